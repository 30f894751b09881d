"""Sums of gathered rows in one Triton kernel, forward and backward: what a combine is made of.

torch has no such thing: it multiplies rows into a float32 copy, adds that up by atomics in any order, and rounds the
result in a third pass. Here every row of the result reads what it is made of, adds it up in float32 in the order of
its places, and is written once: the same bits at every call, and those of torch's own operations on a CPU.

Imported where tensors are on a GPU and Triton is installed; `TRITON_INTERPRET=1` runs it on CPUs.

N gathered rows, R rows of the result, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from .all_to_all import first_order

WIDEST = 2048
"""Columns that one program adds up at a time."""


@triton.jit  # type: ignore[untyped-decorator]
def _gather_sum(
    y: Any, weight: Any, order: Any, start: Any, out: Any, width: Any, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for j in range(tl.load(start + row), tl.load(start + row + 1)):
        n = tl.load(order + j)
        value = tl.load(y + n * width + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value = value * tl.load(weight + n)
        total += value
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _weighted_gradients(
    grad: Any, y: Any, weight: Any, place: Any, y_grad: Any, weight_grad: Any, width: Any, BLOCK: tl.constexpr
) -> None:
    n = tl.program_id(0).to(tl.int64)
    row = tl.load(place + n)
    factor = tl.load(weight + n)
    product = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        above = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(y + n * width + column, mask=inside, other=0.0).to(tl.float32)
        product += above * value
        tl.store(y_grad + n * width + column, (above * factor).to(y_grad.dtype.element_ty), mask=inside)
    tl.store(weight_grad + n, tl.sum(product, axis=0))


class GatherSum(Function):
    """[R, D] in the type of y_ND: at each place the sum of its rows y_ND, each times its weight where there are
    weights, added up in float32. Backward keeps rows as they are."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weight_N: Tensor | None, place_N: Tensor, rows: int) -> Tensor:
        y_ND = y_ND.contiguous()
        ctx.save_for_backward(*([place_N] if weight_N is None else [place_N, y_ND, weight_N.contiguous()]))
        width = y_ND.shape[1]
        order_N = place_N.argsort(stable=True)
        start_R = torch.zeros(rows + 1, dtype=torch.int64, device=y_ND.device)
        start_R[1:].scatter_add_(0, place_N, torch.ones_like(place_N))
        start_R = start_R.cumsum(0)
        out_RD = y_ND.new_empty(rows, width)
        if out_RD.numel():
            block = min(WIDEST, triton.next_power_of_2(width))
            with torch.cuda.device_of(y_ND):  # type: ignore[no-untyped-call]
                _gather_sum[rows, triton.cdiv(width, block)](
                    y_ND, weight_N, order_N, start_R, out_RD, width, WEIGHTED=weight_N is not None, BLOCK=block
                )
        return out_RD

    @staticmethod
    @first_order
    def backward(ctx: Any, out_RD: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        place_N, *saved = ctx.saved_tensors
        if not saved:
            return out_RD.index_select(0, place_N), None, None, None
        y_ND, weight_N = saved
        out_RD = out_RD.contiguous()
        y_grad_ND, weight_grad_N = torch.empty_like(y_ND), torch.empty_like(weight_N)
        if y_ND.numel():
            block = min(WIDEST, triton.next_power_of_2(y_ND.shape[1]))
            with torch.cuda.device_of(y_ND):  # type: ignore[no-untyped-call]
                _weighted_gradients[len(y_ND),](
                    out_RD, y_ND, weight_N, place_N, y_grad_ND, weight_grad_N, y_ND.shape[1], BLOCK=block
                )
        return y_grad_ND, weight_grad_N, None, None
