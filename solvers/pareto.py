"""The front of step time against what it costs: memory, bytes moved, and failures that are not survived."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .._arguments import check_types
from .._deprecated import old_listener, renamed_argument
from .._types import BoolArray, IntArray
from ..placement.cost import prediction_basis
from ..placement.degraded import KINDS, Failure, Kind, single_failures, survives, with_standbys
from ..placement.engines import Constraint
from ..placement.errors import InputError, SolveError, UnsupportedError
from ..placement.evaluate import Evaluation, evaluate
from ..placement.layer_slots import even_slots, grown_slots, slot_capacity
from ..placement.migration import Migration, migration
from ..placement.plan import Plan
from ..placement.problem import Problem
from ..placement.progress import Listener, Progress
from ..placement.statistics import RoutingStatistics
from ..placement.step_mix import problem_steps
from ..placement.steps import Steps
from ..placement.trace import RoutingTrace
from .base import Solver, SolverOptions
from .solve import check_seconds, solve


@dataclass(frozen=True)
class ParetoConfig:
    """What a plan of the sweep is asked for, besides short steps.

    Attributes:
        redundant: slots a layer beyond one an expert.
        tolerate: the kind of single failures to survive, as many of them as the slots allow; None leaves survival to
            chance.
        max_moved: most bytes moved from the plan in force; None for any number.
    """

    redundant: int
    tolerate: Kind | None = None
    max_moved: float | None = None

    @property
    def name(self) -> str:
        """`+8 slots, device failures, 1.5 GB moved`."""
        asked = "" if self.tolerate is None else f", {self.tolerate} failures"
        moved = "" if self.max_moved is None else f", {self.max_moved / 1e9:.3g} GB moved"
        return f"+{self.redundant} slots{asked}{moved}"


@dataclass(frozen=True, eq=False)
class Point:
    """A plan and what it is judged by.

    Attributes:
        config: what was asked for; None for the plan in force.
        plan: the plan.
        evaluation: on the held-out steps.
        seconds: the objective's figure on them.
        survived: single failures of each kind in which every expert keeps a replica.
        migration: from the plan in force, where there is one.
    """

    config: ParetoConfig | None
    plan: Plan
    evaluation: Evaluation
    seconds: float
    survived: Mapping[Kind, int]
    migration: Migration | None

    @property
    def name(self) -> str:
        return "in force" if self.config is None else self.config.name

    @property
    def redundant(self) -> int:
        """Slots a layer beyond one an expert; where layers differ, their mean, rounded up."""
        return -(-int(self.plan.filled.sum()) // self.plan.model.layers) - self.plan.model.experts

    @property
    def memory(self) -> float:
        """Bytes of expert weights on the fullest device."""
        return float(self.evaluation.device_memory.max())

    @property
    def bytes_moved(self) -> float:
        return 0.0 if self.migration is None else self.migration.bytes_moved


@dataclass(frozen=True, eq=False)
class Front:
    """The plans of a sweep.

    Attributes:
        problem: which was solved with every configuration.
        points: in the order solved.
        best: [N] whether no other point is at least as good in everything and better in something.
        refused: configurations without a plan, and why.
        failures: how many single failures of each kind there are.
        interrupted: whether the sweep was cut short.
    """

    problem: Problem
    points: tuple[Point, ...]
    best: BoolArray
    refused: tuple[tuple[ParetoConfig, str], ...]
    failures: Mapping[Kind, int]
    interrupted: bool = False

    def to_dict(self, files: Sequence[Path] = (), stored: Sequence[str] = ()) -> dict[str, Any]:
        """The front as JSON has it. files, stored: where each point's plan went, empty when nowhere."""
        fastest = min((point.seconds for point in self.points), default=0.0)
        points = [
            {
                "point": point.name,
                "best": bool(self.best[i]),
                "redundant_slots": point.redundant,
                "slots": point.plan.num_slots,
                "tolerate": None if point.config is None else point.config.tolerate,
                "max_moved_bytes": None if point.config is None else point.config.max_moved,
                "survives": {
                    kind: {"survived": point.survived[kind], "of": total} for kind, total in self.failures.items()
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
            for i, point in enumerate(self.points)
        ]
        problem = self.problem
        return {
            "model": problem.model.model_dump(mode="json"),
            "topology": {
                "name": problem.topology.name,
                "nodes": problem.topology.num_nodes,
                "devices": problem.num_devices,
            },
            "objective": problem.objective.model_dump(mode="json"),
            "prediction": prediction_basis(problem.model, problem.topology, problem.objective).text,
            "points": points,
            "refused": [{"point": config.name, "reason": reason} for config, reason in self.refused],
            "interrupted": self.interrupted,
        }


@renamed_argument("steps", "held_out")
@check_types
def pareto(
    problem: Problem,
    held_out: RoutingTrace | RoutingStatistics | Steps,
    *,
    redundant: Sequence[int] | None = None,
    tolerate: Sequence[Kind | None] = (None, *KINDS),
    current: Plan | None = None,
    max_moved: Sequence[float | None] | None = None,
    solver: str | Solver | SolverOptions | None = None,
    seconds: float | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    progress: Listener | None = None,
) -> Front:
    """Solves `problem` with every configuration of the sweep, and judges the plans on held-out steps.

    With free shares, a plan for more slots is at least as good on the steps solved on as those found before for fewer,
    whose replicas may stand by in the slots beyond. Under regret, which is against the best of the plans at hand,
    points are judged by their mean step.

    Args:
        problem: its slots are swept, so it names none, and no failures to tolerate. Where it names no engine, that of
            the plan in force is obeyed.
        held_out: routing that no solver has seen, a trace or statistics, of which steps of the problem's batches are
            made to judge on (`problem_steps`); or steps.
        redundant: slots a layer beyond one an expert; default 0, 1/8, 1/4, 1/2 and 1 for each expert, as far as memory
            goes, rounded up to whole slots a device; where experts do not divide over the devices of an engine that
            deals them equally, the least is not 0.
        tolerate: kinds of failures to survive.
        current: the plan in force, which bytes are moved from.
        max_moved: most bytes to move; default any number, and with a plan in force also 1/16 and 1/4 of the weights.
        solver: of each solve (see `solve`).
        seconds: of each solve; by default no limit, as in `solve`.
        seed: of each solve.
        options: the solver's own.
        progress: called before each solve with a `Progress` of the configurations done, their number and the next one's
            name.

    Returns:
        A point of each configuration that has a plan; after a keyboard interrupt those finished so far.

    Raises:
        InputError: the problem names slots, a negative number of redundant slots, or plans and steps of another model
            or number of devices.
    """
    if problem.slots is not None or problem.device_slots is not None or problem.tolerates:
        raise InputError("pareto sweeps slots and failures to tolerate; leave slots, device_slots and tolerates out")
    check_seconds(seconds)
    if problem.engine is None and current is not None and current.provenance.engine:
        problem = replace(problem, engine=current.provenance.engine)
    listener, began = old_listener(progress, ("done", "total", "message"), "pareto"), time.perf_counter()
    limits = max_moved
    if limits is None:
        weights = problem.model.bytes_per_expert * problem.model.experts * problem.model.layers
        limits = (None,) if current is None else (None, weights / 16, weights / 4)
    if redundant is not None and any(count < 0 for count in redundant):
        raise InputError(f"redundant slots ({list(redundant)}) must not be negative")
    for name, values in (("redundant", redundant), ("tolerate", tolerate), ("max_moved", limits)):
        if values is not None and not len(values):
            raise InputError(
                f"pareto: {name} is empty, so that nothing would be solved; leave it out for the usual ones"
            )
    configs = [
        ParetoConfig(count, kind, limit)
        for count in (redundancy_steps(problem) if redundant is None else dict.fromkeys(redundant))
        for kind in tolerate
        if kind is None or (count > 0 and single_failures(problem.topology, (kind,)))
        for limit in limits
    ]
    steps = problem_steps(held_out, problem, seed=seed)
    points = [] if current is None else [_judged(None, current, problem, steps, current)]
    refused: list[tuple[ParetoConfig, str]] = []
    interrupted = False
    try:
        for done, config in enumerate(configs):
            if listener is not None:
                elapsed = time.perf_counter() - began
                listener(Progress(elapsed, message=config.name, done=done, total=len(configs)))
            try:
                asked = problem_for(config, problem, current)
                plan = solve(asked, solver, seconds=seconds, seed=seed, **(options or {}))
            except (UnsupportedError, SolveError) as error:
                refused.append((config, str(error)))
                continue
            stopped = plan.provenance.stop == "interrupted"
            if problem.objective.split == "free" and config.max_moved is None:
                plan = _or_standing_by(plan, asked, points)
            points.append(_judged(config, plan, problem, steps, current))
            if stopped:
                interrupted = done + 1 < len(configs)
                break
    except KeyboardInterrupt:
        interrupted = True
    failures = {kind: len(single_failures(problem.topology, (kind,))) for kind in KINDS}
    return Front(problem, tuple(points), _best(points), tuple(refused), failures, interrupted)


def redundancy_steps(problem: Problem) -> list[int]:
    """0, 1/8, 1/4, 1/2 and 1 redundant slots an expert that memory holds, rounded up to whole slots a device."""
    experts, devices = problem.model.experts, problem.num_devices
    most = int(slot_capacity(problem.model, problem.topology).sum()) - experts
    counts = {0}
    if problem.profile is not None:
        counts = {problem.profile.whole_slots(experts, devices) - experts}
        if Constraint.NO_REPLICAS in problem.profile.constraints:
            return sorted(counts)
    for part in (8, 4, 2, 1):
        slots = experts + -(-experts // part)
        counts.add(-(-slots // devices) * devices - experts)
    return sorted(count for count in counts if count <= most)


def problem_for(config: ParetoConfig, problem: Problem, current: Plan | None = None) -> Problem:
    """The problem with a configuration's slots, as even as memory allows, and the failures it can ask to survive.

    Raises:
        SolveError: the devices do not hold so many slots, or the slots allow no failure of that kind.
    """
    devices = problem.num_devices
    total, capacity = problem.model.experts + config.redundant, slot_capacity(problem.model, problem.topology)
    slots = grown_slots(np.zeros(devices, dtype=np.int64), total, capacity)
    if slots is not None and problem.profile is not None and problem.profile.equal_slots:
        slots = even_slots(total, devices) if total <= devices * capacity.min() else None
    if slots is None:
        raise SolveError(f"does not fit: {total} slots a layer are wanted, the devices hold {int(capacity.sum())}")
    tolerates: tuple[Failure, ...] = ()
    if config.tolerate is not None:
        tolerates = tolerable(single_failures(problem.topology, (config.tolerate,)), slots, config.redundant)
        if not tolerates:
            raise SolveError(
                f"{config.redundant} redundant slots a layer are too few to survive any {config.tolerate} failure"
            )
    return replace(
        problem,
        device_slots=slots.tolist(),
        tolerates=tolerates,
        # Without a limit the plan in force only narrows the search.
        current=None if config.max_moved is None else current,
        max_moved_bytes=config.max_moved,
    )


def tolerable(failures: Sequence[Failure], device_slots: IntArray, redundant: int) -> tuple[Failure, ...]:
    """As many of the failures, no two of a device in common, as so many redundant slots can make survivable.

    device_slots: [G]. Experts on a device that may be lost need another replica elsewhere. Two such devices can hold
    each other's, so that half a redundant slot is enough for each slot on them; a failure alone needs a whole one.
    """
    chosen: list[Failure] = []
    covered = 0
    for failure in sorted(failures, key=lambda failure: int(device_slots[list(failure.devices)].sum())):
        slots = int(device_slots[list(failure.devices)].sum())
        if slots > redundant or covered + slots > 2 * redundant:
            break
        chosen.append(failure)
        covered += slots
    return tuple(chosen)


def _or_standing_by(plan: Plan, asked: Problem, points: Sequence[Point]) -> Plan:
    """The plan, or an earlier one with standbys in further slots where that is better on the steps solved on.

    A standby costs memory alone, so that what fewer slots reached, more slots reach too.
    """
    slots, load = asked.slots_per_device, asked.statistics.total_load
    best = plan
    for point in points:
        known = point.plan.certificate
        used = np.bincount(point.plan.slot_device, minlength=asked.num_devices)
        if point.config is None or known is None or best.certificate is None or (used > slots).any():
            continue
        if known.objective == best.certificate.objective and known.value < best.certificate.value:
            best = with_standbys(point.plan, slots, asked.tolerates, load) or best
    return best


def _judged(config: ParetoConfig | None, plan: Plan, problem: Problem, steps: Steps, current: Plan | None) -> Point:
    evaluation = evaluate(plan, steps, problem)
    regret = problem.objective.risk == "regret"
    return Point(
        config=config,
        plan=plan,
        evaluation=evaluation,
        seconds=evaluation.mean_seconds if regret else evaluation.risk(),
        survived={kind: int(survives(plan, single_failures(plan.topology, (kind,))).sum()) for kind in KINDS},
        migration=None if current is None else migration(current, plan),
    )


def _best(points: Sequence[Point]) -> BoolArray:
    figures = [
        (point.seconds, point.redundant, point.bytes_moved, *(-point.survived[kind] for kind in KINDS))
        for point in points
    ]
    return non_dominated(figures)


def non_dominated(figures: npt.ArrayLike) -> BoolArray:
    """[N] whether no row of figures [N, K], all to be small, is at most as large everywhere and smaller somewhere.

    Of equal rows all stay.
    """
    values = np.asarray(figures, dtype=np.float64)
    result = np.ones(len(values), dtype=bool)
    for i, row in enumerate(values):
        result[i] = not ((values <= row).all(axis=1) & (values < row).any(axis=1)).any()
    return result
