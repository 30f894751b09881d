"""What each rank does in test_expert_layer.py."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from least_loads import least_largest_load
from random_plans import SPEC, logical_weights, random_plan
from ranks import join_group
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

import moeplace as mp
from moeplace.runtime.moe.all_to_all import AsyncAllToAll
from moeplace.runtime.moe.data_parallel import clip_grad_norm_, exclude_from_ddp, expert_parameters
from moeplace.runtime.moe.expert_mlps import GELU, GptOss, SwiGLU
from moeplace.runtime.moe.experts import PlacedExperts
from moeplace.runtime.moe.layer import ExpertParallelMoE, SigmoidRouter, reference_experts

KINDS = (SwiGLU(), GELU(), GptOss())


def equality(rank: int, world: int, folder: Path, plans: int = 24, seed: int = 0) -> dict[str, Any]:
    """What `compare_plans` finds, between ranks that join here."""
    join_group(rank, world, folder)
    found = compare_plans(rank, world, plans, seed)
    dist.destroy_process_group()
    return found


def compare_plans(rank: int, world: int, plans: int, seed: int = 0) -> dict[str, Any]:
    """Worst relative errors of outputs and gradients over random plans, tokens and settings."""
    meshes = {1: init_device_mesh("cpu", (world,)), 2: init_device_mesh("cpu", (2, world // 2))}
    worst: dict[str, float] = {}
    equal_replicas = level = True
    for number in range(plans):
        rng = np.random.default_rng([seed, number])
        dispatch = ("flat", "node_aware")[number % 2]
        gradients = "mean" if number % 3 == 0 else "sum"
        plan = random_plan(rng, 2, world // 2)
        kind = KINDS[number % len(KINDS)]
        experts = PlacedExperts(
            SPEC,
            plan,
            meshes[1 + number % 2],
            SPEC.moe_layers[number % 2],
            kind=kind,
            dispatch=dispatch,
            gradients=gradients,
            replica_choice=("share", "balanced")[number // 2 % 2],
            chunks=1 + number // 4 % 3,
        )
        weights = logical_weights(number, kind.shapes(SPEC), SPEC.experts)
        experts.load_logical(weights)
        batch = tokens(rng, world)
        x = batch["x"][rank].clone().requires_grad_()
        gate = batch["gate"][rank].clone().requires_grad_()
        out = experts(x, batch["ids"][rank], gate)
        (out * batch["up"][rank]).sum().backward()
        found = {"out": out.detach(), "x": x.grad, "gate": gate.grad}
        expected = expected_of(batch, weights, kind, 1.0 / world if gradients == "mean" else 1.0)
        for name, value in found.items():
            worst[name] = max(worst.get(name, 0.0), error(value, expected[name][rank]))
        for name, value in experts.named_parameters():
            rows = torch.from_numpy(experts.row_expert)
            worst[name] = max(worst.get(name, 0.0), error(value.grad, expected[name][rows]))
        equal_replicas &= replicas_equal(experts)
        if number // 2 % 2:
            level &= is_level(experts, batch, rank)
    return {"worst": worst, "equal_replicas": equal_replicas, "level": level}


def is_level(experts: PlacedExperts, batch: dict[str, list[torch.Tensor]], rank: int) -> bool:
    """Whether the most that a rank computes of all ranks' tokens is the least possible."""
    slots = experts.replica_choice.slots(batch["ids"][rank])
    placement = experts.placement
    assert torch.equal(torch.from_numpy(placement.expert.copy())[slots], batch["ids"][rank])
    load = torch.bincount(torch.from_numpy(placement.device.copy())[slots].flatten(), minlength=placement.devices)
    dist.all_reduce(load)
    counts = torch.bincount(torch.cat(batch["ids"]).flatten(), minlength=placement.experts)
    hosts = np.zeros((placement.experts, placement.devices), dtype=bool)
    hosts[placement.expert, placement.device] = True
    return int(load.max()) == int(least_largest_load(counts.numpy()[None], hosts)[0])


def tokens(
    rng: np.random.Generator, world: int, most: int = 13, width: int = SPEC.hidden_size
) -> dict[str, list[torch.Tensor]]:
    """Every rank's batch, known to all: some ranks without tokens, sometimes all tokens to few experts."""
    counts = rng.integers(0, most + 1, size=world) * (rng.random(world) > 0.2)
    popular = SPEC.experts if rng.random() < 0.7 else SPEC.top_k
    ids = [
        np.stack([rng.permutation(popular)[: SPEC.top_k] for _ in range(n)] or [[0] * SPEC.top_k])[:n] for n in counts
    ]

    def drawn(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).float()

    return {
        "ids": [torch.from_numpy(value) for value in ids],
        "x": [drawn(n, width) for n in counts],
        "gate": [drawn(n, SPEC.top_k).sigmoid() for n in counts],
        "up": [drawn(n, width) for n in counts],
    }


def expected_of(batch: dict[str, list[torch.Tensor]], weights: dict[str, torch.Tensor], kind: Any, scale: float) -> Any:
    """Outputs and gradients of the layer in one process, on all ranks' tokens together."""
    own = {name: value.clone().requires_grad_() for name, value in weights.items()}
    x = [value.clone().requires_grad_() for value in batch["x"]]
    gate = [value.clone().requires_grad_() for value in batch["gate"]]
    out = reference_experts(torch.cat(x), torch.cat(batch["ids"]), torch.cat(gate), own, kind)
    (out * torch.cat(batch["up"])).sum().backward()
    zeros = {name: torch.zeros_like(value) for name, value in own.items()}
    return {
        "out": out.detach().split([len(value) for value in x]),
        "x": [value.grad for value in x],
        "gate": [value.grad for value in gate],
        **{n: (zeros[n] if v.grad is None else v.grad) * scale for n, v in own.items()},
    }


def error(found: torch.Tensor | None, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value (or 1)."""
    if found is None:
        return float("inf")
    if not expected.numel():
        return 0.0 if found.shape == expected.shape else float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def replicas_equal(experts: PlacedExperts, of: str = "grad") -> bool:
    """Whether all rows of one expert, on all ranks, hold the same bits."""
    mine = [
        (int(expert), [getattr(p, of)[row].tolist() if of == "grad" else p[row].tolist() for p in experts.parameters()])
        for row, expert in enumerate(experts.row_expert)
    ]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    seen: dict[int, Any] = {}
    return all(seen.setdefault(expert, values) == values for part in every for expert, values in part)


PLAN_SEED = 3


def behaviours(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Everything that is not equality of one layer, in one spawn; each entry is checked by a test of its own."""
    join_group(rank, world, folder)
    flat, deep = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (2, world // 2))
    found: dict[str, Any] = {}
    for check in (
        copies,
        half_precision,
        odd_inputs,
        checkpointing,
        shared,
        chunked,
        ddp,
        sharded,
        compiled,
        clipping,
        refusals,
        one_device_a_node,
    ):
        found[check.__name__] = check(rank, world, flat, deep)
    dist.destroy_process_group()
    return found


def plan_of(number: int, world: int) -> mp.Plan:
    return random_plan(np.random.default_rng([PLAN_SEED, number]), 2, world // 2)


def layer_of(mesh: Any, world: int, number: int = 0, **settings: Any) -> ExpertParallelMoE:
    torch.manual_seed(7)
    return ExpertParallelMoE(SPEC, plan_of(number, world), mesh, 4, **settings)


def inputs(rank: int, rows: int = 5) -> torch.Tensor:
    return torch.randn(2, rows, SPEC.hidden_size, generator=torch.Generator().manual_seed(100 + rank))


def copies(rank: int, world: int, flat: Any, deep: Any) -> dict[str, Any]:
    """Copies sent, against a count from the plan and the routing."""
    result = {}
    for name, mesh in (("flat", flat), ("node_aware", deep)):
        experts = PlacedExperts(SPEC, plan_of(0, world), mesh, 4)
        ids = torch.from_numpy(np.random.default_rng(rank).permuted(np.tile(np.arange(6), (9, 1)), axis=1)[:, :3])
        device = torch.from_numpy(experts.placement.device.copy())[experts.replica_choice.slots(ids)]
        wanted = [{int(d) for d in row} for row in device]
        experts(torch.zeros(9, SPEC.hidden_size), ids, torch.ones(9, 3))
        nodes = [{d // (world // 2) for d in row} for row in wanted]
        result[name] = {
            "sent": experts.dispatcher.copies,
            "devices": [sum(d in row for row in wanted) for d in range(world)],
            "nodes": [sum(n in row for row in nodes) for n in range(2)],
        }
    return result


def half_precision(rank: int, world: int, flat: Any, deep: Any) -> float:
    """bfloat16 against the reference in float32 on the same rounded values, by the root of the mean square."""
    experts = PlacedExperts(SPEC, plan_of(1, world), deep, 4, dtype=torch.bfloat16)
    weights = {n: v.bfloat16() for n, v in logical_weights(1, SwiGLU().shapes(SPEC), SPEC.experts).items()}
    experts.load_logical(weights)
    x = inputs(rank, 20).reshape(-1, SPEC.hidden_size).bfloat16().requires_grad_()
    gate, ids = torch.rand(len(x), SPEC.experts, generator=torch.Generator().manual_seed(rank)).topk(SPEC.top_k)
    out = experts(x, ids, gate)
    out.float().square().sum().backward()
    whole = x.detach().float().requires_grad_()
    expected = reference_experts(whole, ids, gate, {n: v.float() for n, v in weights.items()}, SwiGLU())
    expected.square().sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16
    whole_experts = PlacedExperts(SPEC, plan_of(1, world), deep, 4)
    whole_experts.load_logical({n: v.float() for n, v in weights.items()})
    with torch.autocast("cpu", torch.bfloat16):
        cast = whole_experts(x.detach().float(), ids, gate)
    assert torch.equal(cast, out)
    cast.float().square().sum().backward()
    assert all(value.grad.dtype == torch.float32 for value in whole_experts.parameters())
    pairs = ((out.detach(), expected.detach()), (x.grad, whole.grad))
    return max(float((a.float() - b).square().mean().sqrt() / b.square().mean().sqrt()) for a, b in pairs)


def odd_inputs(rank: int, world: int, flat: Any, deep: Any) -> dict[str, Any]:
    """Non-contiguous inputs, no tokens anywhere, every token to one expert, and NaN on one rank."""
    experts = PlacedExperts(SPEC, plan_of(2, world), deep, 4)
    weights = logical_weights(2, SwiGLU().shapes(SPEC), SPEC.experts)
    experts.load_logical(weights)
    x = torch.randn(SPEC.hidden_size, 6, generator=torch.Generator().manual_seed(rank)).t()
    ids = torch.tensor([[0, 1, 2, 0, 1, 2], [5] * 6]).t()
    gate = torch.rand(2, 6, generator=torch.Generator().manual_seed(rank)).t()
    assert not x.is_contiguous()
    assert not ids.is_contiguous()
    result: dict[str, Any] = {
        "strided": error(experts(x, ids, gate), reference_experts(x, ids, gate, weights, SwiGLU()))
    }
    none = x[:0].clone().requires_grad_()
    out = experts(none, ids[:0], gate[:0])
    out.sum().backward()
    result["none"] = [list(out.shape), list(none.grad.shape)]
    one = torch.zeros_like(ids[:, :1])
    result["one"] = error(experts(x, one, gate[:, :1]), reference_experts(x, one, gate[:, :1], weights, SwiGLU()))
    try:
        experts(x.clone().requires_grad_(rank == 1), ids, gate)
        result["gradients"] = ""
    except mp.InputError as refusal:
        result["gradients"] = str(refusal)
    result["outside"] = []
    for expert in (-1, SPEC.experts):
        try:
            experts(x, torch.full_like(ids, expert), gate)
        except mp.InputError as refusal:
            result["outside"].append(str(refusal))
    if rank == 1:
        x = x.clone()
        x[2] = float("nan")
    result["nan"] = experts(x, ids, gate).isnan().any(dim=1).tolist()
    layer = layer_of(deep, world)
    result["nan_routed"] = layer(x[None])[0].isnan().any(dim=1).tolist()
    return result


def losses_of(layer: torch.nn.Module, rank: int) -> tuple[float, dict[str, torch.Tensor]]:
    layer.zero_grad()
    out = layer(inputs(rank))
    loss = out.square().mean()
    loss.backward()
    return float(loss), {name: value.grad.clone() for name, value in layer.named_parameters()}


def worst_of(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert {n.removeprefix("module.") for n in a} == {n.removeprefix("module.") for n in b}
    return max(
        error(x, y) / max(float(y.abs().max()) if y.numel() else 0.0, 1e-9)
        for x, y in zip(a.values(), b.values(), strict=True)
    )


def checkpointing(rank: int, world: int, flat: Any, deep: Any) -> float:
    """Activation checkpointing changes no gradient."""
    layer = layer_of(flat, world, shared_experts=torch.nn.Linear(SPEC.hidden_size, SPEC.hidden_size), chunks=2)
    _, plain = losses_of(layer, rank)
    layer.zero_grad()
    torch.utils.checkpoint.checkpoint(layer, inputs(rank), use_reentrant=False).square().mean().backward()
    return worst_of({name: value.grad for name, value in layer.named_parameters()}, plain)


def shared(rank: int, world: int, flat: Any, deep: Any) -> dict[str, Any]:
    """Shared experts run while the first message is under way, and add to the result."""
    seen = []

    class Shared(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append("shared")
            return super().forward(x)

    layer = layer_of(flat, world, shared_experts=Shared(SPEC.hidden_size, SPEC.hidden_size), router="sigmoid")
    dispatcher = layer.experts.dispatcher
    dispatch, receive = dispatcher.dispatch, dispatcher.receive
    dispatcher.dispatch = lambda *a: (seen.append("sent"), dispatch(*a))[1]
    dispatcher.receive = lambda *a: (seen.append("waited"), receive(*a))[1]
    both = layer(inputs(rank))
    alone = layer.shared_experts(inputs(rank))
    layer.shared_experts = None
    return {"order": seen[:3], "error": error(both - alone, layer(inputs(rank)))}


def chunked(rank: int, world: int, flat: Any, deep: Any) -> list[str]:
    """What a batch in two chunks does one after the other: forward, then backward by the messages that it starts and
    waits for."""
    layer = layer_of(flat, world, chunks=2)
    seen: list[str] = []

    def noted(word: str, function: Any) -> Any:
        return lambda *given: (seen.append(word), function(*given))[1]

    dispatcher, kind = layer.experts.dispatcher, SwiGLU()
    for method in ("dispatch", "receive", "start_combine", "finish_combine"):
        setattr(dispatcher, method, noted(method, getattr(dispatcher, method)))
    layer.experts.kind = Noted(kind, seen)
    loss = layer(inputs(rank).requires_grad_()).square().mean()
    seen.append("backward")
    launch, land = AsyncAllToAll._launch, AsyncAllToAll._land
    AsyncAllToAll._launch, AsyncAllToAll._land = noted("start", launch), noted("wait", land)
    loss.backward()
    AsyncAllToAll._launch, AsyncAllToAll._land = launch, land
    return seen


class Noted:
    """Experts that say when they are computed, and when their gradients are."""

    def __init__(self, kind: Any, seen: list[str]) -> None:
        self._kind, self._seen = kind, seen

    def forward(self, row_ND: torch.Tensor, *given: Any) -> torch.Tensor:
        self._seen.append("experts")
        y_ND = self._kind.forward(row_ND, *given)
        if y_ND.requires_grad:
            y_ND.register_hook(lambda grad: self._seen.append("experts"))
        return y_ND


def ddp(rank: int, world: int, flat: Any, deep: Any) -> dict[str, Any]:
    """Router gradients are averaged by DDP, expert gradients by the layer: all equal the mean loss of all ranks."""
    layer = layer_of(flat, world)
    own = {n: v.clone() for n, v in losses_of(layer, rank)[1].items()}
    mean = own["gate.weight"].clone()
    dist.all_reduce(mean)
    exclude_from_ddp(layer)
    wrapped = torch.nn.parallel.DistributedDataParallel(layer)
    grads = losses_of(wrapped, rank)[1]
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    fused = torch.optim.AdamW(layer.experts.parameters(), lr=1e-2, fused=True)
    for step in range(6):
        losses_of(wrapped, rank + 10 * step)
        (fused if step % 3 == 2 else optimizer).step()
    return {
        "router": error(grads["module.gate.weight"], mean / world),
        "experts": worst_of({"e": grads["module.experts.down_proj"]}, {"e": own["experts.down_proj"]})
        if len(own["experts.down_proj"])
        else 0.0,
        "replicas": replicas_equal(layer.experts, of="data"),
    }


def sharded(rank: int, world: int, flat: Any, deep: Any) -> dict[str, Any]:
    """fully_shard of everything but the experts gives the same loss and gradients as DDP."""
    layer = layer_of(flat, world)
    exclude_from_ddp(layer)
    loss, grads = losses_of(torch.nn.parallel.DistributedDataParallel(layer), rank)
    layer = layer_of(flat, world)
    fully_shard(layer, ignored_params=expert_parameters(layer))
    again, found = losses_of(layer, rank)
    whole = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in found.items()}
    kinds = {n: type(v).__name__ for n, v in layer.named_parameters()}
    return {"loss": abs(loss - again), "grads": worst_of(whole, grads), "kinds": kinds}


def compiled(rank: int, world: int, flat: Any, deep: Any) -> dict[str, Any]:
    """A model around the layer compiles and gives the same; one graph for all is refused."""
    layer = layer_of(flat, world)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), layer, torch.nn.Linear(16, 16))
    loss, grads = losses_of(model, rank)
    fast = torch.compile(model, backend="aot_eager")
    again, found = losses_of(fast, rank)
    said = ""
    torch._dynamo.reset()
    try:
        torch.compile(model, backend="aot_eager", fullgraph=True)(inputs(rank))
    except torch._dynamo.exc.TorchDynamoException as refusal:
        said = str(refusal)[:300]
    return {
        "loss": abs(loss - again),
        "grads": worst_of(dict(zip(grads, found.values(), strict=True)), grads),
        "fullgraph": said,
    }


def clipping(rank: int, world: int, flat: Any, deep: Any) -> dict[str, Any]:
    """The norm is the one of the whole model with every expert once."""
    layer = layer_of(deep, world, number=4)
    exclude_from_ddp(layer)
    losses_of(torch.nn.parallel.DistributedDataParallel(layer), rank)
    rows = {
        int(e): [p.grad[i].tolist() for p in layer.experts.parameters()] for i, e in enumerate(layer.experts.row_expert)
    }
    every: list[Any] = [None] * world
    dist.all_gather_object(every, rows)
    merged = {e: values for part in every for e, values in part.items()}
    expected = [torch.tensor(value).flatten() for values in merged.values() for value in values]
    expected.append(layer.gate.weight.grad.flatten().clone())
    norm = float(clip_grad_norm_(layer, 1e-8))
    after = float(clip_grad_norm_(layer, 1e9))
    return {
        "norm": norm,
        "expected": float(torch.cat(expected).norm()),
        "after": after,
        "equal": replicas_equal(layer.experts),
    }


def refusals(rank: int, world: int, flat: Any, deep: Any) -> dict[str, str]:
    """What each rank is told when it, or only another rank, is given something wrong."""
    good = plan_of(0, world)
    other = SPEC.replace(experts=8)
    cases = {
        "model": lambda: PlacedExperts(other, good, flat, 4),
        "ranks": lambda: PlacedExperts(SPEC, random_plan(np.random.default_rng(0), 1, world + 1), flat, 4),
        "nodes": lambda: PlacedExperts(SPEC, random_plan(np.random.default_rng(0), 1, world), deep, 4),
        "layer": lambda: PlacedExperts(SPEC, good, flat, 2),
        "different": lambda: PlacedExperts(SPEC, plan_of(1, world) if rank == 2 else good, flat, 4),
        "one_refuses": lambda: PlacedExperts(SPEC, good, flat, 2 if rank == 3 else 4),
        "dispatch": lambda: PlacedExperts(SPEC, good, flat, 4, dispatch="flatt"),
        "two_stage": lambda: PlacedExperts(SPEC, good, flat, 4, dispatch="node_aware"),
        "gradients": lambda: PlacedExperts(SPEC, good, flat, 4, gradients="average"),
        "replica_choice": lambda: PlacedExperts(SPEC, good, flat, 4, replica_choice="nearest"),
        "one_balances": lambda: PlacedExperts(SPEC, good, flat, 4, replica_choice="balanced" if rank == 1 else "share"),
        "one_mistypes": lambda: PlacedExperts(SPEC, good, flat, 4, dispatch="flatt" if rank == 0 else "flat"),
        "chunks": lambda: PlacedExperts(SPEC, good, flat, 4, chunks=0),
        "one_cuts": lambda: PlacedExperts(SPEC, good, flat, 4, chunks=2 if rank == 1 else 1),
        "router": lambda: ExpertParallelMoE(SPEC, good, flat, 4, router="softmaxx"),
        "names": lambda: PlacedExperts(SPEC, good, flat, 4).load_logical({}),
        "shapes": lambda: PlacedExperts(SPEC, good, flat, 4).load_logical(
            {"gate_up_proj": torch.zeros(5, 48, 16), "down_proj": torch.zeros(6, 16, 24)}
        ),
    }
    said = {}
    for name, build in cases.items():
        try:
            build()
        except (mp.InputError, mp.UnsupportedError) as refusal:
            said[name] = str(refusal)
    return said


def one_device_a_node(rank: int, world: int, flat: Any, deep: Any) -> float:
    """Nodes of one device need no second stage."""
    alone = init_device_mesh("cpu", (world, 1))
    plan = random_plan(np.random.default_rng(5), world, 1)
    experts = PlacedExperts(SPEC, plan, alone, 1)
    weights = logical_weights(5, SwiGLU().shapes(SPEC), SPEC.experts)
    experts.load_logical(weights)
    x, ids = inputs(rank)[0], torch.arange(3).repeat(5, 1)
    return error(experts(x, ids, torch.ones(5, 3)), reference_experts(x, ids, torch.ones(5, 3), weights, SwiGLU()))


def killed(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Rank 2 dies in the second step of training."""
    return _training_with_accident(rank, world, folder, lambda: os.kill(os.getpid(), signal.SIGKILL))


def stopped(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Rank 2 stands still in the second step of training, past the timeout."""
    return _training_with_accident(rank, world, folder, lambda: time.sleep(14))


def _training_with_accident(rank: int, world: int, folder: Path, accident: Any) -> dict[str, Any]:
    join_group(rank, world, folder, timeout=timedelta(seconds=4))
    layer = layer_of(init_device_mesh("cpu", (world,)), world)
    losses_of(layer, rank)
    began = time.monotonic()
    try:
        for _ in range(3):
            if rank == 2:
                accident()
            losses_of(layer, rank)
    except mp.RankError as lost:
        return {"said": str(lost), "seconds": time.monotonic() - began}
    return {"said": "", "seconds": 0.0}


def wide(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Rank 9 of 64 on torch's fake process group, at DeepSeek-V3's shapes but for the experts' inner width."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=9, world_size=64)
    spec = mp.ModelSpec(layers=1, experts=256, top_k=8, hidden_size=7168, ffn_size=16, groups=8, moe_layers=(3,))
    rng = np.random.default_rng(0)
    plan = mp.Plan(
        model=spec,
        topology=mp.Topology.preset("h100-hgx", nodes=8),
        physical_to_logical=rng.permutation(np.concatenate([np.arange(256), rng.permutation(256)[:32]]))[None],
        slot_device=np.sort(np.arange(288) % 64),
    )
    found: dict[str, Any] = {}
    for name, mesh in (("flat", init_device_mesh("cpu", (64,))), ("node_aware", init_device_mesh("cpu", (8, 8)))):
        router = SigmoidRouter(7168, 256, 8, groups=8, top_groups=4, scale=2.5, dtype=torch.bfloat16)
        layer = ExpertParallelMoE(spec, plan, mesh, 3, router=router, dtype=torch.bfloat16)
        # What the fake group gives back has the shape of what was sent, rows bound for other ranks' slots: let these
        # count as this rank's. Its values are what memory held.
        rows = len(layer.experts.row_expert)
        layer.experts.dispatcher.place(layer.experts.placement, torch.arange(288) % rows, rows)
        x = torch.randn(16, 7168, dtype=torch.bfloat16, requires_grad=True)
        out = layer(x)
        out.float().square().sum().backward()
        found[name] = {
            "rows": rows,
            "out": list(out.shape),
            "x_grad": list(x.grad.shape),
            "copies": [sum(stage) / len(x) for stage in layer.experts.dispatcher.copies],
            "grads": all(p.grad is not None for p in layer.experts.parameters()),
        }
    dist.destroy_process_group()
    return found


def checkpointed_first(rank: int, world: int, folder: Path) -> dict[str, float]:
    """Errors of gradients where the process's first forward of a dtype is a checkpointed one."""
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for name, dtype in (("built", torch.float32), ("converted", torch.bfloat16)):
        layer = layer_of(mesh, world).to(dtype)
        x = inputs(rank).to(dtype)
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().mean().backward()
        checkpointed = {name: value.grad.clone() for name, value in layer.named_parameters()}
        layer.zero_grad()
        layer(x).square().mean().backward()
        found[name] = worst_of({name: value.grad for name, value in layer.named_parameters()}, checkpointed)
    dist.destroy_process_group()
    return found


def left_out(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Meshes that leave ranks out, and wrappers and optimizers that take the experts for the same on every rank."""
    join_group(rank, world, folder)
    half = plan_of(0, world // 2)
    found: dict[str, Any] = {}
    for name in ("dp", "pp", "alone"):
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=(name, "ep"))["ep"]
        if name == "alone":
            mesh = DeviceMesh.from_group(mesh.get_group(), "cpu")
        try:
            layer = PlacedExperts(SPEC, half, mesh, 4)
            out = layer(inputs(rank)[0], torch.arange(3).repeat(5, 1), torch.ones(5, 3))
            found[name] = list(out.shape)
        except mp.UnsupportedError as refusal:
            found[name] = str(refusal)
    mesh = init_device_mesh("cpu", (world,))

    def zero() -> None:
        layer = layer_of(mesh, world)
        optimizer = ZeroRedundancyOptimizer(layer.parameters(), torch.optim.AdamW)
        losses_of(layer, rank)
        optimizer.step()

    def zero_of_the_rest() -> None:
        layer = layer_of(mesh, world)
        optimizer = ZeroRedundancyOptimizer(layer.gate.parameters(), torch.optim.AdamW)
        losses_of(layer, rank)
        optimizer.step()

    def tensor_parallel() -> None:
        layer = layer_of(mesh, world)
        for name, value in list(layer.experts.named_parameters()):
            layer.experts.register_parameter(name, torch.nn.Parameter(DTensor.from_local(value.detach(), mesh)))
        losses_of(layer, rank)

    cases = {
        "fully_shard": lambda: losses_of(fully_shard(layer_of(mesh, world)), rank),
        "fsdp": lambda: losses_of(FullyShardedDataParallel(layer_of(mesh, world), device_id=torch.device("cpu")), rank),
        "fsdp_orig": lambda: losses_of(
            FullyShardedDataParallel(layer_of(mesh, world), device_id=torch.device("cpu"), use_orig_params=True), rank
        ),
        "tensor_parallel": tensor_parallel,
        "zero": zero,
        "zero_of_the_rest": zero_of_the_rest,
    }
    for name, attempt in cases.items():
        try:
            attempt()
            found[name] = ""
        except mp.UnsupportedError as refusal:
            found[name] = str(refusal)
    dist.destroy_process_group()
    return found
