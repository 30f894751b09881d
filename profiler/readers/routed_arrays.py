"""Arrays of routed experts as engines hand them out: .npy bytes, .npz members, base64 text."""

from __future__ import annotations

import base64
import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...placement.errors import FileFormatError
from ..zip_members import checked_members

MAGIC = b"\x93NUMPY"
START = 1 << 12
GROWTH = 50
"""How many times its own size an .npz may unpack to."""
SMALL = 1 << 20

Ids = npt.NDArray[np.integer[Any]]


def npy_shape(source: Path, field: str, start: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """(shape, column order, type, where the data begin) of .npy bytes, of which only the start is needed."""
    handle = io.BytesIO(start)
    try:
        version = np.lib.format.read_magic(handle)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(handle)
    except Exception as error:  # noqa: BLE001 - numpy evaluates the header, and lets any error through
        raise FileFormatError(f"{source}: {field} is no .npy array ({str(error)[:100]})") from None
    return shape, fortran, dtype, handle.tell()


def npy_array(source: Path, field: str, content: bytes) -> Ids:
    """[T, L, K] whole numbers of .npy bytes, whose size must be what their header says."""
    shape, fortran, dtype, begin = npy_shape(source, field, content)
    _check_array(source, field, shape, dtype, len(content) - begin)
    return np.frombuffer(content, dtype, offset=begin).reshape(shape, order="F" if fortran else "C")


def npy_mapped(source: Path) -> Ids:
    """[T, L, K] whole numbers of an .npy file, mapped."""
    with source.open("rb") as handle:
        start = handle.read(START)
    shape, fortran, dtype, begin = npy_shape(source, "array", start)
    size = source.stat().st_size - begin
    _check_array(source, "array", shape, dtype, size)
    if not size:
        return np.empty(shape, dtype)
    return np.memmap(source, dtype, "r", begin, shape, "F" if fortran else "C")


def npy_mapped_table(source: Path) -> Ids | None:
    """[rows, columns] whole numbers of an .npy file, mapped: none where it is damaged or holds something else; None for three dimensions."""
    with source.open("rb") as handle:
        start = handle.read(START)
    shape, fortran, dtype, begin = npy_shape(source, "array", start)
    wanted = math.prod(shape) * dtype.itemsize
    if len(shape) == 3 and dtype.kind in "iu":
        return None
    if len(shape) != 2 or dtype.kind not in "iu" or min(shape) < 1 or wanted > source.stat().st_size - begin:
        return np.empty((0, 0), np.int64)
    return np.memmap(source, dtype, "r", begin, shape, "F" if fortran else "C")


def npz_arrays(source: Path) -> dict[str, Ids]:
    """The arrays of an .npz by name, each [T, L, K].

    Raises:
        FileFormatError: damaged, unpacking to more than 50 times the file, or other arrays.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            members = checked_members(source, archive)
            total = sum(member.file_size for member in members)
            if total > max(SMALL, GROWTH * source.stat().st_size):
                raise FileFormatError(f"{source}: unpacks to {total:,} bytes, over {GROWTH} times the file; refused")
            arrays: dict[str, Ids] = {}
            for member in members:
                with archive.open(member) as handle:
                    content = handle.read(member.file_size + 1)
                name = member.filename.removesuffix(".npy")
                arrays[name] = npy_array(source, name[:60], content)
            return arrays
    except FileFormatError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        raise FileFormatError(f"{source}: damaged .npz ({error})") from None


def is_routed_arrays(path: Path) -> bool:
    """Whether a file is an .npy of whole numbers in three dimensions, or an .npz of such arrays and nothing else."""
    with path.open("rb") as handle:
        start = handle.read(START)
    try:
        if start.startswith(MAGIC):
            return _fits(path, start)
        if not start.startswith(b"PK"):
            return False
        with zipfile.ZipFile(path) as archive:
            members = checked_members(path, archive)
            for member in members:
                with archive.open(member) as packed:
                    if not _fits(path, packed.read(START)):
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


def base64_array(source: Path, field: str, text: str) -> Ids:
    """[T, L, K] of vLLM's base64 .npy, or [N] int32 of SGLang's, which says no shape."""
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise FileFormatError(f"{source}: {field} is not base64 ({error})") from None
    if content.startswith(MAGIC):
        return npy_array(source, field, content)
    if len(content) % 4:
        raise FileFormatError(f"{source}: {field} holds {len(content)} bytes, expected .npy bytes or int32 values")
    return np.frombuffer(content, "<i4")


def _check_array(source: Path, field: str, shape: tuple[int, ...], dtype: np.dtype[Any], stored: int) -> None:
    if len(shape) != 3 or dtype.kind not in "iu":
        raise FileFormatError(f"{source}: {field} is {dtype} {shape}, expected whole numbers [tokens, layers, top_k]")
    size = math.prod(shape) * dtype.itemsize
    if any(n < 0 for n in shape) or size != stored:
        raise FileFormatError(f"{source}: {field} has shape {shape} of {size:,} bytes in {stored:,}; damaged")


def _fits(path: Path, start: bytes) -> bool:
    shape, _, dtype, _ = npy_shape(path, "array", start)
    return len(shape) == 3 and dtype.kind in "iu"
