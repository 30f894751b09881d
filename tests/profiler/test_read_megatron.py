"""Megatron-LM's router traces, written as its tracer writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp
from moeplace.profiler.read import read_any
from moeplace.profiler.readers.megatron import is_megatron, read_megatron

EXPERTS, TOP_K = 6, 2
LAYERS = (1, 3)


def routed(tokens: int, *seed: int) -> list[list[int]]:
    """As a boolean map gives them: by expert, not by weight."""
    rng = np.random.default_rng(seed)
    return [sorted(rng.permutation(EXPERTS)[:TOP_K].tolist()) for _ in range(tokens)]


def call(step: int, layer: int, rank: int, ids: list[list[int]], **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "stage": "pre_dispatch",
        "block": "decoder",
        "layer": layer,
        "rank": rank,
        "num_tokens": len(ids),
        "topk": TOP_K,
        "top_indices": ids,
    } | more


def write(folder: Path, records: list[dict[str, Any]], rank: int = 0) -> Path:
    path = folder / f"router_trace_rank{rank}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path) -> mp.RoutingTrace:
    trace = read_any(path)
    assert isinstance(trace, mp.RoutingTrace)
    return trace


def test_ranks_steps_and_micro_batches_come_together(tmp_path: Path) -> None:
    for rank in (0, 1):
        records = [
            call(step, layer, rank, routed(4, rank, step, batch, layer))
            for step in (0, 1)
            for batch in (0, 1)
            for layer in LAYERS
        ]
        write(tmp_path, records, rank)
    trace = read(tmp_path)
    expected = [
        np.stack([routed(4, rank, step, batch, layer) for layer in LAYERS], 1)
        for rank in (0, 1)
        for step in (0, 1)
        for batch in (0, 1)
    ]
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate(expected))
    assert trace.moe_layers == LAYERS
    assert trace.step is not None
    assert trace.source is not None
    assert trace.step.tolist() == ([0] * 8 + [1] * 8) * 2
    assert trace.source.tolist() == [0] * 16 + [1] * 16
    assert trace.sequence.tolist() == np.repeat(np.arange(8), 4).tolist()
    assert trace.position.tolist() == [0, 1, 2, 3] * 8


def test_gate_order_is_not_claimed(tmp_path: Path) -> None:
    trace = read(write(tmp_path, [call(0, layer, 0, routed(5, layer)) for layer in LAYERS]))
    assert trace.gate_weights is None
    assert (np.diff(trace.expert_ids.astype(int), axis=2) > 0).all()


def test_a_step_with_a_skipped_record_is_left_out(tmp_path: Path) -> None:
    # The tracer writes nothing for a router call that dropped tokens.
    records = [call(step, layer, 0, routed(3, step, layer)) for step in (0, 1, 2) for layer in LAYERS]
    del records[3]
    trace = read(write(tmp_path, records))
    assert trace.step is not None
    assert sorted(set(trace.step.tolist())) == [0, 2]
    # Of two micro-batches one lacks a layer: which of them cannot be told.
    records = [call(step, layer, 0, routed(3, step, layer, b)) for step in (0, 1) for b in (0, 1) for layer in LAYERS]
    del records[-1]
    trace = read(write(tmp_path, records))
    assert trace.step is not None
    assert set(trace.step.tolist()) == {0}


def test_layers_of_multi_token_prediction_stay_out(tmp_path: Path) -> None:
    records = [call(0, layer, 0, routed(3, layer)) for layer in LAYERS]
    records.insert(1, call(0, 1, 0, routed(2, 9), block="mtp", mtp_idx=0))
    assert read(write(tmp_path, records)).num_tokens == 3


def test_padding_is_dropped(tmp_path: Path) -> None:
    padded = [*routed(2, 1), [-1, -1]]
    trace = read(write(tmp_path, [call(0, layer, 0, padded) for layer in LAYERS]))
    assert trace.position.tolist() == [0, 1]


def test_ranks_that_hold_copies_count_once(tmp_path: Path) -> None:
    for rank in (0, 1):
        write(tmp_path, [call(0, layer, rank, routed(3, layer)) for layer in LAYERS], rank)
    assert read(tmp_path).num_tokens == 3


def test_the_number_of_experts_is_given_recorded_or_seen(tmp_path: Path) -> None:
    plain = [call(0, layer, 0, [[0, 1], [2, 3]]) for layer in LAYERS]
    path = write(tmp_path, plain)
    assert read(path).num_experts == 4
    assert read_megatron(path, num_experts=16).num_experts == 16
    assert read(write(tmp_path, [record | {"logit_shape": [2, 64]} for record in plain])).num_experts == 64
    with pytest.raises(mp.FileFormatError, match=r"ids must be from 0 to 2"):
        read_megatron(path, num_experts=3)


GOOD = call(0, 1, 0, [[0, 1], [2, 3]])
BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "text": ([GOOD | {"top_indices": [["a", "b"], ["c", "d"]]}], "line 1: top_indices is not 2 lists of 2"),
    "fractions": ([GOOD | {"top_indices": [[0.5, 1], [2, 3]]}], "line 1: top_indices"),
    "a ragged table": ([GOOD, GOOD | {"top_indices": [[0], [2, 3]]}], "line 2: top_indices"),
    "fewer tokens than said": ([GOOD | {"num_tokens": 3}], "3 lists of 2"),
    "an id too large": ([GOOD | {"top_indices": [[0, 10**30], [2, 3]]}], "top_indices"),
    "no layer": ([{k: v for k, v in GOOD.items() if k != "layer"} | {"x": {"layer": 1}}], "line 1: layer is None"),
    "a step of text": ([GOOD | {"step": "0"}], "line 1: step is '0'"),
    "an unknown block": ([GOOD | {"block": "encoder"}], "block 'encoder'"),
    "another top_k": ([GOOD, call(0, 2, 0, [[1], [2]], topk=1)], r"top_k is \[1, 2\]"),
    "one expert twice": ([GOOD | {"top_indices": [[1, 1], [2, 3]]}], "same expert twice in model layer 1"),
    "layers that differ in tokens": ([GOOD, call(0, 2, 0, [[1, 2]])], "layers of step 0 on rank 0 differ in tokens"),
    "no complete step": ([GOOD, call(1, 2, 0, [[1, 2]])], "no step has a record of each of the 2 layers"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_trace_is_said(tmp_path: Path, case: str) -> None:
    records, message = BAD[case]
    with pytest.raises(mp.FileFormatError, match=message):
        read_any(write(tmp_path, records))


def test_a_line_cut_off_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD, GOOD | {"step": 1}])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(mp.FileFormatError, match="line 2: not JSON, or truncated"):
        read_any(path)
    path.write_bytes(path.read_bytes() + b"[" * 100_000)
    with pytest.raises(mp.FileFormatError, match="line 2: not JSON"):
        read_any(path)


def test_two_files_of_one_rank_are_refused_and_other_jsonl_is_not_taken(tmp_path: Path) -> None:
    write(tmp_path, [GOOD], 0)
    write(tmp_path, [GOOD], 1)
    with pytest.raises(mp.FileFormatError, match=r"rank 0, as is router_trace_rank0.jsonl"):
        read_any(tmp_path)
    (tmp_path / "log").write_text('{"layer": 1}\n')
    assert not is_megatron(tmp_path / "log")
