"""Routers: which experts a token goes to and with what weight. Any module with the same forward will do.

T tokens, D hidden size, E experts, K experts a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SoftmaxRouter(nn.Module):
    """The K largest of a softmax over all experts (Shazeer et al. 2017; Mixtral, OLMoE, Qwen3-MoE).

    normalise: weights of the chosen experts sum to 1.
    """

    def __init__(
        self,
        hidden_size: int,
        experts: int,
        top_k: int,
        normalise: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.top_k, self.normalise = top_k, normalise
        self.weight = nn.Parameter(torch.empty(experts, hidden_size, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, E], weights [T, K] in float32, expert ids [T, K])."""
        logit_TE = F.linear(x_TD, self.weight)
        weight_TK, expert_TK = logit_TE.float().softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.normalise:
            weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
        return logit_TE, weight_TK, expert_TK


class SigmoidRouter(nn.Module):
    """DeepSeek-V3's: sigmoid scores, a bias that only decides who is chosen, groups of experts, scaled weights.

    groups: experts stand in so many groups; only the `top_groups` with the largest sum of their two best are open
    (both 1: no groups). scale: of the normalised weights. bias: a buffer, moved by balancing (`bias += rate * sign(...)`).
    """

    def __init__(
        self,
        hidden_size: int,
        experts: int,
        top_k: int,
        groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.top_k, self.groups, self.top_groups, self.scale = top_k, groups, top_groups, scale
        self.weight = nn.Parameter(torch.empty(experts, hidden_size, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(experts, device=device, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, E], weights [T, K], expert ids [T, K]), all in float32."""
        logit_TE = F.linear(x_TD.float(), self.weight.float())
        score_TE = logit_TE.sigmoid()
        choice_TE = score_TE.detach() + self.bias
        if self.groups > 1:
            grouped = choice_TE.view(len(choice_TE), self.groups, -1)
            best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
            open_groups = torch.zeros_like(best, dtype=torch.bool)
            open_groups.scatter_(-1, best.topk(self.top_groups, dim=-1).indices, True)
            choice_TE = grouped.masked_fill(~open_groups[..., None], float("-inf")).flatten(-2)
        expert_TK = choice_TE.topk(self.top_k, dim=-1).indices
        weight_TK = score_TE.gather(-1, expert_TK)
        return logit_TE, self.scale * weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + 1e-20), expert_TK
