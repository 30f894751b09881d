"""Many deployments pushing count windows to one server: requests a second, latencies, errors, and whether all counts arrived.

    python benchmarks/service_load.py --db postgresql://user@host/empty --deployments 200 --seconds 600 --out docs/results/service_load.md

Starts `moeplace serve` on the database and pushes a window of 58 layers of 256 experts a deployment every `--every` seconds, on
a fixed schedule: a late answer does not delay the next push, and latencies count from when a push was due. A push that fails is
sent again, as an engine would. Afterwards the counts stored must equal those sent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil

import moeplace as mp
from moeplace.db.service_records import CountWindow

LAYERS, EXPERTS, TOP_K = 58, 256, 8


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--db", required=True)
    arguments.add_argument("--deployments", type=int, default=200)
    arguments.add_argument("--seconds", type=int, default=600)
    arguments.add_argument("--every", type=float, default=1.0)
    arguments.add_argument("--senders", type=int, default=16)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    server, url = start(given.db)
    try:
        report = measure(url, given, psutil.Process(server.pid))
    finally:
        server.terminate()
        server.wait(60)
    print(report)
    if given.out:
        given.out.write_text(report)


def start(db: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "moeplace.cli", "serve", "--port", "0", "--rate", "0", "--workers", "0"]
    environment = {**os.environ, "MOEPLACE_DB": db}
    process = subprocess.Popen(
        [*command, "--check-windows", "1000000"], stderr=subprocess.PIPE, env=environment, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        entry = json.loads(line) if line.startswith("{") else {}
        if entry.get("message") == "serving":
            threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True).start()
            return process, str(entry["url"])
    raise SystemExit("the server did not start")


def measure(url: str, given: argparse.Namespace, server: psutil.Process) -> str:
    client = mp.Client(url)
    spec = mp.ModelSpec(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, hidden_size=7168, ffn_size=2048, name="load")
    client.add_model(spec)
    client.add_topology(mp.Topology.preset("h100-hgx", nodes=4), "cluster")
    names = [f"deployment {i:03}" for i in range(given.deployments)]
    for name in names:
        client.add_deployment(name, "load", "cluster")
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.full(EXPERTS, 0.5), size=LAYERS)
    loads = [np.stack([rng.multinomial(4096 * TOP_K, row) for row in chances]) for _ in range(32)]
    due: queue.Queue[tuple[float, str, int] | None] = queue.Queue()
    took: list[float] = []
    waited: list[float] = []
    failures: list[str] = []
    sent = dict.fromkeys(names, 0)
    lock = threading.Lock()

    def send() -> None:
        mine = mp.Client(url)
        while (item := due.get()) is not None:
            at, name, number = item
            load = loads[number % len(loads)]
            window = CountWindow(datetime.fromtimestamp(1.7e9 + number, UTC), load, source=name)
            begun = time.perf_counter()
            while True:
                try:
                    mine.push_windows(name, [window])
                    break
                except mp.MoeplaceError as error:
                    with lock:
                        failures.append(str(error))
            now = time.perf_counter()
            with lock:
                took.append(now - begun)
                waited.append(now - at)
                sent[name] += int(load.sum())

    senders = [threading.Thread(target=send) for _ in range(given.senders)]
    for sender in senders:
        sender.start()
    used = sum(server.cpu_times()[:2])
    began = time.perf_counter()
    rounds = int(given.seconds / given.every)
    for number in range(rounds):
        for position, name in enumerate(names):
            at = began + given.every * (number + position / len(names))
            time.sleep(max(0.0, at - time.perf_counter()))
            due.put((at, name, number))
    for _ in senders:
        due.put(None)
    for sender in senders:
        sender.join()
    elapsed = time.perf_counter() - began
    used = sum(server.cpu_times()[:2]) - used
    stored = {name: client.totals(name) for name in names}
    lost = [name for name in names if stored[name] != (rounds, sent[name])]
    return text(given, elapsed, took, waited, failures, lost, rounds, used)


def text(
    given: argparse.Namespace,
    elapsed: float,
    took: list[float],
    waited: list[float],
    failures: list[str],
    lost: list[str],
    rounds: int,
    used: float,
) -> str:
    kind = "PostgreSQL" if given.db.startswith("postgres") else "SQLite"
    options = (
        f"--deployments {given.deployments} --seconds {given.seconds} --every {given.every:g} --senders {given.senders}"
    )
    lines = [
        "# Load on the service",
        "",
        f"{given.deployments} deployments push a count window of {LAYERS} x {EXPERTS} every {given.every:g} s for {given.seconds} s to one server "
        f"on {kind}. Server, database and senders share {os.cpu_count()} cores ({platform.machine()}), load average "
        f"{os.getloadavg()[2]:.1f} over 15 minutes from other work too.",
        "",
        f"    python benchmarks/service_load.py --db ... {options}",
        "",
        "| figure | value |",
        "|---|---|",
        f"| windows stored | {rounds * given.deployments:,} |",
        f"| requests a second | {len(took) / elapsed:.1f} |",
        *(
            f"| {name} ms, p50 / p99 / max | {' / '.join(f'{1e3 * value:.0f}' for value in (*np.percentile(values, [50, 99]), max(values)))} |"
            for name, values in (("answer", took), ("answer from when due", waited))
        ),
        f"| CPU time of the server a window, ms | {1e3 * used / len(took):.1f} |",
        f"| errors | {len(failures)} |",
        f"| deployments whose counts differ from those sent | {len(lost)} |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
