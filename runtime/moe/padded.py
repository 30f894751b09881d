"""Dispatch whose messages have the same size in every batch: each slot gets so many rows from each rank, empty ones
among them.

Ranks then need not tell each other how many rows come, and the host never waits for the device. The price is rows of
zeros that travel and are computed on, a row for each of a token's experts (the plain way sends one a rank), and tokens
beyond an expert's capacity that are dropped.

T tokens of this rank, K experts a token, D hidden size, E experts, P slots of the layer, S slots of this rank, G
devices, c rows that a slot gets from each rank, N = T * K pairs of tokens and experts, B = P * c rows sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .all_to_all import AsyncAllToAll
from .dispatcher import WeightedSum
from .layer_placement import LayerPlacement
from .mesh import ExpertMesh
from .replica_division import in_queues


def expert_capacity(tokens: int, top_k: int, experts: int, factor: float) -> int:
    """Tokens of one rank that an expert takes at most, of `tokens` with `top_k` experts each (Megatron-LM's count)."""
    return math.ceil(factor * tokens * top_k / experts)


@dataclass(frozen=True, eq=False)
class PaddedMetadata:
    """One batch between dispatch and combine. token_B: [B] the token in each row sent, T in empty ones. weight_B: [B]
    its gate weight. tokens: T."""

    exchange: AsyncAllToAll
    token_B: Tensor
    weight_B: Tensor
    tokens: int


class PaddedDispatcher:
    """One all-to-all over all ranks each way, of `capacity` rows for each slot and rank.

    A slot is never asked to take more than `capacity` of a rank's tokens: the layer drops what is beyond an expert's
    capacity before (`over_capacity`). A slot of -1 is no slot.
    """

    def __init__(self, mesh: ExpertMesh, capacity: int) -> None:
        self.mesh, self.capacity = mesh, capacity
        self._slots = 0
        self._of_device: list[int] = []
        self._own_S = self._place_S = torch.empty(0, dtype=torch.int64)

    def place(self, placement: LayerPlacement, row_of_slot_P: Tensor, rows: int) -> None:
        """See `Dispatcher.place`."""
        self._slots = len(placement.device)
        self._of_device = np.bincount(placement.device, minlength=self.mesh.size).tolist()
        own_P = row_of_slot_P[placement.on_device(self.mesh.rank)]
        # Rows of expert weights by slot, and slots by row of expert weights.
        self._own_S = own_P.to(self.mesh.device)
        self._place_S = own_P.argsort().to(self.mesh.device)
        assert rows == len(own_P)

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> PaddedMetadata:
        """See `Dispatcher.dispatch`."""
        tokens, top_k = slot_TK.shape
        slot_N = slot_TK.flatten().long()
        slot_N = torch.where(slot_N < 0, self._slots, slot_N)
        order_N, sorted_N, place_N, _ = in_queues(slot_N, self._slots + 1)
        size = self._slots * self.capacity
        fits_N = (sorted_N < self._slots) & (place_N < self.capacity)
        where_N = torch.where(fits_N, sorted_N * self.capacity + place_N, size)
        pair_B = order_N.new_full((size + 1,), tokens * top_k).scatter_(0, where_N, order_N)[:-1]
        token_B = pair_B.div(max(top_k, 1), rounding_mode="floor")
        empty_D = x_TD.new_zeros(1, x_TD.shape[1])
        exchange = AsyncAllToAll(
            self.mesh.group,
            [slots * self.capacity for slots in self._of_device],
            [len(self._own_S) * self.capacity] * self.mesh.size,
        ).start(torch.cat([x_TD, empty_D]).index_select(0, token_B))
        weight_B = torch.cat([weight_TK.flatten(), weight_TK.new_zeros(1)]).index_select(0, pair_B)
        return PaddedMetadata(exchange, token_B, weight_B, tokens)

    def receive(self, metadata: PaddedMetadata) -> tuple[Tensor, Tensor]:
        """See `Dispatcher.receive`: [S * G * c, D], and G * c rows of every expert here."""
        row_RD, _, _ = metadata.exchange.wait()
        size, slots = self.mesh.size, len(self._own_S)
        by_slot = row_RD.view(size, slots, self.capacity, row_RD.shape[1]).transpose(0, 1)
        row_ND = by_slot.index_select(0, self._place_S).flatten(0, 2)
        return row_ND, torch.full((slots,), size * self.capacity, dtype=torch.int64, device=row_ND.device)

    def combine(self, y_ND: Tensor, metadata: PaddedMetadata) -> Tensor:
        """See `Dispatcher.combine`."""
        size, slots = self.mesh.size, len(self._own_S)
        by_row = y_ND.view(slots, size, self.capacity, y_ND.shape[1])
        y_RD = by_row.index_select(0, self._own_S).transpose(0, 1).flatten(0, 2)
        exchange = AsyncAllToAll(self.mesh.group, metadata.exchange.received, metadata.exchange.sent)
        y_BD, _, _ = exchange.start(y_RD).wait()
        total: Tensor = WeightedSum.apply(  # type: ignore[no-untyped-call]
            y_BD, metadata.weight_B, metadata.token_B, metadata.tokens + 1
        )
        return total[: metadata.tokens].to(y_ND.dtype)
