"""What recordings say of themselves: layers that differ, tokens left out, shared experts, workloads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp
from moeplace.profiler.read import Recording, open_routing
from moeplace.profiler.trace_files import TraceWriter, read_trace, write_trace

RNG = np.random.default_rng(0)


def model(layers: int, **fields: Any) -> mp.ModelSpec:
    return mp.ModelSpec(**{"layers": layers, "experts": 8, "top_k": 2, "hidden_size": 64, "ffn_size": 32, **fields})


def ids(tokens: int, layers: int = 3, experts: int = 8, top_k: int = 2) -> Any:
    return RNG.random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k]


# Layers


@pytest.mark.parametrize(
    ("recorded", "of_model", "says"),
    [
        (
            range(3, 62),
            range(3, 61),
            "Recorded only: 61, .*multi-token prediction.*drop-layers 61",
        ),
        (range(59), range(58), "Recorded only: 58, which may be"),
        (range(46), range(1, 46), "Recorded only: 45, which may be .*--drop-layers 45"),
        (range(3, 30), range(3, 61), "In the model only: 30-60, .*hash-routed .*half of a pipeline"),
        (range(29), range(3, 61), "In the model only: 32-60"),
        (range(1, 59), range(58), "Where they are the same layers, counted otherwise, --moe-layers 0-57"),
    ],
)
def test_layers_that_differ_are_named_with_what_they_may_be(recorded: range, of_model: range, says: str) -> None:
    counts = mp.RoutingStatistics.from_counts(RNG.random((len(recorded), 8)), moe_layers=recorded)
    with pytest.raises(mp.InputError, match=says):
        Recording.of(counts, "counts.npz").of_model(model(len(of_model), moe_layers=tuple(of_model)))


def test_a_layer_less_leaves_the_others_as_they_were(toy_trace: mp.RoutingTrace) -> None:
    part = Recording.of(toy_trace, "trace").keep_layers([0, 2])
    assert part.header.moe_layers == (0, 2)
    np.testing.assert_array_equal(part.trace.expert_ids, toy_trace.expert_ids[:, [0, 2]])
    whole = mp.RoutingStatistics.from_trace(toy_trace)
    for kept in ([0, 1], [0, 2]):
        statistics = whole.keep_layers(kept)
        np.testing.assert_array_equal(statistics.load, whole.load[:, kept])
        assert (statistics.transitions is None) == (kept == [0, 2])
    with pytest.raises(mp.InputError, match=r"layers \[7\] were asked for; recorded are 0-2"):
        whole.keep_layers([0, 7])


# Tokens


def test_counts_of_a_model_know_it_and_how_many_tokens_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.stack([np.bincount(ids(500)[:, 0].ravel(), minlength=8) for _ in range(3)]))
    recording = open_routing(tmp_path / "c.npy", kind="loads").of_model(model(3))
    statistics = recording.statistics()
    assert (statistics.tokens, statistics.top_k, statistics.model) == (500, 2, model(3))
    mp.write_statistics(statistics, tmp_path / "counts.npz")
    assert open_routing(tmp_path / "counts.npz").model == model(3)


def test_tokens_with_fewer_experts_are_counted(tmp_path: Path) -> None:
    routed = ids(100)
    routed[:7, 1] = -1
    routed[7:10] = -1
    np.save(tmp_path / "r.npy", routed)
    recording = open_routing(tmp_path / "r.npy", kind="tokens")
    assert recording.trace.num_tokens == 90
    assert "7 of 100 tokens have fewer than k experts in some layer" in recording.notes[0]
    assert "3 of 100 tokens were cached or never captured" in recording.notes[1]


@pytest.mark.parametrize("told", [None, 8])
@pytest.mark.parametrize("shared", [1, 2])
def test_fused_shared_experts_of_tokens_are_set_apart(tmp_path: Path, shared: int, told: int | None) -> None:
    routed = ids(200)
    routed[0, 0], routed[1, 0] = [7, 0], [0, 1]
    extra = np.broadcast_to(8 + np.arange(shared), (200, 3, shared))
    np.save(tmp_path / "r.npy", np.concatenate([routed, extra], axis=2))
    options = {} if told is None else {"num_experts": told}
    recording = open_routing(tmp_path / "r.npy", kind="tokens", **options)
    assert (recording.header.num_experts, recording.header.top_k) == (8, 2)
    np.testing.assert_array_equal(recording.trace.expert_ids, routed)
    assert "shared experts that the engine fused with the 8 routed ones" in recording.notes[0]


def test_fused_shared_experts_of_counts_are_set_apart(tmp_path: Path) -> None:
    windows = np.stack([[np.bincount(ids(500)[:, 0].ravel(), minlength=8) for _ in range(3)] for _ in range(4)])
    np.save(tmp_path / "c.npy", np.concatenate([windows, np.full((4, 3, 2), 500)], axis=2))
    recording = open_routing(tmp_path / "c.npy", kind="loads")
    assert (recording.header.num_experts, recording.header.top_k) == (8, 2)
    np.testing.assert_array_equal(recording.statistics().load, windows)
    assert "experts 8 to 9 are taken by every token" in recording.notes[0]
    # Evenly loaded experts count alike too, and none of them is shared.
    np.save(tmp_path / "even.npy", np.full((4, 3, 8), 100.0))
    assert open_routing(tmp_path / "even.npy").header.num_experts == 8


# Several recordings


def test_two_recordings_become_two_workloads(toy_trace: mp.RoutingTrace) -> None:
    other = toy_trace.select(np.arange(0, toy_trace.num_tokens, 2))
    both = Recording.join({"chat": Recording.of(toy_trace, "a"), "code": Recording.of(other, "b")})
    assert both.trace.workloads == ("chat", "code")
    assert len(np.unique(both.trace.sequence)) == len(np.unique(toy_trace.sequence)) + len(np.unique(other.sequence))
    counts = [mp.RoutingStatistics.from_counts(RNG.random((3, 3, 8))) for _ in range(2)]
    joined = Recording.join({"a": Recording.of(counts[0], "a"), "b": Recording.of(counts[1], "b")}).statistics()
    np.testing.assert_array_equal(joined.load, np.concatenate([part.load for part in counts]))
    assert (joined.workloads, joined.window_workload.tolist()) == (("a", "b"), [0, 0, 0, 1, 1, 1])
    counted = Recording.of(mp.RoutingStatistics.from_trace(toy_trace), "b")
    assert Recording.join({"a": Recording.of(toy_trace, "a"), "b": counted}).statistics().tokens == (
        2 * toy_trace.num_tokens
    )
    few = Recording.of(mp.RoutingStatistics.from_counts(np.ones((3, 4))), "c")
    with pytest.raises(mp.InputError, match="code is of another model than chat: experts is 4, not 8"):
        Recording.join({"chat": Recording.of(counts[0], "a"), "code": few})


def test_two_recordings_into_one_folder_at_once_lose_none(tmp_path: Path, toy_trace: mp.RoutingTrace) -> None:
    outcomes: list[str] = []
    barrier = threading.Barrier(4)

    def record() -> None:
        barrier.wait()
        try:
            write_trace(toy_trace, tmp_path / "trace")
            outcomes.append("written")
        except mp.InputError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("written") == 1
    assert all("own folder" in said or "already holds" in said or said == "written" for said in outcomes)
    assert read_trace(tmp_path / "trace").num_tokens == toy_trace.num_tokens
    writer = TraceWriter(tmp_path / "open", num_experts=8, top_k=2, moe_layers=range(3), gate_weights=False)
    with pytest.raises(mp.InputError, match="being recorded here by another writer"):
        write_trace(toy_trace, tmp_path / "open")
    writer.close()
