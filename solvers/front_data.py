"""The front of step time against its price, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..placement.problem import Problem
from .pareto import Front


def front_data(front: Front, problem: Problem, files: Sequence[Path], stored: Sequence[str]) -> dict[str, Any]:
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
