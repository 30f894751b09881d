"""What replicas near the token are worth: gpt-oss-20b on two nodes of four devices, judged as engines run that use
them.

    pip install mtkahypar
    python -m benchmarks nearest_replica --write

Every plan is judged on held-out sequences under `replica_choice="nearest"`, tokens' homes spread evenly. Search solves
once as if any replica might serve any token ("share") and once as the engine will run ("nearest"), each told the steps
it is judged on. Peers know only routing and solve once a cluster.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import recordings
from published.hypergraph import mt_kahypar
from published.routing import Routing
from runner import Report, data_argument

import moeplace as mp

PRESETS = ("a100-pcie", "h100-hgx")
KINDS = (("prefill", 4096), ("decode", 512))
SPARE = 8
PEER_TOKENS = 8192
"""Tokens whose hyperedges Mt-KaHyPar is given."""


@dataclass(frozen=True)
class Entry:
    """A plan judged, and the CPU seconds that its solve took (all threads)."""

    name: str
    slots: int
    plan: mp.Plan
    cpu_seconds: float


def problem_of(preset: str, slots: int, rule: str, statistics: mp.RoutingStatistics) -> mp.Problem:
    cluster = mp.Topology.preset(preset, nodes=2, devices_per_node=4)
    return mp.Problem(recordings.GPT_OSS, cluster, statistics, mp.Objective(replica_choice=rule), slots=slots)


def solved(name: str, problem: mp.Problem, solver: str, **options: object) -> Entry:
    start = time.process_time()
    plan = mp.solve(problem, solver, **options)
    return Entry(name, problem.num_slots, plan, time.process_time() - start)


def peers(preset: str, statistics: mp.RoutingStatistics, train: mp.RoutingTrace, seconds: float) -> list[Entry]:
    """Plans of others: each has what it can use, EPLB the spare slots, too."""
    experts = recordings.GPT_OSS.experts
    plain, wide = (problem_of(preset, slots, "share", statistics) for slots in (experts, experts + SPARE))
    entries = [
        solved("contiguous", plain, "contiguous"),
        solved("eplb", plain, "eplb"),
        solved("eplb", wide, "eplb"),
        solved("moetuner", plain, "moetuner", seconds=seconds),
    ]
    routing = Routing(
        train.expert_ids[:: max(1, train.num_tokens // PEER_TOKENS)][:PEER_TOKENS],
        experts,
        plain.slots_per_device,
        plain.topology.node_of,
        seed=0,
    )
    start = time.process_time()
    partitions = mt_kahypar(routing)
    spent = time.process_time() - start
    for setting, device_of in partitions.items():
        table = np.argsort(device_of, axis=1, kind="stable")
        plan = mp.Plan(plain.model, plain.topology, table, plain.slot_device)
        entries.append(Entry(f"mt-kahypar, {setting}", experts, plan, spent / len(partitions)))
    return entries


def searches(preset: str, statistics: mp.RoutingStatistics, batch: str, tokens: int, proposals: int) -> Iterator[Entry]:
    experts = recordings.GPT_OSS.experts
    for slots, rule in ((experts, "share"), (experts + SPARE, "share"), (experts + SPARE, "nearest")):
        name = "search" if slots == experts else f"search for {rule}"
        problem = problem_of(preset, slots, rule, statistics)
        yield solved(name, problem, "search", batch=batch, step_tokens=tokens, proposals=proposals)


COLUMNS = {
    "plan": "",
    "slots": "",
    "step ms mean": ".3f",
    "p99": ".3f",
    "to the best peer": "+.1%",
    "compute ms": ".3f",
    "transfer ms": ".3f",
    "load max/mean": ".3f",
    "devices a token": ".2f",
    "nodes a token": ".2f",
    "cross-node copies": ".1%",
    "gap": ".0%",
    "solve CPU s": ".0f",
}


def row(entry: Entry, figures: dict[str, float], best_peer: float) -> tuple[object, ...]:
    certificate = entry.plan.certificate
    return (
        entry.name,
        entry.slots,
        figures["step_seconds_mean"] * 1e3,
        figures["step_seconds_p99"] * 1e3,
        figures["step_seconds_mean"] / best_peer - 1,
        figures["compute_seconds"] * 1e3,
        figures["transfer_seconds"] * 1e3,
        figures["load_max_mean"],
        figures["devices_per_token"],
        figures["nodes_per_token"],
        figures["cross_node_fraction"],
        entry.plan.gap if certificate is not None and "seconds" in certificate.objective else None,
        entry.cpu_seconds,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--proposals", type=int, default=5000, help="of search, a layer")
    parser.add_argument("--seconds", type=float, default=30.0, help="time limit of moetuner")


def run(options: argparse.Namespace, report: Report) -> None:
    train, held = recordings.gpt_oss(options.data).split()
    statistics = mp.RoutingStatistics.from_trace(train)
    for preset in PRESETS:
        others = peers(preset, statistics, train, options.seconds)
        judge = problem_of(preset, recordings.GPT_OSS.experts, "nearest", statistics)
        for batch, tokens in KINDS:
            steps = held.prefill_steps(tokens) if batch == "prefill" else held.decode_steps(tokens, 40)
            table = report.table(f"{preset}, {batch} {tokens}, {steps.num_steps} held-out steps", COLUMNS, COLUMNS)
            judged = [mp.evaluate(entry.plan, steps, judge).summary() for entry in others]
            best = min(figures["step_seconds_mean"] for figures in judged)
            for entry, figures in zip(others, judged, strict=True):
                table.row(*row(entry, figures, best))
            for entry in searches(preset, statistics, batch, tokens, options.proposals):
                table.row(*row(entry, mp.evaluate(entry.plan, steps, judge).summary(), best))
