"""Slots of layers under one budget of memory, against EPLB with the same redundancy in every layer.

    python -m benchmarks slot_budget --write

Tokens a second are those of a deployment whose KV cache bounds how many sequences run at once: what redundant experts
leave of the cache, over the time of a step, other work included; predicted, on steps that no plan was made on. EPLB has
one redundant expert a device in every layer, as engines are started.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import recordings
from runner import Report, data_argument

import moeplace as mp
from moeplace.placement.serving import other_work

COLUMNS = {
    "case": "",
    "plan": "",
    "slots a layer": "",
    "redundant experts": ",d",
    "of the cache": ".1%",
    "cache tokens": ",.0f",
    "step ms, MoE layers": ".3f",
    "tokens/s over EPLB": ".3f",
}
RESERVE = 25e9
"""Bytes a device for dense weights, buffers and activations."""


def cases(options: argparse.Namespace) -> Iterator[tuple[str, mp.Problem, mp.RoutingStatistics | mp.RoutingTrace]]:
    """(name, a problem without slots, held-out routing)."""
    train, held = recordings.gpt_oss(options.data).split()
    one = mp.Topology.preset("h100-sxm", engine="sglang").reserving(RESERVE)
    counts = np.load(options.data / "deepseek_v3_counts.npz", allow_pickle=False)
    layers = np.flatnonzero(counts[counts.files[0]].sum(axis=1))
    left_out = "prefill_in2000out100"
    known = {name: counts[name][layers] for name in counts.files if name != left_out}
    unseen = mp.RoutingStatistics.from_counts({left_out: counts[left_out][layers]}, top_k=8)
    deepseek = mp.ModelSpec(
        layers=len(layers), experts=256, top_k=8, hidden_size=7168, ffn_size=2048, groups=8, expert_dtype="fp8"
    )
    four = mp.Topology.preset("h100-sxm", nodes=4, engine="sglang").reserving(RESERVE)
    for batch in (mp.Batch("decode", tokens_per_device=128), mp.Batch("prefill", tokens_per_device=4096)):
        statistics = mp.RoutingStatistics.from_trace(train)
        yield f"gpt-oss-20b, 8, {batch.text}", mp.Problem(recordings.GPT_OSS, one, statistics, batches=batch), held
        fitted = mp.RoutingStatistics.from_counts(known, top_k=8)
        yield f"DeepSeek-V3, 32, {batch.text}", mp.Problem(deepseek, four, fitted, batches=batch), unseen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--proposals", type=int, default=1000, help="of search, a layer")


def run(options: argparse.Namespace, report: Report) -> None:
    table = report.table("tokens a second", COLUMNS, COLUMNS)
    search = {"proposals": options.proposals}
    for name, problem, held in cases(options):
        front = mp.slot_front(problem, options=search)
        experts, devices = problem.model.experts, problem.num_devices
        usual = mp.Problem(
            problem.model,
            problem.topology,
            problem.statistics,
            problem.objective,
            slots=experts + devices,
            batches=problem.batches,
        )
        best, even = (front.problem_with(point) for point in (front.recommended, front.recommended_even))
        steps = mp.problem_steps(held, problem, most_tokens=65_536)
        known = other_work(problem.model, problem.topology, problem.batches)
        other = 0.0 if known is None else known.ms[problem.batches[0].phase] / 1e3
        plans = {
            "EPLB, one a device": mp.solve(usual, "eplb"),
            "search, one a device": mp.solve(usual, "search", **search),
            "search, slots=auto, one number": mp.solve(even, "search", **search),
            "search, slots=auto": mp.solve(best, "search", **search),
        }
        rates: dict[str, float] = {}
        for label, plan in plans.items():
            judged = mp.evaluate(plan, steps, problem)
            taken = float((plan.device_memory - problem.device_memory).max())
            lost = taken / front.cache_bytes
            rates[label] = (1.0 - lost) / (judged.mean_seconds + other)
            slots = plan.filled.sum(axis=1)
            table.row(
                name,
                label,
                f"{slots.min()}" if slots.min() == slots.max() else f"{slots.min()} to {slots.max()}",
                int(plan.filled.sum()) - experts * problem.model.layers,
                lost,
                None if front.token_bytes is None else taken * devices / front.token_bytes,
                judged.mean_seconds * 1e3,
                rates[label] / rates["EPLB, one a device"],
            )
