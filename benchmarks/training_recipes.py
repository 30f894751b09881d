"""Recipes that people train with, each over four ranks against one process: equal, or refused in words; never wrong.

Three steps of SGD with momentum on two MoE blocks under a plan with replicas. The error is the largest difference of
any weight from the one process's, over the largest distance that a weight has moved.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from forked_ranks import on_ranks
from runner import Report
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
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
    return float((a - b).detach().abs().max()) if len(a) else 0.0


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


Prepare = Callable[[nn.Sequential], Any]
Trained = tuple[nn.Sequential, nn.Sequential]
"""(before, after) in one process."""


def reference(
    ranks: int = RANKS,
    make: Callable[[nn.Sequential], torch.optim.Optimizer] | None = None,
    prepare: Prepare = lambda model: None,
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    clip: float | None = 0.1,
    batches: Callable[[int, int], Tensor] | None = None,
) -> Trained:
    """One process on the tokens of so many ranks.

    make: the optimizer. prepare: what is done with the model before. loss: of the model and a rank's batch. clip: the
    largest norm, None for any. batches: by step and rank.
    """
    model, before = (nn.Sequential(Whole(0), Whole(1)) for _ in range(2))
    prepare(model)
    optimizer = sgd(model.parameters()) if make is None else make(model)
    for step in range(STEPS):
        given = [(batches or batch)(step, rank) for rank in range(ranks)]
        for x in (x for x in given if len(x)):
            ((loss or loss_of)(model, x) / ranks).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return before, model


def spread(mesh: Any, plan: mp.Plan, **settings: Any) -> nn.Sequential:
    return nn.Sequential(*(spread_block(mesh, plan, layer, **settings) for layer in range(2)))


def spread_block(mesh: Any, plan: mp.Plan, layer: int, **settings: Any) -> Block:
    block, whole = Block(plan.model, plan, mesh, layer, seed=None, **settings), Whole(layer)
    block.gate.load_state_dict(whole.gate.state_dict())
    block.experts.load_logical(dict(whole.experts))
    return block


@dataclass
class Run:
    """A recipe under way. settings: of the layers. calls: the model as it is called. loss, clip, batches: as for
    `reference`."""

    rank: int
    mesh: Any
    plan: mp.Plan
    settings: dict[str, Any] = field(default_factory=dict)
    loss: Callable[[Any, Tensor], Tensor] = loss_of
    clip: float | None = 0.1
    batches: Callable[[int, int], Tensor] = batch

    def __post_init__(self) -> None:
        self.model = spread(self.mesh, self.plan, **self.settings)
        self.calls: Any = self.model
        self.optimizer: Any = None

    def ddp(self, exclude: bool = True) -> Run:
        if exclude:
            mp.exclude_from_ddp(self.model)
        self.calls = DistributedDataParallel(self.model)
        return self

    def step(self, step: int, backward: Callable[[Tensor], Any] = torch.Tensor.backward) -> None:
        if self.optimizer is None:
            self.optimizer = sgd(self.model.parameters())
        backward(self.loss(self.calls, self.batches(step, self.rank)))
        if self.clip is not None:
            mp.clip_grad_norm_(self.model, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, first: int = 0) -> Run:
        for step in range(first, STEPS):
            self.step(step)
        return self

    def error(self, trained: Trained | None = None) -> float:
        return error_of(self.model, trained or reference())


def error_of(blocks: Any, trained: Trained) -> float:
    """Of blocks, against those of one process."""
    before, after = trained
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


def run_of(rank: int, **settings: Any) -> Run:
    return Run(rank, flat(), plan_of(RANKS), settings)


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
    return Run(rank, beside_copies(), plan_of(2), settings={"shard_experts": True}).ddp().steps().error()


@recipe("experts cut over copies, fully_shard, activation checkpointing")
def _(rank: int, folder: Path) -> float:
    run = Run(rank, beside_copies(), plan_of(2), settings={"shard_experts": True})
    for block in run.model:
        fully_shard(block, ignored_params=mp.expert_parameters(run.model))
    run.calls = lambda x: checkpoint(run.model, x, use_reentrant=False)
    return run.steps().error()


@recipe("micro-batches, summed once a step by no_sync")
def _(rank: int, folder: Path) -> float:
    return in_halves(run_of(rank).ddp(), no_sync).error()


@contextmanager
def no_sync(run: Run) -> Iterator[None]:
    with run.calls.no_sync(), mp.no_sync(run.model):
        yield


def in_halves(run: Run, summed_later: Callable[[Run], AbstractContextManager[None]]) -> Run:
    """Takes all steps in two micro-batches each; gradients of the first are summed over ranks with the second's."""

    def halves(step: int) -> None:
        x = batch(step, run.rank)
        with summed_later(run):
            (loss_of(run.calls, x[: TOKENS // 2]) / 2).backward()
        (loss_of(run.calls, x[TOKENS // 2 :]) / 2).backward()

    for step in range(STEPS):
        run.step(step, lambda _, step=step: halves(step))  # type: ignore[misc]
    return run


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


def as_torchrun(rank: int) -> None:
    """What accelerate reads."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"}


def accelerated(rank: int, clips: bool) -> float:
    from accelerate import Accelerator

    as_torchrun(rank)
    accelerator, run = Accelerator(cpu=True, gradient_accumulation_steps=2), run_of(rank)
    mp.exclude_from_ddp(run.model)
    run.calls, run.optimizer = accelerator.prepare(run.model, sgd(run.model.parameters()))
    for step in range(STEPS):
        for half in torch.split(batch(step, rank), TOKENS // 2):
            with accelerator.accumulate(run.calls):
                accelerator.backward(loss_of(run.calls, half))
                if accelerator.sync_gradients and clips:
                    accelerator.clip_grad_norm_(run.model.parameters(), 0.1)
                elif accelerator.sync_gradients:
                    mp.clip_grad_norm_(run.model, 0.1)
                run.optimizer.step()
                run.optimizer.zero_grad()
    return run.error()


@recipe("accelerate with DistributedDataParallel, accumulate")
def _(rank: int, folder: Path) -> float:
    return accelerated(rank, clips=False)


@recipe("accelerate's own clip_grad_norm_")
def _(rank: int, folder: Path) -> float:
    return accelerated(rank, clips=True)


@recipe("accelerate with FSDP 2")
def _(rank: int, folder: Path) -> float:
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    as_torchrun(rank)
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
    return checkpointed(run_of(rank).ddp()).steps().error()


def checkpointed(run: Run) -> Run:
    calls = run.calls
    run.calls = lambda x: checkpoint(calls, x, use_reentrant=False)
    return run


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
    return error_of([block], reference(ranks=2))


@recipe("torch.compile around the model")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.calls = torch.compile(run.calls, backend="aot_eager")
    return run.steps().error()


@recipe("torch.compile with inductor around the model")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.calls = torch.compile(run.calls)
    return run.steps().error()


@recipe("the whole model in bfloat16", torch.bfloat16)
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)
    run.model.bfloat16()
    run.batches = lambda step, rank: batch(step, rank).bfloat16()
    # Steps of the size of weights, beside which their own rounding is small.
    run.clip = None
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.3)
    trained = reference(make=lambda model: torch.optim.SGD(model.parameters(), lr=0.3), clip=None)
    return run.ddp().steps().error(trained)


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
    return error_of(average.module, reference())


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


# Ways of stepping.


@recipe("micro-batches, summed one by one")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()

    def halves(model: Any, x: Tensor) -> Tensor:
        (loss_of(model, x[: TOKENS // 2]) / 2).backward()
        return loss_of(model, x[TOKENS // 2 :]) / 2

    run.loss = halves
    return run.steps().error()


@recipe("optimizer.step(closure)")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.optimizer = sgd(run.model.parameters())
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            run.optimizer.zero_grad()
            loss = loss_of(run.calls, batch(step, rank))
            loss.backward()
            mp.clip_grad_norm_(run.model, 0.1)
            return loss

        run.optimizer.step(closure)
    return run.error()


@recipe("optimizers of experts stepping in backward, by hooks")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.clip, run.optimizer = None, sgd([block.gate.weight for block in run.model])
    for value in mp.expert_parameters(run.model):
        alone = sgd([value])

        def take(value: Tensor, alone: torch.optim.Optimizer = alone) -> None:
            alone.step()
            alone.zero_grad()

        value.register_post_accumulate_grad_hook(take)
    return run.steps().error(reference(clip=None))


@recipe("hooks that change gradients of weights")
def _(rank: int, folder: Path) -> float:
    def bounded(model: nn.Sequential) -> None:
        for block in model:
            for value in block.experts.parameters():
                value.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))

    run = run_of(rank).ddp()
    bounded(run.model)
    # One backward in one process too: the hook sees the gradient of all tokens.
    together = reference(1, prepare=bounded, batches=lambda step, _: torch.cat([batch(step, r) for r in range(RANKS)]))
    return run.steps().error(together)


@recipe("hooks on the experts' backward")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    for block in run.model:
        block.experts.register_full_backward_hook(lambda module, into, out: None)
    return run.steps().error()


@recipe("backward twice, with retain_graph")
def _(rank: int, folder: Path) -> float:
    def twice(loss: Tensor) -> None:
        (loss / 2).backward(retain_graph=True)
        (loss / 2).backward()

    run = run_of(rank)
    for step in range(STEPS):
        run.step(step, lambda loss: (twice(loss), [averaged(block.gate.weight.grad) for block in run.model]))
    return run.error()


@recipe("torch.autograd.grad in place of backward")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)

    def into(loss: Tensor) -> None:
        values = list(run.model.parameters())
        for value, grad in zip(values, torch.autograd.grad(loss, values), strict=True):
            value.grad = grad
        for block in run.model:
            averaged(block.gate.weight.grad)

    for step in range(STEPS):
        run.step(step, into)
    return run.error()


@recipe("backward under set_detect_anomaly")
def _(rank: int, folder: Path) -> float:
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        return run_of(rank).ddp().steps().error()


@recipe("activations kept on the CPU, save_on_cpu")
def _(rank: int, folder: Path) -> float:
    with torch.autograd.graph.save_on_cpu():
        return run_of(rank).ddp().steps().error()


@recipe("gradient of a gradient (penalty)")
def _(rank: int, folder: Path) -> float:
    def penalty(model: Any, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss_of(model, x), x, create_graph=True)
        return loss_of(model, x) + slope.square().sum()

    run = run_of(rank)
    run.loss = penalty
    for step in range(STEPS):
        run.step(step, lambda loss: (loss.backward(), [averaged(block.gate.weight.grad) for block in run.model]))
    return run.error(reference(loss=penalty))


@recipe("torch.func.functional_call")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)

    def call(model: Any, x: Tensor) -> Tensor:
        values = dict(run.model.named_parameters())
        return loss_of(lambda x: torch.func.functional_call(run.model, values, (x,)), x)

    run.loss = call
    for step in range(STEPS):
        run.step(step, lambda loss: (loss.backward(), [averaged(block.gate.weight.grad) for block in run.model]))
    return run.error()


@recipe("torch.func.grad")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)

    def call(values: Any, x: Tensor) -> Tensor:
        return loss_of(lambda x: torch.func.functional_call(run.model, values, (x,)), x)

    def into(loss: Tensor) -> None:
        grads = torch.func.grad(call)(dict(run.model.named_parameters()), batch(run.taken, rank))  # type: ignore[attr-defined]
        for name, value in run.model.named_parameters():
            value.grad = grads[name]

    for step in range(STEPS):
        run.taken = step  # type: ignore[attr-defined]
        run.step(step, into)
    return run.error()


# Tokens.


def some(step: int, rank: int) -> Tensor:
    return batch(step, rank)[: (8, 0, 3, 1)[rank]]


def of_all(model: Any, x: Tensor) -> Tensor:
    return (model(x) - x.roll(1, dims=1)).square().sum() / TOKENS


@recipe("ranks with different numbers of tokens, one with none")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.loss, run.batches = of_all, some
    return run.steps().error(reference(loss=of_all, batches=some))


@recipe("tokens that are not contiguous")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.batches = lambda step, rank: batch(step, rank).repeat(1, 2).t().contiguous()[: SPEC.hidden_size].t()
    assert not run.batches(0, 0).is_contiguous()
    return run.steps().error()


@recipe("evaluation mode, no_grad and inference_mode")
def _(rank: int, folder: Path) -> float:
    run, whole = run_of(rank).ddp().steps(), reference()[1]
    x, worst = batch(9, rank), 0.0
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            worst = max(worst, apart(run.calls.eval()(x), whole(x)))
    return worst


# What is trained.


def frozen(choose: Callable[[str], bool]) -> Recipe:
    def freeze(model: nn.Sequential) -> None:
        for name, value in model.named_parameters():
            value.requires_grad_(not choose(name))

    def train(rank: int, folder: Path) -> float:
        run = run_of(rank)
        freeze(run.model)
        run.ddp() if any(value.requires_grad for block in run.model for value in block.gate.parameters()) else None
        run.optimizer = sgd([value for value in run.model.parameters() if value.requires_grad])

        def make(model: nn.Sequential) -> torch.optim.Optimizer:
            return sgd([value for value in model.parameters() if value.requires_grad])

        return run.steps().error(reference(prepare=freeze, make=make))

    return train


RECIPES |= {
    "frozen experts": (frozen(lambda name: "experts" in name), torch.float32),
    "frozen routers": (frozen(lambda name: "gate.weight" in name), torch.float32),
    "frozen: one of the experts' matrices": (frozen(lambda name: name.endswith("down_proj")), torch.float32),
}


@recipe("copy.deepcopy of the model, trained in its place")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)
    run.model = copy.deepcopy(run.model)
    return run.ddp().steps().error()


@recipe("model.to(float64)")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)
    run.model.to(torch.float64)
    run.batches = lambda step, rank: batch(step, rank).double()
    return run.ddp().steps().error()


@recipe("one block used twice (tied weights)")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    calls = run.calls
    run.calls = lambda x: calls(calls(x))
    return run.steps().error(reference(loss=lambda model, x: loss_of(lambda x: model(model(x)), x)))


@recipe("weights reparametrised (torch.nn.utils.parametrizations)")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)
    nn.utils.parametrizations.weight_norm(run.model[0].experts, "down_proj")
    return run.ddp().steps().error()


@recipe("weights pruned (torch.nn.utils.prune)")
def _(rank: int, folder: Path) -> float:
    from torch.nn.utils import prune

    run = run_of(rank)
    prune.random_unstructured(run.model[0].experts, "down_proj", 0.5)
    return run.ddp().steps().error()


# Optimizers that treat each element for itself, against the same in one process. eps keeps steps from turning with the
# sign of rounding.

ELEMENTWISE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW, amsgrad, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, amsgrad=True, foreach=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3, fused=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01, eps=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, eps=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01, eps=1e-3),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-3, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, eps=1e-3),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, eps=1e-3),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "SGD, nesterov, weight decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
}


def beside_one_process(make: Callable[[Any], torch.optim.Optimizer]) -> Recipe:
    def train(rank: int, folder: Path) -> float:
        run = run_of(rank).ddp()
        run.optimizer = make(run.model.parameters())
        return run.steps().error(reference(make=lambda model: make(model.parameters())))

    return train


RECIPES |= {name: (beside_one_process(make), torch.float32) for name, make in ELEMENTWISE.items()}


def by_groups(model: Any) -> torch.optim.Optimizer:
    experts = [value for block in model for value in block.experts.parameters()]
    return torch.optim.SGD(
        [{"params": experts, "lr": 0.02, "weight_decay": 0.1}, {"params": [block.gate.weight for block in model]}],
        lr=0.05, momentum=0.9,
    )  # fmt: skip


@recipe("groups of parameters with rates of their own")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.optimizer = by_groups(run.model)
    return run.steps().error(reference(make=by_groups))


@recipe("an optimizer made before the plan is applied, not told of it")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.step(0)
    mp.apply(run.model, plan_of(RANKS, 1))
    return run.steps(1).error()


@recipe("PostLocalSGDOptimizer")
def _(rank: int, folder: Path) -> float:
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    run = run_of(rank).ddp()
    averager = PeriodicModelAverager(period=1, warmup_steps=0)
    run.optimizer = PostLocalSGDOptimizer(sgd(run.model.parameters()), averager)
    return run.steps().error()


@recipe("torch.nn.utils.clip_grad_norm_")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.clip = None
    for step in range(STEPS):
        run.step(step, lambda loss: (loss.backward(), nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)))
    return run.error()


# DistributedDataParallel's own settings.


def ddp_with(**settings: Any) -> Recipe:
    def train(rank: int, folder: Path) -> float:
        run = run_of(rank)
        mp.exclude_from_ddp(run.model)
        run.calls = DistributedDataParallel(run.model, **settings)
        return run.steps().error()

    return train


RECIPES |= {
    "DistributedDataParallel, static_graph": (ddp_with(static_graph=True), torch.float32),
    "DistributedDataParallel, find_unused_parameters": (ddp_with(find_unused_parameters=True), torch.float32),
}


@recipe("DistributedDataParallel.join for uneven inputs")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.optimizer = sgd(run.model.parameters())
    with run.calls.join():
        for step in range(STEPS - (rank == 1)):
            loss_of(run.calls, batch(step, rank)).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
    return run.error()


# States in memory and files.


@recipe("state_dict and load_state_dict, strict")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.step(0)
    later = run_of(rank).ddp()
    later.optimizer = sgd(later.model.parameters())
    later.model.load_state_dict(run.model.state_dict(), strict=True)
    later.optimizer.load_state_dict(run.optimizer.state_dict())
    return later.steps(1).error()


@recipe("load_state_dict of a state from under another plan")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.step(0)
    kept = {name: value.clone() for name, value in run.model.state_dict().items()}
    mp.apply(run.model, plan_of(RANKS, 1), run.optimizer)
    run.model.load_state_dict(kept)
    return run.steps(1).error()


@recipe("an optimizer's state_dict from under another plan")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.step(0)
    kept = copy.deepcopy(run.optimizer.state_dict())
    mp.apply(run.model, plan_of(RANKS, 1), run.optimizer)
    run.optimizer.load_state_dict(kept)
    return run.steps(1).error()


@recipe("load_state_dict of a whole model's state")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)
    whole = {f"{n}.experts.{name}": value for n in range(2) for name, value in Whole(n).experts.items()}
    run.model.load_state_dict(whole, strict=False)
    return run.ddp().steps().error()


@recipe("an optimizer's state_dict of a whole model")
def _(rank: int, folder: Path) -> float:
    run, whole = run_of(rank), nn.Sequential(Whole(0), Whole(1))
    names = SwiGLU().shapes(SPEC)
    optimizer = sgd([v for block in whole for v in (*(block.experts[name] for name in names), block.gate.weight)])
    loss_of(whole, batch(0, 0)).backward()
    optimizer.step()
    run.optimizer = sgd(run.model.parameters())
    run.optimizer.load_state_dict(optimizer.state_dict())
    return run.ddp().steps().error()


@recipe("an optimizer's state_dict as ordinary tensors, in a file a rank")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.step(0)
    state = run.optimizer.state_dict()
    for entries in state["state"].values():
        entries.update({key: part.as_subclass(Tensor) for key, part in entries.items() if isinstance(part, Tensor)})
    torch.save(state, folder / f"{rank}.pt")
    run.optimizer = sgd(run.model.parameters())
    run.optimizer.load_state_dict(torch.load(folder / f"{rank}.pt", weights_only=True))
    return run.steps(1).error()


@recipe("torch.save of the model")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp().steps()
    torch.save(run.model, folder / f"{rank}.pt")
    return run.error()


@recipe("torch.save of the optimizer's state_dict")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.step(0)
    torch.save(run.optimizer.state_dict(), folder / f"{rank}.pt")
    run.optimizer.load_state_dict(torch.load(folder / f"{rank}.pt"))
    return run.steps(1).error()


@recipe("exponential averages of weights")
def _(rank: int, folder: Path) -> float:
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    def averaging(model: nn.Sequential) -> AveragedModel:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    run = run_of(rank).ddp()
    average = averaging(run.model)
    for step in range(STEPS):
        run.step(step)
        average.update_parameters(run.model)

    return error_of_average(average, averaging)


def error_of_average(average: AveragedModel, averaging: Callable[[nn.Sequential], AveragedModel]) -> float:
    """Against the same average over the steps of one process."""
    averages = []

    def watched(model: nn.Sequential) -> torch.optim.Optimizer:
        averages.append(averaging(model))
        optimizer = sgd(model.parameters())
        optimizer.register_step_post_hook(lambda *_: averages[0].update_parameters(model))
        return optimizer

    before, _ = reference(make=watched)
    return error_of(average.module, (before, averages[0].module))


def averaged_over_a_change(rank: int, moved: bool) -> float:
    run = run_of(rank).ddp()
    average = AveragedModel(run.model)
    for step in range(STEPS):
        if step == 1:
            mp.apply(run.model, plan_of(RANKS, 1), run.optimizer)
            if moved:
                mp.apply(average, plan_of(RANKS, 1))
        run.step(step)
        average.update_parameters(run.model)

    return error_of_average(average, AveragedModel)


@recipe("averages of weights, moved with a change of plan")
def _(rank: int, folder: Path) -> float:
    return averaged_over_a_change(rank, moved=True)


@recipe("averages of weights, left where they were at a change of plan")
def _(rank: int, folder: Path) -> float:
    return averaged_over_a_change(rank, moved=False)


@recipe("averages of state_dicts over a change of plan")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.step(0)
    average = {name: value.clone() for name, value in run.model.state_dict().items()}
    mp.apply(run.model, plan_of(RANKS, 1), run.optimizer)
    run.steps(1)
    for name, value in run.model.state_dict().items():
        average[name].mul_(0.5).add_(0.5 * value)
    run.model.load_state_dict(average)
    return run.error()


# Models of Transformers.


def language_model() -> Any:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=8,
        num_experts_per_tok=2, use_cache=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return OlmoeForCausalLM(config)


def words(step: int, rank: int) -> Tensor:
    return torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(10 * step + rank))


def parallelized(model: Any) -> Any:
    spec = mp.ModelSpec.from_config(model.config)
    topology = mp.Topology.preset("h100-sxm", devices_per_node=RANKS)
    table = np.stack([np.random.default_rng(layer).permutation(8) for layer in range(2)])
    return mp.parallelize(model, mp.Plan(spec, topology, table, np.arange(8) // 2), flat())


def trained_adapters(model: Any, calls: Any, ranks: list[int]) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1.0)
    for step in range(STEPS):
        for rank in ranks:
            tokens = words(step, rank)
            (calls(input_ids=tokens, labels=tokens).loss / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def with_adapters(rank: int, **settings: Any) -> float:
    from peft import LoraConfig, get_peft_model

    def adapted(model: Any) -> Any:
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(r=4, init_lora_weights="gaussian", **settings))

    model = adapted(parallelized(language_model()))
    mp.exclude_from_ddp(model)
    found = trained_adapters(model, DistributedDataParallel(model), [rank])
    whole = adapted(language_model())
    before = {name: value.detach().clone() for name, value in whole.named_parameters()}
    goal = trained_adapters(whole, whole, list(range(RANKS)))
    return max(apart(found[name], goal[name]) for name in goal) / max(apart(before[name], goal[name]) for name in goal)


@recipe("LoRA (peft) on attention, experts frozen")
def _(rank: int, folder: Path) -> float:
    return with_adapters(rank, target_modules=["q_proj", "v_proj"])


@recipe("LoRA (peft) on experts")
def _(rank: int, folder: Path) -> float:
    return with_adapters(rank, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])


@recipe("an optimizer made before parallelize")
def _(rank: int, folder: Path) -> float:
    model = language_model()
    optimizer = torch.optim.AdamW(model.parameters())
    parallelized(model)
    model(input_ids=words(0, rank), labels=words(0, rank)).loss.backward()
    optimizer.step()
    return float("inf")


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


# Sharding, saving and switches of torch that came with its later versions.


@recipe("activation checkpointing, batches in chunks")
def _(rank: int, folder: Path) -> float:
    return checkpointed(run_of(rank, chunks=2).ddp()).steps().error()


@recipe("delay_weight_gradients, activation checkpointing, batches in chunks")
def _(rank: int, folder: Path) -> float:
    return checkpointed(run_of(rank, chunks=2, delay_weight_gradients=True).ddp()).steps().error()


@recipe("delay_weight_gradients, optimizers of experts stepping in backward")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank, delay_weight_gradients=True).ddp()
    run.clip = None
    experts = mp.expert_parameters(run.model)
    own = {value: sgd([value]) for value in experts}

    def take(value: Tensor) -> None:
        own[value].step()
        own[value].zero_grad()

    for value in experts:
        value.register_post_accumulate_grad_hook(take)
    run.optimizer = sgd([value for value in run.model.parameters() if value not in experts])
    return run.steps().error(reference(clip=None))


@recipe("fully_shard over copies and shards (HSDP)")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for block in run.model:
        fully_shard(block, mesh=both, ignored_params=mp.expert_parameters(run.model))
    return run.steps().error()


@recipe("fully_shard, CPUOffloadPolicy")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)
    policy = CPUOffloadPolicy(pin_memory=False)
    fully_shard(run.model, ignored_params=mp.expert_parameters(run.model), offload_policy=policy)
    return run.steps().error()


@recipe("fully_shard, micro-batches by set_requires_gradient_sync")
def _(rank: int, folder: Path) -> float:
    @contextmanager
    def without_sync(run: Run) -> Iterator[None]:
        run.model.set_requires_gradient_sync(False)
        with mp.no_sync(run.model):
            yield
        run.model.set_requires_gradient_sync(True)

    run = run_of(rank)
    fully_shard(run.model, ignored_params=mp.expert_parameters(run.model))
    return in_halves(run, without_sync).error()


@recipe("torch's replicate, experts ignored")
def _(rank: int, folder: Path) -> float:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    run = run_of(rank)
    replicate(run.model, mesh=flat(), ignored_params=mp.expert_parameters(run.model))
    return run.steps().error()


@recipe("torch's replicate over experts")
def _(rank: int, folder: Path) -> float:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    run = run_of(rank)
    replicate(run.model, mesh=flat())
    return run.steps().error()


@recipe("torch's earlier replicate over experts")
def _(rank: int, folder: Path) -> float:
    from torch.distributed._composable import replicate

    run = run_of(rank)
    replicate(run.model)
    return run.steps().error()


@recipe("torch.compile of routers, one graph each")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)
    for block in run.model:
        block.gate.compile(fullgraph=True, backend="aot_eager")
    return run.ddp().steps().error()


@recipe("torch.compile of blocks, one by one")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)
    for block in run.model:
        block.compile(backend="aot_eager")
    return run.ddp().steps().error()


@recipe("torch.use_deterministic_algorithms")
def _(rank: int, folder: Path) -> float:
    torch.use_deterministic_algorithms(True)
    return run_of(rank).ddp().steps().error()


@recipe("gradients set to zero and kept, zero_grad(set_to_none=False)")
def _(rank: int, folder: Path) -> float:
    return zeroing(run_of(rank).ddp()).steps().error()


def zeroing(run: Run) -> Run:
    """With gradients that are set to zero after a step, not to None."""
    run.optimizer = sgd(run.model.parameters())
    clear = run.optimizer.zero_grad
    run.optimizer.zero_grad = lambda: clear(set_to_none=False)
    return run


@recipe("the same with micro-batches under no_sync")
def _(rank: int, folder: Path) -> float:
    return in_halves(zeroing(run_of(rank).ddp()), no_sync).error()


@recipe("a schedule of rates, OneCycleLR")
def _(rank: int, folder: Path) -> float:
    def scheduled(optimizer: Any) -> Any:
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS + 1)
        optimizer.register_step_post_hook(lambda *_: rates.step())
        return optimizer

    run = run_of(rank).ddp()
    run.optimizer = scheduled(sgd(run.model.parameters()))
    return run.steps().error(reference(make=lambda model: scheduled(sgd(model.parameters()))))


def schedule_free(rank: int, changes: bool) -> float:
    from schedulefree import AdamWScheduleFree

    made: list[Any] = []

    def make(values: Any) -> Any:
        made.append(AdamWScheduleFree(values, lr=0.01, eps=1e-3, warmup_steps=2))
        made[-1].train()
        return made[-1]

    run = run_of(rank).ddp()
    run.optimizer = make(run.model.parameters())
    run.step(0)
    if changes:
        mp.apply(run.model, plan_of(RANKS, 1), run.optimizer)
    run.steps(1)
    trained = reference(make=lambda model: make(model.parameters()))
    for optimizer in made:
        optimizer.eval()
    return run.error(trained)


RECIPES |= {
    "schedule-free AdamW": (lambda rank, folder: schedule_free(rank, False), torch.float32),
    "schedule-free AdamW, change of plan between steps": (
        lambda rank, folder: schedule_free(rank, True), torch.float32,
    ),
}  # fmt: skip


@recipe("Lion (lion_pytorch)")
def _(rank: int, folder: Path) -> float:
    from lion_pytorch import Lion

    run = run_of(rank).ddp()
    run.optimizer = Lion(run.model.parameters(), lr=0.01)
    return run.steps().error(reference(make=lambda model: Lion(model.parameters(), lr=0.01)))


@recipe("Muon of experts (in bfloat16, as it computes), SGD of the rest", torch.bfloat16)
def _(rank: int, folder: Path) -> float:
    from moeplace.runtime import Muon

    run = run_of(rank).ddp()
    experts = mp.expert_parameters(run.model)
    muon = Muon(experts, lr=0.02)
    rest = sgd([value for value in run.model.parameters() if value not in experts])
    run.optimizer = Both(muon, rest)
    trained = reference(
        make=lambda model: Both(
            Muon([value for block in model for value in block.experts.values()], lr=0.02),
            sgd([block.gate.weight for block in model]),
        )
    )
    return run.steps().error(trained)


class Both:
    """Two optimizers that step together."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()


@recipe("async_save_checkpoint, load_checkpoint while it trains on")
def _(rank: int, folder: Path) -> float:
    from moeplace.runtime import async_save_checkpoint

    run = run_of(rank).ddp()
    run.step(0)
    saved = async_save_checkpoint(folder / "saved", run.model, run.optimizer)
    run.step(1)
    saved.result()
    later = Run(rank, flat(), plan_of(RANKS, 2)).ddp()
    later.optimizer = sgd(later.model.parameters())
    mp.load_checkpoint(folder / "saved", later.model, later.optimizer)
    return later.steps(1).error()


@recipe("get_state_dict, dcp.save")
def _(rank: int, folder: Path) -> float:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    run = run_of(rank).ddp()
    run.step(0)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    try:
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "dcp")
    except dcp.api.CheckpointException as several:
        raise next(iter(several.failures.values()))[0] from several
    return run.steps(1).error()


@recipe("get_model_state_dict, set_model_state_dict")
def _(rank: int, folder: Path) -> float:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    run = run_of(rank).ddp()
    run.step(0)
    kept = {name: value.clone() for name, value in get_model_state_dict(run.model).items()}
    set_model_state_dict(run.model, kept)
    return run.steps(1).error()


@recipe("set_model_state_dict of the first rank's, broadcast_from_rank0")
def _(rank: int, folder: Path) -> float:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    run = run_of(rank)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    kept = {name: value.clone() for name, value in get_model_state_dict(run.model).items()} if rank == 0 else {}
    set_model_state_dict(run.model, kept, options=options)
    return run.ddp().steps().error()


@recipe("set_optimizer_state_dict of the first rank's, broadcast_from_rank0")
def _(rank: int, folder: Path) -> float:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    run = run_of(rank).ddp()
    run.step(0)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    kept = copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizer)) if rank == 0 else {}
    set_optimizer_state_dict(run.model, run.optimizer, kept, options=options)
    return run.steps(1).error()


@recipe("torch.save of get_model_state_dict, full_state_dict")
def _(rank: int, folder: Path) -> float:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    run = run_of(rank).ddp().steps()
    whole = get_model_state_dict(run.model, options=StateDictOptions(full_state_dict=True))
    torch.save(whole, folder / f"{rank}.pt")
    return run.error()


@recipe("averages of parameters over ranks (torch's PeriodicModelAverager)")
def _(rank: int, folder: Path) -> float:
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    run = run_of(rank).ddp()
    run.optimizer = sgd(run.model.parameters())
    averager = PeriodicModelAverager(period=1)
    run.optimizer.register_step_post_hook(lambda *_: averager.average_parameters(run.model.parameters()))
    return run.steps().error()


# Optimizers that treat more than an element at a time, norms that are given, what autograd goes through in parts, and
# wrappers of torch and of others.


@recipe("torch.optim.Muon")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.optimizer = Both(torch.optim.Muon(mp.expert_parameters(run.model)), sgd(b.gate.weight for b in run.model))
    return run.steps().error()


def low_bits(name: str) -> Recipe:
    def train(rank: int, folder: Path) -> float:
        import torchao

        return with_optimizer(getattr(torchao.optim, name))(rank, folder)

    return train


RECIPES |= {
    "AdamW8bit (torchao)": (low_bits("AdamW8bit"), torch.float32),
    "AdamW4bit (torchao)": (low_bits("AdamW4bit"), torch.float32),
}


def bits(**settings: Any) -> Recipe:
    def train(rank: int, folder: Path) -> float:
        import bitsandbytes

        def make(values: Any) -> Any:
            return bitsandbytes.optim.AdamW(values, lr=0.01, eps=1e-3, **settings)

        return beside_one_process(make)(rank, folder)

    return train


RECIPES |= {
    "AdamW (bitsandbytes)": (bits(), torch.float32),
    "AdamW (bitsandbytes), optim_bits=8": (bits(optim_bits=8), torch.float32),
    "AdamW, foreach=False, maximize": (
        beside_one_process(lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, foreach=False, maximize=True)),
        torch.float32,
    ),
    "AdamW, rate as a tensor, fused": (
        beside_one_process(lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), eps=1e-3, fused=True)), torch.float32,
    ),
}  # fmt: skip


@recipe("a compiled optimizer step, rate as a tensor")
def _(rank: int, folder: Path) -> float:
    def make(values: Any) -> Any:
        return torch.optim.AdamW(values, lr=torch.tensor(0.01), eps=1e-3, foreach=False)

    run = run_of(rank).ddp()
    run.optimizer = make(run.model.parameters())
    run.optimizer.step = torch.compile(run.optimizer.step, backend="aot_eager")
    return run.steps().error(reference(make=lambda model: make(model.parameters())))


@recipe("clip_grads_with_norm_ by get_total_norm")
def _(rank: int, folder: Path) -> float:
    def clip(loss: Tensor) -> None:
        loss.backward()
        values = list(run.model.parameters())
        norm = nn.utils.get_total_norm([value.grad for value in values])
        nn.utils.clip_grads_with_norm_(values, 0.1, norm)

    run = run_of(rank).ddp()
    run.clip = None
    for step in range(STEPS):
        run.step(step, clip)
    return run.error()


@recipe("clip_grads_with_norm_ by moeplace's norm")
def _(rank: int, folder: Path) -> float:
    def clip(loss: Tensor) -> None:
        loss.backward()
        values = list(run.model.parameters())
        nn.utils.clip_grads_with_norm_(values, 0.1, mp.clip_grad_norm_(run.model, float("inf")))

    run = run_of(rank).ddp()
    run.clip = None
    for step in range(STEPS):
        run.step(step, clip)
    return run.error()


@recipe("clip_grad_value_")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.clip = None
    for step in range(STEPS):
        run.step(step, lambda loss: (loss.backward(), nn.utils.clip_grad_value_(run.model.parameters(), 0.01)))

    def make(model: nn.Sequential) -> Any:
        optimizer = sgd(model.parameters())
        optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_(model.parameters(), 0.01))
        return optimizer

    return run.error(reference(make=make, clip=None))


@recipe("two passes a step, sharpness-aware (SAM)")
def _(rank: int, folder: Path) -> float:
    def aware(model: Any, norm: Callable[[], Tensor], first: Callable[[], Any], second: Callable[[], Any]) -> None:
        values = list(model.parameters())
        kept = [value.detach().clone() for value in values]
        first()
        with torch.no_grad():
            factor = 0.05 / norm()
            for value in values:
                value.add_(value.grad * factor)
        model.zero_grad()
        second()
        with torch.no_grad():
            for value, before in zip(values, kept, strict=True):
                value.copy_(before)

    run = run_of(rank).ddp()
    for step in range(STEPS):

        def again(step: int = step) -> None:
            loss_of(run.calls, batch(step, rank)).backward()

        def both(loss: Tensor, again: Any = again) -> None:
            aware(run.model, lambda: mp.clip_grad_norm_(run.model, float("inf")), loss.backward, again)

        run.step(step, both)

    model, before = (nn.Sequential(Whole(0), Whole(1)) for _ in range(2))
    optimizer = sgd(model.parameters())
    for step in range(STEPS):

        def whole(step: int = step) -> None:
            for r in range(RANKS):
                (loss_of(model, batch(step, r)) / RANKS).backward()

        aware(model, lambda: nn.utils.get_total_norm([v.grad for v in model.parameters()]), whole, whole)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return run.error((before, model))


@recipe("backward into experts, then into the rest (inputs=)")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)
    experts = mp.expert_parameters(run.model)
    rest = [value for value in run.model.parameters() if value not in experts]

    def parts(loss: Tensor) -> None:
        loss.backward(inputs=list(experts), retain_graph=True)
        loss.backward(inputs=rest)
        for value in rest:
            averaged(value.grad)

    for step in range(STEPS):
        run.step(step, parts)
    return run.error()


@recipe("selective checkpointing, products kept")
def _(rank: int, folder: Path) -> float:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
        kept = operator in (torch.ops.aten.mm.default, torch.ops.aten._grouped_mm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    run = run_of(rank).ddp()
    calls = run.calls

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    run.calls = lambda x: checkpoint(calls, x, use_reentrant=False, context_fn=contexts)
    return run.steps().error()


@recipe("selective checkpointing, what came from other ranks kept")
def _(rank: int, folder: Path) -> float:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
        kept = str(operator).startswith("c10d.alltoall")
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    run = run_of(rank).ddp()
    calls = run.calls

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy, allow_cache_entry_mutation=True)

    run.calls = lambda x: checkpoint(calls, x, use_reentrant=False, context_fn=contexts)
    return run.steps().error()


@recipe("checkpoint_wrapper and offload_wrapper around blocks")
def _(rank: int, folder: Path) -> float:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

    run = run_of(rank)
    blocks = list(run.model)
    run.model = nn.Sequential(checkpoint_wrapper(blocks[0]), offload_wrapper(blocks[1]))
    run.ddp().step(0)
    mp.apply(run.model, plan_of(RANKS, 1), run.optimizer)
    run.steps(1)
    return error_of(blocks, reference())


@recipe("frozen experts, thawed after a step")
def _(rank: int, folder: Path) -> float:
    def thawing(model: Any, optimizer: Any) -> Any:
        experts = [value for block in model for value in block.experts.parameters()]
        for value in experts:
            value.requires_grad_(False)

        def thaw(*_: Any) -> None:
            for value in experts:
                value.requires_grad_(True)

        optimizer.register_step_post_hook(thaw)
        return optimizer

    run = run_of(rank)
    run.optimizer = thawing(run.model, sgd(run.model.parameters()))
    return run.ddp().steps().error(reference(make=lambda model: thawing(model, sgd(model.parameters()))))


@recipe("evaluation between forward and backward, no_grad")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()

    def loss(model: Any, x: Tensor) -> Tensor:
        value = loss_of(model, x)
        with torch.no_grad():
            run.model.eval()(batch(9, rank)[: 3 + rank])
        run.model.train()
        return value

    run.loss = loss
    return run.steps().error()


@recipe("two batches under way, the earlier's backward first")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)

    def both(model: Any, x: Tensor) -> Tensor:
        first, second = loss_of(model, x[:3]) * 3 / TOKENS, loss_of(model, x[3:]) * 5 / TOKENS
        first.backward()
        return second

    def whole(model: Any, x: Tensor) -> Tensor:
        return loss_of(model, x[:3]) * 3 / TOKENS + loss_of(model, x[3:]) * 5 / TOKENS

    run.loss = both
    for step in range(STEPS):
        run.step(step, lambda loss: (loss.backward(), [averaged(block.gate.weight.grad) for block in run.model]))
    return run.error(reference(loss=whole))


@recipe("torch.vmap over batches")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank)
    run.loss = lambda model, x: torch.vmap(run.model)(x.view(2, -1, SPEC.hidden_size)).square().mean()
    return run.steps().error()


@recipe("DistributedDataParallel, gradients as views of buckets")
def _(rank: int, folder: Path) -> float:
    return ddp_with(gradient_as_bucket_view=True)(rank, folder)


@recipe("parameters_to_vector, vector_to_parameters")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    run.step(0)
    kept = nn.utils.parameters_to_vector(run.model.parameters()).detach().clone()
    with torch.no_grad():
        for value in run.model.parameters():
            value.zero_()
    nn.utils.vector_to_parameters(kept, run.model.parameters())
    return run.steps(1).error()


@recipe("torch.set_default_dtype(bfloat16), weights in float32")
def _(rank: int, folder: Path) -> float:
    run = run_of(rank).ddp()
    torch.set_default_dtype(torch.bfloat16)
    run.batches = lambda step, rank: torch.randn(
        TOKENS, SPEC.hidden_size, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float32
    )
    run.steps()
    torch.set_default_dtype(torch.float32)
    return run.error()


@recipe("float8 of linear layers (torchao)")
def _(rank: int, folder: Path) -> float:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    run = run_of(rank)
    convert_to_float8_training(run.model, config=Float8LinearConfig(emulate=True))
    return run.ddp().steps().error()


@recipe("float8 of experts (torchao)")
def _(rank: int, folder: Path) -> float:
    from torchao.prototype.moe_training.config import Float8TrainingOpConfig
    from torchao.quantization.quant_api import quantize_

    run = run_of(rank)
    quantize_(run.model, Float8TrainingOpConfig(), filter_fn=lambda module, name: name.endswith("experts"))
    return run.ddp().steps().error()


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
