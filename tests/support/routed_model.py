"""A routed model that owes nothing to Transformers, with routers of two makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

EXPERTS, TOP_K, WIDTH = 6, 2, 8


class TupleRouter(torch.nn.Linear):
    """Gives (weights, ids), both [..., k]."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x).softmax(-1).topk(TOP_K, dim=-1)


class MaskRouter(torch.nn.Linear):
    """Gives a dense [..., E] matrix of gates, zero where not chosen: only the user can say how to read it."""

    def forward(self, x: torch.Tensor) -> Any:
        weights, ids = super().forward(x).softmax(-1).topk(TOP_K, dim=-1)
        return torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, ids, weights)


class Experts(torch.nn.Module):
    """Called with (x, ids, weights), under names of its own."""

    num_experts = EXPERTS

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return x * gates.sum(-1, keepdim=True)


class Block(torch.nn.Module):
    def __init__(self, router: torch.nn.Module) -> None:
        super().__init__()
        self.router, self.experts = router, Experts()
        self.told: list[tuple[Any, Any]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        routed = self.router(x)
        weights, ids = routed.topk(TOP_K, dim=-1) if isinstance(routed, torch.Tensor) else routed
        if not torch.compiler.is_compiling():
            self.told.append((ids.reshape(-1, TOP_K).numpy(), weights.detach().reshape(-1, TOP_K).numpy()))
        result: torch.Tensor = self.experts(x, ids, gates=weights) + x
        return result


class Model(torch.nn.Module):
    """Token ids [B, S] or vectors [..., WIDTH]; two routed blocks, the second and the fourth."""

    def __init__(self, router: type[torch.nn.Module] = TupleRouter) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.depth = 4
        self.embed = torch.nn.Embedding(20, WIDTH)
        plain = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(2)]
        self.blocks = torch.nn.ModuleList(
            [plain[0], Block(router(WIDTH, EXPERTS)), plain[1], Block(router(WIDTH, EXPERTS))]
        )

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = x if x.is_floating_point() else self.embed(x)
        for block in list(self.blocks)[: self.depth]:
            x = block(x)
        return x

    @property
    def told(self) -> tuple[np.ndarray, np.ndarray]:
        parts = [block.told for block in self.blocks if isinstance(block, Block)]
        ids, weights = (
            np.stack([np.concatenate([call[i] for call in part]) for part in parts], axis=1) for i in range(2)
        )
        return ids, weights.astype(np.float16)


def ids_of(rows: int, width: int) -> torch.Tensor:
    return torch.randint(20, (rows, width), generator=torch.Generator().manual_seed(0))
