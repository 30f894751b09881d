"""Count windows on their way in: packed, told apart, and gathered into transactions."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

pytest.importorskip("fastapi", reason="the service is an extra")
from service_runs import MODEL, POLICY, TOPOLOGY, counts, skewed

import moeplace as mp
from moeplace.db import Store
from moeplace.db.records import Actor, CountWindow
from moeplace.db.windows import narrow, pack, unpack
from moeplace.placement.errors import InputError, NotFoundError
from moeplace.service.counts import from_arrow, from_json, to_arrow
from moeplace.service.window_batcher import WindowBatcher

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SHAPE = (3, 16)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.db") as opened:
        model, topology = opened.add_model(MODEL), opened.add_topology(TOPOLOGY)
        for name in ("chat", "code"):
            opened.deployments.add(name, model.id, topology.id, POLICY, Actor("test", "approve"))
        yield opened


def window(number: int, minute: int = 0) -> CountWindow:
    return CountWindow(NOON + timedelta(minutes=minute), counts(number, skewed(0)))


@given(st.lists(st.integers(0, 1 << 53), min_size=6, max_size=6), st.integers(0, 54))
def test_packed_counts_come_back_exactly_whatever_their_size(values: list[int], shift: int) -> None:
    load = np.array(values, np.int64).reshape(2, 3) >> shift
    np.testing.assert_array_equal(unpack(pack(narrow(load)), (2, 3)), load)


@pytest.mark.parametrize("damage", [b"", b"3", b"2", b"2garbage", b"x" * 40])
def test_damaged_counts_are_an_error(damage: bytes) -> None:
    with pytest.raises(mp.StoreError, match="damaged"):
        unpack(damage, SHAPE)
    whole = pack(narrow(window(0).load))
    with pytest.raises(mp.StoreError, match="damaged"):
        unpack(whole[:-3], SHAPE)
    with pytest.raises(mp.StoreError, match="damaged"):
        unpack(whole, (3, 17))


@pytest.mark.parametrize("largest", [200, 60_000, 1 << 30, 1 << 40])
def test_counts_travel_as_narrow_as_they_are_and_arrive_the_same(largest: int) -> None:
    sent = CountWindow(NOON, np.random.default_rng(0).integers(0, largest, SHAPE))
    body = to_arrow([sent])
    [arrived] = from_arrow(body, *SHAPE)
    np.testing.assert_array_equal(arrived.load, sent.load)
    assert arrived.load.dtype == np.int64
    negative = CountWindow(NOON, sent.load - largest)
    np.testing.assert_array_equal(from_arrow(to_arrow([negative]), *SHAPE)[0].load, negative.load)


def test_batches_of_one_deployment_in_one_transaction_are_told_apart(store: Store) -> None:
    same = window(1)
    batches: Sequence[Any] = [("chat", [same, window(2)]), ("code", [same]), ("chat", [same, window(3)]), ("chat", [])]
    assert store.windows.add_each(batches) == [2, 1, 1, 0]
    assert store.windows.add_each(batches) == [0, 0, 0, 0]
    assert store.windows.totals("chat")[0] == 3


def test_one_refused_request_does_not_take_the_others_with_it(store: Store) -> None:
    slow = threading.Event()
    add = store.windows.add_each

    def waiting(batches: Sequence[Any]) -> list[int]:
        slow.wait(60)
        return add(batches)

    store.windows.add_each = waiting  # type: ignore[method-assign]
    batcher = WindowBatcher(store)
    good = [batcher.put(name, [window(number)]) for number, name in enumerate(("chat", "code", "chat"))]
    bad = batcher.put("chat", [CountWindow(NOON, np.full(SHAPE, -1))])
    gone = batcher.put("chat", [window(9)])
    assert gone.cancel() or gone.running()
    slow.set()
    assert [future.result(60) for future in good] == [1, 1, 1]
    with pytest.raises(mp.InputError, match="run from -1"):
        bad.result(60)
    # The thread that stores is still there.
    assert batcher.put("code", [window(5)]).result(60) == 1
    batcher.close()
    assert store.windows.totals("chat")[0] == 2


def test_what_waits_is_stored_when_the_server_ends(store: Store) -> None:
    batcher = WindowBatcher(store)
    futures = [batcher.put("chat", [window(number)]) for number in range(50)]
    batcher.close()
    assert sum(future.result(0) for future in futures) == 50 == store.windows.totals("chat")[0]


def test_a_sender_that_is_alone_does_not_wait_for_others(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeplace.service.window_batcher.GATHER_SECONDS", 30.0)
    batcher = WindowBatcher(store)
    began = time.monotonic()
    for number in range(3):
        batcher.put("chat", [window(number)]).result(60)
    assert time.monotonic() - began < 30.0
    batcher.close()


def stream(table: Any, compression: str | None = None) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def as_table(**columns: Any) -> Any:
    import pyarrow as pa

    loads = pa.array([np.arange(48)] * len(next(iter(columns.values()))))
    return pa.table({"ended": pa.array([NOON] * len(loads), pa.timestamp("us", "UTC")), "load": loads, **columns})


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compressed_arrow_is_refused_before_anything_is_decoded(compression: str) -> None:
    import pyarrow as pa

    zeros = pa.ListArray.from_arrays([0, 1 << 24], pa.array(np.zeros(1 << 24, np.int64)))
    table = pa.table({"ended": pa.array([NOON], pa.timestamp("us", "UTC")), "load": zeros})
    bomb = stream(table, compression)
    del zeros, table
    assert len(bomb) < 1 << 20
    before = pa.total_allocated_bytes()
    peak = pa.default_memory_pool().max_memory()
    with pytest.raises(mp.InputError, match="compressed"):
        from_arrow(bomb, *SHAPE)
    assert pa.total_allocated_bytes() == before
    assert pa.default_memory_pool().max_memory() == peak
    texts = pa.array(["chat"] * 2).dictionary_encode()
    with pytest.raises(mp.InputError, match="compressed"):
        from_arrow(stream(as_table(workload=texts), compression), *SHAPE)


@pytest.mark.slow
def test_rows_and_texts_of_arrow_are_bounded_before_they_are_spread_out() -> None:
    import pyarrow as pa

    with pytest.raises(mp.InputError, match=r"windows: \d+ rows"):
        from_arrow(stream(pa.table({"x": pa.nulls(1 << 16)})), *SHAPE)
    short = pa.array(["chat", "code", "chat"]).dictionary_encode()
    assert [window.workload for window in from_arrow(stream(as_table(workload=short)), *SHAPE)] == [
        "chat",
        "code",
        "chat",
    ]
    long = pa.array(["x" * 1_000_000] * 500).dictionary_encode()
    with pytest.raises(mp.InputError, match="more than 100 characters"):
        from_arrow(stream(as_table(source=long)), *SHAPE)


@given(st.integers(0, 1000), st.binary(max_size=8))
def test_damaged_arrow_is_an_error_of_its_sender(at: int, damage: bytes) -> None:
    whole = to_arrow([window(0)])
    at = min(at, len(whole))
    with contextlib.suppress(mp.MoeplaceError):
        from_arrow(whole[:at] + damage + whole[at + len(damage) :], *SHAPE)


@pytest.mark.parametrize("ended", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "1969-12-31T00:00:00Z"])
def test_moments_that_no_window_ends_at_are_refused_by_name(ended: str) -> None:
    body = json.dumps({"windows": [{"ended": ended, "load": [[1]]}]}).encode()
    with pytest.raises(ValidationError, match=r"windows.0.ended\n.*1970 to 2199"):
        from_json(body)


def test_arrow_moments_are_bounded_too() -> None:
    import pyarrow as pa

    table = as_table(workload=pa.array(["chat"]))
    for moment in (-(1 << 62), -62_135_596_800_000_000, 253_402_300_799_000_000):
        early = table.set_column(0, "ended", pa.array([moment], pa.timestamp("us", "Asia/Tokyo")))
        with pytest.raises(mp.InputError, match="ended"):
            from_arrow(stream(early), *SHAPE)


def test_a_window_whose_pairs_have_no_sum_in_64_bits_is_refused(store: Store) -> None:
    with pytest.raises(mp.InputError, match=r"at most 2\*\*48"):
        store.windows.add({"chat": [CountWindow(NOON, np.full(SHAPE, (1 << 53) // 2))]})


def test_what_one_sender_brings_about_is_that_senders_alone(store: Store) -> None:
    """Of whatever kind: here a date whose zone has no room for it, and a load that is no array."""
    begun, held = threading.Event(), threading.Event()
    add = store.windows.add_each

    def waiting(batches: Sequence[Any]) -> list[int]:
        begun.set()
        held.wait(60)
        return add(batches)

    store.windows.add_each = waiting  # type: ignore[method-assign]
    batcher = WindowBatcher(store)
    first = batcher.put("chat", [window(0)])
    assert begun.wait(60), "the others are to be one batch"
    edge = datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))
    good = [batcher.put(name, [window(number)]) for number, name in enumerate(("chat", "code"), 1)]
    bad = [
        batcher.put("chat", [CountWindow(edge, counts(1, skewed(0)))]),
        batcher.put("code", [CountWindow(NOON, object())]),
    ]  # type: ignore[arg-type]
    held.set()
    assert [future.result(60) for future in (first, *good)] == [1, 1, 1]
    assert all(future.exception(60) is not None for future in bad)
    batcher.close()


def test_a_deployment_made_anew_by_another_server_takes_windows_of_its_new_shape(url: str) -> None:
    by, other = Actor("ann", "approve"), MODEL.model_copy(update={"experts": 8})
    with Store.open(url) as here, Store.open(url) as there:
        topology = here.add_topology(TOPOLOGY).id
        here.deployments.add("chat", here.add_model(MODEL).id, topology, {}, by)
        assert here.windows.add({"chat": [CountWindow(NOON, counts(1, skewed(1)))]}) == {"chat": 1}
        there.deployments.remove("chat", by)
        with pytest.raises(NotFoundError, match="no deployment 'chat'"):
            here.windows.add({"chat": [CountWindow(NOON, counts(1, skewed(1)))]})
        there.deployments.add("chat", there.add_model(MODEL).id, topology, {}, by)
        assert here.windows.add({"chat": [CountWindow(NOON, counts(1, skewed(1)))]}) == {"chat": 1}
        there.deployments.remove("chat", by)
        there.deployments.add("chat", there.add_model(other).id, topology, {}, by)
        assert here.windows.add({"chat": [CountWindow(NOON, np.ones((3, 8), np.int64))]}) == {"chat": 1}
        with pytest.raises(InputError, match="shape"):
            here.windows.add({"chat": [CountWindow(NOON, counts(1, skewed(1)))]})
