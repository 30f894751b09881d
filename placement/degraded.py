"""A plan on what is left of its cluster: survivors as they stand, and room for what was lost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .failures import Failure, lost_experts
from .model import ModelSpec
from .plan import EMPTY, Plan, Provenance, equal_shares
from .steps import Steps
from .topology import Topology
from .version import __version__

IntArray = npt.NDArray[np.int64]


def survivors(devices: int, failure: Failure) -> IntArray:
    """Devices that a failure leaves, in order; their positions here are their new ranks."""
    return np.setdiff1d(np.arange(devices), failure.devices)


def degraded(plan: Plan, failure: Failure) -> Plan:
    """The plan as it runs after a failure, nothing moved: tokens of lost replicas go to the surviving ones.

    Survivors of an expert keep the ratio of their shares; where all of them had none, they split its tokens equally.

    Raises:
        InputError: an expert has no replica left; layer and expert are named.
    """
    lost = lost_experts(plan, failure)
    if lost.any():
        layer, expert = np.argwhere(lost)[0]
        raise InputError(
            f"without {failure.name} no replica is left of expert {expert} in layer {plan.moe_layers[layer]} "
            f"({int(lost.sum())} lost in all layers)"
        )
    left = survivors(plan.topology.num_devices, failure)
    kept = np.isin(plan.slot_device, left)
    table, shares = plan.physical_to_logical[:, kept], plan.shares[:, kept]
    rows = np.arange(len(table))[:, None]
    total = np.zeros((len(table), plan.model.experts))
    # An empty slot's share of 0 goes to some expert's total here, and stays 0 below.
    np.add.at(total, (rows, table), shares)
    remaining = total[rows, table]
    equal = equal_shares(table, plan.model.experts)
    kept_ratio = (remaining > 0) | (table == EMPTY)
    return Plan(
        model=plan.model,
        topology=plan.topology.without(failure.devices),
        physical_to_logical=table,
        slot_device=np.searchsorted(left, plan.slot_device[kept]),
        shares=np.where(kept_ratio, shares / np.where(remaining > 0, remaining, 1.0), equal),
        provenance=Provenance(
            solver="degraded",
            version=__version__,
            options={"lost": failure.name, "plan": plan.fingerprint},
            stop="given",
            trace_fingerprint=plan.provenance.trace_fingerprint,
        ),
    )


def rehomed(steps: Steps, origin: IntArray) -> Steps:
    """The same tokens on another cluster. origin: [G] the rank each of its devices had before, or -1 for a new one.

    Tokens of ranks that are gone are dealt to the others in turn; where devices are new, tokens are spread evenly.
    """
    if steps.source is None:
        return steps
    if (origin < 0).any():
        return replace(steps, source=None)
    rank = np.full(max(int(steps.source.max()), int(origin.max())) + 1, -1, dtype=np.int64)
    rank[origin] = np.arange(len(origin))
    source = rank[steps.source]
    homeless = np.flatnonzero(source < 0)
    source[homeless] = np.arange(len(homeless)) % len(origin)
    return replace(steps, source=source)


def slot_room(model: ModelSpec, topology: Topology) -> IntArray:
    """[G] slots a layer that each device's memory holds, at most one an expert."""
    fits = np.floor(topology.memory / (model.bytes_per_expert * model.layers))
    return np.minimum(fits, model.experts).astype(np.int64)


def grown_layer_slots(layer_slots: IntArray, totals: IntArray, model: ModelSpec, topology: Topology) -> IntArray | None:
    """[L, G] at least `layer_slots` [L, G] and `totals` [L] in all, within the devices' memory; see `grown_slots`.

    Layers that are alike stay alike. None when the devices have no room for so many.
    """
    if (layer_slots == layer_slots[0]).all() and (totals == totals[0]).all():
        room = slot_room(model, topology)
        one = None if (layer_slots[0] > room).any() else grown_slots(layer_slots[0], int(totals[0]), room)
        return None if one is None else np.tile(one, (len(layer_slots), 1))
    result = layer_slots.copy()
    memory = np.floor(topology.memory / model.bytes_per_expert).astype(np.int64)
    for layer, total in enumerate(totals.tolist()):
        left = memory - result.sum(axis=0)
        grown = (
            None
            if (left < 0).any()
            else grown_slots(result[layer], total, np.minimum(result[layer] + left, model.experts))
        )
        if grown is None:
            return None
        result[layer] = grown
    return result


def grown_slots(slots: IntArray, total: int, room: IntArray) -> IntArray | None:
    """[G] at least `slots` a device and `total` in all, each next slot on the device with fewest that has room.

    None when the devices have no room for so many.
    """
    result = slots.copy()
    for _ in range(total - int(slots.sum())):
        free = result < room
        if not free.any():
            return None
        result[int(np.argmin(np.where(free, result, np.iinfo(np.int64).max)))] += 1
    return result
