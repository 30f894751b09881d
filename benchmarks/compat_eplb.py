"""`moeplace.compat.eplb.rebalance_experts` against the published `rebalance_experts` of DeepSeek's EPLB.

    python -m benchmarks compat_eplb --eplb eplb.py --write        # the file of github.com/deepseek-ai/EPLB

Draws instances (layers, experts, groups, nodes, GPUs, replicas, and loads: gamma, Zipf, lognormal, small counts with
many ties, or with idle experts; half of the shapes hierarchical), checks both results, and compares the load of each
layer's heaviest GPU, computed in double precision from the maps, equal being within 1e-12 of it. Also times both at 58
layers of 256 experts. One thread. Fails where any layer is worse or the starting point is not the published one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from published.published_eplb import rebalance_experts as published_rebalance
from runner import Report

from moeplace.compat.eplb import published_placement, rebalance_experts

EQUAL = 1e-12
Arguments = tuple[int, int, int, int]


def draw(rng: np.random.Generator) -> tuple[torch.Tensor, Arguments]:
    """Loads [L, E] and (replicas, groups, nodes, GPUs) that the published code takes."""
    hierarchical = rng.random() < 0.5
    nodes = int(rng.choice([1, 2, 3, 4, 8]) if hierarchical else rng.choice([2, 3, 4, 5, 8]))
    if hierarchical:
        groups = nodes * int(rng.choice([1, 2, 3, 4]))
    else:
        groups = int(rng.choice([g for g in (1, 3, 4, 7, 8) if g % nodes]))
    gpus = nodes * int(rng.choice([1, 2, 4, 8]))
    size = int(rng.integers(1, max(2, 256 // groups) + 1))
    experts, layers = groups * size, int(rng.integers(1, 25))
    least = math.ceil(experts / gpus)
    replicas = gpus * int(rng.integers(least, least + 4))
    shape = (layers, experts)
    load: npt.NDArray[np.float64]
    kind = rng.choice(["gamma", "zipf", "lognormal", "counts", "idle"])
    if kind == "gamma":
        load = rng.gamma(1.0, 1000.0, shape)
    elif kind == "zipf":
        load = skewed(rng, rng.uniform(0.3, 1.2), shape)
    elif kind == "lognormal":
        load = rng.lognormal(0.0, 1.0, shape)
    elif kind == "counts":
        load = np.asarray(rng.integers(0, 8, shape), dtype=np.float64)
    else:
        load = np.where(rng.random(shape) < 0.3, rng.poisson(500, shape).astype(np.float64), 0.0)
    return torch.from_numpy(load), (replicas, groups, nodes, gpus)


def skewed(rng: np.random.Generator, exponent: float, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Zipf loads, each layer in an order of its own."""
    ranks = np.arange(1, shape[1] + 1, dtype=np.float64)
    row: npt.NDArray[np.float64] = 1e5 / ranks**exponent
    return np.stack([rng.permutation(row) for _ in range(shape[0])])


def heaviest(load: npt.NDArray[np.float64], table: npt.NDArray[np.int64], gpus: int) -> npt.NDArray[np.float64]:
    """[L] load of the heaviest GPU, in double precision."""
    counts = np.stack([np.bincount(row, minlength=load.shape[1]) for row in table])
    slot_load = np.take_along_axis(load / np.maximum(counts, 1), table, axis=1)
    return np.asarray(slot_load.reshape(len(load), gpus, -1).sum(axis=2).max(axis=1))


def check_maps(maps: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...], arguments: Arguments) -> None:
    """Each map inverts the other, in the published shapes and types, and groups keep to nodes where they should."""
    table, positions, counts = (each.numpy() for each in maps)
    layers, experts = counts.shape
    replicas, groups, nodes, _ = arguments
    assert [m.dtype for m in maps] == [m.dtype for m in theirs]
    assert (table.shape, counts.shape) == (tuple(theirs[0].shape), tuple(theirs[2].shape))
    assert positions.shape == (layers, experts, counts.max())
    assert counts.min() >= 1
    held = positions >= 0
    assert (held.sum(axis=2) == counts).all()
    assert held.sum() == layers * replicas
    layer, expert, rank = np.nonzero(held)
    assert (table[layer, positions[layer, expert, rank]] == expert).all()
    if groups % nodes == 0:
        node = np.arange(replicas) // (replicas // nodes)
        for row in table // (experts // groups):
            assert all(len(set(node[row == g].tolist())) == 1 for g in range(groups))


def verdict(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> npt.NDArray[np.str_]:
    return np.where(ours > theirs * (1 + EQUAL), "worse", np.where(ours < theirs * (1 - EQUAL), "better", "equal"))


def shares(counted: Counter[str]) -> list[float]:
    return [counted[name] / sum(counted.values()) for name in ("better", "equal", "worse")]


def compare(report: Report, published: Callable[..., Any], instances: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    by_instance: Counter[str] = Counter()
    by_layer: Counter[str] = Counter()
    start_differs = with_worse = 0
    gains, ratios, excess, seconds = [], [], [], [0.0, 0.0]
    hierarchical = 0
    for number in range(instances):
        weight, arguments = draw(rng)
        begin = time.perf_counter()
        theirs = published(weight, *arguments)
        between = time.perf_counter()
        ours = rebalance_experts(weight, *arguments)
        end = time.perf_counter()
        check_maps(ours, theirs, arguments)
        load, gpus = weight.numpy(), arguments[3]
        their_load, our_load = heaviest(load, theirs[0].numpy(), gpus), heaviest(load, ours[0].numpy(), gpus)
        start = heaviest(load, published_placement(weight, *arguments), gpus)
        start_differs += int((verdict(start, their_load) != "equal").sum())
        layer_verdict = verdict(our_load, their_load)
        by_layer.update(layer_verdict.tolist())
        with_worse += int((layer_verdict == "worse").any())
        by_instance.update(verdict(our_load.mean(keepdims=True), their_load.mean(keepdims=True)).tolist())
        gains.append(float(1 - our_load.sum() / their_load.sum()) if their_load.sum() else 0.0)
        ratios.append((end - between) / (between - begin))
        excess.append((end - between) - (between - begin))
        seconds[0] += between - begin
        seconds[1] += end - between
        hierarchical += arguments[1] % arguments[2] == 0
        if (number + 1) % 100 == 0:
            print(f"{number + 1} of {instances}", file=sys.stderr)
    layers = sum(by_layer.values())
    table = report.table(
        "random instances", ("", "better", "equal", "worse"), dict.fromkeys(("better", "equal", "worse"), ".1%")
    )
    table.row("instances, by mean over layers", *shares(by_instance))
    table.row(f"layers, each of {layers:,}", *shares(by_layer))
    figures = {
        "instances": instances,
        "hierarchical": hierarchical,
        "instances with any layer worse": with_worse,
        "layers whose start is not the published load": start_differs,
        "mean reduction of the largest load": statistics.mean(gains),
        "time ours/theirs, all instances": seconds[1] / seconds[0],
        "time ours/theirs, median instance": statistics.median(ratios),
        "time ours/theirs, slowest instance": max(ratios),
        "instances slower": sum(each > 0 for each in excess),
        "milliseconds slower, at most": 1e3 * max(excess),
        "milliseconds, mean instance, theirs": 1e3 * seconds[0] / instances,
        "milliseconds, mean instance, ours": 1e3 * seconds[1] / instances,
    }
    for name, value in figures.items():
        report.note("figures", f"{name}: {value:,.4g}")
    if with_worse or start_differs:
        report.failure = f"{with_worse} instances have a worse layer, {start_differs} layers start elsewhere"


def time_both(report: Report, published: Callable[..., Any], repeats: int) -> None:
    rng = np.random.default_rng(1)
    loads = {"gamma": rng.gamma(1.0, 1000.0, (58, 256)), "Zipf": skewed(rng, 1.0, (58, 256))}
    formats = {
        "loads": "",
        "form": "",
        "theirs, ms": ",.0f",
        "ours, ms": ",.0f",
        "faster": ".0f",
        "largest/mean load, theirs": ".4f",
        "ours": ".4f",
    }
    table = report.table("58 layers of 256 experts", formats, formats)
    for name, load in loads.items():
        weight = torch.from_numpy(load)
        for arguments in ((288, 8, 4, 32), (288, 8, 3, 32)):
            taken: list[list[float]] = [[], []]
            imbalance = [0.0, 0.0]
            for _ in range(repeats):
                for who, function in enumerate((published, rebalance_experts)):
                    begin = time.perf_counter()
                    dealt = function(weight, *arguments)[0].numpy()
                    taken[who].append(time.perf_counter() - begin)
                    largest = heaviest(load, dealt, arguments[3])
                    imbalance[who] = float((largest / (load.sum(axis=1) / arguments[3])).mean())
            theirs, ours = (1e3 * statistics.median(each) for each in taken)
            form = f"{'hierarchical' if arguments[1] % arguments[2] == 0 else 'global'}, {arguments[2]} nodes"
            table.row(name, form, theirs, ours, theirs / ours, *imbalance)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--eplb", type=Path, required=True, help="the published eplb.py")
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7, help="of the timing at 58 x 256")


def run(options: argparse.Namespace, report: Report) -> None:
    torch.set_num_threads(1)
    published = published_rebalance(options.eplb)
    # The larger shape first: it also warms both up.
    time_both(report, published, options.repeats)
    compare(report, published, options.instances, options.seed)
