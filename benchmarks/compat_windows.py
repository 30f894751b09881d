"""`moeplace.compat.windows` against the policies whose signatures it has, on random windows of steps.

    python -m benchmarks compat_windows --deepinfer policy.py --vllm default.py --flashlb policy_flashlb.py

Draws windows (steps, layers, experts, devices, slots; loads gamma, Zipf, small counts with many ties, or with idle
experts, each step apart from the others by chance, by drift or not at all) and compares the largest device load, summed
over steps, of each layer: computed in double precision from the maps, equal being within 1e-12 of it. vLLM's policy has
the sum of the steps, and groups on nodes in half of the windows. Peers are files of their repositories, fetched by
whoever runs this; see `peers`. Fails where a layer is worse than a peer's that has no expert twice on a device, or has
one itself. Windows for which a peer gives no plan (an index past its arrays, or experts left out) are only counted.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from published import window_policies
from runner import Report

from moeplace.compat.windows import AscendPolicy, VllmPolicy, rebalance_experts_global
from moeplace.solvers.table_packing import largest_loads

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
EQUAL = 1e-12
MOST_TREE = 4000
"""Experts times steps of windows that FlashLB is run on, at most: its search takes seconds for more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--windows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("deepinfer", "vllm", "flashlb"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help="a peer's file")


def draw(rng: np.random.Generator) -> tuple[Array, int, int]:
    """(loads [S, L, E], slots, devices); a quarter of the windows without spare slots."""
    devices = int(rng.choice([2, 3, 4, 8, 16, 32]))
    width = int(rng.integers(1, 9))
    slots = devices * width
    spare = 0 if rng.random() < 0.25 else int(rng.integers(1, max(2, slots // 2)))
    experts = max(2, slots - spare)
    if slots < experts:
        slots = devices * math.ceil(experts / devices)
    steps, layers = int(rng.integers(1, 65)), int(rng.integers(1, 5))
    shape = (layers, experts)
    kind = rng.choice(["gamma", "zipf", "counts", "idle"])
    if kind == "gamma":
        mean = rng.gamma(rng.uniform(0.3, 2.0), 100.0, shape)
    elif kind == "zipf":
        ranks = np.arange(1, experts + 1) ** -rng.uniform(0.3, 1.2)
        mean = 1000.0 * np.stack([rng.permutation(ranks) for _ in range(layers)])
    elif kind == "counts":
        mean = rng.integers(0, 4, shape).astype(np.float64)
    else:
        mean = np.where(rng.random(shape) < 0.4, rng.gamma(1.0, 200.0, shape), 0.0)
    change = rng.choice(["chance", "drift", "none"])
    if change == "none":
        return np.repeat(np.round(mean)[None], steps, axis=0), slots, devices
    if change == "drift":
        mean = mean * rng.gamma(4.0, 0.25, (steps, *shape))
    return rng.poisson(np.broadcast_to(mean, (steps, *shape))).astype(np.float64), slots, devices


def run(options: argparse.Namespace, report: Report) -> None:
    torch.set_num_threads(1)
    formats = {"better": ".1%", "equal": ".1%", "worse": ".2%", "mean change": "+.2%"}
    excused = {"worse, theirs with an expert twice": "d", "by, mean": ".1%"}
    twice_by = {"theirs with one twice": "d", "ours": "d"}
    none = {"windows without a plan of theirs": "d"}
    columns = ("policy", "windows", *none, "layers", *formats, *excused, *twice_by)
    table = report.table("random windows", columns, {**none, **formats, **excused, **twice_by})
    begin = time.perf_counter()
    for name in ("deepinfer", "vllm", "flashlb"):
        file = getattr(options, name)
        if file is None:
            continue
        rng, shapes = np.random.default_rng(options.seed), np.random.default_rng(options.seed)
        count: Counter[str] = Counter()
        change, above = [], []
        policy = getattr(window_policies, name)(file)
        for number in range(options.windows):
            load, slots, devices = draw(rng)
            if name == "flashlb" and load.shape[0] * load.shape[2] > MOST_TREE:
                continue
            groups, nodes = draw_groups(shapes, load.shape[2], slots, devices) if name == "vllm" else (1, 1)
            if name == "vllm":
                load = load.sum(axis=0, keepdims=True)
                theirs = policy(load[0], slots, devices, groups, nodes)
            else:
                try:
                    theirs = policy(load, slots, devices)
                except IndexError:
                    theirs = np.full((load.shape[1], slots), -1)
            if not all(set(row.tolist()) == set(range(load.shape[2])) for row in theirs):
                count["no plan"] += 1
                continue
            ours = stand_in(name, load, slots, devices, groups, nodes)
            mine, other = (largest_loads(load, each, devices).sum(axis=0) for each in (ours, theirs))
            if mine.sum() > 0 and other.sum() > 0:
                change.append(mine.sum() / other.sum() - 1.0)
            possible = slots * nodes <= load.shape[2] * devices
            for layer in range(len(ours)):
                sign = int(mine[layer] > other[layer] * (1 + EQUAL)) - int(mine[layer] < other[layer] * (1 - EQUAL))
                doubled = twice(theirs[layer], devices)
                count[("better", "equal", "worse")[sign + 1]] += 1
                count["theirs"] += int(possible and doubled)
                count["ours"] += int(possible and twice(ours[layer], devices))
                if sign > 0 and doubled:
                    above.append(mine[layer] / other[layer] - 1.0)
                elif sign > 0:
                    where = f"window {number}, layer {layer}, {slots} slots on {devices}"
                    print(f"{name}, {where}: {mine[layer]} against {other[layer]}", file=sys.stderr)
            count["windows"] += 1
        layers = count["better"] + count["equal"] + count["worse"]
        parts = [count[each] / layers for each in ("better", "equal", "worse")]
        worse = [len(above), float(np.mean(above)) if above else None]
        table.row(
            name,
            count["windows"],
            count["no plan"],
            layers,
            *parts,
            float(np.mean(change)),
            *worse,
            count["theirs"],
            count["ours"],
        )
        if count["worse"] > len(above) or count["ours"]:
            report.failure = f"{name}: {count['worse'] - len(above)} layers worse, {count['ours']} hold one twice"
    print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)


def draw_groups(rng: np.random.Generator, experts: int, slots: int, devices: int) -> tuple[int, int]:
    """(groups, nodes) of a policy that keeps groups on nodes; (1, 1) in half of the windows, and where none divide."""
    able = [n for n in (2, 4, 8) if devices % n == 0 and experts % n == 0 and slots % n == 0]
    if not able or rng.random() < 0.5:
        return 1, 1
    nodes = int(rng.choice(able))
    return int(rng.choice([nodes * k for k in range(1, experts // nodes + 1) if experts % (nodes * k) == 0])), nodes


def stand_in(name: str, load: Array, slots: int, devices: int, groups: int, nodes: int) -> IntArray:
    """[L, P] of ours by that signature."""
    if name == "vllm":
        return VllmPolicy.rebalance_experts(torch.from_numpy(load[0]), slots, groups, nodes, devices).numpy()
    if name == "deepinfer":
        made = rebalance_experts_global(torch.from_numpy(load), slots, slots // devices)[0]
        return made.numpy().astype(np.int64)
    layers, experts = load.shape[1:]
    current = np.tile(np.arange(slots) % experts, (layers, 1))
    counts = np.bincount(current[0], minlength=experts)
    workload = (load / counts)[:, :, current[0]].reshape(len(load), layers, devices, -1)
    made = AscendPolicy().rebalance_experts(current.reshape(layers, devices, -1), workload)
    return np.asarray(made[2].reshape(layers, slots))


def twice(row: IntArray, devices: int) -> bool:
    """Whether a device has an expert twice."""
    return any(len(set(each.tolist())) < len(each) for each in np.split(row, devices))
