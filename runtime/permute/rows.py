"""Which expert stands in which row once a plan has become the order of a model's experts."""

from __future__ import annotations

import numpy as np

from ..._types import IntArray
from ...placement.errors import UnsupportedError
from ...placement.plan import Plan
from ..exporters.base import Constraint, violations

PERMUTE_CONSTRAINTS = frozenset({Constraint.NO_REPLICAS, Constraint.EQUAL_SLOTS})
"""What a plan must keep to before group-limited routing is looked at."""


def expert_order(plan: Plan, groups: int | None = None) -> IntArray:
    """The order of experts by which an engine that deals them in contiguous blocks runs a plan.

    With the experts in this order, an engine that gives device g the g-th block of E / G experts runs the plan. The
    order is the plan's slot order; with group-limited routing (`groups` > 1, default the plan's model's) slots may be
    exchanged inside a device, so that every block of E / groups rows holds one original group whole.

    Args:
        plan: without replicas, with as many slots on every device.
        groups: of group-limited routing.

    Returns:
        [L, E] the original expert that row e of the permuted model holds.

    Raises:
        UnsupportedError: the plan has replicas or uneven slots, or it parts a group in a way no order can mend; the
            message says what to change.
    """
    broken = violations(plan, PERMUTE_CONSTRAINTS)
    if broken:
        raise UnsupportedError(f"a checkpoint cannot be permuted to this plan: {'; '.join(broken)}")
    count = plan.model.groups if groups is None else groups
    if count == 1:
        return plan.physical_to_logical
    rows = []
    for row, layer in zip(plan.physical_to_logical, plan.moe_layers, strict=True):
        order = _order_in_groups(row, plan.slot_device, count)
        if order is None:
            size = plan.model.experts // count
            raise UnsupportedError(
                f"a checkpoint cannot be permuted to this plan: the model routes to {count} groups of {size} experts "
                f"and reads them as blocks of {size} rows, and the plan parts the groups of layer {layer} otherwise "
                "than blocks of devices do. Solve so that experts move inside their group or groups move whole "
                "(contiguous, or the hierarchical EPLB with as many nodes as groups), or use an engine that maps "
                "experts after routing (sglang, trtllm)"
            )
        rows.append(order)
    return np.stack(rows)


def _order_in_groups(row: IntArray, device: IntArray, groups: int) -> IntArray | None:
    """The row with slots exchanged inside devices so that each block holds one group; None when there is no such order.

    A block of rows takes so many experts from each device. It can hold a group exactly if the group has so many experts
    on each device; blocks and groups with equal counts are interchangeable, so matching them in order finds an answer
    whenever there is one.
    """
    size = len(row) // groups
    block = np.arange(len(row)) // size
    group = row // size
    if np.array_equal(group, np.repeat(group[::size], size)):
        return row
    devices = int(device[-1]) + 1
    block_counts = _counts(block, device, groups, devices)
    group_counts = _counts(group, device, groups, devices)
    free = dict.fromkeys(range(groups))
    order = np.empty_like(row)
    for b in range(groups):
        match = next((g for g in [b, *free] if g in free and np.array_equal(group_counts[g], block_counts[b])), None)
        if match is None:
            return None
        del free[match]
        for d in np.flatnonzero(block_counts[b]):
            order[(block == b) & (device == d)] = row[(group == match) & (device == d)]
    return order


def _counts(labels: IntArray, device: IntArray, groups: int, devices: int) -> IntArray:
    """[groups, G] how many slots of each label stand on each device."""
    return np.bincount(labels * devices + device, minlength=groups * devices).reshape(groups, devices)
