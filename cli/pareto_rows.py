"""The front as rows of plain values, and the table that shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import Column, Table, milliseconds, number, quantity
from .what_if_rows import written_survival

if TYPE_CHECKING:
    from ..placement.problem import Problem
    from ..solvers.pareto import Front

COLUMNS = (
    Column("point", "plan", right=False),
    Column("best", "", lambda best: "*" if best else "", right=False),
    Column("redundant_slots", "redundant\nslots"),
    Column("device_memory_max", "memory\na device", quantity("B")),
    Column("bytes_moved", "to move", quantity("B")),
    Column("survives", "survives single failures", written_survival, right=False),
    Column("step_seconds_mean", "step ms\nmean", milliseconds),
    Column("step_seconds_p99", "step ms\np99", milliseconds),
    Column("risk_seconds", "judged by\nms", milliseconds),
    Column("ratio", "to the\nfastest", number(3)),
    Column("stored_as", "stored as", right=False),
)


def pareto_data(front: Front, problem: Problem, files: Sequence[Path], stored: Sequence[str]) -> dict[str, Any]:
    """The front as JSON has it. files, stored: where each point's plan went, empty when nowhere."""
    fastest = min((point.seconds for point in front.points), default=0.0)
    points = [
        {
            "point": point.name,
            "best": bool(front.best[i]),
            "redundant_slots": point.redundant,
            "slots": point.plan.num_slots,
            "tolerate": None if point.wish is None else point.wish.tolerate,
            "max_moved_bytes": None if point.wish is None else point.wish.max_moved,
            "survives": {
                kind: {"survived": point.survived[kind], "of": total} for kind, total in front.failures.items()
            },
            "bytes_moved": None if point.migration is None else point.migration.bytes_moved,
            "migration_seconds": None if point.migration is None else point.migration.seconds,
            "risk_seconds": point.seconds,
            "ratio": point.seconds / fastest,
            **point.evaluation.summary(),
            "solver": point.plan.provenance.solver,
            "stop": point.plan.provenance.stop,
            "fingerprint": point.plan.fingerprint,
            "file": str(files[i]) if files else None,
            "stored_as": stored[i] if stored else None,
        }
        for i, point in enumerate(front.points)
    ]
    return {
        "model": problem.model.model_dump(mode="json"),
        "topology": {
            "name": problem.topology.name,
            "nodes": problem.topology.num_nodes,
            "devices": problem.num_devices,
        },
        "objective": problem.objective.model_dump(mode="json"),
        "points": points,
        "refused": [{"point": wish.name, "reason": reason} for wish, reason in front.refused],
        "interrupted": front.interrupted,
    }


def pareto_columns(data: Mapping[str, Any]) -> list[Column]:
    """The columns that say something about these points, their name first."""
    points = data["points"]
    hidden = {key for key in ("bytes_moved", "stored_as") if all(point[key] is None for point in points)}
    hidden |= {"risk_seconds"} if data["objective"]["risk"] in ("mean", "regret") else set()
    return [column for column in COLUMNS if column.key not in hidden]


def pareto_notes(data: Mapping[str, Any]) -> list[str]:
    """What is marked, and which wishes have no plan."""
    moved = "bytes moved, " if any(point["bytes_moved"] is not None for point in data["points"]) else ""
    return [
        f"* no other plan here is at least as good in everything: step time, redundant slots, {moved}device failures "
        "survived, node failures survived.",
        *(f"{refused['point']}: no plan. {refused['reason']}" for refused in data["refused"]),
    ]


def pareto_table(data: Mapping[str, Any], described: str) -> Table:
    """A line a point."""
    return Table(pareto_columns(data), data["points"], footnotes=(*pareto_notes(data), described))
