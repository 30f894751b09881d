"""One MoE layer of context-coherent execution: a token moves to the device of its highest-weight expert and stays there.

T tokens that stand here before the layer, R copies that arrive, D hidden size, K experts a token, P slots, G devices,
N nodes of S devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import gather
from .decode_statistics import DecodeStatistics, IntArray
from .experts import PlacedExperts
from .layer_placement import LayerPlacement
from .lost_ranks import naming_lost_ranks
from .pairs import Pairs
from .wire import Flight


@dataclass(frozen=True, eq=False)
class Standing:
    """Tokens on this rank. residual_TD: the residual stream. sequence_T: the sequence of each. count_G: [G] tokens that
    stand on each rank, known to all."""

    residual_TD: Tensor
    sequence_T: Tensor
    count_G: IntArray


@dataclass(frozen=True, eq=False)
class _Copies:
    """Tokens with what travels beside them."""

    residual_RD: Tensor
    weight_RK: Tensor
    slot_RK: Tensor
    sequence_R: Tensor


class CoherentExperts:
    """Moves tokens through the experts of one layer (ExFlow; Yao et al. 2024, with more than one expert a token).

    The device of a token's highest-weight expert becomes its owner. Its residual stream goes from the owner so far to
    every device that has one of its experts, once to each; the new owner keeps it, and the other devices send the new owner
    the weighted sum of their experts' outputs. With one expert a token nothing is sent back: one all-to-all a layer.

    node_aware: one copy a token and node, handed on inside, and sums by node on the way to the owner.
    """

    def __init__(self, experts: PlacedExperts, statistics: DecodeStatistics, node_aware: bool) -> None:
        self._experts, self._mesh, self._statistics = experts, experts.mesh, statistics
        self._node_aware = node_aware and self._mesh.nested
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
        mesh, statistics = self._mesh, self._statistics
        weight_TK, order_TK = weight_TK.float().sort(dim=1, descending=True, stable=True)
        slot_TK = self._experts.replica_choice.slots(expert_TK.long().gather(1, order_TK))
        with statistics.timing("dispatch"):
            copies, count_G = self._dispatch(_Copies(standing.residual_TD, weight_TK, slot_TK, standing.sequence_T))
        with statistics.timing("experts"):
            device_RK = self._device_P[copies.slot_RK]
            x_RD = norm(copies.residual_RD)
            y_RD = self._local(x_RD, copies, device_RK)
            own_R = device_RK[:, 0] == mesh.rank
            sequence_T = copies.sequence_R[own_R]
            sum_TD = y_RD[own_R]
        back = None
        if device_RK.shape[1] > 1:
            with statistics.timing("combine"):
                back = self._send_back(y_RD.to(x_RD.dtype), copies.sequence_R, device_RK, own_R)
        with statistics.timing("experts"):
            shared_TD = None if shared is None else shared(x_RD[own_R])
        if back is not None:
            with statistics.timing("combine"):
                value_RD, number_R1 = back()
                place_B = torch.empty(int(sequence_T.max()) + 1 if len(sequence_T) else 0, dtype=torch.int64)
                place_B = place_B.to(sequence_T.device)
                place_B[sequence_T] = torch.arange(len(sequence_T), device=sequence_T.device)
                sum_TD = sum_TD.index_add(0, place_B[number_R1[:, 0]], value_RD.float())
        output_TD = sum_TD.to(x_RD.dtype)
        if shared_TD is not None:
            output_TD = output_TD + shared_TD
        return Standing(copies.residual_RD[own_R] + output_TD, sequence_T, count_G)

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

    def _local(self, x_RD: Tensor, copies: _Copies, device_RK: Tensor) -> Tensor:
        """[R, D] in float32: the weighted sum of each token's experts that stand here."""
        here = int((device_RK == self._mesh.rank).sum())
        rows = len(self._experts.row_expert)
        pairs = Pairs.of(x_RD, copies.weight_RK, copies.slot_RK, self._row_P, rows, here)
        weights = dict(self._experts.named_parameters(recurse=False))
        return pairs.weighted_sum(self._experts.kind.forward(pairs.row_ND, pairs.count_S, weights))

    def _dispatch(self, tokens: _Copies) -> tuple[_Copies, IntArray]:
        """(the copies that arrive, [G] tokens that each rank owns from now on).

        The host waits for the device once: all ranks tell all how many copies go where, which sizes both hops.
        """
        mesh, size = self._mesh, self._mesh.size
        device_TK = self._device_P[tokens.slot_RK]
        need_TG = _hit(device_TK, size)
        owned_G = torch.bincount(device_TK[:, 0], minlength=size)
        told = [need_TG.sum(dim=0), owned_G]
        if not self._node_aware:
            table = gather(mesh, torch.stack(told)).cpu().numpy()
            copies_GG = table[:, 0]
            arrived = self._hop(
                tokens, need_TG, mesh.group, copies_GG[mesh.rank], copies_GG[:, mesh.rank], np.arange(size)
            )
            return arrived, table[:, 1].sum(axis=0)
        assert mesh.inter is not None
        assert mesh.intra is not None
        width = mesh.node_size
        here, place = divmod(mesh.rank, width)
        need_TN = need_TG.view(len(need_TG), size // width, width).any(dim=2)
        table = gather(mesh, torch.cat([*told, need_TN.sum(dim=0)])).cpu().numpy()
        devices_NS = np.arange(size).reshape(-1, width)
        nodes = len(devices_NS)
        copies_NSNS = table[:, :size].reshape(nodes, width, nodes, width)
        entering_NSN = table[:, 2 * size :].reshape(nodes, width, nodes)
        landed = self._hop(
            tokens, need_TN, mesh.inter, entering_NSN[here, place], entering_NSN[:, place, here], devices_NS[:, place]
        )
        need_RS = _hit(self._device_P[landed.slot_RK], size)[:, here * width : (here + 1) * width]
        sent, received = copies_NSNS[:, place, here].sum(axis=0), copies_NSNS[:, :, here, place].sum(axis=0)
        arrived = self._hop(landed, need_RS, mesh.intra, sent, received, devices_NS[here])
        return arrived, table[:, size : 2 * size].sum(axis=0)

    def _hop(
        self,
        tokens: _Copies,
        need_TP: Tensor,
        group: dist.ProcessGroup,
        sent: IntArray,
        received: IntArray,
        devices: IntArray,
    ) -> _Copies:
        """Sends each token to the peers that need it. devices: of the group's ranks."""
        row_C = torch.nonzero_static(need_TP.t(), size=int(sent.sum()))[:, 1]
        sequence_C = tokens.sequence_R[row_C].int()[:, None]
        slot_C = torch.cat([tokens.slot_RK[row_C].int(), sequence_C], dim=1)
        weight_C = torch.nn.functional.pad(tokens.weight_RK[row_C], (0, 1))
        row_CD = tokens.residual_RD.index_select(0, row_C)
        self._record("dispatch", devices, sent, row_CD, 8 * slot_C.shape[1])
        flight = Flight(group, sent.tolist(), received.tolist())
        row_RD, weight_R, slot_R = flight.travel(row_CD, weight_C, slot_C).arrive()
        return _Copies(row_RD, weight_R[:, :-1], slot_R[:, :-1].long(), slot_R[:, -1].long())

    def _send_back(
        self, y_RD: Tensor, sequence_R: Tensor, device_RK: Tensor, own_R: Tensor
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Starts sending outputs to the tokens' owners; the result waits: (rows, their sequences) for tokens owned here."""
        mesh, size = self._mesh, self._mesh.size
        owner_R = device_RK[:, 0]
        # An owner knows from a token's slots which devices, or nodes, will send it a sum.
        other_TG = _hit(device_RK[own_R, 1:], size)
        other_TG[:, mesh.rank] = False
        sent_G = torch.bincount(owner_R[~own_R], minlength=size)
        if not self._node_aware:
            sent, received = torch.stack([sent_G, other_TG.sum(dim=0)]).cpu().numpy()
            order_C = owner_R.masked_fill(own_R, size).argsort(stable=True)[: int(sent.sum())]
            number_C1 = sequence_R[order_C, None]
            return self._return(y_RD[order_C], number_C1, mesh.group, sent, received, np.arange(size))
        return self._send_back_by_node(y_RD, sequence_R, owner_R, own_R, other_TG)

    def _send_back_by_node(
        self, y_RD: Tensor, sequence_R: Tensor, owner_R: Tensor, own_R: Tensor, other_TG: Tensor
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """First to the rank of the owner's place in this node, which adds up, then to the owner's node."""
        mesh = self._mesh
        assert mesh.inter is not None
        assert mesh.intra is not None
        width = mesh.node_size
        here, place = divmod(mesh.rank, width)
        devices_NS = np.arange(mesh.size).reshape(-1, width)
        place_R = (owner_R % width).masked_fill(own_R, width)
        mine = torch.bincount(place_R, minlength=width)[:width]
        theirs = torch.empty_like(mine)
        with naming_lost_ranks(mesh.intra):
            dist.all_to_all_single(theirs, mine, group=mesh.intra)
        sent, received = torch.stack([mine, theirs]).cpu().numpy()
        order_C = place_R.argsort(stable=True)[: int(sent.sum())]
        number_C2 = torch.stack([sequence_R, owner_R], dim=1)[order_C]
        value_RD, number_R2 = self._return(y_RD[order_C], number_C2, mesh.intra, sent, received, devices_NS[here])()
        sequence_M, merged_R = number_R2[:, 0].unique(return_inverse=True)  # type: ignore[no-untyped-call]
        owner_M = torch.empty_like(sequence_M)
        owner_M[merged_R] = number_R2[:, 1]
        sum_MD = value_RD.new_zeros(len(sequence_M), value_RD.shape[1], dtype=torch.float32)
        sum_MD = sum_MD.index_add(0, merged_R, value_RD.float()).to(value_RD.dtype)
        node_M = owner_M // width
        other_TN = other_TG.view(len(other_TG), len(devices_NS), width).any(dim=2)
        other_TN[:, here] = False
        sent_N = torch.bincount(node_M, minlength=len(devices_NS))
        stays = int(sent_N[here])
        received_N = other_TN.sum(dim=0)
        received_N[here] = stays
        sent, received = torch.stack([sent_N, received_N]).cpu().numpy()
        order_M = node_M.argsort(stable=True)
        number_C1 = sequence_M[order_M, None]
        return self._return(sum_MD[order_M], number_C1, mesh.inter, sent, received, devices_NS[:, place])

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
        rows_G[devices] = np.where(devices == self._mesh.rank, 0, sent)
        self._statistics.sent(part, rows_G, row_CD.shape[1] * row_CD.element_size(), side_bytes)
        self._statistics.all_to_alls[part] += 1


def _hit(device_RK: Tensor, size: int) -> Tensor:
    """[R, G] whether a token has any of these experts there."""
    hit_RG = torch.zeros(len(device_RK), size, dtype=torch.bool, device=device_RK.device)
    return hit_RG.scatter_(1, device_RK, torch.ones_like(device_RK, dtype=torch.bool))
