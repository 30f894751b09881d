"""What each rank does in test_torchtitan.py: torchtitan's own trainer on CPUs, with Gloo.

`torchtitan_stand_ins` says what stands in for a GPU.
"""

from __future__ import annotations

import torchtitan_stand_ins  # isort: skip # noqa: F401 - before torchtitan

import copy
import dataclasses
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pages import code
from ranks import join_group, wait_for
from rebalanced_runs import losses_until_rebalanced
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.config.configs import DebugConfig
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import (
    make_gqa_config,
    make_moe_config,
    make_router_config,
    make_token_dispatcher_config,
)
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.qwen3 import model_registry
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock
from torchtitan.trainer import Trainer

import moeplace as mp
from moeplace.integrations import torchtitan
from moeplace.integrations.torchtitan import PlannedTrainer, Rebalancing, model_spec, planned

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "torchtitan.md"
VOCABULARY, LENGTH, BATCH = 64, 16, 8
"""Tokens known; tokens a sequence; sequences of all ranks a step."""


class NoTokenizer(BaseTokenizer):
    """Text is numbers already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, *_: Any, **__: Any) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        return VOCABULARY


class Numbers(BaseDataLoader):
    """The same sequences in every run, each rank its part of them: token t is followed by mostly 3t + 1."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: Any) -> None:
        self._world, self._rank, self._size, self._step = dp_world_size, dp_rank, local_batch_size, 0

    def __iter__(self) -> Any:
        while True:
            draw = np.random.default_rng(self._step)
            token = np.empty((self._world * self._size, LENGTH + 1), dtype=np.int64)
            token[:, 0] = draw.integers(VOCABULARY, size=len(token))
            for i in range(LENGTH):
                noise = draw.integers(VOCABULARY, size=len(token))
                token[:, i + 1] = np.where(draw.random(len(token)) < 0.8, (3 * token[:, i] + 1) % VOCABULARY, noise)
            mine = torch.from_numpy(token[self._rank * self._size :][: self._size])
            self._step += 1
            yield {"input": mine[:, :-1].contiguous()}, mine[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]


class Float32Experts(GroupedExperts):
    """torchtitan's experts without its bfloat16, so that sums in another order differ by float32's rounding alone."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        w1, w2, w3 = (getattr(w, "to_local", lambda w=w: w)() for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        parts = torch.split(x_RD, num_tokens_per_expert_E.tolist())
        return torch.cat([(F.silu(x @ a.T) * (x @ c.T)) @ b.T for x, a, b, c in zip(parts, w1, w2, w3, strict=True)])


WIDTH, EXPERTS, TOP_K = 32, 8, 2
NORMAL = {"weight": partial(torch.nn.init.normal_, std=0.2)}
ONES = {"weight": torch.nn.init.ones_}


def model_config(layers: int = 2) -> Qwen3Model.Config:
    """A small Qwen3-MoE, made of torchtitan's parts."""
    norm = RMSNorm.Config(normalized_shape=WIDTH, param_init=ONES)
    blocks = []
    for _ in range(layers):
        attention = make_gqa_config(
            dim=WIDTH, n_heads=2, n_kv_heads=2, head_dim=16, wqkv_param_init=NORMAL, wo_param_init=NORMAL,
            inner_attention=ScaledDotProductAttention.Config(), fuse_qkv=True,
            rope=CosSinRoPE.Config(dim=16, max_seq_len=LENGTH, theta=10_000.0), qk_norm=None,
        )  # fmt: skip
        router = make_router_config(
            dim=WIDTH, num_experts=EXPERTS, gate_param_init=NORMAL, top_k=TOP_K, score_func="softmax", route_norm=True
        )
        dispatcher = make_token_dispatcher_config(num_experts=EXPERTS, top_k=TOP_K, comm_backend="standard")
        experts = Float32Experts.Config(
            dim=WIDTH, hidden_dim=24, num_experts=EXPERTS,
            param_init=dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), NORMAL["weight"]),
        )  # fmt: skip
        routed = RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher)
        moe = make_moe_config(num_experts=EXPERTS, router=router, routed_experts=routed)
        blocks.append(Qwen3TransformerBlock.Config(attention_norm=norm, ffn_norm=norm, attention=attention, moe=moe))
    return Qwen3Model.Config(
        vocab_size=VOCABULARY, dim=WIDTH, norm=norm, layers=blocks,
        tok_embeddings=Embedding.Config(num_embeddings=VOCABULARY, embedding_dim=WIDTH, param_init=NORMAL),
        lm_head=Linear.Config(in_features=WIDTH, out_features=VOCABULARY, param_init=NORMAL),
    )  # fmt: skip


def config(folder: Path, *, ranks: int, ep: int = 1, start: Path | None = None, **more: Any) -> Trainer.Config:
    """A run of six steps, from the weights in `start`."""
    parallelism = {"spmd_backend": "partial_dtensor", **more.pop("parallelism", {})}
    spec = dataclasses.replace(model_registry("debugmodel_moe"), model=copy.deepcopy(model_config()))
    settings: dict[str, Any] = {
        "model_spec": spec,
        "dump_folder": str(folder),
        "tokenizer": NoTokenizer.Config(),
        "dataloader": Numbers.Config(),
        "loss": CrossEntropyLoss.Config(global_vocab_size=VOCABULARY),
        "metrics": MetricsProcessor.Config(log_freq=1),
        "optimizer": default_adamw(lr=5e-3),
        "lr_scheduler": LRSchedulersContainer.Config(warmup_steps=1),
        "training": TrainingConfig(
            local_batch_size=BATCH // ranks, seq_len=LENGTH, steps=8, mixed_precision_param="float32",
            disable_cuda_graphs=True,
        ),
        "parallelism": ParallelismConfig(expert_parallel_degree=ep, **parallelism),
        "checkpoint": CheckpointManager.Config(
            enable=True, interval=100, last_save_model_only=False,
            initial_load_path=None if start is None else str(start),
        ),
        "activation_checkpoint": None,
        "debug": DebugConfig(seed=1),
    }  # fmt: skip
    return Trainer.Config(**{**settings, **more})


def plan_of(config: Trainer.Config, devices: int, slots: int, seed: int) -> mp.Plan:
    """Replicas in slots of random devices, more than one of some experts, on one device too."""
    spec = model_spec(config)
    draw = np.random.default_rng(seed)
    table = np.stack(
        [draw.permutation(np.concatenate([np.arange(8), draw.integers(8, size=slots - 8)])) for _ in range(spec.layers)]
    )
    topology = mp.Topology.preset("a100-pcie", devices_per_node=devices)
    return mp.Plan(spec, topology, table, slot_device=np.repeat(np.arange(devices), slots // devices))


def run(trainer: Trainer, steps: int, changes: dict[int, mp.Plan] | None = None) -> dict[str, Any]:
    """Trains up to a step, with a change of plan after some; what torchtitan logs of each."""
    curve: list[float] = []
    norms: list[float] = []

    def log(step: int, loss: float, _: float, norm: float, extra_metrics: Any = None) -> None:
        curve.append(loss)
        norms.append(norm)

    trainer.metrics_processor.log = log
    for module in (module for part in trainer.model_parts for module in part.modules()):
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    trainer.checkpointer.load()
    batches = trainer.batch_generator(trainer.dataloader)
    moved = 0
    while trainer.step < steps:
        trainer.step += 1
        trainer.train_step(batches)
        if changes and trainer.step in changes:
            moved += trainer.apply_plan(changes[trainer.step]).moves
    return {"curve": curve, "norms": norms, "moved": moved}


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    known = FileSystemReader(path).read_metadata().state_dict_metadata
    names = [name for name, entry in known.items() if isinstance(entry, TensorStorageMetadata)]
    result = {name: torch.empty(known[name].size, dtype=known[name].properties.dtype) for name in names}
    _load_state_dict(result, storage_reader=FileSystemReader(path), planner=None, no_dist=True)
    return result


def join(rank: int, world: int, folder: Path, name: str = "rendezvous") -> None:
    logging.getLogger("torchtitan").setLevel(logging.ERROR)
    os.environ.update(LOCAL_RANK="0", RANK=str(rank), WORLD_SIZE=str(world))
    join_group(rank, world, folder, name=name)


def parity(rank: int, world: int, folder: Path) -> Any:
    """The last rank trains alone, as torchtitan does; the others together, experts placed, from the same weights."""
    if rank == world - 1:
        join(0, 1, folder, "rendezvous-alone")
        found = one_process(folder)
    else:
        join(rank, world - 1, folder)
        found = together(rank, world - 1, folder)
    dist.destroy_process_group()
    return found


def one_process(folder: Path) -> Any:
    trainer = config(folder / "alone", ranks=1).build()
    torch.distributed.checkpoint.save(trainer.checkpointer.states["model"].state_dict(), checkpoint_id=folder / "seed")
    (folder / "seeded").touch()
    found = run(trainer, 6)
    trainer.checkpointer.save(6, last_step=True)
    later = run(trainer, 8)
    return {name: found[name] + later[name] for name in ("curve", "norms")}


CASES = {"two by two, uneven rows": (2, 10, "partial_dtensor"), "four": (4, 12, "partial_dtensor")}
"""Of FSDP inside expert parallelism and without: (ranks of expert parallelism, slots, torchtitan's backend)."""


def together(rank: int, world: int, folder: Path) -> Any:
    result: dict[str, Any] = {}
    wait_for(folder / "seeded")
    for number, (case, (ep, slots, backend)) in enumerate(CASES.items()):
        here = folder / f"case{number}"
        base = config(here, ranks=world, ep=ep, start=folder / "seed", parallelism={"spmd_backend": backend})
        plans = [plan_of(base, ep, slots, seed) for seed in (1, 2, 3)]
        if rank == 0:
            for index, plan in enumerate(plans):
                plan.save(folder / f"{number}-{index}.json")
        dist.barrier()
        trainer = planned(base, folder / f"{number}-0.json").build()
        found = run(trainer, 6, {2: plans[1], 4: plans[0]})
        found["replicas equal"] = replicas_equal(trainer)
        trainer.checkpointer.save(6, last_step=True)
        # Another plan goes on from the checkpoint.
        resumed = planned(base, folder / f"{number}-2.json").build()
        found["resumed"] = {**run(resumed, 8), "from": resumed.step - 2, "plan": resumed.plan.fingerprint}
        found["slots"] = slots_refused(resumed)
        dist.barrier()
        if rank == 0:
            wait_for(folder / "alone" / "checkpoint" / "step-6" / ".metadata")
            own, theirs = (tensors_of(folder / name / "checkpoint" / "step-6") for name in (f"case{number}", "alone"))
            found["names"] = sorted(set(own) ^ set(theirs))
            found["apart"] = max(float((own[name] - value).abs().max()) for name, value in theirs.items())
        result[case] = found
        dist.barrier()
    result["refused"] = refusals(rank, world, folder)
    return result


def slots_refused(trainer: PlannedTrainer) -> list[str]:
    """What is said of rows as slots have them, replicas among them, sharded or whole, where a state has experts in
    order."""
    layer, said = trainer.expert_layers[0], []
    sharded = {f"inner_experts.{name}": value.detach() for name, value in layer.inner_experts.named_parameters()}
    for state in (sharded, {name: torch.zeros(value.shape) for name, value in sharded.items()}):
        try:
            layer.load_state_dict(state, strict=False)
        except mp.InputError as refusal:
            said.append(str(refusal))
    return said


def replicas_equal(trainer: PlannedTrainer) -> bool:
    """Whether all rows of an expert are the same bits, with what the optimizer has for them."""
    for layer in trainer.expert_layers:
        mesh, rows = layer.mesh, layer.rows(layer.plan)
        for tensor in layer.tensors():
            every: list[Any] = [None] * mesh.size
            dist.all_gather_object(every, tensor, group=mesh.group)
            seen: dict[int, Tensor] = {}
            for expert, holder, place in zip(
                rows.expert.tolist(), rows.rank.tolist(), rows.place.tolist(), strict=True
            ):
                row = every[holder][place]
                if not torch.equal(seen.setdefault(expert, row), row):
                    return False
    return True


def refusals(rank: int, world: int, folder: Path) -> dict[str, str]:
    """What cannot be run, and what is said of it."""
    said = {}
    base = config(folder / "refused", ranks=world, ep=2)
    plan = plan_of(base, 2, 10, 1)
    path = folder / f"refused{rank}.json"

    def refused(name: str, plan: mp.Plan, base: Trainer.Config = base) -> None:
        plan.save(path)
        torchtitan._plan.cache_clear()
        try:
            planned(base, path).build()
        except (mp.InputError, mp.UnsupportedError) as error:
            said[name] = str(error)

    refused("devices", plan_of(base, 4, 12, 1))
    refused("slots", dataclasses.replace(plan, slot_device=np.array([0] * 4 + [1] * 6)))
    refused("model", dataclasses.replace(plan, model=plan.model.replace(ffn_size=48)))
    refused("no expert parallelism", plan, config(folder / "refused", ranks=world, ep=1))
    other = config(folder / "refused", ranks=world, ep=2)
    for block in other.model_spec.model.layers:
        block.moe.routed_experts.token_dispatcher = make_token_dispatcher_config(
            num_experts=EXPERTS, top_k=TOP_K, comm_backend="hybridep", hidden_dim=WIDTH
        )
    refused("dispatcher", plan, other)
    return said


def rebalanced(rank: int, world: int, folder: Path) -> Any:
    """From experts in index order on slow links to a better plan, found beside training."""
    join(rank, world, folder)
    base = config(folder / "run", ranks=world, ep=world)
    base.training.steps = 1_000
    spec = model_spec(base)
    device = mp.Device(compute=1e10, memory=1e9, memory_bandwidth=1e10, intra_bandwidth=1e5)
    topology = mp.Topology(nodes=(mp.Node(devices=(device,) * world, inter_bandwidth=1e5),), intra_latency=0.0)
    # Second slots that stand beside the first serve nobody.
    table = np.tile([0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 4, 5], (spec.layers, 1))
    plan = mp.Plan(spec, topology, table, slot_device=np.repeat(np.arange(world), 6))
    path = folder / "plan.json"
    if rank == 0:
        plan.save(path)
    dist.barrier()
    settings = Rebalancing(every=4, record_steps=3, solver="search", seconds=1.0, horizon_steps=1e9, bytes_per_step=1)
    curves = {}
    for name, rebalance in (("kept", None), ("rebalanced", settings)):
        trainer = planned(base, path, rebalance=rebalance).build()
        curves[name] = losses_until_rebalanced(
            lambda last, trainer=trainer: run(trainer, last)["curve"],
            None if rebalance is None else lambda trainer=trainer: trainer.rebalancer.applied,
            folder / "run" / "rebalance",
        )
    found = {
        "curves": curves,
        "applied": trainer.rebalancer.applied,
        "changed": trainer.plan.fingerprint != plan.fingerprint,
        "saved": (folder / "run" / "rebalance" / "plan.json").is_file()
        and mp.Plan.load(folder / "run" / "rebalance" / "plan.json").fingerprint == trainer.plan.fingerprint,
    }
    trainer.close()
    dist.destroy_process_group()
    return found


def page(rank: int, world: int, folder: Path) -> Any:
    """The how-to page as written, at the size of the tests: a run recorded, solved for, and planned."""
    import torchtitan.models.qwen3.config_registry as registry

    record, configuration = code(PAGE, "py")
    join(rank, world, folder)
    os.chdir(folder)
    registry.qwen3_moe_debug = lambda: config(folder / "run", ranks=world, ep=world)
    trainer = config(folder / "plain", ranks=world, ep=world).build()
    trainer.config.training.steps = 3
    run(trainer, 0)
    exec(record, {"trainer": trainer})  # noqa: S102 - the page's own lines
    if rank == 0:
        solve = next(line for line in code(PAGE, "sh")[1].splitlines() if line.startswith("moeplace solve"))
        for words, others in (("node 4", f"node {world}"), ("slots 72", "slots 12"), ("size 256", f"size {WIDTH}")):
            solve = solve.replace(words, others)
        words = solve.replace("size 768", "size 24").replace("seconds 10", "seconds 1").split()[1:]
        subprocess.run([sys.executable, "-m", "moeplace", *words], check=True)
    dist.barrier()
    names: dict[str, Any] = {}
    exec(configuration, names)  # noqa: S102
    trainer = names["qwen3_moe_planned"]().build()
    found = run(trainer, 2)
    every = trainer.config.rebalance.every
    trainer.close()
    dist.destroy_process_group()
    return {"curve": found["curve"], "slots": trainer.plan.num_slots, "every": every}
