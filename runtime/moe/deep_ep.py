"""Dispatch by DeepEP's kernels over NVLink and RDMA, in its normal mode (`deep_ep.Buffer`): one copy a token and rank,
one a token and node between nodes.

Never run on a GPU: held to one process on a stand-in for `deep_ep.Buffer` over Gloo, which follows its published
interface. Kernels are waited for by the stream at once; nothing travels beside other work.

T tokens of this rank, K experts a token, D hidden size, R rows received, N token-expert pairs computed here, S slots of
this rank, P slots of the layer, M most slots of a device: DeepEP wants as many experts on every rank, and is told M.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from ...placement.errors import InputError, UnsupportedError
from .all_to_all import first_order
from .dispatcher import gathered_sum, permute
from .layer_placement import LayerPlacement
from .mesh import ExpertMesh


@dataclass(eq=False)
class DeepEPMetadata:
    """One batch between dispatch and combine. handle: DeepEP's own. pairs: N. token_N, weight_N: see `permute`."""

    row_RD: Tensor
    weight_RK: Tensor
    place_RK: Tensor
    handle: Any
    pairs: int
    token_N: Tensor = field(default_factory=lambda: torch.empty(0))
    weight_N: Tensor = field(default_factory=lambda: torch.empty(0))


class DeepEPDispatcher:
    """See `Dispatcher`. Tokens are bfloat16; any plan will do.

    Raises:
        UnsupportedError: deep_ep cannot be imported.
    """

    def __init__(self, mesh: ExpertMesh) -> None:
        self.mesh = mesh
        _deep_ep()
        self._most = self._rows = 0
        self._place_P = self._row_M = torch.empty(0, dtype=torch.int64)

    def place(self, placement: LayerPlacement, row_of_slot_P: Tensor, rows: int) -> None:
        """See `Dispatcher.place`."""
        device_P = placement.device
        place_P = np.empty(len(device_P), dtype=np.int64)
        for device in range(self.mesh.size):
            slots = np.flatnonzero(device_P == device)
            place_P[slots] = np.arange(len(slots))
        self._most, self._rows = int(np.bincount(device_P, minlength=self.mesh.size).max()), rows
        where = self.mesh.device
        # Slot -1, no slot, reads the last entry of either table.
        self._place_P = torch.from_numpy(np.append(device_P * self._most + place_P, -1)).to(where)
        self._row_M = torch.full((self._most + 1,), rows, dtype=torch.int64)
        own = placement.on_device(self.mesh.rank)
        self._row_M[torch.from_numpy(place_P[own])] = row_of_slot_P[own]
        self._row_M = self._row_M.to(where)

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> DeepEPMetadata:
        """See `Dispatcher.dispatch`."""
        if x_TD.dtype != torch.bfloat16:
            raise InputError(f"DeepEP sends tokens in bfloat16, these are {x_TD.dtype}; cast them, or use autocast")
        buffer = _buffer_of(self.mesh, x_TD.shape[1])
        place_TK = self._place_P[slot_TK.long()].contiguous()
        arrived: list[Any] = []
        row_RD, weight_RK = _Dispatch.apply(  # type: ignore[no-untyped-call]
            x_TD, weight_TK.float(), place_TK, self._most * self.mesh.size, buffer, arrived
        )
        place_RK, counts, handle = arrived
        return DeepEPMetadata(row_RD, weight_RK, place_RK, handle, sum(counts))

    def receive(self, metadata: DeepEPMetadata) -> tuple[Tensor, Tensor]:
        """See `Dispatcher.receive`."""
        row_ND, count_S, metadata.token_N, metadata.weight_N = permute(
            metadata.row_RD, metadata.weight_RK, metadata.place_RK, self._row_M, self._rows, metadata.pairs
        )
        return row_ND, count_S

    def combine(self, y_ND: Tensor, metadata: DeepEPMetadata) -> Tensor:
        """See `Dispatcher.combine`."""
        total_RD = gathered_sum(y_ND, metadata.token_N, len(metadata.row_RD), metadata.weight_N)
        buffer = _buffer_of(self.mesh, y_ND.shape[1])
        result: Tensor = _Combine.apply(total_RD, metadata.handle, buffer)  # type: ignore[no-untyped-call]
        return result


class _Dispatch(Function):
    """Backward of what DeepEP dispatches is what it combines, by the same handle."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_TK: Tensor, place_TK: Tensor, experts: int, buffer: Any, arrived: list[Any]
    ) -> tuple[Tensor, Tensor]:
        by_rank, by_node, by_expert, in_rank, _ = buffer.get_dispatch_layout(place_TK, experts)
        row_RD, place_RK, weight_RK, counts, handle, _ = buffer.dispatch(
            x_TD.contiguous(),
            topk_idx=place_TK,
            topk_weights=weight_TK.contiguous(),
            num_tokens_per_rank=by_rank,
            num_tokens_per_rdma_rank=by_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=by_expert,
        )
        ctx.buffer, ctx.handle = buffer, handle
        arrived += [place_RK, counts, handle]
        return row_RD, weight_RK

    @staticmethod
    @first_order
    def backward(ctx: Any, row_RD: Tensor, weight_RK: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_TK, _ = ctx.buffer.combine(
            row_RD.contiguous(), ctx.handle, topk_weights=weight_RK.float().contiguous()
        )
        return x_TD, weight_TK, None, None, None, None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, total_RD: Tensor, handle: Any, buffer: Any) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        y_TD, _, _ = buffer.combine(total_RD.contiguous(), handle)
        result: Tensor = y_TD
        return result

    @staticmethod
    @first_order
    def backward(ctx: Any, y_TD: Tensor) -> tuple[Tensor, None, None]:
        total_RD, *_ = ctx.buffer.dispatch(y_TD.contiguous(), handle=ctx.handle)
        return total_RD, None, None


def _deep_ep() -> Any:
    try:
        return importlib.import_module("deep_ep")
    except ImportError as error:
        raise UnsupportedError(
            f"dispatch 'deep_ep' needs DeepEP, which cannot be imported ({error}); install it from its sources on a "
            "machine with NVLink, or give 'flat' or 'node_aware'"
        ) from error


_buffers: WeakKeyDictionary[Any, dict[int, Any]] = WeakKeyDictionary()


def _buffer_of(mesh: ExpertMesh, width: int) -> Any:
    """DeepEP's buffers of a group, for rows of one width, which all layers share; every rank makes them at once."""
    by_width = _buffers.setdefault(mesh.group, {})
    if width not in by_width:
        kind, ranks, row_bytes = _deep_ep().Buffer, mesh.size, width * torch.bfloat16.itemsize
        configs = kind.get_dispatch_config(ranks), kind.get_combine_config(ranks)
        nvlink, rdma = (
            max(getattr(config, hint)(row_bytes, ranks) for config in configs)
            for hint in ("get_nvl_buffer_size_hint", "get_rdma_buffer_size_hint")
        )
        by_width[width] = kind(mesh.group, nvlink, rdma)
    return by_width[width]
