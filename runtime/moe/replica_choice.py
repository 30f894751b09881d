"""Which replica serves a token: by share, near ones first, without chance and without asking other ranks.

T tokens of this rank, K experts a token, P slots, E experts, R most replicas of an expert.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .layer_placement import LayerPlacement


class ReplicaChoice:
    """The slots of a rank's tokens under one placement."""

    def __init__(self, placement: LayerPlacement, rank: int, device: torch.device) -> None:
        self._slots_ER = torch.from_numpy(placement.slots_of).to(device)
        self._replicated = bool((placement.replicas > 1).any())
        # Rounding must not push the last edge below 1, nor a token past the last slot that has a share.
        edges = np.cumsum(placement.quota(rank), axis=1)
        edges[edges > 1.0 - 1e-9] = 2.0
        self._edges_ER = torch.from_numpy(edges).to(device)
        # Ranks start at different fractions of a slot, so that few tokens each are balanced over all ranks together.
        self._start = _bit_reversed(rank, placement.devices)

    def slots(self, expert_TK: Tensor) -> Tensor:
        """[T, K] slot of each chosen expert.

        The i-th of an expert's n tokens here goes where the fraction (i + start) / n falls among the quotas.
        """
        if not self._replicated:
            return self._slots_ER[expert_TK, 0]
        expert_N = expert_TK.flatten()
        order_N = expert_N.argsort(stable=True)
        count_E = torch.zeros(len(self._slots_ER), dtype=torch.int64, device=expert_N.device)
        count_E.scatter_add_(0, expert_N, torch.ones_like(expert_N))
        begin_E = count_E.cumsum(0) - count_E
        sorted_N = expert_N[order_N]
        place_N = torch.arange(len(expert_N), device=expert_N.device) - begin_E[sorted_N]
        fraction_N = (place_N + self._start) / count_E[sorted_N]
        replica_N = (self._edges_ER[sorted_N] <= fraction_N[:, None]).sum(dim=1)
        slot_N = torch.empty_like(expert_N)
        slot_N[order_N] = self._slots_ER[sorted_N, replica_N]
        return slot_N.view_as(expert_TK)


def _bit_reversed(rank: int, size: int) -> float:
    """A fraction in (0, 1): neighbouring ranks far apart, all ranks evenly spread (van der Corput)."""
    bits = max(1, (size - 1).bit_length())
    reversed_rank = int(f"{rank:0{bits}b}"[::-1], 2)
    return (reversed_rank + 0.5) / (1 << bits)
