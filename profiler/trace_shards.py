"""Opening the shards of a Parquet trace and decoding their row groups, trusting nothing in them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..placement.errors import FileFormatError, InputError
from ..placement.load_windows import Stream
from ..placement.trace import RoutingTrace
from .trace_header import INTEGER_COLUMNS, REQUIRED_COLUMNS, TraceHeader

ROW_GROUP_ID_LIMIT = 1 << 28
"""Expert ids one row group may hold: it is decoded whole, into four bytes an id at worst."""

IDS_PER_BYTE_LIMIT = 1 << 10
"""Real routing takes about half a byte an id; what claims a thousand ids a byte is damaged, or made to fill memory."""

SMALL_FILE_IDS = 1 << 27

MAGIC = b"PAR1"


@dataclass(frozen=True)
class TraceShard:
    """One checked Parquet file of a trace. rows: tokens in each row group. columns: those present."""

    path: Path
    header: TraceHeader
    rows: tuple[int, ...]
    columns: tuple[str, ...]

    @property
    def row_groups(self) -> int:
        return len(self.rows)


def trace_shards(path: str | Path) -> tuple[TraceShard, ...]:
    """The shards of a folder in the order of their names, or the one file, all of one shape.

    Raises:
        InputError: no such path. FileFormatError: no shard there, one that is damaged or of a newer version, or shards
            that disagree.
    """
    source = Path(path)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not files:
        raise FileFormatError(
            f"{source}: no .parquet file in this folder; expected the shards of a recording (rank00000-00000.parquet, ...). "
            "A recording that was killed early leaves only .tmp files, which hold no whole shard: record again"
        )
    shards = tuple(_open_shard(file) for file in files)
    first = shards[0]
    for shard in shards[1:]:
        for name in ("num_experts", "top_k", "moe_layers"):
            here, there = getattr(shard.header, name), getattr(first.header, name)
            if here != there:
                raise FileFormatError(
                    f"{shard.path}: {name} is {here}, but {there} in {first.path.name}; the shards are of different "
                    "models or recordings: keep each recording in its own folder"
                )
        if set(shard.columns) != set(first.columns):
            raise FileFormatError(
                f"{shard.path}: columns {', '.join(shard.columns)}, but {', '.join(first.columns)} in "
                f"{first.path.name}; keep each recording in its own folder"
            )
    return shards


def is_trace(path: Path) -> bool:
    """Whether `path` is a Parquet file, or a folder that holds some."""
    if path.is_dir():
        return any(path.glob("*.parquet"))
    with path.open("rb") as handle:
        return handle.read(4) == MAGIC


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Parquet's own errors, said in ours."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, MemoryError, OverflowError, UnicodeDecodeError) as error:
        message = str(error).strip().splitlines()
        raise FileFormatError(
            f"{what}: damaged or truncated Parquet ({message[0] if message else type(error).__name__}); "
            "copy the file again or leave it out"
        ) from None


def _open_shard(path: Path) -> TraceShard:
    import pyarrow.parquet as pq

    size = path.stat().st_size
    with _reading(str(path)), pq.ParquetFile(path) as file:
        metadata, schema = file.metadata, file.schema_arrow
        header = TraceHeader.decode(schema.metadata, path)
        _check_columns(path, schema)
        rows = tuple(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
        _check_rows(path, size, metadata, rows, header)
        _check_chunks_parse(file, rows)
        _check_sizes(path, size, metadata, rows, header)
    return TraceShard(path, header, rows, tuple(schema.names))


def _check_columns(path: Path, schema: Any) -> None:
    import pyarrow.types as types

    for name in REQUIRED_COLUMNS:
        if name not in schema.names:
            raise FileFormatError(f"{path}: column {name!r} is missing; found {', '.join(schema.names)}")
    if len(set(schema.names)) < len(schema.names):
        raise FileFormatError(f"{path}: a column name stands twice in {', '.join(schema.names)}")
    for name in ("expert_ids", "gate_weights"):
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        wanted = types.is_integer if name == "expert_ids" else types.is_floating
        if not (types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind)) or not wanted(
            kind.value_type
        ):
            number = "whole numbers" if name == "expert_ids" else "floating-point numbers"
            raise FileFormatError(f"{path}: column {name!r} has type {kind}, expected a list of {number}")
    for name in INTEGER_COLUMNS:
        if name in schema.names and not types.is_integer(schema.field(name).type):
            raise FileFormatError(f"{path}: column {name!r} has type {schema.field(name).type}, expected whole numbers")
    kind = schema.field("workload").type
    text = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(text) or types.is_large_string(text) or types.is_string_view(text)):
        raise FileFormatError(f"{path}: column 'workload' has type {kind}, expected strings")


def _check_chunks_parse(file: Any, rows: tuple[int, ...]) -> None:
    """Arrow's own reader goes over each group's columns before `metadata.column` may: that accessor lets C++ exceptions
    about damaged column statistics end the process, the reader turns them into Python's."""
    for group in range(len(rows)):
        next(file.iter_batches(batch_size=1, row_groups=[group], use_threads=False), None)


def _check_rows(path: Path, size: int, metadata: Any, rows: tuple[int, ...], header: TraceHeader) -> None:
    """The number of rows that the footer declares must be possible for a file of this size."""
    total = sum(rows) * header.ids_per_token
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise FileFormatError(f"{path}: row groups hold {sum(rows):,} rows, the footer says {metadata.num_rows:,}")
    if total > max(SMALL_FILE_IDS, size * IDS_PER_BYTE_LIMIT):
        raise FileFormatError(
            f"{path}: the footer declares {total:,} expert ids, more than a file of {size:,} bytes can sensibly hold; "
            "the header is damaged"
        )
    for group, count in enumerate(rows):
        if count * header.ids_per_token > ROW_GROUP_ID_LIMIT:
            raise FileFormatError(
                f"{path}, row group {group}: {count:,} rows of {header.ids_per_token} expert ids, more than the "
                f"{ROW_GROUP_ID_LIMIT:,} ids a row group may hold; rewrite the file with smaller row groups"
            )


def _check_sizes(path: Path, size: int, metadata: Any, rows: tuple[int, ...], header: TraceHeader) -> None:
    """What the footer declares of columns must be possible for a file of this size, before all of it is decoded."""
    for group, count in enumerate(rows):
        chunks = metadata.row_group(group)
        for index in range(chunks.num_columns):
            chunk = chunks.column(index)
            column = chunk.path_in_schema.partition(".")[0]
            expected = count * (header.ids_per_token if column in ("expert_ids", "gate_weights") else 1)
            if column in REQUIRED_COLUMNS + INTEGER_COLUMNS + ("gate_weights",) and chunk.num_values != expected:
                raise FileFormatError(
                    f"{path}, row group {group}, column {column!r}: {chunk.num_values:,} values, expected {expected:,} "
                    f"({count:,} rows, {len(header.moe_layers)} layers, top-{header.top_k}); the file is ragged"
                )
            if chunk.total_compressed_size > size or chunk.total_uncompressed_size > 8 * expected + (1 << 26):
                raise FileFormatError(
                    f"{path}, row group {group}, column {column!r}: {chunk.total_uncompressed_size:,} bytes for "
                    f"{expected:,} values; the header is damaged"
                )


def read_row_group(
    shard: TraceShard, group: int, *, tokens: int | None = None, routing_only: bool = False
) -> Iterator[RoutingTrace]:
    """Blocks of at most `tokens` tokens of one row group (None: all of it in one).

    routing_only leaves gate weights and steps unread.

    Raises:
        FileFormatError: the row group is damaged, ragged, or holds ids that are not possible.
    """
    import pyarrow.parquet as pq

    rows = shard.rows[group]
    where = f"{shard.path}, row group {group}"
    header = shard.header
    skipped = ("gate_weights", "step") if routing_only else ()
    known = (*REQUIRED_COLUMNS, *INTEGER_COLUMNS, "gate_weights")
    names = [name for name in shard.columns if name in known and name not in skipped]
    columns: dict[str, Any] = {}
    with _reading(where), pq.ParquetFile(shard.path, page_checksum_verification=True) as file:
        table = file.read_row_group(group, columns=names, use_threads=False)
    if table.num_rows != rows:
        raise FileFormatError(f"{where}: {table.num_rows:,} rows, the footer says {rows:,}")
    for name in names:
        with _reading(f"{where}, column {name!r}"):
            columns[name] = _decode(f"{where}, column {name!r}", name, table[name], header)
        table = table.drop_columns([name])
    width = rows if tokens is None else tokens
    for start in range(0, rows, max(width, 1)):
        part = slice(start, min(rows, start + width))
        yield _block(f"{where}, rows {part.start} to {part.stop - 1}", header, columns, part)


def count_streams(shard: TraceShard, group: int) -> Counter[Stream]:
    """Tokens of each (rank, workload) in a row group; reads those two columns alone."""
    import pyarrow.parquet as pq

    where = f"{shard.path}, row group {group}"
    names = [name for name in ("workload", "source") if name in shard.columns]
    with _reading(where), pq.ParquetFile(shard.path, page_checksum_verification=True) as file:
        table = file.read_row_group(group, columns=names, use_threads=False)
        columns = {name: _decode(f"{where}, column {name!r}", name, table[name], shard.header) for name in names}
    tags, codes = columns["workload"]
    ranks, rank_codes = np.unique(columns.get("source", np.zeros(len(codes), np.int64)), return_inverse=True)
    tally = np.bincount(rank_codes * len(tags) + codes, minlength=len(ranks) * len(tags))
    return Counter(
        {(int(ranks[i // len(tags)]), str(tags[i % len(tags)])): int(tally[i]) for i in np.flatnonzero(tally)}
    )


def _decode(where: str, name: str, column: Any, header: TraceHeader) -> Any:
    """One column as numpy: numbers [T], lists [T, L, k]; the workload as (tags, codes)."""
    import pyarrow as pa

    if column.null_count:
        raise FileFormatError(f"{where}: {column.null_count} of {len(column)} values are missing")
    if name == "workload":
        array = column.combine_chunks().dictionary_encode()
        array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
        return array.dictionary.to_pylist(), array.indices.to_numpy(zero_copy_only=False)
    if name not in ("expert_ids", "gate_weights"):
        return column.to_numpy()
    shape = (len(column), len(header.moe_layers), header.top_k)
    kind = column.type
    if pa.types.is_fixed_size_list(kind) and kind.list_size != header.ids_per_token:
        raise FileFormatError(
            f"{where}: lists of {kind.list_size}, expected {header.ids_per_token} "
            f"({shape[1]} layers, top-{shape[2]}); the header and the column are of different models"
        )
    if not pa.types.is_fixed_size_list(kind):
        column = column.cast(pa.list_(kind.value_type, header.ids_per_token))
    values = column.combine_chunks().flatten()
    if values.null_count:
        raise FileFormatError(f"{where}: {values.null_count} missing values inside the lists")
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def _block(where: str, header: TraceHeader, columns: dict[str, Any], rows: slice) -> RoutingTrace:
    names, codes = columns["workload"]
    gates: npt.NDArray[Any] | None = columns["gate_weights"][rows] if "gate_weights" in columns else None
    try:
        return RoutingTrace.from_arrays(
            columns["expert_ids"][rows],
            num_experts=header.num_experts,
            gate_weights=gates,
            sequence=columns["sequence"][rows],
            position=columns["position"][rows],
            workload=np.asarray(names, dtype=str)[codes[rows]],
            step=columns["step"][rows] if "step" in columns else None,
            source=columns["source"][rows] if "source" in columns else None,
            moe_layers=header.moe_layers,
        )
    except InputError as error:
        raise FileFormatError(f"{where}: {error}") from None


def empty_trace(header: TraceHeader) -> RoutingTrace:
    """A trace of that shape without tokens."""
    shape = (0, len(header.moe_layers), header.top_k)
    return RoutingTrace.from_arrays(
        np.empty(shape, np.int64), header.num_experts, workload=np.empty(0, str), moe_layers=header.moe_layers
    )
