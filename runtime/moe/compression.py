"""Settings of the compressed all-to-all, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ...placement.errors import InputError, nearest

Residual = Literal["none", "plain", "scaled"]
Scope = Literal["all", "off_device", "off_node"]

MOST_CODES = 1 << 40
"""Codes a slot: with the slot in front they must fit 64 bits."""


@dataclass(frozen=True)
class LSHCompression:
    """Tokens that look alike and go to the same expert slot travel as one: their mean, by locality-sensitive hashing.

    rate: rows that travel, over those that plain dispatch sends (one copy a token and device); kept to in each batch by
        the number of hash functions that count. 1 sends everything as it is.
    hashes, dimension: at most so many cross-polytope hashes, each in a space of `dimension`: 2 * dimension values each.
    residual: what restores a token's own output from its cluster's: "none", y = E(c); "plain", y = E(c) + (x - c);
        "scaled", y = E(c) + s (x - c), s by least squares over the batch's centroids.
    error_bound: members of a cluster with a larger relative error, |x - c| over |x| by the root of mean squares, travel
        alone, as in plain dispatch; that adds to `rate`.
    scope: which tokens are compressed: "all", with expert work shrinking too; "off_device", only those that leave
        their rank; "off_node", only those that leave their node.
    warm_up: optimizer steps without compression at first. rotation_steps: optimizer steps that a random rotation is
        kept; None keeps it for ever.
    evaluation: compress in evaluation mode (`model.eval()`) too.

    Raises:
        InputError: a value out of range.
    """

    rate: float = 0.2
    hashes: int = 4
    dimension: int = 16
    residual: Residual = "scaled"
    error_bound: float | None = None
    scope: Scope = "all"
    warm_up: int = 0
    rotation_steps: int | None = None
    evaluation: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0:
            raise InputError(f"rate ({self.rate}) must be above 0 and at most 1: rows that travel over rows of plain")
        for name, least in (("hashes", 1), ("dimension", 1), ("warm_up", 0)):
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


@dataclass(frozen=True)
class CompressionStatistics:
    """Of a rank's latest forward pass.

    plain_rows, sent_rows: rows that leave this device (with node-aware dispatch: one a token and node), in plain
    dispatch and as they were sent. plain_bytes, sent_bytes: of them, there and back; backward moves as many again.
    pairs: token-expert pairs in scope. clusters: that travelled as one row. clustered: pairs in them. refused: pairs
    that the error bound sent alone. error: |x - c| over |x| of the clustered pairs, by the root of mean squares.
    digits: whole hashes that counted. scale: of the residual.
    """

    plain_rows: int
    sent_rows: int
    plain_bytes: int
    sent_bytes: int
    pairs: int
    clusters: int
    clustered: int
    refused: int
    error: float
    digits: int
    scale: float

    @property
    def rate(self) -> float:
        """Rows sent over rows of plain dispatch."""
        return self.sent_rows / self.plain_rows if self.plain_rows else 1.0
