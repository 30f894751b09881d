"""Which ranks run where, and the process groups over which links are measured."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist

from ...placement.errors import InputError


@dataclass(frozen=True, eq=False)
class Ranks:
    """All ranks of the default process group, seen from one of them.

    nodes: ranks of each node, in order. inside: this rank's node. across: the ranks of equal place on all nodes that have
    so many. device: where this rank computes.
    """

    nodes: tuple[tuple[int, ...], ...]
    rank: int
    device: torch.device
    inside: dist.ProcessGroup
    across: dist.ProcessGroup

    @property
    def size(self) -> int:
        return sum(map(len, self.nodes))

    @classmethod
    def of_world(cls, device: torch.device, node_size: int | None = None) -> Ranks:
        """Every rank calls it. node_size: ranks a node; by default torchrun's hosts, else host names tell.

        Raises:
            InputError: ranks of a node do not follow each other, or `node_size` does not divide the ranks.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        label = os.environ.get("GROUP_RANK") or socket.gethostname()
        if node_size is not None:
            if node_size < 1 or world % node_size:
                raise InputError(f"{world} ranks cannot be nodes of {node_size}; give a divisor of {world}")
            label = str(rank // node_size)
        labels: list[str] = [""] * world
        dist.all_gather_object(labels, label)
        nodes = nodes_of(labels)
        inside = across = None
        for members in nodes:
            group = dist.new_group(list(members))
            inside = group if rank in members else inside
        for members in places_of(nodes):
            group = dist.new_group(list(members))
            across = group if rank in members else across
        assert inside is not None
        assert across is not None
        return cls(nodes, rank, device, inside, across)

    def gather(self, value: float) -> list[float]:
        """[G] every rank's value, on every rank."""
        values = [0.0] * self.size
        dist.all_gather_object(values, value)
        return values


def nodes_of(labels: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Runs of ranks with one label.

    Raises:
        InputError: a label comes back after another.
    """
    runs = [(label, tuple(rank for rank, _ in run)) for label, run in groupby(enumerate(labels), key=lambda x: x[1])]
    names = [label for label, _ in runs]
    twice = sorted({label for label in names if names.count(label) > 1})
    if twice:
        raise InputError(
            f"ranks of node {twice[0]!r} do not follow each other; number ranks node by node, as torchrun does"
        )
    return tuple(members for _, members in runs)


def places_of(nodes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The i-th ranks of all nodes that have so many, for every i."""
    largest = max(map(len, nodes))
    return [tuple(members[place] for members in nodes if place < len(members)) for place in range(largest)]
