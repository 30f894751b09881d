"""One client, peer or proxy does no harm to the others: memory, time, connections."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import io
import json
import re
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from sqlalchemy.event import listen

pytest.importorskip("fastapi", reason="the service is an extra")
from service_runs import MODEL, PATIENCE, TOPOLOGY, Server, counts, prepared, send, serving, skewed
from starlette.exceptions import HTTPException

import moeplace as mp
from moeplace.db import Store
from moeplace.db.records import Actor, CountWindow
from moeplace.db.schema import TopologyRow
from moeplace.placement.errors import InputError
from moeplace.profiler.statistics_file import write_statistics
from moeplace.service.counts import ARROW, to_arrow
from moeplace.service.middleware import BodyLimit
from moeplace.service.reader import Operations
from moeplace.service.readers import REQUEST_BYTES, UPLOAD_BYTES

pytestmark = pytest.mark.slow

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(str(tmp_path_factory.mktemp("service") / "store.db"), "--workers", "0") as running:
        with running.client() as client:
            prepared(client)
        yield running


class Watch:
    """What a server takes meanwhile. grown: bytes of memory above those before."""

    def __init__(self, server: Server) -> None:
        self._process = psutil.Process(server.process.pid)
        self._base = self._process.memory_info().rss
        self._stop = threading.Event()
        self.grown = 0
        self._thread = threading.Thread(target=self._memory)

    def _memory(self) -> None:
        while not self._stop.is_set():
            self.grown = max(self.grown, self._process.memory_info().rss - self._base)
            time.sleep(0.005)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def reading_process(server: Server, most_bytes: int) -> psutil.Process:
    """The server's process that reads bodies, or uploads, by the memory it may take."""
    [process] = [
        child
        for child in psutil.Process(server.process.pid).children()
        if "moeplace.service.reader" in child.cmdline() and str(most_bytes) in child.cmdline()
    ]
    return process


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """Stands still: what it is asked for is under way meanwhile."""
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def others_are_answered(server: Server) -> None:
    """Of all kinds: by the event loop alone, from the database, and with a body of their own."""
    window = {"windows": [{"ended": NOON.isoformat(), "load": counts(9, skewed(9)).tolist(), "source": "other"}]}
    assert send(server, "GET", "/health")[0] == 200
    assert send(server, "GET", "/v1/deployments/chat")[0] == 200
    assert send(server, "POST", "/v1/deployments/chat/windows", json.dumps(window).encode())[0] == 200


NOTHINGS = b"[],"
MANY = 6_000_000


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        ("/v1/deployments/chat/windows", b'{"windows":[{"ended":"2026-01-01T00:00:00Z","load":[', b"[]]}]}"),
        ("/v1/plans", b'{"document":{"a":[', b"[]]}}"),
        ("/v1/topologies", b'{"topology":{"a":[', b"[]]}}"),
        ("/v1/models", b'{"spec":[', b"[]]}"),
        ("/v1/solve", b'{"options":{"a":[', b"[]]}}"),
    ],
)
def test_json_that_is_little_on_the_wire_and_much_in_memory_stays_little(
    server: Server, path: str, before: bytes, after: bytes
) -> None:
    """6 million empty lists: near a gigabyte once read, and seconds during which the interpreter does nothing else."""
    with Watch(server) as watch:
        status, answer = send(server, "POST", path, before + NOTHINGS * MANY + after)
    assert status in (413, 422), answer
    assert json.loads(answer)["detail"]
    assert watch.grown < 200 << 20


def test_others_are_answered_while_bodies_and_uploads_are_read(server: Server) -> None:
    large = b'{"windows":[{"ended":"2026-01-01T00:00:00Z","load":[' + NOTHINGS * 200_000 + b"[]]}]}"

    def windows() -> object:
        return send(server, "POST", "/v1/deployments/chat/windows", large)[0] == 422

    def statistics(seed: int) -> object:
        content = io.BytesIO()
        write_statistics(mp.RoutingStatistics.from_counts(counts(seed, skewed(seed)), top_k=2), content)
        with server.client() as client:
            return client.upload_statistics(io.BytesIO(content.getvalue()))

    # Both processes run from here on.
    assert windows()
    assert statistics(11)
    with ThreadPoolExecutor(1) as pool:
        for most_bytes, ask in ((REQUEST_BYTES, windows), (UPLOAD_BYTES, partial(statistics, 12))):
            with stopped(reading_process(server, most_bytes)):
                reading = pool.submit(ask)
                others_are_answered(server)
                assert not reading.done()
            assert reading.result(PATIENCE)


@pytest.mark.parametrize("operation", ["windows", "topology", "plan"])
@pytest.mark.parametrize("value", [b"[],", b"{},", b"1,", b'"a",'])
def test_documents_of_more_values_than_any_right_one_has_are_refused_before_they_are_made(
    operation: str, value: bytes
) -> None:
    asked = {"operation": operation, "kind": "application/json", "shape": [58, 256]}
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="values, .* of them lists or mappings; at most"):
            Operations(None, None).answer(asked, b'{"a":[' + value * 8_000_000 + b"0]}")  # type: ignore[arg-type]
        assert tracemalloc.get_traced_memory()[1] < 64 << 20, "the body itself and no more"
    finally:
        tracemalloc.stop()


def test_large_bodies_that_are_right_are_taken(server: Server) -> None:
    windows = [CountWindow(NOON.replace(microsecond=i), counts(i, skewed(0)), "w" * 99, "s" * 99) for i in range(512)]
    document = {
        "windows": [
            {"ended": w.ended.isoformat(), "load": w.load.tolist(), "workload": "j" * 90, "source": " " * 300 + "x"}
            for w in windows
        ]
    }
    body = json.dumps(document).encode()
    assert len(body) > 1 << 18
    status, answer = send(server, "POST", "/v1/deployments/chat/windows", body)
    assert (status, json.loads(answer)["errors"][0]["field"]) == (422, "windows.0.source"), answer
    status, answer = send(server, "POST", "/v1/deployments/chat/windows", body.replace(b" " * 300, b" " * 9))
    assert (status, json.loads(answer)) == (200, {"received": 512, "new": 512})
    body = to_arrow([CountWindow(w.ended, w.load << 40, w.workload, w.source) for w in windows])
    assert len(body) > 1 << 18
    status, answer = send(server, "POST", "/v1/deployments/chat/windows", body, ARROW)
    assert (status, "2**48" in json.loads(answer)["detail"]) == (422, True), answer
    status, answer = send(server, "POST", "/v1/deployments/chat/windows", to_arrow(windows), ARROW)
    assert (status, json.loads(answer)) == (200, {"received": 512, "new": 512})


def test_an_arrow_stream_of_zeros_packed_into_kilobytes_is_not_decoded(server: Server) -> None:
    import pyarrow as pa

    table = pa.table({"ended": pa.array([NOON]), "load": pa.array([np.zeros(1 << 24, np.int64)])})
    for codec in ("zstd", "lz4"):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
            writer.write_table(table)
        body = sink.getvalue().to_pybytes()
        assert len(body) < 1 << 20
        with Watch(server) as watch:
            status, answer = send(server, "POST", "/v1/deployments/chat/windows", body, ARROW)
        assert (status, b"compressed" in answer) == (422, True)
        assert watch.grown < 100 << 20


def test_columns_nobody_asked_for_are_named_in_few_words(server: Server) -> None:
    import pyarrow as pa

    table = pa.table([pa.array([1])] * 2000, names=[f"c{i}" for i in range(2000)])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    status, answer = send(server, "POST", "/v1/deployments/chat/windows", sink.getvalue().to_pybytes(), ARROW)
    assert (status, b"'c0'" in answer) == (422, True)
    assert len(answer) < 1000


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"X-Long: " + b"a" * 4000 + b"\r\n"),
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Endless: ", b"a" * 4000),
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET / HTTP/1.1\r\nX: ", b"a" * 4000),
        (
            b"POST /v1/plans HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX: ",
            b"a" * 4000,
        ),
    ],
    ids=["many", "one", "in a row", "after a body"],
)
def test_headers_without_end_are_not_kept(server: Server, begin: bytes, piece: bytes) -> None:
    """64 MB of them took the server 300 MB and 7 seconds."""
    address = urlsplit(server.url)
    sent = 0
    with Watch(server) as watch:
        with socket.create_connection((str(address.hostname), address.port), timeout=30) as connection:
            try:
                connection.sendall(begin)
                while sent < 32 << 20:
                    connection.sendall(piece)
                    sent += len(piece)
            except OSError:
                pass
        assert sent < 16 << 20
    assert watch.grown < 50 << 20


def test_a_body_of_many_small_chunks_is_a_body(server: Server) -> None:
    address = urlsplit(server.url)
    body = b" " * 100_000 + b"{}"
    with socket.create_connection((str(address.hostname), address.port), timeout=60) as connection:
        connection.sendall(b"POST /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n")
        connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 422"


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_who_sends_all_of_a_body_before_reading_is_told_why_it_was_refused(server: Server, connection: str) -> None:
    """The answer comes first: what was still on its way reset the connection, and the answer with it."""
    address, size = urlsplit(server.url), 24 << 20
    head = f"POST /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: {connection}\r\nContent-Length: {size}\r\n\r\n"
    with socket.create_connection((str(address.hostname), address.port), timeout=60) as opened:
        opened.sendall(head.encode())
        for _ in range(size >> 16):
            opened.sendall(bytes(1 << 16))
            time.sleep(0.0005)
        assert opened.recv(12) == b"HTTP/1.1 413"
        if connection == "close":
            while opened.recv(1 << 16):
                pass


def test_bodies_that_one_client_sends_slowly_keep_no_others_out() -> None:
    piece, statuses = 4 << 20, []
    go_on = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            while (await receive())["more_body"]:
                pass
            statuses.append((scope["client"][0], 200))
        except HTTPException as error:
            statuses.append((scope["client"][0], error.status_code))

    async def run() -> None:
        limit = BodyLimit(app, 32 << 20)

        def asked(client: str) -> asyncio.Task[None]:
            pieces = iter([piece] * 4)

            async def receive() -> dict[str, Any]:
                size = next(pieces, 0)
                if not size:
                    await go_on.wait()
                return {"type": "http.request", "body": bytes(size), "more_body": bool(size)}

            scope = {"type": "http", "method": "POST", "path": "/v1/plans", "client": (client, 1), "headers": []}
            return asyncio.create_task(limit(scope, receive, None))  # type: ignore[arg-type]

        slow = [asked("10.0.0.1") for _ in range(8)]
        while len(statuses) < 4:
            await asyncio.sleep(0)
        other = asked("10.0.0.2")
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(*slow, other)
        assert not limit._under_way

    asyncio.run(run())
    assert statuses[:4] == [("10.0.0.1", 503)] * 4
    assert sorted(statuses[4:]) == [("10.0.0.1", 200)] * 4 + [("10.0.0.2", 200)]


def test_uploads_that_unpack_to_much_are_read_elsewhere(server: Server) -> None:
    load, workload = np.ones((900, 58, 256)), np.zeros(900, int)
    statistics = mp.RoutingStatistics(experts=256, moe_layers=tuple(range(58)), load=load, window_workload=workload)
    packed = io.BytesIO()
    write_statistics(
        statistics,
        packed,
    )
    assert len(packed.getvalue()) < 8 << 20
    with Watch(server) as watch, server.client() as client:
        assert client.upload_statistics(io.BytesIO(packed.getvalue()))
    assert watch.grown < 64 << 20


def test_one_request_of_a_reading_process_that_dies_fails_alone(server: Server) -> None:
    """The next is read by another process."""
    windows = [CountWindow(NOON.replace(second=7, microsecond=i), counts(i, skewed(0)), "w" * 99) for i in range(512)]
    body = to_arrow([CountWindow(w.ended, w.load << 30, w.workload, "s" * 99) for w in windows])
    assert len(body) > 1 << 18
    path = "/v1/deployments/chat/windows"
    assert send(server, "POST", path, body, ARROW)[0] == 200
    reading_process(server, REQUEST_BYTES).kill()
    status, answer = send(server, "POST", path, body, ARROW)
    assert (status, json.loads(answer)) == (200, {"received": 512, "new": 0})


def test_pages_of_a_thousand_devices_are_small_and_known_ones_are_not_sent_again(server: Server) -> None:
    """They grew with the square of devices: 131 MB and 18 s."""
    model = mp.ModelSpec(layers=2, experts=1024, top_k=4, hidden_size=64, ffn_size=64, name="wide")
    cluster = mp.Topology.preset("h100-hgx", nodes=128, devices_per_node=8)
    rng = np.random.default_rng(0)
    with server.client() as client:
        assert client.add_topology(cluster, "large").devices == 1024
        client.add_deployment("wide", client.add_model(model).id, "large", {"solver": "eplb"})
        client.push_windows("wide", [CountWindow(NOON.replace(hour=i), rng.integers(0, 9, (2, 1024))) for i in (1, 2)])
        plans = []
        for load in rng.random((2, 2, 1024)):
            statistics = mp.RoutingStatistics.from_counts(load, top_k=4)
            plans.append(client.add_plan(mp.solve(mp.Problem(model, cluster, statistics), "eplb")).id)
            client.publish("wide", plans[-1])
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=120)
    for path in ("/deployments/wide", f"/deployments/wide/diff?before={plans[0]}&after={plans[1]}"):
        with Watch(server) as watch:
            connection.request("GET", path, headers={"Accept-Encoding": "gzip"})
            answer = connection.getresponse()
            content = answer.read()
        assert (answer.status, answer.getheader("content-encoding")) == (200, "gzip")
        assert len(content) < 200_000
        assert len(gzip.decompress(content)) < 2_000_000
        assert watch.grown < 200 << 20
        known = {"Accept-Encoding": "gzip", "If-None-Match": str(answer.getheader("etag"))}
        connection.request("GET", path, headers=known)
        again = connection.getresponse()
        assert (again.status, again.read()) == (304, b"")
    connection.close()


def test_windows_of_large_models_are_read_and_shown_a_few_at_a_time(server: Server) -> None:
    """64 of them took an answer of one GET, and a page as many as its policy compares: gigabytes."""
    model = mp.ModelSpec(layers=1024, experts=1024, top_k=4, hidden_size=64, ffn_size=64, name="huge")
    load = np.zeros((1024, 1024), np.int64)
    load[0] = 1
    with server.client() as client:
        client.add_deployment("huge", client.add_model(model).id, "box", {"solver": "eplb"})
        for half in range(2):
            moments = [NOON.replace(hour=half, minute=minute) for minute in range(12)]
            client.push_windows("huge", [CountWindow(moment, load) for moment in moments])
        with Watch(server) as watch:
            page = json.loads(send(server, "GET", "/v1/deployments/huge/windows?limit=64")[1])
            following = json.loads(send(server, "GET", f"/v1/deployments/huge/windows?before={page['next']}")[1])
            assert send(server, "GET", "/deployments/huge")[0] == 200
    assert [len(each["items"]) for each in (page, following)] == [1, 1]
    assert page["items"][0]["key"] > following["items"][0]["key"]
    assert watch.grown < 400 << 20


def test_lists_ask_the_database_for_one_page_of_rows(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store.db") as store:
        ids = [store.add_topology(TOPOLOGY.model_copy(update={"inter_latency": 1e-6 * n})).id for n in range(1, 8)]
        rows: list[object] = []
        listen(TopologyRow, "load", lambda row, _: rows.append(row))
        newest = store.topology_summaries(limit=3)
        assert [entry.id for entry in newest] == ids[::-1][:3]
        assert len(rows) == 3
        assert [entry.id for entry in store.topologies(limit=3, before=newest[-1].id)] == ids[::-1][3:6]
        assert (newest[0].devices, newest[0].nodes, newest[0].label) == (4, 2, "h100-hgx")


def test_the_start_page_shows_all_deployments_a_page_at_a_time(tmp_path: Path) -> None:
    by = Actor("ann", "approve")
    path = str(tmp_path / "store.db")
    with Store.open(path) as store:
        ids = store.add_model(MODEL).id, store.add_topology(TOPOLOGY).id
        for number in range(130):
            store.deployments.add(f"chat {number:03}", *ids, {}, by)
        store.windows.add({"chat 007": [CountWindow(NOON, counts(1, skewed(0)))]})
        asked: list[str] = []
        listen(store._sessions._own_engine(), "before_cursor_execute", lambda *a: asked.append(a[2]))
        found = store.deployments.overview(limit=101)
        assert [entry.windows for entry in found[6:9]] == [0, 1, 0]
        assert (found[0].model, found[0].devices) == ("toy", 4)
        assert len(asked) < 15
    with serving(path, "--workers", "0") as server:
        first = send(server, "GET", "/")[1].decode()
        [following] = re.findall(r'href="/(\?after=[^"]+)">next', first)
        second = send(server, "GET", "/" + following)[1].decode()
        shown = [set(re.findall(r">(chat \d{3})</a>", content)) for content in (first, second)]
        assert [len(names) for names in shown] == [100, 30]
        assert len(shown[0] | shown[1]) == 130
        assert "next" not in second
