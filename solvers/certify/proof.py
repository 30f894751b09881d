"""The bound printed beside a plan, made better with the time given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..._types import FloatArray, IntArray
from ...placement.problem import Problem
from ...placement.risk import risk_weights
from ...placement.steps import Steps
from .certify import StepCertificate

QUICK_ITERATIONS = 50
"""Iterations that bring most of what there is to gain."""
QUICK_SECONDS = 0.7
"""What a bound may cost that nobody asked for, on one core of 2020."""


def risk_bound(
    problem: Problem,
    steps: Steps,
    workload: IntArray,
    step_seconds: FloatArray,
    reference: FloatArray | None,
    seconds: float | None,
    tell: Callable[[float], None] = lambda bound: None,
) -> float:
    """A lower bound of the risk of every plan for `problem` on `steps`, in seconds a step.

    workload: [S] of each step. step_seconds: [S] of the best plan known, which tells what steps matter. reference: what
    regret is measured against. seconds: time to spend; None takes what a little work gives, the same every time.
    """
    weight, offset = risk_weights(step_seconds, workload, problem.objective, reference)
    # Steps without weight need not be looked at.
    counted = np.flatnonzero(weight > 0)
    certificate = StepCertificate(problem, steps.select(counted), weight[counted])
    if seconds is not None:
        certificate.improve(seconds, lambda bound: tell(bound + offset))
    elif (iterations := _quick_iterations(problem, steps)) > 0:
        certificate.improve(np.inf, iterations=iterations)
    return certificate.bound + offset


def _quick_iterations(problem: Problem, steps: Steps) -> int:
    """Iterations that cost about `QUICK_SECONDS`, by sizes and not by the clock; 0 where the set-up costs more."""
    coherent = problem.objective.execution == "context_coherent"
    items = problem.model.experts * (2 if coherent else 1)
    pairs = len(steps.expert_ids) * problem.model.top_k**2 * (2 if coherent else 1)
    layers = problem.model.layers
    setting_up, iteration = layers * pairs * 4e-8, layers * (4e-9 * items**3 + 3e-9 * pairs)
    return int(min(QUICK_ITERATIONS, max(0.0, QUICK_SECONDS - setting_up) / iteration))
