"""Replicas that stand by: they hold weights and serve no tokens until others are lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .failures import Failure, failure_mask
from .plan import Certificate, Plan

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def with_standbys(plan: Plan, device_slots: IntArray, failures: Sequence[Failure], load: FloatArray) -> Plan | None:
    """The plan with further slots and none empty, so that every expert keeps a replica in each failure; step times stay.

    device_slots: [G] slots a layer of each device. load: [L, E] tokens each expert gets; slots that no expert needs go to
    the heaviest. Each expert in need gets one standby (a matching of experts and slots), so None does not mean that no
    plan with these slots survives.

    Raises:
        InputError: a device has fewer slots than the plan uses.
    """
    present = plan.slots_per_device
    for used in present[(device_slots < present).any(axis=1)][:1]:
        raise InputError(f"slots a device {device_slots.tolist()} must be at least the {used.tolist()} in use")
    mask = failure_mask(failures, plan.topology.num_devices)
    tables, shares = [], []
    for layer, filled in enumerate(plan.filled):
        more = np.repeat(np.arange(len(device_slots)), device_slots - present[layer])
        row = _standbys(plan.holds[layer], more, mask, load[layer])
        if row is None:
            return None
        order = np.argsort(np.concatenate([plan.slot_device[filled], more]), kind="stable")
        tables.append(np.concatenate([plan.physical_to_logical[layer, filled], row])[order])
        shares.append(np.concatenate([plan.shares[layer, filled], np.zeros(len(row))])[order])
    certificate = plan.certificate
    return replace(
        plan,
        physical_to_logical=np.stack(tables),
        slot_device=np.repeat(np.arange(len(device_slots)), device_slots),
        shares=np.stack(shares),
        # The bound was proven for fewer slots; with these a plan might do better.
        certificate=None if certificate is None else Certificate(certificate.objective, certificate.value),
        provenance=replace(
            plan.provenance,
            options={
                **plan.provenance.options,
                "standbys": int(device_slots.sum() - present.sum(axis=1).min()),
                "tolerates": [f.name for f in failures],
            },
        ),
        predicted={},
    )


def _standbys(holds: BoolArray, more: IntArray, failures: BoolArray, load: FloatArray) -> IntArray | None:
    """[len(more)] experts of a layer's further slots. holds: [E, G]. more: [new slots] device of each."""
    from scipy.optimize import linear_sum_assignment

    # [E, F] failures that would take every replica.
    fatal = ~np.any(holds[:, None, :] & ~failures[None], axis=2)
    wanting = np.flatnonzero(fatal.any(axis=1))
    helps = ~holds & ~(fatal.astype(np.int64) @ failures.astype(np.int64) > 0)
    if len(wanting) > len(more):
        return None
    result = np.full(len(more), -1, dtype=np.int64)
    if len(wanting):
        useless = ~helps[np.ix_(wanting, more)]
        experts, slots = linear_sum_assignment(useless.astype(float))
        if useless[experts, slots].any():
            return None
        result[slots] = wanting[experts]
    held = holds.copy()
    held[result[result >= 0], more[result >= 0]] = True
    for slot in np.flatnonzero(result < 0):
        free = ~held[:, more[slot]]
        if not free.any():
            return None
        result[slot] = int(np.argmax(np.where(free, load, -1.0)))
        held[result[slot], more[slot]] = True
    return result
