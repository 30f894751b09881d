"""What ranks take for exchanges, expert work and dispatch, all at the same time, as in a step.

T tokens of this rank, D hidden size, K experts a token, N token-expert pairs, S experts a device, G ranks.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ...placement.cost import chance_reached
from ...placement.errors import InputError
from ...placement.model import ModelSpec
from ..moe.dispatcher import AllToAllStage, SentCopies
from ..moe.expert_mlps import GELU, ExpertMLP, SwiGLU
from ..moe.mesh import Stage, node_stages


@dataclass(frozen=True, eq=False)
class Ranks:
    """All ranks of the default process group, seen from one of them.

    nodes: ranks of each node, in order. inside: this rank's node. across: the ranks of equal place on all nodes that
    have so many. device: where this rank computes.
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


ROUNDS = 5
ROUND_SECONDS = 0.1
MOST_REPEATS = 1000


class Clock:
    """Times work that all ranks start together.

    On a GPU device events time it, so that a host that runs ahead does not count.
    """

    def __init__(self, ranks: Ranks, round_seconds: float = ROUND_SECONDS) -> None:
        self._ranks, self._round_seconds = ranks, round_seconds
        self._nothing = torch.zeros(1, device=ranks.device)

    def seconds(self, work: Callable[[], object], alone: int | None = None, apart: bool = False) -> float:
        """[s] of one call on this rank, the median of some rounds. Every rank calls this. alone: only that rank works.

        apart: ranks wait for each other before each call, untimed, so that it finds links at rest as a step does; else
        calls follow each other.
        """
        works = alone in (None, self._ranks.rank)
        once = max(self._ranks.gather(self._round(work, 1, apart) if works else 0.0))
        once = min(once, max(self._ranks.gather(self._round(work, 1, apart) if works else 0.0)))
        repeats = max(1, min(MOST_REPEATS, round(self._round_seconds / max(once, 1e-9))))
        rounds = []
        for _ in range(ROUNDS):
            dist.barrier()
            rounds.append(self._round(work, repeats, apart) / repeats if works else 0.0)
        dist.barrier()
        return statistics.median(rounds)

    def slowest(self, work: Callable[[], object]) -> float:
        """[s] from a start together to the end on the last rank, which is another one from call to call: the median."""
        once = max(self._ranks.gather(min(self._round(work, 1, True), self._round(work, 1, True))))
        calls = max(ROUNDS, min(MOST_REPEATS, round(ROUNDS * self._round_seconds / max(once, 1e-9))))
        every: list[list[float]] = [[]] * self._ranks.size
        dist.all_gather_object(every, self._spans(work, calls, True))
        return float(statistics.median(max(one) for one in zip(*every, strict=True)))

    def _round(self, work: Callable[[], object], repeats: int, apart: bool) -> float:
        return sum(self._spans(work, repeats, apart))

    def _spans(self, work: Callable[[], object], repeats: int, apart: bool) -> list[float]:
        spans = []
        for calls in [1] * repeats if apart else [repeats]:
            if apart:
                # On a GPU this waits in the stream, where a barrier would stop the host.
                dist.all_reduce(self._nothing)
            began = self._mark()
            for _ in range(calls):
                work()
            spans.append((began, self._mark()))
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        return [_between(began, ended) for began, ended in spans]

    def _mark(self) -> Any:
        """This moment, of the host or of the device's stream."""
        if self._ranks.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _between(began: Any, ended: Any) -> float:
    if isinstance(began, float):
        return float(ended - began)
    return float(began.elapsed_time(ended)) / 1e3


# All-to-alls of several sizes: inside nodes, between nodes, and over all ranks.


SIZES = (1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
"""Bytes from a rank to each peer, besides those of a step."""

AROUND = (0.5, 0.7, 1.0, 1.4)
"""Of what a peer is sent when tokens choose devices evenly: what placements make of it."""

ELSEWHERE = 1e-4
"""Weight of other sizes in a fit: they decide only what those of a step leave open."""

LONGEST_EXCHANGE = {"cpu": 0.2, "cuda": 0.05}
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
    timed: list[Exchange] = []
    for size in sorted({*SIZES, *of_step}):
        sent = torch.zeros(peers * size, dtype=torch.uint8, device=ranks.device)
        arrived = torch.empty_like(sent)

        def exchange(arrived: torch.Tensor = arrived, sent: torch.Tensor = sent) -> None:
            dist.all_to_all_single(arrived, sent, group=group)

        weight = 1.0 if of_step[0] <= size <= of_step[-1] else ELSEWHERE
        timed.append(Exchange(size, tuple(ranks.gather(clock.seconds(exchange, apart=True))), weight))
        if max(timed[-1].seconds) > LONGEST_EXCHANGE[ranks.device.type]:
            break
    return timed


def rows_to_peer(ranks: Ranks, kind: str, tokens: int, top_k: int) -> float:
    """Of a rank's tokens, what it sends a peer in an exchange of the kind when tokens choose devices evenly: one copy a
    node between nodes, one a device else; inside nodes also what came in from the other nodes."""
    nodes = len(ranks.nodes)

    def reached(places: int) -> float:
        return tokens * float(chance_reached(1.0 / places, top_k))

    return {"inter": reached(nodes), "intra": reached(ranks.size) * nodes, "all": reached(ranks.size)}[kind]


def remote_peers(ranks: Ranks, node: int) -> int:
    """Peers on other nodes that the ranks of `node` write to in an exchange between ranks of equal place."""
    places = places_of(ranks.nodes)
    return sum(len(places[place]) - 1 for place in range(len(ranks.nodes[node])))


# What a device does beside waiting for links: expert products, reading memory, and putting tokens in order.


LONGEST_WORK = 0.5
"""Seconds of work after which no more is timed."""

LOADS = (0.5, 1.0, 2.0)
"""Of a device in a step, over the mean of all."""

COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}


@dataclass(frozen=True)
class Products:
    """Expert work at one size. pairs: token-expert pairs of each expert. seconds: [G] with rows gathered before and
    summed after, as the layer does. products_only: [G] without."""

    pairs: int
    seconds: tuple[float, ...]
    products_only: tuple[float, ...]


class ExpertWork:
    """Experts of the model's shape on this device, and rows for them."""

    def __init__(
        self, spec: ModelSpec, kind: ExpertMLP | None, experts: int, dtype: torch.dtype, device: torch.device
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
        x_ND = torch.randn(total, self.spec.expert_input_size, dtype=self.dtype, device=self.device)
        weight_N = torch.rand(total, device=self.device)
        row_N = torch.randperm(total, device=self.device)
        count_S = torch.full((self.experts,), pairs, dtype=torch.int64, device=self.device)

        def products(row_ND: Tensor = x_ND) -> Tensor:
            return self.kind.forward(row_ND, count_S, self.weights)

        def whole() -> None:
            y_ND = products(x_ND.index_select(0, row_N)).float() * weight_N[:, None]
            y_ND.new_zeros(total, self.spec.expert_input_size).index_add(0, row_N, y_ND).to(self.dtype)

        return clock.seconds(whole, alone), clock.seconds(products, alone)


def expert_products(work: ExpertWork, ranks: Ranks, clock: Clock, tokens: int) -> list[Products]:
    """All ranks at once: one pair an expert, which is bound by reading, and what a step of `tokens` brings an expert of
    a device of low, mean and high load."""
    mean = tokens * work.spec.top_k / work.spec.experts
    timed: list[Products] = []
    for pairs in sorted({1, *(max(1, round(load * mean)) for load in LOADS)}):
        whole, products = work.timed(ranks, clock, pairs)
        timed.append(Products(pairs, tuple(ranks.gather(whole)), tuple(ranks.gather(products))))
        if max(timed[-1].seconds) > LONGEST_WORK:
            break
    return timed


def copy_bandwidth(ranks: Ranks, clock: Clock) -> list[float]:
    """[G] bytes/s read and written by a plain copy, all ranks at once."""
    source = torch.ones(COPIED[ranks.device.type] // 4, dtype=torch.float32, device=ranks.device)
    target = torch.empty_like(source)
    seconds = clock.seconds(lambda: target.copy_(source))
    return ranks.gather(2 * source.numel() * 4 / seconds)


@torch.no_grad()
def token_seconds(work: ExpertWork, ranks: Ranks, clock: Clock, tokens: int) -> list[float]:
    """[G] of a token in one stage, on its rank: finding its peers, copying it out, adding up what returns. A stage to
    nobody but the rank itself, so without any link."""
    spec = work.spec
    own: list[dist.ProcessGroup] = [dist.new_group([rank]) for rank in range(ranks.size)]
    nobody_else = np.zeros(1, np.int64)
    stage = AllToAllStage(Stage(own[ranks.rank], nobody_else, nobody_else), ranks.device)
    stage.place(torch.zeros(work.experts, dtype=torch.int64, device=ranks.device))
    x_TD = torch.randn(tokens, spec.expert_input_size, dtype=work.dtype, device=ranks.device)
    weight_TK = torch.rand(tokens, spec.top_k, device=ranks.device)
    slot_TK = torch.randint(work.experts, (tokens, spec.top_k), device=ranks.device)

    def there_and_back() -> None:
        copies = stage.send(x_TD, weight_TK, slot_TK)
        row_RD, _, _ = copies.exchange.wait()
        stage.combine(row_RD, copies)

    seconds = clock.seconds(there_and_back)
    return ranks.gather(seconds / tokens)


def memory_bytes(ranks: Ranks) -> list[float]:
    """[G] of each device; ranks on CPUs divide their host's."""
    if ranks.device.type == "cuda":
        mine = float(torch.cuda.get_device_properties(ranks.device).total_memory)
    else:
        mine = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / dist.get_world_size(ranks.inside)
    return ranks.gather(mine)


@dataclass(frozen=True)
class TimedDispatch:
    """Tokens there and back. copies: [stages] of a rank there, to itself and others, mean of all. seconds: on the last
    rank."""

    copies: tuple[float, ...]
    seconds: float


def dispatches(work: ExpertWork, ranks: Ranks, clock: Clock, tokens: int) -> dict[str, TimedDispatch]:
    """By name: "flat", and "node_aware" where nodes have several ranks, equally many. tokens: T, each for K devices
    drawn evenly."""
    if ranks.size == 1:
        return {}
    everyone = dist.group.WORLD
    assert everyone is not None
    devices = np.arange(ranks.size)
    ways = {"flat": [Stage(everyone, devices, devices)]}
    sizes = {len(members) for members in ranks.nodes}
    if len(ranks.nodes) > 1 and len(sizes) == 1 and sizes != {1}:
        ways["node_aware"] = node_stages(ranks.across, ranks.inside, ranks.rank, ranks.size, sizes.pop())
    return {name: _timed(way, work, ranks, clock, tokens) for name, way in ways.items()}


def _timed(way: list[Stage], work: ExpertWork, ranks: Ranks, clock: Clock, tokens: int) -> TimedDispatch:
    spec = work.spec
    generator = torch.Generator().manual_seed(ranks.rank)
    slot_TK = torch.randint(ranks.size, (tokens, spec.top_k), generator=generator).to(ranks.device)
    weight_TK = torch.ones(tokens, spec.top_k, device=ranks.device)
    x_TD = torch.randn(tokens, spec.expert_input_size, dtype=work.dtype, device=ranks.device)
    copies: list[int] = []
    stages = [AllToAllStage(stage, ranks.device) for stage in way]
    for stage in stages:
        stage.place(torch.arange(ranks.size, device=ranks.device))

    def there_and_back() -> None:
        taken: list[SentCopies] = []
        arrived = x_TD, weight_TK, slot_TK
        for stage in stages:
            taken.append(stage.send(*arrived))
            arrived = taken[-1].exchange.wait()
        result = arrived[0]
        for stage, sent in zip(reversed(stages), reversed(taken), strict=True):
            result = stage.combine(result, sent)
        copies[:] = [sum(sent.exchange.sent) for sent in taken]

    seconds = clock.slowest(there_and_back)
    mean = [sum(ranks.gather(float(count))) / ranks.size for count in copies]
    return TimedDispatch(tuple(mean), seconds)
