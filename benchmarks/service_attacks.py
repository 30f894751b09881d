"""Memory of a server under everything that took others' time, memory or place, and what it answers meanwhile.

    python -m benchmarks service_attacks --write

One `moeplace serve` on a file; each kind of abuse in turn, several at once of those that come in bodies, while another
client asks for a deployment from another address. A row a kind: what was answered, the server's memory at most until
then (its own, and that of the processes that read for it), and the longest that the other client waited. After all of
it the server must still answer, and take windows.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import http.client
import io
import json
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
from fault_scene import MODEL, TOPOLOGY, Server, counts
from runner import Report

import moeplace as mp
from moeplace.db.records import CountWindow
from moeplace.profiler.statistics_file import write_statistics
from moeplace.service.counts import ARROW

AT_ONCE = 3
OTHER = "127.0.0.2"
"""The address of a client that does nothing wrong."""
WINDOWS = "/v1/deployments/chat/windows"
JSON = {"Content-Type": "application/json"}
STEPS = {"options": {"step_tokens": 10**8}, "solver": "search"}
PROXIED = (("X-Forwarded-For", "10.1.1.1"), ("Forwarded", "for=10.1.1.1"), ("Host", "evil.example"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--connections", type=int, default=1004, help="half-open requests at once")
    parser.add_argument("--waiting", type=int, default=400, help="that wait for a plan, and as many for a job")


def run(options: argparse.Namespace, report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        recorder = f"default={folder}"
        server = Server(str(Path(folder) / "store.db"), "--workers", "0", "--peer", "127.0.0.1", "--recorder", recorder)
        try:
            measure(options, report, Attacked(server))
        finally:
            server.stop()


class Attacked:
    """A server with a deployment, and what is seen of it: memory at most, and how long others wait."""

    def __init__(self, server: Server) -> None:
        self.url, self._process = server.url, psutil.Process(server.process.pid)
        address = urlsplit(server.url)
        self.host, self.port = str(address.hostname), int(address.port or 0)
        self.client = mp.Client(self.url)
        model, topology = self.client.add_model(MODEL).id, self.client.add_topology(TOPOLOGY, "box").id
        self.client.add_deployment("chat", model, topology, {"solver": "eplb"})
        self.client.push_windows("chat", [counts(i) for i in range(16)])
        self.own = self.together = 0
        self.slowest = 0.0
        self._stop = threading.Event()
        for look in (self._memory, self._others):
            threading.Thread(target=look, daemon=True).start()

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        source: str = "127.0.0.1",
    ) -> int:
        """The status of one answer; 0 where the connection ended without one."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=180, source_address=(source, 0))
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            while answer.read(1 << 20):
                pass
            return answer.status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def _memory(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(psutil.Error):
                self.own = max(self.own, self._process.memory_info().rss)
                children = self._process.children(recursive=True)
                self.together = max(self.together, self.own + sum(child.memory_info().rss for child in children))
            time.sleep(0.02)

    def _others(self) -> None:
        while not self._stop.is_set():
            began = time.perf_counter()
            self.ask("GET", "/v1/deployments/chat", source=OTHER)
            self.slowest = max(self.slowest, time.perf_counter() - began)
            time.sleep(0.02)

    def stop(self) -> None:
        """Looks no longer."""
        self._stop.set()


def measure(options: argparse.Namespace, report: Report, server: Attacked) -> None:
    table = report.table(
        "server under abuse",
        ("what", "answers", "server MB at most", "with its readers", "another client's longest wait, s"),
        {"another client's longest wait, s": ".2f"},
    )
    for what, attack in attacks(options).items():
        server.slowest = 0.0
        statuses = attack(server)
        answers = ", ".join(f"{count} x {status or 'ended'}" for status, count in sorted(Counter(statuses).items()))
        table.row(what, answers, round(server.own / 1e6), round(server.together / 1e6), server.slowest)
    server.stop()
    stored = server.client.push_windows("chat", [counts(10**6 + i) for i in range(16)])
    report.note(
        "afterwards", f"Afterwards the server answers {server.ask('GET', '/')} and takes windows ({stored} new)."
    )


def attacks(options: argparse.Namespace) -> dict[str, Callable[[Attacked], list[int]]]:
    """By what they are."""

    def bodies(path: str, body: bytes, kind: str = "application/json", method: str = "POST", **more: str) -> Any:
        def go(server: Attacked) -> list[int]:
            headers = {"Content-Type": kind, **more}
            with ThreadPoolExecutor(AT_ONCE) as pool:
                asked = [pool.submit(server.ask, method, path, body, headers) for _ in range(AT_ONCE)]
                return [one.result() for one in asked]

        return go

    def dump(value: Any) -> bytes:
        return json.dumps(value).encode()

    policy = "/v1/deployments/chat/policy"
    spec = MODEL.model_dump(mode="json", exclude_unset=True)
    many = b"[]," * 6_000_000
    return {
        "16 million zeros in kilobytes of zstd (Arrow)": bodies(WINDOWS, zeros("zstd"), ARROW),
        "the same in lz4": bodies(WINDOWS, zeros("lz4"), ARROW),
        "texts of a dictionary, a thousandfold (Arrow)": bodies(WINDOWS, dictionary(), ARROW),
        "8 MB of metadata (Arrow)": bodies(WINDOWS, metadata(), ARROW),
        "6 million empty lists as windows": bodies(WINDOWS, b'{"windows":[{"load":[' + many + b"[]]}]}"),
        "the same as a plan": bodies("/v1/plans", b'{"document":{"a":[' + many + b"[]]}}"),
        "a gigabyte of zeros in a megabyte of gzip": bodies(
            WINDOWS, gzip.compress(bytes(1 << 30), 1), **{"Content-Encoding": "gzip"}
        ),
        "a date before all dates": bodies(
            WINDOWS, dump({"windows": [{"ended": "0001-01-01T00:00:00+14:00", "load": []}]})
        ),
        "counts of 2^53": bodies(WINDOWS, dump({"windows": [window(2**53)] * 6})),
        "options nested 900 deep": bodies(policy, b'{"options":' + b'{"a":' * 900 + b"1" + b"}" * 901, method="PUT"),
        "a number of 400 digits": bodies("/v1/models", dump({"spec": {**spec, "hidden_size": 10**399}})),
        "layer 10^40": bodies("/v1/models", dump({"spec": {**spec, "moe_layers": [10**40]}})),
        "steps of 100 million tokens": bodies(
            policy, dump({"options": {"step_tokens": 10**8}, "solver": "search"}), method="PUT"
        ),
        "a form of many parts": bodies(WINDOWS, b"--b\r\n\r\nx\r\n" * 400_000, "multipart/form-data; boundary=b"),
        "statistics that unpack to 106 MB": uploads,
        "webhooks nobody can call": bodies("/v1/deployments/chat/webhooks", dump({"url": "http://[bad/"})),
        "an engine that answers 60 MB": engine,
        "a receiver of a byte every five seconds": receiver,
        "half-open requests": lambda server: half_open(server, options.connections),
        "who waits for plans and jobs": lambda server: waiting(server, options.waiting),
        "pages of 1,024 devices": pages,
        "windows of a million experts, read 64 at a time": large_windows,
        "120 pages of 1,024 devices, asked for at once": many_pages,
        "a body of 24 MB on a connection to be closed": closed,
        "headers without end": headers,
        "addresses of 60 kB, and methods nobody knows": odd_requests,
        "wrong tokens": lambda server: [
            server.ask("GET", "/v1/deployments", headers={"Authorization": f"Bearer mp_{i}"}) for i in range(50)
        ],
        "through a proxy nobody named": lambda server: [
            server.ask("POST", "/v1/deployments/chat/rollback", b'{"version":1}', {**JSON, name: value})
            for name, value in (
                ("X-Forwarded-For", "10.1.1.1"),
                ("Forwarded", "for=10.1.1.1"),
                ("Host", "evil.example"),
            )
        ],
    }


def large_windows(server: Attacked) -> list[int]:
    model = mp.ModelSpec(layers=1024, experts=1024, top_k=4, hidden_size=64, ffn_size=64, name="huge")
    ids = server.client.add_model(model).id, server.client.add_topology(TOPOLOGY).id
    server.client.add_deployment("huge", *ids, {"solver": "eplb"})
    load = np.random.default_rng(0).integers(0, 200, (1024, 1024))
    for part in range(16):
        moments = [datetime(2026, 1, 1, part, minute, tzinfo=UTC) for minute in range(4)]
        server.client.push_windows("huge", [CountWindow(moment, load) for moment in moments])
    with ThreadPoolExecutor(AT_ONCE) as pool:
        paths = ["/v1/deployments/huge/windows?limit=64", "/deployments/huge"] * AT_ONCE
        return list(pool.map(lambda path: server.ask("GET", path), paths))


def many_pages(server: Attacked) -> list[int]:
    with ThreadPoolExecutor(120) as pool:
        return list(pool.map(lambda _: server.ask("GET", "/deployments/wide"), range(120)))


def closed(server: Attacked) -> list[int]:
    return [server.ask("POST", "/v1/models", bytes(24 << 20), {**JSON, "Connection": "close"}) for _ in range(AT_ONCE)]


def window(count: int) -> dict[str, Any]:
    load = np.full((MODEL.layers, MODEL.experts), count).tolist()
    return {"ended": "2026-01-01T00:00:00Z", "load": load}


def stream(table: Any, **options: Any) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def zeros(codec: str) -> bytes:
    import pyarrow as pa

    columns = {"ended": pa.array([datetime(2026, 1, 1, tzinfo=UTC)]), "load": pa.array([np.zeros(1 << 24, np.int64)])}
    return stream(pa.table(columns), compression=codec)


def dictionary() -> bytes:
    import pyarrow as pa

    rows = 100_000
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array(["x" * 100_000]))
    columns = {"ended": pa.array([datetime(2026, 1, 1, tzinfo=UTC)] * rows), "workload": text}
    return stream(pa.table({**columns, "load": pa.array([[1]] * rows)}))


def metadata() -> bytes:
    import pyarrow as pa

    columns = {"ended": pa.array([datetime(2026, 1, 1, tzinfo=UTC)]), "load": pa.array([[1]])}
    return stream(pa.table(columns).replace_schema_metadata({f"k{i}": "v" * 1000 for i in range(8000)}))


def uploads(server: Attacked) -> list[int]:
    load = np.ones((900, 58, 256))
    statistics = mp.RoutingStatistics(
        experts=256, moe_layers=tuple(range(58)), load=load, window_workload=np.zeros(900, int)
    )
    packed = io.BytesIO()
    write_statistics(statistics, packed)

    def upload(_: int) -> int:
        try:
            mp.Client(server.url).upload_statistics(io.BytesIO(packed.getvalue()))
        except mp.MoeplaceError:
            return 422
        return 200

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(upload, range(AT_ONCE)))


@contextmanager
def peer(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A listener that answers everybody so; its address."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)

        def serve(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:
                connection.recv(65536)
                answer(connection)

        def accept() -> None:
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        stop.set()
        thread.join()


def engine(server: Attacked) -> list[int]:
    def much(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[")
        for _ in range(20):
            connection.sendall(b"[]," * 1_000_000)

    with peer(much) as url:
        client = server.client
        client.set_engine("chat", url, every=1.0, span=1.0)
        time.sleep(6)
        client.remove_engine("chat")
    return [200]


def receiver(server: Attacked) -> list[int]:
    def slow(connection: socket.socket) -> None:
        for byte in b"HTTP/1.1 200 OK\r\n":
            connection.sendall(bytes([byte]))
            time.sleep(5)

    with peer(slow) as url:
        made = server.client.add_webhook("chat", url)
        plan = mp.solve(
            mp.Problem(MODEL, TOPOLOGY, mp.RoutingStatistics.from_counts(counts(1).load, top_k=MODEL.top_k)), "eplb"
        )
        server.client.publish("chat", server.client.add_plan(plan).id)
        time.sleep(3)
        server.client.remove_webhook("chat", made.key)
    return [200]


def half_open(server: Attacked, count: int) -> list[int]:
    held = []
    for _ in range(count):
        with contextlib.suppress(OSError):
            connection = socket.create_connection((server.host, server.port), timeout=5)
            connection.sendall(b"POST /v1/plans HTTP/1.1\r\nHost: x\r\nContent-Le")
            held.append(connection)
    statuses = [server.ask("GET", "/v1/deployments") for _ in range(20)]
    for connection in held:
        connection.close()
    return statuses


def waiting(server: Attacked, count: int) -> list[int]:
    etag = server.client.plan_in_force("chat", "moeplace").etag
    job = server.client.solve("chat", solver="eplb").key
    plan = f"GET /v1/deployments/chat/plan?wait=60 HTTP/1.1\r\nHost: 127.0.0.1\r\nIf-None-Match: {etag}\r\n\r\n"
    events = f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    held = []
    for _ in range(count):
        for text in (plan, events):
            connection = socket.create_connection((server.host, server.port), timeout=30)
            connection.sendall(text.encode())
            held.append(connection)
    time.sleep(3)
    statuses = [server.ask("GET", "/v1/deployments") for _ in range(20)]
    for connection in held:
        connection.close()
    server.client.cancel(job)
    return statuses


def pages(server: Attacked) -> list[int]:
    model = mp.ModelSpec(layers=2, experts=1024, top_k=4, hidden_size=64, ffn_size=64, name="wide")
    cluster = mp.Topology.preset("h100-hgx", nodes=128, devices_per_node=8)
    rng = np.random.default_rng(0)
    client = server.client
    client.add_topology(cluster, "large")
    client.add_deployment("wide", client.add_model(model).id, "large", {"solver": "eplb"})
    now = datetime(2026, 1, 1, tzinfo=UTC)
    client.push_windows("wide", [CountWindow(now.replace(hour=i), rng.integers(0, 9, (2, 1024))) for i in (1, 2)])
    plans = []
    for load in rng.random((2, 2, 1024)):
        plan = mp.solve(mp.Problem(model, cluster, mp.RoutingStatistics.from_counts(load, top_k=4)), "eplb")
        plans.append(client.add_plan(plan).id)
        client.publish("wide", plans[-1])
    paths = [
        "/",
        "/deployments/wide",
        f"/deployments/wide/diff?before={plans[0]}&after={plans[1]}",
        f"/plans/{plans[0]}",
    ]
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda path: server.ask("GET", path, headers={"Accept-Encoding": "gzip"}), paths * 4))


def headers(server: Attacked) -> list[int]:
    statuses = []
    for line in (b"X-A: " + b"a" * 1000 + b"\r\n", b"X: y\r\n"):
        connection = socket.create_connection((server.host, server.port), timeout=30)
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n")
            for _ in range(64):
                connection.sendall(line * (1_000_000 // len(line)))
        statuses.append(server.ask("GET", "/v1/deployments"))
    return statuses


def odd_requests(server: Attacked) -> list[int]:
    long = "a" * 60_000
    asked = [("GET", f"/?after={long}"), ("GET", f"/{long}"), ("GET", f"/deployments/{long}"), ("HEAD", "/")]
    asked += [("OPTIONS", "/v1/plans"), ("OPTIONS", "*"), ("TRACE", "/"), ("BREW", "/v1/jobs"), ("PATCH", "/v1/plans")]
    return [server.ask(method, path) for method, path in asked]
