"""Time and peak memory of aggregating a Parquet trace of DeepSeek-V3's shape: 58 layers, top-8 of 256 experts.

    python -m benchmarks aggregation --tokens 1000000

The trace is made by resampling real routing. Rows come from a recorded prefill batch of Qwen3-30B-A3B (48 layers, top-8
of 128 experts): a sequence is a run of neighbouring rows, layer l takes Qwen's layer at the same depth, so who goes with
whom, in a layer and across layers, is real. Expert ids come from the loads DeepSeek-V3 had under two serving workloads:
in each layer the experts of both models are laid out by load along the unit interval, each as wide as its share; a
choice of a Qwen expert draws a point of its interval, and the DeepSeek expert there is chosen. Loads then follow
DeepSeek's, whose experts, being narrower, split Qwen's. A token's choice that falls on an expert it already has is
drawn again, and after eight draws replaced by a random other expert; the distance from DeepSeek's loads that this leaves
is printed.

Aggregation runs in a fresh process. Memory is sampled over that process and its workers every 20 ms: PSS (shared pages
counted once) and RSS, each summed over the processes. CPU seconds are user + system of all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from runner import Report, data_argument

from moeplace.profiler.trace_files import TraceWriter

LAYERS, EXPERTS, TOP_K, BLOCK = 58, 256, 8, 8192
WORKLOADS = {"decode": "decode_in1000out1000", "prefill": "prefill_in4096"}

CHILD = """
import json, sys, time
from moeplace.profiler.aggregate import aggregate
start = time.perf_counter()
statistics = aggregate(sys.argv[1], workers=int(sys.argv[2]) or None)
print(json.dumps({"seconds": time.perf_counter() - start, "tokens": statistics.tokens, "windows": len(statistics.load),
                  "sample_tokens": statistics.sample.num_tokens, "fingerprint": statistics.fingerprint}))
"""


class Resampler:
    """Draws tokens of one workload; see the module's description."""

    def __init__(self, rows: npt.NDArray[np.uint8], counts: npt.NDArray[np.int64], seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._rows = rows
        self._depth = np.round(np.linspace(0, rows.shape[1] - 1, LAYERS)).astype(int)
        self._low, self._width, self._ends, self._order = [], [], [], []
        for layer in range(LAYERS):
            share = np.bincount(rows[:, self._depth[layer]].ravel(), minlength=128) / rows[:, 0].size
            by_load = np.argsort(-share, kind="stable")
            low = np.empty(128)
            low[by_load] = np.cumsum(share[by_load]) - share[by_load]
            order = np.argsort(-counts[layer], kind="stable")
            self._low.append(low)
            self._width.append(share)
            self._order.append(order.astype(np.uint8))
            self._ends.append(np.cumsum(counts[layer][order]) / counts[layer].sum())

    def draw(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """[n, LAYERS, TOP_K] ids for these rows of the recorded batch."""
        ids = np.empty((len(tokens), LAYERS, TOP_K), np.uint8)
        for layer in range(LAYERS):
            chosen = self._rows[tokens, self._depth[layer]]
            drawn = self._points(layer, chosen)
            for attempt in range(9):
                again = _repeats(drawn)
                if not again.any():
                    break
                if attempt < 8:
                    drawn[again] = self._points(layer, chosen[again])
                else:
                    for t, j in np.argwhere(again):
                        drawn[t, j] = self._rng.choice(np.setdiff1d(np.arange(EXPERTS), drawn[t]))
            ids[:, layer] = drawn
        return ids

    def _points(self, layer: int, chosen: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        point = self._low[layer][chosen] + self._width[layer][chosen] * self._rng.random(chosen.shape)
        return self._order[layer][np.minimum(np.searchsorted(self._ends[layer], point), EXPERTS - 1)]


def _repeats(ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Marks each choice that an earlier one of its token already took."""
    repeats = np.zeros(ids.shape, bool)
    for j in range(1, TOP_K):
        repeats[:, j] = (ids[:, :j] == ids[:, j : j + 1]).any(axis=1)
    return repeats


def make_trace(folder: Path, data: Path, tokens: int) -> float:
    """Writes the trace; returns the mean total-variation distance between its loads and DeepSeek's."""
    rows = np.load(data / "qwen3_30b_prefill.npz", allow_pickle=False)["expert_ids"]
    recorded = np.load(data / "deepseek_v3_counts.npz", allow_pickle=False)
    rng = np.random.default_rng(0)
    distance, sequence, step = [], 0, 0
    with TraceWriter(folder, num_experts=EXPERTS, top_k=TOP_K, moe_layers=range(3, 61), gate_weights=False) as writer:
        for number, (workload, key) in enumerate(WORKLOADS.items()):
            counts = recorded[key][3:]
            resampler = Resampler(rows, counts, seed=number)
            load = np.zeros((LAYERS, EXPERTS))
            left = tokens // len(WORKLOADS) + (tokens % len(WORKLOADS) if number == 0 else 0)
            while left:
                take = min(left, BLOCK)
                starts = rng.integers(0, len(rows) - 512, size=-(-take // 512))
                chosen = (starts[:, None] + np.arange(512)).ravel()[:take]
                ids = resampler.draw(chosen)
                writer.add(
                    ids,
                    sequence=sequence + np.arange(take) // 512,
                    position=np.arange(take) % 512,
                    step=step,
                    workload=workload,
                )
                index = ids + np.arange(LAYERS)[:, None] * EXPERTS
                load += np.bincount(index.ravel(), minlength=LAYERS * EXPERTS).reshape(LAYERS, EXPERTS)
                left, sequence, step = left - take, sequence + len(starts), step + 1
                if sys.stderr.isatty():
                    print(f"\rmaking the trace: {workload}, {left:,} tokens to go   ", end="", file=sys.stderr)
            if load.sum():
                shares = load / load.sum(axis=1, keepdims=True), counts / counts.sum(axis=1, keepdims=True)
                distance.append(0.5 * float(np.abs(shares[0] - shares[1]).sum(axis=1).mean()))
    return float(np.mean(distance))


def measure(folder: Path, workers: int) -> dict[str, Any]:
    """Aggregates in a fresh process and watches it."""
    command = [sys.executable, "-c", CHILD, str(folder), str(workers)]
    start = time.perf_counter()
    peak = {"pss": 0, "rss": 0}
    cpu: dict[int, float] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        root = psutil.Process(child.pid)
        while child.poll() is None:
            totals = {"pss": 0, "rss": 0}
            for process in _family(root):
                try:
                    memory, times = process.memory_full_info(), process.cpu_times()
                except psutil.Error:
                    continue
                totals["pss"] += memory.pss
                totals["rss"] += memory.rss
                cpu[process.pid] = times.user + times.system
            peak = {name: max(peak[name], value) for name, value in totals.items()}
            time.sleep(0.02)
        assert child.stdout is not None
        answer = child.stdout.read()
    if child.returncode:
        raise SystemExit(f"aggregation ended with status {child.returncode}")
    result: dict[str, Any] = json.loads(answer)
    result["process_seconds"] = time.perf_counter() - start
    result["cpu_seconds"] = sum(cpu.values())
    result["peak_pss_mb"], result["peak_rss_mb"] = peak["pss"] / 1e6, peak["rss"] / 1e6
    return result


def _family(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=0, help="processes (0: one a core)")
    parser.add_argument("--trace", type=Path, help="keep the trace in this folder, or use the one already there")


def run(options: argparse.Namespace, report: Report) -> None:
    if options.tokens < 2:
        raise SystemExit(f"--tokens {options.tokens}: expected at least 2")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.trace or Path(scratch) / "trace"
        distance = None if folder.is_dir() else make_trace(folder, options.data, options.tokens)
        size = sum(file.stat().st_size for file in folder.glob("*.parquet"))
        result = measure(folder, options.workers)
    result |= {
        "load_distance": distance,
        "file_mb": size / 1e6,
        "tokens_per_second": result["tokens"] / result["seconds"],
        "mb_per_second": size / 1e6 / result["seconds"],
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
    }
    table = report.table("aggregation", ("figure", "value"))
    for name, value in result.items():
        table.row(name, value)
