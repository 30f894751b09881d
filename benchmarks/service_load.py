"""Many deployments pushing count windows to one server: requests a second, latencies, errors, and whether all counts arrived.

    python -m benchmarks service_load --db postgresql://user@host/empty --deployments 200 --seconds 600 --write

Starts `moeplace serve` on the database and pushes a window of 58 layers of 256 experts a deployment every `--every` seconds, on
a fixed schedule: a late answer does not delay the next push, and latencies count from when a push was due. A push that fails is
sent again, as an engine would, and counted as an error. Afterwards the counts stored must equal those sent.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import psutil
from runner import Report

import moeplace as mp
from moeplace.db.records import CountWindow
from moeplace.service.client import Transport
from moeplace.service.counts import ARROW, to_arrow

LAYERS, EXPERTS, TOP_K = 58, 256, 8
Loads = npt.NDArray[np.int64]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--db", required=True)
    parser.add_argument("--deployments", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--every", type=float, default=1.0)
    parser.add_argument("--senders", type=int, default=64)


def run(options: argparse.Namespace, report: Report) -> None:
    server, url = start(options.db)
    try:
        measure(report, url, options, psutil.Process(server.pid))
    finally:
        server.terminate()
        server.wait(60)


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


@dataclass
class Sent:
    """What the senders saw. took: seconds to each answer; waited: from when its push was due. counted: pairs a deployment."""

    took: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


def measure(report: Report, url: str, given: argparse.Namespace, server: psutil.Process) -> None:
    client = mp.Client(url)
    spec = mp.ModelSpec(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, hidden_size=7168, ffn_size=2048, name="load")
    client.add_model(spec)
    client.add_topology(mp.Topology.preset("h100-hgx", nodes=4), "cluster")
    names = [f"deployment-{i:03}" for i in range(given.deployments)]
    for name in names:
        client.add_deployment(name, "load", "cluster")
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.full(EXPERTS, 0.5), size=LAYERS)
    loads = [np.stack([rng.multinomial(4096 * TOP_K, row) for row in chances]) for _ in range(61)]
    due: queue.Queue[tuple[float, str, int, int] | None] = queue.Queue()
    sent = Sent()
    senders = [threading.Thread(target=send, args=(url, loads, due, sent)) for _ in range(given.senders)]
    for sender in senders:
        sender.start()
    used = {name: seconds(processes) for name, processes in parts(server, given.db).items()}
    began = time.perf_counter()
    rounds = int(given.seconds / given.every)
    for number in range(rounds):
        for position, name in enumerate(names):
            at = began + given.every * (number + position / len(names))
            time.sleep(max(0.0, at - time.perf_counter()))
            due.put((at, name, number, position))
    for _ in senders:
        due.put(None)
    for sender in senders:
        sender.join()
    elapsed = time.perf_counter() - began
    used = {name: seconds(processes) - used[name] for name, processes in parts(server, given.db).items()}
    stored = {name: client.totals(name) for name in names}
    lost = [name for name in names if stored[name] != (rounds, sent.counted[name])]
    table = report.table("load on the service", ("figure", "value"), {"value": ","})
    table.row("windows stored", rounds * given.deployments)
    table.row("requests a second", round(len(sent.took) / elapsed, 1))
    for name, values in (("answer", sent.took), ("answer from when due", sent.waited)):
        quantiles = (*np.percentile(values, [50, 99, 99.9]), max(values))
        table.row(f"{name} ms, p50 / p99 / p99.9 / max", " / ".join(f"{1e3 * value:.0f}" for value in quantiles))
    a_window = " / ".join(f"{1e3 * value / len(sent.took):.2f}" for value in used.values())
    table.row(f"CPU time a window, ms, {' / '.join(used)}", a_window)
    table.row("errors", len(sent.failures))
    table.row("deployments whose counts differ from those sent", len(lost))


def send(url: str, loads: list[Loads], due: queue.Queue[tuple[float, str, int, int] | None], sent: Sent) -> None:
    """Pushes what is due, each until it is stored."""
    transport = Transport(url, None, timeout=60)
    pairs = [int(load.sum()) for load in loads]
    while (item := due.get()) is not None:
        at, name, number, position = item
        kind = (number + position) % len(loads)
        window = CountWindow(datetime.fromtimestamp(1.7e9 + number, UTC), loads[kind], source=name)
        body = to_arrow([window])
        begun = time.perf_counter()
        while True:
            try:
                transport.call("POST", f"/v1/deployments/{name}/windows", body, {"Content-Type": ARROW})
                break
            except mp.MoeplaceError as error:
                with sent.lock:
                    sent.failures.append(str(error))
                time.sleep(1.0)
        now = time.perf_counter()
        with sent.lock:
            sent.took.append(now - begun)
            sent.waited.append(now - at)
            sent.counted[name] += pairs[kind]


def parts(server: psutil.Process, db: str) -> dict[str, list[psutil.Process]]:
    """The processes that share the machine: server, senders, and the database's on this machine."""
    found = {"server": [server], "senders": [psutil.Process()]}
    if db.startswith("postgres"):
        told = ("walwriter", "checkpointer", "background writer", f" {urlsplit(db).path.strip('/')} ")
        every = [process for process in psutil.process_iter(["name", "cmdline"]) if process.info["name"] == "postgres"]
        found["database"] = [one for one in every if any(word in " ".join(one.info["cmdline"] or []) for word in told)]
    return found


def seconds(processes: list[psutil.Process]) -> float:
    """CPU time they used so far."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)
