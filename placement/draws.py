"""Random draws, from seeds that users give."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np

from .errors import InputError


def check_seed(seed: Any) -> int:
    """The seed, a whole number from 0 on.

    Raises:
        InputError: it is not.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise InputError(f"seed ({seed!r}) must be a whole number, 0 or more")
    return int(seed)


def generator(seed: int) -> np.random.Generator:
    """Draws of a seed: the same seed, the same draws.

    Raises:
        InputError: as `check_seed` does.
    """
    return np.random.default_rng(check_seed(seed))
