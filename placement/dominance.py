"""Which of several alternatives nothing beats."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def non_dominated(figures: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """[N] whether no row of figures [N, K], all to be small, is at most as large everywhere and smaller somewhere.

    Of equal rows all stay.
    """
    values = np.asarray(figures, dtype=np.float64)
    result = np.ones(len(values), dtype=bool)
    for i, row in enumerate(values):
        result[i] = not ((values <= row).all(axis=1) & (values < row).any(axis=1)).any()
    return result
