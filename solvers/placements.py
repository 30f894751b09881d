"""Every placement of one layer's experts, up to the relabelling of devices that are alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlacementSpace:
    """The placements of E experts on devices with `slots` [G] slots, E in all, one expert a slot.

    kind: what tells devices apart, one entry a device: two may be swapped throughout when slots and kind agree.
    """

    slots: tuple[int, ...]
    kind: tuple[Hashable, ...]

    @property
    def count(self) -> int:
        """How many placements there are, devices told apart: a multinomial coefficient."""
        left, result = sum(self.slots), 1
        for size in self.slots:
            result *= math.comb(left, size)
            left -= size
        return result

    @property
    def count_representatives(self) -> int:
        # A device that may be relabelled is not empty, so that relabelling never leaves a placement as it was.
        return self.count // math.prod(math.factorial(len(alike)) for alike in self._alike)

    @cached_property
    def _alike(self) -> list[list[int]]:
        """Devices in classes of interchangeable ones; an empty device stands alone."""
        classes: dict[Hashable, list[int]] = {}
        for device, (size, kind) in enumerate(zip(self.slots, self.kind, strict=True)):
            classes.setdefault((size, kind) if size else ("empty", device), []).append(device)
        return list(classes.values())

    @cached_property
    def relabellings(self) -> IntArray:
        """[H, G] relabellings[h, g] is the device that device g becomes; the first changes nothing."""
        result = []
        for images in itertools.product(*(itertools.permutations(alike) for alike in self._alike)):
            row = np.empty(len(self.slots), dtype=np.int64)
            for alike, image in zip(self._alike, images, strict=True):
                row[alike] = image
            result.append(row)
        return np.array(result)

    @cached_property
    def representatives(self) -> IntArray:
        """[R, E] device of each expert: of the placements that relabelling turns into each other, the one whose
        interchangeable devices stand in the order of their first experts."""
        opens_after = np.full(len(self.slots), -1)
        for alike in self._alike:
            opens_after[alike[1:]] = alike[:-1]
        full = np.array(self.slots)
        room = full[None].astype(np.int16)
        placed = np.empty((1, 0), dtype=np.int16)
        for _ in range(sum(self.slots)):
            opened = (opens_after < 0) | (room[:, opens_after] < full[opens_after])
            parent, device = np.nonzero((room > 0) & opened)
            placed = np.column_stack([placed[parent], device.astype(np.int16)])
            room = room[parent]
            room[np.arange(len(room)), device] -= 1
        return placed.astype(np.int64)


def device_sets(device_of: IntArray, devices: int) -> npt.NDArray[np.bool_]:
    """[R, G, E] which experts stand on each device, from [R, E] the device of each expert."""
    return np.asarray(device_of[:, None, :] == np.arange(devices)[:, None])
