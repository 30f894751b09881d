"""Measures the devices and links that the ranks of a process group run on, and fits a topology to them.

Exchanges, expert work and dispatch are measured on all ranks at the same time, as in a step. T tokens of this rank, D
hidden size, K experts a token, N token-expert pairs, S experts a device, G ranks.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls
from torch import Tensor

from .._arguments import check_types
from .._types import FloatArray
from ..placement.cost import ExpertCost, Flows, all_to_all_latency, chance_reached, transfer_seconds
from ..placement.errors import InputError
from ..placement.model import ModelSpec
from ..placement.topology import Device, Node, Topology
from .moe.coordination import check_consistent_over, naming_unresponsive_ranks
from .moe.dispatcher import AllToAllStage, SentCopies
from .moe.expert_mlps import GELU, ExpertMLP, SwiGLU
from .moe.mesh import Stage, node_stages


@dataclass(frozen=True)
class LinkTiming:
    """An all-to-all. kind: "intra" (inside nodes), "inter" (between ranks of equal place on nodes) or "all" (every rank
    to every rank). peer_bytes: from a rank to each peer. seconds: on the slowest rank. predicted: by the topology."""

    kind: str
    peer_bytes: int
    seconds: float
    predicted: float


@dataclass(frozen=True)
class WorkTiming:
    """Expert work. pairs: token-expert pairs an expert. seconds: on the median device, rows gathered and summed.
    products_only: without. predicted: by the topology."""

    pairs: int
    seconds: float
    products_only: float
    predicted: float


@dataclass(frozen=True)
class DispatchTiming:
    """The runtime's dispatch and combine, one after the other without experts, of tokens that choose devices evenly.

    dispatch: "flat" or "node_aware". copies: rows that a rank sends there, those to itself included, all stages
    together. seconds: until the last rank is done. links: of these, what the topology says of the rows, stage after
    stage.
    """

    dispatch: str
    copies: float
    seconds: float
    links: float

    @property
    def copy_seconds(self) -> float:
        """What a copy costs beside its time on links: ranks tell each other numbers, order, pack and add up rows, and
        wait for the last of them in every stage."""
        return max(0.0, self.seconds - self.links) / self.copies


@dataclass(frozen=True)
class Calibration:
    """topology: devices and links with effective rates, as the cost model uses them.

    dispatches: of the runtime; the cost model leaves out what they take beside links. experts: a device had in `work`.
    tokens: of the steps that sizes were taken from. token_seconds: what a token costs its own rank in one stage without
    any link; the cost model leaves it out, since it is the same under every plan. copy_bandwidth: bytes/s read and
    written by plain copies. alone: how much faster a device does expert work when the others are idle; well above 1
    when ranks share cores. device_dtype: for reports, such as "cpu, torch.float32".
    """

    topology: Topology
    links: tuple[LinkTiming, ...]
    dispatches: tuple[DispatchTiming, ...]
    work: tuple[WorkTiming, ...]
    experts: int
    tokens: int
    token_seconds: float
    copy_bandwidth: float
    alone: float
    device_dtype: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "topology": self.topology.model_dump(mode="json")}

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the reader of the figures should know."""
        remarks = []
        if self.alone > 1.25:
            remarks.append(
                f"A device works {self.alone:.2f} times as fast while the others are idle: ranks share cores. The cost "
                "model takes devices to be independent, so plans of unequal load will be faster than it says."
            )
        if self.topology.num_nodes == 1:
            remarks.append(
                "One node: links between nodes were not measured; the file has the node's links inside in their place."
            )
        if self.topology.node_size.max() == 1:
            remarks.append(
                "One rank a node: links inside nodes were not measured; the file has memory bandwidth in their place."
            )
        return tuple(remarks)


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


MOST_WEIGHT_BYTES = {"cpu": 1 << 28, "cuda": 1 << 33}
TOKENS = {"cpu": 1024, "cuda": 4096}
"""Of a rank in a step, by default."""
NOISE = 0.1
"""Devices or nodes whose rate is so near the median of all count as equal to it."""


@check_types
def calibrate(
    spec: ModelSpec,
    *,
    kind: ExpertMLP | None = None,
    dtype: torch.dtype | None = None,
    experts: int | None = None,
    tokens: int | None = None,
    node_size: int | None = None,
    uniform: bool = False,
    round_seconds: float = ROUND_SECONDS,
    listen: Callable[[str], None] = lambda message: None,
) -> Calibration:
    """The topology of the default process group; every rank calls it, and gets the same.

    All ranks work at the same time throughout, as in a step. Links: the latency and bandwidth that fit all-to-alls of
    the sizes that steps send. Devices: the flop/s and bytes/s that fit the time of the spec's experts for as many
    tokens as steps bring them, and for one, rows gathered and summed as the layer does. Values within 10 % of the
    median of all devices (or nodes) become that median.

    Args:
        spec: sizes of an expert, top-k.
        kind: what an expert computes; default SwiGLU, or GELU for two matrices.
        dtype: of weights and activations; default bfloat16 on GPUs, float32 on CPUs.
        experts: a device; default the spec's over the ranks, as far as weights stay below 256 MB (CPU) or 8 GB.
        tokens: of a step, all ranks together; default 1,024 a rank (CPU) or 4,096.
        node_size: ranks a node, where torchrun's hosts are not the nodes.
        uniform: devices and nodes are taken for equal, whatever was measured.
        round_seconds: of each timing.
        listen: called with lines of progress.

    Returns:
        The topology, and the timings it was fitted to.

    Raises:
        InputError: a value out of range, or ranks with different ones; ranks of a node do not follow each other;
            timings that no rate fits.
        RankError: a rank is lost on the way.
    """
    world = dist.group.WORLD
    assert world is not None
    with naming_unresponsive_ranks(world):
        device = own_device()
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        failure = None
        if tokens is not None and tokens < dist.get_world_size():
            failure = InputError(
                f"tokens ({tokens}) of a step: expected one or more for each of {dist.get_world_size()} ranks"
            )
        elif experts is not None and experts < 1:
            failure = InputError(
                f"experts ({experts}) a device must be at least 1, or None for the model's over the ranks"
            )
        elif not 0.0 < round_seconds < float("inf"):
            failure = InputError(f"round_seconds ({round_seconds}) must be above 0 and finite")
        # Ranks that measure other sizes than the others would wait for them, or fit what nobody measured.
        settings = f"{spec!r} {kind!r} {dtype} {experts} {tokens} {node_size} {uniform} {round_seconds} {device.type}"
        check_consistent_over([world], "settings of calibrate", settings, failure)
        ranks = Ranks.of_world(device, node_size)
        here = -(-tokens // ranks.size) if tokens else TOKENS[device.type]
        row_bytes = spec.expert_input_size * dtype.itemsize
        clock = Clock(ranks, round_seconds)
        experts = experts or _experts(spec, dtype, ranks)
        work = ExpertWork(spec, kind, experts, dtype, device)
        listen(
            f"{ranks.size} ranks in {len(ranks.nodes)} nodes; {experts} experts a device; steps of {here * ranks.size} "
            "tokens"
        )
        products = expert_products(work, ranks, clock, here * ranks.size)
        busy = products[-1].pairs
        alone = max(ranks.gather(work.timed(ranks, clock, busy, alone=0)[0]))
        listen("expert work timed")
        copied, a_token = copy_bandwidth(ranks, clock), token_seconds(work, ranks, clock, here)
        memory = memory_bytes(ranks)
        timed: dict[str, list[Exchange]] = {}
        for link, group, exists in (
            ("intra", ranks.inside, max(map(len, ranks.nodes)) > 1),
            ("inter", ranks.across, len(ranks.nodes) > 1),
            ("all", world, ranks.size > 1),
        ):
            expected = round(rows_to_peer(ranks, link, here, spec.top_k) * row_bytes)
            timed[link] = exchanges(ranks, group, clock, expected) if exists else []
            if exists:
                listen(f"links timed: {link}")
        through = dispatches(work, ranks, clock, here)
        topology = _topology(ranks, work, products, timed, copied, memory, np.inf if uniform else NOISE)
        return Calibration(
            topology,
            tuple(_link_timings(ranks, topology, timed)),
            tuple(_dispatch_timings(ranks, topology, through, work)),
            tuple(_work_timings(topology, work, products)),
            experts,
            here * ranks.size,
            float(np.median(a_token)),
            float(np.median(copied)),
            products[-1].seconds[0] / alone,
            f"{device.type}, {dtype}",
        )


def own_device() -> torch.device:
    """The GPU of this process's local rank where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _experts(spec: ModelSpec, dtype: torch.dtype, ranks: Ranks) -> int:
    each = spec.weights_per_expert * dtype.itemsize
    return max(1, min(spec.experts // ranks.size, MOST_WEIGHT_BYTES[ranks.device.type] // each))


def _topology(
    ranks: Ranks,
    work: ExpertWork,
    products: Sequence[Products],
    timed: dict[str, list[Exchange]],
    copied: Sequence[float],
    memory: Sequence[float],
    tolerance: float,
) -> Topology:
    arithmetic = [one.pairs * work.experts * work.spec.flops_per_token for one in products]
    reading = [float(work.weight_bytes)] * len(products)
    rates = [roofline(arithmetic, reading, [one.seconds[g] for one in products]) for g in range(ranks.size)]
    # A rank alone in its node has no link inside it; what it would move there stays in its memory.
    intra, intra_latency = list(copied), 0.0
    if timed["intra"]:
        lines = {
            g: _intra_line(timed["intra"], g, len(members))
            for members in ranks.nodes
            if len(members) > 1
            for g in members
        }
        intra = [lines[g][1] if g in lines else copied[g] for g in range(ranks.size)]
        intra_latency = float(np.median([latency for latency, _ in lines.values()]))
    inter, inter_latency = [sum(intra[g] for g in members) for members in ranks.nodes], 0.0
    if timed["inter"]:
        fitted = [_inter_line(timed["inter"], ranks, node) for node in range(len(ranks.nodes))]
        inter = [bandwidth for _, bandwidth in fitted]
        inter_latency = float(np.median([latency for latency, _ in fitted]))
    columns = [alike(values, tolerance) for values in ([c for c, _ in rates], [m for _, m in rates], memory, intra)]
    devices = [
        Device(compute=c, memory=m, memory_bandwidth=b, intra_bandwidth=v) for c, b, m, v in zip(*columns, strict=True)
    ]
    links = alike(inter, tolerance)
    first = np.concatenate([[0], np.cumsum([len(members) for members in ranks.nodes])])
    nodes = tuple(
        Node(devices=tuple(devices[start:end]), inter_bandwidth=float(links[node]))
        for node, (start, end) in enumerate(pairwise(first))
    )
    name = f"calibrated ({work.device.type})"
    return Topology(nodes=nodes, intra_latency=intra_latency, inter_latency=inter_latency, name=name)


def _intra_line(timed: Sequence[Exchange], rank: int, size: int) -> tuple[float, float]:
    """(seconds a peer, bytes/s) of a device's links inside its node."""
    amount, seconds = [one.peer_bytes * (size - 1) for one in timed], [one.seconds[rank] for one in timed]
    latency, bandwidth = line(amount, seconds, [one.weight for one in timed])
    return latency / (size - 1), bandwidth


def _inter_line(timed: Sequence[Exchange], ranks: Ranks, node: int) -> tuple[float, float]:
    """(seconds a node, bytes/s) of a node's links to the others."""
    peers = remote_peers(ranks, node)
    seconds = [max(one.seconds[g] for g in ranks.nodes[node]) for one in timed]
    amount, weight = [one.peer_bytes * peers for one in timed], [one.weight for one in timed]
    latency, bandwidth = line(amount, seconds, weight)
    return latency / (len(ranks.nodes) - 1), bandwidth


def _link_seconds(ranks: Ranks, topology: Topology, kind: str, peer_bytes: float) -> float:
    """What the topology says of an all-to-all in which every rank sends each peer so much."""
    sizes, nodes = topology.node_size, topology.num_nodes
    inside = np.asarray((sizes - 1.0)[topology.node_of], dtype=np.float64)
    between = np.array([remote_peers(ranks, node) for node in range(nodes)], dtype=np.float64)
    leaving = sizes * (topology.num_devices - sizes)
    flows = {
        "intra": Flows(inside, np.zeros(nodes)),
        "inter": Flows(np.zeros(topology.num_devices), between),
        "all": Flows(inside, leaving.astype(np.float64)),
    }
    latencies = {
        "intra": topology.intra_latency * int(inside.max()),
        "inter": topology.inter_latency * (nodes - 1),
        "all": all_to_all_latency(topology, node_dedup=False),
    }
    return float(transfer_seconds(flows[kind], peer_bytes, topology, latencies[kind]))


def _link_timings(ranks: Ranks, topology: Topology, timed: dict[str, list[Exchange]]) -> list[LinkTiming]:
    """What was timed beside what the topology says of it."""
    return [
        LinkTiming(kind, one.peer_bytes, max(one.seconds), _link_seconds(ranks, topology, kind, one.peer_bytes))
        for kind, every in timed.items()
        for one in every
    ]


def _dispatch_timings(
    ranks: Ranks, topology: Topology, through: dict[str, TimedDispatch], work: ExpertWork
) -> list[DispatchTiming]:
    row = work.spec.expert_input_size * work.dtype.itemsize
    peers = {"intra": int(topology.node_size.max()), "inter": topology.num_nodes, "all": topology.num_devices}
    result = []
    for name, one in through.items():
        kinds = ["all"] if name == "flat" else ["inter", "intra"]
        links = [
            2 * _link_seconds(ranks, topology, kind, copies / peers[kind] * row)
            for kind, copies in zip(kinds, one.copies, strict=True)
        ]
        result.append(DispatchTiming(name, sum(one.copies), one.seconds, sum(links)))
    return result


def _work_timings(topology: Topology, work: ExpertWork, products: Sequence[Products]) -> list[WorkTiming]:
    # What was read is the measured weights, whose type need not be the one the model stores.
    expert_bytes = work.weight_bytes / work.experts
    typical = ExpertCost.roofline(
        work.spec.flops_per_token / np.median(topology.compute, keepdims=True),
        expert_bytes / np.median(topology.memory_bandwidth, keepdims=True),
    )
    hit = np.full(1, float(work.experts))
    return [
        WorkTiming(
            one.pairs,
            float(np.median(one.seconds)),
            float(np.median(one.products_only)),
            float(typical.seconds(one.pairs * hit, hit)[0]),
        )
        for one in products
    ]


# Rates from timings: the numbers that make the cost model's formulas fit, by least squares of the relative error.


def line(amount: Sequence[float], seconds: Sequence[float], weight: Sequence[float]) -> tuple[float, float]:
    """(latency, rate) of seconds = latency + amount / rate. amount: increasing. weight: how much each timing counts.

    Buffers on the way swallow small messages, and large ones may pass slower than those before them: no line holds from
    one end to the other, so weights say where it has to. A larger amount takes no less time: where one was faster, the
    smaller one's timing was disturbed.

    Raises:
        InputError: fewer than two amounts, or times that do not grow with them.
    """
    x, t = np.asarray(amount, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if len(x) < 2 or not (t > 0).all():
        raise InputError(f"a line needs two timings above zero or more, given {t.tolist()} for amounts {x.tolist()}")
    t = np.minimum.accumulate(t[::-1])[::-1]
    scale = np.sqrt(np.asarray(weight, dtype=np.float64))
    # Both unknowns in seconds, so that the solver's tolerances mean the same for both.
    largest = x.max()
    (latency, longest), _ = nnls(np.stack([scale / t, scale * (x / largest) / t], axis=1), scale)
    if longest <= 1e-6 * latency:
        raise InputError(
            f"times do not grow with the amount moved: {t.tolist()} s for {x.tolist()} bytes; measure on a quieter "
            "machine"
        )
    return float(latency), float(largest / longest)


def roofline(arithmetic: Sequence[float], reading: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(flop/s, bytes/s) of seconds = max(arithmetic / flop/s, reading / bytes/s), in the logarithm of the ratio.

    Raises:
        InputError: no timings, or some not above zero.
    """
    a, b, t = (np.asarray(values, dtype=np.float64) for values in (arithmetic, reading, seconds))
    if not len(t) or min(a.min(), b.min(), t.min()) <= 0:
        raise InputError(f"a roofline needs timings and amounts above zero, given {t.tolist()} s")
    # Sorted by intensity, some first timings are bound by reading and the rest by arithmetic. Each side's best rate is
    # the geometric mean of its own, so the cut with the least error is the best fit.
    order = np.argsort(a / b, kind="stable")
    rate, width = np.log(a / t)[order], np.log(b / t)[order]
    best = (np.inf, 0.0, 0.0)
    for cut in range(len(t) + 1):
        flops = rate[cut:].mean() if cut < len(t) else rate.max()
        read = width[:cut].mean() if cut else width.max()
        predicted = np.maximum(np.log(a) - flops, np.log(b) - read)
        error = float(((predicted - np.log(t)) ** 2).sum())
        best = min(best, (error, float(flops), float(read)))
    return float(np.exp(best[1])), float(np.exp(best[2]))


def alike(values: Sequence[float], tolerance: float) -> FloatArray:
    """The values, those within `tolerance` of their median replaced by it.

    Equal devices then stay equal, which keeps solvers from trading on noise.
    """
    result = np.asarray(values, dtype=np.float64).copy()
    middle = np.median(result)
    result[np.abs(result / middle - 1.0) <= tolerance] = middle
    return result
