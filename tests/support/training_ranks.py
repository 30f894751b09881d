"""What each rank does in test_training.py."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks import join_group
from small_models import olmoe, tokens
from torch.distributed.device_mesh import init_device_mesh

import moeplace as mp
from moeplace.runtime import clip_grad_norm_
from moeplace.training import ExpertTrainer, RebalanceCallback, Rebalancer


def plain_loop(rank: int, world: int, folder: Path) -> dict[str, Any]:
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    curves = {}
    news: list[str] = []
    for name in ("kept", "rebalanced"):
        model = olmoe(use_cache=False).train()
        mp.parallelize(model, index_order(world, model), mesh)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)
        rebalancer = Rebalancer(
            parallel, optimizer, folder / name, every=4 if name == "rebalanced" else 10_000, record_steps=3,
            solver="search", seconds=1.0, horizon_steps=1e9, bytes_per_step=20_000, say=news.append,
        )  # fmt: skip
        before = rebalancer.plan
        curve = []
        for step in range(400):
            ids = tokens(4, 24, seed=step % 5 * world + rank)
            loss = parallel(input_ids=ids, labels=ids).loss
            loss.backward()
            clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rebalancer.step()
            curve.append(float(loss.detach()))
            enough = torch.tensor(int(step >= 11 and (name == "kept" or rebalancer.applied > 0)))
            dist.all_reduce(enough, dist.ReduceOp.MIN)
            if enough:
                break
            if step > 8:  # training has gone on beside the solver until here
                _wait_for_answers(folder / name)
        rebalancer.close()
        curves[name] = {
            "curve": curve,
            "applied": rebalancer.applied,
            "changed": before.fingerprint != rebalancer.plan.fingerprint,
        }
    dist.destroy_process_group()
    return {**curves, "news": news}


def unanswered(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """A first rank that cannot start its solver, and one that cannot read the answer: training goes on, on all."""
    from moeplace.training import rebalancer as module

    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    result: dict[str, Any] = {}

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    def answered(folder: Path, plan: Any, terms: Any) -> list[str]:
        (folder / "answer.json").write_text('{"apply": tr')
        return ["-c", "pass"]

    for name, stand_in in (("no start", full), ("no answer", answered)):
        model = olmoe(use_cache=False).train()
        mp.parallelize(model, index_order(world, model), mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        news: list[str] = []
        module.request = stand_in
        rebalancer = Rebalancer(model, optimizer, folder / name, every=3, record_steps=2, say=news.append)
        for step in range(40):
            ids = tokens(2, 8, seed=step * world + rank)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            rebalancer.step()
            done = torch.tensor(int(any("keep" in line for line in news)))
            dist.all_reduce(done, dist.ReduceOp.MAX)
            if done:
                break
            time.sleep(0.02)
        rebalancer.close()
        result[name] = {"news": news, "applied": rebalancer.applied, "done": bool(done)}
    dist.destroy_process_group()
    return result


def _wait_for_answers(folder: Path) -> None:
    """Until every round that was given to the solver is answered, so that a slow machine takes no more steps."""
    while any(not (path.parent / "answer.json").is_file() for path in folder.glob("*/current.json")):
        time.sleep(0.02)


def index_order(world: int, model: Any) -> mp.Plan:
    """As many experts on every rank, in index order, on links so slow that every copy counts."""
    spec = mp.ModelSpec.from_config(model.config)
    device = mp.Device(compute=1e10, memory=1e9, memory_bandwidth=1e10, intra_bandwidth=1e5)
    node = mp.Node(devices=(device,) * world, inter_bandwidth=1e5)
    return mp.Plan(
        model=spec,
        topology=mp.Topology(nodes=(node,), intra_latency=0.0),
        physical_to_logical=np.tile(np.arange(spec.experts), (spec.layers, 1)),
        slot_device=np.arange(spec.experts) * world // spec.experts,
    )


def trainer(rank: int, world: int, folder: Path) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    join_group(rank, world, folder)
    model = olmoe(use_cache=False)
    mp.parallelize(model, index_order(world, model), init_device_mesh("cpu", (world,)))
    data = [{"input_ids": row, "labels": row} for row in tokens(64, 8)]
    said: dict[str, str] = {}
    result: dict[str, Any] = {}
    for norm, saving in ((1.0, "no"), (0.0, "steps"), (0.0, "no")):
        callback = RebalanceCallback(
            folder / f"rounds-{norm}", every=4, record_steps=2, solver="eplb", horizon_steps=1e9
        )
        arguments = TrainingArguments(
            output_dir=str(folder / "out"), max_steps=8, per_device_train_batch_size=2, use_cpu=True, report_to=[],
            max_grad_norm=norm, save_strategy=saving, logging_steps=1, disable_tqdm=True, ddp_backend="gloo",
        )  # fmt: skip
        session = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])
        try:
            session.train()
        except (mp.InputError, mp.UnsupportedError) as refusal:
            said[f"{norm} {saving}"] = str(refusal)
            continue
        result = {
            "losses": [entry["loss"] for entry in session.state.log_history if "loss" in entry],
            "rounds": sorted(path.name for path in (folder / f"rounds-{norm}").iterdir()),
            "trace": (folder / f"rounds-{norm}" / "round-0001" / "trace").is_dir(),
        }
    for name, save in (
        ("pretrained", lambda: model.save_pretrained(folder / "saved")),
        ("part", lambda: model.model.save_pretrained(folder / "saved")),
        ("trainer", lambda: session._save(str(folder / "saved"))),  # the first rank alone goes on to write
    ):
        try:
            save()
        except mp.UnsupportedError as refusal:
            said[name] = str(refusal)
    dist.destroy_process_group()
    return {**result, "refused": said, "written": (folder / "saved" / "model.safetensors").exists()}


def expert_trainer(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """A run with two micro-batches a step, resumed in the middle under another plan, and read by from_pretrained."""
    from transformers import OlmoeForCausalLM, TrainingArguments

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    data = [{"input_ids": row, "labels": row} for row in tokens(64, 8)]
    ids = tokens(2, 6)
    result: dict[str, Any] = {}
    for name in ("whole", "resumed"):
        model = olmoe(use_cache=False)
        plan = index_order(world, model)
        if name == "resumed":
            table = plan.physical_to_logical[:, ::-1].copy()
            with torch.no_grad():
                for value in model.parameters():
                    value.zero_()
            plan = mp.Plan(plan.model, plan.topology, table, plan.slot_device)
        mp.parallelize(model, plan, mesh)
        callback = RebalanceCallback(folder / f"rounds-{name}", every=1000, record_steps=2)
        arguments = TrainingArguments(
            output_dir=str(folder / "out"), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            use_cpu=True, report_to=[], max_grad_norm=0.5, save_strategy="steps", save_steps=3, logging_steps=1,
            disable_tqdm=True, ddp_backend="gloo", learning_rate=1e-2,
        )  # fmt: skip
        session = ExpertTrainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])
        session.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-3") if name == "resumed" else None)
        assert callback.rebalancer is not None
        result[name] = {
            "logits": model(input_ids=ids).logits.tolist(),
            "norms": [entry["grad_norm"] for entry in session.state.log_history if "grad_norm" in entry],
            "steps": callback.rebalancer.state_dict()["steps"],
            "plan": callback.rebalancer.plan.physical_to_logical.tolist()
            == index_order(world, model).physical_to_logical.tolist(),
        }
        dist.barrier()
    written = OlmoeForCausalLM.from_pretrained(folder / "out" / "checkpoint-6", use_cache=False).eval()
    result["read"] = written(input_ids=ids).logits.tolist()
    dist.destroy_process_group()
    return result
