"""Rows between the ranks of a group while other work goes on, forward and backward.

One message carries activations, gate weights and slots; activations, and gradients on the way back, may travel in few
bits. C rows sent, R rows received, D hidden size, K experts a token, W columns of a message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...placement.errors import InputError, UnsupportedError
from .compression import RowFormat, bytes_as
from .coordination import naming_unresponsive_ranks


class MessageForm(NamedTuple):
    """What a message holds: rows of `width` values of `dtype`, written in `rows` (None: as they are), with `top_k`
    weights, and as many slots behind them or none."""

    width: int
    dtype: torch.dtype
    top_k: int = 0
    slots: bool = False
    rows: RowFormat | None = None


class AsyncAllToAll:
    """One all-to-all of rows: `start` sends, other work may be done, `wait` gives what arrived.

    Autograd goes through it the other way round: the gradient of `wait` sends and that of `start` waits, so whatever
    runs between the two forward also runs between them backward, while gradients travel.

    sent, received: rows to and from each rank of the group; in order of rank, as the rows are. rows, gradients: how
    rows and their gradients are written; None: as they are. A gradient's way through a format is as if there was none.
    row_bytes, side_bytes: of one row sent: of the activations, and of weights and slots beside them. whole_row_bytes:
    of its activations as they are.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        sent: list[int],
        received: list[int],
        rows: RowFormat | None = None,
        gradients: RowFormat | None = None,
    ) -> None:
        self.group, self.sent, self.received = group, sent, received
        self.rows, self.gradients = rows, gradients
        self.row_bytes = self.whole_row_bytes = self.side_bytes = 0
        self._started: Tensor | None = None
        self._form = MessageForm(0, torch.float32)
        self._slots: Tensor | None = None
        self._pending: tuple[dist.Work | None, Tensor, Tensor] | None = None

    def start(self, row_CD: Tensor, weight_CK: Tensor | None = None, slot_CK: Tensor | None = None) -> AsyncAllToAll:
        """Sends rows, sorted by destination, with float32 weights and int32 slots (only beside weights, as many)."""
        top_k = 0 if weight_CK is None else weight_CK.shape[1]
        width = row_CD.shape[1]
        self._form = MessageForm(width, row_CD.dtype, top_k, slot_CK is not None, self.rows)
        self.whole_row_bytes = width * row_CD.element_size()
        self.row_bytes = self.whole_row_bytes if self.rows is None else self.rows.row_bytes(width)
        self.side_bytes = 4 * top_k * (1 if slot_CK is None else 2)
        self._started = cast(Tensor, _Start.apply(self, row_CD, weight_CK, slot_CK))  # type: ignore[no-untyped-call]
        return self

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows [R, D], weights [R, K], slots [R, K]); the latter two [R, 0] where none were sent."""
        # Taken out first: the graph refers to this object, which must not refer to the graph.
        started, self._started = self._started, None
        row_RD, weight_RK = _Wait.apply(self, started, self._form)  # type: ignore[no-untyped-call]
        slot_RK, self._slots = self._slots, None
        return row_RD, weight_RK, weight_RK.new_empty(len(row_RD), 0, dtype=torch.int32) if slot_RK is None else slot_RK

    def _launch(self, message: Tensor, sent: list[int], received: list[int]) -> None:
        buffer = message.new_empty(sum(received), message.shape[1])
        with naming_unresponsive_ranks(self.group):
            work = dist.all_to_all_single(buffer, message, received, sent, group=self.group, async_op=True)
        self._pending = (work, buffer, message)

    def _land(self) -> Tensor:
        """Waits for what was launched; on a GPU it is the stream that waits."""
        assert self._pending is not None
        work, buffer, _ = self._pending
        if work is not None:
            with naming_unresponsive_ranks(self.group):
                work.wait()
        self._pending = None
        return buffer


def require(condition: Tensor, words: str) -> None:
    """Raises InputError unless the condition holds; on a GPU an error of the device later on, since the host does not
    wait for it."""
    try:
        torch._assert_async(condition, words)
    except RuntimeError as error:
        raise InputError(words) from error


def first_order(backward: Callable[..., Any]) -> Any:
    """A backward that refuses to be differentiated itself, before anything wrong comes of it."""
    once: Any = once_differentiable(backward)

    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "gradients of gradients (create_graph=True: gradient penalties, Hessians) do not go through messages "
                "between ranks; leave out create_graph, or take the penalty on parts of the model without experts"
            )
        return once(ctx, *grads)

    return checked


class _Start(Function):
    @staticmethod
    def forward(
        ctx: Any, exchange: AsyncAllToAll, row_CD: Tensor, weight_CK: Tensor | None, slot_CK: Tensor | None
    ) -> Tensor:
        ctx.exchange, ctx.form = exchange, exchange._form._replace(slots=False, rows=exchange.gradients)
        exchange._launch(pack(row_CD, weight_CK, slot_CK, exchange.rows), exchange.sent, exchange.received)
        return row_CD.new_zeros(())

    @staticmethod
    @first_order
    def backward(ctx: Any, started: Tensor) -> tuple[None, Tensor, Tensor | None, None]:
        row_CD, weight_CK, _ = unpack(ctx.exchange._land(), ctx.form)
        return None, row_CD, weight_CK if weight_CK.shape[1] else None, None


class _Wait(Function):
    @staticmethod
    def forward(ctx: Any, exchange: AsyncAllToAll, started: Tensor, form: MessageForm) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        row_RD, weight_RK, exchange._slots = unpack(exchange._land(), form)
        return row_RD, weight_RK

    @staticmethod
    @first_order
    def backward(ctx: Any, row_RD: Tensor, weight_RK: Tensor) -> tuple[None, Tensor, None]:
        weights = weight_RK if weight_RK.shape[1] else None
        message = pack(row_RD, weights, None, ctx.exchange.gradients)
        ctx.exchange._launch(message, ctx.exchange.received, ctx.exchange.sent)
        return None, row_RD.new_zeros(()), None


def pack(row_CD: Tensor, weight_CK: Tensor | None, slot_CK: Tensor | None, rows: RowFormat | None) -> Tensor:
    """[C, W] in the rows' dtype, or bytes of a format: the bytes of weights and slots stand behind the row, filled up
    to whole columns."""
    written_CW = row_CD if rows is None else rows.encode(row_CD)
    if weight_CK is None:
        return written_CW.contiguous()
    parts = [bytes_as(torch.uint8, weight_CK)]
    if slot_CK is not None:
        parts.append(bytes_as(torch.uint8, slot_CK))
    spare = -sum(part.shape[1] for part in parts) % written_CW.element_size()
    if spare:
        parts.append(parts[0].new_zeros(len(row_CD), spare))
    return torch.cat([written_CW, bytes_as(written_CW.dtype, torch.cat(parts, dim=1))], dim=1)


def unpack(message: Tensor, form: MessageForm) -> tuple[Tensor, Tensor, Tensor | None]:
    columns = form.width if form.rows is None else form.rows.row_bytes(form.width)
    row = message[:, :columns]
    if form.rows is not None:
        row = form.rows.decode(row, form.width, form.dtype)
    if not form.top_k:
        return row, row.new_empty(len(message), 0, dtype=torch.float32), None
    tail = bytes_as(torch.uint8, message[:, columns:])
    weight = bytes_as(torch.float32, tail[:, : 4 * form.top_k])
    slot = bytes_as(torch.int32, tail[:, 4 * form.top_k : 8 * form.top_k]) if form.slots else None
    return row, weight, slot
