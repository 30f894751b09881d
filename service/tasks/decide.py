"""A decision: a stored plan against the one in force, on the newest routing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ...db.records import ClaimedJob, JobOutcome, Judgement
from ...db.store import Store
from ...placement.bounds import device_load_certificate
from ...placement.decide import Decision, count_block, decide, decide_on_counts
from ...placement.errors import InputError
from ...placement.model import ModelSpec
from ...placement.objective import Objective
from ...placement.plan import Plan
from ...placement.problem import Problem
from ...placement.statistics import RoutingStatistics
from ...placement.steps import Batch
from ...placement.topology import Topology
from ...solvers import solve
from ..policy import Policy
from ..routing import from_windows, judging_trace, judging_windows
from ..schemas import DecideRequest
from . import Report

# Decisions and plans as plain figures.


def problem_of(
    plan: Plan,
    statistics: RoutingStatistics,
    objective: Objective,
    engine: str | None = None,
    batches: Sequence[Batch] = (),
) -> Problem:
    """The problem that this plan is one answer to, on other routing than it was solved on."""
    slots = plan.slots_per_device.tolist()
    return Problem(plan.model, plan.topology, statistics, objective, device_slots=slots, engine=engine, batches=batches)


def balance(plan: Plan, statistics: RoutingStatistics) -> dict[str, float]:
    """Device load max/mean of a plan on this routing, with the proven bound and the gap."""
    problem = problem_of(plan, statistics, Objective())
    certificate = device_load_certificate(problem, plan.physical_to_logical, plan.shares)
    return {"load_max_mean": certificate.value, "bound": certificate.bound or 0.0, "gap": certificate.gap or 0.0}


def decision_figures(decision: Decision) -> dict[str, Any]:
    """A decision on one candidate as plain data; what is infinite is null."""
    verdict = decision.verdicts[0]
    figures: dict[str, Any] = {
        name: value
        for name, value in asdict(verdict).items()
        if isinstance(value, float | None) and name != "migration"
    }
    moved = verdict.migration
    figures |= {
        "moves": moved.moves,
        "bytes_moved": moved.bytes_moved,
        "migration_seconds": moved.seconds,
        "restart": moved.restart or None,
        "stall_seconds": moved.stall,
        "confidence": decision.confidence,
        "horizon_steps": decision.horizon_steps,
    }
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
    }


class DecideTask:
    """Request: a `DecideRequest`."""

    kind = "decide"

    def run(self, job: ClaimedJob, store: Store, report: Report) -> JobOutcome:
        request = DecideRequest.of(job)
        deployment = store.deployments.get(request.deployment)
        policy = Policy(**deployment.policy)
        candidate = store.plan(request.candidate).plan
        model, topology = store.model(deployment.model_id).spec, store.topology(deployment.topology_id).topology
        if candidate.model != model or not candidate.topology.is_same_cluster(topology):
            raise InputError(f"plan {request.candidate!r} is for another model or topology than {deployment.name!r}")
        in_force = request.current or deployment.plan_id
        current = store.plan(in_force).plan if in_force else default_plan(model, topology)
        if request.routing == "tokens":
            trace = judging_trace(store, deployment.name)
            problem = Problem(
                model,
                topology,
                RoutingStatistics.from_trace(trace, 0),
                policy.objective,
                engine=policy.engine,
                batches=policy.asked,
            )
            decision = decide(
                current,
                [candidate],
                trace,
                problem,
                confidence=policy.confidence,
                horizon_steps=policy.horizon_steps,
                restart_seconds=policy.restart_seconds,
            )
        else:
            newest = from_windows(judging_windows(store, deployment.name, policy), model)
            decision = on_counts(current, candidate, newest, policy)
        figures = decision_figures(decision)
        judgement = None
        if request.record and request.current is None:
            judgement = Judgement(
                deployment.version, decision.action, decision.reason, figures, policy.publish == "automatic"
            )
        result = {"action": decision.action, "reason": decision.reason, "figures": figures}
        return JobOutcome(result, plan=candidate if judgement else None, judgement=judgement)


def on_counts(current: Plan, candidate: Plan, newest: RoutingStatistics, policy: Policy) -> Decision:
    """The decision on held-out windows, as the policy wants it; on shorter blocks where there are few windows."""
    problem = problem_of(candidate, newest, policy.objective, policy.engine, policy.asked)
    return decide_on_counts(
        current,
        [candidate],
        newest.load,
        problem,
        block=count_block(newest.load, policy.block),
        confidence=policy.confidence,
        horizon_steps=policy.horizon_steps,
        restart_seconds=policy.restart_seconds,
    )


def default_plan(model: ModelSpec, topology: Topology) -> Plan:
    """What engines do without a plan: experts in index order."""
    flat = RoutingStatistics.from_counts(np.ones((model.layers, model.experts)), model.moe_layers, model.top_k)
    return solve(Problem(model, topology, flat), "contiguous")
