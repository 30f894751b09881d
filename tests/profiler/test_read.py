"""Statistics on disk, ExFlow's traces, and finding a record's format by its content."""

from __future__ import annotations

import io
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.profiler import trace_files
from moeplace.profiler.aggregate import aggregate
from moeplace.profiler.read import READERS, open_routing, read_any, reader_of
from moeplace.profiler.readers.exflow import read_exflow
from moeplace.profiler.statistics_file import read_statistics, write_statistics
from moeplace.profiler.trace_files import read_trace, write_trace

ARRAYS = ("load", "window_workload", "coactivation", "transitions")


def assert_same(one: mp.RoutingStatistics, other: mp.RoutingStatistics) -> None:
    for name in ("experts", "moe_layers", "workloads", "top_k", "tokens", "fingerprint"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert (one.sample is None) == (other.sample is None)
    if one.sample is not None and other.sample is not None:
        assert one.sample.fingerprint == other.sample.fingerprint
        for name in ("gate_weights", "step", "source"):
            np.testing.assert_array_equal(getattr(one.sample, name), getattr(other.sample, name), err_msg=name)


# Statistics


@pytest.mark.parametrize("sample_tokens", [0, 100, 1000])
def test_statistics_come_back_as_they_were_written(
    tmp_path: Path, toy_trace: mp.RoutingTrace, sample_tokens: int
) -> None:
    trace = replace(toy_trace, source=toy_trace.sequence % 2)
    statistics = mp.RoutingStatistics.from_trace(trace, sample_tokens)
    write_statistics(statistics, tmp_path / "s.npz")
    assert_same(read_statistics(tmp_path / "s.npz"), statistics)


def test_counts_alone_and_a_full_sample_come_back(tmp_path: Path, toy_trace: mp.RoutingTrace) -> None:
    counts = mp.RoutingStatistics.from_counts({"a": [[1.5, 0.0]], "b": [[[0.0, 2.0]], [[3.0, 1.0]]]}, moe_layers=[7])
    write_statistics(counts, tmp_path / "counts.npz")
    assert_same(read_statistics(tmp_path / "counts.npz"), counts)
    gates = np.sort(np.random.default_rng(0).random(toy_trace.expert_ids.shape), axis=2)[:, :, ::-1]
    sample = replace(toy_trace, gate_weights=gates.astype(np.float16), step=toy_trace.position)
    full = replace(mp.RoutingStatistics.from_trace(toy_trace), sample=sample)
    write_statistics(full, tmp_path / "full.npz")
    assert_same(read_statistics(tmp_path / "full.npz"), full)


def test_a_written_file_is_replaced_whole(tmp_path: Path, toy_trace: mp.RoutingTrace) -> None:
    path = tmp_path / "s.npz"
    first = mp.RoutingStatistics.from_trace(toy_trace)
    write_statistics(first, path)
    unwritable = replace(first, workloads=("chat", object()))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        write_statistics(unwritable, path)
    assert_same(read_statistics(path), first)
    assert os.listdir(tmp_path) == ["s.npz"]


def test_numpy_reads_the_arrays_without_pickle(tmp_path: Path, toy_trace: mp.RoutingTrace) -> None:
    statistics = mp.RoutingStatistics.from_trace(toy_trace)
    write_statistics(statistics, tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["load"], statistics.load)


def _members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _npy(array: Any, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asanyarray(array), allow_pickle=allow_pickle)
    return buffer.getvalue()


Members = dict[str, bytes]


def header(**changes: Any) -> Callable[[Members], None]:
    def edit(members: Members) -> None:
        fields = json.loads(members["moeplace.json"])
        for name, value in changes.items():
            if name in ARRAYS:
                fields["shapes"][name] = value
            else:
                fields[name] = value
        members["moeplace.json"] = json.dumps(fields).encode()

    return edit


def member(name: str, content: bytes) -> Callable[[Members], None]:
    return lambda members: members.__setitem__(f"{name}.npy", content)


def both(*edits: Callable[[Members], None]) -> Callable[[Members], None]:
    def edit(members: Members) -> None:
        for change in edits:
            change(members)

    return edit


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.abort, ()


BAD: dict[str, tuple[Callable[[Members], None], str]] = {
    "a newer version": (header(version=2), "version 2, this release reads version 1; upgrade"),
    "another format": (header(format="other"), "not one of moeplace statistics"),
    "no header": (lambda members: members.__delitem__("moeplace.json"), "without 'moeplace.json'"),
    "a header of text": (lambda members: members.__setitem__("moeplace.json", b"{"), "moeplace|agree"),
    "a header list": (lambda members: members.__setitem__("moeplace.json", b"[]"), "not one of"),
    "shapes as a list": (header(shapes=[]), "lists no shapes"),
    "experts as text": (header(experts="8"), "agree"),
    "a missing array": (lambda members: members.__delitem__("load.npy"), "array 'load' is missing"),
    "an undeclared load": (header(shapes={}), "load"),
    "an unknown array": (header(shapes={"other": [1]}), "'other'"),
    "a negative shape": (header(load=[-1, 3, 8]), "'load'"),
    "a shape that disagrees": (header(load=[1, 3, 8]), r"\(2, 3, 8\), the header says"),
    "pickled objects": (member("load", _npy(np.array([Exploit()]), allow_pickle=True)), "'load'"),
    "a raw pickle": (member("load", pickle.dumps([1] * 200)), "load|magic|agree"),
    "another type": (member("load", _npy(np.zeros((2, 3, 8), ">f8"))), "'load' is >f8"),
    "column order": (member("load", _npy(np.asfortranarray(np.zeros((2, 3, 8))))), "refused"),
    "the same bytes in another shape": (member("load", _npy(np.zeros((2, 8, 3)))), r"\(2, 8, 3\), the header says"),
    "negative counts": (member("load", _npy(np.full((2, 3, 8), -1.0))), "load holds negative"),
    "counts that are no numbers": (member("load", _npy(np.full((2, 3, 8), np.nan))), "non-finite"),
    "an unknown workload": (member("window_workload", _npy(np.array([0, 9]))), "window_workload runs"),
    "a sample of unknown experts": (header(experts=4), "refused|expected|agree"),
    "a sample of unknown workloads": (header(sample_workloads=["chat"]), "sample_workload runs"),
    "a sample without routing": (
        lambda members: members.__delitem__("sample_expert_ids.npy"),
        "'sample_expert_ids' is missing",
    ),
}


@pytest.fixture
def good_file(tmp_path: Path, toy_trace: mp.RoutingTrace) -> Path:
    path = tmp_path / "good.npz"
    write_statistics(mp.RoutingStatistics.from_trace(toy_trace), path)
    assert read_statistics(path).load.shape == (2, 3, 8)
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_statistics_are_refused_by_name(good_file: Path, case: str) -> None:
    edit, message = BAD[case]
    members = _members(good_file)
    edit(members)
    with zipfile.ZipFile(good_file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(mp.FileFormatError, match=message) as caught:
        read_statistics(good_file)
    assert "good.npz" in str(caught.value)


def test_an_array_that_unpacks_to_more_than_declared_is_refused(good_file: Path) -> None:
    """A zip bomb: 40 MB of zeros in 40 kB, first at odds with the header, then past the limit."""
    members = _members(good_file)
    members["load.npy"] = _npy(np.zeros((2, 3, 800_000)))
    with zipfile.ZipFile(good_file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(mp.FileFormatError, match="'load' unpacks to 38,400,128 bytes, its shape"):
        read_statistics(good_file)
    header(load=[2**20, 3, 2**20])(members)
    with zipfile.ZipFile(good_file, "w") as archive:
        archive.writestr("moeplace.json", members["moeplace.json"])
    with pytest.raises(mp.FileFormatError, match="more than the limit"):
        read_statistics(good_file)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_damage_to_statistics_is_refused_or_harmless(data: st.DataObject) -> None:
    if not _BYTES:
        trace = mp.RoutingTrace.from_arrays([[[0, 1]], [[1, 2]]], num_experts=3)
        with tempfile.TemporaryDirectory() as folder:
            write_statistics(mp.RoutingStatistics.from_trace(trace), Path(folder) / "s.npz")
            _BYTES.append((Path(folder) / "s.npz").read_bytes())
    content = bytearray(_BYTES[0])
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.npz"
        path.write_bytes(content)
        assert "s.npz" in _error_of(path)


_BYTES: list[bytes] = []


def _error_of(path: Path) -> str:
    try:
        return f"{path}: {read_statistics(path).tokens}"
    except mp.FileFormatError as error:
        return str(error)


# ExFlow


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(1, 5), st.booleans(), st.booleans())
@settings(deadline=None)
def test_both_numberings_of_exflow_give_the_same_trace(
    seed: int, experts: int, layers: int, by_layer: bool, told: bool
) -> None:
    ids = np.random.default_rng(seed).integers(0, experts, (60, layers))
    ids[0], ids[1] = 0, experts - 1
    table = ids + np.arange(layers) * experts * by_layer
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.npy"
        np.save(path, table.astype(np.int32))
        trace = read_exflow(path, num_experts=experts if told else None)
    assert trace.num_experts == experts
    np.testing.assert_array_equal(trace.expert_ids[:, :, 0], ids)
    np.testing.assert_array_equal(trace.position, np.arange(60))


def test_exflow_experts_that_cannot_be_told_must_be_given(tmp_path: Path) -> None:
    path = tmp_path / "trace.npy"
    np.save(path, np.array([[2, 12], [3, 13]]))
    with pytest.raises(mp.FileFormatError, match="7 to 12 experts a layer; pass num_experts"):
        read_exflow(path)
    assert read_exflow(path, num_experts=8).expert_ids[:, :, 0].tolist() == [[2, 4], [3, 5]]
    with pytest.raises(mp.FileFormatError, match="layer 1 holds ids 12 to 13; with 5 experts"):
        read_exflow(path, num_experts=5)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 2)), "expected whole numbers"),
        (np.zeros((3, 2, 2), int), "expected whole numbers"),
        (np.zeros(3, int), "expected whole numbers"),
        (np.zeros((0, 2), int), "expected whole numbers"),
        (np.array([[0, -1]]), "layer 1 holds the expert id -1"),
        (np.array([[0, 70000], [5, 3]]), "layer 1 holds the expert id 70000"),
        (np.array([Exploit()]), "object .* expected whole numbers"),
    ],
)
def test_other_arrays_are_not_taken_for_exflow(tmp_path: Path, array: Any, message: str) -> None:
    np.save(tmp_path / "t.npy", array, allow_pickle=True)
    with pytest.raises(mp.FileFormatError, match=message):
        read_exflow(tmp_path / "t.npy")


def test_a_truncated_exflow_trace_takes_no_memory_and_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<i8", "fortran_order": False, "shape": (10**12, 100)})
    (tmp_path / "t.npy").write_bytes(buffer.getvalue() + bytes(800))
    with pytest.raises(mp.FileFormatError, match=r"t\.npy"):
        read_exflow(tmp_path / "t.npy")
    (tmp_path / "e.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(mp.FileFormatError, match=r"e\.npy"):
        read_exflow(tmp_path / "e.npy")


# Ids or loads


@pytest.mark.parametrize(
    "table",
    [
        np.array([[7, 1, 4], [2, 9, 3]]),
        np.random.default_rng(0).integers(0, 9000, (58, 256)),
    ],
    ids=["two rows", "DeepSeek-V3"],
)
def test_whole_numbers_that_may_be_loads_are_not_taken_for_tokens(tmp_path: Path, table: Any) -> None:
    np.save(tmp_path / "c.npy", table)
    with pytest.raises(mp.FileFormatError, match=r"may be expert ids .* or loads .*kind=.tokens"):
        read_any(tmp_path / "c.npy")


def test_ids_that_no_loads_could_be_are_read_without_being_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "exflow.npy", rng.integers(0, 64, (2000, 24)))
    np.save(tmp_path / "routed.npy", rng.random((200, 6, 32)).argsort(axis=2)[:, :, :4])
    for name in ("exflow.npy", "routed.npy"):
        assert isinstance(read_any(tmp_path / name), mp.RoutingTrace)


def test_who_says_that_numbers_are_ids_or_how_many_experts_there_are_is_believed(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.array([[7, 1, 4], [2, 9, 3]]))
    for told in ({"kind": "tokens"}, {"num_experts": 10}):
        assert read_any(tmp_path / "c.npy", **told).num_experts == 10
    # Counts below E in a table as wide as E may be loads still.
    np.save(tmp_path / "d.npy", np.eye(3, dtype=int))
    with pytest.raises(mp.FileFormatError, match="may be expert ids"):
        read_any(tmp_path / "d.npy", num_experts=3)
    loads = read_any(tmp_path / "c.npy", kind="loads")
    assert isinstance(loads, mp.RoutingStatistics)
    assert loads.load.tolist() == [[[7, 1, 4], [2, 9, 3]]]
    with pytest.raises(mp.InputError, match="'counts' is unknown"):
        read_any(tmp_path / "c.npy", kind="counts")  # type: ignore[arg-type]


# By content


def test_a_record_is_read_by_what_it_holds_whatever_its_name(tmp_path: Path, toy_trace: mp.RoutingTrace) -> None:
    write_trace(toy_trace, tmp_path / "shards")
    one = tmp_path / "one.bin"
    next((tmp_path / "shards").iterdir()).rename(one)
    write_trace(toy_trace, tmp_path / "folder")
    statistics = mp.RoutingStatistics.from_trace(toy_trace)
    write_statistics(statistics, tmp_path / "s.dat")
    np.save(tmp_path / "e.npy", toy_trace.expert_ids[:, :, 0])
    for path in (one, tmp_path / "folder"):
        trace = read_any(path)
        assert isinstance(trace, mp.RoutingTrace)
        assert trace.fingerprint == toy_trace.fingerprint
    read = read_any(tmp_path / "s.dat")
    assert isinstance(read, mp.RoutingStatistics)
    assert_same(read, statistics)
    exflow = read_any(tmp_path / "e.npy", kind="tokens")
    assert isinstance(exflow, mp.RoutingTrace)
    assert exflow.top_k == 1


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 something else", b"hello", b"\x93NUM"])
def test_an_unknown_file_is_answered_with_the_known_formats(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(mp.FileFormatError) as caught:
        read_any(tmp_path / "x")
    for reader in READERS:
        assert reader.name in str(caught.value)
    with pytest.raises(mp.InputError, match="no such"):
        reader_of(tmp_path / "absent")
    with pytest.raises(mp.FileFormatError, match="known"):
        read_any(tmp_path)


def test_a_truncated_record_is_still_known_for_what_it_is(good_file: Path) -> None:
    good_file.write_bytes(good_file.read_bytes()[:300])
    with pytest.raises(mp.FileFormatError, match="damaged or truncated statistics"):
        read_any(good_file)


# file objects, and opening once


def test_statistics_and_traces_go_through_binary_file_objects(toy_trace: mp.RoutingTrace) -> None:
    statistics, file = mp.RoutingStatistics.from_trace(toy_trace), io.BytesIO()
    write_statistics(statistics, file)
    assert_same(read_statistics(file), statistics)
    halves = [io.BytesIO(), io.BytesIO()]
    middle = toy_trace.num_tokens // 2
    for half, tokens in zip(halves, np.split(np.arange(toy_trace.num_tokens), [middle]), strict=True):
        write_trace(toy_trace.select(tokens), half)
    first = read_trace(halves[0])
    np.testing.assert_array_equal(first.expert_ids, toy_trace.expert_ids[:middle])
    together = aggregate(halves, workers=1)
    assert together.fingerprint == statistics.fingerprint
    np.testing.assert_array_equal(together.transitions, statistics.transitions)


def test_a_damaged_file_object_is_called_by_its_name() -> None:
    class Upload(io.BytesIO):
        name = "upload"

    for content, read in ((b"PAR1" + bytes(40), read_trace), (b"PK\x03\x04" + bytes(40), read_statistics)):
        with pytest.raises(mp.FileFormatError, match="^upload: "):
            read(Upload(content))
    with pytest.raises(mp.FileFormatError, match="^file: "):
        read_trace(io.BytesIO(b"PAR1"))


def test_a_trace_is_opened_once_and_its_tokens_are_read_when_asked_for(
    toy_trace: mp.RoutingTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=4, ffn_size=4, moe_layers=toy_trace.moe_layers)
    write_trace(toy_trace, tmp_path / "trace", model=spec)
    opened: list[Path] = []
    real = trace_files._open_shard
    monkeypatch.setattr(trace_files, "_open_shard", lambda source: (opened.append(source), real(source))[1])
    recording = open_routing(tmp_path / "trace")
    assert recording.model == spec
    assert (recording.header.num_experts, recording.header.top_k) == (8, 2)
    assert recording.statistics().fingerprint == mp.RoutingStatistics.from_trace(toy_trace).fingerprint
    np.testing.assert_array_equal(recording.trace.expert_ids, toy_trace.expert_ids)
    assert len(opened) == 1
    monkeypatch.undo()
    renumbered = recording.of_model(None, [4, 6, 9])
    assert renumbered.trace.moe_layers == renumbered.statistics().moe_layers == (4, 6, 9)
    with pytest.raises(mp.InputError, match="names 2 layers"):
        recording.of_model(None, [4, 6])


def test_counts_have_statistics_and_no_tokens(tmp_path: Path) -> None:
    write_statistics(mp.RoutingStatistics.from_counts(np.ones((2, 3, 8))), tmp_path / "s.npz")
    recording = open_routing(tmp_path / "s.npz")
    assert not recording.is_trace
    assert recording.header.top_k is None
    assert recording.statistics().load.shape == (2, 3, 8)
    with pytest.raises(mp.InputError, match="counts only"):
        _ = recording.trace
