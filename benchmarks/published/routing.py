"""What a peer is given: the routing solved on, as hyperedges and matrices of weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Routing:
    """Tokens [T, L, k] of the training part on slots [G] of devices in nodes node_of [G]."""

    tokens: npt.NDArray[np.integer]
    experts: int
    slots: IntArray
    node_of: IntArray
    seed: int

    @property
    def layers(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def devices(self) -> int:
        return len(self.slots)

    @cached_property
    def load(self) -> FloatArray:
        """[L, E] token-expert pairs."""
        return np.stack(
            [np.bincount(self.tokens[:, layer].ravel(), minlength=self.experts) for layer in range(self.layers)]
        ).astype(np.float64)

    @cached_property
    def coactivation(self) -> FloatArray:
        """[L, E, E] tokens that chose both experts, diagonal zero."""
        result = np.zeros((self.layers, self.experts, self.experts))
        for layer in range(self.layers):
            chosen = self._chosen(layer)
            result[layer] = chosen.T @ chosen
            np.fill_diagonal(result[layer], 0.0)
        return result

    @cached_property
    def transitions(self) -> FloatArray:
        """[L-1, E, E] pairs of experts of neighbouring layers, a token weighing k."""
        k = self.tokens.shape[2]
        return np.stack([self._chosen(layer).T @ self._chosen(layer + 1) / k for layer in range(self.layers - 1)])

    def _chosen(self, layer: int) -> FloatArray:
        chosen = np.zeros((len(self.tokens), self.experts))
        np.put_along_axis(chosen, self.tokens[:, layer].astype(np.int64), 1.0, axis=1)
        return chosen

    def hyperedges(self, layers: list[int]) -> tuple[list[list[int]], list[int]]:
        """Sets of experts that tokens chose over these layers (numbered on, layer after layer) and how many did."""
        joined = np.concatenate(
            [self.tokens[:, layer].astype(np.int64) + i * self.experts for i, layer in enumerate(layers)], axis=1
        )
        sets, counts = np.unique(np.sort(joined, axis=1), axis=0, return_counts=True)
        return sets.tolist(), counts.tolist()
