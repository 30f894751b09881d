"""Jobs of running servers: done once, whoever dies."""

from __future__ import annotations

import os
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from service_runs import MODEL, PATIENCE, TOPOLOGY, counts, prepared, serving, skewed

import moeplace as mp
from moeplace.db import Store
from moeplace.db.jobs import Lane
from moeplace.db.records import CountWindow, DecisionRecord
from moeplace.service import workers
from moeplace.service.settings import Settings
from moeplace.service.workers import LocalBackend

pytestmark = pytest.mark.slow

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
LONG = {"solver": "search", "seconds": 600.0}
UNWATCHED = ("--check-windows", "1000")
"""No look at traffic comes between, whose jobs and plans would be counted too."""


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "store.db")


def fill(client: mp.Client, name: str, seed: int, first: int, count: int) -> None:
    """Sends `count` windows of traffic of one kind."""
    chances = skewed(seed)
    windows = [CountWindow(NOON + timedelta(minutes=first + i), counts(first + i, chances)) for i in range(count)]
    client.push_windows(name, windows)


def running(client: mp.Client, key: int) -> None:
    """Waits until a worker is in the middle of it."""
    deadline = time.monotonic() + PATIENCE
    while client.job(key).state != "running":
        assert time.monotonic() < deadline, client.job(key)
        time.sleep(0.05)
    time.sleep(0.5)


def test_a_solve_gives_the_plan_the_library_gives_and_tells_its_progress(file: str) -> None:
    with serving(file, *UNWATCHED) as server, server.client() as client:
        prepared(client)
        fill(client, "chat", 0, 0, 12)
        job = client.solve("chat", solver="eplb", slots=[20, 16, 18])
        told = []
        done = client.wait(job, progress=told.append)
        assert told[-1].state == "done"
        assert done.result is not None
        plan = client.plan(done.result["plan"])
        load = [counts(i, skewed(0)) for i in range(9)]
        expected = mp.solve(
            mp.Problem(MODEL, TOPOLOGY, mp.RoutingStatistics.from_counts(load, top_k=2), slots=[20, 16, 18]), "eplb"
        )
        assert plan.fingerprint == expected.fingerprint, "the newest quarter of the windows is held out"
        searched = client.wait(client.solve("chat", solver="search", seconds=2.0), progress=told.append)
        assert searched.result is not None
        assert searched.result["value"] <= 1.0 + searched.result["gap"] + 1.0
        assert any(entry.progress.get("history") for entry in told)
        assert searched.attempts == 1
        assert server.stop() == 0


def test_a_cancelled_solve_ends_at_once_and_another_begins(file: str) -> None:
    with serving(file, *UNWATCHED, "--lease", "3") as server, server.client() as client:
        prepared(client)
        fill(client, "chat", 0, 0, 12)
        job = client.solve("chat", **LONG)
        running(client, job.key)
        assert client.cancel(job.key).state == "cancelled"
        after = client.wait(client.solve("chat", solver="eplb"), timeout=PATIENCE)
        assert after.state == "done"
        with pytest.raises(mp.SolveError, match="cancelled"):
            client.wait(job)


def test_the_job_of_a_killed_worker_is_begun_again(file: str) -> None:
    with serving(file, *UNWATCHED) as server, server.client() as client:
        prepared(client)
        fill(client, "chat", 0, 0, 12)
        job = client.solve("chat", solver="search", seconds=3.0)
        running(client, job.key)
        os.kill(server.worker_pid(), signal.SIGKILL)
        done = client.wait(job, timeout=PATIENCE)
        assert (done.state, done.attempts) == ("done", 2)
        assert len(list(client.plans())) == 1


@pytest.mark.long
def test_a_job_outlives_the_server_that_ran_it(url: str) -> None:
    with serving(url, *UNWATCHED, "--lease", "3") as server, server.client() as client:
        prepared(client)
        fill(client, "chat", 0, 0, 12)
        job = client.solve("chat", solver="search", seconds=3.0)
        running(client, job.key)
        worker = psutil.Process(server.worker_pid())
        server.kill()
        gone, _ = psutil.wait_procs([worker], timeout=PATIENCE)
        assert gone, "a worker ends with its server"
    with serving(url, *UNWATCHED, "--lease", "3") as server, server.client() as client:
        done = client.wait(job, timeout=PATIENCE)
        assert done.state == "done"
        assert len(list(client.plans())) == 1


def test_a_server_told_to_stop_gives_its_job_back_at_once(file: str) -> None:
    with serving(file, *UNWATCHED) as server, server.client() as client:
        prepared(client)
        fill(client, "chat", 0, 0, 12)
        job = client.solve("chat", **LONG)
        running(client, job.key)
        assert server.stop() == 0
    with serving(file, *UNWATCHED, "--workers", "0") as server, server.client() as client:
        found = client.job(job.key)
        assert (found.state, found.attempts) == ("queued", 0)


@pytest.mark.long
def test_two_servers_on_one_database_share_the_work(url: str) -> None:
    """Whichever is busy, the other does what is left: each in turn, whoever was asked."""
    with (
        serving(url, *UNWATCHED) as one,
        serving(url, *UNWATCHED) as two,
        one.client() as client,
        two.client() as other,
    ):
        prepared(client)
        fill(client, "chat", 0, 0, 12)
        busy = client.solve("chat", **LONG)
        running(client, busy.key)
        first = {client.job(busy.key).worker}
        done = shared_out(client, other)
        assert first.isdisjoint(done), "a worker has one job at a time"
        assert len(done) == 1
        also_busy = client.solve("chat", **LONG)
        running(client, also_busy.key)
        assert {client.job(also_busy.key).worker} == done, "the only free one"
        client.cancel(busy.key)
        after = shared_out(client, other)
        assert server_of(after) == server_of(first), "the server whose job was cancelled has a worker again"
        assert server_of(after) != server_of(done)
        client.cancel(also_busy.key)


def shared_out(client: mp.Client, other: mp.Client) -> set[str]:
    """Who did jobs that were asked for at either server."""
    jobs = [(client, other)[i % 2].solve("chat", solver="eplb", seed=i) for i in range(4)]
    done = [other.wait(job, timeout=PATIENCE) for job in jobs]
    assert all(job.attempts == 1 for job in done)
    return {job.worker for job in done}


def server_of(workers: set[str]) -> set[str]:
    """Host and process of the servers that started them."""
    return {worker.rpartition(":")[0] for worker in workers}


def test_drift_raises_an_alarm_solves_decides_and_waits_for_approval(file: str) -> None:
    with serving(file, "--check-windows", "16") as server, server.client() as client:
        prepared(client, min_regret=0.005, horizon_steps=5e6)
        fill(client, "chat", 0, 0, 16)
        first = waiting_decision(client)
        assert first.current_id is None
        client.approve(first.key, "first plan")
        fill(client, "chat", 0, 100, 16)
        wait_for_checks(client, 2)
        quiet = next(iter(client.checks("chat")))
        assert (quiet.alarm, quiet.figures["status"]) == (False, "no change")
        fill(client, "chat", 7, 200, 16)
        second = waiting_decision(client)
        assert second.current_id == first.candidate_id
        check = next(iter(client.checks("chat")))
        assert check.alarm
        assert check.figures["p"] <= 0.001
        assert check.figures["regret"] > 0.005
        assert second.figures["gain_low"] > 0
        client.reject(second.key, "not today")
        assert client.deployment("chat").plan_id == first.candidate_id


def test_a_policy_may_publish_without_asking(file: str) -> None:
    with serving(file) as server, server.client() as client:
        prepared(client, publish="automatic", min_regret=0.0, horizon_steps=5e6)
        fill(client, "chat", 0, 0, 16)
        wait_for_checks(client, 1)
        deployment = client.deployment("chat")
        assert deployment.version == 1
        [publication] = client.publications("chat")
        assert (publication.cause, publication.actor) == ("automatic", "service")
        assert client.plan_in_force("chat", "sglang") is not None


def test_a_loss_that_does_not_matter_moves_nothing_when_a_plan_is_looked_at_again(file: str) -> None:
    """A plan made from few windows is, when there are twice as many; 0.04 % was published then."""
    with serving(file, "--check-windows", "8") as server, server.client() as client:
        prepared(client, publish="automatic", min_regret=10.0, horizon_steps=5e6)
        fill(client, "chat", 0, 0, 8)
        wait_for_checks(client, 1)
        assert client.deployment("chat").version == 1, "any plan is better than none"
        fill(client, "chat", 0, 100, 8)
        wait_for_checks(client, 2)
        check = next(iter(client.checks("chat")))
        assert check.figures["status"].endswith("the plan still holds")
        assert 0.0 <= abs(check.figures["regret"]) < 10.0
        assert client.deployment("chat").version == 1


def test_a_decision_asked_for_is_judged_on_newer_windows(file: str) -> None:
    with serving(file, "--check-windows", "1000") as server, server.client() as client:
        prepared(client, horizon_steps=5e6)
        fill(client, "chat", 0, 0, 40)
        plan = client.wait(client.solve("chat")).result
        assert plan is not None
        what_if = client.wait(client.decide("chat", plan["plan"], record=False)).result
        assert what_if is not None
        assert what_if["action"] == "apply"
        assert list(client.decisions("chat")) == []
        result = client.wait(client.decide("chat", plan["plan"])).result
        assert result is not None
        assert result["decision_state"] == "waiting"
        [decision] = client.decisions("chat")
        assert decision.figures["bytes_moved"] > 0
        with pytest.raises(mp.SolveError, match="no trace is uploaded"):
            client.wait(client.decide("chat", plan["plan"], routing="tokens"))


def waiting_decision(client: mp.Client) -> DecisionRecord:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for decision in client.decisions("chat", state="waiting"):
            return decision
        time.sleep(0.2)
    raise AssertionError([list(client.jobs()), list(client.checks("chat"))])


def wait_for_checks(client: mp.Client, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(list(client.checks("chat"))) < count:
        assert time.monotonic() < deadline, list(client.jobs())
        time.sleep(0.2)


def test_workers_import_nothing_from_the_folder_they_run_in(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "email.py").write_text("raise SystemExit('the planted module ran')")
    monkeypatch.chdir(planted)
    with Store.open(file):
        worker = LocalBackend(Settings(), f"sqlite:///{file}").start("planted:1:1", "any")
    try:
        time.sleep(4.0)
        assert worker.ended() is None
    finally:
        worker.stop()
        worker.wait(PATIENCE)


def test_drift_checks_do_not_wait_for_solves(tmp_path: Path) -> None:
    with serving(str(tmp_path / "x.db"), "--workers", "1") as server, server.client() as client:
        prepared(client)
        windows = [CountWindow(NOON + timedelta(minutes=i), counts(i, skewed(0))) for i in range(8)]
        client.push_windows("chat", windows[:7])
        solves = [client.solve("chat", solver="search", seconds=600.0).key for _ in range(3)]
        server.wait_for("job begins", job=solves[0])
        client.push_windows("chat", windows[7:])
        deadline = time.monotonic() + PATIENCE
        while not list(client.checks("chat")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert [client.job(key).state for key in solves] == ["running", "queued", "queued"]
        for key in solves:
            client.cancel(key)


def test_a_server_whose_workers_die_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead:
        place: dict[str, object] = {}  # noqa: RUF012

        def ended(self) -> str:
            return "1"

        def stop(self) -> None: ...

        def wait(self, seconds: float) -> None: ...

    class Backend:
        def size(self) -> int:
            return 1

        def start(self, name: str, lane: Lane) -> Any:
            return Dead()

        def close(self) -> None: ...

    monkeypatch.setattr(workers, "SHORT_LIFE", 0.3)
    with Store.open(tmp_path / "x.db") as store:
        pool = workers.Pool(store, Settings(), Backend())
        assert pool.trouble is None
        for _ in range(2):
            pool.tend()
            pool.tend()
            time.sleep(0.4)
        assert "4 workers in a row died within 0.3 s" in str(pool.trouble)
        pool.close()
