"""The table that shows what changes do to a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .output import Column, Table, milliseconds, number, percent, quantity


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


COLUMNS = (
    Column("change", "change", right=False),
    Column("survives", "every expert\nsurvives", _yes),
    Column("experts_lost", "experts\nlost"),
    Column("lost_load", "their\ntokens", percent),
    Column("degraded_ms", "as is\nms", milliseconds),
    Column("repaired_ms", "repaired\nms", milliseconds),
    Column("repaired_bytes", "to load", quantity("B")),
    Column("slots", "slots"),
    Column("extra_slots", "more on\nsurvivors"),
    Column("ready_ms", "ready\nms", milliseconds),
    Column("ratio", "to\nnow", number(3)),
    Column("ready_moved", "to move", quantity("B")),
    Column("ready_loaded", "to load", quantity("B")),
    Column("ready_survives", "survives\nthen", right=False),
)


def written_survival(counts: Mapping[str, Mapping[str, int]]) -> str:
    """`devices 3/8, nodes 0/2`."""
    return ", ".join(f"{kind}s {count['survived']}/{count['of']}" for kind, count in counts.items() if count["of"])


def what_if_table(data: Mapping[str, Any], described: str) -> Table:
    """A line a change, and what to read out of them."""
    rows = [_shown(row) for row in data["changes"]]
    used = [c for c in COLUMNS if c.key in ("change", "survives") or any(row.get(c.key) is not None for row in rows)]
    now = f"Now: {data['now']['step_seconds_mean'] * 1e3:.3f} ms in {data['slots']} slots a layer"
    counts = written_survival(data["survives"])
    notes = [f"{now}; single failures in which every expert survives: {counts or 'none, there is one device'}."]
    if any(row["extra_slots"] for row in data["changes"]):
        notes.append("Where survivors need more slots than they have, engines must be started with those.")
    notes += [f"{row['change']}: no ready plan. {row['reason']}" for row in data["changes"] if row["reason"]]
    return Table(used, rows, footnotes=(*notes, described))


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    degraded, repaired, ready = row["degraded"] or {}, row["repaired"] or {}, row["ready"] or {}
    return {
        "change": row["change"],
        "survives": row["survives"],
        "experts_lost": row["experts_lost"],
        "lost_load": row["lost_load"],
        "degraded_ms": degraded.get("step_seconds_mean"),
        "repaired_ms": repaired.get("step_seconds_mean"),
        "repaired_bytes": repaired.get("bytes_reloaded"),
        "slots": ready.get("slots"),
        "extra_slots": row["extra_slots"] or None,
        "ready_ms": ready.get("step_seconds_mean"),
        "ratio": ready.get("ratio"),
        "ready_moved": ready.get("bytes_moved"),
        "ready_loaded": ready.get("bytes_reloaded"),
        "ready_survives": written_survival(ready["survives"]) if ready else None,
    }
