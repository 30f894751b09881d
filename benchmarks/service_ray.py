"""A batch of solves on the service: worker processes of one machine, and the same number of workers on a local Ray.

    python -m benchmarks service_ray --jobs 64 --workers 2 --write

Each job places a model of Mixtral's shape (32 layers of 8 experts, on 4 devices) for other transitions, made from
recorded ones as mixtral_ilp.py makes them, by the solver chain: exact, so that two ways of running it must give the
same plans. Each way has a server and an SQLite database of its own; time runs from the first job asked for to the last
one done, with workers up before. The plans are compared table by table. Needs the extra `ray`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from mixtral_ilp import problem_of, recorded_transitions, transitions_of_a_whole_model
from runner import Report, data_argument

import moeplace as mp

DEVICES = 4


@contextmanager
def serving(db: Path, workers: Sequence[str]) -> Iterator[str]:
    """A server; yields its address."""
    command = [
        sys.executable,
        "-m",
        "moeplace.cli",
        "serve",
        "--no-auth",
        "--db",
        str(db),
        "--port",
        "0",
        "--rate",
        "0",
        *workers,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    found = threading.Event()

    def read() -> None:
        for line in process.stderr or ():
            lines.append(line)
            if "Application startup complete" in line:
                found.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        if not found.wait(300):
            raise SystemExit(f"the server did not start: {''.join(lines[-5:])}")
        url = re.search(r'"url": "(http[^"]+)"', next(line for line in lines if '"serving"' in line))
        assert url is not None
        yield url[1]
    finally:
        process.terminate()
        code = process.wait(120)
        if code:
            print(f"the server ended with {code}: {''.join(lines[-5:])}", file=sys.stderr)


def batch(
    db: Path, workers: Sequence[str], problems: Sequence[mp.Problem], count: int
) -> tuple[float, list[mp.Plan], int]:
    """(seconds, plans in the order of the problems, workers that had a part in it)."""
    with serving(db, workers) as url, mp.Client(url, timeout=300) as client, tempfile.TemporaryDirectory() as folder:
        model = client.add_model(problems[0].model).id
        topology = client.add_topology(problems[0].topology).id
        kept = []
        for number, problem in enumerate(problems):
            path = Path(folder) / f"{number}.npz"
            mp.write_statistics(problem.statistics, path)
            kept.append(client.upload_statistics(path))
        wanted: dict[str, Any] = {
            "model": model,
            "topology": topology,
            "solver": "chain",
            "options": {"minimise": "transitions"},
            "seconds": 600.0,
            "objective": problems[0].objective,
        }
        warm = [client.solve(statistics=kept[0], seed=1000 + i, **wanted) for i in range(4 * count)]
        for job in warm:
            client.wait(job)
        began = time.perf_counter()
        jobs = [client.solve(statistics=statistics, **wanted) for statistics in kept]
        done = [client.wait(job) for job in jobs]
        taken = time.perf_counter() - began
        plans = [client.plan(str((job.result or {})["plan"])) for job in done]
        return taken, plans, len({job.worker for job in done})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)


def run(options: argparse.Namespace, report: Report) -> None:
    recorded = recorded_transitions(options.data, "mixtral_8x7b", top1=True)
    problems = [problem_of(transitions_of_a_whole_model(recorded, seed), DEVICES) for seed in range(options.jobs)]
    ways = {
        "process pool": ("--workers", str(options.workers)),
        "local Ray": ("--workers", "ray:local", "--ray-workers", str(options.workers)),
    }
    found = []
    formats = {"seconds": ".1f", "solves a second": ".2f"}
    table = report.table("solves", ("way", *formats, "workers that took part"), formats)
    with tempfile.TemporaryDirectory() as folder:
        for number, (way, workers) in enumerate(ways.items()):
            taken, plans, took_part = batch(Path(folder) / f"{number}.db", workers, problems, options.workers)
            found.append(plans)
            table.row(way, taken, len(plans) / taken, took_part)
    same = sum(
        np.array_equal(one.physical_to_logical, other.physical_to_logical) and one.fingerprint == other.fingerprint
        for one, other in zip(*found, strict=True)
    )
    different = len({plan.fingerprint for plan in found[0]})
    report.note(
        "same plans",
        f"The same plan, table by table: {same} of {options.jobs} ({different} different problems' plans among them).",
    )
    if same != options.jobs:
        report.failure = "the two ways disagree"
