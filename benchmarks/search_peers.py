"""Every way to place experts on every token-level recording, judged on held-out steps.

    pip install mtkahypar pymetis
    git clone https://github.com/deepseek-ai/EPLB
    python -m benchmarks search_peers --eplb EPLB/eplb.py --write

A cell is a cluster, an execution mode and a kind of step. Peers know only routing, so that each solves once a cluster
and mode; of its settings the one that is best on the steps judged on counts. Search minimises the cell's step time on
steps drawn from the training part. Solving and judging never share a sequence (Qwen3: a token).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import recordings
from published import PEERS, Routing
from published.published_eplb import published_eplb
from runner import Report, data_argument

import moeplace as mp

IntArray = npt.NDArray[np.int64]
ROOT = Path(__file__).resolve().parents[1]
EXECUTIONS = ("dispatch_combine", "context_coherent")
PEER_TOKENS = 4096
"""Tokens whose hyperedges partitioners are given: METIS and Mt-KaHyPar settle long before."""


@dataclass(frozen=True)
class Kind:
    """A kind of step: its name, and what search is told of it."""

    name: str
    batch: str
    tokens: int
    steps: int

    def draw(self, trace: mp.RoutingTrace, seed: int) -> mp.Steps:
        if self.batch == "decode":
            return trace.decode_steps(self.tokens, self.steps, seed)
        return trace.prefill_steps(self.tokens, self.steps, seed)


DECODE_128 = Kind("decode 128", "decode", 128, 100)
DECODE_512 = Kind("decode 512", "decode", 512, 40)
PREFILL = Kind("prefill 4096", "prefill", 4096, 24)
PREFILL_512 = Kind("prefill 512", "prefill", 512, 24)


@dataclass(frozen=True)
class Input:
    """A recording and the cells it is used for. layouts: (preset, nodes, devices a node)."""

    name: str
    model: mp.ModelSpec
    train: mp.RoutingTrace
    held: mp.RoutingTrace
    layouts: tuple[tuple[str, int, int], ...]
    kinds: tuple[Kind, ...]


def inputs(data: Path) -> Iterator[Input]:
    fast, slow = "h100-hgx", "a100-pcie"
    train, held = recordings.gpt_oss(data).split("sequence", 0.25, 0)
    layouts = tuple((fast, n, g) for n, g in ((2, 4), (1, 8), (2, 2), (1, 4), (2, 8), (4, 4)))
    yield Input(
        "gpt-oss-20b",
        recordings.GPT_OSS,
        train,
        held,
        (*layouts, (slow, 2, 4)),
        (DECODE_128, DECODE_512, PREFILL),
    )
    train, held = recordings.olmoe_small(ROOT).split("sequence", 0.25, 0)
    yield Input("small OLMoE", recordings.OLMOE_SMALL, train, held, ((slow, 2, 4),), (DECODE_512, PREFILL))
    train, held = recordings.qwen3_prefill(data).split("time", 0.5, 0)
    yield Input("Qwen3-30B-A3B", recordings.QWEN3, train, held, ((slow, 2, 4),), (PREFILL_512,))


def plan_of(problem: mp.Problem, device_of: IntArray, name: str) -> mp.Plan:
    """A peer's device_of [L, E] as a plan."""
    return mp.Plan(
        problem.model,
        problem.topology,
        np.argsort(device_of, axis=1, kind="stable"),
        problem.slot_device,
        np.empty(0),
        provenance=mp.Provenance(name, ""),
    )


def peer_plans(entry: Input, problem: mp.Problem, eplb: Path | None, seconds: float) -> dict[str, dict[str, mp.Plan]]:
    """{peer: {setting: plan}}; a peer that finds nothing in its time has no plans."""
    found: dict[str, dict[str, mp.Plan]] = {}
    solvers = {
        "contiguous": [("contiguous", {})],
        "eplb": [("eplb", {})],
        "exflow": [("exflow", {"form": "staged"}), ("exflow", {"form": "bisect"})],
        "moetuner": [("moetuner", {})],
    }
    for peer, settings in solvers.items():
        for solver, options in settings:
            try:
                plan = mp.solve(problem, solver, seconds=seconds, seed=0, **options)
            except (mp.SolveError, mp.UnsupportedError) as error:
                print(f"  {peer}: {error}", file=sys.stderr)
                continue
            found.setdefault(peer, {})[options.get("form", "default")] = plan
    topology, model = problem.topology, problem.model
    if eplb is not None:
        load = problem.statistics.total_load
        table = published_eplb(eplb)(load, problem.num_slots, 1, topology.num_nodes, topology.num_devices)
        plan = mp.Plan(model, topology, table, problem.slot_device, np.empty(0), provenance=mp.Provenance("eplb", ""))
        found["eplb"]["published code"] = plan
    routing = Routing(
        entry.train.expert_ids[:: max(1, len(entry.train.expert_ids) // PEER_TOKENS)],
        model.experts,
        problem.slots_per_device,
        topology.node_of,
        seed=0,
    )
    for peer, partition in PEERS:
        begun = time.perf_counter()
        found[peer] = {setting: plan_of(problem, device_of, peer) for setting, device_of in partition(routing).items()}
        print(f"  {peer}: {time.perf_counter() - begun:.1f} s", file=sys.stderr)
    return found


@dataclass
class Rows:
    """Rows of finished cells, kept in a file so that a run may be parted."""

    path: Path | None
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path | None) -> Rows:
        there = path is not None and path.exists()
        return cls(path, json.loads(path.read_text()) if path and there else [])

    def find(self, **key: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if all(row[name] == value for name, value in key.items())]

    def save(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.rows))


def peer_cells(entry: Input, eplb: Path | None, seconds: float, known: Rows, until: float) -> None:
    """Adds a row with every peer's figures for each cell of the clusters that `known` lacks."""
    statistics = mp.RoutingStatistics.from_trace(entry.train)
    for preset, nodes, per_node in entry.layouts:
        cluster = f"{nodes} x {per_node} {preset}"
        if known.find(input=entry.name, cluster=cluster) or time.monotonic() > until:
            continue
        topology = mp.Topology.preset(preset, nodes, per_node)
        plans = peer_plans(entry, mp.Problem(entry.model, topology, statistics), eplb, seconds)
        for execution in EXECUTIONS:
            problem = mp.Problem(entry.model, topology, statistics, mp.Objective(execution=execution))
            for kind in entry.kinds:
                steps = kind.draw(entry.held, 1)
                known.rows.append(
                    {
                        "input": entry.name,
                        "cluster": cluster,
                        "execution": execution,
                        "kind": kind.name,
                        "figures": {peer: best_of(settings, steps, problem) for peer, settings in plans.items()},
                    }
                )
        known.save()


def search_cells(entry: Input, seconds: float, known: Rows, until: float) -> None:
    """Completes rows by search's figures."""
    statistics = mp.RoutingStatistics.from_trace(entry.train)
    for preset, nodes, per_node in entry.layouts:
        topology = mp.Topology.preset(preset, nodes, per_node)
        for execution in EXECUTIONS:
            problem = mp.Problem(entry.model, topology, statistics, mp.Objective(execution=execution))
            for kind in entry.kinds:
                cluster = f"{nodes} x {per_node} {preset}"
                rows = known.find(input=entry.name, cluster=cluster, execution=execution, kind=kind.name)
                if not rows or "search" in rows[0]["figures"] or time.monotonic() > until:
                    continue
                steps = kind.draw(entry.held, 1)
                plan = mp.solve(problem, "search", seconds=seconds, seed=0, batch=kind.batch, step_tokens=kind.tokens)
                rows[0]["figures"]["search"] = {"setting": "", "gap": plan.gap, **judged(plan, steps, problem)}
                rows[0]["search_seconds"] = plan.provenance.seconds
                known.save()


def judged(plan: mp.Plan, steps: mp.Steps, problem: mp.Problem) -> dict[str, float]:
    return mp.evaluate(plan, steps, problem).summary()


def best_of(settings: dict[str, mp.Plan], steps: mp.Steps, problem: mp.Problem) -> dict[str, Any]:
    """Figures of the setting with the lowest mean step time on the steps judged on."""
    rows = [{"setting": setting, **judged(plan, steps, problem)} for setting, plan in settings.items()]
    return min(rows, key=lambda row: row["step_seconds_mean"])


COLUMNS = ("contiguous", "eplb", "exflow", "moetuner", "mt-kahypar", "metis", "assignment sweeps", "search")


def best_peer(row: dict[str, Any]) -> str:
    peers = {name: figures for name, figures in row["figures"].items() if name != "search"}
    return min(peers, key=lambda name: peers[name]["step_seconds_mean"])


def cells(row: dict[str, Any]) -> list[object]:
    """A row of the table: step time of each relative to contiguous, and search against the best peer."""
    figures = row["figures"]
    base = figures["contiguous"]["step_seconds_mean"]
    best, search = best_peer(row), figures["search"]
    gain, p99 = (1.0 - search[f"step_seconds_{of}"] / figures[best][f"step_seconds_{of}"] for of in ("mean", "p99"))
    return [
        row["cluster"],
        row["execution"],
        row["kind"],
        base * 1e3,
        *(figures[name]["step_seconds_mean"] / base if name in figures else "none in time" for name in COLUMNS),
        f"{best} {figures[best]['setting']}",
        gain,
        p99,
        search["gap"],
        row["search_seconds"],
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--eplb", type=Path, help="eplb.py of DeepSeek's repository")
    parser.add_argument("--seconds", type=float, default=15.0, help="time limit of each solve")
    parser.add_argument("--inputs", default="", help="only inputs whose name contains this")
    parser.add_argument("--rows", type=Path, help="keep finished cells here; they are not run again")
    parser.add_argument("--minutes", type=float, default=np.inf, help="begin nothing new after so many, with --rows")


def run(options: argparse.Namespace, report: Report) -> None:
    known, until = Rows.read(options.rows), time.monotonic() + 60.0 * options.minutes
    for entry in inputs(options.data):
        if options.inputs in entry.name:
            peer_cells(entry, options.eplb, options.seconds, known, until)
            search_cells(entry, options.seconds, known, until)
    done = [row for row in known.rows if "search" in row["figures"]]
    percent = dict.fromkeys(("to best peer", "p99 to best peer"), "+.1%") | {"gap": ".1%", "search s": ".0f"}
    columns = ("cluster", "execution", "steps", "contiguous ms", *COLUMNS, "best peer", *percent)
    formats = dict.fromkeys(("contiguous ms", *COLUMNS), ".3f") | percent
    for row in done:
        report.table(row["input"], columns, formats).row(*cells(row))
    won = sum(
        row["figures"]["search"]["step_seconds_mean"] < row["figures"][best_peer(row)]["step_seconds_mean"]
        for row in done
    )
    report.note("cells won", f"Search is below every peer in {won} of {len(done)} cells.")
