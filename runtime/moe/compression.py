"""Settings of the compressed all-to-all, and what it reports: fewer bits a row, and fewer rows. Rows in few bits: the
values of a group in 8 or 4 bits, and beside them each group's scale.

C rows, D values of a row, G groups of a row, g values of a group, B bytes of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..._arguments import check_fields
from ...placement.errors import InputError

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


Residual = Literal["none", "plain", "scaled"]
Scope = Literal["all", "off_device", "off_node"]

MOST_CODES = 1 << 40
"""Codes a slot: with the slot in front they must fit 64 bits."""


@check_fields
@dataclass(frozen=True)
class QuantizedRows:
    """Rows travel in few bits: each value as an integer or an fp8 number, neighbours sharing a scale.

    dispatch_dtype: tokens on their way to experts, "int8", "int4", "fp8" (e4m3), or None for the type they have.
    combine_dtype: weighted sums of outputs on their way back. gradient_dtype: gradients of both, in backward.
    group_size: values of a row that share a scale, which takes two bytes more; it must divide the hidden size.

    What a rank's own experts get is written and read alike, so that results do not depend on where an expert stands.
    Gate weights and slots travel whole. Evaluation mode changes nothing.

    Raises:
        InputError: a value out of range.
    """

    dispatch_dtype: WireDtype | None = "int8"
    combine_dtype: WireDtype | None = "int8"
    gradient_dtype: WireDtype | None = "int8"
    group_size: int = 32

    def __post_init__(self) -> None:
        if self.group_size < 2 or self.group_size % 2:
            raise InputError(f"group_size ({self.group_size}) must be an even number of at least 2")

    @classmethod
    def of(cls, dtype: WireDtype, group_size: int = 32) -> QuantizedRows:
        """Everything in one type."""
        return cls(dtype, dtype, dtype, group_size)

    @property
    def dispatch(self) -> RowFormat | None:
        """How tokens are written."""
        return self._format(self.dispatch_dtype)

    @property
    def combine(self) -> RowFormat | None:
        """How weighted sums of outputs are written."""
        return self._format(self.combine_dtype)

    @property
    def gradients(self) -> RowFormat | None:
        """How gradients of both are written."""
        return self._format(self.gradient_dtype)

    @property
    def objective(self) -> dict[str, str]:
        """What `Objective` calls these types, so that the cost model prices the bytes that travel; without those of
        rows that travel as they are."""
        names = {"dispatch_dtype": self.dispatch_dtype, "combine_dtype": self.combine_dtype}
        return {field: f"{dtype}/{self.group_size}" for field, dtype in names.items() if dtype is not None}

    def check_width(self, width: int) -> None:
        """Raises InputError unless rows of `width` values are whole groups."""
        if width % self.group_size:
            raise InputError(
                f"group_size ({self.group_size}) does not divide rows of {width} values; give one that does"
            )

    def _format(self, dtype: WireDtype | None) -> RowFormat | None:
        return None if dtype is None else RowFormat(dtype, self.group_size)


@check_fields
@dataclass(frozen=True)
class LSHCompression:
    """Tokens that look alike and go to the same expert slot travel as one: their mean, by locality-sensitive hashing.

    rate: rows that travel, over those that plain dispatch sends (one copy a token and device); kept to in each batch by
        the number of hash functions that count. 1 sends everything as it is.
    hashes, dimension: at most so many cross-polytope hashes, each in a space of `dimension`: 2 * dimension values each.
    lloyd_steps: how often each pair then goes to the nearest mean of its slot, by distances in the hashes' spaces.
    residual: what restores a token's own output from its cluster's: "none", y = E(c); "plain", y = E(c) + (x - c);
        "scaled", y = E(c) + s (x - c), s by least squares over the batch's centroids.
    error_bound: members of a cluster with a larger relative error, |x - c| over |x| by the root of mean squares weighed
        as the mean is, by squared gate weights, travel alone, as in plain dispatch; that adds to `rate`.
    error_target: the rate of each layer then follows the error of all its pairs in scope, those alone having none: from
        optimizer step to optimizer step it rises while |x - c| over |x| is above this and falls while it is below,
        between `rate`, where it begins, and 1. Where a run goes on from a checkpoint, it begins anew.
    scope: which tokens are compressed: "all", with expert work shrinking too; "off_device", only those that leave
        their rank; "off_node", only those that leave their node.
    warm_up: optimizer steps without compression at first. rotation_steps: optimizer steps that a random rotation is
        kept; None keeps it for ever.
    evaluation: compress in evaluation mode (`model.eval()`) too.
    rows: how the rows that are left travel; None: as they are.

    Raises:
        InputError: a value out of range.
    """

    rate: float = 0.2
    hashes: int = 4
    dimension: int = 16
    lloyd_steps: int = 2
    residual: Residual = "scaled"
    error_bound: float | None = None
    error_target: float | None = None
    scope: Scope = "all"
    warm_up: int = 0
    rotation_steps: int | None = None
    evaluation: bool = False
    seed: int = 0
    rows: QuantizedRows | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0:
            raise InputError(f"rate ({self.rate}) must be above 0 and at most 1: rows that travel over rows of plain")
        for name, least in (("hashes", 1), ("dimension", 1), ("lloyd_steps", 0), ("warm_up", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} ({getattr(self, name)}) must be at least {least}")
        if self.rotation_steps is not None and self.rotation_steps < 1:
            raise InputError(f"rotation_steps ({self.rotation_steps}) must be at least 1, or None to keep the rotation")
        if self.error_bound is not None and not self.error_bound >= 0.0:
            raise InputError(f"error_bound ({self.error_bound}) must be at least 0, or None for no bound")
        if self.error_target is not None and not 0.0 < self.error_target < 1.0:
            raise InputError(f"error_target ({self.error_target}) must be between 0 and 1, or None for a fixed rate")
        if self.hashes * math.log(2 * self.dimension) > math.log(MOST_CODES):
            raise InputError(
                f"hashes ({self.hashes}) of dimension ({self.dimension}) make more than {MOST_CODES:.1e} codes; a "
                "batch has far fewer tokens: take fewer hashes"
            )

    def check_hidden_size(self, hidden_size: int) -> None:
        """Raises InputError unless tokens of `hidden_size` can be projected to `dimension`."""
        if self.dimension > hidden_size:
            raise InputError(
                f"hidden size {hidden_size} is too small for a projection to {self.dimension} dimensions; give "
                f"dimension={hidden_size} or less"
            )


Compression = LSHCompression | QuantizedRows
"""What a layer takes: fewer rows, fewer bits a row, or both (`LSHCompression(rows=...)`)."""


def quantized_rows(compression: Compression | None) -> QuantizedRows | None:
    """How rows travel under `compression`; None: as they are. All ranks must agree on it."""
    return compression.rows if isinstance(compression, LSHCompression) else compression


@dataclass(frozen=True)
class TrafficStatistics:
    """Of a rank's latest forward pass: rows that leave this device, in plain dispatch and as they were sent.

    plain_bytes, sent_bytes: of them, there and back, with gate weights and slots; backward moves as many again where
    gradients travel in the same type.
    """

    plain_rows: int
    sent_rows: int
    plain_bytes: int
    sent_bytes: int

    @property
    def rate(self) -> float:
        """Rows sent over rows of plain dispatch."""
        return self.sent_rows / self.plain_rows if self.plain_rows else 1.0


@dataclass(frozen=True)
class CompressionStatistics(TrafficStatistics):
    """Of a rank's latest forward pass that made clusters.

    Rows are one a token and device, with node-aware dispatch one a token and node. pairs: token-expert pairs in scope.
    clusters: that travelled as one row. clustered: pairs in them. refused: pairs that the error bound sent alone.
    error: |x - c| over |x| of the clustered pairs, by the root of mean squares. digits: whole hashes that counted.
    scale: of the residual.
    """

    pairs: int
    clusters: int
    clustered: int
    refused: int
    error: float
    digits: int
    scale: float
