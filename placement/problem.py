"""Everything a solver is given, checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .failures import Failure, failure_mask
from .model import ModelSpec
from .objective import Objective
from .plan import Plan
from .statistics import RoutingStatistics
from .topology import Topology

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Problem:
    """Place the experts of `model` on the devices of `topology`, given `statistics`, to minimise `objective`.

    slots: P, physical slots a layer (default: one an expert), dealt evenly; the first P mod G devices get one more.
    device_slots: [G] slots of each device instead, when they are to differ.
    pinned: (layer, expert) -> device that must hold it. forbidden: (layer, expert) -> devices that must not. Layers
    count MoE layers from 0.
    current: the plan in force, where a solver may start. max_moved_bytes: most bytes of expert weights that may travel to
    get from it to the answer, an expert counting once for every device that does not hold it yet.
    tolerates: failures (see `single_failures`) in each of which every expert of every layer must keep a replica.
    """

    model: ModelSpec
    topology: Topology
    statistics: RoutingStatistics
    objective: Objective = field(default_factory=Objective)
    slots: int | None = None
    device_slots: Sequence[int] | None = None
    pinned: Mapping[tuple[int, int], int] = field(default_factory=dict)
    forbidden: Mapping[tuple[int, int], Sequence[int]] = field(default_factory=dict)
    tolerates: Sequence[Failure] = ()
    current: Plan | None = None
    max_moved_bytes: float | None = None

    def __post_init__(self) -> None:
        self._check_same_model()
        self._check_slots()
        self._check_tolerates()
        self._check_current()
        devices = self.num_devices
        for name, entries in (("pinned", {k: [v] for k, v in self.pinned.items()}), ("forbidden", self.forbidden)):
            for (layer, expert), targets in entries.items():
                inside = 0 <= layer < self.model.layers and 0 <= expert < self.model.experts
                if not inside or any(not 0 <= device < devices for device in targets):
                    raise InputError(
                        f"Problem.{name}[{layer}, {expert}] = {targets}: layer, expert or device out of range "
                        f"({self.model.layers} layers, {self.model.experts} experts, {devices} devices)"
                    )

    def _check_same_model(self) -> None:
        model, statistics = self.model, self.statistics
        given = {
            "experts": (statistics.experts, model.experts),
            "layers": (statistics.num_layers, model.layers),
            "moe_layers": (statistics.moe_layers, model.moe_layers),
            "top_k": (statistics.top_k or model.top_k, model.top_k),
        }
        for name, (recorded, expected) in given.items():
            if recorded != expected:
                hint = "; give ModelSpec the same moe_layers" if name == "moe_layers" else ""
                raise InputError(
                    f"the routing was recorded on another model: {name} is {recorded}, "
                    f"ModelSpec.{name} is {expected}{hint}"
                )

    def _check_slots(self) -> None:
        if self.device_slots is not None:
            if len(self.device_slots) != self.num_devices or min(self.device_slots) < 0:
                raise InputError(
                    f"Problem.device_slots {list(self.device_slots)} must name {self.num_devices} "
                    "non-negative slot counts, one a device"
                )
            if self.slots is not None and self.slots != sum(self.device_slots):
                raise InputError(
                    f"Problem.slots ({self.slots}) is not the sum of device_slots ({sum(self.device_slots)})"
                )
        if self.num_slots < self.model.experts:
            raise InputError(
                f"Problem.slots ({self.num_slots}) must be at least the number of experts "
                f"({self.model.experts}): every expert needs a slot in every layer"
            )
        needed = self.slots_per_device * self.model.bytes_per_expert * self.model.layers
        for device in np.flatnonzero(needed > self.topology.memory):
            raise InputError(
                f"device {device} would hold {needed[device] / 1e9:.1f} GB of experts in its "
                f"{self.slots_per_device[device]} slots a layer, its memory is {self.topology.memory[device] / 1e9:.1f} GB; "
                "use fewer slots, more devices, or a smaller expert_dtype"
            )

    def _check_tolerates(self) -> None:
        exposed = failure_mask(self.tolerates, self.num_devices).any(axis=0)
        alone = min(int(self.slots_per_device[~exposed].sum()), self.model.experts)
        needed = 2 * self.model.experts - alone
        if len(self.tolerates) and self.num_slots < needed:
            raise InputError(
                f"Problem.tolerates names failures of {int(exposed.sum())} of {self.num_devices} devices: at most "
                f"{alone} experts can do with one replica, so at least {needed} slots a layer are needed, "
                f"given {self.num_slots}"
            )

    def _check_current(self) -> None:
        current, limit = self.current, self.max_moved_bytes
        if current is not None:
            theirs, ours = ((model.experts, model.moe_layers) for model in (current.model, self.model))
            if theirs != ours:
                raise InputError(
                    f"Problem.current places {theirs[0]} experts in layers {theirs[1]}, the problem has {ours[0]} in "
                    f"{ours[1]}"
                )
            if current.topology.num_devices != self.num_devices:
                raise InputError(
                    f"Problem.current is for {current.topology.num_devices} devices, the topology has {self.num_devices}"
                )
        if limit is not None:
            if current is None:
                raise InputError(f"Problem.max_moved_bytes ({limit:g}) needs Problem.current, the plan to move from")
            if not limit >= 0:
                raise InputError(f"Problem.max_moved_bytes ({limit}) must be at least 0, or None for no limit")

    @property
    def max_moves(self) -> int | None:
        """Experts that may reach a device that does not hold them in the current plan, over all layers; None: any."""
        if self.max_moved_bytes is None:
            return None
        most = self.model.layers * self.num_slots
        # What is exactly so many experts' bytes must not lose one to rounding.
        return int(min(most, np.floor(self.max_moved_bytes / self.model.bytes_per_expert * (1 + 1e-12))))

    @property
    def num_devices(self) -> int:
        return self.topology.num_devices

    @property
    def num_slots(self) -> int:
        """P, slots a layer."""
        if self.device_slots is not None:
            return int(sum(self.device_slots))
        return self.model.experts if self.slots is None else self.slots

    @property
    def has_replicas(self) -> bool:
        return self.num_slots > self.model.experts

    @cached_property
    def slots_per_device(self) -> IntArray:
        """[G] slots a layer on each device."""
        if self.device_slots is not None:
            return np.asarray(self.device_slots, dtype=np.int64)
        return even_slots(self.num_slots, self.num_devices)

    @cached_property
    def slot_device(self) -> IntArray:
        """[P] the device owning each slot; a device owns a run of slots."""
        return np.repeat(np.arange(self.num_devices), self.slots_per_device)


def even_slots(slots: int, devices: int) -> IntArray:
    """[G] slots dealt evenly, the first `slots % devices` devices taking one more."""
    return np.full(devices, slots // devices, dtype=np.int64) + (np.arange(devices) < slots % devices)
