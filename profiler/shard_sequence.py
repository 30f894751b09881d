"""Writing blocks of tokens as row groups of Parquet shards, each shard whole or absent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..placement.errors import InputError
from ..placement.files import replacing
from ..placement.trace import RoutingTrace
from .trace_header import TraceHeader

IDS_PER_ROW_GROUP = 1 << 22


class ShardSequence:
    """Row groups into shards, each shard renamed into place when full."""

    def __init__(self, folder: Path, schema: Any, header: TraceHeader, rank: int, rows_per_shard: int) -> None:
        self.columns = tuple(schema.names)
        self._folder, self._schema = folder, schema
        self._rank, self._rows_per_shard = rank, rows_per_shard
        self._rows_per_group = min(max(IDS_PER_ROW_GROUP // header.ids_per_token, 256), 1 << 16, rows_per_shard)
        self._waiting: list[Any] = []
        self._waiting_rows = self._shard_rows = self._shard = 0
        self._open: contextlib.ExitStack | None = None
        self._closed = False
        self._parquet: Any = None
        taken = sorted(folder.glob(f"rank{rank:05d}-*.parquet")) if folder.is_dir() else []
        if taken:
            raise InputError(f"{folder} already holds shards of rank {rank} ({taken[0].name}); give an empty folder")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; a trace is written into a folder")

    def add(self, block: RoutingTrace, workloads: tuple[str, ...], sequence: npt.NDArray[np.int64]) -> None:
        """Appends a block; workloads names its workload codes, sequence is stored in place of its own."""
        if self._closed:
            raise InputError("this TraceWriter is closed; open another with another folder or rank")
        position = _narrow("position", block.position)
        start = 0
        while start < block.num_tokens:
            room = min(self._rows_per_group - self._waiting_rows, self._rows_per_shard - self._shard_rows)
            stop = min(block.num_tokens, start + room)
            self._waiting.append(self._table(block, workloads, sequence, position, slice(start, stop)))
            self._waiting_rows += stop - start
            self._shard_rows += stop - start
            start = stop
            if self._waiting_rows == self._rows_per_group or self._shard_rows == self._rows_per_shard:
                self._flush()
            if self._shard_rows == self._rows_per_shard:
                self._finish_shard()

    def close(self) -> None:
        """Completes the last shard, or writes one empty shard when there was no token."""
        if self._closed:
            return
        self._closed = True
        self._flush()
        if self._parquet is None and self._shard == 0:
            self._start_shard()
        if self._parquet is not None:
            self._finish_shard()

    def _table(
        self,
        block: RoutingTrace,
        workloads: tuple[str, ...],
        sequence: npt.NDArray[np.int64],
        position: npt.NDArray[np.int32],
        rows: slice,
    ) -> Any:
        import pyarrow as pa

        values = {
            "step": block.step,
            "source": block.source,
            "sequence": sequence,
            "position": position,
            "workload": block.workload,
            "expert_ids": block.expert_ids,
            "gate_weights": block.gate_weights,
        }
        arrays = []
        for field in self._schema:
            column = values[field.name]
            assert column is not None
            part = np.ascontiguousarray(column[rows])
            if field.name == "workload":
                arrays.append(pa.DictionaryArray.from_arrays(part.astype(np.int32), pa.array(workloads, pa.string())))
            elif part.ndim == 3:
                arrays.append(
                    pa.FixedSizeListArray.from_arrays(
                        pa.array(part.reshape(-1), field.type.value_type), type=field.type
                    )
                )
            else:
                arrays.append(pa.array(part, field.type))
        return pa.Table.from_arrays(arrays, schema=self._schema)

    def _flush(self) -> None:
        if not self._waiting:
            return
        import pyarrow as pa

        rows = pa.concat_tables(self._waiting).unify_dictionaries().combine_chunks()
        self._waiting, self._waiting_rows = [], 0
        if self._parquet is None:
            self._start_shard()
        with self._dropping_on_error():
            self._parquet.write_table(rows, row_group_size=len(rows))

    def _start_shard(self) -> None:
        import pyarrow.parquet as pq

        path = self._folder / f"rank{self._rank:05d}-{self._shard:05d}.parquet"
        self._open = contextlib.ExitStack()
        with self._dropping_on_error():
            scratch = self._open.enter_context(replacing(path))
            self._parquet = pq.ParquetWriter(
                scratch,
                self._schema,
                compression="zstd",
                compression_level=3,
                write_page_checksum=True,
                use_dictionary=["expert_ids.list.element", "workload"],
                column_encoding={
                    **dict.fromkeys(("step", "source", "sequence", "position"), "DELTA_BINARY_PACKED"),
                    "gate_weights.list.element": "BYTE_STREAM_SPLIT",
                },
            )

    def _finish_shard(self) -> None:
        assert self._open is not None
        with self._dropping_on_error():
            self._parquet.close()
        self._open.close()
        self._open = self._parquet = None
        self._shard_rows = 0
        self._shard += 1

    @contextlib.contextmanager
    def _dropping_on_error(self) -> Iterator[None]:
        """A failed write (a full disk) removes the torn shard and ends the writer; whole shards stay."""
        try:
            yield
        except BaseException as error:
            self._closed, self._parquet = True, None
            if self._open is not None:
                self._open.__exit__(type(error), error, error.__traceback__)
            raise


def _narrow(name: str, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    if len(values) and not (values.min() >= 0 and values.max() < 1 << 31):
        raise InputError(f"{name} runs from {values.min()} to {values.max()}; it must be from 0 to 2**31 - 1")
    return values.astype(np.int32)
