"""Rows in few bits: values of a group in 8 or 4 bits, and beside them each group's scale.

C rows, D values of a row, G groups of a row, g values of a group, B bytes of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WireDtype = Literal["int8", "int4", "fp8"]

VALUE_BITS: dict[WireDtype, int] = {"int8": 8, "int4": 4, "fp8": 8}
LARGEST: dict[WireDtype, float] = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
"""The code of a group's largest value: codes are symmetric, so that zero stays zero and a sign costs nothing."""
SCALE_BYTES = 2


@dataclass(frozen=True)
class RowFormat:
    """How a row's values are written.

    dtype: of codes; fp8 is e4m3. group_size: neighbouring values that share a scale. A scale is in bfloat16, which has
    the exponents of float32: gradients of any size are written alike. A group that holds NaN or an infinity is read
    back as NaN, all of it.
    """

    dtype: WireDtype
    group_size: int

    def row_bytes(self, width: int) -> int:
        """B of a row of `width` values."""
        return width * VALUE_BITS[self.dtype] // 8 + width // self.group_size * SCALE_BYTES

    def encode(self, row_CD: Tensor) -> Tensor:
        """[C, B] of uint8: all codes of a row, then its scales. Every code is the nearest there is."""
        count, width = row_CD.shape
        x_CGg = row_CD.float().view(count, width // self.group_size, self.group_size)
        largest = LARGEST[self.dtype]
        scale_CG = (x_CGg.abs().amax(dim=2) / largest).bfloat16()
        scale_CG = torch.where(scale_CG.isfinite(), scale_CG, float("nan"))
        # A group of zeros has scale 0; codes of NaN groups do not matter, but must be numbers.
        step_CG = torch.where(scale_CG == 0, 1.0, scale_CG.float())
        code_CGg = (x_CGg / step_CG[:, :, None]).nan_to_num_(0.0).clamp_(-largest, largest)
        code_CB = _TO_BYTES[self.dtype](code_CGg.view(count, width))
        return torch.cat([code_CB, bytes_as(torch.uint8, scale_CG)], dim=1)

    def decode(self, message_CB: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """[C, width] of `dtype`, from `encode`."""
        codes = width * VALUE_BITS[self.dtype] // 8
        groups = width // self.group_size
        scale_CG = bytes_as(torch.bfloat16, message_CB[:, codes:]).float()
        code_CD = _FROM_BYTES[self.dtype](message_CB[:, :codes].contiguous())
        value_CGg = code_CD.float().view(len(message_CB), groups, self.group_size)
        return (value_CGg * scale_CG[:, :, None]).view(len(message_CB), width).to(dtype)


def bytes_as(dtype: torch.dtype, rows: Tensor) -> Tensor:
    """The same bytes, row by row, as another type."""
    width = rows.shape[1] * rows.element_size() // dtype.itemsize
    # A single column may count as contiguous with any stride, which view does not take; one long row has stride 1.
    long = rows.contiguous().flatten()
    if long.storage_offset() * long.element_size() % dtype.itemsize:
        # One row, or none, is contiguous wherever it begins; view wants a multiple of the other type's size.
        long = long.clone()
    return long.view(dtype).view(len(rows), width)


def _pack_nibbles(code_CD: Tensor) -> Tensor:
    """Two codes of 4 bits a byte, the first in the lower half."""
    code_CD = code_CD.round().to(torch.int8)
    return ((code_CD[:, 0::2] & 15) | (code_CD[:, 1::2] << 4)).view(torch.uint8)


def _unpack_nibbles(code_CB: Tensor) -> Tensor:
    signed_CB = code_CB.view(torch.int8)
    # Shifts of signed numbers carry the sign down.
    return torch.stack([(signed_CB << 4) >> 4, signed_CB >> 4], dim=2).flatten(1)


_TO_BYTES: dict[WireDtype, Callable[[Tensor], Tensor]] = {
    "int8": lambda code: code.round().to(torch.int8).view(torch.uint8),
    "int4": _pack_nibbles,
    "fp8": lambda code: code.to(torch.float8_e4m3fn).view(torch.uint8),
}
_FROM_BYTES: dict[WireDtype, Callable[[Tensor], Tensor]] = {
    "int8": lambda code: code.view(torch.int8),
    "int4": _unpack_nibbles,
    "fp8": lambda code: code.view(torch.float8_e4m3fn),
}
