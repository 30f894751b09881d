"""A first placement of one layer in which every expert keeps a replica in each of some failures."""

from __future__ import annotations

import numpy as np

from ..._types import BoolArray, FloatArray, IntArray
from ...placement.errors import SolveError

PROGRAM_SECONDS = 30.0
"""For the integer program that takes over where dealing fails; it settles a layer of 256 experts in a few."""


def tolerant_layer(load: FloatArray, slots_per_device: IntArray, allowed: BoolArray, failures: BoolArray) -> IntArray:
    """[P] expert of each slot (slots ordered by device), no expert twice on a device.

    load: [E]. allowed: [E, G]. failures: [F, G]; no expert may stand only on the devices of one of them.

    Raises:
        SolveError: no such placement exists, or none was found in time; the message says which.
    """
    holds = _dealt(load, slots_per_device, allowed, failures)
    if holds is None:
        holds = _programmed(slots_per_device, allowed, failures)
    return np.concatenate([np.flatnonzero(column) for column in holds.T]).astype(np.int64)


def _dealt(load: FloatArray, slots: IntArray, allowed: BoolArray, failures: BoolArray) -> BoolArray | None:
    """[E, G] by dealing replicas to the devices with most free slots, or None where that ends in a corner."""
    counts = _replicas(load, slots, allowed, failures)
    if counts is None:
        return None
    exposed = failures.any(axis=0)
    weight = load / counts
    holds = np.zeros(allowed.shape, dtype=bool)
    free, loaded = slots.copy(), np.zeros(len(slots))
    for expert in sorted(range(len(load)), key=lambda e: (counts[e] > 1, allowed[e].sum(), -weight[e], e)):
        for _ in range(int(counts[expert])):
            fits = allowed[expert] & ~holds[expert] & (free > 0)
            if counts[expert] == 1:
                fits &= ~exposed
            elif holds[expert].any():
                # Failures that would take all replicas dealt so far: stay clear of them.
                fatal = failures[:, holds[expert]].all(axis=1)
                fits &= ~failures[fatal].any(axis=0)
            if not fits.any():
                return None
            most = fits & (free == free[fits].max())
            device = int(np.argmin(np.where(most, loaded, np.inf)))
            holds[expert, device] = True
            free[device] -= 1
            loaded[device] += weight[expert]
    return holds


def _replicas(load: FloatArray, slots: IntArray, allowed: BoolArray, failures: BoolArray) -> IntArray | None:
    """[E] replicas: one for the lightest where slots are short, else two, and the rest to whoever has most load each."""
    experts, total, most = len(load), int(slots.sum()), allowed.sum(axis=1)
    counts = np.full(experts, 2, dtype=np.int64)
    single = max(0, 2 * experts - total)
    safe = np.flatnonzero((allowed & ~failures.any(axis=0)).any(axis=1))
    # Who may stand on one device only has no choice; then the lightest.
    lightest = sorted(safe.tolist(), key=lambda e: (most[e] > 1, load[e], e))
    counts[lightest[:single]] = 1
    if (counts > most).any() or len(lightest) < single:
        return None
    for _ in range(total - int(counts.sum())):
        room = (counts < most) & (counts > 1)
        if not room.any():
            return None
        counts[int(np.argmax(np.where(room, load / counts, -1.0)))] += 1
    return counts


def _programmed(slots: IntArray, allowed: BoolArray, failures: BoolArray) -> BoolArray:
    """[E, G] by an integer program, which also proves that there is none."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import eye, kron

    experts, devices = allowed.shape
    each, ones = eye(experts, format="csr"), np.ones((1, devices))
    constraints = [
        LinearConstraint(kron(np.ones((1, experts)), eye(devices)), slots, slots),
        LinearConstraint(kron(each, ones), 1, devices),
        *(LinearConstraint(kron(each, (~failure).astype(float)[None]), 1, devices) for failure in failures),
    ]
    solved = milp(
        np.zeros(experts * devices),
        integrality=np.ones(experts * devices),
        bounds=Bounds(0.0, allowed.ravel().astype(float)),
        constraints=constraints,
        options={"time_limit": PROGRAM_SECONDS},
    )
    if solved.x is None:
        wanted = f"a placement in which every expert keeps a replica in each of {len(failures)} failures"
        if solved.status == 2:
            raise SolveError(
                f"{wanted} does not exist within these slots and devices; give more slots, or tolerate fewer failures"
            )
        raise SolveError(f"{wanted} was not found within {PROGRAM_SECONDS:g} s; give more slots")
    return np.asarray(solved.x.reshape(experts, devices) > 0.5)
