"""Measured step times of plans on an emulated cluster, and what the cost model said of them.

    python -m benchmarks cluster_placements --hosts 2 --ranks 2 --json rows.jsonl [--show compare,predict]

Ranks have emulated devices (`cluster/devices.py`): ranks that share cores speed up when others wait, which devices do
not. Calibrates the cluster (`mp.runtime.calibrate`), solves for it on three quarters of the example model's recorded
sequences, and runs the model's MoE layers (8 layers, 32 experts, top-2, hidden size 192) on steps of the others: real
`ExpertParallelMoE` layers, a router that sends tokens where the trained model sent them, homes by sequence. Plans take
turns step by step; a step's time is that of its slowest rank. Attention and the head, the same under every plan, are
left out.

compare: contiguous, eplb, exflow, moetuner and search, also with slots for replicas, forward and forward with backward.
predict: these and plans that nobody would choose, each with flat and node-aware dispatch, against `mp.evaluate`.
chunks: contiguous and search, with batches whole and cut in two, in both dispatches.
real: the same in flat dispatch, on no emulated device: the experts' products take as long as they take here. For
`--ranks 1`, with a core for each host.
replicas: contiguous, and search's plans with slots for replicas, made for fixed shares, for replicas near the token and
for batches divided anew, forward and forward with backward.
delay: chunks' steps forward and backward, with the gradients of experts' weights delayed (`delay_weight_gradients`),
with batches whole and cut in two.
decode: steps of one token of each of many sequences, in both modes and dispatches; context-coherent rows end with every
rank being told where tokens are, and have rows with the keys and values that all ranks must be sent in every layer.
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
from runner import Report
from scipy.stats import spearmanr

import moeplace as mp

CLUSTER = Path(__file__).resolve().parent / "cluster"
sys.path.insert(0, str(CLUSTER))

import plans  # noqa: E402
from hosts import Cluster  # noqa: E402
from predictions import Predictions  # noqa: E402


def calibrated(cluster: Cluster, folder: Path, tokens: int) -> dict[str, Any]:
    """What the cluster's ranks find of it, for steps of so many tokens."""
    cluster.torchrun(str(CLUSTER / "measure.py"), "calibrate", str(folder), str(tokens))
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
        settings: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """coherent: plans that run in context-coherent execution, and the values of context that a token has in a
        layer. settings: of the layers, where they are others than the defaults."""
        coherent = coherent or {}
        number, files = len(self.runs), {}
        self._save(f"routing{number}.npz", steps)
        self.predicted[name] = {}
        for label, plan in named.items():
            files[label] = f"plan{number}-{len(files)}.json"
            plan.save(self.folder / files[label])
            execution = "context_coherent" if label in coherent else "dispatch_combine"
            choice = "balanced" if label.startswith(plans.BALANCED) else "share"
            self.predicted[name][label] = self.predictions.of(plan, steps, dispatch, execution, choice)
        run = {"name": name, "dispatch": dispatch, "pass": passes, "plans": files, "routing": f"routing{number}.npz"}
        balanced = [label for label in named if label.startswith(plans.BALANCED)]
        self.runs.append(run | {"coherent": coherent, "balanced": balanced, "settings": settings or {}})

    def _save(self, file: str, steps: mp.Steps) -> None:
        tokens = int(steps.tokens[0])
        shape = (steps.num_steps, tokens, steps.num_layers, steps.top_k)
        source = plans.homes(tokens, self.predictions.topology.num_devices)
        ids = steps.expert_ids.reshape(shape)
        np.savez(self.folder / file, expert_ids=ids, source=source, hidden=plans.SPEC.hidden_size)

    def measured(self, cluster: Cluster) -> list[dict[str, Any]]:
        (self.folder / "work.json").write_text(json.dumps({"runs": self.runs}))
        cluster.torchrun(str(CLUSTER / "measure.py"), "run", str(self.folder))
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
                "plan": name,
                "median_ms": 1e3 * float(np.median(seconds)),
                "mean_ms": 1e3 * float(seconds.mean()),
                "p99_ms": 1e3 * float(np.quantile(seconds, 0.99)),
                "speedup": float((base / seconds).mean()),
                "faster_steps": float((seconds < base).mean()),
                "in_collectives": float(np.mean([row["blocked"] / row["seconds"] for row in mine])),
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="processes a host")
    parser.add_argument("--rate", default="200mbit")
    parser.add_argument("--tokens", type=int, default=2048, help="a step, over all ranks")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20, help="of each solve")
    parser.add_argument(
        "--show", default="compare,predict", help="of compare, predict, chunks, real, replicas, delay, decode"
    )


def run(arguments: argparse.Namespace, report: Report) -> None:
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
        for shown, dispatches, given in CHUNKS:
            whole = {label: every[label] for label in ("contiguous", "search")}
            cut = {f"{label}, 2 chunks": plan for label, plan in whole.items()}
            settings = dict.fromkeys(whole, given) | {label: given | {"chunks": 2} for label in cut}
            for dispatch in dispatches if shown in arguments.show else ():
                for passes in ("forward", "forward and backward"):
                    name = f"{shown}, {dispatch}, {passes}"
                    work.add(name, whole | cut, steps, dispatch, passes, settings=settings)
        if "replicas" in arguments.show:
            named = {"contiguous": every["contiguous"], **plans.divided(topology, train, tokens, seconds, extra=2)}
            for passes in ("forward", "forward and backward"):
                work.add(f"replicas, {passes}", named, steps, passes=passes)
        if "delay" in arguments.show:
            named, settings = {}, {}
            for label in ("contiguous", "search"):
                for more, given in DELAY.items():
                    named[f"{label}{more}"], settings[f"{label}{more}"] = every[label], given
            for dispatch in ("flat", "node_aware"):
                work.add(f"delay, {dispatch}", named, steps, dispatch, passes="forward and backward", settings=settings)
        if "decode" in arguments.show:
            decode = plans.decode_steps(held, tokens, arguments.steps, devices)
            named, coherent = plans.decoding(topology, train, tokens, seconds)
            for dispatch in ("flat", "node_aware"):
                work.add(f"decode, {dispatch}", named, decode, dispatch, coherent=coherent)
        times = work.measured(cluster)
    report.note("calibration", json.dumps(calibration))
    for name in work.predicted:
        rows = sorted(compared(times, work, name), key=lambda row: row["mean_ms"])
        columns = PREDICTED if name.startswith("predict") else COMPARED
        formats = {title: FORMATS.get(key, ".0f") for key, title in columns.items()}
        table = report.table(name, columns.values(), formats)
        for row in rows:
            table.row(*(row[key] for key in columns))
        if name == "forward" or name.startswith("predict"):
            for said, key in (("predicted", "predicted_ms"), ("mp.evaluate alone", "model_ms")):
                found = agreement(rows, key)
                report.note(
                    f"{name}, agreement",
                    f"{said} against measured over {found['plans']} plans: Spearman {found['spearman']:.3f}, "
                    f"median error {found['median_error']:.1%}, largest {found['largest_error']:.1%}.",
                )


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


CHUNKS: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    ("chunks", ("flat", "node_aware"), {}),
    ("real", ("flat",), {"real": True}),
]
"""What cuts batches: its name, dispatches, and settings of all layers in it."""


DELAY: dict[str, dict[str, Any]] = {
    "": {},
    ", delayed": {"delay_weight_gradients": True},
    ", 2 chunks": {"chunks": 2},
    ", 2 chunks, delayed": {"chunks": 2, "delay_weight_gradients": True},
}
"""What is compared of each plan, and the layers' settings."""


FORMATS = dict.fromkeys(("speedup", "load_max_mean"), ".2f") | dict.fromkeys(("faster_steps", "in_collectives"), ".0%")
"""Of columns that are not milliseconds."""
