"""Traces and steps in memory: validation at the door, splits that leak nothing, steps that mean what they say."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.placement.trace import id_dtype

quick = settings(deadline=None)


@st.composite
def numbered_traces(draw: st.DrawFn) -> mp.RoutingTrace:
    """Traces whose only expert id is the token's number, so that every token in a step can be traced back."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    tokens = sum(lengths)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sequence = np.repeat(rng.permutation(50)[: len(lengths)], lengths)
    position = np.concatenate([np.arange(length) + rng.integers(5) for length in lengths])
    mixed = rng.permutation(tokens) if draw(st.booleans()) else np.arange(tokens)
    return mp.RoutingTrace.from_arrays(
        np.arange(tokens)[:, None, None],
        num_experts=tokens,
        sequence=sequence[mixed],
        position=position[mixed],
        workload=np.array(["a", "b", "c"])[sequence[mixed] % 3],
        step=rng.integers(0, 6, tokens),
    )


def tokens_of(steps: mp.Steps) -> list[list[int]]:
    return [block[:, 0, 0].tolist() for block in steps.blocks()]


# from_arrays


@quick
@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.integers(1, 3), st.integers(2, 300), st.booleans())
def test_experts_are_put_in_order_of_gate_weight(
    seed: int, tokens: int, layers: int, experts: int, gated: bool
) -> None:
    rng = np.random.default_rng(seed)
    k = min(experts, 4)
    ids = rng.random((tokens, layers, experts)).argsort(axis=2)[:, :, :k]
    gates = rng.integers(0, 4, ids.shape) / 4
    given_ids, given_gates = ids.copy(), gates.copy()
    trace = mp.RoutingTrace.from_arrays(ids, experts, gate_weights=gates if gated else None)
    np.testing.assert_array_equal(ids, given_ids)
    np.testing.assert_array_equal(gates, given_gates)
    assert trace.expert_ids.dtype == (np.uint8 if experts <= 256 else np.uint16)
    if not gated:
        np.testing.assert_array_equal(trace.expert_ids, ids)
        return
    assert trace.gate_weights is not None
    for t in range(tokens):
        for layer in range(layers):
            pairs = sorted(zip(-gates[t, layer], range(k), ids[t, layer], strict=True))
            assert trace.expert_ids[t, layer].tolist() == [int(e) for _, _, e in pairs]
            assert trace.gate_weights[t, layer].tolist() == [-g for g, _, _ in pairs]


def test_columns_left_out_have_plain_meanings() -> None:
    trace = mp.RoutingTrace.from_arrays(np.zeros((4, 2), int), 1)
    assert trace.top_k == 1
    assert trace.moe_layers == (0, 1)
    assert trace.sequence.tolist() == [0, 0, 0, 0]
    assert trace.position.tolist() == [0, 1, 2, 3]
    assert trace.workloads == ("",)
    assert trace.step is None
    assert trace.source is None
    mixed = mp.RoutingTrace.from_arrays(np.zeros((5, 1), int), 1, sequence=[7, 3, 7, 7, 3], workload=[2, 10, 2, 2, 10])
    assert mixed.position.tolist() == [0, 0, 1, 2, 1]
    assert [mixed.workloads[code] for code in mixed.workload] == ["2", "10", "2", "2", "10"]


def test_a_trace_cannot_be_changed_through_its_arrays(toy_trace: mp.RoutingTrace) -> None:
    for name in ("expert_ids", "sequence", "position", "workload"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(toy_trace, name)[0] = 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"expert_ids": [[[0, 1]], [[0, 4]]]},
            r"expert_ids\[1, 0, 1\] \(model layer 5\) is 4; ids must be from 0 to 3",
        ),
        ({"expert_ids": [[[0, 1]], [[-1, 2]]]}, r"expert_ids\[1, 0, 0\].* is -1"),
        ({"expert_ids": [[[0, 1]], [[2, 2]]]}, "token 1 chose the same expert twice in model layer 5"),
        ({"expert_ids": [[[0.0, 1.0]]] * 2}, "given float64"),
        ({"expert_ids": [0, 1]}, "shape .tokens, layers, top_k."),
        ({"expert_ids": np.zeros((2, 0, 2), int)}, "shape .tokens, layers, top_k."),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": 65537}, "num_experts"),
        ({"moe_layers": [5, 6]}, "moe_layers names 2 layers"),
        ({"gate_weights": [[[0.5, 0.5]]]}, "gate_weights has shape"),
        ({"gate_weights": [[[0.5, 0.5]], [[np.inf, 0.5]]]}, "token 1 in model layer 5.*finite"),
        ({"gate_weights": [[[0.5, 0.5]], [[1e9, 0.5]]]}, "token 1 in model layer 5.*finite"),
        ({"sequence": [0]}, "sequence must be 2 integers"),
        ({"sequence": [0.0, 1.0]}, "sequence must be 2 integers"),
        ({"sequence": np.array([0, 2**63], np.uint64)}, "sequence holds 9223372036854775808"),
        ({"position": [[0, 1]]}, "position must be 2 integers"),
        ({"workload": ["a"]}, "workload must be 2 tags"),
        ({"step": ["a", "b"]}, "step must be 2 integers"),
        ({"source": [0, 1, 2]}, "source must be 2 integers"),
    ],
)
def test_bad_arrays_are_refused_with_the_place(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"expert_ids": [[[0, 1]], [[2, 3]]], "num_experts": 4, "moe_layers": [5]}
    mp.RoutingTrace.from_arrays(**good)
    with pytest.raises(mp.InputError, match=message):
        mp.RoutingTrace.from_arrays(**(good | arguments))


def test_the_fingerprint_follows_the_routing(toy_trace: mp.RoutingTrace) -> None:
    again = toy_trace.select(np.arange(toy_trace.num_tokens))
    assert again.fingerprint == toy_trace.fingerprint
    assert toy_trace.select(np.arange(100)).fingerprint != toy_trace.fingerprint
    assert replace(toy_trace, num_experts=9).fingerprint != toy_trace.fingerprint
    assert replace(toy_trace, sequence=toy_trace.sequence + 1).fingerprint != toy_trace.fingerprint


# concatenate


@quick
@given(numbered_traces(), st.integers(0, 60))
def test_parts_join_to_the_whole(trace: mp.RoutingTrace, cut: int) -> None:
    first, second = trace.select(np.arange(trace.num_tokens) < cut), trace.select(np.arange(trace.num_tokens) >= cut)
    whole = mp.RoutingTrace.concatenate([first, second])
    assert whole.fingerprint == trace.fingerprint
    np.testing.assert_array_equal(whole.step, trace.step)


def test_workloads_join_by_name() -> None:
    one = mp.RoutingTrace.from_arrays([[0], [0]], 2, workload=["b", "c"])
    two = mp.RoutingTrace.from_arrays([[1], [1]], 2, workload=["c", "a"])
    whole = mp.RoutingTrace.concatenate([one, two])
    assert [whole.workloads[code] for code in whole.workload] == ["b", "c", "c", "a"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (mp.RoutingTrace.from_arrays([[0]], 3), "num_experts is 3"),
        (mp.RoutingTrace.from_arrays([[0]], 2, moe_layers=[1]), "moe_layers"),
        (mp.RoutingTrace.from_arrays([[[0, 1]]], 2), "top_k is 2"),
        (mp.RoutingTrace.from_arrays([[0]], 2, step=[0]), "only some of the traces have step"),
    ],
)
def test_traces_that_differ_do_not_join(other: mp.RoutingTrace, message: str) -> None:
    with pytest.raises(mp.InputError, match=message):
        mp.RoutingTrace.concatenate([mp.RoutingTrace.from_arrays([[0]], 2), other])
    with pytest.raises(mp.InputError, match="no trace"):
        mp.RoutingTrace.concatenate([])


# split


@quick
@given(numbered_traces(), st.sampled_from(["sequence", "step", "time"]), st.floats(0.05, 0.95), st.integers(0, 9))
def test_a_split_shares_nothing_and_loses_nothing(trace: mp.RoutingTrace, by: Any, held_out: float, seed: int) -> None:
    try:
        train, held = trace.split(by=by, held_out=held_out, seed=seed)
    except mp.InputError as error:
        assert "cannot hold out" in str(error)  # noqa: PT017
        return
    tokens = [*train.expert_ids[:, 0, 0].tolist(), *held.expert_ids[:, 0, 0].tolist()]
    assert sorted(tokens) == list(range(trace.num_tokens))
    assert train.num_tokens
    assert held.num_tokens
    if by == "time":
        assert max(train.expert_ids[:, 0, 0]) < min(held.expert_ids[:, 0, 0])
    else:
        assert not set(getattr(train, by).tolist()) & set(getattr(held, by).tolist())
    for part in (train, held):
        kept = part.expert_ids[:, 0, 0]
        assert (np.diff(kept.astype(int)) > 0).all()
        np.testing.assert_array_equal(part.sequence, trace.sequence[kept])
        np.testing.assert_array_equal(part.position, trace.position[kept])
    again = trace.split(by=by, held_out=held_out, seed=seed)
    assert (again[0].fingerprint, again[1].fingerprint) == (train.fingerprint, held.fingerprint)


def test_each_workload_keeps_its_share_and_seeds_differ(gpt_oss: mp.RoutingTrace) -> None:
    train, held = gpt_oss.split(by="sequence", held_out=0.25, seed=0)
    for code in range(len(gpt_oss.workloads)):
        whole = len(np.unique(gpt_oss.sequence[gpt_oss.workload == code]))
        mine = len(np.unique(held.sequence[held.workload == code]))
        assert abs(mine - 0.25 * whole) <= 0.5
    assert not set(train.sequence.tolist()) & set(held.sequence.tolist())
    other = gpt_oss.split(by="sequence", held_out=0.25, seed=1)[1]
    assert set(other.sequence.tolist()) != set(held.sequence.tolist())


def test_a_split_that_cannot_be_says_why(toy_trace: mp.RoutingTrace) -> None:
    one = toy_trace.select(toy_trace.sequence == 0)
    with pytest.raises(mp.InputError, match="cannot hold out 25% by sequence"):
        one.split()
    assert one.split(by="time")[1].num_tokens == 10
    with pytest.raises(mp.InputError, match="no step column"):
        toy_trace.split(by="step")
    with pytest.raises(mp.InputError, match="known: sequence, step, time"):
        toy_trace.split(by="token")  # type: ignore[arg-type]
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(mp.InputError, match="held_out"):
            toy_trace.split(held_out=share)


# steps


@quick
@given(numbered_traces(), st.integers(1, 6), st.integers(1, 25), st.integers(0, 9))
def test_decode_lanes_follow_sequences_to_their_end(
    trace: mp.RoutingTrace, concurrency: int, steps: int, seed: int
) -> None:
    batches = trace.decode_steps(concurrency=concurrency, steps=steps, seed=seed)
    assert batches.num_steps == steps
    assert (batches.tokens == concurrency).all()
    if concurrency > len(np.unique(trace.sequence)):
        assert "each" in batches.notes[0]
        return
    assert not batches.notes
    lanes = np.array(tokens_of(batches)).T
    place = {t: (int(trace.sequence[t]), int(trace.position[t])) for t in range(trace.num_tokens)}
    firsts = {int(s): int(trace.position[trace.sequence == s].min()) for s in np.unique(trace.sequence)}
    lasts = {int(s): int(trace.position[trace.sequence == s].max()) for s in np.unique(trace.sequence)}
    for lane in lanes:
        for now, following in itertools.pairwise(lane):
            (sequence, position), (next_sequence, next_position) = place[now], place[following]
            if position < lasts[sequence]:
                assert (next_sequence, next_position) == (sequence, position + 1)
            else:
                assert next_position == firsts[next_sequence]
    again = trace.decode_steps(concurrency=concurrency, steps=steps, seed=seed)
    np.testing.assert_array_equal(again.expert_ids, batches.expert_ids)


def test_decoding_draws_every_sequence_before_any_twice(toy_trace: mp.RoutingTrace) -> None:
    """12 sequences of 40 tokens, 12 lanes: the first step must hold one token of each."""
    trace = replace(toy_trace, workload=toy_trace.sequence, workloads=tuple(map(str, range(12))))
    steps = trace.decode_steps(concurrency=12, steps=1, seed=3)
    assert steps.workload is not None
    assert sorted(steps.workload.tolist()) == list(range(12))


def test_steps_of_more_sequences_than_were_recorded_do_not_pretend_to_know_more(toy_trace: mp.RoutingTrace) -> None:
    """12 sequences for 480 lanes: shares of sequences in a step vary as of 12 drawn anew, not as of 480."""
    trace = replace(toy_trace, workload=toy_trace.sequence, workloads=tuple(map(str, range(12))))
    for steps in (trace.decode_steps(480, steps=400, seed=1), trace.prefill_steps(960, steps=400, seed=1)):
        assert "12 recorded sequences" in steps.notes[0]
        assert steps.workload is not None
        first = [(steps.workload[steps.step_of == s] == 0).mean() for s in range(steps.num_steps)]
        assert np.mean(first) == pytest.approx(1 / 12, rel=0.15)
        assert np.std(first) == pytest.approx(np.sqrt(11 / 12) / 12, rel=0.2), "sampling 12 of 12 with replacement"
    assert "each 40 times" in trace.decode_steps(480, steps=1).notes[0]


def test_parts_of_a_recording_know_its_whole_forward_calls(tmp_path: Path) -> None:
    """3 calls of 8 single tokens and one prompt of 64: sizes stay those of the calls where sequences are parted."""
    sequence = np.concatenate([np.tile(np.arange(8), 3), np.repeat(np.arange(8, 16), 8)])
    step = np.concatenate([np.repeat([0, 1, 2], 8), np.full(64, 3)])
    ids = np.random.default_rng(0).integers(8, size=(88, 2, 1))
    trace = mp.RoutingTrace.from_arrays(ids, num_experts=8, sequence=sequence, step=step)
    expected = (mp.Batch("decode", tokens=8, weight=0.75), mp.Batch("prefill", tokens=64, weight=0.25))
    assert trace.batches == expected
    for number, part in enumerate(trace.split("sequence", 0.5)):
        assert part.batches == expected
        assert mp.RoutingStatistics.from_trace(part).batches == expected
        mp.write_trace(part, tmp_path / f"part{number}")
        assert mp.read_trace(tmp_path / f"part{number}").batches == expected
        assert mp.aggregate(tmp_path / f"part{number}").batches == expected
    statistics = mp.RoutingStatistics.from_trace(trace)
    mp.write_statistics(statistics, tmp_path / "routing.npz")
    assert mp.read_statistics(tmp_path / "routing.npz").batches == expected
    assert replace(trace, step=None).batches == ()


def test_only_steps_as_recorded_keep_their_source_ranks(toy_trace: mp.RoutingTrace) -> None:
    """A batch made from recorded sequences runs on ranks nobody recorded; its tokens are spread evenly."""
    trace = replace(toy_trace, source=toy_trace.sequence, step=toy_trace.position)
    assert trace.decode_steps(concurrency=4, steps=2).source is None
    assert trace.prefill_steps(tokens=40).source is None
    recorded = trace.recorded_steps()
    assert recorded.source is not None
    assert recorded.source[:12].tolist() == list(range(12))
    alone = replace(trace, source=np.zeros_like(trace.sequence))
    assert alone.recorded_steps().source is None, "one process says nothing of where tokens live on a cluster"


@quick
@given(numbered_traces(), st.integers(1, 12), st.integers(0, 9))
def test_prefill_holds_whole_sequences_in_order_each_once(trace: mp.RoutingTrace, tokens: int, seed: int) -> None:
    steps = trace.prefill_steps(tokens=tokens, seed=seed)
    if trace.num_tokens < tokens:
        assert steps.num_steps == 1
        assert "recorded sequence" in steps.notes[0]
        return
    assert steps.num_steps == trace.num_tokens // tokens
    assert (steps.tokens == tokens).all()
    stream = [t for batch in tokens_of(steps) for t in batch]
    assert len(set(stream)) == len(stream)
    drawn = list(dict.fromkeys(int(trace.sequence[t]) for t in stream))
    expected: list[int] = []
    for sequence in drawn:
        mine = np.flatnonzero(trace.sequence == sequence)
        expected += mine[np.argsort(trace.position[mine])].tolist()
    assert stream == expected[: len(stream)]
    more = trace.prefill_steps(tokens=tokens, steps=steps.num_steps + 3, seed=seed)
    assert more.num_steps == steps.num_steps + 3


@quick
@given(numbered_traces())
def test_recorded_steps_are_the_forward_calls(trace: mp.RoutingTrace) -> None:
    assert trace.step is not None
    steps = trace.recorded_steps()
    expected = [np.flatnonzero(trace.step == s).tolist() for s in np.unique(trace.step)]
    assert tokens_of(steps) == expected
    with pytest.raises(mp.InputError, match="no step column"):
        replace(trace, step=None).recorded_steps()


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"steps": 0}])
def test_impossible_steps_are_refused(toy_trace: mp.RoutingTrace, wrong: dict[str, int]) -> None:
    with pytest.raises(mp.InputError, match=next(iter(wrong))):
        toy_trace.decode_steps(**wrong)
    with pytest.raises(mp.InputError, match="at least 1"):
        toy_trace.prefill_steps(tokens=8, steps=0)
    with pytest.raises(mp.InputError, match="0 tokens"):
        toy_trace.select(np.empty(0, np.int64)).decode_steps()


@quick
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 3), st.integers(1, 9))
def test_step_loads_and_workloads_are_those_of_a_naive_count(seed: int, count: int, layers: int, experts: int) -> None:
    rng = np.random.default_rng(seed)
    k = min(2, experts)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 7, count))])
    ids = rng.random((offsets[-1], layers, experts)).argsort(axis=2)[:, :, :k].astype(id_dtype(experts))
    tags = rng.integers(0, 3, offsets[-1])
    steps = mp.Steps(ids, offsets, experts, tuple(range(layers)), workload=tags, workloads=("a", "b", "c"))
    loads = steps.loads()
    for s in range(count):
        mine = range(offsets[s], offsets[s + 1])
        for layer in range(layers):
            counted = [sum(int(e) in ids[t, layer].tolist() for t in mine) for e in range(experts)]
            assert loads[s, layer].tolist() == counted
        votes = [sum(int(tags[t]) == w for t in mine) for w in range(3)]
        assert votes[steps.step_workload[s]] == max(votes)
        assert (steps.step_of[list(mine)] == s).all()
    order = rng.integers(0, count, 6)
    drawn = steps.select(order)
    np.testing.assert_array_equal(drawn.loads(), loads[order])
    np.testing.assert_array_equal(drawn.tokens, steps.tokens[order])
    np.testing.assert_array_equal(drawn.step_workload, steps.step_workload[order])


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 3], "from 0 to 4 tokens"),
        ([1, 4], "from 0 to 4 tokens"),
        ([0], "from 0 to 4 tokens"),
        ([0, 2, 2, 4], "at least one token"),
        ([0, 3, 2, 4], "at least one token"),
    ],
)
def test_offsets_that_do_not_cover_the_tokens_are_refused(offsets: list[int], message: str) -> None:
    with pytest.raises(mp.InputError, match=message):
        mp.Steps(np.zeros((4, 1, 1), np.uint8), np.array(offsets), 1, (0,))


def test_choosing_no_step_is_refused(toy_trace: mp.RoutingTrace) -> None:
    steps = toy_trace.decode_steps(concurrency=2, steps=3)
    with pytest.raises(mp.InputError, match="no step chosen"):
        steps.select([False, False, False])


def test_a_trace_keeps_its_model_on_every_way(tmp_path: Path) -> None:
    model = mp.ModelSpec(layers=2, experts=4, top_k=1, hidden_size=8, ffn_size=8, name="small")
    ids = np.random.default_rng(0).integers(4, size=(40, 2, 1))
    trace = mp.RoutingTrace.from_arrays(ids, 4, sequence=np.arange(40) // 4, moe_layers=(3, 5), model=model)
    known = model.replace(moe_layers=(3, 5))
    assert trace.model == known
    for part in (*trace.split(), mp.RoutingTrace.concatenate(trace.split()), trace.select(np.arange(3))):
        assert part.model == known
    mp.write_trace(trace, tmp_path / "trace")
    assert mp.read_trace(tmp_path / "trace").model == known
    for statistics in (mp.RoutingStatistics.from_trace(trace), mp.aggregate(tmp_path / "trace")):
        assert statistics.model == known
        mp.write_statistics(statistics, tmp_path / "statistics.npz")
        assert mp.read_statistics(tmp_path / "statistics.npz").model == known
    with pytest.raises(mp.InputError, match="another model: experts is 8"):
        mp.RoutingTrace.from_arrays(ids, 8, model=model)


def test_the_example_recording_knows_its_model() -> None:
    folder = Path(__file__).resolve().parents[2] / "examples" / "data" / "olmoe_small"
    trace = mp.read_trace(folder)
    assert trace.model is not None
    assert (trace.model.name, trace.model.layers, trace.model.experts) == ("olmoe", trace.num_layers, 32)
