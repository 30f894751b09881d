"""Ranks of permuted models: modules named and shaped as Megatron-LM's and torchtitan's, run in processes of their
own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import moeplace as mp
from moeplace.runtime.permute.model import permute_model

EXPERTS, WIDTH, FFN, LAYERS = 8, 4, 6, (1, 3)


def plan(devices: int, seed: int = 0, groups: int = 1) -> mp.Plan:
    spec = mp.ModelSpec(
        layers=2, experts=EXPERTS, top_k=2, hidden_size=WIDTH, ffn_size=FFN, moe_layers=LAYERS, groups=groups
    )
    rng = np.random.default_rng(seed)
    table = np.stack([rng.permutation(EXPERTS) for _ in LAYERS])
    topology = mp.Topology.preset("h100-hgx", devices_per_node=devices)
    return mp.Plan(spec, topology, table, np.repeat(np.arange(devices), EXPERTS // devices))


class Values(torch.nn.Module):
    """Parameters and buffers by dotted name; each value names its expert, so that rows can be followed."""

    def __init__(self, tensors: dict[str, torch.Tensor], buffers: tuple[str, ...] = ()) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            module: torch.nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            if leaf in buffers:
                module.register_buffer(leaf, tensor)
            else:
                module.register_parameter(leaf, torch.nn.Parameter(tensor))


def marked(experts: range, *shape: int, layer: int) -> torch.Tensor:
    """[experts, *shape]: expert e of the layer filled with 100 * layer + e, and a little more that tells the
    element."""
    size = int(np.prod(shape))
    rows = torch.tensor([100.0 * layer + e for e in experts])[:, None] + torch.arange(size) / (2 * size)
    return rows.reshape(len(experts), *shape)


def megatron(form: str, local: range, prefix: str = "") -> Values:
    """A rank's part of a model, as megatron/core/transformer/moe/experts.py lays its experts out."""
    tensors: dict[str, torch.Tensor] = {"embedding.weight": torch.ones(3)}
    for layer in range(4):
        stem = f"{prefix}decoder.layers.{layer}."
        tensors[f"{stem}self_attention.linear_qkv.weight"] = torch.full((3,), float(layer))
        if layer not in LAYERS:
            tensors[f"{stem}mlp.linear_fc1.weight"] = torch.full((3,), float(layer))
            continue
        stem += "mlp."
        every = range(EXPERTS)
        tensors[f"{stem}router.weight"] = marked(every, WIDTH, layer=layer)
        tensors[f"{stem}router.bias"] = marked(every, layer=layer)
        tensors[f"{stem}router.expert_bias"] = marked(every, layer=layer)
        tensors[f"{stem}shared_experts.linear_fc1.weight"] = torch.full((3,), float(layer))
        first, second = marked(local, WIDTH, FFN, layer=layer), marked(local, FFN, WIDTH, layer=layer)
        if form == "grouped":
            tensors[f"{stem}experts.weight1"] = first.reshape(WIDTH, -1).clone()
            tensors[f"{stem}experts.weight2"] = second.reshape(-1, WIDTH).clone()
            continue
        for i in range(len(local)):
            names = (
                (f"{stem}experts.linear_fc1.weight{i}", f"{stem}experts.linear_fc2.weight{i}")
                if form == "te"
                else (
                    f"{stem}experts.local_experts.{i}.linear_fc1.weight",
                    f"{stem}experts.local_experts.{i}.linear_fc2.weight",
                )
            )
            tensors[names[0]], tensors[names[1]] = first[i].clone(), second[i].clone()
    return Values(tensors, buffers=("expert_bias",))


def experts_by_row(model: torch.nn.Module) -> dict[str, list[int]]:
    """Which expert each row, block or tensor of routed experts holds, by name."""
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if ".experts.weight" in name:
            blocks = tensor.reshape(-1, WIDTH * FFN)
        elif ".experts.linear" in name or "local_experts" in name:
            blocks = tensor.reshape(1, -1)
        elif "router" in name:
            blocks = tensor.reshape(EXPERTS, -1)
        else:
            continue
        blocks = blocks.detach()
        # A row that is not one expert's whole content, in order, is torn.
        size = blocks.shape[1]
        torch.testing.assert_close(
            blocks - blocks[:, :1], (torch.arange(size) / (2 * size)).expand_as(blocks), atol=1e-3, rtol=0
        )
        found[name] = [int(value) for value in blocks[:, 0]]
    return found


def run_rank(rank: int, world: int, init_file: str, out: str, job: str, job_arguments: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world)
    try:
        torch.save(JOBS[job](rank, world, **job_arguments), f"{out}{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _megatron(rank: int, world: int, forms: tuple[str, ...]) -> dict[str, Any]:
    size = EXPERTS // world
    found: dict[str, Any] = {}
    for form in forms:
        model = megatron(form, range(rank * size, (rank + 1) * size))
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
            optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": parameter.detach().clone()}
        before = {name: value.clone() for name, value in model.state_dict().items()}
        permute_model(model, plan(world), expert_group=dist.group.WORLD, optimizer=optimizer)
        found[form] = experts_by_row(model)
        for parameter in model.parameters():
            assert torch.equal(parameter.grad, parameter)
            assert torch.equal(optimizer.state[parameter]["exp_avg"], parameter)
        permute_model(model, plan(world), expert_group=dist.group.WORLD, optimizer=optimizer, invert=True)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found


def _titan(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    found: dict[str, Any] = {}
    for name, placement in (("experts", Shard(0)), ("columns", Shard(1)), ("copies", Replicate())):
        tensors = {}
        for layer in LAYERS:
            for part in ("w1_EFD", "w2_EDF"):
                whole = marked(range(EXPERTS), WIDTH, FFN, layer=layer)
                tensors[f"layers.{layer}.moe.routed_experts.inner_experts.{part}"] = distribute_tensor(
                    whole, mesh, [placement]
                )
            tensors[f"layers.{layer}._checkpoint_wrapped_module.moe.router.gate.weight"] = distribute_tensor(
                marked(range(EXPERTS), WIDTH, layer=layer), mesh, [Replicate()]
            )
        model = Values(tensors)
        permute_model(model, plan(world))
        for key, value in model.named_parameters():
            found[f"{name} {key}"] = [int(row) for row in value.full_tensor().reshape(EXPERTS, -1)[:, 0]]
    return found


def _unlike(rank: int, world: int) -> dict[str, Any]:
    """Ranks that would move different tensors, by different plans, or of which one refuses: all of them say so."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    size, group = EXPERTS // world, dist.group.WORLD
    found: dict[str, Any] = {}

    def attempt(name: str, model: torch.nn.Module, **arguments: Any) -> None:
        before = {key: value.clone() for key, value in model.named_parameters()}
        try:
            permute_model(model, arguments.pop("plan", plan(world)), **arguments)
            found[name] = ""
        except mp.MoeplaceError as refusal:
            found[name] = str(refusal)
        assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())

    def local() -> Values:
        return megatron("grouped", range(rank * size, (rank + 1) * size))

    attempt("plan", local(), plan=plan(world, seed=rank), expert_group=group)
    attempt("way", local(), invert=rank == 1, expert_group=group)
    gradients = local()
    if rank == 0:
        for parameter in gradients.parameters():
            parameter.grad = torch.zeros_like(parameter)
    attempt("gradients", gradients, expert_group=group)
    unknown = local()
    if rank == 1:
        unknown.register_parameter("expert_of_nobody", torch.nn.Parameter(torch.zeros(1)))
    attempt("one refuses", unknown, expert_group=group)
    mesh = init_device_mesh("cpu", (world,))
    stem = "layers.1.moe."
    values = {
        f"{stem}experts.w1": distribute_tensor(marked(range(EXPERTS), WIDTH, FFN, layer=1), mesh, [Shard(0)]),
        f"{stem}router.gate.weight": distribute_tensor(marked(range(EXPERTS), WIDTH, layer=1), mesh, [Replicate()]),
    }
    titan = Values({key: value for key, value in values.items() if rank == 0 or "router" not in key})
    try:
        permute_model(titan, plan(world))
    except mp.MoeplaceError as refusal:
        found["one refuses, sharded"] = str(refusal)
    return found


JOBS = {"megatron": _megatron, "titan": _titan, "unlike": _unlike}
