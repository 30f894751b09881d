"""Connections that do not send, do not read, or only wait: others are served meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
import uvicorn
import uvloop
from service_runs import MODEL, PATIENCE, TOPOLOGY, Server, prepared, serving, skewed

import moeplace as mp
from moeplace.service import connections

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(str(tmp_path_factory.mktemp("service") / "store.db"), "--workers", "0") as running:
        with running.client() as client:
            prepared(client)
        yield running


def opened(server: Server, sent: bytes = b"") -> socket.socket:
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=PATIENCE)
    if sent:
        connection.sendall(sent)
    return connection


def answered(server: Server) -> bool:
    """Whether another client's request is answered."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.request("GET", "/v1/deployments")
    status = connection.getresponse().status
    connection.close()
    return status == 200


def ended(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_requests_that_do_not_come_take_no_ones_place(server: Server) -> None:
    """More of them than open files were allowed before; some send nothing, some half of their headers or body."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    halves = [
        b"",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ",
        b"POST /v1/solve HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
    ]
    half_open = []
    for number in range(1100):
        if number == 600:
            # Those that came together have had their time to send: those that come next take their places.
            time.sleep((connections.ROUNDS + 1) * connections.LOOK_SECONDS)
        with contextlib.suppress(OSError):
            half_open.append(opened(server, halves[number % 3]))
    try:
        assert all(answered(server) for _ in range(5))
        entry = server.wait_for("connection ended", 30.0)
        assert entry["client"] == "127.0.0.1"
        assert all(ended(connection, 60.0) for connection in half_open[-6:]), "time-outs for headers and bodies"
        whys = {entry["why"] for entry in server.log if entry.get("message") == "connection ended"}
        assert {"headers did not come in time", "a body did not come in time"} <= whys
        assert "too many requests of one client that do not come" in whys
    finally:
        for connection in half_open:
            connection.close()
    assert answered(server)
    assert server.stop() == 0


def test_one_client_gets_half_of_the_connections_and_makes_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        def end(self, why: str) -> None:
            limits.came(self, "a")  # type: ignore[arg-type]
            limits.open["a"] -= 1
            whys.append(why)

    whys: list[str] = []
    limits = connections.Limits(8, ["10.0.0.0/24"])
    limits.open["a"] = 3
    assert limits.refusal("a") is None
    limits.open["a"] = 4
    assert limits.refusal("a") == "too many connections of one client"
    limits.open["10.0.0.7"] = 4
    assert limits.refusal("b") == "too many connections"
    idle = [Idle(), Idle()]
    for each in idle:
        limits.wait_for(each, "a")  # type: ignore[arg-type]
    assert limits.refusal("b") is None
    assert (limits.open["a"], whys) == (3, ["made place for another client"])
    assert [limits.waits(each, "a") for each in idle] == [False, True]  # type: ignore[arg-type]
    assert limits.refusal("10.0.0.7") is None
    monkeypatch.setattr(connections, "HALF_OPEN", 1)
    assert limits.refusal("a") is None
    assert len(whys) == 1, "who came just now may still send"
    limits.rounds += connections.ROUNDS
    assert limits.refusal("a") is None
    assert whys[1] == "too many requests of one client that do not come"


def test_an_idle_connection_makes_place_before_one_that_waits() -> None:
    class Connection:
        def end(self, why: str) -> None:
            limits.goes_on(self, "a")  # type: ignore[arg-type]
            ends.append(self)

    ends: list[Connection] = []
    limits = connections.Limits(8)
    first, second, waiting = Connection(), Connection(), Connection()
    limits.wait_for(waiting, "a")  # type: ignore[arg-type]
    for each in (first, second):
        limits.rests(each, "a")  # type: ignore[arg-type]
    limits.open["a"] = 4
    assert limits.refusal("a") is None, "of its own"
    assert ends == [first]
    limits.open["b"] = 4
    assert limits.refusal("c") is None
    assert ends == [first, second]


def test_what_came_before_an_idle_connection_ends_is_answered() -> None:
    """A loop that is behind runs the timer first: one request in thousands was reset on its way."""

    async def ask_late() -> bytes:
        loop = asyncio.get_running_loop()
        config = uvicorn.Config(answer, http=connections.protocol_within(limits), timeout_keep_alive=1, lifespan="off")
        config.load()
        state = uvicorn.server.ServerState()
        listener = await loop.create_server(
            lambda: config.http_protocol_class(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        request = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
        async with listener:
            client = socket.create_connection(listener.sockets[0].getsockname())
            theirs, ours = socket.socketpair()
            with client, client.makefile("rb") as answers, theirs, ours:
                client.sendall(request)
                assert await loop.run_in_executor(None, whole, answers) == b"ok"
                # Behind by more than the time-out in what it reads, with a request that comes meanwhile.
                loop.add_reader(ours, read_slowly, loop, ours)
                theirs.sendall(b".")
                threading.Timer(0.5, client.sendall, [request]).start()
                return await loop.run_in_executor(None, whole, answers)

    def whole(answers: BinaryIO) -> bytes:
        lines = iter(answers.readline, b"\r\n")
        assert next(lines).startswith(b"HTTP/1.1 200")
        assert b"content-length: 2\r\n" in set(lines)
        return answers.read(2)

    def read_slowly(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
        loop.remove_reader(connection)
        time.sleep(1.5)

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    limits = connections.Limits(8)
    assert uvloop.run(ask_late()) == b"ok"


def test_hundreds_that_wait_for_plans_and_jobs_slow_no_one_and_hear_at_once(server: Server) -> None:
    plan = mp.solve(mp.Problem(MODEL, TOPOLOGY, mp.RoutingStatistics.from_counts(skewed(2), top_k=2)), "eplb")
    with server.client() as client:
        stored = client.add_plan(plan).id
        client.publish("chat", stored)
        etag = client.plan_in_force("chat", "moeplace").etag
        job = client.solve("chat", solver="eplb").key
        hold = f"GET /v1/deployments/chat/plan?wait=60 HTTP/1.1\r\nHost: 127.0.0.1\r\nIf-None-Match: {etag}\r\n\r\n"
        stream = f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        waiting = [opened(server, text.encode()) for _ in range(200) for text in (hold, stream)]
        assert all(answered(server) for _ in range(40))
        second = mp.solve(mp.Problem(MODEL, TOPOLOGY, mp.RoutingStatistics.from_counts(skewed(3), top_k=2)), "eplb")
        client.publish("chat", client.add_plan(second).id)
        client.cancel(job)
        for holder, listener in zip(waiting[::2], waiting[1::2], strict=True):
            holder.settimeout(30)
            assert holder.recv(12) == b"HTTP/1.1 200"
            listener.settimeout(30)
            heard = b""
            while b"event: end" not in heard:
                heard += listener.recv(1 << 16)
        for connection in waiting:
            connection.close()
        others = [opened(server, hold.encode().replace(etag.encode(), b'"x", *')) for _ in range(20)]
        assert answered(server)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert all(holder.recv(12) for holder in others)
        stopping.join(PATIENCE)
        assert server.process.poll() == 0
