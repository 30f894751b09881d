"""What each rank does in test_compression.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from expert_ranks import KINDS, error, tokens
from naive_compression import naive_clusters, naive_forward
from random_plans import SPEC, logical_weights, random_plan
from ranks import join_group
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import moeplace as mp
from moeplace.runtime import LSHCompression, expert_rows
from moeplace.runtime.moe.data_parallel import exclude_from_ddp
from moeplace.runtime.moe.dispatcher import flat as flat_dispatch
from moeplace.runtime.moe.expert_mlps import SwiGLU
from moeplace.runtime.moe.experts import PlacedExperts, ReplicaChoice
from moeplace.runtime.moe.lsh import rotations

SCOPES = ("all", "off_device", "off_node")
RESIDUALS = ("plain", "scaled", "none")


def equality(rank: int, world: int, folder: Path, plans: int = 18) -> dict[str, Any]:
    """Worst relative errors against the naive layer, over random plans, settings and tokens; settings differ by
    rank."""
    join_group(rank, world, folder)
    meshes = {1: init_device_mesh("cpu", (world,)), 2: init_device_mesh("cpu", (2, world // 2))}
    worst: dict[str, float] = {}
    clusters = 0
    for number in range(plans):
        rng = np.random.default_rng([11, number])
        plan = random_plan(rng, 2, world // 2)
        kind = KINDS[number % len(KINDS)]
        two_stage = number % 2 == 1
        settings = [
            LSHCompression(
                rate=float(rng.uniform(0.1, 0.8)),
                hashes=int(rng.integers(1, 4)),
                dimension=int(rng.integers(1, 4)),
                residual=RESIDUALS[number % 3],
                scope=SCOPES[number // 2 % 3],
                seed=number,
                lloyd_steps=number % 3,
            )
            for _ in range(world)
        ]
        layer = SPEC.moe_layers[number % 2]
        experts = PlacedExperts(
            SPEC,
            plan,
            meshes[1 + two_stage],
            layer,
            kind=kind,
            dispatch="node_aware" if two_stage else "flat",
            compression=settings[rank],
            gradients="sum",
        )
        weights = logical_weights(number, kind.shapes(SPEC), SPEC.experts)
        experts.load_logical(weights)
        batch = tokens(rng, world, most=26)
        x = batch["x"][rank].clone().requires_grad_()
        gate = batch["gate"][rank].clone().requires_grad_()
        out = experts(x, batch["ids"][rank], gate)
        (out * batch["up"][rank]).sum().backward()
        own = {name: value.clone().requires_grad_() for name, value in weights.items()}
        expected: dict[str, torch.Tensor] = {}
        for sender in range(world):
            given = _naive(batch, sender, experts, settings[sender], two_stage, own, kind)
            if sender == rank:
                expected |= given
                clusters += int(given["clusters"])
        zeros = {name: torch.zeros_like(value) for name, value in own.items()}
        for name, value in {"out": out.detach(), "x": x.grad, "gate": gate.grad}.items():
            worst[name] = max(worst.get(name, 0.0), error(value, expected[name]))
        for name, value in experts.named_parameters():
            goal = zeros[name] if own[name].grad is None else own[name].grad
            rows = torch.from_numpy(experts.row_expert)
            worst[name] = max(worst.get(name, 0.0), error(value.grad, goal[rows]))
    dist.destroy_process_group()
    return {"worst": worst, "clusters": clusters}


def _naive(
    batch: Any, sender: int, experts: PlacedExperts, settings: LSHCompression, two_stage: bool, own: Any, kind: Any
) -> dict[str, Any]:
    """Outputs and input gradients of one rank's tokens; gradients of weights add up in `own`."""
    placement = experts.placement
    slots = ReplicaChoice(placement, sender, torch.device("cpu")).slots(batch["ids"][sender]).tolist()
    node = placement.node_of[placement.device]
    here, near = placement.device == sender, node == placement.node_of[sender]
    outside = {"all": here | True, "off_device": ~here, "off_node": ~near}[settings.scope]

    def unit(slot: int) -> tuple[str, int]:
        away = two_stage and not near[slot]
        return ("node", int(node[slot])) if away else ("device", int(placement.device[slot]))

    rows = sum(len({unit(s) for s in row if outside[s]}) for row in slots)
    x = batch["x"][sender].clone().requires_grad_()
    gate = batch["gate"][sender].clone().requires_grad_()
    directions = rotations(
        SPEC.hidden_size, settings.hashes, settings.dimension, (settings.seed * 1_000_003 + experts.layer) * 1_000_003
    )
    clusters = naive_clusters(
        x,
        slots,
        gate.detach(),
        lambda t, k: bool(outside[slots[t][k]]),
        int(settings.rate * rows),
        directions,
        settings.dimension,
        settings.lloyd_steps,
    )

    def expert(slot: int, x_D: torch.Tensor) -> torch.Tensor:
        number = int(placement.expert[slot])
        weights = {name: value[number : number + 1] for name, value in own.items()}
        result: torch.Tensor = kind.forward(x_D[None], torch.tensor([1]), weights)[0]
        return result

    out = naive_forward(x, slots, gate, clusters, settings.residual, expert)
    (out * batch["up"][sender]).sum().backward()
    grads = [torch.zeros_like(value) if value.grad is None else value.grad for value in (x, gate)]
    return {"out": out.detach(), "x": grads[0], "gate": grads[1], "clusters": len(clusters)}


def behaviours(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Everything that is not equality, in one spawn; each entry is checked by a test of its own."""
    join_group(rank, world, folder)
    flat, deep = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (2, world // 2))
    found: dict[str, Any] = {}
    for check in (
        nothing_left_out,
        rows,
        odd_inputs,
        half_precision,
        recomputed,
        schedule,
        following,
        ddp,
        counts,
        refusals,
    ):
        found[check.__name__] = check(rank, world, flat, deep)
    dist.destroy_process_group()
    return found


def built(mesh: Any, world: int, number: int = 0, **settings: Any) -> PlacedExperts:
    plan = random_plan(np.random.default_rng([5, number]), 2, world // 2)
    experts = PlacedExperts(SPEC, plan, mesh, 4, compression=LSHCompression(**settings) if settings else None)
    experts.load_logical(logical_weights(3, SwiGLU().shapes(SPEC), SPEC.experts))
    return experts


def batch_of(rank: int, count: int = 120, alike: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens around a few points, ids and gate weights."""
    generator = torch.Generator().manual_seed(rank)
    centre = torch.randn(alike, SPEC.hidden_size, generator=generator)
    which = torch.randint(alike, (count,), generator=generator)
    x = centre[which] + 0.05 * torch.randn(count, SPEC.hidden_size, generator=generator)
    ids = torch.rand(alike, SPEC.experts, generator=generator).topk(SPEC.top_k).indices[which]
    return x, ids, torch.rand(count, SPEC.top_k, generator=generator)


def passed(experts: PlacedExperts, x: torch.Tensor, ids: torch.Tensor, gate: torch.Tensor) -> list[torch.Tensor]:
    """Output and all gradients of one pass."""
    experts.zero_grad()
    x, gate = x.clone().requires_grad_(), gate.clone().requires_grad_()
    out = experts(x, ids, gate)
    out.square().sum().backward()
    return [out.detach(), x.grad, gate.grad, *(value.grad.clone() for value in experts.parameters())]


def nothing_left_out(rank: int, world: int, flat: Any, deep: Any) -> dict[str, bool]:
    """Settings under which nothing is compressed give the bits of plain dispatch, gradients included."""
    given = batch_of(rank)
    result = {}
    for name, settings in {
        "rate": {"rate": 1.0},
        "warm_up": {"rate": 0.2, "warm_up": 1},
        "bound": {"rate": 0.2, "error_bound": 1e-6},
    }.items():
        for where, mesh in (("flat", flat), ("deep", deep)):
            plain = passed(built(mesh, world), *given)
            found = passed(built(mesh, world, **settings), *given)
            result[f"{name} {where}"] = all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    evaluated = built(flat, world, rate=0.2).train(False)
    result["evaluation"] = torch.equal(passed(evaluated, *given)[0], passed(built(flat, world), *given)[0])
    refused = built(flat, world, rate=0.2, error_bound=1e-6)
    passed(refused, *given)
    seen = refused.dispatcher.statistics
    result["refused"] = seen.refused > 0 and seen.clustered == 0 and seen.sent_rows == seen.plain_rows
    return result


def rows(rank: int, world: int, flat: Any, deep: Any) -> dict[str, Any]:
    """Statistics against the rows that the wire carried."""
    result: dict[str, Any] = {}
    given = batch_of(rank)
    for name, mesh in (("flat", flat), ("deep", deep)):
        plain, experts = built(mesh, world), built(mesh, world, rate=0.25)
        device = torch.from_numpy(plain.placement.device.copy())[plain.replica_choice.slots(given[1])]
        own, in_node = rank, 0
        if name == "deep":
            # Rows inside the node leave in the second stage, among those that came from other nodes.
            own, beside = rank // (world // 2), rank ^ 1
            in_node = int((device == beside).any(dim=1).sum())
        carried = {}
        for kind, layer in (("plain", plain), ("sent", experts)):
            layer(*given)
            first = layer.dispatcher.copies[0]
            carried[kind] = sum(first) - first[own]
        carried["plain"] += in_node
        seen = experts.dispatcher.statistics
        result[name] = {
            "carried": carried,
            "plain_rows": seen.plain_rows,
            "sent_rows": seen.sent_rows,
            "pairs": seen.pairs,
            "left": seen.clusters + seen.pairs - seen.clustered,
            "bytes": [seen.plain_bytes, seen.sent_bytes],
            "error": seen.error,
        }
    return result


def odd_inputs(rank: int, world: int, flat: Any, deep: Any) -> dict[str, Any]:
    x, ids, gate = batch_of(rank)
    result: dict[str, Any] = {}
    experts = built(deep, world, rate=0.2)
    few = {1: 0, 2: 1}.get(rank, len(x))
    out, x_grad, *_ = passed(experts, x[:few], ids[:few], gate[:few])
    result["few"] = [list(out.shape), list(x_grad.shape), bool(out.isfinite().all())]
    none = experts(x[:0], ids[:0], gate[:0])
    result["none"] = list(none.shape)
    one = torch.zeros_like(ids[:, :1])
    experts(x, one, gate[:, :1])
    seen = experts.dispatcher.statistics
    result["one"] = [seen.pairs, seen.clusters + seen.pairs - seen.clustered]
    spoilt = x.clone()
    if rank == 1:
        spoilt[2] = float("nan")
        spoilt[5, 3] = float("inf")
    found = passed(experts, spoilt, ids, gate)
    result["nan"] = found[0].isnan().any(dim=1).nonzero().flatten().tolist()
    result["nan_grad"] = found[1].isnan().any(dim=1).nonzero().flatten().tolist()
    same = x[:1].expand(len(x), -1)
    out, *_ = passed(built(flat, world, rate=0.1), same, ids[:1].expand(len(x), -1), gate)
    exact, *_ = passed(built(flat, world), same, ids[:1].expand(len(x), -1), gate)
    result["same"] = error(out, exact)
    return result


def following(rank: int, world: int, flat: Any, deep: Any) -> dict[str, list[float]]:
    """By optimizer step: pairs left over pairs, of two passes each, and |x - c| over |x| of all pairs."""
    experts = built(flat, world, rate=0.05, error_target=0.6)
    optimizer = torch.optim.SGD(experts.parameters(), lr=1e-6)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(200, SPEC.hidden_size, generator=generator)
    ids = torch.rand(200, SPEC.experts, generator=generator).topk(SPEC.top_k).indices
    given = x, ids, torch.full(ids.shape, 1 / SPEC.top_k)
    result: dict[str, list[float]] = {"left": [], "again": [], "error": []}
    for _ in range(60):
        for name in ("left", "again"):
            passed(experts, *given)
            seen = experts.dispatcher.statistics
            result[name].append((seen.clusters + seen.pairs - seen.clustered) / seen.pairs)
        result["error"].append(seen.error * (seen.clustered / seen.pairs) ** 0.5)
        optimizer.step()
    return result


def half_precision(rank: int, world: int, flat: Any, deep: Any) -> float:
    """bfloat16 against float32 on the same values and clusters, by the root of the mean square. Autocast makes the same
    clusters: hashes and distances stay in float32."""
    x, ids, gate = batch_of(rank)
    x = x.bfloat16()
    plan = random_plan(np.random.default_rng([5, 1]), 2, world // 2)
    weights = {n: v.bfloat16() for n, v in logical_weights(1, SwiGLU().shapes(SPEC), SPEC.experts).items()}
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        experts = PlacedExperts(SPEC, plan, deep, 4, dtype=dtype, compression=LSHCompression(rate=0.25))
        experts.load_logical({name: value.to(dtype) for name, value in weights.items()})
        found.append(passed(experts, x.to(dtype), ids, gate))
    half, whole = found
    with torch.autocast("cpu", torch.bfloat16):
        cast = experts(x.float(), ids, gate)
    assert torch.equal(cast, half[0])
    assert half[0].dtype == half[1].dtype == torch.bfloat16
    pairs = zip(half[:3], whole[:3], strict=True)
    return max(float((a.float() - b).square().mean().sqrt() / b.square().mean().sqrt()) for a, b in pairs)


def recomputed(rank: int, world: int, flat: Any, deep: Any) -> bool:
    """Two micro-batches under activation checkpointing, both forward before any backward, across the end of the warm-up
    and changes of rotation: the same bits as without."""
    found = []
    for kept in (True, False):
        experts = built(deep, world, rate=0.25, warm_up=1, rotation_steps=1, residual="scaled")
        optimizer = torch.optim.AdamW(experts.parameters(), lr=1e-2, fused=True)
        seen = []
        for step in range(3):
            optimizer.zero_grad()
            outs = []
            for part in range(2):
                x, ids, gate = batch_of(rank + 10 * part + 100 * step)
                x.requires_grad_()
                out = experts(x, ids, gate) if kept else checkpoint(experts, x, ids, gate, use_reentrant=False)
                outs.append((out, x))
            sum(out.square().mean() for out, _ in outs).backward()
            seen += [value for out, x in outs for value in (out.detach(), x.grad)]
            seen += [value.grad.clone() for value in experts.parameters()]
            optimizer.step()
        found.append(seen)
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def schedule(rank: int, world: int, flat: Any, deep: Any) -> list[bool]:
    """In which passes a layer compressed: two a step, warm-up of two steps, by an optimizer that tells nobody."""
    experts = built(flat, world, rate=0.25, warm_up=2)
    optimizer = torch.optim.AdamW(experts.parameters(), fused=True)
    compressed = []
    for _ in range(4):
        for _ in range(2):
            passed(experts, *batch_of(rank))
            compressed.append(experts.dispatcher.statistics is not None)
        optimizer.step()
    # An optimizer for each parameter, as those that step in backward: one step together.
    done = experts.optimizer_steps.done
    for value in experts.parameters():
        torch.optim.SGD([value], lr=0.1).step()
    assert experts.optimizer_steps.done == done + 1
    return compressed


def ddp(rank: int, world: int, flat: Any, deep: Any) -> dict[str, Any]:
    """A whole layer under DistributedDataParallel learns, its replicas stay equal."""
    torch.manual_seed(3)
    plan = random_plan(np.random.default_rng([5, 2]), 2, world // 2)
    layer = mp.ExpertParallelMoE(SPEC, plan, deep, 4, compression=LSHCompression(rate=0.3, error_bound=0.8))
    exclude_from_ddp(layer)
    wrapped = torch.nn.parallel.DistributedDataParallel(layer)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        x, _, _ = batch_of(rank)
        loss = (wrapped(x) - 0.5 * x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    rows = {int(e): [p[i].tolist() for p in layer.experts.parameters()] for i, e in enumerate(layer.experts.row_expert)}
    every: list[Any] = [None] * world
    dist.all_gather_object(every, rows)
    seen: dict[int, Any] = {}
    equal = all(seen.setdefault(e, values) == values for part in every for e, values in part.items())
    return {"first": losses[0], "last": losses[-1], "equal": equal}


def counts(rank: int, world: int, flat: Any, deep: Any) -> dict[str, Any]:
    """Rows an expert, summed over ranks, and a plan solved on them."""
    layer = mp.ExpertParallelMoE(SPEC, random_plan(np.random.default_rng(1), 2, 2), flat, 4)
    compressed = torch.nn.ModuleList(
        PlacedExperts(SPEC, random_plan(np.random.default_rng(1), 2, 2), flat, n, compression=LSHCompression(rate=0.2))
        for n in SPEC.moe_layers
    )
    windows, tokens_of = [], []
    for step in range(3):
        x, ids, gate = batch_of(rank + 10 * step)
        for experts in compressed:
            experts(x, ids, gate)
        windows.append(expert_rows(compressed))
        own = torch.bincount(ids.flatten(), minlength=SPEC.experts)
        dist.all_reduce(own)
        tokens_of.append(own.tolist())
    received = [int(experts.dispatcher.counts.sum()) for experts in compressed]
    statistics = mp.RoutingStatistics.from_counts(np.stack(windows), moe_layers=SPEC.moe_layers)
    topology = mp.Topology.preset("a100-pcie", nodes=2, devices_per_node=2)
    plan = mp.solve(mp.Problem(SPEC, topology, statistics), "eplb")
    try:
        said = str(expert_rows(layer))
    except mp.InputError as refusal:
        said = str(refusal)
    return {
        "windows": np.stack(windows).tolist(),
        "tokens": tokens_of,
        "mine": received,
        "slots": plan.physical_to_logical.shape[1],
        "refused": said,
    }


def refusals(rank: int, world: int, flat: Any, deep: Any) -> dict[str, str]:
    plan = random_plan(np.random.default_rng([5, 0]), 2, world // 2)

    class Other:
        def __init__(self, mesh: Any) -> None:
            self.inner = flat_dispatch(mesh)

    cases = {
        "hidden": lambda: PlacedExperts(SPEC, plan, flat, 4, compression=LSHCompression(dimension=17)),
        "dispatch": lambda: PlacedExperts(SPEC, plan, flat, 4, dispatch=Other, compression=LSHCompression()),
        "chunks": lambda: PlacedExperts(SPEC, plan, flat, 4, chunks=2, compression=LSHCompression()),
        "one": lambda: PlacedExperts(
            SPEC, plan, flat, 4, compression=LSHCompression(dimension=17 if rank == 2 else 4, hashes=2)
        ),
    }
    said = {}
    for name, build in cases.items():
        try:
            build()
        except (mp.InputError, mp.UnsupportedError) as refusal:
            said[name] = str(refusal)
    return said
