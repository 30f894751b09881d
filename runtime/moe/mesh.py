"""The ranks that share experts: device g of a plan is rank g of the mesh, counted row by row. Beside them may stand
copies of the whole, with the same experts on ranks of equal place: data parallelism of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..._types import IntArray
from ...placement.errors import InputError, UnsupportedError
from ...placement.topology import Topology

STAGES = "pp"
"""Dimension of a device mesh along which ranks hold different layers, as torchtitan and Transformers name it."""

TENSOR_PARALLEL = ("tp", "etp", "tensor", "model")
"""Dimensions along which each expert's matrices would be cut."""


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

    group: all ranks that a plan's devices are. rank: this process's place in it, the plan's device number. inter,
    intra: on a mesh of [nodes, devices a node], the ranks of equal place on each node, and the ranks of this node; None
    on a mesh of one dimension. members: global rank of each device. grid: [copies, devices] global ranks of all that
    hold the same layers; a row is a copy of all experts. data: the ranks of this column, which hold the same experts;
    None where there is one copy. pipeline: the ranks of equal place in all pipeline stages; None without stages.
    """

    mesh: DeviceMesh
    group: dist.ProcessGroup
    rank: int
    size: int
    members: tuple[int, ...]
    grid: IntArray
    inter: dist.ProcessGroup | None = None
    intra: dist.ProcessGroup | None = None
    data: dist.ProcessGroup | None = None
    pipeline: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, mesh: DeviceMesh | ExpertMesh) -> ExpertMesh:
        """The groups of a device mesh of one dimension (devices) or two (nodes, devices a node).

        Sliced from a mesh with more dimensions, those others are data parallelism, along which experts are the same, or
        pipeline stages ("pp"): `init_device_mesh(kind, (2, 8), mesh_dim_names=("dp", "ep"))["ep"]`.

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
        outer = _Outer.of(mesh)
        rank = members.index(dist.get_rank())
        data = _group(outer.grid[:, rank], outer.root, outer.data)
        pipeline = _group(outer.stages, outer.root, (STAGES,))
        if mesh.ndim == 1:
            return cls(mesh, mesh.get_group(), rank, len(members), members, outer.grid, data=data, pipeline=pipeline)
        whole = _group(np.array(members), mesh, ()) if len(members) > 1 else mesh.get_group(1)
        assert whole is not None
        inter, intra = mesh.get_group(0), mesh.get_group(1)
        return cls(mesh, whole, rank, len(members), members, outer.grid, inter, intra, data, pipeline)

    @property
    def copies(self) -> int:
        """How often each expert's place exists: ranks of the data-parallel axis."""
        return len(self.grid)

    @property
    def copy(self) -> int:
        """Which of the copies this rank is in: its row of the grid."""
        return int(np.argwhere(self.grid == self.members[self.rank])[0, 0])

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes for all: device 0 of the first copy."""
        return self.members[self.rank] == int(self.grid[0, 0])

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
        """Raises UnsupportedError unless the mesh has all ranks of the world, or all of this rank's pipeline stage, or
        was sliced from one that has.

        Stages are those of a dimension named "pp" of the mesh that this one was sliced from.
        """
        outer = _Outer.of(self.mesh)
        if outer.tensor_parallel:
            raise UnsupportedError(
                f"the mesh was sliced from one with a dimension {outer.tensor_parallel!r}: tensor parallelism inside "
                "experts does not exist here. Spread the experts over those ranks as well: a plan for all of them and "
                "a mesh without that dimension"
            )
        missing = sorted(set(range(dist.get_world_size())) - set(outer.root.mesh.flatten().tolist()))
        if missing or outer.partial:
            raise UnsupportedError(
                f"the mesh has the ranks {_short(self.members)}, but not "
                f"{_short(missing or sorted(set(range(dist.get_world_size())) - set(self.members)))}: expert gradients "
                "would never be summed with theirs. Give a mesh of all ranks, or one sliced from a mesh of all ranks, "
                "whose other dimensions are then data parallelism with the same experts, or pipeline stages "
                f"({STAGES!r}): init_device_mesh(kind, (2, 4), mesh_dim_names=('dp', 'ep'))['ep']"
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


class _Outer(NamedTuple):
    """Where a mesh stands in the mesh that it was sliced from.

    root: that one. grid: [copies, devices] ranks of this pipeline stage. stages: ranks of equal place in all stages.
    data: names of the dimensions along the copies. tensor_parallel: a dimension that cuts experts, or "". partial:
    whether the mesh has only some ranks of a dimension.
    """

    root: DeviceMesh
    grid: IntArray
    stages: IntArray
    data: tuple[str, ...]
    tensor_parallel: str
    partial: bool

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Self:
        root = mesh._get_root_mesh()
        members = mesh.mesh.flatten().numpy()
        ranks = root.mesh.numpy()
        names = root.mesh_dim_names or ("",) * ranks.ndim
        place = np.argwhere(np.isin(ranks, members))
        if root is mesh or len(place) != len(members):
            return cls(root, members[None], members[:0], (), "", False)
        varied = [axis for axis in range(ranks.ndim) if len(set(place[:, axis].tolist())) > 1]
        here = np.argwhere(ranks == dist.get_rank())[0]
        others = [axis for axis in range(ranks.ndim) if axis not in varied]
        stage = [axis for axis in others if names[axis] == STAGES]
        data = [axis for axis in others if axis not in stage and ranks.shape[axis] > 1]
        tensor = next((names[axis] for axis in data if names[axis] in TENSOR_PARALLEL), "")
        partial = int(np.prod([ranks.shape[axis] for axis in varied], dtype=int)) != len(members)
        along = tuple(slice(None) if axis in (*data, *varied) else int(here[axis]) for axis in range(ranks.ndim))
        order = [axis for axis in range(ranks.ndim) if axis in (*data, *varied)]
        part = np.transpose(ranks[along], [order.index(axis) for axis in (*data, *varied)])
        grid = part.reshape(-1, max(len(members), 1)).astype(np.int64)
        column = tuple(slice(None) if axis in stage else int(here[axis]) for axis in range(ranks.ndim))
        return cls(root, grid, ranks[column].reshape(-1), tuple(names[axis] for axis in data), tensor, partial)


def _group(ranks: IntArray, mesh: DeviceMesh, names: tuple[str, ...]) -> dist.ProcessGroup | None:
    """The process group of these ranks: of one dimension of the mesh where it is that, None for a single rank."""
    if len(ranks) < 2:
        return None
    if len(names) == 1:
        return mesh.get_group(names[0])
    if sorted(ranks.tolist()) == list(range(dist.get_world_size())):
        return dist.group.WORLD
    group = dist.new_group(sorted(ranks.tolist()), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group
