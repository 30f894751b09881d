"""What each rank does in test_expert_checkpoint.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from migration_ranks import Training
from random_plans import SPEC, random_plan
from ranks import join_group
from small_models import olmoe, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import moeplace as mp
from moeplace.runtime.moe.checkpoint import (
    async_save_checkpoint,
    checkpoint_plan,
    load_checkpoint,
    save_checkpoint,
)
from moeplace.runtime.moe.data_parallel import expert_parameters


def plan_of(number: int, world: int, spec: mp.ModelSpec = SPEC) -> mp.Plan:
    return random_plan(np.random.default_rng([21, number]), 1, world, spec)


def write(rank: int, world: int, folder: Path) -> Any:
    """Trains, saves, trains on; and saves a Transformers model under fully_shard."""
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    training = Training(rank, world, mesh, plan_of(0, world))
    save_checkpoint(folder / "trained", training.parallel, training.optimizer)
    pending = async_save_checkpoint(folder / "beside", training.parallel, training.optimizer)
    rows = {f"{layer}/{expert}/{name}": values for (layer, expert, name), values in training.everywhere().items()}
    training.step()
    pending.result()
    pieces = {
        name: len(entry.chunks)
        for name, entry in dcp.FileSystemReader(folder / "trained").read_metadata().state_dict_metadata.items()
        if ".experts." in name and hasattr(entry, "chunks") and len(entry.size)
    }
    model = olmoe(use_cache=False)
    logits = model(input_ids=tokens(2, 6)).logits
    spec = mp.ModelSpec.from_config(model.config)
    mp.parallelize(model, plan_of(1, world, spec), mesh)
    fully_shard(model, ignored_params=expert_parameters(model))
    save_checkpoint(folder / "olmoe", model)
    dist.destroy_process_group()
    return {
        "rows": rows,
        "logits": logits.tolist(),
        "pieces": pieces,
        "plan": checkpoint_plan(folder / "trained").fingerprint == plan_of(0, world).fingerprint,
    }


def read(rank: int, world: int, folder: Path) -> Any:
    """Another number of ranks, other plans: the same rows, the same logits, and the same losses go on."""
    join_group(rank, world, folder, name="second")
    mesh = init_device_mesh("cpu", (world,))
    curves, rows = [], []
    for number in (2, 3):
        training = Training(rank, world, mesh, plan_of(number, world), steps=number - 2)
        load_checkpoint(folder / ("trained", "beside")[number % 2], training.parallel, training.optimizer)
        training.taken = 2
        found = training.everywhere()
        rows.append({f"{layer}/{expert}/{name}": values for (layer, expert, name), values in found.items()})
        curves.append([training.step() for _ in range(4)])
    model = olmoe(use_cache=False)
    spec = mp.ModelSpec.from_config(model.config)
    mp.parallelize(model, plan_of(4, world, spec), mesh)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1.0)
    load_checkpoint(folder / "olmoe", model)
    logits = model(input_ids=tokens(2, 6)).logits
    said = {}
    wider = olmoe(use_cache=False, hidden_size=32)
    mp.parallelize(wider, plan_of(5, world, mp.ModelSpec.from_config(wider.config)), mesh)
    for name, path, target in (("nowhere", "empty", model), ("other", "trained", model), ("shapes", "olmoe", wider)):
        try:
            load_checkpoint(folder / path, target)
        except mp.InputError as refusal:
            said[name] = str(refusal)
    dist.destroy_process_group()
    return {"curves": curves, "rows": rows, "logits": logits.tolist(), "said": said}


def alone(rank: int, world: int, folder: Path) -> Any:
    """The whole model in one process reads the same folder with torch alone."""
    model = olmoe(use_cache=False)
    state = {"model": {name: torch.zeros_like(value) for name, value in model.state_dict().items()}}
    dcp.load(state, checkpoint_id=str(folder / "olmoe"), no_dist=True)
    model.load_state_dict(state["model"])
    return model(input_ids=tokens(2, 6)).logits.tolist()
