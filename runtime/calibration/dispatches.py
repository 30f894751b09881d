"""The runtime's own dispatch and combine, without experts: what they take beside their rows' time on links.

T tokens of this rank, D hidden size, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..moe.hop import Departed, Hop
from .clock import Clock
from .devices import ExpertWork
from .ranks import Ranks


@dataclass(frozen=True)
class TimedDispatch:
    """Tokens there and back. copies: [hops] of a rank there, to itself and others, mean of all. seconds: on the last rank."""

    copies: tuple[float, ...]
    seconds: float


def dispatches(work: ExpertWork, ranks: Ranks, clock: Clock, tokens: int) -> dict[str, TimedDispatch]:
    """By name: "flat", and "node_aware" where nodes have several ranks, equally many. tokens: T, each for K devices drawn
    evenly."""
    if ranks.size == 1:
        return {}
    everyone = dist.group.WORLD
    assert everyone is not None
    device_P = torch.arange(ranks.size, device=ranks.device)
    ways = {"flat": [Hop(everyone, device_P)]}
    sizes = {len(members) for members in ranks.nodes}
    if len(ranks.nodes) > 1 and len(sizes) == 1 and sizes != {1}:
        size = sizes.pop()
        ways["node_aware"] = [Hop(ranks.across, device_P // size), Hop(ranks.inside, device_P % size)]
    return {name: _timed(hops, work, ranks, clock, tokens) for name, hops in ways.items()}


def _timed(hops: list[Hop], work: ExpertWork, ranks: Ranks, clock: Clock, tokens: int) -> TimedDispatch:
    spec = work.spec
    generator = torch.Generator().manual_seed(ranks.rank)
    slot_TK = torch.randint(ranks.size, (tokens, spec.top_k), generator=generator).to(ranks.device)
    weight_TK = torch.ones(tokens, spec.top_k, device=ranks.device)
    x_TD = torch.randn(tokens, spec.hidden_size, dtype=work.dtype, device=ranks.device)
    copies: list[int] = []

    def there_and_back() -> None:
        taken: list[Departed] = []
        arrived = x_TD, weight_TK, slot_TK
        for hop in hops:
            taken.append(hop.depart(*arrived))
            arrived = taken[-1].transit.arrive()
        result = arrived[0]
        for hop, departed in zip(reversed(hops), reversed(taken), strict=True):
            result = hop.back(departed, result)
        copies[:] = [sum(departed.copies) for departed in taken]

    seconds = clock.slowest(there_and_back)
    mean = [sum(ranks.gather(float(count))) / ranks.size for count in copies]
    return TimedDispatch(tuple(mean), seconds)
