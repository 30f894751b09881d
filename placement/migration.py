"""What it takes to go from one plan to another: which experts travel, how many bytes, for how long."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .._types import BoolArray, IntArray
from .cost import Flows, transfer_seconds
from .errors import InputError
from .plan import Plan
from .topology import Topology


@dataclass(frozen=True, eq=False)
class Migration:
    """Experts that must reach a device that does not hold them yet.

    layer, expert, source, target: [M] one entry a move, sources chosen inside the target's node where one holds the
    expert, the least busy one first; source -1 where no device holds it and it must be read from storage.
    bytes_moved: weights between devices. bytes_reloaded: weights from storage. seconds: of the moves between devices,
    on the links of the topology, all at once. restart: what the engine is started with anew to take the plan, empty
    where experts move while it runs. restart_seconds: in which it then serves nothing; None where that is not known.
    """

    layer: IntArray
    expert: IntArray
    source: IntArray
    target: IntArray
    bytes_moved: float
    seconds: float
    bytes_reloaded: float = 0.0
    restart: str = ""
    restart_seconds: float | None = None

    @property
    def moves(self) -> int:
        return len(self.layer)

    @property
    def stall(self) -> float | None:
        """Seconds in which nothing is served: of the moves, or of a restart, None where that is not known."""
        if not self.moves:
            return 0.0
        return self.restart_seconds if self.restart else self.seconds

    @property
    def text(self) -> str:
        """`moving 1.2 GB takes 0.3 s`, or `a restart with --init-expert-location takes 120 s`."""
        if not self.moves or not self.restart:
            return f"moving {self.bytes_moved / 1e9:.2f} GB takes {self.seconds:.3g} s"
        if self.restart_seconds is None:
            return (
                f"it is applied by a restart with {self.restart}, of unknown time: give restart_seconds "
                "(--restart-seconds)"
            )
        return f"a restart with {self.restart} takes {self.restart_seconds:.3g} s"

    def applied_by(self, restart: str, seconds: float | None) -> Migration:
        """The same moves on an engine that is started anew with `restart` (empty: that is not), in so many seconds."""
        return replace(self, restart=restart, restart_seconds=seconds if restart else None)


def migration(current: Plan, candidate: Plan, bytes_per_expert: float | None = None) -> Migration:
    """The moves from `current` to `candidate` on the same devices.

    Args:
        current: the plan in force.
        candidate: of the same model, on as many devices.
        bytes_per_expert: what travels an expert; default its weights (training adds optimizer state).

    Raises:
        InputError: the plans are for different models or numbers of devices.
    """
    if current.model.experts != candidate.model.experts or current.moe_layers != candidate.moe_layers:
        raise InputError("the two plans place different models; a migration needs the same experts and layers")
    if current.topology.num_devices != candidate.topology.num_devices:
        raise InputError(
            f"the plan in force is for {current.topology.num_devices} devices, the candidate for "
            f"{candidate.topology.num_devices}"
        )
    return migration_from(current.holds, candidate, bytes_per_expert)


def migration_from(holds: BoolArray, candidate: Plan, bytes_per_expert: float | None = None) -> Migration:
    """The moves to `candidate` from any state of its devices.

    Args:
        holds: [L, E, G] whether a device holds an expert now.
        candidate: the plan to reach.
        bytes_per_expert: what travels an expert; default its weights.

    Raises:
        InputError: `holds` is of another shape than the candidate's experts and devices.
    """
    target_holds = candidate.holds
    if holds.shape != target_holds.shape:
        raise InputError(f"holds has shape {holds.shape}, the candidate needs {target_holds.shape}")
    topology = candidate.topology
    size = candidate.model.bytes_per_expert if bytes_per_expert is None else bytes_per_expert
    layers, experts, targets = np.nonzero(target_holds & ~holds)
    sources = np.empty(len(layers), dtype=np.int64)
    sent = np.zeros(topology.num_devices)
    for i, (layer, expert, target) in enumerate(zip(layers, experts, targets, strict=True)):
        holders = np.flatnonzero(holds[layer, expert])
        if not len(holders):
            sources[i] = -1
            continue
        near = holders[topology.node_of[holders] == topology.node_of[target]]
        choice = near if len(near) else holders
        sources[i] = choice[np.argmin(sent[choice])]
        sent[sources[i]] += 1
    between = sources >= 0
    return Migration(
        layers,
        experts,
        sources,
        targets,
        bytes_moved=float(between.sum() * size),
        seconds=_seconds(sources[between], targets[between], topology, size),
        bytes_reloaded=float((~between).sum() * size),
    )


def _seconds(source: IntArray, target: IntArray, topology: Topology, size: float) -> float:
    """All moves [M] at once, each of `size` bytes, on the busiest link."""
    node, devices, nodes = topology.node_of, topology.num_devices, topology.num_nodes
    crossing = node[source] != node[target]
    inside = [np.bincount(end[~crossing], minlength=devices) for end in (source, target)]
    between = [np.bincount(node[end[crossing]], minlength=nodes) for end in (source, target)]
    flows = Flows(intra=np.maximum(*inside), inter=np.maximum(*between))
    return float(transfer_seconds(flows, size, topology, latency=0.0))
