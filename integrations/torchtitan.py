"""Plans inside torchtitan 0.3: its trainer, its all-to-all dispatch and its sharding, with experts where a plan says.

    from moeplace.integrations.torchtitan import planned

    def qwen3_moe_planned() -> Trainer.Config:
        return planned(qwen3_moe(), "plan.json", rebalance=Rebalancing(every=500))

The router, its counters and its bias stay over E experts. Expert tensors have a row for each of a layer's P slots; the
dispatcher sends a token to the slot that serves it. torchtitan shards those rows over `ep`, and FSDP over `efsdp`, as
it does with experts. Replicas' gradients are summed after FSDP's reduction; checkpoints have all experts in order,
under torchtitan's own names, so a run goes on under another plan, or without one.

P slots, E experts, S rows of this rank, T tokens, K experts a token, D hidden size.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .._types import IntArray
from ..placement.errors import InputError, UnsupportedError
from ..placement.model import ModelSpec
from ..placement.plan import Plan
from ..profiler import profile
from ..profiler.profile import Recorder
from ..runtime.moe.experts import ReplicaChoice
from ..runtime.moe.layer_placement import LayerPlacement
from ..runtime.moe.mesh import ExpertMesh
from ..training.rebalancer import DTYPES, Rebalancer
from .rows import ChangesPlans, ReplicaSums, RowExchange, RowMigration, Rows, equalize_replicas, even_slots, whole_plan

try:
    from torchtitan.config import TORCH_DTYPE_MAP
    from torchtitan.models.common.moe import RoutedExperts
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher
    from torchtitan.tools.logging import logger
    from torchtitan.trainer import Trainer
except ImportError as error:
    raise UnsupportedError(
        f"torchtitan 0.3 cannot be imported ({error}); pip install 'moeplace[torchtitan]'"
    ) from error

ROUTERS = r"moe\.router$"
"""The modules that choose experts, by the names that torchtitan's models have."""


@dataclass(frozen=True, kw_only=True)
class Rebalancing:
    """When a run looks for a better plan; each as `moeplace.training.Rebalancer` has it.

    folder: of the recordings and answers, inside torchtitan's dump folder; the plan in force is `plan.json` there.
    """

    every: int = 500
    record_steps: int = 20
    solver: str | None = None
    seconds: float = 60.0
    horizon_steps: float | None = None
    bytes_per_step: int | None = None
    folder: str = "rebalance"


def planned(config: Trainer.Config, plan: str | Path, *, rebalance: Rebalancing | None = None) -> PlannedTrainer.Config:
    """A trainer's configuration with its experts placed.

    Args:
        config: of any model of torchtitan with MoE layers, under the standard all-to-all.
        plan: file of the plan to begin with, as `Plan.save` writes it; every rank reads it.
        rebalance: when to look for a better one; None keeps it.

    Returns:
        What torchtitan's `--config` takes. `expert_parallel_degree` must be the plan's number of devices.

    Raises:
        InputError: the plan is for another model. UnsupportedError: another dispatcher, or a plan that gives devices
            different numbers of slots.
    """
    path = Path(plan).absolute()
    loaded = _plan(str(path))
    spec = config.model_spec
    if spec is None:
        raise InputError("config.model_spec is None; set the model first")
    expected = model_spec(config)
    for field in ("experts", "top_k", "hidden_size", "ffn_size", "moe_layers"):
        in_plan, in_model = getattr(loaded.model, field), getattr(expected, field)
        if in_plan != in_model:
            raise InputError(f"the plan is for another model: its {field} is {in_plan}, {spec.flavor}'s {in_model}")
    even_slots(loaded, loaded.topology.num_devices, "torchtitan")
    model = copy.deepcopy(spec.model)
    for index, layer in _moe_layers(model):
        layer.moe.routed_experts = _planned_experts(layer.moe.routed_experts, index, path, loaded)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields["model_spec"] = dataclasses.replace(spec, model=model)
    return PlannedTrainer.Config(**fields, plan=str(path), rebalance=rebalance)


def model_spec(config: Trainer.Config) -> ModelSpec:
    """What solvers need of a configuration's model.

    Raises:
        InputError: it has no MoE layers. UnsupportedError: layers with different experts.
    """
    if config.model_spec is None:
        raise InputError("config.model_spec is None; set the model first")
    layers = _moe_layers(config.model_spec.model)
    if not layers:
        raise InputError(f"{config.model_spec.name} {config.model_spec.flavor} has no MoE layers")
    sizes = {
        (moe.num_experts, moe.router.top_k, experts.dim, experts.hidden_dim)
        for _, layer in layers
        for moe, experts in [(layer.moe, layer.moe.routed_experts.inner_experts)]
    }
    if len(sizes) > 1:
        raise UnsupportedError(f"MoE layers differ in (experts, top_k, hidden size, FFN size): {sorted(sizes)}")
    experts, top_k, hidden, ffn = next(iter(sizes))
    return ModelSpec(
        layers=len(layers),
        experts=experts,
        top_k=top_k,
        hidden_size=hidden,
        ffn_size=ffn,
        moe_layers=tuple(index for index, _ in layers),
    )


def _moe_layers(model: Any) -> list[tuple[int, Any]]:
    """(absolute index, configuration) of the MoE layers of a model's configuration."""
    return [(index, layer) for index, layer in enumerate(model.layers) if getattr(layer, "moe", None) is not None]


def _planned_experts(config: Any, layer: int, path: Path, plan: Plan) -> PlannedRoutedExperts.Config:
    dispatcher = config.token_dispatcher
    if type(dispatcher) is not AllToAllTokenDispatcher.Config:
        raise UnsupportedError(
            f"layers.{layer} sends tokens by {type(dispatcher).__qualname__}; plans go with torchtitan's all-to-all: "
            "moe_comm_backend='standard'"
        )
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields["inner_experts"] = dataclasses.replace(config.inner_experts, num_experts=plan.num_slots)
    fields["token_dispatcher"] = PlannedTokenDispatcher.Config(
        **{field.name: getattr(dispatcher, field.name) for field in dataclasses.fields(dispatcher)}
    )
    return PlannedRoutedExperts.Config(**fields, plan=str(path), layer=layer)


@lru_cache(maxsize=4)
def _plan(path: str) -> Plan:
    return Plan.load(path)


# Modules: where tokens go, and what a layer's rows are.


class PlannedTokenDispatcher(AllToAllTokenDispatcher):  # type: ignore[misc]
    """torchtitan's all-to-all between slots: which of an expert's slots serves a token is settled before it."""

    @dataclass(kw_only=True, slots=True)
    class Config(AllToAllTokenDispatcher.Config):  # type: ignore[misc]
        pass

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._choice: ReplicaChoice | None = None
        self._slots = 0

    def place(self, placement: LayerPlacement, rank: int, device: torch.device) -> None:
        """Sends tokens by `placement` from now on. rank: of this process in expert parallelism."""
        self._choice, self._slots = ReplicaChoice(placement, rank, device), len(placement.expert)

    def dispatch(
        self,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> tuple[Tensor, Tensor, Any]:
        """As torchtitan has it, with slots in place of experts."""
        assert self._choice is not None
        slot_TK = self._choice.slots(topk_expert_ids_TK)
        count_P = num_local_tokens_per_expert_E.new_zeros(self._slots)
        count_P.scatter_add_(0, slot_TK.flatten(), torch.ones_like(slot_TK.flatten(), dtype=count_P.dtype))
        result: tuple[Tensor, Tensor, Any] = super().dispatch(x_TD, topk_scores_TK, slot_TK, count_P)
        return result


class PlannedRoutedExperts(RoutedExperts):  # type: ignore[misc]
    """A layer's routed experts with a row for each slot of a plan; the layer of `rows.RowMigration`.

    plan: the one in force. layer: the model's absolute index.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):  # type: ignore[misc]
        plan: str
        """File of the plan to begin with."""
        layer: int

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.layer, self.plan = config.layer, _plan(config.plan)
        # What reads it means the experts of the model: the router's counters and bias are as many.
        self.inner_experts.num_experts = self.plan.model.experts
        self.optimizers: Sequence[torch.optim.Optimizer] = ()
        self._ranks: ExpertRanks | None = None
        self._sums: ReplicaSums | None = None
        self.register_state_dict_post_hook(_in_order)
        self.register_load_state_dict_pre_hook(_by_plan)

    def parallelize(self, parallel_dims: Any) -> None:
        super().parallelize(parallel_dims)
        self._ranks = ExpertRanks.of(parallel_dims, self.plan)

    def start(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Once weights and optimizers are made: replicas get the weights of their expert's first slot."""
        self.optimizers = optimizers
        self.put_in_force(self.plan)
        equalize_replicas(self)

    # The layer of a migration.

    @property
    def ranks(self) -> ExpertRanks:
        if self._ranks is None:
            raise UnsupportedError(
                "experts are placed where expert parallelism is: set parallelism.expert_parallel_degree to the plan's "
                f"{self.plan.topology.num_devices} devices"
            )
        return self._ranks

    @property
    def mesh(self) -> ExpertMesh:
        return self.ranks.holders(self._sharded_by_rows())

    def rows(self, plan: Plan) -> Rows:
        return self.ranks.rows(plan.physical_to_logical[plan.moe_layers.index(self.layer)], self._sharded_by_rows())

    def in_order(self) -> Rows:
        """All experts once, in their order, as a checkpoint has them."""
        return self.ranks.rows(np.arange(self.plan.model.experts), self._sharded_by_rows())

    def tensors(self) -> list[Tensor]:
        result = []
        for parameter in self.inner_experts.parameters():
            result.append(parameter._local_tensor)
            result += [value._local_tensor for _, value in self._state(parameter)]
        return result

    def write(self, tensors: Sequence[Tensor], rows: Sequence[int]) -> None:
        for tensor, value in zip(self.tensors(), tensors, strict=True):
            tensor[list(rows)] = value[list(rows)]

    def put_in_force(self, plan: Plan) -> None:
        self.plan = plan
        self.token_dispatcher.place(LayerPlacement.of(plan, self.layer), self.ranks.rank, self.ranks.device)
        self._sums = ReplicaSums(self.rows(plan), self.mesh, plan.model.experts)

    def _state(self, parameter: nn.Parameter) -> list[tuple[str, Any]]:
        """What optimizers keep for each row of a parameter."""
        result: list[tuple[str, Any]] = []
        for optimizer in self.optimizers:
            for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                if isinstance(value, DTensor) and value.shape == parameter.shape:
                    result.append((key, value))
                elif isinstance(value, Tensor) and value.ndim:
                    raise UnsupportedError(
                        f"layers.{self.layer}: {type(optimizer).__name__} keeps {key!r} of shape {list(value.shape)} "
                        f"for experts {list(parameter.shape)}, which has no row for each; use an optimizer that works "
                        "element by element, as Adam does"
                    )
        return result

    def _sharded_by_rows(self) -> bool:
        """Whether FSDP cuts the rows that expert parallelism leaves to a rank, and not the next dimension."""
        parameter: Any = next(self.inner_experts.parameters())
        if not isinstance(parameter, DTensor):
            raise UnsupportedError(f"layers.{self.layer}: its experts are not sharded; parallelize the model first")
        names = parameter.device_mesh.mesh_dim_names or ()
        return "efsdp" not in names or getattr(parameter.placements[names.index("efsdp")], "dim", 0) == 0

    # Gradients of replicas.

    def sum_gradients(self) -> None:
        """After backward: replicas' gradients summed, in parts that the norm counts once."""
        self._on_gradients("sum_")

    def restore_gradients(self) -> None:
        """After clipping: each replica has the whole sum."""
        self._on_gradients("undo_")

    def _on_gradients(self, what: str) -> None:
        assert self._sums is not None
        grads = [cast(Any, p.grad)._local_tensor for p in self.inner_experts.parameters() if p.grad is not None]
        if grads:
            getattr(self._sums, what)(grads)


def _rearranged(module: PlannedRoutedExperts, value: DTensor, source: Rows, target: Rows) -> DTensor:
    """The rows of `source` as those of `target`, sharded in the same way.

    Raises:
        InputError: other rows.
    """
    _check_rows(module, value, len(source.expert))
    local = RowExchange(source, target, module.mesh)([value._local_tensor])[0]
    shape = torch.Size([len(target.expert), *value.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, value.device_mesh, value.placements, run_check=False, shape=shape, stride=stride)


def _check_rows(module: PlannedRoutedExperts, value: Tensor, rows: int) -> None:
    if len(value) != rows:
        raise InputError(
            f"layers.{module.layer}: a state has {len(value)} rows of experts, expected {rows}: one of each, in order, "
            "as state_dict and torchtitan's checkpoints have them, and none of replicas"
        )


def _expert_names(module: PlannedRoutedExperts, prefix: str) -> list[str]:
    return [f"{prefix}inner_experts.{name}" for name, _ in module.inner_experts.named_parameters()]


def _in_order(module: PlannedRoutedExperts, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """What a state_dict has: all experts in order."""
    for name in _expert_names(module, prefix):
        value = state.get(name)
        if isinstance(value, DTensor):
            state[name] = _rearranged(module, value, module.rows(module.plan), module.in_order())
        elif value is not None:
            first = module.plan.logical_to_physical[module.plan.moe_layers.index(module.layer), :, 0]
            state[name] = value[torch.from_numpy(first).to(value.device)]


def _by_plan(module: PlannedRoutedExperts, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The same the other way, before a state_dict is loaded."""
    for name in _expert_names(module, prefix):
        value = state.get(name)
        if isinstance(value, DTensor):
            state[name] = _rearranged(module, value, module.in_order(), module.rows(module.plan))
        elif value is not None:
            _check_rows(module, value, module.plan.model.experts)
            table = module.plan.physical_to_logical[module.plan.moe_layers.index(module.layer)]
            state[name] = value[torch.from_numpy(table).to(value.device)]


def _convert_state(
    modules: Sequence[PlannedRoutedExperts], optimizer: torch.optim.Optimizer, state: dict[str, Any], in_order: bool
) -> dict[str, Any]:
    """An optimizer's state_dict with its expert rows in order, or by plan."""
    module_of = {parameter: module for module in modules for parameter in module.inner_experts.parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    converted = dict(state["state"])
    for number, parameter in enumerate(parameters):
        module = module_of.get(parameter)
        if module is None or number not in converted:
            continue
        ends = [module.rows(module.plan), module.in_order()]
        source, target = ends if in_order else ends[::-1]
        converted[number] = {
            key: _rearranged(module, value, source, target) if isinstance(value, DTensor) and value.ndim else value
            for key, value in converted[number].items()
        }
    return {**state, "state": converted}


# Ranks: who has which rows.


class ExpertRanks:
    """The ranks of expert parallelism, and those that FSDP deals each one's rows over.

    rank: of this process in expert parallelism. plan_mesh: all ranks that hold the same layers, a copy of all experts
    in each row of its grid.
    """

    def __init__(self, ep: DeviceMesh, grid: IntArray, copies: int) -> None:
        """grid: [efsdp, ep] global ranks that share a copy of the rows. copies: of that grid."""
        me = dist.get_rank()
        world = np.arange(dist.get_world_size())
        # The mesh is [pp, dp_replicate, efsdp, ep] over the world: copies of this stage are neighbours.
        stage = world.reshape(-1, copies, *grid.shape)[me // (copies * grid.size)].reshape(-1, grid.shape[1])
        group = ep.get_group()
        members = stage[int(np.argwhere(stage == me)[0, 0])]
        self.rank = members.tolist().index(me)
        data = _new_group(stage[:, self.rank]) if len(stage) > 1 else None
        self.plan_mesh = ExpertMesh(ep, group, self.rank, len(members), tuple(members.tolist()), stage, data=data)
        self.efsdp = len(grid)
        by_rows, by_width = _flat(ep, grid.reshape(-1)), _flat(ep, members)
        self._holders = {True: by_rows, False: by_rows if self.efsdp == 1 else by_width}

    @classmethod
    def of(cls, parallel_dims: Any, plan: Plan) -> ExpertRanks | None:
        """Those of torchtitan's meshes; None without expert parallelism."""
        ep = parallel_dims.get_optional_mesh("ep")
        if ep is None:
            return None
        even_slots(plan, ep.size(), "torchtitan")
        if plan.model.experts % ep.size():
            raise UnsupportedError(
                f"torchtitan's checkpoints deal {plan.model.experts} experts evenly to the {ep.size()} ranks of expert "
                "parallelism, which does not go; take a divisor"
            )
        group = ep.get_group()
        if group not in _ranks_of:
            efsdp = parallel_dims.get_mesh("efsdp").size() if parallel_dims.ep_enabled else 1
            first = dist.get_rank() // (efsdp * ep.size()) * efsdp * ep.size()
            grid = np.arange(first, first + efsdp * ep.size()).reshape(efsdp, ep.size())
            _ranks_of[group] = cls(ep, grid, parallel_dims.dp_replicate)
        return _ranks_of[group]

    @property
    def device(self) -> torch.device:
        return self.plan_mesh.device

    def holders(self, by_rows: bool) -> ExpertMesh:
        """The ranks that a table's rows are dealt over."""
        return self._holders[by_rows]

    def rows(self, expert: IntArray, by_rows: bool) -> Rows:
        """Where torchtitan has the rows of a table of experts: evenly over `ep`; each one's over `efsdp` then, in runs
        as torch cuts a dimension, where that cuts rows."""
        ep = self.plan_mesh.size
        place = np.arange(len(expert))
        own = len(expert) // ep
        rank = place // own
        if by_rows:
            run = -(-own // self.efsdp)
            rank = (place % own) // run * ep + rank
        return Rows(np.asarray(expert, dtype=np.int64), rank)


_ranks_of: WeakKeyDictionary[dist.ProcessGroup, ExpertRanks] = WeakKeyDictionary()


def _flat(ep: DeviceMesh, ranks: IntArray) -> ExpertMesh:
    members = np.sort(ranks)
    place = members.tolist().index(dist.get_rank())
    return ExpertMesh(ep, _new_group(members), place, len(members), tuple(members.tolist()), members[None])


def _new_group(ranks: IntArray) -> dist.ProcessGroup:
    group = dist.new_group(ranks.tolist(), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


# The trainer.


class PlannedTrainer(ChangesPlans, Trainer):  # type: ignore[misc]
    """torchtitan's trainer with placed experts: replicas' gradients, the optimizer's state and the plan are its own.

    rebalancer: None where the plan stays, and before the first step.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):  # type: ignore[misc]
        plan: str = ""
        """File of the plan to begin with."""
        rebalance: Rebalancing | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.debug.spmd_typechecking:
            raise UnsupportedError("debug.spmd_typechecking knows nothing of slots; leave it out")
        self._passes = 0
        self.rebalancer: Rebalancer | None = None
        self.expert_layers = [
            module for part in self.model_parts for module in part.modules() if isinstance(module, PlannedRoutedExperts)
        ]
        if config.rebalance is not None and self.parallel_dims.pp_enabled:
            raise UnsupportedError(
                "a stage of a pipeline sees its own layers' routing alone; leave out rebalance, and change the plan by "
                "apply_plan"
            )
        for optimizer in self.optimizers:
            optimizer.register_state_dict_post_hook(
                lambda optimizer, state: _convert_state(self.expert_layers, optimizer, state, in_order=True)
            )
            optimizer.register_load_state_dict_pre_hook(
                lambda optimizer, state: _convert_state(self.expert_layers, optimizer, state, in_order=False)
            )
        for layer in self.expert_layers:
            layer.start(list(self.optimizers))
        self.optimizers.register_step_pre_hook(lambda *_: self._restore_gradients())

    def forward_backward_step(self, **arguments: Any) -> Tensor:
        loss: Tensor = super().forward_backward_step(**arguments)
        self._passes += 1
        if self._passes == self.gradient_accumulation_steps:
            self._passes = 0
            for layer in self.expert_layers:
                layer.sum_gradients()
        return loss

    def _restore_gradients(self) -> None:
        for layer in self.expert_layers:
            layer.restore_gradients()

    def train_step(self, data_iterator: Any) -> None:
        if self.config.rebalance is not None and self.rebalancer is None:
            self.rebalancer = self._rebalancer(self.config.rebalance)
        super().train_step(data_iterator)
        if self.rebalancer is not None:
            applied = self.rebalancer.applied
            self.rebalancer.step()
            if self.rebalancer.applied > applied and self.mesh.first:
                self.plan.save(self._folder(self.config.rebalance) / "plan.json")

    def close(self) -> None:
        if self.rebalancer is not None:
            self.rebalancer.close()
        super().close()

    # The placed model of a Rebalancer.

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return whole_plan(self.expert_layers)

    @property
    def mesh(self) -> ExpertMesh:
        return self.expert_layers[0].ranks.plan_mesh

    @property
    def row_dtypes(self) -> tuple[str, str]:
        """What `Objective` calls the types in which rows travel to experts and back."""
        own = DTYPES[TORCH_DTYPE_MAP[self.config.training.mixed_precision_param]]
        return own, own

    def record(self, folder: Path) -> Recorder:
        return profile(self.model_parts[0], folder, routers=ROUTERS, num_experts=self.plan.model.experts)

    def tensors(self) -> list[Tensor]:
        return self.expert_layers[0].tensors()

    def change(self, plan: Plan) -> RowMigration:
        return RowMigration(self.expert_layers, plan, self.mesh)

    def _rebalancer(self, settings: Rebalancing) -> Rebalancer:
        values: Mapping[str, Any] = dataclasses.asdict(settings)
        folder = self._folder(settings)
        result = Rebalancer(
            self, None, folder, **{name: value for name, value in values.items() if name != "folder"}, say=logger.info
        )
        rounds = [int(path.name[-4:]) for path in folder.glob("round-[0-9][0-9][0-9][0-9]")]
        result.load_state_dict({"steps": self.step - 1, "round": max(rounds, default=0), "applied": 0})
        return result

    def _folder(self, settings: Rebalancing) -> Path:
        return Path(self.config.dump_folder) / settings.folder
