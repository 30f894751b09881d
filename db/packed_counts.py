"""Loads in few bytes: the narrowest integers that hold them, byte by byte of their places, compressed.

High bytes of counts are nearly all alike: standing together they cost next to nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..placement.errors import StoreError
from .service_records import LoadArray

WIDTHS = (1, 2, 4, 8)


def narrow(load: LoadArray) -> npt.NDArray[np.unsignedinteger]:
    """The same counts, none of them negative, as unsigned integers of 1, 2, 4 or 8 bytes, whichever is enough."""
    return load.astype(f"<u{_width(int(load.max(initial=0)))}")


def pack(counts: npt.NDArray[np.unsignedinteger]) -> bytes:
    """What `unpack` reads: the width of `narrow` counts as a digit, then their bytes."""
    import pyarrow as pa

    width = counts.dtype.itemsize
    places = np.ascontiguousarray(np.ascontiguousarray(counts).reshape(-1).view(np.uint8).reshape(-1, width).T)
    packed: bytes = pa.Codec("zstd", compression_level=1).compress(places).to_pybytes()
    return b"%d" % width + packed


def unpack(content: bytes, shape: tuple[int, int]) -> LoadArray:
    """Raises StoreError for what is damaged."""
    import pyarrow as pa

    try:
        width = WIDTHS[WIDTHS.index(int(content[:1]))]
        raw = pa.decompress(content[1:], decompressed_size=shape[0] * shape[1] * width, codec="zstd")
        places = np.frombuffer(raw, np.uint8).reshape(width, -1).T
        counts = np.ascontiguousarray(places).view(f"<u{width}").reshape(shape)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise StoreError(f"a count window was damaged after it was stored ({error}); restore a copy") from None
    return counts.astype(np.int64)


def _width(largest: int) -> int:
    return next(width for width in WIDTHS if largest < 1 << 8 * width)
