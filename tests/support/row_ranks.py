"""What each rank does in test_rows.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks import join_group
from torch import Tensor

import moeplace as mp
from moeplace.integrations.rows import ReplicaSums, RowExchange, RowMigration, Rows
from moeplace.runtime.moe.mesh import ExpertMesh

EXPERTS, LAYERS, SLOTS = 6, 2, 12


def mesh_of(world: int) -> ExpertMesh:
    from torch.distributed.device_mesh import init_device_mesh

    return ExpertMesh.of(init_device_mesh("cpu", (world,)))


def table(draw: np.random.Generator, world: int, size: int) -> Rows:
    """Rows of all experts and some more, on ranks in no order, some of which may have none."""
    expert = draw.permutation(np.concatenate([np.arange(EXPERTS), draw.integers(EXPERTS, size=size - EXPERTS)]))
    return Rows(expert, draw.integers(world, size=size))


def content(rows: Rows, rank: int, width: int) -> Tensor:
    expert = torch.from_numpy(rows.expert[rows.on(rank)]).float()
    return expert[:, None] * 10 + torch.arange(width)


def rows(rank: int, world: int, folder: Path) -> Any:
    join_group(rank, world, folder)
    mesh = mesh_of(world)
    draw = np.random.default_rng(7)
    right, sums, norms = 0, 0.0, 0.0
    for _ in range(20):
        source, target = table(draw, world, int(draw.integers(6, 12))), table(draw, world, int(draw.integers(6, 12)))
        values = [content(source, rank, 3), content(source, rank, 5).double()]
        exchange = RowExchange(source, target, mesh)
        found = exchange(values, chunk_bytes=16)
        right += torch.equal(found[0], content(target, rank, 3)) and torch.equal(
            found[1], content(target, rank, 5).double()
        )
        once = {(int(e), int(r)) for e, r in zip(target.expert, target.rank, strict=True)}
        held = {(int(e), int(r)) for e, r in zip(source.expert, source.rank, strict=True)}
        assert len(exchange.moves) == len(once - held)
        sum_error, norm_error = summed(target, mesh, draw)
        sums, norms = max(sums, sum_error), max(norms, norm_error)
    found = {"right": right, "sums": sums, "norms": norms, **migrated(mesh, world)}
    dist.destroy_process_group()
    return found


def summed(target: Rows, mesh: ExpertMesh, draw: np.random.Generator) -> tuple[float, float]:
    """Worst errors of the sums, and of the norm, against all rows added up in one place."""
    every = torch.from_numpy(draw.standard_normal((len(target.expert), 4)))
    whole = torch.zeros(EXPERTS, 4, dtype=torch.float64)
    whole.index_add_(0, torch.from_numpy(target.expert), every)
    here = torch.from_numpy(target.on(mesh.rank))
    grad = every[here].clone()
    replicas = ReplicaSums(target, mesh, EXPERTS)
    replicas.sum_([grad])
    square = grad.square().sum()
    dist.all_reduce(square)
    replicas.undo_([grad])
    error = (grad - whole[torch.from_numpy(target.expert)[here]]).abs()
    return float(error.max()) if len(error) else 0.0, float((square.sqrt() - whole.norm()).abs())


class Layer:
    """A layer whose rows are weights and one moment. fails: raises when asked for them; refuses: so does this."""

    def __init__(self, layer: int, plan: mp.Plan, mesh: ExpertMesh) -> None:
        self.layer, self.plan, self.mesh = layer, plan, mesh
        self.values = [content(self.rows(plan), mesh.rank, 3) + layer, content(self.rows(plan), mesh.rank, 2) - layer]
        self.fails = self.refuses = False

    def rows(self, plan: mp.Plan) -> Rows:
        return Rows(plan.physical_to_logical[plan.moe_layers.index(self.layer)], plan.slot_device)

    def tensors(self) -> list[Tensor]:
        if self.fails:
            raise RuntimeError("a rank without its memory")
        if self.refuses:
            raise mp.UnsupportedError("state of another shape")
        return self.values

    def write(self, tensors: Sequence[Tensor], rows: Sequence[int]) -> None:
        for own, value in zip(self.values, tensors, strict=True):
            own[list(rows)] = value[list(rows)]

    def put_in_force(self, plan: mp.Plan) -> None:
        self.plan = plan

    @property
    def right(self) -> bool:
        rows = self.rows(self.plan)
        expected = [content(rows, self.mesh.rank, 3) + self.layer, content(rows, self.mesh.rank, 2) - self.layer]
        return all(torch.equal(value, other) for value, other in zip(self.values, expected, strict=True))


def migrated(mesh: ExpertMesh, world: int) -> dict[str, Any]:
    spec = mp.ModelSpec(layers=LAYERS, experts=EXPERTS, top_k=2, hidden_size=4, ffn_size=4, moe_layers=(1, 4))
    topology = mp.Topology.preset("a100-pcie", devices_per_node=world)
    draw = np.random.default_rng(3)

    def plan() -> mp.Plan:
        extra = SLOTS - EXPERTS
        slots = [draw.permutation(np.r_[np.arange(EXPERTS), draw.integers(EXPERTS, size=extra)]) for _ in range(LAYERS)]
        return mp.Plan(spec, topology, np.stack(slots), slot_device=np.arange(SLOTS) * world // SLOTS)

    first, second, third = plan(), plan(), plan()
    layers = [Layer(layer, first, mesh) for layer in spec.moe_layers]
    change = RowMigration(layers, second, mesh)
    half = change.advance(limit_bytes=1)
    between = [layer.plan is change.plan for layer in layers]
    right = [layer.right for layer in layers]
    change.advance()
    same = np.array_equal(change.plan.device_share, second.device_share)
    stay = RowMigration(layers, dataclasses.replace(change.plan), mesh)
    result = {
        "half": [half, between, right, change.done, [layer.right for layer in layers], same],
        "bytes": change.bytes_moved == change.bytes_total > 0,
        "moves to the plan in force": stay.moves,
    }
    failing = RowMigration(layers, third, mesh)
    layers[1].fails = mesh.rank == 1
    try:
        failing.advance()
    except mp.RankError as error:
        result["failed"] = str(error)
    layers[1].fails = False
    result["after"] = [layer.right and layer.plan is change.plan for layer in layers]
    try:
        RowMigration(layers, second if mesh.rank else third, mesh)
    except mp.InputError as error:
        result["different"] = str(error)
    layers[0].refuses = mesh.rank == 2
    try:
        RowMigration(layers, second, mesh)
    except mp.MoeplaceError as error:
        result["one refuses"] = str(error)
    return result
