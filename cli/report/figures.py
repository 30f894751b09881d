"""What a figure of the report is: charts, beside each other or to choose from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """A chart as SVG, and what stands above it."""

    heading: str
    chart: str


@dataclass(frozen=True)
class Choice:
    """Panels that are shown together, and what a selector calls them."""

    label: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Figure:
    """key: its element's id. caption: what to look for. choices: one, or several under a selector with this label; the
    first is shown."""

    key: str
    title: str
    caption: str
    choices: tuple[Choice, ...]
    choice_label: str = ""


def single(key: str, title: str, caption: str, *panels: Panel) -> Figure:
    """A figure without a selector."""
    return Figure(key, title, caption, (Choice("", panels),))
