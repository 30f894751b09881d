"""All-to-alls of several sizes: inside nodes, between nodes, and over all ranks, each on all ranks at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .clock import Clock
from .ranks import Ranks, places_of

SIZES = (1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
"""Bytes from a rank to each peer."""

LONGEST = {"cpu": 0.2, "cuda": 0.05}
"""Seconds of an all-to-all after which no larger one is timed."""


@dataclass(frozen=True)
class Exchange:
    """One size of all-to-all. peer_bytes: from a rank to each peer. seconds: [G] on every rank."""

    peer_bytes: int
    seconds: tuple[float, ...]


def exchanges(ranks: Ranks, group: dist.ProcessGroup | None, clock: Clock) -> list[Exchange]:
    """Times every size over `group` (None: all ranks); all groups of the kind at the same time."""
    peers = dist.get_world_size(group)
    found: list[Exchange] = []
    for size in SIZES:
        sent = torch.zeros(peers * size, dtype=torch.uint8, device=ranks.device)
        arrived = torch.empty_like(sent)

        def exchange(arrived: torch.Tensor = arrived, sent: torch.Tensor = sent) -> None:
            dist.all_to_all_single(arrived, sent, group=group)

        found.append(Exchange(size, tuple(ranks.gather(clock.seconds(exchange)))))
        if max(found[-1].seconds) > LONGEST[ranks.device.type]:
            break
    return found


def remote_peers(ranks: Ranks, node: int) -> int:
    """Peers on other nodes that the ranks of `node` write to in an exchange between ranks of equal place."""
    places = places_of(ranks.nodes)
    return sum(len(places[place]) - 1 for place in range(len(ranks.nodes[node])))
