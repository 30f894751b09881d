"""Faults done to the service again and again: what is lost, what is doubled, which jobs do not finish, how long it
takes.

    python -m benchmarks service_faults --repeats 20 --write
    python -m benchmarks service_faults --repeats 3 --only "PostgreSQL restarted"

Everything is real: server and worker processes, a PostgreSQL of the benchmark's own that is stopped in mid-air, a file
system that is full, system clocks that jump (libfaketime). Senders go on meanwhile and send again what got no answer.
Needs PostgreSQL's programs; the full disk needs the right to mount; clocks need libfaketime.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from fault_scene import MODEL, Postgres, Pusher, Server, counts, folder, prepared, until
from runner import Report

import moeplace as mp
from moeplace.profiler.trace_files import write_trace
from moeplace.service.client import Transport

PIECE = 1 << 13
BATCH, MOST_BATCHES = 200, 200
"""Windows a request, and requests, that fill what is left of a disk."""
JSON = {"Content-Type": "application/json"}
WORKER = ("--workers", "1", "--lease", "15")
JUMPS = (7, -7, 3600, -3600, 86_400, -86_400, 2_592_000, -2_592_000)
"""Seconds."""


@dataclass
class Found:
    """lost, doubled: windows, uploads, plans, approvals. unfinished: jobs not done. recovery: seconds from the fault
    until what it cut short was complete. middle: faults that did fall in the middle."""

    lost: int = 0
    doubled: int = 0
    unfinished: int = 0
    middle: int = 0
    recovery: list[float] = field(default_factory=list)

    def expect(self, wanted: int, found: int) -> None:
        self.lost += max(0, wanted - found)
        self.doubled += max(0, found - wanted)

    def pushed(self, pusher: Pusher, client: mp.Client, before: int) -> None:
        """Compares what was answered with what is stored; `before` windows stood there already."""
        windows, pairs = pusher.close()
        stored = client.totals(pusher.deployment)
        old = sum(int(counts(-2 - number).load.sum()) for number in range(before))
        self.expect(windows + before, stored[0])
        if stored[0] == windows + before and stored[1] != pairs + old:
            self.lost += 1

    def job(self, server: Server, client: mp.Client, key: int) -> None:
        """Waits for a job; whoever did it, it is to be done, once."""
        ended = until(lambda: (job := client.job(key)).state in ("done", "failed", "cancelled") and job)
        self.unfinished += ended.state != "done"
        self.doubled += max(0, server.outcomes_stored(key) - 1)


def start(stack: ExitStack, *arguments: str, db: str = "", **options: Any) -> tuple[Server, mp.Client]:
    server = Server(db, *arguments, **options)
    stack.callback(server.stop)
    return server, mp.Client(server.url, timeout=60)


def own_postgres(stack: ExitStack) -> Postgres:
    postgres = Postgres(stack.enter_context(folder()))
    stack.callback(postgres.stop, "immediate")
    return postgres


def asked(db: str, query: str, *values: Any) -> tuple[Any, ...]:
    """One row, from PostgreSQL itself."""
    with psycopg.connect(db) as connection:
        row = connection.execute(query.encode(), values).fetchone()
        assert row is not None
        return row


def solvable(client: mp.Client, *names: str, **policy: Any) -> None:
    prepared(client, *names, **policy)
    for name in names:
        client.push_windows(name, [counts(-2 - number) for number in range(16)])


def running(client: mp.Client, seed: int) -> int:
    """A solve that takes its two seconds, under way."""
    key = client.solve("chat", seed=seed, seconds=2.0).key
    until(lambda: client.job(key).state != "queued" or None, every=0.02)
    return key


def uploads(repeats: int) -> Found:
    found, chance = Found(), random.Random(0)
    with ExitStack() as stack:
        db = own_postgres(stack).url
        server, client = start(stack, "--workers", "0", db=db)
        prepared(client, "chat")
        pusher = Pusher(server.url, "chat")
        for number in range(repeats):
            content = shard(number)
            at_piece, reached = chance.randrange(1, len(content) // PIECE), threading.Event()
            sender = threading.Thread(target=upload, args=(server.url, content, at_piece, reached))
            sender.start()
            reached.wait()
            time.sleep(chance.uniform(0.0, 0.02))
            server.kill()
            fault = time.monotonic()
            found.middle += asked(db, "SELECT count(*) FROM uploads WHERE state = 'open'")[0]
            server.start()
            sender.join()
            until(partial(pusher.stored_since, fault))
            found.recovery.append(time.monotonic() - fault)
        found.pushed(pusher, client, 0)
        whole = "SELECT u.key FROM uploads u JOIN upload_parts p ON p.upload_key = u.key WHERE u.state = 'complete' "
        whole += "GROUP BY u.key HAVING sum(length(p.content)) = u.total_bytes"
        found.expect(repeats, asked(db, f"SELECT count(*) FROM ({whole}) AS whole")[0])
    return found


def upload(url: str, content: bytes, at_piece: int, reached: threading.Event) -> None:
    """Sends a file in small pieces, going on where it stopped."""
    transport = Transport(url, None, 60)
    about = {"kind": "trace", "deployment": "chat", "sha256": hashlib.sha256(content).hexdigest()}
    body = json.dumps({**about, "total_bytes": len(content)}).encode()
    record = until(lambda: transport.call("POST", "/v1/uploads", body, JSON).json())
    path = f"/v1/uploads/{record['key']}"
    while (sent := record["received_bytes"]) < len(content):
        if sent // PIECE >= at_piece:
            reached.set()
        headers = {"Content-Type": "application/octet-stream", "Upload-Offset": str(sent)}
        try:
            record = transport.call("PATCH", path, content[sent : sent + PIECE], headers).json()
        except mp.MoeplaceError:
            record = until(lambda: transport.call("GET", path).json())
    until(lambda: transport.call("POST", f"{path}/finish").json()["state"] == "complete" or None)


def shard(seed: int) -> bytes:
    """A Parquet shard of the toy model's routing."""
    ids = np.random.default_rng(seed).random((20_000, MODEL.layers, MODEL.experts)).argsort(axis=2)[..., : MODEL.top_k]
    with folder() as place:
        write_trace(mp.RoutingTrace.from_arrays(ids, num_experts=MODEL.experts), place / "trace", model=MODEL)
        [file] = (place / "trace").glob("*.parquet")
        return file.read_bytes()


def solves(repeats: int, *, whole_server: bool) -> Found:
    found, chance = Found(), random.Random(1)
    with ExitStack() as stack:
        db = own_postgres(stack).url
        server, client = start(stack, *WORKER, db=db)
        solvable(client, "chat")
        for number in range(repeats):
            key = running(client, number)
            time.sleep(chance.uniform(0.0, 1.5))
            if whole_server:
                server.kill()
            else:
                os.kill(server.worker_pid(), signal.SIGKILL)
            fault = time.monotonic()
            found.middle += asked(db, "SELECT count(*) FROM jobs WHERE key = %s AND state <> 'done'", key)[0]
            if whole_server:
                server.start()
            found.job(server, client, key)
            found.recovery.append(time.monotonic() - fault)
        found.expect(repeats, asked(db, "SELECT count(*) FROM plans")[0])
    return found


def approvals(repeats: int) -> Found:
    found, chance = Found(), random.Random(2)
    names = [f"chat-{number}" for number in range(repeats)]
    with ExitStack() as stack:
        db = own_postgres(stack).url
        decider, client = start(stack, *WORKER, "--check-windows", "16", db=db)
        solvable(client, *names, solver="eplb", horizon_steps=5e6)
        waiting = until(lambda: len(every := list(client.decisions(state="waiting"))) == repeats and every, every=1.0)
        decider.stop()
        server, client = start(stack, "--workers", "0", db=db)
        for decision in waiting:
            approve = partial(until, partial(client.approve, decision.key))
            approving = threading.Thread(target=approve)
            approving.start()
            time.sleep(chance.uniform(0.0, 0.1))
            server.kill()
            fault = time.monotonic()
            found.middle += approving.is_alive()
            server.start()
            approving.join()
            found.recovery.append(time.monotonic() - fault)
            found.expect(1, len(list(client.publications(decision.deployment))))
        found.expect(repeats, len(list(client.audit(action="decision.approve"))))
        found.expect(repeats, len(list(client.decisions(state="published"))))
    return found


def postgres_restarts(repeats: int) -> Found:
    found, chance = Found(), random.Random(3)
    names = ("chat", "code", "mail", "news")
    with ExitStack() as stack:
        postgres = own_postgres(stack)
        server, client = start(stack, *WORKER, db=postgres.url)
        solvable(client, *names)
        pushers = [Pusher(server.url, name) for name in names]
        for number in range(repeats):
            key = running(client, number)
            time.sleep(chance.uniform(0.0, 1.0))
            postgres.stop(("immediate", "fast")[number % 2])
            time.sleep(chance.uniform(0.0, 3.0))
            postgres.start()
            fault = time.monotonic()
            found.middle += asked(postgres.url, "SELECT count(*) FROM jobs WHERE key = %s AND state <> 'done'", key)[0]
            for pusher in pushers:
                until(partial(pusher.stored_since, fault))
            found.job(server, client, key)
            found.recovery.append(time.monotonic() - fault)
        for pusher in pushers:
            found.pushed(pusher, client, 16)
        found.expect(repeats, asked(postgres.url, "SELECT count(*) FROM plans")[0])
    return found


def full_disks(repeats: int) -> Found:
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(64 + 16 * repeats))
        return filled(stack, disk, str(disk / "store.db"), repeats, 6 << 20)


def full_postgres_disks(repeats: int) -> Found:
    """Its log of changes grows in small pieces, so that there is no room for it either: PostgreSQL then goes down, and
    is started once there is room, as an operator does."""
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(160 + 4 * repeats))
        postgres = Postgres(disk, "min_wal_size=2MB", "max_wal_size=8MB", log_segment=1)
        stack.callback(lambda: postgres.is_up() and postgres.stop("immediate"))
        return filled(stack, disk, postgres.url, repeats, 1 << 20, postgres)


def filled(stack: ExitStack, disk: Path, db: str, repeats: int, size: int, postgres: Postgres | None = None) -> Found:
    """Fills the disk again and again: at once, and every other time by windows that are sent until one is refused."""
    found, batches, downs = Found(), 0, 0
    server, client = start(stack, *WORKER, db=db)
    solvable(client, "chat", "code")
    pusher = Pusher(server.url, "chat")
    transport = Transport(server.url, None, 60)
    for number in range(repeats):
        key = running(client, number)
        content = random.Random(number).randbytes(size)
        upload_key = until(partial(begun, transport, content))["key"]
        fill(disk / "ballast", leave=number % 2 << 19)
        most = batches + MOST_BATCHES * (number % 2)
        while batches < most and taken(server.url, "POST", "/v1/deployments/code/windows", batch(batches), JSON):
            batches += 1
        piece = {"Content-Type": "application/octet-stream", "Upload-Offset": "0"}
        found.middle += not taken(server.url, "PATCH", f"/v1/uploads/{upload_key}", content, piece)
        time.sleep(0.5)
        (disk / "ballast").unlink()
        fault = time.monotonic()
        if postgres is not None and not postgres.is_up():
            downs += 1
            postgres.start()
        found.expect(len(content), until(partial(append, transport, upload_key, content))["received_bytes"])
        until(partial(pusher.stored_since, fault))
        until(partial(transport.call, "POST", "/v1/deployments/code/windows", batch(batches), JSON))
        batches += 1
        found.job(server, client, key)
        found.recovery.append(time.monotonic() - fault)
    found.pushed(pusher, client, 16)
    found.expect(16 + BATCH * batches, client.totals("code")[0])
    found.expect(repeats, len(list(client.plans())))
    if postgres is not None:
        print(f"{BATCH * batches} windows besides; PostgreSQL went down {downs} times of {repeats}", flush=True)
    return found


def batch(number: int) -> bytes:
    """A request with many windows, others for every number."""
    sent = [counts(1_000_000 + number * BATCH + position) for position in range(BATCH)]
    windows = [{"ended": window.ended.isoformat(), "load": window.load.tolist()} for window in sent]
    return json.dumps({"windows": windows}).encode()


def taken(url: str, method: str, path: str, body: bytes, headers: dict[str, str]) -> bool:
    """Whether a request is; otherwise it is refused as it should be.

    Raises:
        AssertionError: what came is neither a success nor a problem of status 503.
    """
    try:
        urllib.request.urlopen(urllib.request.Request(url + path, body, headers, method=method), timeout=120).close()
    except urllib.error.HTTPError as error:
        told, kind = json.loads(error.read()), error.headers["Content-Type"]
        if (error.code, kind, told["status"]) != (503, "application/problem+json", 503):
            raise AssertionError(f"{error.code} {kind}: {told}") from None
        return False
    return True


def begun(transport: Transport, content: bytes) -> Any:
    """An upload of this content."""
    about = {"kind": "statistics", "sha256": hashlib.sha256(content).hexdigest(), "total_bytes": len(content)}
    return transport.call("POST", "/v1/uploads", json.dumps(about).encode(), JSON).json()


def append(transport: Transport, key: int, content: bytes) -> Any:
    """All of an upload in one piece; as it is, where that came already."""
    record = transport.call("GET", f"/v1/uploads/{key}", again=True).json()
    if record["received_bytes"] == len(content):
        return record
    headers = {"Content-Type": "application/octet-stream", "Upload-Offset": "0"}
    return transport.call("PATCH", f"/v1/uploads/{key}", content, headers).json()


@contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    with folder() as place:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", str(place)], check=True)


def fill(path: Path, leave: int) -> None:
    """Leaves so many bytes free, about."""
    with path.open("wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
        file.truncate(max(0, file.tell() - leave))


def clock_jumps(repeats: int) -> Found:
    found = Found()
    [library] = list(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    with ExitStack() as stack:
        db = own_postgres(stack).url
        clock = stack.enter_context(folder()) / "clock"
        clock.write_text("+0")
        fake = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
        # What counts seconds since the start runs on when a clock is set.
        fake |= {"DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        # A lease that no busy machine outlasts: what is begun again is the clock's doing.
        server, client = start(stack, *WORKER, "--lease", "120", db=db, environment=fake)
        solvable(client, "chat")
        pusher = Pusher(server.url, "chat")
        for number in range(repeats):
            key = running(client, number)
            before = client.job(key)
            clock.with_suffix(".new").write_text(f"{JUMPS[number % len(JUMPS)]:+d}")
            clock.with_suffix(".new").replace(clock)
            fault = time.monotonic()
            found.middle += before.state == "running"
            until(partial(pusher.stored_since, fault))
            found.job(server, client, key)
            # A worker that lives keeps its job, whatever the time.
            found.doubled += client.job(key).attempts - 1
            found.recovery.append(time.monotonic() - fault)
        found.pushed(pusher, client, 16)
        found.expect(repeats, asked(db, "SELECT count(*) FROM plans")[0])
    return found


FAULTS: dict[str, Callable[[int], Found]] = {
    "server killed in the middle of an upload": uploads,
    "server killed in the middle of a solve": partial(solves, whole_server=True),
    "server killed in the middle of an approval": approvals,
    "worker killed in the middle of a solve": partial(solves, whole_server=False),
    "PostgreSQL restarted under load": postgres_restarts,
    "disk full, SQLite": full_disks,
    "disk full, PostgreSQL": full_postgres_disks,
    "clock jumps": clock_jumps,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", action="append", help="part of a fault's name; may be given several times")
    parser.add_argument("--at-once", type=int, default=1, help="faults side by side, each with servers of its own")


def run(options: argparse.Namespace, report: Report) -> None:
    names = [name for name in FAULTS if not options.only or any(part in name for part in options.only)]
    counted = ("repeats", "in the middle", "lost", "doubled", "unfinished")
    formats = dict.fromkeys(("recovery s, median", "slowest"), ".1f")
    table = report.table("faults", ("fault", *counted, *formats), formats)
    with ThreadPoolExecutor(options.at_once) as pool:
        for name, found in zip(names, pool.map(lambda name: FAULTS[name](options.repeats), names), strict=True):
            figures = (len(found.recovery), found.middle, found.lost, found.doubled, found.unfinished)
            table.row(name, *figures, float(np.median(found.recovery)), max(found.recovery))
