"""All-to-alls of several sizes: inside nodes, between nodes, and over all ranks, each on all ranks at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .clock import Clock
from .ranks import Ranks, places_of

SIZES = (1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
"""Bytes from a rank to each peer, besides those of a step."""

AROUND = (0.5, 0.7, 1.0, 1.4)
"""Of what a peer is sent when tokens choose devices evenly: what placements make of it."""

ELSEWHERE = 1e-4
"""Weight of other sizes in a fit: they decide only what those of a step leave open."""

LONGEST = {"cpu": 0.2, "cuda": 0.05}
"""Seconds of an all-to-all after which no larger one is timed."""


@dataclass(frozen=True)
class Exchange:
    """One size of all-to-all. peer_bytes: from a rank to each peer. seconds: [G] on every rank. weight: in a fit."""

    peer_bytes: int
    seconds: tuple[float, ...]
    weight: float


def exchanges(ranks: Ranks, group: dist.ProcessGroup, clock: Clock, expected: int) -> list[Exchange]:
    """Times every size over `group`; all groups of the kind at the same time. expected: bytes to a
    peer in a step."""
    peers = dist.get_world_size(group)
    of_step = [max(1, round(part * expected)) for part in AROUND]
    found: list[Exchange] = []
    for size in sorted({*SIZES, *of_step}):
        sent = torch.zeros(peers * size, dtype=torch.uint8, device=ranks.device)
        arrived = torch.empty_like(sent)

        def exchange(arrived: torch.Tensor = arrived, sent: torch.Tensor = sent) -> None:
            dist.all_to_all_single(arrived, sent, group=group)

        weight = 1.0 if of_step[0] <= size <= of_step[-1] else ELSEWHERE
        found.append(Exchange(size, tuple(ranks.gather(clock.seconds(exchange, apart=True))), weight))
        if max(found[-1].seconds) > LONGEST[ranks.device.type]:
            break
    return found


def rows_to_peer(ranks: Ranks, kind: str, tokens: int, top_k: int) -> float:
    """Of a rank's tokens, what it sends a peer in an exchange of the kind when tokens choose devices evenly: one copy a node
    between nodes, one a device else; inside nodes also what came in from the other nodes."""
    nodes = len(ranks.nodes)

    def reached(places: int) -> float:
        return tokens * (1.0 - (1.0 - 1.0 / places) ** top_k)

    return {"inter": reached(nodes), "intra": reached(ranks.size) * nodes, "all": reached(ranks.size)}[kind]


def remote_peers(ranks: Ranks, node: int) -> int:
    """Peers on other nodes that the ranks of `node` write to in an exchange between ranks of equal place."""
    places = places_of(ranks.nodes)
    return sum(len(places[place]) - 1 for place in range(len(ranks.nodes[node])))
