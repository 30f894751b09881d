"""What operators do by commands: a deployment in one go, its decisions, roll-back, webhooks, jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from cli_runs import run
from service_runs import MODEL, TOPOLOGY, serving, skewed
from traces import make_trace

import moeplace as mp
from moeplace.profiler.trace_files import write_trace

pytestmark = pytest.mark.slow


def test_a_service_is_operated_by_commands(tmp_path: Path) -> None:
    write_trace(make_trace(0, layers=3, experts=16, top_k=2), tmp_path / "trace", model=MODEL)
    with serving(str(tmp_path / "store.db"), "--workers", "0", "--check-windows", "10000") as server:
        at = ("--server", server.url, "--json")

        def data(*words: Any) -> Any:
            answer = run(*words, *at).data
            assert answer["schema"].startswith(f"moeplace/{words[0]}")
            return answer.get("rows", answer)

        cluster = ("--topology", "h100-hgx", "--nodes", "2", "--devices-per-node", "2")
        made = data("deploy", tmp_path / "trace", "--name", "chat", *cluster)
        assert (made["name"], made["policy"]["publish"]) == ("chat", "approval")
        [entry] = data("deployments", "list")
        assert entry["name"] == data("deployments", "show", "chat")["name"] == "chat"
        assert len(data("models", "list")) == len(data("topologies", "list")) == 1
        assert data("windows", "list", "chat") == []
        assert data("windows", "remove", "chat")["removed"] == 0
        with server.client() as client:
            for seed in (1, 2):
                statistics = mp.RoutingStatistics.from_counts(skewed(seed), top_k=2)
                plan = mp.solve(mp.Problem(MODEL, TOPOLOGY, statistics), "eplb")
                client.publish("chat", client.add_plan(plan).id)
            job = client.solve("chat", solver="eplb", routing="tokens")
        assert data("rollback", "chat", 1, "--comment", "slower")["cause"] == "rollback"
        assert data("deployments", "show", "chat")["hold"]["by"] == "local"
        assert data("deployments", "release", "chat")["hold"] is None
        assert [entry["state"] for entry in data("jobs", "list", "--deployment", "chat")] == ["queued"]
        assert data("jobs", "cancel", job.key)["state"] == data("jobs", "show", job.key)["state"] == "cancelled"
        assert data("decisions", "list", "--waiting") == []
        for command in (("decisions", "show"), ("approve",), ("reject",)):
            assert "no decision 9" in run(*command, 9, *at).err
        hook = data("webhooks", "add", "chat", "http://127.0.0.1:1/", "--event", "drift.alarm")
        assert hook["secret"].startswith("whsec_")
        assert [entry["key"] for entry in data("webhooks", "list", "chat")] == [hook["key"]]
        assert data("webhooks", "deliveries", "chat", hook["key"]) == []
        assert data("webhooks", "remove", "chat", hook["key"])["removed"] == hook["key"]
        assert "no engine is asked" in run("engines", "show", "chat", *at).err
        assert "is no folder of this server" in run("engines", "set", "chat", "http://e:1", *at).err
        assert "chat" in run("deployments", "list", "--server", server.url).out
        assert data("deployments", "remove", "chat")["removed"] == "chat"
        assert data("deployments", "list") == []
