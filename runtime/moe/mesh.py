"""The ranks that share experts: device g of a plan is rank g of the mesh, counted row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..._types import IntArray
from ...placement.errors import InputError, UnsupportedError
from ...placement.topology import Topology

STAGES = "pp"
"""Dimension of a device mesh along which ranks hold different layers, as torchtitan and Transformers name it."""


class Stage(NamedTuple):
    """One exchange between the ranks of a group. devices: theirs, in order of rank. peer_G: [G] the rank of the group
    through which each device is reached."""

    group: dist.ProcessGroup
    devices: IntArray
    peer_G: IntArray


def node_stages(
    inter: dist.ProcessGroup, intra: dist.ProcessGroup, rank: int, size: int, node_size: int
) -> list[Stage]:
    """First between the ranks of `rank`'s place on all nodes (inter), then inside its node (intra)."""
    device_NS = np.arange(size).reshape(-1, node_size)
    node, place = divmod(rank, node_size)
    return [
        Stage(inter, device_NS[:, place], np.arange(size) // node_size),
        Stage(intra, device_NS[node], np.arange(size) % node_size),
    ]


@dataclass(frozen=True, eq=False)
class ExpertMesh:
    """Process groups of expert parallelism.

    group: all ranks of the mesh. rank: this process's place in it, the plan's device number. inter, intra: on a mesh of
    [nodes, devices a node], the ranks of equal place on each node, and the ranks of this node; None on a mesh of one
    dimension. members: global rank of each device.
    """

    mesh: DeviceMesh
    group: dist.ProcessGroup
    rank: int
    size: int
    members: tuple[int, ...]
    inter: dist.ProcessGroup | None = None
    intra: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, mesh: DeviceMesh | ExpertMesh) -> ExpertMesh:
        """The groups of a device mesh of one dimension (devices) or two (nodes, devices a node).

        Raises:
            InputError: this rank is not in the mesh, its ranks do not increase, or it has three dimensions or more.
        """
        if isinstance(mesh, ExpertMesh):
            return mesh
        members = tuple(mesh.mesh.flatten().tolist())
        if mesh.ndim > 2:
            raise InputError(
                f"mesh has {mesh.ndim} dimensions {tuple(mesh.mesh.shape)}; give its expert-parallel part: one "
                "dimension of devices, or two: nodes and devices a node"
            )
        if dist.get_rank() not in members:
            raise InputError(f"rank {dist.get_rank()} is not in the mesh of ranks {list(members)}")
        if list(members) != sorted(members):
            raise InputError(f"the mesh's ranks {list(members)} must increase: device g of the plan is its g-th rank")
        rank = members.index(dist.get_rank())
        if mesh.ndim == 1:
            return cls(mesh, mesh.get_group(), rank, len(members), members)
        whole = members == tuple(range(dist.get_world_size()))
        world = dist.group.WORLD if whole else dist.new_group(list(members), use_local_synchronization=True)
        assert world is not None
        return cls(mesh, world, rank, len(members), members, mesh.get_group(0), mesh.get_group(1))

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        kind = self.mesh.device_type
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    @property
    def node_size(self) -> int:
        """Devices a node, on a mesh of two dimensions."""
        return int(self.mesh.mesh.shape[-1])

    @property
    def nested(self) -> bool:
        """Whether there are several nodes of several devices."""
        return self.inter is not None and 1 < self.node_size < self.size

    def stages(self, two_stage: bool) -> list[Stage]:
        """The exchanges, in order, that bring something to any device; those between one rank are left out.

        two_stage: first between ranks of equal place on the nodes, then inside the node.

        Raises:
            InputError: two stages on a mesh of one dimension.
        """
        if not two_stage:
            stages = [Stage(self.group, np.arange(self.size), np.arange(self.size))]
        elif self.inter is None or self.intra is None:
            raise InputError(
                "dispatch in two stages needs a mesh of two dimensions, nodes and devices a node: "
                "init_device_mesh(kind, (nodes, devices), mesh_dim_names=('node', 'device'))"
            )
        else:
            stages = node_stages(self.inter, self.intra, self.rank, self.size, self.node_size)
        return [stage for stage in stages if len(stage.devices) > 1]

    def check_covers_world(self) -> None:
        """Raises UnsupportedError unless the mesh has all ranks of the world, or all of this rank's pipeline stage.

        Stages are those of a dimension named "pp" of the mesh that this one was sliced from.
        """
        root = self.mesh._get_root_mesh()
        names, ranks = root.mesh_dim_names or (), root.mesh
        stages = names.index(STAGES) if STAGES in names and root is not self.mesh else None
        needed = set(range(dist.get_world_size()))
        if stages is not None and set(ranks.flatten().tolist()) == needed:
            here = (ranks == self.members[self.rank]).nonzero()[0, stages]
            needed = set(ranks.select(stages, int(here)).flatten().tolist())
        missing = sorted(needed - set(self.members))
        if missing:
            raise UnsupportedError(
                f"the mesh has the ranks {_short(self.members)}, but not {_short(missing)}: expert gradients would "
                "never be summed with theirs, for data parallelism of experts does not exist yet. Give a mesh of all "
                "ranks (more replicas in the plan serve the same end), or, with pipeline stages, one sliced from a "
                f"mesh with a dimension named {STAGES!r}, of all ranks of the stage"
            )

    def check_topology(self, topology: Topology) -> None:
        """Raises InputError unless the topology has this mesh's ranks and, in two dimensions, its nodes."""
        if topology.num_devices != self.size:
            raise InputError(
                f"the plan is for {topology.num_devices} devices, the mesh has {self.size} ranks; solve again with a "
                "topology of as many devices as ranks"
            )
        if self.inter is not None and set(topology.node_size.tolist()) != {self.node_size}:
            raise InputError(
                f"the mesh has {self.mesh.mesh.shape[0]} nodes of {self.node_size} ranks, the plan's topology nodes of "
                f"{topology.node_size.tolist()} devices; give a mesh of one dimension for nodes of different sizes"
            )


def _short(ranks: Sequence[int]) -> str:
    return f"{list(ranks[:8])}" if len(ranks) <= 8 else f"[{', '.join(map(str, ranks[:8]))}, ...]"
