"""Dispatch through torch's symmetric memory (`torch.ops.symm_mem.all_to_all_vdev`): numbers of rows stay on the device,
and the host waits for none of them.

Never run on a GPU: held to one process on a stand-in for the operator, which reads other processes' memory as its
sources say, with delays.

The operator (torch/csrc/distributed/c10d/symm_mem/nvshmem_extension.cu) writes its numbers of rows to all ranks, meets
them in a barrier, and then reads its rows out of their buffers; behind that it meets nobody. A rank may therefore still
be reading when its peers go on. What keeps rows from being overwritten while they are read is that calls take turns
with two sets of buffers: whoever fills a set for the second time has been through the barrier of the call between,
which every rank reaches only when it has read all that the first time was for. Numbers of rows are copied out before
the next call, for the same reason.

T tokens of this rank, K experts a token, D hidden size, G ranks, S slots of this rank, P slots of the layer; C copies
sent and R copies received at most, N token-expert pairs computed here at most; B bytes of a row.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ...placement.errors import InputError, UnsupportedError
from .all_to_all import MessageForm, first_order, pack, require, unpack
from .compression import bytes_as
from .coordination import naming_unresponsive_ranks
from .dispatcher import gathered_sum, one_copy_a_peer, permute
from .layer_placement import LayerPlacement
from .mesh import ExpertMesh

BACKEND = "NVSHMEM"
"""The only one of symmetric memory that is asked for; set_backend(...) chooses it."""
BLOCKS = (8, 16, 32, 64)
"""Numbers of blocks that the operator launches, shared out among ranks; a block's part of a message must be whole."""
MOST_RANKS = 512
"""Of a group: the operator has a thread for each."""


@dataclass(frozen=True)
class SymmetricMemory:
    """`dispatch=` through torch's symmetric memory (NVSHMEM), which sends without the host knowing how many rows.

    One copy a token and rank. Rows received, and what experts make of them, stand in tensors of the size that is agreed
    on here, whatever there is of them. The operator is waited for by the stream at once; nothing travels beside other
    work.

    tokens: the most that a rank has in a batch; the same on all ranks, whose buffers are of that size.
    rank_capacity_factor: a rank has place for so many times the mean of token-expert pairs, tokens x top-k. A batch of
    which a rank would get more ends in an error on all ranks (on a GPU, one of the device). None has place for the
    worst there can be: all tokens of all ranks on one.

    Raises:
        InputError: tokens is no whole number of at least 1, or rank_capacity_factor no number of at least 1.
    """

    tokens: int
    rank_capacity_factor: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise InputError(f"tokens is {self.tokens!r}; expected a whole number of at least 1")
        factor = self.rank_capacity_factor
        if factor is not None and not 1.0 <= factor < float("inf"):
            raise InputError(f"rank_capacity_factor is {factor!r}; expected a number of at least 1, or None")

    def __call__(self, mesh: ExpertMesh) -> SymmetricDispatcher:
        return SymmetricDispatcher(mesh, self)


@dataclass(eq=False)
class SymmetricMetadata:
    """One batch between dispatch and combine. row_C: [C] the row of the tokens that each copy is of. tokens: T."""

    buffers: SymmetricBuffers
    arrived: tuple[Tensor, Tensor, Tensor, Tensor]
    row_C: Tensor
    tokens: int
    token_N: Tensor = field(default_factory=lambda: torch.empty(0))
    weight_N: Tensor = field(default_factory=lambda: torch.empty(0))
    valid_N: Tensor = field(default_factory=lambda: torch.empty(0))


class SymmetricDispatcher:
    """See `Dispatcher` and `SymmetricMemory`. Any plan will do.

    Raises:
        UnsupportedError: torch has no such operator for this device, symmetric memory has another backend, the mesh has
            pipeline stages or more ranks than the operator serves.
    """

    def __init__(self, mesh: ExpertMesh, settings: SymmetricMemory) -> None:
        self.mesh, self.settings = mesh, settings
        if mesh.pipeline is not None:
            raise UnsupportedError(
                "SymmetricMemory and pipeline stages do not go together: NVSHMEM's memory is taken by all ranks of the "
                "world at once, and stages come to their first batch one after another; give another dispatch"
            )
        if mesh.size > MOST_RANKS:
            raise UnsupportedError(
                f"SymmetricMemory serves {MOST_RANKS} ranks, the mesh has {mesh.size}; give another dispatch"
            )
        _check_operator(mesh.device)
        self._peer_P = self._row_P = torch.empty(0, dtype=torch.int64)
        self._rows = 0

    def place(self, placement: LayerPlacement, row_of_slot_P: Tensor, rows: int) -> None:
        """See `Dispatcher.place`."""
        where = self.mesh.device
        # Slot -1, no slot, reads the last entry of either table.
        device_P = torch.from_numpy(placement.device.copy()).long()
        self._peer_P = torch.cat([device_P, device_P.new_tensor([self.mesh.size])]).to(where)
        row_P = torch.where(row_of_slot_P < 0, rows, row_of_slot_P)
        self._row_P = torch.cat([row_P, row_P.new_tensor([rows])]).to(where)
        self._rows = rows

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> SymmetricMetadata:
        """See `Dispatcher.dispatch`."""
        most, peers, (tokens, top_k) = self.settings.tokens, self.mesh.size, slot_TK.shape
        if tokens > most:
            raise InputError(f"{tokens} tokens, SymmetricMemory was told of at most {most}; give the most of any rank")
        pairs = self._pairs(top_k)
        peer_TK = self._peer_P[slot_TK.long()]
        key_N, order_N = one_copy_a_peer(peer_TK, peers)
        # As many as there can be: who they are for is known on the device alone.
        chosen_C = order_N[: tokens * min(top_k, peers)]
        row_C = chosen_C.div(max(top_k, 1), rounding_mode="floor")
        here_CK = peer_TK[row_C] == key_N[chosen_C][:, None]
        sent_G = _numbers(key_N, peers)
        if self.settings.rank_capacity_factor is not None:
            sent_G = self._checked(sent_G, _numbers(peer_TK.flatten(), peers), pairs)
        rows = max(most * min(top_k, peers), self._received(top_k))
        buffers = _buffers_of(self.mesh, rows, x_TD.shape[1] * x_TD.element_size() + 8 * top_k)
        arrived = _Carry.apply(  # type: ignore[no-untyped-call]
            buffers,
            self._received(top_k),
            sent_G,
            x_TD.index_select(0, row_C),
            torch.where(here_CK, weight_TK[row_C], 0.0),
            torch.where(here_CK, slot_TK[row_C], -1).int(),
        )
        return SymmetricMetadata(buffers, arrived, row_C, tokens)

    def receive(self, metadata: SymmetricMetadata) -> tuple[Tensor, Tensor]:
        """See `Dispatcher.receive`. Behind the rows of experts stand those for which nothing came: zeros."""
        row_RD, weight_RK, slot_RK, _ = metadata.arrived
        top_k = slot_RK.shape[1]
        pairs = min(self._pairs(top_k), len(row_RD) * min(top_k, self._rows))
        row_ND, count_S, metadata.token_N, metadata.weight_N = permute(
            row_RD, weight_RK, slot_RK, self._row_P, self._rows, pairs
        )
        metadata.valid_N = torch.arange(len(row_ND), device=row_ND.device) < count_S.sum()
        return torch.where(metadata.valid_N[:, None], row_ND, 0.0), count_S

    def combine(self, y_ND: Tensor, metadata: SymmetricMetadata) -> Tensor:
        """See `Dispatcher.combine`."""
        row_RD, _, _, received_G = metadata.arrived
        # Nobody has said what experts make of rows that are none.
        y_ND = torch.where(metadata.valid_N[:, None], y_ND, 0.0)
        total_RD = gathered_sum(y_ND, metadata.token_N, len(row_RD), metadata.weight_N)
        y_CD, *_ = _Carry.apply(  # type: ignore[no-untyped-call]
            metadata.buffers, len(metadata.row_C), received_G, total_RD, None, None
        )
        return gathered_sum(y_CD, metadata.row_C, metadata.tokens)

    def _pairs(self, top_k: int) -> int:
        """N: for which every rank has place."""
        mean, factor = self.settings.tokens * top_k, self.settings.rank_capacity_factor
        return mean * self.mesh.size if factor is None else math.ceil(factor * mean)

    def _received(self, top_k: int) -> int:
        """R: one copy a token and rank, of at least one pair."""
        return min(self.settings.tokens * self.mesh.size, self._pairs(top_k))

    def _checked(self, sent_G: Tensor, pairs_G: Tensor, most: int) -> Tensor:
        """Copies for each rank: none at all where some rank has no place for its pairs, which ends in an error.

        The operator itself would write beyond the buffer.
        """
        with naming_unresponsive_ranks(self.mesh.group):
            dist.all_reduce(pairs_G, group=self.mesh.group)
        fits = pairs_G.max() <= most
        require(
            fits,
            f"SymmetricMemory: a rank would get more than the {most} token-expert pairs that rank_capacity_factor "
            f"({self.settings.rank_capacity_factor}) has place for; give a larger one, or None",
        )
        return torch.where(fits, sent_G, 0)


def _numbers(key_N: Tensor, peers: int) -> Tensor:
    """[G] how often each rank is named."""
    count = torch.zeros(peers + 1, dtype=torch.int64, device=key_N.device)
    return count.scatter_add_(0, key_N, torch.ones_like(key_N))[:-1]


class _Carry(Function):
    """Rows sorted by rank to these ranks, with weights and slots or without: (rows, weights, slots -1 where there are
    none, rows from each rank), `rows` of them, zeros behind those that came. Backward carries gradients the other way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        buffers: SymmetricBuffers,
        rows: int,
        sent_G: Tensor,
        row_CD: Tensor,
        weight_CK: Tensor | None,
        slot_CK: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        top_k = 0 if weight_CK is None else weight_CK.shape[1]
        form = MessageForm(row_CD.shape[1], row_CD.dtype, top_k, slot_CK is not None)
        message, received_G = buffers.exchange(pack(row_CD, weight_CK, slot_CK, None), sent_G, rows)
        row_RD, weight_RK, slot_RK = unpack(message, form)
        slot_RK = received_G.new_empty(rows, 0) if slot_RK is None else slot_RK
        slot_RK = slot_RK.masked_fill(torch.arange(rows, device=slot_RK.device)[:, None] >= received_G.sum(), -1)
        ctx.buffers, ctx.form, ctx.rows = buffers, form._replace(slots=False), len(row_CD)
        ctx.save_for_backward(received_G)
        ctx.mark_non_differentiable(slot_RK, received_G)
        return row_RD, weight_RK, slot_RK, received_G

    @staticmethod
    @first_order
    def backward(
        ctx: Any, row_RD: Tensor, weight_RK: Tensor, slot_RK: None, numbers_G: None
    ) -> tuple[Tensor | None, ...]:
        (received_G,) = ctx.saved_tensors
        weights = weight_RK if ctx.form.top_k else None
        message, _ = ctx.buffers.exchange(pack(row_RD, weights, None, None), received_G, ctx.rows)
        row_CD, weight_CK, _ = unpack(message, ctx.form)
        return None, None, None, row_CD, weight_CK if ctx.form.top_k else None, None


class SymmetricBuffers:
    """Symmetric tensors between the ranks of a group, which all layers share; every rank makes them at once.

    rows: of a message at most, in either direction. row_bytes: B at most.
    """

    SETS = 2
    """That calls take turns with: see above."""

    def __init__(self, group: dist.ProcessGroup, rows: int, row_bytes: int, device: torch.device) -> None:
        symmetric = _symmetric_memory()
        peers = group.size()
        self._group, self._turn = group, 0

        def empty(*size: int, dtype: torch.dtype) -> Tensor:
            # The first batch may be an evaluation's, and later ones train.
            with torch.inference_mode(False):
                value: Tensor = symmetric.empty(*size, dtype=dtype, device=device)
                symmetric.rendezvous(value, group)
            return value

        self._sets = [
            (empty(rows, row_bytes, dtype=torch.uint8), empty(2, peers, dtype=torch.int64)) for _ in range(self.SETS)
        ]
        # These are read and written by their own rank alone.
        self._sent_G, self._out = empty(peers, dtype=torch.int64), empty(rows, row_bytes, dtype=torch.uint8)

    def exchange(self, message: Tensor, sent_G: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """(the first `rows` rows of what arrives, zeros behind, like the message; [G] rows from each rank).

        message: [C, W] rows sorted by rank, of which the first `sent_G.sum()` are sent.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                "SymmetricMemory is not for CUDA graphs: one of an odd number of exchanges would fill the same buffers "
                "twice in a row when it is played again; capture other parts of the model, or give padded_tokens"
            )
        sent = bytes_as(torch.uint8, message)
        self._turn = (self._turn + 1) % self.SETS
        buffer, came_2G = self._sets[self._turn]
        buffer[: len(sent), : sent.shape[1]] = sent
        self._sent_G.copy_(sent_G)
        with naming_unresponsive_ranks(self._group):
            torch.ops.symm_mem.all_to_all_vdev(buffer, self._out, self._sent_G, came_2G, self._group.group_name)
        received_G = came_2G[0].clone()
        valid = torch.arange(rows, device=sent.device) < received_G.sum()
        arrived = torch.where(valid[:, None], self._out[:rows, : sent.shape[1]], 0)
        return bytes_as(message.dtype, arrived), received_G


def _symmetric_memory() -> Any:
    return importlib.import_module("torch.distributed._symmetric_memory")


def _check_operator(device: torch.device) -> None:
    """Raises UnsupportedError unless torch's operator runs on this device, with memory of its kind."""
    try:
        symmetric = _symmetric_memory()
        names = [argument.name for argument in torch.ops.symm_mem.all_to_all_vdev.default._schema.arguments]
    except (ImportError, AttributeError):
        names = []
    expected = ["input", "out", "in_splits", "out_splits_offsets", "group_name"]
    if names != expected:
        raise UnsupportedError(
            f"SymmetricMemory needs torch.ops.symm_mem.all_to_all_vdev({', '.join(expected)}); this torch "
            f"{torch.__version__} has {', '.join(names) or 'no such operator'}. Give 'flat' or 'node_aware'"
        )
    if not torch._C._dispatch_has_kernel_for_dispatch_key("symm_mem::all_to_all_vdev", device.type.upper()):
        raise UnsupportedError(
            f"SymmetricMemory: this torch {torch.__version__} has no all_to_all_vdev for {device.type!r}; it comes "
            "with builds for CUDA with NVSHMEM. Give 'flat' or 'node_aware'"
        )
    backend = symmetric.get_backend(device)
    if backend != BACKEND:
        raise UnsupportedError(
            f"SymmetricMemory needs symmetric memory of {BACKEND}, this process has that of {backend}; call "
            f"torch.distributed._symmetric_memory.set_backend('{BACKEND}') before any of it is taken"
        )


_buffers: WeakKeyDictionary[Any, dict[tuple[int, int], SymmetricBuffers]] = WeakKeyDictionary()
"""Of each group, by rows and bytes of a row."""


def _buffers_of(mesh: ExpertMesh, rows: int, row_bytes: int) -> SymmetricBuffers:
    # Addresses that are multiples of 16 bytes are copied in one piece.
    whole = math.lcm(16, *(max(blocks // mesh.size, 1) for blocks in BLOCKS))
    size = rows, -(-row_bytes // whole) * whole
    by_size = _buffers.setdefault(mesh.group, {})
    if size not in by_size:
        by_size[size] = SymmetricBuffers(mesh.group, *size, mesh.device)
    return by_size[size]
