"""Recipes that people train with, each over four ranks against one process: equal, or refused in words; never wrong.

Three steps of SGD with momentum on two MoE blocks under a plan with replicas. The error is the largest difference of
any weight from the one process's, over the largest distance that a weight has moved.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from forked_ranks import on_ranks
from runner import Report
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import moeplace as mp
from moeplace.runtime.moe.expert_mlps import SwiGLU
from moeplace.runtime.moe.layer import SoftmaxRouter, reference_experts

RANKS, STEPS, TOKENS = 4, 3, 8
SPEC = mp.ModelSpec(layers=2, experts=8, top_k=2, hidden_size=16, ffn_size=16, expert_dtype="fp32")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Above this a recipe is wrong: rounding of some thousand terms, and of bfloat16."""


class Whole(nn.Module):
    """A block in one process, one token and expert at a time."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        torch.manual_seed(layer)
        self.gate = SoftmaxRouter(SPEC.hidden_size, SPEC.experts, SPEC.top_k)
        self.experts = nn.ParameterDict(
            {name: torch.randn(SPEC.experts, *shape) / 4 for name, shape in SwiGLU().shapes(SPEC).items()}
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        _, weight_TK, expert_TK = self.gate(x_TD)
        return x_TD + reference_experts(x_TD, expert_TK, weight_TK, self.experts, SwiGLU())


class Block(mp.ExpertParallelMoE):
    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD + super().forward(x_TD)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if len(a) else 0.0


def plan_of(devices: int, seed: int = 0) -> mp.Plan:
    rng = np.random.default_rng(seed)
    table = np.stack([rng.permutation(np.concatenate([np.arange(8), rng.integers(8, size=4)])) for _ in range(2)])
    topology = mp.Topology.preset("h100-sxm", devices_per_node=devices)
    return mp.Plan(SPEC, topology, table, np.sort(np.arange(12) % devices))


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(TOKENS, SPEC.hidden_size, generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return (model(x).float() - x.roll(1, dims=1)).square().mean()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def reference(ranks: int) -> tuple[nn.Sequential, nn.Sequential]:
    """(before, after) in one process, on the tokens of so many ranks."""
    model, before = (nn.Sequential(Whole(0), Whole(1)) for _ in range(2))
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        for rank in range(ranks):
            (loss_of(model, batch(step, rank)) / ranks).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return before, model


def spread(mesh: Any, plan: mp.Plan, cut: bool) -> nn.Sequential:
    return nn.Sequential(*(spread_block(mesh, plan, layer, cut) for layer in range(2)))


def spread_block(mesh: Any, plan: mp.Plan, layer: int, cut: bool = False) -> Block:
    block, whole = Block(plan.model, plan, mesh, layer, seed=None, shard_experts=cut), Whole(layer)
    block.gate.load_state_dict(whole.gate.state_dict())
    block.experts.load_logical(dict(whole.experts))
    return block


@dataclass
class Run:
    """A recipe under way. cut: experts over copies. calls: the model as it is called."""

    rank: int
    mesh: Any
    plan: mp.Plan
    cut: bool = False

    def __post_init__(self) -> None:
        self.model = spread(self.mesh, self.plan, self.cut)
        self.calls: Any = self.model
        self.optimizer: Any = None

    def ddp(self, exclude: bool = True) -> Run:
        if exclude:
            mp.exclude_from_ddp(self.model)
        self.calls = DistributedDataParallel(self.model)
        return self

    def step(self, step: int, backward: Callable[[Tensor], None] = torch.Tensor.backward) -> None:
        if self.optimizer is None:
            self.optimizer = sgd(self.model.parameters())
        backward(loss_of(self.calls, batch(step, self.rank)))
        mp.clip_grad_norm_(self.model, 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, first: int = 0) -> Run:
        for step in range(first, STEPS):
            self.step(step)
        return self

    def error(self) -> float:
        return error_of(self.model)


def error_of(blocks: Sequence[Block] | nn.Sequential, ranks: int = RANKS) -> float:
    """Of blocks whose tokens were those of so many ranks."""
    before, after = reference(ranks)
    worst = moved = 0.0
    for block in blocks:
        layer = block.experts
        first, goal = before[layer.layer], after[layer.layer]
        rows = torch.from_numpy(layer.row_expert)
        for name, value in layer.named_parameters(recurse=False):
            worst = max(worst, apart(layer.joined(value), goal.experts[name][rows]))
            moved = max(moved, apart(first.experts[name], goal.experts[name]))
        gate = block.gate.weight
        worst = max(worst, apart(gate.full_tensor() if isinstance(gate, DTensor) else gate, goal.gate.weight))
        moved = max(moved, apart(first.gate.weight, goal.gate.weight))
    return worst / moved


Recipe = Callable[[int, Path], Any]
RECIPES: dict[str, tuple[Recipe, torch.dtype]] = {}


def recipe(name: str, dtype: torch.dtype = torch.float32) -> Callable[[Recipe], Recipe]:
    def add(function: Recipe) -> Recipe:
        RECIPES[name] = (function, dtype)
        return function

    return add


def flat() -> DeviceMesh:
    return init_device_mesh("cpu", (RANKS,))


def beside_copies() -> DeviceMesh:
    """Two devices, and two copies of each."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))["ep"]


def run_of(rank: int) -> Run:
    return Run(rank, flat(), plan_of(RANKS))


@recipe("DistributedDataParallel, experts over all ranks")
def _(rank: int, folder: Path) -> float:
    return run_of(rank).ddp().steps().error()


@recipe("DistributedDataParallel, nodes of two ranks")
def _(rank: int, folder: Path) -> float:
    topology = mp.Topology.preset("h100-sxm", nodes=2, devices_per_node=2)
    flat_plan = plan_of(RANKS)
    plan = mp.Plan(SPEC, topology, flat_plan.physical_to_logical, flat_plan.slot_device)
    return Run(rank, init_device_mesh("cpu", (2, 2)), plan).ddp().steps().error()


@recipe("data parallelism of experts, dp 2 x ep 2")
def _(rank: int, folder: Path) -> float:
    return Run(rank, beside_copies(), plan_of(2)).ddp().steps().error()


@recipe("experts cut over copies (shard_experts), dp 2 x ep 2")
def _(rank: int, folder: Path) -> float:
    return Run(rank, beside_copies(), plan_of(2), cut=True).ddp().steps().error()


@recipe("experts cut over copies, fully_shard, activation checkpointing")
def _(rank: int, folder: Path) -> float:
    run = Run(rank, beside_copies(), plan_of(2), cut=True)
    for block in run.model:
        fully_shard(block, ignored_params=mp.expert_parameters(run.model))
    run.calls = lambda x: checkpoint(run.model, x, use_reentrant=False)
    return run.steps().error()


@recipe("micro-batches, summed once a step by no_sync")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()

    def halves(loss: Tensor) -> None:
        del loss
        x = batch(run.taken, rank)
        with run.calls.no_sync(), mp.no_sync(run.model):
            (loss_of(run.calls, x[: TOKENS // 2]) / 2).backward()
        (loss_of(run.calls, x[TOKENS // 2 :]) / 2).backward()

    for step in range(STEPS):
        run.taken = step  # type: ignore[attr-defined]
        run.step(step, halves)
    return run.error()


@recipe("fully_shard with ignored_params")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)
    fully_shard(run.model, ignored_params=mp.expert_parameters(run.model))
    return run.steps().error()


@recipe("fully_shard, MixedPrecisionPolicy(param_dtype=bfloat16)", torch.bfloat16)
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(run.model, ignored_params=mp.expert_parameters(run.model), mp_policy=policy)
    return run.steps().error()


@recipe("autocast in bfloat16", torch.bfloat16)
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    calls = run.calls

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return calls(x)

    run.calls = cast
    return run.steps().error()


@recipe("fully_shard without ignored_params")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)
    fully_shard(run.model)
    return run.steps().error()


@recipe("FullyShardedDataParallel over experts")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)
    run.calls = FullyShardedDataParallel(run.model, device_id=torch.device("cpu"), use_orig_params=True)
    return run.steps().error()


@recipe("accelerate with FSDP 2")
def _(rank: int, folder: Path) -> float:
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # Accelerate takes its plugin on GPUs alone; what it then does with the model is the same on CPUs.
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    run = run_of(rank)
    run.calls, run.optimizer = accelerator.prepare(run.model, sgd(run.model.parameters()))
    return run.steps().error()


@recipe("DistributedDataParallel without exclude_from_ddp")
def _(rank: int, folder: Path) -> float:
    return run_of(rank).ddp(exclude=False).steps().error()


@recipe("activation checkpointing, use_reentrant=False, from the first forward")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    calls = run.calls
    run.calls = lambda x: checkpoint(calls, x, use_reentrant=False)
    return run.steps().error()


@recipe("activation checkpointing, use_reentrant=True")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)
    model = run.model
    run.calls = lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=True)
    for step in range(STEPS):
        run.step(step, lambda loss: (loss.backward(), [averaged(block.gate.weight.grad) for block in model]))
    return run.error()


def averaged(value: Tensor) -> None:
    dist.all_reduce(value)
    value.div_(RANKS)


@recipe("pipeline stages, GPipe 2 x EP 2")
def _(rank: int, folder: Path) -> float:
    root = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "ep"))
    stage, place = divmod(rank, 2)
    block = spread_block(root["ep"], plan_of(2).select([stage]), stage)
    part = PipelineStage(block, stage, 2, torch.device("cpu"), group=root["pp"].get_group())
    schedule = ScheduleGPipe(part, 2, loss_fn=lambda out, x: (out - x.roll(1, dims=1)).square().mean())
    optimizer = sgd(block.parameters())
    for step in range(STEPS):
        x = batch(step, place)
        schedule.step(x) if stage == 0 else schedule.step(target=x)
        dist.all_reduce(block.gate.weight.grad, group=root["ep"].get_group())
        block.gate.weight.grad.div_(2)
        mp.clip_grad_norm_(block, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return error_of([block], ranks=2)


@recipe("torch.compile around the model")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.calls = torch.compile(run.calls, backend="aot_eager")
    return run.steps().error()


@recipe("GradScaler")
def _(rank: int, folder: Path) -> float:
    return scaled(run_of(rank), torch.amp.GradScaler("cpu", init_scale=1024.0))


@recipe("ShardedGradScaler")
def _(rank: int, folder: Path) -> float:
    return scaled(run_of(rank), ShardedGradScaler("cpu", init_scale=1024.0))


def scaled(run: Run, scaler: Any) -> float:
    run.ddp()
    run.optimizer = sgd(run.model.parameters())
    for step in range(STEPS):
        scaler.scale(loss_of(run.calls, batch(step, run.rank))).backward()
        scaler.unscale_(run.optimizer)
        mp.clip_grad_norm_(run.model, 0.1)
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
    return run.error()


def with_optimizer(make: Callable[[Any], Any]) -> Recipe:
    def train(rank: int, folder: Path) -> float:
        run = run_of(rank).ddp()
        run.optimizer = make(run.model.parameters())
        return run.steps().error()

    return train


class OwnOptimizer(torch.optim.SGD.__mro__[1]):  # type: ignore[misc]
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        pass


RECIPES |= {
    "SGD, fused": (with_optimizer(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True)), torch.float32),
    "ZeroRedundancyOptimizer": (
        with_optimizer(lambda p: ZeroRedundancyOptimizer(p, torch.optim.SGD, lr=0.05, momentum=0.9)), torch.float32,
    ),
    "Adafactor": (with_optimizer(torch.optim.Adafactor), torch.float32),
    "LBFGS": (with_optimizer(torch.optim.LBFGS), torch.float32),
    "an optimizer of an unknown class": (with_optimizer(OwnOptimizer), torch.float32),
}  # fmt: skip


@recipe("averages of weights, AveragedModel")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    average = AveragedModel(run.model, avg_fn=lambda old, new, count: new)
    for step in range(STEPS):
        run.step(step)
        average.update_parameters(run.model)
    mp.apply(run.model, plan_of(RANKS, 1), run.optimizer)  # of the model alone: the average stays where it is
    assert torch.allclose(average(batch(9, rank)), run.model(batch(9, rank)), atol=1e-5)
    return error_of(average.module)


@recipe("change of plan between steps")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.step(0)
    mp.apply(run.model, plan_of(RANKS, 1), run.optimizer)
    return run.steps(1).error()


@recipe("save_checkpoint, load_checkpoint under another plan")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.step(0)
    mp.save_checkpoint(folder / "saved", run.model, run.optimizer)
    later = Run(rank, flat(), plan_of(RANKS, 2)).ddp()
    later.optimizer = sgd(later.model.parameters())
    mp.load_checkpoint(folder / "saved", later.model, later.optimizer)
    return later.steps(1).error()


@recipe("a mesh of some ranks, on its own")
def _(rank: int, folder: Path) -> float:
    part = beside_copies()
    return Run(rank, DeviceMesh.from_group(part.get_group(), "cpu"), plan_of(2)).ddp().steps().error()


@recipe("a mesh that cuts experts, tp 2 x ep 2")
def _(rank: int, folder: Path) -> float:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "ep"))["ep"]
    return Run(rank, mesh, plan_of(2)).ddp().steps().error()


@recipe("DeepSpeed, ZeRO 1")
def _(rank: int, folder: Path) -> float:
    import deepspeed

    run = run_of(rank)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    config = {
        "train_micro_batch_size_per_gpu": TOKENS, "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }  # fmt: skip
    run.calls = deepspeed.initialize(
        model=run.model, model_parameters=run.model.parameters(), config=config, dist_init_required=False
    )[0]
    return run.steps().error()


def attempt(rank: int, ranks: int, name: str, folder: str) -> tuple[str, float, str]:
    """(how it ended, error, words)."""
    function, _ = RECIPES[name]
    dist.barrier()
    try:
        return "ran", float(function(rank, Path(folder))), ""
    except mp.MoeplaceError as refusal:
        return "refused", 0.0, str(refusal)
    except ModuleNotFoundError as missing:
        return "missing", 0.0, str(missing)
    except Exception as error:  # noqa: BLE001  # what a recipe does wrong is what is asked
        return "crash", 0.0, f"{type(error).__name__}: {error}"


def outcome(name: str) -> tuple[str, str]:
    """(equal, refused, wrong, crash or not installed; the error, or the words)."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            parts = on_ranks(attempt, RANKS, name, folder)
        except SystemExit as gone:
            return "crash", str(gone)
    ended = {part[0] for part in parts}
    worst = max(part[1] for part in parts)
    if ended == {"ran"}:
        return ("equal" if worst <= TOLERANCE[RECIPES[name][1]] else "wrong"), f"{worst:.1e}"
    for kind, result in (("crash", "crash"), ("missing", "not installed"), ("refused", "refused")):
        if kind in ended:
            words = next(part[2] for part in parts if part[0] == kind).replace("|", "/")
            return (result if ended == {kind} else "crash"), words.split(". ")[0][:180]
    raise AssertionError(ended)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", default=[], help="recipes whose name contains one of these")


def run(options: argparse.Namespace, report: Report) -> None:
    table = report.table("Recipes", ("recipe", "result", "error, or what is said"))
    bad = []
    for name in RECIPES:
        if options.only and not any(part in name for part in options.only):
            continue
        result, words = outcome(name)
        table.row(name, result, words)
        if result in ("wrong", "crash"):
            bad.append(name)
    if bad:
        report.failure = f"wrong or crashed: {', '.join(bad)}"
