"""Measured step times of plans on an emulated cluster, and what the cost model said of them.

    python benchmarks/cluster/placements.py --hosts 2 --ranks 2 --out results.json [--show compare,predict]

Ranks have emulated devices (`devices.py`): ranks that share cores speed up when others wait, which devices do not.
Calibrates the cluster (`mp.runtime.calibrate`), solves for it on three quarters of the example model's recorded sequences,
and runs the model's MoE layers (8 layers, 32 experts, top-2, hidden size 192) on steps of the others: real
`ExpertParallelMoE` layers, a router that sends tokens where the trained model sent them, homes by sequence. Plans take
turns step by step; a step's time is that of its slowest rank. Attention and the head, the same under every plan, are left out.

compare: contiguous, eplb, exflow, moetuner and search, also with slots for replicas, forward and forward with backward.
predict: these and plans that nobody would choose, each with flat and node-aware dispatch, against `mp.evaluate`.
decode: steps of one token of each of many sequences, in both modes and dispatches; context-coherent rows end with every rank being told
where tokens are, and have rows with the keys and values that all ranks must be sent in every layer.
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
from predictions import Predictions
from scipy.stats import spearmanr

import moeplace as mp

HERE = Path(__file__).resolve().parent


def calibrated(cluster: Cluster, folder: Path, tokens: int) -> dict[str, Any]:
    """What the cluster's ranks find of it, for steps of so many tokens."""
    cluster.torchrun(str(HERE / "measure.py"), "calibrate", str(folder), str(tokens))
    found: dict[str, Any] = json.loads((folder / "calibration.json").read_text())
    return found


class Work:
    """Runs for `measure.py`, and the predictions that belong to them."""

    def __init__(self, folder: Path, predictions: Predictions) -> None:
        self.folder, self.predictions = folder, predictions
        self.runs: list[dict[str, Any]] = []
        self.predicted: dict[str, dict[str, Any]] = {}

    def add(
        self,
        name: str,
        named: dict[str, mp.Plan],
        steps: mp.Steps,
        dispatch: str = "node_aware",
        passes: str = "forward",
        coherent: dict[str, int] | None = None,
    ) -> None:
        """coherent: plans that run in context-coherent execution, and the values of context that a token has in a layer."""
        coherent = coherent or {}
        number, files = len(self.runs), {}
        self._save(f"routing{number}.npz", steps)
        self.predicted[name] = {}
        for label, plan in named.items():
            files[label] = f"plan{number}-{len(files)}.json"
            plan.save(self.folder / files[label])
            execution = "context_coherent" if label in coherent else "dispatch_combine"
            self.predicted[name][label] = self.predictions.of(plan, steps, dispatch, execution)
        run = {"name": name, "dispatch": dispatch, "pass": passes, "plans": files, "routing": f"routing{number}.npz"}
        self.runs.append(run | {"coherent": coherent})

    def _save(self, file: str, steps: mp.Steps) -> None:
        tokens = int(steps.tokens[0])
        shape = (steps.num_steps, tokens, steps.num_layers, steps.top_k)
        source = plans.homes(tokens, self.predictions.topology.num_devices)
        ids = steps.expert_ids.reshape(shape)
        np.savez(self.folder / file, expert_ids=ids, source=source, hidden=plans.SPEC.hidden_size)

    def measured(self, cluster: Cluster) -> list[dict[str, Any]]:
        (self.folder / "work.json").write_text(json.dumps({"runs": self.runs}))
        cluster.torchrun(str(HERE / "measure.py"), "run", str(self.folder))
        found: list[dict[str, Any]] = json.loads((self.folder / "times.json").read_text())
        return found


def step_seconds(times: Sequence[dict[str, Any]], run: str, plan: str) -> np.ndarray[Any, Any]:
    """[S] of the slowest rank."""
    return np.array([row["seconds"] for row in times if (row["run"], row["plan"]) == (run, plan)])


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
                "p99_ms": 1e3 * float(np.quantile(seconds, 0.99)),
                "speedup": float((base / seconds).mean()),
                "faster_steps": float((seconds < base).mean()),
                "in_collectives": float(np.mean([row["blocked"] / row["seconds"] for row in mine])),
                "predicted_transfer_ms": 1e3 * predicted["transfer"],
                "predicted_compute_ms": 1e3 * predicted["compute"],
                "predicted_ms": 1e3 * float(np.mean(predicted["seconds"])),
                "model_ms": 1e3 * float(np.mean(predicted["model"])),
                "load_max_mean": predicted["load_max_mean"],
            }
        )
    return rows


def agreement(rows: Sequence[dict[str, Any]], said: str = "predicted_ms") -> dict[str, float]:
    """Of predicted and measured mean step times over plans."""
    measured, predicted = (np.array([row[key] for row in rows]) for key in ("mean_ms", said))
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
    parser.add_argument("--tokens", type=int, default=2048, help="a step, over all ranks")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20, help="of each solve")
    parser.add_argument("--show", default="compare,predict", help="of compare, predict, decode")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    train, held = plans.routing()
    cluster = Cluster(arguments.hosts, arguments.ranks, arguments.rate)
    with cluster, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens, seconds = arguments.tokens, arguments.seconds
        calibration = calibrated(cluster, folder, tokens)
        work = Work(folder, Predictions(calibration))
        topology = work.predictions.topology
        devices = topology.num_devices
        steps = plans.held_steps(held, tokens, arguments.steps, devices)
        every = plans.solved(topology, train, tokens, seconds)
        if "compare" in arguments.show:
            more = plans.solved(topology, train, tokens, seconds, extra=2)
            more = {f"{label}, 2 more slots a device": plan for label, plan in more.items() if label != "contiguous"}
            work.add("forward", every | more, steps)
            work.add("forward and backward", every | more, steps, passes="forward and backward")
        if "predict" in arguments.show:
            wide = every | dict(plans.spread(plans.problem_for(topology, train), every["search"]))
            for dispatch in ("node_aware", "flat"):
                work.add(f"predict, {dispatch}", wide, steps.select(range(max(1, arguments.steps // 2))), dispatch)
        if "decode" in arguments.show:
            decode = plans.decode_steps(held, tokens, arguments.steps, devices)
            named, coherent = plans.decoding(topology, train, tokens, seconds)
            for dispatch in ("flat", "node_aware"):
                work.add(f"decode, {dispatch}", named, decode, dispatch, coherent=coherent)
        times = work.measured(cluster)
    rows = {run["name"]: compared(times, work, run["name"]) for run in work.runs}
    result = {
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "calibration": calibration,
        "rows": rows,
        "agreement": {
            run: {"predicted": agreement(found), "mp.evaluate alone": agreement(found, "model_ms")}
            for run, found in rows.items()
            if run == "forward" or run.startswith("predict")
        },
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
PREDICTED = {
    "plan": "plan",
    "mean_ms": "measured ms",
    "predicted_ms": "predicted ms",
    "model_ms": "mp.evaluate alone ms",
    "load_max_mean": "load max/mean",
}


def report(result: dict[str, Any]) -> str:
    """Markdown tables of the rows."""
    parts = []
    for run, rows in result["rows"].items():
        columns = PREDICTED if run.startswith("predict") else COMPARED
        ordered = sorted(rows, key=lambda row: row["mean_ms"])
        lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(_cell(key, row[key]) for key in columns) + " |" for row in ordered]
        note = "".join(
            f"\n\n{said} against measured over {found['plans']} plans: Spearman {found['spearman']:.3f}, median error "
            f"{found['median_error']:.1%}, largest {found['largest_error']:.1%}."
            for said, found in result["agreement"].get(run, {}).items()
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
