"""Colours of the page's plots, for light and dark; the page itself has the same in its style sheet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

Scale = tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Theme:
    """text, muted, rule: type, secondary type, hairlines. paper: the ground that plots stand on. before, after: the
    two plans that matter. others: the rest, in turn. parts: parts of a whole. diverging: around a middle that recedes.
    sequential: from the ground up."""

    name: str
    text: str
    muted: str
    rule: str
    paper: str
    before: str
    after: str
    others: tuple[str, ...]
    parts: tuple[str, ...]
    diverging: Scale
    sequential: Scale


LIGHT = Theme(
    name="light",
    text="#1f2328",
    muted="#636c76",
    rule="#e3e6ea",
    paper="#ffffff",
    before="#8b939e",
    after="#0b62c4",
    others=("#b5762a", "#3f8f7b", "#8a63b0", "#b0566f", "#7d8a3c", "#4f86a8", "#a1683a", "#6c6fb3"),
    parts=("#3d7dc8", "#b9c2cd", "#8895a5"),
    diverging=((0.0, "#2c6ea8"), (0.25, "#93bbda"), (0.5, "#f4f4f2"), (0.75, "#eba37c"), (1.0, "#b5441a")),
    sequential=((0.0, "#f7f8fa"), (0.15, "#d5e3f3"), (0.4, "#8db8e2"), (0.7, "#3d7dc8"), (1.0, "#0d3a78")),
)
DARK = Theme(
    name="dark",
    text="#e4e7eb",
    muted="#98a1ad",
    rule="#2d333b",
    paper="#14171b",
    before="#8b939e",
    after="#61a8f5",
    others=("#d29a52", "#62b7a1", "#b18ad6", "#d37d95", "#a4b25c", "#76abcc", "#c58f61", "#9497d8"),
    parts=("#4c8fdd", "#3d4652", "#667180"),
    diverging=((0.0, "#5aa3dd"), (0.25, "#31587a"), (0.5, "#22262c"), (0.75, "#8a4a2a"), (1.0, "#f0834d")),
    sequential=((0.0, "#1a1e23"), (0.15, "#1c3350"), (0.4, "#2b5f9b"), (0.7, "#579bdf"), (1.0, "#d8eaff")),
)
THEMES = (LIGHT, DARK)


def base_layout(theme: Theme, height: int) -> dict[str, Any]:
    """What every plot shares: no ground of its own, quiet axes, room for titles."""
    return {
        "template": "none",
        "height": height,
        "autosize": True,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": theme.muted},
        "margin": {"l": 64, "r": 16, "t": 36, "b": 52},
        "hoverlabel": {
            "bgcolor": theme.paper,
            "bordercolor": theme.rule,
            "font": {"color": theme.text, "family": FONT, "size": 12},
        },
        "dragmode": False,
    }


def axis(theme: Theme, title: str, **more: Any) -> dict[str, Any]:
    """An axis with its title and unit."""
    return {
        "title": {"text": title, "font": {"size": 12, "color": theme.muted}, "standoff": 10},
        "color": theme.muted,
        "gridcolor": theme.rule,
        "linecolor": theme.rule,
        "tickcolor": theme.rule,
        "zeroline": False,
        "fixedrange": True,
        **more,
    }


def heading(theme: Theme, text: str, x: float) -> dict[str, Any]:
    """A panel's name above its left edge; x in shares of the plot's width."""
    return {
        "text": text,
        "x": x,
        "y": 1.0,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "yshift": 8,
        "showarrow": False,
        "font": {"size": 13, "color": theme.text},
    }


def colour_axis(theme: Theme, scale: Scale, title: str, **more: Any) -> dict[str, Any]:
    """A shared colour scale with its bar at the right."""
    bar = {
        "title": {"text": f"{title}<br> ", "side": "top", "font": {"size": 11, "color": theme.muted}},
        "thickness": 10,
        "outlinewidth": 0,
        "len": 1.0,
        "x": 1.0,
        "xpad": 14,
        "tickfont": {"size": 11, "color": theme.muted},
        "ticks": "",
        **more.pop("colorbar", {}),
    }
    return {"colorscale": [list(stop) for stop in scale], "colorbar": bar, **more}
