"""Devices a token needs against balance: the front that search draws on gpt-oss-20b, and where others stand.

    python benchmarks/locality_front.py --data DATA --out docs/results/locality_front.md

One node of 4 or 8 devices bound by tokens; the speed of its links goes from fast, where balance is all that counts, to
slow, where copies do. Figures are of held-out decode steps of 128 sequences: distinct devices a token, and device load
max/mean of a step. With 8 redundant slots a replica is taken by its share, whatever else the token needs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import recordings
from peers import PEERS, Routing
from search_peers import PEER_TOKENS, plan_of

import moeplace as mp

LINKS = (1e12, 1e11, 4e10, 2e10, 1e10, 5e9, 1e9)
"""Bytes a second of each device's links, at 600 Tflop/s a device."""
MARKS = {
    8: ((2.91, 1.265), (3.04, 1.214), (3.27, 1.193)),
    4: ((2.22, 1.143), (2.47, 1.111)),
}
"""Plain annealing over pair swaps, 5 s: (devices a token, load max/mean) published beside this benchmark's data."""


def cluster(devices: int, links: float) -> mp.Topology:
    device = {"compute": 6e14, "memory": 8e10, "memory_bandwidth": 1e16, "intra_bandwidth": links, "count": devices}
    return mp.Topology.from_dict({"nodes": [{"devices": [device], "inter_bandwidth": 1e12}], "name": "one node"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the recordings")
    parser.add_argument("--proposals", type=int, default=20_000, help="search's effort a layer")
    parser.add_argument("--out", type=Path, help="Markdown file to write (default: print)")
    options = parser.parse_args()
    train, held = recordings.gpt_oss(options.data).split("sequence", 0.25, 0)
    statistics = mp.RoutingStatistics.from_trace(train)
    steps = held.decode_steps(128, 200, 1)
    parts = [
        "# Locality against balance\n",
        " ".join((__doc__ or "").split("\n\n", 2)[2].split()) + "\n",
        f"    python benchmarks/locality_front.py --data DATA --proposals {options.proposals}\n",
    ]
    for devices in (8, 4):
        rows = []
        for slots in (None, recordings.GPT_OSS.experts + 8):
            for links in LINKS:
                problem = mp.Problem(recordings.GPT_OSS, cluster(devices, links), statistics, slots=slots)
                plan = mp.solve(problem, "search", seed=0, proposals=options.proposals)
                rows.append((f"search, links {links / 1e9:g} GB/s", slots or 32, *figures(plan, steps, problem)))
                print(devices, *rows[-1], file=sys.stderr)
        problem = mp.Problem(recordings.GPT_OSS, cluster(devices, 1e10), statistics)
        rows += [(name, 32, *figures(mp.solve(problem, name), steps, problem)) for name in ("contiguous", "eplb")]
        routing = Routing(
            train.expert_ids[:: len(train.expert_ids) // PEER_TOKENS],
            32,
            problem.slots_per_device,
            problem.topology.node_of,
            0,
        )
        for peer, partition in PEERS:
            rows += [
                (f"{peer}, {setting}", 32, *figures(plan_of(problem, device_of, peer), steps, problem))
                for setting, device_of in partition(routing).items()
            ]
        rows += [("plain annealing, pair swaps", 32, reach, load) for reach, load in MARKS[devices]]
        parts.append(f"## {devices} devices\n\n| plan | slots | devices a token | load max/mean |\n|---|---|---|---|")
        parts.append("\n".join(f"| {name} | {slots} | {reach:.2f} | {load:.3f} |" for name, slots, reach, load in rows))
        parts.append("")
    text = "\n".join(parts)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    else:
        print(text)


def figures(plan: mp.Plan, steps: mp.Steps, problem: mp.Problem) -> tuple[float, float]:
    summary = mp.evaluate(plan, steps, problem).summary()
    return summary["devices_per_token"], summary["load_max_mean"]


if __name__ == "__main__":
    main()
