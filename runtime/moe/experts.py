"""The experts of one MoE layer, spread over ranks as a plan says.

The layer itself comes first, then which replica serves a token, gradients of replicas and copies, and experts cut over
copies.

T tokens of this rank, K experts a token, D hidden size, E experts, P slots of the layer, S slots of this rank (rows of
expert weights), R most replicas of an expert, N token-expert pairs computed here; m rows here whose expert has
replicas, n parameters of one expert.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..._types import IntArray
from ...placement.errors import InputError, MoeplaceError, UnsupportedError, nearest
from ...placement.model import ModelSpec
from ...placement.objective import SLACK
from ...placement.plan import Plan
from .all_to_all import require
from .compression import Compression, LSHCompression, QuantizedRows, quantized_rows
from .coordination import check_consistent, gather, naming_unresponsive_ranks
from .deep_ep import DeepEPDispatcher, LowLatencyDispatcher
from .dispatcher import AllToAllDispatcher, Dispatcher, PaddedDispatcher, expert_capacity, flat, node_aware
from .expert_mlps import DelayedGradients, ExpertMLP, SwiGLU
from .layer_placement import BalancedReplicas, LayerPlacement, in_queues
from .lsh import CompressedDispatcher
from .managers import (
    MARK,
    ExpertParameter,
    ExpertRows,
    OptimizerSteps,
    RowsOf,
    check_join,
    check_loading,
    own_rows,
    refuse_parametrisation,
)
from .mesh import ExpertMesh
from .online import OnlineCopies, check_homes
from .symmetric import SymmetricDispatcher

Gradients = Literal["mean", "sum"]
Replicas = Literal["share", "balanced"]
MakeDispatcher = Callable[[ExpertMesh], Dispatcher]


DISPATCHERS: dict[str, MakeDispatcher] = {
    "flat": flat, "node_aware": node_aware, "deep_ep": DeepEPDispatcher,
}  # fmt: skip

_WEIGHTS = (
    "On every rank, parallelize(model, plan, mesh, weights=folder) reads its own of a checkpoint, "
    "load_checkpoint(path, model) of a distributed one, and experts.load_logical(weights) takes them from tensors of "
    "all experts"
)


class PlacedExperts(nn.Module):
    """This rank's experts of one layer, and the way of all ranks' tokens to them and back.

    Parameters carry the expert MLP's names, [S, ...] each, a row for each slot of this rank; which expert a row holds
    says `row_expert`. Every rank of the mesh builds the layer, and calls it equally often, with any number of tokens.
    `sums_gradients`: whether backward sums the gradients of an expert over all that hold it; while it does not
    (`no_sync`), `gradients_wait` for the next one that does.

    Args:
        spec: of the model; must be the plan's.
        plan: which experts stand where.
        mesh: all ranks; device g of the plan is its g-th. Sliced from a mesh with more dimensions, those are data
            parallelism of experts (each of that mesh's places holds the same experts, and gradients are summed over
            them) or, named "pp", pipeline stages.
        layer: the model's absolute index of the layer.
        kind: what an expert computes; SwiGLU by default.
        dispatch: "flat", "node_aware" (the default on a mesh of two dimensions), "deep_ep" (DeepEP's kernels; never run
            on a GPU yet), `DeepEPLowLatency` (the same for decoding), `SymmetricMemory` (torch's symmetric memory,
            never run on a GPU either), or a function of the mesh.
        compression: on top of flat or node-aware dispatch, one row for tokens that look alike (`LSHCompression`), few
            bits a row (`QuantizedRows`), or both; None sends every token as it is.
        replica_choice: "share" divides an expert's tokens among its replicas by the plan's shares, near ones first,
            without asking other ranks; "balanced" divides each batch anew, so that the largest load of a rank is the
            least possible (`Objective(replica_choice="balanced")`), for one small exchange of counts a layer.
        gradients: "mean" divides expert gradients by the number of ranks, as DistributedDataParallel and fully_shard do
            with the others; "sum" leaves the sum over all ranks' losses.
        dtype: of the weights.
        online_slots: experts that each rank holds for one batch beside its own, copied from their homes on its node:
            for every batch the hottest go where there is least to do (`plan_online`), so that ranks have about as many
            rows each. The plan has one slot an expert. 0: none.
        online_slack: how much above the mean number of rows a rank may stay, as a part of it.
        capacity_factor: of a rank's tokens an expert takes at most so many times the mean, those with the largest gate
            weights; None takes all.
        padded_tokens: the most tokens that a rank has in a batch. Messages and matrix products then have the sizes that
            `capacity_factor` gives so many, in every batch: the host never waits for the device, and empty rows travel
            and are computed on. None sends what there is.
        shard_experts: where ranks beside each other would hold the same experts (a mesh sliced from one with more
            dimensions), each keeps an equal part of every expert, of its gradient and of its optimizer state, as
            fully_shard has it: parts are joined for a layer's forward pass and again for its backward.
        chunks: a batch goes through in so many parts, one behind another: while one is computed, rows of the next are
            on their way to experts and those of the one before on their way back; in backward likewise. Every part has
            an exchange of its own, so it pays where links are slow and batches large.
        delay_weight_gradients: backward computes the gradients of experts' weights behind those of their inputs, while
            these travel to the tokens' ranks. The same gradients, all there when backward returns; rows and the
            gradients of outputs are kept until then.
        seed: weights are drawn from (seed, layer, expert), the same under every plan; None leaves them to
            `load_logical`.

    Raises:
        InputError: the plan is for another model, number of ranks or node layout, lacks the layer, or ranks hold
            different plans; all ranks raise.
        UnsupportedError: the mesh, or the one that it was sliced from, has not all ranks of the world, or cuts experts
            ("tp"); copies cannot share an expert's tensors evenly; or, once built, fully_shard or
            FullyShardedDataParallel takes the expert parameters too.
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
        compression: Compression | None = None,
        replica_choice: Replicas = "share",
        gradients: Gradients = "mean",
        dtype: torch.dtype | None = None,
        online_slots: int = 0,
        online_slack: float = SLACK,
        capacity_factor: float | None = None,
        padded_tokens: int | None = None,
        shard_experts: bool = False,
        chunks: int = 1,
        delay_weight_gradients: bool = False,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.mesh = ExpertMesh.of(mesh)
        self.spec, self.layer, self.kind = spec, layer, kind or SwiGLU()
        self.num_experts = spec.experts
        self.gradients, self.compression, self.replicas = gradients, compression, replica_choice
        self.online_slots, self.online_slack = online_slots, online_slack
        self.capacity_factor, self.padded_tokens = capacity_factor, padded_tokens
        self.chunks, self.delay_weight_gradients = chunks, delay_weight_gradients
        self.shapes = self.kind.shapes(spec)
        """Of one expert's whole tensors, by name."""
        self.shards = ExpertShards(self.mesh) if shard_experts and self.mesh.copies > 1 else None
        self.sums_gradients, self.gradients_wait = True, False
        self.unused_rows: dict[str, int] = {}
        """By parameter, rows that the model's own has behind those of experts, of experts that compute nothing."""
        self.optimizer_steps = OptimizerSteps(self)
        self.dispatcher = self._check_together(plan, dispatch, dtype)
        self.plan = plan
        placement = LayerPlacement.of(plan, layer)
        self.row_expert = placement.expert[placement.on_device(self.mesh.rank)]
        for name, whole in self.shapes.items():
            shape = whole if self.shards is None else self.shards.shape(whole)
            value = torch.empty(len(self.row_expert), *shape, dtype=dtype, device=self.mesh.device)
            self.register_parameter(name, ExpertParameter(value))
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
            for name, value, choices in (
                ("gradients", self.gradients, get_args(Gradients)),
                ("replica_choice", self.replicas, get_args(Replicas)),
            ):
                if value not in choices:
                    raise InputError(f"{name} {value!r} is unknown; {nearest(str(value), choices)}")
            if self.capacity_factor is not None:
                if not self.capacity_factor > 0:
                    raise InputError(f"capacity_factor ({self.capacity_factor}) must be above 0, or None for no limit")
                if isinstance(self.compression, LSHCompression):
                    raise UnsupportedError("LSHCompression and capacity_factor do not go together; leave one out")
            if self.padded_tokens is not None:
                self._check_padded(self.padded_tokens, dispatch)
            self.mesh.check_covers_world()
            check_plan(self.spec, plan, self.mesh)
            if isinstance(self.online_slots, bool) or not isinstance(self.online_slots, int) or self.online_slots < 0:
                raise InputError(f"online_slots is {self.online_slots!r}; expected a whole number of at least 0")
            if not 0.0 <= self.online_slack < float("inf"):
                raise InputError(f"online_slack is {self.online_slack!r}; expected a number of at least 0")
            if self.online_slots and isinstance(self.compression, LSHCompression):
                raise InputError(
                    "LSHCompression and online_slots do not go together: what is planned is tokens, not centroids; "
                    "leave one of them out"
                )
            if self.shards is not None:
                self.shards.check(self.layer, self.shapes)
                if self.online_slots:
                    raise UnsupportedError("shard_experts and online_slots do not go together; leave one out")
            check_homes(LayerPlacement.of(plan, self.layer), self.online_slots)
            if isinstance(self.chunks, bool) or not isinstance(self.chunks, int) or self.chunks < 1:
                raise InputError(f"chunks is {self.chunks!r}; expected a whole number of at least 1")
            if self.padded_tokens is None:
                dispatcher = self._compressed(_make(dispatch, self.mesh))
            else:
                dispatcher = PaddedDispatcher(self.mesh, self._capacity(self.padded_tokens, self.spec.top_k))
            if self.chunks > 1:
                self._check_chunks(dispatcher)
            if self.delay_weight_gradients:
                self._check_delay(dispatcher)
        except MoeplaceError as error:
            failure = error
        settings = f"{self.kind!r} {self.gradients} {self.replicas} {type(dispatcher).__name__}"
        settings += f" {self.capacity_factor} {self.padded_tokens} {self.chunks}"
        settings += " shards" if self.shards is not None else ""
        settings += " delayed" if self.delay_weight_gradients else ""
        settings += f" {self.online_slots} {self.online_slack}" if self.online_slots else ""
        settings += f" {quantized_rows(self.compression)}"
        settings += (
            f" {dispatcher.settings}" if isinstance(dispatcher, LowLatencyDispatcher | SymmetricDispatcher) else ""
        )
        content = f"{plan.fingerprint} {self.layer} {dtype} {settings}"
        check_consistent(self.mesh, f"plan and settings of MoE layer {self.layer}", content, failure)
        assert dispatcher is not None
        return dispatcher

    def _check_padded(self, tokens: int, dispatch: str | MakeDispatcher | None) -> None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise InputError(f"padded_tokens is {tokens!r}; expected a whole number of at least 1")
        if self.capacity_factor is None:
            raise InputError(
                "padded_tokens needs capacity_factor, which says how many rows an expert gets: 1.25, say; what is "
                "beyond is dropped"
            )
        if dispatch not in (None, "flat"):
            raise InputError(f"padded_tokens sends by one all-to-all over all ranks; leave out dispatch ({dispatch!r})")
        if self.online_slots or self.compression is not None:
            other = "online_slots" if self.online_slots else "compression"
            raise UnsupportedError(f"padded_tokens and {other} do not go together; leave one out")

    def _check_chunks(self, dispatcher: Dispatcher) -> None:
        if not isinstance(dispatcher, AllToAllDispatcher):
            what = "LSHCompression" if isinstance(dispatcher, CompressedDispatcher) else type(dispatcher).__name__
            raise UnsupportedError(
                f"chunks ({self.chunks}) are sent by flat and node_aware dispatch, not with {what}; give chunks=1"
            )
        if self.shards is not None:
            raise UnsupportedError(
                f"shard_experts and chunks ({self.chunks}) do not go together: every chunk would join the experts' "
                "parts anew; leave one out"
            )

    def _check_delay(self, dispatcher: Dispatcher) -> None:
        if not isinstance(dispatcher, AllToAllDispatcher | CompressedDispatcher | PaddedDispatcher):
            raise UnsupportedError(
                f"delay_weight_gradients is for rows that travel beside other work, as flat and node_aware dispatch "
                f"send them; with {type(dispatcher).__name__} it would do nothing: leave it out"
            )
        if self.shards is not None:
            raise UnsupportedError(
                "shard_experts and delay_weight_gradients do not go together: gradients of experts cut over copies "
                "are summed where their parts are joined, before others are sent; leave one out"
            )

    def _capacity(self, tokens: int, top_k: int) -> int:
        assert self.capacity_factor is not None
        return expert_capacity(tokens, top_k, self.num_experts, self.capacity_factor)

    def _compressed(self, plain: Dispatcher) -> Dispatcher:
        settings = self.compression
        if settings is None:
            return plain
        if not isinstance(plain, AllToAllDispatcher):
            raise InputError(
                f"compression works on top of flat and node_aware dispatch, not of {type(plain).__name__}; give no "
                "compression, or one of these as dispatch"
            )
        rows = quantized_rows(settings)
        if rows is not None:
            for width in (self.spec.expert_input_size, self.spec.expert_output_size):
                rows.check_width(width)
        plain.quantize(rows)
        if isinstance(settings, QuantizedRows):
            return plain

        def steps() -> int | None:
            return self.optimizer_steps.done if self.training or settings.evaluation else None

        return CompressedDispatcher(plain, self.mesh, settings, self.layer, self.spec.expert_input_size, steps)

    @torch.no_grad()
    def _try_kernels(self) -> None:
        """One row through an expert, so that torch's kernels are tried here and not inside a forward that a checkpoint,
        a compiler or a recorder watches."""
        weights = {
            name: value.new_zeros(len(value), *self.shapes[name])
            for name, value in self.named_parameters(recurse=False)
        }
        example = next(iter(weights.values()))
        count_S = torch.zeros(len(example), dtype=torch.int64, device=example.device)
        count_S[:1] = 1
        self.kind.forward(example.new_zeros(int(count_S.sum()), self.spec.expert_input_size), count_S, weights)

    def put_in_force(self, plan: Plan, placement: LayerPlacement) -> None:
        """Routes by `placement` from now on. `row_expert` and the parameters' rows must already be its own."""
        self.plan, self.placement = plan, placement
        where = np.stack([placement.expert, placement.device]).astype(np.int64)
        experts = tuple(self.row_expert.tolist())
        digest = hashlib.sha256(where.tobytes()).hexdigest()[:16]
        if self.shards is not None:
            digest += f" part {self.mesh.copy} of {self.mesh.copies}"
        self.rows = RowsOf(self.layer, digest, experts)
        self._mark()
        self.row_of_slot = rows_of_slots(placement, self.mesh.rank, self.row_expert)
        self.replica_choice = (
            BalancedReplicas(placement, self.mesh.rank, self.mesh.device, partial(gather, self.mesh.group))
            if self.replicas == "balanced"
            else ReplicaChoice(placement, self.mesh.rank, self.mesh.device)
        )
        self.gradient_sum = GradientSum(
            placement, self.mesh, self.row_of_slot, self.row_expert, over_copies=self.shards is None
        )
        row_of_slot, rows = self.row_of_slot, len(self.row_expert)
        self.copies: OnlineCopies | None = None
        if self.online_slots:
            self.copies = OnlineCopies(placement, self.mesh, self.online_slots, self.online_slack, row_of_slot)
            placement, row_of_slot, rows = self.copies.placement, self.copies.row_of_slot, rows + self.online_slots
        self.dispatcher.place(placement, torch.from_numpy(row_of_slot), rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> PlacedExperts:
        """A copy with parameters of its own over the same ranks, as averages of weights are kept in."""
        for shared in (self.shards, self.mesh, self.mesh.group, self.mesh.inter, self.mesh.intra, self.mesh.data):
            memo[id(shared)] = shared
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        vars(result).update(copy.deepcopy(vars(self), memo))
        result.optimizer_steps = OptimizerSteps(result)
        return result

    @property
    def _in_order(self) -> bool:
        """Whether this rank's rows are all experts in their order, and it is alone."""
        return self._alone and np.array_equal(self.row_expert, np.arange(self.num_experts))

    @property
    def _alone(self) -> bool:
        return self.mesh.size == 1 and self.shards is None

    def _mark(self) -> None:
        once = self._alone and np.array_equal(np.sort(self.row_expert), np.arange(self.num_experts))
        for value in self.parameters(recurse=False):
            if isinstance(value, ExpertParameter):
                value.once, value.in_order, value.cut = once, self._in_order, self.shards is not None
                value.rows = self.rows

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._in_order and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][MARK] = self.rows.mark
        if not keep_vars and not self._in_order:
            for name in self._parameters:
                destination[prefix + name] = ExpertRows.of(destination[prefix + name], self.rows)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        if not self._in_order:
            check_loading()
        mark = RowsOf.of_mark(local_metadata.get(MARK))
        for name, parameter in self.named_parameters(recurse=False):
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor) or (isinstance(value, ExpertParameter) and value.rows == self.rows):
                continue
            whole, marked = self.whole_shape(name), isinstance(value, ExpertRows | ExpertParameter)
            # A state of this model's, updated with a whole model's tensors, keeps its mark.
            of_whole = not marked and tuple(value.shape) == whole
            if self._in_order and (of_whole or not (marked or mark)):
                continue
            # Torch says what is wrong with other shapes. The dictionary is a copy of what was given.
            if marked or mark or of_whole or tuple(value.shape) == tuple(parameter.shape):
                state_dict[prefix + name] = own_rows(
                    value, None if of_whole else mark, self.rows, name, whole, _WEIGHTS
                )
        if local_metadata.get("assign_to_params_buffers"):
            # Torch makes plain parameters of them.
            for name in self._parameters:
                value = state_dict.get(prefix + name)
                if type(value) is Tensor:
                    state_dict[prefix + name] = ExpertParameter(value)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)
        self._mark()

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter as the whole model has it."""
        return (self.num_experts + self.unused_rows.get(name, 0), *self.shapes[name])

    def __setattr__(self, name: str, value: Any) -> None:
        # fully_shard puts its own parameters in place by setattr, unsharded ones during forward: these no longer tell.
        if isinstance(value, DTensor):
            raise self._managed(name, "fully_shard")
        registered = name in vars(self).get("_parameters", {})
        if registered and isinstance(value, nn.Parameter) and not isinstance(value, ExpertParameter):
            refuse_parametrisation()
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        # FullyShardedDataParallel deletes parameters, then puts views of its own in their place.
        if name in self._parameters:
            if sys._getframe(1).f_globals.get("__name__") == "torch.nn.utils.parametrize":
                refuse_parametrisation()
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
            top_k_index: [..., K] experts of each; those from E on have no weights and give what they are given.
            top_k_weights: [..., K] gate weights.
            meanwhile: called while tokens travel.
        """
        x_TD = hidden_states.reshape(-1, self.spec.expert_input_size)
        self._check_managers()
        parameters = self._weights()
        kind = self.mesh.mesh.device_type
        if torch.is_autocast_enabled(kind):
            # As for torch's own layers; grouped products know nothing of autocast.
            x_TD = x_TD.to(torch.get_autocast_dtype(kind))
        for name, value in parameters.items():
            self._check_dtype(name, value, x_TD.dtype)
        # Cut experts become narrower as they are joined, so that their gradients are added up in the wider type.
        weights = parameters
        if self.shards is None:
            weights = {name: value.to(x_TD.dtype) for name, value in parameters.items()}
        expert_TK = top_k_index.reshape(len(x_TD), top_k_index.shape[-1])
        weight_TK = top_k_weights.reshape(expert_TK.shape).float()
        self._check_experts(expert_TK)
        identity_TK = absent_TK = (expert_TK >= self.num_experts) if self.spec.zero_experts else None
        if self.capacity_factor is not None:
            tokens = self.padded_tokens or len(x_TD)
            if len(x_TD) > tokens:
                raise InputError(
                    f"layer {self.layer}: {len(x_TD)} tokens, padded_tokens is {tokens}; give the most that a rank has"
                )
            capacity = self._capacity(tokens, expert_TK.shape[1])
            dropped_TK = over_capacity(expert_TK, weight_TK, capacity)
            absent_TK = dropped_TK if identity_TK is None else identity_TK | dropped_TK
        prefetch = None
        if self.copies is not None:
            chosen_TK = expert_TK.long()
            prefetch = self.copies.start(
                chosen_TK if absent_TK is None else chosen_TK.masked_fill(absent_TK, -1), weights
            )
            slot_TK = prefetch.slot_TK
        elif absent_TK is None:
            slot_TK = self.replica_choice.slots(expert_TK.long())
        else:
            slot_TK = self.replica_choice.slots(expert_TK.long().masked_fill(absent_TK, 0))
            slot_TK = slot_TK.masked_fill(absent_TK, -1)
        first, others = (x_TD, slot_TK, weight_TK), []
        if self.chunks > 1:
            edges = [len(x_TD) * i // self.chunks for i in range(self.chunks + 1)]
            sizes = [after - before for before, after in pairwise(edges)]
            first, *others = zip(*(torch.split(rows, sizes) for rows in first), strict=True)
        metadata = self.dispatcher.dispatch(*first)
        if meanwhile is not None:
            meanwhile()
        if self.copies is not None and prefetch is not None:
            weights = self.copies.finish(prefetch, weights)
        if others:
            out_TD = self._in_chunks(metadata, others, weights)
        else:
            # Made before rows are waited for, so that in backward it comes after their gradients have been sent.
            compute = self._computing(weights)
            row_ND, count_S = self.dispatcher.receive(metadata)
            if self.shards is None:
                y_ND = compute(row_ND, count_S)
            else:
                y_ND = JoinedWeights.run(self.shards, weights, x_TD.dtype, partial(self.kind.forward, row_ND, count_S))
            out_TD = self.dispatcher.combine(y_ND, metadata)
        if identity_TK is not None:
            out_TD = out_TD + x_TD * (weight_TK * identity_TK).sum(dim=-1, keepdim=True).to(x_TD.dtype)
        return out_TD.view(hidden_states.shape)

    def _in_chunks(
        self, first: Any, others: Sequence[tuple[Tensor, Tensor, Tensor]], weights: Mapping[str, Tensor]
    ) -> Tensor:
        """[T, D] of the chunk that is on its way and those behind it. Autograd goes through this order backwards, where
        results and tokens change places: gradients travel behind experts' backward as rows do behind their forward."""
        dispatcher = self.dispatcher
        assert isinstance(dispatcher, AllToAllDispatcher)
        batches, computing = [first], [self._computing(weights)]
        for following in (*others, None):
            current, compute = batches[-1], computing[-1]
            if following is not None:
                batches.append(dispatcher.dispatch(*following))
                computing.append(self._computing(weights))
            dispatcher.start_combine(compute(*dispatcher.receive(current)), current)
        return dispatcher.finish_combine(batches)

    def _computing(self, weights: Mapping[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """(rows [N, D], rows of each expert [S]) -> [N, D] what the experts here make of them."""
        if not self.delay_weight_gradients or not torch.is_grad_enabled():
            return lambda row_ND, count_S: self.kind.forward(row_ND, count_S, weights)
        delayed = DelayedGradients()
        later = delayed.weights(weights)
        return lambda row_ND, count_S: delayed.run(partial(self.kind.forward, row_ND, count_S, later))

    def _check_dtype(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        """Raises InputError unless `value` is of the tokens' type, or of a wider one that is used in theirs, as
        fully_shard's MixedPrecisionPolicy has the other weights."""
        wider = value.dtype.is_floating_point and torch.finfo(value.dtype).bits > torch.finfo(dtype).bits
        if value.dtype != dtype and not wider:
            raise InputError(
                f"layer {self.layer}: tokens are {dtype}, {name} is {value.dtype}; give tokens of that type, or run "
                "under torch.autocast"
            )

    def _check_experts(self, expert_TK: Tensor) -> None:
        """Raises InputError for experts that do not exist; on a GPU an error of the device, since the host does not
        wait."""
        most = self.num_experts + self.spec.zero_experts
        known = (expert_TK.clamp(0, most - 1) == expert_TK).all()
        require(
            known,
            f"layer {self.layer}: top_k_index has experts outside 0 to {most - 1}; give a token that goes to fewer "
            "experts any of these with a weight of 0",
        )

    def _check_managers(self) -> None:
        """Raises UnsupportedError if something treats these parameters as the same on every rank, or replaced them."""
        if self._parameters.keys() != self.shapes.keys():
            raise UnsupportedError(
                f"layer {self.layer}: its parameters are {sorted(self._parameters)}, expected {sorted(self.shapes)}: "
                "pruning, weight_norm and the like put their own in an expert's place, which is unknown here; leave "
                "the experts out"
            )
        if torch._C._are_functorch_transforms_active():
            raise UnsupportedError(
                f"layer {self.layer}: torch.func's transforms (grad, vmap, jvp) do not go through messages between "
                "ranks; use backward() or torch.autograd.grad"
            )
        check_join()
        for name, value in self.named_parameters(recurse=False):
            if isinstance(value, DTensor):
                raise self._managed(name, "a tensor-parallel plan")
            if hasattr(value, "ds_id") or hasattr(value, "_hp_mapping"):
                raise self._managed(name, "DeepSpeed's ZeRO")

    def _weights(self) -> Mapping[str, Tensor]:
        parameters = dict(self.named_parameters(recurse=False))
        names, values = zip(*parameters.items(), strict=True)
        scale = 1.0 / (self.mesh.size * self.mesh.copies) if self.gradients == "mean" else 1.0
        if self.gradient_sum.any or scale != 1.0:
            values = SharedGradients.apply(self, scale, *values)  # type: ignore[no-untyped-call]
        return dict(zip(names, values, strict=True))

    @torch.no_grad()
    def summed_gradients(self, grads: list[Tensor]) -> list[Tensor]:
        """What backward adds to the gradients [S, ...] of the parameters, from this batch's own."""
        if not self.gradient_sum.any:
            return grads
        parameters = list(self.parameters(recurse=False))
        if not self.sums_gradients:
            if not self.gradients_wait:
                # What earlier batches of this step have summed is everybody's already, and will be added up again.
                for parameter in parameters:
                    if parameter.grad is not None:
                        self.gradient_sum.divide(parameter.grad)
            self.gradients_wait = True
            return grads
        if self.gradients_wait:
            grads = [g if p.grad is None else g + p.grad for g, p in zip(grads, parameters, strict=True)]
            for parameter in parameters:
                parameter.grad = None
            self.gradients_wait = False
        return self.gradient_sum.reduce(grads)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draws every expert's weights anew, normal with deviation 0.02; biases become zero."""
        for row, expert in enumerate(self.row_expert.tolist()):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + self.layer) * 1_000_003 + expert)
            for name, value in self.named_parameters(recurse=False):
                drawn = torch.randn(self.shapes[name], generator=generator) * 0.02
                self.fill(name, row, drawn if value.ndim > 2 else torch.zeros_like(drawn))

    @torch.no_grad()
    def joined(self, value: Tensor) -> Tensor:
        """Whole rows of experts from rows [S, ...] of this rank; where `shard_experts` cuts them, every rank that has a
        part of them calls it with its part."""
        rows = value.detach().as_subclass(Tensor)
        return rows if self.shards is None else self.shards.join(rows)

    @torch.no_grad()
    def fill(self, name: str, row: int, expert: Tensor) -> None:
        """Puts one expert's whole tensor into a row, or this rank's part of it."""
        part = expert if self.shards is None else self.shards.part(expert[None])[0]
        self.get_parameter(name)[row].copy_(part)

    @torch.no_grad()
    def load_logical(self, weights: Mapping[str, Tensor]) -> None:
        """Takes this rank's rows from [E, ...] tensors of all experts in logical order, by parameter name.

        Raises:
            InputError: a name is missing, or a shape is not [E, ...] of the expert MLP.
        """
        for name, value in self.named_parameters(recurse=False):
            expected = (self.num_experts, *self.shapes[name])
            if name not in weights:
                raise InputError(f"layer {self.layer}: no weights {name!r} given; given are {sorted(weights)}")
            if tuple(weights[name].shape) != expected:
                raise InputError(
                    f"layer {self.layer}: {name} has shape {tuple(weights[name].shape)}, expected {expected}"
                )
            whole = weights[name] if self.shards is None else self.shards.part(weights[name])
            value.copy_(whole[torch.from_numpy(self.row_expert).to(whole.device)])

    def extra_repr(self) -> str:
        return (
            f"layer={self.layer}, experts={self.num_experts}, here={self.row_expert.tolist()}, "
            f"ranks={self.mesh.size}, kind={self.kind}"
        )


def over_capacity(expert_TK: Tensor, weight_TK: Tensor, capacity: int) -> Tensor:
    """[T, K] whether a token is one too many for its expert, which takes `capacity` of a rank's: those with the largest
    gate weights, the earlier where these are equal (Megatron-LM's policy "probs")."""
    expert_N, weight_N = expert_TK.flatten(), weight_TK.detach().flatten()
    by_weight_N = weight_N.argsort(descending=True, stable=True)
    order_N = by_weight_N[expert_N[by_weight_N].argsort(stable=True)]
    sorted_N = expert_N[order_N]
    # The first of an expert's run: everything before it has a smaller number.
    begin_N = torch.searchsorted(sorted_N, sorted_N)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device) - begin_N
    return (place_N >= capacity).view(expert_TK.shape)


def check_plan(spec: ModelSpec, plan: Plan, mesh: ExpertMesh) -> None:
    """Raises InputError unless `plan` places `spec`'s experts on this mesh's ranks."""
    for field in ("experts", "top_k", "hidden_size", "ffn_size", "moe_layers"):
        planned, expected = getattr(plan.model, field), getattr(spec, field)
        if field == "moe_layers" and planned != expected and set(expected) < set(planned):
            raise InputError(
                f"this model has the layers {list(expected)} of the plan's {list(planned)}; a pipeline stage takes "
                f"plan.select({list(expected)})"
            )
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
        replica = np.zeros(len(placement.expert), dtype=np.int64)
        for expert, number in enumerate(placement.replicas.tolist()):
            replica[placement.slots_of[expert, :number]] = np.arange(number)
        before = np.concatenate([np.full((len(edges), 1), -1.0), edges[:, :-1]], axis=1)
        self._expert_P, self._from_P, self._to_P = (
            torch.from_numpy(values).to(device)
            for values in (placement.expert, before[placement.expert, replica], edges[placement.expert, replica])
        )
        # Ranks start at different fractions of a slot, so that few tokens each are balanced over all ranks together.
        self._start = _bit_reversed(rank, placement.devices)

    def slots(self, expert_TK: Tensor) -> Tensor:
        """[T, K] slot of each chosen expert.

        The i-th of an expert's n tokens here goes where the fraction (i + start) / n falls among the quotas.
        """
        if not self._replicated:
            return self._slots_ER[expert_TK, 0]
        expert_N = expert_TK.flatten()
        order_N, sorted_N, place_N, count_E = in_queues(expert_N, len(self._slots_ER))
        fraction_N = (place_N + self._start) / count_E[sorted_N]
        replica_N = (self._edges_ER[sorted_N] <= fraction_N[:, None]).sum(dim=1)
        slot_N = torch.empty_like(expert_N)
        slot_N[order_N] = self._slots_ER[sorted_N, replica_N]
        return slot_N.view_as(expert_TK)

    def spread(self, weight_TE: Tensor, chosen_TE: Tensor) -> tuple[Tensor, Tensor]:
        """[T, P] weights and choice of slots, for those of experts: the same choice as `slots` makes, of as many
        experts a token as there are."""
        place_TE = chosen_TE.cumsum(dim=0) - 1
        fraction_TE = (place_TE + self._start) / chosen_TE.sum(dim=0).clamp(min=1)
        fraction_TP = fraction_TE[:, self._expert_P]
        chosen_TP = chosen_TE[:, self._expert_P] & (self._from_P <= fraction_TP) & (fraction_TP < self._to_P)
        return torch.where(chosen_TP, weight_TE[:, self._expert_P], 0.0), chosen_TP


def _bit_reversed(rank: int, size: int) -> float:
    """A fraction in (0, 1): neighbouring ranks far apart, all ranks evenly spread (van der Corput)."""
    bits = max(1, (size - 1).bit_length())
    reversed_rank = int(f"{rank:0{bits}b}"[::-1], 2)
    return (reversed_rank + 0.5) / (1 << bits)


class GradientSum:
    """Gradients of an expert summed over all that hold it: the copies of data parallelism, then its replicas. The sum
    is the same bits everywhere, so that they stay equal for ever.

    Each replicated expert's gradient is cut into as many pieces as devices hold it; a holder gathers one piece from
    all, adds them in the order of devices, and hands the sum back. That moves 2 (h - 1) / h gradients a holder, the
    least possible, and every piece is added up by one rank only.
    """

    def __init__(
        self,
        placement: LayerPlacement,
        mesh: ExpertMesh,
        row_of_slot: IntArray,
        row_expert: IntArray,
        over_copies: bool,
    ) -> None:
        self._mesh = mesh
        self._copies = mesh.data if over_copies else None
        copies = mesh.copies if over_copies else 1
        # On the device: a list or an array of the host's would make it wait, in every backward.
        self._holders_S = torch.from_numpy(placement.replicas[row_expert] * copies).to(mesh.device)
        holders = [np.unique(placement.device[placement.expert == e]) for e in range(placement.experts)]
        self._replicated = bool((placement.replicas > 1).any())
        self.any = self._replicated or copies > 1
        mine = [e for e in np.flatnonzero(placement.replicas > 1) if mesh.rank in holders[e]]
        self._holders = [holders[e].tolist() for e in mine]
        rows = [row_of_slot[(placement.expert == e) & (placement.device == mesh.rank)].tolist() for e in mine]
        self._first_m = torch.tensor([row[0] for row in rows], dtype=torch.int64, device=mesh.device)
        """The row that stands for an expert; twins on this device are added to it first."""
        self._twins = [(row[0], other) for row in rows for other in row[1:]]

    def reduce(self, grads: list[Tensor]) -> list[Tensor]:
        """Gradients [S, ...] with each row summed over all that hold its expert."""
        grads = [grad.clone(memory_format=torch.contiguous_format) for grad in grads]
        if self._copies is not None:
            # Copies first: how a backend orders the terms of its sum depends on a row's place, which differs between
            # replicas but not between copies.
            with naming_unresponsive_ranks(self._copies):
                for grad in grads:
                    dist.all_reduce(grad, group=self._copies)
        if not self._replicated:
            return grads
        for first, other in self._twins:
            for grad in grads:
                grad[first] += grad[other]
        flat_mn = torch.cat([grad.index_select(0, self._first_m).flatten(1) for grad in grads], dim=1)
        total_mn = self._exchange(flat_mn)
        start = 0
        for grad in grads:
            size = grad[0].numel() if len(grad) else 0
            if len(self._first_m):
                rows = total_mn[:, start : start + size].reshape(-1, *grad.shape[1:])
                grad.index_copy_(0, self._first_m, rows)
            for first, other in self._twins:
                grad[other] = grad[first]
            start += size
        return grads

    def divide(self, grad: Tensor) -> None:
        """Divides each row, in place, by the number of those that hold its expert."""
        grad.div_(self._holders_S.view(-1, *[1] * (grad.ndim - 1)).to(grad.dtype))

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
    """Identity on an expert layer's parameters; backward scales, and sums what all that hold an expert got."""

    @staticmethod
    def forward(ctx: Any, layer: PlacedExperts, scale: float, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.layer, ctx.scale = layer, scale
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = list(grads) if ctx.scale == 1.0 else [grad * ctx.scale for grad in grads]
        return None, None, *ctx.layer.summed_gradients(scaled)


def _cuts(length: int, holders: list[int]) -> dict[int, tuple[int, int]]:
    """The piece of `length` numbers that each holder adds up."""
    edges = [length * i // len(holders) for i in range(len(holders) + 1)]
    return {holder: (edges[i], edges[i + 1]) for i, holder in enumerate(holders)}


def _length(piece: tuple[int, int]) -> int:
    return piece[1] - piece[0]


# Experts cut over the ranks that would else hold the same ones: data parallelism that does not repeat them.
#
# Every tensor of an expert is cut along its first dimension, a part for each copy. Parts are joined for a layer's
# forward pass and again for its backward, and dropped between the two; gradients come back summed over all copies, each
# rank its part's: what fully_shard does with other weights.
#
# S rows of a rank, n the first dimension of an expert's tensor, C copies.


class ExpertShards:
    """This rank's parts of tensors [S, n, ...], between the ranks of a mesh that hold the same experts."""

    def __init__(self, mesh: ExpertMesh) -> None:
        assert mesh.data is not None
        self._group, self._count, self._index = mesh.data, mesh.copies, mesh.copy

    def check(self, layer: int, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raises UnsupportedError unless each copy has an equal part of every tensor."""
        for name, shape in shapes.items():
            if shape[0] % self._count:
                raise UnsupportedError(
                    f"layer {layer}: an expert's {name} is {list(shape)}, whose first dimension {self._count} copies "
                    "cannot share evenly; leave out shard_experts, or give a mesh with another number of copies"
                )

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """What a rank holds of an expert's tensor."""
        return (whole[0] // self._count, *whole[1:])

    def part(self, value_SN: Tensor) -> Tensor:
        """[S, n / C, ...] this rank's part."""
        return value_SN.chunk(self._count, dim=1)[self._index]

    def join(self, part_SN: Tensor) -> Tensor:
        """[S, n, ...] from all copies' parts; each of them calls it."""
        rows, size, *rest = part_SN.shape
        parts = part_SN.new_empty(self._count * rows, size, *rest)
        with naming_unresponsive_ranks(self._group):
            dist.all_gather_into_tensor(parts, part_SN.contiguous(), group=self._group)
        return parts.view(self._count, rows, size, *rest).transpose(0, 1).reshape(rows, self._count * size, *rest)

    def sum_parts(self, value_SN: Tensor) -> Tensor:
        """[S, n / C, ...] this rank's part of the sum over all copies' tensors."""
        rows, size, *rest = value_SN.shape
        parts = value_SN.view(rows, self._count, size // self._count, *rest).transpose(0, 1).contiguous()
        mine = parts.new_empty(rows, size // self._count, *rest)
        with naming_unresponsive_ranks(self._group):
            dist.reduce_scatter_tensor(mine, parts.flatten(0, 1), group=self._group)
        return mine


class JoinedWeights:
    """The whole weights of one layer's pass. What autograd would keep of them is joined again in backward.

    Args:
        shards: how they are cut.
        parts: [S, n / C, ...] by name, as autograd follows them.
        dtype: in which they travel and are used.
    """

    def __init__(self, shards: ExpertShards, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._shards, self._dtype = shards, dtype
        self._parts = {name: part.detach().as_subclass(Tensor) for name, part in parts.items()}
        self._versions = [part._version for part in self._parts.values()] if torch.is_grad_enabled() else []
        self._again: dict[str, Tensor] = {}
        self._name_at: dict[int, str] = {}

    @classmethod
    def run(
        cls,
        shards: ExpertShards,
        parts: Mapping[str, Tensor],
        dtype: torch.dtype,
        compute: Callable[[Mapping[str, Tensor]], Tensor],
    ) -> Tensor:
        """What `compute` makes of the whole weights; autograd keeps none of them."""
        joined = cls(shards, parts, dtype)
        wholes = dict(zip(parts, _Join.apply(joined, *parts.values()), strict=True))  # type: ignore[no-untyped-call]
        joined._name_at = {value.untyped_storage().data_ptr(): name for name, value in wholes.items() if value.numel()}
        with torch.autograd.graph.saved_tensors_hooks(joined._pack, joined._unpack):
            result = compute(wholes)
        again: Tensor = _JoinAgain.apply(joined, result)  # type: ignore[no-untyped-call]
        return again

    def join(self) -> dict[str, Tensor]:
        """The whole of each parameter, from what the copies hold now."""
        return {name: self._shards.join(part.to(self._dtype)) for name, part in self._parts.items()}

    def join_again(self) -> None:
        """For backward: every copy at the same point of it, whichever weights its tokens went through.

        Raises:
            InputError: they are not those of forward any more.
        """
        if [part._version for part in self._parts.values()] != self._versions:
            raise InputError(
                "experts that are cut over copies (shard_experts) were changed between forward and backward, which "
                "joins them again: gradients would be of other weights. Step optimizers behind the last backward"
            )
        self._again = self.join()

    def sum_parts(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """This rank's parts of gradients; what backward joined is not needed any more."""
        self._again = {}
        return [
            self._shards.sum_parts(grad.to(part.dtype)) for grad, part in zip(grads, self._parts.values(), strict=True)
        ]

    def _pack(self, value: Tensor) -> Any:
        name = self._name_at.get(value.untyped_storage().data_ptr()) if value.numel() else None
        return value if name is None else (name, value.shape, value.stride(), value.storage_offset())

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        name, shape, stride, offset = packed
        return self._again[name].as_strided(shape, stride, offset)


class _Join(Function):
    """Parts to wholes; backward, the sums over all copies' gradients to the parts."""

    @staticmethod
    def forward(ctx: Any, joined: JoinedWeights, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.joined = joined
        return tuple(joined.join().values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.joined.sum_parts(grads)


class _JoinAgain(Function):
    """Identity; backward comes to it before it needs weights."""

    @staticmethod
    def forward(ctx: Any, joined: JoinedWeights, result: Tensor) -> Tensor:
        ctx.joined = joined
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        ctx.joined.join_again()
        return None, grad
