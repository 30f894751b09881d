"""Hops of the runtime itself: what a dispatch takes beside its rows' time on links.

T tokens of this rank, D hidden size, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..moe.hop import Hop
from .clock import Clock
from .devices import ExpertWork
from .ranks import Ranks


@dataclass(frozen=True)
class TimedHop:
    """Tokens there, unchanged, and back. copies: of a rank, to itself and others, mean of all. seconds: [G]."""

    copies: float
    seconds: tuple[float, ...]


def hop(work: ExpertWork, ranks: Ranks, group: dist.ProcessGroup, clock: Clock, tokens: int) -> TimedHop:
    """tokens: T. Each goes to K ranks of the group drawn evenly, once to each."""
    spec, peers = work.spec, dist.get_world_size(group)
    way = Hop(group, torch.arange(peers, device=ranks.device))
    generator = torch.Generator().manual_seed(ranks.rank)
    slot_TK = torch.randint(peers, (tokens, spec.top_k), generator=generator).to(ranks.device)
    weight_TK = torch.ones(tokens, spec.top_k, device=ranks.device)
    x_TD = torch.randn(tokens, spec.hidden_size, dtype=work.dtype, device=ranks.device)
    copies = 0

    def there_and_back() -> None:
        nonlocal copies
        departed = way.depart(x_TD, weight_TK, slot_TK)
        row_RD, _, _ = departed.transit.arrive()
        way.back(departed, row_RD)
        copies = sum(departed.copies)

    seconds = clock.seconds(there_and_back, apart=True)
    return TimedHop(sum(ranks.gather(float(copies))) / ranks.size, tuple(ranks.gather(seconds)))
