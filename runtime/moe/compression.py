"""Settings of the compressed all-to-all, and what it reports: fewer bits a row, and fewer rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ...placement.errors import InputError, nearest
from .row_format import RowFormat, WireDtype

Residual = Literal["none", "plain", "scaled"]
Scope = Literal["all", "off_device", "off_node"]

MOST_CODES = 1 << 40
"""Codes a slot: with the slot in front they must fit 64 bits."""


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
        for name in ("dispatch_dtype", "combine_dtype", "gradient_dtype"):
            value = getattr(self, name)
            if value is not None and value not in get_args(WireDtype):
                raise InputError(f"{name} {value!r} is unknown; {nearest(str(value), get_args(WireDtype))}, or None")
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
        for name, choices in (("residual", Residual), ("scope", Scope)):
            if getattr(self, name) not in get_args(choices):
                raise InputError(
                    f"{name} {getattr(self, name)!r} is unknown; {nearest(str(getattr(self, name)), get_args(choices))}"
                )
        if (2 * self.dimension) ** self.hashes > MOST_CODES:
            raise InputError(
                f"hashes ({self.hashes}) of dimension ({self.dimension}) make "
                f"{(2 * self.dimension) ** self.hashes:.1e} codes, at most {MOST_CODES:.1e} are possible; a batch has "
                "far fewer tokens: take fewer hashes"
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

    @property
    def byte_rate(self) -> float:
        """Bytes sent over bytes of plain dispatch."""
        return self.sent_bytes / self.plain_bytes if self.plain_bytes else 1.0


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
