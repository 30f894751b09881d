"""What each rank does in test_expert_data_parallel.py."""

from __future__ import annotations

import os
import signal
import time
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from random_plans import SPEC, logical_weights, random_plan
from ranks import join_group
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import moeplace as mp
from moeplace.runtime.moe.data_parallel import clip_grad_norm_, exclude_from_ddp, expert_layers, no_sync
from moeplace.runtime.moe.expert_mlps import SwiGLU
from moeplace.runtime.moe.experts import ExpertShards
from moeplace.runtime.moe.layer import ExpertParallelMoE, SoftmaxRouter, reference_experts
from moeplace.runtime.moe.muon import Muon

STEPS, CHANGED, SAVED = 7, 2, 4
"""Optimizer steps; before which the plan changes, and before which a checkpoint is written."""
NORM = 0.05


def plan_of(number: int, devices: int) -> mp.Plan:
    return random_plan(np.random.default_rng([31, number]), 1, devices, most_extra=6)


def batch(step: int, part: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 100 * part + rank)
    return torch.randn(4 + rank, SPEC.hidden_size, generator=generator)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = (model(x) - x.roll(1, dims=1)).square().mean()
    return loss


class Whole(nn.Module):
    """The layer in one process, one token and expert at a time."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.gate = SoftmaxRouter(SPEC.hidden_size, SPEC.experts, SPEC.top_k)
        shapes = SwiGLU().shapes(SPEC)
        self.experts = nn.ParameterDict(logical_weights(seed, shapes, SPEC.experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        _, weight_TK, expert_TK = self.gate(x_TD)
        return x_TD + reference_experts(x_TD, expert_TK, weight_TK, self.experts, SwiGLU())


class Block(ExpertParallelMoE):
    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD + super().forward(x_TD)


def whole_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Whole(seed) for seed in (0, 1)))


def spread_model(plan: mp.Plan, mesh: Any, shard_experts: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(SPEC, plan, mesh, layer, shard_experts=shard_experts) for layer in SPEC.moe_layers))
    for seed, (_, experts) in enumerate(expert_layers(model)):
        experts.load_logical(logical_weights(seed, SwiGLU().shapes(SPEC), SPEC.experts))
    whole = whole_model()
    for block, other in zip(model, whole, strict=True):
        block.gate.load_state_dict(other.gate.state_dict())
    return model


def reference(world: int, parts: int) -> dict[str, Any]:
    """The whole model in one process on all ranks' batches."""
    model = whole_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(0.0)
        for part in range(parts):
            for rank in range(world):
                loss = loss_of(model, batch(step, part, rank)) / world / parts
                loss.backward()
                losses[-1] += float(loss.detach())
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), NORM)))
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norms": norms, "weights": [dict(layer.experts) for layer in model]}


class Run:
    """Training of the spread model under DDP, in `parts` micro-batches a step."""

    def __init__(self, rank: int, model: nn.Module, parts: int) -> None:
        self.rank, self.model, self.parts = rank, model, parts
        exclude_from_ddp(model)
        self.parallel = nn.parallel.DistributedDataParallel(model)
        self.optimizer = torch.optim.AdamW(self.parallel.parameters(), lr=3e-3)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self, step: int) -> None:
        total = torch.zeros(())
        for part in range(self.parts):
            if part < self.parts - 1:
                with self.parallel.no_sync(), no_sync(self.model):
                    loss = loss_of(self.parallel, batch(step, part, self.rank)) / self.parts
                    loss.backward()
            else:
                loss = loss_of(self.parallel, batch(step, part, self.rank)) / self.parts
                loss.backward()
            total += loss.detach()
        dist.all_reduce(total)
        self.losses.append(float(total) / dist.get_world_size())
        self.norms.append(float(clip_grad_norm_(self.model, NORM)))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def worst(self, expected: list[dict[str, Tensor]]) -> float:
        """Largest difference of an expert's weights from the reference's."""
        worst = 0.0
        for (_, layer), weights in zip(expert_layers(self.model), expected, strict=True):
            for name, value in layer.named_parameters(recurse=False):
                difference = layer.joined(value) - weights[name][torch.from_numpy(layer.row_expert)]
                worst = max(worst, float(difference.abs().max()) if len(value) else 0.0)
        return worst


def same_bits(model: nn.Module) -> bool:
    """Whether all rows of one expert, on all ranks, hold the same bits."""
    mine = [
        (layer.layer, int(expert), [value[row].tolist() for value in whole])
        for _, layer in expert_layers(model)
        for whole in [[layer.joined(value) for value in layer.parameters(recurse=False)]]
        for row, expert in enumerate(layer.row_expert)
    ]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    seen: dict[tuple[int, int], Any] = {}
    return all(seen.setdefault((layer, expert), row) == row for part in every for layer, expert, row in part)


def training(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Two copies of two devices, or of halves of their experts, through a change of plan and a checkpoint that four
    devices, or the halves, then read."""
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "ep"))["ep"]
    found: dict[str, Any] = {}
    references: list[Any] = [{parts: reference(world, parts) for parts in (1, 3)} if rank == 0 else None]
    dist.broadcast_object_list(references)
    for parts, cut in ((1, False), (3, False), (1, True), (3, True)):
        expected = references[0][parts]
        run = Run(rank, spread_model(plan_of(0, world // 2), mesh, cut), parts)
        path = folder / f"checkpoint-{parts}-{cut}"
        for step in range(STEPS):
            if step == CHANGED:
                mp.apply(run.model, plan_of(1, world // 2), run.optimizer)
            if step == SAVED:
                mp.save_checkpoint(path, run.model, run.optimizer)
            run.step(step)
        flat = init_device_mesh("cpu", (world,))
        # What halves wrote is read by whole ones, and the other way about.
        later = (
            Run(rank, spread_model(plan_of(2, world), flat), parts)
            if cut or parts == 1
            else Run(rank, spread_model(plan_of(2, world // 2), mesh, True), parts)
        )
        mp.load_checkpoint(path, later.model, later.optimizer)
        for step in range(SAVED, STEPS):
            later.step(step)
        found[f"{parts}{' cut' * cut}"] = {
            "losses": [run.losses, expected["losses"]],
            "norms": [run.norms, expected["norms"]],
            "weights": run.worst(expected["weights"]),
            "bits": same_bits(run.model),
            "resumed": [later.losses, expected["losses"][SAVED:]],
            "resumed_weights": later.worst(expected["weights"]),
            "numbers": sum(value.numel() for _, layer in expert_layers(run.model) for value in layer.parameters()),
        }
    dist.destroy_process_group()
    return found


def cut(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Experts of which each of two copies has a half: what stays of whole ones, what copies add up, what is refused."""
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "ep"))["ep"]
    model = spread_model(plan_of(0, world // 2), mesh, True)
    wholes: list[weakref.ref[Any]] = []
    join = ExpertShards.join

    def watched(self: ExpertShards, part_SN: Tensor) -> Tensor:
        whole = join(self, part_SN)
        wholes.append(weakref.ref(whole.untyped_storage()))
        return whole

    ExpertShards.join = watched  # type: ignore[method-assign]
    x = batch(0, 0, rank)
    loss = loss_of(model, x)
    kept = sum(whole() is not None for whole in wholes)
    # The second copy has no tokens: it joins and adds up all the same.
    loss.backward()
    none = loss_of(model, x if rank < world // 2 else x[:0])
    none.nan_to_num().backward()
    model.zero_grad()
    stale = loss_of(model, x)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        next(value for _, layer in expert_layers(model) for value in layer.parameters()).add_(0.0)
    said = {}
    try:
        stale.backward()
    except mp.InputError as refusal:
        said["changed"] = str(refusal)
    model.zero_grad()
    half = model.bfloat16()
    with torch.no_grad():
        narrow = half(x.bfloat16()).float()
    odd = SPEC.replace(hidden_size=15)
    odd_plan = random_plan(np.random.default_rng(0), 1, world // 2, odd)
    for name, make in {
        "muon": lambda: Muon([value for _, layer in expert_layers(model) for value in layer.parameters()]),
        "online": lambda: Block(SPEC, plan_of(0, world // 2), mesh, 1, shard_experts=True, online_slots=1),
        "chunks": lambda: Block(SPEC, plan_of(0, world // 2), mesh, 1, shard_experts=True, chunks=2),
        "uneven": lambda: Block(odd, odd_plan, mesh, 1, shard_experts=True),
        "torch.save": lambda: torch.save(model.state_dict(), folder / f"{rank}.pt"),
    }.items():
        try:
            make()
        except (mp.UnsupportedError, mp.InputError) as refusal:
            said[name] = f"{type(refusal).__name__}: {refusal}"
    dist.destroy_process_group()
    return {"wholes": len(wholes), "kept": kept, "narrow": bool(narrow.isfinite().all()), "said": said}


def waiting(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Gradients under no_sync: how many messages, what a step without a summing backward says, and mixed orders."""
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "ep"))["ep"]
    run = Run(rank, spread_model(plan_of(3, world // 2), mesh), 1)
    counts = []
    for unsummed in (0, 3):
        sent: list[str] = []
        whole = {name: getattr(dist, name) for name in ("all_reduce", "all_to_all_single")}

        def counting(name: str, sent: list[str] = sent, whole: dict[str, Any] = whole) -> Any:
            return lambda *values, **named: (sent.append(name), whole[name](*values, **named))[1]

        x = batch(0, 0, rank)
        for _ in range(unsummed):
            with no_sync(run.model):
                loss_of(run.model, x).backward()
        loss = loss_of(run.model, x)
        for name in whole:
            setattr(dist, name, counting(name))
        loss.backward()
        for name, function in whole.items():
            setattr(dist, name, function)
        counts.append(len(sent))
        run.optimizer.zero_grad()
    said = ""
    with no_sync(run.model):
        loss_of(run.model, batch(0, 0, rank)).backward()
    try:
        run.optimizer.step()
    except mp.InputError as refusal:
        said = str(refusal)
    run.optimizer.zero_grad()
    orders = []
    for order in ([True, True, True], [True, False, True], [False, True, True], [False, False, True]):
        for part, summed in enumerate(order):
            if summed:
                loss_of(run.model, batch(9, part, rank)).backward()
            else:
                with no_sync(run.model):
                    loss_of(run.model, batch(9, part, rank)).backward()
        orders.append([value.grad.clone() for value in run.model[1].experts.parameters()])
        run.optimizer.zero_grad()
    worst = max(
        float((a - b).abs().max()) for other in orders[1:] for a, b in zip(orders[0], other, strict=True) if len(a)
    )
    dist.destroy_process_group()
    return {"messages": counts, "said": said, "orders": worst}


def meshes(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """What is data parallelism, what a stage, and what is refused."""
    join_group(rank, world, folder)
    shapes = {
        "dp": ((2, world // 2), ("dp", "ep"), ("ep",)),
        "two": ((2, 2, world // 4), ("dp_replicate", "dp_shard", "ep"), ("ep",)),
        "nodes": ((2, 1, world // 2), ("dp", "node", "device"), ("node", "device")),
        "pp": ((2, world // 2), ("pp", "ep"), ("ep",)),
        "pp_dp": ((2, 2, world // 4), ("pp", "dp", "ep"), ("ep",)),
        "tp": ((2, world // 2), ("tp", "ep"), ("ep",)),
    }
    found: dict[str, Any] = {}
    for name, (shape, names, part) in shapes.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)[part]
        devices = mesh.size()
        try:
            layer = mp.ExpertParallelMoE(SPEC, plan_of(4, devices), mesh, 4)
        except mp.UnsupportedError as refusal:
            found[name] = str(refusal)
            continue
        found[name] = layer.experts.mesh.grid.tolist()
    try:
        mp.ExpertParallelMoE(SPEC, plan_of(4, 2), torch.distributed.DeviceMesh("cpu", [0, 1]), 4)
    except (mp.UnsupportedError, mp.InputError) as refusal:
        found["alone"] = f"{type(refusal).__name__}: {refusal}"
    dp = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "ep"))["ep"]
    try:
        mp.ExpertParallelMoE(SPEC, plan_of(4 + (rank >= 2), world // 2), dp, 4)
    except mp.InputError as refusal:
        found["other_plan"] = str(refusal)
    dist.destroy_process_group()
    return found


def killed(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Rank 1 dies between two rounds of a migration: no copy changes its plan."""
    join_group(rank, world, folder, timeout=timedelta(seconds=20))
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "ep"))["ep"]
    run = Run(rank, spread_model(plan_of(0, world // 2), mesh), 1)
    before = run.model[0].experts.plan.fingerprint
    change = mp.Migration(run.model, plan_of(1, world // 2), run.optimizer, timeout=timedelta(seconds=4))
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    said = ""
    began = time.monotonic()
    try:
        change.advance()
    except mp.RankError as error:
        said = str(error)
    return {
        "said": said,
        "seconds": time.monotonic() - began,
        "kept": run.model[0].experts.plan.fingerprint == before,
    }


def norms(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Norms of several orders over pipeline stages of two ranks, against those of all gradients in one process."""
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("pp", "ep"))["ep"]
    plan = plan_of(3, world // 2)
    stage = SPEC.moe_layers[rank // 2]
    torch.manual_seed(rank // 2)
    spec = SPEC.replace(layers=1, moe_layers=(stage,))
    layer = Block(spec, plan.select([stage]), mesh, stage)
    loss_of(layer, batch(0, 0, 0)).backward()
    rows = {
        f"{stage}/{expert}/{name}": value.grad[row].tolist()
        for name, value in layer.experts.named_parameters()
        for row, expert in enumerate(layer.experts.row_expert.tolist())
    }
    rows[f"{stage}/gate"] = layer.gate.weight.grad.tolist()
    every: list[Any] = [None] * world
    dist.all_gather_object(every, rows)
    merged = {name: torch.tensor(value).flatten() for part in every for name, value in part.items()}
    flat = torch.cat(list(merged.values()))
    found: dict[str, Any] = {"norms": {}}
    for order in (1.0, 2.0, 3.0, float("inf")):
        norm = clip_grad_norm_(layer, float("inf"), order)
        found["norms"][str(order)] = [float(norm), float(torch.linalg.vector_norm(flat, order))]
    gradients = [value.grad.clone() for value in layer.parameters()]
    if rank == 1 and len(layer.experts.row_expert):
        layer.experts.down_proj.grad[0, 0, 0] = float("nan")
    held = torch.tensor(int(rank == 1 and len(layer.experts.row_expert)))
    dist.all_reduce(held)
    found["held"] = int(held)
    try:
        clip_grad_norm_(layer, 1.0, error_if_nonfinite=True)
        found["nonfinite"] = ""
    except RuntimeError as error:
        found["nonfinite"] = str(error)
    found["kept"] = (
        all(torch.equal(a, b.grad) for a, b in zip(gradients[1:], list(layer.parameters())[1:], strict=True))
        or rank == 1
    )
    try:
        mp.ExpertParallelMoE(spec, plan, mesh, stage)
        found["whole plan"] = ""
    except mp.InputError as refusal:
        found["whole plan"] = str(refusal)
    dist.destroy_process_group()
    return found
