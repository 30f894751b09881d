"""Rates from timings: the numbers that make the cost model's formulas fit, by least squares of the relative error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...placement.errors import InputError

FloatArray = npt.NDArray[np.float64]


def line(amount: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(latency, rate) of seconds = latency + amount / rate. amount: increasing.

    The smallest amount's time is the latency; larger ones, weighted by one over their time, give the rate. A fit of both at
    once lets small messages, which buffers on the way swallow, spoil the rate at which large ones pass. A larger amount takes
    no less time: where one was faster, the smaller one's timing was disturbed.

    Raises:
        InputError: fewer than two amounts, or times that do not grow with them.
    """
    x, t = np.asarray(amount, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if len(x) < 2 or not (t > 0).all():
        raise InputError(f"a line needs two timings above zero or more, given {t.tolist()} for amounts {x.tolist()}")
    t = np.minimum.accumulate(t[::-1])[::-1]
    more, longer = x - x[0], t - t[0]
    slope = (more * longer / t).sum() / (more**2 / t).sum()
    if slope <= 0:
        raise InputError(
            f"times do not grow with the amount moved: {t.tolist()} s for {x.tolist()} bytes; measure on a quieter machine"
        )
    return max(0.0, float(t[0] - slope * x[0])), float(1.0 / slope)


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
