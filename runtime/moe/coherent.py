"""One MoE layer of context-coherent execution: a token moves to the device of its highest-weight expert and stays there.

T tokens that stand here before the layer, R copies here, D hidden size, K experts a token, P slots, G devices.
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
from ...placement.cost import Roofline
from .all_to_all import Flight
from .coordination import naming_lost_ranks
from .dispatcher import Pairs
from .experts import PlacedExperts
from .layer_placement import LayerPlacement
from .mesh import ExpertMesh

# What decoding sent and where its time went, on one rank. G devices.


@dataclass(eq=False)
class DecodeStatistics:
    """Of one rank, since `reset`. Parts of what travels:

    - `dispatch`: tokens on their way to experts
    - `combine`: outputs of experts on their way to the token
    - `gather`: keys and values of new tokens, to all ranks
    - `context`: keys and values of prompts, to all ranks
    - `ids`: new tokens

    copies: [G] rows sent to each other device, by part. bytes: [G] their bytes, without what describes them;
    side_bytes: [G] gate weights, slots and numbers of tokens beside them. all_to_alls: exchanges of dispatch and combine,
    by part, of all layers and iterations. seconds: spent or waited, by part, and `attention`, `experts`, `head`.
    iterations: of decoding. tokens: of this rank's sequences in them.
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

    def sent(self, part: str, rows_G: IntArray, row_bytes: int, side_bytes: int = 0) -> None:
        """rows_G: [G] rows to each device, none to itself. row_bytes, side_bytes: of one row."""
        for table, factor in ((self.copies, 1), (self.bytes, row_bytes), (self.side_bytes, side_bytes)):
            if part not in table:
                table[part] = np.zeros(self.devices, dtype=np.int64)
            table[part] += rows_G * factor

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


# The ways of one layer of context-coherent execution: tokens to their experts' devices, sums to the tokens' new
# owners. T tokens that stand here before the layer, R copies here, C rows sent, D hidden size, K experts a token, P
# slots, G devices, N nodes of S devices. What a rank would send to itself stays where it is.


@dataclass(frozen=True, eq=False)
class Copies:
    """Tokens with what travels beside them."""

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


@dataclass(frozen=True, eq=False)
class Underway:
    """stayed: tokens that stood here and need this device. count_G: [G] tokens that each rank owns from now on.
    arrive: waits for the other tokens that need this device."""

    stayed: Copies
    count_G: IntArray
    arrive: Callable[[], Copies]


class CoherentRoutes:
    """node_aware: one copy a token and node, handed on inside, and sums by node on the way to the owner."""

    def __init__(self, mesh: ExpertMesh, statistics: DecodeStatistics, node_aware: bool) -> None:
        self._mesh, self._statistics = mesh, statistics
        self._node_aware = node_aware and mesh.nested

    def out(self, tokens: Copies, device_P: Tensor) -> Underway:
        """Starts sending tokens to all devices that have one of their experts. device_P: [P] of each slot.

        The host waits for the device once: all ranks tell all how many copies go where, which sizes both hops.
        """
        mesh, size = self._mesh, self._mesh.size
        device_TK = device_P[tokens.slot_RK]
        need_TG = hit(device_TK, size)
        told = [need_TG.sum(dim=0), torch.bincount(device_TK[:, 0], minlength=size)]
        if self._node_aware:
            return self._out_by_node(tokens, device_P, need_TG, told)
        table = self._tell(torch.cat(told))
        copies_GG = table[:, :size]
        arrive = self._hop(
            tokens, need_TG, mesh.group, copies_GG[mesh.rank], copies_GG[:, mesh.rank], np.arange(size), mesh.rank
        )
        stayed = tokens.take(_rows(need_TG[:, mesh.rank], copies_GG[mesh.rank, mesh.rank]))
        return Underway(stayed, table[:, size:].sum(axis=0), arrive)

    def _out_by_node(self, tokens: Copies, device_P: Tensor, need_TG: Tensor, told: list[Tensor]) -> Underway:
        """First to the rank of equal place in each other node, then inside the node."""
        mesh, size = self._mesh, self._mesh.size
        intra = mesh.intra
        assert mesh.inter is not None
        assert intra is not None
        width = mesh.node_size
        here, place = divmod(mesh.rank, width)
        inside = slice(here * width, (here + 1) * width)
        need_TN = need_TG.view(len(need_TG), size // width, width).any(dim=2)
        table = self._tell(torch.cat([*told, need_TN.sum(dim=0)]))
        devices_NS = np.arange(size).reshape(-1, width)
        nodes = len(devices_NS)
        copies_NSNS = table[:, :size].reshape(nodes, width, nodes, width)
        entering_NSN = table[:, 2 * size :].reshape(nodes, width, nodes)
        sent, received = entering_NSN[here, place], entering_NSN[:, place, here]
        land = self._hop(tokens, need_TN, mesh.inter, sent, received, devices_NS[:, place], here)
        stayed = tokens.take(_rows(need_TG[:, mesh.rank], copies_NSNS[here, place, here, place]))

        def arrive() -> Copies:
            landed = land()
            need_RS = hit(device_P[landed.slot_RK], size)[:, inside]
            both, need_BS = Copies.joined([tokens, landed]), torch.cat([need_TG[:, inside], need_RS])
            by_node = copies_NSNS[:, place, here]
            sent, received = by_node.sum(axis=0), copies_NSNS[:, :, here, place].sum(axis=0)
            handed_on = self._hop(both, need_BS, intra, sent, received, devices_NS[here], place)
            kept = landed.take(_rows(need_RS[:, place], sent[place] - by_node[here, place]))
            return Copies.joined([kept, handed_on()])

        return Underway(stayed, table[:, size : 2 * size].sum(axis=0), arrive)

    def _tell(self, mine: Tensor) -> IntArray:
        """[G, ...] the numbers of all ranks. An all-to-all of one round, where Gloo gathers in G - 1."""
        every = mine.new_empty(self._mesh.size, len(mine))
        with naming_lost_ranks(self._mesh.group):
            dist.all_to_all_single(every, mine.repeat(self._mesh.size, 1), group=self._mesh.group)
        return np.asarray(every.cpu().numpy())

    def _hop(
        self,
        tokens: Copies,
        need_TP: Tensor,
        group: dist.ProcessGroup,
        sent: IntArray,
        received: IntArray,
        devices: IntArray,
        own: int,
    ) -> Callable[[], Copies]:
        """Starts sending each token to the peers that need it, but for rank `own` of the group. devices: of its ranks."""
        others = np.arange(len(devices)) != own
        sent, received = np.where(others, sent, 0), np.where(others, received, 0)
        away_TP = need_TP & torch.from_numpy(others).to(need_TP.device)
        row_C = torch.nonzero_static(away_TP.t(), size=int(sent.sum()))[:, 1]
        slot_C = torch.cat([tokens.slot_RK[row_C].int(), tokens.sequence_R[row_C].int()[:, None]], dim=1)
        weight_C = torch.nn.functional.pad(tokens.weight_RK[row_C], (0, 1))
        row_CD = tokens.residual_RD.index_select(0, row_C)
        self._record("dispatch", devices, sent, row_CD, 8 * slot_C.shape[1])
        transit = Flight(group, sent.tolist(), received.tolist()).travel(row_CD, weight_C, slot_C)

        def arrive() -> Copies:
            row_RD, weight_R, slot_R = transit.arrive()
            return Copies(row_RD, weight_R[:, :-1], slot_R[:, :-1].long(), slot_R[:, -1].long())

        return arrive

    def back(
        self, sum_CD: Tensor, sequence_C: Tensor, owner_C: Tensor, awaited_TG: Tensor
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Starts sending sums to the owners of their tokens; the result waits: (rows, their sequences) for tokens owned here.

        owner_C: other ranks. awaited_TG: for tokens owned here, the other ranks that have one of their experts.
        """
        mesh, size = self._mesh, self._mesh.size
        if self._node_aware:
            return self._back_by_node(sum_CD, sequence_C, owner_C, awaited_TG)
        sent_G = torch.bincount(owner_C, minlength=size)
        sent, received = torch.stack([sent_G, awaited_TG.sum(dim=0)]).cpu().numpy()
        order_C = owner_C.argsort(stable=True)
        wait = self._return(sum_CD[order_C], sequence_C[order_C, None], mesh.group, sent, received, np.arange(size))

        def arrive() -> tuple[Tensor, Tensor]:
            value_RD, number_R1 = wait()
            return value_RD, number_R1[:, 0]

        return arrive

    def _back_by_node(
        self, sum_CD: Tensor, sequence_C: Tensor, owner_C: Tensor, awaited_TG: Tensor
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """First to the rank of the owner's place in this node, which adds up, then to the owner's node."""
        mesh = self._mesh
        assert mesh.inter is not None
        assert mesh.intra is not None
        width = mesh.node_size
        here, place = divmod(mesh.rank, width)
        devices_NS = np.arange(mesh.size).reshape(-1, width)
        number_C2 = torch.stack([sequence_C, owner_C], dim=1)
        place_C = owner_C % width
        mine = torch.bincount(place_C, minlength=width)
        mine[place] = 0
        theirs = torch.empty_like(mine)
        with naming_lost_ranks(mesh.intra):
            dist.all_to_all_single(theirs, mine, group=mesh.intra)
        sent, received = torch.stack([mine, theirs]).cpu().numpy()
        order_C = place_C.masked_fill(place_C == place, width).argsort(stable=True)
        away_C, kept_C = order_C.tensor_split([int(sent.sum())])
        wait = self._return(sum_CD[away_C], number_C2[away_C], mesh.intra, sent, received, devices_NS[here])
        value_RD, number_R2 = wait()
        value_RD, number_R2 = torch.cat([sum_CD[kept_C], value_RD]), torch.cat([number_C2[kept_C], number_R2])
        sequence_M, merged_R = number_R2[:, 0].unique(return_inverse=True)  # type: ignore[no-untyped-call]
        owner_M = torch.empty_like(sequence_M)
        owner_M[merged_R] = number_R2[:, 1]
        sum_MD = value_RD.new_zeros(len(sequence_M), value_RD.shape[1], dtype=torch.float32)
        sum_MD = sum_MD.index_add(0, merged_R, value_RD.float()).to(value_RD.dtype)
        # Of this node's owners only the rank itself can be among them now.
        node_M = (owner_M // width).masked_fill(owner_M == mesh.rank, len(devices_NS))
        awaited_TN = awaited_TG.view(len(awaited_TG), len(devices_NS), width).any(dim=2)
        awaited_TN[:, here] = False
        sent_N = torch.bincount(node_M, minlength=len(devices_NS))[: len(devices_NS)]
        sent, received = torch.stack([sent_N, awaited_TN.sum(dim=0)]).cpu().numpy()
        away_M, kept_M = node_M.argsort(stable=True).tensor_split([int(sent.sum())])
        wait = self._return(sum_MD[away_M], sequence_M[away_M, None], mesh.inter, sent, received, devices_NS[:, place])

        def arrive() -> tuple[Tensor, Tensor]:
            value_RD, number_R1 = wait()
            return torch.cat([sum_MD[kept_M], value_RD]), torch.cat([sequence_M[kept_M], number_R1[:, 0]])

        return arrive

    def _return(
        self,
        row_CD: Tensor,
        number_CK: Tensor,
        group: dist.ProcessGroup,
        sent: IntArray,
        received: IntArray,
        devices: IntArray,
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Rows in order of destination on their way, with numbers; the result waits for (rows, numbers) that arrive."""
        self._record("combine", devices, sent, row_CD, 8 * number_CK.shape[1])
        flight = Flight(group, sent.tolist(), received.tolist())
        transit = flight.travel(row_CD, torch.zeros_like(number_CK, dtype=torch.float32), number_CK.int())

        def wait() -> tuple[Tensor, Tensor]:
            value_RD, _, number_RK = transit.arrive()
            return value_RD, number_RK.long()

        return wait

    def _record(self, part: str, devices: IntArray, sent: IntArray, row_CD: Tensor, side_bytes: int) -> None:
        rows_G = np.zeros(self._mesh.size, dtype=np.int64)
        rows_G[devices] = sent
        self._statistics.sent(part, rows_G, row_CD.shape[1] * row_CD.element_size(), side_bytes)
        self._statistics.all_to_alls[part] += 1


def hit(device_RK: Tensor, size: int) -> Tensor:
    """[R, G] whether a token has any of these experts there."""
    hit_RG = torch.zeros(len(device_RK), size, dtype=torch.bool, device=device_RK.device)
    return hit_RG.scatter_(1, device_RK, torch.ones_like(device_RK, dtype=torch.bool))


def _rows(chosen_T: Tensor, count: int) -> Tensor:
    """The numbers of `count` rows that are chosen."""
    return torch.nonzero_static(chosen_T, size=int(count))[:, 0]


REREAD = 2.0
"""Arithmetic of the tokens that stayed, over the time to read the experts' weights once, from which on these are computed
apart: two more readings then cost less than what is computed while rows travel."""


@dataclass(frozen=True, eq=False)
class Standing:
    """Tokens on this rank. residual_TD: the residual stream. sequence_T: the sequence of each. count_G: [G] tokens that
    stand on each rank, known to all."""

    residual_TD: Tensor
    sequence_T: Tensor
    count_G: IntArray


class CoherentExperts:
    """Moves tokens through the experts of one layer (ExFlow; Yao et al. 2024, with more than one expert a token).

    The device of a token's highest-weight expert becomes its owner. Its residual stream goes from the owner so far to
    every device that has one of its experts, once to each; the new owner keeps it, and the other devices send the new owner
    the weighted sum of their experts' outputs. With one expert a token nothing is sent back: one all-to-all a layer.

    Tokens that stay are computed while the others travel, and those that arrive at their new owner while sums travel.
    overlap: whether to; by default where the plan's topology says that experts are worth reading more than once (`REREAD`).
    node_aware: one copy a token and node, handed on inside, and sums by node on the way to the owner.
    """

    def __init__(
        self, experts: PlacedExperts, statistics: DecodeStatistics, node_aware: bool, overlap: bool | None = None
    ) -> None:
        self._experts, self._mesh, self._statistics = experts, experts.mesh, statistics
        self._routes = CoherentRoutes(self._mesh, statistics, node_aware)
        self._overlap = overlap
        self._in_force: LayerPlacement | None = None

    def move(
        self,
        standing: Standing,
        weight_TK: Tensor,
        expert_TK: Tensor,
        norm: Callable[[Tensor], Tensor],
        shared: Callable[[Tensor], Tensor] | None,
    ) -> Standing:
        """The tokens that stand here after the layer, its output added to their residual streams.

        norm: makes an expert's input of the residual stream. shared: experts that every token goes through.
        """
        self._follow_plan()
        statistics, dtype = self._statistics, standing.residual_TD.dtype
        weight_TK, order_TK = weight_TK.float().sort(dim=1, descending=True, stable=True)
        slot_TK = self._experts.replica_choice.slots(expert_TK.long().gather(1, order_TK))
        with statistics.timing("dispatch"):
            tokens = Copies(standing.residual_TD, weight_TK, slot_TK, standing.sequence_T)
            underway = self._routes.out(tokens, self._device_P)
        with statistics.timing("experts"):
            stayed = underway.stayed
            apart = self._worth_it(stayed)
            # In this order: while tokens travel, before sums leave, while sums travel.
            first = stayed if apart else stayed.take(slice(0))
            first_RD = self._sums(first, norm)
        with statistics.timing("dispatch"):
            arrived = underway.arrive()
        with statistics.timing("experts"):
            second, third = arrived, arrived.take(slice(0))
            if apart:
                own_R = self._owner(arrived) == self._mesh.rank
                second, third = arrived.take(~own_R), arrived.take(own_R)
            else:
                second = Copies.joined([stayed, arrived])
            second_RD = self._sums(second, norm)
            before = Copies.joined([first, second])
            own_R = self._owner(before) == self._mesh.rank
            owned = Copies.joined([before.take(own_R), third])
            before_RD = torch.cat([first_RD, second_RD])
        back = None
        if slot_TK.shape[1] > 1:
            with statistics.timing("combine"):
                back = self._send_back(before.take(~own_R), before_RD[~own_R].to(dtype), owned)
        with statistics.timing("experts"):
            sum_TD = torch.cat([before_RD[own_R], self._sums(third, norm)])
            shared_TD = None if shared is None else shared(norm(owned.residual_RD))
        sequence_T = owned.sequence_R
        if back is not None:
            with statistics.timing("combine"):
                value_RD, number_R = back()
                place_B = torch.empty(int(sequence_T.max()) + 1 if len(sequence_T) else 0, dtype=torch.int64)
                place_B = place_B.to(sequence_T.device)
                place_B[sequence_T] = torch.arange(len(sequence_T), device=sequence_T.device)
                sum_TD = sum_TD.index_add(0, place_B[number_R], value_RD.float())
        output_TD = sum_TD.to(dtype)
        if shared_TD is not None:
            output_TD = output_TD + shared_TD
        return Standing(owned.residual_RD + output_TD, sequence_T, underway.count_G)

    def _follow_plan(self) -> None:
        """Tables of the plan in force, which may change between two iterations."""
        experts = self._experts
        if self._in_force is experts.placement:
            return
        self._in_force = experts.placement
        device = self._mesh.device
        self._device_P = torch.from_numpy(experts.placement.device.copy()).to(device)
        row_P = np.where(experts.row_of_slot >= 0, experts.row_of_slot, len(experts.row_expert))
        self._row_P = torch.from_numpy(np.append(row_P, len(experts.row_expert))).to(device)

    def _owner(self, copies: Copies) -> Tensor:
        """[R] the device of each token's highest-weight expert."""
        return self._device_P[copies.slot_RK[:, 0]]

    def _worth_it(self, stayed: Copies) -> bool:
        """Whether tokens that stay are computed apart. Each rank decides for itself: messages are the same either way."""
        if self._overlap is not None:
            return self._overlap
        spec, topology = self._experts.spec, self._experts.plan.topology
        work, rank = Roofline.of(spec, topology), self._mesh.rank
        arithmetic = self._pairs_here(stayed) * work.per_pair[rank]
        reading = len(self._experts.row_expert) * work.per_read[rank]
        return bool(arithmetic >= REREAD * reading)

    def _pairs_here(self, copies: Copies) -> int:
        return int((self._device_P[copies.slot_RK] == self._mesh.rank).sum())

    def _sums(self, copies: Copies, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """[R, D] in float32: the weighted sum of each token's experts that stand here."""
        if not len(copies):
            return copies.residual_RD.float()
        rows = len(self._experts.row_expert)
        pairs = Pairs.of(
            norm(copies.residual_RD), copies.weight_RK, copies.slot_RK, self._row_P, rows, self._pairs_here(copies)
        )
        weights = dict(self._experts.named_parameters(recurse=False))
        return pairs.weighted_sum(self._experts.kind.forward(pairs.row_ND, pairs.count_S, weights))

    def _send_back(self, foreign: Copies, sum_RD: Tensor, owned: Copies) -> Callable[[], tuple[Tensor, Tensor]]:
        """Starts sending sums of tokens that others own; an owner knows from its tokens' slots who will send it some."""
        awaited_TG = hit(self._device_P[owned.slot_RK[:, 1:]], self._mesh.size)
        awaited_TG[:, self._mesh.rank] = False
        return self._routes.back(sum_RD, foreign.sequence_R, self._owner(foreign), awaited_TG)
