"""The layer in one process, one token and expert at a time: what every fast path is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .expert_kinds import ExpertKind


def reference_experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, weights: Mapping[str, Tensor], kind: ExpertKind
) -> Tensor:
    """[T, D] the weighted sum of each token's experts. weights: [E, ...] each, logical experts in order."""
    result = []
    for x_D, expert_K, weight_K in zip(x_TD, expert_TK.tolist(), weight_TK, strict=True):
        total = torch.zeros_like(x_D)
        for expert, weight in zip(expert_K, weight_K, strict=True):
            own = {name: value[expert : expert + 1] for name, value in weights.items()}
            total = total + weight * kind.forward(x_D[None], torch.tensor([1]), own)[0]
        result.append(total)
    return torch.stack(result) if result else x_TD * 0
