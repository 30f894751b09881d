"""Layers annealed side by side, in rounds of falling temperature, until the budget is spent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..._types import FloatArray, IntArray
from ...placement.problem import Problem
from .anneal import anneal, anneal_coherent, anneal_homes
from .kernel_types import Aim, Limit, Moves, Neighbours, Rates, no_limit
from .scenario import Scenario, home_tokens

TASTE = 30
"""Proposals that tell how much one typically changes a layer's figure, the unit of temperatures."""


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


class Engine:
    """Holds one state a layer and improves it. Thread-safe only through `run`, which does its own threading."""

    def __init__(self, problem: Problem, scenario: Scenario, rates: Rates, moves: Sequence[Moves], seed: int) -> None:
        self._problem, self._scenario, self._rates, self._moves = problem, scenario, rates, moves
        self._coherent = problem.objective.execution == "context_coherent" and scenario.steps is not None
        homes = scenario.steps is not None and scenario.steps.source is not None and not self._coherent
        self._anneal = anneal_homes if homes else anneal
        self._tokens: list[Any] = [
            home_tokens(scenario, layer, problem) if homes else scenario.layer(layer)
            for layer in range(problem.model.layers)
        ]
        self._seeds = np.random.SeedSequence(seed)
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
        self.states: list[LayerState] = []
        self.limits: list[Limit] = [no_limit()] * problem.model.layers

    def start(
        self, tables: Sequence[IntArray], shares: Sequence[FloatArray], aims: Sequence[Aim], taste: int = TASTE
    ) -> None:
        """Takes a placement as the state, prices it, and learns what a proposal changes, of `taste` that improve."""
        zero = np.zeros(self._scenario.num_steps)
        placed = [Placed(table, share, zero) for table, share in zip(tables, shares, strict=True)]
        self.states = [LayerState(layer, layer, np.inf, 0.0) for layer in placed]
        self.run(aims, taste, hot=0.0, cold=0.0)

    def run(self, aims: Sequence[Aim], proposals: int, hot: float, cold: float) -> None:
        """One round: every layer walks on for `proposals`, from temperature `hot` to `cold` in typical changes."""
        seeds = self._seeds.spawn(1)[0].generate_state(len(self.states))
        layers = range(len(self.states))
        # In context-coherent execution a layer's cost depends on its neighbours: odd ones wait for even ones.
        for group in [layers[::2], layers[1::2]] if self._coherent else [layers]:
            tasks = [
                self._pool.submit(self._one, layer, aims[layer], proposals, hot, cold, int(seeds[layer]) % (1 << 31))
                for layer in group
            ]
            for layer, task in zip(group, tasks, strict=True):
                self.states[layer] = task.result()

    def answer(self, aims_changed: bool) -> list[Placed]:
        """The best placement of each layer; where it was judged beside other neighbours or by another aim than today's,
        the present one."""
        return [state.now if self._coherent or aims_changed else state.best for state in self.states]

    def _one(self, layer: int, aim: Aim, proposals: int, hot: float, cold: float, seed: int) -> LayerState:
        state = self.states[layer]
        common = (
            self._rates,
            aim,
            self._moves[layer],
            self.limits[layer],
            state.now.slot_expert,
            self._problem.layer_slot_device(layer),
            state.now.share,
            proposals,
            hot * state.typical,
            cold * state.typical,
            seed,
        )
        if self._coherent:
            walked = anneal_coherent(self._tokens[layer], self._around(layer), *common)
        else:
            walked = self._anneal(self._tokens[layer], *common)
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
