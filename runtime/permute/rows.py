"""Which expert stands in which row once a plan has become the order of a model's experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..._types import IntArray
from ...placement.engines import engine_profile, order_in_groups, violations
from ...placement.errors import UnsupportedError
from ...placement.plan import Plan


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
    if groups is not None:
        plan = replace(plan, model=plan.model.replace(groups=groups))
    broken = violations(plan, engine_profile("permute").constraints)
    if broken:
        raise UnsupportedError(f"a checkpoint cannot be permuted to this plan: {'; '.join(broken)}")
    if plan.model.groups == 1:
        return plan.physical_to_logical
    rows = (order_in_groups(row, plan.slot_device, plan.model.groups) for row in plan.physical_to_logical)
    return np.stack([row for row in rows if row is not None])
