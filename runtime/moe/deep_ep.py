"""Dispatch by DeepEP's kernels over NVLink and RDMA (`deep_ep.Buffer`): in its normal mode one copy a token and rank,
one a token and node between nodes; in its low-latency mode, for decoding, one a token and expert, forward only.

Never run on a GPU: held to one process on a stand-in for `deep_ep.Buffer` over Gloo, which follows its published
interface. Kernels are waited for by the stream at once; nothing travels beside other work.

T tokens of this rank, K experts a token, D hidden size, R rows received, N token-expert pairs computed here, S slots of
this rank, P slots of the layer, M most slots of a device: DeepEP wants as many experts on every rank, and is told M.
B rows that low-latency mode has for each of these: the most tokens of a rank, from every rank.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, ClassVar
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


class _Places:
    """Slots as DeepEP counts them, M a rank, under the plan in force."""

    def __init__(self, mesh: ExpertMesh, needed_by: str) -> None:
        self.mesh = mesh
        _deep_ep(needed_by)
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


class DeepEPDispatcher(_Places):
    """See `Dispatcher`. Tokens are bfloat16; any plan will do.

    Raises:
        UnsupportedError: deep_ep cannot be imported.
    """

    def __init__(self, mesh: ExpertMesh) -> None:
        super().__init__(mesh, "dispatch 'deep_ep'")

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


@dataclass(frozen=True)
class DeepEPLowLatency:
    """`dispatch=` in DeepEP's low-latency mode: for decoding, under torch.no_grad or inference_mode.

    A token is sent once to each of its experts, straight to their ranks, and DeepEP adds up what they give. The host
    waits for the device once a layer, for the numbers of rows.

    tokens: the most that a rank has in a batch; the same on all ranks, whose buffers are of that size. fp8: tokens
    travel in e4m3 with a scale for 128 values; results in bfloat16.

    Raises:
        InputError: tokens is no whole number of at least 1.
    """

    tokens: int
    fp8: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise InputError(f"tokens is {self.tokens!r}; expected a whole number of at least 1")

    def __call__(self, mesh: ExpertMesh) -> LowLatencyDispatcher:
        return LowLatencyDispatcher(mesh, self)


@dataclass(eq=False)
class LowLatencyMetadata:
    """One batch between dispatch and combine. arrived: [M, B, D], in fp8 with scales [M, B, D / 128]; valid_MB: which
    of them hold a row. order_N: where each row computed is among those that are valid."""

    arrived: Any
    valid_MB: Tensor
    handle: Any
    place_TK: Tensor
    weight_TK: Tensor
    order_N: Tensor = field(default_factory=lambda: torch.empty(0))


class LowLatencyDispatcher(_Places):
    """See `Dispatcher` and `DeepEPLowLatency`. Tokens are bfloat16, of a multiple of 128 values; any plan will do.

    Raises:
        UnsupportedError: deep_ep cannot be imported.
    """

    SCALED: ClassVar = 128
    """Values that share a scale."""

    def __init__(self, mesh: ExpertMesh, settings: DeepEPLowLatency) -> None:
        super().__init__(mesh, "DeepEPLowLatency")
        self.settings = settings

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> LowLatencyMetadata:
        """See `Dispatcher.dispatch`; every token, or none, of a rank may be sent."""
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "DeepEP's low-latency mode goes forward only: gradients would be lost. Decode under torch.no_grad() or "
                "torch.inference_mode(), or train with dispatch='deep_ep', 'flat' or 'node_aware'"
            )
        most, (tokens, width) = self.settings.tokens, x_TD.shape
        if x_TD.dtype != torch.bfloat16:
            raise InputError(f"DeepEP sends tokens in bfloat16, these are {x_TD.dtype}; cast them, or use autocast")
        if tokens > most:
            raise InputError(f"{tokens} tokens, DeepEPLowLatency was told of at most {most}; give the most of any rank")
        if width % self.SCALED:
            raise UnsupportedError(
                f"DeepEP's low-latency mode sends multiples of {self.SCALED} values, tokens have {width}; give another "
                "dispatch"
            )
        experts = self._most * self.mesh.size
        place_TK = self._place_P[slot_TK.long()].contiguous()
        buffer = _low_latency_buffer_of(self.mesh, most, width, experts)
        arrived, count_M, handle, *_ = buffer.low_latency_dispatch(
            x_TD.contiguous(), place_TK, most, experts, use_fp8=self.settings.fp8
        )
        rows = torch.arange(most * self.mesh.size, device=count_M.device)
        valid_MB = rows[None, :] < count_M[:, None]
        return LowLatencyMetadata(arrived, valid_MB, handle, place_TK, weight_TK.float().contiguous())

    def receive(self, metadata: LowLatencyMetadata) -> tuple[Tensor, Tensor]:
        """See `Dispatcher.receive`. Copies what is there out of DeepEP's buffer, which its next batches overwrite."""
        valid_MB, arrived, metadata.arrived = metadata.valid_MB, metadata.arrived, None
        if self.settings.fp8:
            code_MBD, scale_MBG = arrived
            code_ND, scale_NG = code_MBD.view(torch.uint8)[valid_MB].view(code_MBD.dtype), scale_MBG[valid_MB]
            row_NGg = code_ND.float().view(*scale_NG.shape, self.SCALED) * scale_NG[:, :, None]
            row_ND = row_NGg.flatten(1).bfloat16()
        else:
            row_ND = arrived[valid_MB]
        # From DeepEP's order of slots to that of the rows of weights here.
        row_M = self._row_M[: len(valid_MB)]
        row_N = row_M[:, None].expand_as(valid_MB)[valid_MB]
        metadata.order_N = row_N.argsort(stable=True)
        count_S = torch.zeros(self._rows + 1, dtype=torch.int64, device=row_M.device)
        count_S.scatter_add_(0, row_M, valid_MB.sum(dim=1))
        return row_ND.index_select(0, metadata.order_N), count_S[:-1]

    def combine(self, y_ND: Tensor, metadata: LowLatencyMetadata) -> Tensor:
        """See `Dispatcher.combine`."""
        valid_MB, width = metadata.valid_MB, y_ND.shape[1]
        back_ND = torch.empty_like(y_ND)
        back_ND[metadata.order_N] = y_ND
        result_MBD = y_ND.new_zeros(*valid_MB.shape, width)
        result_MBD[valid_MB] = back_ND
        buffer = _low_latency_buffer_of(self.mesh, self.settings.tokens, width, self._most * self.mesh.size)
        y_TD: Tensor = buffer.low_latency_combine(result_MBD, metadata.place_TK, metadata.weight_TK, metadata.handle)[0]
        return y_TD


def _deep_ep(needed_by: str = "") -> Any:
    try:
        return importlib.import_module("deep_ep")
    except ImportError as error:
        raise UnsupportedError(
            f"{needed_by} needs DeepEP, which cannot be imported ({error}); install it from its sources on a "
            "machine with NVLink, or give 'flat' or 'node_aware'"
        ) from error


_buffers: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
"""DeepEP's, by group."""


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


def _low_latency_buffer_of(mesh: ExpertMesh, tokens: int, width: int, experts: int) -> Any:
    """The same for low-latency mode, whose buffers are of a size that is agreed on."""
    by_size = _buffers.setdefault(mesh.group, {})
    size = (tokens, width, experts)
    if size not in by_size:
        kind, ranks = _deep_ep().Buffer, mesh.size
        rdma = kind.get_low_latency_rdma_size_hint(tokens, width, ranks, experts)
        by_size[size] = kind(mesh.group, 0, rdma, low_latency_mode=True, num_qps_per_rank=experts // ranks)
    return by_size[size]
