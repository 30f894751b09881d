"""What each rank does in test_online_layer.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from expert_ranks import error, expected_of, tokens
from random_plans import SPEC, logical_weights
from ranks import join_group
from torch.distributed.device_mesh import init_device_mesh

import moeplace as mp
from moeplace.runtime.moe.expert_mlps import GELU, GptOss, SwiGLU
from moeplace.runtime.moe.experts import PlacedExperts

KINDS = (SwiGLU(), GELU(), GptOss())


def homes_plan(rng: np.random.Generator, nodes: int, per_node: int) -> mp.Plan:
    """A slot an expert, at random, ranks with different numbers of them, some with none."""
    cluster = mp.Topology.preset("h100-hgx", nodes=nodes, devices_per_node=per_node)
    devices = nodes * per_node
    table = np.stack([rng.permutation(SPEC.experts) for _ in range(SPEC.layers)])
    owners = np.sort(rng.integers(devices, size=SPEC.experts))
    return mp.Plan(SPEC, cluster, table, owners)


def equality(rank: int, world: int, folder: Path, plans: int = 16) -> dict[str, Any]:
    """Worst relative errors of outputs and gradients over random homes, tokens and settings; loads and copies."""
    join_group(rank, world, folder)
    meshes = {1: init_device_mesh("cpu", (world,)), 2: init_device_mesh("cpu", (2, world // 2))}
    worst: dict[str, float] = {}
    copied, even = 0, []
    for number in range(plans):
        rng = np.random.default_rng([7, number])
        gradients = "mean" if number % 3 == 0 else "sum"
        kind, layer = KINDS[number % len(KINDS)], number % 2
        experts = PlacedExperts(
            SPEC,
            homes_plan(rng, 1 + number % 2, world // (1 + number % 2)),
            meshes[1 + number % 2],
            SPEC.moe_layers[layer],
            kind=kind,
            gradients=gradients,
            online_slots=1 + number % 3,
            online_slack=0.0,
            chunks=1 + number // 2 % 2,
        )
        weights = logical_weights(number, kind.shapes(SPEC), SPEC.experts)
        experts.load_logical(weights)
        for turn in range(2):
            batch = tokens(rng, world, most=40)
            x = batch["x"][rank].clone().requires_grad_()
            gate = batch["gate"][rank].clone().requires_grad_()
            experts.zero_grad()
            out = experts(x, batch["ids"][rank], gate)
            (out * batch["up"][rank]).sum().backward()
            expected = expected_of(batch, weights, kind, 1.0 / world if gradients == "mean" else 1.0)
            found = {"out": out.detach(), "x": x.grad, "gate": gate.grad}
            for name, value in found.items():
                worst[name] = max(worst.get(name, 0.0), error(value, expected[name][rank]))
            for name, value in experts.named_parameters():
                rows = torch.from_numpy(experts.row_expert)
                assert turn or value.shape[0] == len(rows)
                worst[name] = max(worst.get(name, 0.0), error(value.grad, expected[name][rows]))
            assert experts.copies is not None
            prefetch = experts.copies.start(batch["ids"][rank], dict(experts.named_parameters()))
            prefetch.exchange.wait()
            copied += int(prefetch.plan.copies[0])
            loads, native = prefetch.plan.loads[0], np.zeros(world, dtype=np.int64)
            counts = torch.bincount(torch.cat(batch["ids"]).flatten(), minlength=SPEC.experts).numpy()
            np.add.at(native, prefetch.plan.homes[0], counts)
            even.append((int(loads.max()), int(native.max())))
            # What the plan says is what arrives.
            devices = experts.copies.placement.device[prefetch.slot_TK.numpy()]
            mine = torch.from_numpy(np.bincount(devices.ravel(), minlength=world))
            dist.all_reduce(mine)
            assert mine.tolist() == loads.tolist()
    dist.destroy_process_group()
    return {"worst": worst, "copied": copied, "even": even}


def moved_and_checkpointed(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """A layer whose homes move between two batches, and one under activation checkpointing; refusals on all ranks."""
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    rng = np.random.default_rng(3)
    first, second = homes_plan(rng, 1, world), homes_plan(rng, 1, world)
    layers = torch.nn.ModuleList(
        mp.ExpertParallelMoE(SPEC, first, mesh, layer, online_slots=2) for layer in SPEC.moe_layers
    )
    x = torch.from_numpy(np.random.default_rng(rank).standard_normal((50, SPEC.hidden_size))).float()

    def run() -> torch.Tensor:
        out = x
        for layer in layers:
            out = out + layer(out)
        return out

    before = run()
    mp.apply(layers, second)
    after = run()
    again = x
    for layer in layers:
        again = again + torch.utils.checkpoint.checkpoint(layer, again, use_reentrant=False)
    after.sum().backward()
    grads = [value.grad.clone() for value in layers.parameters()]
    layers.zero_grad()
    again.sum().backward()
    refused = []
    table = np.concatenate([first.physical_to_logical, first.physical_to_logical[:, :world]], axis=1)
    owners = np.concatenate([first.slot_device, np.arange(world)])
    order = np.argsort(owners, kind="stable")
    replicated = mp.Plan(SPEC, first.topology, table[:, order], owners[order])
    for build in (
        lambda: mp.ExpertParallelMoE(SPEC, replicated, mesh, SPEC.moe_layers[0], online_slots=1),
        lambda: mp.ExpertParallelMoE(
            SPEC, first, mesh, SPEC.moe_layers[0], online_slots=1, compression=mp.LSHCompression()
        ),
        lambda: mp.ExpertParallelMoE(SPEC, first, mesh, SPEC.moe_layers[0], online_slots=-1),
        lambda: mp.ExpertParallelMoE(SPEC, first, mesh, SPEC.moe_layers[0], online_slots=rank % 2 + 1),
        lambda: mp.apply(layers, replicated),
    ):
        try:
            build()
            refused.append("")
        except mp.MoeplaceError as error_:
            refused.append(str(error_))
    found = {
        "moved": error(after.detach(), before.detach()),
        "checkpointed": error(again.detach(), after.detach()),
        "gradients": max(error(a.grad, b) for a, b in zip(layers.parameters(), grads, strict=True)),
        "refused": refused,
    }
    dist.destroy_process_group()
    return found
