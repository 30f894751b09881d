"""One layer of a plan, as its ranks run it: the experts of each slot, and which slot serves a rank's tokens.

P slots, E experts, G devices, R most replicas of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..._types import FloatArray, IntArray
from ...placement.errors import InputError
from ...placement.plan import Plan


@dataclass(frozen=True, eq=False)
class LayerPlacement:
    """expert, device, share: [P], one entry a slot that holds an expert, devices not decreasing. node_of: [G]. experts:
    E."""

    expert: IntArray
    device: IntArray
    share: FloatArray
    node_of: IntArray
    experts: int

    @classmethod
    def of(cls, plan: Plan, layer: int) -> LayerPlacement:
        """The plan's filled slots at the model's absolute layer index `layer`.

        Raises:
            InputError: the plan has no such layer.
        """
        if layer not in plan.moe_layers:
            raise InputError(
                f"the plan places the layers {list(plan.moe_layers)}, not layer {layer}; solve again with a model that "
                "names all MoE layers"
            )
        row = plan.moe_layers.index(layer)
        filled = plan.filled[row]
        return cls(
            plan.physical_to_logical[row, filled],
            plan.slot_device[filled],
            plan.shares[row, filled],
            plan.topology.node_of,
            plan.model.experts,
        )

    @property
    def devices(self) -> int:
        return len(self.node_of)

    @cached_property
    def replicas(self) -> IntArray:
        """[E] slots of each expert."""
        return np.bincount(self.expert, minlength=self.experts)

    @cached_property
    def slots_of(self) -> IntArray:
        """[E, R] slots of each expert in increasing order, padded with -1."""
        result = np.full((self.experts, int(self.replicas.max())), -1, dtype=np.int64)
        filled = np.zeros(self.experts, dtype=np.int64)
        for slot, expert in enumerate(self.expert):
            result[expert, filled[expert]] = slot
            filled[expert] += 1
        return result

    def on_device(self, device: int) -> IntArray:
        """The slots of a device, in increasing order."""
        return np.flatnonzero(self.device == device)

    def with_slots(self, expert: IntArray, device: IntArray, share: FloatArray) -> LayerPlacement:
        """The same layer with more slots, appended behind the others of their devices."""
        devices = np.concatenate([self.device, device])
        order = np.argsort(devices, kind="stable")
        return LayerPlacement(
            np.concatenate([self.expert, expert])[order],
            devices[order],
            np.concatenate([self.share, share])[order],
            self.node_of,
            self.experts,
        )

    def quota(self, device: int) -> FloatArray:
        """[E, R] of `device`'s tokens for an expert, the part that each of its slots serves; rows sum to 1.

        Every device is taken to have as many tokens for the expert. Slots on the device itself are filled first, then
        those in its node, then the rest, each in proportion to what is left; so every slot gets its share in total, and
        no token travels further than the shares ask for.
        """
        result = np.zeros(self.slots_of.shape)
        single = self.replicas == 1
        result[single, 0] = 1.0
        for expert in np.flatnonzero(~single):
            slots = self.slots_of[expert, : self.replicas[expert]]
            result[expert, : len(slots)] = self._flow(slots)[device]
        return result

    def _flow(self, slots: IntArray) -> FloatArray:
        """[G, slots] part of each device's tokens that goes to each slot."""
        left = np.ones(self.devices)
        capacity = self.share[slots] * self.devices
        flow = np.zeros((self.devices, len(slots)))
        near = self.node_of[:, None] == self.node_of[self.device[slots]][None, :]
        own = np.arange(self.devices)[:, None] == self.device[slots][None, :]
        for allowed, regions in ((own, np.arange(self.devices)), (near, self.node_of), (np.ones_like(near), None)):
            labels = np.zeros(self.devices, dtype=np.int64) if regions is None else regions
            for label in np.unique(labels):
                rows = np.flatnonzero(labels == label)
                columns = np.flatnonzero(allowed[rows[0]])
                supply, demand = left[rows].sum(), capacity[columns].sum()
                if supply <= 1e-12 or demand <= 1e-12:
                    continue
                moved = min(supply, demand) * np.outer(left[rows] / supply, capacity[columns] / demand)
                flow[np.ix_(rows, columns)] += moved
                left[rows] -= moved.sum(axis=1)
                capacity[columns] -= moved.sum(axis=0)
        return np.asarray(flow / flow.sum(axis=1, keepdims=True))
