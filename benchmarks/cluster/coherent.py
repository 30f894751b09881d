"""The example model's MoE layers in context-coherent execution, on recorded routing: one token of each of many
sequences."""

from __future__ import annotations

import numpy as np
import torch
from devices import Slowed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import moeplace as mp
from moeplace.runtime.moe.coherent import CoherentExperts, DecodeStatistics, LocalTokens
from moeplace.runtime.moe.decoder import RowGather
from moeplace.runtime.moe.experts import PlacedExperts
from moeplace.runtime.moe.mesh import ExpertMesh


class CoherentLayers(nn.Module):
    """An iteration of decoding without attention and head: tokens move from layer to layer, every rank is told where
    they ended, and in each layer `context` values a token (its keys and values) go to all ranks beside the later
    layers."""

    def __init__(self, plan: mp.Plan, mesh: DeviceMesh, dispatch: str, context: int) -> None:
        super().__init__()
        self.mesh = ExpertMesh.of(mesh)
        self.statistics = DecodeStatistics(self.mesh.size)
        self.context = context
        self.layers = nn.ModuleList(
            PlacedExperts(plan.model, plan, self.mesh, layer, kind=Slowed(), dispatch=dispatch)
            for layer in plan.moe_layers
        )
        self.moves = [CoherentExperts(layer, self.statistics, dispatch == "node_aware") for layer in self.layers]

    def forward(self, x_TD: Tensor, token_T: Tensor, expert_BLK: Tensor) -> None:
        """x_TD: of this rank's tokens. token_T: their numbers. expert_BLK: of all ranks' tokens."""
        count_G = np.full(self.mesh.size, len(token_T))
        tokens = LocalTokens(x_TD, token_T, count_G)
        gathering: list[RowGather] = []
        for index, move in enumerate(self.moves):
            for one in gathering:
                one.hand_on()
            if self.context:
                row_TW = torch.zeros(len(tokens.sequence_T), self.context)
                gathering.append(RowGather(self.mesh, self.statistics, "gather", row_TW, tokens.count_G))
            expert_TK = expert_BLK[tokens.sequence_T, index]
            weight_TK = torch.tensor([0.6, 0.4]).expand(len(expert_TK), 2)
            tokens = move.move(tokens, weight_TK, expert_TK, _norm, None)
        told_T2 = torch.stack([tokens.sequence_T, tokens.sequence_T], dim=1)
        RowGather(self.mesh, self.statistics, "ids", told_T2, tokens.count_G).finish()
        for one in gathering:
            one.finish()


def _norm(x_RD: Tensor) -> Tensor:
    return nn.functional.rms_norm(x_RD, x_RD.shape[-1:])
