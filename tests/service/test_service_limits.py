"""What cannot be solved is refused when it is asked for, and a job takes no more than it may."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from service_runs import MODEL, Server, counts, prepared, send, serving, skewed

import moeplace as mp
from moeplace.db.records import CountWindow
from moeplace.placement.errors import SolveError
from moeplace.service.worker import Limits, group_bytes

pytestmark = pytest.mark.slow

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = str(tmp_path_factory.mktemp("service") / "store.db")
    with serving(path, "--job-seconds", "4", "--job-memory", "2", "--check-windows", "1000") as running:
        with running.client() as client:
            prepared(client)
            windows = [CountWindow(NOON + timedelta(minutes=i), counts(i, skewed(0))) for i in range(40)]
            client.push_windows("chat", windows)
        yield running


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(depth):
        inner = {"a": inner}
    return inner


SPEC = MODEL.model_dump(mode="json", exclude_unset=True)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/v1/deployments/chat/policy", {"options": nested(900)}),
        ("PUT", "/v1/deployments/chat/policy", {"options": nested(90)}),
        ("PUT", "/v1/deployments/chat/policy", {"options": {"steps": 10**40}}),
        ("POST", "/v1/solve", {"deployment": "chat", "options": nested(900)}),
        ("POST", "/v1/solve", {"deployment": "chat", "windows": 10**400}),
        ("POST", "/v1/pareto", {"deployment": "chat", "options": {"a": [nested(200)]}}),
        ("POST", "/v1/models", {"spec": {**SPEC, "hidden_size": 10**399}}),
        ("POST", "/v1/models", {"spec": {**SPEC, "moe_layers": [10**40, 1, 2]}}),
        ("POST", "/v1/models", {"spec": {**SPEC, "ffn_size": -(10**30)}}),
        ("POST", "/v1/topologies", {"topology": {"preset": "h100-hgx", "nodes": 10**30}}),
        ("POST", "/v1/topologies", {"topology": nested(900)}),
        ("POST", "/v1/plans", {"document": nested(900)}),
        ("POST", "/v1/uploads", {"kind": "statistics", "sha256": "0" * 64, "total_bytes": 10**400}),
    ],
)
def test_json_that_no_reader_can_take_is_refused_not_failed_at(
    server: Server, method: str, path: str, body: Any
) -> None:
    status, answer = send(server, method, path, json.dumps(body).encode())
    assert status == 422, answer
    assert len(answer) < 6000


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"solver": "serach"}, "did you mean 'search'"),
        ({"options": {"propsals": 3}, "solver": "search"}, "did you mean 'proposals'"),
        ({"options": {"proposals": "many"}, "solver": "search"}, "a whole number"),
        ({"slots": 17, "engine": "vllm"}, "slots"),
        ({"slots": [18, 18]}, "slots"),
        ({"slots": 3}, "slots"),
        ({"solver": "exflow", "slots": 20}, "does not support"),
        ({"options": {"step_tokens": 100_000_000}, "solver": "search"}, "GB"),
        ({"options": {"step_tokens": 10**12}, "solver": "search"}, "at most 1,000,000,000"),
    ],
)
def test_deployments_and_jobs_that_could_not_be_solved_are_refused(
    server: Server, policy: dict[str, Any], message: str
) -> None:
    with server.client() as client:
        model, topology = client.deployment("chat").model_id, client.deployment("chat").topology_id
        with pytest.raises(mp.MoeplaceError, match=message):
            client.add_deployment("other", model, topology, policy)
        with pytest.raises(mp.MoeplaceError, match=message):
            client.set_policy("chat", mp_policy(policy))
        with pytest.raises(mp.MoeplaceError, match=message):
            client.solve("chat", **policy)


def mp_policy(fields: dict[str, Any]) -> Any:
    from moeplace.service.policy import Policy

    return Policy(**fields)


def test_studies_of_more_steps_than_a_job_can_hold_are_refused(server: Server) -> None:
    with server.client() as client:
        for ask in (client.pareto, client.what_if):
            with pytest.raises(mp.InputError, match="a job has 2"):
                ask("chat", steps={"tokens": 1_000_000, "count": 2000}, solver="eplb", seconds=1)


def test_a_job_that_runs_too_long_is_ended_and_the_next_one_is_done(server: Server) -> None:
    with server.client() as client:
        began = time.monotonic()
        with pytest.raises(SolveError, match="runs for more than 4 s"):
            client.wait(client.solve("chat", solver="search", seconds=600.0))
        assert time.monotonic() - began < 60
        assert client.wait(client.solve("chat", solver="eplb")).state == "done"


def test_the_memory_of_a_job_is_that_of_all_its_processes() -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc here")
    # This very test shares its group with whoever started it.
    assert group_bytes() > 10 << 20
    assert os.getpgid(0)
    assert "GB of memory" in str(Limits(30.0, 1 << 20, 60.0).excess(time.monotonic() + 60))
    assert Limits(30.0, 1 << 60, 60.0).excess(time.monotonic() + 60) is None
