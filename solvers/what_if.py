"""What a change of the cluster does to a plan, and the plan that is ready for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .._arguments import check_types
from .._deprecated import old_listener
from .._types import BoolArray, IntArray
from ..placement.degraded import degraded, grown_layer_slots, rehomed, repaired, slot_room, survivors
from ..placement.errors import SolveError, UnsupportedError
from ..placement.evaluate import Evaluation, evaluate, evaluate_on
from ..placement.failures import KINDS, Failure, failure_mask, single_failures, survives
from ..placement.layer_slots import Slots, slots_by_layer, spanned
from ..placement.migration import Migration, migration_from
from ..placement.plan import Plan
from ..placement.problem import Problem
from ..placement.progress import Listener, Progress
from ..placement.steps import Steps
from ..placement.topology import Topology
from .base import Solver
from .options import SolverOptions
from .solve import check_seconds, solve


@dataclass(frozen=True, eq=False)
class Change:
    """Another cluster for a plan. origin: [G] the rank each of its devices has in the plan's, -1 for a new device.

    slots: P a layer of the ready plan, or [L] numbers, one a layer; by default those of the devices that stay, or as many
    as the plan has where there are new ones, and always enough for every expert.
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


@dataclass(frozen=True, eq=False)
class Judged:
    """A plan on the changed cluster, what the steps cost with it, and what must move to get there."""

    plan: Plan
    evaluation: Evaluation
    migration: Migration


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a change does.

    lost: [L, E] experts of which no device that stays holds a replica. lost_load: the part of the steps' token-expert
    pairs that chose them. degraded: the plan with nothing moved, where devices only go and no expert is lost.
    repaired: where experts are lost, the survivors as they stand with the lost experts loaded again. ready: a plan
    solved for the changed cluster. reason: why there is none. extra_slots: slots a layer that devices which stay need
    beyond their present ones, in the layer that needs most.
    """

    change: Change
    lost: BoolArray
    lost_load: float
    degraded: Judged | None = None
    repaired: Judged | None = None
    ready: Judged | None = None
    extra_slots: int = 0
    reason: str = ""

    @property
    def survives(self) -> bool:
        return not self.lost.any()


@dataclass(frozen=True, eq=False)
class WhatIf:
    """before: the plan as it stands. outcomes: one a change, in order; fewer than asked when `interrupted`."""

    before: Evaluation
    outcomes: tuple[Outcome, ...]
    interrupted: bool = False


@check_types
def what_if(
    plan: Plan,
    problem: Problem,
    steps: Steps,
    changes: Sequence[Change] | None = None,
    *,
    ready: bool = True,
    max_moved_bytes: float | None = None,
    solver: str | Solver | SolverOptions | None = None,
    seconds: float | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    progress: Listener | None = None,
) -> WhatIf:
    """Replays `steps` after each change, and solves for the changed cluster.

    problem: statistics, objective and constraints, on the plan's topology; pins to devices that go are dropped, and
    failures it tolerates are not asked of ready plans. changes: default the loss of every device and of every node.
    ready: whether to repair and solve; otherwise only survival and the degraded plan are looked at. max_moved_bytes: most
    that ready plans may move between devices, after failures (lost experts are loaded beside that). solver, seconds,
    seed: of each solve, options: the solver's own (see `solve`). progress: called before each change with a `Progress` of
    the changes done, their number and the next one's name. After a keyboard interrupt the outcomes finished so far are
    returned.

    Raises:
        InputError: the plan, the problem and the steps are not about the same model or number of devices.
    """
    check_seconds(seconds)
    listener, began = old_listener(progress, ("done", "total", "message"), "what_if"), time.perf_counter()
    before = evaluate(plan, steps, problem)
    if changes is None:
        changes = [Change.losing(failure, plan.topology) for failure in single_failures(plan.topology)]
    outcomes: list[Outcome] = []
    try:
        for done, change in enumerate(changes):
            if listener is not None:
                seconds_so_far = time.perf_counter() - began
                listener(Progress(seconds_so_far, message=change.name, done=done, total=len(changes)))
            outcome = _as_it_is(plan, problem, steps, change)
            if ready:
                outcome = _solved(
                    outcome, plan, problem, steps, (solver, seconds, seed, options or {}), max_moved_bytes
                )
            outcomes.append(outcome)
            if outcome.ready is not None and outcome.ready.plan.provenance.stop == "interrupted":
                return WhatIf(before, tuple(outcomes), interrupted=len(outcomes) < len(changes))
    except KeyboardInterrupt:
        return WhatIf(before, tuple(outcomes), interrupted=True)
    return WhatIf(before, tuple(outcomes))


def _as_it_is(plan: Plan, problem: Problem, steps: Steps, change: Change) -> Outcome:
    lost = np.asarray(~_held(plan, change).any(axis=2))
    chosen = steps.loads().sum(axis=0)
    outcome = Outcome(change, lost, float(chosen[lost].sum() / chosen.sum()))
    if not (change.stays and _gone(plan, change)) or lost.any():
        return outcome
    left = degraded(plan, Failure(change.name, _gone(plan, change)))
    return replace(outcome, degraded=_judged(left, plan, problem, steps, change))


def _solved(
    outcome: Outcome,
    plan: Plan,
    problem: Problem,
    steps: Steps,
    how: tuple[str | Solver | SolverOptions | None, float | None, int, Mapping[str, Any]],
    max_moved_bytes: float | None,
) -> Outcome:
    change, experts = outcome.change, problem.model.experts
    # The last column is for devices that are new.
    present = np.pad(plan.slots_per_device, ((0, 0), (0, 1)))[:, change.origin]
    keeps = change.stays and change.slots is None
    if change.slots is not None:
        wanted = slots_by_layer(problem.model, change.topology.num_devices, change.slots, None).sum(axis=1)
    else:
        wanted = np.maximum(experts, (present if keeps else plan.slots_per_device).sum(axis=1))
    base = present if keeps else np.zeros_like(present)
    slots = grown_layer_slots(base, wanted, problem.model, change.topology)
    if slots is None:
        room = int(slot_room(problem.model, change.topology).sum())
        return replace(
            outcome,
            reason=f"does not fit: {spanned(wanted)} slots a layer are needed, {change.topology.num_devices} devices "
            f"have room for {room}",
        )
    extra = np.maximum(slots - present, 0)[:, change.origin >= 0].sum(axis=1)
    outcome = replace(outcome, extra_slots=int(extra.max()))
    if keeps and outcome.lost.any():
        failure = Failure(change.name, _gone(plan, change))
        mended = repaired(plan, failure, slots, problem.statistics.total_load)
        outcome = replace(outcome, repaired=_judged(mended, plan, problem, steps, change))
    solver, seconds, seed, options = how
    after = _problem_after(problem, change, slots)
    at_once = outcome.degraded or outcome.repaired
    if max_moved_bytes is not None and at_once is not None:
        after = replace(after, current=at_once.plan, max_moved_bytes=max_moved_bytes)
    try:
        ready = solve(after, solver, seconds=seconds, seed=seed, **options)
    except (UnsupportedError, SolveError) as error:
        return replace(outcome, reason=str(error))
    return replace(outcome, ready=_judged(ready, plan, problem, steps, change))


def _judged(result: Plan, plan: Plan, problem: Problem, steps: Steps, change: Change) -> Judged:
    evaluation = evaluate_on(result, rehomed(steps, change.origin), problem.model, change.topology, problem.objective)
    return Judged(result, evaluation, migration_from(_held(plan, change), result))


def _gone(plan: Plan, change: Change) -> tuple[int, ...]:
    """Devices of the plan's cluster that the changed one lacks."""
    return tuple(int(g) for g in np.setdiff1d(np.arange(plan.topology.num_devices), change.origin))


def _held(plan: Plan, change: Change) -> BoolArray:
    """[L, E, G] what the devices of the changed cluster hold before anything moves."""
    layers, experts, _ = plan.holds.shape
    nothing = np.zeros((layers, experts, 1), dtype=bool)
    return np.concatenate([plan.holds, nothing], axis=2)[:, :, change.origin]


def _problem_after(problem: Problem, change: Change, slots: IntArray) -> Problem:
    rank = {int(old): new for new, old in enumerate(change.origin) if old >= 0}
    return replace(
        problem,
        topology=change.topology,
        slots=None,
        device_slots=slots.tolist(),
        pinned={key: rank[device] for key, device in problem.pinned.items() if device in rank},
        forbidden={key: [rank[d] for d in devices if d in rank] for key, devices in problem.forbidden.items()},
        tolerates=(),
        current=None,
        max_moved_bytes=None,
    )


# The changes of a cluster that somebody asks about, from their names and numbers.


def changes_asked(
    cluster: Topology,
    *,
    lose: Sequence[str] = (),
    n_1: bool = False,
    devices: int | None = None,
    nodes: int | None = None,
    topology: Topology | None = None,
    slots: Slots | None = None,
) -> list[Change]:
    """Each change on its own; the loss of every single device and node where nothing else is asked.

    lose: failures by name (`Failure.named`). n_1: all single failures besides. devices, nodes: the plan's cluster with so
    many of them. topology: another cluster. slots: a layer of the ready plans, or one number for each layer;
    alone, a change of its own.

    Raises:
        InputError: a failure of what is not there, or a size that the cluster cannot have.
    """
    changes = []
    if topology is not None:
        changes.append(Change.moving(f"{topology.name}, {topology.num_devices} devices", topology, slots))
    if nodes is not None:
        resized = cluster.resized(nodes=nodes)
        changes.append(Change.resizing(f"{nodes} node{'s' if nodes > 1 else ''}", cluster, resized, slots))
    if devices is not None:
        resized = cluster.resized(devices=devices)
        changes.append(Change.resizing(f"{devices} device{'s' if devices > 1 else ''}", cluster, resized, slots))
    failures = [Failure.named(name, cluster) for name in lose]
    if slots is not None and not (changes or failures or n_1):
        return [Change.resizing(f"{spanned(np.asarray(slots))} slots", cluster, cluster, slots)]
    if n_1 or not (changes or failures):
        failures += [failure for failure in single_failures(cluster) if failure not in failures]
    return changes + [Change.losing(failure, cluster, slots) for failure in failures]


# What changes do to a plan, as plain values.


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
        "degraded": _what_if_data_judged(outcome.degraded, result),
        "repaired": _what_if_data_judged(outcome.repaired, result, outcome, "repaired", about),
        "ready": _what_if_data_judged(outcome.ready, result, outcome, "ready", about),
        "extra_slots": outcome.extra_slots,
        "reason": outcome.reason or None,
    }


def _what_if_data_judged(
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
