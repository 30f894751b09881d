"""What is stored can be removed, grows not without end, and is summed whatever it holds."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

pytest.importorskip("fastapi", reason="the service is an extra")
from service_runs import MODEL, POLICY, TOPOLOGY, counts, skewed

import moeplace as mp
from moeplace.db import Store
from moeplace.db.records import Actor, CountWindow, Finding, JobOutcome, Judgement
from moeplace.placement.errors import ConflictError, NotFoundError
from moeplace.placement.plan import plan_to_dict
from moeplace.profiler.statistics_file import write_statistics
from moeplace.service.app import apply_retention
from moeplace.service.client import Transport
from moeplace.service.reader import Operations
from moeplace.service.window_batcher import WindowBatcher

ANN = Actor("ann", "approve")
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(url) as opened:
        model, topology = opened.add_model(MODEL), opened.add_topology(TOPOLOGY)
        for name in ("chat", "other"):
            opened.deployments.add(name, model.id, topology.id, POLICY, ANN)
        yield opened


def window(minute: int = 0, load: np.ndarray | None = None) -> CountWindow:
    return CountWindow(NOON + timedelta(minutes=minute), counts(minute, skewed(0)) if load is None else load)


def lived(store: Store) -> None:
    """Everything that a deployment may have."""
    statistics = mp.RoutingStatistics.from_counts(skewed(0), top_k=2)
    content = io.BytesIO()
    write_statistics(statistics, content)
    plan = mp.solve(mp.Problem(MODEL, TOPOLOGY, statistics), "eplb")
    store.windows.add({"chat": [window(i) for i in range(20)]})
    store.windows.compact("chat", older_than=datetime.now(UTC) + timedelta(hours=1), group=4, keep=64)
    store.webhooks.add("chat", "http://127.0.0.1:1/", ANN)
    store.engines.set("chat", ANN, url="http://127.0.0.1:1", recorder="a", every=2.0, span=1.0, secret="key")
    upload = store.uploads.begin("trace", "chat", "0" * 64, 4)
    store.uploads.append(upload.key, 0, b"1234")
    store.jobs.submit("watch", {}, ANN, deployment="chat")
    job = store.jobs.claim("w")
    assert job is not None
    outcome = JobOutcome(
        {},
        plan=plan,
        statistics=statistics,
        content=content.getvalue(),
        finding=Finding(3, True, {}),
        judgement=Judgement(0, "apply", "because", {}, True),
        rebase=3,
    )
    assert store.jobs.finish(job, outcome)


def test_a_removed_deployment_leaves_its_plans_and_the_audit_log(store: Store) -> None:
    lived(store)
    before = store.describe().counts
    assert store.deployments.remove("chat", ANN) == []
    after = store.describe().counts
    assert {name for name, count in after.items() if count} == {
        *("models", "topologies", "statistics", "plans", "deployments", "audit")
    }
    assert after["plans"] == before["plans"]
    assert after["deployments"] == 1
    assert store.audit.entries(limit=1)[0].action == "deployment.remove"
    with pytest.raises(NotFoundError):
        store.deployments.get("chat")
    [plan] = store.plans()
    store.remove("plan", plan.id, ANN)
    assert store.plans() == []


def test_old_drift_checks_are_dropped_but_the_newest(store: Store) -> None:
    for number in range(4):
        store.jobs.submit("watch", {}, ANN, deployment="chat")
        job = store.jobs.claim("w")
        assert job is not None
        assert store.jobs.finish(job, JobOutcome({}, finding=Finding(number, False, {})))
    assert store.deployments.drop_checks(NOON) == 0
    apply_retention(store, -1.0)
    assert [check.last_window for check in store.deployments.checks("chat", limit=9)] == [3]


def test_windows_and_jobs_are_removed_as_asked(store: Store) -> None:
    lived(store)
    assert store.windows.totals("chat")[0] == 20
    assert store.windows.remove("chat", ANN, ended_before=NOON + timedelta(minutes=10)) > 0
    assert 0 < store.windows.totals("chat")[0] < 20
    assert store.windows.remove("chat", ANN) > 0
    assert store.windows.totals("chat") == (0, 0)
    job = store.jobs.submit("solve", {}, ANN)
    with pytest.raises(ConflictError, match="cancel it first"):
        store.jobs.remove(job.key, ANN)
    store.jobs.cancel(job.key, ANN)
    store.jobs.remove(job.key, ANN)
    with pytest.raises(NotFoundError):
        store.jobs.get(job.key)
    [decided] = store.jobs.page(limit=9)
    with pytest.raises(ConflictError, match="belongs to a decision"):
        store.jobs.remove(decided.key, ANN)


def test_retention_drops_what_is_old_and_nothing_refers_to(store: Store) -> None:
    lived(store)
    for seed in (1, 2):
        unused = mp.RoutingStatistics.from_counts(skewed(seed), top_k=2)
        content = io.BytesIO()
        write_statistics(unused, content)
        store.add_statistics(unused, content.getvalue(), name="mine" if seed == 1 else None)
    store.jobs.cancel(store.jobs.submit("solve", {}, ANN).key, ANN)
    while entries := store.webhooks.take(9):
        for entry in entries:
            store.webhooks.sent(entry.key, "204", state="sent")
    before = store.describe().counts
    apply_retention(store, keep_days=1.0)
    assert store.describe().counts == before
    time.sleep(0.01)
    apply_retention(store, keep_days=0.0)
    after = store.describe().counts
    assert {name: before[name] - after[name] for name in before if before[name] != after[name]} == {
        "jobs": 1,
        "deliveries": before["deliveries"],
        "statistics": 1,
    }


def test_counts_of_any_size_are_summed(store: Store) -> None:
    """As rows of earlier releases have them, too."""
    store.windows.add({"chat": [window(i) for i in range(3)]})
    with store._sessions.writing() as session:
        session.execute(text("UPDATE windows SET pairs = 9223372036854775807"))
    assert store.windows.totals("chat") == (3, 3 * (2**63 - 1))


def test_windows_for_a_removed_deployment_fail_alone(url: str, store: Store) -> None:
    """A server that knew it learns, and the other senders of its transaction have theirs stored."""
    with Store.open(url) as server:
        assert server.windows.shape("chat") == server.windows.shape("other")
        store.deployments.remove("chat", ANN)
        batcher = WindowBatcher(server)
        try:
            futures = [batcher.put(name, [window(1)]) for name in ("other", "chat", "other")]
            assert [futures[0].result(60), futures[2].result(60)] in ([1, 0], [1, 1])
            with pytest.raises(NotFoundError, match="chat"):
                futures[1].result(60)
        finally:
            batcher.close()


@pytest.mark.slow
def test_the_client_sends_again_what_a_server_failed_at() -> None:
    answers = [500, 503, 502, 200]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(answers.pop(0))
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    transport = Transport(f"http://127.0.0.1:{server.server_address[1]}", None, 30.0)
    began = time.monotonic()
    assert transport.call("POST", "/v1/x", b"{}", again=True).json() == {}
    assert time.monotonic() - began > 0.4, "with pauses between"
    answers[:] = [500]
    with pytest.raises(mp.MoeplaceError, match="500"):
        transport.call("POST", "/v1/x", b"{}")
    transport.close()
    server.shutdown()
    server.server_close()


def test_a_sent_plans_certificate_is_its_senders_word(url: str) -> None:
    statistics = mp.RoutingStatistics.from_counts(skewed(0), top_k=2)
    plan = mp.solve(mp.Problem(MODEL, TOPOLOGY, statistics), "eplb")
    bob = {"name": "bob", "role": "submit", "deployments": None, "client": None}
    with Store.open(url) as store:
        operations = Operations(store, None)

        def sent(**certificate: float) -> dict[str, Any]:
            claim = replace(plan, certificate=replace(plan.certificate, **certificate))  # type: ignore[type-var]
            body = json.dumps({"document": plan_to_dict(claim)}).encode()
            return dict(json.loads(operations.answer({"operation": "plan", "actor": bob}, body)[1]))

        with pytest.raises(mp.InputError, match="bound"):
            sent(value=1.0, bound=1.5)
        claimed = sent()
        assert claimed["claimed_by"] == "bob"
        assert store.plan(claimed["id"]).claimed_by == "bob"
        other = mp.solve(mp.Problem(MODEL, TOPOLOGY, statistics), "round_robin")
        assert store.add_plan(other).claimed_by is None
        again = operations.answer(
            {"operation": "plan", "actor": bob}, json.dumps({"document": plan_to_dict(other)}).encode()
        )
        assert json.loads(again[1])["claimed_by"] is None, "what was proven here stays proven"
