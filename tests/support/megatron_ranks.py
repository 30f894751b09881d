"""What each rank does in test_megatron.py: megatron-core's own model, schedule, optimizers and checkpoints on CPUs, on
Gloo.

`megatron_stand_ins` says what stands in for a GPU.
"""

from __future__ import annotations

import megatron_stand_ins  # isort: skip # noqa: F401 - before megatron

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from pages import code
from ranks import join_group, wait_for
from rebalanced_runs import losses_until_rebalanced
from torch import Tensor, nn
from torch.nn import functional as F

import moeplace as mp
from moeplace.integrations.megatron import PlacedModel, model_spec, planned
from moeplace.training import Rebalancer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "megatron.md"
VOCABULARY, LENGTH, BATCH, MICRO_BATCHES = 64, 16, 8, 2
"""Tokens known; tokens a sequence; sequences of all ranks a micro-batch, and how many of those a step."""
WIDTH, EXPERTS, TOP_K, LAYERS = 32, 8, 2, 2


def config_of(ep: int, **more: Any) -> TransformerConfig:
    """A small GPT with gated experts."""
    return TransformerConfig(
        num_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=2, ffn_hidden_size=24, moe_ffn_hidden_size=24,
        num_moe_experts=EXPERTS, moe_router_topk=TOP_K, moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall", moe_router_dtype="fp32", expert_model_parallel_size=ep,
        gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False, use_cpu_initialization=True,
        hidden_dropout=0.0, attention_dropout=0.0, bias_activation_fusion=False, bias_dropout_fusion=False,
        **{"params_dtype": torch.float32, "pipeline_dtype": torch.float32, **more},
    )  # fmt: skip


def plan_of(config: TransformerConfig, devices: int, slots: int, seed: int) -> mp.Plan:
    """Replicas of random experts in slots of random devices, up to one on each."""
    draw = np.random.default_rng(seed)
    own = slots // devices
    tables = []
    while len(tables) < LAYERS:
        more = draw.integers(EXPERTS, size=slots - EXPERTS)
        table = draw.permutation(np.concatenate([np.arange(EXPERTS), more]))
        if all(len(set(part)) == own for part in table.reshape(devices, own).tolist()):
            tables.append(table)
    topology = mp.Topology.preset("a100-pcie", devices_per_node=devices)
    return mp.Plan(model_spec(config), topology, np.stack(tables), slot_device=np.repeat(np.arange(devices), own))


class Run:
    """A model in megatron-core's wrapper with its optimizer, and the placed model of both where there is a plan."""

    def __init__(self, ep: int, plan: mp.Plan | None = None, *, distributed: bool = False, **more: Any) -> None:
        torch.manual_seed(3)
        overlap = more.pop("overlap", False)
        self.config = config_of(ep, **more)
        spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
        if plan is not None:
            spec = planned(spec, self.config, plan)
        gpt = GPTModel(self.config, spec, VOCABULARY, LENGTH, position_embedding_type="rope")
        if self.config.bf16:
            gpt.bfloat16()
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=distributed, overlap_grad_reduce=overlap, overlap_param_gather=overlap,
            grad_reduce_in_fp32=True, bucket_size=3000,
        )  # fmt: skip
        self.model = DistributedDataParallel(self.config, settings, gpt)
        self.model.broadcast_params()
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=5e-3, weight_decay=0.01, clip_grad=0.5, bf16=self.config.bf16,
                params_dtype=self.config.params_dtype, use_distributed_optimizer=distributed,
                overlap_param_gather=overlap,
            ),
            [self.model],
        )  # fmt: skip
        self.config.finalize_model_grads_func = finalize_model_grads
        if overlap:
            self.config.no_sync_func = self.model.no_sync
            self.config.grad_sync_func = self.model.start_grad_sync
            self.config.param_sync_func = self.model.start_param_sync
        self.placed = None if plan is None else PlacedModel([self.model], self.optimizer)
        self.steps = 0

    def train(self, steps: int, changes: dict[int, mp.Plan] | None = None) -> dict[str, Any]:
        """Up to a step, with a change of plan after some."""
        curve, norms, moved = [], [], 0
        while self.steps < steps:
            loss, norm = self.step()
            curve.append(loss)
            norms.append(norm)
            if changes and self.steps in changes:
                moved += self.placed.apply_plan(changes[self.steps]).moves
        return {"curve": curve, "norms": norms, "moved": moved}

    def step(self) -> tuple[float, float]:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        rank, world = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=numbers(self.steps, rank, world), model=[self.model],
            num_microbatches=MICRO_BATCHES, seq_length=LENGTH, micro_batch_size=BATCH // world, forward_only=False,
        )  # fmt: skip
        _, norm, _ = self.optimizer.step()
        self.steps += 1
        total = torch.stack(losses).mean()
        dist.all_reduce(total)
        return float(total) / world, float(norm)

    def sharded(self, is_loading: bool = False, *, optimizer: bool = True) -> dict[str, Any]:
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        model = self.model.module.sharded_state_dict(metadata=metadata)
        if not optimizer:
            return {"model": model}
        return {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
        }

    def save(self, folder: Path, *, optimizer: bool = True) -> None:
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
        dist.barrier()
        self.gathered()
        dist_checkpointing.save(self.sharded(optimizer=optimizer), str(folder))

    def gathered(self) -> None:
        """Parameters that overlap leaves to the next forward pass, as Megatron-LM gathers them before it saves."""
        if self.model.ddp_config.overlap_param_gather:
            self.model.start_param_sync(force_sync=True)

    def load(self, folder: Path, step: int) -> None:
        """Of step 0 there is no optimizer's state."""
        if step and self.model.ddp_config.use_distributed_optimizer:
            # The distributed optimizer over torch's Adam reads a checkpoint into state that is there alone.
            for part in self.optimizer.chained_optimizers:
                part._init_optimizer_states_with_dummy_values()
        state = dist_checkpointing.load(self.sharded(is_loading=True, optimizer=step > 0), str(folder))
        self.model.module.load_state_dict(state["model"])
        if step:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.optimizer.reload_model_params()
        self.steps = step

    def replicas_equal(self) -> bool:
        """Whether all that hold an expert hold the same, optimizer state too."""
        self.gathered()
        every: list[Any] = [None] * dist.get_world_size()
        held: dict[tuple[int, int], list[list[float]]] = {}
        mine = []
        for layer in self.placed.layers:
            rows = layer.rows(layer.plan)
            tensors = layer.tensors()
            for row, expert in enumerate(rows.expert[rows.on(layer.mesh.rank)].tolist()):
                mine.append((layer.layer, expert, [float(t[row].double().sum()) for t in tensors]))
        dist.all_gather_object(every, mine)
        for layer, expert, sums in (entry for part in every for entry in part):
            held.setdefault((layer, expert), []).append(sums)
        return all(sums == group[0] for group in held.values() for sums in group)


def numbers(step: int, rank: int, world: int) -> Any:
    """The same sequences in every run, each rank its part of them: token t is followed by mostly 3t + 1."""
    for micro in range(MICRO_BATCHES):
        draw = np.random.default_rng((step, micro))
        token = np.empty((BATCH, LENGTH + 1), dtype=np.int64)
        token[:, 0] = draw.integers(VOCABULARY, size=BATCH)
        for i in range(LENGTH):
            noise = draw.integers(VOCABULARY, size=BATCH)
            token[:, i + 1] = np.where(draw.random(BATCH) < 0.8, (3 * token[:, i] + 1) % VOCABULARY, noise)
        yield torch.from_numpy(token[rank * (BATCH // world) :][: BATCH // world])


def forward_step(data: Any, model: nn.Module) -> Any:
    token = next(data)
    position = torch.arange(LENGTH).expand(len(token), -1)
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    output = model(token[:, :-1].contiguous(), position, later, labels=token[:, 1:].contiguous())

    def loss_func(output: Tensor) -> tuple[Tensor, Tensor]:
        loss = output.float().mean()
        return loss, loss.detach()

    return output, loss_func


def join(rank: int, world: int, folder: Path, ep: int, name: str = "rendezvous") -> None:
    os.environ.update(LOCAL_RANK="0", RANK=str(rank), WORLD_SIZE=str(world))
    if not dist.is_initialized():
        join_group(rank, world, folder, name=name)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep)


CASES = {
    2: {"two": (2, 10, {})},
    4: {
        "four": (4, 12, {"distributed": True}),
        "two by two, flat shards, overlapped": (2, 10, {"distributed": True, "overlap": True}),
    },
}
"""By number of ranks: (ranks of expert parallelism, slots, settings)."""


def parity(rank: int, world: int, folder: Path) -> Any:
    """One process, as megatron-core trains; then together, experts placed, from the same weights."""
    result: dict[str, Any] = {}
    if rank == 0:
        join(0, 1, folder, 1, "rendezvous-alone")
        run = Run(1)
        run.save(folder / "seed", optimizer=False)
        result["alone"] = run.train(6)
        run.save(folder / "alone")
        later = run.train(8)
        result["alone"] = {name: result["alone"][name] + later[name] for name in ("curve", "norms")}
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        (folder / "seeded").touch()
    wait_for(folder / "seeded")
    for number, (case, (ep, slots, settings)) in enumerate(CASES[world].items()):
        join(rank, world, folder, ep)
        plans = [plan_of(config_of(ep), ep, slots, seed) for seed in (1, 2, 3)]
        run = Run(ep, plans[0], **settings)
        run.load(folder / "seed", 0)
        found = run.train(6, {2: plans[1], 4: plans[0]})
        found["replicas equal"] = run.replicas_equal()
        run.save(folder / f"case{number}")
        resumed = Run(ep, plans[2], **settings)
        resumed.load(folder / f"case{number}", 6)
        found["resumed"] = resumed.train(8)
        result[case] = found
    dist.destroy_process_group()
    return result


def half(rank: int, world: int, folder: Path) -> Any:
    """In bfloat16, with and without changes of plan, under both kinds of optimizer."""
    result: dict[str, Any] = {}
    settings = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    for case, more in (
        ("whole", {}),
        ("flat shards", {"distributed": True}),
    ):
        join(rank, world, folder, 2)
        plans = [plan_of(config_of(2), 2, 10, seed) for seed in (1, 2, 3)]
        kept = Run(2, plans[0], **settings, **more).train(6)
        run = Run(2, plans[0], **settings, **more)
        changed = run.train(6, {2: plans[1], 4: plans[2]})
        result[case] = {
            "kept": kept["curve"], "changed": changed["curve"], "moved": changed["moved"],
            "replicas equal": run.replicas_equal(),
        }  # fmt: skip
    dist.destroy_process_group()
    return result


def rebalanced(rank: int, world: int, folder: Path) -> Any:
    """From experts in index order on slow links to a better plan, found beside training."""
    join(rank, world, folder, world)
    device = mp.Device(compute=1e10, memory=1e9, memory_bandwidth=1e10, intra_bandwidth=1e5)
    topology = mp.Topology(nodes=(mp.Node(devices=(device,) * world, inter_bandwidth=1e5),), intra_latency=0.0)
    # Second slots of two experts, and none of those that the other device has most of.
    table = np.tile([0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 0, 1], (LAYERS, 1))
    plan = mp.Plan(model_spec(config_of(world)), topology, table, slot_device=np.repeat(np.arange(world), 6))
    curves = {}
    for name in ("kept", "rebalanced"):
        run = Run(world, plan)
        rebalancer = Rebalancer(
            run.placed, None, folder / name, every=4 if name == "rebalanced" else 10_000, record_steps=3,
            solver="search", seconds=1.0, horizon_steps=1e9, bytes_per_step=1,
        )  # fmt: skip

        def train(last: int, run: Any = run, rebalancer: Any = rebalancer) -> list[float]:
            losses: list[float] = run.train(last)["curve"]
            rebalancer.step()
            return losses

        applied = (lambda rebalancer=rebalancer: rebalancer.applied) if name == "rebalanced" else None
        curves[name] = losses_until_rebalanced(train, applied, folder / name)
    found = {
        "curves": curves,
        "applied": rebalancer.applied,
        "changed": run.placed.plan.fingerprint != plan.fingerprint,
    }
    rebalancer.close()
    dist.destroy_process_group()
    return found


def refused(rank: int, world: int, folder: Path) -> Any:
    join(rank, world, folder, 1)
    config, spec = config_of(1), get_gpt_layer_local_spec(num_experts=EXPERTS)
    plan = plan_of(config, 1, 8, 0)
    said = {}

    def refusal(name: str, call: Any) -> None:
        try:
            call()
        except (mp.InputError, mp.UnsupportedError) as error:
            said[name] = str(error)

    twice = mp.Plan(plan.model, plan.topology, np.tile([*range(8), 7], (LAYERS, 1)), slot_device=np.zeros(9, dtype=int))
    refusal("model", lambda: planned(spec, config, dataclasses.replace(plan, model=plan.model.replace(ffn_size=48))))
    refusal("devices", lambda: planned(spec, config, plan_of(config, 2, 10, 0)))
    refusal("twice", lambda: planned(spec, config, twice))
    capacity = config_of(1, moe_pad_expert_input_to_capacity=True, moe_expert_capacity_factor=1.0)
    refusal("capacity", lambda: planned(spec, capacity, plan))
    refusal("dense", lambda: planned(get_gpt_layer_local_spec(), config, plan))
    unplanned, run = Run(1), Run(1, plan, distributed=True)
    refusal("unplanned", lambda: PlacedModel([unplanned.model], unplanned.optimizer))
    refusal("unwrapped", lambda: PlacedModel([run.model.module], run.optimizer))
    # As --ckpt-format torch writes it: slot by slot, under the plan then in force.
    other = Run(1, plan_of(config, 1, 8, 1), distributed=True)
    refusal("slots", lambda: other.model.module.load_state_dict(run.model.module.state_dict()))
    refusal("slots, not strictly", lambda: other.model.load_state_dict(run.model.state_dict(), strict=False))
    again = Run(1, plan, distributed=True)
    refusal("same slots", lambda: again.model.module.load_state_dict(run.model.module.state_dict()))
    metadata = {"distrib_optim_sharding_type": "dp_reshardable"}
    refusal("flat checkpoint", lambda: run.optimizer.sharded_state_dict({}, metadata=metadata))
    dist.destroy_process_group()
    return said


def page(rank: int, world: int, folder: Path) -> Any:
    """The how-to page as written, at the size of the tests: a run recorded, solved for, and planned."""
    recorded, train = code(PAGE, "py")
    join(rank, world, folder, world)
    os.chdir(folder)
    plain = Run(world)
    names: dict[str, Any] = {
        "gpt": plain.model.module, "config": plain.config, "train": lambda steps: plain.train(min(steps, 3))
    }  # fmt: skip
    exec(recorded, names)  # noqa: S102 - the page's own lines
    dist.barrier()
    if rank == 0:
        solve = next(line for line in code(PAGE, "sh")[1].splitlines() if line.startswith("moeplace solve"))
        for words, others in (
            ("node 4", f"node {world}"), ("slots 72", "slots 12"), ("size 4096", f"size {WIDTH}"),
            ("size 1536", "size 24"), ("seconds 10", "seconds 1"),
        ):  # fmt: skip
            solve = solve.replace(words, others)
        subprocess.run([sys.executable, "-m", "moeplace", *solve.split()[1:]], check=True)
    dist.barrier()
    curve: list[float] = []
    run = Run(world)

    def train_step(model: nn.Module, optimizer: Any) -> None:
        run.model, run.optimizer = model, optimizer
        curve.append(run.step()[0])

    names |= {
        "config": run.config, "layers": get_gpt_layer_local_spec(num_experts=EXPERTS), "vocabulary": VOCABULARY,
        "length": LENGTH, "steps": 2, "ddp_config": run.model.ddp_config, "train_step": train_step,
        "optimizer_config": run.optimizer.chained_optimizers[0].config,
    }  # fmt: skip
    exec(train, names)  # noqa: S102
    dist.destroy_process_group()
    return {"curve": curve, "slots": names["placed"].plan.num_slots}
