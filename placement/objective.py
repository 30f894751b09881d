"""What a plan is to minimise."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from .division import Division
from .model import row_value_bytes
from .validation import Record

SLACK = 0.015
"""Of the mean load, by default: what a rank may have above it before a copy is worth its bytes."""
ReplicaChoice = Literal["share", "nearest", "balanced"]
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
    division: how "balanced" divides: "local" (own tokens stay while the device is under the target, the rest is
    spilled; `ExpertParallelMoE`), "lp" (wherever tokens come from; SGLang's `--ep-dispatch-algorithm lp`, LPLB) or
    "waterfill" (in proportion to what devices lack of the mean; SGLang's Waterfill); see `placement/division.py`.
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
