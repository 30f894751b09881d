"""What each rank does in test_deepspeed.py: AutoEP's engine on Gloo, with experts where a plan says."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks import join_group
from rebalanced_runs import losses_until_rebalanced
from torch import Tensor, nn

import moeplace as mp
from moeplace.runtime.moe.expert_mlps import SwiGLU
from moeplace.runtime.moe.layer import reference_experts

os.environ["DS_ACCELERATOR"] = "cpu"
SPEC = mp.ModelSpec(layers=2, experts=6, top_k=2, hidden_size=16, ffn_size=24, moe_layers=(0, 1))
STEPS, TOKENS = 6, 10


class Experts(nn.Module):
    """As Transformers has Mixtral's."""

    def __init__(self) -> None:
        super().__init__()
        shapes = SwiGLU().shapes(SPEC)
        self.gate_up_proj = nn.Parameter(torch.randn(SPEC.experts, *shapes["gate_up_proj"]) / 4)
        self.down_proj = nn.Parameter(torch.randn(SPEC.experts, *shapes["down_proj"]) / 4)
        self.act_fn = nn.SiLU()


class Block(nn.Module):
    """A mixture of experts in one process, one token and expert at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(SPEC.hidden_size, SPEC.experts, bias=False)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, 1)
        weight_TK, expert_TK = self.gate(x_TD).softmax(dim=-1).topk(SPEC.top_k, dim=-1)
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
        weights = dict(self.experts.named_parameters())
        return reference_experts(x_TD, expert_TK, weight_TK, weights, SwiGLU()).view(x.shape)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Block()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(nn.functional.rms_norm(x, x.shape[-1:]))
        return x + y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.config = SimpleNamespace(num_local_experts=SPEC.experts, num_experts_per_tok=SPEC.top_k)
        self.model = nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(SPEC.layers))})

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.model["layers"]:
            y = layer(y)
        return (y - x.roll(1, dims=1)).square().mean()


def plan_of(seed: int, devices: int, twins: int = 2) -> mp.Plan:
    """Random, with replicas, as many slots on each device and none twice there."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(SPEC.layers):
        own = np.array_split(rng.permutation(SPEC.experts), devices)
        more = [rng.permutation(np.setdiff1d(np.arange(SPEC.experts), part))[:twins] for part in own]
        rows.append(np.concatenate([rng.permutation(np.concatenate(pair)) for pair in zip(own, more, strict=True)]))
    topology = mp.Topology.preset("h100-sxm", devices_per_node=devices)
    return mp.Plan(SPEC, topology, np.stack(rows), np.repeat(np.arange(devices), SPEC.experts // devices + twins))


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(1, TOKENS, SPEC.hidden_size, generator=torch.Generator().manual_seed(10 * step + rank))


def alone(ranks: int) -> list[float]:
    """Mean loss of each step in one process on all ranks' batches."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    curve = []
    for step in range(STEPS):
        loss = torch.stack([model(batch(step, rank)) for rank in range(ranks)]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(loss.detach()))
    return curve


def engine_of(plan: mp.Plan, stage: int, **settings: Any) -> Any:
    import deepspeed

    from moeplace.integrations.deepspeed import planned

    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "expert_parallel": {
            "enabled": True,
            "autoep_size": plan.topology.num_devices,
            "preset_model": "mixtral",
            "use_grouped_mm": False,
        },
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        **settings,
    }
    with planned(plan):
        engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    return engine


def trained(engine: Any, rank: int, steps: range) -> list[float]:
    curve = []
    for step in steps:
        loss = engine(batch(step, rank))
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        curve.append(float(mean) / dist.get_world_size())
    return curve


def prepare(rank: int, world: int, folder: Path) -> None:
    join_group(rank, world, folder)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    import deepspeed

    # Its build would be waited for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", dist_init_required=False, verbose=False)
    deepspeed.utils.logger.setLevel("ERROR")


def replicas_equal(engine: Any) -> bool:
    """Whether all rows of one expert, over the ranks of the first copy, hold the same bits."""
    every: list[Any] = [None] * dist.get_world_size()
    mine = []
    for layer in planned_layers(engine):
        rows = layer.rows(layer.plan)
        own = rows.expert[rows.on(layer.mesh.rank)].tolist()
        values = [[part.tolist() for part in parts] for parts in zip(*layer.tensors(), strict=True)]
        mine += [((layer.layer, expert), value) for expert, value in zip(own, values, strict=True)]
    dist.all_gather_object(every, mine)
    seen: dict[Any, Any] = {}
    return all(seen.setdefault(key, value) == value for part in every for key, value in part)


def planned_layers(engine: Any) -> list[Any]:
    from moeplace.integrations.deepspeed import PlannedMoELayer

    return [module for module in engine.module.modules() if isinstance(module, PlannedMoELayer)]


def parity(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Losses of planned runs by ZeRO stage, of one whose plan changes and of one that goes on from a checkpoint."""
    from moeplace.integrations.deepspeed import PlacedModel

    prepare(rank, world, folder)
    found: dict[str, Any] = {"alone": alone(world), "curves": {}, "replicas": []}
    for stage in (0, 1, 2):
        engine = engine_of(plan_of(stage, 2), stage)
        found["curves"][f"stage {stage}"] = trained(engine, rank, range(STEPS))
        found["replicas"].append(replicas_equal(engine))
    engine = engine_of(plan_of(5, 2), 0)
    curve = trained(engine, rank, range(3))
    placed = PlacedModel(engine)
    found["moves"] = placed.apply_plan(plan_of(6, 2)).moves
    engine.save_checkpoint(str(folder / "saved"))
    found["curves"]["changed"] = curve + trained(engine, rank, range(3, STEPS))
    found["replicas"].append(replicas_equal(engine))
    resumed = engine_of(placed.plan, 0)
    resumed.load_checkpoint(str(folder / "saved"))
    found["curves"]["resumed"] = curve + trained(resumed, rank, range(3, STEPS))
    try:
        engine_of(plan_of(5, 2), 0).load_checkpoint(str(folder / "saved"))
    except mp.InputError as refusal:
        found["other plan"] = str(refusal)
    bare = {name: value for name, value in resumed.module.state_dict().items() if "plan_fingerprint" not in name}
    try:
        resumed.module.load_state_dict(bare, strict=False)
    except mp.InputError as refusal:
        found["no plan"] = str(refusal)
    clipped = engine_of(plan_of(5, 2), 0, gradient_clipping=0.1)
    trained(clipped, rank, range(2))
    found["replicas"].append(replicas_equal(clipped))
    found["recorded"] = recorded(rank, folder)
    dist.destroy_process_group()
    return found


def recorded(rank: int, folder: Path) -> list[list[int]]:
    """Experts of this rank's first layer, as a recorder beside a planned engine has them, and as its router says."""
    engine = engine_of(plan_of(5, 2), 0)
    layer = planned_layers(engine)[0]
    with mp.profile(engine.module, folder / f"trace-{rank}", routers=r"mlp\.router$", num_experts=SPEC.experts):
        engine(batch(0, rank))
    trace = mp.read_trace(folder / f"trace-{rank}")
    x = nn.functional.rms_norm(batch(0, rank), (SPEC.hidden_size,)).flatten(0, 1)
    chosen = layer.router.gate(x).topk(SPEC.top_k, dim=-1).indices
    return [np.sort(trace.expert_ids[:, 0], axis=-1).tolist(), chosen.sort(dim=-1).values.tolist()]


def rebalanced(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """From replicas that help nobody on slow links to a better plan, found beside training."""
    from moeplace.integrations.deepspeed import PlacedModel
    from moeplace.training import Rebalancer

    prepare(rank, world, folder)
    device = mp.Device(compute=1e10, memory=1e9, memory_bandwidth=1e10, intra_bandwidth=1e5)
    topology = mp.Topology(nodes=(mp.Node(devices=(device,) * world, inter_bandwidth=1e5),), intra_latency=0.0)
    plan = mp.Plan(SPEC, topology, np.tile([0, 1, 2, 3, 4, 3, 4, 5, 0, 1], (2, 1)), np.repeat(np.arange(world), 5))
    curves = {}
    for name, every in (("steady", 10_000), ("rebalanced", 4)):
        engine = engine_of(plan, 0)
        placed = PlacedModel(engine)
        rebalancer = Rebalancer(
            placed, None, folder / name, every=every, record_steps=3, solver="search", seconds=1.0, horizon_steps=1e9,
            bytes_per_step=1,
        )  # fmt: skip

        def train(last: int, engine: Any = engine, rebalancer: Any = rebalancer) -> list[float]:
            losses = trained(engine, rank, range(last - 1, last))
            rebalancer.step()
            return losses

        applied = (lambda rebalancer=rebalancer: rebalancer.applied) if name == "rebalanced" else None
        curves[name] = losses_until_rebalanced(train, applied, folder / name)
    changed = placed.plan.fingerprint != plan.fingerprint
    rebalancer.close()
    dist.destroy_process_group()
    return {"curves": curves, "applied": rebalancer.applied, "changed": changed}


def refused(rank: int, world: int, folder: Path) -> dict[str, str]:
    """What is said to plans and settings that do not go together."""
    from moeplace.integrations.deepspeed import PlacedModel

    prepare(rank, world, folder)
    good = plan_of(5, 2)
    wider = mp.Plan(SPEC.replace(ffn_size=48), good.topology, good.physical_to_logical, good.slot_device)
    late = mp.Plan(SPEC.replace(moe_layers=(0, 3)), good.topology, good.physical_to_logical, good.slot_device)
    uneven = mp.Plan(SPEC, good.topology, np.tile([0, 1, 2, 3, 4, 5, 0, 1], (2, 1)), np.repeat([0, 1], [5, 3]))
    said = {}
    for name, build in {
        "model": lambda: engine_of(wider, 0),
        "layer": lambda: engine_of(late, 0),
        "uneven": lambda: engine_of(uneven, 0),
        "stage 3": lambda: engine_of(good, 3)(batch(0, rank)),
        "flat": lambda: PlacedModel(engine_of(good, 1)),
    }.items():
        try:
            build()
        except (mp.InputError, mp.UnsupportedError) as refusal:
            said[name] = str(refusal)
    dist.destroy_process_group()
    return said
