"""A whole MoE layer over ranks: router, experts by plan, shared experts.

A batch goes from here to `dispatcher` and `experts`. T tokens of this rank, D hidden size, E experts, K experts a
token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..._arguments import check_fields
from ...placement.errors import InputError, nearest
from ...placement.model import ModelSpec
from ...placement.objective import SLACK
from ...placement.plan import Plan
from .compression import Compression
from .expert_mlps import ExpertMLP
from .experts import Gradients, MakeDispatcher, PlacedExperts, Replicas
from .mesh import ExpertMesh


@check_fields
class ExpertParallelMoE(nn.Module):
    """[..., D] -> [..., D]: each token through its top-k experts, wherever the plan has them, plus the shared experts.

    Routers and shared experts are the same on all ranks when ranks draw them from one seed, or under
    DistributedDataParallel or fully_shard, which must leave the experts alone (`exclude_from_ddp`,
    `expert_parameters`).

    torch.compile: the layer itself runs eagerly inside a compiled model (split sizes depend on data), so
    `fullgraph=True` is refused by torch for a model that contains it.

    Args:
        spec, plan, mesh, layer, kind, dispatch, compression, replica_choice, gradients, dtype, online_slots,
            online_slack, capacity_factor, padded_tokens, shard_experts, chunks, delay_weight_gradients, seed: as for
            `PlacedExperts`.
        router: "softmax", "sigmoid", or a module that gives (anything, weights [T, K], ids [T, K]) for [T, D].
        shared_experts: a module [..., D] -> [..., D] that every token goes through, computed while tokens travel.

    Raises:
        InputError: an unknown router, or as for `PlacedExperts`.
        UnsupportedError: as for `PlacedExperts`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: Plan,
        mesh: DeviceMesh | ExpertMesh,
        layer: int,
        *,
        router: str | nn.Module = "softmax",
        shared_experts: nn.Module | None = None,
        kind: ExpertMLP | None = None,
        dispatch: str | MakeDispatcher | None = None,
        compression: Compression | None = None,
        replica_choice: Replicas = "share",
        gradients: Gradients = "mean",
        dtype: torch.dtype | None = None,
        online_slots: int = 0,
        online_slack: float = SLACK,
        capacity_factor: float | None = None,
        padded_tokens: int | None = None,
        shard_experts: bool = False,
        chunks: int = 1,
        delay_weight_gradients: bool = False,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.experts = PlacedExperts(
            spec,
            plan,
            mesh,
            layer,
            kind=kind,
            dispatch=dispatch,
            compression=compression,
            replica_choice=replica_choice,
            gradients=gradients,
            dtype=dtype,
            online_slots=online_slots,
            online_slack=online_slack,
            capacity_factor=capacity_factor,
            padded_tokens=padded_tokens,
            shard_experts=shard_experts,
            chunks=chunks,
            delay_weight_gradients=delay_weight_gradients,
            seed=seed,
        )
        if isinstance(router, str):
            if router not in ROUTERS:
                raise InputError(f"router {router!r} is unknown; {nearest(router, ROUTERS)}, or a module")
            where = self.experts.mesh.device
            router = ROUTERS[router](spec.hidden_size, spec.experts, spec.top_k, device=where, dtype=dtype)
        self.gate = router
        self.shared_experts = shared_experts

    @classmethod
    def around(cls, experts: PlacedExperts, router: nn.Module, shared_experts: nn.Module | None) -> ExpertParallelMoE:
        """The layer of parts that exist already."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.experts, layer.gate, layer.shared_experts = experts, router, shared_experts
        return layer

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor) -> Tensor:
        _, weight_TK, expert_TK = self.gate(hidden_states.reshape(-1, hidden_states.shape[-1]))
        shared = self.shared_experts
        if shared is None:
            routed: Tensor = self.experts(hidden_states, expert_TK, weight_TK)
            return routed
        beside: list[Tensor] = []
        routed = self.experts(hidden_states, expert_TK, weight_TK, lambda: beside.append(shared(hidden_states)))
        return routed + beside[0]


# Routers: which experts a token goes to and with what weight. Any module with the same forward will do.


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
    (both 1: no groups). scale: of the normalised weights. bias: a buffer, moved by balancing (`bias += rate *
    sign(...)`).
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
        # Under autocast too.
        with torch.autocast(x_TD.device.type, enabled=False):
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


ROUTERS: dict[str, Callable[..., nn.Module]] = {"softmax": SoftmaxRouter, "sigmoid": SigmoidRouter}


# The layer in one process, one token and expert at a time: what every fast path is compared with.


def reference_experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, weights: Mapping[str, Tensor], kind: ExpertMLP
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
