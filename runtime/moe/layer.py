"""A whole MoE layer over ranks: router, experts by plan, shared experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ...placement.errors import InputError, nearest
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from .compression import LSHCompression
from .expert_kinds import ExpertKind
from .experts import Gradients, MakeDispatcher, PlacedExperts
from .mesh import ExpertMesh
from .routers import SigmoidRouter, SoftmaxRouter

ROUTERS: dict[str, Callable[..., nn.Module]] = {"softmax": SoftmaxRouter, "sigmoid": SigmoidRouter}


class ExpertParallelMoE(nn.Module):
    """[..., D] -> [..., D]: each token through its top-k experts, wherever the plan has them, plus the shared experts.

    router: "softmax", "sigmoid", or a module that gives (anything, weights [T, K], ids [T, K]) for [T, D].
    shared_experts: a module [..., D] -> [..., D] that every token goes through, computed while tokens travel.
    The other arguments are those of `PlacedExperts`. Routers and shared experts are the same on all ranks when ranks
    draw them from one seed, or under DistributedDataParallel or fully_shard, which must leave the experts alone
    (`exclude_from_ddp`, `expert_parameters`).

    torch.compile: the layer itself runs eagerly inside a compiled model (split sizes depend on data), so
    `fullgraph=True` is refused by torch for a model that contains it.
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
        kind: ExpertKind | None = None,
        dispatch: str | MakeDispatcher | None = None,
        compression: LSHCompression | None = None,
        gradients: Gradients = "mean",
        dtype: torch.dtype | None = None,
        seed: int = 0,
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
            gradients=gradients,
            dtype=dtype,
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
        """The layer of parts that are there already."""
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
