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


def _layered_loads(windows: int, layers: int = 6, experts: int = 16) -> Any:
    """Loads of layers that each prefer other experts; windows of different sizes, in whole numbers."""
    preferred = RNG.dirichlet(np.ones(experts), layers)
    return np.stack([[RNG.multinomial(2 * 1000 * (w + 1), p) for p in preferred] for w in range(windows)])


@pytest.mark.parametrize("number", [np.int64, np.float32, np.float16])
@pytest.mark.parametrize(("axes", "called"), [((0, 2, 1), "windows, experts, layers"), ((1, 0, 2), "layers, windows")])
def test_loads_whose_axes_are_exchanged_are_refused_and_those_in_order_are_read(
    axes: tuple[int, ...], called: str, number: type[np.number[Any]], tmp_path: Path
) -> None:
    loads = (_layered_loads(4) / (100 if number is np.float16 else 1)).astype(number)
    np.save(tmp_path / "loads.npy", loads)
    assert loads_of(tmp_path / "loads.npy", kind="loads").shape == (4, 6, 16)
    np.save(tmp_path / "other.npy", loads.transpose(axes))
    with pytest.raises(mp.FileFormatError, match=rf"is \[{called}.*by its totals.*transpose it"):
        read_any(tmp_path / "other.npy", kind="loads")
    if axes == (0, 2, 1) and number is not np.float16:
        (tmp_path / "one.csv").write_text("\n".join(",".join(map(str, row)) for row in loads[0].T.tolist()))
        with pytest.raises(mp.FileFormatError, match=r"is \[experts, layers\]"):
            read_any(tmp_path / "one.csv")


def test_tables_that_agree_either_way_are_taken_as_they_stand(tmp_path: Path) -> None:
    for table in (np.full((2, 64), 100.0), np.eye(12) * 5000 + 1, np.array([[1.0, 2, 3], [3, 2, 1]])):
        np.save(tmp_path / "a.npy", table)
        np.testing.assert_array_equal(loads_of(tmp_path / "a.npy"), table[None])


@pytest.mark.parametrize("kind", [None, "tokens"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_ids_whose_axes_are_exchanged_are_refused(top_k: int, kind: Any, tmp_path: Path) -> None:
    scores = RNG.gumbel(size=(900, 6, 16)) + RNG.normal(size=(6, 16))
    ids = scores.argsort(axis=2)[:, :, :top_k].squeeze(axis=2 if top_k == 1 else ())
    np.save(tmp_path / "ids.npy", ids)
    assert read_any(tmp_path / "ids.npy", kind="tokens").expert_ids.shape == (900, 6, top_k)
    np.save(tmp_path / "other.npy", np.swapaxes(ids, 0, 1))
    with pytest.raises(mp.FileFormatError, match=r"are \[layers, tokens.*np.swapaxes"):
        read_any(tmp_path / "other.npy", kind=kind)


def test_ids_that_hold_an_expert_twice_are_not_taken_for_loads_of_two_experts(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", RNG.integers(0, 16, (500, 6, 2)))
    with pytest.raises(mp.FileFormatError, match="may be expert ids .* or loads"):
        read_any(tmp_path / "a.npy")


def test_the_numbers_a_csv_gives_its_layers_are_theirs(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("layer,0,1\n4,1,2\n3,3,4\n5,5,6\n")
    read = read_any(tmp_path / "a.csv")
    assert read.moe_layers == (3, 4, 5)
    assert isinstance(read, mp.RoutingStatistics)
    assert read.load[0].tolist() == [[3, 4], [1, 2], [5, 6]]
    for text, message in (
        ("step,layer,0,1\n0,3,1,2\n0,4,1,2\n1,3,1,2\n1,5,1,2\n", "windows have different layers"),
        ("layer,0,1\n0.5,1,2\n1,1,2\n", "other than numbers of layers"),
    ):
        (tmp_path / "b.csv").write_text(text)
        with pytest.raises(mp.FileFormatError, match=message):
            read_any(tmp_path / "b.csv")


@pytest.mark.parametrize("suffix", ["npy", "json", "csv"])
def test_a_first_column_that_numbers_the_layers_is_no_expert(suffix: str, tmp_path: Path) -> None:
    table = np.hstack([np.arange(3.0, 9)[:, None], _layered_loads(1)[0]])
    path = tmp_path / f"a.{suffix}"
    match suffix:
        case "npy":
            np.save(path, table)
        case "json":
            path.write_text(json.dumps(table.tolist()))
        case _:
            path.write_text("\n".join(",".join(map(str, row)) for row in table.tolist()))
    with pytest.raises(mp.FileFormatError, match="first column counts up by one .3, 4, "):
        read_any(path)


def test_experts_that_are_given_are_those_of_the_loads(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", RNG.random((3, 10)))
    assert loads_of(tmp_path / "a.npy", num_experts=10).shape == (1, 3, 10)
    with pytest.raises(mp.FileFormatError, match="have 10 experts a layer, not 8; counts of slots"):
        read_any(tmp_path / "a.npy", num_experts=8)


def test_a_column_that_adds_up_the_others_says_nothing_of_top_k(tmp_path: Path) -> None:
    loads = _layered_loads(2)
    np.save(tmp_path / "a.npy", np.concatenate([loads, loads.sum(axis=2, keepdims=True)], axis=2).astype(float))
    recording = open_routing(tmp_path / "a.npy")
    np.testing.assert_array_equal(recording.statistics().load, loads)
    assert recording.header.top_k is None
    assert "the last column adds up all others, as a total does" in recording.notes[0]


def test_arrays_of_one_file_that_are_taken_for_windows_are_so_aloud(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", chat=RNG.random((2, 8)), code=RNG.random((2, 8)))
    assert "2 arrays were taken for windows in time" in open_routing(tmp_path / "a.npz").notes[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"", "an empty file"),
        ("a.npy.gz", b"\x1f\x8b\x08rest", r"compressed by gzip \(unpack it first\)"),
        ("a.json.zst", b"\x28\xb5\x2f\xfdrest", "compressed by zstd"),
        ("a.pkl", b"\x80\x04rest", "a pickle, which may run code"),
        ("a.json", b'{"expert_load": [[1, 2]]}', "a JSON object with expert_load .*logical_count"),
        ("a.json", "[[1, 2]]".encode("utf-16"), "text in UTF-16"),
        ("a.tsv", b"1\t2\n3\t4\n", "text that begins .*tables are read from .csv"),
        ("a.bin", bytes(range(1, 30)), "bytes that begin 01 02 03"),
        ("a.bin", b"\xef\xbb\xbf \n", "bytes that begin ef bb bf"),
        ("a.txt", b"\x1d\n\x0b", "bytes that begin 1d"),
        ("a.xlsx", b"PK\x03\x04rest", "a damaged zip archive"),
    ],
)
def test_what_is_no_record_is_described(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(mp.FileFormatError, match=f"{message}.*no known format of routing record"):
        read_any(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(mp.FileFormatError, match="an empty folder"):
        read_any(tmp_path / "folder")


@pytest.mark.parametrize("content", [{"a": 1.0}, [1.0]])
def test_a_torch_file_of_something_else_says_what_and_what_to_save(content: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(mp.FileFormatError, match=f"a torch.save file of a {type(content).__name__}.*logical_count"):
        read_any(tmp_path / "a.pt")
