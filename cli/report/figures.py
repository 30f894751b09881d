"""Plots of the report: colours for both themes, axes, what a plot is, and heat maps in pairs, before and after."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

Scale = tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Theme:
    """Colours; the page has the same in its style sheet. text, muted, rule: type, secondary type, hairlines. paper: the
    ground that plots stand on. before, after: the two plans that matter. others: the rest, in turn. parts: parts of a
    whole. diverging: around a middle that recedes. sequential: from the ground up."""

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


@dataclass(frozen=True)
class TraceChoice:
    """An entry of a plot's selector: its label, and the traces it shows."""

    label: str
    traces: tuple[int, ...]


@dataclass(frozen=True)
class Figure:
    """A plot as the page needs it: data once, a layout for each theme. key: its element's id. caption: what to look
    for. data, layouts: Plotly's, by theme name."""

    key: str
    title: str
    caption: str
    data: list[dict[str, Any]]
    layouts: dict[str, dict[str, Any]]
    choices: tuple[TraceChoice, ...] = ()
    choice_label: str = ""


def make_figure(
    key: str,
    title: str,
    caption: str,
    traces: Sequence[Any],
    layout: Callable[[Theme], dict[str, Any]],
    choices: Sequence[TraceChoice] = (),
    choice_label: str = "",
) -> Figure:
    """Checks traces and layouts against Plotly's schema, and packs arrays. With choices, the first is shown."""
    import plotly.graph_objects as go

    if choices:
        for index, trace in enumerate(traces):
            trace.visible = index in choices[0].traces
    drawn = go.Figure(data=list(traces), layout=layout(THEMES[0]))
    plain = json.loads(drawn.to_json())
    layouts = {theme.name: json.loads(go.Figure(layout=layout(theme)).to_json())["layout"] for theme in THEMES}
    return Figure(key, title, caption, plain["data"], layouts, tuple(choices), choice_label)


GAP = 0.05
DOMAINS = ((0.0, 0.5 - GAP / 2), (0.5 + GAP / 2, 1.0))


def paired_layout(
    theme: Theme,
    headings: tuple[str, str],
    x_title: str,
    y_title: str,
    height: int,
    coloraxis: dict[str, Any],
    x: dict[str, Any] | None = None,
    y: dict[str, Any] | None = None,
    square: bool = False,
    shapes: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The layout of traces on (x, y) and (x2, y2) that share their vertical axis and `coloraxis`.

    x, y: more settings of the axes of both panels. square: cells as high as wide.
    """
    plain: dict[str, Any] = {"showgrid": False, "ticks": ""}
    result = base_layout(theme, height) | {
        "annotations": [heading(theme, text, domain[0]) for text, domain in zip(headings, DOMAINS, strict=True)],
        "coloraxis": coloraxis,
        "shapes": shapes or [],
    }
    for number, domain in enumerate(DOMAINS):
        suffix = "" if number == 0 else "2"
        horizontal = {"domain": domain, "constrain": "domain", "anchor": f"y{suffix}"}
        vertical = {"autorange": "reversed", "anchor": f"x{suffix}"}
        if square:
            vertical |= {"scaleanchor": f"x{suffix}", "constrain": "domain", "constraintoward": "top"}
        hidden = {} if number == 0 else {"showticklabels": False}
        result[f"xaxis{suffix}"] = axis(theme, x_title, **(plain | horizontal | (x or {})))
        result[f"yaxis{suffix}"] = axis(theme, "" if number else y_title, **(plain | vertical | (y or {}) | hidden))
    return result


def boundaries(theme: Theme, positions: list[float], low: float, high: float, both: bool) -> list[dict[str, Any]]:
    """Thin lines at positions of the vertical axis of both panels, and with `both` of the horizontal axis too.

    low, high: the extent of the other axis.
    """
    line = {"color": theme.muted, "width": 0.7}
    shapes: list[dict[str, Any]] = []
    for suffix in ("", "2"):
        refs = {"type": "line", "xref": f"x{suffix}", "yref": f"y{suffix}", "line": line}
        for at in positions:
            shapes.append({**refs, "x0": low, "x1": high, "y0": at, "y1": at})
            if both:
                shapes.append({**refs, "x0": at, "x1": at, "y0": low, "y1": high})
    return shapes
