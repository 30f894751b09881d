"""What may fail in a cluster, and what of a plan is then left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .._types import BoolArray
from .errors import InputError
from .plan import Plan
from .topology import Topology

Kind = Literal["device", "node"]
KINDS: tuple[Kind, ...] = ("device", "node")


@dataclass(frozen=True)
class Failure:
    """Devices lost together."""

    name: str
    """`device:3`, `node:1`, or several joined by `+`."""
    devices: tuple[int, ...]

    @classmethod
    def named(cls, name: str, topology: Topology) -> Failure:
        """The failure of that name: `device:3`, `node:1`, or `device:3+node:1` for losing them together.

        Raises:
            InputError: not of that form, or the topology has no such device or node.
        """
        lost: set[int] = set()
        for part in name.split("+"):
            kind, _, number = part.strip().partition(":")
            if kind not in KINDS or not number.isdecimal():
                raise InputError(f"failure {part!r} must be device:N or node:N, such as device:3")
            count = topology.num_devices if kind == "device" else topology.num_nodes
            if int(number) >= count:
                raise InputError(f"failure {part!r}: the topology has {kind}s 0 to {count - 1}")
            lost.update(_members(kind, int(number), topology))
        return cls("+".join(part.strip() for part in name.split("+")), tuple(sorted(lost)))


def single_failures(topology: Topology, kinds: Sequence[Kind] = KINDS) -> tuple[Failure, ...]:
    """The loss of each device, and of each node where there are several; what would leave no device is left out."""
    counts = {"device": topology.num_devices, "node": topology.num_nodes}
    return tuple(
        Failure(f"{kind}:{i}", _members(kind, i, topology))
        for kind in kinds
        if counts[kind] > 1
        for i in range(counts[kind])
    )


def failure_mask(failures: Sequence[Failure], devices: int) -> BoolArray:
    """[F, G] whether a failure takes a device, for F failures and G devices.

    Raises:
        InputError: a failure of a device that is not there, or of all devices; it is named.
    """
    mask = np.zeros((len(failures), devices), dtype=bool)
    for row, failure in zip(mask, failures, strict=True):
        if not failure.devices or not all(0 <= device < devices for device in failure.devices):
            raise InputError(f"failure {failure.name!r} takes devices {failure.devices}, there are 0 to {devices - 1}")
        row[list(failure.devices)] = True
        if row.all():
            raise InputError(f"failure {failure.name!r} takes all {devices} devices; no plan survives that")
    return mask


def lost_experts(plan: Plan, failure: Failure) -> BoolArray:
    """[L, E] experts of which a failure takes every replica."""
    holds = plan.holds.copy()
    holds[:, :, list(failure.devices)] = False
    return np.asarray(~holds.any(axis=2))


def survives(plan: Plan, failures: Sequence[Failure]) -> BoolArray:
    """[F] whether every expert of every layer keeps a replica in each failure."""
    return np.array([not lost_experts(plan, failure).any() for failure in failures], dtype=bool)


def _members(kind: str, number: int, topology: Topology) -> tuple[int, ...]:
    if kind == "device":
        return (number,)
    return tuple(int(device) for device in np.flatnonzero(topology.node_of == number))
