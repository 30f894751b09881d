"""The emulated cluster of benchmarks/cluster: MoE layers run on it, its links are limited, and nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import moeplace as mp

pytest.importorskip("torch")

TESTS = Path(__file__).resolve().parents[1] / "support"
FOLDER = TESTS.parents[1] / "benchmarks" / "cluster"
sys.path.insert(0, str(FOLDER))
from hosts import Cluster, HostError, NamespacesUnavailableError  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.long]

UP_AND_IDLE = """
import signal, sys, time
from hosts import Cluster
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
with Cluster(hosts=2) as cluster:
    for host in range(2):
        cluster.start(host, ["sleep", sys.argv[1]])
    time.sleep(0.3)
    print("up", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module", autouse=True)
def _allowed() -> None:
    try:
        with Cluster(hosts=2):
            pass
    except NamespacesUnavailableError as error:
        pytest.skip(str(error))


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--seconds", "240", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])},
        timeout=280,
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("cluster")
    done = run(folder, "--hosts", "2", "--ranks", "2", "--rate", "10mbit", "--", str(TESTS / "cluster_script.py"), ".")
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(4)]


def test_layers_on_two_hosts_equal_the_single_process_layer(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert max(found["worst"].values()) < 2e-5, found["worst"]
        assert found["equal_replicas"]


def test_links_between_hosts_are_limited_and_those_inside_are_not(ranks: list[dict[str, Any]]) -> None:
    """Two ranks a host send a megabyte each over 10 Mbit/s: 1.6 s, less what the bucket lets through at once."""
    slowest = {where: max(found["seconds"][where] for found in ranks) for where in ("between", "inside")}
    assert slowest["between"] > 1.4
    assert slowest["inside"] < slowest["between"]


def test_hosts_see_no_network_but_their_own(ranks: list[dict[str, Any]]) -> None:
    assert all(found["interfaces"] == ["eth0", "lo"] for found in ranks)


def test_calibration_finds_hosts_and_the_rate_of_their_links(ranks: list[dict[str, Any]]) -> None:
    topology = mp.Topology.from_dict(ranks[0]["topology"])
    assert topology.node_size.tolist() == [2, 2]
    assert 0.7 * 1.25e6 < topology.inter_bandwidth.min() <= topology.inter_bandwidth.max() < 1.3 * 1.25e6
    assert topology.intra_bandwidth.min() > 5 * 1.25e6
    assert all(found["topology"] == ranks[0]["topology"] for found in ranks)


def test_a_script_that_fails_is_told_and_ends_the_other_host(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.exit('this rank has had enough')\n"
        "time.sleep(1000)\n"
    )
    done = run(tmp_path, "--hosts", "2", "--ranks", "1", "--", str(script))
    assert done.returncode == 1
    assert "this rank has had enough" in done.stderr
    assert "torchrun on host 1 ended with 1" in done.stderr
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(script) in (p.info["cmdline"] or [])]


@pytest.fixture
def idle() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process with a cluster up, and what the sleepers on its hosts are called with."""
    nap = f"{300 + time.time_ns() % 10**9 / 1e9:.9f}"
    process = subprocess.Popen(
        [sys.executable, "-c", UP_AND_IDLE, nap], cwd=FOLDER, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    yield process, nap
    process.kill()
    process.communicate()


def sleepers(nap: str) -> int:
    return sum(p.info["cmdline"] == ["sleep", nap] for p in psutil.process_iter(["cmdline"]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_runs_on_after_the_process_that_made_the_cluster(
    number: signal.Signals, idle: tuple[subprocess.Popen[str], str]
) -> None:
    process, nap = idle
    assert sleepers(nap) == 2
    process.send_signal(number)
    process.wait(timeout=30)
    ends = time.monotonic() + 20
    while sleepers(nap) and time.monotonic() < ends:
        time.sleep(0.05)
    assert sleepers(nap) == 0


def test_two_clusters_stand_side_by_side_and_leave_the_machines_network_alone() -> None:
    before = socket.if_nameindex()
    with Cluster(hosts=2) as one, Cluster(hosts=3) as other:
        assert socket.if_nameindex() == before
        for cluster, host in ((one, 0), (one, 1), (other, 2)):
            reads = ["sh", "-c", f"ip -o address show dev eth0 | grep -q {cluster.address(host)}/"]
            assert cluster.start(host, reads).wait(timeout=30) == 0
    assert socket.if_nameindex() == before


def test_a_command_past_its_time_is_ended() -> None:
    with Cluster(hosts=2) as cluster, pytest.raises(HostError, match="had not ended after 0 s"):
        cluster.torchrun("-c", "nothing", seconds=0)


@pytest.mark.parametrize(("what", "wanted"), [({"hosts": 0}, "0 hosts"), ({"hosts": 2, "rate": "fast"}, "'fast'")])
def test_a_cluster_that_cannot_be_is_refused(what: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        Cluster(**what)
