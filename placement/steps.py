"""Batches of tokens that run through the model together: what a plan is judged on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .._types import IntArray
from .errors import InputError


@dataclass(frozen=True, eq=False)
class Steps:
    """S steps of tokens, one after the other; step s holds tokens offsets[s] to offsets[s+1].

    expert_ids: [T, L, k], highest gate weight first. offsets: [S+1]. source: [T] source rank of each token, or None
    (then tokens are spread evenly over the devices). workload: [T] index into `workloads`.
    """

    expert_ids: npt.NDArray[np.unsignedinteger[Any]]
    offsets: IntArray
    num_experts: int
    moe_layers: tuple[int, ...]
    source: IntArray | None = None
    workload: IntArray | None = None
    workloads: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        if len(self.offsets) < 2 or self.offsets[0] != 0 or self.offsets[-1] != len(self.expert_ids):
            raise InputError(f"Steps.offsets must run from 0 to {len(self.expert_ids)} tokens, given {self.offsets}")
        if np.any(np.diff(self.offsets) < 1):
            raise InputError("Steps.offsets: every step must hold at least one token")

    @property
    def num_steps(self) -> int:
        return len(self.offsets) - 1

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
        layers, experts = self.num_layers, self.num_experts
        result = np.empty((self.num_steps, layers, experts), dtype=np.int64)
        base = np.arange(layers)[None, :, None] * experts
        for s, block in enumerate(self.blocks()):
            result[s] = np.bincount((block + base).ravel(), minlength=layers * experts).reshape(layers, experts)
        return result

    def blocks(self) -> Iterator[npt.NDArray[np.unsignedinteger[Any]]]:
        """The [tokens, L, k] expert ids of each step in turn."""
        for start, end in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            yield self.expert_ids[start:end]

    def select(self, steps: npt.ArrayLike) -> Steps:
        """Some of the steps, in the order given (repeats allowed, as a bootstrap draws them)."""
        chosen = np.arange(self.num_steps)[np.asarray(steps)]
        if not len(chosen):
            raise InputError("Steps.select: no step chosen")
        tokens = np.concatenate([np.arange(self.offsets[s], self.offsets[s + 1]) for s in chosen])
        return replace(
            self,
            expert_ids=self.expert_ids[tokens],
            offsets=np.concatenate([[0], np.cumsum(self.tokens[chosen])]),
            source=None if self.source is None else self.source[tokens],
            workload=None if self.workload is None else self.workload[tokens],
        )
