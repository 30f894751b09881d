"""How many slots each layer gets out of one budget of memory, against the KV cache that would fill it.

A redundant expert takes memory on every layer's budget alike and saves time where its layer is uneven. Each number of
slots is solved for once, for all layers together; what it saves in each layer is read off that plan, and the best mix
of layers for every size of the budget is a multiple-choice knapsack, solved exactly. Points are then whole plans'
predictions: redundant experts, tokens of KV cache that they displace, time of a step.

One point is recommended. Where the cache bounds how many sequences decode at once, tokens a second go with what is left
of the cache and against the time of a step; the point of most tokens a second is the one. It asks most of a redundant
expert: where the cache is never full, points further along the front cost nothing.

L layers, G devices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .._arguments import check_types
from .._types import FloatArray, IntArray
from ..placement.engines import Constraint
from ..placement.errors import InputError, SolveError, UnsupportedError
from ..placement.evaluate import evaluate
from ..placement.problem import Problem
from ..placement.progress import Listener, Progress
from ..placement.serving import cache_token_bytes, other_work
from ..placement.step_mix import problem_steps, step_mix
from .base import Feature, Solver, SolverOptions
from .search.annealer import cheapest_mix
from .solve import check_seconds, solve, solver_named

PARTS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Redundant slots of a layer that are looked at, in slots a device."""
BUDGETS = 16
"""Sizes of the budget for which the best mix of layers is a point."""
PROPOSALS = 4000
"""Of search a layer for each number of slots, where neither they nor seconds are given: plans are compared with one
another, the answer itself is solved for anew."""
JUDGED_TOKENS = 16_384
"""Of the steps of each batch on which plans are compared."""


@dataclass(frozen=True, eq=False)
class SlotPoint:
    """Slots of each layer, what they cost and what they bring.

    Attributes:
        device_slots: [L, G] slots of each layer on each device.
        redundant: experts over all layers beyond one slot each.
        memory: bytes of redundant experts on the device that holds most of them.
        cache_lost: share of the KV cache displaced, of what memory leaves with one slot an expert.
        cache_tokens_lost: tokens of it, on all devices; None where a token's bytes are not known.
        step_seconds: predicted, of the MoE layers.
        saved: part of a whole step's time that is saved against the fewest slots; whole as far as other work is known.
        throughput: tokens a second over those with the fewest slots where the cache bounds how many decode at once.
    """

    device_slots: IntArray
    redundant: int
    memory: float
    cache_lost: float
    cache_tokens_lost: float | None
    step_seconds: float
    saved: float
    throughput: float

    @property
    def slots(self) -> tuple[int, ...]:
        """Of each layer."""
        return tuple(self.device_slots.sum(axis=1).tolist())

    @property
    def even(self) -> bool:
        """Whether every layer has the same number."""
        return len(set(self.slots)) == 1

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "slots": list(self.slots),
            "even": self.even,
            "redundant_experts": self.redundant,
            "memory_bytes": self.memory,
            "cache_lost": self.cache_lost,
            "cache_tokens_lost": self.cache_tokens_lost,
            "step_seconds": self.step_seconds,
            "saved": self.saved,
            "throughput": self.throughput,
        }


@dataclass(frozen=True, eq=False)
class SlotFront:
    """Points from the fewest slots to the whole budget.

    Attributes:
        problem: whose slots are asked for.
        points: by redundant experts; what another point beats in memory and time is left out.
        even: the same number in every layer, each that was looked at.
        recommended: the point of most tokens a second among those that the problem's engine can run.
        memory_budget: bytes a device that redundant experts may take.
        cache_bytes: of the device with least, what memory leaves for KV cache with one slot an expert.
        token_bytes: of KV cache a token on its device, where known.
        other_seconds: of a step beside its MoE layers, as far as known.
    """

    problem: Problem
    points: tuple[SlotPoint, ...]
    even: tuple[SlotPoint, ...]
    recommended: SlotPoint
    memory_budget: float
    cache_bytes: float
    token_bytes: float | None
    other_seconds: float

    @property
    def recommended_even(self) -> SlotPoint:
        """The best one number for every layer."""
        return _most_tokens(self.even)

    def problem_with(self, point: SlotPoint) -> Problem:
        """The problem with a point's slots."""
        return _with_slots(self.problem, point.device_slots)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "memory_budget": self.memory_budget,
            "cache_bytes": self.cache_bytes,
            "cache_token_bytes": self.token_bytes,
            "other_seconds": self.other_seconds,
            "recommended": self.recommended.to_dict(),
            "recommended_even": self.recommended_even.to_dict(),
            "points": [point.to_dict() for point in self.points],
            "even": [point.to_dict() for point in self.even],
        }


@check_types
def slot_front(
    problem: Problem,
    *,
    memory_budget: float | None = None,
    token_bytes: float | None = None,
    other_ms: Mapping[str, float] | None = None,
    solver: str | Solver | SolverOptions | None = None,
    seconds: float | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    progress: Listener | None = None,
) -> SlotFront:
    """What redundant experts cost in KV cache and bring in time, layer by layer, under one budget of memory.

    Args:
        problem: names no slots. Its topology's `reserve` is memory that neither experts nor KV cache may have. Engines
            that want one number in every layer are recommended the best such number.
        memory_budget: most bytes of redundant experts on a device, all layers together; default: all that is left.
        token_bytes: of KV cache a token takes on its device, all layers; default: of known models.
        other_ms: milliseconds of a step beside its MoE layers by phase ("decode", "prefill"); default: estimated for
            known models, engines and GPUs, else none.
        solver: of each solve (see `solve`); default search.
        seconds: of all solves together; by default no limit.
        seed: of each solve.
        options: the solver's own.
        progress: called before each solve.

    Returns:
        The front. `front.problem_with(front.recommended)` is the problem to solve.

    Raises:
        InputError: the problem names slots, or a size that is not positive.
        UnsupportedError: an engine without replicas, a solver without them, or copies made online.
        SolveError: no number of slots has a plan.

    Example:
        >>> front = mp.slot_front(problem, memory_budget=4e9)  # doctest: +SKIP
        >>> plan = mp.solve(front.problem_with(front.recommended))  # doctest: +SKIP
    """
    check_seconds(seconds)
    _check(problem, memory_budget, token_bytes)
    solver = "search" if solver is None else solver
    left = float((problem.topology.expert_memory - problem.device_memory).min())
    budget = left if memory_budget is None else min(memory_budget, left)
    # Bounds of plans that are not the answer are not asked for.
    asked = {name: value for name, value in (options or {}).items() if name != "certify"}
    if isinstance(solver, str) and solver == "search" and seconds is None:
        asked.setdefault("proposals", PROPOSALS)
    costs = _measured(problem, _redundancies(problem, budget), solver, seconds, seed, asked, progress, other_ms)
    token_bytes = cache_token_bytes(problem.model) if token_bytes is None else token_bytes

    def points_of(mixes: Sequence[Sequence[int]]) -> list[SlotPoint]:
        each = [_point(problem, costs, mix, left, token_bytes) for mix in mixes]
        return [point for point in each if point.memory <= budget or point.redundant == 0]

    even = points_of([[row] * problem.model.layers for row in range(len(costs.redundant))])
    mixed = points_of(_mixes(costs, budget, problem)) if _may_mix(problem, solver) else []
    points = _undominated([*even, *mixed])
    return SlotFront(
        problem=problem,
        points=tuple(points),
        even=tuple(even),
        recommended=_most_tokens([*even, *mixed]),
        memory_budget=budget,
        cache_bytes=left,
        token_bytes=token_bytes,
        other_seconds=costs.other,
    )


@dataclass(frozen=True)
class _Costs:
    """seconds: [K, L] mean of a step in each layer, with each of K numbers of redundant slots. other: of a step beside
    its MoE layers."""

    redundant: list[int]
    seconds: FloatArray
    other: float


def _measured(
    problem: Problem,
    counts: Sequence[int],
    solver: str | Solver | SolverOptions,
    seconds: float | None,
    seed: int,
    options: Mapping[str, Any],
    progress: Listener | None,
    other_ms: Mapping[str, float] | None,
) -> _Costs:
    """Solves for each number of redundant slots, and reads each layer's time off the plan."""
    steps, began = (
        problem_steps(problem.statistics, problem, most_tokens=JUDGED_TOKENS, seed=seed),
        time.perf_counter(),
    )
    ms = _other_ms(problem) if other_ms is None else other_ms
    known: list[int] = []
    rows: list[FloatArray] = []
    other, refused = 0.0, ""
    for done, count in enumerate(counts):
        if progress is not None:
            elapsed = time.perf_counter() - began
            progress(Progress(elapsed, message=f"{count} redundant slots a layer", done=done, total=len(counts)))
        one = _with_slots(problem, _dealt([count] * problem.model.layers, problem))
        limit = None if seconds is None else seconds / len(counts)
        try:
            plan = solve(one, solver, seconds=limit, seed=seed, **options)
        except SolveError as error:
            refused = str(error)
            continue
        judged = evaluate(plan, steps, one)
        known.append(count)
        rows.append(judged.step_weight @ (judged.dispatch + judged.compute + judged.combine))
        other = sum(
            ms.get(name.partition(" ")[0], 0.0) / 1e3 * float(judged.step_weight[judged.batch == code].sum())
            for code, name in enumerate(judged.batches)
        )
    if not known:
        raise SolveError(f"no number of slots has a plan: {refused}")
    return _Costs(known, np.stack(rows), other)


def _point(problem: Problem, costs: _Costs, mix: Sequence[int], left: float, token_bytes: float | None) -> SlotPoint:
    """The point where each layer takes a row of the costs. left: bytes of a device for redundant experts and cache."""
    slots = _dealt([costs.redundant[row] for row in mix], problem)
    more = slots.sum(axis=0) - problem.layer_slots.sum(axis=0)
    taken = float(more.max() * problem.model.bytes_per_expert)
    moe = float(costs.seconds[list(mix), np.arange(problem.model.layers)].sum())
    before, after = float(costs.seconds[0].sum()) + costs.other, moe + costs.other
    lost = taken / left if left > 0 else 0.0
    return SlotPoint(
        device_slots=slots,
        redundant=int(more.sum()),
        memory=taken,
        cache_lost=lost,
        cache_tokens_lost=None if token_bytes is None else taken * problem.num_devices / token_bytes,
        step_seconds=moe,
        saved=1.0 - after / before,
        throughput=(1.0 - lost) * before / after,
    )


def _check(problem: Problem, memory_budget: float | None, token_bytes: float | None) -> None:
    if problem.slots is not None or problem.device_slots is not None:
        raise InputError("slot_front chooses the slots of each layer; leave slots and device_slots out")
    for name, value in (("memory_budget", memory_budget), ("token_bytes", token_bytes)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{name} ({value:g}) must be bytes above 0")
    if problem.profile is not None and Constraint.NO_REPLICAS in problem.profile.constraints:
        raise UnsupportedError(f"{problem.engine} gives every expert one slot: there are no slots to choose")
    if problem.objective.online:
        raise UnsupportedError("experts copied for one step have one home each: there are no slots to choose")


def _redundancies(problem: Problem, budget: float) -> list[int]:
    """Redundant slots of a layer to look at, 0 first: what the budget holds in one layer where layers may differ, in
    all layers where they may not."""
    model, devices = problem.model, problem.num_devices
    base = int(problem.layer_slots[0].sum())
    equal = problem.profile is not None and problem.profile.equal_slots
    layers = model.layers if equal else 1
    most = min(int(budget // (model.bytes_per_expert * layers)) * devices, model.experts * devices - base)
    parts = [part for part in PARTS if not equal or part == int(part)]
    return [0, *sorted({round(part * devices) for part in parts if 1 <= round(part * devices) <= most})]


def _with_slots(problem: Problem, device_slots: IntArray) -> Problem:
    alike = bool((device_slots == device_slots[0]).all())
    return replace(problem, device_slots=(device_slots[0] if alike else device_slots).tolist())


def _dealt(redundant: Sequence[int], problem: Problem) -> IntArray:
    """[L, G] slots where each layer has so many more: what does not divide by devices goes round them from layer to
    layer, so that none holds more than one more than another."""
    devices = problem.num_devices
    result, turn = problem.layer_slots.copy(), 0
    for layer, count in enumerate(redundant):
        result[layer] += count // devices
        result[layer, (turn + np.arange(count % devices)) % devices] += 1
        turn = (turn + count) % devices
    return result


def _may_mix(problem: Problem, solver: str | Solver | SolverOptions) -> bool:
    """Whether layers may have different numbers of slots."""
    if problem.profile is not None and problem.profile.equal_slots:
        return False
    name = solver.solver if isinstance(solver, SolverOptions) else solver
    named = solver_named(name) if isinstance(name, str) else name
    return Feature.LAYER_SLOTS in named.supports


def _mixes(costs: _Costs, budget: float, problem: Problem) -> list[list[int]]:
    """For each size of the budget the row of the costs that each layer takes, of least time in all."""
    known, (_, layers) = costs.redundant, costs.seconds.shape
    unit = math.gcd(*known) or 1
    at = {count // unit: row for row, count in enumerate(known)}
    values = []
    for layer in range(layers):
        value = np.full(known[-1] // unit + 1, np.inf)
        value[list(at)] = costs.seconds[:, layer]
        values.append(value)
    most = min(int(budget // problem.model.bytes_per_expert) * problem.num_devices, known[-1] * layers)
    sizes = sorted({round(most / unit * part / BUDGETS) for part in range(1, BUDGETS + 1)})
    return [[at[units] for units in cheapest_mix(values, size)[0]] for size in sizes]


def _other_ms(problem: Problem) -> Mapping[str, float]:
    known = other_work(problem.model, problem.topology, step_mix(problem).batches)
    return {} if known is None else known.ms


def _most_tokens(points: Sequence[SlotPoint]) -> SlotPoint:
    return max(points, key=lambda point: (point.throughput, -point.redundant))


def _undominated(points: Sequence[SlotPoint]) -> list[SlotPoint]:
    """By memory, each faster than all before it."""
    result: list[SlotPoint] = []
    for point in sorted(points, key=lambda point: (point.memory, point.step_seconds)):
        if not result or point.step_seconds < result[-1].step_seconds:
            result.append(point)
    return result
