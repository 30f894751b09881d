"""What workers do, a class a kind of job, each from the job's request to its outcome: decisions, looks at deployments,
and jobs that solve."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from .._types import FloatArray
from ..db.records import ClaimedJob, DeploymentRecord, Finding, JobOutcome, Judgement, WindowRecord
from ..db.references import id_of_plan
from ..db.store import Store
from ..placement.bounds import device_load_certificate
from ..placement.decide import LEAST_BLOCKS, Decision, count_block, decide, decide_on_counts
from ..placement.drift import can_tell, drift
from ..placement.errors import InputError, UnsupportedError
from ..placement.model import ModelSpec
from ..placement.objective import Objective, weighted_mean
from ..placement.plan import Plan
from ..placement.problem import Problem
from ..placement.progress import Progress
from ..placement.statistics import RoutingStatistics, window_weights, with_tokens
from ..placement.step_mix import mixed_window_seconds, problem_steps, step_mix
from ..placement.steps import Batch, Steps
from ..placement.topology import Topology
from ..placement.trace import RoutingTrace
from ..solvers import solve
from ..solvers.pareto import pareto
from ..solvers.what_if import Change, parse_changes, what_if
from ..solvers.what_if import Outcome as Changed
from .policy import Policy
from .routing import (
    from_windows,
    judging_trace,
    judging_windows,
    solving_traces,
    solving_windows,
    stored_statistics,
    to_bytes,
)
from .schemas import ChangesRequest, DecideRequest, ParetoJob, SolveJob, StudyJob, WhatIfJob

Report = Callable[[Progress], None]


def steps_of(report: Report) -> Report:
    """A listener for work in parts, that reports which of them is under way."""
    return lambda news: report(replace(news, message=f"{news.message} ({news.done + 1} of {news.total})"))


class Task(Protocol):
    """Instances are stateless. `run` reads from the store and writes nothing: the outcome is stored when the job ends,
    so that a job that is begun twice leaves one trace. It raises MoeplaceError for what cannot be done."""

    @property
    def kind(self) -> str: ...

    def run(self, job: ClaimedJob, store: Store, report: Report) -> JobOutcome: ...


# A decision: a stored plan against the one in force, on the newest routing. First plans as plain figures.


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


# A look at a deployment: has its traffic moved, does that matter, and if so, is a new plan worth its migration?
#
# 1. All windows since the plan was last judged are searched for a change against those it was judged on and against
#    each other (`placement.drift`), which also says when it was.
# 2. Once a change is found and enough windows came after it, a fresh plan is solved on the older half of those. What
#    the plan in force loses against it on the newer half is the regret. An alarm is a change found and a regret that
#    matters, so alarms without a change come no more often than the test's stated rate.
# 3. On an alarm, `decide` judges the fresh plan on the newer half, with its migration. Its answer waits for approval or
#    is published, as the policy says.
# 4. A plan judged on few windows is looked at again when there are twice as many, until `recent`: without an alarm, for
#    nothing changed but what is known.


class WatchTask:
    """Request: empty."""

    kind = "watch"

    def run(self, job: ClaimedJob, store: Store, report: Report) -> JobOutcome:
        if job.deployment is None:
            raise InputError("a watch is kept over a deployment")
        deployment = store.deployments.get(job.deployment)
        look = _Look(deployment, store)
        return look.outcome(report)


class _Look:
    """One deployment at one moment."""

    def __init__(self, deployment: DeploymentRecord, store: Store) -> None:
        self._deployment = deployment
        self._policy = Policy(**deployment.policy)
        self._model = store.model(deployment.model_id).spec
        self._topology = store.topology(deployment.topology_id).topology
        self._current = _plan_in_force(deployment, store, self._model, self._topology)
        self._reference = None if deployment.reference_id is None else stored_statistics(store, deployment.reference_id)
        newest = store.windows.page(deployment.name, limit=self._policy.searched)
        self._last = newest[-1].key if newest else 0
        # What was joined is one observation of many windows: it cannot stand beside single ones. What is empty is none.
        self._windows = [window for window in newest if window.merged == 1 and window.pairs]
        self._since = [window for window in self._windows if window.key > deployment.reference_window]

    def outcome(self, report: Report) -> JobOutcome:
        policy = self._policy
        if self._reference is None and len(self._since) < self._least:
            return self._quiet({"status": "waiting for windows", "windows": len(self._since)})
        if not self._since:
            return self._quiet({"status": "no new windows"})
        routing = from_windows(self._since[-policy.recent :], self._model)
        seconds = mixed_window_seconds(self._current, routing.load, self._problem(routing))
        figures: dict[str, Any] = {
            **balance(self._current, routing),
            "step_seconds": weighted_mean(seconds, _weight(routing)),
        }
        if self._reference is None:
            return self._judged(self._since[-policy.recent :], "first plan", figures, report)
        known = int(with_tokens(self._reference.load).sum())
        if can_tell(known, len(self._since), policy.block, policy.false_alarm):
            load = from_windows(self._since, self._model).load
            change = drift(self._reference.load, load, block=policy.block, alpha=policy.false_alarm)
            figures |= {
                "p": change.p,
                "divergence": change.divergence,
                "layer": self._model.moe_layers[change.layer],
                "layer_divergence": change.layer_divergence,
                "dependence": change.dependence,
            }
            if change.p <= policy.false_alarm:
                figures["windows_since"] = change.since
                if change.since < self._least:
                    return self._quiet({"status": "changed, waiting for windows to judge on", **figures})
                return self._judged(self._since[-min(change.since, policy.recent) :], "alarm", figures, report)
        enough = min(policy.recent, known + len(self._since), len(self._windows))
        if enough >= 2 * known:
            return self._judged(self._windows[-enough:], "looked at again", figures, report)
        return self._quiet({"status": "no change", **figures})

    @property
    def _least(self) -> int:
        """Windows that a plan can be solved and judged on."""
        return max(2 * LEAST_BLOCKS, 4 * self._policy.block)

    def _judged(
        self, windows: Sequence[WindowRecord], cause: str, figures: dict[str, Any], report: Report
    ) -> JobOutcome:
        half = len(windows) // 2
        older, newer = from_windows(windows[:half], self._model), from_windows(windows[half:], self._model)
        routing = from_windows(windows, self._model)
        fresh = solve(
            replace(self._problem(older), current=self._current),
            self._policy.solver,
            seconds=self._policy.seconds,
            progress=report,
            **self._policy.options,
        )
        paid, possible = (
            weighted_mean(mixed_window_seconds(plan, newer.load, self._problem(newer)), _weight(newer))
            for plan in (self._current, fresh)
        )
        regret = paid / possible - 1.0
        figures |= {"regret": regret, "fresh_step_seconds": possible, "fresh": balance(fresh, newer)}
        # Whatever caused the look, a loss that does not matter moves nothing; without any plan `decide` alone says.
        if regret < (0.0 if cause == "first plan" else self._policy.min_regret):
            holds = "changed, the plan still holds" if cause == "alarm" else "the plan still holds"
            return self._quiet({"status": holds, **figures}, rebased=routing)
        decision = on_counts(self._current, fresh, newer, self._policy)
        judged = decision_figures(decision)
        judgement = Judgement(
            self._deployment.version, decision.action, decision.reason, judged, self._policy.publish == "automatic"
        )
        figures["status"] = cause
        return JobOutcome(
            {"figures": figures, "action": decision.action, "reason": decision.reason},
            plan=fresh,
            # What traffic is compared with from now on: all windows after the change, half of which it was solved on.
            statistics=routing,
            content=to_bytes(routing),
            finding=Finding(self._last, cause == "alarm", figures),
            judgement=judgement,
            rebase=self._last,
        )

    def _quiet(self, figures: dict[str, Any], rebased: RoutingStatistics | None = None) -> JobOutcome:
        finding = Finding(self._last, alarm=False, figures=figures)
        if rebased is None:
            return JobOutcome({"figures": figures}, finding=finding)
        return JobOutcome(
            {"figures": figures},
            statistics=rebased,
            content=to_bytes(rebased),
            finding=finding,
            rebase=self._last,
        )

    def _problem(self, routing: RoutingStatistics) -> Problem:
        policy = self._policy
        return Problem(
            self._model,
            self._topology,
            routing,
            policy.objective,
            slots=policy.slots,
            engine=policy.engine,
            batches=policy.asked,
        )


def _weight(routing: RoutingStatistics) -> FloatArray:
    """[S] what each window counts."""
    return np.asarray(window_weights(routing.load).sum(axis=1))


def _plan_in_force(deployment: DeploymentRecord, store: Store, model: ModelSpec, topology: Topology) -> Plan:
    if deployment.plan_id is None:
        return default_plan(model, topology)
    return store.plan(deployment.plan_id).plan


# Jobs that solve: a plan for a deployment's routing or for stored statistics, and studies: what failures or another
# cluster would do to a plan, and the front of step time against its price.


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
