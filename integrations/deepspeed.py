"""Plans inside DeepSpeed's AutoEP: its engine, its dispatch and its reduction of gradients, with experts where a plan
says, replicas included.

    from moeplace.integrations.deepspeed import PlacedModel, planned

    with planned("plan.json"):
        engine, *_ = deepspeed.initialize(model=model, config=config)
    placed = PlacedModel(engine)

The router stays over E experts. Expert tensors have a row for each of this rank's slots, and what the router chose goes
to the slots that serve it, which AutoEP's dispatch takes for experts. Replicas' gradients are summed in backward,
before DeepSpeed reduces its own. `placement_descriptors` says of any plan where its experts are, as DeepSpeed's
universal checkpoints are read (`deepspeed.checkpoint.autoep_affine`).

P slots, E experts, S slots of this rank, T tokens, K experts a token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh

from ..placement.errors import InputError, UnsupportedError
from ..placement.plan import Plan
from ..profiler import profile
from ..profiler.profile import Recorder
from ..runtime.moe.experts import ReplicaChoice
from ..runtime.moe.layer_placement import LayerPlacement
from ..runtime.moe.mesh import ExpertMesh
from ..training.rebalancer import DTYPES
from .rows import ChangesPlans, ReplicaSums, RowMigration, Rows, even_slots, whole_plan

try:
    from deepspeed.checkpoint.autoep_affine import (
        autoep_experts_for_rank,
        autoep_placement_to_affine_map,
        make_autoep_placement_descriptor,
    )
    from deepspeed.checkpoint.constants import (
        AFFINE_MAP,
        AUTOEP_EXPERT_PLACEMENT,
        AUTOEP_PARAM_LOCAL_EXPERTS,
        AUTOEP_PARAM_LOGICAL_SHAPE,
        DS_AUTOEP_UC_META,
    )
    from deepspeed.module_inject import auto_ep_layer
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.moe.ep_count import count_tokens_per_expert
    from deepspeed.moe.ep_experts import GroupedExperts
    from deepspeed.moe.ep_repack import repack_expert_weights
    from deepspeed.moe.ep_router import TokenChoiceTopKRouter
    from deepspeed.utils import groups
except ImportError as error:
    raise UnsupportedError(f"deepspeed 0.19 cannot be imported ({error}); pip install 'moeplace[deepspeed]'") from error

ROUTERS = r"(^|\.)router$"
"""The modules that choose experts, by the name that AutoEP's layers have."""
WEIGHTS = ("w1", "w2", "w3")


def placement_descriptors(plan: Plan) -> dict[int, dict[str, Any]]:
    """What DeepSpeed calls the placement of each layer, made and checked by DeepSpeed.

    Args:
        plan: any, with unequal numbers of slots and replicas too.

    Returns:
        {absolute layer: descriptor}: plain numbers, lists and dictionaries.

    Raises:
        UnsupportedError: a device has an expert twice.
    """
    result = {}
    for row, layer in enumerate(plan.moe_layers):
        experts = [_experts_of(plan, row, device) for device in range(plan.topology.num_devices)]
        for device, own in enumerate(experts):
            twice = sorted({expert for expert in own if own.count(expert) > 1})
            if twice:
                raise UnsupportedError(
                    f"layer {layer}: device {device} has expert {twice[0]} twice, which AutoEP's descriptor has no "
                    "word for; solve with replicas on different devices"
                )
        result[layer] = make_autoep_placement_descriptor(plan.model.experts, experts)
    return result


def _experts_of(plan: Plan, row: int, device: int) -> list[int]:
    slots = np.flatnonzero((plan.slot_device == device) & plan.filled[row])
    return [int(expert) for expert in plan.physical_to_logical[row, slots]]


# The layer: where tokens go, and what its slots are.


@contextmanager
def planned(plan: Plan | str | Path) -> Iterator[Plan]:
    """Has AutoEP put experts where a plan says, in each engine that `deepspeed.initialize` makes inside.

    Args:
        plan: to begin with, or its file; as many slots on every rank, `autoep_size` the number of its devices.

    Raises:
        InputError: the plan is for another model or number of ranks. UnsupportedError: ranks with different numbers of
            slots, an expert twice on a rank, ZeRO stage 3, folded tensor parallelism, or a dispatch other than AutoEP's
            all-to-all.
    """
    loaded = plan if isinstance(plan, Plan) else Plan.load(plan)
    placement_descriptors(loaded)
    # The engine and AutoEP look the class up in this module, to make layers and to know them.
    auto_ep_layer.AutoEPMoELayer = type("PlannedMoELayer", (PlannedMoELayer,), {"plan": loaded})
    try:
        yield loaded
    finally:
        auto_ep_layer.AutoEPMoELayer = AutoEPMoELayer


class PlannedRouter(TokenChoiceTopKRouter):  # type: ignore[misc]
    """AutoEP's router, whose layer is told slots in place of experts. Hooks, those of recorders too, see experts."""

    choice: ReplicaChoice | None = None
    slots = 0

    def __call__(self, *arguments: Any, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        score_TK, expert_TK, _ = super().__call__(*arguments, **more)
        assert self.choice is not None
        slot_TK = self.choice.slots(expert_TK)
        return score_TK, slot_TK, count_tokens_per_expert(slot_TK, self.slots)


class PlannedExperts(GroupedExperts):  # type: ignore[misc]
    """AutoEP's experts, of which each replica gets the gradient of all of them."""

    sums: ReplicaSums | None = None

    def forward(self, x_ND: Tensor, count_S: Tensor) -> Tensor:
        if hasattr(self.w1, "ds_id"):
            raise UnsupportedError("ZeRO stage 3 cuts experts in parts, which plans do not know; take stage 0, 1 or 2")
        assert self.sums is not None
        if not self.sums.any:
            result: Tensor = super().forward(x_ND, count_S)
            return result
        summed = _ReplicaGradients.apply(self.sums, self.w1, self.w2, self.w3)  # type: ignore[no-untyped-call]
        # What an object has of its own goes before a module's parameters.
        self.__dict__.update(zip(WEIGHTS, summed, strict=True))
        try:
            result = super().forward(x_ND, count_S)
        finally:
            for name in WEIGHTS:
                del self.__dict__[name]
        return result


class _ReplicaGradients(Function):
    """Identity on weights [S, ...]; backward gives each replica the sum over all of its expert."""

    @staticmethod
    def forward(ctx: Any, sums: ReplicaSums, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.sums = sums
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows = ctx.sums.rows
        result = [grad.clone() for grad in grads]
        for grad, total in zip(result, ctx.sums.totals([grad[rows] for grad in grads]), strict=True):
            grad[rows] = total
        return None, *result


class PlannedMoELayer(AutoEPMoELayer):  # type: ignore[misc]
    """AutoEP's layer with a row for each slot of a plan on this rank; the layer of `rows.RowMigration`.

    plan: the one in force, first the class's. optimizer: whose state moves with rows; None before `PlacedModel`.
    `tokens_per_expert`, a counter of AutoEP's, counts slots.
    """

    plan: Plan

    def __init__(
        self, spec: Any, source_module: nn.Module, ep_size: int, ep_rank: int, config: Any, **more: Any
    ) -> None:
        plan = self.plan
        layer = _check(plan, spec, ep_size, config)
        super().__init__(spec, source_module, ep_size, ep_rank, config, **more)
        self.layer = layer
        self.optimizer: torch.optim.Optimizer | None = None
        self.router.__class__, self.experts.__class__ = PlannedRouter, PlannedExperts
        self.router.slots = plan.num_slots
        self.num_local_experts = self.experts.num_experts = plan.num_slots // ep_size
        counts = torch.zeros(plan.num_slots, device=self.experts.w1.device)
        self.register_buffer("tokens_per_expert", counts, persistent=False)
        own = torch.from_numpy(self.rows(plan).expert[plan.slot_device == ep_rank])
        whole = repack_expert_weights(getattr(source_module, spec.experts_name), spec, ep_rank=0, ep_size=1)
        for parameter, value in zip(self._weights, whole, strict=True):
            parameter.data = value.detach()[own].clone()
        self.register_buffer("plan_fingerprint", _bytes_of(plan))

    def set_deepspeed_parallelism(self, *arguments: Any, **more: Any) -> None:
        super().set_deepspeed_parallelism(*arguments, **more)
        if self.folding_group_handles is not None and self.folding_group_handles.spec.tp_size > 1:
            raise UnsupportedError("folded tensor parallelism deals rows in its own order; set autotp_size to 1")
        self.put_in_force(self.plan)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        saved = state_dict.get(f"{prefix}plan_fingerprint")
        if saved is not None and not torch.equal(saved.cpu(), self.plan_fingerprint.cpu()):
            raise InputError(
                f"layer {self.layer}: the checkpoint was written under plan {bytes(saved.tolist()).decode()[:12]}, in "
                f"force is {self.plan.fingerprint[:12]}; begin with the plan that it was written under"
            )
        table = self.plan.physical_to_logical[self.plan.moe_layers.index(self.layer)]
        given = any(f"{prefix}experts.{name}" in state_dict for name in WEIGHTS)
        if saved is None and given and not np.array_equal(table, np.arange(self.plan.model.experts)):
            raise InputError(
                f"layer {self.layer}: the checkpoint does not say under which plan it was written: its rows would be "
                "taken for those of this one. Build the engine from the whole model's weights instead"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    # The layer of a migration.

    @property
    def mesh(self) -> ExpertMesh:
        return _mesh_of(self.ep_group_name, copies=False)

    def rows(self, plan: Plan) -> Rows:
        return Rows(plan.physical_to_logical[plan.moe_layers.index(self.layer)].copy(), plan.slot_device)

    def tensors(self) -> list[Tensor]:
        """[S, ...] of each weight, and what the optimizer keeps for it."""
        return [tensor for weight in self._weights for tensor in (weight.detach(), *self._kept(weight))]

    @torch.no_grad()
    def write(self, tensors: Sequence[Tensor], rows: Sequence[int]) -> None:
        for target, value in zip(self.tensors(), tensors, strict=True):
            target[rows] = value[rows]

    def put_in_force(self, plan: Plan) -> None:
        self.plan = plan
        placement = LayerPlacement.of(plan, self.layer)
        self.router.choice = ReplicaChoice(placement, self.mesh.rank, self.experts.w1.device)
        self.experts.sums = ReplicaSums(self.rows(plan), self.mesh, plan.model.experts)
        self.plan_fingerprint.copy_(_bytes_of(plan))
        self.expert_placement_descriptor = placement_descriptors(plan)[self.layer]
        own = autoep_experts_for_rank(self.expert_placement_descriptor, self.mesh.rank)
        for weight in self._weights:
            shape = [plan.model.experts, *weight.shape[1:]]
            affine = autoep_placement_to_affine_map(self.expert_placement_descriptor, shape).to_dict()
            placed = {AUTOEP_EXPERT_PLACEMENT: self.expert_placement_descriptor, AFFINE_MAP: affine}
            getattr(weight, DS_AUTOEP_UC_META).update(
                placed | {AUTOEP_PARAM_LOGICAL_SHAPE: shape, AUTOEP_PARAM_LOCAL_EXPERTS: list(own)}
            )

    @property
    def _weights(self) -> list[nn.Parameter]:
        return [self.experts.get_parameter(name) for name in WEIGHTS]

    def _kept(self, weight: nn.Parameter) -> list[Tensor]:
        state = {} if self.optimizer is None else self.optimizer.state.get(weight, {})
        values = [state[name] for name in sorted(state) if isinstance(state[name], Tensor) and state[name].ndim]
        for value in values:
            if value.shape != weight.shape:
                raise UnsupportedError(
                    f"{type(self.optimizer).__name__} keeps state of shape {list(value.shape)} for experts of shape "
                    f"{list(weight.shape)}; use an optimizer that works element by element, as Adam does"
                )
        return values


def _check(plan: Plan, spec: Any, ep_size: int, config: Any) -> int:
    """The layer's absolute index."""
    name = spec.moe_module_name
    number = re.search(r"\d+", name)
    if number is None or int(number[0]) not in plan.moe_layers:
        raise InputError(f"{name} is none of the layers {list(plan.moe_layers)} of the plan")
    for field, in_model in (
        ("experts", spec.num_experts),
        ("top_k", spec.top_k),
        ("hidden_size", spec.hidden_size),
        ("ffn_size", spec.ffn_hidden_size),
    ):
        if (in_plan := getattr(plan.model, field)) != in_model:
            raise InputError(f"the plan is for another model: its {field} is {in_plan}, that of {name} {in_model}")
    if config.comm_backend != "comm":
        raise UnsupportedError(f"comm_backend {config.comm_backend!r}: plans go with AutoEP's all-to-all, 'comm'")
    even_slots(plan, ep_size, "AutoEP")
    return int(number[0])


def _bytes_of(plan: Plan) -> Tensor:
    return torch.tensor(list(plan.fingerprint.encode()), dtype=torch.uint8)


@lru_cache
def _mesh_of(name: str, copies: bool) -> ExpertMesh:
    """The ranks of expert parallelism, and with `copies` all that hold the same layers; all of these call it at once at
    first."""
    group, data = groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
    members = dist.get_process_group_ranks(group)
    every: list[Any] = [members]
    if copies:
        every = [None] * dist.get_world_size(data)
        dist.all_gather_object(every, members, group=data)
    mesh = DeviceMesh.from_group(group, "cuda" if torch.cuda.is_available() else "cpu", mesh_dim_names=("ep",))
    beside = data if len(every) > 1 else None
    return ExpertMesh(
        mesh, group, members.index(dist.get_rank()), len(members), tuple(members), np.array(every), data=beside
    )


# The model in training.


class PlacedModel(ChangesPlans):
    """An engine of DeepSpeed with placed experts, whose plan changes between steps, optimizer's state included; what a
    `Rebalancer` takes, without an optimizer of its own.

    layers: the planned layers of this rank.

    Args:
        engine: of `deepspeed.initialize` inside `planned`; without ZeRO, with an optimizer of torch.

    Raises:
        InputError: no planned layers. UnsupportedError: an optimizer that keeps experts in flat copies.
    """

    def __init__(self, engine: Any) -> None:
        self.layers = [module for module in engine.module.modules() if isinstance(module, PlannedMoELayer)]
        if not self.layers:
            raise InputError("the engine has no planned layers; make it inside `with planned(plan):`")
        self._model, optimizer = engine.module, engine.optimizer
        trained = {id(value) for group in optimizer.param_groups for value in group["params"]}
        if not isinstance(optimizer, torch.optim.Optimizer) or id(self.layers[0].experts.w1) not in trained:
            raise UnsupportedError(
                f"{type(optimizer).__name__} keeps experts in flat copies, which do not move; plans change with ZeRO "
                "stage 0 in float32, or by a new start from a checkpoint of whole experts"
            )
        for layer in self.layers:
            layer.optimizer = optimizer

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return whole_plan(self.layers)

    @property
    def mesh(self) -> ExpertMesh:
        return _mesh_of(self.layers[0].ep_group_name, copies=True)

    @property
    def row_dtypes(self) -> tuple[str, str]:
        """What `Objective` calls the types in which rows travel to experts and back."""
        own = DTYPES[self.layers[0].experts.w1.dtype]
        return own, own

    def record(self, folder: str | Path) -> Recorder:
        """A recorder of this rank's routing, to be entered."""
        return profile(self._model, folder, routers=ROUTERS, num_experts=self.plan.model.experts)

    def tensors(self) -> list[Tensor]:
        return self.layers[0].tensors()

    def change(self, plan: Plan) -> RowMigration:
        """A change to `plan`, to be made between steps."""
        even_slots(plan, self.mesh.size, "AutoEP")
        placement_descriptors(plan)
        return RowMigration(self.layers, plan, self.mesh)
