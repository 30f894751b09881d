"""The course of a search on counts alone: rounds of balancing every layer on all recorded load vectors together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ...placement.plan import Certificate, Stop
from ...placement.problem import Problem
from ..base import Budget, Solution
from .group_homes import GroupHomes
from .judge import Judge
from .layout import Moves
from .load_bounds import window_bounds
from .load_kernel import LoadLayer, balance_loads
from .load_risk import WindowWeights
from .load_settle import settle
from .load_shares import level_layer
from .pace import Pace
from .scenario import Scenario
from .starts import even_layer_share, even_shares

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

PROPOSALS = 120_000
"""A layer, when neither they nor seconds are given."""
ROUNDS, ALONE_ROUNDS = 12, 4
HOT, COLD = 1.0, 0.3
"""First temperature of the first round and of the last, in a layer's excess over its bound, a slot."""
LEAPS = 1000
"""Slots below which the first round is hotter, in proportion: with few slots every exchange is a leap."""
TOLERANCE = 1e-3
"""A figure this close to its bound, relatively, is good enough; a layer is done at half of it."""
LEAST_EXCESS = 1e-6
"""What a layer is taken to lie above its bound at least, so that sharpness stays finite."""


@dataclass(frozen=True)
class BalancedLayer:
    """A layer's experts of its own slots [P], shares [E, G], and heaviest load over the mean in each window [S]."""

    slot_expert: IntArray
    share: FloatArray
    peaks: FloatArray


def search_loads(
    problem: Problem,
    budget: Budget,
    scenario: Scenario,
    moves: Sequence[Moves],
    tables: Sequence[IntArray],
    current: tuple[list[IntArray], list[FloatArray]] | None,
    proposals: int | None,
    homes: GroupHomes | None,
) -> Solution:
    """Balances the windows' loads [S, L, E] from slot tables [P], one a layer, or the plan in force (tables and shares
    [E, G]) in layers where that is better; see `Search` for `proposals`."""
    judge = Judge(problem, scenario)
    windows = WindowWeights(problem, scenario)
    balance = _Balance(problem, scenario, moves, budget.seed, homes, current)
    stop: Stop = "finished"
    try:
        balance.start(tables, windows.weight)
        if scenario.num_steps == 1 and homes is None:
            balance.level()
        best = _best_start(balance, judge)
        budget.report(best[1].value, best[1].bound, "start")
        try:
            if problem.objective.risk == "regret":
                judge.reference = _alone(balance, judge, scenario, tables, proposals or PROPOSALS, budget)
                windows.reference = judge.reference
                balance.start(tables, windows.weight)
                best = _best_start(balance, judge)
            pace = Pace(budget, proposals or PROPOSALS, ROUNDS)
            for round_ in range(ROUNDS):
                if budget.spent or balance.done:
                    break
                with pace.timing():
                    balance.run(windows.weight, pace.proposals(round_), round_ / (ROUNDS - 1))
                answer = _answer(balance, judge)
                if answer[1].value < best[1].value:
                    best = answer
                budget.report(best[1].value, best[1].bound, f"round {round_ + 1} of {ROUNDS}")
                windows.learn(judge.figures(answer[0], answer[2]), judge.bound)
            stop = "time limit" if budget.spent else "finished"
        except KeyboardInterrupt:
            stop = "interrupted"
    finally:
        balance.close()
    certificate = best[1]
    if homes is not None:
        limited = f"{certificate.objective}, at most {homes.most:g} of a layer's load off its groups' home nodes"
        certificate = replace(certificate, objective=limited)
    return Solution(best[0], certificate, shares=best[2], stop=stop)


class _Balance:
    """Holds one state a layer and improves it, layers side by side on all cores."""

    def __init__(
        self,
        problem: Problem,
        scenario: Scenario,
        moves: Sequence[Moves],
        seed: int,
        homes: GroupHomes | None,
        current: tuple[list[IntArray], list[FloatArray]] | None,
    ) -> None:
        speed = problem.topology.compute
        self.problem, self._moves = problem, moves
        self._rows = scenario.loads.transpose(1, 0, 2).copy()
        self._slowness = speed.sum() / speed
        nowhere = np.zeros((problem.model.experts, problem.num_devices))
        self._stray = [nowhere] * len(moves) if homes is None else list(homes.stray)
        self._limit = 0.0 if homes is None else homes.most
        self._bounds = window_bounds(problem, scenario.loads)
        self._scenario = scenario
        self._seeds = np.random.SeedSequence(seed)
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
        self.current = (
            [] if current is None else [self._placed(layer, *at) for layer, at in enumerate(zip(*current, strict=True))]
        )
        if any(
            (layer.share * stray).sum() > self._limit + 1e-9
            for layer, stray in zip(self.current, self._stray, strict=False)
        ):
            self.current = []
        self.layers: list[BalancedLayer] = []
        self.done = False
        """Whether the figure is within `TOLERANCE` of the bound, by the weights of the last round."""

    def start(self, tables: Sequence[IntArray], weight: FloatArray) -> None:
        """Takes slot tables with equal shares as the state, or the plan in force in layers where that is better."""
        even = even_shares(self.problem, tables)
        self.layers = [self._placed(layer, table, even[layer]) for layer, table in enumerate(tables)]
        for layer, mine in enumerate(self._scenario.layer_weights(weight).T[: len(self.current)]):
            if mine @ self.current[layer].peaks <= mine @ self.layers[layer].peaks:
                self.layers[layer] = self.current[layer]
        self._look(weight)

    def level(self) -> None:
        """Of a single window, with shares free: levels layers exactly where handing on load from device to device does."""
        problem = self.problem
        if problem.objective.split != "free":
            return
        for layer, moves in enumerate(self._moves):
            levelled = level_layer(self._rows[layer][0], problem.layer_slots[layer], problem.topology.compute, moves)
            if levelled is not None:
                placed = self._placed(layer, *levelled)
                if placed.peaks[0] < self.layers[layer].peaks[0]:
                    self.layers[layer] = placed
        self._look(np.ones(1))

    def run(self, weight: FloatArray, proposals: int, progress: float) -> None:
        """One round of at most `proposals` a layer, windows counting by `weight` [S]. progress: 0 first, 1 last."""
        hot = HOT + LEAPS / self.problem.num_slots
        heat = hot * (COLD / hot) ** progress
        seeds = self._seeds.spawn(1)[0].generate_state(len(self.layers))
        tasks = [
            self._pool.submit(self._one, layer, mine, proposals, heat, int(seed) % (1 << 31))
            for layer, (mine, seed) in enumerate(zip(self._scenario.layer_weights(weight).T, seeds, strict=True))
        ]
        self.layers = [task.result() for task in tasks]
        self._look(weight)

    def _look(self, weight: FloatArray) -> None:
        counts, peaks = self._scenario.layer_weights(weight), np.stack([layer.peaks for layer in self.layers], axis=1)
        self.done = bool((counts * peaks).sum() <= (counts * self._bounds).sum() * (1.0 + TOLERANCE))

    def _one(self, layer: int, weight: FloatArray, proposals: int, heat: float, seed: int) -> BalancedLayer:
        """weight: [S] what this layer's windows count."""
        state, counted = self.layers[layer], weight > 0
        if not counted.any():
            return state
        weight = weight / weight.sum()
        least = float(weight @ self._bounds[:, layer])
        excess = max(float(weight @ state.peaks) - least, LEAST_EXCESS)
        given = LoadLayer(
            self._rows[layer][counted],
            weight[counted],
            self._slowness,
            self._stray[layer],
            self._limit,
            self._moves[layer],
        )
        slot_device, enough = self.problem.layer_slot_device(layer), least * (1.0 + 0.5 * TOLERANCE)
        table, share = state.slot_expert, state.share
        if counted.sum() == 1:
            table, share = settle(given, table, slot_device, share, enough)
            excess = max(float((given.rows[0] @ share * self._slowness).max()) - least, LEAST_EXCESS)
        # A device this much above the others is felt, and ln G of them together are not mistaken for one.
        sharpness = np.log(self.problem.num_devices) / excess
        hot = heat * excess / len(table)
        table, share = balance_loads(given, table, slot_device, share, proposals, sharpness, hot, enough, seed)
        if self.problem.objective.split == "equal":
            share = even_layer_share(self.problem, layer, table)
        return self._placed(layer, table, share)

    def _placed(self, layer: int, table: IntArray, share: FloatArray) -> BalancedLayer:
        return BalancedLayer(table, share, np.maximum(1.0, ((self._rows[layer] @ share) * self._slowness).max(axis=1)))

    def close(self) -> None:
        """Stops the threads; rounds already handed out end first."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _alone(
    balance: _Balance, judge: Judge, scenario: Scenario, tables: Sequence[IntArray], proposals: int, budget: Budget
) -> FloatArray:
    """[W] figure of each workload's own plan, which regret is measured against: a quarter of all effort, over them."""
    present = np.unique(scenario.workload)
    reference = np.zeros(len(scenario.workloads))
    for w, code in enumerate(present):
        weight = np.where(scenario.workload == code, scenario.step_weight, 0.0)
        weight /= weight.sum()
        balance.start(tables, weight)
        timed = budget.seconds is not None
        pace = Pace(
            budget, max(1, proposals // 4), rounds=4 * ROUNDS * (len(present) - w) // 3 if timed else ALONE_ROUNDS
        )
        for round_ in range(ALONE_ROUNDS):
            with pace.timing():
                balance.run(weight, pace.proposals(round_), round_ / (ALONE_ROUNDS - 1))
        table, _, shares = _answer(balance, judge)
        reference[code] = weight @ judge.figures(table, shares)
    return reference


def _best_start(balance: _Balance, judge: Judge) -> tuple[IntArray, Certificate, FloatArray]:
    """The state, or the whole plan in force: under some risks the better layers are not the better plan."""
    best = _answer(balance, judge)
    current = _answer(balance, judge, balance.current) if balance.current else best
    return min(best, current, key=lambda answer: answer[1].value)


def _answer(
    balance: _Balance, judge: Judge, layers: Sequence[BalancedLayer] | None = None
) -> tuple[IntArray, Certificate, FloatArray]:
    """(slot table [L, P], certificate, shares [L, P]) of the state, or of other `layers`."""
    layers = balance.layers if layers is None else layers
    rows = [layer.slot_expert for layer in layers]
    table = balance.problem.slot_table(rows)
    shares = balance.problem.slot_shares(rows, [layer.share for layer in layers])
    return table, judge.certificate(table, shares), shares
