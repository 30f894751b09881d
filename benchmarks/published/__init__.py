"""Partitioners that others use for expert placement, each at its settings, as slot tables of a moeplace problem.

A peer is a function `(Routing) -> dict[setting, device_of]`; device_of [L, E] gives every device as many experts as it
has slots. The best setting is chosen by the judge, on the steps it judges on: peers get the benefit of the doubt.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .equal import align_layers
from .graph import metis
from .hypergraph import mt_kahypar
from .routing import Routing
from .sweeps import assignment

IntArray = npt.NDArray[np.int64]

PEERS: tuple[tuple[str, Callable[[Routing], dict[str, IntArray]]], ...] = (
    ("mt-kahypar", mt_kahypar),
    ("metis", metis),
    ("assignment sweeps", assignment),
)

__all__ = ["PEERS", "Routing", "align_layers"]
