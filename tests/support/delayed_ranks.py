"""What each rank does in test_delayed_gradients.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from expert_ranks import KINDS, error, expected_of, inputs, layer_of, plan_of, replicas_equal, tokens
from random_plans import SPEC, logical_weights, random_plan
from ranks import join_group
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import moeplace as mp
from moeplace.runtime import no_sync
from moeplace.runtime.moe.all_to_all import AsyncAllToAll
from moeplace.runtime.moe.expert_mlps import DelayedGradients
from moeplace.runtime.moe.experts import PlacedExperts


def equality(rank: int, world: int, folder: Path, plans: int = 12) -> dict[str, Any]:
    """Worst relative errors against one process over random plans with replicas, chunks and kinds of experts."""
    join_group(rank, world, folder)
    meshes = [init_device_mesh("cpu", (world,))]
    if world > 2:
        meshes.append(init_device_mesh("cpu", (2, world // 2)))
    worst: dict[str, float] = {}
    equal_replicas = True
    for number in range(plans):
        rng = np.random.default_rng([21, number])
        kind, mesh = KINDS[number % len(KINDS)], meshes[number % len(meshes)]
        plan = random_plan(rng, len(meshes), world // len(meshes))
        experts = PlacedExperts(
            SPEC,
            plan,
            mesh,
            SPEC.moe_layers[number % 2],
            kind=kind,
            gradients="sum",
            chunks=1 + number // 3 % 3,
            delay_weight_gradients=True,
        )
        weights = logical_weights(number, kind.shapes(SPEC), SPEC.experts)
        experts.load_logical(weights)
        batch = tokens(rng, world)
        x = batch["x"][rank].clone().requires_grad_()
        gate = batch["gate"][rank].clone().requires_grad_()

        def loss(x: Tensor, gate: Tensor, experts: Any = experts, batch: Any = batch) -> Tensor:
            return (experts(x, batch["ids"][rank], gate) * batch["up"][rank]).sum()

        value = checkpoint(loss, x, gate, use_reentrant=False) if number // 2 % 2 else loss(x, gate)
        value.backward()
        expected = expected_of(batch, weights, kind, 1.0)
        # Without any tokens the reference gives no gradient of them.
        inputs_of = {"x": x, "gate": gate} if sum(map(len, batch["x"])) else {}
        found = {name: error(value.grad, expected[name][rank]) for name, value in inputs_of.items()}
        rows = torch.from_numpy(experts.row_expert)
        found |= {name: error(value.grad, expected[name][rows]) for name, value in experts.named_parameters()}
        worst = {name: max(worst.get(name, 0.0), found.get(name, 0.0)) for name in worst | found}
        equal_replicas &= replicas_equal(experts)
    dist.destroy_process_group()
    return {"worst": worst, "equal_replicas": equal_replicas}


def ways(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Ways to come by gradients, each with and without the delay: where they are not the same bits; of weights used in
    several ways, whose gradients are added up in another order, where they are not the same but for rounding."""
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    padded = {"capacity_factor": 2.0, "padded_tokens": 16}
    found: dict[str, Any] = {"same": {}}
    for name, gradients in WAYS.items():
        for setting, settings in (
            ("", {}),
            ("chunks", {"chunks": 2}),
            ("padded", padded),
            ("lsh", {"compression": mp.LSHCompression(rate=0.5)}),
        ):
            if setting == "" or name == "once":
                plain, delayed = (
                    gradients(layer_of(mesh, world, delay_weight_gradients=delay, **settings), rank)
                    for delay in (False, True)
                )
                found["same"][f"{name} {setting}".strip()] = sorted(
                    key
                    for key in plain
                    if (plain[key] - delayed[key]).abs().max()
                    > (1e-5 if name == "in_another_way" else 0.0) * plain[key].abs().max()
                )
    found["order"] = order(layer_of(mesh, world, delay_weight_gradients=True), rank)
    found["chunked order"] = order(layer_of(mesh, world, delay_weight_gradients=True, chunks=2), rank)
    found["evaluation"] = evaluation(layer_of(mesh, world, delay_weight_gradients=True), rank)
    found["refused"] = refused(rank, world, mesh)
    dist.destroy_process_group()
    return found


def loss_of(layer: torch.nn.Module, rank: int, seed: int = 0) -> Tensor:
    loss: Tensor = layer(inputs(rank + 10 * seed)).square().mean()
    return loss


def gradients_of(layer: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in layer.named_parameters() if value.grad is not None}


def once(layer: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    loss_of(layer, rank).backward()
    return gradients_of(layer)


def accumulated(layer: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    """Two micro-batches one by one, then two whose replicas are summed once."""
    for seed in range(2):
        loss_of(layer, rank, seed).backward()
    with no_sync(layer):
        loss_of(layer, rank, 2).backward()
    loss_of(layer, rank, 3).backward()
    return gradients_of(layer)


def two_batches_at_once(layer: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    """Two passes through the layer in one graph."""
    (loss_of(layer, rank, 0) + loss_of(layer, rank, 1)).backward()
    return gradients_of(layer)


def twice_through(layer: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    loss = loss_of(layer, rank)
    loss.backward(retain_graph=True)
    loss.backward()
    return gradients_of(layer)


def inputs_first(layer: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    """The inputs' gradient alone, which leaves weights' uncomputed; then all, then the weights' alone."""
    x = inputs(rank).requires_grad_()
    loss = layer(x).square().mean()
    (alone,) = torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward(retain_graph=True)
    weights = torch.autograd.grad(loss, list(layer.experts.parameters()))
    return gradients_of(layer) | {"x alone": alone} | {f"alone {n}": value for n, value in enumerate(weights)}


def frozen(layer: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    layer.experts.down_proj.requires_grad_(False)
    loss_of(layer, rank).backward()
    return gradients_of(layer)


def frozen_inputs(layer: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    """Nothing before the experts learns: no gradient travels to the tokens' ranks."""
    layer.gate.requires_grad_(False)
    loss_of(layer, rank).backward()
    return gradients_of(layer)


def hooked(layer: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    """Hooks on weights' gradients, and optimizers that step in backward."""
    layer.experts.gate_up_proj.register_hook(lambda grad: 2 * grad)
    seen: dict[str, Tensor] = {}
    layer.experts.down_proj.register_post_accumulate_grad_hook(
        lambda value: seen.update(stepped=value.detach() - 0.1 * value.grad)
    )
    loss_of(layer, rank).backward()
    return gradients_of(layer) | {name: value.as_subclass(Tensor) for name, value in seen.items()}


def in_bfloat16(layer: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(layer, rank)
    loss.backward()
    return gradients_of(layer)


def reentrant(layer: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    x = inputs(rank).requires_grad_()
    checkpoint(layer, x, use_reentrant=True).square().mean().backward()
    return gradients_of(layer)


def on_the_cpu(layer: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(layer, rank)
    loss.backward()
    return gradients_of(layer)


def in_another_way(layer: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    """Experts that use a weight twice, as it is and doubled, and cut off from its gradient."""
    layer.experts.kind = Odd(layer.experts.kind)
    loss_of(layer, rank).backward()
    return gradients_of(layer)


class Odd:
    """Experts whose weights go several ways."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def forward(self, row_ND: Tensor, count_S: Tensor, weights: dict[str, Tensor]) -> Tensor:
        doubled = {name: 2.0 * value for name, value in weights.items()}
        constant = {name: value.detach() for name, value in weights.items()}
        parts = {name: value[:, :] for name, value in weights.items()}
        total: Tensor = sum(self._kind.forward(row_ND, count_S, each) for each in (weights, doubled, constant, parts))
        return total


WAYS: dict[str, Callable[[Any, int], dict[str, Tensor]]] = {
    way.__name__: way
    for way in (
        once,
        accumulated,
        two_batches_at_once,
        twice_through,
        inputs_first,
        frozen,
        frozen_inputs,
        hooked,
        in_bfloat16,
        reentrant,
        on_the_cpu,
        in_another_way,
    )
}


def order(layer: Any, rank: int) -> list[str]:
    """What backward does one after the other: messages it starts and waits for, and gradients of weights."""
    seen: list[str] = []

    def noted(word: str, function: Any) -> Any:
        return lambda *given: (seen.append(word), function(*given))[1]

    loss = layer(inputs(rank).requires_grad_()).square().mean()
    launch, land, gradients = AsyncAllToAll._launch, AsyncAllToAll._land, DelayedGradients.gradients
    AsyncAllToAll._launch, AsyncAllToAll._land = noted("start", launch), noted("wait", land)
    DelayedGradients.gradients = noted("weights", gradients)
    loss.backward()
    AsyncAllToAll._launch, AsyncAllToAll._land, DelayedGradients.gradients = launch, land, gradients
    return seen


def evaluation(layer: Any, rank: int) -> bool:
    """Without gradients nothing is put off, and outputs are the same."""
    with torch.no_grad():
        alone = layer(inputs(rank))
    return bool(torch.equal(alone, layer(inputs(rank))))


def refused(rank: int, world: int, mesh: Any) -> dict[str, str]:
    copies = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "ep"))["ep"]
    plan, half = plan_of(0, world), random_plan(np.random.default_rng(3), 1, world // 2)

    class Own:
        def place(self, *given: Any) -> None: ...

    said = {}
    for name, build in {
        "shards": lambda: PlacedExperts(SPEC, half, copies, 4, shard_experts=True, delay_weight_gradients=True),
        "own": lambda: PlacedExperts(SPEC, plan, mesh, 4, dispatch=lambda _: Own(), delay_weight_gradients=True),
        "one": lambda: PlacedExperts(SPEC, plan, mesh, 4, delay_weight_gradients=rank == 1),
    }.items():
        try:
            build()
        except (mp.UnsupportedError, mp.InputError) as refusal:
            said[name] = str(refusal)
    return said
