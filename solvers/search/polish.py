"""The shares of a search's answer, made the best its placement can have."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import numpy.typing as npt

from ...placement.plan import Certificate
from ..base import Budget
from ..shares import layer_shares, towards
from .judge import Judge

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Answer = tuple[IntArray, Certificate, FloatArray]

PART = 0.05
"""Of a time limit, that may go into programs of shares."""


def polished(judge: Judge, answer: Answer, budget: Budget) -> Answer:
    """The answer (slot table [L, P], certificate, shares [L, P]) with shares from linear programs where replicas may share
    freely and that lowers the risk's value; see `layer_shares`. Ctrl-C leaves it as it is."""
    problem, scenario = judge.problem, judge.scenario
    objective = problem.objective
    # Programs know shares that count alike from every home.
    if objective.split != "free" or not problem.has_replicas or objective.replica_choice != "share":
        return answer
    table, certificate, shares = answer
    brief = Budget(None if budget.seconds is None else PART * budget.seconds)
    aim, weights = shares.copy(), scenario.layer_weights(scenario.step_weight)
    with suppress(KeyboardInterrupt):
        for layer in range(len(table)):
            if brief.spent:
                break
            loads = scenario.loads[:, layer]
            aim[layer] = layer_shares(
                loads, table[layer], shares[layer], problem.slot_device, problem, weights[:, layer]
            ).shares
        better = towards(shares, aim, certificate.value, lambda tried: judge.certificate(table, tried).value)
        if better is not None:
            answer = table, judge.certificate(table, better), better
            budget.report(answer[1].value, answer[1].bound, "shares")
    return answer
