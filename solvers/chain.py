"""Exact placement of models with few placements a layer: the optimum is the cheapest path through all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array

from .._types import BoolArray, FloatArray, IntArray
from ..placement.cost import Flows, TransferCost, Transfers, compute_seconds, flows_between, flows_from_even_sources
from ..placement.errors import InputError, SolveError, UnsupportedError, nearest
from ..placement.evaluate import evaluate_on
from ..placement.plan import Certificate, Plan
from ..placement.problem import Problem
from ..placement.step_mix import StepMix, batch_steps, mixed_steps, named_batch, step_mix
from ..placement.steps import PHASES, Phase, Steps
from .base import Budget, Feature, Needs, Solution, fill_slots

if TYPE_CHECKING:
    from .set_traffic import SetTraffic


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


# Mean predicted seconds of many placements of a layer at once, exactly as replaying the steps gives them.
#
# What a device costs depends on the set of experts it holds, and few sets make up many placements: tokens are counted
# once a set, then looked up. Shapes: S steps, T tokens, R placements, M distinct sets, E experts, G (H) devices, N
# nodes.

BLOCK_VALUES = 1 << 19
"""Floats a working array may hold: small enough for the cache, large enough to keep the interpreter out of the way."""


@dataclass(frozen=True)
class PlacementSpace:
    """The placements of E experts on devices with `slots` [G] slots, E in all, one expert a slot.

    kind: what tells devices apart, one entry a device: two may be swapped throughout when slots and kind agree.
    """

    slots: tuple[int, ...]
    kind: tuple[Hashable, ...]

    @property
    def count(self) -> int:
        """How many placements there are, devices told apart: a multinomial coefficient."""
        left, result = sum(self.slots), 1
        for size in self.slots:
            result *= math.comb(left, size)
            left -= size
        return result

    @property
    def count_representatives(self) -> int:
        # A device that may be renamed is not empty, so that renaming never leaves a placement as it was.
        return self.count // math.prod(math.factorial(len(alike)) for alike in self._alike)

    @cached_property
    def _alike(self) -> list[list[int]]:
        """Devices in classes of interchangeable ones; an empty device stands alone."""
        classes: dict[Hashable, list[int]] = {}
        for device, (size, kind) in enumerate(zip(self.slots, self.kind, strict=True)):
            classes.setdefault((size, kind) if size else ("empty", device), []).append(device)
        return list(classes.values())

    @cached_property
    def renamings(self) -> IntArray:
        """[H, G] renamings[h, g] is the device that device g becomes; the first changes nothing."""
        result = []
        for images in itertools.product(*(itertools.permutations(alike) for alike in self._alike)):
            row = np.empty(len(self.slots), dtype=np.int64)
            for alike, image in zip(self._alike, images, strict=True):
                row[alike] = image
            result.append(row)
        return np.array(result)

    @cached_property
    def representatives(self) -> IntArray:
        """[R, E] device of each expert, one placement of those that renaming turns into each other.

        It is the one whose interchangeable devices stand in the order of their first experts.
        """
        opens_after = np.full(len(self.slots), -1)
        for alike in self._alike:
            opens_after[alike[1:]] = alike[:-1]
        full = np.array(self.slots)
        free = full[None].astype(np.int16)
        placed = np.empty((1, 0), dtype=np.int16)
        for _ in range(sum(self.slots)):
            opened = (opens_after < 0) | (free[:, opens_after] < full[opens_after])
            parent, device = np.nonzero((free > 0) & opened)
            placed = np.column_stack([placed[parent], device.astype(np.int16)])
            free = free[parent]
            free[np.arange(len(free)), device] -= 1
        return placed.astype(np.int64)


def device_sets(device_of: IntArray, devices: int) -> BoolArray:
    """[R, G, E] which experts stand on each device, from [R, E] the device of each expert."""
    return np.asarray(device_of[:, None, :] == np.arange(devices)[:, None])


class StepCosts:
    """Prices the placements of a layer, up to renaming, and their neighbourhood, on steps."""

    def __init__(self, problem: Problem, steps: Steps, space: PlacementSpace) -> None:
        self._steps, self._model, self._weight = steps, problem.model, steps.step_weight
        self._topology, self._objective = problem.topology, problem.objective
        transfers = Transfers.of(problem.model, problem.topology, problem.objective)
        self._transfers, self._waits = transfers.of_steps(steps), transfers.waits(steps)
        self._load = steps.loads().astype(np.float64)
        self._on_device = device_sets(space.representatives, problem.num_devices)
        self._renamings = space.renamings
        self._sets, self._set_of = _distinct(self._on_device)
        on_node = np.logical_or.reduceat(self._on_device, problem.topology.node_start, axis=1)
        self._node_sets, self._node_set_of = _distinct(on_node)
        self._all_sets, self._all_set_of = _distinct(np.concatenate([self._on_device, on_node], axis=1))

    @property
    def coherent(self) -> bool:
        return self._objective.execution == "context_coherent"

    def unary(self, layer: int) -> FloatArray:
        """[R] seconds of the layer that depend on its own placement alone.

        With combine where tokens return to their source rank, without the dispatch from the layer before where they do
        not.
        """
        ids, load = self._steps.expert_ids[:, layer], self._load[:, layer]
        sets = self._sets.T.astype(np.float64)
        tokens, touched = load @ sets, (load > 0) @ sets
        from_source = not self.coherent or layer == 0
        reached = [self._source_tables(ids, transfer.pairs) for transfer, _ in self._transfers] if from_source else None
        result = np.empty(len(self._on_device))
        for block in self._blocks():
            of = self._set_of[block]
            seconds = compute_seconds(tokens[:, of], touched[:, of], self._model, self._topology).max(axis=-1)
            if reached is not None:
                seconds += self._from_sources(reached, block)
            result[block] = self._weight @ seconds
        if self.coherent and self._steps.top_k > 1:
            # Outputs of a token's other experts, to its owner. A link's larger direction is the same both ways.
            back = self._links.back * self._traffic.within(self._owned(ids[:, 0], ids[:, 1:]))
            result += self._links.fixed[1] + back
        return result

    def cheapest_before(self, layer: int, reached: FloatArray) -> tuple[FloatArray, IntArray, IntArray]:
        """The cheapest way to each placement of layer + 1 from those of `layer`, whose cost is reached [R].

        Returns:
            ([R] the least of reached[a] plus the seconds of the dispatch from the owners under placement a, over all a
            and renamings; [R] that a; [R] the renaming).
        """
        before, after = self._steps.expert_ids[:, layer], self._steps.expert_ids[:, layer + 1]
        least, state, name = self._traffic.cheapest_before(reached, self._owned(before[:, 0], after))
        return least + self._links.fixed[0], state, name

    @property
    def _links(self) -> TransferCost:
        """Where tokens stay with their experts all steps' transfers are of one kind."""
        return self._transfers[0][0]

    def _from_sources(self, reached: list[tuple[FloatArray, FloatArray]], block: slice) -> FloatArray:
        """[S, B] seconds of what goes out from tokens' source ranks, and returns there unless they stay."""
        out, back = self._waits
        result = np.zeros((self._steps.num_steps, len(self._set_of[block])))
        result += (out if self.coherent else out + back)[:, None]
        for (transfer, of_kind), tables in zip(self._transfers, reached, strict=True):
            busiest = transfer.links(self._source_flows(*tables, block, transfer.dedup)).max(axis=-1)
            seconds = busiest * (1.0 if self.coherent else 1.0 + transfer.back)
            result += np.where(of_kind[:, None], seconds, 0.0)
        return result

    def _source_tables(self, ids: npt.NDArray[Any], pairs: bool) -> tuple[FloatArray, FloatArray]:
        """Tokens, or `pairs` of them and their experts, for a device or a node holding the set: [S, M], or [S, G, M] by
        source rank where that is known."""
        source, devices = self._steps.source, self._on_device.shape[1]
        if source is None:
            return (
                self._count(None, 1, ids, self._sets, pairs)[:, 0],
                self._count(None, 1, ids, self._node_sets, pairs)[:, 0],
            )
        return (
            self._count(source, devices, ids, self._sets, pairs),
            self._count(source, devices, ids, self._node_sets, pairs),
        )

    def _source_flows(self, reached: FloatArray, node_reached: FloatArray, block: slice, dedup: bool) -> Flows:
        of, node_of = self._set_of[block], self._node_set_of[block]
        if self._steps.source is None:
            return flows_from_even_sources(reached[:, of], node_reached[:, node_of], self._topology, dedup)
        pairs = reached[:, :, of].transpose(0, 2, 1, 3)
        return flows_between(pairs, node_reached[:, :, node_of].transpose(0, 2, 1, 3), self._topology, dedup)

    @cached_property
    def _traffic(self) -> SetTraffic:
        # Compiled kernels: loading them takes a second, which solvers of other problems do without.
        from .set_traffic import Links, SetTraffic

        topology, cost = self._topology, self._links
        first = np.concatenate([[0], np.cumsum(topology.node_size)])
        links = Links(cost.per_copy, cost.per_node_copy, topology.node_of, first, cost.dedup)
        set_of, node_set_of = np.split(self._all_set_of, [topology.num_devices], axis=1)
        return SetTraffic(set_of, node_set_of, self._all_sets, self._renamings, links)

    def _owned(self, first: npt.NDArray[Any], ids: npt.NDArray[Any]) -> FloatArray:
        """[S, E, M] tokens by their highest-weight expert `first` [T] that also chose, in `ids`, one of each set, times
        what a step counts beside the mean one: seconds on links are in proportion to tokens."""
        counted = self._count(first, self._steps.num_experts, ids, self._all_sets)
        return counted * (self._weight * self._steps.num_steps)[:, None, None]

    def _count(
        self, key: npt.NDArray[Any] | None, keys: int, ids: npt.NDArray[Any], sets: BoolArray, pairs: bool = False
    ) -> FloatArray:
        """[S, K, M] tokens of each step and key that chose an expert of the set, or `pairs` of them and such experts.

        ids: [T, k]; sets: [M, E].
        """
        # Where experts are few many tokens choose alike: they are counted once a choice, and choices once a set.
        chosen, which = _distinct_choices(ids, sets.shape[1])
        steps, row = self._steps.num_steps, self._steps.step_of * keys
        cells = np.ones(len(which)), (row if key is None else row + key, which)
        tokens = csr_array(coo_array(cells, shape=(steps * keys, len(chosen))))
        members, result = sets.T.astype(np.float32), np.empty((steps * keys, len(sets)))
        width = max(1, BLOCK_VALUES // max(1, len(chosen)))
        for first in range(0, len(sets), width):
            some = slice(first, first + width)
            counted = chosen @ members[:, some]
            result[:, some] = tokens @ (counted if pairs else counted > 0).astype(np.float64)
        return result.reshape(steps, keys, len(sets))

    def _blocks(self) -> Iterator[slice]:
        devices = self._on_device.shape[1]
        width = max(1, BLOCK_VALUES // (self._steps.num_steps * devices * devices))
        for first in range(0, len(self._on_device), width):
            yield slice(first, first + width)


def _distinct(sets: BoolArray) -> tuple[BoolArray, IntArray]:
    """The distinct sets [M, E] among [R, X, E], and which of them each is [R, X]."""
    flat = sets.reshape(-1, sets.shape[2])
    _, first, inverse = np.unique(np.packbits(flat, axis=1), axis=0, return_index=True, return_inverse=True)
    return flat[first], inverse.reshape(sets.shape[:2]).astype(np.int64)


def _distinct_choices(ids: npt.NDArray[Any], experts: int) -> tuple[npt.NDArray[np.float32], IntArray]:
    """The sets of experts [U, E] that tokens chose, 1 where one is in it, and which of them each token's is [T].

    ids: [T, k].
    """
    chosen = np.zeros((len(ids), experts), dtype=np.uint8)
    np.put_along_axis(chosen, ids.astype(np.int64), np.uint8(1), axis=1)
    packed = np.zeros((len(ids), -(-experts // 64) * 8), dtype=np.uint8)
    packed[:, : -(-experts // 8)] = np.packbits(chosen, axis=1)
    # A few whole numbers a token: one sorts some fifty times faster than rows do.
    keys = packed.view(np.uint64)
    if keys.shape[1] == 1:
        _, first, which = np.unique(keys[:, 0], return_index=True, return_inverse=True)
    else:
        _, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return chosen[first].astype(np.float32), which.reshape(-1).astype(np.int64)
