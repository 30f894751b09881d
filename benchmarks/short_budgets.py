"""What search answers after a fraction of a second to several, against its start, EPLB and DeepInfer, held out.

    python -m benchmarks short_budgets --deepinfer policy.py

Counts: windows of steps as `peers` has them, fitted to one window and judged on another. Tokens: recorded sequences of
gpt-oss-20b, a quarter of them held out, prefill steps and decode steps. Seconds are those of processors, of all threads
together, so that other work on the machine takes none of them: search's limit counts them, too. DeepInfer's policy is a
file of its sdist (deepinfer/model_executor/eplb/policy.py), fetched by whoever runs this; without it its column is
empty.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import recordings
from peers import DEVICES, balance, window_cases
from published import window_policies
from runner import Report, data_argument

import moeplace as mp
from moeplace.solvers import base
from moeplace.solvers.eplb import rebalance

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SECONDS = (0.2, 0.5, 1.0, 2.0, 7.0)
SLOTS = 40
BATCHES = (("prefill", 4096), ("decode", 512), ("decode", 128))
"""Steps that tokens are judged on: tokens of all devices together."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--seconds", type=float, nargs="+", default=SECONDS, help="time limits")
    parser.add_argument("--only", choices=("counts", "tokens"), action="append", help="parts to run (default: all)")
    parser.add_argument("--deepinfer", type=Path, metavar="FILE", help="DeepInfer's policy")


def run(options: argparse.Namespace, report: Report) -> None:
    # Limits of seconds count processor time.
    base.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[attr-defined]
    policy = None
    if options.deepinfer:
        import torch

        torch.set_num_threads(1)
        policy = window_policies.deepinfer(options.deepinfer)
    parts = options.only or ("counts", "tokens")
    if "counts" in parts:
        counts(report, options, policy)
    if "tokens" in parts:
        tokens(report, options, policy)


def counts(report: Report, options: argparse.Namespace, policy: window_policies.WindowPolicy | None) -> None:
    table = report.table("Counts: load max/mean", *_columns("window", options.seconds, ".4f"))
    for name, window, held, slots, devices in window_cases(options.data):
        problem = window_problem(window, slots, devices)
        row(
            table,
            f"{name}, {slots} on {devices}",
            problem,
            options.seconds,
            lambda made, held=held, devices=devices: balance(held, made, devices),
            rebalance(window.mean(axis=0), slots, 1, 1, devices),
            None if policy is None else timed(policy, window, slots, devices),
        )


def window_problem(window: Array, slots: int, devices: int) -> mp.Problem:
    """Of counts [S, L, E]."""
    layers, experts = window.shape[1:]
    model = mp.ModelSpec(layers=layers, experts=experts, top_k=4, hidden_size=2880, ffn_size=2880)
    cluster = mp.Topology.preset("h200-hgx", nodes=max(1, devices // 8))
    return mp.Problem(model, cluster, mp.RoutingStatistics.from_counts(window), slots=slots)


def tokens(report: Report, options: argparse.Namespace, policy: window_policies.WindowPolicy | None) -> None:
    table = report.table("Tokens: step time over EPLB's", *_columns("steps", options.seconds, ".4f"))
    train, held = recordings.gpt_oss(options.data).split()
    cluster = mp.Topology.preset("h100-hgx")
    for phase, size in BATCHES:
        batches = [mp.Batch(phase, tokens=size)]
        problem = mp.Problem(recordings.GPT_OSS, cluster, train, slots=SLOTS, batches=batches)
        steps = train.prefill_steps(size) if phase == "prefill" else train.decode_steps(size, 100)
        window = steps.loads().astype(float)
        eplb = mp.solve(problem, "eplb")
        base = mp.evaluate(eplb, held, problem).step_seconds.mean()

        def judged(made: IntArray, problem: mp.Problem = problem, eplb: mp.Plan = eplb, base: float = base) -> float:
            plan = mp.Plan(eplb.model, eplb.topology, made, eplb.slot_device)
            return float(mp.evaluate(plan, held, problem).step_seconds.mean() / base)

        peer = None if policy is None else timed(policy, window, SLOTS, DEVICES)
        row(table, f"gpt-oss-20b, {phase} {size}", problem, options.seconds, judged, eplb.physical_to_logical, peer)


def row(
    table: Any,
    name: str,
    problem: mp.Problem,
    limits: tuple[float, ...],
    judged: Callable[[IntArray], float],
    eplb: IntArray,
    peer: tuple[IntArray, float] | None,
) -> None:
    """Adds a line of figures and one of seconds taken."""
    mp.solve(problem, "search", proposals=12)
    figures: list[Any] = [judged(eplb)]
    taken: list[Any] = [None]
    figures += [None] if peer is None else [judged(peer[0])]
    taken += [None] if peer is None else [peer[1]]
    for limit in (None, *limits):
        begin = time.process_time()
        # A single proposal a round: what search starts from.
        plan = mp.solve(problem, "search", proposals=1) if limit is None else mp.solve(problem, "search", seconds=limit)
        taken.append(time.process_time() - begin)
        figures.append(judged(plan.physical_to_logical))
    table.row(name, "held out", *figures)
    table.row("", "seconds taken", *(None if each is None else f"{each:.2f}" for each in taken))


def timed(policy: window_policies.WindowPolicy, window: Array, slots: int, devices: int) -> tuple[IntArray, float]:
    policy(window[:2], slots, devices)
    begin = time.process_time()
    made = policy(window, slots, devices)
    return made, time.process_time() - begin


def _columns(what: str, limits: tuple[float, ...], digits: str) -> tuple[list[str], dict[str, str]]:
    figures = ["EPLB", "DeepInfer", "search's start", *(f"{limit:g} s" for limit in limits)]
    return [what, "", *figures], dict.fromkeys(figures, digits)
