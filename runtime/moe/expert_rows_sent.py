"""Work of experts under compression: what placement should be solved on, since a cluster costs as much as one token."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ...placement.errors import InputError
from .compressed import CompressedDispatcher
from .data_parallel import expert_layers
from .lost_ranks import naming_lost_ranks


def expert_rows(model: nn.Module) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """[L, E] rows that all ranks sent for each expert in their latest forward pass, a cluster as one. Every rank calls it.

    One step's counts: of several steps stacked, [S, L, E], `RoutingStatistics.from_counts` makes what solvers read.

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
    with naming_lost_ranks(group):
        dist.all_reduce(total, group=group)
    return total.cpu().numpy()
