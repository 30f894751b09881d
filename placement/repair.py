"""The least that makes a plan whole again after a failure: lost experts are loaded, nothing else moves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .degraded import survivors
from .errors import InputError
from .failures import Failure
from .layer_slots import in_table, own_slots
from .plan import EMPTY, Plan, Provenance
from .version import __version__

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def repaired(plan: Plan, failure: Failure, device_slots: IntArray, load: FloatArray) -> Plan:
    """The surviving slots as they stand, with every lost expert in an empty slot or in place of a spare replica.

    device_slots: [G] slots a layer of each surviving device, or [L, G] of each layer, at least those it has. load: [L, E]
    tokens each expert gets; heaviest first, lost experts go where the most loaded device stays least loaded. Slots still
    empty then take another replica of the experts with most load each. Replicas share equally.

    Raises:
        InputError: fewer slots than experts, or a device with fewer slots than it holds.
    """
    left = survivors(plan.topology.num_devices, failure)
    present = plan.slots_per_device[:, left]
    wanted = np.broadcast_to(device_slots, present.shape)
    short = (wanted.sum(axis=1) < plan.model.experts) | (wanted < present).any(axis=1)
    for layer in np.flatnonzero(short)[:1]:
        raise InputError(
            f"slots a device {wanted[layer].tolist()} must be at least the {present[layer].tolist()} in use and "
            f"{plan.model.experts} in all, in layer {plan.moe_layers[layer]}"
        )
    kept = plan.filled & np.isin(plan.slot_device, left)
    rows = []
    for layer, slots in enumerate(wanted):
        device = np.searchsorted(left, plan.slot_device[kept[layer]])
        more = np.repeat(np.arange(len(left)), slots - present[layer])
        order = np.argsort(np.concatenate([device, more]), kind="stable")
        row = np.concatenate([plan.physical_to_logical[layer, kept[layer]], np.full(len(more), EMPTY)])[order]
        rows.append(_fill(row, np.repeat(np.arange(len(left)), slots), load[layer]))
    return Plan(
        model=plan.model,
        topology=plan.topology.without(failure.devices),
        physical_to_logical=in_table(rows, own_slots(wanted)),
        slot_device=np.repeat(np.arange(len(left)), wanted.max(axis=0)),
        provenance=Provenance(
            solver="repaired",
            version=__version__,
            options={"lost": failure.name, "plan": plan.fingerprint},
            stop="given",
            trace_fingerprint=plan.provenance.trace_fingerprint,
        ),
    )


def _fill(row: IntArray, slot_device: IntArray, load: FloatArray) -> IntArray:
    """[P] a layer's slots with every expert in one of them and none empty."""
    row = row.copy()
    count = np.bincount(row[row != EMPTY], minlength=len(load))
    missing = np.flatnonzero(count == 0)
    for expert in missing[np.argsort(-load[missing], kind="stable")]:
        empty = np.flatnonzero(row == EMPTY)
        spare = empty if len(empty) else np.flatnonzero(count[row] > 1)
        slot = min(spare, key=lambda slot: (_most_loaded(row, slot_device, load, int(slot), int(expert)), slot))
        if row[slot] != EMPTY:
            count[row[slot]] -= 1
        row[slot] = expert
        count[expert] += 1
    for slot in np.flatnonzero(row == EMPTY):
        here = np.zeros(len(load), dtype=bool)
        mine = row[slot_device == slot_device[slot]]
        here[mine[mine != EMPTY]] = True
        # Where the device holds every expert already, any expert serves.
        row[slot] = int(np.argmax(np.where(here, -1.0, load / count)))
        count[row[slot]] += 1
    return row


def _most_loaded(row: IntArray, slot_device: IntArray, load: FloatArray, slot: int, expert: int) -> float:
    """Load of the most loaded device when the slot goes to the expert, replicas sharing equally."""
    changed = row.copy()
    changed[slot] = expert
    filled = changed != EMPTY
    count = np.bincount(changed[filled], minlength=len(load))
    each = load[changed[filled]] / count[changed[filled]]
    return float(np.bincount(slot_device[filled], weights=each).max())
