"""A first placement of one layer: replicas where load is, heaviest first to the least loaded device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...placement.errors import SolveError
from ...placement.problem import Problem
from ..compiled import kernel

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def balanced_layer(
    load: FloatArray, slots_per_device: IntArray, speed: FloatArray, allowed: npt.NDArray[np.bool_]
) -> IntArray:
    """[P] expert of each slot (slots ordered by device), no expert twice on a device.

    load: [E]. speed: [G] relative compute rates. allowed: [E, G].

    Raises:
        SolveError: the pinned and forbidden devices leave no placement that this finds.
    """
    devices = len(slots_per_device)
    choices = allowed.sum(axis=1)
    copies = replicate(load, int(slots_per_device.sum()), np.minimum(choices, devices))
    count = np.bincount(copies, minlength=len(load))
    weight = load / count
    holds = np.zeros((len(load), devices), dtype=bool)
    order = copies[np.lexsort((copies, -weight[copies], choices[copies]))]
    if deal(order, weight, slots_per_device, speed, allowed, holds):
        return np.concatenate([np.flatnonzero(holds[:, g]) for g in range(devices)]).astype(np.int64)
    holds[:] = False
    free, loaded = slots_per_device.copy(), np.zeros(devices)
    for expert in order:
        fits = allowed[expert] & ~holds[expert] & (free > 0)
        if not fits.any():
            _make_room(expert, allowed, holds, free, loaded, weight, speed)
            continue
        device = int(np.argmin(np.where(fits, (loaded + weight[expert] / speed), np.inf)))
        holds[expert, device] = True
        free[device] -= 1
        loaded[device] += weight[expert] / speed[device]
    return np.concatenate([np.flatnonzero(holds[:, g]) for g in range(devices)]).astype(np.int64)


def even_shares(problem: Problem, tables: Sequence[IntArray]) -> list[FloatArray]:
    """[E, G] a layer, equal shares of the experts in its own slots [P_l]."""
    return [even_layer_share(problem, layer, table) for layer, table in enumerate(tables)]


def even_layer_share(problem: Problem, layer: int, table: IntArray) -> FloatArray:
    """[E, G] equal shares of the experts in a layer's own slots [P_l]."""
    share = np.zeros((problem.model.experts, problem.num_devices))
    share[table, problem.layer_slot_device(layer)] = 1.0
    return np.asarray(share / share.sum(axis=1, keepdims=True))


@kernel
def deal(order: Any, weight: Any, slots_per_device: Any, speed: Any, allowed: Any, holds: Any) -> bool:
    """Deals replicas in `order` to the devices that stay least loaded, into `holds` [E, G]; False where one finds none."""
    free, loaded = slots_per_device.copy(), np.zeros(speed.shape[0])
    for expert in order:
        best, least = -1, np.inf
        for g in range(speed.shape[0]):
            after = loaded[g] + weight[expert] / speed[g]
            if allowed[expert, g] and not holds[expert, g] and free[g] > 0 and after < least:
                best, least = g, after
        if best < 0:
            return False
        holds[expert, best] = True
        free[best] -= 1
        loaded[best] = least
    return True


def replicate(load: FloatArray, slots: int, most: IntArray) -> IntArray:
    """[slots] experts, each at least once, spare slots to whoever has most load a replica, `most` [E] replicas each.

    Raises:
        SolveError: more slots than experts may have replicas.
    """
    if slots > int(most.sum()):
        raise SolveError(
            f"{slots} slots a layer, but only {int(most.sum())} replicas fit without standing twice on a device"
        )
    count = np.ones(len(load), dtype=np.int64)
    for _ in range(slots - len(load)):
        count[int(np.argmax(np.where(count < most, load / count, -1.0)))] += 1
    return np.repeat(np.arange(len(load)), count)


def _make_room(
    expert: int,
    allowed: npt.NDArray[np.bool_],
    holds: npt.NDArray[np.bool_],
    free: IntArray,
    loaded: FloatArray,
    weight: FloatArray,
    speed: FloatArray,
) -> None:
    """Puts `expert` on a full device by moving experts on, device by device, to one with a free slot: the shortest way."""
    came: dict[int, tuple[int, int]] = {
        int(device): (-1, expert) for device in np.flatnonzero(allowed[expert] & ~holds[expert])
    }
    queue = list(came)
    for device in queue:
        if free[device] > 0:
            free[device] -= 1
            while device >= 0:
                before, moved = came[device]
                holds[moved, device] = True
                loaded[device] += weight[moved] / speed[device]
                if before >= 0:
                    holds[moved, before] = False
                    loaded[before] -= weight[moved] / speed[before]
                device = before
            return
        for target in range(len(free)):
            movable = np.flatnonzero(holds[:, device] & ~holds[:, target] & allowed[:, target])
            if target not in came and len(movable):
                came[target] = device, int(movable[0])
                queue.append(target)
    raise SolveError(f"no device is left for expert {expert}: too many experts are pinned or forbidden")
