"""What others are told: webhooks, signed and again until taken; jobs' events; the same request asked twice."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from service_runs import MODEL, PATIENCE, TOPOLOGY, Server, counts, prepared, receiving, serving, skewed
from standardwebhooks import Webhook, WebhookVerificationError

import moeplace as mp
from moeplace._http import Peers
from moeplace.db import Store
from moeplace.db.records import Actor, CountWindow
from moeplace.service.webhooks import WebhookSender

pytestmark = pytest.mark.slow

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(str(tmp_path_factory.mktemp("service") / "store.db"), "--check-windows", "1000") as running:
        with running.client() as client:
            prepared(client)
            windows = [CountWindow(NOON + timedelta(minutes=i), counts(i, skewed(0))) for i in range(40)]
            client.push_windows("chat", windows)
        yield running


def test_webhooks_are_signed_and_sent_again_until_they_are_taken(server: Server) -> None:
    plan = mp.solve(mp.Problem(MODEL, TOPOLOGY, mp.RoutingStatistics.from_counts(skewed(2), top_k=2)), "eplb")
    with receiving(refusals=1) as (url, got), server.client() as client:
        made = client.add_webhook("chat", url)
        assert [hook.url for hook in client.webhooks("chat")] == [url]
        client.publish("chat", client.add_plan(plan).id)
        deadline = time.monotonic() + PATIENCE
        while len(got) < 2:
            assert time.monotonic() < deadline, got
            time.sleep(0.05)
        first, second = (Webhook(made.secret).verify(body, headers) for headers, body in got[:2])
        assert first["id"] == second["id"], "the same event, told apart by its id"
        assert len({headers["webhook-id"] for headers, _ in got}) == 1
        headers, body = got[0]
        with pytest.raises(WebhookVerificationError, match="No matching signature"):
            Webhook(made.secret).verify(body.replace(b"chat", b"chit"), headers)
        with pytest.raises(WebhookVerificationError, match="No matching signature"):
            # As somebody would who heard it and sends it again later.
            Webhook(made.secret).verify(body, {**headers, "webhook-timestamp": str(int(time.time()) + 1)})
        event = second
        assert (event["event"], event["deployment"], event["cause"]) == ("plan.published", "chat", "manual")
        client.remove_webhook("chat", made.key)
        assert client.webhooks("chat") == []


def ask(server: Server, body: Any, key: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=PATIENCE)
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}
    connection.request("POST", "/v1/solve", json.dumps(body).encode(), headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_the_same_request_under_one_key_is_one_job(server: Server) -> None:
    body = {"deployment": "chat", "solver": "eplb", "seed": 3}
    status, job = ask(server, body, "once")
    assert status == 202
    assert ask(server, body, "once")[1]["key"] == job["key"]
    assert ask(server, body, "twice")[1]["key"] != job["key"]
    status, problem = ask(server, {**body, "seed": 4}, "once")
    assert (status, "Idempotency-Key was used for another request" in problem["detail"]) == (409, True)


def test_progress_comes_as_server_sent_events_until_the_job_ends(server: Server) -> None:
    with server.client() as client:
        job = client.solve("chat", solver="search", seconds=2.0)
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=PATIENCE)
    connection.request("GET", f"/v1/jobs/{job.key}/events")
    answer = connection.getresponse()
    assert answer.getheader("content-type", "").startswith("text/event-stream")
    entries = [entry.splitlines() for entry in answer.read().decode().split("\n\n") if entry.startswith("event:")]
    assert {entry[0] for entry in entries[:-1]} == {"event: job"}
    assert entries[-1][0] == "event: end"
    states = [json.loads(entry[1].removeprefix("data: "))["state"] for entry in entries]
    assert states[-1] == "done"
    assert "running" in states


def test_every_decision_is_in_the_audit_log_with_who_asked_for_it(server: Server) -> None:
    with server.client() as client:
        found = client.wait(client.solve("chat", solver="eplb")).result or {}
        told = client.wait(client.decide("chat", found["plan"])).result or {}
        [entry] = client.audit(action="decision.made")
        assert (entry.actor, entry.subject, entry.detail["decision"]) == ("local", "chat", told["decision"])
        assert client.decision(told["decision"]).reason == entry.detail["reason"]


def test_vllm_ascend_gets_its_file(server: Server, tmp_path: Path) -> None:
    plan = mp.solve(mp.Problem(MODEL, TOPOLOGY, mp.RoutingStatistics.from_counts(skewed(2), top_k=2)), "eplb")
    with server.client() as client:
        assert client.topology("box") == TOPOLOGY
        content = json.loads(client.export(client.add_plan(plan).id, "vllm-ascend"))
    written = mp.export_plan(plan, "vllm-ascend", tmp_path / "plan.json")
    assert content == json.loads(written.read_text())


@pytest.mark.parametrize(
    "url", ["http://[bad/", "http:///path", "http://:80/", "http://host:99999/", "http://host:0/", "http://host:x/"]
)
def test_addresses_that_cannot_be_called_are_refused_when_they_are_given(server: Server, url: str) -> None:
    with server.client() as client, pytest.raises(mp.InputError, match="url"):
        client.add_webhook("chat", url)


def test_a_webhook_that_cannot_be_called_does_not_keep_others_from_theirs(tmp_path: Path) -> None:
    """As earlier releases took them, and one whose answer no database keeps."""
    by = Actor("test", "approve")
    with (
        Store.open(tmp_path / "store.db") as store,
        receiving(refusals=0) as (url, got),
        answering(b"\x00\xff no HTTP \x00\r\n\r\n") as garbled,
    ):
        model, topology = store.add_model(MODEL), store.add_topology(TOPOLOGY)
        store.deployments.add("chat", model.id, topology.id, {}, by)
        for address in ("http://[bad/", "http://host:99999/", "http://" + "x" * 70 + ".test/", garbled, url):
            store.webhooks.add("chat", address, by)
        plan = mp.solve(mp.Problem(MODEL, TOPOLOGY, mp.RoutingStatistics.from_counts(skewed(2), top_k=2)), "eplb")
        store.deployments.publish("chat", store.add_plan(plan).id, by, cause="manual")
        sender = WebhookSender(store, Peers())
        sender.deliver()
        assert sender.wait(PATIENCE)
        assert len(got) == 1
        hooks = store.webhooks.all("chat")
        outcomes = [store.webhooks.deliveries("chat", hook.key, limit=9)[0] for hook in hooks]
        assert [(entry.attempts, entry.state) for entry in outcomes] == [(1, "due")] * 4 + [(1, "sent")]


@contextmanager
def answering(content: bytes) -> Iterator[str]:
    """A listener that sends this to whoever connects, once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(content)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        thread.join(60)
