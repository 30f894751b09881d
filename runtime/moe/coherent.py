"""One MoE layer of context-coherent execution: a token moves to the device of its highest-weight expert and stays there.

T tokens that stand here before the layer, R copies here, D hidden size, K experts a token, P slots, G devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .coherent_routes import CoherentRoutes, Copies, hit
from .decode_statistics import DecodeStatistics, IntArray
from .experts import PlacedExperts
from .layer_placement import LayerPlacement
from .pairs import Pairs

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
        pairs = self._pairs_here(stayed)
        arithmetic = pairs * spec.flops_per_token / topology.compute[self._mesh.rank]
        reading = len(self._experts.row_expert) * spec.bytes_per_expert / topology.memory_bandwidth[self._mesh.rank]
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
