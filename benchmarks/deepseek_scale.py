"""Search on the whole objective at DeepSeek-V3's size: how good after 30 seconds, and how much memory it takes.

    python benchmarks/deepseek_scale.py --data DATA --out docs/results/deepseek_scale.md

58 layers, 256 experts, top-8 in 4 of 8 groups; 288 slots on 32 devices in 4 nodes, and 320 slots on 64 in 8. Steps are
modelled (see deepseek_shape.py). Every solve runs in a process of its own, whose peak memory counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import deepseek_shape

import moeplace as mp

CLUSTERS = ((288, 4, 8), (320, 8, 8))
"""Slots a layer, nodes, devices a node."""
STEP_TOKENS, JUDGED_STEPS = 4096, 4


def solved(folder: Path, slots: int, nodes: int, per_node: int, solver: str, seconds: float) -> dict[str, Any]:
    """Runs in the process measured."""
    trace = mp.read_trace(folder)
    train, held = trace.split("sequence", 0.25, 0)
    problem = mp.Problem(
        deepseek_shape.MODEL,
        mp.Topology.preset("h100-hgx", nodes, per_node),
        mp.RoutingStatistics.from_trace(train),
        mp.Objective(dispatch_dtype="fp8"),
        slots=slots,
    )
    options = {"batch": "prefill", "step_tokens": STEP_TOKENS} if solver == "search" else {}
    plan = mp.solve(problem, solver, seconds=seconds, seed=0, **options)
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


def measured(folder: Path, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", str(folder), *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def row(name: str, seconds: float, figures: dict[str, Any], long: dict[str, Any] | None) -> str:
    own = f"{figures['value'] * 1e3:.3f}" if name == "search" else ""
    behind = f"{figures['value'] / long['value'] - 1.0:+.2%}" if long is not None and name == "search" else ""
    gap = "" if name != "search" else f"{figures['gap']:.1%}"
    return (
        f"| {name} | {figures['solve_seconds']:.1f} | {figures['step_seconds_mean'] * 1e3:.3f} "
        f"| {figures['step_seconds_p99'] * 1e3:.3f} | {figures['load_max_mean']:.3f} | {figures['devices_per_token']:.2f} "
        f"| {figures['nodes_per_token']:.2f} | {own} | {behind} | {gap} | {figures['peak_gb']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the recordings")
    parser.add_argument(
        "--tokens", type=int, default=32_768, help="modelled tokens, a quarter of the sequences held out"
    )
    parser.add_argument("--trace", type=Path, help="keep the modelled trace here, or use it where it stands")
    parser.add_argument("--short", type=float, default=30.0, help="seconds")
    parser.add_argument("--long", type=float, default=600.0, help="seconds")
    parser.add_argument("--slots", type=int, help="only the cluster with so many slots")
    parser.add_argument("--out", type=Path, help="Markdown file to write (default: print)")
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        folder, slots, nodes, per_node, solver, seconds = options.one
        print(json.dumps(solved(Path(folder), int(slots), int(nodes), int(per_node), solver, float(seconds))))
        return
    sections = []
    with tempfile.TemporaryDirectory() as name:
        folder = options.trace or Path(name) / "trace"
        if not folder.exists():
            trace = deepseek_shape.modelled_trace(options.data, options.tokens)
            mp.write_trace(trace, folder, model=deepseek_shape.MODEL)
        for slots, nodes, per_node in CLUSTERS:
            if options.slots not in (None, slots):
                continue
            cluster = (slots, nodes, per_node)
            long = measured(folder, *cluster, "search", options.long)
            rows = [
                row("eplb", options.short, measured(folder, *cluster, "eplb", options.short), None),
                row("search", options.short, measured(folder, *cluster, "search", options.short), long),
                row("search", options.long, long, long),
            ]
            sections.append(
                f"## {slots} slots on {nodes * per_node} devices in {nodes} nodes\n\n"
                "| solver | solve s | held-out step ms | p99 | load max/mean | devices a token | nodes a token "
                "| own value ms | to the long solve | gap | peak GB |\n" + "|---" * 11 + "|\n" + "\n".join(rows) + "\n"
            )
    head = (
        "# Search at DeepSeek-V3's size\n\n58 layers, 256 experts, top-8 within 4 of 8 groups, h100-hgx nodes, FP8 out "
        f"and BF16 back, prefill steps of {STEP_TOKENS} tokens. Loads are recorded ones, co-activation and transitions "
        "modelled on gpt-oss-20b's tokens: see `benchmarks/deepseek_shape.py`.\n\n"
        f"    python benchmarks/deepseek_scale.py --data DATA --short {options.short:g} --long {options.long:g}\n"
    )
    text = "\n".join([head, *sections])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
