"""What a device costs at least by the experts it holds: every set that fits on one, and single experts.

Where devices have c slots each, all equal, and experts stand whole, a placement of a layer is a partition of its
experts into sets of c. What a device computes and how many tokens reach it from elsewhere depends on its set alone, so
that few enough sets can each be priced in full: no average over links, and every step's own.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..._types import FloatArray, IntArray
from ...placement.bounds import compute_bound, layer_seconds_bound
from ...placement.cost import ExpertCost, TransferCost, Transfers
from ...placement.jit import kernel
from ...placement.problem import Problem
from ...placement.steps import Steps
from ...placement.topology import Topology
from ..base import working_seconds
from ..mip.highs import QuietHighs
from .sdp import ROUNDING
from .set_pairs import PairCosts

MOST_SETS = 60_000
"""Sets gone through: 32 experts on 8 devices have 35,960, 128 on 64 have 8,128."""
ROWS = 512
"""Rows of a linear program, experts times figures: steps are added up in groups so that there are no more."""


def sets_fit(problem: Problem) -> bool:
    """Whether a device's sets can be gone through: equal slots, no replicas, few enough."""
    slots, experts = problem.slots_per_device, problem.model.experts
    alike = (
        problem.layers_alike
        and not problem.has_replicas
        and bool((slots == slots[0]).all())
        and problem.num_devices > 1
    )
    return alike and math.comb(experts, int(slots[0])) <= MOST_SETS


class DeviceSets:
    """Prices all sets of a problem on steps whose times count by `weight` [S] (summing to one).

    groups: of steps that are added up, about so many at most; by default as many as `ROWS` allow. members: [A, c]
    experts of each set.
    """

    def __init__(self, problem: Problem, steps: Steps, weight: FloatArray, groups: int | None = None) -> None:
        self._problem, self._steps, self._weight = problem, steps, weight
        self.devices, experts = problem.num_devices, problem.model.experts
        slots = int(problem.slots_per_device[0])
        self.members: IntArray = np.array(list(itertools.combinations(range(experts), slots)), dtype=np.int64)
        self._loads = steps.loads().astype(np.float64)
        self._floor = compute_bound(self._loads, problem)
        self._transfer_floor = layer_seconds_bound(steps, problem) - self._floor
        self._link_floors = link_floors(problem, steps, self._loads)
        transfers = Transfers.of(problem.model, problem.topology, problem.objective)
        self._waits, self._kinds = transfers.waits(steps), transfers.of_steps(steps)
        # What a returning copy costs beside one going out.
        self._back = min(transfer.back for transfer, _ in self._kinds)
        self._groups = _groups(weight, groups or max(1, ROWS // (experts * (3 if self._coherent else 2))))

    @property
    def _coherent(self) -> bool:
        return self._problem.objective.execution == "context_coherent"

    def work(self, layer: int) -> FloatArray:
        """[R, A] weighted seconds of compute that a layer takes at least where a device holds the set.

        R groups of steps, A sets.
        """
        problem, topology = self._problem, self._problem.topology
        model, loads, floor = problem.model, self._loads[:, layer], self._floor[:, layer, None]
        hits = (loads > 0).astype(np.float64)
        result = floor + np.zeros(len(self.members))
        cost = ExpertCost.of(model, topology)
        base = cost.base(loads.sum(axis=1)).min(axis=1, keepdims=True)
        here = [amount[:, self.members].sum(axis=2) for amount in (loads, hits)]
        rest = [amount.sum(axis=1, keepdims=True) - mine for amount, mine in zip((loads, hits), here, strict=True)]
        for pair, read, unit in zip(cost.pair, cost.read, (cost.pair[0], cost.read[1]), strict=True):
            # What the others have left to do takes at least as long as all of them together need.
            others = float((1.0 / unit).sum() - 1.0 / unit.max())
            left = rest[0] * float((pair / unit).min()) + rest[1] * float((read / unit).min())
            mine = here[0] * float(pair.min()) + here[1] * float(read.min())
            result = np.maximum(result, base + np.maximum(mine, left / others))
        return self._grouped(result * self._weight[:, None])

    def transfers(self, layer: int) -> FloatArray:
        """[R, A] weighted seconds of each all-to-all that a layer takes at least where a device holds the set.

        Latency included; in dispatch_combine both ways as one.
        """
        steps = self._steps
        ids = steps.expert_ids[:, layer].astype(np.int64)
        dispatch, combine = (floor[:, layer] for floor in self._link_floors)
        evenly = 0.0 if steps.source is not None else self._rate(from_device=False)
        wait_out, wait_back = self._waits
        if not self._coherent:
            carried, waits = 1.0 + self._back, wait_out + wait_back
            floor = np.maximum(dispatch * carried, self._transfer_floor[:, layer] - waits)
            return self._all_to_all(self._reached(ids) * (evenly * carried), floor, waits)
        if layer == 0:
            copies = self._reached(ids) * evenly
        else:
            copies = self._reached_from(ids, steps.expert_ids[:, layer - 1, 0].astype(np.int64)) * self._rate(
                from_device=True
            )
        out = self._all_to_all(copies, dispatch, wait_out)
        if ids.shape[1] == 1:
            return out
        copies = self._reached(ids, owner=ids[:, 0]) * self._rate(from_device=True)
        return np.concatenate([out, self._all_to_all(copies * self._back, combine * self._back, wait_back)])

    def pairs(self, layer: int) -> tuple[PairCosts, float]:
        """What the layer's sets cost with those of the layer before (`set_pairs`), and the seconds beside.

        Holds on one node, for layers after the first in context_coherent.
        """
        steps = self._steps
        ids, before = (steps.expert_ids[:, at].astype(np.int64) for at in (layer, layer - 1))
        led, owned = self._by_owner(ids, before[:, 0]), self._by_owner(ids[:, 1:], ids[:, 0])
        out = self._one_weight * self._rate(from_device=True)
        dispatch, combine = (self._grouped(floor[:, layer] * self._weight) for floor in self._link_floors)
        wait_out, wait_back = (float(self._weight @ wait) for wait in self._waits)
        # A token of one expert has nothing to send back.
        waits = wait_out + (wait_back if ids.shape[1] > 1 else 0.0)
        floors = np.stack([dispatch, combine * self._back])
        return PairCosts(self.members, self.work(layer), led, owned, out, out * self._back, floors), waits

    def _by_owner(self, ids: IntArray, owner: IntArray) -> npt.NDArray[Any]:
        """[R, A, E] tokens of each group of steps that chose an expert of each set, by the one that owns them."""
        experts, groups = self._problem.model.experts, self._groups
        most = max(int(self._steps.tokens[group].sum()) for group in groups)
        result = np.zeros((len(groups), len(self.members), experts), np.min_scalar_type(most))
        if ids.shape[1]:
            for number, group in enumerate(groups):
                result[number] = self._count_group(ids, owner, experts, None, group)
        return result

    def _rate(self, from_device: bool) -> float:
        """Seconds of a copy that a device receives inside its node, in no step less.

        from_device: from one that is known, else evenly.
        """
        return min(_receiving(transfer, self._problem.topology, from_device) for transfer, _ in self._kinds)

    @property
    def _one_weight(self) -> FloatArray:
        """[R] the weight of a step of each group."""
        return np.array([self._weight[group[0]] for group in self._groups])

    def _all_to_all(self, seconds: FloatArray, floor: FloatArray, waits: FloatArray) -> FloatArray:
        """[R, A] from the busiest link's seconds [R, A] a step, a floor [S], and what no plan changes [S]."""
        least = self._grouped((floor * self._weight)[:, None])
        beside = self._grouped((waits * self._weight)[:, None])
        return np.asarray(np.maximum(seconds * self._one_weight[:, None], least) + beside)

    def _grouped(self, figures: FloatArray) -> FloatArray:
        """[R, ...] sums of [S, ...] over the steps of each group."""
        return np.stack([figures[group].sum(axis=0) for group in self._groups])

    def _reached(self, ids: IntArray, owner: IntArray | None = None) -> FloatArray:
        """[R, A] tokens of each group of steps that must come to a device of each set.

        owner: [T] experts on whose devices they are already.
        """
        nowhere = np.zeros(len(ids), np.int64)
        return self._counted(ids, nowhere, 1, owner)[:, :, 0].astype(np.float64)

    def _reached_from(self, ids: IntArray, before: IntArray) -> FloatArray:
        """[R, A] the same where each token is on the device of an expert of the layer before.

        before: [T] those experts; whichever fit may stand on the set's device.
        """
        size = self.members.shape[1]
        by_leader = self._counted(ids, before, self._problem.model.experts, None)
        return by_leader.sum(axis=2) - _largest(by_leader, size)

    def _counted(self, ids: IntArray, segment: IntArray, segments: int, owner: IntArray | None) -> IntArray:
        return np.stack([self._count_group(ids, segment, segments, owner, group) for group in self._groups])

    def _count_group(
        self, ids: IntArray, segment: IntArray, segments: int, owner: IntArray | None, group: IntArray
    ) -> IntArray:
        """[A, Q] tokens of some steps, by their segment, that chose an expert of each set and are led by none of it."""
        experts = self._problem.model.experts
        result = np.zeros((len(self.members), segments), np.int64)
        tokens = np.flatnonzero(np.isin(self._steps.step_of, group))
        tokens = tokens[np.argsort(segment[tokens], kind="stable")]
        place, word_segment = _word_places(np.bincount(segment[tokens], minlength=segments))
        chose, led = (np.zeros((experts, 64 * len(word_segment)), np.uint8) for _ in range(2))
        chose[ids[tokens], place[:, None]] = 1
        if owner is not None:
            led[owner[tokens], place] = 1
        count_reached(_words(chose), _words(led), word_segment, self.members, result)
        return result


def _groups(weight: FloatArray, most: int) -> list[IntArray]:
    """Steps of equal weight, split into about `most` groups (more where weights differ more)."""
    alike = [np.flatnonzero(weight == value) for value in np.unique(weight)]
    parts = [max(1, round(most * len(steps) / len(weight))) for steps in alike]
    return [
        part
        for steps, count in zip(alike, parts, strict=True)
        for part in np.array_split(steps, min(count, len(steps)))
    ]


def _word_places(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Bits [T] of tokens in order of their segments, each of which begins a new word; and the segment of each word."""
    words = -(-counts // 64)
    start = 64 * (np.cumsum(words) - words)
    inside = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(start, counts) + inside, np.repeat(np.arange(len(counts)), words)


def _words(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(np.packbits(bits, axis=1)).view(np.uint64)


def _largest(counts: IntArray, some: int) -> FloatArray:
    """[R, A] the sum of the largest of the last axis."""
    last = counts.shape[2]
    return np.asarray(np.partition(counts, last - some, axis=2)[:, :, last - some :].sum(axis=2), dtype=np.float64)


# Tokens as bits: how many of them chose an expert of a set.


M1 = np.uint64(0x5555555555555555)
M2 = np.uint64(0x3333333333333333)
M4 = np.uint64(0x0F0F0F0F0F0F0F0F)
H01 = np.uint64(0x0101010101010101)
ONE, TWO, FOUR, TOP = np.uint64(1), np.uint64(2), np.uint64(4), np.uint64(56)


@kernel
def count_reached(chose: Any, led: Any, segment: Any, sets: Any, result: Any) -> None:
    """result[a, q]: tokens of segment q that chose an expert of sets[a] and are led by none of it.

    chose, led: [E, W] a bit a token, by expert. segment: [W] of each word. sets: [A, c], neighbours alike in their
    first experts, whose unions are kept. result: [A, Q] zeros.
    """
    count, size = sets.shape
    words = chose.shape[1]
    any_of = np.zeros((size, words), dtype=np.uint64)
    led_by = np.zeros((size, words), dtype=np.uint64)
    for a in range(count):
        first = 0
        if a > 0:
            while first < size - 1 and sets[a, first] == sets[a - 1, first]:
                first += 1
        for place in range(first, size):
            e = sets[a, place]
            for w in range(words):
                before, led_before = np.uint64(0), np.uint64(0)
                if place > 0:
                    before, led_before = any_of[place - 1, w], led_by[place - 1, w]
                any_of[place, w] = before | chose[e, w]
                led_by[place, w] = led_before | led[e, w]
        for w in range(words):
            x = any_of[size - 1, w] & ~led_by[size - 1, w]
            x -= (x >> ONE) & M1
            x = (x & M2) + ((x >> TWO) & M2)
            x = (x + (x >> FOUR)) & M4
            result[a, segment[w]] += np.int64((x * H01) >> TOP)


def link_floors(problem: Problem, steps: Steps, loads: FloatArray) -> tuple[FloatArray, FloatArray]:
    """What one expert alone puts on the links of its device, whatever stands where.

    The tokens that chose an expert must reach its device: the busiest device receives at least those of the most chosen
    expert, less the ones that may be there already. With one expert a device that is all there is to know.

    Args:
        problem: gives topology and objective.
        steps: S steps.
        loads: [S, L, E] tokens of each expert.

    Returns:
        ([S, L], [S, L]) seconds that dispatch and combine take at least for copies that each cost what one going out
        does, what no plan changes left out. Zeros where nothing can be said: with replicas, whose tokens are split.
    """
    topology, objective = problem.topology, problem.objective
    nodes, nothing = topology.num_nodes, np.zeros(loads.shape[:2])
    if problem.has_replicas or topology.num_devices == 1:
        return nothing, nothing
    from_sources, kinds = nothing, Transfers.of(problem.model, topology, objective).of_steps(steps)
    if steps.source is None:
        for transfer, of_kind in kinds:
            evenly = loads.max(axis=2) * _receiving(transfer, topology, from_device=False)
            from_sources = np.where(of_kind[:, None], evenly, from_sources)
    if objective.execution == "dispatch_combine":
        return from_sources, from_sources
    rate = _receiving(kinds[0][0], topology, from_device=True)
    slots = int(problem.slots_per_device.max())
    dispatch, combine = nothing.copy(), nothing.copy()
    for s, block in enumerate(steps.blocks()):
        ids = block.astype(np.int64)
        for layer in range(ids.shape[1]):
            if layer > 0:
                counts = _by_leader(ids[:, layer - 1, 0], ids[:, layer], loads.shape[2])
                dispatch[s, layer] = _busiest(counts, slots, slots, alone=slots == 1 and nodes == 1)
            if ids.shape[2] > 1:
                counts = _by_leader(ids[:, layer, 0], ids[:, layer, 1:], loads.shape[2])
                combine[s, layer] = _busiest(counts, slots - 1, 0, alone=slots == 1 and nodes == 1)
    dispatch, combine = dispatch * rate, combine * rate
    dispatch[:, 0] = from_sources[:, 0]
    return dispatch, combine


def _receiving(transfer: TransferCost, topology: Topology, from_device: bool) -> float:
    """Seconds of a copy that a device receives inside its node, from a device that is known or evenly."""
    smallest = float(topology.node_size.min())
    # A copy from another node is fanned out inside from a device chosen evenly; unmerged ones come by other links.
    passing = (smallest - 1.0) / smallest
    if from_device:
        rate = 1.0 if topology.num_nodes == 1 else passing if transfer.dedup else 0.0
    else:
        rate = passing if transfer.dedup else (smallest - 1.0) / topology.num_devices
    return rate * float(transfer.per_copy.min())


def _by_leader(owner: IntArray, chosen: IntArray, experts: int) -> IntArray:
    """[E, E] tokens by the expert that leads them and each expert chosen [T, j]."""
    pairs = owner[:, None] * experts + chosen
    return np.bincount(pairs.ravel(), minlength=experts * experts).reshape(experts, experts)


def _busiest(by_leader: IntArray, beside: int, own: int, alone: bool) -> float:
    """Copies received by the device of some expert, when the leads of `beside` experts may stand there.

    alone: one expert a device on one node, where an owner's device also sends one copy for each expert chosen, those of
    `own` experts aside that may stand beside it.
    """
    experts = len(by_leader)
    there = np.sort(by_leader, axis=0)[experts - beside :].sum(axis=0)
    busiest = float((by_leader.sum(axis=0) - there).max())
    if alone:
        spared = np.sort(by_leader, axis=1)[:, experts - own :].sum(axis=1)
        busiest = max(busiest, float((by_leader.sum(axis=1) - spared).max()))
    return busiest


# Lower bounds over partitions of experts into sets, by a linear program whose columns are sets.
#
# Whatever set a given expert is in, a step takes at least what that set alone costs. With x[A] the chance that A is one
# of the sets, each figure k is thus at least the sum over sets A of expert i of x[A] cost[k, A], for every i. Sets are
# added as the program's prices ask for them (Gilmore and Gomory, Oper. Res. 9, 1961), prices being taken from an
# interior point, which spares most of the rounds (Gondzio, Gonzalez-Brevis and Munari, Eur. J. Oper. Res. 224, 2013).

CLOSE = 2e-3
"""Rounds end when the bound is this near, relatively, to the value of the program's own sets."""
ADDED, FIRST = 400, 800
"""Sets added a round, and to begin with."""
TRUSTED = 1e-4
"""Relative tolerance of an interior point: prices need not be better than that, as the bound holds for any."""
ROUNDS = 50


def least_over_partitions(members: IntArray, cost: FloatArray, sets: int, seconds: float) -> float:
    """A lower bound, over all partitions of experts into `sets` of the sets `members` [A, c], of the sum over k of the
    largest cost[k, A] among the partition's sets. cost: [K, A], not negative; members in lexicographic order.

    Ends when nothing is left to gain or the seconds are spent; -inf when they were too few.
    """
    end = working_seconds() + seconds
    if members.shape[1] == 1:
        return float(cost.max(axis=1).sum())
    scale = float(cost.mean(axis=1).sum())
    if scale <= 0.0:
        return 0.0
    program = _Program(members, cost / scale, sets)
    best = -np.inf
    for _ in range(ROUNDS):
        left = end - working_seconds()
        if left <= 0.0 or not program.solve(left):
            break
        best = max(best, program.bound)
        if best >= program.value * (1.0 - CLOSE) or not program.add_cheapest():
            break
    return best * scale


class _Program:
    """The program of some of the sets: minimise the sum of figures t[k] that are at least what every expert's set
    costs.

    value: of the last solution. bound: a lower bound over all sets, by its prices.
    """

    def __init__(self, members: IntArray, cost: FloatArray, sets: int) -> None:
        self._members, self._cost, self._sets = members, cost, sets
        self._figures, self._experts = len(cost), int(members.max()) + 1
        self._inside = np.zeros(len(members), dtype=bool)
        self._prices = cost.sum(axis=0)
        self.value, self.bound = np.inf, -np.inf
        self._solver = QuietHighs()
        options: dict[str, bool | float | str] = {
            "output_flag": False,
            "solver": "ipm",
            "run_crossover": "off",
            "ipm_optimality_tolerance": TRUSTED,
        }
        for name, value in options.items():
            self._solver.setOptionValue(name, value)
        self._frame()
        self._add(self._first())

    def _frame(self) -> None:
        """Figures as columns, and the rows: t[k] less the chances' costs, for each k and expert; an expert's chances
        sum to one."""
        figures, experts = self._figures, self._experts
        rows = figures * experts
        none, nothing, ones, most = np.zeros(rows, np.int32), np.zeros(0), np.ones(rows), np.full(rows, np.inf)
        self._solver.addCols(
            figures, ones[:figures], np.zeros(figures), most[:figures], 0, none[:figures], none[:0], nothing
        )
        figure_of = np.repeat(np.arange(figures, dtype=np.int32), experts)
        self._solver.addRows(rows, np.zeros(rows), most, rows, np.arange(rows, dtype=np.int32), figure_of, ones)
        self._solver.addRows(experts, ones[:experts], ones[:experts], 0, none[:experts], none[:0], nothing)

    def _first(self) -> IntArray:
        """Sets of whole partitions, so that there is a solution, and the cheapest ones."""
        size = self._members.shape[1]
        if len(self._members) <= 4 * FIRST:
            return np.arange(len(self._members))
        weights = self._experts ** np.arange(size - 1, -1, -1)
        rng = np.random.default_rng(0)
        partitions = max(1, FIRST * size // (2 * self._experts))
        drawn = np.concatenate([rng.permutation(self._experts) for _ in range(partitions)]).reshape(-1, size)
        # In lexicographic order the sets' keys rise.
        places = np.searchsorted(self._members @ weights, np.sort(drawn, axis=1) @ weights)
        return np.unique(np.concatenate([places, np.argpartition(self._prices, FIRST // 2)[: FIRST // 2]]))

    def add_cheapest(self) -> bool:
        """Adds sets whose reduced prices are lowest and below zero; whether there were any."""
        some = min(ADDED, len(self._prices) - 1)
        cheapest = np.argpartition(self._prices, some)[: some + 1]
        return self._add(cheapest[self._prices[cheapest] < -ROUNDING])

    def _add(self, sets: IntArray) -> bool:
        new = sets[~self._inside[sets]]
        if not len(new):
            return False
        self._inside[new] = True
        members = self._members[new]
        rows = np.arange(self._figures + 1)[None, :, None] * self._experts + members[:, None, :]
        values = np.concatenate([-self._cost[:, new].T, np.ones((len(new), 1))], axis=1)
        zero, width = np.zeros(len(new)), rows[0].size
        self._solver.addCols(
            len(new),
            zero,
            zero,
            np.full(len(new), np.inf),
            rows.size,
            np.arange(len(new), dtype=np.int32) * width,
            rows.ravel().astype(np.int32),
            np.repeat(values, members.shape[1], axis=1).ravel(),
        )
        return True

    def solve(self, seconds: float) -> bool:
        """Takes new prices; False when there are none in the time."""
        # The limit is on all runs of a solver together.
        self._solver.setOptionValue("time_limit", self._solver.getRunTime() + seconds)
        self._solver.run()
        duals = np.asarray(self._solver.getSolution().row_dual)
        split = self._figures * self._experts
        if len(duals) != split + self._experts or not np.isfinite(duals).all():
            return False
        # Any weights of the experts bound a figure, if they are not negative and sum to one.
        over = np.maximum(duals[:split].reshape(self._figures, self._experts), 0.0) + ROUNDING
        self._take(over / over.sum(axis=1, keepdims=True), duals[split:])
        self.value = float(self._solver.getInfo().objective_function_value)
        return True

    def _take(self, over: FloatArray, paid: FloatArray) -> None:
        """Prices sets by weights of experts [K, E] and what each pays [E]. No set is cheaper than the cheapest: that
        bounds every partition, whatever the prices are."""
        charged, size = np.zeros(len(self._members)), self._members.shape[1]
        for figure, weight in zip(self._cost, over, strict=True):
            charged += figure * sum(weight[self._members[:, place]] for place in range(size))
        self._prices = charged - paid[self._members].sum(axis=1)
        margin = ROUNDING * self._sets * (float(charged.max()) + float(np.abs(paid).sum()))
        self.bound = float(paid.sum() + self._sets * self._prices.min() - margin)
