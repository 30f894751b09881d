"""What one expert computes, for many experts at once: grouped matrix products where torch has them, else one by one.

N inputs, those of one expert behind another's; S experts here; D hidden size, F expert FFN size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
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
        """[N, D] outputs. count_S: [S] inputs of each expert. weights: [S, ...] each.

        Where the host does not know how many inputs there are, zeros stand behind them, and what comes of these is not
        looked at.
        """


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
        kind = value.device.type
        ctx.function, ctx.cast = function, (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(value)
        return function(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (value,) = ctx.saved_tensors
        kind, dtype, enabled = ctx.cast
        # As in forward, whatever backward is called under.
        with torch.enable_grad(), torch.autocast(kind, dtype, enabled=enabled):
            value = value.detach().requires_grad_()
            (result,) = torch.autograd.grad(ctx.function(value), value, grad)
        return None, result


class Groups:
    """Products of a batch's groups of rows with a matrix each. What products give for rows behind the last group may be
    anything."""

    def __init__(self, row_ND: Tensor, count_S: Tensor) -> None:
        self._count_S = count_S
        self._end_S = count_S.cumsum(0).to(torch.int32)
        self._rows = len(row_ND)
        self._sizes: list[int] | None = None

    def product(self, row_NI: Tensor, weight_SIO: Tensor) -> Tensor:
        """[N, O] each row times its group's matrix [I, O]."""
        delayed = DelayedGradients.under_way()
        where = None if delayed is None else delayed.place_of(weight_SIO)
        if delayed is None or where is None:
            return self.product_at_once(row_NI, weight_SIO)
        result: Tensor = _DelayedProduct.apply(  # type: ignore[no-untyped-call]
            self, delayed, delayed.next_product(), where, row_NI, weight_SIO
        )
        return result

    def product_at_once(self, row_NI: Tensor, weight_SIO: Tensor) -> Tensor:
        """The same, whose backward gives the gradients of rows and matrices together."""
        if len(row_NI) and len(weight_SIO) and _groupable(row_NI.device, row_NI.dtype, *weight_SIO.shape[1:]):
            return F.grouped_mm(row_NI.contiguous(), weight_SIO, offs=self._end_S)
        return self.product_one_by_one(row_NI, weight_SIO)

    def product_one_by_one(self, row_NI: Tensor, weight_SIO: Tensor) -> Tensor:
        """The same by a loop over groups; on a GPU the host waits for the sizes once a batch."""
        if not len(weight_SIO):
            # No expert here: an empty result that backward still passes through, since other ranks wait for it there.
            return row_NI @ weight_SIO.sum(dim=0)
        *groups, rest = torch.split(row_NI, self._all_sizes())
        parts = [rows @ weight for rows, weight in zip(groups, weight_SIO, strict=True)]
        return torch.cat([*parts, rest.new_zeros(len(rest), weight_SIO.shape[2])])

    def outer(self, row_NI: Tensor, grad_NO: Tensor, like_SIO: Tensor) -> Tensor:
        """[S, I, O] the gradients of matrices, strided as these are: the same bits as the product's own backward."""
        _, inputs, outputs = like_SIO.shape
        columns = like_SIO.stride(1) == 1 and like_SIO.stride(2) >= inputs
        first, second = (grad_NO, row_NI) if columns else (row_NI, grad_NO)
        if len(row_NI) and len(like_SIO) and _groupable(row_NI.device, row_NI.dtype, inputs, outputs):
            result_S = F.grouped_mm(first.contiguous().t(), second.contiguous(), offs=self._end_S)
        elif not len(like_SIO):
            return torch.zeros_like(like_SIO)
        else:
            sizes = self._all_sizes()
            parts = zip(torch.split(first, sizes)[:-1], torch.split(second, sizes)[:-1], strict=True)
            result_S = torch.stack([one.t() @ other for one, other in parts])
        return result_S.transpose(1, 2) if columns else result_S

    def spread(self, value_SO: Tensor) -> Tensor:
        """[N, O] each group's value, for each of its rows; zeros behind them."""
        row_N = torch.arange(self._rows, dtype=torch.int32, device=value_SO.device)
        group_N = torch.searchsorted(self._end_S, row_N, right=True, out_int32=True)
        return torch.cat([value_SO, value_SO.new_zeros(1, *value_SO.shape[1:])])[group_N]

    def _all_sizes(self) -> list[int]:
        """Rows of each group, and those behind the last."""
        if self._sizes is None:
            sizes = self._count_S.tolist()
            self._sizes = [*sizes, self._rows - sum(sizes)]
        return self._sizes


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


class DelayedGradients:
    """Gradients of the weights of one pass through experts, computed behind those of its inputs.

    `weights` makes a node of autograd at the point where it is called. Products with these weights give backward the
    gradients of their rows alone, and note what the others are made of; autograd comes to the node once it has nothing
    left to do that was begun later. What stands before the call in forward, such as the sending of rows, therefore
    waits for its gradients after the weights' have been computed, and what stands behind it has sent them before.
    Nothing is left over when backward returns. Gradients of weights that an expert uses in another way than by
    `Groups.product` are computed where they always were.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._weights: dict[str, Tensor] = {}
        self._node: Any = None
        self._products = 0
        self._noted: dict[int, tuple[Groups, str, bool, Tensor, Tensor]] = {}

    def weights(self, weights: Weights) -> Weights:
        """The same weights, whose gradients come back to this point of the pass."""
        gated = dict(zip(weights, _Delay.apply(self, *weights.values()), strict=True))  # type: ignore[no-untyped-call]
        self._names = tuple(weights)
        self._weights = {name: value.detach().as_subclass(Tensor) for name, value in weights.items()}
        self._node = next((value.grad_fn for value in gated.values()), None)
        return gated

    def run(self, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` makes of these weights."""
        token = _delayed.set(self)
        try:
            return compute()
        finally:
            _delayed.reset(token)
            # The graph refers to this object, which must not refer to the graph.
            self._node = None

    @staticmethod
    def under_way() -> DelayedGradients | None:
        """Of the pass that is being run; None where gradients are not delayed."""
        return _delayed.get()

    def place_of(self, weight_SIO: Tensor) -> tuple[str, bool] | None:
        """(which of the weights this is, whether transposed); None where its gradient does not come back as a whole,
        and unchanged."""
        node = weight_SIO.grad_fn
        if self._node is None or node is None:
            return None
        number = weight_SIO.output_nr if node is self._node else None
        for before, output in node.next_functions:
            number = output if before is self._node and len(node.next_functions) == 1 else number
        if number is None or not weight_SIO.numel():
            return None
        name = self._names[number]
        value = self._weights[name]
        for transposed, same in ((False, value), (True, value.mT)):
            if (same.data_ptr(), same.shape, same.stride()) == (
                weight_SIO.data_ptr(), weight_SIO.shape, weight_SIO.stride(),
            ):  # fmt: skip
                return name, transposed
        return None

    def next_product(self) -> int:
        """A number of its own for each product of the pass."""
        self._products += 1
        return self._products

    def note(self, number: int, group: Groups, place: tuple[str, bool], row_NI: Tensor, grad_NO: Tensor) -> None:
        """What a weight's gradient is made of. Backward that comes to a product again brings the same anew."""
        self._noted[number] = group, *place, row_NI, grad_NO

    def gradients(self) -> list[Tensor | None]:
        """Of each weight, from all that was noted since they were last asked for."""
        noted, self._noted = self._noted, {}
        result: dict[str, Tensor] = {}
        for _, (group, name, transposed, row_NI, grad_NO) in sorted(noted.items()):
            value = self._weights[name]
            grad_SIO = group.outer(row_NI, grad_NO, value.mT if transposed else value)
            grad_S = grad_SIO.mT if transposed else grad_SIO
            result[name] = result[name] + grad_S if name in result else grad_S
        return [result.get(name) for name in self._names]


_delayed: ContextVar[DelayedGradients | None] = ContextVar("_delayed", default=None)
"""Of the pass that is under way."""


class _Delay(Function):
    """The identity; backward adds the gradients that products have left to be computed."""

    @staticmethod
    def forward(ctx: Any, delayed: DelayedGradients, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.delayed = delayed
        ctx.set_materialize_grads(False)
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        both = zip(grads, ctx.delayed.gradients(), strict=True)
        return None, *(later if grad is None else grad if later is None else grad + later for grad, later in both)


class _DelayedProduct(Function):
    """`Groups.product`, whose backward gives the gradient of the rows and leaves that of the matrices for later."""

    @staticmethod
    def forward(
        ctx: Any,
        group: Groups,
        delayed: DelayedGradients,
        number: int,
        place: tuple[str, bool],
        row_NI: Tensor,
        weight_SIO: Tensor,
    ) -> Tensor:
        ctx.group, ctx.delayed, ctx.number, ctx.place = group, delayed, number, place
        ctx.save_for_backward(row_NI, weight_SIO)
        return group.product_at_once(row_NI, weight_SIO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        row_NI, weight_SIO = ctx.saved_tensors
        ctx.delayed.note(ctx.number, ctx.group, ctx.place, row_NI.detach(), grad_NO)
        row = ctx.group.product_at_once(grad_NO, weight_SIO.transpose(1, 2)) if ctx.needs_input_grad[4] else None
        return None, None, None, None, row, None
