"""Expert loads over successive spans of a stream of tokens, in bounded memory, and what each of them weighs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_WINDOWS = 256
FIRST_WINDOW_TOKENS = 256

Stream = tuple[int, str]
"""The tokens one rank recorded of one workload, in the order recorded."""


def window_weights(
    load: npt.NDArray[np.float64], workload: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.float64]:
    """[S, L] how much each layer of each window of loads [S, L, E] counts, all together 1.

    Layers count alike, and in each its windows by the tokens they hold: what is empty counts nowhere. Of loads without
    any token all count alike. workload: [S] codes where workloads are compared: each by itself then, all alike.
    """
    if workload is not None:
        present = np.unique(workload)
        result = np.zeros(load.shape[:2])
        for code in present:
            result[workload == code] = window_weights(load[workload == code]) / len(present)
        return result
    tokens = load.sum(axis=2)
    layer = tokens.sum(axis=0)
    busy = layer > 0
    if not busy.any():
        return np.full(tokens.shape, 1.0 / tokens.size)
    return np.asarray(tokens / np.where(busy, layer, 1.0) / busy.sum())


def with_tokens(load: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """[S] which windows of loads [S, L, E] hold any token."""
    return np.asarray(load.any(axis=(1, 2)))


class LoadWindows:
    """Loads [L, E] of each window: window i of a workload holds the i-th span of `window_tokens` tokens of every rank.

    When there are more than 256 windows (or more than one each, for more workloads than that), neighbours are joined and
    `window_tokens` doubles. Spans are numbered from the start of their stream, so the windows depend neither on how the
    stream was cut into blocks nor on how many accumulators counted parts of it.

    preceding: tokens of each stream that come before the first block added here.
    """

    def __init__(self, layers: int, experts: int, preceding: Mapping[Stream, int] | None = None) -> None:
        self._layers, self._experts = layers, experts
        self._seen: dict[Stream, int] = dict(preceding or {})
        self._counts: dict[tuple[str, int], npt.NDArray[np.int64]] = {}
        self.window_tokens = FIRST_WINDOW_TOKENS

    def add(self, stream: Stream, expert_ids: npt.NDArray[np.unsignedinteger[Any]]) -> None:
        """Counts the next tokens [n, L, k] of a stream."""
        first = self._seen.get(stream, 0)
        done, tokens = 0, len(expert_ids)
        while done < tokens:
            window = (first + done) // self.window_tokens
            stop = min(tokens, (window + 1) * self.window_tokens - first)
            self._put((stream[1], window), self._loads(expert_ids[done:stop]))
            self._shrink()
            done = stop
        self._seen[stream] = first + tokens

    def merge(self, other: LoadWindows) -> None:
        """Adds what another instance counted; its streams are numbered as it was told when built."""
        while self.window_tokens < other.window_tokens:
            self._double()
        ratio = self.window_tokens // other.window_tokens
        for (workload, window), loads in other._counts.items():
            self._put((workload, window // ratio), loads.copy())
        for stream, tokens in other._seen.items():
            self._seen[stream] = max(tokens, self._seen.get(stream, 0))
        self._shrink()

    def workload_load(self, workload: str) -> npt.NDArray[np.int64]:
        """[L, E] over all windows of a workload."""
        total = np.zeros((self._layers, self._experts), np.int64)
        for (name, _), loads in self._counts.items():
            if name == workload:
                total += loads
        return total

    def result(self, workloads: tuple[str, ...]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Loads [S, L, E] and the workload [S] of each window, by workload and in time order."""
        code_of = {name: code for code, name in enumerate(workloads)}
        keys = sorted(self._counts, key=lambda key: (code_of[key[0]], key[1]))
        load = np.empty((len(keys), self._layers, self._experts))
        for row, key in enumerate(keys):
            load[row] = self._counts[key]
        return load, np.array([code_of[name] for name, _ in keys], dtype=np.int64)

    def _loads(self, expert_ids: npt.NDArray[np.unsignedinteger[Any]]) -> npt.NDArray[np.int64]:
        layers, experts = self._layers, self._experts
        index = expert_ids + (np.arange(layers) * experts)[:, None]
        return np.bincount(index.ravel(), minlength=layers * experts).reshape(layers, experts)

    def _put(self, key: tuple[str, int], loads: npt.NDArray[np.int64]) -> None:
        if key in self._counts:
            self._counts[key] += loads
        else:
            self._counts[key] = loads

    def _shrink(self) -> None:
        while len(self._counts) > MAX_WINDOWS and len(self._counts) > len({name for name, _ in self._counts}):
            self._double()

    def _double(self) -> None:
        old, self._counts = self._counts, {}
        self.window_tokens *= 2
        for (workload, window), loads in old.items():
            self._put((workload, window // 2), loads)
