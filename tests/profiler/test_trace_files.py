"""Parquet traces: what is written comes back, shards are whole or absent, and damaged files are refused by name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.profiler.trace_files import TraceWriter, read_header, read_trace, scan_trace, trace_shards, write_trace

pytestmark = pytest.mark.slow

COLUMNS = ("expert_ids", "gate_weights", "sequence", "position", "step", "source")


def assert_equal(one: mp.RoutingTrace, other: mp.RoutingTrace) -> None:
    assert (one.num_experts, one.moe_layers, one.top_k) == (other.num_experts, other.moe_layers, other.top_k)
    for name in COLUMNS:
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == right.dtype, name
            np.testing.assert_array_equal(left, right, err_msg=name)
    assert [one.workloads[c] for c in one.workload] == [other.workloads[c] for c in other.workload]


@st.composite
def traces(draw: st.DrawFn) -> mp.RoutingTrace:
    experts = draw(st.sampled_from([1, 5, 256, 300]))
    top_k, layers = draw(st.integers(1, min(3, experts))), draw(st.integers(1, 3))
    tokens = draw(st.integers(0, 50))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    optional = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    names = np.array(["", "chat", "code, \u6570\u5b66"])
    return mp.RoutingTrace.from_arrays(
        rng.random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k],
        num_experts=experts,
        gate_weights=rng.random((tokens, layers, top_k)) if optional[0] else None,
        sequence=rng.integers(-(2**62), 2**62, tokens),
        position=rng.integers(0, 2**31, tokens),
        workload=names[rng.integers(0, 3, tokens)],
        step=rng.integers(0, 2**62, tokens) if optional[1] else None,
        source=rng.integers(0, 5000, tokens) if optional[2] else None,
        moe_layers=sorted(rng.choice(90, layers, replace=False).tolist()),
    )


@settings(deadline=None, max_examples=60)
@given(traces())
def test_a_trace_comes_back_as_it_was_written(trace: mp.RoutingTrace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_trace(trace, folder)
        back = read_trace(folder)
        if trace.num_tokens:
            assert_equal(back, trace)
        else:
            assert (back.num_tokens, back.num_layers, back.top_k) == (0, trace.num_layers, trace.top_k)
        assert_equal(read_trace(next(Path(folder).glob("*.parquet"))), back)


def record(folder: Path, trace: mp.RoutingTrace, *, batch: int = 40, **options: Any) -> None:
    given_gates = trace.gate_weights is not None
    with TraceWriter(
        folder,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        moe_layers=trace.moe_layers,
        gate_weights=given_gates,
        **options,
    ) as writer:
        for start in range(0, trace.num_tokens, batch):
            part = trace.select(np.arange(start, min(start + batch, trace.num_tokens)))
            writer.add(
                part.expert_ids,
                gate_weights=part.gate_weights,
                sequence=part.sequence,
                position=part.position,
                step=start // batch,
                workload=part.workloads[part.workload[0]],
            )


def test_shards_are_cut_at_their_size_and_batches_run_on_across_them(
    tmp_path: Path, toy_trace: mp.RoutingTrace
) -> None:
    record(tmp_path / "trace", toy_trace, batch=40, rows_per_shard=100)
    names = sorted(file.name for file in (tmp_path / "trace").iterdir())
    assert names == [f"rank00000-{n:05d}.parquet" for n in range(5)]
    shards = trace_shards(tmp_path / "trace")
    assert [sum(shard.rows) for shard in shards] == [100, 100, 100, 100, 80]
    back = read_trace(tmp_path / "trace")
    np.testing.assert_array_equal(back.expert_ids, toy_trace.expert_ids)
    assert [back.workloads[c] for c in back.workload] == [toy_trace.workloads[c] for c in toy_trace.workload]
    assert back.step is not None
    np.testing.assert_array_equal(back.step, np.arange(480) // 40)


def test_ranks_keep_their_sequences_apart(tmp_path: Path, toy_trace: mp.RoutingTrace) -> None:
    for rank in (0, 3):
        record(tmp_path, toy_trace, rank=rank)
    back = read_trace(tmp_path)
    assert len(np.unique(back.sequence)) == 2 * len(np.unique(toy_trace.sequence))
    assert back.source is not None
    for rank in (0, 3):
        mine = back.select(back.source == rank)
        np.testing.assert_array_equal(mine.expert_ids, toy_trace.expert_ids)
        assert len(np.unique(mine.sequence)) == len(np.unique(toy_trace.sequence))
    copied = tmp_path / "copy"
    write_trace(back, copied)
    assert_equal(read_trace(copied), back)


def test_gate_weights_put_experts_in_order_when_written(tmp_path: Path) -> None:
    with TraceWriter(tmp_path, num_experts=4, top_k=3, moe_layers=[0]) as writer:
        writer.add([[[0, 1, 2]]], gate_weights=[[[0.25, 0.25, 0.5]]], sequence=[0], position=[0], step=0)
    back = read_trace(tmp_path)
    assert back.expert_ids.tolist() == [[[2, 0, 1]]]
    assert back.gate_weights is not None
    assert back.gate_weights.tolist() == [[[0.5, 0.25, 0.25]]]


def test_a_scan_gives_the_same_tokens_in_small_blocks(tmp_path: Path, toy_trace: mp.RoutingTrace) -> None:
    record(tmp_path, toy_trace, rows_per_shard=150)
    blocks = list(scan_trace(tmp_path, tokens=32))
    assert max(block.num_tokens for block in blocks) == 32
    np.testing.assert_array_equal(np.concatenate([b.expert_ids for b in blocks]), toy_trace.expert_ids)
    tags = [block.workloads[code] for block in blocks for code in block.workload]
    assert tags == [toy_trace.workloads[code] for code in toy_trace.workload]


def test_the_writer_holds_one_row_group_and_writes_many(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = rng.random((10_000, 60, 16)).argsort(axis=2).astype(np.uint8)[:, :, :8]
    trace = mp.RoutingTrace.from_arrays(ids, num_experts=16)
    before = pa.total_allocated_bytes()
    with TraceWriter(tmp_path, num_experts=16, top_k=8, moe_layers=range(60), gate_weights=False) as writer:
        for turn in range(3):
            writer.add(trace.expert_ids, sequence=trace.sequence, position=trace.position, step=turn)
            assert pa.total_allocated_bytes() - before < 64_000_000
    (shard,) = trace_shards(tmp_path)
    assert shard.row_groups >= 3
    assert max(shard.rows) * 480 <= 1 << 22


def test_the_header_names_shape_and_model(tmp_path: Path, toy_trace: mp.RoutingTrace) -> None:
    spec = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=16, ffn_size=32, moe_layers=(1, 2, 5), name="toy")
    with TraceWriter(tmp_path, num_experts=8, top_k=2, moe_layers=[1, 2, 5], model=spec):
        pass
    header = read_header(tmp_path)
    assert header.model == spec
    assert (header.num_experts, header.top_k, header.moe_layers) == (8, 2, (1, 2, 5))
    stored = json.loads(pq.read_schema(tmp_path / "rank00000-00000.parquet").metadata[b"moeplace.trace"])
    assert stored["version"] == 1
    assert stored["moe_layers"] == [1, 2, 5]
    assert read_trace(tmp_path).num_tokens == 0


def test_plain_arrow_sees_the_documented_columns(tmp_path: Path, gpt_oss: mp.RoutingTrace) -> None:
    part = gpt_oss.select(np.arange(500))
    record(tmp_path, part, batch=500)
    table = pq.read_table(tmp_path / "rank00000-00000.parquet")
    assert table.schema.names == ["step", "source", "sequence", "position", "workload", "expert_ids", "gate_weights"]
    assert table.schema.field("expert_ids").type.list_size == 24 * 4
    rows = table.slice(7, 1).to_pylist()[0]
    assert rows["expert_ids"] == part.expert_ids[7].ravel().tolist()
    assert rows["workload"] == part.workloads[part.workload[7]]
    assert part.gate_weights is not None
    np.testing.assert_array_equal(np.float16(rows["gate_weights"]), part.gate_weights[7].ravel())


# What the writer refuses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_ids": [[[0, 1, 2]]]}, "expected .tokens, 1 layers, 2 experts"),
        ({"expert_ids": [[[0, 8]]]}, "from 0 to 7"),
        ({"expert_ids": [[[0, -1]]]}, "is -1"),
        ({"expert_ids": [[[3, 3]]]}, "same expert twice"),
        ({"gate_weights": None}, "opened with gate_weights"),
        ({"gate_weights": [[[0.5, float("nan")]]]}, "finite"),
        ({"sequence": [-1]}, "sequence numbers"),
        ({"sequence": [1 << 40]}, "sequence numbers"),
        ({"sequence": [0, 1]}, "sequence must be 1 integers"),
        ({"position": [-1]}, "position"),
        ({"position": [1 << 31]}, "position"),
        ({"position": [0.5]}, "position must be 1 integers"),
    ],
)
def test_a_bad_call_writes_nothing(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "expert_ids": [[[0, 1]]],
        "gate_weights": [[[0.5, 0.5]]],
        "sequence": [0],
        "position": [0],
        "step": 0,
    }
    with TraceWriter(tmp_path, num_experts=8, top_k=2, moe_layers=[4]) as writer:
        writer.add(**good)
        with pytest.raises(mp.InputError, match=message):
            writer.add(**(good | change))
    assert read_trace(tmp_path).num_tokens == 1
    with pytest.raises(mp.InputError, match="closed"):
        writer.add(**good)


def test_a_folder_already_written_is_left_alone(tmp_path: Path, toy_trace: mp.RoutingTrace) -> None:
    write_trace(toy_trace, tmp_path / "trace")
    with pytest.raises(mp.InputError, match="already holds shards of rank 0"):
        write_trace(toy_trace, tmp_path / "trace")
    (tmp_path / "file").write_text("")
    with pytest.raises(mp.InputError, match="is a file"):
        write_trace(toy_trace, tmp_path / "file")


@pytest.mark.parametrize(
    "shape",
    [
        {"num_experts": 0},
        {"num_experts": 70000},
        {"top_k": 9},
        {"moe_layers": []},
        {"moe_layers": [2, 1]},
        {"moe_layers": [-1]},
        {"rank": -1},
        {"rows_per_shard": 0},
    ],
)
def test_an_impossible_shape_is_refused_at_once(tmp_path: Path, shape: dict[str, Any]) -> None:
    with pytest.raises(mp.InputError, match=next(iter(shape))):
        TraceWriter(tmp_path / "t", **({"num_experts": 8, "top_k": 2, "moe_layers": [0, 1]} | shape))
    assert not (tmp_path / "t").exists()


# Interrupted writes

RECORDING = """
import sys, numpy as np, resource, signal
from moeplace.profiler.trace_files import TraceWriter
folder, limit = sys.argv[1], int(sys.argv[2])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
ids = np.random.default_rng(0).random((20000, 4, 64)).argsort(axis=2)[:, :, :8]
writer = TraceWriter(folder, num_experts=64, top_k=8, moe_layers=range(4), gate_weights=False, rows_per_shard=30000)
for step in range(100):
    n = 20000 if step < 2 else 10 if not limit else 20000
    writer.add(ids[:n], sequence=np.zeros(n, int), position=np.arange(n), step=step)
    print(step, flush=True)
    if step == 3 and not limit:
        import time
        time.sleep(600)
"""


def test_a_killed_recording_leaves_whole_shards_only(tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    with subprocess.Popen(
        [sys.executable, "-c", RECORDING, str(folder), "0"], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.strip() == "3":
                break
        child.send_signal(signal.SIGKILL)
    shards = trace_shards(folder)
    assert [sum(shard.rows) for shard in shards] == [30_000]
    assert read_trace(folder).num_tokens == 30_000


def test_a_full_disk_leaves_whole_shards_only_and_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    record(folder, mp.RoutingTrace.from_arrays([[[0, 1]]], num_experts=64), rank=1)
    outcome = subprocess.run(
        [sys.executable, "-c", RECORDING, str(folder), "400000"], capture_output=True, text=True, timeout=120
    )
    assert outcome.returncode == 1
    assert "File too large" in outcome.stderr
    assert sorted(file.name for file in folder.iterdir()) == ["rank00001-00000.parquet"]


# Files from elsewhere


@pytest.fixture
def good_file(tmp_path: Path, toy_trace: mp.RoutingTrace) -> Path:
    record(tmp_path / "good", toy_trace)
    return tmp_path / "good" / "rank00000-00000.parquet"


def rewritten(path: Path, change: Callable[[pa.Table], pa.Table], **header: Any) -> Path:
    """The file with its table, or fields of its header, changed."""
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata)
    table = change(table)
    fields = json.loads(metadata[b"moeplace.trace"]) | header
    pq.write_table(table.replace_schema_metadata({b"moeplace.trace": json.dumps(fields).encode()}), path)
    return path


def with_column(name: str, column: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = column(table[name]) if callable(column) else column
        return table.set_column(table.schema.get_field_index(name), name, values)

    return change


def with_ids(edit: Callable[[Any], None], kind: str = "uint8") -> Callable[[pa.Table], pa.Table]:
    def column(old: Any) -> Any:
        ids = old.combine_chunks().flatten().to_numpy().reshape(-1, 3, 2).astype(kind)
        edit(ids)
        return pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), 6)

    return with_column("expert_ids", column)


def put(value: Any) -> Callable[[Any], None]:
    def edit(ids: Any) -> None:
        ids[100, 1] = value

    return edit


def same(table: pa.Table) -> pa.Table:
    return table


BAD_TABLES: dict[str, tuple[Callable[[pa.Table], pa.Table], dict[str, Any], str]] = {
    "id out of range": (with_ids(put([0, 8])), {}, r"row group 0.*model layer 1.*is 8.*0 to 7"),
    "negative id": (with_ids(put([0, -1]), "int16"), {}, r"row group 0.*is -1"),
    "duplicate experts": (with_ids(put([5, 5])), {}, r"row group 0.*token 100 chose the same expert twice"),
    "fewer experts in the header": (same, {"num_experts": 4}, "must be from 0 to 3"),
    "wrong list length": (same, {"moe_layers": [0, 1]}, "ragged|lists of 6, expected 4"),
    "wrong top-k": (same, {"top_k": 3}, "ragged|lists of 6, expected 9"),
    "ragged lists": (
        with_column("expert_ids", pa.array([[0, 1, 2, 3, 4, 5]] * 479 + [[0, 1, 2]], pa.list_(pa.uint8()))),
        {},
        "ragged|damaged",
    ),
    "ragged lists of the right total": (
        with_column(
            "expert_ids", pa.array([[0, 1, 2, 3, 4, 5]] * 478 + [[0, 1, 2], [3, 4, 5] * 3], pa.list_(pa.uint8()))
        ),
        {},
        "expert_ids",
    ),
    "a missing list": (
        with_column("expert_ids", pa.array([[0, 1, 2, 3, 4, 5]] * 479 + [None], pa.list_(pa.uint8(), 6))),
        {},
        "expert_ids",
    ),
    "a missing id": (
        with_column(
            "expert_ids", pa.array([[0, 1, 2, 3, 4, 5]] * 479 + [[0, 1, 2, 3, 4, None]], pa.list_(pa.uint8(), 6))
        ),
        {},
        "missing values",
    ),
    "ids as text": (with_column("expert_ids", pa.array(["0 1"] * 480)), {}, "'expert_ids' has type string"),
    "ids as fractions": (
        with_column("expert_ids", pa.array([[0.5] * 6] * 480, pa.list_(pa.float32(), 6))),
        {},
        "list of whole numbers",
    ),
    "no expert_ids": (lambda t: t.drop_columns(["expert_ids"]), {}, "column 'expert_ids' is missing"),
    "no sequence": (lambda t: t.drop_columns(["sequence"]), {}, "column 'sequence' is missing"),
    "no workload": (lambda t: t.drop_columns(["workload"]), {}, "column 'workload' is missing"),
    "a missing position": (
        with_column("position", pa.array([None] + [0] * 479, pa.int32())),
        {},
        "'position': 1 of 480 values are missing",
    ),
    "a missing workload": (with_column("workload", pa.array([None] + ["a"] * 479)), {}, "'workload': 1 of 480"),
    "positions as text": (with_column("position", pa.array(["0"] * 480)), {}, "'position' has type string"),
    "workloads as numbers": (with_column("workload", pa.array([0] * 480)), {}, "'workload' has type int64"),
    "a newer version": (same, {"version": 2}, "version 2, this release reads version 1; upgrade"),
    "a header of text": (same, {"num_experts": "8"}, "malformed"),
    "a header without layers": (same, {"moe_layers": None}, "malformed"),
    "a header of impossible layers": (same, {"moe_layers": [3, 2, 1]}, "malformed"),
    "a header of a wrong model": (same, {"model": {"layers": -1}}, "malformed"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_refused_by_name(good_file: Path, case: str) -> None:
    change, header, message = BAD_TABLES[case]
    path = rewritten(good_file, change, **header)
    with pytest.raises(mp.FileFormatError, match=message) as caught:
        read_trace(path.parent)
    assert path.name in str(caught.value)
    with pytest.raises(mp.FileFormatError):
        list(scan_trace(path, tokens=10))


def test_lists_and_wider_numbers_from_other_tools_are_read(good_file: Path, toy_trace: mp.RoutingTrace) -> None:
    def change(table: pa.Table) -> pa.Table:
        table = with_column("expert_ids", lambda c: c.cast(pa.list_(pa.int64())))(table)
        table = with_column("workload", lambda c: c.cast(pa.large_string()))(table)
        return table.append_column("note", pa.array(["x"] * 480))

    back = read_trace(rewritten(good_file, change))
    np.testing.assert_array_equal(back.expert_ids, toy_trace.expert_ids)
    assert [back.workloads[c] for c in back.workload] == [toy_trace.workloads[c] for c in toy_trace.workload]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_experts": 9}, "num_experts is 9, but 8"),
        ({"top_k": 1}, "top_k is 1, but 2"),
        ({"moe_layers": [0, 1, 3]}, "moe_layers is"),
        ({"gate_weights": True}, "columns"),
    ],
)
def test_shards_of_different_recordings_are_not_mixed(good_file: Path, other: dict[str, Any], message: str) -> None:
    shape = {"num_experts": 8, "top_k": 2, "moe_layers": [0, 1, 2], "gate_weights": False} | other
    with TraceWriter(good_file.parent, rank=1, **shape):
        pass
    with pytest.raises(mp.FileFormatError, match=f"rank00001.*{message}"):
        read_trace(good_file.parent)


def test_a_folder_without_shards_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(mp.FileFormatError, match="no .parquet file"):
        read_trace(tmp_path)
    with pytest.raises(mp.InputError, match="no such file or folder"):
        read_trace(tmp_path / "absent")


def test_parquet_of_something_else_is_told_apart(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(mp.FileFormatError, match="not a routing trace"):
        read_trace(tmp_path)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_truncation_is_refused(data: st.DataObject) -> None:
    content = _sample_bytes()
    keep = data.draw(st.integers(0, len(content) - 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.parquet"
        path.write_bytes(content[:keep])
        with pytest.raises(mp.FileFormatError, match=r"t\.parquet"):
            read_trace(path)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_damage_is_either_refused_or_harmless(data: st.DataObject) -> None:
    content = bytearray(_sample_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.parquet"
        path.write_bytes(content)
        outcome = _tokens_or_error(path)
    assert outcome in (0, 64) or "t.parquet" in str(outcome)


def _tokens_or_error(path: Path) -> int | str:
    try:
        return read_trace(path).num_tokens
    except mp.FileFormatError as error:
        return str(error)


def _sample_bytes() -> bytes:
    """A small file in memory, made once."""
    if not _SAMPLE:
        rng = np.random.default_rng(1)
        trace = mp.RoutingTrace.from_arrays(
            rng.random((64, 2, 8)).argsort(axis=2)[:, :, :2], num_experts=8, gate_weights=rng.random((64, 2, 2))
        )
        with tempfile.TemporaryDirectory() as folder:
            write_trace(trace, folder)
            _SAMPLE.append(next(Path(folder).iterdir()).read_bytes())
    return _SAMPLE[0]


_SAMPLE: list[bytes] = []


def test_damaged_pages_are_caught_by_their_checksums(tmp_path: Path) -> None:
    """A flipped byte in the ids may still be a valid id: only the checksum tells."""
    content = bytearray(_sample_bytes())
    chunk = pq.ParquetFile(pa.BufferReader(bytes(content))).metadata.row_group(0).column(3)
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    path = tmp_path / "t.parquet"
    path.write_bytes(content)
    with pytest.raises(mp.FileFormatError, match="row group 0"):
        read_trace(path)


def _varint(value: int) -> bytes:
    """A Thrift compact i64, as the footer of a Parquet file holds its counts."""
    value *= 2
    parts = []
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


@pytest.mark.parametrize("claimed", [10**6, 10**10, 2**60])
def test_a_footer_that_lies_about_rows_takes_no_memory(good_file: Path, claimed: int) -> None:
    content = good_file.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    body, footer = content[: -8 - length], content[-8 - length : -8]
    for true in (480, 480 * 6):
        old, new = b"\x16" + _varint(true), b"\x16" + _varint(claimed * true // 480)
        assert footer.count(old) >= 1
        footer = footer.replace(old, new)
    good_file.write_bytes(body + footer + len(footer).to_bytes(4, "little") + content[-4:])
    pool = pa.default_memory_pool()
    before, peak = pa.total_allocated_bytes(), pool.max_memory() or 0
    with pytest.raises(mp.FileFormatError, match=r"rank00000-00000\.parquet"):
        read_trace(good_file)
    assert (pool.max_memory() or 0) <= max(peak, before + (1 << 28))


def test_a_lost_shard_folder_reports_unfinished_work(tmp_path: Path) -> None:
    (tmp_path / ".rank00000-00000.parquet.1.ab.tmp").write_bytes(b"PAR1")
    with pytest.raises(mp.FileFormatError, match=r"\.tmp files"):
        read_trace(tmp_path)


def test_shards_can_be_moved_as_files(good_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "renamed.parquet"
    other.parent.mkdir()
    shutil.copy(good_file, other)
    assert read_trace(other.parent).fingerprint == read_trace(good_file).fingerprint
    assert os.listdir(other.parent) == ["renamed.parquet"]


def shorter_lists(footer: bytes) -> Iterator[bytes]:
    """The footer with one element of one of its lists of 64-bit numbers gone, for each list in turn."""
    for at, byte in enumerate(footer):
        if byte & 15 == 6 and 1 <= byte >> 4 <= 5:
            end = at + 1
            while end < len(footer) and footer[end] & 128:
                end += 1
            yield footer[:at] + bytes([byte - 16]) + footer[end + 1 :]


def test_damaged_statistics_of_a_column_are_refused_and_do_not_end_the_process(good_file: Path) -> None:
    """Arrow checks level histograms where its Python accessor lets C++ exceptions through."""
    whole = good_file.read_bytes()
    start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for footer in shorter_lists(whole[start:-8]):
        good_file.write_bytes(whole[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
        try:
            read_trace(good_file)
        except mp.FileFormatError as error:
            refused += "histogram" in str(error)
    assert refused == 2, "repetition and definition levels of the nested column"
