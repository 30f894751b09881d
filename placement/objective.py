"""What a plan is to minimise."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from .model import DTYPE_BYTES
from .validation import Record


class Objective(Record):
    """How the layer runs, and which figure of the step times counts.

    execution: "dispatch_combine" (tokens live on a source rank; DeepSpeed, Megatron, vLLM, SGLang, TensorRT-LLM) or
    "context_coherent" (tokens stay where their expert ran; ExFlow).
    risk: "mean", "cvar:q" (mean of the slowest 1-q of steps), "worst_workload" (largest mean of a workload), or
    "regret" (largest loss against the best plan of each workload).
    split: whether an expert's replicas take equal shares of its tokens or any.
    replica_choice: which replica serves a token: "share" (by chance, whoever asks), or "nearest" (on the token's source
    rank, else in its node, else any, each by share: SGLang's static and dynamic dispatch). Set it to what the engine
    does; dispatch_combine only, since a token keeps no rank otherwise.
    dispatch_dtype, combine_dtype: how activations travel to experts and back.
    node_dedup: one copy a (token, node) between nodes, fanned out inside, as DeepEP does; False sends every copy.
    """

    execution: Literal["dispatch_combine", "context_coherent"] = "dispatch_combine"
    risk: str = "mean"
    split: Literal["equal", "free"] = "equal"
    replica_choice: Literal["share", "nearest"] = "share"
    dispatch_dtype: str = "bf16"
    combine_dtype: str = "bf16"
    node_dedup: bool = True

    @model_validator(mode="after")
    def _known(self) -> Self:
        for field in ("dispatch_dtype", "combine_dtype"):
            if getattr(self, field) not in DTYPE_BYTES:
                raise ValueError(f"{field} ({getattr(self, field)!r}) must be one of {', '.join(DTYPE_BYTES)}")
        if self.risk not in ("mean", "worst_workload", "regret") and self._tail() is None:
            raise ValueError(
                f"risk ({self.risk!r}) must be mean, cvar:q with q in [0, 1) (cvar:0.99), worst_workload or regret"
            )
        if self.replica_choice == "nearest" and self.execution == "context_coherent":
            raise ValueError(
                'replica_choice ("nearest") needs tokens with a source rank, which execution ("context_coherent") does '
                'not give them; use "dispatch_combine", or replica_choice "share"'
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
        result = Objective(**{**self.model_dump(), **changes})
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
