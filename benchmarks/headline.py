"""What `solve --for sglang` gains with its defaults: the README's first table.

    python -m benchmarks headline --write

gpt-oss-20b on 2 x 4 H100 with recorded tokens, and DeepSeek-V3's shape on 4 x 8 with recorded loads and modelled tokens
(see deepseek_shape.py). Every plan of a model has the same slots and is judged on held-out sequences, at the two kinds
of steps that are solved for where nobody says which run; their mean is by the weights that were solved for.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import deepseek_shape
import recordings
from runner import Report, data_argument

import moeplace as mp
from moeplace.placement.kernels import kernel_fit

PAGE = "../../README"
ENGINE = "sglang"
JUDGED_TOKENS = 65_536
COLUMNS = {
    "model": "",
    "on": "",
    "expert times measured": "",
    "plan": "",
    "decode, 64 tokens a device: ms": ".2f",
    "prefill, 1,024: ms": ".2f",
    "both, to EPLB": ".3f",
    "of the ideal": ".1%",
}


@dataclass(frozen=True)
class Case:
    """A model, its cluster of H100s, and its routing, parted."""

    model: mp.ModelSpec
    nodes: int
    per_node: int
    slots: int
    train: mp.RoutingTrace
    held: mp.RoutingTrace

    def problem(self) -> mp.Problem:
        cluster = mp.Topology.preset("h100-hgx", self.nodes, self.per_node)
        statistics = mp.RoutingStatistics.from_trace(self.train)
        return mp.Problem(self.model, cluster, statistics, slots=self.slots, engine=ENGINE)


def cases(data: Path, only: str, tokens: int, kept: Path | None) -> Iterator[Case]:
    if only in recordings.GPT_OSS.name:
        yield Case(recordings.GPT_OSS, 2, 4, 40, *recordings.gpt_oss(data).split("sequence", 0.25, 0))
    if only not in deepseek_shape.MODEL.name:
        return
    if kept is not None and kept.exists():
        modelled = mp.read_trace(kept)
    else:
        modelled = deepseek_shape.modelled_trace(data, tokens)
        if kept is not None:
            mp.write_trace(modelled, kept, model=deepseek_shape.MODEL)
    yield Case(deepseek_shape.MODEL, 4, 8, 288, *modelled.split("sequence", 0.25, 0))


def measured(problem: mp.Problem) -> str:
    """Engine, GPU and dtype of the kernels that predict expert times: `sglang 0.5.14, h100-sxm, fp8`."""
    topology = problem.topology
    fits = {kernel_fit(gpu, topology.engine, problem.model, topology.num_devices) for gpu in topology.gpus}
    named = [f"{fit.engine} {fit.version}, {fit.gpu}" if fit else "a roofline" for fit in fits]
    return f"{' and '.join(named)}, {problem.model.expert_dtype}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--seconds", type=float, default=30.0, help="of a search; the command line's default")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--tokens", type=int, default=32_768, help="modelled ones of DeepSeek-V3")
    parser.add_argument("--trace", type=Path, help="keep the modelled trace here, or use it where it stands")


def run(options: argparse.Namespace, report: Report) -> None:
    table = report.table("headline", tuple(COLUMNS), COLUMNS)
    for case in cases(options.data, options.only, options.tokens, options.trace):
        problem = case.problem()
        steps = mp.problem_steps(case.held, problem, most_tokens=JUDGED_TOKENS, seed=1)
        plans = {name: mp.solve(problem, name) for name in ("contiguous", "eplb")}
        plans["search"] = mp.solve(problem, "search", seconds=options.seconds)
        figures = {name: mp.evaluate(plan, steps, problem) for name, plan in plans.items()}
        for name, evaluation in figures.items():
            by_kind = [part.mean_seconds * 1e3 for part in evaluation.by_batch().values()]
            to_eplb = evaluation.mean_seconds / figures["eplb"].mean_seconds
            on = f"{case.nodes} x {case.per_node} H100, {case.slots} slots"
            table.row(case.model.name, on, measured(problem), name, *by_kind, to_eplb, evaluation.ideal_share)
