"""Rows on their way between ranks: one message carries activations, gate weights and slots, and overlaps with compute.

C rows sent, R rows received, D hidden size, K experts a token, W columns of a message. Autograd through a pair of
functions: `Depart` sends, `Arrive` waits. In backward their roles change: `Arrive` sends gradients back and `Depart`
waits for them, so that whatever ran between them forward runs between them backward, while messages travel.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .lost_ranks import naming_lost_ranks


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
