"""Layers annealed side by side, each with exact incremental evaluation, in rounds of falling temperature.

A proposal exchanges the experts of two slots, gives a slot to another expert, or shifts shares between two replicas;
its effect on every step is computed from the tokens of the (at most two) experts it touches. How depends on how tokens
travel, which the type of the layer's tokens tells: spread evenly (`even_traffic`), from known source ranks
(`source_traffic`), or from layer to layer (`coherent_traffic`).

With several starts a short cold walk from each tells, layer by layer, which basin is the deepest (`multistart`). Where
only so many experts may move, layers have limits (`MoveBudget`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numba.extending import overload

from ..._types import FloatArray, IntArray
from ...placement.errors import SolveError
from ...placement.jit import kernel
from ...placement.problem import Problem
from ..base import Budget
from . import coherent_traffic, even_traffic, source_traffic
from .coherent_traffic import CoherentState
from .even_traffic import EvenState
from .moves import (
    Change,
    CoherentTokens,
    LayerTokens,
    MoveLimit,
    MoveRules,
    Neighbours,
    Placement,
    Rates,
    RiskWeights,
    SourceTokens,
    accepted,
    carry_out,
    copy,
    copy_all,
    count_moved,
    layer_value,
    more_moved,
    no_move_limit,
    propose,
    remember,
    slot_tables,
)
from .scenario import Scenario, source_tokens
from .source_traffic import SourceState

CALIBRATION = 30
"""Proposals that tell how much one typically changes a layer's figure, the unit of temperatures."""

Tokens = LayerTokens | SourceTokens | CoherentTokens
State = EvenState | SourceState | CoherentState

# In compiled code these four are the functions of the module that the tokens' type belongs to.

_TRAFFIC: dict[type, ModuleType] = {
    LayerTokens: even_traffic,
    SourceTokens: source_traffic,
    CoherentTokens: coherent_traffic,
}


def begin(tokens: Tokens, rates: Rates, placement: Placement) -> State:
    """The state of a placement."""
    raise NotImplementedError


def delta(state: State, tokens: Tokens, rates: Rates, placement: Placement, change: Change, new: FloatArray) -> None:
    """Prices a change into `state.new_cost`. new: [2, G] shares of its experts."""


def commit(state: State, tokens: Tokens, rates: Rates, placement: Placement, change: Change, new: FloatArray) -> None:
    """Keeps a change that `delta` has priced; the placement is still the old one."""


def rollback(state: State, tokens: Tokens, rates: Rates, placement: Placement, change: Change, new: FloatArray) -> None:
    """Drops a change that `delta` has priced."""


@overload(begin, strict=False)
def _begin(tokens: Any, rates: Any, placement: Any) -> Callable[..., Any]:
    return _TRAFFIC[tokens.instance_class].begin


@overload(delta, strict=False)
def _delta(state: Any, tokens: Any, rates: Any, placement: Any, change: Any, new: Any) -> Callable[..., Any]:
    return _TRAFFIC[tokens.instance_class].delta


@overload(commit, strict=False)
def _commit(state: Any, tokens: Any, rates: Any, placement: Any, change: Any, new: Any) -> Callable[..., Any]:
    return _TRAFFIC[tokens.instance_class].commit


@overload(rollback, strict=False)
def _rollback(state: Any, tokens: Any, rates: Any, placement: Any, change: Any, new: Any) -> Callable[..., Any]:
    return _TRAFFIC[tokens.instance_class].rollback


@kernel
def anneal(
    tokens: Tokens,
    rates: Rates,
    risk: RiskWeights,
    rules: MoveRules,
    limit: MoveLimit,
    slot_expert: IntArray,
    slot_device: IntArray,
    share: FloatArray,
    proposals: int,
    hot: float,
    cold: float,
    seed: int,
) -> tuple[float, IntArray, FloatArray, FloatArray, IntArray, FloatArray, FloatArray, float]:
    """Anneals one layer from temperature `hot` to `cold` (seconds), geometrically; the start is the first incumbent.

    slot_expert: [P]. slot_device: [P]. share: [E, G]. No expert may stand twice on one device.
    Returns the best placement seen (value, slot_expert, share, step costs [S]), where the walk ended (slot_expert,
    share, step costs), and the mean absolute change of the value over proposals.
    """
    np.random.seed(seed)
    slot_at, replicas = slot_tables(slot_expert, slot_device, share.shape[0], share.shape[1])
    placement = Placement(slot_expert.copy(), slot_device, share.copy(), slot_at, replicas)
    state = begin(tokens, rates, placement)
    value = layer_value(state.cost, risk)
    best, best_cost = value, state.cost.copy()
    best_expert, best_share = placement.slot_expert.copy(), placement.share.copy()
    moved = count_moved(placement, limit)
    remember(value, moved, placement, limit)

    new = np.zeros((2, share.shape[1]))
    cooling = (cold / hot) ** (1.0 / max(1, proposals - 1)) if hot > 0.0 else 0.0
    temperature = hot
    changes, priced = 0.0, 0
    for _ in range(proposals):
        temperature *= cooling
        change = propose(placement, rules, new)
        if change.kind == 0:
            continue
        more = more_moved(change, slot_device, limit)
        if more > 0 and moved + more > limit.most:
            continue
        delta(state, tokens, rates, placement, change, new)
        new_value = layer_value(state.new_cost, risk)
        changes += abs(new_value - value)
        priced += 1
        if not accepted(value, new_value + more * limit.price, temperature):
            rollback(state, tokens, rates, placement, change, new)
            continue
        commit(state, tokens, rates, placement, change, new)
        carry_out(change, new, placement)
        value = new_value
        moved += more
        remember(value, moved, placement, limit)
        if value < best:
            best = value
            copy(placement.slot_expert, best_expert)
            copy_all(placement.share, best_share)
            copy(state.cost, best_cost)
    typical = changes / priced if priced > 0 else 0.0
    return best, best_expert, best_share, best_cost, placement.slot_expert, placement.share, state.cost, typical


@dataclass(frozen=True)
class Placed:
    """A layer's placement: experts of its own slots [P], shares [E, G], and its step costs [S]."""

    slot_expert: IntArray
    share: FloatArray
    cost: FloatArray


@dataclass(frozen=True)
class LayerState:
    """Where a layer's walk stands, the best it has seen and its figure, and what a proposal typically changes."""

    now: Placed
    best: Placed
    value: float
    typical: float


class Annealer:
    """Holds one state a layer and improves it. Thread-safe only through `run`, which does its own threading."""

    def __init__(
        self, problem: Problem, scenario: Scenario, rates: Rates, rules: Sequence[MoveRules], seed: int
    ) -> None:
        self._problem, self._scenario, self._rates, self._rules = problem, scenario, rates, rules
        self._coherent = problem.objective.execution == "context_coherent" and scenario.steps is not None
        sources = scenario.steps is not None and scenario.steps.source is not None and not self._coherent
        self._tokens: list[LayerTokens] | list[SourceTokens] = (
            [source_tokens(scenario, layer, problem) for layer in range(problem.model.layers)]
            if sources
            else [scenario.layer(layer) for layer in range(problem.model.layers)]
        )
        self._seeds = np.random.SeedSequence(seed)
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
        self.states: list[LayerState] = []
        self.limits: list[MoveLimit] = [no_move_limit()] * problem.model.layers

    def start(
        self,
        tables: Sequence[IntArray],
        shares: Sequence[FloatArray],
        risks: Sequence[RiskWeights],
        calibration: int = CALIBRATION,
    ) -> None:
        """Takes a placement as the state, prices it, and learns what a proposal changes from `calibration` ones."""
        zero = np.zeros(self._scenario.num_steps)
        placed = [Placed(table, share, zero) for table, share in zip(tables, shares, strict=True)]
        self.states = [LayerState(layer, layer, np.inf, 0.0) for layer in placed]
        self.run(risks, calibration, hot=0.0, cold=0.0)

    def run(self, risks: Sequence[RiskWeights], proposals: int, hot: float, cold: float) -> None:
        """One round: every layer walks on for `proposals`, from temperature `hot` to `cold` in typical changes."""
        seeds = self._seeds.spawn(1)[0].generate_state(len(self.states))
        layers = range(len(self.states))
        # In context-coherent execution a layer's cost depends on its neighbours: odd ones wait for even ones.
        for group in [layers[::2], layers[1::2]] if self._coherent else [layers]:
            tasks = [
                self._pool.submit(self._one, layer, risks[layer], proposals, hot, cold, int(seeds[layer]) % (1 << 31))
                for layer in group
            ]
            for layer, task in zip(group, tasks, strict=True):
                self.states[layer] = task.result()

    def answer(self, risk_changed: bool) -> list[Placed]:
        """The best placement of each layer; where it was priced beside other neighbours or by another risk than
        today's, the present one."""
        return [state.now if self._coherent or risk_changed else state.best for state in self.states]

    def _one(self, layer: int, risk: RiskWeights, proposals: int, hot: float, cold: float, seed: int) -> LayerState:
        state, tokens = self.states[layer], self._tokens[layer]
        walked = anneal(
            CoherentTokens(tokens, self._around(layer))
            if self._coherent and isinstance(tokens, LayerTokens)
            else tokens,
            self._rates,
            risk,
            self._rules[layer],
            self.limits[layer],
            state.now.slot_expert,
            self._problem.layer_slot_device(layer),
            state.now.share,
            proposals,
            hot * state.typical,
            cold * state.typical,
            seed,
        )
        value, table, share, cost, table_now, share_now, cost_now, typical = walked
        best, now = Placed(table, share, cost), Placed(table_now, share_now, cost_now)
        if value >= state.value:
            best, value = state.best, state.value
        return LayerState(now, best, float(value), state.typical or float(typical))

    def _around(self, layer: int) -> Neighbours:
        ids = self._scenario.walked_ids
        last = len(self.states) - 1
        tokens = len(ids)
        before = np.full(tokens, -1, np.int32) if layer == 0 else ids[:, layer - 1, 0].astype(np.int32)
        after = ids[:, layer + 1] if layer < last else ids[:, layer, :0]
        return Neighbours(
            before,
            self.states[max(layer - 1, 0)].now.share,
            np.ascontiguousarray(after, dtype=np.int32),
            self.states[min(layer + 1, last)].now.share,
        )

    def close(self) -> None:
        """Stops the threads; rounds already handed out end first."""
        self._pool.shutdown(wait=True, cancel_futures=True)


# How many proposals a round gets, so that a time limit is met and a cooling still ends cold.


FIRST_ROUND = 20
"""Proposals of the first timed round: a few milliseconds to a second, enough to learn the speed."""


class CoolingSchedule:
    """Deals `proposals` evenly over rounds; with a time limit, what is left of the time evenly over rounds left."""

    def __init__(
        self, budget: Budget, proposals: int, rounds: int = 12, reserve: float = 0.0, first: int = FIRST_ROUND
    ) -> None:
        """reserve: seconds to leave over at the end. first: proposals of the first round under a time limit."""
        self._budget, self.rounds, self._reserve, self._first = budget, rounds, reserve, first
        self._even = max(1, proposals // rounds)
        self._given = 0
        self._per_proposal: float | None = None
        self._beside = 0.0
        self._ended: float | None = None

    def proposals(self, round_: int) -> int:
        """Proposals for this round, the first being 0."""
        if self._budget.left is None:
            self._given = self._even
        elif self._per_proposal is None:
            self._given = self._first
        else:
            share = max(0.0, self._budget.left - self._reserve) / max(1, self.rounds - round_) - self._beside
            self._given = max(1, int(share / self._per_proposal))
        return self._given

    @property
    def spent(self) -> bool:
        """Whether there is no time left for another round."""
        return self._budget.left is not None and self._budget.left <= self._reserve

    @property
    def expected(self) -> float:
        """Proposals a layer gets over all rounds, as far as is known; none before the first timed round."""
        if self._budget.left is None:
            return float(self._even * self.rounds)
        return 0.0 if self._per_proposal is None else self._budget.left / self._per_proposal

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Around a round: learns what a proposal takes, and what is spent between rounds."""
        start = self._budget.elapsed
        if self._ended is not None:
            self._beside = start - self._ended
        yield
        self._ended = self._budget.elapsed
        self._per_proposal = max(self._ended - start, 1e-6) / self._given


Start = tuple[list[IntArray], list[FloatArray]]

EFFORT = 20
"""A walk gets one part in so many of all effort."""
WARM, COLD = 3e-2, 1e-3
"""Temperatures of the walks, in typical changes: cold enough to stay in the basin a start lies in."""


def multistart(
    annealer: Annealer, starts: Sequence[Start], risks: Sequence[RiskWeights], budget: Budget, proposals: int
) -> Start:
    """(slot tables, shares) of the best layers after a walk from each start. Layers must not depend on each other."""
    if len(starts) == 1:
        return starts[0]
    runners = []
    for start in starts:
        brief = Budget(None if budget.left is None else budget.left / EFFORT, budget.seed)
        annealer.start(*start, risks)
        schedule = CoolingSchedule(brief, max(1, proposals // EFFORT), rounds=2)
        for turn in range(2):
            with schedule.timing():
                annealer.run(risks, schedule.proposals(turn), WARM, COLD)
        runners.append(annealer.states)
    best = [min(layers, key=lambda state: state.value).best for layers in zip(*runners, strict=True)]
    return [layer.slot_expert for layer in best], [layer.share for layer in best]


# At most so many experts moved from the plan in force, over all layers: who may move how many.
#
# Every layer walks inside its own limit and remembers the best placement at each distance from the plan in force. Where
# layers do not depend on each other, the cheapest mix of these placements within the budget is a multiple-choice
# knapsack, solved exactly; it also tells what a move is worth, which layers are charged on their next walk. Where they
# do, limits that never exceed the budget together are dealt anew after each round from what layers left unused.

HEADROOM = 4
"""Moves beyond its part of the budget that a layer may at least try."""


class MoveBudget:
    """Sets an annealer's limits, and reads the answer from what its layers remember."""

    def __init__(self, problem: Problem, annealer: Annealer, coupled: bool, price: float = 0.0) -> None:
        """coupled: whether layers' values depend on their neighbours'. The annealer has been given its start, which
        must lie within the budget.

        Raises:
            SolveError: it does not; the bytes needed are named.
        """
        assert problem.current is not None
        assert problem.max_moves is not None
        self._problem, self._annealer, self.coupled = problem, annealer, coupled
        self._most, self.price = problem.max_moves, price
        # Copies: arrays that may not be written are another type to compiled code.
        self._holds = [holds.copy() for holds in problem.current.holds]
        self._turn = 0
        needed = int(self._moved().sum())
        if needed > self._most:
            raise SolveError(
                f"slots and constraints alone move {needed} experts of the current plan "
                f"({needed * problem.model.bytes_per_expert:.4g} bytes), Problem.max_moved_bytes is "
                f"{problem.max_moved_bytes:.4g}: allow that many, or ask for slots and constraints that the current "
                "plan keeps to (no expert twice on a device)"
            )
        self.deal()

    def deal(self) -> None:
        """New limits around what the layers' present placements have moved."""
        moved, layers = self._moved(), len(self._holds)
        spare = self._most - int(moved.sum())
        if self.coupled:
            # Whom the remainder goes to changes from round to round.
            turns = (np.arange(layers) - self._turn) % layers
            most = moved + spare // layers + (turns < spare % layers)
            self._turn += spare % layers
        else:
            most = moved + np.maximum(HEADROOM, np.maximum(moved // 2, -(-2 * spare // layers)))
        self._limit(np.minimum(most, np.minimum(self._most, self._problem.layer_slots.sum(axis=1))))

    def forget(self) -> None:
        """Values remembered so far no longer compare."""
        self._limit(np.array([limit.most for limit in self._annealer.limits]), keep=False)

    def _limit(self, most: IntArray, keep: bool = True) -> None:
        known = self._annealer.limits
        remembered = np.zeros(len(most), np.int64) if self.coupled else most + 1
        self._annealer.limits = [
            MoveLimit(holds, int(cap), self.price, *_memory(limit if keep else no_move_limit(), int(count), int(slots)))
            for holds, cap, count, limit, slots in zip(
                self._holds, most, remembered, known, self._problem.layer_slots.sum(axis=1), strict=True
            )
        ]

    def _moved(self) -> IntArray:
        """[L] experts each layer's present placement has moved."""
        return np.array(
            [
                (~holds[state.now.slot_expert, self._problem.layer_slot_device(layer)]).sum()
                for layer, (holds, state) in enumerate(zip(self._holds, self._annealer.states, strict=True))
            ]
        )

    def answer(self) -> list[Placed]:
        """The best placements within the budget."""
        if self.coupled:
            return [state.now for state in self._annealer.states]
        limits = self._annealer.limits
        chosen, worth = cheapest_mix([limit.value for limit in limits], self._most)
        self.price = worth
        placed = []
        for layer, (count, limit, state) in enumerate(zip(chosen, limits, self._annealer.states, strict=True)):
            share = np.zeros(state.now.share.shape)
            share[limit.slot_expert[count], self._problem.layer_slot_device(layer)] = limit.slot_share[count]
            placed.append(Placed(limit.slot_expert[count].copy(), share, state.now.cost))
        return placed


def _memory(known: MoveLimit, count: int, slots: int) -> tuple[FloatArray, IntArray, FloatArray]:
    """Room for the best placement at `count` distances, with those already known."""
    value, slot_expert, slot_share = (
        np.full(count, np.inf),
        np.zeros((count, slots), np.int64),
        np.zeros((count, slots)),
    )
    same = min(count, len(known.value))
    if same:
        value[:same] = known.value[:same]
        slot_expert[:same] = known.slot_expert[:same]
        slot_share[:same] = known.slot_share[:same]
    return value, slot_expert, slot_share


def cheapest_mix(values: list[FloatArray], most: int) -> tuple[list[int], float]:
    """One count a layer, at most `most` in all, with the least sum of values[layer][count]; and what one more is worth.

    values: [K] a layer, inf where unknown; every layer has a finite value within the budget. Exact, by dynamic
    programming over layers; of equals the lower counts.
    """
    least = np.zeros(most + 1)
    came: list[IntArray] = []
    for value in values:
        best, count = np.full(most + 1, np.inf), np.zeros(most + 1, np.int64)
        for k in np.flatnonzero(np.isfinite(value[: most + 1])):
            total = np.full(most + 1, np.inf)
            total[k:] = least[: most + 1 - k] + value[k]
            better = total < best
            best[better], count[better] = total[better], k
        least = best
        came.append(count)
    at = most
    chosen = []
    for count in reversed(came):
        chosen.append(int(count[at]))
        at -= chosen[-1]
    # Over a tenth of the budget: the last move alone says little.
    width = min(most, max(1, most // 10))
    before = least[most - width] if most else np.inf
    worth = float((before - least[most]) / width) if np.isfinite(before) else 0.0
    return chosen[::-1], worth
