"""`deep_ep.Buffer` in its normal mode over Gloo: the interface and the meaning that DeepEP's own Buffer documents, none
of its kernels. And what each rank does with it in test_deep_ep.py."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from expert_ranks import error, expected_of, tokens
from random_plans import SPEC, logical_weights, random_plan
from ranks import join_group
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import moeplace as mp
from moeplace.runtime.moe.expert_mlps import SwiGLU
from moeplace.runtime.moe.experts import PlacedExperts


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return hidden_bytes * ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return 0


class Buffer:
    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        assert num_nvl_bytes > 0
        self.group, self.ranks = group, group.size()

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dtype == torch.int64
        assert num_experts % self.ranks == 0
        chosen = topk_idx[topk_idx >= 0]
        by_expert = torch.bincount(chosen, minlength=num_experts).int()
        rank = torch.where(topk_idx < 0, -1, topk_idx // (num_experts // self.ranks))
        in_rank = (rank[:, :, None] == torch.arange(self.ranks)).any(dim=1)
        return in_rank.sum(dim=0).int(), None, by_expert, in_rank, None

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16
        if handle is not None:
            assert topk_idx is None
            token, sent, received, _ = handle
            return self._rows(x[token], sent, received), None, None, None, None, None
        assert num_tokens_per_rank is not None
        assert num_tokens_per_expert is not None
        assert is_token_in_rank is not None
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        token = torch.cat([torch.nonzero(is_token_in_rank[:, rank])[:, 0] for rank in range(self.ranks)])
        sent = num_tokens_per_rank.tolist()
        counts = torch.empty(self.ranks, dtype=torch.int64)
        dist.all_to_all_single(counts, num_tokens_per_rank.long(), group=self.group)
        received = counts.tolist()
        local = len(num_tokens_per_expert) // self.ranks
        idx, weights = self._rows(topk_idx[token], sent, received), self._rows(topk_weights[token], sent, received)
        first = self.group.rank() * local
        here = (idx >= first) & (idx < first + local)
        idx, weights = torch.where(here, idx - first, -1), torch.where(here, weights, 0.0)
        by_expert = torch.bincount(idx[idx >= 0], minlength=local).tolist()
        handle = (token, sent, received, len(x))
        return self._rows(x[token], sent, received), idx, weights, by_expert, handle, None

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16
        token, sent, received, tokens = handle
        back = self._rows(x, received, sent)
        total = x.new_zeros(tokens, x.shape[1], dtype=torch.float32).index_add_(0, token, back.float()).bfloat16()
        if topk_weights is None:
            return total, None, None
        weights = self._rows(topk_weights, received, sent)
        return total, weights.new_zeros(tokens, weights.shape[1]).index_add_(0, token, weights), None

    def _rows(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        result = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), received, sent, group=self.group)
        return result


def install() -> None:
    module: Any = ModuleType("deep_ep")
    module.Buffer = Buffer
    sys.modules["deep_ep"] = module


def equality(rank: int, world: int, folder: Path) -> dict[str, float]:
    """Largest errors, over random plans with replicas, of the layer in bfloat16 against one process in float32."""
    join_group(rank, world, folder)
    mesh, worst = init_device_mesh("cpu", (world,)), {}
    install()
    for number in range(8):
        rng = np.random.default_rng([11, number])
        plan = random_plan(rng, 1, world)
        kind = SwiGLU()
        experts = PlacedExperts(SPEC, plan, mesh, 1, dispatch="deep_ep", gradients="sum", dtype=torch.bfloat16)
        weights = {n: v.bfloat16() for n, v in logical_weights(number, kind.shapes(SPEC), SPEC.experts).items()}
        experts.load_logical(weights)
        batch = tokens(rng, world)
        batch["x"] = [x.bfloat16().float() for x in batch["x"]]
        x = batch["x"][rank].bfloat16().requires_grad_()
        gate = batch["gate"][rank].clone().requires_grad_()
        out = experts(x, batch["ids"][rank], gate)
        (out.float() * batch["up"][rank]).sum().backward()
        expected = expected_of(batch, {name: value.float() for name, value in weights.items()}, kind, 1.0)
        for name, value in {"out": out.detach(), "x": x.grad, "gate": gate.grad}.items():
            worst[name] = max(worst.get(name, 0.0), error(value.float(), expected[name][rank]))
        for name, value in experts.named_parameters():
            rows = torch.from_numpy(experts.row_expert)
            worst[name] = max(worst.get(name, 0.0), error(value.grad.float(), expected[name][rows]))
    dist.destroy_process_group()
    return worst


def refused(rank: int, world: int, folder: Path) -> list[str]:
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    plan = random_plan(np.random.default_rng(0), 1, world)
    said = []
    for stand_in in (False, True):
        if stand_in:
            install()
        try:
            layer = PlacedExperts(SPEC, plan, mesh, 1, dispatch="deep_ep")
            layer(torch.zeros(2, SPEC.hidden_size), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3))
        except (mp.UnsupportedError, mp.InputError) as refusal:
            said.append(str(refusal))
    dist.destroy_process_group()
    return said
