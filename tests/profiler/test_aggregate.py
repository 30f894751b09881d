"""Aggregating shards on disk: the same as counting in memory, on any number of processes, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import moeplace as mp
from moeplace.profiler.aggregate import aggregate
from moeplace.profiler.trace_files import TraceWriter, read_trace

pytestmark = pytest.mark.slow


def record(folder: Path, trace: mp.RoutingTrace, *, ranks: int = 1, rows_per_shard: int = 150) -> None:
    """Deals the trace's sequences to ranks, each recording one batch of a workload after the other."""
    for rank in range(ranks):
        mine = trace.select(trace.sequence % ranks == rank)
        with TraceWriter(
            folder,
            num_experts=trace.num_experts,
            top_k=trace.top_k,
            moe_layers=trace.moe_layers,
            gate_weights=False,
            rank=rank,
            rows_per_shard=rows_per_shard,
        ) as writer:
            for sequence in np.unique(mine.sequence):
                part = mine.select(mine.sequence == sequence)
                writer.add(
                    part.expert_ids,
                    sequence=part.sequence,
                    position=part.position,
                    step=int(sequence),
                    workload=part.workloads[part.workload[0]],
                )


def assert_same(one: mp.RoutingStatistics, other: mp.RoutingStatistics) -> None:
    for name in ("experts", "moe_layers", "workloads", "top_k", "tokens", "fingerprint"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("load", "window_workload", "coactivation", "transitions"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert one.require_sample().fingerprint == other.require_sample().fingerprint


@pytest.mark.parametrize("ranks", [1, 3])
def test_any_number_of_processes_gives_what_memory_gives(tmp_path: Path, gpt_oss: mp.RoutingTrace, ranks: int) -> None:
    part = gpt_oss.select(gpt_oss.sequence % 11 == 0)
    record(tmp_path, part, ranks=ranks, rows_per_shard=1500)
    expected = mp.RoutingStatistics.from_trace(read_trace(tmp_path), sample_tokens=3000)
    assert len(expected.workloads) > 1
    assert expected.require_sample().num_tokens < part.num_tokens
    for workers in (1, 2, 3):
        assert_same(aggregate(tmp_path, sample_tokens=3000, workers=workers), expected)
    alone = mp.RoutingStatistics.from_trace(part, sample_tokens=3000)
    assert alone.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(alone.total_load, expected.total_load)


def test_progress_ends_at_all_tokens(tmp_path: Path, toy_trace: mp.RoutingTrace) -> None:
    record(tmp_path, toy_trace)
    for workers in (1, 2):
        calls: list[tuple[int, int]] = []
        aggregate(tmp_path, workers=workers, progress=lambda done, total: calls.append((done, total)))  # noqa: B023
        assert calls[-1] == (480, 480)
        assert [done for done, _ in calls] == sorted({done for done, _ in calls})
        assert len(calls) >= workers


def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = rng.random((4500, 60, 16)).argsort(axis=2).astype(np.uint8)[:, :, :8]
    peaks = []
    for turns in (4, 10):
        folder = tmp_path / str(turns)
        with TraceWriter(folder, num_experts=16, top_k=8, moe_layers=range(60), gate_weights=False) as writer:
            for turn in range(turns):
                sequence = np.full(len(ids), turn)
                writer.add(ids, sequence=sequence, position=np.arange(len(ids)), step=turn)
        tracemalloc.start()
        statistics = aggregate(folder, sample_tokens=2000, workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert statistics.tokens == turns * len(ids)
    assert peaks[1] < 1.25 * peaks[0] + 2_000_000


def test_a_damaged_shard_is_named_whichever_process_meets_it(tmp_path: Path, toy_trace: mp.RoutingTrace) -> None:
    record(tmp_path, toy_trace)
    last = sorted(tmp_path.iterdir())[-1]
    content = bytearray(last.read_bytes())
    content[200:220] = bytes(20)
    last.write_bytes(content)
    for workers in (1, 2):
        with pytest.raises(mp.FileFormatError, match=last.name):
            aggregate(tmp_path, workers=workers)


def test_an_empty_recording_is_refused(tmp_path: Path) -> None:
    with TraceWriter(tmp_path, num_experts=4, top_k=2, moe_layers=[0]):
        pass
    with pytest.raises(mp.InputError, match="no token was counted"):
        aggregate(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"), [({"workers": 0}, "workers"), ({"sample_tokens": -1}, "sample_tokens")]
)
def test_bad_options_are_refused(
    tmp_path: Path, toy_trace: mp.RoutingTrace, options: dict[str, int], message: str
) -> None:
    record(tmp_path, toy_trace)
    with pytest.raises(mp.InputError, match=message):
        aggregate(tmp_path, **options)


SCRIPT = """
import sys, threading, time
import psutil
import moeplace as mp
from moeplace.profiler.aggregate import aggregate

def kill():
    while True:
        for child in psutil.Process().children():
            try:
                if any("popen_loky" in word for word in child.cmdline()):
                    child.kill()
                    return
            except psutil.Error:
                pass
        time.sleep(0.001)

if sys.argv[2] == "kill":
    threading.Thread(target=kill, daemon=True).start()
try:
    print(aggregate(sys.argv[1], workers=2).tokens)
except mp.MoeplaceError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("how", ["run", "kill"])
def test_a_plain_script_without_a_main_guard_works_and_a_killed_worker_is_reported(
    tmp_path: Path, toy_trace: mp.RoutingTrace, how: str
) -> None:
    record(tmp_path / "trace", toy_trace)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    outcome = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "trace"), how], capture_output=True, text=True, timeout=120
    )
    assert outcome.returncode == 0, outcome.stderr
    if how == "run":
        assert outcome.stdout.strip() == "480"
    else:
        assert outcome.stdout.startswith("MoeplaceError a worker process was killed")
