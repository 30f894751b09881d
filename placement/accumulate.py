"""Counting routing block by block in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .load_windows import LoadWindows, Stream
from .statistics import RoutingStatistics
from .token_sample import TokenSample
from .trace import RoutingTrace

PAIR_TABLE_LIMIT = 1 << 29
"""Entries of co-activation and transition tables over all workloads (8 bytes each)."""

NARROW = np.uint32

Ids = npt.NDArray[np.unsignedinteger[Any]]
Counts = npt.NDArray[np.integer[Any]]


class StatisticsAccumulator:
    """Adds up blocks of a trace into `RoutingStatistics`; parts may be counted apart and merged.

    Totals, windows, sample and fingerprint do not depend on the sizes of the blocks, nor on how many accumulators shared
    the work, as long as each is told in `preceding` how many tokens of each (rank, workload) come before its first
    block. Memory is that of the result: the pair tables of each workload, 256 windows, and the sample.

    Raises:
        InputError: tables of this many experts, layers and workloads would not fit in memory.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        moe_layers: Sequence[int],
        top_k: int,
        sample_tokens: int = 200_000,
        preceding: Mapping[Stream, int] | None = None,
    ) -> None:
        if sample_tokens < 0:
            raise InputError(f"sample_tokens ({sample_tokens}) must be 0 or more")
        self._experts, self._layers, self._top_k = num_experts, tuple(moe_layers), top_k
        self._windows = LoadWindows(len(self._layers), num_experts, preceding)
        self._sample = TokenSample(sample_tokens)
        self._pairs: dict[str, _PairCounts] = {}

    @classmethod
    def like(
        cls, trace: RoutingTrace, *, sample_tokens: int = 200_000, preceding: Mapping[Stream, int] | None = None
    ) -> Self:
        """An empty accumulator for blocks of the trace's shape."""
        return cls(
            num_experts=trace.num_experts,
            moe_layers=trace.moe_layers,
            top_k=trace.top_k,
            sample_tokens=sample_tokens,
            preceding=preceding,
        )

    def add(self, block: RoutingTrace) -> None:
        """Counts the tokens of a block.

        Raises:
            InputError: the block is of another model.
        """
        given = (block.num_experts, block.moe_layers, block.top_k)
        expected = (self._experts, self._layers, self._top_k)
        for name, here, there in zip(("num_experts", "moe_layers", "top_k"), given, expected, strict=True):
            if here != there:
                raise InputError(f"StatisticsAccumulator.add: {name} is {here}, the blocks before had {there}")
        for (source, workload), tokens in streams(block):
            counts = self._counts_of(workload)
            for part in np.array_split(tokens, -(-len(tokens) // counts.chunk)):
                ids = block.expert_ids[part]
                counts.add(ids)
                self._windows.add((source, workload), ids)
        if self._sample.limit:
            self._sample.add(block)

    def merge(self, other: StatisticsAccumulator) -> None:
        """Adds what another accumulator counted of the same trace, as if its blocks had come after these."""
        for workload, counts in other._pairs.items():
            self._counts_of(workload).merge(counts)
        self._windows.merge(other._windows)
        self._sample.merge(other._sample)

    def finish(self) -> RoutingStatistics:
        """The statistics of all tokens so far. Only workloads that have tokens are named, in order of their names.

        The fingerprint is SHA-256 over the exact counts (tokens, loads, pairs of each workload), so that the same tokens
        give the same one in whatever blocks, order or number of workers they were counted.

        Raises:
            InputError: no token was counted.
        """
        names = tuple(sorted(self._pairs))
        if not names:
            raise InputError("no token was counted: the trace is empty; record some routing first")
        layers, experts = len(self._layers), self._experts
        coactivation = np.empty((len(names), layers, experts, experts))
        transitions = np.empty((len(names), layers - 1, experts, experts))
        digest = hashlib.sha256(repr((experts, self._layers, self._top_k, names)).encode())
        for code, name in enumerate(names):
            counts = self._pairs[name]
            counts.count()
            digest.update(repr(counts.tokens).encode())
            for table in (*self._windows.workload_load(name), *counts.together, *counts.onward):
                digest.update(np.ascontiguousarray(table, dtype="<i8").data)
            coactivation[code] = counts.together
            coactivation[code] += counts.together.transpose(0, 2, 1)
            np.divide(counts.onward, self._top_k, out=transitions[code])
        load, window_workload = self._windows.result(names)
        sample = self._sample.result()
        return RoutingStatistics(
            experts=experts,
            moe_layers=self._layers,
            load=load,
            window_workload=window_workload,
            workloads=names,
            top_k=self._top_k,
            coactivation=coactivation,
            transitions=transitions,
            sample=None if sample is None else _renamed(sample, names),
            tokens=sum(counts.tokens for counts in self._pairs.values()),
            fingerprint=digest.hexdigest(),
        )

    def _counts_of(self, workload: str) -> _PairCounts:
        if workload not in self._pairs:
            entries = (len(self._pairs) + 1) * (2 * len(self._layers) - 1) * self._experts**2
            if entries > PAIR_TABLE_LIMIT:
                raise InputError(
                    f"co-activation and transitions of {len(self._layers)} layers, {self._experts} experts and more than "
                    f"{len(self._pairs)} workloads need {entries * 8 / 1e9:.1f} GB; give fewer workload tags, or record "
                    "counts only"
                )
            self._pairs[workload] = _PairCounts(len(self._layers), self._experts, self._top_k)
        return self._pairs[workload]


class _PairCounts:
    """How often experts went together in one workload. Tokens wait until a chunk that suits the cache is full.

    together: [L, E, E] pairs of one layer, each in one of its two orders. onward: [L-1, E, E] pairs of a layer and the
    next. Four bytes a count serve until so many tokens have come that a count could pass them.
    """

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self._experts, self._top_k = experts, top_k
        self.together: Counts = np.zeros((layers, experts, experts), NARROW)
        self.onward: Counts = np.zeros((layers - 1, experts, experts), NARROW)
        self.tokens = 0
        self.chunk = min(16384, max(512, (1 << 19) // top_k**2))
        self._waiting: list[Ids] = []
        self._waiting_tokens = 0

    def add(self, ids: Ids) -> None:
        self._expect(len(ids))
        self._waiting.append(ids)
        self._waiting_tokens += len(ids)
        if self._waiting_tokens >= self.chunk:
            self.count()

    def _expect(self, tokens: int) -> None:
        self.tokens += tokens
        if self.onward.dtype == NARROW and self.tokens > np.iinfo(NARROW).max:
            self.together, self.onward = self.together.astype(np.int64), self.onward.astype(np.int64)

    def merge(self, other: _PairCounts) -> None:
        other.count()
        self._expect(other.tokens)
        _increase(self.together, other.together)
        _increase(self.onward, other.onward)

    def count(self) -> None:
        """Counts the waiting tokens: one histogram over E*E bins a table and layer.

        Index rows run along tokens, which lets numpy add whole vectors: on 256 experts, top-8, half the time of a sparse
        matrix product or of the same with index rows of k experts.
        """
        if not self._waiting_tokens:
            return
        experts, k = self._experts, self._top_k
        joined = np.concatenate(self._waiting)
        self._waiting, self._waiting_tokens = [], 0
        columns = np.ascontiguousarray(joined.transpose(1, 2, 0))
        index = np.empty((k, k, len(joined)), np.int64)
        half = np.empty((k * (k - 1) // 2, len(joined)), np.int64)
        first = columns[0].astype(np.int64)
        for layer in range(len(columns)):
            scaled = first * experts
            row = 0
            for i in range(k - 1):
                np.add(scaled[i], first[i + 1 :], out=half[row : row + k - 1 - i])
                row += k - 1 - i
            if k > 1:
                _increase(self.together[layer], _histogram(half, experts))
            if layer + 1 < len(columns):
                following = columns[layer + 1].astype(np.int64)
                np.add(scaled[:, None], following[None], out=index)
                _increase(self.onward[layer], _histogram(index, experts))
                first = following


def _increase(table: Counts, counts: Counts) -> None:
    np.add(table, counts, out=table, casting="unsafe")


def _histogram(index: Counts, experts: int) -> Counts:
    return np.bincount(index.reshape(-1), minlength=experts * experts).reshape(experts, experts)


def streams(block: RoutingTrace) -> list[tuple[Stream, npt.NDArray[np.int64]]]:
    """The tokens of each (rank, workload) of a block, in the order recorded; rank 0 where ranks are unknown."""
    width = len(block.workloads)
    source = np.zeros(block.num_tokens, np.int64) if block.source is None else block.source
    ranks, rank_code = np.unique(source, return_inverse=True)
    code = rank_code * width + block.workload
    order = np.argsort(code, kind="stable")
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    parts = np.split(order, starts[1:]) if len(order) else []
    return [((int(ranks[code[p[0]] // width]), block.workloads[code[p[0]] % width]), p) for p in parts]


def _renamed(sample: RoutingTrace, workloads: tuple[str, ...]) -> RoutingTrace:
    code_of = {name: code for code, name in enumerate(workloads)}
    # A name that no token of the sample has may be unknown here; its code is then never used.
    codes = np.array([code_of.get(name, 0) for name in sample.workloads], np.int64)[sample.workload]
    codes.flags.writeable = False
    return replace(sample, workload=codes, workloads=workloads)
