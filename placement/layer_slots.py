"""How many slots each layer has on each device, and how rows of different length share one table.

The table has as many slots as the layer with most on each device; a layer with fewer leaves the last of a device's run
empty. L layers, G devices, P slots of the table, P_l slots of layer l.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from .._types import BoolArray, IntArray
from .errors import InputError
from .model import ModelSpec
from .packing import pack
from .plan import EMPTY
from .topology import Topology

T = TypeVar("T", np.int64, np.float64)

Slots = int | Sequence[int]
DeviceSlots = Sequence[int] | Sequence[Sequence[int]]


def even_slots(slots: int, devices: int) -> IntArray:
    """[G] slots dealt evenly, the first `slots % devices` devices taking one more."""
    return np.full(devices, slots // devices, dtype=np.int64) + (np.arange(devices) < slots % devices)


def slots_by_layer(
    model: ModelSpec, topology: Topology, slots: Slots | None, device_slots: DeviceSlots | None, equal: bool = False
) -> IntArray:
    """[L, G] slots of each layer on each device, from `Problem.slots` and `Problem.device_slots`.

    Without the latter they are dealt evenly; where devices differ in memory and the small ones do not hold so many, as
    evenly as memory allows, unless they must be `equal`.

    Raises:
        InputError: a list of another length than the layers or devices, the two fields contradict each other, or a
        layer
            has no slot for an expert, or more than devices can hold without holding one twice; the layer is named.
    """
    totals, devices = _totals(model, slots), topology.num_devices
    if device_slots is None:
        result = np.stack([even_slots(int(total), devices) for total in totals])
        memory = topology.expert_memory
        if not equal and memory.min() < memory.max() and (result.sum(axis=0) * model.bytes_per_expert > memory).any():
            grown = grown_layer_slots(np.zeros_like(result), totals, model, topology)
            result = result if grown is None else grown
    else:
        result = _by_device(model, devices, device_slots)
        if slots is not None and (result.sum(axis=1) != totals).any():
            layer = int(np.flatnonzero(result.sum(axis=1) != totals)[0])
            raise InputError(
                f"Problem.slots ({totals[layer]}) is not the sum of device_slots ({result[layer].sum()})"
                + _layer_named(model, layer, result)
            )
    for layer in np.flatnonzero(result.sum(axis=1) < model.experts)[:1].tolist():
        raise InputError(
            f"Problem.slots ({result[layer].sum()}) must be at least the number of experts ({model.experts}): every "
            "expert needs a slot in every layer" + _layer_named(model, layer, result)
        )
    most = model.experts * devices
    if slots is not None and np.ndim(slots):
        for layer in np.flatnonzero(totals > most)[:1].tolist():
            raise InputError(
                f"Problem.slots ({totals[layer]}) of layer {model.moe_layers[layer]} are more than {model.experts} "
                f"experts on {devices} devices fill ({most}) without standing twice on one"
            )
    return result


def alike_layers(layer_slots: IntArray) -> list[tuple[IntArray, IntArray]]:
    """(slots [G], layers) of each distinct row of [L, G]: layers with the same slots are worked on together."""
    distinct, group = np.unique(layer_slots, axis=0, return_inverse=True)
    return [(slots, np.flatnonzero(group.ravel() == number)) for number, slots in enumerate(distinct)]


def own_slots(layer_slots: IntArray) -> BoolArray:
    """[L, P] which slots of the table are a layer's own, from [L, G]."""
    most = layer_slots.max(axis=0)
    place = np.concatenate([np.arange(count) for count in most])
    return np.asarray(place < np.repeat(layer_slots, most, axis=1))


def in_table(rows: Sequence[npt.NDArray[T]], own: BoolArray, elsewhere: int = EMPTY) -> npt.NDArray[T]:
    """[L, P] rows [P_l], a layer's in the order of its own slots [L, P]."""
    result = np.full(own.shape, elsewhere, dtype=rows[0].dtype)
    result[own] = np.concatenate(rows)
    return result


def spanned(counts: IntArray) -> str:
    """Counts [n] in words: `64`, or where they differ `56 to 72`."""
    return f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"


def _totals(model: ModelSpec, slots: Slots | None) -> IntArray:
    if slots is None:
        slots = model.experts
    counts = np.asarray(slots)
    if counts.shape not in ((), (model.layers,)) or not np.issubdtype(counts.dtype, np.integer):
        raise InputError(
            f"Problem.slots ({slots}) must be one whole number, or one for each of the {model.layers} MoE layers "
            f"{model.moe_layers}"
            + ('; to have them chosen, solve(problem, slots="auto")' if counts.dtype.kind == "U" else "")
        )
    return np.broadcast_to(counts, model.layers).astype(np.int64)


def _by_device(model: ModelSpec, devices: int, device_slots: DeviceSlots) -> IntArray:
    shapes = {(devices,), (model.layers, devices)}
    try:
        counts = np.asarray(device_slots)
    except ValueError:
        counts = np.empty(0)
    if counts.shape not in shapes or not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise InputError(
            f"Problem.device_slots {np.asarray(device_slots, dtype=object).tolist()} must name {devices} non-negative "
            f"slot counts, one a device, or such a list for each of the {model.layers} MoE layers"
        )
    return np.broadcast_to(counts, (model.layers, devices)).astype(np.int64)


def _layer_named(model: ModelSpec, layer: int, layer_slots: IntArray) -> str:
    """Where layers differ, which one it is."""
    alike = bool((layer_slots == layer_slots[0]).all())
    return "" if alike else f" (layer {model.moe_layers[layer]})"


# Slots within memory: no device loses any that it has.


def slot_capacity(model: ModelSpec, topology: Topology) -> IntArray:
    """[G] slots a layer that each device's memory holds, at most one an expert."""
    fits = np.floor(topology.expert_memory / (model.bytes_per_expert * model.layers))
    return np.minimum(fits, model.experts).astype(np.int64)


def grown_slots(slots: IntArray, total: int, capacity: IntArray) -> IntArray | None:
    """Further slots dealt one by one to the device that has fewest.

    Args:
        slots: [G] slots that each device has at least.
        total: slots in all.
        capacity: [G] slots that each device holds.

    Returns:
        [G] slots of each device, or None when the devices do not hold so many.
    """
    free, more = np.maximum(capacity - slots, 0), max(total - int(slots.sum()), 0)
    if more > free.sum():
        return None
    device, _ = pack(np.ones((1, more)), free, slots.astype(np.float64))
    return slots + np.bincount(device[0], minlength=len(slots))


def grown_layer_slots(layer_slots: IntArray, totals: IntArray, model: ModelSpec, topology: Topology) -> IntArray | None:
    """`grown_slots` of every layer, within the devices' memory; layers that are alike stay alike.

    Args:
        layer_slots: [L, G] slots that each device has at least.
        totals: [L] slots of each layer in all.
        model: gives the bytes of an expert.
        topology: gives the memory of each device.

    Returns:
        [L, G], or None when the devices do not hold so many.
    """
    if (layer_slots == layer_slots[0]).all() and (totals == totals[0]).all():
        capacity = slot_capacity(model, topology)
        one = None if (layer_slots[0] > capacity).any() else grown_slots(layer_slots[0], int(totals[0]), capacity)
        return None if one is None else np.tile(one, (len(layer_slots), 1))
    result = layer_slots.copy()
    memory = np.floor(topology.expert_memory / model.bytes_per_expert).astype(np.int64)
    for layer, total in enumerate(totals.tolist()):
        left = memory - result.sum(axis=0)
        if (left < 0).any():
            return None
        grown = grown_slots(result[layer], total, np.minimum(result[layer] + left, model.experts))
        if grown is None:
            return None
        result[layer] = grown
    return result
