"""What a device does beside waiting for links: expert products, reading memory, and putting tokens in order.

N token-expert pairs, S experts, D hidden size, K experts a token.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ...placement.model import ModelSpec
from ..moe.expert_kinds import GELU, ExpertKind, SwiGLU
from ..moe.hop import Hop
from .clock import Clock
from .ranks import Ranks

LONGEST = 0.5
"""Seconds of work after which no more is timed."""

LOADS = (0.5, 1.0, 2.0)
"""Of a device in a step, over the mean of all."""

COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}


@dataclass(frozen=True)
class Products:
    """Expert work at one size. pairs: token-expert pairs of each expert. seconds: [G] with rows gathered before and summed
    after, as the layer does. products_only: [G] without."""

    pairs: int
    seconds: tuple[float, ...]
    products_only: tuple[float, ...]


class ExpertWork:
    """Experts of the model's shape on this device, and rows for them."""

    def __init__(
        self, spec: ModelSpec, kind: ExpertKind | None, experts: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.spec, self.experts, self.dtype, self.device = spec, experts, dtype, device
        self.kind = kind or (SwiGLU() if spec.matrices == 3 else GELU())
        self.weights = {
            name: torch.randn(experts, *shape, dtype=dtype, device=device) * 0.02
            for name, shape in self.kind.shapes(spec).items()
        }

    @property
    def weight_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.weights.values())

    @torch.no_grad()
    def timed(self, ranks: Ranks, clock: Clock, pairs: int, alone: int | None = None) -> tuple[float, float]:
        """Seconds on this rank: with rows gathered and summed, and of the products alone."""
        total = pairs * self.experts
        x_ND = torch.randn(total, self.spec.hidden_size, dtype=self.dtype, device=self.device)
        weight_N = torch.rand(total, device=self.device)
        row_N = torch.randperm(total, device=self.device)
        count_S = torch.full((self.experts,), pairs, dtype=torch.int64, device=self.device)

        def products(row_ND: Tensor = x_ND) -> Tensor:
            return self.kind.forward(row_ND, count_S, self.weights)

        def whole() -> None:
            y_ND = products(x_ND.index_select(0, row_N)).float() * weight_N[:, None]
            y_ND.new_zeros(total, self.spec.hidden_size).index_add(0, row_N, y_ND).to(self.dtype)

        return clock.seconds(whole, alone), clock.seconds(products, alone)


def expert_products(work: ExpertWork, ranks: Ranks, clock: Clock, tokens: int) -> list[Products]:
    """All ranks at once: one pair an expert, which is bound by reading, and what a step of `tokens` brings an expert of a
    device of low, mean and high load."""
    mean = tokens * work.spec.top_k / work.spec.experts
    found: list[Products] = []
    for pairs in sorted({1, *(max(1, round(load * mean)) for load in LOADS)}):
        whole, products = work.timed(ranks, clock, pairs)
        found.append(Products(pairs, tuple(ranks.gather(whole)), tuple(ranks.gather(products))))
        if max(found[-1].seconds) > LONGEST:
            break
    return found


def copy_bandwidth(ranks: Ranks, clock: Clock) -> list[float]:
    """[G] bytes/s read and written by a plain copy, all ranks at once."""
    source = torch.ones(COPIED[ranks.device.type] // 4, dtype=torch.float32, device=ranks.device)
    target = torch.empty_like(source)
    seconds = clock.seconds(lambda: target.copy_(source))
    return ranks.gather(2 * source.numel() * 4 / seconds)


@torch.no_grad()
def token_seconds(work: ExpertWork, ranks: Ranks, clock: Clock, tokens: int) -> list[float]:
    """[G] of a token in one hop, on its rank: finding its peers, copying it out, adding up what returns. A hop to nobody
    but the rank itself, so without any link."""
    spec = work.spec
    own: list[dist.ProcessGroup] = [dist.new_group([rank]) for rank in range(ranks.size)]
    hop = Hop(own[ranks.rank], torch.zeros(work.experts, dtype=torch.int64, device=ranks.device))
    x_TD = torch.randn(tokens, spec.hidden_size, dtype=work.dtype, device=ranks.device)
    weight_TK = torch.rand(tokens, spec.top_k, device=ranks.device)
    slot_TK = torch.randint(work.experts, (tokens, spec.top_k), device=ranks.device)

    def there_and_back() -> None:
        departed = hop.depart(x_TD, weight_TK, slot_TK)
        row_RD, _, _ = departed.transit.arrive()
        hop.back(departed, row_RD)

    seconds = clock.seconds(there_and_back)
    return ranks.gather(seconds / tokens)


def memory_bytes(ranks: Ranks) -> list[float]:
    """[G] of each device; ranks on CPUs divide their host's."""
    if ranks.device.type == "cuda":
        mine = float(torch.cuda.get_device_properties(ranks.device).total_memory)
    else:
        mine = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / dist.get_world_size(ranks.inside)
    return ranks.gather(mine)
