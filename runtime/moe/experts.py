"""The experts of one MoE layer, spread over ranks as a plan says.

The layer itself comes first, then which replica serves a token, gradients of replicas, and the count of optimizer
steps.

T tokens of this rank, K experts a token, D hidden size, E experts, P slots of the layer, S slots of this rank (rows of
expert weights), R most replicas of an expert, N token-expert pairs computed here; m rows here whose expert has
replicas, n parameters of one expert.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..._types import IntArray
from ...placement.errors import InputError, MoeplaceError, UnsupportedError, nearest
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from .compression import LSHCompression
from .coordination import check_consistent, naming_unresponsive_ranks
from .dispatcher import AllToAllDispatcher, Dispatcher, flat, node_aware
from .expert_mlps import ExpertMLP, SwiGLU
from .layer_placement import LayerPlacement
from .lsh import CompressedDispatcher
from .mesh import ExpertMesh

Gradients = Literal["mean", "sum"]
MakeDispatcher = Callable[[ExpertMesh], Dispatcher]

DISPATCHERS: dict[str, MakeDispatcher] = {"flat": flat, "node_aware": node_aware}


class PlacedExperts(nn.Module):
    """This rank's experts of one layer, and the way of all ranks' tokens to them and back.

    Parameters carry the expert MLP's names, [S, ...] each, a row for each slot of this rank; which expert a row holds
    says `row_expert`. Every rank of the mesh builds the layer, and calls it equally often, with any number of tokens.

    Args:
        spec: of the model; must be the plan's.
        plan: which experts stand where.
        mesh: all ranks; device g of the plan is its g-th.
        layer: the model's absolute index of the layer.
        kind: what an expert computes; SwiGLU by default.
        dispatch: "flat", "node_aware" (the default on a mesh of two dimensions), or a function of the mesh.
        compression: one row for tokens that look alike, on top of flat or node-aware dispatch; None sends every token.
        gradients: "mean" divides expert gradients by the number of ranks, as DistributedDataParallel and fully_shard do
            with the others; "sum" leaves the sum over all ranks' losses.
        dtype: of the weights.
        seed: weights are drawn from (seed, layer, expert), the same under every plan; None leaves them to
            `load_logical`.

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
        kind: ExpertMLP | None = None,
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
        self._try_kernels()
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
        check_consistent(self.mesh, f"plan and settings of MoE layer {self.layer}", content, failure)
        assert dispatcher is not None
        return dispatcher

    def _compressed(self, plain: Dispatcher) -> Dispatcher:
        settings = self.compression
        if settings is None:
            return plain
        if not isinstance(plain, AllToAllDispatcher):
            raise InputError(
                f"compression works on top of flat and node_aware dispatch, not of {type(plain).__name__}; give no "
                "compression, or one of these as dispatch"
            )

        def steps() -> int | None:
            return self.optimizer_steps.done if self.training or settings.evaluation else None

        return CompressedDispatcher(plain, self.mesh, settings, self.layer, self.spec.expert_input_size, steps)

    @torch.no_grad()
    def _try_kernels(self) -> None:
        """One row through an expert, so that torch's kernels are tried here and not inside a forward that a checkpoint,
        a compiler or a recorder watches."""
        weights = dict(self.named_parameters(recurse=False))
        example = next(iter(weights.values()))
        count_S = torch.zeros(len(example), dtype=torch.int64, device=example.device)
        count_S[:1] = 1
        self.kind.forward(example.new_zeros(int(count_S.sum()), self.spec.expert_input_size), count_S, weights)

    def put_in_force(self, plan: Plan, placement: LayerPlacement) -> None:
        """Routes by `placement` from now on. `row_expert` and the parameters' rows must already be its own."""
        self.plan, self.placement = plan, placement
        self.row_of_slot = rows_of_slots(placement, self.mesh.rank, self.row_expert)
        self.replica_choice = ReplicaChoice(placement, self.mesh.rank, self.mesh.device)
        self.replica_sum = ReplicaSum(placement, self.mesh, self.row_of_slot)
        self.dispatcher.place(placement, torch.from_numpy(self.row_of_slot), len(self.row_expert))

    def __setattr__(self, name: str, value: Any) -> None:
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
            f"layer {self.layer}: {name} was taken over by {by}, as if every rank held the same experts; leave them "
            "out: fully_shard(model, ignored_params=expert_parameters(model)), FullyShardedDataParallel(model, "
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

        Args:
            hidden_states: [..., D] tokens of this rank, none is fine.
            top_k_index: [..., K] experts of each.
            top_k_weights: [..., K] gate weights.
            meanwhile: called while tokens travel.
        """
        x_TD = hidden_states.reshape(-1, self.spec.expert_input_size)
        weights = self._weights()
        kind = self.mesh.mesh.device_type
        if torch.is_autocast_enabled(kind):
            # As for torch's own layers; grouped products know nothing of autocast.
            x_TD = x_TD.to(torch.get_autocast_dtype(kind))
            weights = {name: value.to(x_TD.dtype) for name, value in weights.items()}
        expert_TK = top_k_index.reshape(len(x_TD), top_k_index.shape[-1])
        weight_TK = top_k_weights.reshape(expert_TK.shape).float()
        slot_TK = self.replica_choice.slots(expert_TK.long())
        metadata = self.dispatcher.dispatch(x_TD, slot_TK, weight_TK)
        if meanwhile is not None:
            meanwhile()
        row_ND, count_S = self.dispatcher.receive(metadata)
        y_ND = self.kind.forward(row_ND, count_S, weights)
        return self.dispatcher.combine(y_ND, metadata).view(hidden_states.shape)

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
            InputError: a name is missing, or a shape is not [E, ...] of the expert MLP.
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
        planned, expected = getattr(plan.model, field), getattr(spec, field)
        if planned != expected:
            raise InputError(f"the plan is for another model: its {field} is {planned}, this model's {expected}")
    mesh.check_topology(plan.topology)


def rows_of_slots(placement: LayerPlacement, rank: int, row_expert: IntArray) -> IntArray:
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


class ReplicaChoice:
    """Which replica serves a token under one placement: by share, near ones first, without chance and without asking
    other ranks."""

    def __init__(self, placement: LayerPlacement, rank: int, device: torch.device) -> None:
        self._slots_ER = torch.from_numpy(placement.slots_of).to(device)
        self._replicated = bool((placement.replicas > 1).any())
        # Rounding must not push the last edge below 1, nor a token past the last slot that has a share.
        edges = np.cumsum(placement.quota(rank), axis=1)
        edges[edges > 1.0 - 1e-9] = 2.0
        self._edges_ER = torch.from_numpy(edges).to(device)
        # Ranks start at different fractions of a slot, so that few tokens each are balanced over all ranks together.
        self._start = _bit_reversed(rank, placement.devices)

    def slots(self, expert_TK: Tensor) -> Tensor:
        """[T, K] slot of each chosen expert.

        The i-th of an expert's n tokens here goes where the fraction (i + start) / n falls among the quotas.
        """
        if not self._replicated:
            return self._slots_ER[expert_TK, 0]
        expert_N = expert_TK.flatten()
        order_N = expert_N.argsort(stable=True)
        count_E = torch.zeros(len(self._slots_ER), dtype=torch.int64, device=expert_N.device)
        count_E.scatter_add_(0, expert_N, torch.ones_like(expert_N))
        begin_E = count_E.cumsum(0) - count_E
        sorted_N = expert_N[order_N]
        place_N = torch.arange(len(expert_N), device=expert_N.device) - begin_E[sorted_N]
        fraction_N = (place_N + self._start) / count_E[sorted_N]
        replica_N = (self._edges_ER[sorted_N] <= fraction_N[:, None]).sum(dim=1)
        slot_N = torch.empty_like(expert_N)
        slot_N[order_N] = self._slots_ER[sorted_N, replica_N]
        return slot_N.view_as(expert_TK)


def _bit_reversed(rank: int, size: int) -> float:
    """A fraction in (0, 1): neighbouring ranks far apart, all ranks evenly spread (van der Corput)."""
    bits = max(1, (size - 1).bit_length())
    reversed_rank = int(f"{rank:0{bits}b}"[::-1], 2)
    return (reversed_rank + 0.5) / (1 << bits)


class ReplicaSum:
    """Gradients of replicas summed over their ranks, the same bits on each, so that replicas stay equal for ever.

    Each replicated expert's gradient is cut into as many pieces as devices hold it; a holder gathers one piece from
    all, adds them in the order of devices, and hands the sum back. That moves 2 (h - 1) / h gradients a holder, the
    least possible, and every piece is added up by one rank only.
    """

    def __init__(self, placement: LayerPlacement, mesh: ExpertMesh, row_of_slot: IntArray) -> None:
        self._mesh = mesh
        holders = [np.unique(placement.device[placement.expert == e]) for e in range(placement.experts)]
        self.any = bool((placement.replicas > 1).any())
        mine = [e for e in np.flatnonzero(placement.replicas > 1) if mesh.rank in holders[e]]
        self._holders = [holders[e].tolist() for e in mine]
        rows = [row_of_slot[(placement.expert == e) & (placement.device == mesh.rank)].tolist() for e in mine]
        self._first = [row[0] for row in rows]
        """The row that stands for an expert; twins on this device are added to it first."""
        self._twins = [(row[0], other) for row in rows for other in row[1:]]

    def reduce(self, grads: list[Tensor]) -> list[Tensor]:
        """Gradients [S, ...] with the rows of replicated experts summed over all their replicas."""
        grads = [grad.clone(memory_format=torch.contiguous_format) for grad in grads]
        for first, other in self._twins:
            for grad in grads:
                grad[first] += grad[other]
        flat_mn = torch.cat([grad[self._first].flatten(1) for grad in grads], dim=1)
        total_mn = self._exchange(flat_mn)
        start = 0
        for grad in grads:
            size = grad[0].numel() if len(grad) else 0
            if self._first:
                grad[self._first] = total_mn[:, start : start + size].reshape(-1, *grad.shape[1:])
            for first, other in self._twins:
                grad[other] = grad[first]
            start += size
        return grads

    def _exchange(self, flat_mn: Tensor) -> Tensor:
        size, rank = self._mesh.size, self._mesh.rank
        cuts = [_cuts(flat_mn.shape[1], holders) for holders in self._holders]
        shared = [[i for i, holders in enumerate(self._holders) if peer in holders] for peer in range(size)]
        # To each peer its pieces of what both hold, from each peer this rank's pieces; back again the sums.
        theirs = [[flat_mn[i, slice(*cuts[i][peer])] for i in shared[peer]] for peer in range(size)]
        lengths = [[_length(cuts[i][rank]) for i in shared[peer]] for peer in range(size)]
        arrived = self._all_to_all(flat_mn, theirs, lengths)
        sums: list[Tensor | None] = [None] * len(self._holders)
        for peer in range(size):
            for i, piece in zip(shared[peer], arrived[peer], strict=True):
                total = sums[i]
                sums[i] = piece if total is None else total + piece
        done = [[part for i in shared[peer] if (part := sums[i]) is not None] for peer in range(size)]
        back = self._all_to_all(flat_mn, done, [[len(piece) for piece in pieces] for pieces in theirs])
        result = torch.empty_like(flat_mn)
        for peer in range(size):
            for i, piece in zip(shared[peer], back[peer], strict=True):
                result[i, slice(*cuts[i][peer])] = piece
        return result

    def _all_to_all(self, like: Tensor, pieces: list[list[Tensor]], lengths: list[list[int]]) -> list[list[Tensor]]:
        sent = [sum(len(piece) for piece in part) for part in pieces]
        received = [sum(part) for part in lengths]
        every = [piece for part in pieces for piece in part]
        message = torch.cat(every) if every else like.new_empty(0)
        buffer = like.new_empty(sum(received))
        with naming_unresponsive_ranks(self._mesh.group):
            dist.all_to_all_single(buffer, message, received, sent, group=self._mesh.group)
        return [
            list(torch.split(part, sizes)) if sizes else []
            for part, sizes in zip(torch.split(buffer, received), lengths, strict=True)
        ]


class SharedGradients(Function):
    """Identity on an expert layer's parameters; backward sums what replicas got, and scales."""

    @staticmethod
    def forward(ctx: Any, replicas: ReplicaSum, scale: float, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.replicas, ctx.scale = replicas, scale
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        summed = ctx.replicas.reduce(list(grads)) if ctx.replicas.any else list(grads)
        return None, None, *(grad if ctx.scale == 1.0 else grad * ctx.scale for grad in summed)


def _cuts(length: int, holders: list[int]) -> dict[int, tuple[int, int]]:
    """The piece of `length` numbers that each holder adds up."""
    edges = [length * i // len(holders) for i in range(len(holders) + 1)]
    return {holder: (edges[i], edges[i + 1]) for i, holder in enumerate(holders)}


def _length(piece: tuple[int, int]) -> int:
    return piece[1] - piece[0]


class OptimizerSteps:
    """Counts the optimizer steps that a module's own parameters have taken: what a schedule of its own goes by.

    Forward passes would not do: gradient accumulation makes several a step, activation checkpointing repeats them.
    Refuses optimizers that take every rank's experts for the same.

    done: steps since this was made.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.done = 0
        _watch()
        _counts.add(self)

    def among(self, parameters: set[int]) -> bool:
        """Whether any of the module's own parameters is among these, by id."""
        module = self._module()
        return module is not None and any(id(value) in parameters for value in module.parameters(recurse=False))


_counts: weakref.WeakSet[OptimizerSteps] = weakref.WeakSet()
_hooked = False


def _watch() -> None:
    global _hooked
    if not _hooked:
        register_optimizer_step_pre_hook(_refuse_zero_redundancy)
        register_optimizer_step_post_hook(_count_step)
        _hooked = True


def _refuse_zero_redundancy(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # Torch's class, without importing it: nothing can be one before its module is there.
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None or not isinstance(optimizer, module.ZeroRedundancyOptimizer):
        return
    parameters = _parameter_ids(optimizer)
    if any(count.among(parameters) for count in list(_counts)):
        raise UnsupportedError(
            "ZeroRedundancyOptimizer gives every parameter to one rank, which sends it to the others; but every rank "
            "has its own experts. Give it the other parameters only, and the experts (expert_parameters(model)) to an "
            "optimizer of their own"
        )


def _count_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    parameters = _parameter_ids(optimizer)
    for count in list(_counts):
        if count.among(parameters):
            count.done += 1


def _parameter_ids(optimizer: Optimizer) -> set[int]:
    return {id(value) for group in optimizer.param_groups for value in group["params"]}
