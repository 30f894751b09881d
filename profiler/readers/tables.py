"""Plain loads, as balancers take them: [layers, experts] or [windows, layers, experts] of .npy, .npz, .pt, JSON or CSV.

A folder of such files is one record: files of ranks are summed (`engine_counts.sum_ranks`), others follow in time.
Whole numbers may be expert ids as well: `check_kind` tells, or refuses with both readings.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..._tensor_files import load_plain, tensor_array
from ..._types import FloatArray
from ...placement.errors import FileFormatError, InputError
from ...placement.model_config import differing_layers
from ...placement.statistics import RoutingStatistics
from ..files import BOM, ITEM_LIMIT, NPY_MAGIC, json_items
from .arrays import (
    MOST_EXPERTS,
    ROWS_LOOKED_AT,
    Numbers,
    exchanged_axes,
    is_surely_ids,
    is_surely_loads,
    npy_numbers,
    npz_numbers,
    reading_of,
)
from .engine_counts import RankCounts, remark, statistics_of, sum_ranks
from .sglang import start_of

MOST_LAYERS = 1 << 12
"""More than any model has: larger numbers of layers are of something else."""
SUFFIXES = (".npy", ".npz", ".pt", ".json", ".csv")
START = 1 << 12
TEXT_LIMIT = ITEM_LIMIT
LOGICAL_COUNT = "logical_count"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2"
"""How the structure of a tensor alone begins, after two bytes for the protocol."""


class Table(NamedTuple):
    """Numbers of a file as they stand in it. name: of an array, or what holds them. layers: their numbers, where the
    file says them. counted: whether its first column was told to be counts."""

    name: str
    numbers: Numbers
    layers: tuple[int, ...] | None = None
    counted: bool = False


def is_loads(path: Path) -> bool:
    """Whether `path` holds bare numbers: a file, or a folder of such files and of nothing else."""
    if path.is_dir():
        files = _files(path)
        return bool(files) and len({_container(file) for file in files}) == 1 and _container(files[0]) != ""
    return _container(path) != ""


def read_loads(path: str | Path, *, num_experts: int | None = None) -> RoutingStatistics:
    """Reads loads; layers are numbered from 0 but where a CSV numbers them, and those that count nothing are left out.

    num_experts: how many each layer has, where that is known.

    Raises:
        InputError: no such path.
        FileFormatError: other shapes or types, damaged, files that differ in shape, layers that differ in experts, or
            axes in another order.
    """
    source = Path(path)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    files = _files(source) if source.is_dir() else [source]
    tables = [(file, table) for file in files for table in _tables(file)]
    parts = [
        RankCounts(file, None, _windows(file, table, num_experts), table.name if file.suffix == ".npz" else "")
        for file, table in tables
    ]
    if not parts:
        raise FileFormatError(f"{source}: no numbers in it; expected [layers, experts] or [windows, layers, experts]")
    shapes = sorted({part.counts.shape[1:] for part in parts})
    if len(shapes) > 1:
        raise FileFormatError(f"{source}: [layers, experts] are {shapes}, expected one shape of a model")
    numbered = {table.layers for _, table in tables}
    if len(numbered) > 1:
        raise FileFormatError(f"{source}: files number their layers otherwise; expected the same layers in each")
    summed = sum_ranks(parts)
    if len(parts) > 1 and len(summed) == len(parts):
        what, order = ("files", "order of their names") if len(files) > 1 else ("arrays", "order they stand in")
        remark(
            f"{source}: {len(parts)} {what} were taken for windows in time, in the {order}; those of ranks, which are "
            "summed, are told by names like rank0 and rank1"
        )
    layers = numbered.pop() or range(shapes[0][0])
    read = statistics_of(source, (window for rows in summed for window in rows), layers)
    if num_experts not in (None, read.experts):
        raise FileFormatError(
            f"{source}: loads {list(parts[0].counts.shape)} have {read.experts} experts a layer, not {num_experts}"
            + ("; counts of slots with replicas are to be summed by expert" if read.experts > num_experts else "")
        )
    return read


def check_loads(source: Path, num_experts: int | None) -> None:
    """Lets loads pass that are surely no expert ids.

    Raises:
        FileFormatError: whole numbers that may be ids, or are.
    """
    for file in _files(source) if source.is_dir() else [source]:
        if _container(file) in ("json object", "csv"):
            continue
        for _, numbers, _, _ in _tables(file):
            if numbers.size and numbers.ndim in (2, 3):
                whole = numbers.dtype.kind in "iu"
                if (whole or _is_whole(numbers)) and is_surely_ids(numbers, num_experts):
                    raise FileFormatError(
                        f"{file}: whole numbers {list(numbers.shape)} that are expert ids, by their range and repeats; "
                        "ids are read from .npy and .npz: np.save them, or say that they are loads (--as loads)"
                    )
                if whole and _container(file) != "json" and not is_surely_loads(numbers, num_experts):
                    raise FileFormatError(reading_of(file, numbers))


def _is_whole(numbers: Numbers) -> bool:
    """Whether floating-point numbers hold no fraction, as ids that went through floats."""
    some = numbers[:ROWS_LOOKED_AT]
    return bool(np.isfinite(some).all() and (np.abs(some) < MOST_EXPERTS).all() and (some == np.floor(some)).all())


def _files(folder: Path) -> list[Path]:
    """In the order of the numbers in their names: step2 comes before step10."""
    files = [file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file()]
    return sorted(files, key=lambda file: [part.zfill(20) for part in re.split(r"(\d+)", file.name)])


def _container(file: Path) -> str:
    """What holds the numbers, told by the first bytes; empty where nothing known does."""
    if not file.is_file():
        return ""
    with file.open("rb") as handle:
        start = handle.read(START)
    if start.startswith(NPY_MAGIC):
        return "npy"
    if start.startswith(b"PK"):
        pickled = start_of(file)
        if pickled:
            return "pt" if pickled[2:].startswith(TENSOR) else ""
        return "npz" if b".npy" in start[:200] else ""
    text = start.lstrip().removeprefix(BOM)
    if text.startswith(b"{"):
        return "json object" if b'"logical_count"' in text[:200] else ""
    if text.startswith(b"["):
        return "json" if text[1:].lstrip().startswith(b"[") else ""
    return "csv" if file.suffix == ".csv" and text[:1] else ""


def _tables(file: Path) -> Iterator[Table]:
    """The arrays of a file, with their names where they have some."""
    match _container(file):
        case "npy":
            yield Table("array", npy_numbers(file))
        case "npz":
            yield from (Table(name, numbers) for name, numbers in npz_numbers(file).items())
        case "pt":
            yield Table("tensor", tensor_array(file, "tensor", load_plain(file)))
        case "csv":
            yield _csv(file)
        case kind if kind:
            name = LOGICAL_COUNT if kind == "json object" else "list"
            yield Table(name, _json(file, kind == "json object"))
        case _:
            raise FileFormatError(
                f"{file}: no plain loads; expected .npy, .npz, a .pt tensor, CSV, or JSON: [layers][experts], "
                f'[windows][layers][experts] or {{"{LOGICAL_COUNT}": ...}}'
            )


def _windows(file: Path, table: Table, num_experts: int | None) -> npt.NDArray[Any]:
    """[W, L, E]."""
    name, numbers = table.name, table.numbers
    if numbers.ndim not in (2, 3) or 0 in numbers.shape or numbers.shape[-1] > MOST_EXPERTS:
        raise FileFormatError(
            f"{file}: {name} has shape {list(numbers.shape)}, expected loads [layers, experts] or [windows, layers, "
            f"experts], of at most {MOST_EXPERTS:,} experts"
        )
    if numbers.shape[-1] == 1:
        raise FileFormatError(
            f"{file}: {name} has shape {list(numbers.shape)}, one expert a layer: there is nothing to place. Expected "
            "[layers, experts] or [windows, layers, experts]; leave out an axis that is none of these"
        )
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        raise FileFormatError(f"{file}: {name} holds NaN or infinity; loads are finite and start at 0")
    if num_experts != numbers.shape[-1]:
        if not table.counted and _numbers_its_rows(numbers):
            raise FileFormatError(
                f"{file}: the first column counts up by one ({int(numbers[0, 0])}, {int(numbers[1, 0])}, "
                "...): the number of each layer, or what its first expert counts? "
                + (
                    "Name the columns in a first row: layer,0,1,2 or 0,1,2"
                    if table.name == CSV
                    else "Leave numbers of layers out, or say how many experts there are (--num-experts)"
                )
            )
        otherwise = ", or say how many experts its last axis has (--num-experts)"
        check_order(f"{file}: {name} {list(numbers.shape)}", numbers, otherwise)
    return numbers if numbers.ndim == 3 else numbers[None]


def check_order(what: str, numbers: Numbers, otherwise: str = "") -> None:
    """Refuses loads whose axes surely are in another order.

    Raises:
        FileFormatError: they are.
    """
    exchanged = exchanged_axes(numbers)
    if exchanged:
        raise FileFormatError(
            f"{what} is {exchanged}, by its totals: every layer counts as many choices of experts as the others. "
            f"Expected [layers, experts] or [windows, layers, experts]: transpose it{otherwise}"
        )


def _numbers_its_rows(numbers: Numbers) -> bool:
    """Whether a table's first column counts up by one, and no other does: numbers of the layers, not counts."""
    if numbers.ndim != 2 or len(numbers) < 3:
        return False
    counting = (np.diff(numbers.astype(np.float64), axis=0) == 1).all(axis=0)
    first = float(numbers[0, 0])
    return bool(counting[0]) and not counting[1:].any() and first.is_integer() and 0 <= first < MOST_LAYERS


def _json(file: Path, is_object: bool) -> Numbers:
    if file.stat().st_size > TEXT_LIMIT:
        raise FileFormatError(f"{file}: {file.stat().st_size:,} bytes of JSON; save as .npy, which has no such limit")
    with file.open("rb") as handle:
        values = list(json_items(handle, str(file), LOGICAL_COUNT if is_object else ""))
    if len(values) != 1:
        raise FileFormatError(f"{file}: {len(values)} JSON values, expected one table of loads")
    return nested_numbers(file, LOGICAL_COUNT if is_object else "the list", values[0])


def nested_numbers(file: Path, field: str, value: Any) -> Numbers:
    """Nested lists [L][E] or [W][L][E] of numbers as an array.

    Raises:
        FileFormatError: other values, or lists of different lengths; layers that differ in experts are named.
    """
    depth, inner = 0, value
    while isinstance(inner, list) and inner and depth < 4:
        depth, inner = depth + 1, inner[0]
    windows = [value] if depth == 2 else value
    if depth not in (2, 3) or not isinstance(windows, list) or not all(isinstance(w, list) for w in windows):
        raise FileFormatError(f"{file}: {field} is not [layers][experts] or [windows][layers][experts] of numbers")
    for number, window in enumerate(windows):
        for layer, row in enumerate(window):
            if not isinstance(row, list) or not row or not set(map(type, row)) <= {int, float}:
                other = (
                    next((v for v in row if type(v) not in (int, float)), "nothing") if isinstance(row, list) else row
                )
                raise FileFormatError(
                    f"{file}: {field}, window {number}, layer {layer} is no list of numbers, one an expert: it holds "
                    f"{json.dumps(other)[:40]}"
                )
            check_equal_experts(f"{file}: {field}, window {number}", layer, len(row), len(windows[0][0]))
        if len(window) != len(windows[0]):
            raise FileFormatError(
                f"{file}: {field}, window {number} has {len(window)} layers, the first {len(windows[0])}"
            )
    try:
        return np.array(windows if depth == 3 else value, np.float64 if _has_fractions(windows) else np.int64)
    except OverflowError:
        raise FileFormatError(f"{file}: {field} holds a number too large") from None


def check_equal_experts(where: str, layer: int, experts: int, first: int) -> None:
    """Refuses layers that differ in experts, which plans do not describe.

    Raises:
        FileFormatError: they differ.
    """
    if experts != first:
        raise FileFormatError(differing_layers(where, "the number of experts", 0, first, layer, experts))


def _has_fractions(windows: Sequence[Sequence[Sequence[Any]]]) -> bool:
    return any(type(value) is float for window in windows for row in window for value in row)


CSV = "table"


def _csv(file: Path) -> Table:
    """[L, E] of rows of numbers; with a head, a column `layer` numbers and orders the rows, and `window` parts them."""
    if file.stat().st_size > TEXT_LIMIT:
        raise FileFormatError(f"{file}: {file.stat().st_size:,} bytes of CSV; save as .npy, which has no such limit")
    try:
        text = file.read_text(encoding="utf-8-sig")
        rows = [row for row in csv.reader(io.StringIO(text), strict=True) if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileFormatError(f"{file}: damaged CSV ({error})") from None
    head = [_column(cell) for cell in rows[0]] if rows and _is_head(rows) else []
    body = rows[1:] if head else rows
    named = [name for name in ("window", "layer") if name in head]
    if {"expert", "count", "load", "tokens"} & set(head):
        raise FileFormatError(
            f"{file}: columns {', '.join(head)[:100]}: a row an expert is not read; expected a row a layer with one "
            "column an expert, and columns layer and window where wanted"
        )
    if not body:
        raise FileFormatError(f"{file}: no rows of numbers; expected a row a layer, a column an expert")
    width = len(head or body[0])
    values: Numbers = np.empty((len(body), width))
    for number, row in enumerate(body, 2 if head else 1):
        keyed = [_key(cell) if head and i < width and head[i] in named else cell for i, cell in enumerate(row)]
        if not all(map(_is_number, keyed)):
            raise FileFormatError(
                f"{file}: row {number} holds {_first_other(keyed)!r}, expected numbers with commas between them"
            )
        if head and len(row) != width:
            raise FileFormatError(f"{file}: row {number} has {len(row)} columns, the first names {width}")
        check_equal_experts(f"{file}: row {number}", number - 1 - bool(head), len(row), width)
        values[number - 1 - bool(head)] = [float(cell) for cell in keyed]
    keys = values[:, [head.index(name) for name in named]]
    values = values[:, _expert_columns(file, head, named) if head else slice(None)]
    if named:
        order = np.lexsort(keys.T[::-1])
        keys, values = keys[order], values[order]
        if len(np.unique(keys, axis=0)) < len(keys):
            raise FileFormatError(f"{file}: a {' and '.join(named)} stands twice; expected one row each")
    layers = keys[:, named.index("layer")] if "layer" in named else None
    if "window" in named:
        sizes = np.unique(keys[:, 0], return_counts=True)[1]
        if len(set(sizes.tolist())) > 1:
            raise FileFormatError(f"{file}: windows have {sizes.min()} to {sizes.max()} layers, expected one number")
        values = values.reshape(len(sizes), int(sizes[0]), values.shape[1])
        if layers is not None:
            by_window = layers.reshape(len(sizes), -1)
            if (by_window != by_window[0]).any():
                raise FileFormatError(f"{file}: windows have different layers, expected the same in each")
            layers = by_window[0]
    if layers is None:
        return Table(CSV, values, counted=bool(head))
    if (layers < 0).any() or (layers != np.floor(layers)).any() or layers.max() >= MOST_LAYERS:
        raise FileFormatError(f"{file}: column layer holds other than numbers of layers, from 0 on")
    return Table(CSV, values, tuple(int(layer) for layer in layers), counted=True)


LAYER_NAMES = ("layer", "layer_id", "layer_idx", "layer_index", "moe_layer", "layers", "")
"""Without a name stands the index that a frame of pandas is written with."""
WINDOW_NAMES = ("window", "step", "iteration", "iter", "interval")


def _is_head(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first row names columns: text, or the numbers of all experts in order."""
    first = rows[0]
    counted = len(first) > 2 and [cell.strip() for cell in first] == [str(i) for i in range(len(first))]
    return counted or not all(map(_is_number, first))


def _column(cell: str) -> str:
    name = cell.strip().lower()
    return "layer" if name in LAYER_NAMES else "window" if name in WINDOW_NAMES else name


def _key(cell: str) -> str:
    """The number of a layer or window, which may stand behind a word: `layer_3`."""
    match = re.fullmatch(r"[A-Za-z_. ]*?(\d{1,9})", cell.strip())
    return match[1] if match else cell


def _expert_columns(file: Path, head: Sequence[str], named: Sequence[str]) -> list[int]:
    """The columns of counts in the order of the experts that their names number, from 0 or from 1."""
    columns: dict[int, int] = {}
    for place, name in enumerate(head):
        if name in named:
            continue
        number = re.fullmatch(r"[^\d]*(\d{1,6})", name)
        if number is None or int(number[1]) in columns:
            raise FileFormatError(
                f"{file}: column {name[:60]!r} is no expert's number that stands once; name columns by experts (0 or "
                "expert_0), and layer and window where wanted"
            )
        columns[int(number[1])] = place
    first = min(columns, default=0)
    if first > 1 or sorted(columns) != list(range(first, first + len(columns))):
        raise FileFormatError(f"{file}: columns of experts {_some(sorted(columns))}, expected all from 0 on")
    if first == 1:
        remark(f"{file}: columns count experts from 1; the first was taken for expert 0")
    return [columns[number] for number in sorted(columns)]


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:6])) + (", ..." if len(numbers) > 6 else "")


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell)) and "_" not in cell
    except ValueError:
        return False


def _first_other(row: Sequence[str]) -> str:
    return next(cell for cell in row if not _is_number(cell))[:40]


# Recorded load histories of the ADRS benchmark: {"load_history": [{"logical_expert_load": [L][E]}, ...]}.

FIELD = "logical_expert_load"
ENTRIES_LOOKED_AT = 64


def is_load_history(path: Path) -> bool:
    """Whether `path` is a JSON object that begins with a load history."""
    if not path.is_file():
        return False
    with path.open("rb") as handle:
        start = handle.read(START)
    return start.lstrip().startswith(b"{") and b'"load_history"' in start


def read_load_history(path: str | Path, *, entries_per_window: int = 1) -> RoutingStatistics:
    """Reads a history of loads, in order, one entry at a time.

    entries_per_window: entries summed into a window; the benchmark's protocol solves on window i of 100 entries and
    judges on i + 1. What is left over at the end is a shorter window. Layers are numbered from 0 in the history,
    without dense ones. Memory: the windows, a few times, and one entry.

    Raises:
        InputError: no such file, entries_per_window below 1.
        FileFormatError: no such record, damaged, cut off, entries that differ in shape, or axes in another order.
    """
    source = Path(path)
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    if entries_per_window < 1:
        raise InputError(f"entries_per_window ({entries_per_window}) must be at least 1")
    windows: list[FloatArray] = []
    with source.open("rb") as handle:
        for number, entry in enumerate(json_items(handle, str(source), "load_history.item")):
            load = _load(source, number, entry)
            if windows and load.shape != windows[0].shape:
                raise FileFormatError(
                    f"{source}: load_history[{number}].{FIELD} has shape {load.shape}, the first {windows[0].shape}"
                )
            if number % entries_per_window:
                windows[-1] += load
            else:
                windows.append(load)
    if not windows:
        raise FileFormatError(f"{source}: load_history is empty or missing, or no list; expected a list of loads")
    check_order(f"{source}: {FIELD}", np.stack(windows[:ENTRIES_LOOKED_AT]))
    layers = range(len(windows[0]))
    windows.reverse()
    return statistics_of(source, (windows.pop() for _ in range(len(windows))), layers)


def _load(source: Path, number: int, entry: Any) -> FloatArray:
    """[L, E] of one entry."""
    rows = entry.get(FIELD) if isinstance(entry, dict) else None
    where = f"load_history[{number}].{FIELD}"
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise FileFormatError(f"{source}: {where} is not [layers][experts] of numbers")
    numbers = nested_numbers(source, where, rows)
    if numbers.ndim != 2 or numbers.shape[1] > MOST_EXPERTS:
        raise FileFormatError(f"{source}: {where} is not [layers][experts] of numbers")
    return numbers.astype(np.float64)
