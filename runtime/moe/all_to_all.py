"""One hop of a token: from a rank to the peers that need it, one copy each, and the results back.

T rows here, C copies sent, R copies received, D hidden size, K experts a token, P slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .coordination import naming_lost_ranks

# Rows on their way between ranks: one message carries activations, gate weights and slots, and overlaps with compute.
# C rows sent, R rows received, D hidden size, K experts a token, W columns of a message. Autograd through a pair of
# functions: `Depart` sends, `Arrive` waits. In backward their roles change: `Arrive` sends gradients back and
# `Depart` waits for them, so that whatever ran between them forward runs between them backward, while messages
# travel.


class Flight:
    """One message each way between the ranks of `group`.

    sent, received: rows to and from each rank of the group. slots: [R, K] of the arrived rows, when slots were sent.
    """

    def __init__(self, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> None:
        self.group, self.sent, self.received = group, sent, received
        self.slots: Tensor | None = None
        self._work: dist.Work | None = None
        self._buffers: tuple[Tensor, Tensor] | None = None

    def travel(self, row_CD: Tensor, weight_CK: Tensor | None = None, slot_CK: Tensor | None = None) -> Transit:
        """Starts sending rows, in order of destination, with what belongs to them."""
        token = Depart.apply(self, row_CD, weight_CK, slot_CK)  # type: ignore[no-untyped-call]
        top_k = 0 if weight_CK is None else weight_CK.shape[1]
        return Transit(self, cast(Tensor, token), row_CD.shape[1], row_CD.dtype, top_k, slot_CK is not None)

    def launch(self, message: Tensor, sizes: tuple[list[int], list[int]]) -> None:
        """sizes: rows to each rank, rows from each rank."""
        sent, received = sizes
        buffer = message.new_empty(sum(received), message.shape[1])
        with naming_lost_ranks(self.group):
            self._work = dist.all_to_all_single(buffer, message, received, sent, group=self.group, async_op=True)
        self._buffers = (buffer, message)

    def land(self) -> Tensor:
        """Waits for what was launched; on a GPU it is the stream that waits."""
        assert self._buffers is not None
        if self._work is not None:
            with naming_lost_ranks(self.group):
                self._work.wait()
        buffer = self._buffers[0]
        self._work = self._buffers = None
        return buffer


class Transit:
    """Rows under way."""

    def __init__(self, flight: Flight, token: Tensor, width: int, dtype: torch.dtype, top_k: int, slots: bool) -> None:
        self._flight, self._token = flight, token
        self._form = (width, dtype, top_k, slots)

    def arrive(self) -> tuple[Tensor, Tensor, Tensor]:
        """Waits: (rows [R, D], gate weights [R, K], slots [R, K]); the latter two [R, 0] where none were sent."""
        row_RD, weight_RK = Arrive.apply(self._flight, self._token, self._form)  # type: ignore[no-untyped-call]
        slot_RK = self._flight.slots
        self._flight.slots = None
        return row_RD, weight_RK, weight_RK.new_empty(len(row_RD), 0, dtype=torch.int32) if slot_RK is None else slot_RK


class Depart(Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, row_CD: Tensor, weight_CK: Tensor | None, slot_CK: Tensor | None) -> Tensor:
        ctx.flight, ctx.width, ctx.dtype = flight, row_CD.shape[1], row_CD.dtype
        ctx.top_k = 0 if weight_CK is None else weight_CK.shape[1]
        flight.launch(_pack(row_CD, weight_CK, slot_CK), (flight.sent, flight.received))
        return row_CD.new_zeros(())

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> tuple[None, Tensor, Tensor | None, None]:
        message = ctx.flight.land()
        row_CD, weight_CK, _ = _unpack(message, ctx.width, ctx.dtype, ctx.top_k, False)
        return None, row_CD, weight_CK if ctx.top_k else None, None


class Arrive(Function):
    @staticmethod
    def forward(
        ctx: Any, flight: Flight, token: Tensor, form: tuple[int, torch.dtype, int, bool]
    ) -> tuple[Tensor, Tensor]:
        ctx.flight = flight
        row_RD, weight_RK, flight.slots = _unpack(flight.land(), *form)
        return row_RD, weight_RK

    @staticmethod
    def backward(ctx: Any, row_RD: Tensor, weight_RK: Tensor) -> tuple[None, Tensor, None]:
        weights = weight_RK if weight_RK.shape[1] else None
        ctx.flight.launch(_pack(row_RD, weights, None), (ctx.flight.received, ctx.flight.sent))
        return None, row_RD.new_zeros(()), None


def _pack(row_CD: Tensor, weight_CK: Tensor | None, slot_CK: Tensor | None) -> Tensor:
    """[C, W] in the rows' dtype: the bytes of weights and slots stand behind the row, filled up to whole columns."""
    if weight_CK is None:
        return row_CD.contiguous()
    parts = [_seen_as(torch.uint8, weight_CK)]
    if slot_CK is not None:
        parts.append(_seen_as(torch.uint8, slot_CK))
    spare = -sum(part.shape[1] for part in parts) % row_CD.element_size()
    if spare:
        parts.append(parts[0].new_zeros(len(row_CD), spare))
    return torch.cat([row_CD, _seen_as(row_CD.dtype, torch.cat(parts, dim=1))], dim=1)


def _unpack(
    message: Tensor, width: int, dtype: torch.dtype, top_k: int, slots: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    if not top_k:
        return message, message.new_empty(len(message), 0, dtype=torch.float32), None
    tail = _seen_as(torch.uint8, message[:, width:])
    weight = _seen_as(torch.float32, tail[:, : 4 * top_k])
    slot = _seen_as(torch.int32, tail[:, 4 * top_k : 8 * top_k]) if slots else None
    return message[:, :width], weight, slot


def _seen_as(dtype: torch.dtype, rows: Tensor) -> Tensor:
    """The same bytes, row by row, as another type."""
    width = rows.shape[1] * rows.element_size() // dtype.itemsize
    # A single column may count as contiguous with any stride, which view does not take; one long row has stride 1.
    return rows.contiguous().flatten().view(dtype).view(len(rows), width)


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
