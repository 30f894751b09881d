"""How long a drift check waits while others have filled the queue with solves.

    python -m benchmarks service_queue --write

Starts `moeplace serve` with one worker, fills its queue with as many long solves as it takes of `--callers` tokens, and
then sends enough windows for a check, again and again: seconds from the answer to the last window until the check is
stored. Checks have a worker of their own, and one look at all deployments every two seconds asks for them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from fault_scene import MODEL, TOPOLOGY, Server, counts, until
from runner import Report

import moeplace as mp
from moeplace.db import Store
from moeplace.db.jobs import MOST_QUEUED, MOST_QUEUED_SECONDS
from moeplace.db.records import Actor

WINDOWS = 16
"""For a check."""
BY = Actor("benchmark", "approve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--checks", type=int, default=20)


def run(options: argparse.Namespace, report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder, served(Path(folder), options.callers) as (url, tokens):
        operator, *callers = tokens
        client = mp.Client(url, token=operator)
        model = client.add_model(MODEL).id
        topology = client.add_topology(TOPOLOGY, "box").id
        client.add_deployment("chat", model, topology, {"solver": "eplb"})
        send(client, 0)
        until(lambda: list(client.checks("chat")) or None)
        queued = fill(url, callers)
        took = []
        for number in range(1, options.checks + 1):
            send(client, number)
            began = time.perf_counter()
            until(lambda number=number: len(list(client.checks("chat"))) > number or None, every=0.02)  # type: ignore[misc]
            took.append(time.perf_counter() - began)
        still = sum(job.state == "queued" for job in client.jobs())
        table = report.table("drift checks under a full queue", ("figure", "value"))
        table.row("solves before them in the queue, of how many callers", f"{queued} of {options.callers}")
        table.row("of these still waiting after the last check", still)
        table.row("checks", len(took))
        table.row("seconds until a check is stored, p50 / max", f"{np.median(took):.1f} / {max(took):.1f}")


@contextmanager
def served(folder: Path, callers: int) -> Iterator[tuple[str, list[str]]]:
    """The server's address; an operator's token, and one for each caller."""
    db = str(folder / "store.db")
    with Store.open(db) as store:
        tokens = [store.tokens.add("operator", "approve", BY)]
        tokens += [store.tokens.add(f"caller-{number}", "submit", BY) for number in range(callers)]
    server = Server(db, "--auth", "--workers", "1", "--check-windows", str(WINDOWS))
    try:
        yield server.url, tokens
    finally:
        server.stop()


def send(client: mp.Client, number: int) -> None:
    """Windows enough for one check."""
    client.push_windows("chat", [counts(WINDOWS * number + i) for i in range(WINDOWS)])


def fill(url: str, tokens: list[str]) -> int:
    """As many long solves of each caller as are taken; returns how many."""
    for token in tokens:
        client = mp.Client(url, token=token)
        for _ in range(MOST_QUEUED):
            client.solve("chat", solver="search", seconds=MOST_QUEUED_SECONDS / MOST_QUEUED)
    return MOST_QUEUED * len(tokens)
