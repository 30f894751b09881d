"""The table that shows a front."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .output import Column, Table, milliseconds, number, quantity
from .what_if_rows import written_survival

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
