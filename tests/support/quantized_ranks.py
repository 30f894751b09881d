"""What each rank does in test_quantized_rows.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from expert_ranks import error, tokens
from random_plans import SPEC, logical_weights, random_plan
from ranks import join_group
from torch import Tensor
from torch.autograd import Function
from torch.distributed.device_mesh import init_device_mesh

import moeplace as mp
from moeplace.runtime import LSHCompression, QuantizedRows
from moeplace.runtime.moe.compression import RowFormat
from moeplace.runtime.moe.expert_mlps import SwiGLU
from moeplace.runtime.moe.experts import PlacedExperts, ReplicaChoice

CASES = {
    "int8": QuantizedRows.of("int8", 8),
    "int4": QuantizedRows.of("int4", 16),
    "fp8": QuantizedRows.of("fp8", 8),
    "out alone": QuantizedRows("int8", None, None, 8),
    "gradients alone": QuantizedRows(None, None, "int4", 8),
    "mixed": QuantizedRows("fp8", "int4", "int8", 4),
}


def layers(rank: int, world: int, folder: Path) -> dict[str, Any]:
    join_group(rank, world, folder)
    flat, deep = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (2, world // 2))
    found = {
        "equality": {name: equality(rank, world, flat, n, rows) for n, (name, rows) in enumerate(CASES.items())},
        "bytes": {name: bytes_of(rank, world, flat, rows) for name, rows in CASES.items()},
        "hops": hops(rank, world, flat, deep),
        "chunks": chunks(rank, world, deep),
        "composed": composed(rank, world, flat),
        "refused": refused(rank, world, flat),
    }
    dist.destroy_process_group()
    return found


class RoundTrip(Function):
    """Rows as they are read after a journey, and their gradients after theirs."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, there: RowFormat | None, back: RowFormat | None) -> Tensor:
        ctx.back = back
        return read_back(row, there)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return read_back(grad, ctx.back), None, None


def read_back(row: Tensor, form: RowFormat | None) -> Tensor:
    return row.clone() if form is None else form.decode(form.encode(row), row.shape[1], row.dtype)


def experts_of(
    mesh: Any, world: int, number: int, compression: Any, dtype: Any = None, chunks: int = 1
) -> PlacedExperts:
    plan = random_plan(np.random.default_rng([17, number]), 2, world // 2)
    experts = PlacedExperts(SPEC, plan, mesh, 4, gradients="sum", compression=compression, dtype=dtype, chunks=chunks)
    weights = logical_weights(number, SwiGLU().shapes(SPEC), SPEC.experts)
    experts.load_logical(weights if dtype is None else {name: value.to(dtype) for name, value in weights.items()})
    return experts


def equality(rank: int, world: int, mesh: Any, number: int, rows: QuantizedRows) -> dict[str, float]:
    """Relative errors against one process that rounds each row of a token and device by itself."""
    experts = experts_of(mesh, world, number, rows)
    batch = tokens(np.random.default_rng([18, number]), world)
    x, gate = (batch[name][rank].clone().requires_grad_() for name in ("x", "gate"))
    out = experts(x, batch["ids"][rank], gate)
    (out * batch["up"][rank]).sum().backward()
    weights = logical_weights(number, SwiGLU().shapes(SPEC), SPEC.experts)
    own = {name: value.clone().requires_grad_() for name, value in weights.items()}
    expected: dict[str, Tensor] = {}
    for sender in range(world):
        naive = _naive(batch, sender, experts, rows, own)
        if sender == rank:
            expected = naive
    found = {"out": out.detach(), "x": x.grad, "gate": gate.grad}
    worst = {name: _apart_from_ties(value, expected[name]) for name, value in found.items()}
    for name, value in experts.named_parameters():
        goal = own[name].grad
        assert goal is not None
        worst[name] = error(value.grad, goal[torch.from_numpy(experts.row_expert)])
    return worst


def _apart_from_ties(found: Tensor, exact: Tensor) -> float:
    """Relative error, but for few values that stand between two codes or two scales, where the last bit decides."""
    if not len(found):
        return 0.0
    apart = (found - exact).abs() > 1e-4 * exact.square().mean().sqrt()
    assert apart.sum() <= 8 + 0.01 * apart.numel()
    return error(torch.where(apart, exact, found), exact)


def _naive(batch: Any, sender: int, experts: PlacedExperts, rows: QuantizedRows, own: Any) -> dict[str, Tensor]:
    placement = experts.placement
    slots = ReplicaChoice(placement, sender, torch.device("cpu")).slots(batch["ids"][sender]).tolist()
    x, gate = (batch[name][sender].clone().requires_grad_() for name in ("x", "gate"))
    outs = []
    for t, row in enumerate(slots):
        total = torch.zeros(1, SPEC.hidden_size)
        for device in sorted({int(placement.device[slot]) for slot in row}):
            read = RoundTrip.apply(x[t : t + 1], rows.dispatch, rows.gradients)
            result = torch.zeros(1, SPEC.hidden_size)
            for k, slot in enumerate(row):
                if placement.device[slot] == device:
                    expert = int(placement.expert[slot])
                    weights = {name: value[expert : expert + 1] for name, value in own.items()}
                    result = result + gate[t, k] * SwiGLU().forward(read, torch.tensor([1]), weights)
            total = total + RoundTrip.apply(result, rows.combine, rows.gradients)
        outs.append(total)
    out = torch.cat(outs) if outs else x
    (out * batch["up"][sender]).sum().backward()
    grads = [torch.zeros_like(value) if value.grad is None else value.grad for value in (x, gate)]
    return {"out": out.detach(), "x": grads[0], "gate": grads[1]}


@contextmanager
def messages(rank: int) -> Iterator[list[tuple[int, int]]]:
    """(bytes to other ranks, bytes from them) of each all-to-all of rows; gradients of replicas are one long row."""
    seen: list[tuple[int, int]] = []
    before = dist.all_to_all_single

    def counting(output: Tensor, message: Tensor, received: Any = None, sent: Any = None, **rest: Any) -> Any:
        if sent is not None and message.ndim == 2:
            row = message.shape[1] * message.element_size()
            seen.append(((sum(sent) - sent[rank]) * row, (sum(received) - received[rank]) * row))
        return before(output, message, received, sent, **rest)

    dist.all_to_all_single = counting
    try:
        yield seen
    finally:
        dist.all_to_all_single = before


def bytes_of(rank: int, world: int, mesh: Any, rows: QuantizedRows) -> dict[str, int]:
    """Bytes of this rank's rows, there and back, as counted by the layer and on the way; in bfloat16."""
    x, ids, gate = batch_of(rank)
    carried = {}
    for name, compression in (("plain", None), ("sent", rows)):
        experts = experts_of(mesh, world, 3, compression, torch.bfloat16)
        tokens_in = x.bfloat16().requires_grad_()
        with messages(rank) as seen:
            out = experts(tokens_in, ids, gate.clone().requires_grad_())
            forward = seen[0][0] + seen[1][1]
            seen.clear()
            out.float().square().sum().backward()
            carried[name] = forward, seen[0][0] + seen[1][1]
    statistics = experts.dispatcher.statistics
    whole = SPEC.hidden_size * 2
    gradient = whole if rows.gradients is None else rows.gradients.row_bytes(SPEC.hidden_size)
    return {
        "forward": carried["sent"][0],
        "sent_bytes": statistics.sent_bytes,
        "plain_forward": carried["plain"][0],
        "plain_bytes": statistics.plain_bytes,
        "backward": carried["sent"][1],
        "backward_expected": statistics.sent_rows * (2 * gradient + 4 * SPEC.top_k),
    }


def batch_of(rank: int, count: int = 120, alike: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens around a few points, ids and gate weights."""
    generator = torch.Generator().manual_seed(rank)
    centre = torch.randn(alike, SPEC.hidden_size, generator=generator)
    which = torch.randint(alike, (count,), generator=generator)
    x = centre[which] + 0.05 * torch.randn(count, SPEC.hidden_size, generator=generator)
    ids = torch.rand(alike, SPEC.experts, generator=generator).topk(SPEC.top_k).indices[which]
    return x, ids, torch.rand(count, SPEC.top_k, generator=generator)


def hops(rank: int, world: int, flat: Any, deep: Any) -> list[float]:
    """Errors of the output by one exchange and by two, of int8."""
    given = batch_of(rank)
    found = []
    for mesh in (flat, deep):
        exact = experts_of(mesh, world, 3, None)(*given)
        found.append(error(experts_of(mesh, world, 3, QuantizedRows.of("int8", 8))(*given), exact))
    return found


def chunks(rank: int, world: int, deep: Any) -> dict[str, Any]:
    """A batch whole and in three chunks: the difference of outputs, and what is told of the traffic."""
    out, told = [], []
    for number in (1, 3):
        experts = experts_of(deep, world, 3, QuantizedRows.of("int4", 8), chunks=number)
        out.append(experts(*batch_of(rank)))
        told.append(list(astuple(experts.dispatcher.statistics)))
    return {"error": error(out[1], out[0]), "told": told}


def composed(rank: int, world: int, mesh: Any) -> dict[str, Any]:
    """LSH's rows in int8 against the same clusters in whole rows."""
    given = batch_of(rank)
    rows = QuantizedRows.of("int8", 8)
    out = [
        (experts := experts_of(mesh, world, 3, LSHCompression(rate=0.25, rows=kind)))(*given) for kind in (None, rows)
    ]
    seen = experts.dispatcher.statistics
    assert rows.dispatch is not None
    return {
        "plain_rows": seen.plain_rows,
        "sent_rows": seen.sent_rows,
        "sent_bytes": seen.sent_bytes,
        "row_bytes": 2 * rows.dispatch.row_bytes(SPEC.hidden_size) + 8 * SPEC.top_k,
        "error": error(out[1], out[0]),
    }


def refused(rank: int, world: int, mesh: Any) -> dict[str, str]:
    plan = random_plan(np.random.default_rng([5, 0]), 2, world // 2)
    said = {}
    for name, compression in {
        "differing": QuantizedRows.of("int4" if rank == 1 else "int8", 8),
        "width": QuantizedRows(),
    }.items():
        try:
            PlacedExperts(SPEC, plan, mesh, 4, compression=compression)
        except mp.InputError as refusal:
            said[name] = str(refusal)
    return said
