"""What replicas near the token are worth: gpt-oss-20b on two nodes of four devices, judged as engines run that use them.

    pip install mtkahypar
    python benchmarks/nearest_replica.py --data DATA --out docs/results/nearest_replica.md

Every plan is judged on held-out sequences under `replica_choice="nearest"`, tokens' homes spread evenly. Search solves once as
if any replica might serve any token ("share") and once as the engine will run ("nearest"), each told the steps it is judged
on. Peers know only routing and solve once a cluster.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import recordings
from peers.hypergraph import mt_kahypar
from peers.routing import Routing

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
    print(f"{name}, {problem.num_slots} slots", file=sys.stderr)
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
        coherent=False,
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


def row(entry: Entry, steps: mp.Steps, problem: mp.Problem, best_peer: float) -> str:
    figures = mp.evaluate(entry.plan, steps, problem).summary()
    mean = figures["step_seconds_mean"]
    cells = (
        entry.name,
        str(entry.slots),
        f"{mean * 1e3:.3f}",
        f"{figures['step_seconds_p99'] * 1e3:.3f}",
        f"{mean / best_peer - 1:+.1%}",
        f"{figures['compute_seconds'] * 1e3:.3f}",
        f"{figures['transfer_seconds'] * 1e3:.3f}",
        f"{figures['load_max_mean']:.3f}",
        f"{figures['devices_per_token']:.2f}",
        f"{figures['nodes_per_token']:.2f}",
        f"{figures['cross_node_fraction']:.1%}",
        "" if entry.plan.gap is None or "seconds" not in figure_of(entry.plan) else f"{entry.plan.gap:.0%}",
        f"{entry.cpu_seconds:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def figure_of(plan: mp.Plan) -> str:
    return "" if plan.certificate is None else plan.certificate.objective


def cell(
    preset: str, batch: str, tokens: int, entries: list[Entry], held: mp.RoutingTrace, statistics: mp.RoutingStatistics
) -> str:
    """One cluster and kind of steps, as a table."""
    steps = held.prefill_steps(tokens) if batch == "prefill" else held.decode_steps(tokens, 40)
    judge = problem_of(preset, recordings.GPT_OSS.experts, "nearest", statistics)
    means = [
        mp.evaluate(entry.plan, steps, judge).step_seconds.mean()
        for entry in entries
        if not entry.name.startswith("search")
    ]
    head = (
        "| plan | slots | step ms mean | p99 | to the best peer | compute ms | transfer ms | load max/mean | "
        "devices a token | nodes a token | cross-node copies | gap | solve CPU s |"
    )
    lines = [row(entry, steps, judge, float(min(means))) for entry in entries]
    title = f"## {preset}, {batch} {tokens}, {steps.num_steps} held-out steps"
    return "\n".join([title, "", head, "|" + "---|" * 13, *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with gpt_oss_20b_routing.npz")
    parser.add_argument("--out", type=Path, help="Markdown file to write (default: print)")
    parser.add_argument("--proposals", type=int, default=5000, help="of search, a layer")
    parser.add_argument("--seconds", type=float, default=30.0, help="time limit of moetuner")
    options = parser.parse_args()
    train, held = recordings.gpt_oss(options.data).split()
    statistics = mp.RoutingStatistics.from_trace(train)
    sections = []
    for preset in PRESETS:
        known = peers(preset, statistics, train, options.seconds)
        for batch, tokens in KINDS:
            found = [*known, *searches(preset, statistics, batch, tokens, options.proposals)]
            sections.append(cell(preset, batch, tokens, found, held, statistics))
            print(sections[-1], file=sys.stderr)
    head = (
        f"# Replicas near the token, gpt-oss-20b\n\n{recordings.GPT_OSS.name}: 24 layers, 32 experts, top-4; two nodes of "
        'four devices; a quarter of 430 recorded sequences held out. Every plan is judged with `replica_choice="nearest"` '
        "([cost model](../cost-model.md)), homes spread evenly; step times are predicted. 40 slots are 8 more than "
        f"experts. Search makes {options.proposals:,} proposals a layer; its gap is that of its own objective on the "
        "training part.\n\n"
        f"    python benchmarks/nearest_replica.py --data DATA --proposals {options.proposals}\n"
    )
    text = "\n".join([head, *sections])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
