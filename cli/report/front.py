"""The page of a front: what shorter steps cost in memory, in bytes moved and in failures not survived."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..._display import plural
from ...charts.svg import POINT_KINDS, Mark, scatter
from ...placement.files import write_text
from ..output import milliseconds, quantity
from ..tables import pareto_columns, pareto_notes
from .figures import Figure, Panel, single
from .page import Line, render

if TYPE_CHECKING:
    from ...placement.problem import Problem
    from ...solvers.pareto import Front, Point


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
    write_text(path, render("front.html.j2", figures=page.figures, page=page))


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
        f"devices in {plural(topology.num_nodes, 'node')} ({topology.name}), "
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
    marks = [
        Mark(value(point), point.seconds * 1e3, *POINT_KINDS[_kind(point)], _told(point), bool(best))
        for point, best in zip(front.points, front.best, strict=True)
    ]
    chart = scatter(
        title, x_title, "predicted step time (ms)", marks, more_is_better=more_is_better, width=1130, height=380
    )
    return single(
        key,
        title,
        f"Lower is faster, further {'right survives more' if more_is_better else 'left costs less'}. Large marks are "
        "plans that no other beats in everything; the dotted line is what these two figures alone allow. "
        "The axes do not start at zero.",
        Panel("", chart),
    )


def _kind(point: Point) -> str:
    if point.config is None:
        return "in force"
    return point.config.tolerate or "nothing asked"


def _told(point: Point) -> str:
    survived = ", ".join(f"{count} {kind}" for kind, count in point.survived.items())
    moved = "" if point.migration is None else f"; {quantity('B')(point.bytes_moved)} to move"
    return (
        f"{point.name}: {milliseconds(point.seconds)} ms; {quantity('B')(point.memory)} on the fullest device{moved}"
        f"; survives {survived} failures"
    )
