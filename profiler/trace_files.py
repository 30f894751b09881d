"""Parquet traces: one row a token, written in shards, one writer a rank, read back in bounded memory.

Columns: `step` int64 (forward call), `source` int32 (rank that recorded the token), `sequence` int64, `position` int32,
`workload` dictionary of strings, `expert_ids` fixed-size list of L*k uint8 or uint16 (layer by layer, highest gate
weight first), `gate_weights` fixed-size list of L*k float32 that hold float16 values (Spark knows no half floats; split
into byte streams the empty bytes compress away). `step`, `source` and `gate_weights` may be absent. One list column,
dictionary-encoded under zstd, was both smaller and quicker to read than a column a layer.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from .._arguments import check_fields, check_methods, check_types
from .._types import IntArray
from ..placement.errors import FileFormatError, InputError
from ..placement.files import full_disk_told, missing_folders, remove_empty, replacing
from ..placement.model import ModelSpec
from ..placement.statistics import Stream
from ..placement.steps import Batch, as_batches
from ..placement.trace import RoutingTrace, id_dtype
from .files import Source, name_of, path_or_file, reading, size_of

HEADER_KEY = b"moeplace.trace"
VERSION = 1

INTEGER_COLUMNS = ("step", "source", "sequence", "position")
REQUIRED_COLUMNS = ("sequence", "position", "workload", "expert_ids")

IDS_PER_ROW_GROUP = 1 << 22
ROWS_PER_SHARD = 1 << 18
RANK_SHIFT = 40

ROW_GROUP_ID_LIMIT = 1 << 28
"""Expert ids one row group may hold: it is decoded whole, into four bytes an id at worst."""
IDS_PER_BYTE_LIMIT = 1 << 10
"""Real routing takes about half a byte an id; what claims a thousand ids a byte is damaged, or made to fill memory."""
SMALL_FILE_IDS = 1 << 27

MAGIC = b"PAR1"


@dataclass(frozen=True)
class TraceHeader:
    """Shape of a trace, kept as JSON in the Parquet schema metadata under `moeplace.trace`.

    model: the recorded model where the recorder knew it. batches: kinds of the recording's forward calls, where this is
    a part that cuts them.
    """

    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    model: ModelSpec | None = None
    batches: tuple[Batch, ...] = ()

    def __post_init__(self) -> None:
        layers = self.moe_layers
        if not 1 <= self.num_experts <= 65536:
            raise InputError(f"num_experts ({self.num_experts}) must be between 1 and 65536")
        if not 1 <= self.top_k <= self.num_experts:
            raise InputError(f"top_k ({self.top_k}) must be between 1 and num_experts ({self.num_experts})")
        if not layers or len(layers) > 65536 or layers[0] < 0:
            raise InputError(f"moe_layers ({layers}) must name at least one layer, and none below 0")
        if any(b <= a for a, b in itertools.pairwise(layers)):
            raise InputError(f"moe_layers ({layers}) must be increasing")

    @property
    def ids_per_token(self) -> int:
        """L * k."""
        return len(self.moe_layers) * self.top_k

    def encode(self) -> bytes:
        fields = {
            "version": VERSION,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "moe_layers": list(self.moe_layers),
            "model": None if self.model is None else self.model.model_dump(mode="json"),
            **({"batches": [asdict(batch) for batch in self.batches]} if self.batches else {}),
        }
        return json.dumps(fields).encode()

    @classmethod
    def decode(cls, metadata: Mapping[bytes, bytes] | None, origin: str | Path) -> TraceHeader:
        """Reads the header out of a Parquet file's key-value metadata.

        Raises:
            FileFormatError: no header, a header of a newer release, or one that is malformed.
        """
        if not metadata or HEADER_KEY not in metadata:
            raise FileFormatError(
                f"{origin}: Parquet, but not a routing trace: the metadata key {HEADER_KEY.decode()!r} is absent; "
                "tools that rewrite Parquet drop it, so pass the recorded shards, or build a trace with "
                "RoutingTrace.from_arrays and write it with write_trace"
            )
        try:
            fields = json.loads(metadata[HEADER_KEY])
            version = fields["version"]
            if version != VERSION:
                raise FileFormatError(
                    f"{origin}: routing trace of format version {version}, this release reads version {VERSION}; "
                    "upgrade moeplace"
                )
            model = fields.get("model")
            return cls(
                num_experts=_whole(fields["num_experts"]),
                top_k=_whole(fields["top_k"]),
                moe_layers=tuple(_whole(layer) for layer in fields["moe_layers"]),
                model=None if model is None else ModelSpec(**model),
                batches=as_batches([Batch(**batch) for batch in fields.get("batches", ())]),
            )
        except FileFormatError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FileFormatError(
                f"{origin}: the {HEADER_KEY.decode()!r} metadata is malformed ({error}); record the trace again"
            ) from None


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected a whole number, found {value!r}")
    return value


def trace_schema(header: TraceHeader, *, gate_weights: bool, step: bool = True, source: bool = True) -> Any:
    """The Arrow schema of a shard; optional columns are absent when not recorded."""
    import pyarrow as pa

    width = header.ids_per_token
    fields = [
        *([pa.field("step", pa.int64(), nullable=False)] if step else []),
        *([pa.field("source", pa.int32(), nullable=False)] if source else []),
        pa.field("sequence", pa.int64(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("workload", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("expert_ids", _list_of(pa.from_numpy_dtype(id_dtype(header.num_experts)), width), nullable=False),
        *([pa.field("gate_weights", _list_of(pa.float32(), width), nullable=False)] if gate_weights else []),
    ]
    return pa.schema(fields, metadata={HEADER_KEY: header.encode()})


def _list_of(value_type: Any, width: int) -> Any:
    import pyarrow as pa

    return pa.list_(pa.field("element", value_type, nullable=False), width)


# Writing: blocks of tokens as row groups of shards, each shard whole or absent.


@check_methods
@check_fields
class TraceWriter:
    """Writes tokens of one rank as shards `rank00000-00000.parquet`, ... in `folder`.

    A shard appears under its name only when complete: a killed process leaves whole shards and no torn one. Memory is
    bounded by one row group (about four million expert ids). Ranks number their sequences independently; the rank is
    put above bit 40 of the stored sequence number, so that they stay distinct in the folder they share.

    Use it as a context manager, or call `close`. Not for concurrent use; ranks each have their own.

    Raises:
        InputError: the folder already holds shards of this rank, or the shape is impossible.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        num_experts: int,
        top_k: int,
        moe_layers: Sequence[int],
        rank: int = 0,
        gate_weights: bool = True,
        rows_per_shard: int = ROWS_PER_SHARD,
        model: ModelSpec | None = None,
    ) -> None:
        if not 0 <= rank < 1 << 22 or rows_per_shard < 1:
            raise InputError(f"rank ({rank}) must be 0 or more and rows_per_shard ({rows_per_shard}) at least 1")
        layers = tuple(int(layer) for layer in moe_layers)
        self._header = TraceHeader(int(num_experts), int(top_k), layers, model)
        schema = trace_schema(self._header, gate_weights=gate_weights)
        self._rank = rank
        self._shards = _ShardSequence(Path(folder), schema, self._header, rank, rows_per_shard)

    def add(
        self,
        expert_ids: npt.ArrayLike,
        *,
        gate_weights: npt.ArrayLike | None = None,
        sequence: npt.ArrayLike,
        position: npt.ArrayLike,
        step: int | npt.ArrayLike,
        workload: str = "",
    ) -> None:
        """Appends tokens: expert_ids and gate_weights [T, L, k], sequence and position [T], step one number or [T].

        Raises:
            InputError: shapes, ids or numbers that are not valid; nothing of the call is written then.
        """
        ids = np.asarray(expert_ids)
        shape = (len(self._header.moe_layers), self._header.top_k)
        if ids.ndim != 3 or ids.shape[1:] != shape:
            raise InputError(
                f"expert_ids has shape {ids.shape}, expected [tokens, {shape[0]} layers, {shape[1]} experts]"
            )
        if (gate_weights is not None) != ("gate_weights" in self._shards.columns):
            opened, called = ("with", "without") if gate_weights is None else ("without", "with")
            raise InputError(f"this TraceWriter was opened {opened} gate_weights, but add was called {called} them")
        steps = np.full(len(ids), step, dtype=np.int64) if np.ndim(step) == 0 else step
        block = RoutingTrace.from_arrays(
            ids,
            num_experts=self._header.num_experts,
            gate_weights=gate_weights,
            sequence=sequence,
            position=position,
            step=steps,
            source=np.full(len(ids), self._rank, dtype=np.int64),
            moe_layers=self._header.moe_layers,
        )
        if block.num_tokens and not (block.sequence.min() >= 0 and block.sequence.max() < 1 << RANK_SHIFT):
            raise InputError(
                f"sequence numbers run from {block.sequence.min()} to {block.sequence.max()}; they must be from 0 to "
                f"2**{RANK_SHIFT} - 1, since the rank is stored above them"
            )
        self._shards.add(block, (workload,), block.sequence + (self._rank << RANK_SHIFT))

    def close(self) -> None:
        """Completes the last shard; a writer that was given no token leaves one empty shard, so the shape is known."""
        self._shards.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What was recorded before an error elsewhere is good, and often dear: keep it.
        self.close()


@check_types
def write_trace(trace: RoutingTrace, target: Source, *, model: ModelSpec | None = None) -> None:
    """Writes a trace held in memory; `read_trace` gives the same trace back.

    Args:
        trace: the tokens.
        target: a folder, which gets shards; or a binary file object, which gets all tokens as one shard.
        model: the recorded model, kept in every shard; default the trace's own.

    Raises:
        InputError: the folder already holds a trace. OSError: it cannot be written; nothing of it stays behind.
    """
    header = TraceHeader(trace.num_experts, trace.top_k, trace.moe_layers, model or trace.model, trace.whole_batches)
    schema = trace_schema(
        header,
        gate_weights=trace.gate_weights is not None,
        step=trace.step is not None,
        source=trace.source is not None,
    )
    opened = path_or_file(target)
    if isinstance(opened, Path):
        with full_disk_told(opened):
            shards = _ShardSequence(opened, schema, header, 0, ROWS_PER_SHARD)
            try:
                shards.add(trace, trace.workloads, trace.sequence)
                shards.close()
            except BaseException as error:
                # Some shards of a whole trace would be read as all of it.
                shards.discard(error)
                raise
        return
    position = _narrow("position", trace.position)
    rows = _rows_per_group(header)
    with _parquet_writer(opened, schema) as parquet:
        for start in range(0, trace.num_tokens, rows):
            part = slice(start, start + rows)
            parquet.write_table(_table(schema, trace, trace.workloads, trace.sequence, position, part))


class _ShardSequence:
    """Row groups into the shards of one rank, each shard renamed into place when full."""

    def __init__(self, folder: Path, schema: Any, header: TraceHeader, rank: int, rows_per_shard: int) -> None:
        self.columns = tuple(schema.names)
        self._folder, self._schema = folder, schema
        self._rank, self._rows_per_shard = rank, rows_per_shard
        self._rows_per_group = min(_rows_per_group(header), rows_per_shard)
        self._waiting: list[Any] = []
        self._waiting_rows = self._shard_rows = self._shard = 0
        self._open: contextlib.ExitStack | None = None
        self._closed = False
        self._parquet: Any = None
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; a trace is written into a folder")
        self._made = missing_folders(folder)
        try:
            self._claim = _claim(folder, rank)
        except OSError:
            remove_empty(self._made)
            raise
        taken = sorted(folder.glob(f"rank{rank:05d}-*.parquet")) if folder.is_dir() else []
        if taken:
            self._claim.close()
            raise InputError(f"{folder} already holds shards of rank {rank} ({taken[0].name}); give an empty folder")

    def add(self, block: RoutingTrace, workloads: tuple[str, ...], sequence: IntArray) -> None:
        """Appends a block; workloads names its workload codes, sequence is stored in place of its own."""
        if self._closed:
            raise InputError("this TraceWriter is closed; open another with another folder or rank")
        position = _narrow("position", block.position)
        start = 0
        while start < block.num_tokens:
            free = min(self._rows_per_group - self._waiting_rows, self._rows_per_shard - self._shard_rows)
            stop = min(block.num_tokens, start + free)
            self._waiting.append(_table(self._schema, block, workloads, sequence, position, slice(start, stop)))
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
        self._claim.close()

    def discard(self, error: BaseException) -> None:
        """Ends the writer, and removes every shard written so far."""
        try:
            self._end(error)
        finally:
            for shard in range(self._shard):
                self._path(shard).unlink(missing_ok=True)
            remove_empty(self._made)

    def _path(self, shard: int) -> Path:
        return self._folder / f"rank{self._rank:05d}-{shard:05d}.parquet"

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
        self._open = contextlib.ExitStack()
        with self._dropping_on_error():
            scratch = self._open.enter_context(replacing(self._path(self._shard)))
            self._parquet = _parquet_writer(scratch, self._schema)

    def _finish_shard(self) -> None:
        with self._dropping_on_error():
            assert self._open is not None
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
            self._end(error)
            raise

    def _end(self, error: BaseException) -> None:
        """Ends the writer without its torn shard, and without a folder where that would be empty."""
        opened, self._open = self._open, None
        self._closed, self._parquet = True, None
        try:
            if opened is not None:
                opened.__exit__(type(error), error, error.__traceback__)
        finally:
            self._claim.close()
            remove_empty(self._made)


def _claim(folder: Path, rank: int) -> contextlib.ExitStack:
    """Claims a rank's shards in a folder until it is closed, or the process ends however it does: two recordings into
    one folder would replace each other's shards.

    Raises:
        InputError: another writer has the claim.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".rank{rank:05d}.lock"
    with contextlib.ExitStack() as claim:
        handle = claim.enter_context(path.open("wb"))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{folder}: rank {rank} is being recorded here by another writer; give each recording its own folder"
            ) from None
        # Taken away while it is held: who opened it before finds our shards, or our claim.
        claim.callback(path.unlink, missing_ok=True)
        return claim.pop_all()


def _rows_per_group(header: TraceHeader) -> int:
    return min(max(IDS_PER_ROW_GROUP // header.ids_per_token, 256), 1 << 16)


def _table(
    schema: Any,
    block: RoutingTrace,
    workloads: tuple[str, ...],
    sequence: IntArray,
    position: npt.NDArray[np.int32],
    rows: slice,
) -> Any:
    """Some tokens as an Arrow table."""
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
    for field in schema:
        column = values[field.name]
        assert column is not None
        part = np.ascontiguousarray(column[rows])
        if field.name == "workload":
            arrays.append(pa.DictionaryArray.from_arrays(part.astype(np.int32), pa.array(workloads, pa.string())))
        elif part.ndim == 3:
            flat = pa.array(part.reshape(-1), field.type.value_type)
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
        else:
            arrays.append(pa.array(part, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _parquet_writer(target: Any, schema: Any) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetWriter(
        target,
        schema,
        compression="zstd",
        compression_level=3,
        write_page_checksum=True,
        use_dictionary=["expert_ids.list.element", "workload"],
        column_encoding={
            **dict.fromkeys(INTEGER_COLUMNS, "DELTA_BINARY_PACKED"),
            "gate_weights.list.element": "BYTE_STREAM_SPLIT",
        },
    )


def _narrow(name: str, values: IntArray) -> npt.NDArray[np.int32]:
    if len(values) and not (values.min() >= 0 and values.max() < 1 << 31):
        raise InputError(f"{name} runs from {values.min()} to {values.max()}; it must be from 0 to 2**31 - 1")
    return values.astype(np.int32)


# Reading: shards are opened and row groups decoded, and nothing in them is trusted.


@check_types
def read_trace(path: Source) -> RoutingTrace:
    """The whole trace of a folder of shards, or of one shard, in memory.

    Args:
        path: of the folder or the shard, or a shard as a binary file object that can seek.

    Returns:
        All tokens, in the order of the files' names.

    Raises:
        FileFormatError: as `scan_trace`.
    """
    return trace_of_shards(trace_shards(path))


@check_types
def scan_trace(path: Source, tokens: int = 65536) -> Iterator[RoutingTrace]:
    """Blocks of at most `tokens` tokens of a folder of shards or of one shard, in the order of the files' names.

    One row group is in memory at a time. Everything read is validated.

    Raises:
        FileFormatError: a file that is truncated, ragged, of a newer version, or at odds with the other shards.
    """
    if tokens < 1:
        raise InputError(f"tokens ({tokens}) must be at least 1")
    for shard in trace_shards(path):
        for group in range(shard.row_groups):
            yield from read_row_group(shard, group, tokens=tokens)


def read_header(path: Source) -> TraceHeader:
    """Shape and model of a trace, without its tokens.

    Raises:
        FileFormatError: as `scan_trace`.
    """
    return trace_shards(path)[0].header


def empty_trace(header: TraceHeader) -> RoutingTrace:
    """A trace of that shape without tokens."""
    shape = (0, len(header.moe_layers), header.top_k)
    trace = RoutingTrace.from_arrays(
        np.empty(shape, np.int64), header.num_experts, workload=np.empty(0, str), moe_layers=header.moe_layers
    )
    return replace(trace, model=header.model, whole_batches=header.batches)


@dataclass(frozen=True)
class TraceShard:
    """One checked Parquet file of a trace. rows: tokens in each row group. columns: those present."""

    source: Path | BinaryIO
    header: TraceHeader
    rows: tuple[int, ...]
    columns: tuple[str, ...]

    @property
    def name(self) -> str:
        """What errors call it."""
        return name_of(self.source)

    @property
    def row_groups(self) -> int:
        return len(self.rows)


def trace_shards(path: Source | Sequence[Source]) -> tuple[TraceShard, ...]:
    """The shards of a folder in the order of their names, or the one file, or the files given; all of one shape.

    Raises:
        InputError: no such path. FileFormatError: no shard there, one that is damaged or of a newer version, or shards
            that disagree.
    """
    if isinstance(path, Sequence) and not isinstance(path, str):
        files = [path_or_file(file) for file in path]
    else:
        source = path_or_file(path)
        if isinstance(source, Path) and not source.exists():
            raise InputError(f"{source}: no such file or folder")
        files = [*sorted(source.glob("*.parquet"))] if isinstance(source, Path) and source.is_dir() else [source]
    if not files:
        raise FileFormatError(
            f"{path}: no .parquet file in this folder; expected the shards of a recording (rank00000-00000.parquet, "
            "...). A recording that was killed early leaves only .tmp files, which hold no whole shard: record again"
        )
    shards = tuple(_open_shard(file) for file in files)
    first = shards[0]
    for shard in shards[1:]:
        for name in ("num_experts", "top_k", "moe_layers"):
            here, there = getattr(shard.header, name), getattr(first.header, name)
            if here != there:
                raise FileFormatError(
                    f"{shard.name}: {name} is {here}, but {there} in {Path(first.name).name}; the shards are of "
                    "different models or recordings: keep each recording in its own folder"
                )
        if set(shard.columns) != set(first.columns):
            raise FileFormatError(
                f"{shard.name}: columns {', '.join(shard.columns)}, but {', '.join(first.columns)} in "
                f"{Path(first.name).name}; keep each recording in its own folder"
            )
    return shards


def is_trace(path: Path) -> bool:
    """Whether `path` is a Parquet file, or a folder that holds some."""
    if path.is_dir():
        return any(path.glob("*.parquet"))
    with path.open("rb") as handle:
        return handle.read(4) == MAGIC


def trace_of_shards(shards: Sequence[TraceShard]) -> RoutingTrace:
    """The tokens of shards that are open already.

    Raises:
        FileFormatError: as `read_row_group`.
    """
    blocks = [block for shard in shards for group in range(shard.row_groups) for block in read_row_group(shard, group)]
    return RoutingTrace.concatenate(blocks) if blocks else empty_trace(shards[0].header)


def read_row_group(
    shard: TraceShard, group: int, *, tokens: int | None = None, routing_only: bool = False
) -> Iterator[RoutingTrace]:
    """Blocks of at most `tokens` tokens of one row group (None: all of it in one).

    routing_only leaves gate weights unread.

    Raises:
        FileFormatError: the row group is damaged, ragged, or holds ids that are not possible.
    """
    rows = shard.rows[group]
    where = f"{shard.name}, row group {group}"
    header = shard.header
    skipped = ("gate_weights",) if routing_only else ()
    known = (*REQUIRED_COLUMNS, *INTEGER_COLUMNS, "gate_weights")
    names = [name for name in shard.columns if name in known and name not in skipped]
    columns: dict[str, Any] = {}
    with _shard_open(shard, where) as file:
        table = file.read_row_group(group, columns=names, use_threads=False)
    if table.num_rows != rows:
        raise FileFormatError(f"{where}: {table.num_rows:,} rows, the footer says {rows:,}")
    for name in names:
        with _arrow_errors(f"{where}, column {name!r}"):
            columns[name] = _decode(f"{where}, column {name!r}", name, table[name], header)
        table = table.drop_columns([name])
    width = rows if tokens is None else tokens
    for start in range(0, rows, max(width, 1)):
        part = slice(start, min(rows, start + width))
        yield _block(f"{where}, rows {part.start} to {part.stop - 1}", header, columns, part)


def count_streams(shard: TraceShard, group: int) -> Counter[Stream]:
    """Tokens of each (rank, workload) in a row group; reads those two columns alone."""
    where = f"{shard.name}, row group {group}"
    names = [name for name in ("workload", "source") if name in shard.columns]
    with _shard_open(shard, where) as file:
        table = file.read_row_group(group, columns=names, use_threads=False)
        columns = {name: _decode(f"{where}, column {name!r}", name, table[name], shard.header) for name in names}
    tags, codes = columns["workload"]
    ranks, rank_codes = np.unique(columns.get("source", np.zeros(len(codes), np.int64)), return_inverse=True)
    tally = np.bincount(rank_codes * len(tags) + codes, minlength=len(ranks) * len(tags))
    return Counter(
        {(int(ranks[i // len(tags)]), str(tags[i % len(tags)])): int(tally[i]) for i in np.flatnonzero(tally)}
    )


@contextlib.contextmanager
def _shard_open(shard: TraceShard, where: str) -> Iterator[Any]:
    with _arrow_errors(where), _parquet_file(shard.source, page_checksum_verification=True) as file:
        yield file


def _parquet_file(source: Path | BinaryIO, **options: Any) -> Any:
    import pyarrow.parquet as pq

    if not isinstance(source, Path):
        source.seek(0)
    return pq.ParquetFile(source, **options)


@contextlib.contextmanager
def _arrow_errors(what: str) -> Iterator[None]:
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


def _decode(where: str, name: str, column: Any, header: TraceHeader) -> Any:
    """One column as numpy: numbers [T], lists [T, L, k]; the workload as (tags, codes)."""
    import pyarrow as pa

    if column.null_count:
        raise FileFormatError(f"{where}: {column.null_count} of {len(column)} values are missing")
    if name == "workload":
        array = column.combine_chunks().dictionary_encode()
        array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
        names, codes = array.dictionary.to_pylist(), array.indices.to_numpy(zero_copy_only=False)
        if codes.size and not 0 <= codes.min() <= codes.max() < len(names):
            raise FileFormatError(f"{where}: damaged: workloads that the column does not name")
        return names, codes
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
        trace = RoutingTrace.from_arrays(
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
    return replace(trace, model=header.model, whole_batches=header.batches)


def _open_shard(source: Path | BinaryIO) -> TraceShard:
    name = name_of(source)
    with reading(source) as handle:
        size = size_of(handle)
    with _arrow_errors(name), _parquet_file(source) as file:
        metadata, schema = file.metadata, file.schema_arrow
        header = TraceHeader.decode(schema.metadata, name)
        _check_columns(name, schema)
        rows = tuple(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
        _check_rows(name, size, metadata, rows, header)
        _check_chunks_parse(file, rows)
        _check_sizes(name, size, metadata, rows, header)
    return TraceShard(source, header, rows, tuple(schema.names))


def _check_columns(file: str, schema: Any) -> None:
    import pyarrow.types as types

    for name in REQUIRED_COLUMNS:
        if name not in schema.names:
            raise FileFormatError(f"{file}: column {name!r} is missing; found {', '.join(schema.names)}")
    if len(set(schema.names)) < len(schema.names):
        raise FileFormatError(f"{file}: a column name stands twice in {', '.join(schema.names)}")
    for name in ("expert_ids", "gate_weights"):
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        is_number = types.is_integer if name == "expert_ids" else types.is_floating
        if not (types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind)) or not is_number(
            kind.value_type
        ):
            number = "whole numbers" if name == "expert_ids" else "floating-point numbers"
            raise FileFormatError(f"{file}: column {name!r} has type {kind}, expected a list of {number}")
    for name in INTEGER_COLUMNS:
        if name in schema.names and not types.is_integer(schema.field(name).type):
            raise FileFormatError(f"{file}: column {name!r} has type {schema.field(name).type}, expected whole numbers")
    kind = schema.field("workload").type
    text = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(text) or types.is_large_string(text) or types.is_string_view(text)):
        raise FileFormatError(f"{file}: column 'workload' has type {kind}, expected strings")


def _check_chunks_parse(file: Any, rows: tuple[int, ...]) -> None:
    """Arrow's own reader goes over each group's columns before `metadata.column` may: that accessor lets C++ exceptions
    about damaged column statistics end the process, the reader turns them into Python's."""
    for group in range(len(rows)):
        next(file.iter_batches(batch_size=1, row_groups=[group], use_threads=False), None)


def _check_rows(name: str, size: int, metadata: Any, rows: tuple[int, ...], header: TraceHeader) -> None:
    """The number of rows that the footer declares must be possible for a file of this size."""
    total = sum(rows) * header.ids_per_token
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise FileFormatError(f"{name}: row groups hold {sum(rows):,} rows, the footer says {metadata.num_rows:,}")
    if total > max(SMALL_FILE_IDS, size * IDS_PER_BYTE_LIMIT):
        raise FileFormatError(
            f"{name}: the footer declares {total:,} expert ids, more than a file of {size:,} bytes can sensibly hold; "
            "the header is damaged"
        )
    for group, count in enumerate(rows):
        if count * header.ids_per_token > ROW_GROUP_ID_LIMIT:
            raise FileFormatError(
                f"{name}, row group {group}: {count:,} rows of {header.ids_per_token} expert ids, more than the "
                f"{ROW_GROUP_ID_LIMIT:,} ids a row group may hold; rewrite the file with smaller row groups"
            )


def _check_sizes(name: str, size: int, metadata: Any, rows: tuple[int, ...], header: TraceHeader) -> None:
    """What the footer declares of columns must be possible for a file of this size, before all of it is decoded."""
    for group, count in enumerate(rows):
        chunks = metadata.row_group(group)
        for index in range(chunks.num_columns):
            chunk = chunks.column(index)
            column = chunk.path_in_schema.partition(".")[0]
            expected = count * (header.ids_per_token if column in ("expert_ids", "gate_weights") else 1)
            if column in REQUIRED_COLUMNS + INTEGER_COLUMNS + ("gate_weights",) and chunk.num_values != expected:
                raise FileFormatError(
                    f"{name}, row group {group}, column {column!r}: {chunk.num_values:,} values, expected {expected:,} "
                    f"({count:,} rows, {len(header.moe_layers)} layers, top-{header.top_k}); the file is ragged"
                )
            if chunk.total_compressed_size > size or chunk.total_uncompressed_size > 8 * expected + (1 << 26):
                raise FileFormatError(
                    f"{name}, row group {group}, column {column!r}: {chunk.total_uncompressed_size:,} bytes for "
                    f"{expected:,} values; the header is damaged"
                )
