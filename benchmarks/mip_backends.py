"""Backends of integer programs side by side, and what building a large program costs.

    python -m benchmarks mip_backends --seconds 10

Every backend gets the same programs, the same greedy start or assignment sweeps, and the same wall clock. Programs:
MoETuner's first (clusters of even load) on the loads of recorded models, one layer each, with 128 and 256 experts of
DeepSeek-V3's shape where those are to be had and drawn ones where not; its second (clusters to devices) on OLMoE's
transitions; ExFlow's on the 16 busiest experts a layer of OLMoE and on a model of Mixtral's shape (see mixtral_ilp.py),
where chain proves the optimum. Values: percent of a layer's load for clusters, share of transitions that cross devices
for ExFlow, seconds a million tokens for mapping. Bounds are those of the program alone, without what solvers know
beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mixtral_ilp import DOMAINS, recorded_transitions, transitions_of_a_whole_model
from runner import Report, child, data_argument

import moeplace as mp
from moeplace.solvers.base import Budget
from moeplace.solvers.exflow import assignment_sweeps, divide, exflow_program, local_weight
from moeplace.solvers.mip.program import BACKENDS
from moeplace.solvers.moetuner import MappingTask, cluster_layer, map_clusters, pair_cost

FloatArray = npt.NDArray[np.float64]
Case = Callable[[str, float, int], tuple[float, float, str]]


def clusters(load: FloatArray, devices: int) -> Case:
    sizes, targets = np.full(devices, len(load) // devices), np.full(devices, load.sum() / devices)

    def run(backend: str, seconds: float, seed: int) -> tuple[float, float, str]:
        found = cluster_layer(load, sizes, targets, Budget(seed=seed), backend=backend, seconds=seconds)
        return 100 * found.deviation / load.sum(), 100 * found.bound / load.sum(), found.stop

    return run


def crossings(transitions: FloatArray, devices: int) -> Case:
    slots, total = np.full(devices, transitions.shape[1] // devices), transitions.sum()

    def run(backend: str, seconds: float, seed: int) -> tuple[float, float, str]:
        budget = Budget(seed=seed)
        start = assignment_sweeps(transitions, slots, budget)
        placed, bound, stop = divide(transitions, slots, budget, backend, seconds, start)
        return 1 - local_weight(transitions, placed) / total, bound, stop

    return run


def mapping(transitions: FloatArray, devices: int, layers: int) -> Case:
    """Clusters of experts in index order, on two nodes."""
    size = transitions.shape[1] // devices
    flows = transitions.reshape(-1, devices, size, devices, size).sum(axis=(2, 4))
    topology = mp.Topology.preset("h100-hgx", nodes=2, devices_per_node=devices // 2)
    traffic = 4096e6 * np.resize(flows / flows.sum(axis=(1, 2), keepdims=True), (layers - 1, devices, devices))
    task = MappingTask(traffic, pair_cost(topology), np.zeros(devices, np.int64), topology.node_of)

    def run(backend: str, seconds: float, seed: int) -> tuple[float, float, str]:
        found = map_clusters(task, Budget(seconds=seconds, seed=seed), method="ilp", backend=backend)
        return found.seconds, found.bound, found.stop

    return run


def cases(data: Path, seed: int) -> dict[str, Case]:
    recorded = {name: recorded_transitions(data, name, top1=True) for name in ("olmoe_1b_7b", "mixtral_8x7b")}
    counts = np.load(data / "olmoe_mixtral_counts.npz", allow_pickle=False)
    olmoe = recorded["olmoe_1b_7b"].sum(axis=0)
    load = counts[f"olmoe_1b_7b/{DOMAINS[0]}/load"][1].astype(np.float64)
    arriving = [olmoe[0].sum(axis=1), olmoe[0].sum(axis=0) + olmoe[1].sum(axis=1), olmoe[1].sum(axis=0)]
    busiest = [np.argsort(-weights)[:16] for weights in arriving]
    few = np.stack([w[np.ix_(a, b)] for w, a, b in zip(olmoe, busiest, busiest[1:], strict=False)])
    mixtral = transitions_of_a_whole_model(recorded["mixtral_8x7b"], seed)
    rng = np.random.default_rng(seed)
    drawn = {experts: np.floor(1e4 * rng.gamma(0.6, size=experts)) for experts in (128, 256)}
    return {
        "clusters, 32 experts on 8": clusters(load[:32], 8),
        "clusters, 64 experts on 8": clusters(load, 8),
        "clusters, 128 experts on 8": clusters(drawn[128], 8),
        "clusters, 256 experts on 16": clusters(drawn[256], 16),
        "mapping, 8 clusters on 2 nodes": mapping(olmoe, 8, 4),
        "exflow, OLMoE, 16 experts on 4": crossings(few, 4),
        "exflow, Mixtral's shape on 2": crossings(mixtral, 2),
        "exflow, Mixtral's shape on 4": crossings(mixtral, 4),
    }


def peak_mib() -> float:
    """This process's own peak, which getrusage mixes with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def built(experts: int, devices: int, layers: int) -> list[Any]:
    """Builds ExFlow's program of dense transitions; the row of the table."""
    from moeplace.solvers.mip import highs

    transitions = np.random.default_rng(0).random((layers - 1, experts, experts)) + 0.01
    before, began = peak_mib(), time.perf_counter()
    program = exflow_program(transitions, np.full(devices, experts // devices)).program
    seconds, peak = time.perf_counter() - began, peak_mib()
    began = time.perf_counter()
    highs.hand_over(highs.QuietHighs(), program)
    handed = time.perf_counter() - began
    label = f"{layers} layers of {experts} experts on {devices}"
    return [label, program.variables, program.rows, seconds, handed, before, peak, peak_mib()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--seconds", type=float, default=10.0, help="time limit of each solve")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--seed", type=int, default=0, help="of drawn loads, made transitions and backends")
    parser.add_argument("--build", type=int, nargs=3, metavar=("EXPERTS", "DEVICES", "LAYERS"), help=argparse.SUPPRESS)


def run(options: argparse.Namespace, report: Report) -> None:
    if options.build:
        print(json.dumps(built(*options.build)))
        return
    columns = ("program", "backend", "value", "bound", "seconds", "stopped")
    table = report.table("backends", columns, {"value": ".5g", "bound": ".5g", "seconds": ".1f"})
    for name, case in cases(options.data, options.seed).items():
        for backend in options.backends:
            began = time.perf_counter()
            value, bound, stop = case(backend, options.seconds, options.seed)
            table.row(name, backend, value, bound, time.perf_counter() - began, stop)
    formats = {"variables": ",", "rows": ",", "built, s": ".2f", "handed to HiGHS, s": ".2f"}
    formats |= dict.fromkeys(("MiB before", "built", "handed"), ".0f")
    sizes = report.table("building ExFlow's program", ("program", *formats), formats)
    for experts in (64, 128):
        # A process of its own, for its peak of memory.
        done = child("mip_backends", "--data", options.data, "--build", experts, 8, 16)
        if done.returncode:
            raise SystemExit(done.stderr)
        sizes.row(*json.loads(done.stdout))
