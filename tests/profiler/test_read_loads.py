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
    assert ["taken for windows in time" in note for note in recording.notes] == [True]


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


@pytest.mark.parametrize(
    ("text", "load"),
    [
        (",0,1,2\n0,5,6,7\n1,8,9,9\n", [[5, 6, 7], [8, 9, 9]]),
        ("layer_id,ep_0,ep_1\nlayer_1,3,4\nlayer_0,1,2\n", [[1, 2], [3, 4]]),
        ("layer,e10,e1,e0,e2,e3,e4,e5,e6,e7,e8,e9\n0,10,1,0,2,3,4,5,6,7,8,9\n", [list(range(11))]),
        ("0,1,2,3\n5,6,7,8\n", [[5, 6, 7, 8]]),
        ("step,layer,0,1\n1,0,5,6\n0,0,1,2\n", [[[1, 2]], [[5, 6]]]),
    ],
)
def test_a_csvs_head_tells_keys_from_counts_and_the_experts_order(text: str, load: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    read = read_any(tmp_path / "a.csv", kind="loads")
    assert isinstance(read, mp.RoutingStatistics)
    np.testing.assert_array_equal(read.load, np.array(load, dtype=float).reshape(read.load.shape))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer,0,1,total\n0,1,2,3\n", "column 'total' is no expert's number"),
        ("layer,e0,e0\n0,1,2\n", "column 'e0' is no expert's number that stands once"),
        ("layer,0,2\n0,1,2\n", "columns of experts 0, 2, expected all from 0 on"),
    ],
)
def test_columns_that_are_no_experts_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(mp.FileFormatError, match=message):
        read_any(tmp_path / "a.csv", kind="loads")


@pytest.mark.parametrize("name", ["gpu{}", "counts.npu{}", "dp{}_ep0", "worker-{}", "node{}_gpu0"])
def test_ranks_are_told_by_whatever_they_are_called(name: str, tmp_path: Path) -> None:
    parts = [np.random.default_rng(i).integers(5, 90, (2, 4)).astype(float) for i in range(3)]
    for number, part in enumerate(parts):
        np.save(tmp_path / f"{name.format(number)}.npy", part)
    recording = open_routing(tmp_path, kind="loads")
    np.testing.assert_array_equal(recording.statistics().load, [sum(parts)])
    assert "were summed" in recording.notes[0]
    arrays = {name.format(number).replace("-", "_").replace(".", "_"): part for number, part in enumerate(parts)}
    np.savez(tmp_path / "all.npz", **arrays)
    recording = open_routing(tmp_path / "all.npz", kind="loads")
    np.testing.assert_array_equal(recording.statistics().load, [sum(parts)])
    assert "3 arrays hold what ranks counted" in recording.notes[0]


def test_files_that_are_taken_for_windows_are_so_in_the_order_of_their_numbers_and_it_is_said(tmp_path: Path) -> None:
    for step in (2, 10, 1):
        np.save(tmp_path / f"step{step}.npy", np.full((1, 3), step, dtype=float))
    recording = open_routing(tmp_path, kind="loads")
    assert recording.statistics().load[:, 0, 0].tolist() == [1, 2, 10]
    assert "3 files were taken for windows in time" in recording.notes[0]


def test_ranks_whose_files_are_not_there_are_named(tmp_path: Path) -> None:
    gap, step = tmp_path / "gap", tmp_path / "step"
    for folder, names in ((gap, ("rank0", "rank3")), (step, ("step0_rank0", "step0_rank1", "step1_rank0"))):
        folder.mkdir()
        for name in names:
            np.save(folder / f"{name}.npy", RNG.random((2, 4)))
    assert "no counts of ranks 1, 2 among those of other ranks" in open_routing(gap).notes[0]
    assert "no counts of rank 1 among those of step1" in open_routing(step).notes[0]


CHOICES = np.array([[RNG.permutation(64)[:8] for _ in range(3)] for _ in range(200)])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (RNG.random((4, 1)), r"shape \[4, 1\], one expert a layer"),
        (RNG.random((2, 4, 1)), r"shape \[2, 4, 1\], one expert a layer"),
        (CHOICES.astype(float), "that are expert ids, by their range and repeats"),
        (np.repeat(CHOICES[:, 0], 3, axis=0), r"no row of 8 holds an expert twice.*\[tokens, 1, 8\]"),
    ],
)
def test_arrays_that_would_be_read_as_something_else_are_refused(array: Any, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(mp.FileFormatError, match=message):
        read_any(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3,10,20\n4,40,50\n5,1,2\n", "first column counts up by one .3, 4, ...."),
        ("# loads\n1,2\n3,4\n", "row 2 has 2 columns, the first names 1"),
        ("1;2\n3;4\n", "row 2 holds '3;4', expected numbers with commas between them"),
    ],
)
def test_tables_whose_columns_are_unclear_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(mp.FileFormatError, match=message):
        read_any(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_the_mark_that_editors_put_before_utf_8_is_passed_over(name: str, tmp_path: Path) -> None:
    text = "[[1, 2], [3, 4]]" if name == "a.json" else "1,2\n3,4\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert loads_of(tmp_path / name).tolist() == [[[1, 2], [3, 4]]]
