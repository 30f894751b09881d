"""What failures, or another cluster, would do to a plan, with plans ready for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...db.content import id_of_plan
from ...db.records import ClaimedJob, Outcome
from ...db.store import Store
from ...placement.errors import InputError, UnsupportedError
from ...placement.model import ModelSpec
from ...placement.objective import Objective
from ...placement.plan import Plan
from ...placement.problem import Problem
from ...placement.statistics import RoutingStatistics
from ...placement.steps import Steps
from ...placement.synthetic import sample_steps
from ...placement.topology import Topology
from ...placement.trace import RoutingTrace
from ...solvers.pareto import front_data, pareto
from ...solvers.what_if import Change, changes_asked, what_if, what_if_data
from ...solvers.what_if import Outcome as Changed
from ..policy import Policy
from ..routing import from_windows, stored_statistics, to_bytes
from .base import Report, judging_trace, judging_windows, solving_traces, solving_windows, steps_of
from .judge import default_plan

# What a plan is solved on and replayed on: a deployment's routing, or stored statistics.


DECODE_STEPS, PREFILL_STEPS, DRAWN_STEPS = 200, 32, 16


@dataclass(frozen=True, eq=False)
class Ground:
    """statistics: for solvers. steps: held out of them. described: what the steps are, in words."""

    statistics: RoutingStatistics
    steps: Steps
    described: str

    def outcome(self, data: Mapping[str, Any], plans: Sequence[Plan]) -> Outcome:
        """What a study on it leaves behind: its figures, its plans, and what they were solved on."""
        return Outcome(
            {**data, "steps": self.described},
            plans=tuple(plans),
            statistics=self.statistics,
            content=to_bytes(self.statistics),
        )


def ground(job: ClaimedJob, store: Store, model: ModelSpec) -> Ground:
    """Of request: statistics and held_out (ids), or routing and windows of the deployment; steps (batch, tokens, count);
    objective, seed.

    Raises:
        InputError: too little is recorded. UnsupportedError: counts do not tell what is asked.
    """
    request = job.request
    if request["statistics"] is not None or job.deployment is None:
        held = stored_statistics(store, request["held_out"]).require_sample()
        return Ground(stored_statistics(store, request["statistics"]), *_replayed(held, request))
    policy = Policy(**store.deployments.get(job.deployment).policy)
    if request["routing"] == "tokens":
        trace = judging_trace(store, job.deployment)
        return Ground(solving_traces(store, job.deployment, policy), *_replayed(trace, request))
    if Objective(**request["objective"]).execution == "context_coherent":
        raise UnsupportedError("context-coherent step times depend on transitions, counts tell of none; upload traces")
    windows = judging_windows(store, job.deployment, policy)
    if not windows:
        raise InputError("there are too few count windows to hold some out to judge on; send more to the deployment")
    known = from_windows(solving_windows(store, job.deployment, policy, request["windows"]), model)
    tokens = request["steps"]["tokens"] or policy.step_tokens
    count = request["steps"]["count"] or DRAWN_STEPS
    load = from_windows(windows, model).load
    steps = sample_steps(load, model.top_k, model.moe_layers, step_tokens=tokens, steps=count, seed=request["seed"])
    return Ground(known, steps, f"{count} steps of {tokens} tokens drawn from the newest {len(windows)} count windows")


def _replayed(trace: RoutingTrace, request: Mapping[str, Any]) -> tuple[Steps, str]:
    wanted, seed = request["steps"], request["seed"]
    tokens = wanted["tokens"]
    if wanted["batch"] == "prefill":
        count = wanted["count"] or PREFILL_STEPS
        return trace.prefill_steps(tokens or 4096, count, seed), f"prefill {tokens or 4096}: {count} steps, held out"
    count = wanted["count"] or DECODE_STEPS
    return trace.decode_steps(tokens or 128, count, seed), f"decode {tokens or 128}: {count} steps, held out"


# The front of step time against memory, bytes moved and survivable failures.


class SweepFront:
    """Request: model, topology (ids), current (a plan's id, or null), redundant, tolerate, max_moved (see `pareto`), solver,
    options, seconds, seed, objective, and what `ground` reads."""

    kind = "pareto"

    def run(self, job: ClaimedJob, store: Store, report: Report) -> Outcome:
        request = job.request
        model, topology = store.model(request["model"]).spec, store.topology(request["topology"]).topology
        basis = ground(job, store, model)
        problem = Problem(model, topology, basis.statistics, Objective(**request["objective"]))
        front = pareto(
            problem,
            basis.steps,
            redundant=request["redundant"],
            tolerate=request["tolerate"],
            current=None if request["current"] is None else store.plan(request["current"]).plan,
            max_moved=request["max_moved"],
            solver=request["solver"],
            seconds=request["seconds"],
            seed=request["seed"],
            options=request["options"],
            progress=steps_of(report),
        )
        plans = [point.plan for point in front.points]
        data = front_data(front, problem, [], [id_of_plan(plan) for plan in plans])
        return basis.outcome(data, plans)


class AskWhatIf:
    """Request: plan (id, or null for experts in index order), changes (see `wanted_changes`), ready, max_moved_bytes, solver,
    options, seconds, seed, objective, and what `ground` reads."""

    kind = "what-if"

    def run(self, job: ClaimedJob, store: Store, report: Report) -> Outcome:
        request = job.request
        plan = asked_plan(job, store)
        basis = ground(job, store, plan.model)
        problem = Problem(plan.model, plan.topology, basis.statistics, Objective(**request["objective"]))
        result = what_if(
            plan,
            problem,
            basis.steps,
            wanted_changes(plan.topology, request["changes"], store),
            ready=request["ready"],
            max_moved_bytes=request["max_moved_bytes"],
            solver=request["solver"],
            seconds=request["seconds"],
            seed=request["seed"],
            options=request["options"],
            progress=steps_of(report),
        )
        kept: list[Plan] = []

        def about(_: Changed, kind: str, found: Plan) -> dict[str, Any]:
            kept.append(found)
            return {"stored_as": id_of_plan(found)}

        return basis.outcome(what_if_data(plan, result, about), kept)


def asked_plan(job: ClaimedJob, store: Store) -> Plan:
    """The plan of a request, or experts in index order where a deployment has none in force."""
    if job.request["plan"] is not None:
        return store.plan(job.request["plan"]).plan
    if job.deployment is None:
        raise InputError("plan: name the plan to ask about, or a deployment")
    deployment = store.deployments.get(job.deployment)
    return default_plan(store.model(deployment.model_id).spec, store.topology(deployment.topology_id).topology)


def wanted_changes(cluster: Topology, wanted: Any, store: Store) -> list[Change]:
    """The changes of a request: lose, n_1, devices, nodes, topology (a stored one's id), slots.

    Raises:
        InputError: as `changes_asked`.
    """
    other = None if wanted["topology"] is None else store.topology(wanted["topology"]).topology
    return changes_asked(cluster, **{**wanted, "topology": other})
