"""Devices a token needs against balance: the front that search draws on gpt-oss-20b, and where others stand.

    python -m benchmarks locality_front --write

4 or 8 devices hold experts; a node without experts sends every token's copies over one link, so that it is the sum of
copies that costs, beside the busiest device's compute. The link's speed decides what a copy is worth. Figures are of
held-out decode steps of 128 sequences: distinct devices a token, and device load max/mean of a step. With 8 redundant
slots a replica is taken by its share, whatever else the token needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import recordings
from published import PEERS, Routing
from published.plain_annealing import plain_annealing
from runner import Report, Table, data_argument
from search_peers import PEER_TOKENS, plan_of

import moeplace as mp

COPIES_WORTH = (1.0, 0.7, 0.5, 0.35, 0.2)
"""Of one device more a token, in load max/mean of a step."""
COMPUTE = 6e14
TOKENS = 128
MARKS = {
    8: ((2.91, 1.265), (3.04, 1.214), (3.27, 1.193)),
    4: ((2.22, 1.143), (2.47, 1.111)),
}
"""Plain annealing over pair swaps, 5 s: (devices a token, load max/mean) published beside this benchmark's data, of
sequences split otherwise."""


def cluster(devices: int, worth: float) -> mp.Topology:
    """Devices with experts on one node and a device without on another, where tokens live as evenly as on the
    others."""
    device = {"compute": COMPUTE, "memory": 8e10, "memory_bandwidth": 1e16, "intra_bandwidth": 1e16}
    model = recordings.GPT_OSS
    balanced = TOKENS * model.top_k / devices * model.flops_per_token / COMPUTE
    # There and back, of the tokens at home on the device without experts.
    copy = 2 * TOKENS / (devices + 1) * model.hidden_size * 2
    link = copy / (worth * balanced)
    nodes = [{"devices": [device | {"count": count}], "inter_bandwidth": link} for count in (devices, 1)]
    return mp.Topology.from_dict({"nodes": nodes, "name": "experts apart"})


def searched(
    devices: int, more: int, statistics: mp.RoutingStatistics, proposals: int
) -> Iterator[tuple[str, mp.Plan]]:
    """Search's plans for what a copy may be worth, on the devices with experts alone."""
    model, slots = recordings.GPT_OSS, recordings.GPT_OSS.experts + more
    plain = mp.Problem(model, mp.Topology.preset("h100-hgx", 1, devices), statistics, slots=slots)
    for worth in COPIES_WORTH:
        problem = mp.Problem(
            model,
            cluster(devices, worth),
            statistics,
            mp.Objective(node_dedup=False),
            device_slots=[*plain.slots_per_device.tolist(), 0],
        )
        found = mp.solve(problem, "search", seed=0, proposals=proposals, steps=256)
        plan = mp.Plan(model, plain.topology, found.physical_to_logical, plain.slot_device, found.shares)
        yield f"search, a copy worth {worth:g}", plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--proposals", type=int, default=6_000, help="effort a layer, search's and plain annealing's")


def run(options: argparse.Namespace, report: Report) -> None:
    train, held = recordings.gpt_oss(options.data).split("sequence", 0.25, 0)
    statistics = mp.RoutingStatistics.from_trace(train)
    steps, drawn = held.decode_steps(TOKENS, 200, 1), train.decode_steps(TOKENS, 256, 0)
    for devices in (8, 4):
        problem = mp.Problem(recordings.GPT_OSS, mp.Topology.preset("h100-hgx", 1, devices), statistics)
        table = report.table(
            f"{devices} devices",
            ("plan", "slots", "devices a token", "load max/mean"),
            {"devices a token": ".2f", "load max/mean": ".3f"},
        )

        def add(name: str, plan: mp.Plan, problem: mp.Problem = problem, table: Table = table) -> None:
            summary = mp.evaluate(plan, steps, problem).summary()
            table.row(name, plan.num_slots, summary["devices_per_token"], summary["load_max_mean"])

        for more in (0, 8):
            for name, plan in searched(devices, more, statistics, options.proposals):
                add(name, plan)
        for worth in COPIES_WORTH:
            device_of = plain_annealing(drawn, devices, 1.0 / worth, options.proposals)
            add(f"plain annealing, a copy worth {worth:g}", plan_of(problem, device_of, "plain"))
        for name in ("contiguous", "eplb"):
            add(name, mp.solve(problem, name))
        add("eplb", mp.solve(mp.Problem(problem.model, problem.topology, statistics, slots=40), "eplb"))
        routing = Routing(
            train.expert_ids[:: len(train.expert_ids) // PEER_TOKENS],
            32,
            problem.slots_per_device,
            problem.topology.node_of,
            0,
        )
        for peer, partition in PEERS:
            for setting, device_of in partition(routing).items():
                add(f"{peer}, {setting}", plan_of(problem, np.asarray(device_of), peer))
        for reach, load in MARKS[devices]:
            table.row("the marks", 32, reach, load)
