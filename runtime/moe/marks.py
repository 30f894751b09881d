"""Marks on a rank's experts, by which what takes them for all of a model's is refused.

A rank's parameters [S, ...] are some experts of many, and every rank has others. Wrappers, optimizers and checkpoints
that know nothing of them see ordinary tensors: the marks are what such code asks for of any tensor that it clips or
writes.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad

from ...placement.errors import UnsupportedError

DATA: Any = Tensor.data
GRAD: Any = nn.Parameter.grad
"""Torch's own descriptors."""

COPIES = {
    Tensor.detach, Tensor.clone, Tensor.contiguous, Tensor.cpu, Tensor.cuda, Tensor.to, Tensor.type, Tensor.float,
    Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.pin_memory, Tensor.new_empty, DATA.__get__,
    torch.detach, torch.clone, torch.empty_like,
}  # fmt: skip
"""Functions of torch by which weights are made ready to be written; what they give is marked as what they take."""


class _Unwritten:
    """Of a tensor: refuses to be written by torch.save, torch.distributed.checkpoint and safetensors.

    in_order: whether it has all experts in their order, as in one process, and may be.
    """

    in_order = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self.in_order:
            _refuse_writing("torch.save (or pickle)")
        return super().__reduce_ex__(protocol)

    def __create_write_items__(self, name: str, value: Any) -> Any:
        """What torch.distributed.checkpoint asks tensors that know how they are written."""
        from torch.distributed.checkpoint.planner_helpers import _create_write_items

        if not self.in_order:
            _refuse_writing("torch.distributed.checkpoint")
        assert isinstance(self, Tensor)
        return _create_write_items(name, self.detach().as_subclass(Tensor))

    def is_contiguous(self, *arguments: Any, **named: Any) -> bool:
        """As torch has it; safetensors asks it before it writes."""
        if not self.in_order and sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] == "safetensors":
            _refuse_writing("safetensors")
        assert isinstance(self, Tensor)
        return bool(torch.Tensor.is_contiguous(self, *arguments, **named))


def _refuse_writing(by: str) -> NoReturn:
    raise UnsupportedError(
        f"{by} would write this rank's experts as if they were all, in their order. On every rank, "
        "moeplace.save_checkpoint(path, model, optimizer) writes what training resumes from, under any plan, and "
        "moeplace.export_hf(model, folder) what from_pretrained reads. For a file of this rank's alone, "
        "value.as_subclass(torch.Tensor) is written as it is"
    )


class ExpertRows(_Unwritten, Tensor):
    """Rows of experts that other ranks do not have, as a state_dict has them; so are copies of it."""

    @classmethod
    def of(cls, value: Tensor) -> ExpertRows:
        """The same memory, marked."""
        return value.as_subclass(cls)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        return cls.of(result) if function in COPIES and type(result) is Tensor else result

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertRows:
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone()
        result: ExpertRows = memo[id(self)]
        return result


class ExpertParameter(_Unwritten, nn.Parameter):
    """Rows of experts that other ranks do not have, marked as frameworks mark theirs."""

    allreduce = False
    """As Megatron-LM and DeepSpeed have it: no gradient to be averaged over all ranks."""

    once = False
    """Whether it has every expert once, and no other rank of the mesh has any: its norm is the experts'."""

    cut = False
    """Whether it has a part of each expert, and other ranks have the others."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParameter:
        result: ExpertParameter = super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        result.once, result.in_order, result.cut = self.once, self.in_order, self.cut
        return result

    @property
    def grad(self) -> Tensor | None:
        """As torch has it; torch.nn.utils.clip_grad_norm_ asks it before it sums a norm."""
        if not self.once:
            frame = sys._getframe(1)
            if frame.f_globals is vars(clip_grad):
                _check_clipping(frame)
        value: Tensor | None = GRAD.__get__(self)
        return value

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        GRAD.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        GRAD.__delete__(self)

    @property
    def group_name(self) -> str:
        """What DeepSpeed asks when it takes parameters over, to send rank 0's to all others."""
        raise UnsupportedError(
            "DeepSpeed's engine sends the first rank's parameters to all others, and knows of no groups for these "
            "experts, of which every rank has its own. Use DistributedDataParallel or fully_shard(model, "
            "ignored_params=expert_parameters(model)), or DeepSpeed's own expert layers"
        )


def _check_clipping(frame: Any) -> None:
    # A comprehension has a frame of its own up to Python 3.11. Clipping by value, or by a norm that is given, is right;
    # by infinity nothing is scaled: so Transformers' Trainer looks at a norm to log it.
    if frame.f_code.co_name == "<listcomp>":
        frame = frame.f_back
    if frame.f_code.co_name == "clip_grad_norm_" and float(frame.f_locals.get("max_norm", 0.0)) != float("inf"):
        raise UnsupportedError(
            "torch.nn.utils.clip_grad_norm_ would take the norm of this rank's experts for that of all: ranks would "
            "scale by different factors. Call moeplace.clip_grad_norm_(model, max_norm) on every rank, which "
            "counts all ranks' experts once"
        )
