"""vLLM's load statistics: intervals become windows, replicas are summed by their map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp
from moeplace.profiler.read import open_routing, read_any, reader_of
from moeplace.profiler.readers.vllm_loads import read_vllm_loads

META = {"record_type": "eplb_load_meta", "version": 1, "model": "m", "num_ranks": 2, "num_layers": 2}


def stats(step: int, load: Any, expert: Any, **changes: Any) -> dict[str, Any]:
    said = {"record_type": "eplb_load_stats", "version": 1, "step": step, "expert_load": load, "p2l_map": expert}
    return said | changes


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in lines))
    return path


MAP = [[0, 1, 2, 0], [2, 1, 0, 1]]


def test_intervals_are_windows_and_replicas_one_expert(tmp_path: Path) -> None:
    moved = [[1, 0, 2, 2], [0, 1, 2, 0]]
    path = write(
        tmp_path / "stats.jsonl",
        META,
        stats(1, [[10, 1, 5, 2], [2, 8, 1, 3]], MAP),
        stats(2, [[1.5, 2, 3, 4], [5, 6, 7, 8]], moved),
    )
    assert reader_of(path).read is read_vllm_loads
    statistics = read_any(path)
    assert isinstance(statistics, mp.RoutingStatistics)
    expected = [[[12, 1, 5], [1, 11, 2]], [[2, 1.5, 7], [13, 6, 7]]]
    np.testing.assert_array_equal(statistics.load, expected)
    assert statistics.moe_layers == (0, 1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([META], "no line is a eplb_load_stats"),
        ([META, stats(1, [[1, 2]], [[0, 1]], version=2)], "line 2 has version 2, expected 1"),
        ([META, {"record_type": "other", "version": 1}], "line 2 is no eplb_load_meta or eplb_load_stats"),
        ([META, [1]], "line 2 is no eplb_load_meta or eplb_load_stats"),
        ([stats(1, [[1, 2]], [[0, 1, 1]])], r"line 1 has expert_load of shape \(1, 2\) and p2l_map of \(1, 3\)"),
        ([stats(1, [[1, 2]], [[0, -1]])], "line 1 p2l_map must hold experts from 0 on"),
        ([stats(1, [[1, 2]], [[0, 1 << 40]])], "line 1 p2l_map must hold experts from 0 on"),
        ([stats(1, [[1, 2]], [[0, 0.5]])], "line 1 p2l_map must hold experts from 0 on"),
        ([stats(1, [[1, -2]], [[0, 1]])], "window 0, layer 0, expert 1 counts -2"),
        ([stats(1, [[float("nan"), 2]], [[0, 1]])], "window 0, layer 0, expert 0 counts nan"),
        ([stats(1, [[1, float("inf")]], [[0, 1]])], "window 0, layer 0, expert 1 counts inf"),
        ([stats(1, [[1, 2]], None)], "line 1 p2l_map is not"),
        ([stats(1, [[1, 2]], [[0, 1]]), stats(2, [[1, 2]] * 2, [[0, 1]] * 2)], "line 2 has 2 layers, an earlier one 1"),
        ([stats(1, [[1, 2]], [[0, 2]])], "fewer than its 2 slots allow"),
        ([stats(1, [[1, 2, 3]], [[0, 1, 1]]), stats(2, [[1, 2, 3]], [[0, 1, 2]])], "lines map 2 to 3 experts"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(lines: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(mp.FileFormatError, match=message):
        read_vllm_loads(write(tmp_path / "stats.jsonl", *lines))


def test_a_line_cut_off_is_named_and_a_missing_file_too(tmp_path: Path) -> None:
    path = write(tmp_path / "stats.jsonl", META, stats(1, [[1, 2]], [[0, 1]]))
    path.write_text(path.read_text()[:-5])
    with pytest.raises(mp.FileFormatError, match="line 2: not JSON, or truncated"):
        read_vllm_loads(path)
    with pytest.raises(mp.InputError, match="no such file"):
        read_vllm_loads(tmp_path / "none.jsonl")


@pytest.mark.parametrize(("steps", "line"), [((1, 2, 1, 2), 3), ((1, 1, 2, 2), 2), ((1, 2, 3, 4), None)])
def test_steps_that_begin_again_are_told(steps: tuple[int, ...], line: int | None, tmp_path: Path) -> None:
    load = [[10, 1, 5, 2], [2, 8, 1, 3]]
    recording = open_routing(write(tmp_path / "stats.jsonl", *(stats(step, load, MAP) for step in steps)))
    assert recording.statistics().load.shape == (4, 2, 3)
    assert [f"steps begin again at line {line}" in note for note in recording.notes] == [True] * (line is not None)
