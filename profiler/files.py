"""Files that nobody vouches for: opened from a path or a binary file object, and checked before they are believed; JSON
too large to parse at once, its items one by one in bounded memory."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..placement.errors import FileFormatError
from ..placement.files import no_file, replacing

Source = str | os.PathLike[str] | BinaryIO
"""What readers and writers take: a path, or a binary file object, which is used from its beginning and left open."""

NPY_MAGIC = b"\x93NUMPY"
NPY_HEADER = 1 << 12
"""Bytes in which the header of an .npy file lies."""


def path_or_file(source: Source) -> Path | BinaryIO:
    """A path as `Path`, a file object as it is."""
    return Path(source) if isinstance(source, str | os.PathLike) else source


def name_of(source: Path | BinaryIO) -> str:
    """What errors call the source: its path, the name of a file object that has one, else "file"."""
    if isinstance(source, Path):
        return str(source)
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else "file"


@contextlib.contextmanager
def reading(source: Path | BinaryIO) -> Iterator[BinaryIO]:
    """The source open at its beginning.

    Raises:
        InputError: no such file.
    """
    if isinstance(source, Path):
        if not source.is_file():
            raise no_file(source)
        with source.open("rb") as handle:
            yield handle
    else:
        source.seek(0)
        yield source


@contextlib.contextmanager
def writing(target: Path | BinaryIO) -> Iterator[Path | BinaryIO]:
    """Where to write: a scratch file that takes the path's place once it is whole, or the file object."""
    if isinstance(target, Path):
        with replacing(target) as scratch:
            yield scratch
    else:
        yield target


def size_of(handle: BinaryIO) -> int:
    """Bytes in all; the position stays."""
    at = handle.tell()
    size = handle.seek(0, io.SEEK_END)
    handle.seek(at)
    return size


def npy_shape(name: str, field: str, start: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """(shape, column order, type, where the data begin) of .npy bytes, of which only the start is needed.

    Raises:
        FileFormatError: they are not .npy bytes.
    """
    handle = io.BytesIO(start)
    try:
        version = np.lib.format.read_magic(handle)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(handle)
    except Exception as error:  # noqa: BLE001 - numpy evaluates the header, and lets any error through
        raise FileFormatError(f"{name}: {field} is no .npy array ({str(error)[:100]})") from None
    return shape, fortran, dtype, handle.tell()


CHUNK = 1 << 16
ITEM_LIMIT = 1 << 26
"""Bytes that one item may take."""
DEPTH_LIMIT = 256
"""Containers inside one another: ijson keeps the whole way to each, which takes the square of the depth."""

BOM = b"\xef\xbb\xbf"
"""What some editors put before UTF-8."""
ESCAPES = re.compile(rb"\\.", re.DOTALL)
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def json_items(handle: BinaryIO, name: str, prefix: str, limit: int = ITEM_LIMIT) -> Iterator[Any]:
    """The values at `prefix`, as ijson names places ("" a value of the file, "item" one of a list at the top), of one
    or several JSON values one after another. Numbers with fractions are floats.

    name: of the file, for errors. limit: bytes an item may take.

    Raises:
        FileFormatError: not JSON, cut off, nested too deep, or more than `limit` bytes without an item.
    """
    import ijson

    checked = _Checked(handle, name, limit)
    items = ijson.items(checked, prefix, use_float=True, multiple_values=True, buf_size=CHUNK)
    while True:
        try:
            item = next(items, checked)
        except FileFormatError:
            raise
        except (ijson.JSONError, ValueError, OverflowError) as error:
            text = error.args[0] if error.args else error
            text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
            raise FileFormatError(f"{name}: damaged JSON before byte {checked.taken:,}: {_said(text)}") from None
        if item is checked:
            return
        yield item
        checked.since = 0


def _said(problem: str) -> str:
    first = problem.strip().split("\n")[0].strip()
    return "cut off" if "premature EOF" in first else first[:200] or "no value"


class _Checked:
    """The file as ijson reads it, watched for depth and for bytes that make up no item."""

    def __init__(self, handle: BinaryIO, name: str, limit: int) -> None:
        self._handle, self._name, self._limit = handle, name, limit
        self._depth, self._in_text, self._rest = 0, False, b""
        self.taken = self.since = 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes.

        Raises:
            FileFormatError: they go too deep, or too far without an item.
        """
        chunk = self._handle.read(size)
        if not self.taken:
            chunk = chunk.removeprefix(BOM)
        self.taken += len(chunk)
        self.since += len(chunk)
        if self.since > self._limit + CHUNK:
            raise FileFormatError(f"{self._name}: a value of more than {self._limit:,} bytes, or damaged")
        self._follow(chunk)
        return chunk

    def _follow(self, chunk: bytes) -> None:
        """Counts brackets outside text, in a few passes of C."""
        chunk = self._rest + chunk
        self._rest = b""
        if b"\\" in chunk:
            if (len(chunk) - len(chunk.rstrip(b"\\"))) % 2:
                chunk, self._rest = chunk[:-1], b"\\"
            chunk = ESCAPES.sub(b"", chunk)
        parts = chunk.split(b'"')
        outside = b"".join(parts[1 if self._in_text else 0 :: 2]).translate(None, NOT_BRACKETS)
        self._in_text ^= len(parts) % 2 == 0
        if not outside:
            return
        marks = np.frombuffer(outside, np.uint8)
        depth = self._depth + np.cumsum(np.where((marks == ord("[")) | (marks == ord("{")), 1, -1))
        self._depth = int(depth[-1])
        if depth.max() > DEPTH_LIMIT:
            raise FileFormatError(f"{self._name}: damaged JSON, nested more than {DEPTH_LIMIT} deep")
