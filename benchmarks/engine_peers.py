"""Every way to place experts, judged as an engine runs them: its kernels, its dispatch, its choice of replicas, the
batches that are solved for where nobody names any.

    pip install mtkahypar pymetis
    python -m benchmarks engine_peers --eplb eplb.py --vllm default.py --sglang deepseek.py deepseek_vec.py \
        --deepinfer policy.py --flashlb policy_flashlb.py --write

A cell is a cluster and a number of slots. Search solves with its defaults, on the training part; peers know routing
(partitioners, integer programs) or the loads of each of the same training steps (policies of engines), and of their
settings the one that is best on the steps judged on counts. Those that cannot make replicas are left out where there
are more slots than experts. Files of peers: see peers.py. Solving and judging never share a sequence (Qwen3: a token).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import recordings
from published import PEERS, Routing, window_policies
from published.published_eplb import published_eplb
from runner import Report, data_argument
from search_peers import PEER_TOKENS, plan_of

import moeplace as mp

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (("contiguous", {}), ("eplb", {}), ("exflow", {"form": "staged"}), ("exflow", {"form": "bisect"}))
SETTINGS += (("moetuner", {}),)
REPLICATE = ("contiguous", "eplb")
FITTED_TOKENS, JUDGED_TOKENS = 65_536, 65_536
"""Of the steps whose loads policies are given, and of those judged on, a batch."""
Policy = Callable[[npt.NDArray[np.float64], int, int], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Cell:
    """A recording's two parts on a cluster, with so many slots a layer."""

    name: str
    model: mp.ModelSpec
    train: mp.RoutingTrace
    held: mp.RoutingTrace
    preset: str
    nodes: int
    per_node: int
    slots: int

    @property
    def cluster(self) -> str:
        return f"{self.nodes} x {self.per_node} {self.preset}"

    def problem(self, engine: str | None) -> mp.Problem:
        topology = mp.Topology.preset(self.preset, self.nodes, self.per_node)
        statistics = mp.RoutingStatistics.from_trace(self.train)
        return mp.Problem(self.model, topology, statistics, slots=self.slots, engine=engine)


def cells(data: Path) -> Iterator[Cell]:
    """gpt-oss-20b with a slot an expert and with a quarter more, then two other recordings."""
    train, held = recordings.gpt_oss(data).split("sequence", 0.25, 0)
    layouts = [("h100-hgx", *shape) for shape in ((2, 4), (1, 8), (2, 2), (1, 4), (2, 8), (4, 4))]
    for preset, nodes, per_node in (*layouts, ("a100-pcie", 2, 4)):
        devices = nodes * per_node
        for slots in (32, -(-40 // devices) * devices):
            yield Cell("gpt-oss-20b", recordings.GPT_OSS, train, held, preset, nodes, per_node, slots)
    train, held = recordings.olmoe_small(ROOT).split("sequence", 0.25, 0)
    for slots in (32, 40):
        yield Cell("small OLMoE", recordings.OLMOE_SMALL, train, held, "a100-pcie", 2, 4, slots)
    train, held = recordings.qwen3_prefill(data).split("time", 0.5, 0)
    yield Cell("Qwen3-30B-A3B", recordings.QWEN3, train, held, "a100-pcie", 2, 4, 128)


def policies_of(options: argparse.Namespace) -> dict[str, Policy]:
    """Of loads [S, L, E], by name: those whose files are named."""
    found: dict[str, Policy] = {}
    if options.eplb:
        published = published_eplb(options.eplb)
        found["EPLB, published"] = lambda load, slots, devices: published(load.sum(axis=0), slots, 1, 1, devices)
    if options.vllm:
        vllm = window_policies.vllm(options.vllm)
        found["vLLM"] = lambda load, slots, devices: vllm(load.sum(axis=0), slots, devices)
    for file in options.sglang or ():
        found[f"SGLang {file.stem}"] = window_policies.sglang(file)
    if options.deepinfer:
        found["DeepInfer"] = window_policies.deepinfer(options.deepinfer)
    if options.flashlb:
        found["FlashLB"] = window_policies.flashlb(options.flashlb)
    return found


def peer_plans(cell: Cell, problem: mp.Problem, policies: dict[str, Policy], seconds: float) -> dict[str, mp.Plan]:
    """By name and setting. Policies' tables are judged with equal shares, as engines run them."""
    plans: dict[str, mp.Plan] = {}
    plain = cell.problem(None)
    for solver, arguments in SETTINGS:
        if problem.has_replicas and solver not in REPLICATE:
            continue
        try:
            plans[" ".join((solver, *arguments.values()))] = mp.solve(
                plain, solver, seconds=seconds, seed=0, **arguments
            )
        except (mp.SolveError, mp.UnsupportedError) as error:
            print(f"  {solver}: {error}", file=sys.stderr)
    loads = mp.problem_steps(cell.train, problem, most_tokens=FITTED_TOKENS, seed=0).loads().astype(np.float64)
    for name, policy in policies.items():
        table = policy(loads, problem.num_slots, problem.num_devices)
        plans[name] = mp.Plan(
            cell.model, problem.topology, table, problem.slot_device, provenance=mp.Provenance(name, "")
        )
    if not problem.has_replicas:
        routing = Routing(
            cell.train.expert_ids[:: max(1, cell.train.num_tokens // PEER_TOKENS)],
            cell.model.experts,
            problem.slots_per_device,
            problem.topology.node_of,
            seed=0,
        )
        for peer, partition in PEERS:
            for setting, device_of in partition(routing).items():
                plans[f"{peer} {setting}"] = plan_of(problem, device_of, peer)
    return plans


PERCENT = ("to best peer", "p99 to best peer")
COLUMNS = {
    "cluster": "",
    "slots": "",
    "contiguous ms": ".3f",
    "eplb": ".3f",
    "best engine policy": "",
    "its time": ".3f",
    "best other": "",
    "other's time": ".3f",
    "search": ".3f",
    **dict.fromkeys(PERCENT, "+.1%"),
    "contiguous, of the ideal": ".1%",
    "best peer, of the ideal": ".1%",
    "search, of the ideal": ".1%",
}


def row(cell: Cell, policies: dict[str, Policy], engine: str, seconds: float) -> list[object]:
    """A row of the table."""
    problem, begun = cell.problem(engine), time.perf_counter()
    plans = peer_plans(cell, problem, policies, seconds)
    search = mp.solve(problem, "search", seconds=seconds, seed=0)
    print(f"  {cell.name}, {cell.cluster}, {cell.slots}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    steps = mp.problem_steps(cell.held, problem, most_tokens=JUDGED_TOKENS, seed=1)
    judged = {name: mp.evaluate(plan, steps, problem) for name, plan in plans.items()}
    mine, base = mp.evaluate(search, steps, problem), judged["contiguous"].mean_seconds

    def best_of(names: list[str]) -> tuple[str, float | None]:
        if not names:
            return "-", None
        name = min(names, key=lambda name: judged[name].mean_seconds)
        return name, judged[name].mean_seconds / base

    of_engines = ["eplb", *policies]
    others = [name for name in plans if name not in ("contiguous", *of_engines)]
    best, _ = best_of(list(plans))
    gains = [
        1.0 - mine.summary()[figure] / judged[best].summary()[figure]
        for figure in ("step_seconds_mean", "step_seconds_p99")
    ]
    shares = [judged["contiguous"].ideal_share, judged[best].ideal_share, mine.ideal_share]
    values = [base * 1e3, judged["eplb"].mean_seconds / base, *best_of(of_engines), *best_of(others)]
    return [cell.cluster, cell.slots, *values, mine.mean_seconds / base, *gains, *shares]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    for name in ("eplb", "vllm", "deepinfer", "flashlb"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help="a peer's file")
    parser.add_argument("--sglang", type=Path, nargs="+", metavar="FILE", help="SGLang's deepseek.py, deepseek_vec.py")
    parser.add_argument("--engine", default="sglang")
    parser.add_argument("--seconds", type=float, default=15.0, help="time limit of each solve")
    parser.add_argument("--only", nargs="+", metavar="CELL", help="as '2x4,40': nodes, devices a node, slots")
    parser.add_argument("--rows", type=Path, help="keep finished cells here; they are not run again")


def run(options: argparse.Namespace, report: Report) -> None:
    import torch

    torch.set_num_threads(1)
    rows: dict[str, list[object]] = {}
    if options.rows is not None and options.rows.exists():
        rows = json.loads(options.rows.read_text())
    policies, mine = policies_of(options), list(COLUMNS).index(PERCENT[0])
    for cell in cells(options.data):
        shape = f"{cell.nodes}x{cell.per_node},{cell.slots}"
        key = f"{cell.name} {cell.preset} {shape}"
        if key not in rows and not (options.only and shape not in options.only):
            rows[key] = row(cell, policies, options.engine, options.seconds)
            if options.rows is not None:
                options.rows.write_text(json.dumps(rows))
        if key in rows:
            report.table(cell.name, tuple(COLUMNS), COLUMNS).row(*rows[key])
    won = sum(float(str(values[mine])) > 0 for values in rows.values())
    report.note("cells won", f"Search is below every peer in {won} of {len(rows)} cells.")
