"""Solves on a Ray of this machine: done once, also when a Ray worker is lost."""

from __future__ import annotations

import os
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
pytest.importorskip("ray", reason="Ray is an extra; pip install 'moeplace[ray]'")
from service_runs import MODEL, TOPOLOGY, counts, prepared, serving, skewed

import moeplace as mp
from moeplace.db.records import CountWindow

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def test_a_lost_ray_workers_job_is_begun_again_and_done_once(tmp_path: Path) -> None:
    arguments = ("--workers", "ray:local", "--ray-workers", "1", "--check-windows", "1000")
    with serving(str(tmp_path / "store.db"), *arguments) as server, server.client() as client:
        prepared(client)
        windows = [CountWindow(NOON + timedelta(minutes=i), counts(i, skewed(0))) for i in range(12)]
        client.push_windows("chat", windows)
        solved = client.wait(client.solve("chat", solver="eplb", slots=20), timeout=200)
        assert solved.result is not None
        load = [counts(i, skewed(0)) for i in range(9)]
        expected = mp.solve(
            mp.Problem(MODEL, TOPOLOGY, mp.RoutingStatistics.from_counts(load, top_k=2), slots=20), "eplb"
        )
        assert client.plan(solved.result["plan"]).fingerprint == expected.fingerprint

        job = client.solve("chat", solver="search", seconds=8.0)
        deadline = time.monotonic() + 60
        while client.job(job.key).state != "running":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1.0)
        os.kill(ray_worker_of(server.process.pid), signal.SIGKILL)
        done = client.wait(job, timeout=200)
        # Lost with its worker, or given back by what the worker had started when it saw that.
        assert (done.state, done.attempts in (1, 2)) == ("done", True)
        assert done.worker != solved.worker
        assert len(list(client.plans())) == 2
        server.wait_for("worker died")
        workers = psutil.Process(server.process.pid).children(recursive=True)
        assert server.stop() == 0
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not [process for process in alive if "moeplace.service.worker" in " ".join(process.cmdline())]


def ray_worker_of(pid: int) -> int:
    """The Ray process that started a worker process of the server."""
    for process in psutil.Process(pid).children(recursive=True):
        if "moeplace.service.worker" in " ".join(process.cmdline()):
            return process.ppid()
    raise AssertionError("no worker process runs below the server")
