"""Plain loads of any container, what tells them from expert ids, and counts of several ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp
from moeplace.profiler.read import open_routing, read_any

TABLE = [[7, 1, 4], [2, 9, 3]]
RNG = np.random.default_rng(0)


def loads_of(path: Path, **options: Any) -> Any:
    record = read_any(path, **options)
    assert isinstance(record, mp.RoutingStatistics)
    return record.load


@pytest.mark.parametrize("windows", [0, 3])
@pytest.mark.parametrize("suffix", ["npy", "npz", "pt", "json", "object.json", "csv"])
def test_every_container_of_loads_gives_the_same(tmp_path: Path, suffix: str, windows: int) -> None:
    table = RNG.random((2, 5)) if not windows else RNG.random((windows, 2, 5))
    path = tmp_path / f"loads.{suffix}"
    match suffix:
        case "npy":
            np.save(path, table)
        case "npz":
            np.savez(path, counts=table)
        case "pt":
            torch = pytest.importorskip("torch")
            torch.save(torch.from_numpy(table), path)
        case "json":
            path.write_text(json.dumps(table.tolist()))
        case "object.json":
            path.write_text(json.dumps({"logical_count": table.tolist()}))
        case _:
            windowed = table.reshape(-1, 2, 5).tolist()
            rows = [[w, layer, *windowed[w][layer]] for w in range(len(windowed)) for layer in (0, 1)]
            # With columns that number them, rows may come in any order.
            rows = rows[::-1] if windows else [row[2:] for row in rows]
            head = "window,layer,0,1,2,3,4\n" if windows else ""
            path.write_text(head + "".join(",".join(map(repr, row)) + "\n" for row in rows))
    np.testing.assert_allclose(loads_of(path), table.reshape(-1, 2, 5))


@pytest.mark.parametrize(
    "table",
    [
        RNG.integers(0, 5000, (20, 6, 32)),
        RNG.multinomial(4000, np.ones(64) / 64, 6),
        # Of experts so unlike that none ever meets another: each layer adds up to the same.
        RNG.multinomial(400, [0.7, 0.2, 0.07, 0.03], (500, 6)),
        np.vstack([np.zeros((3, 64), int), RNG.multinomial(4000, np.ones(64) / 64, 58)]),
        RNG.integers(0, 90_000, (58, 256)),
    ],
    ids=["repeats", "sums", "sums of windows", "dense layers", "above any id"],
)
def test_whole_numbers_that_no_ids_could_be_are_loads(tmp_path: Path, table: Any) -> None:
    np.save(tmp_path / "c.npy", table)
    used = table[table.any(axis=1)] if table.ndim == 2 else table
    np.testing.assert_array_equal(loads_of(tmp_path / "c.npy"), used.reshape(-1, *used.shape[-2:]))


def test_ids_in_a_container_of_loads_are_refused_as_ids(tmp_path: Path) -> None:
    ids = RNG.random((200, 6, 32)).argsort(axis=2)[:, :, :4]
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))
    with pytest.raises(mp.FileFormatError, match="that are expert ids"):
        read_any(tmp_path / "ids.json")
    (tmp_path / "table.json").write_text(json.dumps(TABLE))
    with pytest.raises(mp.FileFormatError, match="no expert ids by type, shape or container"):
        read_any(tmp_path / "table.json", kind="tokens")
    with pytest.raises(mp.InputError, match="says itself what it holds"):
        open_routing(_history(tmp_path, [TABLE]), kind="tokens")


def _history(folder: Path, entries: list[Any]) -> Path:
    path = folder / "history.json"
    path.write_text(json.dumps({"load_history": [{"logical_expert_load": entry} for entry in entries]}))
    return path


@pytest.mark.parametrize("where", ["list", "history", "csv"])
def test_layers_that_differ_in_experts_are_named(tmp_path: Path, where: str) -> None:
    ragged = [[1, 2, 3], [1, 2]]
    path = _history(tmp_path, [ragged]) if where == "history" else tmp_path / f"ragged.{where}"
    if where == "list":
        path.write_text(json.dumps(ragged))
    elif where == "csv":
        path.write_text("1,2,3\n1,2\n")
    with pytest.raises(mp.FileFormatError, match=r"differs between layers \(3 in layer 0, 2 in layer 1\).*pruned"):
        read_any(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "1,2\n3,x\n", "row 2 holds 'x'"),
        ("a.csv", "layer,expert,count\n0,0,1\n", "a row an expert is not read"),
        ("a.csv", "layer,0\n1,2\n1,3\n", "layer stands twice"),
        ("a.csv", "layer,0\n", "no rows of numbers"),
        ("a.json", "[[1, 2], [3, null]]", "layer 1 is no list of numbers"),
        ("a.json", "[[1, 2], [3, -1]]", "expert 1 counts -1"),
        ("a.json", '{"logical_count": 3}', "logical_count is not"),
        ("a.json", "[[1, 2]", "cut off"),
    ],
)
def test_damaged_loads_are_refused_by_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(mp.FileFormatError, match=message):
        read_any(tmp_path / name)


# Parts of one window


@pytest.mark.parametrize("told_by", ["name", "disjoint support"])
def test_files_of_ranks_are_summed_and_it_is_said(tmp_path: Path, told_by: str) -> None:
    parts = RNG.random((4, 6, 64))
    if told_by != "name":
        parts *= (np.arange(64) // 16 == np.arange(4)[:, None])[:, None]
    for rank, part in enumerate(parts):
        np.save(tmp_path / (f"counts_rank{rank}.npy" if told_by == "name" else f"{'dcba'[rank]}.npy"), part)
    recording = open_routing(tmp_path)
    np.testing.assert_allclose(recording.statistics().load, parts.sum(axis=0)[None])
    assert "4 files hold what ranks counted of the same windows, and were summed" in recording.notes[0]


def test_files_without_ranks_are_windows_in_time(tmp_path: Path) -> None:
    windows = RNG.random((3, 2, 8))
    for number, window in enumerate(windows):
        np.save(tmp_path / f"at{number}.npy", window)
    recording = open_routing(tmp_path)
    np.testing.assert_allclose(recording.statistics().load, windows)
    assert recording.notes == ()


def _dump(folder: Path, name: str, rank: int, counts: Any, **more: Any) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"rank": rank, "logical_count": torch.from_numpy(counts), **more}, folder / name)


@pytest.mark.parametrize("names", [["a", "b", "c", "d"], ["1.5_0", "1.5_1", "2.5_0", "2.5_1"]])
def test_sglang_files_of_several_ranks_are_summed_dump_by_dump(tmp_path: Path, names: list[str]) -> None:
    counts = RNG.integers(1, 50, (4, 3, 4, 8))
    for number, name in enumerate(names):
        _dump(tmp_path, f"expert_distribution_recorder_{name}.pt", number % 2, counts[number])
    recording = open_routing(tmp_path)
    np.testing.assert_array_equal(
        recording.statistics().load, np.concatenate([counts[0] + counts[1], counts[2] + counts[3]])
    )
    assert recording.notes
    _dump(tmp_path, "expert_distribution_recorder_e.pt", 1, counts[0] + 1)
    with pytest.raises(mp.FileFormatError, match="ranks wrote different numbers of files"):
        read_any(tmp_path)


def test_ranks_that_lie_first_in_a_count_are_no_windows(tmp_path: Path) -> None:
    counts = RNG.integers(1, 50, (3, 4, 8))
    _dump(tmp_path, "one.pt", 0, counts, logical_count_layout="rank_layer_expert")
    recording = open_routing(tmp_path / "one.pt")
    np.testing.assert_array_equal(recording.statistics().load, counts.sum(axis=0)[None])
    assert "3 ranks of one window" in recording.notes[0]
    _dump(tmp_path, "two.pt", 0, counts, logical_count_layout="layer_rank_expert")
    with pytest.raises(mp.FileFormatError, match="'layer_rank_expert'"):
        read_any(tmp_path / "two.pt")
