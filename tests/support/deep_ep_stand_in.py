"""`deep_ep.Buffer` over Gloo, in its normal and its low-latency mode: the interface and the meaning that DeepEP's own
Buffer documents, none of its kernels. And what each rank does with it in test_deep_ep.py."""

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
from moeplace.runtime import DeepEPLowLatency
from moeplace.runtime.moe.expert_mlps import SwiGLU
from moeplace.runtime.moe.experts import PlacedExperts


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return hidden_bytes * ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return 0


class Buffer:
    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
    ) -> None:
        assert (num_rdma_bytes if low_latency_mode else num_nvl_bytes) > 0
        self.group, self.ranks = group, group.size()
        self.low_latency, self.queues = low_latency_mode, num_qps_per_rank
        self.latest: list[Tensor] = []

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

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        assert num_experts % num_ranks == 0
        return num_max_dispatch_tokens_per_rank * hidden * num_experts

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        use_fp8: bool = True,
    ) -> tuple[Any, ...]:
        assert self.low_latency
        assert x.dtype == torch.bfloat16
        assert x.shape[1] % 128 == 0
        assert topk_idx.dtype == torch.int64
        assert len(x) == len(topk_idx) <= num_max_dispatch_tokens_per_rank
        local, room = num_experts // self.ranks, num_max_dispatch_tokens_per_rank * self.ranks
        assert self.queues == local
        order = topk_idx.flatten().argsort(stable=True)[int((topk_idx < 0).sum()) :]
        by_expert = torch.bincount(topk_idx.flatten()[order], minlength=num_experts)
        theirs = torch.empty_like(by_expert)
        dist.all_to_all_single(theirs, by_expert, group=self.group)
        sent, received = (part.view(self.ranks, local).sum(dim=1).tolist() for part in (by_expert, theirs))
        # Rows come by rank and then by expert; DeepEP has those of an expert one behind another, of all ranks.
        expert = torch.arange(local).repeat(self.ranks).repeat_interleave(theirs)
        behind = expert.argsort(stable=True)
        counts = torch.bincount(expert, minlength=local)
        place = torch.empty_like(expert)
        place[behind] = torch.cat([torch.arange(count) for count in counts.tolist()])
        handle = (order, expert, place, sent, received, x.shape[1], num_experts)
        token = order // topk_idx.shape[1]
        if not use_fp8:
            result = x.new_full((local, room, x.shape[1]), float("nan"))
            result[expert, place] = self._rows(x[token], sent, received)
            self._reuse([result])
            return result, counts.int(), handle, None, None
        group = x[token].float().view(len(token), x.shape[1] // 128, 128)
        largest = group.abs().amax(dim=2).clamp(min=1e-4)
        code = (group * (448.0 / largest)[:, :, None]).flatten(1).to(torch.float8_e4m3fn)
        codes = torch.full((local, room, x.shape[1]), float("nan")).to(torch.float8_e4m3fn)
        scales = torch.full((local, room, x.shape[1] // 128), float("nan"))
        codes.view(torch.uint8)[expert, place] = self._rows(code.view(torch.uint8), sent, received)
        scales[expert, place] = self._rows(largest * (1.0 / 448.0), sent, received)
        # The last two dimensions of scales are in column-major order.
        scales = scales.transpose(1, 2).contiguous().transpose(1, 2)
        self._reuse([codes, scales])
        return (codes, scales), counts.int(), handle, None, None

    def low_latency_combine(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Any) -> tuple[Any, ...]:
        order, expert, place, sent, received, width, num_experts = handle
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert x.shape[0] == num_experts // self.ranks
        assert x.shape[2] == width
        assert topk_weights.dtype == torch.float32
        back = self._rows(x[expert, place], received, sent)
        weighted = back.float() * topk_weights.flatten()[order][:, None]
        total = torch.zeros(len(topk_idx), width).index_add_(0, order // topk_idx.shape[1], weighted)
        return total.bfloat16(), None, None

    def _reuse(self, tensors: list[Tensor]) -> None:
        """What an earlier call gave out is overwritten, as DeepEP's next batches do."""
        for tensor in self.latest:
            tensor.copy_(torch.full(tensor.shape, float("nan")))
        self.latest = tensors

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


WIDE = SPEC.replace(hidden_size=256)


def low_latency(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Largest errors of two layers one after the other, decoding in bfloat16 and in fp8; and what is refused."""
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    found: dict[str, Any] = {"missing": attempt(lambda: experts_of(mesh, world, 0, DeepEPLowLatency(8)))}
    install()
    for fp8 in (False, True):
        worst = 0.0
        for number in range(6):
            rng = np.random.default_rng([12, number])
            experts, weights = experts_of(mesh, world, number, DeepEPLowLatency(13, fp8=fp8))
            batch = tokens(rng, world, width=WIDE.hidden_size)
            batch["x"] = [x.bfloat16().float() for x in batch["x"]]
            with torch.no_grad():
                for _ in range(2):
                    out = experts(batch["x"][rank].bfloat16(), batch["ids"][rank], batch["gate"][rank])
            if fp8:
                batch["x"] = [in_fp8(x) for x in batch["x"]]
            expected = expected_of(batch, weights, SwiGLU(), 1.0)["out"][rank]
            worst = max(worst, error(out.float(), expected))
        found["fp8" if fp8 else "bfloat16"] = worst
    experts, _ = experts_of(mesh, world, 0, DeepEPLowLatency(8))
    x, ids, gate = torch.zeros(9, 256, dtype=torch.bfloat16), torch.zeros(9, 3, dtype=torch.int64), torch.ones(9, 3)
    found["gradients"] = attempt(lambda: experts(x[:8], ids[:8], gate[:8]))
    with torch.no_grad():
        found["tokens"] = attempt(lambda: experts(x, ids, gate))
        narrow = random_plan(np.random.default_rng(0), 1, world)
        few = PlacedExperts(SPEC, narrow, mesh, 1, dispatch=DeepEPLowLatency(8), dtype=torch.bfloat16)
        found["width"] = attempt(lambda: few(x[:8, : SPEC.hidden_size], ids[:8], gate[:8]))
    found["one"] = attempt(lambda: experts_of(mesh, world, 0, DeepEPLowLatency(8 + rank % 2)))
    found["none"] = attempt(lambda: DeepEPLowLatency(0))
    found["delayed"] = attempt(
        lambda: PlacedExperts(SPEC, narrow, mesh, 1, dispatch="deep_ep", delay_weight_gradients=True)
    )
    dist.destroy_process_group()
    return found


def experts_of(mesh: Any, world: int, number: int, dispatch: Any) -> tuple[PlacedExperts, dict[str, Tensor]]:
    plan = random_plan(np.random.default_rng([13, number]), 1, world, WIDE)
    experts = PlacedExperts(WIDE, plan, mesh, 1, dispatch=dispatch, dtype=torch.bfloat16)
    weights = {n: v.bfloat16() for n, v in logical_weights(number, SwiGLU().shapes(WIDE), WIDE.experts).items()}
    experts.load_logical(weights)
    return experts, {name: value.float() for name, value in weights.items()}


def in_fp8(x_TD: Tensor) -> Tensor:
    """Rows as they come out of e4m3 with a scale for 128 values."""
    group = x_TD.view(len(x_TD), WIDE.hidden_size // 128, 128)
    scale = group.abs().amax(dim=2, keepdim=True) / 448.0
    return ((group / scale).to(torch.float8_e4m3fn).float() * scale).view_as(x_TD)


def attempt(build: Any) -> str:
    try:
        build()
    except (mp.UnsupportedError, mp.InputError) as refusal:
        return str(refusal)
    return ""


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
