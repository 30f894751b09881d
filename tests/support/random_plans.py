"""Plans of all sorts, drawn at random, and layers of experts to put them in force on."""

from __future__ import annotations

import numpy as np
import torch
from emptied_slots import empty_some

import moeplace as mp
from moeplace.placement.plan import EMPTY

SPEC = mp.ModelSpec(layers=2, experts=6, top_k=3, hidden_size=16, ffn_size=24, expert_dtype="fp32", moe_layers=(1, 4))


def topology(nodes: int, devices: int) -> mp.Topology:
    return mp.Topology.preset("a100-pcie", nodes=nodes, devices_per_node=devices)


def random_plan(
    rng: np.random.Generator, nodes: int, devices: int, spec: mp.ModelSpec = SPEC, most_extra: int = 8
) -> mp.Plan:
    """Replicas (on one device too), unequal or zero shares, devices and layers with different numbers of slots, devices
    with none and empty slots."""
    total = nodes * devices
    slots = spec.experts + int(rng.integers(0, most_extra + 1))
    table = np.stack(
        [
            rng.permutation(
                np.concatenate([np.arange(spec.experts), rng.integers(spec.experts, size=slots - spec.experts)])
            )
            for _ in range(spec.layers)
        ]
    )
    shares = rng.random(table.shape) * (rng.random(table.shape) > 0.15)
    owner, given = np.sort(rng.integers(total, size=slots)), rng.random() < 0.7
    empty_some(rng, table)
    for row, share in zip(table, shares, strict=True):
        share[row == EMPTY] = 0.0
        held = row[row != EMPTY]
        sums = np.bincount(held, weights=share[row != EMPTY], minlength=spec.experts)
        share[np.isin(row, np.flatnonzero(sums == 0))] = 1.0
        share /= np.where(row == EMPTY, 1.0, np.bincount(held, share[row != EMPTY], spec.experts)[row])
    return mp.Plan(
        model=spec,
        topology=topology(nodes, devices),
        physical_to_logical=table,
        slot_device=owner,
        shares=shares if given else np.empty(0),
    )


def logical_weights(seed: int, shapes: dict[str, tuple[int, ...]], experts: int) -> dict[str, torch.Tensor]:
    """[E, ...] values of each parameter, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(experts, *shape, generator=generator) / 4 for name, shape in shapes.items()}
