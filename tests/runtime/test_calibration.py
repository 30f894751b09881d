"""Calibration: rates from timings, and a topology from real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import check_output
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import moeplace as mp

pytest.importorskip("torch")

from ranks import launch

from moeplace.cli.app import app
from moeplace.runtime.calibration import alike, line, nodes_of, places_of, roofline

pytestmark = [pytest.mark.slow, pytest.mark.long]

rates = st.floats(1e6, 1e12)


@given(st.floats(0, 1e-2), rates, st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4))
def test_a_line_gives_back_the_latency_and_rate_that_made_it(latency: float, rate: float, weight: list[float]) -> None:
    amounts = [1e3, 1e5, 1e6, 1e7]
    found = line(amounts, [latency + amount / rate for amount in amounts], weight)
    assert found == pytest.approx((latency, rate), rel=1e-5, abs=1e-12)


def test_a_line_holds_where_the_weight_lies_whatever_buffers_and_queues_do_elsewhere() -> None:
    amounts = np.array([1e3, 2e4, 1e5, 2e5, 4e5, 4e6])
    seconds = 1e-3 + np.maximum(amounts - 3e4, 0) / 25e6 + np.maximum(amounts - 1e6, 0) / 20e6
    latency, rate = line(list(amounts), list(seconds), [1e-4, 1e-4, 1.0, 1.0, 1.0, 1e-4])
    assert latency + amounts[2:5] / rate == pytest.approx(seconds[2:5], rel=0.03)


@pytest.mark.parametrize("seconds", [[1.0, 1.0, 1.0], [2.0, 1.0, 0.5], [0.0, 1.0, 2.0], [1.0]])
def test_times_that_give_no_rate_are_refused(seconds: list[float]) -> None:
    with pytest.raises(mp.InputError, match="timings above zero|do not grow"):
        line([10.0**n for n in range(len(seconds))], seconds, [1.0] * len(seconds))


@given(rates, rates, st.floats(0.3, 3.0))
def test_a_roofline_gives_back_the_rates_that_made_it(flops: float, read: float, knee: float) -> None:
    amount = np.array([1.0, 4.0, 16.0, 64.0, 256.0])
    reading = np.full(5, 1e6)
    # The knee lies among the amounts, so that both sides are seen.
    arithmetic = amount * (1e6 / read * flops / (16.0 * knee))
    seconds = np.maximum(arithmetic / flops, reading / read)
    assert roofline(list(arithmetic), list(reading), list(seconds)) == pytest.approx((flops, read), rel=1e-6)


def test_devices_within_noise_of_the_median_become_equal_and_others_stay() -> None:
    assert alike([100.0, 104.0, 97.0, 60.0, 105.0], 0.1).tolist() == [100.0, 100.0, 100.0, 60.0, 100.0]
    assert alike([1.0, 2.0, 3.0], np.inf).tolist() == [2.0, 2.0, 2.0]


def test_nodes_are_runs_of_ranks_and_places_leave_out_nodes_without_them() -> None:
    nodes = nodes_of(["a", "a", "a", "b", "b"])
    assert nodes == ((0, 1, 2), (3, 4))
    assert places_of(nodes) == [(0, 3), (1, 4), (2,)]
    with pytest.raises(mp.InputError, match="'a' do not follow each other"):
        nodes_of(["a", "b", "a"])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch("calibration_ranks:measured", 4, tmp_path_factory.mktemp("calibration"))


def test_every_rank_gets_the_same_topology_of_the_ranks_nodes(found: list[dict[str, Any]]) -> None:
    topology = mp.Topology.from_dict(found[0]["topology"])
    assert topology.node_size.tolist() == [2, 2]
    for other in found:
        assert other["topology"] == found[0]["topology"]


def test_every_timing_stands_beside_what_the_topology_says_of_it(found: list[dict[str, Any]]) -> None:
    links, work = found[0]["links"], found[0]["work"]
    assert {row["kind"] for row in links} == {"intra", "inter", "all"}
    assert [row["pairs"] for row in work] == [1, 8, 16, 32]
    assert min(row["seconds"] for row in links + work) > 0
    topology = mp.Topology.from_dict(found[0]["topology"])
    first = next(row for row in links if row["kind"] == "inter")
    by_hand = topology.inter_latency + first["peer_bytes"] * 2 / topology.inter_bandwidth.min()
    assert first["predicted"] == pytest.approx(by_hand)


def test_messages_of_the_sizes_of_steps_are_timed(found: list[dict[str, Any]]) -> None:
    """64 tokens over 4 ranks, two experts each of 8, 128 bytes a row: 3/4 of a rank's 16 tokens go to the other node,
    7/16 to a device, and twice that inside a node once those of the other node have come."""
    assert found[0]["tokens"] == 64
    for kind, rows in (("inter", 12.0), ("all", 7.0), ("intra", 14.0)):
        sizes = {row["peer_bytes"] for row in found[0]["links"] if row["kind"] == kind}
        assert {round(part * rows * 128) for part in (0.5, 1.0)} <= sizes


def test_dispatch_is_timed_as_the_runtime_does_it(found: list[dict[str, Any]]) -> None:
    """16 tokens a rank: at most two copies each to devices, and at most two to nodes before."""
    flat, staged = found[0]["dispatches"]
    assert (flat["dispatch"], staged["dispatch"]) == ("flat", "node_aware")
    assert 16 < flat["copies"] <= 32
    assert flat["copies"] < staged["copies"] <= 64
    for timed in (flat, staged):
        assert timed["seconds"] > 0
        assert timed["links"] > 0


def test_steps_with_less_than_a_token_a_rank_are_refused(found: list[dict[str, Any]]) -> None:
    assert all("tokens (3) of a step" in one["too_few"] for one in found)


def test_ranks_with_other_settings_are_told_and_none_waits(found: list[dict[str, Any]]) -> None:
    for rank, words in enumerate(one["unlike"] for one in found):
        assert f"has another one than rank {rank}" in words["tokens"]
        assert words["one refuses"].startswith(
            "tokens (3)" if rank == 2 else "settings of calibrate: rank 2 refused it"
        )
        assert words["experts"].startswith("experts (0) a device must be at least 1")
        assert words["round_seconds"].startswith("round_seconds (0.0)")


def test_nodes_that_do_not_divide_the_ranks_are_refused_on_every_rank(found: list[dict[str, Any]]) -> None:
    assert all("4 ranks cannot be nodes of 3" in one["refused"] for one in found)


@pytest.mark.long
def test_the_command_measures_one_process_and_writes_a_topology_that_solves(tmp_path: Path) -> None:
    path = tmp_path / "topology.json"
    sizes = ["--hidden-size", "32", "--ffn-size", "16", "--experts", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "moeplace", "calibrate", *sizes, "-o", str(path), "--json"],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    check_output(printed)
    assert mp.Topology.load(path) == mp.Topology.from_dict(printed["topology"])
    assert printed["links"] == []
    assert "one process: no links to measure" in done.stderr


def test_an_output_that_is_no_topology_file_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["calibrate", "-o", str(tmp_path / "topology.txt")])
    assert done.exit_code == 1
    assert "must end in .json, .yaml or .yml" in done.output
