"""A decision: a stored plan against the one in force, on the newest routing."""

from __future__ import annotations

import numpy as np

from ...db.service_records import ClaimedJob, Judgement, Outcome
from ...db.store import Store
from ...placement.decide import Decision, decide
from ...placement.decide_counts import LEAST_BLOCKS, decide_on_counts
from ...placement.errors import InputError
from ...placement.load_windows import with_tokens
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from ...placement.problem import Problem
from ...placement.statistics import RoutingStatistics
from ...placement.topology import Topology
from ...solvers import solve
from ..policy import Policy
from ..routing import from_windows
from .base import Report
from .figures import decision_figures, problem_of
from .split import judging_trace, judging_windows


class Judge:
    """Request: candidate (a plan's id), current (another plan to judge against, or null), routing, record."""

    kind = "decide"

    def run(self, job: ClaimedJob, store: Store, report: Report) -> Outcome:
        request = job.request
        if job.deployment is None:
            raise InputError("a decision is made for a deployment")
        deployment = store.deployments.get(job.deployment)
        policy = Policy(**deployment.policy)
        candidate = store.plan(request["candidate"]).plan
        model, topology = store.model(deployment.model_id).spec, store.topology(deployment.topology_id).topology
        if candidate.model != model or candidate.topology != topology:
            raise InputError(f"plan {request['candidate']!r} is for another model or topology than {job.deployment!r}")
        in_force = request["current"] or deployment.plan_id
        current = store.plan(in_force).plan if in_force else default_plan(model, topology)
        if request["routing"] == "tokens":
            trace = judging_trace(store, job.deployment)
            problem = Problem(model, topology, RoutingStatistics.from_trace(trace, 0), policy.objective)
            decision = decide(
                current,
                [candidate],
                trace,
                problem,
                concurrency=policy.step_tokens,
                confidence=policy.confidence,
                horizon_steps=policy.horizon_steps,
            )
        else:
            held = from_windows(judging_windows(store, job.deployment, policy), model)
            decision = on_counts(current, candidate, held, policy)
        figures = decision_figures(decision)
        judgement = None
        if request["record"] and request["current"] is None:
            judgement = Judgement(
                deployment.version, decision.action, decision.reason, figures, policy.publish == "automatic"
            )
        result = {"action": decision.action, "reason": decision.reason, "figures": figures}
        return Outcome(result, plan=candidate if judgement else None, judgement=judgement)


def on_counts(current: Plan, candidate: Plan, held: RoutingStatistics, policy: Policy) -> Decision:
    """The decision on held-out windows, as the policy wants it; on shorter blocks where there are few windows."""
    problem = problem_of(candidate, held, policy.objective)
    return decide_on_counts(
        current,
        [candidate],
        held.load,
        problem,
        step_tokens=policy.step_tokens,
        block=max(1, min(policy.block, int(with_tokens(held.load).sum()) // LEAST_BLOCKS)),
        confidence=policy.confidence,
        horizon_steps=policy.horizon_steps,
    )


def default_plan(model: ModelSpec, topology: Topology) -> Plan:
    """What engines do without a plan: experts in index order."""
    flat = RoutingStatistics.from_counts(np.ones((model.layers, model.experts)), model.moe_layers, model.top_k)
    return solve(Problem(model, topology, flat), "contiguous")
