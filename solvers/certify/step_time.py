"""The proven lower bound of a plan's step time, made better with the time given.

It begins as the bound of single terms. Time goes first into the sets of experts that a device can hold (`device_sets`),
where there are few enough, then into semidefinite relaxations of single layers or neighbouring ones (below, solved in
`sdp`), until the clock says stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..._types import FloatArray, IntArray
from ...placement.bounds import compute_bound, layer_seconds_bound
from ...placement.cost import ExpertCost, TransferCost, Transfers, chance_reached
from ...placement.objective import risk_weights
from ...placement.problem import Problem
from ...placement.steps import Steps
from ...placement.topology import Topology
from ..base import working_seconds
from .device_sets import DeviceSets, least_over_partitions, link_floors, sets_fit
from .sdp import (
    CHUNK,
    MAX_ITERATIONS,
    ROUNDING,
    THREADS,
    TRIANGLE_HOLDERS,
    TRIANGLE_ITEMS,
    BusierWay,
    Entries,
    GramSpace,
    HoldersNeeded,
    PrimalDual,
    RowSums,
    SlowestDevice,
    SplitBetweenTwo,
    Term,
    Triangles,
)
from .set_pairs import least_over_pairs

QUICK_ITERATIONS = 50
"""Iterations that bring most of what there is to gain."""
QUICK_SECONDS = 0.7
"""What a bound may cost that nobody asked for, on one core of 2020."""
SET_SECONDS = 3e-5
"""A layer's bound by sets, for each set, on one core of 2020."""
GROUP_SECONDS, WORK_PART = 3e-6, 0.3
"""The same of compute alone, for each set and group of steps; and how much of the time for sets may go into it."""
FEW_SETS = 3_000
"""Sets that cost next to nothing, so that on several nodes copies inside them are looked at, too."""
SET_PART = 0.7
"""Of the time, what may go into sets."""
PAIR_PART = 0.95
"""Of the time, what may have gone by when pairs of sets are done."""
PAIR_GROUPS = 32
"""Groups of steps that pairs of sets are priced in."""
PAIR_SECONDS, MOST_PAIR_COSTS = 1e-6, 80_000_000
"""A layer's bound by pairs of sets, for each set, group of steps and expert, on one core of 2020; and how many of these
are held at a time."""


def risk_bound(
    problem: Problem,
    steps: Steps,
    workload: IntArray,
    step_seconds: FloatArray,
    reference: FloatArray | None,
    seconds: float | None,
    report: Callable[[float], None] = lambda bound: None,
) -> float:
    """A lower bound of the risk of every plan for `problem` on `steps`, in seconds a step.

    Args:
        problem: which every plan is for.
        steps: S steps.
        workload: [S] of each step.
        step_seconds: [S] of the best plan known, which tells what steps matter.
        reference: what regret is measured against.
        seconds: time to spend; None takes what a little work gives, the same every time.
        report: called with the bound as it rises.
    """
    weight, offset = risk_weights(step_seconds, workload, problem.objective, reference, steps.weight, steps.batch)
    # Steps without weight need not be looked at.
    counted = np.flatnonzero(weight > 0)
    certificate = StepCertificate(problem, steps.select(counted), weight[counted])
    if seconds is not None:
        certificate.improve(seconds, lambda bound: report(bound + offset))
    elif (iterations := _quick_iterations(problem, steps)) > 0:
        certificate.improve(np.inf, iterations=iterations)
    return certificate.bound + offset


class StepCertificate:
    """A lower bound, over all plans of a problem, of the steps' seconds weighted by `weight` [S] (summing to one).

    It begins as the bound of single terms and never falls; `improve` spends time on it.
    """

    def __init__(self, problem: Problem, steps: Steps, weight: FloatArray) -> None:
        self._problem, self._steps, self._weight = problem, steps, weight
        # [L] of a layer with the dispatch into it, and of its compute alone.
        self._layer = weight @ layer_seconds_bound(steps, problem)
        self._work: FloatArray | None = None
        # A replica chosen by where the token lives or by the step is not one and the same for all tokens, which Gram
        # matrices would have it be.
        chosen = problem.objective.replica_choice != "share" and problem.has_replicas
        self._levels: list[Level] = [] if chosen else levels(problem, steps)
        self._bounds: dict[int, _LevelBound] = {}
        # Where tokens return home a relaxation is of one layer, and the better bound of each layer counts.
        self._by_layer = problem.objective.execution == "dispatch_combine" or problem.model.layers == 1

    @property
    def bound(self) -> float:
        """Seconds."""
        whole = float(self._layer.sum())
        if not self._bounds:
            return whole
        # The relaxations share out the step time alike on all levels, so that each may be bounded on the better one.
        best = np.max([level.bounds() for level in self._bounds.values()], axis=0)
        if self._by_layer:
            best = np.maximum(best, self._layer)
        return max(whole, float(best.sum()))

    def improve(
        self, seconds: float, report: Callable[[float], None] = lambda bound: None, iterations: int = MAX_ITERATIONS
    ) -> float:
        """Works on the bound for about so many seconds, less when nothing is left to gain, and returns it.

        Args:
            seconds: to spend. Without a limit (inf) sets are left out.
            report: called with the bound as it rises.
            iterations: of a relaxation, at most (rounded up to whole chunks).
        """
        begin = working_seconds()
        end = begin + seconds
        with ThreadPoolExecutor(THREADS) as pool:
            if self._work is None and sets_fit(self._problem) and np.isfinite(seconds):
                self._go_through_sets(pool, begin + SET_PART * seconds)
                report(self.bound)
                self._go_through_pairs(pool, begin + PAIR_PART * seconds)
                report(self.bound)
            for number in range(len(self._levels)):
                if working_seconds() >= end:
                    break
                if number not in self._bounds:
                    self._bounds[number] = self._relaxed(number, pool, end)
                for unsolved in self._bounds[number].rounds(iterations):
                    if working_seconds() >= end:
                        break
                    list(pool.map(lambda relaxation: _iterate(relaxation, end), unsolved))
                    report(self.bound)
        return self.bound

    def _go_through_sets(self, pool: ThreadPoolExecutor, end: float) -> None:
        """Bounds every layer by the sets that a device can hold, as far as the time goes."""
        problem, layers = self._problem, self._problem.model.layers
        # Where copies between nodes decide, they are not of a device's set, and compute is bounded by itself.
        several = problem.topology.num_nodes > 1
        count = math.comb(problem.model.experts, int(problem.slots_per_device[0]))
        left = THREADS * (end - working_seconds())
        if layers * count * SET_SECONDS > left:
            return
        groups = int(min(PAIR_GROUPS, WORK_PART * left / (layers * count * GROUP_SECONDS))) if several else None
        sets = DeviceSets(problem, self._steps, self._weight, groups or None)
        work = self._weight @ compute_bound(self._steps.loads().astype(np.float64), problem)

        def one(layer: int) -> None:
            figures = sets.work(layer)
            if several:
                left = end - working_seconds()
                work[layer] = max(work[layer], least_over_partitions(sets.members, figures, sets.devices, left))
            if not several or len(sets.members) <= FEW_SETS:
                figures = np.concatenate([figures, sets.transfers(layer)])
                left = end - working_seconds()
                least = least_over_partitions(sets.members, figures, sets.devices, left)
                self._layer[layer] = max(self._layer[layer], least)

        list(pool.map(lambda layer: one(layer) if working_seconds() < end else None, range(layers)))
        self._work = work

    def _go_through_pairs(self, pool: ThreadPoolExecutor, end: float) -> None:
        """Bounds layers by the sets that a device can hold in them and in the layer before, if there is time for all
        of them; a node's sets are not looked at."""
        problem, layers = self._problem, self._problem.model.layers
        groups = min(PAIR_GROUPS, len(self._weight))
        costs = math.comb(problem.model.experts, int(problem.slots_per_device[0])) * groups * problem.model.experts
        coherent = problem.objective.execution == "context_coherent" and problem.topology.num_nodes == 1
        if not coherent or layers == 1 or costs > MOST_PAIR_COSTS:
            return
        if (layers - 1) * costs * PAIR_SECONDS > THREADS * (end - working_seconds()):
            return
        sets = DeviceSets(problem, self._steps, self._weight, groups)

        def one(layer: int) -> None:
            # Time that a layer leaves over is the others'.
            left = end - working_seconds()
            if left > 0.0:
                costs, waits = sets.pairs(layer)
                least = least_over_pairs(costs, sets.devices, left * min(1.0, THREADS / (layers - layer)))
                self._layer[layer] = max(self._layer[layer], least + waits)

        list(pool.map(one, range(1, layers)))

    def _relaxed(self, number: int, pool: ThreadPoolExecutor, end: float) -> _LevelBound:
        """The relaxations of a level, as many as there is time to make."""
        relaxations = Relaxations(self._problem, self._steps, self._weight, self._levels[number], self._work)

        def make(span: tuple[int, ...]) -> Relaxation | None:
            return relaxations.make(span) if working_seconds() < end else None

        spans = relaxations.spans()
        return _LevelBound(list(pool.map(make, spans)), np.array([relaxations.known(span) for span in spans]))


class _LevelBound:
    """The relaxations of a level.

    known: [relaxations] what is known of each before the first iteration, or where it was not made.
    """

    def __init__(self, relaxations: list[Relaxation | None], known: FloatArray) -> None:
        self._relaxations, self._known = relaxations, known

    def bounds(self) -> FloatArray:
        """[relaxations] seconds."""
        return np.maximum([-np.inf if each is None else each.bound for each in self._relaxations], self._known)

    def rounds(self, iterations: int) -> Iterator[list[Relaxation]]:
        """The relaxations that still have something to gain, again and again."""
        made = [relaxation for relaxation in self._relaxations if relaxation is not None]
        while unsolved := [each for each in made if not each.solver.solved(iterations, each.constant)]:
            yield unsolved


def _iterate(relaxation: Relaxation, end: float) -> None:
    if working_seconds() < end:
        relaxation.solver.run(CHUNK)


def _quick_iterations(problem: Problem, steps: Steps) -> int:
    """Iterations that cost about `QUICK_SECONDS`, by sizes and not by the clock; 0 where the set-up costs more."""
    coherent = problem.objective.execution == "context_coherent"
    items = problem.model.experts * (2 if coherent else 1)
    pairs = len(steps.expert_ids) * problem.model.top_k**2 * (2 if coherent else 1)
    layers = problem.model.layers
    setting_up, iteration = layers * pairs * 4e-8, layers * (4e-9 * items**3 + 3e-9 * pairs)
    return int(min(QUICK_ITERATIONS, max(0.0, QUICK_SECONDS - setting_up) / iteration))


# A step's predicted time as relaxed problems of one layer, or of two neighbours, that bound it when added up.
#
# The busiest link carries at least the average one, so copies may be summed: a token that needs d devices sends d
# copies (d - 1 where it already stands on one). Where copies between nodes decide, holders are nodes, and a node's
# devices together work no faster than their rates together.

Transfer = tuple[list[Term], float]


@dataclass(frozen=True)
class Level:
    """Whose copies are counted: those between nodes, or those between devices.

    slots: [L, H] of each holder. copy: seconds of dispatch that a holder which a token needs costs on all links
    together; evenly: the same where source ranks are spread evenly, and a token's every holder counts. leaving: seconds
    on the link of the one holder that sends, the fastest; 0 where not all it sends takes that link. work: what expert
    work costs a holder.
    """

    slots: IntArray
    copy: float
    evenly: float
    leaving: float
    work: ExpertCost

    @property
    def holders(self) -> int:
        return int(self.slots.shape[1])


def levels(problem: Problem, steps: Steps) -> list[Level]:
    """The level whose links are the slower for tokens routed at random first, then the other, if it has links.

    steps: those looked at.
    """
    topology = problem.topology
    smallest, away = float(topology.node_size.min()), 1.0 - float(topology.node_size.max()) / topology.num_devices
    slots, work = problem.layer_slots, ExpertCost.of(problem.model, topology)
    transfers = Transfers.of(problem.model, topology, problem.objective)
    kinds = [_link_seconds(transfer, topology, smallest, away) for transfer, _ in transfers.of_steps(steps)]
    # No step's copies cost less.
    inside, between = np.min(kinds, axis=0)
    node_slots = np.add.reduceat(slots, topology.node_start, axis=1)
    both = [
        Level(slots, float(inside[0]), float(inside[1]), float(inside[2]), work),
        Level(node_slots, float(between[0]), float(between[1]), float(between[2]), work.pooled(topology.node_start)),
    ]
    with_links = [level for level in both if level.evenly > 0.0]
    return sorted(with_links, key=lambda level: -level.evenly * _holders_at_random(level, problem.model.top_k))


def _link_seconds(transfer: TransferCost, topology: Topology, smallest: float, away: float) -> FloatArray:
    """[2, 3] copy, evenly and leaving of the level of devices, and of the level of nodes."""
    nodes, dedup = topology.num_nodes, transfer.dedup
    # Inside nodes: a copy from another node is fanned out from a device chosen evenly, and so passes (size - 1) / size
    # links.
    within = (smallest - 1.0) / smallest if dedup or nodes == 1 else 0.0
    link, trunk = transfer.all_links
    evenly = (within if dedup else (smallest - 1.0) / topology.num_devices) * link
    if not dedup and nodes > 1:
        # Every copy crosses by itself: devices, not nodes, tell how many.
        evenly = max(evenly, away * trunk)
    return np.array(
        [
            [(1.0 if nodes == 1 else within) * link, evenly, float(transfer.per_copy.min()) if nodes == 1 else 0.0],
            [trunk if nodes > 1 else 0.0, away * trunk, float(transfer.per_node_copy.min()) if nodes > 1 else 0.0],
        ]
    )


def _holders_at_random(level: Level, experts: int) -> float:
    """Holders a token needs on average when its experts stand anywhere."""
    return level.holders * float(chance_reached(1.0 / level.holders, experts))


@dataclass(frozen=True)
class Relaxation:
    """Some layers' terms, relaxed, and the seconds that they take whatever the placement."""

    constant: float
    solver: PrimalDual

    @property
    def bound(self) -> float:
        """Of its part of the weighted step time."""
        return self.constant + self.solver.bound


class Relaxations:
    """Makes the relaxations of a problem on steps whose times count by `weight` [S] (summing to one).

    work: [L] weighted seconds of compute below which no placement is, beside what holders tell of it.
    """

    def __init__(
        self, problem: Problem, steps: Steps, weight: FloatArray, level: Level, work: FloatArray | None = None
    ) -> None:
        self._problem, self._steps, self._weight, self._level = problem, steps, weight, level
        self._loads = steps.loads().astype(np.float64)
        self._floor = compute_bound(self._loads, problem)
        self._work = work
        self._link_floors = link_floors(problem, steps, self._loads)
        transfers = Transfers.of(problem.model, problem.topology, problem.objective)
        self._wait_out, self._wait_back = transfers.waits(steps)
        # What a returning copy costs beside one going out.
        self._back = min(transfer.back for transfer, _ in transfers.of_steps(steps))

    @property
    def coherent(self) -> bool:
        return self._problem.objective.execution == "context_coherent"

    def spans(self) -> list[tuple[int, ...]]:
        """Layers of each relaxation: one each, or neighbours where the dispatch between them couples them."""
        layers = self._problem.model.layers
        if self.coherent and layers > 1:
            return [(layer, layer + 1) for layer in range(layers - 1)]
        return [(layer,) for layer in range(layers)]

    def make(self, span: tuple[int, ...]) -> Relaxation:
        """The relaxation of those layers."""
        experts, slots = self._problem.model.experts, self._level.slots[list(span)]
        space = GramSpace.of(slots, experts)
        terms: list[Term] = [Entries.of(space, slots)]
        if space.holders <= TRIANGLE_HOLDERS and space.items <= TRIANGLE_ITEMS:
            terms.append(Triangles(space.items, space.holders))
        if not space.even:
            terms.append(RowSums.of(space, slots))
        constant = 0.0
        for place, layer in enumerate(span):
            share = self._share(layer)
            slowest, base = self._compute(layer, place, space, share)
            terms.append(slowest)
            constant += base
            for term, offset in self._transfers(layer, place, span, share):
                terms.extend(term)
                constant += offset
        return Relaxation(constant, PrimalDual(space, terms))

    def known(self, span: tuple[int, ...]) -> float:
        """Seconds that the relaxation of those layers has at least, without looking into it."""
        work = self._weight @ self._floor if self._work is None else self._work
        out, back = float(self._weight @ self._wait_out), float(self._weight @ self._wait_back)
        waits = out + back if not self.coherent else back if self._problem.model.top_k > 1 else 0.0
        own = sum(self._share(layer) * (float(work[layer]) + waits) for layer in span)
        arriving = (0 in span) + len(span) - 1 if self.coherent else 0
        return own + arriving * out

    def _share(self, layer: int) -> float:
        """Of a layer's own terms that a relaxation takes: neighbouring ones half each."""
        return 0.5 if self.coherent and 0 < layer < self._problem.model.layers - 1 else 1.0

    def _compute(self, layer: int, place: int, space: GramSpace, share: float) -> tuple[Term, float]:
        """The slowest holder's work, and the seconds that every holder takes whatever it is given."""
        fastest, loads = self._level.work.fastest(), self._loads[:, layer]
        work = np.zeros((len(loads), 2, space.items))
        own = slice(place * space.experts, (place + 1) * space.experts)
        hit = (loads > 0).astype(np.float64)
        work[:, :, own] = fastest.lines(loads[..., None], hit[..., None])[..., 0].transpose(1, 0, 2)
        base = fastest.base(loads.sum(axis=1))[:, 0]
        weight = share * self._weight
        constant = float(weight @ base)
        least = 0.0 if self._work is None else share * float(self._work[layer]) - constant
        return SlowestDevice(work, weight, self._floor[:, layer] - base, least), constant

    def _transfers(
        self, layer: int, place: int, span: tuple[int, ...], share: float
    ) -> Iterator[tuple[list[Term], float]]:
        """(copies as a term, seconds whatever the placement) of the all-to-alls of a layer."""
        here = self._steps.expert_ids[:, layer].astype(np.int64) + place * self._problem.model.experts
        experts, with_source = self._problem.model.experts, self._steps.source is not None
        dispatch, combine = (floor[:, layer] for floor in self._link_floors)
        top = here[:, :1]
        if not self.coherent:
            # Out and back alike.
            waits = self._wait_out + self._wait_back
            yield self._copies(here, span, 1.0 + self._back, waits, with_source, None, dispatch, 1.0)
            return
        if layer == 0:
            yield self._copies(here, span, 1.0, self._wait_out, with_source, None, dispatch, 1.0)
        elif place > 0:
            owner = self._steps.expert_ids[:, layer - 1, :1].astype(np.int64) + (place - 1) * experts
            both = np.hstack([owner, here])
            yield self._copies(both, span, 1.0, self._wait_out, True, owner[:, 0], dispatch, 1.0)
        if here.shape[1] > 1:
            yield self._copies(here, span, self._back, self._wait_back, True, top[:, 0], combine, share)

    def _copies(
        self,
        ids: IntArray,
        span: tuple[int, ...],
        times: float,
        waits: FloatArray,
        from_holder: bool,
        owner: IntArray | None,
        floor: FloatArray,
        part: float,
    ) -> Transfer:
        """One all-to-all of tokens that need the holders of `ids` [T, j].

        times: what a copy costs beside one going out. waits: [S] seconds that no plan changes. from_holder: a token
        comes from a holder that may be among those, which spares a copy. owner: [T] the item on whose holder it is.

        Each step is counted on all links together, or on that of one owner where this promises
        more; or is not counted but taken as `floor` [S] has it, seconds of copies going out.
        """
        level = self._level
        random = _holders_at_random(level, ids.shape[1]) - from_holder
        rate = np.full(len(ids), level.copy if from_holder else level.evenly)
        one_link = owner is not None and level.leaving > 0.0 and not self._problem.has_replicas
        if owner is not None and one_link:
            rate = self._rates(owner)
            # Each way by itself, where links are alike and no step counts what one expert sends alone.
            one_link = bool((rate == level.copy).all()) and 2.0 * level.copy <= level.leaving * (1.0 + ROUNDING)
        rate = rate * times
        per_step = np.bincount(self._steps.step_of, weights=rate)
        known = floor * times > per_step * random
        weight = part * self._weight
        constant = float(weight @ (waits + np.where(known, floor * times, -per_step * from_holder)))
        counted = np.where(known, 0.0, weight)[self._steps.step_of] * rate
        if not counted.any():
            return [], constant
        items = len(span) * self._problem.model.experts
        chosen = ids[counted > 0]
        if level.holders == 2 and one_link:
            return [BusierWay(chosen, counted[counted > 0], items)], constant
        if level.holders == 2:
            return [SplitBetweenTwo(chosen, counted[counted > 0], items)], constant
        return [HoldersNeeded(chosen, counted[counted > 0], items)], constant

    def _rates(self, owner: IntArray) -> FloatArray:
        """[T] seconds of each token's copies.

        Evenly over all links, or, in steps where one expert leads so many tokens that its holder's link alone is the
        busier, those tokens on that link and the others for nothing.
        """
        level, step_of, tokens = self._level, self._steps.step_of, self._steps.tokens
        width = int(owner.max()) + 1
        led = np.bincount(step_of * width + owner, minlength=len(tokens) * width).reshape(-1, width)
        alone = led.max(axis=1) * level.leaving > tokens * level.copy
        leads_most = led.argmax(axis=1)[step_of] == owner
        return np.asarray(np.where(alone[step_of], leads_most * level.leaving, level.copy))
