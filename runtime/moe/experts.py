"""The experts of one MoE layer, spread over ranks as a plan says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...placement.errors import InputError, MoeplaceError, UnsupportedError, nearest
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from .agreement import agree
from .compressed import CompressedDispatcher
from .compression import LSHCompression
from .dispatcher import Dispatcher, HopDispatcher, flat, node_aware
from .expert_kinds import ExpertKind, SwiGLU
from .layer_placement import LayerPlacement
from .mesh import ExpertMesh
from .optimizer_steps import OptimizerSteps
from .replica_choice import ReplicaChoice
from .replica_sum import ReplicaSum, SharedGradients

Gradients = Literal["mean", "sum"]
MakeDispatcher = Callable[[ExpertMesh], Dispatcher]

DISPATCHERS: dict[str, MakeDispatcher] = {"flat": flat, "node_aware": node_aware}


class PlacedExperts(nn.Module):
    """This rank's experts of one layer, and the way of all ranks' tokens to them and back.

    spec: of the model; must be the plan's. layer: the model's absolute index of the layer. kind: what an expert computes.
    dispatch: "flat", "node_aware" (the default on a mesh of two dimensions), or a function of the mesh.
    compression: one row for tokens that look alike, on top of flat or node-aware dispatch; None sends every token.
    gradients: "mean" divides expert gradients by the number of ranks, as DistributedDataParallel and fully_shard do with
    the others; "sum" leaves the sum over all ranks' losses.
    seed: weights are drawn from (seed, layer, expert), the same under every plan; None leaves them to `load_logical`.

    Parameters carry the expert kind's names, [S, ...] each, a row for each slot of this rank; which expert a row holds
    says `row_expert`. Every rank of the mesh builds the layer, and calls it equally often, with any number of tokens.

    Raises:
        InputError: the plan is for another model, number of ranks or node layout, lacks the layer, or ranks hold
            different plans; all ranks raise.
        UnsupportedError: the mesh has not all ranks of the world or, sliced from a mesh with a dimension "pp", of the
            pipeline stage; or, once built, fully_shard or FullyShardedDataParallel takes the expert parameters too.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: Plan,
        mesh: DeviceMesh | ExpertMesh,
        layer: int,
        *,
        kind: ExpertKind | None = None,
        dispatch: str | MakeDispatcher | None = None,
        compression: LSHCompression | None = None,
        gradients: Gradients = "mean",
        dtype: torch.dtype | None = None,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.mesh = ExpertMesh.of(mesh)
        self.spec, self.layer, self.kind = spec, layer, kind or SwiGLU()
        self.num_experts = spec.experts
        self.gradients, self.compression = gradients, compression
        self.optimizer_steps = OptimizerSteps(self)
        self.dispatcher = self._check_together(plan, dispatch, dtype)
        self.plan = plan
        placement = LayerPlacement.of(plan, layer)
        self.row_expert = placement.expert[placement.on_device(self.mesh.rank)]
        for name, shape in self.kind.shapes(spec).items():
            value = torch.empty(len(self.row_expert), *shape, dtype=dtype, device=self.mesh.device)
            self.register_parameter(name, nn.Parameter(value))
        if seed is not None:
            self.reset_parameters(seed)
        self._try_kind()
        self.put_in_force(plan, placement)

    def _check_together(
        self, plan: Plan, dispatch: str | MakeDispatcher | None, dtype: torch.dtype | None
    ) -> Dispatcher:
        """Checks what was given; a rank that finds something wrong tells the others, before any waits for it."""
        failure: MoeplaceError | None = None
        dispatcher: Dispatcher | None = None
        try:
            if self.gradients not in get_args(Gradients):
                raise InputError(
                    f"gradients {self.gradients!r} is unknown; {nearest(str(self.gradients), get_args(Gradients))}"
                )
            self.mesh.check_covers_world()
            check_plan(self.spec, plan, self.mesh)
            LayerPlacement.of(plan, self.layer)
            dispatcher = self._compressed(_make(dispatch, self.mesh))
        except MoeplaceError as error:
            failure = error
        content = f"{plan.fingerprint} {self.layer} {dtype} {self.kind!r} {self.gradients} {type(dispatcher).__name__}"
        agree(self.mesh, f"plan and settings of MoE layer {self.layer}", content, failure)
        assert dispatcher is not None
        return dispatcher

    def _compressed(self, plain: Dispatcher) -> Dispatcher:
        settings = self.compression
        if settings is None:
            return plain
        if not isinstance(plain, HopDispatcher):
            raise InputError(
                f"compression works on top of flat and node_aware dispatch, not of {type(plain).__name__}; give no "
                "compression, or one of these as dispatch"
            )

        def steps() -> int | None:
            return self.optimizer_steps.done if self.training or settings.evaluation else None

        return CompressedDispatcher(plain, self.mesh, settings, self.layer, self.spec.hidden_size, steps)

    @torch.no_grad()
    def _try_kind(self) -> None:
        """One row through an expert, so that torch's kernels are tried here and not inside a forward that a checkpoint,
        a compiler or a recorder watches."""
        weights = dict(self.named_parameters(recurse=False))
        example = next(iter(weights.values()))
        count_S = torch.zeros(len(example), dtype=torch.int64, device=example.device)
        count_S[:1] = 1
        self.kind.forward(example.new_zeros(int(count_S.sum()), self.spec.hidden_size), count_S, weights)

    def put_in_force(self, plan: Plan, placement: LayerPlacement) -> None:
        """Routes by `placement` from now on. `row_expert` and the parameters' rows must already be its own."""
        self.plan, self.placement = plan, placement
        self.row_of_slot = rows_of_slots(placement, self.mesh.rank, self.row_expert)
        self.replica_choice = ReplicaChoice(placement, self.mesh.rank, self.mesh.device)
        self.replica_sum = ReplicaSum(placement, self.mesh, self.row_of_slot)
        self.dispatcher.place(placement, torch.from_numpy(self.row_of_slot), len(self.row_expert))

    def __setattr__(self, name: str, value: object) -> None:
        # fully_shard puts its own parameters in place by setattr, unsharded ones during forward: these no longer tell.
        if isinstance(value, DTensor):
            raise self._managed(name, "fully_shard")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        # FullyShardedDataParallel deletes parameters, then puts views of its own in their place.
        if name in self._parameters:
            raise self._managed(name, "FullyShardedDataParallel or another wrapper that deletes parameters")
        super().__delattr__(name)

    def _managed(self, name: str, by: str) -> UnsupportedError:
        return UnsupportedError(
            f"layer {self.layer}: {name} was taken over by {by}, as if every rank held the same experts; leave them out: "
            "fully_shard(model, ignored_params=expert_parameters(model)), FullyShardedDataParallel(model, "
            "ignored_states=expert_parameters(model))"
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        """The weighted sum of each token's experts.

        hidden_states: [..., D] tokens of this rank, none is fine. top_k_index, top_k_weights: [..., K].
        meanwhile: called while tokens travel.
        """
        x_TD = hidden_states.reshape(-1, self.spec.hidden_size)
        weights = self._weights()
        kind = self.mesh.mesh.device_type
        if torch.is_autocast_enabled(kind):
            # As for torch's own layers; grouped products know nothing of autocast.
            x_TD = x_TD.to(torch.get_autocast_dtype(kind))
            weights = {name: value.to(x_TD.dtype) for name, value in weights.items()}
        expert_TK = top_k_index.reshape(len(x_TD), top_k_index.shape[-1])
        weight_TK = top_k_weights.reshape(expert_TK.shape).float()
        slot_TK = self.replica_choice.slots(expert_TK.long())
        sent = self.dispatcher.dispatch(x_TD, slot_TK, weight_TK)
        if meanwhile is not None:
            meanwhile()
        work = sent.wait()
        y_ND = self.kind.forward(work.row_ND, work.count_S, weights)
        return self.dispatcher.combine(y_ND, work).view(hidden_states.shape)

    def _weights(self) -> Mapping[str, Tensor]:
        parameters = dict(self.named_parameters(recurse=False))
        for name, value in parameters.items():
            if isinstance(value, DTensor):
                raise self._managed(name, "a tensor-parallel plan")
        names, values = zip(*parameters.items(), strict=True)
        scale = 1.0 / self.mesh.size if self.gradients == "mean" else 1.0
        if self.replica_sum.any or scale != 1.0:
            values = SharedGradients.apply(self.replica_sum, scale, *values)  # type: ignore[no-untyped-call]
        return dict(zip(names, values, strict=True))

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draws every expert's weights anew, normal with deviation 0.02; biases become zero."""
        for row, expert in enumerate(self.row_expert.tolist()):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + self.layer) * 1_000_003 + expert)
            for value in self.parameters(recurse=False):
                drawn = torch.randn(value.shape[1:], generator=generator) * 0.02
                value[row] = drawn if value.ndim > 2 else 0.0

    @torch.no_grad()
    def load_logical(self, weights: Mapping[str, Tensor]) -> None:
        """Takes this rank's rows from [E, ...] tensors of all experts in logical order, by parameter name.

        Raises:
            InputError: a name is missing, or a shape is not [E, ...] of the expert kind.
        """
        for name, value in self.named_parameters(recurse=False):
            expected = (self.num_experts, *value.shape[1:])
            if name not in weights:
                raise InputError(f"layer {self.layer}: no weights {name!r} given; given are {sorted(weights)}")
            if tuple(weights[name].shape) != expected:
                raise InputError(
                    f"layer {self.layer}: {name} has shape {tuple(weights[name].shape)}, expected {expected}"
                )
            value.copy_(weights[name][torch.from_numpy(self.row_expert).to(weights[name].device)])

    def extra_repr(self) -> str:
        return (
            f"layer={self.layer}, experts={self.num_experts}, here={self.row_expert.tolist()}, "
            f"ranks={self.mesh.size}, kind={self.kind}"
        )


def check_plan(spec: ModelSpec, plan: Plan, mesh: ExpertMesh) -> None:
    """Raises InputError unless `plan` places `spec`'s experts on this mesh's ranks."""
    for field in ("experts", "top_k", "hidden_size", "ffn_size", "moe_layers"):
        given, expected = getattr(plan.model, field), getattr(spec, field)
        if given != expected:
            raise InputError(f"the plan is for another model: its {field} is {given}, this model's {expected}")
    mesh.check_topology(plan.topology)


def rows_of_slots(
    placement: LayerPlacement, rank: int, row_expert: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """[P] the row of weights that serves each slot of `rank`, -1 for the slots of others."""
    result = np.full(len(placement.expert), -1, dtype=np.int64)
    free = {expert: np.flatnonzero(row_expert == expert).tolist() for expert in np.unique(row_expert).tolist()}
    for slot in placement.on_device(rank):
        result[slot] = free[int(placement.expert[slot])].pop(0)
    return result


def _make(dispatch: str | MakeDispatcher | None, mesh: ExpertMesh) -> Dispatcher:
    if dispatch is None:
        dispatch = "flat" if mesh.inter is None else "node_aware"
    if not isinstance(dispatch, str):
        return dispatch(mesh)
    if dispatch not in DISPATCHERS:
        raise InputError(
            f"dispatch {dispatch!r} is unknown; {nearest(dispatch, DISPATCHERS)}, or a function of the mesh"
        )
    return DISPATCHERS[dispatch](mesh)
