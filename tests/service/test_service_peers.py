"""Servers that others run, engines and webhooks' receivers: which are called, how long they may take, who is told."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
pytest.importorskip("torch", reason="SGLang's dumps are torch files")

import engine_endpoints
from service_runs import MODEL, PATIENCE, TOPOLOGY, prepared, receiving, serving, skewed
from standardwebhooks import Webhook

import moeplace as mp
from moeplace._http import Connections, Peers, UnansweredError
from moeplace.db import Store
from moeplace.db.records import Actor
from moeplace.db.webhooks import OF_DEPLOYMENT
from moeplace.placement.errors import ConflictError, StoreError
from moeplace.profiler.engine_servers import EngineServer
from moeplace.service.polling import ANSWER_BYTES
from moeplace.service.webhooks import WebhookSender

pytestmark = pytest.mark.slow

ANN = Actor("ann", "approve")

REFUSED = [
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "169.254.43518",
    "169.254.169.254.",
    "[::169.254.169.254]",
    "[::ffff:0:169.254.169.254]",
    "[64:ff9b:1::a9fe:a9fe]",
    "192.0.0.192",
    "255.255.255.255",
    "[::ffff:169.254.169.254]",
    "[64:ff9b::a9fe:a9fe]",
    "[2002:a9fe:a9fe::1]",
    "[fe80::1]",
    "[fd00:ec2::254]",
    "100.100.100.200",
    "168.63.129.16",
    "0.0.0.0",
    "0",
    "[::]",
    "224.0.0.1",
    "[ff02::1]",
]


@pytest.mark.parametrize("host", REFUSED)
def test_addresses_that_no_peer_has_are_not_called(host: str) -> None:
    with pytest.raises(UnansweredError, match="may be called|not known|getaddrinfo|expected"):
        Connections(peers=Peers()).request("GET", f"http://{host}/latest", timeout=2.0)
    with pytest.raises(mp.InputError, match="no address that may be called"):
        Peers().check(f"http://{host}:8080/")


def test_an_address_that_holds_a_password_is_refused() -> None:
    for url in ("http://ann:secret@10.0.0.1/", "http://ann@10.0.0.1/", "http://@10.0.0.1/"):
        with pytest.raises(mp.InputError, match="password"):
            Peers().check(url)
    Peers().check("http://[::1]:8000/")


def test_peers_are_those_that_the_operator_names() -> None:
    only = Peers.of(["10.0.0.0/8", "engine.internal", "localhost", "fd12::/16"])
    only.check("http://10.1.2.3:30000")
    only.check("http://[fd12::7]/")
    only.check("http://engine.internal:30000")
    for url in ("http://192.168.0.1/", "http://127.0.0.1/", "http://[::ffff:192.168.0.1]/"):
        with pytest.raises(mp.InputError, match="may be called"):
            only.check(url)
    with pytest.raises(mp.InputError, match="none of the servers"):
        Peers.of(["engine.internal"]).check("http://evil.example/")
    for entry in ("10.0.0.1/8", "300.1.1.1", "http://x", "a b"):
        with pytest.raises(mp.InputError, match="neither a network"):
            Peers.of([entry])
    with answering(b"HTTP/1.1 204 No Content\r\n\r\n") as address:
        assert Connections(peers=only).request("GET", f"http://localhost:{address[1]}/", timeout=9.0).status == 204
        with pytest.raises(UnansweredError, match="no address that may be called"):
            Connections(peers=only).request("GET", f"http://127.0.0.1:{address[1]}/", timeout=9.0)


@contextmanager
def answering(content: bytes, pause: float = 0.0) -> Iterator[tuple[str, int]]:
    """A server that answers this to whoever connects, with a pause before each byte."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)

        def answer(connection: socket.socket) -> None:
            with connection:
                connection.recv(65536)
                try:
                    for byte in content if pause else [content]:
                        if stop.wait(pause):
                            return
                        connection.sendall(bytes([byte]) if isinstance(byte, int) else byte)
                except OSError:
                    pass

        def accept() -> None:
            while not stop.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                connection.settimeout(None)
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            stop.set()
            thread.join()


def until(what: Any, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


SLOW = b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 4000


def test_peers_that_answer_a_byte_at_a_time_keep_nobody_waiting(tmp_path: Path) -> None:
    """Neither other webhooks, nor the server's end."""
    plan = mp.solve(mp.Problem(MODEL, TOPOLOGY, mp.RoutingStatistics.from_counts(skewed(2), top_k=2)), "eplb")
    with (
        answering(SLOW, 0.2) as (_, port),
        receiving() as (url, got),
        serving(str(tmp_path / "s.db"), "--workers", "0", "--recorder", f"a={tmp_path}") as server,
        server.client() as client,
    ):
        prepared(client)
        client.set_engine("chat", f"http://127.0.0.1:{port}", recorder="a", every=1, span=0.1)
        slow = [client.add_webhook("chat", f"http://127.0.0.1:{port}/").key for _ in range(3)]
        hook = client.add_webhook("chat", url)
        for _ in range(2):
            client.publish("chat", client.add_plan(plan).id)
        until(lambda: len(got) >= 2)
        assert not any(entry.attempts for key in slow for entry in client.deliveries("chat", key)), "none given up yet"
        until(lambda: [entry.state for entry in client.deliveries("chat", hook.key)] == ["sent", "sent"])
        assert server.stop() == 0


def test_an_engine_that_answers_too_much_is_not_read(tmp_path: Path) -> None:
    engine = engine_endpoints.Other(lambda: (200, b"[" + b"[]," * 20_000_000 + b"[]]"))
    before = psutil.Process().memory_info().rss
    with engine_endpoints.serving(engine) as url:
        server = EngineServer(url, timeout=30.0, quote=False, most=ANSWER_BYTES, connections=Connections(peers=Peers()))
        with pytest.raises(mp.MoeplaceError, match="more than 1,048,576 bytes"):
            server.json("GET", "/server_info")
    assert psutil.Process().memory_info().rss - before < 250 << 20


def test_several_servers_send_each_event_once(url: str) -> None:
    stores = [Store.open(url) for _ in range(3)]
    first = stores[0]
    model, topology = first.add_model(MODEL), first.add_topology(TOPOLOGY)
    first.deployments.add("chat", model.id, topology.id, {}, ANN)
    plan = mp.solve(mp.Problem(MODEL, TOPOLOGY, mp.RoutingStatistics.from_counts(skewed(2), top_k=2)), "eplb")
    stored = first.add_plan(plan).id
    with receiving() as (address, got):
        key = first.webhooks.add("chat", address, ANN)[0].key
        away = first.webhooks.add("chat", "http://127.0.0.1:1/", ANN)[0].key
        for _ in range(6):
            first.deployments.publish("chat", stored, ANN, cause="manual")
        senders = [WebhookSender(store, Peers()) for store in stores]

        def all_sent() -> bool:
            for sender in senders:
                sender.deliver()
            return all(entry.state == "sent" for entry in first.webhooks.deliveries("chat", key, limit=9))

        until(all_sent)
        assert all(sender.wait(PATIENCE) for sender in senders)
        ids = [json.loads(body)["id"] for _, body in got]
        assert len(ids) == len(set(ids)) == 6
        tried = first.webhooks.deliveries("chat", away, limit=9)
        assert max(entry.attempts for entry in tried) <= 3, "retried on one clock, not by each server's own"
    for store in stores:
        store.close()


def test_deliveries_are_shown_tested_sent_again_filtered_and_signed_with_a_new_secret(tmp_path: Path) -> None:
    plan = mp.solve(mp.Problem(MODEL, TOPOLOGY, mp.RoutingStatistics.from_counts(skewed(2), top_k=2)), "eplb")
    with receiving() as (url, got), serving(str(tmp_path / "s.db"), "--workers", "0") as server:
        client = server.client()
        prepared(client)
        with pytest.raises(mp.InputError, match="no address that may be called"):
            client.add_webhook("chat", "http://169.254.169.254/latest/meta-data/")
        with pytest.raises(mp.InputError, match="events"):
            client.add_webhook("chat", url, events=["plan.publish"])
        made = client.add_webhook("chat", url, events=["drift.alarm"])
        client.publish("chat", client.add_plan(plan).id)
        test = client.test_webhook("chat", made.key)
        until(lambda: [entry.state for entry in client.deliveries("chat", made.key)] == ["sent"])
        assert Webhook(made.secret).verify(got[0][1], got[0][0])["event"] == "webhook.test"
        other = client.rotate_webhook("chat", made.key)
        assert other.secret != made.secret
        client.redeliver("chat", made.key, test.key)
        until(lambda: len(got) == 2)
        for secret in (made.secret, other.secret):
            assert Webhook(secret).verify(got[1][1], got[1][0])["id"] == test.key
        assert [entry.action for entry in client.audit(subject="chat")][:3] == [
            "webhook.redeliver",
            "webhook.rotate",
            "webhook.test",
        ]
        client.close()


def test_secrets_are_encrypted_under_the_operators_key(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fernet = pytest.importorskip("cryptography.fernet", reason="encryption of secrets needs cryptography")
    with Store.open(url) as store:
        model, topology = store.add_model(MODEL), store.add_topology(TOPOLOGY)
        store.deployments.add("chat", model.id, topology.id, {}, ANN)
        secret = store.webhooks.add("chat", "http://127.0.0.1:1/", ANN)[1]
        store.engines.set("chat", ANN, url="http://e:1", recorder="a", every=2.0, span=1.0, secret="engine-key")
        keys = [fernet.Fernet.generate_key().decode() for _ in range(2)]
        (tmp_path / "keys").write_text(keys[0] + "\n")
        monkeypatch.setenv("MOEPLACE_SECRET_KEY_FILE", str(tmp_path / "keys"))
        assert store.webhooks.seal_all() == 1
        store.engines.seal_all()
        assert store.webhooks.seal_all() == 0
        store.webhooks.test("chat", 1, ANN)
        [taken] = store.webhooks.take(9)
        [engine] = store.engines.all()
        assert secret not in str(taken.secrets)
        assert "engine-key" not in str(engine.secret)

        from moeplace.db.secrets import unseal

        assert [unseal(entry) for entry in taken.secrets] == [secret]
        assert unseal(str(engine.secret)) == "engine-key"
        monkeypatch.setenv("MOEPLACE_SECRET_KEY", f"{keys[1]},{keys[0]}")
        assert unseal(str(engine.secret)) == "engine-key", "a former key still opens"
        monkeypatch.setenv("MOEPLACE_SECRET_KEY", keys[1])
        with pytest.raises(StoreError, match="another key"):
            unseal(str(engine.secret))
        monkeypatch.delenv("MOEPLACE_SECRET_KEY")
        monkeypatch.delenv("MOEPLACE_SECRET_KEY_FILE")
        with pytest.raises(StoreError, match="set MOEPLACE_SECRET_KEY"):
            unseal(str(engine.secret))
        monkeypatch.setenv("MOEPLACE_SECRET_KEY", "short")
        with pytest.raises(StoreError, match="make one"):
            store.webhooks.add("chat", "http://127.0.0.1:1/", ANN)


def test_webhooks_of_one_deployment_keep_no_other_from_its_events(url: str) -> None:
    with Store.open(url) as store:
        model, topology = store.add_model(MODEL), store.add_topology(TOPOLOGY)
        for name in ("many", "one"):
            store.deployments.add(name, model.id, topology.id, {}, ANN)
        hooks = [store.webhooks.add("many", f"http://127.0.0.1:{port}/", ANN)[0].key for port in range(1, 33)]
        with pytest.raises(ConflictError, match="32 webhooks"):
            store.webhooks.add("many", "http://127.0.0.1:99/", ANN)
        for key in hooks:
            for _ in range(3):
                store.webhooks.test("many", key, ANN)
        own = store.webhooks.add("one", "http://127.0.0.1:1/", ANN)[0].key
        store.webhooks.test("one", own, ANN)
        first = store.webhooks.take(32)
        assert [item.webhook for item in first].count(own) == 1
        assert len(first) == 1 + OF_DEPLOYMENT
        assert own in {item.webhook for item in first[:2]}
        assert store.webhooks.take(32, busy_deployments=[first[0].deployment]) == []
        assert len(store.webhooks.take(32)) == OF_DEPLOYMENT
        for _ in range(97):
            store.webhooks.test("many", hooks[0], ANN)
        with pytest.raises(ConflictError, match="100 events are on their way"):
            store.webhooks.test("many", hooks[0], ANN)
