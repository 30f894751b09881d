"""A placement after hundreds of accepted moves, with the step costs that the increments led to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import moeplace as mp
from moeplace._types import FloatArray
from moeplace.solvers.search.annealer import Annealer
from moeplace.solvers.search.moves import MoveRules
from moeplace.solvers.search.scenario import Scenario, mean_risks, rates_for


@dataclass(frozen=True)
class Annealed:
    """costs: [S, L] seconds by increments. repriced: [S, L] the same, counted anew."""

    plan: mp.Plan
    costs: FloatArray
    repriced: FloatArray


def annealed(problem: mp.Problem, scenario: Scenario, share_moves: bool) -> Annealed:
    """Anneals a plan of little search on the scenario, with moves of shares where asked."""
    model = problem.model
    mask = np.ones((model.experts, problem.num_devices), dtype=bool)
    moves = [MoveRules(mask, share_moves)] * model.layers
    annealer = Annealer(problem, scenario, rates_for(problem, scenario), moves, seed=3)
    table = mp.solve(problem, "search", step_tokens=8, steps=2, proposals=1).physical_to_logical
    shares = []
    for row in table:
        share = np.zeros(mask.shape)
        share[row, problem.slot_device] = 1.0
        shares.append(share / share.sum(axis=1, keepdims=True))
    risks = mean_risks(scenario)
    annealer.start(list(table), shares, risks)
    annealer.run(risks, proposals=400, hot=1.0, cold=0.5)
    costs = np.stack([state.now.cost for state in annealer.states], axis=1)
    annealer.run(risks, proposals=0, hot=0.0, cold=0.0)
    repriced = np.stack([state.now.cost for state in annealer.states], axis=1)
    annealer.close()
    plan = mp.Plan(
        model,
        problem.topology,
        np.stack([state.now.slot_expert for state in annealer.states]),
        problem.slot_device,
        np.stack([state.now.share[state.now.slot_expert, problem.slot_device] for state in annealer.states]),
    )
    return Annealed(plan, costs, repriced)
