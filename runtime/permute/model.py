"""A plan applied to a Megatron-LM, torchtitan or DeepSpeed AutoEP model in memory, experts spread over ranks or not."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..._arguments import check_types
from ..._types import IntArray
from ...placement.errors import InputError, MoeplaceError, UnsupportedError
from ...placement.plan import Plan
from .checkpoint import expert_order

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

# Which part of a model a parameter or buffer is, by its name. Names as of megatron-core 0.16.1
# (megatron/core/transformer/moe: router.py, experts.py, shared_experts.py), torchtitan 0.2.2 and 0.3.0
# (torchtitan/models/common/moe.py, models/gpt_oss/moe.py) and DeepSpeed 0.19.8 (module_inject/auto_ep_layer.py, in the
# place of a Transformers model's MoE block).


_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_MEGATRON = re.compile(r"(?P<stem>(?:.+\.)?decoder\.layers\.(?P<layer>\d+)\.)mlp\.(?P<rest>.+)")
_TITAN = re.compile(r"(?P<stem>(?:.+\.)?layers\.(?P<layer>\d+)\.)moe\.(?P<rest>.+)")
_AUTOEP = re.compile(
    r"(?P<stem>(?:.+\.)?layers\.(?P<layer>\d+)\.)(?:mlp|block_sparse_moe|feed_forward)\."
    r"(?P<rest>router\..+|experts\.w[123]|expert_bias|tokens_per_expert|shared_experts(?:_gate)?\..+)"
)
_PREDICTION = re.compile(r"(?:^|\.)mtp(?:_|\.)")
_SUSPECT = re.compile(r"expert|router|(?:^|\.)moe\.")

_ROUTER = re.compile(
    r"router\.(?:weight|bias|expert_bias|local_tokens_per_expert|global_tokens_per_expert)"  # Megatron-LM
    r"|router\.gate\.(?:weight|bias)|(?:expert_bias|tokens_per_expert)(?:_E)?"  # torchtitan, DeepSpeed
    r"|router\.e_score_correction_bias"  # DeepSpeed
)
_STACKED = re.compile(
    r"(?:routed_experts\.inner_experts|experts)\.(?:w[123]|w1_EFD|w2_EDF|w3_EFD"
    r"|mlp1_weight(?:_EGD)?|mlp1_bias(?:_EG)?|mlp2_weight(?:_EDF)?|mlp2_bias(?:_ED)?)"
)
_JOINED = re.compile(r"experts\.weight[12]")
_GROUPED = re.compile(r"experts\.(linear_fc[12]\.(?:weight|bias))(\d+)")
_SINGLE = re.compile(r"experts\.local_experts\.(\d+)\.(linear_fc[12]\.(?:weight|bias))")
_ALIKE = re.compile(
    r"shared_experts(?:_gate)?\..+|router\.ga_steps|fc[12]_latent_proj\..+"
    # A layer without experts.
    r"|linear_fc[12]\.(?:weight|bias|layer_norm_weight|layer_norm_bias)"
)


@dataclass(frozen=True)
class ModelRole:
    """kind: "router" has all E experts in dimension 0, on every rank; "stacked" has this rank's experts there; "joined"
    has them one after the other in its memory, whatever its shape; "expert" is of one of this rank's experts alone.

    layer: as the name says it. stem: the layer's own name. expert: its number on this rank, for "expert". place: equal
    for the tensors that change places with each other.
    """

    kind: Literal["router", "stacked", "joined", "expert"]
    layer: int
    stem: str
    place: str
    expert: int = -1


def without_wrappers(name: str) -> str:
    """The name without what torch.compile, activation checkpointing and FSDP put into it."""
    return _WRAPPERS.sub("", name)


def model_role(name: str) -> ModelRole | None:
    """The part in a routed MoE layer; None for what a change of experts leaves alone.

    Raises:
        UnsupportedError: a name inside an MoE layer, or one that speaks of experts elsewhere, which is not known.
    """
    plain = without_wrappers(name)
    match = _MEGATRON.fullmatch(plain) or _TITAN.fullmatch(plain) or _AUTOEP.fullmatch(plain)
    if _PREDICTION.search(plain):
        return None
    if match is None:
        if _SUSPECT.search(plain):
            raise UnsupportedError(
                f"{name} speaks of experts, and its name is of no layer of Megatron-LM, torchtitan or AutoEP that is "
                "known; leaving it as it is could give wrong results"
            )
        return None
    layer, stem, rest = int(match["layer"]), match["stem"], match["rest"]
    if _ALIKE.fullmatch(rest):
        return None
    for pattern, kind in ((_ROUTER, "router"), (_STACKED, "stacked"), (_JOINED, "joined")):
        if pattern.fullmatch(rest):
            return ModelRole(kind, layer, stem, plain)  # type: ignore[arg-type]
    if grouped := _GROUPED.fullmatch(rest):
        return ModelRole("expert", layer, stem, f"{stem}{grouped[1]}", int(grouped[2]))
    if single := _SINGLE.fullmatch(rest):
        return ModelRole("expert", layer, stem, f"{stem}{single[2]}", int(single[1]))
    raise UnsupportedError(
        f"{name} stands in an MoE layer and its name is not known; leaving it as it is could give wrong results. Known "
        "are megatron-core up to 0.16, torchtitan 0.2 and 0.3, and DeepSpeed's AutoEP 0.19"
    )


@dataclass(frozen=True)
class Place:
    """Tensors of one layer that are permuted alike. tensors: one with all of this rank's experts, or one an expert."""

    role: ModelRole
    layer: int
    tensors: tuple[torch.Tensor, ...]


@check_types
def permute_model(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    plan: Plan,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    expert_group: ProcessGroup | None = None,
    invert: bool = False,
) -> IntArray:
    """Puts each MoE layer's experts in the plan's order, in place: router rows, biases, expert weights, gradients.

    Such an engine gives rank r of an expert-parallel group the r-th block of experts, so that the model then runs the
    plan and computes what it did. Call it between steps, on a model whose experts are in their first order, on
    every rank; a plan changes another by inverting that one first. Memory: one tensor of one layer's local experts,
    three times; a DTensor's whole, twice.

    Args:
        model: of Megatron-LM, its chunks of interleaved pipeline parallelism too, torchtitan, or DeepSpeed's AutoEP,
            wrapped or not.
        plan: without replicas, with as many slots on every device.
        optimizer: a plain torch optimizer whose state moves along; Megatron-LM's own ones keep copies out of reach, so
            permute before they are made.
        expert_group: expert-parallel ranks, in the order of the plan's devices, where the tensors are of a rank's
            experts alone (Megatron-LM's `parallel_state.get_expert_model_parallel_group()`); DTensors know their own.
        invert: undo.

    Returns:
        [L, E] the original expert in each row.

    Raises:
        UnsupportedError: a name or a tensor that is not known, an optimizer other than torch's own, a plan that no
            order of experts can follow; see `expert_order`.
        InputError: a model that is not the plan's, or ranks with different plans, tensors, gradients or state. Where
            experts are spread over ranks, all of them raise, and nothing has moved on any.
    """
    import torch

    from ..moe.coordination import check_consistent_over

    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    groups = _groups(chunks, expert_group)
    failure: MoeplaceError | None = None
    places: list[Place] = []
    order, ranks = np.empty((0, 0), dtype=np.int64), 1
    try:
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise UnsupportedError(
                f"the state of {type(optimizer).__name__} cannot be permuted: give a torch.optim.Optimizer, or save "
                "the permuted model and start its optimizer anew"
            )
        order = expert_order(plan)
        places = [place for chunk in chunks for place in _places(chunk, optimizer)]
        ranks = _checked(places, plan, expert_group)
    except MoeplaceError as error:
        failure = error
    if groups:
        moved = [
            f"{p.role.place} {p.layer} {len(p.tensors)} {p.tensors[0].dtype} {list(p.tensors[0].shape)}" for p in places
        ]
        content = "\n".join([str(order.tolist()), str(invert), *moved])
        check_consistent_over(groups, "plan, model and optimizer state to permute", content, failure)
    elif failure is not None:
        raise failure
    rows = dict(zip(plan.moe_layers, np.argsort(order, axis=1) if invert else order.copy(), strict=True))
    with torch.no_grad():
        for place in places:
            _move(place, rows[place.layer], plan.model.experts, ranks, expert_group)
    return order


def _groups(chunks: Sequence[torch.nn.Module], expert_group: ProcessGroup | None) -> list[ProcessGroup]:
    """Of the ranks that change experts with each other: they go on together, or none does."""
    from torch.distributed.tensor import DTensor

    if expert_group is not None:
        return [expert_group]
    tensors = (t for chunk in chunks for t in (*chunk.parameters(), *chunk.buffers()) if isinstance(t, DTensor))
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors)
    return list(dict.fromkeys(group for mesh in meshes for group in mesh.get_all_groups()))


def _places(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[Place]:
    """Every parameter and buffer of routed experts, with its gradient and its state in the optimizer."""
    together: dict[tuple[str, str], list[tuple[ModelRole, torch.Tensor]]] = defaultdict(list)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        role = model_role(name)
        if role is None:
            continue
        for part, value in _with_state(name, tensor, optimizer):
            together[role.place, part].append((role, value))
    numbers = {without_wrappers(name): getattr(module, "layer_number", None) for name, module in model.named_modules()}
    for members in together.values():
        members.sort(key=lambda member: member[0].expert)
        role = members[0][0]
        # Megatron-LM numbers a pipeline stage's layers from 0 in names; the layer itself knows better, from 1.
        number = numbers.get(role.stem.rstrip("."))
        yield Place(role, role.layer if type(number) is not int else number - 1, tuple(t for _, t in members))


def _with_state(
    name: str, tensor: torch.Tensor, optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    yield "", tensor
    if tensor.grad is not None:
        yield "gradient", tensor.grad
    for key, value in (optimizer.state.get(tensor, {}) if optimizer is not None else {}).items():
        if not isinstance(value, torch.Tensor) or not value.ndim:
            continue
        if value.shape != tensor.shape:
            raise UnsupportedError(
                f"the optimizer's {key} of {name} has shape {list(value.shape)}, the parameter {list(tensor.shape)}: "
                "how to permute it is not known"
            )
        yield key, value


def _checked(places: Sequence[Place], plan: Plan, group: ProcessGroup | None) -> int:
    """How many ranks the experts are spread over; all there is to know before anything moves."""
    import torch.distributed as dist

    seen: dict[int, set[bool]] = defaultdict(set)
    for place in places:
        if place.layer not in plan.moe_layers:
            raise InputError(
                f"{place.role.place} is of layer {place.layer}, which the plan does not place; its MoE layers are "
                f"{', '.join(map(str, plan.moe_layers))}"
            )
        seen[place.layer].add(place.role.kind == "router")
    halves = [layer for layer, kinds in seen.items() if len(kinds) < 2]
    if halves or not seen:
        raise InputError(
            f"layer {halves[0]} has {'no experts' if True in seen[halves[0]] else 'no router'} in this model"
            if halves
            else "the model has no MoE layer under a name of Megatron-LM, torchtitan or DeepSpeed's AutoEP"
        )
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks != 1 and ranks != plan.topology.num_devices:
        raise InputError(
            f"expert_group has {ranks} ranks, the plan places on {plan.topology.num_devices} devices: solve for the "
            "group"
        )
    for place in places:
        _check_size(place, plan.model.experts, ranks)
    return ranks


def _check_size(place: Place, experts: int, ranks: int) -> None:
    import torch
    from torch.distributed.tensor import DTensor

    first = place.tensors[0]
    for tensor in place.tensors:
        kind = type(tensor)
        if kind not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, DTensor):
            raise UnsupportedError(f"{place.role.place} is a {kind.__name__}: how to permute it is not known")
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            raise UnsupportedError(f"{place.role.place}: experts differ in shape or dtype and cannot change places")
    if isinstance(first, DTensor):
        whole = place.role.kind in ("router", "stacked") and first.shape[0] == experts
        expected = f"{experts} experts in dimension 0"
    elif place.role.kind == "expert":
        local = [place.role.expert + i for i in range(len(place.tensors))]
        whole = place.role.expert == 0 and len(local) * ranks == experts
        expected = f"{experts // ranks} experts on this rank"
    elif place.role.kind == "joined":
        whole = first.is_contiguous() and experts % ranks == 0 and first.numel() % (experts // ranks) == 0
        expected = f"{experts // ranks} experts joined"
    else:
        local_experts = experts if place.role.kind == "router" else experts // ranks
        whole = bool(first.ndim) and first.shape[0] == local_experts
        expected = f"{local_experts} experts in dimension 0"
    if not whole:
        raise InputError(
            f"{place.role.place} has {len(place.tensors)} tensor(s) of shape {list(first.shape)}, expected {expected}; "
            "where experts are spread over ranks, pass expert_group"
        )


def _move(place: Place, rows: IntArray, experts: int, ranks: int, group: ProcessGroup | None) -> None:
    import torch
    from torch.distributed.tensor import DTensor

    first = place.tensors[0]
    if isinstance(first, DTensor):
        _move_distributed(first, rows)
        return
    if place.role.kind == "router":
        first.copy_(first[torch.from_numpy(rows).to(first.device)])
        return
    local = experts // ranks
    single = place.role.kind == "expert"
    content = torch.stack(list(place.tensors)).flatten(1) if single else first.reshape(local, -1)
    moved = content[torch.from_numpy(rows).to(content.device)] if ranks == 1 else _exchanged(content, rows, group)
    if single:
        for tensor, content in zip(place.tensors, moved, strict=True):
            tensor.copy_(content.view_as(tensor))
    else:
        first.copy_(moved.view(first.shape))


def _move_distributed(tensor: DTensor, rows: IntArray) -> None:
    import torch
    from torch.distributed.tensor import distribute_tensor

    whole = tensor.full_tensor()
    whole = whole[torch.from_numpy(rows).to(whole.device)]
    tensor.copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None))


def _exchanged(content: torch.Tensor, rows: IntArray, group: Any) -> torch.Tensor:
    """[e, n] this rank's experts after the move, from [e, n] before it, e of E on each rank."""
    import torch
    import torch.distributed as dist

    local, ranks, me = len(content), dist.get_world_size(group), dist.get_rank(group)
    rows_of_rank = rows.reshape(ranks, local)
    sent = [rows_of_rank[rank][rows_of_rank[rank] // local == me] % local for rank in range(ranks)]
    owner = rows_of_rank[me] // local
    arrived = torch.empty_like(content)
    dist.all_to_all_single(
        arrived,
        content[torch.from_numpy(np.concatenate(sent)).to(content.device)],
        np.bincount(owner, minlength=ranks).tolist(),
        [len(part) for part in sent],
        group=group,
    )
    moved = torch.empty_like(content)
    moved[torch.from_numpy(np.argsort(owner, kind="stable")).to(content.device)] = arrived
    return moved
