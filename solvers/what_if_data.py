"""What changes do to a plan, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..placement.failures import KINDS, single_failures, survives
from ..placement.plan import Plan
from .what_if import Judged, Outcome, WhatIf

Survival = dict[str, dict[str, int]]
About = Callable[[Outcome, str, Plan], Mapping[str, Any]]
"""What else to tell of a plan, given the outcome it belongs to and its kind, "ready" or "repaired"."""


def survival(plan: Plan) -> Survival:
    """Of the single device and node failures, how many leave every expert a replica."""
    result: Survival = {}
    for kind in KINDS:
        kept = survives(plan, single_failures(plan.topology, (kind,)))
        result[kind] = {"survived": int(kept.sum()), "of": len(kept)}
    return result


def what_if_data(plan: Plan, result: WhatIf, about: About) -> dict[str, Any]:
    """The outcomes as JSON has them."""
    return {
        "plan": plan.fingerprint,
        "slots": plan.num_slots,
        "survives": survival(plan),
        "now": result.before.summary(),
        "interrupted": result.interrupted,
        "changes": [_row(plan, outcome, result, about) for outcome in result.outcomes],
    }


def _row(plan: Plan, outcome: Outcome, result: WhatIf, about: About) -> dict[str, Any]:
    change = outcome.change
    return {
        "change": change.name,
        "devices": change.topology.num_devices,
        "nodes": change.topology.num_nodes,
        "survives": outcome.survives,
        "experts_lost": int(outcome.lost.sum()),
        "lost": {
            str(layer): row.nonzero()[0].tolist()
            for layer, row in zip(plan.moe_layers, outcome.lost, strict=True)
            if row.any()
        },
        "lost_load": outcome.lost_load,
        "degraded": _judged(outcome.degraded, result),
        "repaired": _judged(outcome.repaired, result, outcome, "repaired", about),
        "ready": _judged(outcome.ready, result, outcome, "ready", about),
        "extra_slots": outcome.extra_slots,
        "reason": outcome.reason or None,
    }


def _judged(
    judged: Judged | None, result: WhatIf, outcome: Outcome | None = None, kind: str = "", about: About | None = None
) -> dict[str, Any] | None:
    if judged is None:
        return None
    more = {} if outcome is None or about is None else about(outcome, kind, judged.plan)
    return {
        **judged.evaluation.summary(),
        "ratio": float(judged.evaluation.step_seconds.mean() / result.before.step_seconds.mean()),
        "slots": judged.plan.num_slots,
        "device_slots": judged.plan.slots_per_device.max(axis=0).tolist(),
        "moves": judged.migration.moves,
        "bytes_moved": judged.migration.bytes_moved,
        "bytes_reloaded": judged.migration.bytes_reloaded,
        "migration_seconds": judged.migration.seconds,
        "survives": survival(judged.plan),
        "stop": judged.plan.provenance.stop,
        "fingerprint": judged.plan.fingerprint,
        **more,
    }
