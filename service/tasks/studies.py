"""Jobs that solve: a plan for a deployment's routing or for stored statistics, and studies: what failures or another
cluster would do to a plan, and the front of step time against its price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...db.records import ClaimedJob, JobOutcome
from ...db.references import id_of_plan
from ...db.store import Store
from ...placement.errors import InputError, UnsupportedError
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from ...placement.problem import Problem
from ...placement.statistics import RoutingStatistics
from ...placement.step_mix import problem_steps, step_mix
from ...placement.steps import Batch, Steps
from ...placement.topology import Topology
from ...placement.trace import RoutingTrace
from ...solvers import solve
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
from ..schemas import ChangesRequest, ParetoJob, SolveJob, StudyJob, WhatIfJob
from . import Report, steps_of
from .decide import default_plan


class SolveTask:
    """Request: a `SolveJob`."""

    kind = "solve"

    def run(self, job: ClaimedJob, store: Store, report: Report) -> JobOutcome:
        request = SolveJob.of(job)
        model, topology = store.model(request.model).spec, store.topology(request.topology).topology
        statistics = _routing(request, store, model)
        plan = solve(
            Problem(
                model,
                topology,
                statistics,
                request.objective,
                slots=request.slots,
                engine=request.engine,
                batches=request.batches,
            ),
            request.solver,
            seconds=request.seconds,
            seed=request.seed,
            progress=report,
            **request.options,
        )
        certificate = plan.certificate
        result = {
            "value": certificate.value if certificate else None,
            "bound": plan.bound,
            "gap": plan.gap,
            "objective": certificate.objective if certificate else None,
            "seconds": plan.provenance.seconds,
            "stop": plan.provenance.stop,
        }
        return JobOutcome(result, plan=plan, statistics=statistics, content=to_bytes(statistics))


def _routing(request: SolveJob, store: Store, model: ModelSpec) -> RoutingStatistics:
    if request.statistics is not None:
        return stored_statistics(store, request.statistics)
    if request.deployment is None:
        raise InputError("a solve needs a deployment or statistics")
    policy = Policy(**store.deployments.get(request.deployment).policy)
    if request.routing == "tokens":
        return solving_traces(store, request.deployment, policy)
    return from_windows(solving_windows(store, request.deployment, policy, request.windows), model)


@dataclass(frozen=True, eq=False)
class RoutingSplit:
    """What a study solves on, and what is held out of it. described: what that is, in words. batches: that were
    named."""

    statistics: RoutingStatistics
    held_out: RoutingTrace | RoutingStatistics
    described: str
    batches: tuple[Batch, ...]

    def steps(self, problem: Problem, request: StudyJob) -> Steps:
        """The held-out steps to replay."""
        return problem_steps(self.held_out, problem, count=request.steps.count, seed=request.seed)

    def outcome(self, data: Mapping[str, Any], plans: Sequence[Plan], problem: Problem, steps: Steps) -> JobOutcome:
        """What a study on it leaves behind: its figures, its plans, and what they were solved on."""
        mix = step_mix(problem)
        described = f"{' and '.join(steps.batches)}: {steps.num_steps} steps, {self.described}"
        return JobOutcome(
            {"batches": mix.to_dict(), **data, "steps": described},
            plans=tuple(plans),
            statistics=self.statistics,
            content=to_bytes(self.statistics),
        )


def split_routing(request: StudyJob, store: Store, model: ModelSpec) -> RoutingSplit:
    """Stored statistics and the sample held out of them, or a deployment's routing and the newest of it.

    Raises:
        InputError: too little is recorded. UnsupportedError: counts do not tell what is asked.
    """
    named = request.steps.named
    if request.statistics is not None and request.held_out is not None:
        sample = stored_statistics(store, request.held_out).require_sample()
        return RoutingSplit(stored_statistics(store, request.statistics), sample, "held out", named)
    if request.deployment is None:
        raise InputError("a study needs a deployment, or statistics and held_out")
    policy = Policy(**store.deployments.get(request.deployment).policy)
    named = named or policy.asked
    if request.routing == "tokens":
        trace = judging_trace(store, request.deployment)
        return RoutingSplit(solving_traces(store, request.deployment, policy), trace, "held out", named)
    if request.objective.execution == "context_coherent":
        raise UnsupportedError("context-coherent step times depend on transitions, counts tell of none; upload traces")
    windows = judging_windows(store, request.deployment, policy)
    if not windows:
        raise InputError("there are too few count windows to hold some out to judge on; send more to the deployment")
    known = from_windows(solving_windows(store, request.deployment, policy, request.windows), model)
    newest = from_windows(windows, model)
    return RoutingSplit(known, newest, f"drawn from the newest {len(windows)} count windows", named)


class ParetoTask:
    """Request: a `ParetoJob`."""

    kind = "pareto"

    def run(self, job: ClaimedJob, store: Store, report: Report) -> JobOutcome:
        request = ParetoJob.of(job)
        model, topology = store.model(request.model).spec, store.topology(request.topology).topology
        split = split_routing(request, store, model)
        problem = Problem(
            model, topology, split.statistics, request.objective, engine=request.engine, batches=split.batches
        )
        steps = split.steps(problem, request)
        front = pareto(
            problem,
            steps,
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
        return split.outcome(data, plans, problem, steps)


class WhatIfTask:
    """Request: a `WhatIfJob`."""

    kind = "what-if"

    def run(self, job: ClaimedJob, store: Store, report: Report) -> JobOutcome:
        request = WhatIfJob.of(job)
        plan = _asked_plan(request, store)
        split = split_routing(request, store, plan.model)
        problem = Problem(
            plan.model, plan.topology, split.statistics, request.objective, engine=request.engine, batches=split.batches
        )
        steps = split.steps(problem, request)
        result = what_if(
            plan,
            problem,
            steps,
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
        ready: list[Plan] = []

        def about(_: Changed, kind: str, made: Plan) -> dict[str, Any]:
            ready.append(made)
            return {"stored_as": id_of_plan(made)}

        return split.outcome(result.to_dict(about), ready, problem, steps)


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
