"""Studies: what failures or another cluster would do to a plan, and the front of step time against its price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...db.content import id_of_plan
from ...db.records import ClaimedJob, JobOutcome
from ...db.store import Store
from ...placement.errors import InputError, UnsupportedError
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from ...placement.problem import Problem
from ...placement.statistics import RoutingStatistics
from ...placement.steps import Steps
from ...placement.synthetic import sample_steps
from ...placement.topology import Topology
from ...placement.trace import RoutingTrace
from ...solvers.pareto import pareto
from ...solvers.what_if import Change, parse_changes, what_if
from ...solvers.what_if import Outcome as Changed
from ..policy import Policy
from ..routing import (
    from_windows,
    judging_trace,
    judging_windows,
    solving_traces,
    solving_windows,
    stored_statistics,
    to_bytes,
)
from ..schemas import ChangesRequest, ParetoJob, StudyJob, WhatIfJob
from .base import Report, steps_of
from .decide import default_plan

DECODE_STEPS, PREFILL_STEPS, DRAWN_STEPS = 200, 32, 16


@dataclass(frozen=True, eq=False)
class RoutingSplit:
    """What a study solves on and what it is replayed on. statistics: for solvers. steps: held out of them. described:
    what the steps are, in words."""

    statistics: RoutingStatistics
    steps: Steps
    described: str

    def outcome(self, data: Mapping[str, Any], plans: Sequence[Plan]) -> JobOutcome:
        """What a study on it leaves behind: its figures, its plans, and what they were solved on."""
        return JobOutcome(
            {**data, "steps": self.described},
            plans=tuple(plans),
            statistics=self.statistics,
            content=to_bytes(self.statistics),
        )


def split_routing(request: StudyJob, store: Store, model: ModelSpec) -> RoutingSplit:
    """Stored statistics and the sample held out of them, or a deployment's routing and the newest of it.

    Raises:
        InputError: too little is recorded. UnsupportedError: counts do not tell what is asked.
    """
    if request.statistics is not None and request.held_out is not None:
        sample = stored_statistics(store, request.held_out).require_sample()
        return RoutingSplit(stored_statistics(store, request.statistics), *_replayed(sample, request))
    if request.deployment is None:
        raise InputError("a study needs a deployment, or statistics and held_out")
    policy = Policy(**store.deployments.get(request.deployment).policy)
    if request.routing == "tokens":
        trace = judging_trace(store, request.deployment)
        return RoutingSplit(solving_traces(store, request.deployment, policy), *_replayed(trace, request))
    if request.objective.execution == "context_coherent":
        raise UnsupportedError("context-coherent step times depend on transitions, counts tell of none; upload traces")
    windows = judging_windows(store, request.deployment, policy)
    if not windows:
        raise InputError("there are too few count windows to hold some out to judge on; send more to the deployment")
    known = from_windows(solving_windows(store, request.deployment, policy, request.windows), model)
    tokens = request.steps.tokens or policy.step_tokens
    count = request.steps.count or DRAWN_STEPS
    load = from_windows(windows, model).load
    steps = sample_steps(load, model.top_k, model.moe_layers, step_tokens=tokens, steps=count, seed=request.seed)
    return RoutingSplit(
        known, steps, f"{count} steps of {tokens} tokens drawn from the newest {len(windows)} count windows"
    )


def _replayed(trace: RoutingTrace, request: StudyJob) -> tuple[Steps, str]:
    tokens, count, seed = request.steps.tokens, request.steps.count, request.seed
    if request.steps.batch == "prefill":
        count = count or PREFILL_STEPS
        return trace.prefill_steps(tokens or 4096, count, seed), f"prefill {tokens or 4096}: {count} steps, held out"
    count = count or DECODE_STEPS
    return trace.decode_steps(tokens or 128, count, seed), f"decode {tokens or 128}: {count} steps, held out"


class ParetoTask:
    """Request: a `ParetoJob`."""

    kind = "pareto"

    def run(self, job: ClaimedJob, store: Store, report: Report) -> JobOutcome:
        request = ParetoJob.of(job)
        model, topology = store.model(request.model).spec, store.topology(request.topology).topology
        split = split_routing(request, store, model)
        problem = Problem(model, topology, split.statistics, request.objective, engine=request.engine)
        front = pareto(
            problem,
            split.steps,
            redundant=request.redundant,
            tolerate=request.tolerate,
            current=None if request.current is None else store.plan(request.current).plan,
            max_moved=request.max_moved,
            solver=request.solver,
            seconds=request.seconds,
            seed=request.seed,
            options=request.options,
            progress=steps_of(report),
        )
        plans = [point.plan for point in front.points]
        data = front.to_dict(stored=[id_of_plan(plan) for plan in plans])
        return split.outcome(data, plans)


class WhatIfTask:
    """Request: a `WhatIfJob`."""

    kind = "what-if"

    def run(self, job: ClaimedJob, store: Store, report: Report) -> JobOutcome:
        request = WhatIfJob.of(job)
        plan = _asked_plan(request, store)
        split = split_routing(request, store, plan.model)
        problem = Problem(plan.model, plan.topology, split.statistics, request.objective, engine=request.engine)
        result = what_if(
            plan,
            problem,
            split.steps,
            changes_of(plan.topology, request.changes, store),
            ready=request.ready,
            max_moved_bytes=request.max_moved_bytes,
            keep_ranks=request.changes.keep_ranks,
            solver=request.solver,
            seconds=request.seconds,
            seed=request.seed,
            options=request.options,
            progress=steps_of(report),
        )
        kept: list[Plan] = []

        def about(_: Changed, kind: str, found: Plan) -> dict[str, Any]:
            kept.append(found)
            return {"stored_as": id_of_plan(found)}

        return split.outcome(result.to_dict(about), kept)


def _asked_plan(request: WhatIfJob, store: Store) -> Plan:
    """The plan of a request, or experts in index order where a deployment has none in force."""
    if request.plan is not None:
        return store.plan(request.plan).plan
    if request.deployment is None:
        raise InputError("plan: name the plan to ask about, or a deployment")
    deployment = store.deployments.get(request.deployment)
    return default_plan(store.model(deployment.model_id).spec, store.topology(deployment.topology_id).topology)


def changes_of(cluster: Topology, changes: ChangesRequest, store: Store) -> list[Change]:
    """The changes of a request, whose topology is a stored one.

    Raises:
        InputError: as `parse_changes`.
    """
    other = None if changes.topology is None else store.topology(changes.topology).topology
    asked = changes.model_dump(exclude={"keep_ranks"})
    return parse_changes(cluster, **{**asked, "topology": other})
