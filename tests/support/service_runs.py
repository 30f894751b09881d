"""A real server process for tests: started on a free port, told to stop or killed, started again."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from forks import forks

import moeplace as mp

MODEL = mp.ModelSpec(layers=3, experts=16, top_k=2, hidden_size=1024, ffn_size=512, name="toy")
TOPOLOGY = mp.Topology.preset("h100-hgx", nodes=2, devices_per_node=2)
PATIENCE = 200.0
"""Seconds to wait for what comes within one on a machine that has nothing else to do."""
IMPORTED = (
    "moeplace.cli.commands.serve", "moeplace.service.app", "moeplace.service.server", "moeplace.service.worker",
    "moeplace.solvers.search.annealer", "moeplace.solvers.search.driver", "uvicorn",
)  # fmt: skip
POLICY = {"solver": "eplb", "seconds": 5, "block": 1, "recent": 16, "step_tokens": 4096, "min_regret": 0.01}


class Server:
    """`moeplace serve` in a process of its own."""

    def __init__(self, url: str, *arguments: str) -> None:
        command = ["-m", "served", "serve", "--rate", "0", *arguments]
        if not {"--auth", "--no-auth"} & set(arguments) and "0.0.0.0" not in arguments:
            command.append("--no-auth")
        if "--port" not in arguments:
            command += ["--port", "0"]
        environment = {**os.environ, "MOEPLACE_DB": url}
        reading, writing = os.pipe()
        with open(os.devnull, "wb") as nowhere, os.fdopen(writing) as log:
            source = forks(*IMPORTED)
            self.process = source.start(command, stdout=nowhere.fileno(), stderr=log.fileno(), env=environment)
        self._stderr = os.fdopen(reading)
        self.log: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = str(self.wait_for("serving")["url"])
        self.wait_for("Application startup complete.")
        self._wait_for_answers()

    def client(self, token: str | None = None) -> mp.Client:
        return mp.Client(self.url, token)

    def wait_for(self, message: str, seconds: float = PATIENCE, **fields: Any) -> dict[str, Any]:
        """The first log entry with this message and these fields."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for entry in list(self.log):
                if entry.get("message") == message and all(entry.get(key) == value for key, value in fields.items()):
                    return entry
            assert self.process.poll() is None or self._reader.is_alive(), f"the server ended: {self.log[-5:]}"
            time.sleep(0.02)
        raise AssertionError(f"no {message!r} {fields} in the log: {self.log[-20:]}")

    def _wait_for_answers(self) -> None:
        """The log says that the application is ready a moment before its socket listens."""
        address = urlsplit(self.url)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection((address.hostname, address.port), timeout=PATIENCE).close()
                return
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, f"nothing listens at {self.url}: {self.log[-5:]}"
                time.sleep(0.02)

    def worker_pid(self) -> int:
        """The newest worker process that takes any job."""
        starts = [entry for entry in self.log if entry.get("message") == "worker starts"]
        return int([entry["pid"] for entry in starts if entry["lane"] == "any"][-1])

    def stop(self) -> int:
        """Ends it as an operator does; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def _read(self) -> None:
        with self._stderr:
            for line in self._stderr:
                try:
                    self.log.append(json.loads(line))
                except ValueError:
                    self.log.append({"message": line})


@contextmanager
def serving(url: str, *arguments: str) -> Iterator[Server]:
    server = Server(url, *arguments)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


@contextmanager
def receiving(refusals: int = 0) -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """A receiver that is unwell at first. Yields its address, and what it got: (headers, body)."""
    got: list[tuple[dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((dict(self.headers), body))
            self.send_response(503 if len(got) <= refusals else 204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{receiver.server_address[1]}/hook?of=chat", got
    finally:
        receiver.shutdown()
        receiver.server_close()


def send(
    server: Server, method: str, path: str, body: bytes | None = None, kind: str = "application/json", **headers: str
) -> tuple[int, bytes]:
    """Status and body of one answer."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=120)
    connection.request(method, path, body, {**({"Content-Type": kind} if body is not None else {}), **headers})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def skewed(seed: int) -> np.ndarray:
    """[L, E] chances of experts."""
    return np.random.default_rng(seed).dirichlet(np.full(MODEL.experts, 0.4), size=MODEL.layers)


def counts(seed: int, chances: np.ndarray, tokens: int = 4000) -> np.ndarray:
    """[L, E] one window of traffic that follows them."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.multinomial(tokens * MODEL.top_k, row) for row in chances])


def prepared(client: mp.Client, name: str = "chat", **policy: Any) -> None:
    """A deployment of the toy model."""
    # By its id: other tests on the same server may keep another model of that name.
    model = client.add_model(MODEL).id
    client.add_topology(TOPOLOGY, "box")
    client.add_deployment(name, model, "box", {**POLICY, **policy})
