"""The safetensors format, as far as moving tensors between files needs it: checked headers, and copying byte ranges.

Format: an unsigned 64-bit length, a JSON header of that length, then the tensors without holes
(https://github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..placement.errors import FileFormatError

DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
MAX_HEADER = 100_000_000
"""Bytes, the format's own limit."""
MAX_RANK = 16
COPY_BYTES = 1 << 23


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `start` counts bytes from the beginning of the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checked header. raw: the file's first bytes up to the first tensor. tensors: in the order of their bytes."""

    file: Path
    raw: bytes
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True)
class ByteRange:
    file: Path
    start: int
    nbytes: int


def read_header(file: Path) -> Header:
    """Reads and checks a header, no tensor.

    Raises:
        FileFormatError: truncated, not safetensors, an unknown dtype, a tensor whose size is not its shape's, tensors
            that overlap, leave holes or do not end with the file; the tensor is named.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise FileFormatError(
                f"{file}: not a safetensors file, or truncated ({size:,} bytes, header said to take {length:,})"
            )
        text = handle.read(length)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{file}: the safetensors header is not valid JSON ({error})") from None
    if not isinstance(entries, dict):
        raise FileFormatError(f"{file}: the safetensors header is not a JSON object")
    entries.pop("__metadata__", None)
    base = 8 + length
    tensors = sorted((_stored(file, base, *entry) for entry in entries.items()), key=lambda t: (t.start, t.nbytes))
    end = base
    for tensor in tensors:
        if tensor.start != end:
            raise FileFormatError(f"{file}: tensor {tensor.name} starts at byte {tensor.start:,}, expected {end:,}")
        end += tensor.nbytes
    if end != size:
        raise FileFormatError(
            f"{file}: {size:,} bytes, the header describes {end:,}; truncated, or the header is of another file"
        )
    return Header(file, prefix + text, tuple(tensors))


def copy_ranges(ranges: Iterable[ByteRange], header: bytes, target: Path, report: Callable[[int], None]) -> None:
    """Writes `header` and then the ranges one after the other, through a buffer of a few megabytes.

    report: called with the bytes of each write.

    Raises:
        FileFormatError: a source ended early (it changed since its header was read).
    """
    buffer = memoryview(bytearray(COPY_BYTES))
    source: Any = None
    try:
        with target.open("wb") as out:
            out.write(header)
            report(len(header))
            for part in _joined(ranges):
                if source is None or source.name != str(part.file):
                    if source is not None:
                        source.close()
                    source = open(str(part.file), "rb", buffering=0)  # noqa: SIM115 - kept for the next range
                source.seek(part.start)
                left = part.nbytes
                while left:
                    got = source.readinto(buffer[: min(left, COPY_BYTES)])
                    if not got:
                        raise FileFormatError(f"{part.file}: ended early; did it change while it was read?")
                    out.write(buffer[:got])
                    report(got)
                    left -= got
            out.flush()
            os.fsync(out.fileno())
    finally:
        if source is not None:
            source.close()


def _joined(ranges: Iterable[ByteRange]) -> Iterable[ByteRange]:
    """Neighbouring ranges as one: experts that stay need no seek each."""
    current: ByteRange | None = None
    for part in ranges:
        if current is not None and part.file == current.file and part.start == current.start + current.nbytes:
            current = ByteRange(current.file, current.start, current.nbytes + part.nbytes)
            continue
        if current is not None:
            yield current
        current = part
    if current is not None:
        yield current


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _stored(file: Path, base: int, name: str, entry: Any) -> StoredTensor:
    def wrong(what: str) -> FileFormatError:
        return FileFormatError(f"{file}: tensor {name[:200]}: {what}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong("expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise wrong(f"dtype {str(dtype)[:40]!r} is unknown")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or any(type(n) is not int or n < 0 for n in shape):
        raise wrong("shape must list at most 16 non-negative whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int or n < 0 for n in offsets):
        raise wrong("data_offsets must be two non-negative whole numbers")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise wrong(f"{offsets[1] - offsets[0]:,} bytes, its shape {shape} and dtype {dtype} take {bits / 8:,.1f}")
    return StoredTensor(file, name, dtype, tuple(shape), base + offsets[0], bits // 8)
