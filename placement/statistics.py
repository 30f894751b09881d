"""What solvers read: loads, co-activation and transitions, counted from routing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .errors import InputError, UnsupportedError
from .trace import RoutingTrace

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RoutingStatistics:
    """Counts over S windows of routing, W workloads, L MoE layers and E experts.

    load: [S, L, E] tokens each expert got in each window. window_workload: [S] index into `workloads`.
    coactivation: [W, L, E, E] tokens that chose both experts in a layer (symmetric, zero diagonal).
    transitions: [W, L-1, E, E] expert at layer l to expert at l+1, every pair of a token's k x k counting 1/k, so that
    a token weighs k. sample: whole sequences kept for building steps. Count-only records have none of the last three.
    tokens: how many tokens were counted (0 when unknown). fingerprint: SHA-256 of what was counted.
    """

    experts: int
    moe_layers: tuple[int, ...]
    load: FloatArray
    window_workload: npt.NDArray[np.int64]
    workloads: tuple[str, ...] = ("",)
    top_k: int | None = None
    coactivation: FloatArray | None = None
    transitions: FloatArray | None = None
    sample: RoutingTrace | None = None
    tokens: int = 0
    fingerprint: str = ""

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

    def _counts_only(self, wanted: str) -> str:
        return (
            f"these statistics hold expert loads only, {wanted} is needed; record routing in token mode, "
            "or use a solver that needs loads alone (eplb, moetuner without traffic)"
        )

    @classmethod
    def from_trace(cls, trace: RoutingTrace, sample_tokens: int = 200_000) -> RoutingStatistics:
        """Counts a trace held in memory; `moeplace.profiler.aggregate` does the same for shards of any size."""
        from .accumulate import StatisticsAccumulator

        accumulator = StatisticsAccumulator.like(trace, sample_tokens=sample_tokens)
        accumulator.add(trace)
        return accumulator.finish()

    @classmethod
    def from_counts(
        cls,
        counts: Mapping[str, npt.ArrayLike] | npt.ArrayLike,
        moe_layers: Iterable[int] | None = None,
        top_k: int | None = None,
    ) -> RoutingStatistics:
        """Statistics from expert loads alone: [L, E], or [T, L, E] for T windows, one array or one a workload.

        A single float64 array that cannot be written to is kept as it is; any other is copied once.

        Raises:
            InputError: shapes that disagree, negative or non-finite counts, no counts at all; the workload is named.
        """
        named = dict(counts) if isinstance(counts, Mapping) else {"": counts}
        if not named:
            raise InputError("from_counts: no workload given")
        windows: list[FloatArray] = []
        codes: list[int] = []
        for code, (name, given) in enumerate(named.items()):
            array = np.asarray(given, dtype=np.float64)
            array = array[None] if array.ndim == 2 else array
            if array.ndim != 3 or 0 in array.shape or (windows and array.shape[1:] != windows[0].shape[1:]):
                wanted = f"[{windows[0].shape[1]}, {windows[0].shape[2]}]" if windows else "[layers, experts]"
                raise InputError(
                    f"from_counts: workload {name!r} has shape {np.shape(given)}, expected {wanted}, "
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
        layers = _layers(moe_layers, load.shape[1])
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
        )


def _layers(moe_layers: Iterable[int] | None, count: int) -> tuple[int, ...]:
    layers: Sequence[int] = range(count) if moe_layers is None else [int(layer) for layer in moe_layers]
    if len(layers) != count:
        raise InputError(f"moe_layers names {len(layers)} layers, the counts have {count}")
    return tuple(layers)
