"""What an engine's layout cannot express, and how to ask for a plan that it can."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

import numpy as np

from ...placement.layer_slots import spanned
from ...placement.plan import EMPTY, Plan, equal_shares


class Constraint(Enum):
    """A limit of an engine that not every valid plan keeps to."""

    EQUAL_SLOTS = "every device has the same number of slots in every layer, and none is empty"
    EQUAL_SHARES = "an expert's replicas take equal shares of its tokens"
    SPREAD_REPLICAS = "no device holds an expert twice in a layer"
    NO_REPLICAS = "every expert has one slot"


def violations(plan: Plan, constraints: Iterable[Constraint]) -> list[str]:
    """A sentence for each constraint the plan breaks: what it has and what to change. Empty when it keeps to all."""
    wanted = set(constraints)
    found = (check(plan) for constraint, check in _CHECKS.items() if constraint in wanted)
    return [sentence for sentence in found if sentence is not None]


def _unequal_slots(plan: Plan) -> str | None:
    devices = plan.topology.num_devices
    if not plan.filled.all():
        return (
            f"every slot needs an expert in every layer, this plan's layers fill {spanned(plan.filled.sum(axis=1))} of "
            f"{plan.num_slots}: solve with one number of slots for all layers, a multiple of {devices}"
        )
    counts = np.bincount(plan.slot_device, minlength=devices)
    if counts.min() == counts.max():
        return None
    below, above = plan.num_slots // devices * devices, -(-plan.num_slots // devices) * devices
    choices = [str(slots) for slots in dict.fromkeys((below, above)) if slots >= plan.model.experts]
    return (
        f"every device needs the same number of slots, this plan's {plan.num_slots} slots a layer give its {devices} "
        f"devices from {counts.min()} to {counts.max()}: solve with slots={' or '.join(choices)} and no device_slots"
    )


def _unequal_shares(plan: Plan) -> str | None:
    if plan.has_equal_shares:
        return None
    expected = equal_shares(plan.physical_to_logical, plan.model.experts)
    layer, slot = np.unravel_index(int(np.abs(plan.shares - expected).argmax()), plan.shares.shape)
    expert = plan.physical_to_logical[layer, slot]
    return (
        f"replicas take equal shares of an expert's tokens, this plan gives slot {slot} a share of "
        f"{plan.shares[layer, slot]:.3f} of expert {expert} in layer {plan.moe_layers[layer]}, where an equal one is "
        f"{expected[layer, slot]:.3f}: solve with Objective(split='equal'), from here with Problem(current=plan, "
        "max_moved_bytes=0) to keep the placement, or more to fit it to equal shares (`moeplace solve --split equal "
        "--current PLAN --max-moved SIZE`)"
    )


def _stacked_replicas(plan: Plan) -> str | None:
    for table, layer in zip(plan.physical_to_logical, plan.moe_layers, strict=True):
        filled = table != EMPTY
        pairs, counts = np.unique(plan.slot_device[filled] * plan.model.experts + table[filled], return_counts=True)
        if counts.max() > 1:
            device, expert = divmod(int(pairs[counts.argmax()]), plan.model.experts)
            return (
                f"a device may hold an expert once, device {device} holds expert {expert} {counts.max()} times in layer "
                f"{layer}: solve with fewer slots, or with a solver that spreads replicas over devices"
            )
    return None


def _replicas(plan: Plan) -> str | None:
    if plan.num_slots == plan.model.experts:
        return None
    return (
        f"every expert needs exactly one slot, this plan has {plan.num_slots} slots a layer for {plan.model.experts} "
        f"experts: solve with slots={plan.model.experts} (the default)"
    )


_CHECKS: dict[Constraint, Callable[[Plan], str | None]] = {
    Constraint.EQUAL_SLOTS: _unequal_slots,
    Constraint.EQUAL_SHARES: _unequal_shares,
    Constraint.SPREAD_REPLICAS: _stacked_replicas,
    Constraint.NO_REPLICAS: _replicas,
}
