"""Search on the whole objective at DeepSeek-V3's size: how good after 30 seconds, and how much memory it takes.

    python -m benchmarks deepseek_scale --write

58 layers, 256 experts, top-8 in 4 of 8 groups; 288 slots on 32 devices in 4 nodes, and 320 slots on 64 in 8. Steps are
modelled (see deepseek_shape.py). Every solve runs in a process of its own, whose peak memory counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from pathlib import Path
from typing import Any

import deepseek_shape
from runner import Report, child, data_argument

import moeplace as mp

CLUSTERS = ((288, 4, 8), (320, 8, 8))
"""Slots a layer, nodes, devices a node."""
STEP_TOKENS, JUDGED_STEPS = 4096, 4


def solved(
    folder: Path, slots: int, nodes: int, per_node: int, solver: str, seconds: float, certify: float
) -> dict[str, Any]:
    """Runs in the process measured. certify: of the seconds, what goes into search's bound; 0 leaves it to search."""
    trace = mp.read_trace(folder)
    train, held = trace.split("sequence", 0.25, 0)
    problem = mp.Problem(
        deepseek_shape.MODEL,
        mp.Topology.preset("h100-hgx", nodes, per_node),
        mp.RoutingStatistics.from_trace(train),
        mp.Objective(dispatch_dtype="fp8"),
        slots=slots,
    )
    options: dict[str, Any] = {}
    if solver == "search":
        options = {"batch": "prefill", "step_tokens": STEP_TOKENS, "certify": certify}
    plan = mp.solve(problem, solver, seconds=seconds - certify, seed=0, **options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    summary = mp.evaluate(plan, held.prefill_steps(STEP_TOKENS, JUDGED_STEPS, 1), problem).summary()
    certificate = plan.certificate
    return {
        "value": None if certificate is None else certificate.value,
        "gap": plan.gap,
        "solve_seconds": plan.provenance.seconds,
        "peak_gb": peak,
        **summary,
    }


COLUMNS = {
    "solver": "",
    "solve s": ".1f",
    "held-out step ms": ".3f",
    "p99": ".3f",
    "load max/mean": ".3f",
    "devices a token": ".2f",
    "nodes a token": ".2f",
    "own value ms": ".3f",
    "to the long solve": "+.2%",
    "gap": ".1%",
    "peak GB": ".2f",
}


def row(name: str, figures: dict[str, Any], long: dict[str, Any]) -> tuple[object, ...]:
    searched = name == "search"
    return (
        name,
        figures["solve_seconds"],
        figures["step_seconds_mean"] * 1e3,
        figures["step_seconds_p99"] * 1e3,
        figures["load_max_mean"],
        figures["devices_per_token"],
        figures["nodes_per_token"],
        figures["value"] * 1e3 if searched else None,
        figures["value"] / long["value"] - 1.0 if searched else None,
        figures["gap"] if searched else None,
        figures["peak_gb"],
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument(
        "--tokens", type=int, default=32_768, help="modelled tokens, a quarter of the sequences held out"
    )
    parser.add_argument("--trace", type=Path, help="keep the modelled trace here, or use it where it stands")
    parser.add_argument("--short", type=float, default=30.0, help="seconds")
    parser.add_argument("--long", type=float, default=600.0, help="seconds")
    parser.add_argument(
        "--certify", type=float, default=450.0, help="of the long solve's seconds, what its bound takes"
    )
    parser.add_argument("--slots", type=int, help="only the cluster with so many slots")
    parser.add_argument("--one", nargs=7, help=argparse.SUPPRESS)


def run(options: argparse.Namespace, report: Report) -> None:
    if options.one:
        folder, slots, nodes, per_node, solver, *seconds = options.one
        whole, certify = map(float, seconds)
        print(json.dumps(solved(Path(folder), int(slots), int(nodes), int(per_node), solver, whole, certify)))
        return

    def measured(*arguments: object) -> dict[str, Any]:
        done = child("deepseek_scale", "--data", options.data, "--one", *arguments)
        if done.returncode:
            raise SystemExit(done.stderr)
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    with tempfile.TemporaryDirectory() as name:
        folder = options.trace or Path(name) / "trace"
        if not folder.exists():
            trace = deepseek_shape.modelled_trace(options.data, options.tokens)
            mp.write_trace(trace, folder, model=deepseek_shape.MODEL)
        for slots, nodes, per_node in CLUSTERS:
            if options.slots not in (None, slots):
                continue
            title = f"{slots} slots on {nodes * per_node} devices in {nodes} nodes"
            table, cluster = report.table(title, COLUMNS, COLUMNS), (folder, slots, nodes, per_node)
            long = measured(*cluster, "search", options.long, options.certify)
            for solver in ("eplb", "search"):
                table.row(*row(solver, measured(*cluster, solver, options.short, 0.0), long))
            table.row(*row("search", long, long))
