"""One MoE layer of context-coherent execution: a token moves to the device of its highest-weight expert and stays
there.

ExFlow (Yao et al. 2024), with more than one expert a token. T tokens that stand here before the layer, R copies here, C
rows sent, D hidden size, K experts a token, N token-expert pairs, P slots, G devices.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..._types import IntArray
from ...placement.cost import ExpertCost
from .all_to_all import AsyncAllToAll
from .coordination import naming_unresponsive_ranks
from .dispatcher import AllToAllStage, StagedDispatcher, permute, unpermute
from .experts import PlacedExperts
from .layer_placement import LayerPlacement
from .mesh import ExpertMesh

REREAD = 2.0
"""Arithmetic of the tokens that stayed, over the time to read the experts' weights once, from which on these are
computed apart: two more readings then cost less than what is computed while rows travel."""


@dataclass(frozen=True, eq=False)
class LocalTokens:
    """Tokens on this rank. residual_TD: the residual stream. sequence_T: the sequence of each. count_G: [G] tokens on
    each rank, known to all."""

    residual_TD: Tensor
    sequence_T: Tensor
    count_G: IntArray


class CoherentExperts:
    """Moves tokens through the experts of one layer.

    The device of a token's highest-weight expert becomes its owner. Its residual stream goes from the owner so far to
    every device that has one of its experts, once to each; the new owner keeps it, and the other devices send the new
    owner the weighted sum of their experts' outputs. With one expert a token nothing is sent back: one all-to-all a
    layer.

    Tokens that stay are computed while the others travel, and those that arrive at their new owner while sums travel.
    overlap: whether to; by default where the plan's topology says that experts are worth reading more than once
    (`REREAD`). node_aware: one copy a token and node, handed on inside, and sums by node on the way to the owner.
    """

    def __init__(
        self, experts: PlacedExperts, statistics: DecodeStatistics, node_aware: bool, overlap: bool | None = None
    ) -> None:
        self._experts, self._statistics, self._overlap = experts, statistics, overlap
        self._dispatcher = CoherentDispatcher(experts.mesh, node_aware and experts.mesh.nested, statistics)
        self._in_force: LayerPlacement | None = None

    def move(
        self,
        tokens: LocalTokens,
        weight_TK: Tensor,
        expert_TK: Tensor,
        norm: Callable[[Tensor], Tensor],
        shared: Callable[[Tensor], Tensor] | None,
    ) -> LocalTokens:
        """The tokens that stand here after the layer, its output added to their residual streams.

        Args:
            tokens: that stand here before it.
            weight_TK: [T, K] gate weights.
            expert_TK: [T, K] experts.
            norm: makes an expert's input of the residual stream.
            shared: experts that every token goes through.
        """
        experts, dispatcher = self._experts, self._dispatcher
        if self._in_force is not experts.placement:  # the plan may change between two iterations
            self._in_force = experts.placement
            dispatcher.place(experts.placement, torch.from_numpy(experts.row_of_slot), len(experts.row_expert))
        weight_TK, order_TK = weight_TK.float().sort(dim=1, descending=True, stable=True)
        slot_TK = experts.replica_choice.slots(expert_TK.long().gather(1, order_TK))
        metadata = dispatcher.dispatch(tokens.residual_TD, slot_TK, weight_TK, tokens.sequence_T, norm)
        with self._statistics.timing("experts"):
            if self._worth_it(metadata.stayed):
                metadata.early_RD = self._sums(metadata.stayed, norm)
        row_ND, count_S = dispatcher.receive(metadata)
        with self._statistics.timing("experts"):
            y_ND = self._forward(row_ND, count_S)
        shared_TD: list[Tensor] = []

        def meanwhile() -> None:
            with self._statistics.timing("experts"):
                metadata.late_RD = self._sums(metadata.late, norm)
                if shared is not None:
                    shared_TD.append(shared(norm(metadata.owned.residual_RD)))

        output_TD = dispatcher.combine(y_ND, metadata, meanwhile)
        if shared_TD:
            output_TD = output_TD + shared_TD[0]
        return LocalTokens(metadata.owned.residual_RD + output_TD, metadata.owned.sequence_R, metadata.count_G)

    def _worth_it(self, stayed: Copies) -> bool:
        """Whether tokens that stay are computed apart. Each rank decides for itself: messages are the same either
        way."""
        if self._overlap is not None:
            return self._overlap
        work, rank = ExpertCost.of(self._experts.spec, self._experts.plan.topology), self._experts.mesh.rank
        arithmetic = self._dispatcher.pairs_here(stayed) * work.pair[0, rank]
        reading = len(self._experts.row_expert) * work.read[1, rank]
        return bool(arithmetic >= REREAD * reading)

    def _sums(self, copies: Copies, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """[R, D] in float32: the weighted sum of each token's experts that stand here."""
        if not len(copies):
            return copies.residual_RD.float()
        row_ND, count_S, token_N, weight_N = self._dispatcher.permute(copies, norm)
        return unpermute(self._forward(row_ND, count_S), token_N, weight_N, len(copies))

    def _forward(self, row_ND: Tensor, count_S: Tensor) -> Tensor:
        return self._experts.kind.forward(row_ND, count_S, dict(self._experts.named_parameters(recurse=False)))


@dataclass(frozen=True, eq=False)
class Copies:
    """Tokens with what travels beside them. slot_RK: all their slots, that of the highest gate weight first."""

    residual_RD: Tensor
    weight_RK: Tensor
    slot_RK: Tensor
    sequence_R: Tensor

    def __len__(self) -> int:
        return len(self.sequence_R)

    def take(self, rows: Tensor | slice) -> Copies:
        return Copies(self.residual_RD[rows], self.weight_RK[rows], self.slot_RK[rows], self.sequence_R[rows])

    @staticmethod
    def joined(parts: Sequence[Copies]) -> Copies:
        return Copies(
            torch.cat([part.residual_RD for part in parts]),
            torch.cat([part.weight_RK for part in parts]),
            torch.cat([part.slot_RK for part in parts]),
            torch.cat([part.sequence_R for part in parts]),
        )


@dataclass(eq=False)
class CoherentMetadata:
    """One batch between dispatch and combine.

    tokens: that stood here. norm: makes an expert's input of the residual stream. sizes: rows sent and received of each
    stage. copies_GG: [G, G] copies from rank to rank. count_G: [G] tokens that each rank owns from now on.
    stayed: tokens that stood here and need this device. early_RD: their sums, if they are computed before `receive`.
    late: arrived at their new owner, to be computed until the sums of the others are back; late_RD: their sums.
    now: computed between `receive` and `combine`; token_N, weight_N: see `permute`.
    owned: tokens that this rank has after the layer.
    """

    tokens: Copies
    norm: Callable[[Tensor], Tensor]
    sizes: list[tuple[IntArray, IntArray]]
    copies_GG: IntArray
    count_G: IntArray
    stayed: Copies
    exchange: AsyncAllToAll | None = None
    early_RD: Tensor | None = None
    late: Copies = field(init=False)
    late_RD: Tensor = field(init=False)
    now: Copies = field(init=False)
    token_N: Tensor = field(init=False)
    weight_N: Tensor = field(init=False)
    owned: Copies = field(init=False)

    def __post_init__(self) -> None:
        self.late = self.now = self.owned = self.tokens.take(slice(0))
        self.late_RD = self.late.residual_RD.float()


class CoherentDispatcher(StagedDispatcher):
    """A `Dispatcher` through the same stages whose `combine` gives the sums of the tokens that this rank owns then
    (`CoherentMetadata.owned`). What a rank would send to itself stays where it is."""

    def __init__(self, mesh: ExpertMesh, two_stage: bool, statistics: DecodeStatistics) -> None:
        super().__init__(mesh, two_stage)
        self._statistics = statistics

    def dispatch(
        self,
        x_TD: Tensor,
        slot_TK: Tensor,
        weight_TK: Tensor,
        sequence_T: Tensor,
        norm: Callable[[Tensor], Tensor],
    ) -> CoherentMetadata:
        """Starts sending tokens to all devices that have one of their experts.

        The host waits for the device once: all ranks tell all how many copies go where, which sizes every stage.

        Args:
            x_TD: [T, D] the residual stream.
            slot_TK: [T, K] slots, that of the highest gate weight first.
            weight_TK: [T, K] float32 gate weights.
            sequence_T: [T] the sequence of each token.
            norm: makes an expert's input of the residual stream.
        """
        mesh, size = self.mesh, self.mesh.size
        with self._statistics.timing("dispatch"):
            tokens = Copies(x_TD, weight_TK, slot_TK, sequence_T)
            device_TK = self.device_P[slot_TK]
            need_TG = hit(device_TK, size)
            counts = [need_TG.sum(dim=0), torch.bincount(device_TK[:, 0], minlength=size)]
            if self.two_stage:
                counts.append(hit(self.stages[0].peer_G[device_TK], self.stages[0].peers).sum(dim=0))
            table = self._gather_counts(torch.cat(counts))
            copies_GG = table[:, :size]
            stayed = tokens.take(_rows(need_TG[:, mesh.rank], copies_GG[mesh.rank, mesh.rank]))
            metadata = CoherentMetadata(
                tokens, norm, self._sizes(table), copies_GG, table[:, size : 2 * size].sum(axis=0), stayed
            )
            if self.stages:
                metadata.exchange = self._send(0, tokens, metadata)
        return metadata

    def receive(self, metadata: CoherentMetadata) -> tuple[Tensor, Tensor]:
        """Waits for the tokens that need this device: ([N, D] what is to be computed before `combine`, [S] of each
        expert)."""
        with self._statistics.timing("dispatch"):
            arrived = self._arrived(metadata)
        with self._statistics.timing("experts"):
            if metadata.early_RD is None:
                metadata.now = Copies.joined([metadata.stayed, arrived])
            else:
                own_R = self._owner(arrived) == self.mesh.rank
                metadata.now, metadata.late = arrived.take(~own_R), arrived.take(own_R)
            row_ND, count_S, metadata.token_N, metadata.weight_N = self.permute(metadata.now, metadata.norm)
        return row_ND, count_S

    def combine(self, y_ND: Tensor, metadata: CoherentMetadata, meanwhile: Callable[[], None] = lambda: None) -> Tensor:
        """[owned, D] the sums of the tokens that this rank owns now; the others' go to their owners.

        Args:
            y_ND: [N, D] outputs, in the order of `receive`.
            metadata: of the batch.
            meanwhile: called while sums travel; computes `late`.
        """
        dtype = metadata.tokens.residual_RD.dtype
        computed, sum_RD = metadata.now, unpermute(y_ND, metadata.token_N, metadata.weight_N, len(metadata.now))
        if metadata.early_RD is not None:
            computed = Copies.joined([metadata.stayed, computed])
            sum_RD = torch.cat([metadata.early_RD, sum_RD])
        own_R = self._owner(computed) == self.mesh.rank
        metadata.owned = owned = Copies.joined([computed.take(own_R), metadata.late])
        back = None
        if self.stages and owned.slot_RK.shape[1] > 1:
            with self._statistics.timing("combine"):
                back = self._send_back(computed.take(~own_R), sum_RD[~own_R].to(dtype), owned)
        meanwhile()
        sum_TD = torch.cat([sum_RD[own_R], metadata.late_RD])
        if back is not None:
            with self._statistics.timing("combine"):
                value_RD, sequence_R = back()
                sequence_T = owned.sequence_R
                place_B = sequence_T.new_empty(int(sequence_T.max()) + 1 if len(sequence_T) else 0)
                place_B[sequence_T] = torch.arange(len(sequence_T), device=sequence_T.device)
                sum_TD = sum_TD.index_add(0, place_B[sequence_R], value_RD.float())
        return sum_TD.to(dtype)

    def permute(self, copies: Copies, norm: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pairs that stand here in the order of the experts; see `dispatcher.permute`."""
        return permute(
            norm(copies.residual_RD),
            copies.weight_RK,
            copies.slot_RK,
            self.row_P,
            self.rows,
            self.pairs_here(copies),
        )

    def pairs_here(self, copies: Copies) -> int:
        return int((self.device_P[copies.slot_RK] == self.mesh.rank).sum())

    def _owner(self, copies: Copies) -> Tensor:
        """[R] the device of each token's highest-weight expert."""
        return self.device_P[copies.slot_RK[:, 0]]

    def _gather_counts(self, mine: Tensor) -> IntArray:
        """[G, ...] the numbers of all ranks. An all-to-all of one round, where Gloo gathers in G - 1."""
        every = mine.new_empty(self.mesh.size, len(mine))
        with naming_unresponsive_ranks(self.mesh.group):
            dist.all_to_all_single(every, mine.repeat(self.mesh.size, 1), group=self.mesh.group)
        return np.asarray(every.cpu().numpy())

    def _sizes(self, table: IntArray) -> list[tuple[IntArray, IntArray]]:
        """Rows sent and received in each stage. table: the counts of all ranks, see `dispatch`."""
        rank, size = self.mesh.rank, self.mesh.size
        copies_GG = table[:, :size]
        if not self.two_stage:
            return [(copies_GG[rank], copies_GG[:, rank])] * len(self.stages)
        width = self.mesh.node_size
        node, place = divmod(rank, width)
        copies_NSNS = copies_GG.reshape(-1, width, size // width, width)
        entering_NSN = table[:, 2 * size :].reshape(-1, width, size // width)
        return [
            (entering_NSN[node, place], entering_NSN[:, place, node]),
            (copies_NSNS[:, place, node].sum(axis=0), copies_NSNS[:, :, node, place].sum(axis=0)),
        ]

    def _send(self, index: int, copies: Copies, metadata: CoherentMetadata) -> AsyncAllToAll:
        """Starts sending each token to the other peers of a stage that need it, with all its slots."""
        stage, last = self.stages[index], index == len(self.stages) - 1
        device_RK = self.device_P[copies.slot_RK]
        if last:  # peers that have one of its experts; before, those through which devices are reached that have
            need_RP = hit(device_RK, self.mesh.size)[:, torch.from_numpy(stage.devices).to(device_RK.device)]
        else:
            need_RP = hit(stage.peer_G[device_RK], stage.peers)
        others = np.arange(stage.peers) != stage.own
        sent, received = (np.where(others, rows, 0) for rows in metadata.sizes[index])
        away_RP = need_RP & torch.from_numpy(others).to(need_RP.device)
        row_C = torch.nonzero_static(away_RP.t(), size=int(sent.sum()))[:, 1]
        exchange = AsyncAllToAll(stage.group, sent.tolist(), received.tolist()).start(
            copies.residual_RD.index_select(0, row_C),
            torch.nn.functional.pad(copies.weight_RK[row_C], (0, 1)),
            torch.cat([copies.slot_RK[row_C].int(), copies.sequence_R[row_C].int()[:, None]], dim=1),
        )
        self._statistics.exchanged("dispatch", stage.devices, sent, exchange.row_bytes, exchange.side_bytes)
        return exchange

    def _arrived(self, metadata: CoherentMetadata) -> Copies:
        """The copies from other ranks that need this device; takes the stages after the first."""
        here, rank = metadata.tokens, self.mesh.rank
        parts = [here.take(slice(0))] if not self.stages else []
        for index, stage in enumerate(self.stages):
            exchange = self._send(index, here, metadata) if index else metadata.exchange
            assert exchange is not None
            row_RD, weight_R, slot_R = exchange.wait()
            arrived = Copies(row_RD, weight_R[:, :-1], slot_R[:, :-1].long(), slot_R[:, -1].long())
            if index < len(self.stages) - 1:
                here = Copies.joined([here, arrived])
                from_G = metadata.copies_GG[:, rank]
                need_R = hit(self.device_P[arrived.slot_RK], self.mesh.size)[:, rank]
                arrived = arrived.take(_rows(need_R, from_G[stage.devices].sum() - from_G[rank]))
            parts.append(arrived)
        return parts[0] if len(parts) == 1 else Copies.joined(parts)

    def _send_back(self, foreign: Copies, sum_CD: Tensor, owned: Copies) -> Callable[[], tuple[Tensor, Tensor]]:
        """Starts sending sums to the owners of their tokens; the result waits: (sums, their sequences) for tokens owned
        here.

        With two stages first to the rank of the owner's place in this node, which adds up, then to the owner's node.
        """
        sequence_C, owner_C = foreign.sequence_R, self._owner(foreign)
        for stage in self.stages[:0:-1]:
            mine = torch.bincount(stage.peer_G[owner_C], minlength=stage.peers)
            mine[stage.own] = 0
            theirs = torch.empty_like(mine)
            with naming_unresponsive_ranks(stage.group):
                dist.all_to_all_single(theirs, mine, group=stage.group)
            number_C2 = torch.stack([sequence_C, owner_C], dim=1)
            value_RD, number_R2 = self._return(stage, sum_CD, number_C2, owner_C, mine, theirs)()
            sequence_C, merged_R = number_R2[:, 0].unique(return_inverse=True)  # type: ignore[no-untyped-call]
            owner_C = torch.empty_like(sequence_C)
            owner_C[merged_R] = number_R2[:, 1]
            sum_CD = value_RD.new_zeros(len(sequence_C), value_RD.shape[1], dtype=torch.float32)
            sum_CD = sum_CD.index_add(0, merged_R, value_RD.float()).to(value_RD.dtype)
        stage = self.stages[0]
        mine = torch.bincount(stage.peer_G[owner_C], minlength=stage.peers)
        # An owner knows from its tokens' slots who will send it some.
        awaited_TP = hit(stage.peer_G[self.device_P[owned.slot_RK[:, 1:]]], stage.peers)
        theirs = awaited_TP.sum(dim=0)
        mine[stage.own] = theirs[stage.own] = 0
        wait = self._return(stage, sum_CD, sequence_C[:, None], owner_C, mine, theirs)

        def arrive() -> tuple[Tensor, Tensor]:
            value_RD, number_R1 = wait()
            return value_RD, number_R1[:, 0]

        return arrive

    def _return(
        self, stage: AllToAllStage, sum_CD: Tensor, number_CM: Tensor, owner_C: Tensor, mine: Tensor, theirs: Tensor
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Sums on their way to the peers of their owners; the result waits: (sums, numbers), those that stayed first.

        Args:
            stage: to go through.
            sum_CD: [C, D] sums.
            number_CM: [C, M] numbers beside them.
            owner_C: [C] the device that each is for.
            mine: [peers] sums for each peer, none for this rank.
            theirs: [peers] sums from each peer, none from this rank.
        """
        sent, received = torch.stack([mine, theirs]).cpu().numpy()
        peer_C = stage.peer_G[owner_C]
        order_C = peer_C.masked_fill(peer_C == stage.own, stage.peers).argsort(stable=True)
        away_C, stays_C = order_C.tensor_split([int(sent.sum())])
        number_away = number_CM[away_C].int()
        exchange = AsyncAllToAll(stage.group, sent.tolist(), received.tolist()).start(
            sum_CD[away_C], torch.zeros_like(number_away, dtype=torch.float32), number_away
        )
        self._statistics.exchanged("combine", stage.devices, sent, exchange.row_bytes, exchange.side_bytes)

        def wait() -> tuple[Tensor, Tensor]:
            value_RD, _, number_RM = exchange.wait()
            return torch.cat([sum_CD[stays_C], value_RD]), torch.cat([number_CM[stays_C], number_RM.long()])

        return wait


def hit(device_RK: Tensor, size: int) -> Tensor:
    """[R, G] whether a token has any of these experts there."""
    hit_RG = torch.zeros(len(device_RK), size, dtype=torch.bool, device=device_RK.device)
    return hit_RG.scatter_(1, device_RK, torch.ones_like(device_RK, dtype=torch.bool))


def _rows(chosen_T: Tensor, count: int) -> Tensor:
    """The numbers of `count` rows that are chosen."""
    return torch.nonzero_static(chosen_T, size=int(count))[:, 0]


@dataclass(eq=False)
class DecodeStatistics:
    """What one rank has sent in decoding and where its time went, since `reset`. Parts of what travels:

    - `dispatch`: tokens on their way to experts
    - `combine`: outputs of experts on their way to the token
    - `gather`: keys and values of new tokens, to all ranks
    - `context`: keys and values of prompts, to all ranks
    - `ids`: new tokens

    copies: [G] rows sent to each other device, by part. bytes: [G] their bytes, without what describes them;
    side_bytes: [G] gate weights, slots and numbers of tokens beside them. all_to_alls: exchanges of dispatch and
    combine, by part, of all layers and iterations. seconds: spent or waited, by part, and `attention`, `experts`,
    `head`. iterations: of decoding. tokens: of this rank's sequences in them.
    """

    devices: int
    copies: dict[str, IntArray] = field(default_factory=dict)
    bytes: dict[str, IntArray] = field(default_factory=dict)
    side_bytes: dict[str, IntArray] = field(default_factory=dict)
    all_to_alls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    iterations: int = 0
    tokens: int = 0

    def reset(self) -> None:
        self.__init__(self.devices)  # type: ignore[misc]

    def sent(self, part: str, devices: IntArray, rows: IntArray, row_bytes: int, side_bytes: int = 0) -> None:
        """rows: sent to each of `devices`, none to this rank. row_bytes, side_bytes: of one row."""
        for table, factor in ((self.copies, 1), (self.bytes, row_bytes), (self.side_bytes, side_bytes)):
            if part not in table:
                table[part] = np.zeros(self.devices, dtype=np.int64)
            table[part][devices] += rows * factor

    def exchanged(self, part: str, devices: IntArray, rows: IntArray, row_bytes: int, side_bytes: int = 0) -> None:
        """The same of an exchange of dispatch or combine."""
        self.sent(part, devices, rows, row_bytes, side_bytes)
        self.all_to_alls[part] += 1

    @contextlib.contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Adds the host's time inside the block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began

    def bytes_sent(self, *parts: str, to: IntArray | None = None) -> int:
        """Bytes of these parts (default: all), what describes the rows included; `to` some devices or all."""
        total = 0
        for table in (self.bytes, self.side_bytes):
            for part in parts or table:
                if part in table:
                    total += int((table[part] if to is None else table[part][to]).sum())
        return total
