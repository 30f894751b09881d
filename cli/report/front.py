"""The page of a front: what shorter steps cost in memory, in bytes moved and in failures not survived."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...placement.files import write_text
from ..output import milliseconds, quantity
from ..tables import pareto_columns, pareto_notes
from .build import Line
from .figures import Figure, Theme, axis, base_layout, make_figure
from .page import render

if TYPE_CHECKING:
    from ...placement.problem import Problem
    from ...solvers.pareto import Front, Point

SYMBOLS = {"in force": "x", "nothing asked": "circle", "device": "diamond", "node": "square"}


@dataclass(frozen=True)
class FrontPage:
    """What the page shows; rows of plans that nothing beats are chosen."""

    title: str
    subtitle: str
    figures: list[Figure]
    headings: list[str]
    rows: list[Line]
    remarks: list[str]


def write_front_page(page: FrontPage, path: str | Path) -> None:
    """Renders the page and writes it whole or not at all."""
    write_text(path, render("front.html.j2", page.figures, page=page))


def build_front_page(front: Front, problem: Problem, steps: str, held_out: str) -> FrontPage:
    """Plots of step time over memory, over failures survived, and over bytes moved where a plan is in force."""
    model, topology = problem.model, problem.topology
    data = front.to_dict()
    columns = pareto_columns(data)
    figures = [
        front_figure(
            front,
            "memory",
            "Step time over memory",
            "expert weights on the fullest device (GB)",
            lambda point: point.memory / 1e9,
        ),
        front_figure(
            front,
            "failures",
            "Step time over failures survived",
            f"single failures in which every expert keeps a replica, of {sum(front.failures.values())}",
            lambda point: float(sum(point.survived.values())),
            more_is_better=True,
        ),
    ]
    if any(point.migration is not None for point in front.points):
        figures.append(
            front_figure(
                front,
                "moved",
                "Step time over bytes moved",
                "moved from the plan in force (GB)",
                lambda p: p.bytes_moved / 1e9,
            )
        )
    return FrontPage(
        title=model.name or "Expert placement",
        subtitle=f"{model.layers} MoE layers of {model.experts} experts, top-{model.top_k}, on {topology.num_devices} "
        f"devices in {topology.num_nodes} node{'s' if topology.num_nodes > 1 else ''} ({topology.name}), "
        f"{problem.objective.execution}",
        figures=figures,
        headings=[column.title for column in columns],
        rows=[
            Line(
                row["point"],
                ["\N{EN DASH}" if (v := row.get(c.key)) is None else c.write(v) for c in columns[1:]],
                "",
                row["best"],
            )
            for row in data["points"]
        ],
        remarks=[*pareto_notes(data), f"{steps}. {held_out}. Step times: {data['prediction']}."],
    )


def front_figure(
    front: Front, key: str, title: str, x_title: str, value: Callable[[Point], float], more_is_better: bool = False
) -> Figure:
    """Points of step time over `value`; plans that nothing beats are large, the line joins the fastest for each
    value."""
    import plotly.graph_objects as go

    kinds = [_kind(point) for point in front.points]
    present = [kind for kind in SYMBOLS if kind in kinds]
    traces: list[Any] = []
    for kind in present:
        mine = [i for i, other in enumerate(kinds) if other == kind]
        points = [front.points[i] for i in mine]
        traces.append(
            go.Scatter(
                x=[value(point) for point in points],
                y=[point.seconds * 1e3 for point in points],
                mode="markers",
                name=kind if kind in ("in force", "nothing asked") else f"survive {kind} failures",
                marker={
                    "symbol": SYMBOLS[kind],
                    "size": [11 if front.best[i] else 7 for i in mine],
                    "opacity": [1.0 if front.best[i] else 0.45 for i in mine],
                },
                text=[_hover(point) for point in points],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    x, y = _envelope([(value(point), point.seconds * 1e3) for point in front.points], more_is_better)
    traces.append(
        go.Scatter(x=x, y=y, mode="lines", line={"width": 1, "dash": "dot"}, hoverinfo="skip", showlegend=False)
    )

    def layout(theme: Theme) -> dict[str, Any]:
        colours = {"in force": theme.before, "nothing asked": theme.after, "device": theme.others[0]}
        return base_layout(theme, 380) | {
            "colorway": [*(colours.get(kind, theme.others[1]) for kind in present), theme.muted],
            "xaxis": axis(theme, x_title, showgrid=True, ticks="outside", showline=True),
            "yaxis": axis(theme, "predicted step time (ms)", showgrid=True, ticks=""),
            "legend": {"x": 1.01, "y": 1.0, "font": {"color": theme.text, "size": 12}},
            "hovermode": "closest",
        }

    return make_figure(
        key,
        title,
        f"Lower is faster, further {'right survives more' if more_is_better else 'left costs less'}. Large marks are "
        "plans that no other beats in everything; the dotted line is what these two figures alone allow. "
        "The axes do not start at zero.",
        traces,
        layout,
    )


def _kind(point: Point) -> str:
    if point.config is None:
        return "in force"
    return point.config.tolerate or "nothing asked"


def _hover(point: Point) -> str:
    survived = ", ".join(f"{count} {kind}" for kind, count in point.survived.items())
    moved = "" if point.migration is None else f"<br>{quantity('B')(point.bytes_moved)} to move"
    return (
        f"{point.name}: {milliseconds(point.seconds)} ms<br>{quantity('B')(point.memory)} on the fullest device{moved}"
        f"<br>survives {survived} failures"
    )


def _envelope(pairs: list[tuple[float, float]], more_is_better: bool) -> tuple[list[float], list[float]]:
    """Corners of the staircase that no pair lies below, from the cheapest value on."""
    x: list[float] = []
    y: list[float] = []
    for value, seconds in sorted(pairs, key=lambda pair: (-pair[0] if more_is_better else pair[0], pair[1])):
        if not y or seconds < y[-1]:
            if y:
                x.append(value)
                y.append(y[-1])
            x.append(value)
            y.append(seconds)
    return x, y
