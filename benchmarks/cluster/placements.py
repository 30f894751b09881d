"""Measured step times of plans on an emulated cluster, and what the cost model said of them.

    python benchmarks/cluster/placements.py --hosts 2 --ranks 2 --out results.json [--show compare,predict]

Ranks have emulated devices (`devices.py`): ranks that share cores speed up when others wait, which devices do not.
Calibrates the cluster (`mp.runtime.calibrate`), solves for it on three quarters of the example model's recorded sequences,
and runs the model's MoE layers (8 layers, 32 experts, top-2, hidden size 192) on steps of the others: real
`ExpertParallelMoE` layers, a router that sends tokens where the trained model sent them, homes by sequence. Plans take
turns step by step; a step's time is that of its slowest rank. Attention and the head, the same under every plan, are left out.

compare: contiguous, eplb, exflow, moetuner and search, also with slots for replicas, forward and forward with backward.
predict: these and plans that nobody would choose, each with flat and node-aware dispatch, against `mp.evaluate`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plans
from hosts import Cluster
from scipy.stats import spearmanr

import moeplace as mp
from moeplace.placement.evaluate import evaluate_on

HERE = Path(__file__).resolve().parent


def calibrated(cluster: Cluster, folder: Path, slow: float) -> dict[str, Any]:
    """What the cluster's ranks find of it."""
    (folder / "work.json").write_text(json.dumps({"slow": slow}))
    cluster.torchrun(str(HERE / "measure.py"), "calibrate", str(folder))
    found: dict[str, Any] = json.loads((folder / "calibration.json").read_text())
    return found


class Work:
    """Runs for `measure.py`, and the predictions that belong to them."""

    def __init__(self, folder: Path, topology: mp.Topology, steps: mp.Steps, hop_seconds: float) -> None:
        self.folder, self.topology, self.steps = folder, topology, steps
        self.runs: list[dict[str, Any]] = []
        self.predicted: dict[str, dict[str, Any]] = {}
        devices, tokens = topology.num_devices, int(steps.tokens[0])
        self._hop_seconds = hop_seconds * tokens / devices * len(steps.moe_layers)
        shape = (steps.num_steps, tokens, steps.num_layers, steps.top_k)
        arrays = {"expert_ids": steps.expert_ids.reshape(shape), "source": plans.homes(tokens, devices)}
        np.savez(folder / "routing.npz", **arrays, hidden=plans.SPEC.hidden_size)

    def add(self, name: str, named: dict[str, mp.Plan], dispatch: str, turns: int, passes: str = "forward") -> None:
        files = {}
        self.predicted[name] = {}
        dedup = dispatch == "node_aware"
        hops = sum((self.topology.node_size.max() > 1, self.topology.num_nodes > 1)) if dedup else 1
        for label, plan in named.items():
            files[label] = f"plan{len(self.runs)}-{len(files)}.json"
            plan.save(self.folder / files[label])
            objective = plans.OBJECTIVE.replace(node_dedup=dedup)
            judged = evaluate_on(plan, self.steps, plan.model, self.topology, objective)
            self.predicted[name][label] = {
                "seconds": (judged.step_seconds + hops * self._hop_seconds).tolist(),
                "transfer": float((judged.dispatch + judged.combine).sum(axis=1).mean()),
                "compute": float(judged.compute.sum(axis=1).mean()),
                "load_max_mean": float(judged.load_max_mean.mean()),
            }
        self.runs.append(
            {
                "name": name,
                "dispatch": dispatch,
                "pass": passes,
                "turns": turns,
                "plans": files,
                "routing": "routing.npz",
            }
        )

    def measured(self, cluster: Cluster, slow: float) -> list[dict[str, Any]]:
        (self.folder / "work.json").write_text(json.dumps({"runs": self.runs, "slow": slow}))
        cluster.torchrun(str(HERE / "measure.py"), "run", str(self.folder))
        found: list[dict[str, Any]] = json.loads((self.folder / "times.json").read_text())
        return found


def step_seconds(times: Sequence[dict[str, Any]], run: str, plan: str) -> np.ndarray[Any, Any]:
    """[S] the median over turns of each step."""
    steps: dict[int, list[float]] = {}
    for row in times:
        if (row["run"], row["plan"]) == (run, plan):
            steps.setdefault(row["step"], []).append(row["seconds"])
    return np.array([np.median(steps[step]) for step in sorted(steps)])


def compared(times: Sequence[dict[str, Any]], work: Work, run: str) -> list[dict[str, Any]]:
    """A row a plan: milliseconds a step, and how much faster than contiguous, step by step."""
    base = step_seconds(times, run, "contiguous")
    rows = []
    for name, predicted in work.predicted[run].items():
        seconds = step_seconds(times, run, name)
        mine = [row for row in times if (row["run"], row["plan"]) == (run, name)]
        rows.append(
            {
                "run": run,
                "plan": name,
                "median_ms": 1e3 * float(np.median(seconds)),
                "mean_ms": 1e3 * float(seconds.mean()),
                "p99_ms": 1e3 * float(np.quantile([row["seconds"] for row in mine], 0.99)),
                "speedup": float((base / seconds).mean()),
                "faster_steps": float((seconds < base).mean()),
                "in_collectives": float(np.mean([row["blocked"] / row["seconds"] for row in mine])),
                "predicted_transfer_ms": 1e3 * predicted["transfer"],
                "predicted_compute_ms": 1e3 * predicted["compute"],
                "predicted_ms": 1e3 * float(np.mean(predicted["seconds"])),
                "load_max_mean": predicted["load_max_mean"],
            }
        )
    return rows


def agreement(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of predicted and measured mean step times over plans."""
    measured, predicted = (np.array([row[key] for row in rows]) for key in ("mean_ms", "predicted_ms"))
    error = np.abs(predicted / measured - 1.0)
    return {
        "plans": len(rows),
        "spearman": float(spearmanr(measured, predicted).statistic),
        "median_error": float(np.median(error)),
        "largest_error": float(error.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="processes a host")
    parser.add_argument("--rate", default="200mbit")
    parser.add_argument(
        "--slow", type=float, default=6, help="seconds of expert work that a second of CPU time stands for"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="a step, over all ranks")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20, help="of each solve")
    parser.add_argument("--show", default="compare,predict")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    train, held = plans.routing()
    cluster = Cluster(arguments.hosts, arguments.ranks, arguments.rate)
    with cluster, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibration = calibrated(cluster, folder, arguments.slow)
        topology = mp.Topology.from_dict(calibration["topology"])
        steps = plans.held_steps(held, arguments.tokens, arguments.steps, topology.num_devices)
        work = Work(folder, topology, steps, calibration["token_seconds"])
        problem = plans.problem_for(topology, train)
        every = plans.solved(problem, arguments.tokens, arguments.seconds)
        if "compare" in arguments.show:
            more = plans.solved(plans.problem_for(topology, train, extra=2), arguments.tokens, arguments.seconds)
            more = {f"{label}, 2 more slots a device": plan for label, plan in more.items() if label != "contiguous"}
            for passes in ("forward", "forward and backward"):
                work.add(passes, every | more, "node_aware", arguments.turns, passes)
        if "predict" in arguments.show:
            wide = every | dict(plans.spread(problem, every["search"]))
            for dispatch in ("node_aware", "flat"):
                work.add(f"predict, {dispatch}", wide, dispatch, 1)
        times = work.measured(cluster, arguments.slow)
    rows = {run["name"]: compared(times, work, run["name"]) for run in work.runs}
    result = {
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "calibration": calibration,
        "rows": rows,
        "agreement": {run: agreement(found) for run, found in rows.items() if "backward" not in run},
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1))
    print(report(result))


COMPARED = {
    "plan": "plan",
    "median_ms": "median ms",
    "mean_ms": "mean ms",
    "p99_ms": "p99 ms",
    "speedup": "contiguous / this",
    "faster_steps": "steps faster than contiguous",
    "load_max_mean": "load max/mean",
    "in_collectives": "in all-to-alls",
}
PREDICTED = {"plan": "plan", "mean_ms": "measured ms", "predicted_ms": "predicted ms", "load_max_mean": "load max/mean"}


def report(result: dict[str, Any]) -> str:
    """Markdown tables of the rows."""
    parts = []
    for run, rows in result["rows"].items():
        columns = PREDICTED if run.startswith("predict") else COMPARED
        ordered = sorted(rows, key=lambda row: row["mean_ms"])
        lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(_cell(key, row[key]) for key in columns) + " |" for row in ordered]
        found = result["agreement"].get(run)
        note = ""
        if found is not None:
            note = (
                f"\n\nPredicted against measured over {found['plans']} plans: Spearman {found['spearman']:.3f}, median error "
                f"{found['median_error']:.1%}, largest {found['largest_error']:.1%}."
            )
        parts.append(f"**{run}**\n\n" + "\n".join(lines) + note)
    return "\n\n".join(parts)


def _cell(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if key in ("faster_steps", "in_collectives"):
        return f"{value:.0%}"
    return f"{value:.0f}" if key.endswith("_ms") else f"{value:.2f}"


if __name__ == "__main__":
    main()
