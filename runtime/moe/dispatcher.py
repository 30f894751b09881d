"""How tokens reach their experts' ranks and results return: the contract, and dispatch by one all-to-all or two.

    metadata = dispatcher.dispatch(x_TD, slot_TK, weight_TK)     # sends
    row_ND, count_S = dispatcher.receive(metadata)               # waits; rows in order of the experts here
    y_ND = experts(row_ND, count_S)
    out_TD = dispatcher.combine(y_ND, metadata)                  # there and back again

T tokens of this rank, K experts a token, D hidden size, C copies sent, R copies received, N token-expert pairs computed
here, S slots of this rank (rows of expert weights), P slots of the layer, G devices.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ...placement.errors import InputError
from .all_to_all import AsyncAllToAll, first_order
from .compression import QuantizedRows, TrafficStatistics
from .coordination import naming_unresponsive_ranks
from .layer_placement import LayerPlacement, in_queues
from .mesh import ExpertMesh, Stage


class Dispatcher(Protocol):
    """Carries tokens of all ranks to the rows of expert weights that serve them, and weighted sums back. Every rank
    calls the same methods in the same order; gradients flow through both ways."""

    def place(self, placement: LayerPlacement, row_of_slot_P: Tensor, rows: int) -> None:
        """A plan comes into force.

        Args:
            placement: which slot is on which device.
            row_of_slot_P: [P] this rank's row of expert weights, -1 for slots of other ranks.
            rows: S.
        """

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> Any:
        """Starts sending tokens to the slots that serve them; other work may be done until `receive`.

        Args:
            x_TD: [T, D] this rank's tokens.
            slot_TK: [T, K] slots that serve them.
            weight_TK: [T, K] float32 gate weights.

        Returns:
            What `receive` and `combine` have to know of this batch: the dispatcher's own.
        """

    def receive(self, metadata: Any) -> tuple[Tensor, Tensor]:
        """Waits: ([N, D] what the experts here are to compute, one expert's rows behind another's, [S] rows of
        each)."""

    def combine(self, y_ND: Tensor, metadata: Any) -> Tensor:
        """[T, D] the sum of each token's expert outputs, weighted; y_ND: in the order of `receive`."""


def permute(
    x_RD: Tensor, weight_RK: Tensor, slot_RK: Tensor, row_P: Tensor, rows: int, pairs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token-expert pairs in the order of the rows of expert weights here.

    Args:
        x_RD: [R, D] tokens here.
        weight_RK: [R, K] gate weights.
        slot_RK: [R, K] slots, -1 for none.
        row_P: [P + 1] row of expert weights of each slot, `rows` where it stands elsewhere; slot -1 reads the last
            entry.
        rows: S.
        pairs: N, how many pairs stand here.

    Returns:
        ([N, D] inputs, [S] how many of each expert, [N] the row of x_RD that each is of, [N] its gate weight).
    """
    key_N = row_P[slot_RK.long()].flatten()
    order_N = key_N.argsort(stable=True)[:pairs]
    count_S = torch.zeros(rows + 1, dtype=torch.int64, device=key_N.device)
    count_S.scatter_add_(0, key_N, torch.ones_like(key_N))
    token_N = order_N.div(max(slot_RK.shape[1], 1), rounding_mode="floor")
    return x_RD.index_select(0, token_N), count_S[:-1], token_N, weight_RK.flatten()[order_N]


def unpermute(y_ND: Tensor, token_N: Tensor, weight_N: Tensor, rows: int) -> Tensor:
    """[rows, D] in float32: the weighted sum of each token's outputs, from `permute`'s order."""
    total: Tensor = WeightedSum.apply(y_ND, weight_N, token_N, rows)  # type: ignore[no-untyped-call]
    return total


@lru_cache(maxsize=1)
def _gather_kernels() -> Any:
    """The module of Triton's kernels; None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import gather_kernels

    return gather_kernels


def gathered_sum(y_ND: Tensor, place_N: Tensor, rows: int, weight_N: Tensor | None = None) -> Tensor:
    """[rows, D] in the type of y_ND: the sum of its rows at each of the places place_N, each times its weight where
    there are weights, added up in float32. One kernel on a GPU where Triton is installed, torch's operations
    elsewhere."""
    total: Tensor
    if (y_ND.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and (kernels := _gather_kernels()) is not None:
        total = kernels.GatherSum.apply(y_ND, weight_N, place_N, rows)
    elif weight_N is None:
        total = RowSum.apply(y_ND, place_N, rows)  # type: ignore[no-untyped-call]
    else:
        total = unpermute(y_ND, place_N, weight_N, rows).to(y_ND.dtype)
    return total


class WeightedSum(Function):
    """[rows, D] in float32: sums of rows y_ND, each times its weight, at the places token_N.

    Backward keeps the rows as they are, where torch's own operations keep two float32 copies of them; the same bits.
    """

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weight_N: Tensor, token_N: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(y_ND, weight_N, token_N)
        weighted_ND = y_ND.float() * weight_N[:, None]
        return weighted_ND.new_zeros(rows, y_ND.shape[1]).index_add_(0, token_N, weighted_ND)

    @staticmethod
    @first_order
    def backward(ctx: Any, total_RD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_ND, weight_N, token_N = ctx.saved_tensors
        grad_ND = total_RD.index_select(0, token_N)
        weights_N = (grad_ND * y_ND.float()).sum(dim=1)
        return grad_ND.mul_(weight_N[:, None]).to(y_ND.dtype), weights_N, None, None


class RowSum(Function):
    """[rows, D] sums of rows y_CD at the places row_C, added up in float32; backward keeps only the places."""

    @staticmethod
    def forward(ctx: Any, y_CD: Tensor, row_C: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(row_C)
        y_TD = y_CD.new_zeros(rows, y_CD.shape[1], dtype=torch.float32)
        return y_TD.index_add_(0, row_C, y_CD.float()).to(y_CD.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, y_TD: Tensor) -> tuple[Tensor, None, None]:
        (row_C,) = ctx.saved_tensors
        return y_TD.index_select(0, row_C), None, None


NONE, ALL, SOME = range(3)


@dataclass(eq=False)
class SentCopies:
    """Copies sent in one stage. row_C: [C] the row here that each is of. rows: here before the stage. pairs:
    token-expert pairs that arrive. gradients: whether the ranks need those of the batch: NONE, ALL, or SOME of those
    that this one knows of. back: the exchange by which results returned."""

    exchange: AsyncAllToAll
    row_C: Tensor
    rows: int
    pairs: int
    gradients: int
    back: AsyncAllToAll | None = None


@dataclass(eq=False)
class DispatchMetadata:
    """One batch between dispatch and combine.

    batch: (rows, gate weights, slots) while nothing has been sent. copies: of each stage begun. rows: R, after the
    last. token_N, weight_N: see `permute`. result: of one device alone.
    """

    batch: tuple[Tensor, Tensor, Tensor] | None = None
    copies: list[SentCopies] = field(default_factory=list)
    rows: int = 0
    token_N: Tensor = field(default_factory=lambda: torch.empty(0))
    weight_N: Tensor = field(default_factory=lambda: torch.empty(0))
    result: Tensor | None = None


def one_copy_a_peer(peer_TK: Tensor, peers: int) -> tuple[Tensor, Tensor]:
    """([T * K] the peer that a token's copy goes to, `peers` where another of its places stands for that already or
    there is none; [T * K] places in order of these, the earlier first)."""
    sorted_TK = peer_TK.sort(dim=1).values
    first_TK = torch.ones_like(sorted_TK, dtype=torch.bool)
    first_TK[:, 1:] = sorted_TK[:, 1:] != sorted_TK[:, :-1]
    key_N = torch.where(first_TK, sorted_TK, peers).flatten()
    return key_N, key_N.argsort(stable=True)


class AllToAllStage:
    """Copies of rows to the ranks of a group, and sums of what was made of them back.

    stage: between whom. device: on which this rank computes. own: this rank's place in the group. rows: how rows are
    written; None: as they are.
    """

    def __init__(self, stage: Stage, device: torch.device) -> None:
        self.group, self.devices = stage.group, stage.devices
        self.peers, self.own = len(stage.devices), dist.get_rank(stage.group)
        self.rows: QuantizedRows | None = None
        self.peer_G = self._peer_P = torch.from_numpy(stage.peer_G).to(device)

    def place(self, device_P: Tensor) -> None:
        """device_P: [P] the device of each slot."""
        # Slot -1, a place in the table of K that belongs to another rank, reads the last entry: no peer.
        self._peer_P = torch.cat([self.peer_G[device_P], self.peer_G.new_tensor([self.peers])])

    def send(self, x_TD: Tensor, weight_TK: Tensor, slot_TK: Tensor, gradients: int = NONE) -> SentCopies:
        """Starts sending every row once to each peer that has one of its slots, with its weights and slots there (-1:
        not there). gradients: SOME if an earlier stage found that. The host waits for the device once, for the numbers
        of rows."""
        top_k = slot_TK.shape[1]
        peer_TK = self._peer_P[slot_TK.long()]
        key_N, order_N = one_copy_a_peer(peer_TK, self.peers)
        if gradients != SOME and torch.is_grad_enabled() and (x_TD.requires_grad or weight_TK.requires_grad):
            gradients = ALL
        sent, received, pairs, gradients = self._sizes(key_N, peer_TK, gradients)
        chosen_C = order_N[: sum(sent)]
        row_C = chosen_C.div(max(top_k, 1), rounding_mode="floor")
        here_CK = peer_TK[row_C] == key_N[chosen_C][:, None]
        formats = (None, None) if self.rows is None else (self.rows.dispatch, self.rows.gradients)
        exchange = AsyncAllToAll(self.group, sent, received, *formats).start(
            x_TD.index_select(0, row_C),
            torch.where(here_CK, weight_TK[row_C], 0.0),
            torch.where(here_CK, slot_TK[row_C], -1).int(),
        )
        return SentCopies(exchange, row_C, len(x_TD), pairs, gradients)

    def start_combine(self, y_RD: Tensor, copies: SentCopies) -> None:
        """Starts returning what was made of each copy, y_RD: [R, D]."""
        formats = (None, None) if self.rows is None else (self.rows.combine, self.rows.gradients)
        copies.back = AsyncAllToAll(self.group, copies.exchange.received, copies.exchange.sent, *formats).start(y_RD)

    def finish_combine(self, copies: SentCopies) -> Tensor:
        """[T, D] sum over each row's copies of what was made of them."""
        assert copies.back is not None
        y_CD, _, _ = copies.back.wait()
        return gathered_sum(y_CD, copies.row_C, copies.rows)

    def combine(self, y_RD: Tensor, copies: SentCopies) -> Tensor:
        """Both at once."""
        self.start_combine(y_RD, copies)
        return self.finish_combine(copies)

    def _sizes(self, key_N: Tensor, peer_TK: Tensor, gradients: int) -> tuple[list[int], list[int], int, int]:
        """(rows to each peer, rows from each peer, token-expert pairs from all peers, who needs gradients)."""
        mine = torch.zeros(self.peers + 1, 3, dtype=torch.int64, device=key_N.device)
        mine[:, 2].fill_(gradients)
        mine[:, 0].scatter_add_(0, key_N, torch.ones_like(key_N))
        mine[:, 1].scatter_add_(0, peer_TK.flatten(), torch.ones_like(key_N))
        mine = mine[:-1].contiguous()
        theirs = torch.empty_like(mine)
        with naming_unresponsive_ranks(self.group):
            dist.all_to_all_single(theirs, mine, group=self.group)
        table = torch.stack([mine, theirs]).tolist()
        sent, received = ([row[0] for row in side] for side in table)
        same = {row[2] for row in table[1]} == {gradients}
        return sent, received, sum(row[1] for row in table[1]), gradients if same else SOME


class StagedDispatcher:
    """What dispatchers through one stage or two have in common: the stages, and the plan in force.

    two_stage: first between ranks of equal place on the nodes, then inside the node. device_P: [P] the device of each
    slot. row_P, rows: see `permute`.

    Raises:
        InputError: two stages on a mesh of one dimension.
    """

    def __init__(self, mesh: ExpertMesh, two_stage: bool) -> None:
        self.mesh, self.two_stage = mesh, two_stage
        self.stages = [AllToAllStage(stage, mesh.device) for stage in mesh.stages(two_stage)]
        self.device_P = self.row_P = torch.empty(0, dtype=torch.int64)
        self.rows = 0

    def place(self, placement: LayerPlacement, row_of_slot_P: Tensor, rows: int) -> None:
        """See `Dispatcher.place`."""
        self.device_P = torch.from_numpy(placement.device.copy()).to(self.mesh.device)
        for stage in self.stages:
            stage.place(self.device_P)
        row_P = torch.where(row_of_slot_P < 0, rows, row_of_slot_P)
        self.row_P = torch.cat([row_P, row_P.new_tensor([rows])]).to(self.mesh.device)
        self.rows = rows


class AllToAllDispatcher(StagedDispatcher):
    """One copy a token and rank, summed at the rank before it returns.

    two_stage: first one copy a token and node, to the rank of equal place there, which hands it on inside the node.
    Sums are taken on the way back as well, so that one row a token and node returns (as DeepEP does).
    copies: of the latest dispatch, copies sent to each rank, stage by stage; a rank's own are among them. Of a batch in
    chunks it is the last one's.
    quantized: how rows are written between ranks; None: as they are.
    A slot of -1 is no slot: its row goes nowhere for it.
    """

    copies: tuple[tuple[int, ...], ...] = ()
    quantized: QuantizedRows | None = None
    statistics: TrafficStatistics | None = None
    """Of the latest forward pass, where rows are quantised: rows to other ranks over all stages."""

    def quantize(self, rows: QuantizedRows | None) -> None:
        """Writes rows like this from the next batch on. Every rank must."""
        self.quantized = rows
        for stage in self.stages:
            stage.rows = rows

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> DispatchMetadata:
        """See `Dispatcher.dispatch`."""
        if not self.stages:
            return DispatchMetadata(batch=(x_TD, weight_TK, slot_TK))
        return DispatchMetadata(copies=[self.stages[0].send(x_TD, weight_TK, slot_TK)])

    def receive(self, metadata: DispatchMetadata) -> tuple[Tensor, Tensor]:
        """See `Dispatcher.receive`: waits for the first stage, and goes through the others.

        Raises:
            InputError: gradients are needed on some ranks alone; all raise.
        """
        if metadata.batch is not None:
            (x_RD, weight_RK, slot_RK), metadata.batch = metadata.batch, None
            pairs = int((slot_RK >= 0).sum())
        else:
            x_RD, weight_RK, slot_RK = metadata.copies[0].exchange.wait()
            for stage in self.stages[1:]:
                metadata.copies.append(stage.send(x_RD, weight_RK, slot_RK, metadata.copies[-1].gradients))
                x_RD, weight_RK, slot_RK = metadata.copies[-1].exchange.wait()
            pairs = metadata.copies[-1].pairs
            if metadata.copies[-1].gradients == SOME:
                raise InputError(
                    "some ranks need gradients of this batch and others do not: backward would wait for ranks that "
                    "never come to it. Give tokens or gate weights that require gradients on all ranks, or on none, "
                    "and torch.no_grad() to all or none"
                )
        self.copies = tuple(tuple(copies.exchange.sent) for copies in metadata.copies)
        metadata.rows = len(x_RD)
        row_ND, count_S, metadata.token_N, metadata.weight_N = permute(
            x_RD, weight_RK, slot_RK, self.row_P, self.rows, pairs
        )
        return row_ND, count_S

    def combine(self, y_ND: Tensor, metadata: DispatchMetadata) -> Tensor:
        """See `Dispatcher.combine`."""
        self.start_combine(y_ND, metadata)
        return self.finish_combine([metadata])

    def start_combine(self, y_ND: Tensor, metadata: DispatchMetadata) -> None:
        """The first half of `combine`: sums inside the node, and starts sending results to where their tokens live, so
        that another batch may be computed meanwhile."""
        result = gathered_sum(y_ND, metadata.token_N, metadata.rows, metadata.weight_N)
        for stage, copies in zip(reversed(self.stages[1:]), reversed(metadata.copies[1:]), strict=True):
            result = stage.combine(result, copies)
        if self.stages:
            self.stages[0].start_combine(result, metadata.copies[0])
        else:
            metadata.result = result

    def finish_combine(self, batches: Sequence[DispatchMetadata]) -> Tensor:
        """The second half, of one batch or of the chunks that make up one: [T, D], one behind another."""
        results = [
            self.stages[0].finish_combine(metadata.copies[0]) if self.stages else cast(Tensor, metadata.result)
            for metadata in batches
        ]
        if self.quantized is not None:
            self.statistics = self._traffic(batches)
        return results[0] if len(results) == 1 else torch.cat(results)

    def _traffic(self, batches: Sequence[DispatchMetadata]) -> TrafficStatistics:
        rows = plain = sent = 0
        for stage, copies in ((s, c) for batch in batches for s, c in zip(self.stages, batch.copies, strict=True)):
            there, back = copies.exchange, copies.back
            assert back is not None
            away = sum(there.sent) - there.sent[stage.own]
            rows += away
            plain += away * (there.whole_row_bytes + there.side_bytes + back.whole_row_bytes)
            sent += away * (there.row_bytes + there.side_bytes + back.row_bytes)
        return TrafficStatistics(rows, rows, plain, sent)


def flat(mesh: ExpertMesh) -> AllToAllDispatcher:
    """One all-to-all over all ranks each way: one copy a token and rank."""
    return AllToAllDispatcher(mesh, two_stage=False)


def node_aware(mesh: ExpertMesh) -> AllToAllDispatcher:
    """Two all-to-alls each way: one copy a token and node between nodes, then one a token and rank inside."""
    return AllToAllDispatcher(mesh, two_stage=True)


# Dispatch whose messages have the same size in every batch: each slot gets so many rows from each rank, empty ones
# among them. Ranks then need not tell each other how many rows come, and the host never waits for the device. The
# price is rows of zeros that travel and are computed on, a row for each of a token's experts (the plain way sends one
# a rank), and tokens beyond an expert's capacity that are dropped. E experts, c rows that a slot gets from each rank,
# N = T * K pairs of tokens and experts, B = P * c rows sent.


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
