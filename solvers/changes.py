"""The changes of a cluster that somebody asks about, from their names and numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..placement.failures import Failure, single_failures
from ..placement.layer_slots import Slots, spanned
from ..placement.topology import Topology
from .what_if import Change


def changes_asked(
    cluster: Topology,
    *,
    lose: Sequence[str] = (),
    n_1: bool = False,
    devices: int | None = None,
    nodes: int | None = None,
    topology: Topology | None = None,
    slots: Slots | None = None,
) -> list[Change]:
    """Each change on its own; the loss of every single device and node where nothing else is asked.

    lose: failures by name (`Failure.named`). n_1: all single failures besides. devices, nodes: the plan's cluster with so
    many of them. topology: another cluster. slots: a layer of the ready plans, or one number for each layer;
    alone, a change of its own.

    Raises:
        InputError: a failure of what is not there, or a size that the cluster cannot have.
    """
    changes = []
    if topology is not None:
        changes.append(Change.moving(f"{topology.name}, {topology.num_devices} devices", topology, slots))
    if nodes is not None:
        resized = cluster.resized(nodes=nodes)
        changes.append(Change.resizing(f"{nodes} node{'s' if nodes > 1 else ''}", cluster, resized, slots))
    if devices is not None:
        resized = cluster.resized(devices=devices)
        changes.append(Change.resizing(f"{devices} device{'s' if devices > 1 else ''}", cluster, resized, slots))
    failures = [Failure.named(name, cluster) for name in lose]
    if slots is not None and not (changes or failures or n_1):
        return [Change.resizing(f"{spanned(np.asarray(slots))} slots", cluster, cluster, slots)]
    if n_1 or not (changes or failures):
        failures += [failure for failure in single_failures(cluster) if failure not in failures]
    return changes + [Change.losing(failure, cluster, slots) for failure in failures]
