"""The ADRS benchmark's load histories, read as a stream."""

from __future__ import annotations

import io
import json
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.profiler import files
from moeplace.profiler.files import DEPTH_LIMIT, json_items
from moeplace.profiler.read import read_any
from moeplace.profiler.readers.tables import is_load_history, read_load_history

pytestmark = pytest.mark.slow


def loads(entries: int, layers: int = 3, experts: int = 5) -> np.ndarray[Any, Any]:
    return np.random.default_rng(entries).integers(1, 3000, (entries, layers, experts))


def write(path: Path, table: np.ndarray[Any, Any], **more: Any) -> Path:
    history = [{"logical_expert_load": entry} for entry in table.tolist()]
    path.write_text(json.dumps({"load_history": history} | more))
    return path


def test_every_entry_is_a_window_in_order(tmp_path: Path) -> None:
    table = loads(7)
    statistics = read_any(write(tmp_path / "load", table))
    assert isinstance(statistics, mp.RoutingStatistics)
    np.testing.assert_array_equal(statistics.load, table)
    assert statistics.moe_layers == (0, 1, 2)
    assert statistics.top_k is None


def test_entries_of_experts_and_layers_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = np.stack([rng.multinomial(9000, p, 4) for p in rng.dirichlet(np.ones(8), 3)])
    assert isinstance(read_any(write(tmp_path / "load", table)), mp.RoutingStatistics)
    with pytest.raises(mp.FileFormatError, match=r"logical_expert_load is .windows, experts, layers., by its totals"):
        read_any(write(tmp_path / "other", table.swapaxes(1, 2)))


def test_entries_are_summed_into_windows(tmp_path: Path) -> None:
    table = loads(7)
    statistics = read_load_history(write(tmp_path / "a", table), entries_per_window=3)
    np.testing.assert_array_equal(statistics.load, [table[:3].sum(0), table[3:6].sum(0), table[6:].sum(0)])


def test_dense_layers_keep_the_numbers_of_the_others_and_idle_entries_go(tmp_path: Path) -> None:
    table = loads(4)
    table[:, 0] = 0
    table[2] = 0
    statistics = read_load_history(write(tmp_path / "a", table))
    assert statistics.moe_layers == (1, 2)
    np.testing.assert_array_equal(statistics.load, table[[0, 1, 3], 1:])


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("indent", [None, 1])
def test_where_the_file_is_cut_into_chunks_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    table = loads(3)
    history = [{"step": i, "logical_expert_load": entry, "é": [1.5, None]} for i, entry in enumerate(table.tolist())]
    content = {"seed": 12345, "load_history": history, "name": "é {[", "end": -1.25e3}
    (tmp_path / "a").write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
    np.testing.assert_array_equal(read_load_history(tmp_path / "a").load, table)


def test_the_file_is_never_in_memory_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", 1 << 16)
    path = write(tmp_path / "a", loads(3000, 4, 64))
    size = path.stat().st_size
    tracemalloc.start()
    try:
        statistics = read_load_history(path, entries_per_window=100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(statistics.load) == 30
    assert peak < size / 3


BAD: dict[str, tuple[str, str]] = {
    "cut off": ('{"load_history": [{"logical_expert_load": [[1, 2]]}, {"log', "damaged JSON"),
    "cut off after an entry": ('{"load_history": [{"logical_expert_load": [[1, 2]]}', "cut off"),
    "cut off before the end": ('{"load_history": [{"logical_expert_load": [[1, 2]]}]', "cut off"),
    "more after the end": ('{"load_history": [{"logical_expert_load": [[1]]}]} x', "damaged JSON before byte"),
    "a history that is none": ('{"load_history": 5}', "no list; expected a list of loads"),
    "no entries": ('{"load_history": []}', "load_history is empty or missing"),
    "the name as a value": ('{"a": "load_history", "b": {"load_history": []}}', "missing"),
    "an entry without loads": ('{"load_history": [{"load": [[1]]}]}', r"load_history\[0\].logical_expert_load"),
    "a flat load": ('{"load_history": [{"logical_expert_load": [1, 2]}]}', r"not \[layers\]\[experts\]"),
    "a ragged load": (
        '{"load_history": [{"logical_expert_load": [[1, 2], [3]]}]}',
        "number of experts differs between layers",
    ),
    "text": ('{"load_history": [{"logical_expert_load": [["1"]]}]}', "of numbers"),
    "truth values": ('{"load_history": [{"logical_expert_load": [[true]]}]}', "of numbers"),
    "shapes that differ": (
        '{"load_history": [{"logical_expert_load": [[1]]}, {"logical_expert_load": [[1, 2]]}]}',
        r"load_history\[1\].logical_expert_load has shape \(1, 2\), the first \(1, 1\)",
    ),
    "negative loads": ('{"load_history": [{"logical_expert_load": [[1, -2]]}]}', "window 0, layer 0, expert 1"),
    "not a number": ('{"load_history": [{"logical_expert_load": [[1, NaN]]}]}', "damaged JSON"),
    "a number too large": ('{"load_history": [{"logical_expert_load": [[1' + "0" * 400 + "]]}]}", "integer overflow"),
    "all zero": ('{"load_history": [{"logical_expert_load": [[0, 0]]}]}', "every count is 0"),
    "nested deeply": ('{"load_history": [' + "[" * 100_000, "damaged JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_history_is_said(tmp_path: Path, case: str) -> None:
    text, message = BAD[case]
    (tmp_path / "a").write_text(text)
    with pytest.raises(mp.FileFormatError, match=message):
        read_any(tmp_path / "a")


def test_a_value_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", 100)
    for endless in (b"[[" + b"1, " * 5000, b'["' + b"a" * 5000, b'{"other": [' + b"1, " * 5000):
        with pytest.raises(mp.FileFormatError, match="more than 1,000 bytes"):
            list(json_items(io.BytesIO(endless), "a", "item", limit=1000))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
def test_containers_nested_too_deep_are_refused_and_brackets_in_text_are_none(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    for deep in (b"[" * 100_000, b'["]]]]",' * 1000, b'{"a\\"}":' * 1000):
        with pytest.raises(mp.FileFormatError, match=f"more than {DEPTH_LIMIT} deep"):
            list(json_items(io.BytesIO(deep), "a", "item"))
    text = "[{" * 1000 + '"\\'
    assert list(json_items(io.BytesIO(json.dumps([text, [text]]).encode()), "a", "item")) == [text, [text]]


def test_other_json_is_not_taken_and_options_are_checked(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"plan": 1}')
    assert not is_load_history(tmp_path / "a")
    with pytest.raises(mp.InputError, match="at least 1"):
        read_load_history(write(tmp_path / "b", loads(1)), entries_per_window=0)
    with pytest.raises(mp.InputError, match="no such file"):
        read_load_history(tmp_path / "c")


json_values = st.recursive(
    st.none()
    | st.booleans()
    # yajl refuses the smallest number of 64 bits.
    | st.integers(1 - (1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(json_values, max_size=5), st.integers(1, 9))
def test_any_json_comes_out_as_it_went_in(content: list[Any], chunk: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK", chunk)
        path = Path(folder) / "a"
        path.write_text(json.dumps(content, ensure_ascii=chunk % 2 == 0), encoding="utf-8")
        with path.open("rb") as handle:
            assert list(json_items(handle, "a", "item")) == content


def test_layers_with_different_numbers_of_experts_are_named(tmp_path: Path) -> None:
    path = tmp_path / "load"
    path.write_text(json.dumps({"load_history": [{"logical_expert_load": [[1, 2, 3], [4, 5]]}]}))
    with pytest.raises(
        mp.InputError, match=r"differs between layers \(3 in layer 0, 2 in layer 1\).*Nemotron-3 Puzzle"
    ):
        read_load_history(path)
