"""Counting of routing: exact against a naive loop, and independent of blocks, order of merging and sharing."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.placement import statistics as accumulate
from moeplace.placement.statistics import (
    FIRST_WINDOW_TOKENS,
    MAX_WINDOWS,
    LoadWindows,
    StatisticsAccumulator,
    TokenSample,
    streams,
)


@st.composite
def traces(draw: st.DrawFn, max_tokens: int = 40) -> mp.RoutingTrace:
    experts = draw(st.integers(1, 7))
    top_k = draw(st.integers(1, min(4, experts)))
    layers, tokens = draw(st.integers(1, 4)), draw(st.integers(1, max_tokens))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = rng.random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k]
    return mp.RoutingTrace.from_arrays(
        ids,
        num_experts=experts,
        sequence=rng.integers(0, 6, tokens),
        position=rng.permutation(tokens),
        workload=rng.choice(["chat", "code", "maths"], tokens),
        source=rng.integers(0, 3, tokens) if draw(st.booleans()) else None,
        moe_layers=range(2, 2 + layers),
    )


def naive_pairs(trace: mp.RoutingTrace, workload: str) -> tuple[Any, Any, Any]:
    """Loads, co-activation and transitions of one workload by a loop over tokens, as their definitions read."""
    L, E, k = trace.num_layers, trace.num_experts, trace.top_k
    load, together, onward = np.zeros((L, E)), np.zeros((L, E, E)), np.zeros((L - 1, E, E))
    for t in range(trace.num_tokens):
        if trace.workloads[trace.workload[t]] != workload:
            continue
        for layer in range(L):
            chosen = [int(e) for e in trace.expert_ids[t, layer]]
            for e in chosen:
                load[layer, e] += 1
                for other in chosen:
                    if other != e:
                        together[layer, e, other] += 1
            if layer + 1 < L:
                for e in chosen:
                    for following in trace.expert_ids[t, layer + 1]:
                        onward[layer, e, int(following)] += 1
    return load, together, onward / k


def assert_same(one: mp.RoutingStatistics, other: mp.RoutingStatistics) -> None:
    assert one.workloads == other.workloads
    assert one.fingerprint == other.fingerprint
    assert one.tokens == other.tokens
    for name in ("load", "window_workload", "coactivation", "transitions"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert (one.sample is None) == (other.sample is None)
    if one.sample is not None and other.sample is not None:
        assert one.sample.fingerprint == other.sample.fingerprint


@settings(deadline=None)
@given(traces())
def test_counts_are_those_of_a_naive_loop(trace: mp.RoutingTrace) -> None:
    statistics = mp.RoutingStatistics.from_trace(trace)
    used = tuple(sorted({trace.workloads[code] for code in trace.workload}))
    assert statistics.workloads == used
    assert statistics.coactivation is not None
    assert statistics.transitions is not None
    for code, name in enumerate(used):
        load, together, onward = naive_pairs(trace, name)
        np.testing.assert_array_equal(statistics.workload_load[code], load)
        np.testing.assert_array_equal(statistics.coactivation[code], together)
        np.testing.assert_array_equal(statistics.transitions[code], onward)
    assert statistics.tokens == trace.num_tokens
    np.testing.assert_array_equal(statistics.total_load.sum(axis=1), trace.num_tokens * trace.top_k)
    np.testing.assert_allclose(statistics.total_transitions.sum(axis=(1, 2)), trace.num_tokens * trace.top_k)


@settings(deadline=None)
@given(traces(), st.data())
def test_blocks_do_not_change_the_result(trace: mp.RoutingTrace, data: st.DataObject) -> None:
    limit = data.draw(st.integers(1, 60), "sample_tokens")
    cuts = sorted(data.draw(st.lists(st.integers(0, trace.num_tokens), max_size=5), "cuts"))
    accumulator = StatisticsAccumulator.like(trace, sample_tokens=limit)
    for start, stop in pairwise([0, *cuts, trace.num_tokens]):
        accumulator.add(trace.select(np.arange(start, stop)))
    assert_same(accumulator.finish(), mp.RoutingStatistics.from_trace(trace, sample_tokens=limit))


@settings(deadline=None)
@given(traces(), st.data())
def test_shared_work_gives_the_same_result(trace: mp.RoutingTrace, data: st.DataObject) -> None:
    limit = data.draw(st.integers(1, 60), "sample_tokens")
    cuts = sorted(data.draw(st.lists(st.integers(0, trace.num_tokens), max_size=4), "cuts"))
    total = StatisticsAccumulator.like(trace, sample_tokens=limit)
    preceding: dict[tuple[int, str], int] = {}
    for start, stop in pairwise([0, *cuts, trace.num_tokens]):
        part = trace.select(np.arange(start, stop))
        accumulator = StatisticsAccumulator.like(trace, sample_tokens=limit, preceding=preceding)
        accumulator.add(part)
        total.merge(accumulator)
        for stream, tokens in streams(part):
            preceding[stream] = preceding.get(stream, 0) + len(tokens)
    assert_same(total.finish(), mp.RoutingStatistics.from_trace(trace, sample_tokens=limit))


@settings(deadline=None)
@given(traces(), st.integers(0, 60))
def test_the_sample_keeps_within_its_limit_and_holds_tokens_of_the_trace(trace: mp.RoutingTrace, limit: int) -> None:
    sample = mp.RoutingStatistics.from_trace(trace, sample_tokens=limit).sample
    if limit >= trace.num_tokens:
        assert sample is not None
        assert sample.num_tokens == trace.num_tokens
    if sample is None:
        return
    assert sample.num_tokens <= limit
    known = {(int(s), int(p)): i for i, (s, p) in enumerate(zip(trace.sequence, trace.position, strict=True))}
    rows = [known[int(s), int(p)] for s, p in zip(sample.sequence, sample.position, strict=True)]
    np.testing.assert_array_equal(sample.expert_ids, trace.expert_ids[rows])
    tags = [trace.workloads[code] for code in trace.workload[rows]]
    assert [sample.workloads[code] for code in sample.workload] == tags


def test_the_sample_holds_whole_sequences_in_order(gpt_oss: mp.RoutingTrace) -> None:
    sample = mp.RoutingStatistics.from_trace(gpt_oss, sample_tokens=30_000).require_sample()
    assert 25_000 < sample.num_tokens <= 30_000
    names, counts = np.unique(sample.sequence, return_counts=True)
    assert len(names) > 50
    lengths = np.bincount(gpt_oss.sequence)
    np.testing.assert_array_equal(counts, lengths[names])
    order = np.lexsort((sample.position, sample.sequence))
    np.testing.assert_array_equal(order, np.arange(sample.num_tokens))


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2)), min_size=2, max_size=20), st.integers(4, 60))
def test_merged_samples_are_the_sample_of_the_whole(units: list[tuple[int, int]], limit: int) -> None:
    """Parts that dropped tokens on their own must not keep what the whole would have dropped."""
    lengths, parts = np.array(units).T
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    trace = mp.RoutingTrace.from_arrays(np.zeros((len(sequence), 1, 1), int), num_experts=1, sequence=sequence)
    whole, total = TokenSample(limit), TokenSample(limit)
    whole.add(trace)
    for part in range(3):
        sample = TokenSample(limit)
        sample.add(trace.select(np.repeat(parts, lengths) == part))
        total.merge(sample)
    one, other = whole.result(), total.result()
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one.fingerprint == other.fingerprint


def test_one_endless_sequence_still_leaves_a_sample() -> None:
    tokens = 20_000
    ids = np.random.default_rng(0).integers(0, 8, (tokens, 1, 1))
    trace = mp.RoutingTrace.from_arrays(ids, num_experts=8)
    sample = mp.RoutingStatistics.from_trace(trace, sample_tokens=9_000).require_sample()
    assert sample.num_tokens == 9_000  # four spans of a quarter each
    assert (np.diff(sample.position) > 0).all()
    assert sample.decode_steps(concurrency=4, steps=10).num_steps == 10


def test_windows_are_spans_of_one_workload_and_stay_few() -> None:
    tokens = 3 * MAX_WINDOWS * FIRST_WINDOW_TOKENS
    ids = (np.arange(tokens) * 16 // tokens)[:, None, None]
    tags = np.where(np.arange(tokens) % 4 == 0, "a", "b")
    statistics = mp.RoutingStatistics.from_trace(mp.RoutingTrace.from_arrays(ids, num_experts=16, workload=tags), 0)
    assert statistics.sample is None
    assert len(statistics.load) <= MAX_WINDOWS
    per_window = statistics.load.sum(axis=(1, 2))
    width = per_window.max()
    assert width == 4 * FIRST_WINDOW_TOKENS
    for code in range(2):
        mine = statistics.load[statistics.window_workload == code]
        assert (mine[:-1].sum(axis=(1, 2)) == width).all()
        # Experts were used one after the other, so the windows must be in time order.
        assert (np.diff(mine[:, 0].argmax(axis=1)) >= 0).all()


@pytest.mark.parametrize("cuts", [[150_000], [10_000, 20_000], [5, 199_000], [65_536, 131_072]])
def test_windows_of_merged_parts_are_those_of_the_whole(cuts: list[int]) -> None:
    """Parts end with windows of different widths, some narrower than the whole's, some as wide."""
    ids = np.random.default_rng(0).integers(0, 4, (200_000, 1, 1)).astype(np.uint8)
    whole = LoadWindows(layers=1, experts=4)
    whole.add((0, ""), ids)
    total, widths = LoadWindows(layers=1, experts=4), []
    for start, stop in pairwise([0, *cuts, len(ids)]):
        part = LoadWindows(layers=1, experts=4, preceding={(0, ""): start})
        part.add((0, ""), ids[start:stop])
        widths.append(part.window_tokens)
        total.merge(part)
    assert len(set(widths)) > 1 or widths[0] < whole.window_tokens
    assert total.window_tokens == whole.window_tokens == 4 * FIRST_WINDOW_TOKENS
    for one, other in zip(total.result(("",)), whole.result(("",)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_windows_line_up_the_ranks_spans() -> None:
    windows = LoadWindows(layers=1, experts=2)
    for rank, expert in ((0, 0), (1, 1)):
        for _ in range(2):
            windows.add((rank, ""), np.full((FIRST_WINDOW_TOKENS, 1, 1), expert, np.uint8))
    load, workload = windows.result(("",))
    np.testing.assert_array_equal(load, np.full((2, 1, 2), FIRST_WINDOW_TOKENS))
    assert workload.tolist() == [0, 0]


def test_more_workloads_than_windows_keep_one_each() -> None:
    tokens = 2 * FIRST_WINDOW_TOKENS * 300
    tags = np.char.add("w", (np.arange(tokens) % 300).astype(str))
    trace = mp.RoutingTrace.from_arrays(np.zeros((tokens, 1, 1), int), num_experts=1, workload=tags)
    statistics = mp.RoutingStatistics.from_trace(trace, 0)
    assert statistics.load.shape == (300, 1, 1)
    assert (statistics.load == 2 * FIRST_WINDOW_TOKENS).all()


def test_the_fingerprint_tells_different_routing_apart(toy_trace: mp.RoutingTrace) -> None:
    base = mp.RoutingStatistics.from_trace(toy_trace).fingerprint
    assert len(base) == 64
    ids = toy_trace.expert_ids.copy()
    ids[7, 1] = ids[7, 1][::-1] if (ids[7, 1] == ids[8, 1]).all() else ids[8, 1]
    changed = replace(toy_trace, expert_ids=ids)
    assert mp.RoutingStatistics.from_trace(changed).fingerprint != base
    renamed = replace(toy_trace, workloads=("chat", "prose"))
    assert mp.RoutingStatistics.from_trace(renamed).fingerprint != base
    assert mp.RoutingStatistics.from_trace(toy_trace, sample_tokens=10).fingerprint == base


def test_counting_goes_on_after_a_result(toy_trace: mp.RoutingTrace) -> None:
    half = toy_trace.num_tokens // 2
    accumulator = StatisticsAccumulator.like(toy_trace)
    accumulator.add(toy_trace.select(np.arange(half)))
    assert accumulator.finish().tokens == half
    accumulator.add(toy_trace.select(np.arange(half, toy_trace.num_tokens)))
    assert_same(accumulator.finish(), mp.RoutingStatistics.from_trace(toy_trace))


def test_experts_and_workloads_without_tokens_are_zero_and_unnamed(toy_trace: mp.RoutingTrace) -> None:
    chat = toy_trace.select(toy_trace.workload == toy_trace.workloads.index("chat"))
    wide = replace(chat, num_experts=12)
    statistics = mp.RoutingStatistics.from_trace(wide)
    assert statistics.workloads == ("chat",)
    assert statistics.sample is not None
    assert statistics.sample.workloads == ("chat",)
    assert (statistics.total_load[:, 8:] == 0).all()


def test_a_layer_without_tokens_makes_no_nan() -> None:
    counts = np.random.default_rng(0).integers(0, 50, (4, 3, 8))
    counts[:, 1] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistics = mp.RoutingStatistics.from_counts({"a": counts, "b": counts[0]}, top_k=2)
        assert (statistics.total_load[1] == 0).all()
        assert np.isfinite(statistics.workload_load).all()
        spec = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=8, ffn_size=8)
        problem = mp.Problem(
            model=spec, topology=mp.Topology.preset("h100-hgx", nodes=1, devices_per_node=4), statistics=statistics
        )
        plan = mp.solve(problem, "contiguous")
    assert np.isfinite(plan.certificate.value)


def test_an_empty_trace_is_refused(toy_trace: mp.RoutingTrace) -> None:
    with pytest.raises(mp.InputError, match="no token was counted"):
        mp.RoutingStatistics.from_trace(toy_trace.select(np.empty(0, np.int64)))


@pytest.mark.parametrize("field", ["num_experts", "moe_layers"])
def test_a_block_of_another_model_is_refused(toy_trace: mp.RoutingTrace, field: str) -> None:
    other = replace(toy_trace, **{field: 9 if field == "num_experts" else (0, 1, 5)})
    accumulator = StatisticsAccumulator.like(toy_trace)
    with pytest.raises(mp.InputError, match=field):
        accumulator.add(other)


def test_tables_that_cannot_fit_are_refused_before_allocation() -> None:
    accumulator = StatisticsAccumulator(num_experts=65536, moe_layers=range(4), top_k=1)
    block = mp.RoutingTrace.from_arrays(np.full((1, 4, 1), 65535), num_experts=65536)
    with pytest.raises(mp.InputError, match="GB"):
        accumulator.add(block)


def test_counts_past_the_narrow_type_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulate, "NARROW", np.uint8)
    trace = mp.RoutingTrace.from_arrays(np.tile([[0, 1], [1, 0]], (600, 1, 1)), num_experts=2)
    total = StatisticsAccumulator.like(trace)
    for start in range(0, 600, 200):
        part = StatisticsAccumulator.like(trace, preceding={(0, ""): start})
        part.add(trace.select(np.arange(start, start + 200)))
        total.merge(part)
    statistics = total.finish()
    np.testing.assert_array_equal(statistics.total_coactivation[0], [[0, 600], [600, 0]])
    np.testing.assert_array_equal(statistics.total_transitions[0], [[300, 300], [300, 300]])


def test_a_window_of_an_unknown_workload_is_refused() -> None:
    with pytest.raises(mp.InputError, match="window_workload"):
        mp.RoutingStatistics(experts=2, moe_layers=(0,), load=np.ones((1, 1, 2)), window_workload=np.array([1]))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_many_chunks_and_wide_ids_are_exact(seed: int) -> None:
    """Past one chunk of the counter and with two-byte ids, against an independent one-hot product."""
    rng = np.random.default_rng(seed)
    tokens, layers, experts, k = 3000, 2, 300, 16
    ids = rng.random((tokens, layers, experts)).argpartition(k, axis=2)[:, :, :k]
    statistics = mp.RoutingStatistics.from_trace(mp.RoutingTrace.from_arrays(ids, num_experts=experts), 0)
    hot = np.zeros((layers, tokens, experts))
    for layer in range(layers):
        hot[layer, np.arange(tokens)[:, None], ids[:, layer]] = 1
    together = hot.transpose(0, 2, 1) @ hot
    together[:, np.arange(experts), np.arange(experts)] = 0
    np.testing.assert_array_equal(statistics.total_coactivation, together)
    np.testing.assert_array_equal(statistics.total_transitions[0], hot[0].T @ hot[1] / k)
