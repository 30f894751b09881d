"""All plans of a small problem, and what is proven about them."""

from __future__ import annotations

import itertools

import numpy as np

import moeplace as mp
from moeplace.placement.evaluate import evaluate_on
from moeplace.solvers.certify.step_time import risk_bound


def all_tables(problem: mp.Problem, layer: int = 0) -> list[np.ndarray]:
    """Every way to fill a layer's own slots with all experts, up to the order within a device and without doubles there."""
    sizes, experts = problem.layer_slots[layer].tolist(), problem.model.experts
    contents = [list(itertools.combinations(range(experts), size)) for size in sizes]
    return [
        np.array(list(itertools.chain(*chosen)))
        for chosen in itertools.product(*contents)
        if len(set(itertools.chain(*chosen))) == experts
    ]


def bound_of(problem: mp.Problem, steps: mp.Steps, seconds: float = 0.25) -> float:
    tables = problem.slot_table([all_tables(problem, layer)[0] for layer in range(problem.model.layers)])
    plan = mp.Plan(problem.model, problem.topology, tables, problem.slot_device)
    figures = evaluate_on(plan, steps, problem.model, problem.topology, problem.objective).step_seconds
    return risk_bound(problem, steps, steps.step_workload, figures, None, seconds)
