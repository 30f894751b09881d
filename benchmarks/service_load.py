"""Many deployments pushing count windows to one server: requests a second, latencies, errors, and whether all counts
arrived.

    python -m benchmarks service_load --db postgresql://user@host/empty --holders 400 --streams 400 --write

Starts `moeplace serve` on the database and pushes a window of 58 layers of 256 experts a deployment every `--every`
seconds, on a fixed schedule: a late answer does not delay the next push, and latencies count from when a push was due.
A push that fails is sent again, as an engine would, and counted as an error. Afterwards the counts stored must equal
those sent. Beside them `--holders` connections wait for another plan (`plan?wait=60`), and `--streams` follow a job:
they come all at once after a quarter of the time, and half way a plan is published that wakes every holder. The senders
are one process and thread, whose bodies are made before: they are not what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import psutil
from runner import Report

import moeplace as mp
from moeplace.db.records import CountWindow
from moeplace.service.counts import ARROW, to_arrow

LAYERS, EXPERTS, TOP_K = 58, 256, 8
MODEL = mp.ModelSpec(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, hidden_size=7168, ffn_size=2048, name="load")
Loads = npt.NDArray[np.int64]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--db", required=True)
    parser.add_argument("--deployments", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--every", type=float, default=1.0)
    parser.add_argument("--senders", type=int, default=64)
    parser.add_argument("--holders", type=int, default=0, help="that wait for a plan")
    parser.add_argument("--streams", type=int, default=0, help="of a job's events")


def run(options: argparse.Namespace, report: Report) -> None:
    server, url = start(options.db)
    try:
        measure(report, url, options, psutil.Process(server.pid))
    finally:
        server.terminate()
        server.wait(60)


def start(db: str) -> tuple[subprocess.Popen[str], str]:
    command = [
        sys.executable,
        "-m",
        "moeplace.cli",
        "serve",
        "--no-auth",
        "--port",
        "0",
        "--rate",
        "0",
        "--workers",
        "0",
    ]
    environment = {**os.environ, "MOEPLACE_DB": db}
    process = subprocess.Popen(
        [*command, "--check-windows", "1000000"], stderr=subprocess.PIPE, env=environment, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        entry = json.loads(line) if line.startswith("{") else {}
        if entry.get("message") == "serving":
            threading.Thread(target=pass_on, args=(process.stderr,), daemon=True).start()
            return process, str(entry["url"])
    raise SystemExit("the server did not start")


def pass_on(lines: Iterable[str]) -> None:
    """What the server warns of, such as connections that it ended."""
    for line in lines:
        if not line.startswith("{") or json.loads(line).get("level") in ("warning", "error"):
            sys.stderr.write(line)


@dataclass
class Sent:
    """What the senders saw. took: seconds to each answer; waited: from when its push was due; alive: to answers of
    /health. counted: pairs a deployment. came, heard: seconds until all who wait had a first answer, and until all
    holders had the plan that was published meanwhile."""

    took: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    alive: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    came: float = math.nan
    heard: float = math.nan


def measure(report: Report, url: str, given: argparse.Namespace, server: psutil.Process) -> None:
    client = mp.Client(url)
    client.add_model(MODEL)
    client.add_topology(mp.Topology.preset("h100-hgx", nodes=4), "cluster")
    names = [f"deployment-{i:03}" for i in range(given.deployments)]
    for name in names:
        client.add_deployment(name, "load", "cluster")
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.full(EXPERTS, 0.5), size=LAYERS)
    loads = [np.stack([rng.multinomial(4096 * TOP_K, row) for row in chances]) for _ in range(61)]
    flat = mp.RoutingStatistics.from_counts(np.ones((LAYERS, EXPERTS)), top_k=TOP_K)
    problem = mp.Problem(MODEL, client.topology("cluster"), flat)
    plans = [client.add_plan(mp.solve(problem, solver)).id for solver in ("contiguous", "round_robin")]
    client.publish(names[0], plans[0])
    job = client.solve(names[0], solver="eplb").key if given.streams else 0
    rounds = int(given.seconds / given.every)
    used = {name: seconds(processes) for name, processes in parts(server, given.db).items()}
    load = Load(url, names, loads, given)
    began = time.perf_counter()
    sent = asyncio.run(load.run(rounds, names[0], plans[1], job))
    elapsed = time.perf_counter() - began
    used = {name: seconds(processes) - used[name] for name, processes in parts(server, given.db).items()}
    stored = {name: client.totals(name) for name in names}
    lost = [name for name in names if stored[name] != (rounds, sent.counted[name])]
    table = report.table("load on the service", ("figure", "value"), {"value": ","})
    table.row("windows stored", rounds * given.deployments)
    table.row("requests a second", round(len(sent.took) / elapsed, 1))
    shown = {"answer": sent.took, "answer from when due": sent.waited, "answer of /health": sent.alive}
    for name, values in shown.items():
        quantiles = (*np.percentile(values, [50, 99, 99.9]), max(values))
        table.row(f"{name} ms, p50 / p99 / p99.9 / max", " / ".join(f"{1e3 * value:.0f}" for value in quantiles))
    a_window = " / ".join(f"{1e3 * value / len(sent.took):.2f}" for value in used.values())
    table.row(f"CPU time a window, ms, {' / '.join(used)}", a_window)
    table.row("errors", len(sent.failures))
    if given.holders or given.streams:
        broken = sent.broken.total()
        table.row("held, streamed beside it, of them broken off", f"{given.holders} / {given.streams} / {broken}")
        table.row("seconds until each of them had a first answer, who came at once", round(sent.came, 1))
    if given.holders:
        table.row("seconds until each holder had the plan published meanwhile", round(sent.heard, 1))
    table.row("memory of the server at most, MB", round(peak_memory(server.pid) / 1e6))
    table.row("deployments whose counts differ from those sent", len(lost))
    for what, count in sorted(Counter(sent.failures).items()):
        print(f"error: {what}, {count} times", file=sys.stderr)
    for what, count in sorted(sent.broken.items()):
        print(f"broken off: {what}, {count} times", file=sys.stderr)


class Bodies:
    """Arrow streams of count windows, in which only the end of the span and the source differ: put together of pieces
    that are made once."""

    def __init__(self, loads: list[Loads]) -> None:
        ended, source = datetime(2001, 2, 3, 4, 5, 6, 7, UTC), "d" * len("deployment-000")
        marks = (round(ended.timestamp() * 1e6).to_bytes(8, "little"), source.encode())
        self._pieces = []
        for load in loads:
            body = to_arrow([CountWindow(ended, load, source=source)])
            where = sorted((body.index(mark), mark) for mark in marks)
            assert all(body.count(mark) == 1 for mark in marks)
            cuts = [0, *(edge for at, mark in where for edge in (at, at + len(mark))), len(body)]
            pieces = [body[cuts[i] : cuts[i + 1]] for i in range(0, len(cuts), 2)]
            self._pieces.append((pieces, where[0][1] == marks[0]))
        self.pairs = [int(load.sum()) for load in loads]

    def body(self, kind: int, ended: int, source: str) -> bytes:
        """ended: seconds since 1970."""
        pieces, ended_first = self._pieces[kind]
        values = [(ended * 1_000_000).to_bytes(8, "little"), source.encode()]
        first, second = values if ended_first else values[::-1]
        return b"".join((pieces[0], first, pieces[1], second, pieces[2]))


class Line(asyncio.Protocol):
    """A connection that is asked and answers, one after the other. Answers have a length."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[int] | None = None
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        if not found or self._answer is None:
            return
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if len(body) >= int(length or 0):
            self._data = b""
            if not self._answer.done():
                self._answer.set_result(int(head[9:12]))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("closed"))

    @property
    def closed(self) -> bool:
        return bool(self._transport.is_closing())

    def ask(self, request: bytes) -> asyncio.Future[int]:
        """The status of its answer."""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)  # type: ignore[attr-defined]
        return self._answer


class Load:
    """Pushes on a schedule, and beside them connections that wait."""

    def __init__(self, url: str, names: list[str], loads: list[Loads], given: argparse.Namespace) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname, address.port
        self._names, self._bodies, self._given = names, Bodies(loads), given
        self._idle: list[Line] = []
        self._places = asyncio.Semaphore(given.senders)
        self._sent = Sent()
        self._answered: Counter[str] = Counter()

    async def run(self, rounds: int, held: str, plan: str, job: int) -> Sent:
        """rounds: pushes of each deployment. held: whose plan is waited for; plan: what is published half way."""
        beside = [asyncio.create_task(self._live())]
        pushes = set()
        began = time.perf_counter()
        for number in range(rounds):
            for position, name in enumerate(self._names):
                at = began + self._given.every * (number + position / len(self._names))
                await asyncio.sleep(max(0.0, at - time.perf_counter()))
                task = asyncio.create_task(self._push(at, name, number, position))
                pushes.add(task)
                task.add_done_callback(pushes.discard)
                if position == 0 and number == rounds // 4:
                    beside.append(asyncio.create_task(self._come(held, job)))
                if position == 0 and number == rounds // 2 and self._given.holders:
                    beside.append(asyncio.create_task(self._publish(held, plan)))
        while pushes:
            await asyncio.wait(pushes)
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        return self._sent

    async def _line(self) -> Line:
        while self._idle:
            line = self._idle.pop()
            if not line.closed:
                return line
        _, line = await asyncio.get_running_loop().create_connection(Line, self._host, self._port)
        return line

    def _request(self, method: str, path: str, body: bytes = b"", kind: str = ARROW) -> bytes:
        about = f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n" if body else ""
        return f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n{about}\r\n".encode() + body

    async def _ask(self, request: bytes) -> int:
        line = await self._line()
        status = await asyncio.wait_for(line.ask(request), 60)
        self._idle.append(line)
        return status

    async def _push(self, at: float, name: str, number: int, position: int) -> None:
        """One window, until it is stored."""
        kind = (number + position) % len(self._bodies.pairs)
        body = self._bodies.body(kind, 1_700_000_000 + number, name)
        request = self._request("POST", f"/v1/deployments/{name}/windows", body)
        async with self._places:
            begun = time.perf_counter()
            while True:
                try:
                    status = await self._ask(request)
                except (OSError, TimeoutError) as error:
                    self._sent.failures.append(repr(error))
                else:
                    if status == 200:
                        break
                    self._sent.failures.append(str(status))
                await asyncio.sleep(1.0)
            now = time.perf_counter()
        self._sent.took.append(now - begun)
        self._sent.waited.append(now - at)
        self._sent.counted[name] += self._bodies.pairs[kind]

    async def _live(self) -> None:
        """Asks for /health ten times a second, over a new connection each time, as whoever watches over it does."""
        while True:
            begun = time.perf_counter()
            try:
                _, line = await asyncio.get_running_loop().create_connection(Line, self._host, self._port)
                await asyncio.wait_for(line.ask(self._request("GET", "/health")), 60)
                line._transport.close()
            except (OSError, TimeoutError) as error:
                self._sent.failures.append(repr(error))
            self._sent.alive.append(time.perf_counter() - begun)
            await asyncio.sleep(0.1)

    async def _come(self, held: str, job: int) -> None:
        """All who wait, at once: for a plan that stays in force, and for a job that no worker takes."""
        paths = [f"/v1/deployments/{held}/plan?wait=60"] * self._given.holders
        paths += [f"/v1/jobs/{job}/events"] * self._given.streams
        begun = time.perf_counter()
        firsts = [asyncio.get_running_loop().create_future() for _ in paths]
        async with asyncio.TaskGroup() as group:
            for path, first in zip(paths, firsts, strict=True):
                group.create_task(self._wait(path, first))
            await asyncio.wait(firsts)
            self._sent.came = time.perf_counter() - begun

    async def _publish(self, held: str, plan: str) -> None:
        before, begun = self._answered["2"], time.perf_counter()
        body = json.dumps({"plan": plan, "comment": ""}).encode()
        status = await self._ask(self._request("PUT", f"/v1/deployments/{held}/plan", body, "application/json"))
        if status != 200:
            self._sent.failures.append(f"publish: {status}")
        while self._answered["2"] < before + self._given.holders:
            await asyncio.sleep(0.01)
        self._sent.heard = time.perf_counter() - begun

    async def _wait(self, path: str, first: asyncio.Future[None]) -> None:
        """Asks, again once it was answered."""
        etag = ""
        while True:
            try:
                reader, writer = await asyncio.open_connection(self._host, self._port, limit=1 << 22)
                known = f"If-None-Match: {etag}\r\n" if etag else ""
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n{known}\r\n".encode())
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                status = head.split()[1]
                if status not in ("200", "304"):
                    self._sent.broken[f"{path.rpartition('/')[2]} {status}"] += 1
                if not first.done():
                    first.set_result(None)
                etag = head.partition("\r\netag: ")[2].partition("\r\n")[0] or etag
                while await reader.read(1 << 16):
                    pass
                writer.close()
                if "/events" in path:
                    self._sent.broken["a stream that ended"] += 1
                elif status == "200":
                    self._answered["2"] += 1
            except (OSError, asyncio.IncompleteReadError) as error:
                self._sent.broken[f"{path.rpartition('/')[2]} {type(error).__name__}"] += 1
                await asyncio.sleep(1.0)


def peak_memory(pid: int) -> int:
    """Bytes that a process had in memory at most."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


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
