"""Batches of tokens that run through the model together: what a plan is judged on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .._display import Displayed, names, plural, span
from .._types import BoolArray, FloatArray, IntArray
from .errors import InputError

IdArray = npt.NDArray[np.unsignedinteger[Any]]


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
        chosen = np.arange(self.num_steps)[np.asarray(steps)]
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
