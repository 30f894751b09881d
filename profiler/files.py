"""Files that nobody vouches for: opened from a path or a binary file object, and checked before they are believed."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..placement.errors import FileFormatError, InputError
from ..placement.files import replacing

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
            raise InputError(f"{source}: no such file")
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
