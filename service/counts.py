"""Count windows as they arrive: JSON, or an Arrow stream."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, FailFast, Field

from ..db.records import CountWindow
from ..db.windows import TEXT_LENGTH, check_ended, narrow
from ..placement.errors import FileFormatError, InputError

JSON, ARROW = "application/json", "application/vnd.apache.arrow.stream"
MOST_WINDOWS = 512
DICTIONARY_BATCH = 2
"""The kind of an Arrow message, as its header has it."""
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Name = Annotated[str, Field(max_length=TEXT_LENGTH, pattern=r"^[^\x00]*$")]


def _possible(ended: datetime) -> datetime:
    try:
        return check_ended(ended)
    except InputError as error:
        raise ValueError(str(error)) from None


class WindowIn(BaseModel):
    """Tokens each expert [L, E] got in a span of traffic that ended at `ended`.

    source: who counted. A window sent again with the same four is stored once.
    """

    model_config = ConfigDict(extra="forbid")

    ended: Annotated[AwareDatetime, AfterValidator(_possible)]
    load: Annotated[list[Annotated[list[Count], FailFast()]], FailFast()]
    workload: Name = ""
    source: Name = ""


class WindowsIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    windows: Annotated[list[WindowIn], Field(min_length=1, max_length=MOST_WINDOWS), FailFast()]


def read_windows(kind: str, body: bytes, shape: tuple[int, int]) -> list[CountWindow]:
    """Reads a body of this content type, `JSON` or `ARROW`. shape: [layers, experts], which Arrow streams do not tell.
    Raises as `from_json`, `from_arrow`."""
    return from_arrow(body, *shape) if kind == ARROW else from_json(body)


def from_json(body: bytes) -> list[CountWindow]:
    """Reads a `WindowsIn`.

    Raises:
        ValidationError: of pydantic, naming the field.
    """
    parsed = WindowsIn.model_validate_json(body)
    return [
        CountWindow(entry.ended, _rectangular(entry.load, index), entry.workload, entry.source)
        for index, entry in enumerate(parsed.windows)
    ]


COLUMNS = {"ended", "load", "workload", "source"}
MOST_NAMED = 8
"""Columns of a stream that an error names."""


def from_arrow(body: bytes, layers: int, experts: int) -> list[CountWindow]:
    """Reads an Arrow stream of the columns ended (timestamp), load (list of layers * experts integers, layer by layer)
    and, where wanted, workload and source (text). Buffers must not be compressed: what is decoded is no larger than the
    body.

    Raises:
        FileFormatError: not an Arrow stream. InputError: a column is missing or of another type; it is named; or
            the stream is compressed, or of too many rows.
    """
    try:
        return _windows_of(body, layers, experts)
    except UnicodeDecodeError as error:
        # Of any name in the schema, such as a time zone's, which is read only where it is asked for.
        raise FileFormatError(f"not an Arrow stream, or damaged ({error})") from None


def _windows_of(body: bytes, layers: int, experts: int) -> list[CountWindow]:
    import pyarrow as pa

    try:
        rows = _announced_rows(body)
        if not 1 <= rows <= MOST_WINDOWS:
            raise InputError(f"windows: {rows} rows, 1 to {MOST_WINDOWS} are taken at once")
        with pa.ipc.open_stream(pa.BufferReader(body)) as reader:
            names = reader.schema.names
            if not set(names) <= COLUMNS or len(set(names)) != len(names):
                raise InputError(
                    f"columns {sorted(names)[:MOST_NAMED]}: expected ended, load, workload and source, once each"
                )
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, struct.error) as error:
        raise FileFormatError(f"not an Arrow stream, or damaged ({error})") from None
    ended = _times(table)
    loads = _loads(table, layers, experts)
    texts = {name: _texts(table, name) for name in ("workload", "source")}
    return [
        CountWindow(ended[row], loads[row], texts["workload"][row], texts["source"][row])
        for row in range(table.num_rows)
    ]


def _announced_rows(body: bytes) -> int:
    """Rows of all batches of an Arrow stream, from the messages' headers; no buffer is touched.

    Compression is refused: a few kilobytes of it become gigabytes.

    Raises:
        InputError: a buffer is compressed.
    """
    import pyarrow as pa

    rows = 0
    messages = pa.ipc.MessageReader.open_stream(pa.BufferReader(body))
    while True:
        try:
            message = messages.read_next_message()
        except StopIteration:
            return rows
        header = message.metadata.to_pybytes()
        # The second is how Arrow before 1.0 said it; readers still heed it.
        if message.type in ("record batch", "dictionary"):
            length, compressed = _batch_header(header)
            if compressed or b"ARROW:experimental_compression" in header:
                raise InputError(
                    "body: its buffers are compressed; write the Arrow stream without "
                    "(IpcWriteOptions(compression=None))"
                )
            rows += length if message.type == "record batch" else 0


def _batch_header(header: bytes) -> tuple[int, bool]:
    """(rows, whether buffers are compressed) of a record batch or dictionary, from the flatbuffer that describes it.

    Fields by their numbers in Arrow's format/Message.fbs. Raises struct.error for offsets that lead out of the header.
    """

    def pointed(at: int) -> int:
        return at + int(struct.unpack_from("<I", header, at)[0])

    def field(table: int, number: int) -> int:
        """Where a field of a table is, 0 where it is left out."""
        entries = table - int(struct.unpack_from("<i", header, table)[0])
        if entries < 0:
            raise struct.error("a table of negative offset")
        if int(struct.unpack_from("<H", header, entries)[0]) < 6 + 2 * number:
            return 0
        offset = int(struct.unpack_from("<H", header, entries + 4 + 2 * number)[0])
        return table + offset if offset else 0

    message = pointed(0)
    batch = pointed(field(message, 2))
    if struct.unpack_from("<B", header, field(message, 1))[0] == DICTIONARY_BATCH:
        batch = pointed(field(batch, 1))
    length = field(batch, 0)
    rows = int(struct.unpack_from("<q", header, length)[0]) if length else 0
    if rows < 0:
        raise struct.error(f"a batch of {rows} rows")
    return rows, bool(field(batch, 3))


def to_arrow(windows: Sequence[CountWindow]) -> bytes:
    """What `from_arrow` reads. Raises InputError for windows of different shapes, or none."""
    import pyarrow as pa

    size = {np.asarray(window.load).size for window in windows}
    if len(size) != 1:
        raise InputError("windows of different shapes cannot go together, nor none")
    loads = np.concatenate([np.asarray(window.load, np.int64).ravel() for window in windows])
    if loads.size and loads.min() >= 0:
        # What is negative travels as it is, to be refused by whoever keeps it.
        loads = narrow(loads)
    table = pa.table(
        {
            "ended": pa.array([window.ended.astimezone(UTC) for window in windows], pa.timestamp("us", "UTC")),
            "workload": pa.array([window.workload for window in windows], pa.string()),
            "source": pa.array([window.source for window in windows], pa.string()),
            "load": pa.FixedSizeListArray.from_arrays(pa.array(loads), size.pop()),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _rectangular(load: list[list[int]], index: int) -> Any:
    if not load or len({len(row) for row in load}) != 1:
        raise InputError(f"windows.{index}.load: rows of different lengths, or none; expected [layers][experts]")
    return np.array(load, dtype=np.int64)


def _column(table: Any, name: str) -> Any:
    if name not in table.column_names:
        raise InputError(f"column {name!r} is missing; ended and load are needed")
    column = table.column(name)
    # A window alone is most of what comes, and its columns are in one piece.
    column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if column.null_count:
        raise InputError(f"column {name!r} holds nulls")
    return column


def _times(table: Any) -> list[datetime]:
    import pyarrow as pa

    column = _column(table, "ended")
    if not pa.types.is_timestamp(column.type):
        raise InputError(f"column 'ended' is {column.type}, expected a timestamp")
    try:
        micro = column if column.type.unit == "us" else column.cast(pa.timestamp("us", tz=column.type.tz), safe=False)
        aware = [value if value.tzinfo else value.replace(tzinfo=UTC) for value in micro.to_pylist()]
        return [check_ended(value).astimezone(UTC) for value in aware]
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise InputError(f"column 'ended' holds a time out of range ({error})") from None


def _loads(table: Any, layers: int, experts: int) -> Any:
    import pyarrow as pa

    column = _column(table, "load")
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not pa.types.is_integer(kind.value_type):
        raise InputError(f"column 'load' is {kind}, expected a list of integers")
    values = column.flatten()
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    if (lengths != layers * experts).any() or values.null_count:
        raise InputError(f"column 'load': every row needs {layers} x {experts} = {layers * experts} integers")
    if pa.types.is_uint64(kind.value_type) and len(values) and values.to_numpy().max() > 1 << 53:
        raise InputError("column 'load' holds counts above 2**53")
    return values.to_numpy(zero_copy_only=False).astype(np.int64).reshape(-1, layers, experts)


def _texts(table: Any, name: str) -> list[str]:
    import pyarrow as pa
    import pyarrow.compute as pc

    if name not in table.column_names:
        return [""] * int(table.num_rows)
    column = _column(table, name)
    texts = column.dictionary if pa.types.is_dictionary(column.type) else column
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        raise InputError(f"column {name!r} is {column.type}, expected text")
    # Before one text of a dictionary becomes that of each row.
    spread = texts is not column and len(texts) and (pc.max(pc.utf8_length(texts)).as_py() or 0) > TEXT_LENGTH
    values = [] if spread else [str(value) for value in column.to_pylist()]
    if spread or max(map(len, values), default=0) > TEXT_LENGTH:
        raise InputError(f"column {name!r} holds texts of more than {TEXT_LENGTH} characters")
    return values
