"""What one expert computes, for many experts at once: grouped matrix products where torch has them, else one by one.

N inputs, those of one expert behind another's; S experts here; D hidden size, F expert FFN size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...placement.model import ModelSpec

Weights = Mapping[str, Tensor]


class ExpertMLP(Protocol):
    """An expert's parameters and its function."""

    def shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of one expert, by name."""

    def forward(self, row_ND: Tensor, count_S: Tensor, weights: Weights) -> Tensor:
        """[N, D] outputs. count_S: [S] inputs of each expert. weights: [S, ...] each."""


@dataclass(frozen=True)
class SwiGLU:
    """down(silu(gate x) * up x); gate_up_proj [2F, D] gate first, down_proj [D, F], as Transformers stores them.

    activation: a function of torch.nn.functional in silu's place.
    """

    activation: str = "silu"

    def shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        return {
            "gate_up_proj": (2 * spec.ffn_size, spec.expert_input_size),
            "down_proj": (spec.expert_output_size, spec.ffn_size),
        }

    def forward(self, row_ND: Tensor, count_S: Tensor, weights: Weights) -> Tensor:
        group = Groups(row_ND, count_S)
        both_NF = group.product(row_ND, weights["gate_up_proj"].transpose(1, 2))
        return group.product(recomputed(self._gate, both_NF), weights["down_proj"].transpose(1, 2))

    def _gate(self, both_NF: Tensor) -> Tensor:
        gate_NF, up_NF = both_NF.chunk(2, dim=-1)
        gated_NF: Tensor = getattr(F, self.activation)(gate_NF) * up_NF
        return gated_NF


@dataclass(frozen=True)
class GELU:
    """down(gelu(up x)); up_proj [F, D], down_proj [D, F], no biases. approximate: as torch.nn.functional.gelu."""

    approximate: str = "none"

    def shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        return {
            "up_proj": (spec.ffn_size, spec.expert_input_size),
            "down_proj": (spec.expert_output_size, spec.ffn_size),
        }

    def forward(self, row_ND: Tensor, count_S: Tensor, weights: Weights) -> Tensor:
        group = Groups(row_ND, count_S)
        hidden_NF = F.gelu(group.product(row_ND, weights["up_proj"].transpose(1, 2)), approximate=self.approximate)
        return group.product(hidden_NF, weights["down_proj"].transpose(1, 2))


@dataclass(frozen=True)
class GptOss:
    """gpt-oss: (up + 1) * gate * sigmoid(alpha gate), both clamped, gate and up interleaved, with biases; weights
    stored inputs first."""

    alpha: float = 1.702
    limit: float = 7.0

    def shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        return {
            "gate_up_proj": (spec.expert_input_size, 2 * spec.ffn_size),
            "gate_up_proj_bias": (2 * spec.ffn_size,),
            "down_proj": (spec.ffn_size, spec.expert_output_size),
            "down_proj_bias": (spec.expert_output_size,),
        }

    def forward(self, row_ND: Tensor, count_S: Tensor, weights: Weights) -> Tensor:
        group = Groups(row_ND, count_S)
        both_NF = group.product(row_ND, weights["gate_up_proj"]) + group.spread(weights["gate_up_proj_bias"])
        hidden_NF = recomputed(self._gate, both_NF)
        return group.product(hidden_NF, weights["down_proj"]) + group.spread(weights["down_proj_bias"])

    def _gate(self, both_NF: Tensor) -> Tensor:
        gate_NF = both_NF[..., ::2].clamp(max=self.limit)
        up_NF = both_NF[..., 1::2].clamp(min=-self.limit, max=self.limit)
        return (up_NF + 1) * (gate_NF * torch.sigmoid(gate_NF * self.alpha))


@dataclass(frozen=True)
class Fused:
    """The experts of a Transformers class, as its flags declare them; its own module computes gate and norm.

    name: the class. gated: gate_up_proj rather than up_proj. transposed: matrices are stored inputs first. bias: of
    both matrices. post_norm: of each expert's output. input_size, ffn_size, output_size: as the module's own shapes
    say. module: without its weights.
    """

    name: str
    gated: bool
    transposed: bool
    bias: bool
    post_norm: bool
    input_size: int
    ffn_size: int
    output_size: int
    module: Any = field(repr=False, compare=False)

    FLAGS: ClassVar = frozenset({"has_gate", "is_transposed", "has_bias", "has_post_expert_norm", "is_concatenated"})
    """Of Transformers' experts; how gate and up are laid out is the module's own gate's matter."""

    def shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        del spec
        first, both = ("gate_up_proj", 2 * self.ffn_size) if self.gated else ("up_proj", self.ffn_size)
        shapes: dict[str, tuple[int, ...]] = {
            first: (self.input_size, both) if self.transposed else (both, self.input_size),
            "down_proj": (self.ffn_size, self.output_size) if self.transposed else (self.output_size, self.ffn_size),
        }
        if self.bias:
            shapes |= {f"{first}_bias": (both,), "down_proj_bias": (self.output_size,)}
        return shapes

    def forward(self, row_ND: Tensor, count_S: Tensor, weights: Weights) -> Tensor:
        group = Groups(row_ND, count_S)

        def product(row_NI: Tensor, name: str) -> Tensor:
            weight_SIO = weights[name] if self.transposed else weights[name].transpose(1, 2)
            out_NO = group.product(row_NI, weight_SIO)
            return out_NO + group.spread(weights[f"{name}_bias"]) if self.bias else out_NO

        hidden_NF = recomputed(self._gate, product(row_ND, "gate_up_proj" if self.gated else "up_proj"))
        out_ND = product(hidden_NF, "down_proj")
        normed_ND: Tensor = self.module.post_expert_norm(out_ND) if self.post_norm else out_ND
        return normed_ND

    def _gate(self, both_NF: Tensor) -> Tensor:
        if not self.gated:
            hidden_NF: Tensor = self.module.act_fn(both_NF)
        elif hasattr(self.module, "_apply_gate"):
            hidden_NF = self.module._apply_gate(both_NF).to(both_NF.dtype)
        else:
            gate_NF, up_NF = both_NF.chunk(2, dim=-1)
            hidden_NF = self.module.act_fn(gate_NF) * up_NF
        return hidden_NF


def recomputed(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """function(value), for a function without parameters or chance; backward keeps only `value`, and computes the rest
    again."""
    result: Tensor = _Recomputed.apply(function, value)  # type: ignore[no-untyped-call]
    return result


class _Recomputed(Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(value)
        return function(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (value,) = ctx.saved_tensors
        with torch.enable_grad():
            value = value.detach().requires_grad_()
            (result,) = torch.autograd.grad(ctx.function(value), value, grad)
        return None, result


class Groups:
    """Products of a batch's groups of rows with a matrix each."""

    def __init__(self, row_ND: Tensor, count_S: Tensor) -> None:
        self._count_S = count_S
        self._end_S = count_S.cumsum(0).to(torch.int32)
        self._rows = len(row_ND)
        self._sizes: list[int] | None = None

    def product(self, row_NI: Tensor, weight_SIO: Tensor) -> Tensor:
        """[N, O] each row times its group's matrix [I, O]."""
        if len(row_NI) and len(weight_SIO) and _groupable(row_NI.device, row_NI.dtype, *weight_SIO.shape[1:]):
            return F.grouped_mm(row_NI.contiguous(), weight_SIO, offs=self._end_S)
        return self.product_one_by_one(row_NI, weight_SIO)

    def product_one_by_one(self, row_NI: Tensor, weight_SIO: Tensor) -> Tensor:
        """The same by a loop over groups; on a GPU the host waits for the sizes once a batch."""
        if not len(weight_SIO):
            # No expert here: an empty result that backward still passes through, since other ranks wait for it there.
            return row_NI @ weight_SIO.sum(dim=0)
        if self._sizes is None:
            self._sizes = self._count_S.tolist()
        parts = zip(torch.split(row_NI, self._sizes), weight_SIO, strict=True)
        return torch.cat([rows @ weight for rows, weight in parts])

    def spread(self, value_SO: Tensor) -> Tensor:
        """[N, O] each group's value, for each of its rows."""
        row = torch.arange(len(value_SO), device=value_SO.device)
        return value_SO[torch.repeat_interleave(row, self._count_S, output_size=self._rows)]


@functools.cache
def _groupable(device: torch.device, dtype: torch.dtype, inputs: int, outputs: int) -> bool:
    """Whether torch's grouped product runs here for such matrices, forward and backward."""
    if not hasattr(F, "grouped_mm"):
        return False
    try:
        # Hooks of its own, so that activation checkpointing around the first forward neither keeps nor counts what the
        # trial saves: it does not come again in recomputation.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_is, _as_is):
            row = torch.zeros(2, inputs, device=device, dtype=dtype, requires_grad=True)
            weight = torch.zeros(2, outputs, inputs, device=device, dtype=dtype, requires_grad=True)
            ends = torch.tensor([1, 2], device=device, dtype=torch.int32)
            result = F.grouped_mm(row, weight.transpose(1, 2), offs=ends)
            torch.autograd.grad(result, (row, weight), torch.zeros_like(result))
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _as_is(value: Tensor) -> Tensor:
    return value
