"""Two heat maps side by side under one colour scale: before and after."""

from __future__ import annotations

from typing import Any

from .theme import Theme, axis, base_layout, heading

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
