"""Who may manage a rank's experts: wrappers, optimizers and gradient scalers, and the count of steps.

A rank's parameters [S, ...] are some experts of many, and every rank has others: no wrapper may take them for the same
everywhere, an optimizer must treat each element, or each expert, for itself, and whether a step is taken must be the
same on all ranks. Wrappers, optimizers and checkpoints that know nothing of this see ordinary tensors: marks are what
such code asks for of any tensor that it clips or writes.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils import clip_grad
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop
from torch.optim.asgd import ASGD
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ...placement.errors import InputError, UnsupportedError
from .mesh import ExpertMesh

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


BY_ELEMENT: set[type] = {SGD, Adam, AdamW, Adamax, NAdam, RAdam, Adagrad, Adadelta, ASGD, RMSprop, Rprop}
"""Optimizers, and those made from them, that treat every element of a parameter for itself."""

ELSEWHERE = {
    ("apex", "FusedAdam"), ("apex", "FusedSGD"), ("apex", "FusedAdagrad"), ("transformer_engine", "FusedAdam"),
    ("transformer_engine", "FusedSGD"), ("deepspeed", "FusedAdam"), ("deepspeed", "DeepSpeedCPUAdam"),
    ("deepspeed", "FusedLion"), ("deepspeed", "DeepSpeedCPULion"), ("bitsandbytes", "Lion"), ("bitsandbytes", "Adam"),
    ("bitsandbytes", "AdamW"),
}  # fmt: skip
"""(package, class) of the same in packages that need not be there."""

WHOLE_TENSORS = {
    "Adafactor": "divides by the root mean square of the whole tensor",
    "LBFGS": "takes one step for all parameters together",
    "Lamb": "scales by the norm of the whole tensor",
    "LAMB": "scales by the norm of the whole tensor",
    "FusedLAMB": "scales by the norm of the whole tensor",
    "FusedLamb": "scales by the norm of the whole tensor",
    "LARS": "scales by the norm of the whole tensor",
    "FusedNovoGrad": "scales by the norm of the whole tensor",
    "Shampoo": "multiplies by factors of the whole tensor",
    "SOAP": "multiplies by factors of the whole tensor",
}


def allow_optimizer(kind: type[Optimizer]) -> None:
    """Says that optimizers of this class, and those made from it, treat each element of a parameter, or each of its
    rows, for itself; so that they may hold a rank's experts. Those of torch.optim that do are known."""
    BY_ELEMENT.add(kind)


class Layer(Protocol):
    """What is asked of a module of experts."""

    layer: int
    mesh: ExpertMesh
    gradients_wait: bool

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...


class OptimizerSteps:
    """Counts the optimizer steps that a module's own parameters have taken: what a schedule of its own goes by.

    Forward passes would not do: gradient accumulation makes several a step, activation checkpointing repeats them.
    Refuses optimizers and scalers that would make experts differ from what they are in one process.

    done: steps since this was made.
    """

    def __init__(self, module: Layer) -> None:
        self._module = weakref.ref(module)
        self.done = 0
        _watch()
        _counts.add(self)

    def of(self, parameters: set[int]) -> Layer | None:
        """The module, if any of its own parameters is among these, by id."""
        module = self._module()
        if module is None or not any(id(value) in parameters for value in module.parameters(recurse=False)):
            return None
        return module


_counts: weakref.WeakSet[OptimizerSteps] = weakref.WeakSet()
_hooked = False


def _watch() -> None:
    global _hooked
    if not _hooked:
        register_optimizer_step_pre_hook(_check_step)
        register_optimizer_step_post_hook(_count_step)
        register_module_module_registration_hook(_check_wrapper)
        _hooked = True


def _check_wrapper(wrapper: nn.Module, name: str, module: nn.Module | None) -> None:
    """Torch calls this whenever a module becomes part of another; DistributedDataParallel has sent nothing by then."""
    if not isinstance(wrapper, nn.parallel.DistributedDataParallel) or module is None or dist.get_world_size() < 2:
        return
    for path, value in module.named_parameters():
        if isinstance(value, ExpertParameter) and path not in wrapper.parameters_to_ignore:
            raise UnsupportedError(
                f"DistributedDataParallel would take {path} for the same on every rank and send the first rank's "
                "experts to all others; call exclude_from_ddp(model) before, on the very module that it wraps"
            )


def _among(optimizer: Optimizer) -> Iterator[tuple[OptimizerSteps, Layer]]:
    parameters = {id(value) for group in optimizer.param_groups for value in group["params"]}
    for count in list(_counts):
        module = count.of(parameters)
        if module is not None:
            yield count, module


def _check_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    modules = [module for _, module in _among(optimizer)]
    if not modules:
        return
    check_optimizer(optimizer)
    for module in modules:
        if module.gradients_wait:
            raise InputError(
                f"layer {module.layer}: gradients of micro-batches under no_sync wait to be summed; leave no_sync "
                "before the last backward of a step"
            )
    # Frames: this hook, torch's wrapper of step, those of schedulers and wrappers, then the scaler's own two.
    frame = sys._getframe(1)
    for _ in range(12):
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.amp.GradScaler) and owner.is_enabled():
            _check_scaler(owner, modules)
        if frame.f_back is None:
            return
        frame = frame.f_back


def _count_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for count, _ in _among(optimizer):
        count.done += 1


def check_optimizer(optimizer: Optimizer) -> None:
    """Raises UnsupportedError unless the optimizer treats every expert for itself, by its class."""
    # Torch's class, without importing it: nothing can be one before its module is there.
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if zero is not None and isinstance(optimizer, zero.ZeroRedundancyOptimizer):
        raise UnsupportedError(
            "ZeroRedundancyOptimizer gives every parameter to one rank, which sends it to the others; but every rank "
            "has its own experts. Give it the other parameters only, and the experts (expert_parameters(model)) to an "
            "optimizer of their own"
        )
    kind = type(optimizer)
    lineage = {(base.__module__.partition(".")[0], base.__name__) for base in kind.__mro__}
    for _, name in lineage:
        if name in WHOLE_TENSORS:
            raise UnsupportedError(
                f"{kind.__name__} {WHOLE_TENSORS[name]}; a rank's parameters are the experts that it happens to have, "
                "so each plan would train differently. Give the experts (expert_parameters(model)) to an optimizer "
                "that works element by element, as AdamW does, or to moeplace.runtime.Muon"
            )
    if isinstance(optimizer, tuple(BY_ELEMENT)) or lineage & ELSEWHERE:
        return
    raise UnsupportedError(
        f"whether {kind.__module__}.{kind.__qualname__} treats every expert for itself is not known. If it does, and "
        f"keeps its state in tensors with a row for each expert, say moeplace.runtime.allow_optimizer({kind.__name__});"
        " else give the experts (expert_parameters(model)) to an optimizer that does, as AdamW"
    )


def _check_scaler(scaler: torch.amp.GradScaler, modules: list[Layer]) -> None:
    sharded = sys.modules.get("torch.distributed.fsdp.sharded_grad_scaler")
    needed = {int(rank) for module in modules for rank in module.mesh.grid.flatten()}
    if len(needed) < 2:
        return
    if sharded is not None and isinstance(scaler, sharded.ShardedGradScaler):
        if needed <= set(dist.get_process_group_ranks(scaler.process_group)):
            return
        why = f"the process group of {type(scaler).__name__} lacks some of the ranks {sorted(needed)}"
    else:
        why = f"{type(scaler).__name__} looks for infinities on each rank alone, and experts differ between ranks"
    raise UnsupportedError(
        f"{why}: ranks would skip different steps and scale by different factors. Use "
        "torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler(device), which asks all ranks"
    )
