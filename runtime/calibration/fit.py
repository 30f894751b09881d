"""Rates from timings: the numbers that make the cost model's formulas fit, by least squares of the relative error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from ...placement.errors import InputError

FloatArray = npt.NDArray[np.float64]


def line(amount: Sequence[float], seconds: Sequence[float], weight: Sequence[float]) -> tuple[float, float]:
    """(latency, rate) of seconds = latency + amount / rate. amount: increasing. weight: how much each timing counts.

    Buffers on the way swallow small messages, and large ones may pass slower than those before them: no line holds from one
    end to the other, so weights say where it has to. A larger amount takes no less time: where one was faster, the smaller
    one's timing was disturbed.

    Raises:
        InputError: fewer than two amounts, or times that do not grow with them.
    """
    x, t = np.asarray(amount, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if len(x) < 2 or not (t > 0).all():
        raise InputError(f"a line needs two timings above zero or more, given {t.tolist()} for amounts {x.tolist()}")
    t = np.minimum.accumulate(t[::-1])[::-1]
    scale = np.sqrt(np.asarray(weight, dtype=np.float64))
    # Both unknowns in seconds, so that the solver's tolerances mean the same for both.
    largest = x.max()
    (latency, longest), _ = nnls(np.stack([scale / t, scale * (x / largest) / t], axis=1), scale)
    if longest <= 1e-6 * latency:
        raise InputError(
            f"times do not grow with the amount moved: {t.tolist()} s for {x.tolist()} bytes; measure on a quieter machine"
        )
    return float(latency), float(largest / longest)


def roofline(arithmetic: Sequence[float], reading: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(flop/s, bytes/s) of seconds = max(arithmetic / flop/s, reading / bytes/s), in the logarithm of the ratio.

    Raises:
        InputError: no timings, or some not above zero.
    """
    a, b, t = (np.asarray(values, dtype=np.float64) for values in (arithmetic, reading, seconds))
    if not len(t) or min(a.min(), b.min(), t.min()) <= 0:
        raise InputError(f"a roofline needs timings and amounts above zero, given {t.tolist()} s")
    # Sorted by intensity, some first timings are bound by reading and the rest by arithmetic. Each side's best rate is
    # the geometric mean of its own, so the cut with the least error is the best fit.
    order = np.argsort(a / b, kind="stable")
    rate, width = np.log(a / t)[order], np.log(b / t)[order]
    best = (np.inf, 0.0, 0.0)
    for cut in range(len(t) + 1):
        flops = rate[cut:].mean() if cut < len(t) else rate.max()
        read = width[:cut].mean() if cut else width.max()
        predicted = np.maximum(np.log(a) - flops, np.log(b) - read)
        error = float(((predicted - np.log(t)) ** 2).sum())
        best = min(best, (error, float(flops), float(read)))
    return float(np.exp(best[1])), float(np.exp(best[2]))


def alike(values: Sequence[float], tolerance: float) -> FloatArray:
    """The values, those within `tolerance` of their median replaced by it.

    Equal devices then stay equal, which keeps solvers from trading on noise.
    """
    result = np.asarray(values, dtype=np.float64).copy()
    middle = np.median(result)
    result[np.abs(result / middle - 1.0) <= tolerance] = middle
    return result
