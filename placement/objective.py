"""What a plan is to minimise, and one figure from many step times as its risk asks: a mean, tail, or worst workload.

Figures [S] are seconds of steps, or of windows, whose weights [S] say how much each counts. Workloads are codes [S]
into W names, kinds codes of the batch that a step is of: a tail is taken of the steps of each kind, since the slowest
of all are only those of the largest kind. Every risk is the largest weighted sum of figures over a set of weights (its
dual form; for cvar Rockafellar and Uryasev, J. Risk 2, 2000): `risk_value` is that largest sum, `risk_weights` are the
weights that reach it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from .._types import FloatArray, IntArray
from .errors import InputError
from .model import row_value_bytes
from .validation import Record

SLACK = 0.015
"""Of the mean load, by default: what a rank may have above it before a copy is worth its bytes."""
ReplicaChoice = Literal["share", "nearest", "balanced"]
Division = Literal["local", "lp", "waterfill"]
"""How a step's tokens are divided among replicas, anew for every step.

local: each device keeps what its own tokens ask of it, and then its node's, while it is not above the least possible
largest load; the rest goes where there is room (`ExpertParallelMoE`). lp: the least possible largest load, wherever
tokens come from (DeepSeek's LPLB; SGLang's `--ep-dispatch-algorithm lp`). waterfill: in proportion to what devices lack
of the mean beside experts without replicas, a tenth more to the token's own device (the weights by which SGLang's
Waterfill deals the shared expert, of which every device has a replica; `layers/moe/deepep_waterfill.py`).
"""
DispatchKind = Literal["normal", "low_latency", "all_to_all", "all_gather"]
"""How tokens travel to experts and results back.

normal: one copy a (token, device): DeepEP's normal mode, TensorRT-LLM's NVLink kernels, moeplace's own layer.
low_latency: one copy a (token, expert): DeepEP's low-latency mode, vLLM-Ascend's MC2. all_to_all: the same by a
collective (NCCL): Megatron-LM, vLLM-Ascend. all_gather: every token to every device, and reduce-scatter: no plan
changes it.
"""


class Objective(Record):
    """How the layer runs, and which figure of the step times counts.

    execution: "dispatch_combine" (tokens live on a source rank; DeepSpeed, Megatron, vLLM, SGLang, TensorRT-LLM) or
    "context_coherent" (tokens stay where their expert ran; ExFlow).
    risk: "mean", "cvar:q" (mean of the slowest 1-q of steps), "worst_workload" (largest mean of a workload), or
    "regret" (largest loss against the best plan of each workload).
    split: whether an expert's replicas take equal shares of its tokens or any.
    replica_choice: which replica serves a token: "share" (by chance, whoever asks), or "nearest" (on the token's source
    rank, else in its node, else any, each by share: SGLang's static and dynamic dispatch), or "balanced" (each step's
    tokens divided anew so that the largest device load is the least possible; shares count for nothing). Set it to what
    the engine does; but for "share" dispatch_combine only, since a token keeps no rank otherwise.
    division: how "balanced" divides: "local" (own tokens stay while the device is under the target, then the node's,
    the rest is spilled; `ExpertParallelMoE`), "lp" (wherever tokens come from; SGLang's `--ep-dispatch-algorithm lp`,
    LPLB) or "waterfill" (in proportion to what devices lack of the mean; SGLang's Waterfill); see
    `placement/division.py`.
    online: spare slots of each device into which experts are copied anew for every step, from devices of its node; the
    step's tokens are then divided among homes and copies (see `placement/online.py`). Every expert has one slot, its
    home, beside them. online_slack: what a device may have above the mean load before it is worth a copy, as a part of
    the mean.
    dispatch_dtype, combine_dtype: how activations travel to experts and back: bf16, fp8, or by groups of values with a
    scale of two bytes each, as int4/32.
    node_dedup: one copy a (token, node) between nodes, fanned out inside, as DeepEP does; False sends every copy.
    prefill_dispatch, decode_dispatch: how tokens travel in prefill and in decode (steps that do not say are decode up
    to 256 tokens a device):
    "normal" (one copy a (token, device), as DeepEP's normal mode), "low_latency" or "all_to_all" (one a (token,
    expert), as DeepEP's low-latency mode and NCCL) or "all_gather" (all tokens everywhere, whatever the plan).
    dispatch_combine only, but for "normal".
    """

    execution: Literal["dispatch_combine", "context_coherent"] = "dispatch_combine"
    risk: str = "mean"
    split: Literal["equal", "free"] = "equal"
    replica_choice: ReplicaChoice = "share"
    division: Division = "local"
    online: int = Field(default=0, ge=0)
    online_slack: float = Field(default=SLACK, ge=0.0, allow_inf_nan=False)
    dispatch_dtype: str = "bf16"
    combine_dtype: str = "bf16"
    node_dedup: bool = True
    prefill_dispatch: DispatchKind = "normal"
    decode_dispatch: DispatchKind = "normal"

    @model_validator(mode="after")
    def _known(self) -> Self:
        for field in ("dispatch_dtype", "combine_dtype"):
            try:
                row_value_bytes(getattr(self, field))
            except ValueError as error:
                raise ValueError(f"{field} ({getattr(self, field)!r}) {error}") from None
        if self.risk not in ("mean", "worst_workload", "regret") and self._tail() is None:
            raise ValueError(
                f"risk ({self.risk!r}) must be mean, cvar:q with q in [0, 1) (cvar:0.99), worst_workload or regret"
            )
        if self.replica_choice != "share" and self.execution == "context_coherent":
            raise ValueError(
                f'replica_choice ("{self.replica_choice}") needs tokens with a source rank, which execution '
                '("context_coherent") does not give them; use "dispatch_combine", or replica_choice "share"'
            )
        if self.division != "local" and self.replica_choice != "balanced":
            raise ValueError(
                f'division ("{self.division}") says how replica_choice "balanced" divides a step\'s tokens; '
                f'replica_choice ("{self.replica_choice}") does not divide them'
            )
        for field in ("prefill_dispatch", "decode_dispatch"):
            if getattr(self, field) != "normal" and self.execution == "context_coherent":
                raise ValueError(
                    f"{field} ({getattr(self, field)!r}) brings results back to a token's source rank, which execution "
                    '("context_coherent") does not; use "dispatch_combine", or "normal"'
                )
        if self.online and (self.replica_choice, self.execution) != ("share", "dispatch_combine"):
            raise ValueError(
                f"online ({self.online}) divides tokens among homes and copies by itself, in dispatch_combine; "
                f"execution is {self.execution!r}, replica_choice {self.replica_choice!r} (leave it unset)"
            )
        return self

    def filled(self, **values: Any) -> Objective:
        """With these values for fields that nobody set. They still count as unset, so that another engine's go first.

        Raises:
            InputError: a value out of range.
        """
        unset = {name: value for name, value in values.items() if name not in self.model_fields_set}
        result = Objective(**{**self.model_dump(), **unset})
        object.__setattr__(result, "__pydantic_fields_set__", set(self.model_fields_set))
        return result

    def replace(self, **changes: Any) -> Objective:
        """A changed copy, validated again; what `filled` filled stays as it is."""
        values = self.model_dump()
        if "division" not in self.model_fields_set and changes.get("replica_choice", "balanced") != "balanced":
            # An engine's rule goes with its choice of replicas.
            del values["division"]
        result = Objective(**{**values, **changes})
        object.__setattr__(result, "__pydantic_fields_set__", {*self.model_fields_set, *changes})
        return result

    @property
    def tail(self) -> float | None:
        """q of a "cvar:q" risk, else None."""
        return self._tail()

    def _tail(self) -> float | None:
        kind, _, level = self.risk.partition(":")
        try:
            q = float(level)
        except ValueError:
            return None
        return q if kind == "cvar" and 0.0 <= q < 1.0 else None


NEAR = 0.01
"""Workloads within this of the worst, relatively, share its weight: a good plan has several that are the worst."""


def risk_value(
    step_seconds: FloatArray,
    step_workload: IntArray,
    objective: Objective,
    best: FloatArray | None = None,
    weight: FloatArray | None = None,
    kind: IntArray | None = None,
) -> float:
    """The objective's figure, in seconds a step.

    Args:
        step_seconds: [S] seconds of each step.
        step_workload: [S] codes of the workload of each.
        objective: names the risk.
        best: [W] mean step time of each workload's own best plan, which "regret" measures against.
        weight: [S] how much each counts, as windows do by their tokens; None for all alike. What weighs nothing is not
            looked at.
        kind: [S] codes of the kinds of steps; None for one.

    Raises:
        InputError: regret without `best`.
    """
    if weight is not None:
        counted = weight > 0
        step_seconds, step_workload, weight = step_seconds[counted], step_workload[counted], weight[counted]
        kind = None if kind is None else kind[counted]
    if objective.tail is not None:
        return weighted_mean(step_seconds, tail_weight(step_seconds, objective.tail, weight, kind))
    if objective.risk == "mean":
        return weighted_mean(step_seconds, weight)
    codes, means = workload_means(step_seconds, step_workload, weight)
    if objective.risk == "worst_workload":
        return float(means.max())
    if best is None:
        raise InputError("risk 'regret' needs the mean step time of each workload's own best plan")
    return float((means - best[codes]).max())


def risk_weights(
    step_seconds: FloatArray,
    step_workload: IntArray,
    objective: Objective,
    best: FloatArray | None = None,
    weight: FloatArray | None = None,
    kind: IntArray | None = None,
) -> tuple[FloatArray, float]:
    """Weights that make a lower bound of a weighted sum of step times a lower bound of the risk, over all plans.

    Args:
        step_seconds: [S] of a plan, for which the two are (nearly) the same.
        step_workload: [S] codes of the workload of each.
        objective: names the risk.
        best: [W] as in `risk_value`.
        weight: [S] as in `risk_value`, every step above 0.
        kind: [S] as in `risk_value`.

    Returns:
        ([S] weights summing to one, offset): for any plan, weights @ its step seconds + offset is at most its risk.
    """
    if objective.tail is not None:
        return tail_weight(step_seconds, objective.tail, weight, kind), 0.0
    each = np.full(len(step_seconds), 1.0 / len(step_seconds)) if weight is None else weight / weight.sum()
    if objective.risk == "mean":
        return each, 0.0
    codes, means = workload_means(step_seconds, step_workload, weight)
    own = np.zeros(len(codes)) if best is None or objective.risk != "regret" else best[codes]
    worst = (means - own) >= (means - own).max() - NEAR * means.max()
    part, group = worst / worst.sum(), np.searchsorted(codes, step_workload)
    return (part / np.bincount(group, weights=each))[group] * each, -float(part @ own)


def tail_weight(
    figures: FloatArray, tail: float, weight: FloatArray | None = None, kind: IntArray | None = None
) -> FloatArray:
    """[S] what each of `figures` [S] counts in the mean of the largest 1 - tail of them, all together 1.

    weight: [S] that part is one of weight, the last taken in part; None: one of their number, rounded, at least one.
    kind: [S] codes of kinds, of each of which the largest are taken; each counts by its weight.
    """
    if kind is not None and len(codes := np.unique(kind)) > 1:
        even = np.full(len(figures), 1.0 / len(figures)) if weight is None else weight
        result = np.zeros(len(figures))
        for code in codes:
            mine = kind == code
            result[mine] = tail_weight(figures[mine], tail, even[mine]) * even[mine].sum()
        return np.asarray(result / result.sum())
    order = np.argsort(figures)[::-1]
    taken = np.zeros(len(figures))
    if weight is None:
        taken[order[: max(1, round(len(figures) * (1.0 - tail)))]] = 1.0
    else:
        before = np.cumsum(weight[order]) - weight[order]
        taken[order] = np.clip((1.0 - tail) * weight.sum() - before, 0.0, weight[order])
    return np.asarray(taken / taken.sum())


def workload_means(
    figures: FloatArray, workload: IntArray, weight: FloatArray | None = None
) -> tuple[IntArray, FloatArray]:
    """([V] codes of the workloads that are there, [V] means of their figures [S] by weight [S], all alike without)."""
    codes = np.unique(workload)
    parts = [workload == code for code in codes]
    means = [weighted_mean(figures[part], None if weight is None else weight[part]) for part in parts]
    return codes, np.array(means)


def best_by_workload(
    figures: Sequence[FloatArray], workload: IntArray, workloads: int, weight: FloatArray | None = None
) -> FloatArray:
    """[W] the least mean step time that any of several plans has on each workload, 0 where it has no step.

    Regret among these plans is measured against it. figures: [S] of each plan. weight: [S] as in `risk_value`.
    """
    best = np.zeros(workloads)
    codes = np.unique(workload)
    best[codes] = np.min([workload_means(of_plan, workload, weight)[1] for of_plan in figures], axis=0)
    return best


def weighted_mean(figures: npt.NDArray[Any], weight: FloatArray | None) -> float:
    """Of figures [S] by weight [S]; None: all alike."""
    return float(weighted_means(figures, weight))


def weighted_means(figures: npt.NDArray[Any], weight: FloatArray | None) -> FloatArray:
    """[...] of figures [S, ...] by weight [S]; None: all alike."""
    if weight is None:
        return np.asarray(figures.mean(axis=0))
    values = figures.astype(np.float64)
    # Above the least of those that count, so that rounding does not end below it.
    least = values[weight > 0].min(axis=0)
    return np.asarray(least + np.tensordot(weight, values - least, axes=1) / weight.sum())


def percentiles(figures: FloatArray, ranks: Sequence[float], weight: FloatArray | None) -> list[float]:
    """Of figures [S], that part of which by weight [S] lies at or below (None: all alike, between two figures)."""
    if weight is None:
        return [float(value) for value in np.percentile(figures, ranks)]
    order = np.argsort(figures)
    reached = np.cumsum(weight[order])
    at = np.searchsorted(reached, np.asarray(ranks) / 100.0 * reached[-1] * (1 - 1e-12))
    return [float(figures[order[i]]) for i in np.minimum(at, len(order) - 1)]
