"""What changes do to a plan, as rows of plain values and the table that shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import Column, Table, milliseconds, number, percent, quantity

if TYPE_CHECKING:
    from ..placement.plan import Plan
    from ..solvers.what_if import Judged, Outcome, WhatIf


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


def survival(plan: Plan) -> dict[str, dict[str, int]]:
    """Of the single device and node failures, how many leave every expert a replica."""
    from ..placement.failures import KINDS, single_failures, survives

    result: dict[str, dict[str, int]] = {}
    for kind in KINDS:
        kept = survives(plan, single_failures(plan.topology, (kind,)))
        result[kind] = {"survived": int(kept.sum()), "of": len(kept)}
    return result


def written_survival(counts: Mapping[str, Mapping[str, int]]) -> str:
    """`devices 3/8, nodes 0/2`."""
    return ", ".join(f"{kind}s {count['survived']}/{count['of']}" for kind, count in counts.items() if count["of"])


def what_if_data(plan: Plan, result: WhatIf, files: Mapping[str, Mapping[str, Path]]) -> dict[str, Any]:
    """The outcomes as JSON has them."""
    return {
        "plan": plan.fingerprint,
        "slots": plan.num_slots,
        "survives": survival(plan),
        "now": result.before.summary(),
        "interrupted": result.interrupted,
        "changes": [_row(plan, outcome, result, files.get(outcome.change.name, {})) for outcome in result.outcomes],
    }


def _row(plan: Plan, outcome: Outcome, result: WhatIf, files: Mapping[str, Path]) -> dict[str, Any]:
    change = outcome.change
    return {
        "change": change.name,
        "devices": change.topology.num_devices,
        "nodes": change.topology.num_nodes,
        "survives": outcome.survives,
        "experts_lost": int(outcome.lost.sum()),
        "lost": {
            str(layer): row.nonzero()[0] for layer, row in zip(plan.moe_layers, outcome.lost, strict=True) if row.any()
        },
        "lost_load": outcome.lost_load,
        "degraded": _judged(outcome.degraded, result, None),
        "repaired": _judged(outcome.repaired, result, files.get("repaired")),
        "ready": _judged(outcome.ready, result, files.get("ready")),
        "extra_slots": outcome.extra_slots,
        "reason": outcome.reason or None,
    }


def _judged(judged: Judged | None, result: WhatIf, file: Path | None) -> dict[str, Any] | None:
    if judged is None:
        return None
    return {
        **judged.evaluation.summary(),
        "ratio": float(judged.evaluation.step_seconds.mean() / result.before.step_seconds.mean()),
        "slots": judged.plan.num_slots,
        "device_slots": [int((judged.plan.slot_device == g).sum()) for g in range(judged.plan.topology.num_devices)],
        "moves": judged.migration.moves,
        "bytes_moved": judged.migration.bytes_moved,
        "bytes_reloaded": judged.migration.bytes_reloaded,
        "migration_seconds": judged.migration.seconds,
        "survives": survival(judged.plan),
        "stop": judged.plan.provenance.stop,
        "fingerprint": judged.plan.fingerprint,
        "file": None if file is None else str(file),
    }


def what_if_table(data: Mapping[str, Any], plan: Plan, result: WhatIf, described: str) -> Table:
    """A line a change, and what to read out of them."""
    rows = [_shown(row) for row in data["changes"]]
    used = [c for c in COLUMNS if c.key in ("change", "survives") or any(row.get(c.key) is not None for row in rows)]
    now = f"Now: {data['now']['step_seconds_mean'] * 1e3:.3f} ms in {plan.num_slots} slots a layer"
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
