"""Batches of tokens that run through the model together: the kinds, sizes and shares of steps that a deployment runs,
and recorded steps, which a plan is judged on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict

from .._arguments import check_fields, check_methods
from .._display import Displayed, names, plural, span
from .._types import BoolArray, FloatArray, IntArray
from .errors import InputError
from .validation import check_choice, check_range

Phase = Literal["decode", "prefill"]
"""Steps of one token of each of many sequences, or of whole prompts cut into batches."""
PHASES: tuple[Phase, ...] = ("decode", "prefill")
MOST_TOKENS = 10_000_000
"""Tokens of a step."""
WRITTEN = re.compile(r"(decode|prefill):(\d{1,40})(/step)?(?:@(\d*\.?\d+(?:[eE]-?\d+)?))?")


@check_methods
@check_fields
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
        sizes = {"tokens_per_device": self.tokens_per_device, "tokens": self.tokens}
        named = {name: size for name, size in sizes.items() if size is not None}
        if len(named) != 1:
            raise InputError(
                f"Batch({self.phase!r}): give tokens_per_device, or tokens over all devices, one of them; given "
                + (" and ".join(f"{name}={size}" for name, size in named.items()) or "neither")
            )
        ((name, size),) = named.items()
        check_range(f"Batch.{name}", size, 1, MOST_TOKENS)
        object.__setattr__(self, name, int(size))
        if not 0 < self.weight < np.inf:
            raise InputError(f"Batch.weight ({self.weight}) must be above 0 and finite")
        object.__setattr__(self, "weight", float(self.weight))

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
        InputError: two of one phase and size.
    """
    result = () if batches is None else (batches,) if isinstance(batches, Batch) else tuple(batches)
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


IdArray = npt.NDArray[np.unsignedinteger[Any]]


@check_methods
@dataclass(frozen=True, eq=False, repr=False)
class Steps(Displayed):
    """S steps of tokens, one after the other; step s holds tokens offsets[s] to offsets[s+1].

    expert_ids: [T, L, k], highest gate weight first. offsets: [S+1]. source: [T] source rank of each token, or None
    (then tokens are spread evenly over the devices). workload: [T] index into `workloads`. weight: [S] how much each
    step counts in means, together 1; None: all alike. batch: [S] index into `batches`, names of the kinds of steps;
    None where all are of one. worth: [S] of how many independent observations each step is worth, below 1 where steps
    share sequences; None: each is one. notes: what there is to know of how they were made. grouped: of steps drawn from
    counts, others in which each token's experts are of as few groups as the model limits them to; None where nothing
    more is to be told.
    """

    expert_ids: IdArray
    offsets: IntArray
    num_experts: int
    moe_layers: tuple[int, ...]
    source: IntArray | None = None
    workload: IntArray | None = None
    workloads: tuple[str, ...] = ("",)
    weight: FloatArray | None = None
    batch: IntArray | None = None
    batches: tuple[str, ...] = ()
    worth: FloatArray | None = None
    notes: tuple[str, ...] = ()
    grouped: Steps | None = None

    def __post_init__(self) -> None:
        if len(self.offsets) < 2 or self.offsets[0] != 0 or self.offsets[-1] != len(self.expert_ids):
            raise InputError(f"Steps.offsets must run from 0 to {len(self.expert_ids)} tokens, given {self.offsets}")
        if np.any(np.diff(self.offsets) < 1):
            raise InputError("Steps.offsets: every step must hold at least one token")
        for name, column in (("weight", self.weight), ("batch", self.batch), ("worth", self.worth)):
            if column is not None and column.shape != (self.num_steps,):
                raise InputError(
                    f"Steps.{name} has shape {column.shape}, expected one entry for each of {self.num_steps} steps"
                )

    def _summary(self) -> tuple[str, dict[str, str]]:
        tokens = self.tokens
        size = f"{tokens[0]}" if tokens.min() == tokens.max() else f"{tokens.min()} to {tokens.max()}"
        return f"{plural(self.num_steps, 'step')} of {size} tokens", {
            "layers": span(self.moe_layers),
            "experts": f"{self.num_experts}, top-{self.top_k}",
            "workloads": names(self.workloads),
            "source ranks": "not recorded" if self.source is None else f"{len(np.unique(self.source))}",
            **({"batches": ", ".join(self.batches)} if self.batches else {}),
            **({"note": " ".join(self.notes)} if self.notes else {}),
        }

    @classmethod
    def join(cls, parts: Sequence[Steps], weights: Sequence[float] | None = None, batches: Sequence[str] = ()) -> Steps:
        """Steps of one model, one after the other.

        Args:
            parts: at least one, alike in what is known of their tokens.
            weights: how much each part counts, its steps alike; None: all steps alike.
            batches: a name of each part, where they are of different kinds.

        Raises:
            InputError: no part, or only some of them with source ranks, workloads or worth.
        """
        if not parts:
            raise InputError("Steps.join: no steps given")
        for name in ("source", "workload", "worth", "grouped"):
            if len({getattr(part, name) is None for part in parts}) > 1:
                raise InputError(f"Steps.join: only some of the parts have {name}")
        sizes = [part.num_steps for part in parts]

        def joined(name: str) -> Any:
            columns = [getattr(part, name) for part in parts]
            return None if columns[0] is None else np.concatenate(columns)

        grouped = [part.grouped for part in parts if part.grouped is not None]
        weight = None
        if weights is not None:
            share = np.asarray(weights, dtype=np.float64) / float(sum(weights))
            weight = np.repeat(share / sizes, sizes)
        return replace(
            parts[0],
            expert_ids=joined("expert_ids"),
            offsets=np.concatenate([[0], np.cumsum(np.concatenate([part.tokens for part in parts]))]),
            source=joined("source"),
            workload=joined("workload"),
            weight=weight,
            worth=joined("worth"),
            batch=np.repeat(np.arange(len(parts)), sizes) if batches else None,
            batches=tuple(batches),
            notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
            grouped=None if not grouped else cls.join(grouped, weights, batches),
        )

    @property
    def step_weight(self) -> FloatArray:
        """[S] how much each step counts, together 1."""
        return np.full(self.num_steps, 1.0 / self.num_steps) if self.weight is None else self.weight

    def by_batch(self) -> dict[str, Steps]:
        """The steps of each batch, by its name; all under "" where none is named."""
        if self.batch is None:
            return {"": self}
        return {name: self.select(self.batch == code) for code, name in enumerate(self.batches)}

    @property
    def num_steps(self) -> int:
        return len(self.offsets) - 1

    def are_prefill(self, most_decode: int) -> BoolArray:
        """[S] whether steps are prefill: as their batches are named, else those of more tokens than `most_decode`."""
        larger = self.tokens > most_decode
        if self.batch is None or not self.batches:
            return np.asarray(larger)
        phase = [name.partition(" ")[0] for name in self.batches]
        named, prefill = (np.array([of in which for of in phase]) for which in (("decode", "prefill"), ("prefill",)))
        return np.asarray(np.where(named[self.batch], prefill[self.batch], larger))

    @property
    def num_layers(self) -> int:
        return int(self.expert_ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.expert_ids.shape[2])

    @property
    def tokens(self) -> IntArray:
        """[S] tokens in each step."""
        return np.asarray(np.diff(self.offsets))

    @cached_property
    def step_of(self) -> IntArray:
        """[T] step of each token."""
        return np.repeat(np.arange(self.num_steps), self.tokens)

    @cached_property
    def step_workload(self) -> IntArray:
        """[S] the workload most of a step's tokens belong to."""
        if self.workload is None:
            return np.zeros(self.num_steps, np.int64)
        width = len(self.workloads)
        votes = np.bincount(self.step_of * width + self.workload, minlength=self.num_steps * width)
        return np.asarray(votes.reshape(self.num_steps, width).argmax(axis=1))

    def loads(self) -> IntArray:
        """[S, L, E] tokens each expert got in each step and layer."""
        return expert_counts(self.expert_ids.transpose(1, 0, 2), self.offsets, self.num_experts)

    def blocks(self) -> Iterator[IdArray]:
        """The [tokens, L, k] expert ids of each step in turn."""
        for start, end in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            yield self.expert_ids[start:end]

    def select(self, steps: npt.ArrayLike) -> Steps:
        """Some of the steps, in the order given (repeats allowed, as a bootstrap draws them)."""
        chosen = np.arange(self.num_steps)[check_choice("Steps.select: steps", steps, self.num_steps)]
        if not len(chosen):
            raise InputError("Steps.select: no step chosen")
        weight = None if self.weight is None else self.weight[chosen]
        tokens = np.concatenate([np.arange(self.offsets[s], self.offsets[s + 1]) for s in chosen])
        return replace(
            self,
            expert_ids=self.expert_ids[tokens],
            offsets=np.concatenate([[0], np.cumsum(self.tokens[chosen])]),
            source=None if self.source is None else self.source[tokens],
            workload=None if self.workload is None else self.workload[tokens],
            weight=None if weight is None else weight / weight.sum(),
            batch=None if self.batch is None else self.batch[chosen],
            worth=None if self.worth is None else self.worth[chosen],
            grouped=None if self.grouped is None else self.grouped.select(chosen),
        )


def expert_counts(ids: IdArray, bounds: IntArray, experts: int) -> IntArray:
    """[S, L, E] tokens that chose each expert. ids: [L, T, k]; bounds: [S+1] where each step's tokens begin."""
    layers = ids.shape[0]
    counts = np.empty((len(bounds) - 1, layers, experts), dtype=np.int64)
    base = np.arange(layers)[:, None, None] * experts
    for s in range(len(bounds) - 1):
        flat = (ids[:, bounds[s] : bounds[s + 1]] + base).ravel()
        counts[s] = np.bincount(flat, minlength=layers * experts).reshape(layers, experts)
    return counts
