"""What solvers read: loads, co-activation and transitions, counted from routing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from .._arguments import check_methods, check_types
from .._display import Displayed, names, plural, span
from .._types import BoolArray, FloatArray, IntArray
from .errors import InputError, UnsupportedError
from .model import ModelSpec
from .steps import Batch
from .trace import ForwardCalls, RoutingTrace, apart, layer_index
from .validation import generator

# Expert loads over successive spans of a stream of tokens, in bounded memory, and what each of them weighs.


MAX_WINDOWS = 256
FIRST_WINDOW_TOKENS = 256

Stream = tuple[int, str]
"""The tokens one rank recorded of one workload, in the order recorded."""


def window_weights(load: FloatArray, workload: IntArray | None = None) -> FloatArray:
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


def with_tokens(load: FloatArray) -> BoolArray:
    """[S] which windows of loads [S, L, E] hold any token."""
    return np.asarray(load.any(axis=(1, 2)))


class LoadWindows:
    """Loads [L, E] of each window: window i of a workload holds the i-th span of `window_tokens` tokens of every rank.

    When there are more than 256 windows (or more than one each, for more workloads than that), neighbours are joined
    and `window_tokens` doubles. Spans are numbered from the start of their stream, so the windows depend neither on how
    the stream was cut into blocks nor on how many accumulators counted parts of it.

    preceding: tokens of each stream that come before the first block added here.
    """

    def __init__(self, layers: int, experts: int, preceding: Mapping[Stream, int] | None = None) -> None:
        self._layers, self._experts = layers, experts
        self._seen: dict[Stream, int] = dict(preceding or {})
        self._counts: dict[tuple[str, int], IntArray] = {}
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

    def workload_load(self, workload: str) -> IntArray:
        """[L, E] over all windows of a workload."""
        total = np.zeros((self._layers, self._experts), np.int64)
        for (name, _), loads in self._counts.items():
            if name == workload:
                total += loads
        return total

    def result(self, workloads: tuple[str, ...]) -> tuple[FloatArray, IntArray]:
        """Loads [S, L, E] and the workload [S] of each window, by workload and in time order."""
        code_of = {name: code for code, name in enumerate(workloads)}
        keys = sorted(self._counts, key=lambda key: (code_of[key[0]], key[1]))
        load = np.empty((len(keys), self._layers, self._experts))
        for row, key in enumerate(keys):
            load[row] = self._counts[key]
        return load, np.array([code_of[name] for name, _ in keys], dtype=np.int64)

    def _loads(self, expert_ids: npt.NDArray[np.unsignedinteger[Any]]) -> IntArray:
        layers, experts = self._layers, self._experts
        index = expert_ids + (np.arange(layers) * experts)[:, None]
        return np.bincount(index.ravel(), minlength=layers * experts).reshape(layers, experts)

    def _put(self, key: tuple[str, int], loads: IntArray) -> None:
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


# A sample of whole sequences that does not depend on the order in which tokens arrive.


SPAN_TOKENS = 4096

HashArray = npt.NDArray[np.uint64]


class TokenSample:
    """Keeps at most `limit` tokens: whole sequences, and of sequences longer than 4,096 tokens whole spans of that
    many.

    Every (sequence, span) has a hash; kept are those of the smallest hashes whose tokens together stay within the
    limit. What lies past that cut now lies past it for good, so it can be dropped while tokens still arrive, and the
    result is the same however the tokens are cut into blocks or shared between accumulators. Gate weights and steps are
    not kept: a part of a step is not a step.
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
        chosen = hashes < self._cut
        count = int(chosen.sum())
        if count:
            self._blocks.append((block.select(chosen), hashes[chosen]))
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
            chosen = hashes < cut
            if chosen.any():
                self._blocks.append((block.select(chosen), hashes[chosen]))
                self._held += int(chosen.sum())


def span_hash(trace: RoutingTrace, span_tokens: int) -> HashArray:
    """[T] hash of each token's sequence and span: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), twice."""
    with np.errstate(over="ignore"):
        return _mix(_mix(trace.sequence.view(np.uint64)) ^ (trace.position // span_tokens).view(np.uint64))


def _mix(values: HashArray) -> HashArray:
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


@check_methods
@dataclass(frozen=True, eq=False, repr=False)
class RoutingStatistics(Displayed):
    """Counts over S windows of routing, W workloads, L MoE layers and E experts.

    load: [S, L, E] tokens each expert got in each window. window_workload: [S] index into `workloads`.
    coactivation: [W, L, E, E] tokens that chose both experts in a layer (symmetric, zero diagonal).
    transitions: [W, L-1, E, E] expert at layer l to expert at l+1, every pair of a token's k x k counting 1/k, so that
    a token weighs k. sample: whole sequences kept for building steps. Count-only records have none of the last three.
    tokens: how many tokens were counted (0 when unknown). fingerprint: SHA-256 of what was counted. model: what was
    recorded, where the recording says so. batches: kinds of the recording's forward calls, where these are known.

    Example:
        >>> import moeplace as mp
        >>> mp.RoutingStatistics.from_counts([[10, 20, 30, 40]]).total_load.tolist()
        [[10.0, 20.0, 30.0, 40.0]]
        >>> mp.RoutingStatistics.from_trace(mp.read_trace("examples/data/olmoe_small"))  # doctest: +SKIP
    """

    experts: int
    moe_layers: tuple[int, ...]
    load: FloatArray
    window_workload: IntArray
    workloads: tuple[str, ...] = ("",)
    top_k: int | None = None
    coactivation: FloatArray | None = None
    transitions: FloatArray | None = None
    sample: RoutingTrace | None = None
    tokens: int = 0
    fingerprint: str = ""
    model: ModelSpec | None = None
    batches: tuple[Batch, ...] = ()

    def __post_init__(self) -> None:
        layers, width = len(self.moe_layers), len(self.workloads)
        if self.load.ndim != 3 or self.load.shape[1:] != (layers, self.experts) or not len(self.load):
            raise InputError(
                f"RoutingStatistics.load has shape {self.load.shape}, expected [windows >= 1, {layers}, {self.experts}]"
            )
        if self.window_workload.shape != (len(self.load),):
            raise InputError(
                f"RoutingStatistics.window_workload has shape {self.window_workload.shape}, "
                f"expected one workload for each of the {len(self.load)} windows"
            )
        if self.window_workload.min() < 0 or self.window_workload.max() >= width:
            raise InputError(
                f"RoutingStatistics.window_workload runs from {self.window_workload.min()} to "
                f"{self.window_workload.max()}, but {width} workloads are named"
            )
        pairs = {
            "coactivation": (self.coactivation, (width, layers, self.experts, self.experts)),
            "transitions": (self.transitions, (width, layers - 1, self.experts, self.experts)),
        }
        for name, (array, shape) in pairs.items():
            if array is not None and array.shape != shape:
                raise InputError(f"RoutingStatistics.{name} has shape {array.shape}, expected {shape}")
        for name, values in {"load": self.load, **{name: array for name, (array, _) in pairs.items()}}.items():
            # A NaN is the smallest and the largest of all, to numpy.
            if values is not None and values.size and not (values.min() >= 0 and np.isfinite(values.max())):
                raise InputError(f"RoutingStatistics.{name} holds negative or non-finite values; counts are wanted")

    def _summary(self) -> tuple[str, dict[str, str]]:
        title = f"{plural(len(self.load), 'window')}, {self.num_layers} layers, {self.experts} experts"
        mean = self.total_load.mean(axis=1)
        ratio = self.total_load.max(axis=1) / np.where(mean > 0, mean, 1.0)
        pairs = [name for name in ("coactivation", "transitions") if getattr(self, name) is not None]
        return title, {
            "model": "not recorded" if self.model is None else self.model.title,
            "layers": span(self.moe_layers),
            "tokens": f"{self.tokens:,}" if self.tokens else "unknown",
            "workloads": names(self.workloads),
            "expert load": f"max/mean {ratio.mean():.2f}, mean over layers",
            "pairs": ", ".join(pairs) or "none: loads alone",
            "sample": "none" if self.sample is None else plural(self.sample.num_tokens, "token"),
        }

    @property
    def num_layers(self) -> int:
        return len(self.moe_layers)

    @cached_property
    def total_load(self) -> FloatArray:
        """[L, E] tokens over all windows."""
        return np.asarray(self.load.sum(axis=0))

    @cached_property
    def workload_load(self) -> FloatArray:
        """[W, L, E] tokens over the windows of each workload."""
        result = np.zeros((len(self.workloads), *self.load.shape[1:]))
        np.add.at(result, self.window_workload, self.load)
        return result

    @cached_property
    def total_transitions(self) -> FloatArray:
        """[L-1, E, E] over all workloads.

        Raises:
            UnsupportedError: this record has counts only.
        """
        if self.transitions is None:
            raise UnsupportedError(self._counts_only("transitions between layers"))
        return np.asarray(self.transitions.sum(axis=0))

    @cached_property
    def total_coactivation(self) -> FloatArray:
        """[L, E, E] over all workloads.

        Raises:
            UnsupportedError: this record has counts only.
        """
        if self.coactivation is None:
            raise UnsupportedError(self._counts_only("co-activation"))
        return np.asarray(self.coactivation.sum(axis=0))

    def require_sample(self) -> RoutingTrace:
        """The token sample.

        Raises:
            UnsupportedError: this record has none.
        """
        if self.sample is None or not self.sample.num_tokens:
            raise UnsupportedError(self._counts_only("a token sample"))
        return self.sample

    def split(
        self, by: Literal["sequence", "step", "time"] = "step", held_out: float = 0.25, seed: int = 0
    ) -> tuple[RoutingStatistics, RoutingStatistics]:
        """Parts counts into (train, held-out) windows; empty windows are in neither, each workload keeps its share.

        by: "time" holds out the last windows of each workload; the others draw windows at random, since counts know no
        sequences.

        Raises:
            InputError: held_out outside (0, 1), or fewer than two windows with tokens in a workload.
        """
        if not 0.0 < held_out < 1.0:
            raise InputError(f"held_out ({held_out}) must be between 0 and 1, both excluded")
        known, rng = with_tokens(self.load), generator(seed)
        mask = np.zeros(len(self.load), np.bool_)
        for code in np.unique(self.window_workload[known]):
            windows = np.flatnonzero(known & (self.window_workload == code))
            if len(windows) < 2:
                raise InputError(
                    f"workload {self.workloads[code]!r} has {len(windows)} window with tokens; it takes 2 to hold one "
                    "out"
                )
            count = min(len(windows) - 1, max(1, round(held_out * len(windows))))
            mask[windows[len(windows) - count :] if by == "time" else rng.choice(windows, count, replace=False)] = True

        def part(chosen: BoolArray) -> RoutingStatistics:
            digest = hashlib.sha256(f"{self.fingerprint} {np.flatnonzero(chosen).tolist()}".encode())
            load = self.load[chosen]
            tokens = round(float(load.sum(axis=(0, 2)).max()) / self.top_k) if self.top_k else 0
            return replace(
                self,
                load=load,
                window_workload=self.window_workload[chosen],
                coactivation=None,
                transitions=None,
                sample=None,
                tokens=tokens,
                fingerprint=digest.hexdigest(),
            )

        return part(known & ~mask), part(mask)

    def keep_layers(self, layers: Sequence[int]) -> RoutingStatistics:
        """The statistics of some layers only, by their absolute indices. Transitions stay where no layer between two
        that are kept goes.

        Raises:
            InputError: a layer that was not counted, or none.
        """
        index = layer_index(self.moe_layers, layers)
        names_ = tuple(self.moe_layers[i] for i in index)
        neighbours = index == list(range(index[0], index[-1] + 1))
        return replace(
            self,
            moe_layers=names_,
            load=self.load[:, index],
            coactivation=None if self.coactivation is None else self.coactivation[:, index],
            transitions=None if self.transitions is None or not neighbours else self.transitions[:, index[:-1]],
            sample=None if self.sample is None else self.sample.keep_layers(names_),
            fingerprint=hashlib.sha256(f"{self.fingerprint} {names_}".encode()).hexdigest(),
            model=None if self.model is None else self.model.replace(layers=len(names_), moe_layers=names_),
        )

    def of_model(self, model: ModelSpec) -> RoutingStatistics:
        """The statistics as those of a model, whose layers and experts they must have: it says k, and with it how many
        tokens were counted.

        Raises:
            InputError: the model is another one.
        """
        model = model.of_routing(self.experts, model.moe_layers, self.top_k)
        tokens = self.tokens or round(float(self.load.sum(axis=(0, 2)).max()) / model.top_k)
        return replace(self, model=model, moe_layers=model.moe_layers, top_k=model.top_k, tokens=tokens)

    @classmethod
    def join(cls, parts: Mapping[str, RoutingStatistics]) -> RoutingStatistics:
        """Statistics of several recordings of one model, each a workload of its own, by name.

        Raises:
            InputError: none given, or of different models.
        """
        if not parts:
            raise InputError("RoutingStatistics.join: nothing given")
        first = next(iter(parts.values()))
        for name, part in parts.items():
            for field in ("experts", "moe_layers", "top_k"):
                if getattr(part, field) != getattr(first, field):
                    raise InputError(
                        f"{name} is of another model than {next(iter(parts))}: {field} is {getattr(part, field)}, "
                        f"not {getattr(first, field)}"
                    )

        def stacked(field: str) -> FloatArray | None:
            tables = [getattr(part, field) for part in parts.values()]
            return None if any(table is None for table in tables) else np.stack([t.sum(axis=0) for t in tables])

        samples = [part.sample.tagged(name) for name, part in parts.items() if part.sample is not None]
        sizes = [len(part.load) for part in parts.values()]
        return replace(
            first,
            load=np.concatenate([part.load for part in parts.values()]),
            window_workload=np.repeat(np.arange(len(parts)), sizes),
            workloads=tuple(parts),
            coactivation=stacked("coactivation"),
            transitions=stacked("transitions"),
            sample=RoutingTrace.concatenate(apart(samples)) if len(samples) == len(parts) else None,
            tokens=sum(part.tokens for part in parts.values()) if all(part.tokens for part in parts.values()) else 0,
            fingerprint=hashlib.sha256(
                repr([(name, part.fingerprint) for name, part in parts.items()]).encode()
            ).hexdigest(),
            batches=first.batches if len({part.batches for part in parts.values()}) == 1 else (),
        )

    def _counts_only(self, what: str) -> str:
        return (
            f"these statistics hold expert loads only, {what} is needed; record routing in token mode, "
            "or use a solver that needs loads alone (eplb, moetuner without traffic)"
        )

    @classmethod
    @check_types
    def from_trace(cls, trace: RoutingTrace, sample_tokens: int = 200_000) -> RoutingStatistics:
        """Counts a trace held in memory; `moeplace.profiler.aggregate` does the same for shards of any size."""

        accumulator = StatisticsAccumulator.like(trace, sample_tokens=sample_tokens)
        accumulator.add(trace)
        return accumulator.finish()

    @classmethod
    def from_counts(
        cls,
        counts: Mapping[str, npt.ArrayLike] | npt.ArrayLike,
        moe_layers: Iterable[int] | None = None,
        top_k: int | None = None,
        model: ModelSpec | None = None,
    ) -> RoutingStatistics:
        """Statistics from expert loads alone: [L, E], or [T, L, E] for T windows, one array or one a workload.

        A single float64 array that cannot be written to is kept as it is; any other is copied once.

        Args:
            counts: tokens of each expert. moe_layers: [L] absolute layer indices (default: the model's, where one is
                given, else 0..L-1). top_k: experts a token, where known. model: what was recorded, so that `Problem`
                need not be told.

        Raises:
            InputError: shapes that disagree, negative or non-finite counts, no counts at all (the workload is named),
                or a model of another shape.
        """
        named = dict(counts) if isinstance(counts, Mapping) else {"": counts}
        if not named:
            raise InputError("from_counts: no workload given")
        windows: list[FloatArray] = []
        codes: list[int] = []
        for code, (name, loads) in enumerate(named.items()):
            try:
                array = np.asarray(loads, dtype=np.float64)
            except (TypeError, ValueError):
                raise InputError(
                    f"from_counts: workload {name!r} is {loads!r:.60}; expected numbers [T, L, E]"
                ) from None
            array = array[None] if array.ndim == 2 else array
            if array.ndim != 3 or 0 in array.shape or (windows and array.shape[1:] != windows[0].shape[1:]):
                expected_shape = f"[{windows[0].shape[1]}, {windows[0].shape[2]}]" if windows else "[layers, experts]"
                raise InputError(
                    f"from_counts: workload {name!r} has shape {np.shape(loads)}, expected {expected_shape}, "
                    "or the same with windows in front"
                )
            if not (array.min() >= 0 and np.isfinite(array.max())):
                raise InputError(f"from_counts: workload {name!r} holds negative or non-finite counts")
            windows.append(array)
            codes += [code] * len(array)
        first = next(iter(named.values()))
        if len(windows) > 1:
            load = np.concatenate(windows)
        else:
            shared = np.may_share_memory(windows[0], np.asarray(first)) and windows[0].flags.writeable
            load = windows[0].copy() if shared else windows[0]
        if moe_layers is None and model is not None and model.layers == load.shape[1]:
            moe_layers = model.moe_layers
        layers = _layers(moe_layers, load.shape[1])
        if model is not None:
            model = model.of_routing(load.shape[2], layers, top_k)
            top_k = model.top_k
        digest = hashlib.sha256(repr((tuple(named), layers, codes)).encode())
        digest.update(np.ascontiguousarray(load).data)
        return cls(
            experts=load.shape[2],
            moe_layers=layers,
            load=load,
            window_workload=np.array(codes, dtype=np.int64),
            workloads=tuple(str(name) for name in named),
            top_k=top_k,
            tokens=int(load.sum(axis=(0, 2)).max() / top_k) if top_k else 0,
            fingerprint=digest.hexdigest(),
            model=model,
        )


def _layers(moe_layers: Iterable[int] | None, count: int) -> tuple[int, ...]:
    layers: Sequence[int] = range(count) if moe_layers is None else [int(layer) for layer in moe_layers]
    if len(layers) != count:
        raise InputError(f"moe_layers names {len(layers)} layers, the counts have {count}")
    return tuple(layers)


# Counting routing block by block in bounded memory.


PAIR_TABLE_LIMIT = 1 << 29
"""Entries of co-activation and transition tables over all workloads (8 bytes each)."""

NARROW = np.uint32

Ids = npt.NDArray[np.unsignedinteger[Any]]
Counts = npt.NDArray[np.integer[Any]]


class StatisticsAccumulator:
    """Adds up blocks of a trace into `RoutingStatistics`; parts may be counted apart and merged.

    Totals, windows, sample and fingerprint do not depend on the sizes of the blocks, nor on how many accumulators
    shared the work, as long as each is told in `preceding` how many tokens of each (rank, workload) come before its
    first block. Memory is that of the result: the pair tables of each workload, 256 windows, and the sample.

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
        model: ModelSpec | None = None,
        batches: tuple[Batch, ...] = (),
    ) -> None:
        if sample_tokens < 0:
            raise InputError(f"sample_tokens ({sample_tokens}) must be 0 or more")
        self._experts, self._layers, self._top_k = num_experts, tuple(moe_layers), top_k
        self._model, self._batches, self._calls = model, batches, ForwardCalls()
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
            model=trace.model,
            batches=trace.whole_batches,
        )

    def add(self, block: RoutingTrace) -> None:
        """Counts the tokens of a block.

        Raises:
            InputError: the block is of another model.
        """
        shape = (block.num_experts, block.moe_layers, block.top_k)
        expected = (self._experts, self._layers, self._top_k)
        for name, here, there in zip(("num_experts", "moe_layers", "top_k"), shape, expected, strict=True):
            if here != there:
                raise InputError(f"StatisticsAccumulator.add: {name} is {here}, the blocks before had {there}")
        for (source, workload), tokens in streams(block):
            counts = self._counts_of(workload)
            for part in np.array_split(tokens, -(-len(tokens) // counts.chunk)):
                ids = block.expert_ids[part]
                counts.add(ids)
                self._windows.add((source, workload), ids)
        if not self._batches:
            self._calls.add(block)
        if self._sample.limit:
            self._sample.add(block)

    def merge(self, other: StatisticsAccumulator) -> None:
        """Adds what another accumulator counted of the same trace, as if its blocks had come after these."""
        for workload, counts in other._pairs.items():
            self._counts_of(workload).merge(counts)
        self._windows.merge(other._windows)
        self._calls.merge(other._calls)
        self._sample.merge(other._sample)

    def finish(self) -> RoutingStatistics:
        """The statistics of all tokens so far. Only workloads that have tokens are named, in order of their names.

        The fingerprint is SHA-256 over the exact counts (tokens, loads, pairs of each workload), so that the same
        tokens give the same one in whatever blocks, order or number of workers they were counted.

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
            model=self._model,
            batches=self._batches or self._calls.batches(),
        )

    def _counts_of(self, workload: str) -> _PairCounts:
        if workload not in self._pairs:
            entries = (len(self._pairs) + 1) * (2 * len(self._layers) - 1) * self._experts**2
            if entries > PAIR_TABLE_LIMIT:
                raise InputError(
                    f"co-activation and transitions of {len(self._layers)} layers, {self._experts} experts and more "
                    f"than {len(self._pairs)} workloads need {entries * 8 / 1e9:.1f} GB; give fewer workload tags, or "
                    "record counts only"
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

        Index rows run along tokens, which lets numpy add whole vectors: on 256 experts, top-8, half the time of a
        sparse matrix product or of the same with index rows of k experts.
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


def streams(block: RoutingTrace) -> list[tuple[Stream, IntArray]]:
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
