"""Count windows as they arrive: JSON, or an Arrow stream."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from ..db.packed_counts import narrow
from ..db.service_records import CountWindow
from ..placement.errors import FileFormatError, InputError

JSON, ARROW = "application/json", "application/vnd.apache.arrow.stream"
MOST_WINDOWS = 512
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Name = Annotated[str, Field(max_length=100, pattern=r"^[^\x00]*$")]


class WindowIn(BaseModel):
    """Tokens each expert [L, E] got in a span of traffic that ended at `ended`.

    source: who counted. A window sent again with the same four is stored once.
    """

    model_config = ConfigDict(extra="forbid")

    ended: AwareDatetime
    load: list[list[Count]]
    workload: Name = ""
    source: Name = ""


class WindowsIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    windows: Annotated[list[WindowIn], Field(min_length=1, max_length=MOST_WINDOWS)]


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


def from_arrow(body: bytes, layers: int, experts: int) -> list[CountWindow]:
    """Reads an Arrow stream of the columns ended (timestamp), load (list of layers * experts integers, layer by layer) and,
    where wanted, workload and source (text).

    Raises:
        FileFormatError: not an Arrow stream. InputError: a column is missing or of another type; it is named.
    """
    import pyarrow as pa

    try:
        with pa.ipc.open_stream(pa.BufferReader(body)) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise FileFormatError(f"not an Arrow stream, or damaged ({error})") from None
    if not 1 <= table.num_rows <= MOST_WINDOWS:
        raise InputError(f"windows: {table.num_rows} rows, 1 to {MOST_WINDOWS} are taken at once")
    unknown = set(table.column_names) - {"ended", "load", "workload", "source"}
    if unknown or len(set(table.column_names)) != len(table.column_names):
        raise InputError(f"columns {sorted(table.column_names)}: expected ended, load, workload and source, once each")
    ended = _times(table)
    loads = _loads(table, layers, experts)
    texts = {name: _texts(table, name) for name in ("workload", "source")}
    return [
        CountWindow(ended[row], loads[row], texts["workload"][row], texts["source"][row])
        for row in range(table.num_rows)
    ]


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
    column = table.column(name).combine_chunks()
    if column.null_count:
        raise InputError(f"column {name!r} holds nulls")
    return column


def _times(table: Any) -> list[datetime]:
    import pyarrow as pa

    column = _column(table, "ended")
    if not pa.types.is_timestamp(column.type):
        raise InputError(f"column 'ended' is {column.type}, expected a timestamp")
    try:
        micro = column.cast(pa.timestamp("us", tz=column.type.tz), safe=False).to_pylist()
        return [(value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC) for value in micro]
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

    if name not in table.column_names:
        return [""] * int(table.num_rows)
    column = _column(table, name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise InputError(f"column {name!r} is {column.type}, expected text")
    return [str(value) for value in column.to_pylist()]
