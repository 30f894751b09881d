"""Expert parallelism beside data parallelism: which parameters are whose, and one gradient norm over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..._arguments import check_types
from ..._types import IntArray
from ...placement.errors import InputError
from .coordination import gather, sum_everywhere
from .experts import PlacedExperts
from .lsh import CompressedDispatcher

WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Attributes under which wrappers of torch hold a module."""


def expert_layers(model: nn.Module) -> list[tuple[str, PlacedExperts]]:
    """(name, module) of every layer of placed experts, by increasing layer."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PlacedExperts)]
    return sorted(layers, key=lambda pair: pair[1].layer)


@check_types
def expert_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that differ from rank to rank: `fully_shard(part, ignored_params=expert_parameters(model))`."""
    return {value for _, module in expert_layers(model) for value in module.parameters(recurse=False)}


@check_types
def exclude_from_ddp(model: nn.Module) -> None:
    """Call before DistributedDataParallel(model): it then leaves the experts' parameters alone."""
    names = [
        f"{name}.{parameter}" if name else parameter
        for name, module in expert_layers(model)
        for parameter, _ in module.named_parameters(recurse=False)
    ]
    wrapper = torch.nn.parallel.DistributedDataParallel
    wrapper._set_params_and_buffers_to_ignore_for_model(model, names)  # type: ignore[no-untyped-call]


@contextmanager
@check_types
def no_sync(model: nn.Module) -> Iterator[None]:
    """Inside, backward leaves the gradients of experts unsummed: for all micro-batches of a step but the last.

    The next backward outside sums them all at once, so that replicas and copies of experts talk once a step. As
    DistributedDataParallel.no_sync, beside which it stands: `with ddp.no_sync(), no_sync(model): loss.backward()`.
    """
    layers = [module for _, module in expert_layers(model)]
    before = [module.sums_gradients for module in layers]
    for module in layers:
        module.sums_gradients = False
    try:
        yield
    finally:
        for module, value in zip(layers, before, strict=True):
            module.sums_gradients = value


@torch.no_grad()
@check_types
def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ over the whole model: every logical expert counts once, wherever its replicas are.

    The norm and the factor are the same bits on all ranks; every rank calls it. On a mesh sliced from one with a
    dimension "pp", the norm is over the layers of all stages.

    Args:
        model: with or without expert layers.
        max_norm: gradients longer than this are scaled down to it.
        norm_type: p of the norm, "inf" for the largest gradient.
        error_if_nonfinite: raise on all ranks, instead of scaling by what is no number.

    Returns:
        The norm before clipping.

    Raises:
        InputError: norm_type is not above 0.
        RuntimeError: the norm is not finite, and `error_if_nonfinite`.
    """
    power = float(norm_type)
    if not power > 0:
        raise InputError(f"norm_type ({norm_type}) must be above 0, or 'inf'")
    layers = [module for _, module in expert_layers(model)]
    experts = expert_parameters(model)
    parts = _other_norms([p.grad for p in model.parameters() if p.grad is not None and p not in experts], power)
    if layers:
        mesh = layers[0].mesh
        parts = [part.to(mesh.device) for part in parts]
        zero = torch.zeros((), dtype=torch.float64, device=mesh.device)
        mine = _total([zero, *_expert_norms([each for each in layers if each.shards is None], power)], power)
        sharded = [each for each in layers if each.shards is not None]
        if sharded and mesh.data is not None:
            part = _total([zero, *_expert_norms(sharded, power)], power)
            mine = _total([mine, *gather(mesh.data, part)], power)
        parts += list(gather(mesh.group, mine))
        if mesh.pipeline is not None:
            parts = list(gather(mesh.pipeline, _total(parts, power)))
    norm = _total(parts, power) if parts else torch.zeros((), dtype=torch.float64)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"the norm of order {power:g} of the gradients is {float(norm)}: not finite, nothing clipped"
        )
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for value in model.parameters():
        if value.grad is not None:
            value.grad.mul_(factor.to(value.grad.dtype))
    return norm.float()


def _total(norms: list[Tensor], power: float) -> Tensor:
    """The norm of parts whose norms these are, in float64."""
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms]), power)
    return total


def _other_norms(grads: list[Tensor], power: float) -> list[Tensor]:
    """Norms of the gradients, together for those that are spread over the same ranks in the same way."""
    together: dict[Any, list[Tensor]] = {}
    for grad in grads:
        key = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
        together.setdefault(key, []).append(grad)
    norms = [torch.nn.utils.get_total_norm(part, power) for part in together.values()]
    return [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]


def _expert_norms(layers: list[PlacedExperts], power: float) -> Iterator[Tensor]:
    """Of this rank's rows, each counted for its part of all replicas."""
    for module in layers:
        part_S = torch.from_numpy(module.placement.replicas[module.row_expert] ** (-1.0 / power)).to(module.mesh.device)
        for value in module.parameters(recurse=False):
            if value.grad is not None and len(value):
                dtype = torch.promote_types(value.grad.dtype, torch.float32)
                row_S = torch.linalg.vector_norm(value.grad.flatten(1), power, dim=1, dtype=dtype)
                yield torch.linalg.vector_norm(row_S.double() * part_S, power)


@check_types
def expert_rows(model: nn.Module) -> IntArray:
    """[L, E] rows that all ranks sent for each expert in their latest forward pass, a cluster as one. Every rank calls
    it.

    What placement should be solved on under compression, since a cluster costs as much as one token. One step's counts:
    of several steps stacked, [S, L, E], `RoutingStatistics.from_counts` makes what solvers read.

    Raises:
        InputError: the model has no expert layers, or one without compression.
    """
    layers = expert_layers(model)
    if not layers:
        raise InputError(f"{type(model).__name__} has no layer of placed experts; build or parallelize it first")
    counts = []
    for name, layer in layers:
        if not isinstance(layer.dispatcher, CompressedDispatcher):
            raise InputError(f"{name} sends without compression; record its routing with moeplace.profile instead")
        mine = layer.dispatcher.counts
        counts.append(
            mine if len(mine) else torch.zeros(layer.num_experts, dtype=torch.int64, device=layer.mesh.device)
        )
    total = torch.stack(counts)
    counted: IntArray = sum_everywhere(layers[0][1].mesh, total).cpu().numpy()
    return counted
