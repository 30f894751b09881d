"""Replicas by the step: what plans are worth whose replicas divide each step's tokens anew, beside fixed shares.

    python -m benchmarks balanced_steps --write [--parts gpt_oss deepseek figure]

gpt_oss: gpt-oss-20b on one node of eight H100, 40 slots, a quarter of the sequences held out, source ranks in equal
runs, expert time from SGLang's measured kernels. Search solves for fixed shares, for nearest replicas, for balanced
ones (predicted step time), and for balanced ones on the loads of the training part's decode and prefill steps together
(load alone). Each plan is judged by rules that could run it.
deepseek: one plan for four of DeepSeek-V3's workloads, judged on the fifth with replicas divided.
figure: 200 decode steps one after the other, into docs/results/balanced_steps.svg; needs matplotlib.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import recordings
from load_balance import CLUSTERS, deepseek, scaled
from runner import PAGES, Report, data_argument

import moeplace as mp
from moeplace.placement.bounds import window_balance

SLOTS = 40
KINDS = (("decode", 128), ("prefill", 4096))
RULES: dict[str, dict[str, Any]] = {
    "share": {},
    "nearest": {"replica_choice": "nearest"},
    "balanced": {"replica_choice": "balanced"},
    "balanced, lp": {"replica_choice": "balanced", "division": "lp"},
    "balanced, waterfill": {"replica_choice": "balanced", "division": "waterfill"},
}
PARTS = ("gpt_oss", "deepseek", "figure")
FIGURE = PAGES / "balanced_steps.svg"
DRAWN_TOKENS = 2048
"""Of the figure's steps; sequences repeat in them."""


def problem_of(statistics: mp.RoutingStatistics, rule: str = "share", **objective: Any) -> mp.Problem:
    cluster = mp.Topology.preset("h100-hgx", nodes=1, engine="sglang")
    return mp.Problem(recordings.GPT_OSS, cluster, statistics, mp.Objective(**RULES[rule], **objective), slots=SLOTS)


def with_ranks(steps: mp.Steps) -> mp.Steps:
    """Equal runs of each step's tokens on the eight ranks."""
    return replace(steps, source=np.concatenate([np.arange(tokens) * 8 // tokens for tokens in steps.tokens]))


def steps_of(trace: mp.RoutingTrace, kind: str, tokens: int, steps: int) -> mp.Steps:
    return trace.decode_steps(tokens, steps) if kind == "decode" else trace.prefill_steps(tokens)


def level_plan(train: mp.RoutingTrace, proposals: int) -> mp.Plan:
    """Of load alone: windows are the training part's own steps, as many tokens of either kind."""
    loads = [steps_of(train, kind, tokens, 64).loads() for kind, tokens in KINDS]
    weighed = [load.repeat(max(1, round(64 / len(load))), axis=0) for load in loads]
    # A window counts by its tokens: both kinds alike.
    even = [load / load.sum(axis=2, keepdims=True) for load in weighed]
    statistics = mp.RoutingStatistics.from_counts(np.round(np.concatenate(even) * 2**16))
    return mp.solve(problem_of(statistics, "balanced"), "search", proposals=proposals)


JUDGED_BY: dict[str, tuple[str, ...]] = {
    "contiguous, 32 slots": ("share",),
    "eplb": tuple(RULES),
    "search for shares": ("share", "balanced"),
    "search for nearest": ("nearest", "balanced"),
    "search for balanced": ("nearest", "balanced", "balanced, lp"),
    "search for balanced, load alone": tuple(RULES),
}


def solved(name: str, statistics: mp.RoutingStatistics, kind: str, tokens: int, proposals: int) -> mp.Plan:
    """A plan of those named in `JUDGED_BY`, but for the one of load alone."""
    options: dict[str, Any] = {"batch": kind, "step_tokens": tokens, "proposals": proposals}
    if name == "contiguous, 32 slots":
        plain = mp.Problem(recordings.GPT_OSS, problem_of(statistics).topology, statistics)
        return mp.solve(plain, "contiguous")
    if name == "eplb":
        return mp.solve(problem_of(statistics), "eplb")
    if name == "search for shares":
        return mp.solve(problem_of(statistics, split="free"), "search", **options)
    rule = name.removeprefix("search for ")
    return mp.solve(problem_of(statistics, rule), "search", **options)


GPT_OSS_COLUMNS = {
    "plan": "",
    "replicas": "",
    "load max/mean": ".4f",
    "step ms mean": ".3f",
    "p99": ".3f",
    "of the ideal": ".1%",
    "copies that leave": ".4f",
    "to nearest": "+.1%",
}


def gpt_oss(report: Report, data: Path, proposals: int, level_proposals: int) -> None:
    train, held = recordings.gpt_oss(data).split()
    statistics = mp.RoutingStatistics.from_trace(train)
    level = level_plan(train, level_proposals)
    for kind, tokens in KINDS:
        steps = with_ranks(steps_of(held, kind, tokens, 60))
        table = report.table(f"gpt-oss-20b, {kind} {tokens}", GPT_OSS_COLUMNS, GPT_OSS_COLUMNS)
        for name, rules in JUDGED_BY.items():
            alone = name == "search for balanced, load alone"
            plan = level if alone else solved(name, statistics, kind, tokens, proposals)
            judged = {rule: mp.evaluate(plan, steps, problem_of(statistics, rule)).summary() for rule in rules}
            for rule, figures in judged.items():
                near = judged.get("nearest")
                table.row(
                    name,
                    rule,
                    figures["load_max_mean"],
                    figures["step_seconds_mean"] * 1e3,
                    figures["step_seconds_p99"] * 1e3,
                    figures["ideal_share"],
                    figures["cross_device_fraction"],
                    None if near is None else figures["cross_device_fraction"] / near["cross_device_fraction"] - 1,
                )


def left_out(report: Report, data: Path, clusters: list[int], layers: int | None, proposals: int) -> None:
    arrays = np.load(data / "deepseek_v3_counts.npz", allow_pickle=False)
    workloads = {
        name: scaled(arrays[name][arrays[name].sum(axis=1) > 0][:layers].astype(np.float64)) for name in arrays.files
    }
    divided = mp.Objective(**RULES["balanced"])
    solvers = {"eplb": "share", "search for shares": "share", "search for balanced": "balanced"}
    columns = {"left out": "", **dict.fromkeys(solvers, ".4f"), "solve s": ".0f"}
    for slots, nodes in CLUSTERS:
        if slots not in clusters:
            continue
        table = report.table(
            f"DeepSeek-V3, {slots} slots on {8 * nodes} devices, one workload left out", columns, columns
        )
        rows = []
        for out, load in workloads.items():
            rest = {name: other for name, other in workloads.items() if name != out}
            figures, spent = [], 0.0
            for name, rule in solvers.items():
                problem = deepseek(rest, slots, nodes, **RULES[rule])
                began = time.perf_counter()
                # Of as many seconds each: proposals on shares take a sixteenth of those that divide.
                effort = {} if name == "eplb" else {"proposals": proposals * (1 if rule == "balanced" else 16)}
                plan = mp.solve(problem, "search" if effort else "eplb", **effort)
                spent = time.perf_counter() - began
                figures.append(window_balance(plan, load[None], divided))
            rows.append(figures)
            table.row(out, *figures, spent)
        table.row("mean", *np.mean(rows, axis=0), None)


def figure(data: Path, proposals: int) -> None:
    """Predicted time of 200 held-out decode steps in order, under four plans, and the ideal."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moeplace"
    from matplotlib import pyplot as plt

    train, held = recordings.gpt_oss(data).split()
    statistics = mp.RoutingStatistics.from_trace(train)
    steps = with_ranks(held.decode_steps(DRAWN_TOKENS, 200))
    lines = {
        "contiguous": ("contiguous, 32 slots", "share"),
        "EPLB": ("eplb", "share"),
        "search with shares": ("search for shares", "share"),
        "search balanced": ("search for balanced", "balanced"),
    }
    drawing, axes = plt.subplots(figsize=(9.6, 3.6))
    judged: Any = None
    for label, (name, rule) in lines.items():
        plan = solved(name, statistics, "decode", DRAWN_TOKENS, proposals)
        judged = mp.evaluate(plan, steps, problem_of(statistics, rule))
        axes.plot(judged.step_seconds * 1e3, linewidth=1, label=f"{label}: {judged.step_seconds.mean() * 1e3:.2f} ms")
    axes.plot(judged.ideal * 1e3, linewidth=1, color="black", label=f"ideal: {judged.ideal.mean() * 1e3:.2f} ms")
    axes.set_xlabel(f"held-out decode steps of {DRAWN_TOKENS} tokens, one after the other")
    axes.set_ylabel("predicted ms of all MoE layers")
    axes.legend(fontsize=8, ncols=2)
    drawing.savefig(FIGURE, format="svg", metadata={"Date": None}, facecolor="white", bbox_inches="tight")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--proposals", type=int, default=2000, help="of search on steps, a layer")
    parser.add_argument("--level-proposals", type=int, default=6000, help="of search on loads, a layer")
    parser.add_argument("--left-out-proposals", type=int, default=3000, help="of search for DeepSeek-V3, a layer")
    parser.add_argument("--layers", type=int, help="of DeepSeek-V3's, the first so many")
    parser.add_argument("--slots", type=int, nargs="+", default=[288, 320], help="of DeepSeek-V3's clusters")


def run(options: argparse.Namespace, report: Report) -> None:
    if "gpt_oss" in options.parts:
        gpt_oss(report, options.data, options.proposals, options.level_proposals)
    if "deepseek" in options.parts:
        left_out(report, options.data, options.slots, options.layers, options.left_out_proposals)
    if "figure" in options.parts:
        figure(options.data, options.proposals)
