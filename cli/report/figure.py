"""A plot as the page needs it: data once, a layout for each theme, and which traces each choice shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .theme import THEMES, Theme


@dataclass(frozen=True)
class Choice:
    """An entry of a plot's selector: its label, and the traces it shows."""

    label: str
    traces: tuple[int, ...]


@dataclass(frozen=True)
class Figure:
    """key: its element's id. caption: what to look for. data, layouts: Plotly's, by theme name."""

    key: str
    title: str
    caption: str
    data: list[dict[str, Any]]
    layouts: dict[str, dict[str, Any]]
    choices: tuple[Choice, ...] = ()
    choice_label: str = ""


def make_figure(
    key: str,
    title: str,
    caption: str,
    traces: Sequence[Any],
    layout: Callable[[Theme], dict[str, Any]],
    choices: Sequence[Choice] = (),
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
