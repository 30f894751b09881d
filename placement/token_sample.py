"""A sample of whole sequences that does not depend on the order in which tokens arrive."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .trace import RoutingTrace

SPAN_TOKENS = 4096

HashArray = npt.NDArray[np.uint64]


class TokenSample:
    """Keeps at most `limit` tokens: whole sequences, and of sequences longer than 4,096 tokens whole spans of that many.

    Every (sequence, span) has a hash; kept are those of the smallest hashes whose tokens together stay within the limit.
    What lies past that cut now lies past it for good, so it can be dropped while tokens still arrive, and the result is
    the same however the tokens are cut into blocks or shared between accumulators. Gate weights and steps are not kept:
    a part of a step is not a step.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._span = min(SPAN_TOKENS, max(1, limit // 4))
        self._cut = np.uint64(np.iinfo(np.uint64).max)
        self._blocks: list[tuple[RoutingTrace, HashArray]] = []
        self._held = 0

    def add(self, block: RoutingTrace) -> None:
        self._keep(replace(block, gate_weights=None, step=None), span_hash(block, self._span))

    def merge(self, other: TokenSample) -> None:
        """Adds another sample of the same limit, as if its tokens had come after these."""
        if other._cut < self._cut:
            self._cut_at(other._cut)
        for block, hashes in other._blocks:
            self._keep(block, hashes)

    def result(self) -> RoutingTrace | None:
        """The sample in order of sequence and position, or None when it is empty."""
        self._drop()
        if not self._held:
            return None
        joined = RoutingTrace.concatenate([block for block, _ in self._blocks])
        return joined.select(np.lexsort((joined.position, joined.sequence)))

    def _keep(self, block: RoutingTrace, hashes: HashArray) -> None:
        kept = hashes < self._cut
        count = int(kept.sum())
        if count:
            self._blocks.append((block.select(kept), hashes[kept]))
            self._held += count
        if self._held > self.limit + self.limit // 4:
            self._drop()

    def _drop(self) -> None:
        if self._held <= self.limit:
            return
        hashes, counts = np.unique(np.concatenate([hashes for _, hashes in self._blocks]), return_counts=True)
        self._cut_at(hashes[np.searchsorted(np.cumsum(counts), self.limit, side="right")])

    def _cut_at(self, cut: np.uint64) -> None:
        self._cut = cut
        blocks, self._blocks, self._held = self._blocks, [], 0
        while blocks:
            block, hashes = blocks.pop(0)
            kept = hashes < cut
            if kept.any():
                self._blocks.append((block.select(kept), hashes[kept]))
                self._held += int(kept.sum())


def span_hash(trace: RoutingTrace, span_tokens: int) -> HashArray:
    """[T] hash of each token's sequence and span: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), twice."""
    with np.errstate(over="ignore"):
        return _mix(_mix(trace.sequence.view(np.uint64)) ^ (trace.position // span_tokens).view(np.uint64))


def _mix(values: HashArray) -> HashArray:
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))
