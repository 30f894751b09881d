"""Measures the devices and links that the ranks of a process group run on, and fits a topology to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls

from ..._arguments import check_types
from ..._types import FloatArray
from ...placement.cost import ExpertCost, Flows, all_to_all_latency, transfer_seconds
from ...placement.errors import InputError
from ...placement.model import ModelSpec
from ...placement.topology import Device, Node, Topology
from ..moe.coordination import naming_unresponsive_ranks
from ..moe.expert_mlps import ExpertMLP
from .measure import (
    ROUND_SECONDS,
    Clock,
    Exchange,
    ExpertWork,
    Products,
    Ranks,
    TimedDispatch,
    copy_bandwidth,
    dispatches,
    exchanges,
    expert_products,
    memory_bytes,
    remote_peers,
    rows_to_peer,
    token_seconds,
)
from .result import Calibration, DispatchTiming, LinkTiming, WorkTiming

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
        InputError: `tokens` below one a rank; ranks of a node do not follow each other; timings that no rate fits.
        RankError: a rank is lost on the way.
    """
    world = dist.group.WORLD
    assert world is not None
    with naming_unresponsive_ranks(world):
        device = own_device()
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        if tokens is not None and tokens < dist.get_world_size():
            raise InputError(
                f"tokens ({tokens}) of a step: expected one or more for each of {dist.get_world_size()} ranks"
            )
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
