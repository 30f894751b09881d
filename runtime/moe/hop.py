"""One hop of a token: from a rank to the peers that need it, one copy each, and the results back.

T rows here, C copies sent, R copies received, D hidden size, K experts a token, P slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .lost_ranks import naming_lost_ranks
from .wire import Flight, Transit


@dataclass(frozen=True, eq=False)
class Departed:
    """Copies under way on one hop. row_C: [C] the row here that each copy is of. rows: T. pairs: token-expert pairs
    that are on their way to this rank."""

    flight: Flight
    transit: Transit
    row_C: Tensor
    rows: int
    pairs: int

    @property
    def copies(self) -> tuple[int, ...]:
        """Copies sent to each rank of the group."""
        return tuple(self.flight.sent)


class Hop:
    """Moves rows between the ranks of a group. peer_P: [P] the rank of the group that a slot's tokens go to."""

    def __init__(self, group: dist.ProcessGroup, peer_P: Tensor) -> None:
        self.group = group
        self.peers = dist.get_world_size(group)
        # Slot -1, a place in the table of K that belongs to another rank, reads the last entry: no peer.
        self._peer_P = torch.cat([peer_P, peer_P.new_tensor([self.peers])])

    def depart(self, row_TD: Tensor, weight_TK: Tensor, slot_TK: Tensor) -> Departed:
        """Sends every row once to each peer that has one of its slots, with its weights and slots there (-1: not there).

        The host waits for the device once, for the numbers of rows.
        """
        top_k = slot_TK.shape[1]
        peer_TK = self._peer_P[slot_TK.long()]
        sorted_TK = peer_TK.sort(dim=1).values
        first_TK = torch.ones_like(sorted_TK, dtype=torch.bool)
        first_TK[:, 1:] = sorted_TK[:, 1:] != sorted_TK[:, :-1]
        key_N = torch.where(first_TK, sorted_TK, self.peers).flatten()
        order_N = key_N.argsort(stable=True)
        sent, received, pairs = self._sizes(key_N, peer_TK)
        chosen_C = order_N[: sum(sent)]
        row_C = chosen_C.div(max(top_k, 1), rounding_mode="floor")
        here_CK = peer_TK[row_C] == key_N[chosen_C][:, None]
        flight = Flight(self.group, sent, received)
        transit = flight.travel(
            row_TD.index_select(0, row_C),
            torch.where(here_CK, weight_TK[row_C], 0.0),
            torch.where(here_CK, slot_TK[row_C], -1).int(),
        )
        return Departed(flight, transit, row_C, len(row_TD), pairs)

    def back(self, departed: Departed, result_RD: Tensor) -> Tensor:
        """[T, D] sum over each row's copies of what was made of them."""
        flight = Flight(self.group, departed.flight.received, departed.flight.sent)
        result_CD, _, _ = flight.travel(result_RD).arrive()
        result_TD = result_CD.new_zeros(departed.rows, result_CD.shape[1], dtype=torch.float32)
        return result_TD.index_add(0, departed.row_C, result_CD.float()).to(result_RD.dtype)

    def _sizes(self, key_N: Tensor, peer_TK: Tensor) -> tuple[list[int], list[int], int]:
        """(rows to each peer, rows from each peer, token-expert pairs from all peers)."""
        mine = torch.zeros(self.peers + 1, 2, dtype=torch.int64, device=key_N.device)
        mine[:, 0].scatter_add_(0, key_N, torch.ones_like(key_N))
        mine[:, 1].scatter_add_(0, peer_TK.flatten(), torch.ones_like(key_N))
        mine = mine[:-1].contiguous()
        theirs = torch.empty_like(mine)
        with naming_lost_ranks(self.group):
            dist.all_to_all_single(theirs, mine, group=self.group)
        table = torch.stack([mine, theirs]).tolist()
        sent, received = ([row[0] for row in side] for side in table)
        return sent, received, sum(row[1] for row in table[1])
