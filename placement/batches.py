"""The steps a deployment runs: their kinds, sizes and shares."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

import numpy as np
from pydantic import ConfigDict

from .._types import BoolArray, IntArray
from .errors import InputError

Phase = Literal["decode", "prefill"]
"""Steps of one token of each of many sequences, or of whole prompts cut into batches."""
PHASES: tuple[Phase, ...] = ("decode", "prefill")
MOST_TOKENS = 10_000_000
"""Tokens of a step."""
WRITTEN = re.compile(r"(decode|prefill):(\d{1,40})(/step)?(?:@(\d*\.?\d+(?:[eE]-?\d+)?))?")


@dataclass(frozen=True)
class Batch:
    """One kind of steps that a deployment runs.

    phase: "decode" (one token of each of many sequences) or "prefill" (whole prompts, cut into batches).
    tokens_per_device: tokens of a step on each device, as engines count them; or tokens: of a step over all devices.
    weight: the part of the deployment's steps that are of this kind, in proportion to other batches'.

    Example:
        >>> import moeplace as mp
        >>> mp.Batch("decode", tokens_per_device=64, weight=0.9).step_tokens(8)
        512
        >>> mp.Batch.parse("prefill:2048@0.1")
        Batch(phase='prefill', tokens_per_device=2048, tokens=None, weight=0.1)

    Raises:
        InputError: on construction: an unknown phase, both sizes or none, or a size or weight out of range.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    phase: Phase
    _: KW_ONLY
    tokens_per_device: int | None = None
    tokens: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise InputError(f"Batch.phase is {self.phase!r}; use decode or prefill")
        sizes = {"tokens_per_device": self.tokens_per_device, "tokens": self.tokens}
        named = {name: size for name, size in sizes.items() if size is not None}
        if len(named) != 1:
            raise InputError(
                f"Batch({self.phase!r}): give tokens_per_device, or tokens over all devices, one of them; given "
                + (" and ".join(f"{name}={size}" for name, size in named.items()) or "neither")
            )
        ((name, size),) = named.items()
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or not 1 <= size <= MOST_TOKENS:
            raise InputError(f"Batch.{name} is {size!r}; a whole number from 1 to {MOST_TOKENS:,} is wanted")
        object.__setattr__(self, name, int(size))
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float | np.number) or not 0 < weight < np.inf:
            raise InputError(f"Batch.weight is {weight!r}; a number above 0 is wanted")
        object.__setattr__(self, "weight", float(weight))

    @classmethod
    def parse(cls, text: str) -> Batch:
        """A batch from `decode:64` or `prefill:2048@0.1`: the phase, tokens a device, and the weight.
        `prefill:4096/step` is of so many tokens over all devices.

        Raises:
            InputError: not of that form.
        """
        written = WRITTEN.fullmatch(text.strip())
        if written is None:
            raise InputError(
                f"batch {text!r} is not PHASE:TOKENS or PHASE:TOKENS@WEIGHT, tokens on each device: decode:64, "
                "prefill:2048@0.1"
            )
        phase: Phase = "decode" if written[1] == "decode" else "prefill"
        size, weight = int(written[2]), 1.0 if written[4] is None else float(written[4])
        return cls(phase, weight=weight, **{"tokens" if written[3] else "tokens_per_device": size})

    @property
    def written(self) -> str:
        """As `parse` reads it."""
        size = f"{self.tokens}/step" if self.tokens is not None else f"{self.tokens_per_device}"
        return f"{self.phase}:{size}" + ("" if self.weight == 1.0 else f"@{self.weight!r}")

    def step_tokens(self, devices: int) -> int:
        """Tokens of a step over so many devices."""
        if self.tokens is not None:
            return self.tokens
        assert self.tokens_per_device is not None
        return self.tokens_per_device * devices

    def name(self, devices: int) -> str:
        """`decode 512`: the phase and the tokens of a step over so many devices."""
        return f"{self.phase} {self.step_tokens(devices)}"

    @property
    def text(self) -> str:
        """`decode steps of 64 tokens a device`."""
        size = f"{self.tokens:,} tokens" if self.tokens is not None else f"{self.tokens_per_device:,} tokens a device"
        return f"{self.phase} steps of {size}"


USUAL_BATCHES = (Batch("decode", tokens_per_device=64), Batch("prefill", tokens_per_device=1024))
"""What is solved and judged for where nobody says what runs. 1,024 tokens on each of 8 data-parallel ranks are the
8,192-token chunks that SGLang, vLLM and TensorRT-LLM cut prompts into by default; above, time is in proportion to
tokens, so that plans rank alike."""


def as_batches(batches: Iterable[Batch] | Batch | None) -> tuple[Batch, ...]:
    """The batches of an argument.

    Raises:
        InputError: something else than batches, or two of one phase and size.
    """
    listed = () if batches is None else (batches,) if isinstance(batches, Batch) else batches
    if not isinstance(listed, Iterable):
        raise InputError(f"batches is {batches!r}; a list is wanted, as [Batch('decode', tokens_per_device=64)]")
    result = tuple(listed)
    for entry in result:
        if not isinstance(entry, Batch):
            raise InputError(f"batches holds {entry!r}; Batch('decode', tokens_per_device=64) is wanted")
    kinds = [replace(batch, weight=1.0) for batch in result]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise InputError(f"batches names {kind.text} twice; give each kind once, with its weight")
    return result


# What a recording's own forward calls were.


LEAST_SHARE = 0.02
"""Of steps and of tokens: kinds of recorded steps that are less of both are left out."""


def batches_of_steps(tokens: IntArray, is_decode: BoolArray) -> tuple[Batch, ...]:
    """The batches of forward calls: of each phase those of one size within a factor of four, at their mean size.

    Args:
        tokens: [S] of each call. is_decode: [S] whether no sequence had more than one token in it.
    """
    # Sizes in whole powers of four around 1, 4, 16, ...
    band = np.round(np.log2(tokens) / 2).astype(np.int64)
    result = []
    for phase, chosen in (("decode", is_decode), ("prefill", ~is_decode)):
        for size in np.unique(band[chosen]):
            here = chosen & (band == size)
            share, of_tokens = here.mean(), tokens[here].sum() / tokens.sum()
            if max(share, of_tokens) >= LEAST_SHARE:
                mean = max(1, round(float(tokens[here].mean())))
                result.append(Batch("decode" if phase == "decode" else "prefill", tokens=mean, weight=float(share)))
    return tuple(result)
