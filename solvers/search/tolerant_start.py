"""A first placement of one layer in which every expert keeps a replica in each of some failures."""

from __future__ import annotations

import numpy as np

from ..._types import BoolArray, FloatArray, IntArray
from ...placement.errors import SolveError
from ..base import Budget
from ..mip import Program, ProgramBuilder, solve_program

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
    program = placement_program("placement that tolerates failures", np.zeros(allowed.shape), slots, allowed, failures)
    found = solve_program(program, Budget(seconds=PROGRAM_SECONDS), backend="highs")
    if found.stop == "interrupted":
        raise KeyboardInterrupt
    if found.values is None:
        wanted = f"a placement in which every expert keeps a replica in each of {len(failures)} failures"
        if found.infeasible:
            raise SolveError(
                f"{wanted} does not exist within these slots and devices; give more slots, or tolerate fewer failures"
            )
        raise SolveError(f"{wanted} was not found within {PROGRAM_SECONDS:g} s; give more slots")
    return np.asarray(found.values.reshape(allowed.shape) > 0.5)


def placement_program(name: str, cost: FloatArray, slots: IntArray, allowed: BoolArray, failures: BoolArray) -> Program:
    """One layer's placements without an expert twice on a device, x[e, g], at cost [E, G].

    slots: [G], all filled. allowed: [E, G]. failures: [F, G]; every expert keeps a replica in each.
    """
    builder = ProgramBuilder(name)
    held = builder.add_variables(allowed.shape, upper=allowed, cost=cost, integral=True)
    builder.add_rows(held.T, 1.0, slots, slots)
    builder.add_rows(held, 1.0, 1.0)
    for failure in failures:
        builder.add_rows(held[:, ~failure], 1.0, 1.0)
    return builder.build()
