"""The cheapest path through layers of states: exact for any cost with a term a layer and a term a neighbouring pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..placement.errors import InputError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def cheapest_path(unary: Sequence[FloatArray], pair: Callable[[int], FloatArray]) -> tuple[IntArray, float]:
    """One state a layer, such that the sum of the states' and the neighbours' costs is least (Viterbi 1967).

    unary: L arrays, [S_l] cost of each state of layer l; layers may have different numbers of states.
    pair: pair(l) is the [S_l, S_{l+1}] cost of layer l's state followed by layer l+1's. Called once for each l from 0
    to L-2, in order; one matrix is held at a time. Costs may be +inf (not allowed), never NaN.

    Returns ([L] states, their cost); of equally cheap states the first is taken. The cost is +inf when every path is
    forbidden.

    Raises:
        InputError: no layer, a layer without states, or a matrix of the wrong shape.
    """
    if not unary or any(costs.ndim != 1 or not len(costs) for costs in unary):
        raise InputError(f"cheapest_path: every layer needs at least one state, given {[np.shape(c) for c in unary]}")
    reached = np.asarray(unary[0], dtype=np.float64)
    came_from: list[IntArray] = []
    for layer, costs in enumerate(unary[1:]):
        through = np.asarray(pair(layer), dtype=np.float64)
        if through.shape != (len(reached), len(costs)):
            raise InputError(
                f"cheapest_path: pair({layer}) has shape {through.shape}, expected {(len(reached), len(costs))}"
            )
        through = through + reached[:, None]
        best = through.argmin(axis=0)
        came_from.append(best)
        reached = through[best, np.arange(len(costs))] + costs
    states = [int(reached.argmin())]
    for best in reversed(came_from):
        states.append(int(best[states[-1]]))
    return np.array(states[::-1], dtype=np.int64), float(reached.min())
