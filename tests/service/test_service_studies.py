"""What-if and Pareto on a service: the answers the library gives here, on a deployment's routing and on what is
sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from cli_runs import CLUSTER, JUDGED, run, toy_model, toy_trace_folder
from service_runs import MODEL, POLICY, TOPOLOGY, Server, counts, prepared, serving, skewed
from traces import make_trace

import moeplace as mp
from moeplace.db.records import CountWindow
from moeplace.placement.engines import target_names
from moeplace.placement.objective import Objective
from moeplace.profiler.trace_files import write_trace
from moeplace.service.policy import Policy

pytestmark = pytest.mark.slow

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ELSEWHERE = ("file", "stored_as", "steps", "statistics")
SEND = ("--solver", "eplb", "--json")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A deployment of 40 count windows and three traces, not looked at by itself."""
    folder = tmp_path_factory.mktemp("service")
    with serving(str(folder / "store.db"), "--check-windows", "1000") as running, running.client() as client:
        prepared(client)
        windows = [CountWindow(NOON + timedelta(minutes=i), counts(i, skewed(0))) for i in range(40)]
        client.push_windows("chat", windows)
        for seed in range(3):
            write_trace(make_trace(seed, layers=3, experts=16), folder / f"trace{seed}", model=MODEL)
            client.upload_trace("chat", next((folder / f"trace{seed}").glob("*.parquet")))
        yield running


@pytest.fixture
def client(server: Server) -> mp.Client:
    return server.client()


def result(client: mp.Client, job: Any) -> dict[str, Any]:
    found = client.wait(job, timeout=120).result
    assert found is not None
    return dict(found)


def bare(entry: Any) -> Any:
    """An answer without where its plans went and how the steps are called, which differ by where they were asked
    for."""
    if isinstance(entry, dict):
        return {key: bare(value) for key, value in entry.items() if key not in ELSEWHERE}
    return [bare(value) for value in entry] if isinstance(entry, list) else entry


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_trace_folder(tmp_path_factory.mktemp("toy") / "trace", toy_model())


def test_a_front_asked_of_a_service_is_the_one_made_here(server: Server, trace: Path, tmp_path: Path) -> None:
    asked = ("pareto", trace, *CLUSTER, *JUDGED, "--redundant", "0,8", *SEND)
    here = run(*asked, "--no-store", "-o", tmp_path / "here")
    there = run(*asked, "--server", server.url, "-o", tmp_path / "there")
    assert (here.code, there.code) == (0, 0), there.err
    assert bare(there.data) == bare(here.data)
    assert len(there.data["points"]) == 2
    for mine, theirs in zip(here.data["points"], there.data["points"], strict=True):
        assert mp.Plan.load(mine["file"]).fingerprint == mp.Plan.load(theirs["file"]).fingerprint
    shown = run(*[part for part in asked if part != "--json"], "--server", server.url)
    assert "no other plan here is at least as good in everything" in shown.out


def test_a_what_if_asked_of_a_service_is_the_one_made_here(server: Server, trace: Path, tmp_path: Path) -> None:
    solved = run("solve", trace, *CLUSTER, "-s", "eplb", "--no-store", "-o", tmp_path / "plan.json")
    assert solved.code == 0, solved.err
    asked = ("whatif", tmp_path / "plan.json", trace, *JUDGED, "--lose", "device:1", "--devices", "3", *SEND)
    here = run(*asked, "-o", tmp_path / "here", "--db", tmp_path / "mine.db")
    there = run(*asked, "-o", tmp_path / "there", "--server", server.url)
    assert (here.code, there.code) == (0, 0), there.err
    assert bare(there.data) == bare(here.data)
    assert [row["change"] for row in there.data["changes"]] == ["3 devices", "device:1"]
    ready = there.data["changes"][1]["ready"]
    assert mp.Plan.load(ready["file"]).fingerprint == ready["fingerprint"]
    moved = run(*asked, "-t", "h100-hgx", "--server", server.url)
    assert moved.code == 2
    other = run(*asked[:-5], "-t", "a100-pcie", "--devices-per-node", "2", *SEND, "--server", server.url)
    assert other.data["changes"][0]["change"] == "a100-pcie, 2 devices", other.err


@pytest.mark.parametrize("routing", ["counts", "tokens"])
def test_a_deployments_own_routing_is_what_its_studies_are_judged_on(client: mp.Client, routing: Any) -> None:
    answer = result(
        client,
        client.what_if("chat", routing=routing, changes={"lose": ["node:0"]}, steps={"tokens": 64}, solver="eplb"),
    )
    [row] = answer["changes"]
    assert (row["change"], row["devices"], row["survives"]) == ("node:0", 2, False)
    ready = client.plan(row["ready"]["stored_as"])
    assert ready.topology == TOPOLOGY.without(range(2))
    assert ("drawn from the newest 8 count windows" in answer["steps"]) == (routing == "counts")
    front = result(
        client,
        client.pareto("chat", routing=routing, redundant=[0, 4], tolerate=[None], steps={"tokens": 64}, solver="eplb"),
    )
    assert [point["redundant_slots"] for point in front["points"]] == [0, 4]
    assert any(point["best"] for point in front["points"])
    view = {plan.id: plan for plan in client.plans()}[front["points"][1]["stored_as"]]
    assert view.statistics_id is not None, "a point's plan is kept with what it was solved on"


def test_bytes_are_moved_from_the_plan_in_force(client: mp.Client) -> None:
    plan = result(client, client.solve("chat", solver="eplb"))["plan"]
    client.publish("chat", plan)
    front = result(client, client.pareto("chat", redundant=[0], tolerate=[None], max_moved=[None], solver="contiguous"))
    assert [point["point"] for point in front["points"]] == ["in force", "+0 slots"]
    assert front["points"][0]["bytes_moved"] == 0
    assert front["points"][1]["bytes_moved"] > 0


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        ("what_if", {"deployment": "chat", "changes": {"lose": ["device:9"]}}, "devices 0 to 3"),
        ("what_if", {"deployment": "chat", "changes": {"lose": ["rack:1"]}}, "device:N or node:N"),
        ("what_if", {"deployment": "chat", "changes": {"nodes": 4096}}, "8192 devices, at most 4096"),
        ("what_if", {"deployment": "chat", "seconds": 2000.0}, "more than the 3600"),
        ("what_if", {"statistics": "x", "held_out": "y"}, "no statistics"),
        ("what_if", {}, "give deployment, or statistics and held_out"),
        ("what_if", {"deployment": "chat", "plan": "nothing"}, "no plan"),
        ("what_if", {"deployment": "chat", "solver": "elpb"}, "did you mean 'eplb'"),
        ("pareto", {"deployment": "chat", "model": "toy"}, "leave them out"),
        ("pareto", {"deployment": "chat", "redundant": list(range(400))}, "at most 32"),
        ("pareto", {"deployment": "chat", "options": {"x": 1}}, "no option 'x'"),
        ("pareto", {"deployment": "other", "max_moved": [1.0]}, "no deployment"),
    ],
)
def test_a_study_that_cannot_be_made_is_refused_at_once(
    client: mp.Client, kind: str, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(mp.MoeplaceError, match=message):
        getattr(client, kind)(**asked)


def test_a_sweep_tells_its_progress_and_can_be_cancelled(client: mp.Client) -> None:
    job = client.what_if("chat", solver="search", seconds=60.0, changes={"n_1": True})
    for found in client.events(job.key):
        if found.progress.get("message"):
            assert found.progress["message"] == "device:0 (1 of 6)"
            break
    assert client.cancel(job.key).state == "cancelled"


def test_records_are_sent_to_a_deployment_once(server: Server, tmp_path: Path) -> None:
    loads = np.stack([counts(i, skewed(3)) for i in range(5)])
    mp.write_statistics(mp.RoutingStatistics.from_counts(loads, top_k=2), tmp_path / "counts.npz")
    with server.client() as client:
        client.add_deployment("sent", client.add_model(MODEL).id, "box", POLICY)
    sent = ("import", tmp_path / "counts.npz", "--server", server.url, "--deployment", "sent", "--json")
    assert run(*sent).data["sent"] == "5 windows to 'sent', 5 of them new"
    assert run(*sent).data["sent"] == "5 windows to 'sent', 0 of them new"
    with server.client() as client:
        stored = [np.asarray(window.load) for window in client.windows("sent")]
    np.testing.assert_array_equal(np.stack(stored[::-1]), loads)
    write_trace(make_trace(9, layers=3, experts=16), tmp_path / "trace", model=MODEL)
    done = run("import", tmp_path / "trace", "--server", server.url, "--deployment", "sent", "--json")
    assert done.data["sent"] == "1 trace shard to 'sent'", done.err
    whole = run("import", tmp_path / "trace", "--server", server.url, "--json")
    with server.client() as client:
        assert whole.data["sent"] == f"statistics {next(iter(client.statistics())).id}"
    assert run("import", tmp_path / "trace").code == 2


def test_a_candidate_is_judged_by_the_service_and_a_stored_plan_here(
    server: Server, client: mp.Client, tmp_path: Path
) -> None:
    plan = result(client, client.solve("chat", solver="eplb"))["plan"]
    asked = ("decide", "--server", server.url, "--deployment", "chat", "--candidates", plan, "--json")
    before = len(list(client.decisions("chat")))
    judged = run(*asked)
    assert judged.code == 0, judged.err
    assert judged.data["action"] in ("keep", "apply")
    assert judged.data["candidates"][0]["bytes_moved"] == judged.data["figures"]["bytes_moved"]
    assert len(list(client.decisions("chat"))) == before
    kept = run(*asked, "--record").data
    assert client.decision(kept["decision"]).reason == kept["reason"]
    assert run(*asked, tmp_path).code == 2
    write_trace(make_trace(9, layers=3, experts=16), tmp_path / "trace", model=MODEL)
    evaluated = run("evaluate", plan, tmp_path / "trace", "--server", server.url, *JUDGED, "--json")
    assert evaluated.code == 0, evaluated.err
    assert plan in json.dumps(evaluated.data)


@pytest.mark.parametrize("engine", target_names())
def test_every_plan_made_under_a_policy_for_an_engine_is_one_it_runs(server: Server, engine: str) -> None:
    name = f"for-{engine}"
    with server.client() as client:
        slots = None if engine == "permute" else 24
        prepared(client, name, engine=engine, slots=slots, solver="search", options={"proposals": 50}, seconds=1.0)
        client.push_windows(name, [CountWindow(NOON + timedelta(minutes=i), counts(i, skewed(0))) for i in range(40)])
        made = [result(client, client.solve(name))["plan"]]
        client.publish(name, made[0])
        changes = {"lose": ["device:1"], "devices": 6}
        for row in result(client, client.what_if(name, changes=changes, seconds=0.5))["changes"]:
            assert row["ready"] or "do not divide over" in row["reason"]
            made += [row[kind]["stored_as"] for kind in ("repaired", "ready") if row[kind]]
        front = result(client, client.pareto(name, seconds=0.5, tolerate=[None], max_moved=[None]))
        assert front["points"]
        made += [point["stored_as"] for point in front["points"]]
        for plan in map(client.plan, made):
            assert plan.provenance.engine == engine
            mp.check_export(plan, engine)
        # What the engine cannot run is not put in force, whoever asks.
        stacked = np.tile(np.r_[np.arange(16), np.zeros(2, dtype=int)], (3, 1))
        uneven = mp.Plan(MODEL, TOPOLOGY, stacked, np.sort(np.arange(18) % TOPOLOGY.num_devices))
        other = client.add_plan(uneven).id
        if engine == "moeplace":
            assert client.publish(name, other).version == 2
            return
        with pytest.raises(mp.MoeplaceError, match=f"cannot be put in force for 'for-{engine}': {engine} cannot"):
            client.publish(name, other)
        with pytest.raises(mp.MoeplaceError, match=f"{engine} cannot"):
            result(client, client.decide(name, other))


def test_a_policy_names_a_known_engine_and_keeps_what_was_asked(server: Server) -> None:
    with pytest.raises(mp.InputError, match="did you mean 'sglang'"):
        Policy(engine="sglan")
    document = Policy(engine="sglang", objective=Objective(risk="cvar:0.9")).as_document()
    assert (document["engine"], document["objective"]) == ("sglang", {"risk": "cvar:0.9"})
    assert Policy(**document).objective.model_fields_set == {"risk"}
