"""One figure from many step times, as the objective's risk asks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .objective import Objective

FloatArray = npt.NDArray[np.float64]


def risk_value(
    step_seconds: FloatArray,
    step_workload: npt.NDArray[np.int64],
    objective: Objective,
    best: FloatArray | None = None,
) -> float:
    """The objective's figure, in seconds a step.

    step_seconds: [S]. step_workload: [S] codes. best: [W] mean step time of each workload's own best plan, which
    "regret" measures against.

    Raises:
        InputError: regret without `best`.
    """
    if objective.tail is not None:
        count = max(1, round(len(step_seconds) * (1.0 - objective.tail)))
        return float(np.sort(step_seconds)[-count:].mean())
    if objective.risk == "mean":
        return float(step_seconds.mean())
    codes = np.unique(step_workload)
    means = np.array([step_seconds[step_workload == code].mean() for code in codes])
    if objective.risk == "worst_workload":
        return float(means.max())
    if best is None:
        raise InputError("risk 'regret' needs the mean step time of each workload's own best plan")
    return float((means - best[codes]).max())
