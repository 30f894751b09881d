"""Decisions and plans as plain figures."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from ...placement.decide import Decision
from ...placement.load_bound import device_load_certificate
from ...placement.objective import Objective
from ...placement.plan import Plan
from ...placement.problem import Problem
from ...placement.statistics import RoutingStatistics


def problem_of(plan: Plan, statistics: RoutingStatistics, objective: Objective) -> Problem:
    """The problem that this plan is one answer to, on other routing than it was solved on."""
    return Problem(plan.model, plan.topology, statistics, objective, device_slots=plan.slots_per_device.tolist())


def balance(plan: Plan, statistics: RoutingStatistics) -> dict[str, float]:
    """Device load max/mean of a plan on this routing, with the proven bound and the gap."""
    problem = problem_of(plan, statistics, Objective())
    found = device_load_certificate(problem, plan.physical_to_logical, plan.shares)
    return {"load_max_mean": found.value, "bound": found.bound or 0.0, "gap": found.gap or 0.0}


def decision_figures(decision: Decision) -> dict[str, Any]:
    """A decision on one candidate as plain data; what is infinite is null."""
    verdict = decision.verdicts[0]
    figures: dict[str, Any] = {
        name: value for name, value in asdict(verdict).items() if isinstance(value, float) and name != "migration"
    }
    moved = verdict.migration
    figures |= {
        "moves": moved.moves,
        "bytes_moved": moved.bytes_moved,
        "migration_seconds": moved.seconds,
        "confidence": decision.confidence,
        "horizon_steps": decision.horizon_steps,
    }
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
    }
