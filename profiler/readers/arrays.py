"""Bare arrays of whole numbers, .npy and .npz: read with nothing trusted, and whether they are expert ids or loads."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from ..._tensor_files import checked_members
from ..._types import BoolArray
from ...placement.errors import FileFormatError
from ..files import NPY_HEADER, NPY_MAGIC, name_of, npy_shape, reading, size_of

GROWTH_LIMIT = 50
"""How many times its own size an .npz may unpack to."""
SMALL = 1 << 20

ROUTED = "routed_experts"
"""What engines call such arrays."""

MOST_LAYERS = 512
"""More rows than any model has layers."""
MOST_TOP_K = 64
MOST_IDS = 2048
"""More experts than any layer has: numbers from there on are counts."""
MOST_EXPERTS = 65536
ROWS_LOOKED_AT = 1 << 16
LEAST_SHARED_ROWS = 64
"""Choices of experts that must all name one, for it to be shared by all tokens rather than chosen by these."""
EXPECTED_PAIRS = 9.0
"""Expected pairs of equal numbers in a row, had they been counts: that none is seen has chance e^-9, 1 in 8,100."""

Ids = npt.NDArray[np.integer[Any]]
Numbers = npt.NDArray[Any]
Kind = Literal["tokens", "loads"]
"""What bare numbers are: expert ids of tokens, or loads of experts."""


def npy_array(name: str, field: str, content: bytes) -> Ids:
    """[T, L, K] whole numbers of .npy bytes, whose size must be what their header says.

    Raises:
        FileFormatError: other bytes, another shape or type, or damaged.
    """
    shape, fortran, dtype, begin = npy_shape(name, field, content)
    _check_array(name, field, shape, dtype, len(content) - begin)
    return np.frombuffer(content, dtype, offset=begin).reshape(shape, order="F" if fortran else "C")


def npy_file(source: Path | BinaryIO) -> Ids:
    """[T, L, K] whole numbers of an .npy file, mapped where it has a path.

    Raises:
        FileFormatError: as `npy_array`.
    """
    if not isinstance(source, Path):
        with reading(source) as handle:
            return npy_array(name_of(source), "array", handle.read())
    shape, fortran, dtype, begin = _header_of(source)
    size = source.stat().st_size - begin
    _check_array(str(source), "array", shape, dtype, size)
    if not size:
        return np.empty(shape, dtype)
    return np.memmap(source, dtype, "r", begin, shape, "F" if fortran else "C")


def npy_table(source: Path) -> Ids:
    """[rows, columns] whole numbers of an .npy file, mapped.

    Raises:
        FileFormatError: another shape or type, or damaged.
    """
    shape, fortran, dtype, begin = _header_of(source)
    if len(shape) != 2 or 0 in shape or dtype.kind not in "iu":
        raise FileFormatError(
            f"{source}: {dtype} {shape}, expected whole numbers of shape [tokens, layers]; "
            "for another layout load it and call RoutingTrace.from_arrays"
        )
    needed, size = math.prod(shape) * dtype.itemsize, source.stat().st_size - begin
    if min(shape) < 0 or needed > size:
        raise FileFormatError(f"{source}: damaged or cut off: {size:,} bytes for shape {shape} of {needed:,}")
    return np.memmap(source, dtype, "r", begin, shape, "F" if fortran else "C")


def npy_numbers(source: Path) -> Numbers:
    """Whole or floating-point numbers of an .npy file, mapped.

    Raises:
        FileFormatError: another type, or damaged.
    """
    shape, fortran, dtype, begin = _header_of(source)
    _check_numbers(str(source), "array", shape, dtype, source.stat().st_size - begin)
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(source, dtype, "r", begin, shape, "F" if fortran else "C")


def npz_numbers(source: Path) -> dict[str, Numbers]:
    """The arrays of an .npz by name, of whole or floating-point numbers.

    Raises:
        FileFormatError: damaged, unpacking to more than 50 times the file, or of another type.
    """

    def array(name: str, field: str, content: bytes) -> Numbers:
        shape, fortran, dtype, begin = npy_shape(name, field, content)
        _check_numbers(name, field, shape, dtype, len(content) - begin)
        return np.frombuffer(content, dtype, offset=begin).reshape(shape, order="F" if fortran else "C")

    return _npz(source, array)


def npz_arrays(source: Path | BinaryIO) -> dict[str, Ids]:
    """The arrays of an .npz by name, each [T, L, K].

    Raises:
        FileFormatError: damaged, unpacking to more than 50 times the file, or other arrays.
    """
    return _npz(source, npy_array)


def _npz(source: Path | BinaryIO, array: Callable[[str, str, bytes], Numbers]) -> dict[str, Numbers]:
    called = name_of(source)
    try:
        with reading(source) as handle, zipfile.ZipFile(handle) as archive:
            size = size_of(handle)
            members = checked_members(called, archive, size)
            total = sum(member.file_size for member in members)
            if total > max(SMALL, GROWTH_LIMIT * size):
                raise FileFormatError(
                    f"{called}: unpacks to {total:,} bytes, over {GROWTH_LIMIT} times the file; refused"
                )
            arrays: dict[str, Numbers] = {}
            for member in members:
                with archive.open(member) as packed:
                    content = packed.read(member.file_size + 1)
                name = member.filename.removesuffix(".npy")
                arrays[name] = array(called, name[:60], content)
            return arrays
    except FileFormatError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        raise FileFormatError(f"{called}: damaged .npz ({error})") from None


def holds_arrays(path: Path) -> bool:
    """Whether a file is an .npy of whole numbers in three dimensions, or an .npz of such arrays and nothing else."""
    with path.open("rb") as handle:
        start = handle.read(NPY_HEADER)
    try:
        if start.startswith(NPY_MAGIC):
            return _is_three_dimensional(start)
        if not start.startswith(b"PK"):
            return False
        with zipfile.ZipFile(path) as archive:
            members = checked_members(str(path), archive, path.stat().st_size)
            for member in members:
                with archive.open(member) as packed:
                    if not _is_three_dimensional(packed.read(NPY_HEADER)):
                        return False
            return bool(members)
    except (
        FileFormatError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        NotImplementedError,
        RuntimeError,
        ValueError,
    ):
        return False


def npy_is(path: Path, dimensions: int) -> bool:
    """Whether a file is an .npy of whole numbers in so many dimensions."""
    try:
        shape, _, dtype, _ = _header_of(path)
    except FileFormatError:
        return False
    return len(shape) == dimensions and dtype.kind in "iu"


def is_filled(ids: Ids) -> BoolArray:
    """[T, L] where the experts of a token differ, or all are the same: 0 of a dense layer, -1 of a cached token."""
    ordered = np.sort(ids, axis=2)
    steps = np.diff(ordered, axis=2)
    return np.asarray((steps > 0).all(axis=2) | ((steps == 0).all(axis=2) & (ordered[:, :, 0] <= 0)))


def fused_shared(blocks: Sequence[Ids], num_experts: int | None) -> int:
    """How many of each token's K experts are shared experts that the engine fused into the routed ones.

    They come after all others: ids E, E + 1, ... Where E is `num_experts`, every token has as many ids from there on;
    where it is not known, every token of 64 or more has each of the highest ids. blocks: [T, L, K] of one model; rows
    of zeros or with -1 are looked over.
    """
    rows = [block.reshape(-1, block.shape[2]) for block in blocks]
    rows = [part[(part > 0).any(axis=1) & (part >= 0).all(axis=1)] for part in rows]
    count, width = sum(map(len, rows)), rows[0].shape[1] if rows else 0
    if num_experts is not None:
        above = {int(number) for part in rows if len(part) for number in np.unique((part >= num_experts).sum(axis=1))}
        return above.pop() if len(above) == 1 and max(above) < width else 0
    highest = max((int(part.max()) for part in rows if len(part)), default=0)
    if count < LEAST_SHARED_ROWS:
        return 0
    present = [all((part == highest - back).any(axis=1).all() for part in rows) for back in range(min(4, width - 1))]
    return [*present, False].index(False)


def kind_of(source: Path, num_experts: int | None) -> Kind:
    """Whether the bare arrays of an .npy or .npz are expert ids or loads, where their numbers tell.

    The same bytes can be ids [tokens, layers] or [tokens, layers, top_k], and loads [layers, experts] or
    [windows, layers, experts]; see `is_surely_ids` and `is_surely_loads`. An .npz whose arrays are named as engines
    name routed experts holds ids. Numbers with fractions are loads.

    Raises:
        FileFormatError: both readings are possible; says how to tell. Or damaged.
    """
    kinds: set[Kind] = set()
    for array in _bare_arrays(source):
        if array.dtype.kind == "f" or not array.size:
            kinds.add("loads" if array.dtype.kind == "f" else "tokens")
        elif is_surely_ids(array, num_experts):
            check_axes(source, array)
            kinds.add("tokens")
        elif is_surely_loads(array, num_experts):
            kinds.add("loads")
        else:
            check_axes(source, array)
            raise FileFormatError(reading_of(source, array))
    if len(kinds) > 1:
        raise FileFormatError(f"{source}: some arrays are expert ids and others loads; keep them in files of their own")
    return kinds.pop() if kinds else "tokens"


def reading_of(source: Path, array: Numbers) -> str:
    """What whole numbers that may be ids or loads may be, and how to say which."""
    ids, loads = (
        ("[tokens, layers]", "[layers, experts]")
        if array.ndim == 2
        else ("[tokens, layers, top_k]", "[windows, layers, experts]")
    )
    return (
        f"{source}: whole numbers {list(array.shape)} up to {int(array.max()):,} may be expert ids {ids} or loads "
        f'{loads}. Say which: moeplace import --as tokens or --as loads; read_any(path, kind="tokens") or "loads"'
    )


def _bare_arrays(source: Path) -> list[Numbers]:
    """The arrays that nothing but their numbers tells of."""
    if not source.is_file():
        return []
    with source.open("rb") as handle:
        start = handle.read(len(NPY_MAGIC))
    if start == NPY_MAGIC:
        return [npy_numbers(source)]
    if not start.startswith(b"PK"):
        return []
    arrays = npz_numbers(source)
    return [] if any(name.endswith(ROUTED) for name in arrays) else list(arrays.values())


def is_surely_ids(array: Numbers, num_experts: int | None) -> bool:
    """Whether whole numbers are surely, or nearly so, expert ids. One of these holds:

    - `num_experts` is given, no number reaches it, and the last axis has another length (loads have that length);
    - [tokens, layers] (or top_k 1): more rows than any model has layers (512), and than any layer's numbers span;
    - [tokens, layers, top_k]: no row of at most 64 numbers holds one twice (blank rows apart), though of counts in the
      same range 9 pairs or more would be expected to be equal; and rows do not add up to one total in all layers, as
      loads do, every token choosing as many experts in each.
    """
    array = array[:ROWS_LOOKED_AT]
    if array.ndim not in (2, 3) or int(array.min()) < -1:
        return False
    if num_experts is not None and array.shape[-1] != num_experts and int(array.max()) < num_experts:
        return True
    if array.ndim == 2 or array.shape[2] == 1:
        table = array.reshape(len(array), -1).astype(np.int64)
        return len(table) > max(MOST_LAYERS, int(np.ptp(table, axis=0).max()) + 1)
    ids = array.astype(np.int64)
    chosen = (ids > 0).any(axis=2)
    if not are_choices(ids[chosen], int(ids.max()) + 1) or not is_filled(ids).all():
        return False
    used = ids[:, chosen.any(axis=0)].sum(axis=2)
    return used.shape[1] < 2 or bool((np.ptp(used, axis=1) > 0).any())


def are_choices(rows: Numbers, experts: int) -> bool:
    """Whether no row of at most 64 numbers below `experts` holds one twice, though 9 pairs or more would be expected to
    be equal by chance. rows: [tokens, numbers]."""
    columns = rows.shape[1]
    pairs = len(rows) * columns * (columns - 1) / 2 / max(experts, 1)
    if columns > MOST_TOP_K or pairs < EXPECTED_PAIRS:
        return False
    return bool(np.diff(np.sort(rows, axis=1), axis=1).all())


def is_surely_loads(array: Numbers, num_experts: int | None) -> bool:
    """Whether whole numbers are surely, or nearly so, loads. None is negative, and one of these holds:

    - in three dimensions a row holds a number above 0 twice, since a token chooses an expert once, and numbers or rows
      are more than any model's ids, or layers count about as much as one another;
    - the layers of a window add up to one total (those that count anything), though by chance that would be rarer than
      1 in 8,100: every token chooses as many experts in each;
    - `num_experts` is given, the last axis has that length, and a number reaches it;
    - the last axis is longer than any model has layers, or experts a token; in two dimensions with numbers that ids
      [layers, tokens] do not reach.
    """
    windows = array[None] if array.ndim == 2 else array[:ROWS_LOOKED_AT]
    if array.ndim not in (2, 3) or int(windows.min()) < 0 or array.shape[-1] > MOST_EXPERTS:
        return False
    highest = int(windows.max())
    too_long = (
        array.shape[-1] > MOST_TOP_K if array.ndim == 3 else array.shape[-1] > MOST_LAYERS and highest >= MOST_IDS
    )
    if too_long or highest >= MOST_EXPERTS:
        return True
    if num_experts is not None and array.shape[-1] == num_experts and highest >= num_experts:
        return True
    windows = windows.astype(np.int64)
    if array.ndim == 3:
        ordered = np.sort(windows, axis=2)
        repeats = ((np.diff(ordered, axis=2) == 0) & (ordered[:, :, 1:] > 0)).any()
        if repeats and (highest >= MOST_IDS or array.shape[-1] > MOST_TOP_K // 2 or _layers_are_near(windows)):
            return True
    totals = windows.sum(axis=2)
    surprise = 0.0
    for window in totals:
        counted = window[window > 0]
        if len(counted) and (counted != counted[0]).any():
            return False
        surprise += max(0, len(counted) - 1) * math.log(max(int(counted[0]), 1)) if len(counted) else 0.0
    return surprise >= EXPECTED_PAIRS


def exchanged_axes(array: Numbers) -> str | None:
    """In which other order loads surely have their axes, told by their totals: every token chooses as many experts in
    each layer, so that layers count as much as one another, and windows and experts do not."""
    numbers = array[:ROWS_LOOKED_AT]
    if 0 in numbers.shape or _surprise(numbers) is not None:
        return None
    for name, order in ORDERS[array.ndim].items():
        surprise = _surprise(numbers.transpose(order))
        if surprise is not None and surprise >= EXPECTED_PAIRS:
            return name
    return None


ORDERS: Mapping[int, Mapping[str, tuple[int, ...]]] = {
    2: {"[experts, layers]": (1, 0)},
    3: {"[windows, experts, layers]": (0, 2, 1), "[layers, windows, experts]": (1, 0, 2)},
}
"""How axes may be exchanged, and what brings them back."""


def _surprise(numbers: Numbers) -> float | None:
    """How unlikely it would be, as a logarithm, that layers agreed by chance in what they count; None where they do
    not agree. Layers that count nothing are looked over. numbers: [L, E] or [W, L, E]."""
    totals = numbers.sum(axis=-1, dtype=np.float64).reshape(-1, numbers.shape[-2])
    highest = totals.max(axis=1, keepdims=True)
    counted = totals != 0
    rounding = {2: 2e-3, 4: 1e-5}.get(numbers.dtype.itemsize, 1e-9) if numbers.dtype.kind == "f" else 0.0
    if (counted & (np.abs(totals - highest) > rounding * highest)).any():
        return None
    others = np.maximum(counted.sum(axis=1) - 1, 0)
    each = np.log(np.maximum(highest[:, 0], 1.0)) if (totals == np.floor(totals)).all() else -math.log(rounding or 1.0)
    return float((others * each).sum())


def check_axes(source: Path | str, ids: Ids) -> None:
    """Refuses ids [tokens, layers] or [tokens, layers, top_k] whose first two axes surely are exchanged.

    Raises:
        FileFormatError: they are.
    """
    if are_exchanged(ids.reshape(*ids.shape[:2], -1)):
        ends = ", top_k" if ids.ndim == 3 else ""
        raise FileFormatError(
            f"{source}: expert ids {list(ids.shape)} are [layers, tokens{ends}], by the experts that its rows prefer; "
            f"expected [tokens, layers{ends}]: save np.swapaxes(array, 0, 1)"
        )


def are_exchanged(ids: Ids) -> bool:
    """Whether ids [T, L, K] surely are [layers, tokens, K]: more layers than tokens, where the first axis tells far
    better which experts are chosen than the second. Layers prefer experts, each its own; a token has no number of an
    expert that it prefers in all layers."""
    ids = ids[:ROWS_LOOKED_AT]
    if ids.shape[1] <= ids.shape[0] or len(ids) < 2:
        return False
    first, second = _preference(ids), _preference(np.swapaxes(ids, 0, 1))
    return first > SURE_PREFERENCE and first > second


SURE_PREFERENCE = 6.0
"""Standard deviations above chance."""


def _preference(ids: Ids) -> float:
    """How far above chance rows [R, ...] differ in what they choose: chi-squared, in its standard deviations."""
    flat = ids.reshape(len(ids), -1).astype(np.int64)
    rows, columns = np.nonzero(flat >= 0)
    experts, choices = np.unique(flat[rows, columns], return_inverse=True)
    counts = np.bincount(rows * len(experts) + choices, minlength=len(flat) * len(experts)).reshape(len(flat), -1)
    expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / max(counts.sum(), 1)
    freedom = (len(flat) - 1) * (len(experts) - 1)
    if freedom < 1:
        return 0.0
    squared = np.divide((counts - expected) ** 2, expected, out=np.zeros_like(expected), where=expected > 0).sum()
    return float((squared - freedom) / math.sqrt(2 * freedom))


def _layers_are_near(windows: Numbers) -> bool:
    """Whether the layers of most windows count about as much as one another, as loads do though tokens were dropped."""
    totals = windows.sum(axis=2).astype(np.float64)
    totals = totals[:, totals.any(axis=0)]
    highest = totals.max(axis=1)
    return totals.shape[1] > 1 and bool(np.median((highest - totals.min(axis=1)) / np.maximum(highest, 1.0)) <= 0.2)


def _header_of(source: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    with source.open("rb") as handle:
        return npy_shape(str(source), "array", handle.read(NPY_HEADER))


def _check_array(name: str, field: str, shape: tuple[int, ...], dtype: np.dtype[Any], stored: int) -> None:
    if len(shape) != 3 or dtype.kind not in "iu":
        raise FileFormatError(f"{name}: {field} is {dtype} {shape}, expected whole numbers [tokens, layers, top_k]")
    size = math.prod(shape) * dtype.itemsize
    if any(n < 0 for n in shape) or size != stored:
        raise FileFormatError(f"{name}: {field} has shape {shape} of {size:,} bytes in {stored:,}; damaged")


def _check_numbers(name: str, field: str, shape: tuple[int, ...], dtype: np.dtype[Any], stored: int) -> None:
    if dtype.kind not in "iuf" or len(shape) not in (2, 3):
        raise FileFormatError(
            f"{name}: {field} is {dtype} {shape}, expected numbers: expert ids [tokens, layers] or [tokens, layers, "
            "top_k], or loads [layers, experts] or [windows, layers, experts]"
        )
    size = math.prod(shape) * dtype.itemsize
    if min(shape) < 0 or size != stored:
        raise FileFormatError(f"{name}: {field} has shape {shape} of {size:,} bytes in {stored:,}; damaged")


def _is_three_dimensional(start: bytes) -> bool:
    shape, _, dtype, _ = npy_shape("", "array", start)
    return len(shape) == 3 and dtype.kind in "iu"
