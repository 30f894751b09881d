"""Plans inside Megatron-LM: megatron-core's MoE layers, dispatchers, optimizers and checkpoints, with experts where a
plan says.

    from moeplace.integrations.megatron import PlacedModel, planned

    spec = planned(get_gpt_decoder_block_spec(config, use_transformer_engine=True), config, "plan.json")
    model = DistributedDataParallel(config, ddp_config, GPTModel(config, spec, ...))
    optimizer = get_megatron_optimizer(optimizer_config, [model])
    placed = PlacedModel([model], optimizer)

The router, its counters and its bias stay over E experts. A layer has an expert module for each of its P slots; what
the router says is spread from [T, E] to [T, P], and megatron-core's dispatchers run on that as they are. Replicas'
gradients are summed once megatron-core has reduced its own; norms count one of an expert's replicas. Distributed
checkpoints have all experts in order, under megatron-core's own names, so a run goes on under another plan, or without
one.

P slots, E experts, S slots of this rank, T tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..placement.errors import InputError, UnsupportedError
from ..placement.model import ModelSpec
from ..placement.plan import Plan
from ..profiler import profile
from ..profiler.profile import Recorder
from ..runtime.moe.experts import ReplicaChoice
from ..runtime.moe.layer_placement import LayerPlacement
from ..runtime.moe.mesh import ExpertMesh
from ..training.rebalancer import DTYPES
from .rows import ChangesPlans, ReplicaSums, RowMigration, Rows, equalize_replicas, even_slots, whole_plan

try:
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
    from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensorFactory
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
    from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig
except ImportError as error:
    raise UnsupportedError(
        f"megatron-core 0.16 cannot be imported ({error}); pip install 'moeplace[megatron]'"
    ) from error

ROUTERS = r"mlp\.router$"
"""The modules that choose experts, by the names that megatron-core's layers have."""

SLOTS = "expert_of_slot"
"""Under it a state_dict's metadata says whose slots it has, rank by rank."""

MAIN = "main"
"""What the 32-bit copy of a 16-bit parameter is called beside its optimizer's state."""


def planned(spec: Any, config: TransformerConfig, plan: Plan | str | Path) -> Any:
    """A specification of layers with its experts placed.

    Args:
        spec: of a layer, or of a block of layers, as megatron-core's `get_gpt_layer_local_spec`,
            `get_gpt_decoder_block_spec` and their like give it.
        config: of the model.
        plan: to begin with, or its file.

    Returns:
        The same specification with `PlannedMoELayer` in place of `MoELayer`; what was given stays as it is.

    Raises:
        InputError: the plan is for another model, or the specification has no MoE layers. UnsupportedError: a setting
            that plans do not go with, or a plan that gives devices different numbers of slots.
    """
    loaded = plan if isinstance(plan, Plan) else Plan.load(plan)
    expected = model_spec(config)
    for field in ("experts", "top_k", "hidden_size", "ffn_size", "moe_layers"):
        in_plan, in_model = getattr(loaded.model, field), getattr(expected, field)
        if in_plan != in_model:
            raise InputError(f"the plan is for another model: its {field} is {in_plan}, the configuration's {in_model}")
    _check_config(config)
    _check_plan(loaded, config.expert_model_parallel_size)
    result, changed = _with_plan(spec, loaded)
    if not changed:
        raise InputError(f"{type(spec).__name__} has no MoELayer; give the specification of layers that have experts")
    return result


def model_spec(config: TransformerConfig) -> ModelSpec:
    """What solvers need of a configuration's model.

    Raises:
        InputError: it has no MoE layers.
    """
    if not config.num_moe_experts:
        raise InputError(f"num_moe_experts is {config.num_moe_experts}: the model has no experts")
    every = config.moe_layer_freq
    pattern = [index % every == 0 for index in range(config.num_layers)] if isinstance(every, int) else every
    layers = tuple(index for index, moe in enumerate(pattern) if moe)
    return ModelSpec(
        layers=len(layers),
        experts=config.num_moe_experts,
        top_k=config.moe_router_topk,
        hidden_size=config.hidden_size,
        ffn_size=config.moe_ffn_hidden_size or config.ffn_hidden_size,
        moe_layers=layers,
    )


def _with_plan(spec: Any, plan: Plan) -> tuple[Any, bool]:
    """A copy of a specification with its MoE layers planned, and whether there were any."""
    if isinstance(spec, ModuleSpec) and spec.module is MoELayer:
        result = copy.copy(spec)
        result.module, result.params = PlannedMoELayer, {**spec.params, "plan": plan}
        return result, True
    if isinstance(spec, list):
        parts = [_with_plan(part, plan) for part in spec]
        return [part for part, _ in parts], any(changed for _, changed in parts)
    fields = (
        ["submodules"] if isinstance(spec, ModuleSpec) else [f.name for f in dataclasses.fields(spec)]
        if dataclasses.is_dataclass(spec) and not isinstance(spec, type) else []
    )  # fmt: skip
    result, any_changed = copy.copy(spec), False
    for field in fields:
        value, changed = _with_plan(getattr(spec, field), plan)
        if changed:
            setattr(result, field, value)
            any_changed = True
    return (result, True) if any_changed else (spec, False)


def _check_plan(plan: Plan, devices: int) -> None:
    """Raises for plans that megatron-core's equal ranks, or its checkpoints, do not go with."""
    own = even_slots(plan, devices, "Megatron-LM")
    for layer, table in zip(plan.moe_layers, plan.physical_to_logical, strict=True):
        for device, experts in enumerate(np.sort(table.reshape(-1, own), axis=1)):
            if len(twice := experts[1:][experts[1:] == experts[:-1]]):
                raise UnsupportedError(
                    f"layer {layer}: device {device} has expert {twice[0]} twice, which a rank cannot write into one "
                    "of megatron-core's checkpoints; solve with replicas on different devices"
                )


def _check_config(config: TransformerConfig) -> None:
    """Raises for settings that plans do not go with."""
    refused = {
        "cuda_graph_impl": (config.cuda_graph_impl != "none", "the spread to slots is in no captured graph"),
        "moe_pad_expert_input_to_capacity": (
            config.moe_pad_expert_input_to_capacity,
            "each replica would get an expert's whole capacity",
        ),
        "expert_tensor_parallel_size": (
            (config.expert_tensor_parallel_size or 1) > 1,
            "an expert's matrices are whole on a rank",
        ),
        "fp8": (bool(config.fp8), "scales of FP8 tensors do not move with experts"),
        "fp4": (bool(config.fp4), "scales of FP4 tensors do not move with experts"),
    }
    for name, (is_set, why) in refused.items():
        if is_set:
            raise UnsupportedError(f"{name}={getattr(config, name)} does not go with a plan: {why}; leave it out")


# The layer: where tokens go, and what its slots are.


class PlannedMoELayer(MoELayer):  # type: ignore[misc]
    """megatron-core's MoE layer with an expert for each slot of a plan; the layer of `rows.RowMigration`.

    plan: the one in force. slots: by name the parameters of each slot of this rank.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        *,
        plan: Plan,
    ) -> None:
        groups = get_default_pg_collection() if pg_collection is None else pg_collection
        _check_plan(plan, groups.ep.size())
        of_slots = copy.copy(config)
        of_slots.num_moe_experts = plan.num_slots
        of_experts = config

        def router(*, config: TransformerConfig, pg_collection: Any) -> Any:
            return submodules.router(config=of_experts, pg_collection=pg_collection)

        super().__init__(of_slots, dataclasses.replace(submodules, router=router), layer_number, groups)
        self.config, self.plan = config, plan
        self.slots = _slot_parameters(self.experts)
        self.keepers: list[_Keeper] = []
        self._groups = groups
        self._choice: ReplicaChoice | None = None
        self._sums: ReplicaSums | None = None

    def set_layer_number(self, layer_number: int) -> None:
        super().set_layer_number(layer_number)
        self._choice = self._choice_of(self.plan)

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As megatron-core has it, with slots in place of experts."""
        probs_TE, chosen_TE = super().route(hidden_states, padding_mask)
        assert self._choice is not None
        return self._choice.spread(probs_TE, chosen_TE)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As megatron-core has it, with the model's experts in order."""
        if (metadata or {}).get("singleton_local_shards"):
            raise UnsupportedError("singleton_local_shards names slots one by one; leave it out of the metadata")
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, value in state.items():
            if name.startswith(f"{prefix}experts.") and isinstance(value, ShardedBase):
                state[name] = self._in_order(value, len(sharded_offsets), name)
        return state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][SLOTS] = self._table(self.plan).tolist()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        # Distributed checkpoints name experts, and say nothing here: their slots are those in force.
        written = local_metadata.get(SLOTS, self._table(self.plan).tolist())
        if written != self._table(self.plan).tolist():
            raise InputError(
                f"layer {self.layer}: this state has experts as another plan has them, slot by slot: {written}, in "
                f"force is {self._table(self.plan).tolist()}. Begin with the plan that it was written under, or use "
                "megatron-core's distributed checkpoints (--ckpt-format torch_dist), which go by expert"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    def start(self, keepers: list[_Keeper]) -> None:
        """Once weights and optimizers are made: replicas get the weights of their expert's first slot."""
        self.keepers = keepers
        self.put_in_force(self.plan)
        equalize_replicas(self)

    # The layer of a migration.

    @property
    def layer(self) -> int:
        return int(self.layer_number) - 1

    @property
    def plan_mesh(self) -> ExpertMesh:
        """All ranks that hold this layer."""
        return _mesh_of(self._groups)

    @property
    def mesh(self) -> ExpertMesh:
        return dataclasses.replace(self.plan_mesh, grid=np.array([self.plan_mesh.members]), data=None)

    def rows(self, plan: Plan) -> Rows:
        return Rows(self._table(plan), plan.slot_device)

    def tensors(self) -> list[Tensor]:
        """[S, ...] of each of a slot's parameters, and [S, elements] of what is kept for it."""
        result = []
        for name in self.slots[0]:
            parameters = [slot[name] for slot in self.slots]
            keeper = self._keeper(parameters[0])
            result.append(torch.stack([parameter.detach() for parameter in parameters]))
            result += [keeper.gather(parameters, key) for key in keeper.names(parameters[0])]
        return result

    @torch.no_grad()
    def write(self, tensors: Sequence[Tensor], rows: Sequence[int]) -> None:
        values = iter(tensors)
        for name in self.slots[0]:
            parameters = [slot[name] for slot in self.slots]
            keeper = self._keeper(parameters[0])
            weight = next(values)
            for row in rows:
                parameters[row].copy_(weight[row])
            for key in keeper.names(parameters[0]):
                value = next(values)
                for row in rows:
                    keeper.put(parameters[row], key, value[row])

    def put_in_force(self, plan: Plan) -> None:
        self.plan, self._choice = plan, self._choice_of(plan)
        self._sums = ReplicaSums(self.rows(plan), self.mesh, plan.model.experts)
        first = self._replica_of_slot(plan) == 0
        own = plan.slot_device == self.mesh.rank
        for slot, counts in zip(self.slots, first[own].tolist(), strict=True):
            for parameter in slot.values():
                # By this mark megatron-core's norms and counts of zeros leave out what another rank counts.
                tensors: tuple[Any, ...] = (parameter, self._keeper(parameter).main(parameter))
                for tensor in tensors:
                    if tensor is not None:
                        tensor.shared = not counts

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """After megatron-core's own reduction: each replica has the sum over all of them."""
        assert self._sums is not None
        if not self._sums.any:
            return
        rows = self._sums.rows
        trained = [name for name, parameter in self.slots[0].items() if hasattr(parameter, "main_grad")]
        grads = []
        for name in trained:
            like = _main_grad(self.slots[0][name])
            parameters = [self.slots[row][name] for row in rows]
            whole = [self._keeper(parameter).whole_gradient(parameter) for parameter in parameters]
            grads.append(torch.stack(whole) if whole else like.new_empty(0, *like.shape))
        for name, total in zip(trained, self._sums.totals(grads), strict=True):
            for row, value in zip(rows, total, strict=True):
                _main_grad(self.slots[row][name]).copy_(value)

    def _keeper(self, parameter: nn.Parameter) -> _Keeper:
        for keeper in self.keepers:
            if keeper.has(parameter):
                return keeper
        return _Keeper(None)

    def _table(self, plan: Plan) -> Any:
        """[P] expert in each slot of this layer."""
        return plan.physical_to_logical[plan.moe_layers.index(self.layer)]

    def _choice_of(self, plan: Plan) -> ReplicaChoice:
        device = next(self.experts.parameters()).device
        return ReplicaChoice(LayerPlacement.of(plan, self.layer), self._groups.ep.rank(), device)

    def _replica_of_slot(self, plan: Plan) -> Any:
        """[P] how many slots before it have the same expert."""
        table = self._table(plan)
        return np.array([int((table[:slot] == expert).sum()) for slot, expert in enumerate(table.tolist())])

    def _in_order(self, value: ShardedBase, axis: int, name: str) -> ShardedBase:
        """A sharded tensor of a slot as one of its expert, the `axis`-th coordinate. Replicas other than the first are
        copies, as those of data parallelism are."""
        table, replica = self._table(self.plan), self._replica_of_slot(self.plan)
        copies = self._groups.expt_dp.size()

        def moved(tensor: Any) -> Any:
            if not isinstance(tensor, ShardedBase):
                return tensor
            if isinstance(tensor, ShardedTensorFactory):
                return dataclasses.replace(tensor, build_fn=built(tensor.build_fn))
            return _at(tensor, axis, int(table[tensor.global_offset[axis]]), self.plan.model.experts)

        def built(build: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *arguments: dict_list_map_outplace(moved, build(*arguments))

        slot = self._slot_of(value, axis, name)
        pipeline, tensor_parallel, data = value.replica_id
        shifted = dataclasses.replace(value, replica_id=(pipeline, tensor_parallel, data + int(replica[slot]) * copies))
        result: ShardedBase = moved(shifted)
        return result

    def _slot_of(self, value: ShardedBase, axis: int, name: str) -> int:
        """A factory builds its tensors only when asked to."""
        if not isinstance(value, ShardedTensorFactory):
            return int(value.global_offset[axis])
        offsets: list[int] = []
        dict_list_map_outplace(
            lambda tensor: (
                offsets.append(int(tensor.global_offset[axis])) if isinstance(tensor, ShardedTensor) else None
            ),
            value.build(),
        )
        if len(set(offsets)) != 1:
            raise UnsupportedError(f"{name} is one tensor of the slots {sorted(set(offsets))}, which plans cannot part")
        return offsets[0]


def _at(tensor: Any, axis: int, expert: int, experts: int) -> Any:
    """A sharded tensor or object at another place of one of its axes."""
    changes: dict[str, Any] = {}
    for field, value in (("global_offset", expert), ("global_shape", experts), ("axis_fragmentations", experts)):
        old = getattr(tensor, field, None)
        if old is not None:
            changes[field] = (*old[:axis], value, *old[axis + 1 :])
    return dataclasses.replace(tensor, **changes)


def _main_grad(parameter: Any) -> Tensor:
    """Where megatron-core's wrapper has a parameter's gradient."""
    result: Tensor = parameter.main_grad
    return result


_NUMBERED = re.compile(r"(.+\.(?:weight|bias))(\d+)")


def _slot_parameters(experts: Any) -> list[dict[str, nn.Parameter]]:
    """By name the parameters of each slot of this rank."""
    if isinstance(experts, SequentialMLP):
        return [dict(expert.named_parameters()) for expert in experts.local_experts]
    slots: list[dict[str, nn.Parameter]] = [{} for _ in range(int(experts.num_local_experts))]
    for name, parameter in experts.named_parameters():
        numbered = _NUMBERED.fullmatch(name)
        if numbered is None or not isinstance(experts, TEGroupedMLP):
            raise UnsupportedError(
                f"{type(experts).__name__} keeps {name} of all its experts in one tensor; plans go with SequentialMLP "
                "(moe_grouped_gemm=False) and TEGroupedMLP (Transformer Engine)"
            )
        slots[int(numbered[2])][numbered[1]] = parameter
    return slots


# Optimizers: what they keep for a parameter.


class _Keeper:
    """What one of megatron-core's optimizers keeps for the parameters of experts: main copies and state, whole or, with
    the distributed optimizer, the run of elements that falls to this rank.

    Args:
        optimizer: None before there is one: nothing is kept.
    """

    def __init__(self, optimizer: MegatronOptimizer | None) -> None:
        self._optimizer = cast(Any, optimizer)
        self._distributed = type(optimizer) is DistributedOptimizer
        self.group = self._optimizer.data_parallel_group if self._distributed else None
        self._sharded = self.group is not None and self.group.size() > 1
        if optimizer is None:
            return
        kinds = (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer)
        if type(optimizer) not in kinds:
            raise UnsupportedError(
                f"{type(optimizer).__name__} keeps experts in a way that is not known here; plans go with "
                f"{', '.join(kind.__name__ for kind in kinds)}"
            )
        self._mains = {id(parameter) for parameter in optimizer.get_parameters()}
        for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
            if getattr(optimizer.config, name):
                raise UnsupportedError(f"{name} keeps state where plans do not find it; leave it out")

    def has(self, parameter: nn.Parameter) -> bool:
        if self._optimizer is None:
            return False
        if self._distributed:
            return any(parameter in buffer.param_index_map for buffer in self._optimizer.buffers)
        return id(getattr(parameter, "main_param", parameter)) in self._mains

    def main(self, parameter: nn.Parameter) -> Tensor | None:
        """What the optimizer steps: the parameter, its 32-bit copy, or this rank's run of either; None where it has
        none of its elements."""
        if self._optimizer is None:
            return parameter
        if not self._distributed:
            result: Tensor = getattr(parameter, "main_param", parameter)
            return result
        place = self._optimizer.model_param_group_index_map.get(parameter)
        if place is None:
            return None
        group, order = place
        run: Tensor = self._optimizer.optimizer.param_groups[group]["params"][order]
        return run

    def names(self, parameter: nn.Parameter) -> list[str]:
        """What is kept beside the parameter itself, in one order on all ranks."""
        if self._optimizer is None:
            return []
        names = {
            key
            for state in self._optimizer.optimizer.state.values()
            for key, value in state.items()
            if isinstance(value, Tensor) and value.ndim
        }
        if self._sharded:
            every: list[Any] = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(every, sorted(names), group=self.group)
            names = set().union(*every)
        return [MAIN] * (parameter.dtype != torch.float32) + sorted(names)

    def gather(self, parameters: Sequence[nn.Parameter], name: str) -> Tensor:
        """[parameters, elements] of what is kept under a name."""
        result = torch.zeros(len(parameters), parameters[0].numel(), dtype=torch.float32, device=parameters[0].device)
        for row, parameter in zip(result, parameters, strict=True):
            if (stored := self._kept(parameter, name)) is not None:
                row[self._run(parameter)] = stored.flatten()
        if self._sharded:
            dist.all_reduce(result, group=self.group)
        return result

    def put(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """Keeps `value` [elements], as far as it falls to this rank."""
        if (stored := self._kept(parameter, name)) is not None:
            stored.copy_(value[self._run(parameter)].view_as(stored))

    def whole_gradient(self, parameter: nn.Parameter) -> Tensor:
        """As it was reduced; of the distributed optimizer's, a rank has its own run alone."""
        grad = _main_grad(parameter)
        if not self._sharded:
            return grad
        whole = torch.zeros_like(grad)
        if self.main(parameter) is not None:
            run = self._run(parameter)
            whole.view(-1)[run] = grad.view(-1)[run]
        dist.all_reduce(whole, group=self.group)
        return whole

    def _kept(self, parameter: nn.Parameter, name: str) -> Tensor | None:
        assert self._optimizer is not None
        main = self.main(parameter)
        if main is None or name == MAIN:
            return main
        stored = self._optimizer.optimizer.state[main][name]
        if not isinstance(stored, Tensor) or stored.shape != main.shape:
            raise UnsupportedError(
                f"{type(self._optimizer.optimizer).__name__} keeps {name!r} of another shape than its parameter; use "
                "an optimizer that works element by element, as Adam does"
            )
        return stored

    def _run(self, parameter: nn.Parameter) -> slice:
        if not self._distributed:
            return slice(None)
        run = self._optimizer._get_model_param_range_map(parameter)["param"]
        return slice(run.start, run.end)

    def refuse_flat_checkpoints(self) -> None:
        """Checkpoints of the distributed optimizer that are cut as its buffers are know nothing of experts."""
        if not self._distributed:
            return
        optimizer: Any = self._optimizer
        write = optimizer.sharded_state_dict

        def checked(*arguments: Any, metadata: dict[str, Any] | None = None, **more: Any) -> Any:
            kind = (metadata or {}).get("distrib_optim_sharding_type", "fully_sharded_model_space")
            if more.get("sharding_type", kind) not in DistributedOptimizer.checkpoint_fully_reshardable_formats:
                raise UnsupportedError(
                    f"distrib_optim_sharding_type {more.get('sharding_type', kind)!r} writes slots as they lie in "
                    "buffers, which another plan cannot read; use 'fully_reshardable' "
                    "(--dist-ckpt-optim-fully-reshardable)"
                )
            return write(*arguments, metadata=metadata, **more)

        optimizer.sharded_state_dict = checked


def _chained(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    if isinstance(optimizer, ChainedOptimizer):
        for part in optimizer.chained_optimizers:
            yield from _chained(part)
    else:
        yield optimizer


# Ranks.


_mesh_by_group: WeakKeyDictionary[dist.ProcessGroup, ExpertMesh] = WeakKeyDictionary()


def _mesh_of(groups: Any) -> ExpertMesh:
    """The ranks of expert parallelism, and all that hold the same layers; all of these call it at once at first."""
    ep, copies = groups.ep, groups.expt_dp
    if ep not in _mesh_by_group:
        members = dist.get_process_group_ranks(ep)
        every: list[Any] = [None] * copies.size()
        dist.all_gather_object(every, members, group=copies)
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = DeviceMesh.from_group(ep, kind, mesh_dim_names=("ep",))
        data = copies if copies.size() > 1 else None
        _mesh_by_group[ep] = ExpertMesh(mesh, ep, ep.rank(), len(members), tuple(members), np.array(every), data=data)
    return _mesh_by_group[ep]


# The model in training.


@dataclass(frozen=True)
class _Reduced:
    """A model chunk's own reduction of gradients, and the sums of replicas after it."""

    reduce: Callable[..., None]
    layers: Sequence[PlannedMoELayer]

    def __call__(self, *arguments: Any, **more: Any) -> None:
        self.reduce(*arguments, **more)
        for layer in self.layers:
            layer.sum_gradients()


class PlacedModel(ChangesPlans):
    """Megatron's model chunks with placed experts; what a `Rebalancer` takes, without an optimizer of its own.

    Made once the optimizer is, before the first step and before a checkpoint is loaded, on every rank. Replicas get
    equal weights, and from then on their gradients are summed wherever `finalize_model_grads` is called.

    layers: the planned layers of this rank.

    Args:
        model: the chunks, each in megatron-core's DistributedDataParallel.
        optimizer: of `get_megatron_optimizer`.

    Raises:
        InputError: no planned layers, or chunks without that wrapper. UnsupportedError: an optimizer whose state plans
            cannot move.
    """

    def __init__(self, model: Sequence[nn.Module], optimizer: MegatronOptimizer) -> None:
        self._model: list[Any] = list(model)
        by_chunk = [
            [module for module in chunk.modules() if isinstance(module, PlannedMoELayer)] for chunk in self._model
        ]
        self.layers = [layer for layers in by_chunk for layer in layers]
        if not self.layers:
            raise InputError("the model has no planned layers; build it from `planned(spec, config, plan)`")
        for chunk in self._model:
            if type(chunk) is not DistributedDataParallel:
                raise InputError(
                    f"{type(chunk).__name__} is not megatron-core's DistributedDataParallel, whose reduction replicas "
                    "wait for; wrap the model in it"
                )
            if chunk.ddp_config.num_distributed_optimizer_instances > 1:
                raise UnsupportedError("num_distributed_optimizer_instances above 1 is not known here; leave it at 1")
        parameters = [parameter for slot in self.layers[0].slots for parameter in slot.values()]
        keepers = [
            keeper
            for part in _chained(optimizer)
            if not getattr(part, "is_stub_optimizer", False)
            for keeper in [_Keeper(part)]
            if any(keeper.has(parameter) for parameter in parameters)
        ]
        for keeper in keepers:
            keeper.refuse_flat_checkpoints()
        for layer in self.layers:
            layer.start(keepers)
        for chunk, layers in zip(self._model, by_chunk, strict=True):
            chunk.finish_grad_sync = _Reduced(chunk.finish_grad_sync, layers)

    # The placed model of a Rebalancer.

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return whole_plan(self.layers)

    @property
    def mesh(self) -> ExpertMesh:
        return self.layers[0].plan_mesh

    @property
    def row_dtypes(self) -> tuple[str, str]:
        """What `Objective` calls the types in which rows travel to experts and back."""
        own = DTYPES[self.layers[0].config.params_dtype]
        return own, own

    def record(self, folder: str | Path) -> Recorder:
        """A recorder of this rank's routing, to be entered.

        Raises:
            UnsupportedError: ranks that see parts of sequences or layers, or tokens that are dropped.
        """
        config = self.layers[0].config
        for name in ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"):
            if getattr(config, name) > 1:
                raise UnsupportedError(f"{name} is {getattr(config, name)}: a rank sees a part of what is recorded")
        if config.moe_expert_capacity_factor is not None:
            raise UnsupportedError("moe_expert_capacity_factor drops tokens, of which a trace knows nothing")
        return record(self._model[0].module, config, folder)

    def tensors(self) -> list[Tensor]:
        return self.layers[0].tensors()

    def change(self, plan: Plan) -> RowMigration:
        """A change to `plan`, to be made between steps."""
        _check_plan(plan, self.mesh.size)
        for chunk in self._model:
            if chunk.ddp_config.overlap_param_gather:
                # Parameters that are gathered in the next forward pass are not whole until then.
                chunk.start_param_sync(force_sync=True)
        return RowMigration(self.layers, plan, self.mesh)


def record(model: nn.Module, config: TransformerConfig, folder: str | Path) -> Recorder:
    """A recorder of a model of megatron-core, planned or not; see `moeplace.profile`.

    Args:
        model: a GPTModel, or what has its layers; called with tokens [sequences, length].
        config: its configuration.
        folder: of the trace, the same on all ranks.
    """
    return profile(
        model,
        folder,
        routers=ROUTERS,
        extract=_chosen(config.moe_router_topk),
        num_experts=config.num_moe_experts,
    )


def _chosen(top_k: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def extract(module: nn.Module, args: Any, kwargs: Any, output: Any) -> tuple[Tensor, Tensor]:
        probs_TE, chosen_TE = output
        weights, ids = torch.where(chosen_TE, probs_TE, -1.0).topk(top_k, dim=1)
        # megatron-core has the length first, and sequences second.
        length, sequences = args[0].shape[:2]
        ordered = [part.view(length, sequences, top_k).transpose(0, 1).reshape(-1, top_k) for part in (ids, weights)]
        return ordered[0], ordered[1]

    return extract
