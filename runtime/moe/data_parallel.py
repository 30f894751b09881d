"""Expert parallelism beside data parallelism: which parameters are whose, and one gradient norm over all of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..._types import IntArray
from ...placement.errors import InputError
from .coordination import gather, naming_unresponsive_ranks
from .experts import PlacedExperts
from .lsh import CompressedDispatcher


def expert_layers(model: nn.Module) -> list[tuple[str, PlacedExperts]]:
    """(name, module) of every layer of placed experts, by increasing layer."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PlacedExperts)]
    return sorted(layers, key=lambda pair: pair[1].layer)


def expert_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that differ from rank to rank: `fully_shard(part, ignored_params=expert_parameters(model))`."""
    return {value for _, module in expert_layers(model) for value in module.parameters(recurse=False)}


def exclude_from_ddp(model: nn.Module) -> None:
    """Call before DistributedDataParallel(model): it then leaves the experts' parameters alone."""
    names = [
        f"{name}.{parameter}" if name else parameter
        for name, module in expert_layers(model)
        for parameter, _ in module.named_parameters(recurse=False)
    ]
    wrapper = torch.nn.parallel.DistributedDataParallel
    wrapper._set_params_and_buffers_to_ignore_for_model(model, names)  # type: ignore[no-untyped-call]


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ over the whole model: every logical expert counts once, wherever its replicas are.

    The norm and the factor are the same bits on all ranks; every rank calls it.

    Args:
        model: with or without expert layers.
        max_norm: gradients longer than this are scaled down to it.

    Returns:
        The norm before clipping.
    """
    layers = expert_layers(model)
    experts = expert_parameters(model)
    others = [p.grad for p in model.parameters() if p.grad is not None and p not in experts]
    total = torch.nn.utils.get_total_norm(others) if others else torch.tensor(0.0)
    total = total.full_tensor() if isinstance(total, DTensor) else total
    square = total.double() ** 2
    if layers:
        mesh = layers[0][1].mesh
        square = square.to(mesh.device)
        mine = torch.zeros(1, dtype=torch.float64, device=mesh.device)
        for norm in _squares([module for _, module in layers]):
            mine += norm
        for part in gather(mesh, mine):
            square = square + part[0]
    norm = square.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for value in model.parameters():
        if value.grad is not None:
            value.grad.mul_(factor.to(value.grad.dtype))
    return norm.float()


def _squares(layers: list[PlacedExperts]) -> Iterator[Tensor]:
    for module in layers:
        weight = torch.from_numpy(1.0 / module.placement.replicas[module.row_expert]).to(module.mesh.device)
        for value in module.parameters(recurse=False):
            if value.grad is not None and len(value):
                yield (value.grad.flatten(1).double().square().sum(dim=1) * weight).sum()


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
    group = layers[0][1].mesh.group
    with naming_unresponsive_ranks(group):
        dist.all_reduce(total, group=group)
    counted: IntArray = total.cpu().numpy()
    return counted
