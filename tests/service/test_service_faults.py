"""Servers killed in the middle of what they do: nothing lost, nothing doubled."""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from service_runs import MODEL, PATIENCE, Server, counts, prepared, serving, skewed
from traces import make_trace

import moeplace as mp
from moeplace.db.records import CountWindow
from moeplace.profiler.trace_files import write_trace
from moeplace.service.client import Transport

pytestmark = pytest.mark.slow

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ROUNDS = int(os.environ.get("MOEPLACE_TEST_FAULTS", "2"))
"""How often each fault is repeated."""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.long
def test_windows_and_uploads_survive_kills_in_the_middle(url: str, tmp_path: Path) -> None:
    arguments = ("--port", free_port(), "--workers", "0")
    write_trace(make_trace(0, layers=3, experts=16, top_k=2), tmp_path / "trace", model=MODEL)
    [shard] = (tmp_path / "trace").glob("*.parquet")
    with serving(url, *arguments) as server:
        address = server.url
        prepared(server.client())
        servers = [server]
        stop = threading.Event()
        sent: list[int] = []

        def push() -> None:
            number = 0
            while not stop.is_set():
                load = counts(number % 7, skewed(0))
                window = CountWindow(NOON + timedelta(seconds=number), load)
                while True:
                    try:
                        mp.Client(address, timeout=10).push_windows("chat", [window])
                        break
                    except mp.MoeplaceError:
                        time.sleep(0.05)
                sent.append(int(load.sum()))
                number += 1

        pusher = threading.Thread(target=push)
        pusher.start()
        try:
            for _ in range(ROUNDS):
                before = len(sent)
                while len(sent) < before + 5:
                    time.sleep(0.01)
                servers[-1].kill()
                servers.append(Server(url, *arguments))
                mp.Client(address).upload_trace("chat", shard)
        finally:
            stop.set()
            pusher.join()
            client = mp.Client(address)
            assert client.totals("chat") == (len(sent), sum(sent))
            assert client.upload_trace("chat", shard).state == "complete"
            assert servers[-1].stop() == 0


def test_an_approval_cut_short_is_made_once(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    arguments = ("--port", free_port())
    with serving(path, *arguments) as server:
        address = server.url
        prepared(server.client(), min_regret=0.0, horizon_steps=5e6)
        windows = [CountWindow(NOON + timedelta(minutes=i), counts(i, skewed(0))) for i in range(16)]
        server.client().push_windows("chat", windows)
        deadline = time.monotonic() + PATIENCE
        while not (waiting := list(server.client().decisions(state="waiting"))):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        approving = threading.Thread(target=lambda: _approve(address, waiting[0].key))
        approving.start()
        time.sleep(0.01)
        server.kill()
    with serving(path, *arguments) as server, server.client() as client:
        approving.join(PATIENCE)
        client.approve(waiting[0].key)
        assert client.deployment("chat").version == 1
        assert [entry.cause for entry in client.publications("chat")] == ["approved"]
        assert [entry.action for entry in client.audit(action="decision.approve")] == ["decision.approve"]


def _approve(address: str, key: int) -> None:
    while True:
        try:
            mp.Client(address).approve(key)
            return
        except mp.MoeplaceError:
            time.sleep(0.1)


def test_a_connection_the_service_closed_while_idle_is_opened_again() -> None:
    """Also where a request may not be sent twice: it was not sent yet."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(PATIENCE)
        closed = threading.Semaphore(0)

        def serve() -> None:
            for _ in range(3):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(answer)
                closed.release()

        serving_thread = threading.Thread(target=serve)
        serving_thread.start()
        transport = Transport(f"http://127.0.0.1:{listening.getsockname()[1]}", None, PATIENCE)
        for _ in range(3):
            assert transport.call("POST", "/once", b"{}").json() == {}
            assert closed.acquire(timeout=PATIENCE)
        transport.close()
        serving_thread.join(PATIENCE)
