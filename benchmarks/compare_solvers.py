"""Every solver on gpt-oss-20b's recorded routing, judged on held-out sequences.

    python benchmarks/compare_solvers.py --data ../shared/data --out docs/results/compare_solvers.md

One `moeplace compare` for each cell: 4 and 8 devices on 2 nodes, both execution modes, decode steps of 128 sequences and
prefill steps of 4,096 tokens. All solvers get the same statistics and time limit; search is told which steps it will be
judged on, as every user knows what their engine runs. Solving and judging never share a sequence.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import moeplace as mp

MODEL = mp.ModelSpec(
    name="gpt-oss-20b", layers=24, experts=32, top_k=4, hidden_size=2880, ffn_size=2880, expert_dtype="mxfp4"
)
STEPS = {
    "decode 128": ("--decode 128", "search"),
    "prefill 4096": ("--prefill 4096", "search:batch=prefill:step_tokens=4096"),
}
SOLVERS = "contiguous,round_robin,random,eplb,exflow:form=staged,exflow:form=bisect,moetuner,chain"
COLUMNS = (
    ("load_max_mean", "load max/mean", "{:.3f}"),
    ("devices_per_token", "devices a token", "{:.2f}"),
    ("nodes_per_token", "nodes a token", "{:.2f}"),
    ("cross_device_fraction", "cross-device", "{:.1%}"),
    ("cross_node_fraction", "cross-node", "{:.1%}"),
    ("local_transitions", "local transitions", "{:.1%}"),
    ("step_ms_mean", "step ms mean", "{:.3f}"),
    ("step_ms_p50", "p50", "{:.3f}"),
    ("step_ms_p99", "p99", "{:.3f}"),
    ("ratio", "to contiguous", "{:.3f}"),
    ("gap", "gap (own objective)", "{:.1%}"),
    ("solve_seconds", "solve s", "{:.1f}"),
)


def write_recording(data: Path, folder: Path) -> None:
    """The recorded arrays as a trace on disk, each sequence tagged with the question set it answers."""
    arrays = np.load(data / "gpt_oss_20b_routing.npz", allow_pickle=False)
    trace = mp.RoutingTrace.from_arrays(
        arrays["expert_ids"],
        num_experts=32,
        gate_weights=arrays["gate_probs"],
        sequence=arrays["sequence"],
        position=arrays["position"],
        workload=arrays["sequence_dataset"][arrays["sequence"]],
    )
    mp.write_trace(trace, folder, model=MODEL)


def compare(
    trace: Path, topology: str, devices: int, execution: str, steps: str, seconds: float
) -> list[dict[str, Any]]:
    """Rows of one `moeplace compare`."""
    judged_on, search = STEPS[steps]
    command = (
        f"compare {trace} --topology {topology} --nodes 2 --devices-per-node {devices // 2} --execution {execution} "
        f"{judged_on} --solvers {SOLVERS},{search} --seconds {seconds} --json"
    )
    print(f"$ moeplace {command}", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "moeplace.cli", *command.split()], check=True, stdout=subprocess.PIPE, text=True
    )
    answer = json.loads(done.stdout)
    rows: list[dict[str, Any]] = answer if isinstance(answer, list) else answer["rows"]
    for row in rows:
        for name in ("mean", "p50", "p99"):
            value = row.get(f"step_seconds_{name}")
            row[f"step_ms_{name}"] = None if value is None else value * 1e3
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; a solver that cannot serve the problem gets its reason."""
    lines = ["| solver | " + " | ".join(title for _, title, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"| {row['solver']} | {row['reason']}" + " |" * len(COLUMNS))
            continue
        cells = ["" if row.get(key) is None else form.format(row[key]) for key, _, form in COLUMNS]
        lines.append(f"| {row['solver']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with gpt_oss_20b_routing.npz")
    parser.add_argument("--out", type=Path, help="Markdown file to write (default: print)")
    parser.add_argument("--topology", default="h100-hgx")
    parser.add_argument("--seconds", type=float, default=30.0, help="time limit of each solve")
    parser.add_argument("--json", action="store_true", help="print all rows as JSON")
    options = parser.parse_args()
    sections, everything = [], []
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "gpt_oss_20b"
        write_recording(options.data, trace)
        for devices in (4, 8):
            for execution in ("dispatch_combine", "context_coherent"):
                for steps in STEPS:
                    rows = compare(trace, options.topology, devices, execution, steps, options.seconds)
                    sections.append(f"## {devices} devices on 2 nodes, {execution}, {steps}\n\n{table(rows)}\n")
                    everything += [{"devices": devices, "execution": execution, **row} for row in rows]
    head = (
        f"# Solvers on gpt-oss-20b, held-out sequences\n\n{MODEL.name}: 24 layers, 32 experts, top-4, mxfp4 experts; "
        f"131,403 recorded decode tokens of 430 sequences, a quarter held out. Topology {options.topology}, "
        f"{options.seconds:g} s a solve, 2 CPU cores. Step times are predicted by the [cost model](../cost-model.md); "
        "the gap is that of each solver's own objective on the training part.\n\n"
        f"    python benchmarks/compare_solvers.py --data DATA --topology {options.topology} "
        f"--seconds {options.seconds:g}\n"
    )
    text = "\n".join([head, *sections])
    if options.json:
        print(json.dumps(everything))
    elif options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
