"""Who may manage a rank's experts: wrappers, optimizers and gradient scalers, and the count of steps.

A rank's parameters [S, ...] are some experts of many, and every rank has others: no wrapper may take them for the same
everywhere, an optimizer must treat each element, or each expert, for itself, and whether a step is taken must be the
same on all ranks. Wrappers, optimizers and checkpoints that know nothing of this see ordinary tensors: marks are what
such code asks for of any tensor that it clips or writes.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils import clip_grad
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop
from torch.optim.asgd import ASGD
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from ...placement.errors import InputError, UnsupportedError
from .mesh import ExpertMesh

DATA: Any = Tensor.data
GRAD: Any = nn.Parameter.grad
LEAF: Any = nn.Parameter.is_leaf
"""Torch's own descriptors."""

COPIES = {
    Tensor.detach, Tensor.clone, Tensor.contiguous, Tensor.cpu, Tensor.cuda, Tensor.to, Tensor.type, Tensor.float,
    Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.pin_memory, Tensor.new_empty, DATA.__get__,
    torch.detach, torch.clone, torch.empty_like,
}  # fmt: skip
"""Functions of torch by which weights are made ready to be written; what they give is marked as what they take."""

ARITHMETIC = {
    Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.lerp, Tensor.__add__, Tensor.__radd__, Tensor.__sub__,
    Tensor.__rsub__, Tensor.__mul__, Tensor.__rmul__, Tensor.__truediv__, torch.add, torch.sub, torch.mul, torch.div,
    torch.lerp,
}  # fmt: skip
"""Functions by which averages of weights are made: they are of the same experts, and stay marked."""


MARK = "expert_rows"
"""Under it a state_dict says, in plain values, whose rows its tensors have: the model's in its metadata, an optimizer's
beside its state. So it is known of tensors that were written as ordinary ones too."""


class RowsOf(NamedTuple):
    """Whose rows a tensor [S, ...] holds. placement: a digest of where the layer's slots stand. experts: [S]."""

    layer: int
    placement: str
    experts: tuple[int, ...]

    @classmethod
    def of_mark(cls, mark: Any) -> RowsOf | None:
        """Of what a state_dict has under `MARK`; None for none."""
        return None if mark is None else cls(int(mark[0]), str(mark[1]), tuple(int(expert) for expert in mark[2]))

    @property
    def mark(self) -> tuple[int, str, tuple[int, ...]]:
        """As values that torch.load reads with weights_only."""
        return self.layer, self.placement, self.experts


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
        "moeplace.export_hf(model, folder) what from_pretrained reads. For a file of this rank's alone, put "
        "value.as_subclass(torch.Tensor) in the values' places in the state_dict itself, which says whose rows they are"
    )


def refuse_parametrisation() -> NoReturn:
    """Raises UnsupportedError: something else would stand in the place of an expert parameter."""
    raise UnsupportedError(
        "an expert parameter would become a plain one, that looks the same on every rank: parametrisations "
        "(weight_norm, spectral_norm), adapters of experts (LoRA) and conversions (torchao's float8 training) that put "
        "their own parameters in an expert's place are unknown here; leave the experts out. For values of your own, "
        "load_logical, or value.data.copy_(rows)"
    )


class ExpertRows(_Unwritten, Tensor):
    """Rows of experts that other ranks do not have, as a state_dict has them; so are copies of it.

    rows: whose. Rows of several plans do not go together: averages of weights would mix experts.
    """

    rows: RowsOf

    @classmethod
    def of(cls, value: Tensor, rows: RowsOf) -> ExpertRows:
        """The same memory, marked."""
        result = value.as_subclass(cls)
        result.rows = rows
        return result

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lists = [part for part in args if isinstance(part, list | tuple)]
        marked: list[RowsOf] = []
        for together in (args, *zip(*lists, strict=False)) if len(lists) > 1 else (args,):
            rows = [part.rows for part in together if isinstance(part, ExpertRows)]
            _check_same(rows)
            marked = marked or rows
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        marking = type(result) is Tensor and (function in COPIES or function in ARITHMETIC)
        return cls.of(result, marked[0]) if marking and marked else result

    def in_order_of(self, rows: RowsOf) -> Tensor:
        """As an ordinary tensor, in the order of `rows`, of the same placement.

        Raises:
            InputError: these are of another placement.
        """
        value = self.as_subclass(Tensor)
        _check_same([self.rows._replace(experts=()), rows._replace(experts=())])
        if self.rows.experts == rows.experts:
            return value
        if Counter(self.rows.experts) != Counter(rows.experts):
            _check_same([self.rows, rows])
        # Replicas of an expert are equal: any of them will do.
        return value[[self.rows.experts.index(expert) for expert in rows.experts]]

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertRows:
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone()
        result: ExpertRows = memo[id(self)]
        return result


def own_rows(value: Tensor, mark: RowsOf | None, rows: RowsOf, name: str, whole: tuple[int, ...], by: str) -> Tensor:
    """What a state has for an expert parameter, in the order in which this rank has its rows.

    Args:
        value: [S, ...] marked or not.
        mark: whose rows a state says that its ordinary tensors have; None where it says nothing.
        rows: this rank's.
        name: of the parameter.
        whole: the shape that a whole model's has.
        by: what this rank's own are read by.

    Raises:
        InputError: these are of another placement, or nobody knows whose they are.
    """
    known = value.rows if isinstance(value, ExpertRows | ExpertParameter) else mark
    if known is not None and known[:2] == rows[:2]:
        if len(value) != len(known.experts):
            raise InputError(
                f"layer {rows.layer}: {name} has {len(value)} rows, and the state says that they are of the experts "
                f"{list(known.experts)}"
            )
        return ExpertRows.of(value.detach().as_subclass(Tensor), known).in_order_of(rows)
    if known is not None:
        what = (
            f"has rows of experts of layer {known.layer}"
            if known.layer != rows.layer
            else "has rows of experts as another plan has them, or another part of them"
        )
    elif tuple(value.shape) == whole:
        what = f"has a row for each of {whole[0]} experts, as a whole model's state has"
    else:
        what = "has rows of which the state does not say whose they are: under another plan they would be others'"
    raise InputError(f"layer {rows.layer}: {name} {what}. This rank has the rows {list(rows.experts)}. {by}")


def _check_same(rows: list[RowsOf]) -> None:
    if len(set(rows)) > 1:
        raise InputError(
            f"layer {rows[0].layer}: rows of experts as one plan has them would be mixed with those of another plan or "
            "layer. Put one plan in force for both (an average of weights moves with apply(average, plan)), or keep "
            "states with save_checkpoint and load_checkpoint, which go by expert"
        )


class ExpertParameter(_Unwritten, nn.Parameter):
    """Rows of experts that other ranks do not have, marked as frameworks mark theirs."""

    allreduce = False
    """As Megatron-LM and DeepSpeed have it: no gradient to be averaged over all ranks."""

    once = False
    """Whether it has every expert once, and no other rank of the mesh has any: its norm is the experts'."""

    cut = False
    """Whether it has a part of each expert, and other ranks have the others."""

    rows: RowsOf | None = None
    """Whose rows it has; None until a plan is in force."""

    def detach(self) -> Tensor:
        """Marked as a state is: averages of weights are taken of what this gives."""
        if sys._getframe(1).f_code is nn.Parameter.__new__.__code__:
            refuse_parametrisation()
        value = super().detach()
        return value if self.in_order or self.rows is None else ExpertRows.of(value, self.rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParameter:
        result: ExpertParameter = super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        result.once, result.in_order, result.cut, result.rows = self.once, self.in_order, self.cut, self.rows
        return result

    @property
    def grad(self) -> Tensor | None:
        """As torch has it; torch.nn.utils.clip_grad_norm_ asks it before it sums a norm."""
        if not self.once:
            frame = sys._getframe(1)
            if frame.f_globals is vars(clip_grad):
                _check_clipping(self, frame)
            elif frame.f_globals.get("__name__") == "torch.distributed.algorithms.model_averaging.utils":
                _refuse_averaging("PeriodicModelAverager (or another of torch's averagers)")
        value: Tensor | None = GRAD.__get__(self)
        return value

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        GRAD.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        GRAD.__delete__(self)

    def size(self, *arguments: Any) -> Any:
        """As torch has it; torch.optim.Muon asks it for the words in which it refuses three dimensions."""
        if sys._getframe(1).f_globals.get("__name__") == "torch.optim._muon":
            _refuse_optimizer("torch.optim.Muon", WHOLE_TENSORS["Muon"])
        return super().size(*arguments)

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        """As torch has it; optimizers ask it of what they are given. From then on their states are watched: one may be
        loaded before the first step."""
        frame = sys._getframe(1)
        optimizer = frame.f_locals.get("self") if frame.f_code.co_name == "add_param_group" else None
        if isinstance(optimizer, Optimizer):
            _watch_states(optimizer)
        return bool(LEAF.__get__(self))

    @property
    def group_name(self) -> str:
        """What DeepSpeed asks when it takes parameters over, to send rank 0's to all others."""
        raise UnsupportedError(
            "DeepSpeed's engine sends the first rank's parameters to all others, and knows of no groups for these "
            "experts, of which every rank has its own. Use DistributedDataParallel or fully_shard(model, "
            "ignored_params=expert_parameters(model)), or DeepSpeed's own expert layers"
        )


def _refuse_averaging(by: str) -> NoReturn:
    raise UnsupportedError(
        f"{by} averages every parameter over ranks, but every rank has its own experts. Give it the other parameters "
        "only, and the experts (expert_parameters(model)) to an optimizer of their own"
    )


def check_loading() -> None:
    """Raises UnsupportedError inside torch.distributed.checkpoint's functions that set states, where they have sent the
    first rank's to all others."""
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    frame = sys._getframe(1) if module is not None else None
    while frame is not None:
        if frame.f_globals is vars(module) and getattr(frame.f_locals.get("info"), "broadcast_from_rank0", False):
            raise UnsupportedError(
                "broadcast_from_rank0 gives the first rank's experts, and an optimizer's state for them, to every "
                "rank, but each has its own. On every rank, moeplace.load_checkpoint(path, model, optimizer) reads "
                "them under any plan, and parallelize(..., weights=folder) each rank's own of a whole model"
            )
        frame = frame.f_back


def _check_clipping(asked: ExpertParameter, frame: Any) -> None:
    # A comprehension has a frame of its own up to Python 3.11. Clipping by value, or by the norm of all ranks, is
    # right; by infinity nothing is scaled: so Transformers' Trainer looks at a norm to log it.
    if frame.f_code.co_name == "<listcomp>":
        frame = frame.f_back
    name = frame.f_code.co_name.strip("_")
    if float(frame.f_locals.get("max_norm", 0.0)) == float("inf"):
        return
    if name == "clip_grad_norm" or (name == "clip_grads_with_norm" and _is_of_this_rank(asked, **frame.f_locals)):
        raise UnsupportedError(
            f"torch.nn.utils.{name}_ would take the norm of this rank's experts for that of all: ranks would "
            "scale by different factors. Call moeplace.clip_grad_norm_(model, max_norm) on every rank, which "
            "counts all ranks' experts once"
        )


def _is_of_this_rank(asked: ExpertParameter, parameters: Any, total_norm: Any, **others: Any) -> bool:
    """Whether a norm that is given is that of the very gradients that this rank would scale by it."""
    if isinstance(parameters, Iterator):
        raise InputError(
            "clip_grads_with_norm_ was given an iterator, of which nobody can see whether total_norm is the norm of "
            "this rank's experts or of all; give it list(model.parameters()), or call "
            "moeplace.clip_grad_norm_(model, max_norm)"
        )
    values = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [grad for value in values if (grad := GRAD.__get__(value)) is not None]
    # Once a call: all of them are asked.
    first = next(value for value in values if isinstance(value, ExpertParameter))
    if asked is not first or not grads or any(isinstance(grad, DTensor) for grad in grads):
        return False
    norm = float(total_norm)
    return norm > 0 and abs(float(nn.utils.get_total_norm(grads)) - norm) <= 1e-6 * norm


BY_ELEMENT: set[type] = {SGD, Adam, AdamW, Adamax, NAdam, RAdam, Adagrad, Adadelta, ASGD, RMSprop, Rprop}
"""Optimizers, and those made from them, that treat every element of a parameter for itself."""

ELSEWHERE = {
    ("apex", "FusedAdam"), ("apex", "FusedSGD"), ("apex", "FusedAdagrad"), ("transformer_engine", "FusedAdam"),
    ("transformer_engine", "FusedSGD"), ("deepspeed", "FusedAdam"), ("deepspeed", "DeepSpeedCPUAdam"),
    ("deepspeed", "FusedLion"), ("deepspeed", "DeepSpeedCPULion"), ("bitsandbytes", "Lion"), ("bitsandbytes", "Adam"),
    ("bitsandbytes", "AdamW"), ("schedulefree", "AdamWScheduleFree"), ("schedulefree", "SGDScheduleFree"),
    ("schedulefree", "RAdamScheduleFree"), ("lion_pytorch", "Lion"),
}  # fmt: skip
"""(package, class) of the same in packages that need not be there."""

SMALL_STATES = ("8bit", "4bit", "Fp8")
"""Ends of names of optimizers (torchao's, bitsandbytes') with states of few bits, a scale for a block of values."""

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
    "Muon": "takes one matrix at a time, and an expert parameter has one for each expert",
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
    rows: RowsOf

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]: ...

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter as the whole model has it."""


class OptimizerSteps:
    """Counts the optimizer steps that a module's own parameters have taken: what a schedule of its own goes by.

    Forward passes would not do: gradient accumulation makes several a step, activation checkpointing repeats them.
    Refuses optimizers and scalers that would make experts differ from what they are in one process.

    done: steps since this was made, of the parameter that has taken the most.
    """

    def __init__(self, module: Layer) -> None:
        self._module = weakref.ref(module)
        self._taken: Counter[int] = Counter()
        self.done = 0
        _watch()
        _counts.add(self)

    def count(self, module: Layer, optimizer: Optimizer) -> None:
        """The optimizer has taken a step; one for each parameter may be behind another."""
        stepped = _parameters_of(optimizer)
        for place, value in enumerate(module.parameters(recurse=False)):
            self._taken[place] += id(value) in stepped
        self.done = max(self._taken.values())

    def of(self, parameters: set[int]) -> Layer | None:
        """The module, if any of its own parameters is among these, by id."""
        module = self._module()
        if module is None or not any(id(value) in parameters for value in module.parameters(recurse=False)):
            return None
        return module


_counts: weakref.WeakSet[OptimizerSteps] = weakref.WeakSet()
_wrappers: weakref.WeakSet[nn.parallel.DistributedDataParallel] = weakref.WeakSet()
"""Around layers of experts."""
_replaced = WeakIdKeyDictionary()
"""Parameters of modules that layers of placed experts stand in for now."""
_followed: weakref.WeakKeyDictionary[Optimizer, dict[int, str]] = weakref.WeakKeyDictionary()
"""Of optimizers of experts: by layer, the placement that their state is of, once there is one."""
_hooked = False


def note_replaced(parameters: Iterable[nn.Parameter]) -> None:
    """Says that these are no part of the model any more: an optimizer that steps them was made before."""
    _replaced.update(dict.fromkeys(parameters))


def check_join() -> None:
    """Raises UnsupportedError inside DistributedDataParallel.join: ranks that have no more batches call no layer."""
    for wrapper in _wrappers:
        if wrapper._join_config.enable:
            raise UnsupportedError(
                "DistributedDataParallel.join lets ranks without batches leave, but their experts are needed by all "
                "others' tokens. Give every rank equally many batches, the last ones with no tokens where there are "
                "none, and leave out join"
            )


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
        if not isinstance(value, ExpertParameter):
            continue
        _wrappers.add(wrapper)
        if path not in wrapper.parameters_to_ignore:
            raise UnsupportedError(
                f"DistributedDataParallel would take {path} for the same on every rank and send the first rank's "
                "experts to all others; call exclude_from_ddp(model) before, on the very module that it wraps"
            )


def _parameters_of(optimizer: Optimizer) -> set[int]:
    return {id(value) for group in optimizer.param_groups for value in group["params"]}


def _among(optimizer: Optimizer) -> Iterator[tuple[OptimizerSteps, Layer]]:
    parameters = _parameters_of(optimizer)
    for count in list(_counts):
        module = count.of(parameters)
        if module is not None:
            yield count, module


def follow(optimizer: Optimizer, modules: Iterable[Layer]) -> None:
    """Says that the optimizer's state is of the rows that these layers have now."""
    # Accelerate's wrapper has the optimizer that steps inside.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if optimizer in _followed:
        _followed[optimizer] |= {module.layer: module.rows.placement for module in modules}


def _watch_states(optimizer: Optimizer) -> dict[int, str]:
    """Marks the states that the optimizer gives, and checks those that it is given; by layer, what its own is of."""
    known = _followed.get(optimizer)
    if known is None:
        known = _followed[optimizer] = {}
        optimizer.register_state_dict_post_hook(_mark_state)
        optimizer.register_load_state_dict_pre_hook(_unmark_state)
        optimizer.register_load_state_dict_post_hook(_follow_loaded)
    return known


def _check_state(optimizer: Optimizer, modules: list[Layer]) -> None:
    """Raises InputError if the optimizer's state is of other rows than the layers' parameters have now."""
    known = _watch_states(optimizer)
    for module in modules:
        entries = [state for value in module.parameters(recurse=False) if (state := optimizer.state.get(value))]
        moved = known.get(module.layer, module.rows.placement) != module.rows.placement
        if moved and any(isinstance(part, Tensor) and part.ndim for state in entries for part in state.values()):
            raise InputError(
                f"layer {module.layer}: another plan was put in force without this {type(optimizer).__name__}, whose "
                "state is still that of the experts which were here before. Give it to apply(model, plan, optimizer), "
                "or make a new one"
            )
        known[module.layer] = module.rows.placement
        # Put there by hand.
        for state in entries:
            for key, part in state.items():
                if isinstance(part, ExpertRows):
                    state[key] = part.in_order_of(module.rows)


def _expert_entries(optimizer: Optimizer, state_dict: dict[str, Any]) -> Iterator[tuple[int, ExpertParameter, RowsOf]]:
    """(its number in the state_dict, the parameter, whose rows) of each expert parameter."""
    for group, written in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for value, number in zip(group["params"], written["params"], strict=True):
            if isinstance(value, ExpertParameter) and value.rows is not None:
                yield number, value, value.rows


def _is_of_rows(part: Any, value: Tensor) -> bool:
    """Whether an entry of a parameter's state is not one number for the whole of it."""
    return isinstance(part, Tensor) and part.ndim > 0 and (part.numel() != 1 or value.numel() == 1)


def _mark_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer keeps for rows of experts is theirs: it is not written for all, nor loaded under another plan.
    Inner dictionaries are the optimizer's own, and stay."""
    state, marks = dict(state_dict["state"]), {}
    for number, value, rows in _expert_entries(optimizer, state_dict):
        if number in state and not value.in_order:
            marks[number] = rows.mark
            state[number] = {
                key: ExpertRows.of(part, rows) if _is_of_rows(part, value) and len(part) == len(value) else part
                for key, part in state[number].items()
            }
    return {**state_dict, "state": state, **({MARK: marks} if marks else {})}


def _unmark_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """Raises InputError before anything is loaded, if it is of other rows, or nobody knows of which."""
    sizes = [[len(group["params"]) for group in side] for side in (optimizer.param_groups, state_dict["param_groups"])]
    if sizes[0] != sizes[1]:
        return None  # torch says what is wrong
    state, marks = dict(state_dict["state"]), state_dict.get(MARK, {})
    names = {
        id(value): (module, name)
        for _, module in _among(optimizer)
        for name, value in module.named_parameters(recurse=False)
    }
    for number, value, rows in _expert_entries(optimizer, state_dict):
        entries, mark = state.get(number, {}), RowsOf.of_mark(marks.get(number))
        if not value.in_order:
            check_loading()
        module, name = names.get(id(value), (None, "an expert parameter"))
        whole = () if module is None else module.whole_shape(name)
        state[number] = {}
        for key, part in entries.items():
            if _is_of_rows(part, value):
                if not value.in_order or mark is not None or isinstance(part, ExpertRows):
                    part = own_rows(part, mark, rows, f"{key} of {name}", whole, _OPTIMIZERS)
                # Torch loads any shape, and then some step broadcasts it, or fails far from here.
                if part.ndim == value.ndim and part.shape != value.shape:
                    raise InputError(
                        f"layer {rows.layer}: {key} of {name} has shape {list(part.shape)}, and the parameter "
                        f"{list(value.shape)}; expected the same"
                    )
            state[number][key] = part
    return {**state_dict, "state": {number: entries for number, entries in state.items() if entries}}


_OPTIMIZERS = (
    "Write the whole model and its optimizer with torch.distributed.checkpoint (get_state_dict, save), or placed ones "
    "with moeplace.save_checkpoint(path, model, optimizer); on every rank, moeplace.load_checkpoint(path, model, "
    "optimizer) reads either under any plan"
)


def _follow_loaded(optimizer: Optimizer) -> None:
    follow(optimizer, [module for _, module in _among(optimizer)])


def _check_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # Mostly nobody holds them any more.
    for group in optimizer.param_groups if _replaced else ():
        for value in group["params"]:
            if value in _replaced:
                raise InputError(
                    f"this {type(optimizer).__name__} was made before parallelize: it holds experts that are no part "
                    "of the model any more, and none of those that are. Make optimizers afterwards"
                )
    # In order, so that all ranks name the same layer.
    modules = sorted((module for _, module in _among(optimizer)), key=lambda module: module.layer)
    if not modules:
        return
    check_optimizer(optimizer)
    _check_state(optimizer, modules)
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
        if type(owner).__name__ == "PostLocalSGDOptimizer":
            _refuse_averaging("PostLocalSGDOptimizer")
        if frame.f_back is None:
            return
        frame = frame.f_back


def _count_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for count, module in _among(optimizer):
        count.count(module, optimizer)


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
    for package, name in lineage:
        if package != "moeplace" and name in WHOLE_TENSORS:
            _refuse_optimizer(kind.__name__, WHOLE_TENSORS[name])
        few = name.endswith(SMALL_STATES) and name != "Optimizer8bit"  # bitsandbytes' base of all
        if few or getattr(getattr(optimizer, "args", None), "optim_bits", 32) < 32:
            _refuse_optimizer(kind.__name__, "keeps its state in blocks of values, which reach from expert to expert")
    if isinstance(optimizer, tuple(BY_ELEMENT)) or lineage & ELSEWHERE:
        return
    raise UnsupportedError(
        f"whether {kind.__module__}.{kind.__qualname__} treats every expert for itself is not known. If it does, and "
        f"keeps its state in tensors with a row for each expert, say moeplace.runtime.allow_optimizer({kind.__name__});"
        " else give the experts (expert_parameters(model)) to an optimizer that does, as AdamW"
    )


def _refuse_optimizer(name: str, why: str) -> NoReturn:
    raise UnsupportedError(
        f"{name} {why}; a rank's parameters are the experts that it happens to have, so each plan would train "
        "differently. Give the experts (expert_parameters(model)) to an optimizer that works element by element, as "
        "AdamW does, or to moeplace.runtime.Muon"
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
