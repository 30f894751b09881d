"""A batch of solves on the service: worker processes of one machine, and the same number of workers on a local Ray.

    python benchmarks/service_ray.py --data DATA --jobs 64 --workers 2

Each job places a model of Mixtral's shape (32 layers of 8 experts, on 4 devices) for other transitions, made from recorded ones as
benchmarks/mixtral_ilp.py makes them, by the solver chain: exact, so that two ways of running it must give the same plans. Each way
has a server and an SQLite database of its own; time runs from the first job asked for to the last one done, with workers up before.
The plans are compared table by table. Needs the extra `ray`.
"""

from __future__ import annotations

import argparse
import os
import platform
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
from mixtral_ilp import DOMAINS, problem_of, transitions_of_mixtral_shape

import moeplace as mp

DEVICES = 4


@contextmanager
def serving(db: Path, workers: Sequence[str]) -> Iterator[str]:
    """A server; yields its address."""
    command = [sys.executable, "-m", "moeplace.cli", "serve", "--db", str(db), "--port", "0", "--rate", "0", *workers]
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    counts = np.load(given.data / "olmoe_mixtral_counts.npz", allow_pickle=False)
    recorded = np.stack([counts[f"mixtral_8x7b/{domain}/transitions_top1"] for domain in DOMAINS]).astype(float)
    problems = [problem_of(transitions_of_mixtral_shape(recorded, seed), DEVICES) for seed in range(given.jobs)]
    ways = {
        "process pool": ("--workers", str(given.workers)),
        "local Ray": ("--workers", "ray:local", "--ray-workers", str(given.workers)),
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (way, workers) in enumerate(ways.items()):
            found[way] = batch(Path(folder) / f"{number}.db", workers, problems, given.workers)
            print(f"{way}: {found[way][0]:.1f} s", file=sys.stderr)
    pool, ray = found["process pool"], found["local Ray"]
    same = sum(
        np.array_equal(one.physical_to_logical, other.physical_to_logical) and one.fingerprint == other.fingerprint
        for one, other in zip(pool[1], ray[1], strict=True)
    )
    different = len({plan.fingerprint for plan in pool[1]})
    load = os.getloadavg()[2]
    print("# Solves on Ray\n")
    print(
        f"{given.jobs} solves of a model of Mixtral's shape on {DEVICES} devices by the solver chain, {given.workers} workers each way, "
        f"on {os.cpu_count()} cores ({platform.machine()}) that server, database and sender share; load average {load:.1f} over "
        "15 minutes from other work too. One run each, in this order: at such a load the two times tell that both ways keep up, not "
        "which is faster. Ray starts a worker process beside each actor, and jobs go through the database either way.\n"
    )
    print(f"    python benchmarks/service_ray.py --data DATA --jobs {given.jobs} --workers {given.workers}\n")
    print("| way | seconds | solves a second | workers that took part |\n|---|---|---|---|")
    for way, (taken, plans, took_part) in found.items():
        print(f"| {way} | {taken:.1f} | {len(plans) / taken:.2f} | {took_part} |")
    print(
        f"\nThe same plan, table by table: {same} of {given.jobs} ({different} different problems' plans among them)."
    )
    if same != given.jobs:
        raise SystemExit("the two ways disagree")


if __name__ == "__main__":
    main()
