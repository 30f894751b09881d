"""Exact placement of models with few placements a layer: the optimum is the cheapest path through all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import numpy as np

from .._types import BoolArray, FloatArray, IntArray
from ..placement.errors import InputError, SolveError, UnsupportedError, nearest
from ..placement.evaluate import evaluate_on
from ..placement.plan import Certificate, Plan
from ..placement.problem import Problem
from ..placement.step_mix import StepMix, batch_steps, mixed_steps, named_batch, step_mix
from ..placement.steps import PHASES, Phase, Steps
from .base import Budget, Feature, Needs, Solution, fill_slots
from .step_costs import PlacementSpace, StepCosts, device_sets

Minimise = Literal["transitions", "step"]

TRANSITIONS_OBJECTIVE = "cross-device transitions, share of all"

SAMPLE_TOKENS = 16_384
"""Tokens replayed when the number of steps is not given."""

MAX_STATES = 500_000
"""Placements of a layer up to renaming devices: what memory holds."""
MAX_PLACEMENTS = 400_000
"""Placements of a layer where neighbours are compared: 9 experts on 9 devices are 362,880."""
MAX_PAIRS = 250_000_000
"""Pairs of neighbouring placements compared a layer."""
MAX_STEP_SECONDS = 120
"""Work for the step objective, as `step_work` estimates it."""
MAX_COUNTS = 50_000_000
"""Counts of tokens by pairs of expert sets and step that are held at a time."""
BLOCK_PAIRS = 1 << 21
"""Pairs of placements priced at once: bounds memory to some tens of MB."""


class Chain:
    """Proves its plan optimal, where a layer has few placements (8 experts on 2, 4 or 8 devices, not 32 on 4)."""

    name = "chain"
    supports = frozenset({Feature.UNEVEN_SLOTS, Feature.PINNED})
    needs = frozenset({Needs.TRANSITIONS})

    def solve(
        self,
        problem: Problem,
        budget: Budget,
        *,
        minimise: Minimise | None = None,
        batch: Phase | None = None,
        step_tokens: int | None = None,
        steps: int | None = None,
    ) -> Solution:
        """The plan of least cost.

        Args:
            problem: without replicas.
            budget: whose seconds end it without a plan.
            minimise: "transitions", the share of transitions between layers that change device; or "step", the mean
                predicted step time under the problem's objective. By default "step" under dispatch_combine, where
                transitions cost nothing, and "transitions" under context_coherent, where they are what costs.
            batch: "decode" or "prefill", with step_tokens the steps that the seed draws from the statistics' token
                sample in place of the problem's batches.
            step_tokens: tokens of each step over all devices.
            steps: of each batch; by default as many as 16,384 tokens make, from 4 to 64.

        Raises:
            UnsupportedError: too many placements a layer, or figures to compute; a risk other than "mean" under
                "step"; statistics without transitions, or, for "step", without a token sample.
            SolveError: no placement respects the constraints, or the time limit came before the end.
            InputError: an unknown value of minimise or batch, or a size that is not positive.
        """
        if minimise is None:
            minimise = "transitions" if problem.objective.execution == "context_coherent" else "step"
        if minimise == "transitions":
            return _fewest_transitions(problem, budget)
        if minimise != "step":
            raise InputError(f"chain: minimise is {minimise!r}; {nearest(str(minimise), ('transitions', 'step'))}")
        if problem.objective.risk != "mean":
            raise UnsupportedError(
                f"chain minimises the mean step time: risk {problem.objective.risk!r} does not add up over layers, so "
                "the cheapest path need not be its optimum; use Objective(risk='mean') or minimise='transitions'"
            )
        if batch not in (None, *PHASES):
            raise InputError(f"chain: batch is {batch!r}; {nearest(str(batch), PHASES)}")
        for name, size in (("step_tokens", step_tokens), ("steps", steps)):
            if size is not None and size < 1:
                raise InputError(f"chain: {name} ({size}) must be at least 1")
        sample, mix = problem.statistics.require_sample(), _mix(problem, batch, step_tokens)
        parts = []
        for kind in mix.batches:
            tokens = kind.step_tokens(problem.num_devices)
            parts.append(batch_steps(sample, kind.phase, tokens, steps or _default_steps(tokens), budget.seed))
        sampled = mixed_steps(parts, mix)
        return fastest_step(
            problem, budget, sampled, f"{sampled.num_steps} sampled steps ({' and '.join(mix.names())})"
        )

    def work(
        self, problem: Problem, batch: Phase | None = None, step_tokens: int | None = None, steps: int | None = None
    ) -> float | None:
        """Estimated seconds of minimising step time on sampled steps, or None where it would be refused."""
        kinds = _mix(problem, batch, step_tokens).batches
        return self.work_on(
            problem, sum(steps or _default_steps(kind.step_tokens(problem.num_devices)) for kind in kinds)
        )

    def work_on(self, problem: Problem, count: int) -> float | None:
        """As `work`, on so many steps in all."""
        space = _space(problem, _device_kinds(problem))
        if _too_many(space, neighbours=problem.objective.execution == "context_coherent"):
            return None
        work = step_work(problem, space, count)
        return work if _steps_that_fit(problem, space, count, work) >= count else None


def _mix(problem: Problem, batch: Phase | None, step_tokens: int | None) -> StepMix:
    """The problem's batches, or the one named in their place."""
    if batch is None and step_tokens is None:
        return step_mix(problem)
    return step_mix(replace(problem, batches=(named_batch(batch, step_tokens),)))


def _default_steps(step_tokens: int) -> int:
    return max(4, min(64, SAMPLE_TOKENS // max(1, step_tokens)))


def _fewest_transitions(problem: Problem, budget: Budget) -> Solution:
    transitions = problem.statistics.total_transitions
    space = _space(problem, ["any"] * problem.num_devices)
    _check_placements(space, neighbours=True)
    sets = device_sets(space.representatives, problem.num_devices).astype(np.float64)

    def crossing(layer: int, left: IntArray, renamings: IntArray) -> FloatArray:
        expected = sets @ transitions[layer].T
        renamed = expected[:, np.argsort(renamings, axis=1)].transpose(1, 0, 2, 3)
        width = sets.shape[1] * sets.shape[2]
        local = sets[left].reshape(-1, width) @ renamed.reshape(-1, width).T
        cost = transitions[layer].sum() - local
        return np.asarray(cost.reshape(len(left), len(renamings), len(sets)).transpose(1, 0, 2))

    unary = np.where(allowed_states(problem, space), 0.0, np.inf)
    device_of, _ = cheapest_placements(space, list(unary), by_pairs(space, crossing), budget)
    crossed = sum(
        float(matrix[here[:, None] != after].sum())
        for matrix, here, after in zip(transitions, device_of[:-1], device_of[1:], strict=True)
    )
    value = crossed / float(transitions.sum()) if crossed else 0.0
    budget.report(value, value)
    return Solution(fill_slots(device_of), Certificate(TRANSITIONS_OBJECTIVE, value, value))


def fastest_step(problem: Problem, budget: Budget, steps: Steps, kind: str) -> Solution:
    """The plan of least mean step time, with its proof.

    Args:
        problem: without replicas, under the mean.
        budget: whose seconds end it without a plan.
        steps: whose tokens have no known source ranks.
        kind: names the steps in the certificate.

    Raises:
        UnsupportedError: as `Chain.solve`.
        SolveError: as `Chain.solve`.
    """
    topology, layers = problem.topology, problem.model.layers
    coherent = problem.objective.execution == "context_coherent"
    space = _space(problem, _device_kinds(problem))
    _check_placements(space, neighbours=coherent)
    _check_step_size(problem, space, steps.num_steps)
    allowed = allowed_states(problem, space)
    costs = StepCosts(problem, steps, space)
    unary = np.empty(allowed.shape)
    for layer in range(layers):
        check_time(budget, layer, layers)
        unary[layer] = np.where(allowed[layer], costs.unary(layer), np.inf)
    if coherent:
        device_of, value = cheapest_placements(space, list(unary), costs.cheapest_before, budget)
    else:
        device_of, value = space.representatives[unary.argmin(axis=1)], float(unary.min(axis=1).sum())
    table = fill_slots(device_of)
    plan = Plan(problem.model, topology, table, problem.slot_device)
    replayed = evaluate_on(plan, steps, problem.model, topology, problem.objective).mean_seconds
    # The path's own sum differs from the replay by rounding alone, and no bound may lie above its value.
    certificate = Certificate(f"mean predicted step seconds, {kind}", replayed, min(value, replayed))
    budget.report(certificate.value, certificate.bound)
    return Solution(table, certificate, separable=True)


def allowed_states(problem: Problem, space: PlacementSpace) -> BoolArray:
    """[L, R] which placements respect the problem's pinned and forbidden devices.

    Raises:
        SolveError: no placement of a layer does; the layer is named.
    """
    placed = space.representatives
    allowed = np.ones((problem.model.layers, len(placed)), dtype=bool)
    for (layer, expert), device in problem.pinned.items():
        allowed[layer] &= placed[:, expert] == device
    for (layer, expert), devices in problem.forbidden_devices.items():
        allowed[layer] &= ~np.isin(placed[:, expert], devices)
    stuck = np.flatnonzero(~allowed.any(axis=1))
    if len(stuck):
        raise SolveError(
            f"no placement of MoE layer {stuck[0]} respects its pinned and forbidden devices with "
            f"{list(space.slots)} slots a device; loosen Problem.pinned or Problem.forbidden there"
        )
    return allowed


def check_time(budget: Budget, layer: int, layers: int) -> None:
    """Raises SolveError once the budget's seconds are spent; tells the listener of progress otherwise."""
    if budget.spent:
        raise SolveError(
            f"chain had come to layer {layer} of {layers} when its {budget.seconds} s ran out, and has no plan before "
            "the last; give it more time, or use a solver that stops early (search, exflow, moetuner)"
        )
    budget.report(None, None, f"layer {layer} of {layers}")


def _device_kinds(problem: Problem) -> list[Hashable]:
    """What tells devices apart in a step whose tokens have no known source ranks: node and rates."""
    return [(number, device) for number, node in enumerate(problem.topology.nodes) for device in node.devices]


def _space(problem: Problem, kinds: Sequence[Hashable]) -> PlacementSpace:
    """The placements of a layer; a device named by a constraint is like no other."""
    named = set(problem.pinned.values()).union(*problem.forbidden_devices.values())
    kind = tuple(("named", g) if g in named else kind for g, kind in enumerate(kinds))
    return PlacementSpace(tuple(problem.slots_per_device.tolist()), kind)


def _too_many(space: PlacementSpace, neighbours: bool) -> bool:
    """Whether a space has too many placements to hold, or, with `neighbours`, to compare with one another."""
    states = space.count_representatives
    return states > MAX_STATES or (neighbours and (space.count > MAX_PLACEMENTS or space.count * states > MAX_PAIRS))


def _check_placements(space: PlacementSpace, neighbours: bool) -> None:
    if _too_many(space, neighbours):
        raise UnsupportedError(
            f"chain: {sum(space.slots)} experts fill slots {list(space.slots)} in {space.count:,} ways a layer "
            f"({space.count_representatives:,} up to renaming devices), too many to go through; use search, exflow or "
            "moetuner"
        )


def step_work(problem: Problem, space: PlacementSpace, steps: int) -> float:
    """Estimated seconds of the step objective on one core.

    As measured: 0.1 us a device's figure of a layer's own placements; for pairs 1.5 ns a device, and one pair in twenty
    priced in full, device by device and step.
    """
    devices, layers, states = problem.num_devices, problem.model.layers, space.count_representatives
    seconds = 1e-7 * states * steps * devices * layers
    if problem.objective.execution == "context_coherent":
        seconds += 1.5e-9 * states * space.count * (layers - 1) * (devices + steps * devices**2 / 20)
    return seconds


def _steps_that_fit(problem: Problem, space: PlacementSpace, steps: int, work: float) -> int:
    fit = int(steps * MAX_STEP_SECONDS / work)
    if problem.objective.execution == "context_coherent":
        fit = min(fit, MAX_COUNTS // _set_count(problem, space) ** 2)
    return fit


def _check_step_size(problem: Problem, space: PlacementSpace, steps: int) -> None:
    work = step_work(problem, space, steps)
    fit = _steps_that_fit(problem, space, steps, work)
    if fit < steps:
        raise UnsupportedError(
            f"chain: {space.count:,} placements a layer ({space.count_representatives:,} up to renaming devices) on "
            f"{steps} steps and {problem.model.layers} layers are too many to price (near {work:,.0f} s of work, "
            f"{MAX_STEP_SECONDS} s at most, and {MAX_COUNTS:,} counts at a time); "
            + (f"ask for fewer steps (steps={fit} fits), " if fit else "")
            + "minimise='transitions', or use search, exflow or moetuner"
        )


def _set_count(problem: Problem, space: PlacementSpace) -> int:
    """Distinct sets of experts that a device or a node can hold."""
    first = np.concatenate([[0], np.cumsum(problem.topology.node_size)[:-1]])
    node_slots = np.add.reduceat(np.array(space.slots), first)
    sizes = [*set(space.slots), *set(node_slots.tolist())]
    return sum(math.comb(problem.model.experts, size) for size in sizes)


class Predecessors(Protocol):
    """Called with a layer and reached[a], [R], the least cost of a path to each of its placements.

    Returns for each placement [R] of the next layer the least of reached[a] and the cost of the pair, over all a and
    renamings of the latter; which a; which renaming. A pair's cost must not change when both are renamed alike.
    """

    def __call__(self, layer: int, reached: FloatArray) -> tuple[FloatArray, IntArray, IntArray]: ...


class PairCost(Protocol):
    """Cost between two layers' placements, unchanged when both are renamed alike.

    Called with a layer, representatives [A] of it and renamings [H, G] of the next layer's; returns [H, A, R].
    """

    def __call__(self, layer: int, left: IntArray, renamings: IntArray) -> FloatArray: ...


def cheapest_placements(
    space: PlacementSpace, unary: Sequence[FloatArray], predecessors: Predecessors, budget: Budget
) -> tuple[IntArray, float]:
    """[L, E] device of each expert, and the least sum of unary[l] [R] and pair costs (Viterbi 1967).

    Devices that are alike may be renamed throughout a plan without changing its cost. So a layer's state is a placement
    up to renaming, the cost between two layers' states is the least over the second's renamings, and following the
    cheapest path fixes each layer's names in turn. 8 experts on 4 devices: 105 states instead of 2,520 placements.

    Raises:
        SolveError: the budget's seconds ran out; nothing short of the whole chain proves or places anything.
    """
    reached = unary[0]
    steps: list[tuple[IntArray, IntArray]] = []
    for layer, costs in enumerate(unary[1:]):
        check_time(budget, layer, len(unary))
        least, state, name = predecessors(layer, reached)
        steps.append((state, name))
        reached = least + costs
    path, names = [int(reached.argmin())], []
    for came_from, named in reversed(steps):
        names.append(int(named[path[-1]]))
        path.append(int(came_from[path[-1]]))
    devices = np.arange(len(space.slots))
    device_of = np.empty((len(unary), space.representatives.shape[1]), dtype=np.int64)
    for layer, here in enumerate(reversed(path)):
        if layer:
            devices = devices[space.renamings[names[-layer]]]
        device_of[layer] = devices[space.representatives[here]]
    return device_of, float(reached.min())


def by_pairs(space: PlacementSpace, pair: PairCost) -> Predecessors:
    """Predecessors found by pricing every pair, some tens of MB at a time."""
    states = len(space.representatives)
    height = max(1, min(len(space.renamings), BLOCK_PAIRS // states**2))
    width = max(1, BLOCK_PAIRS // (states * height))

    def predecessors(layer: int, reached: FloatArray) -> tuple[FloatArray, IntArray, IntArray]:
        least, state, name = np.full(states, np.inf), np.zeros(states, np.int64), np.zeros(states, np.int64)
        for left in range(0, states, width):
            some = np.arange(left, min(left + width, states))
            for first in range(0, len(space.renamings), height):
                costs = pair(layer, some, space.renamings[first : first + height]) + reached[some][:, None]
                flat = costs.reshape(-1, states)
                row = flat.argmin(axis=0)
                better = flat[row, np.arange(states)] < least
                least = np.where(better, flat[row, np.arange(states)], least)
                state = np.where(better, some[row % len(some)], state)
                name = np.where(better, first + row // len(some), name)
        return least, state, name

    return predecessors


def cheapest_path(unary: Sequence[FloatArray], pair: Callable[[int], FloatArray]) -> tuple[IntArray, float]:
    """One state a layer, such that the sum of the states' and the neighbours' costs is least (Viterbi 1967).

    Args:
        unary: L arrays, [S_l] cost of each state of layer l; layers may have different numbers of states. Costs may be
            +inf (not allowed), never NaN.
        pair: pair(l) is the [S_l, S_{l+1}] cost of layer l's state followed by layer l+1's. Called once for each l from
            0 to L-2, in order; one matrix is held at a time.

    Returns:
        ([L] states, their cost); of equally cheap states the first is taken. The cost is +inf when every path is
        forbidden.

    Raises:
        InputError: no layer, a layer without states, or a matrix of the wrong shape.
    """
    if not unary or any(costs.ndim != 1 or not len(costs) for costs in unary):
        raise InputError(f"cheapest_path: every layer needs at least one state, given {[np.shape(c) for c in unary]}")
    reached = np.asarray(unary[0], dtype=np.float64)
    came_from: list[IntArray] = []
    for layer, costs in enumerate(unary[1:]):
        through = np.asarray(pair(layer), dtype=np.float64)
        if through.shape != (len(reached), len(costs)):
            raise InputError(
                f"cheapest_path: pair({layer}) has shape {through.shape}, expected {(len(reached), len(costs))}"
            )
        through = through + reached[:, None]
        best = through.argmin(axis=0)
        came_from.append(best)
        reached = through[best, np.arange(len(costs))] + costs
    states = [int(reached.argmin())]
    for best in reversed(came_from):
        states.append(int(best[states[-1]]))
    return np.array(states[::-1], dtype=np.int64), float(reached.min())
