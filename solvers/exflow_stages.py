"""The order in which ExFlow's program divides devices: all at once, nodes first, or in halves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._types import IntArray
from ..placement.errors import InputError, nearest

FORMS = ("direct", "staged", "bisect")


@dataclass(frozen=True)
class Stage:
    """One program: experts go to groups of devices. parts: the next stage of each group, None for a single device."""

    groups: tuple[tuple[int, ...], ...]
    parts: tuple[Stage | None, ...]

    def effort(self, slots: IntArray) -> float:
        """Relative size of this stage's program: pair variables a layer pair."""
        return float(len(self.groups) * self.group_slots(slots).sum() ** 2)

    def total_effort(self, slots: IntArray) -> float:
        """The same, of this stage and all after it."""
        return self.effort(slots) + sum(part.total_effort(slots) for part in self.parts if part is not None)

    def group_slots(self, slots: IntArray) -> IntArray:
        """Slots of each group, from those of each device [G]."""
        return np.array([slots[list(group)].sum() for group in self.groups], dtype=np.int64)


def stages(node_of: IntArray, slots: IntArray, form: str) -> Stage | None:
    """The stages of a form for devices in nodes node_of [G] with slots [G]; None when there is only one device.

    direct: every device at once. staged: nodes, then the devices of each node. bisect: two halves of the nodes, and
    so on down to two halves of a node's devices, cut where the slots are most nearly halved.

    Raises:
        InputError: unknown form; the nearest is named.
    """
    if form not in FORMS:
        raise InputError(f"form {form!r} is unknown; {nearest(form, FORMS)}")
    devices = tuple(range(len(node_of)))
    if form == "direct":
        return _divided([(device,) for device in devices], {})
    nodes = [tuple(np.flatnonzero(node_of == node).tolist()) for node in np.unique(node_of)]
    if form == "staged":
        inside = {node: _divided([(device,) for device in node], {}) for node in nodes}
        return _divided(nodes, inside) if len(nodes) > 1 else inside[nodes[0]]
    return _bisected(nodes, slots)


def _divided(groups: list[tuple[int, ...]], parts: dict[tuple[int, ...], Stage | None]) -> Stage | None:
    if len(groups) == 1:
        return None
    return Stage(tuple(groups), tuple(parts.get(group) for group in groups))


def _bisected(units: list[tuple[int, ...]], slots: IntArray) -> Stage | None:
    if len(units) == 1:
        if len(units[0]) == 1:
            return None
        return _bisected([(device,) for device in units[0]], slots)
    filled = np.cumsum([slots[list(unit)].sum() for unit in units])
    cut = 1 + int(np.abs(filled[:-1] - filled[-1] / 2).argmin())
    halves = [units[:cut], units[cut:]]
    groups = tuple(tuple(device for unit in half for device in unit) for half in halves)
    return Stage(groups, tuple(_bisected(half, slots) for half in halves))
