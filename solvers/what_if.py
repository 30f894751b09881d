"""What a change of the cluster does to a plan, and the plan that is ready for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from .._arguments import check_fields, check_methods, check_types
from .._deprecated import old_listener, renamed_argument
from .._display import plural
from .._types import BoolArray, IntArray
from ..placement.degraded import (
    KINDS,
    Failure,
    degraded,
    failure_mask,
    on_survivors,
    remap_source_ranks,
    renumbered,
    repaired,
    single_failures,
    survives,
    survivors,
)
from ..placement.engines import violations
from ..placement.errors import SolveError, UnsupportedError
from ..placement.evaluate import Evaluation, evaluate, evaluate_on
from ..placement.layer_slots import Slots, grown_layer_slots, slot_capacity, slots_by_layer, spanned
from ..placement.migration import Migration, migration_from
from ..placement.plan import Plan
from ..placement.problem import Problem
from ..placement.progress import Listener, Progress
from ..placement.statistics import RoutingStatistics
from ..placement.step_mix import problem_steps
from ..placement.steps import Steps
from ..placement.topology import Topology
from ..placement.trace import RoutingTrace
from .base import Solver, SolverOptions
from .solve import check_seconds, solve

Survival = dict[str, dict[str, int]]
Details = Callable[["Outcome", str, Plan], Mapping[str, Any]]
"""What else to tell of a plan, given the outcome it belongs to and its kind, "ready" or "repaired"."""


@check_methods
@check_fields
@dataclass(frozen=True, eq=False)
class Change:
    """Another cluster for a plan.

    Attributes:
        name: shown to the user. topology: the other cluster. origin: [G] the rank that each of its devices has in the
        plan's cluster, -1 for a new device. slots: P a layer of the ready plan, or [L] numbers, one a layer; by default
        those of the devices that stay, or as
            many as the plan has where there are new ones, always enough for every expert, and as many as the problem's
            engine deals.
    """

    name: str
    topology: Topology
    origin: IntArray
    slots: Slots | None = None

    @property
    def stays(self) -> bool:
        """Whether every device was there before."""
        return bool((self.origin >= 0).all())

    @classmethod
    def losing(cls, failure: Failure, topology: Topology, slots: Slots | None = None) -> Change:
        """A failure in the plan's cluster.

        Raises:
            InputError: it takes devices that are not there, or all of them.
        """
        failure_mask([failure], topology.num_devices)
        left = survivors(topology.num_devices, failure)
        return cls(failure.name, topology.without(failure.devices), left, slots)

    @classmethod
    def resizing(cls, name: str, before: Topology, after: Topology, slots: Slots | None = None) -> Change:
        """The plan's cluster with devices added or taken away at its end (see `Topology.resized`), or none."""
        ranks = np.arange(after.num_devices)
        return cls(name, after, np.where(ranks < before.num_devices, ranks, -1), slots)

    @classmethod
    def moving(cls, name: str, topology: Topology, slots: Slots | None = None) -> Change:
        """Another cluster, whose devices hold nothing yet."""
        return cls(name, topology, np.full(topology.num_devices, -1, dtype=np.int64), slots)


def parse_changes(
    cluster: Topology,
    *,
    lose: Sequence[str] = (),
    n_1: bool = False,
    devices: int | None = None,
    nodes: int | None = None,
    topology: Topology | None = None,
    slots: Slots | None = None,
) -> list[Change]:
    """The changes that somebody asks about, each on its own; every single failure where nothing else is asked.

    Args:
        cluster: of the plan.
        lose: failures by name (see `Failure.named`).
        n_1: all single failures besides.
        devices: the plan's cluster with so many devices.
        nodes: the plan's cluster with so many nodes.
        topology: another cluster.
        slots: a layer of the ready plans, or one number for each layer; alone, a change of its own.

    Raises:
        InputError: a failure of what is not there, or a size that the cluster cannot have.
    """
    changes = []
    if topology is not None:
        changes.append(Change.moving(f"{topology.name}, {topology.num_devices} devices", topology, slots))
    if nodes is not None:
        resized = cluster.resized(nodes=nodes)
        changes.append(Change.resizing(plural(nodes, "node"), cluster, resized, slots))
    if devices is not None:
        resized = cluster.resized(devices=devices)
        changes.append(Change.resizing(plural(devices, "device"), cluster, resized, slots))
    failures = [Failure.named(name, cluster) for name in lose]
    if slots is not None and not (changes or failures or n_1):
        return [Change.resizing(f"{spanned(np.asarray(slots))} slots", cluster, cluster, slots)]
    if n_1 or not (changes or failures):
        failures += [failure for failure in single_failures(cluster) if failure not in failures]
    return changes + [Change.losing(failure, cluster, slots) for failure in failures]


@dataclass(frozen=True, eq=False)
class EvaluatedPlan:
    """A plan on the changed cluster, what the steps cost with it, and what must move to get there."""

    plan: Plan
    evaluation: Evaluation
    migration: Migration

    def to_dict(self, before: Evaluation) -> dict[str, Any]:
        """As JSON has it; before: the evaluation that its step time is compared with."""
        return {
            **self.evaluation.summary(),
            "ratio": self.evaluation.mean_seconds / before.mean_seconds,
            "slots": self.plan.num_slots,
            "device_slots": self.plan.slots_per_device.max(axis=0).tolist(),
            "moves": self.migration.moves,
            "bytes_moved": self.migration.bytes_moved,
            "bytes_reloaded": self.migration.bytes_reloaded,
            "migration_seconds": self.migration.seconds,
            "survives": survival(self.plan),
            "stop": self.plan.provenance.stop,
            "fingerprint": self.plan.fingerprint,
        }


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a change does.

    Attributes:
        change: the change.
        lost: [L, E] experts of which no device that stays holds a replica.
        lost_load: the part of the steps' token-expert pairs that chose them.
        degraded: the plan with nothing moved, where devices only go and no expert is lost.
        repaired: where experts are lost, the survivors as they stand with the lost experts loaded again.
        ready: a plan solved for the changed cluster.
        extra_slots: slots a layer that devices which stay need beyond their present ones, in the layer that needs most.
        reason: why there is no ready plan.
    """

    change: Change
    lost: BoolArray
    lost_load: float
    degraded: EvaluatedPlan | None = None
    repaired: EvaluatedPlan | None = None
    ready: EvaluatedPlan | None = None
    extra_slots: int = 0
    reason: str = ""

    @property
    def survives(self) -> bool:
        return not self.lost.any()

    def to_dict(self, moe_layers: Sequence[int], before: Evaluation, details: Details | None = None) -> dict[str, Any]:
        """As JSON has it. moe_layers: names of the layers; before, details: as of `WhatIf`."""
        plans: dict[str, dict[str, Any] | None] = {"degraded": None, "repaired": None, "ready": None}
        for kind, evaluated in (("degraded", self.degraded), ("repaired", self.repaired), ("ready", self.ready)):
            if evaluated is not None:
                more = {} if details is None or kind == "degraded" else details(self, kind, evaluated.plan)
                plans[kind] = {**evaluated.to_dict(before), **more}
        lost = zip(moe_layers, self.lost, strict=True)
        return {
            "change": self.change.name,
            "devices": self.change.topology.num_devices,
            "nodes": self.change.topology.num_nodes,
            "survives": self.survives,
            "experts_lost": int(self.lost.sum()),
            "lost": {str(layer): row.nonzero()[0].tolist() for layer, row in lost if row.any()},
            "lost_load": self.lost_load,
            **plans,
            "extra_slots": self.extra_slots,
            "reason": self.reason or None,
        }


@dataclass(frozen=True, eq=False)
class WhatIf:
    """What each change does to a plan.

    Attributes:
        plan: the plan as it stands.
        before: what the steps cost with it.
        outcomes: one a change, in order; fewer than asked when `interrupted`.
    """

    plan: Plan
    before: Evaluation
    outcomes: tuple[Outcome, ...]
    interrupted: bool = False

    def to_dict(self, details: Details | None = None) -> dict[str, Any]:
        """The outcomes as JSON has them, each ready and repaired plan with what `details` tells of it besides."""
        return {
            "plan": self.plan.fingerprint,
            "slots": self.plan.num_slots,
            "survives": survival(self.plan),
            "prediction": self.before.basis.text,
            "now": self.before.summary(),
            "interrupted": self.interrupted,
            "changes": [outcome.to_dict(self.plan.moe_layers, self.before, details) for outcome in self.outcomes],
        }


def survival(plan: Plan) -> Survival:
    """Of the single device and node failures, how many leave every expert a replica."""
    result: Survival = {}
    for kind in KINDS:
        survived = survives(plan, single_failures(plan.topology, (kind,)))
        result[kind] = {"survived": int(survived.sum()), "of": len(survived)}
    return result


@renamed_argument("steps", "held_out")
@check_types
def what_if(
    plan: Plan,
    problem: Problem,
    held_out: RoutingTrace | RoutingStatistics | Steps,
    changes: Sequence[Change] | None = None,
    *,
    ready: bool = True,
    max_moved_bytes: float | None = None,
    keep_ranks: bool = False,
    solver: str | Solver | SolverOptions | None = None,
    seconds: float | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    progress: Listener | None = None,
) -> WhatIf:
    """Replays steps after each change, and solves for the changed cluster.

    Args:
        plan: the plan in force.
        problem: statistics, objective and constraints, on the plan's topology; pins to devices that go are dropped, and
            failures it tolerates are not asked of ready plans. Where it names no engine, the plan's is obeyed.
        held_out: routing that no solver has seen, a trace or statistics, of which steps of the problem's batches are
            made to replay (`problem_steps`); or steps.
        changes: default the loss of every device and of every node.
        ready: whether to repair and solve; otherwise only survival and the degraded plan are looked at.
        max_moved_bytes: most that ready plans may move between devices, after failures (lost experts are loaded beside
            that).
        keep_ranks: whether devices that are left keep their numbers in the repaired and ready plans after a failure,
            the lost ones having no slots; for engines that know masked ranks.
        solver: of each solve (see `solve`).
        seconds: of each solve; by default no limit, as in `solve`.
        seed: of each solve.
        options: the solver's own.
        progress: called before each change with a `Progress` of the changes done, their number and the next one's name.

    Returns:
        An outcome of each change; after a keyboard interrupt those finished so far.

    Raises:
        InputError: the plan, the problem and the steps are not about the same model or number of devices.
        UnsupportedError: the engine does not run the slots that a change names, or knows no masked ranks.
    """
    check_seconds(seconds)
    problem = replace(problem, engine=problem.engine or plan.provenance.engine or None)
    if keep_ranks and (problem.profile is None or not problem.profile.masked_ranks):
        raise UnsupportedError(
            f"keep_ranks leaves lost devices their numbers: {problem.engine or 'no engine named'} knows no masked ranks"
        )
    listener, began = old_listener(progress, ("done", "total", "message"), "what_if"), time.perf_counter()
    steps = problem_steps(held_out, problem, seed=seed)
    before = evaluate(plan, steps, problem)
    if changes is None:
        changes = [Change.losing(failure, plan.topology) for failure in single_failures(plan.topology)]
    for change in changes:
        if change.slots is not None:
            _check_slots_named(problem, change)
    make_plan = partial(solve, solver=solver, seconds=seconds, seed=seed, **(options or {}))
    outcomes: list[Outcome] = []
    try:
        for done, change in enumerate(changes):
            if listener is not None:
                elapsed = time.perf_counter() - began
                listener(Progress(elapsed, message=change.name, done=done, total=len(changes)))
            outcome = _unrepaired(plan, problem, steps, change)
            if ready:
                outcome = _made_ready(outcome, plan, problem, steps, make_plan, max_moved_bytes)
            if keep_ranks and change.stays:
                outcome = _keeping_ranks(outcome, plan.topology)
            outcomes.append(outcome)
            if outcome.ready is not None and outcome.ready.plan.provenance.stop == "interrupted":
                return WhatIf(plan, before, tuple(outcomes), interrupted=len(outcomes) < len(changes))
    except KeyboardInterrupt:
        return WhatIf(plan, before, tuple(outcomes), interrupted=True)
    return WhatIf(plan, before, tuple(outcomes))


def _unrepaired(plan: Plan, problem: Problem, steps: Steps, change: Change) -> Outcome:
    """What the change takes, and the plan with nothing moved."""
    lost = np.asarray(~_holds_before(plan, change).any(axis=2))
    chosen = steps.loads().sum(axis=0)
    outcome = Outcome(change, lost, float(chosen[lost].sum() / chosen.sum()))
    if not (change.stays and _gone(plan, change)) or lost.any():
        return outcome
    left = degraded(plan, Failure(change.name, _gone(plan, change)))
    return replace(outcome, degraded=_evaluated(left, plan, problem, steps, change))


def _made_ready(
    outcome: Outcome,
    plan: Plan,
    problem: Problem,
    steps: Steps,
    make_plan: Callable[[Problem], Plan],
    max_moved_bytes: float | None,
) -> Outcome:
    """The outcome with the repaired plan and the ready one."""
    change, experts = outcome.change, problem.model.experts
    # The last column is for devices that are new.
    present = np.pad(plan.slots_per_device, ((0, 0), (0, 1)))[:, change.origin]
    keeps_slots = change.stays and change.slots is None
    if change.slots is not None:
        totals = slots_by_layer(problem.model, change.topology, change.slots, None).sum(axis=1)
    else:
        totals = np.maximum(experts, (present if keeps_slots else plan.slots_per_device).sum(axis=1))
    least = present if keeps_slots else np.zeros_like(present)
    if problem.profile is not None and problem.profile.equal_slots:
        slots = _dealt_slots(problem, change, totals, least)
    else:
        slots = grown_layer_slots(least, totals, problem.model, change.topology)
    if slots is None:
        capacity = int(slot_capacity(problem.model, change.topology).sum())
        return replace(
            outcome,
            reason=f"does not fit: {spanned(totals)} slots a layer are needed, {change.topology.num_devices} devices "
            f"hold {capacity}",
        )
    try:
        after = _problem_after(problem, change, slots)
    except UnsupportedError as error:
        return replace(outcome, reason=str(error))
    extra = np.maximum(slots - present, 0)[:, change.origin >= 0].sum(axis=1)
    outcome = replace(outcome, extra_slots=int(extra.max()))
    if keeps_slots and outcome.lost.any():
        failure = Failure(change.name, _gone(plan, change))
        repaired_plan = repaired(plan, failure, slots, problem.statistics.total_load)
        if problem.profile is None or not violations(repaired_plan, problem.profile.constraints):
            made = replace(repaired_plan.provenance, engine=problem.engine or "")
            repaired_plan = replace(repaired_plan, provenance=made)
            outcome = replace(outcome, repaired=_evaluated(repaired_plan, plan, problem, steps, change))
    at_once = outcome.degraded or outcome.repaired
    if max_moved_bytes is not None and at_once is not None:
        after = replace(after, current=at_once.plan, max_moved_bytes=max_moved_bytes)
    try:
        ready = make_plan(after)
    except (UnsupportedError, SolveError) as error:
        return replace(outcome, reason=str(error))
    return replace(outcome, ready=_evaluated(ready, plan, problem, steps, change))


def _check_slots_named(problem: Problem, change: Change) -> None:
    """Refuses slots that a change names and the engine does not run, before anything is solved."""
    try:
        replace(_problem_after(problem, change, None), slots=change.slots)
    except UnsupportedError as error:
        raise UnsupportedError(f"{change.name}: {error}") from None


def _dealt_slots(problem: Problem, change: Change, totals: IntArray, least: IntArray) -> IntArray | None:
    """[L, G] as many slots on every device in every layer, at least so many in all [L] and on each [L, G]; None when
    some device does not hold them. Ranks that were lost before have none where the engine masks them."""
    alive: BoolArray = np.ones(change.topology.num_devices, dtype=np.bool_)
    if problem.profile is not None and problem.profile.masked_ranks and least.any():
        alive = np.asarray(least.any(axis=0))
    each = max(-(-int(totals.max()) // int(alive.sum())), int(least.max()))
    fits = each <= int(slot_capacity(problem.model, change.topology)[alive].min())
    return np.tile(np.where(alive, each, 0), (problem.model.layers, 1)) if fits else None


def _keeping_ranks(outcome: Outcome, cluster: Topology) -> Outcome:
    """The outcome with its plans on the whole cluster, lost devices without slots."""

    def on_cluster(judged: EvaluatedPlan | None) -> EvaluatedPlan | None:
        return judged and replace(judged, plan=renumbered(judged.plan, cluster, outcome.change.origin))

    return replace(outcome, repaired=on_cluster(outcome.repaired), ready=on_cluster(outcome.ready))


def _evaluated(result: Plan, plan: Plan, problem: Problem, steps: Steps, change: Change) -> EvaluatedPlan:
    steps = remap_source_ranks(steps, change.origin)
    judged, topology = result, change.topology
    if problem.profile is not None and problem.profile.masked_ranks:
        judged, steps = on_survivors(replace(result, topology=topology), steps)
        topology = judged.topology
    evaluation = evaluate_on(judged, steps, problem.model, topology, problem.objective)
    return EvaluatedPlan(result, evaluation, migration_from(_holds_before(plan, change), result))


def _gone(plan: Plan, change: Change) -> tuple[int, ...]:
    """Devices of the plan's cluster that the changed one lacks."""
    return tuple(int(g) for g in np.setdiff1d(np.arange(plan.topology.num_devices), change.origin))


def _holds_before(plan: Plan, change: Change) -> BoolArray:
    """[L, E, G] what the devices of the changed cluster hold before anything moves."""
    layers, experts, _ = plan.holds.shape
    nothing = np.zeros((layers, experts, 1), dtype=bool)
    return np.concatenate([plan.holds, nothing], axis=2)[:, :, change.origin]


def _problem_after(problem: Problem, change: Change, slots: IntArray | None) -> Problem:
    rank = {int(old): new for new, old in enumerate(change.origin) if old >= 0}
    return replace(
        problem,
        topology=change.topology,
        slots=None,
        device_slots=None if slots is None else slots.tolist(),
        pinned={key: rank[device] for key, device in problem.pinned.items() if device in rank},
        forbidden={key: [rank[d] for d in devices if d in rank] for key, devices in problem.forbidden.items()},
        tolerates=(),
        current=None,
        max_moved_bytes=None,
    )
