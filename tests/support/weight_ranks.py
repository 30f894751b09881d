"""What each rank does in test_expert_weights.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from family_ranks import spec_of
from random_plans import random_plan
from ranks import join_group
from safetensors.torch import load_file, save_file
from small_models import FAMILIES, olmoe, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import moeplace as mp
from moeplace.runtime.moe.data_parallel import expert_parameters
from moeplace.runtime.moe.weights import load_weights


def families(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Every family from its own files on the meta device, and out again."""
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    found: dict[str, Any] = {}
    for number, (name, (build, layers)) in enumerate(FAMILIES.items()):
        whole = build(use_cache=False)
        ids = tokens(2, 6)
        expected = whole(input_ids=ids).logits
        plan = random_plan(np.random.default_rng([41, number]), 1, world, spec_of(whole, layers))
        source, target = folder / name / "in", folder / name / "out"
        if rank == 0:
            whole.save_pretrained(source, max_shard_size="20KB" if number % 2 else "5GB")
        dist.barrier()
        with torch.device("meta"):
            model = build(use_cache=False)
        mp.parallelize(model, plan, mesh, weights=source)
        read = load_weights(model, source)
        if number % 2:
            fully_shard(model, ignored_params=expert_parameters(model))
        logits = model(input_ids=ids).logits
        mp.export_hf(model, target, shard_bytes=30_000 if number % 2 else 5_000_000_000)
        again = type(whole).from_pretrained(target, dtype=torch.float32).eval()
        files = {path.name for path in target.iterdir()}
        own, experts = 0, 0
        for part in model.modules():
            if isinstance(part, mp.runtime.PlacedExperts):
                own += sum(value.nbytes for value in part.parameters())
                experts += sum(value[0].nbytes * part.num_experts for value in part.parameters() if len(value))
        total = sum(value.nbytes for value in whole.parameters())
        stored = {key for file in source.glob("*.safetensors") for key in load_file(file)}
        written = {key for file in target.glob("*.safetensors") for key in load_file(file)}
        found[name] = {
            "meta": float((logits - expected).abs().max() / expected.abs().max()),
            "again": [
                name for name, value in again.state_dict().items() if not torch.equal(value, whole.state_dict()[name])
            ],
            "names": sorted(stored ^ written),
            "files": sorted(files),
            "read": read,
            "expected": [own, total - experts] if experts else None,
        }
    found["refused"] = refused(rank, world, folder, mesh)
    dist.destroy_process_group()
    return found


def cut(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Halves of experts, read from the files of whole ones, and whole ones out again."""
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "ep"))["ep"]
    whole = olmoe(use_cache=False)
    ids = tokens(2, 6)
    expected = whole(input_ids=ids).logits
    plan = random_plan(np.random.default_rng(1), 1, world // 2, spec_of(whole, (0, 1)))
    if rank == 0:
        whole.save_pretrained(folder / "in")
    dist.barrier()
    with torch.device("meta"):
        model = olmoe(use_cache=False)
    mp.parallelize(model, plan, mesh, weights=folder / "in", shard_experts=True)
    error = float((model(input_ids=ids).logits - expected).abs().max())
    mp.export_hf(model, folder / "out")
    written, stored = (
        {k: v for f in (folder / name).glob("*.safetensors") for k, v in load_file(f).items()} for name in ("out", "in")
    )
    dist.destroy_process_group()
    return {
        "error": error,
        "same": written.keys() == stored.keys() and all(torch.equal(written[k], stored[k]) for k in stored),
    }


def refused(rank: int, world: int, folder: Path, mesh: Any) -> dict[str, str]:
    whole = olmoe(use_cache=False)
    plan = random_plan(np.random.default_rng(1), 1, world, spec_of(whole, (0, 1)))
    source = folder / "plain"
    cases = {"missing": folder / "missing", "shape": folder / "shape", "quantised": folder / "quantised"}
    if rank == 0:
        whole.save_pretrained(source)
        tensors = load_file(source / "model.safetensors")
        for name, path in cases.items():
            path.mkdir()
            changed = dict(tensors)
            key = next(key for key in tensors if ".experts.3." in key)
            if name == "missing":
                del changed[key]
            else:
                changed[key] = (
                    changed[key][:-1].contiguous() if name == "shape" else changed[key].to(torch.float8_e4m3fn)
                )
            save_file(changed, path / "model.safetensors")
    dist.barrier()
    said = {}
    for name, path in cases.items():
        with torch.device("meta"):
            model = olmoe(use_cache=False)
        try:
            mp.parallelize(model, plan, mesh, weights=path)
        except mp.MoeplaceError as refusal:
            said[name] = str(refusal)
    model = olmoe(use_cache=False)
    mp.parallelize(model, plan, mesh)
    try:
        mp.export_hf(model, source)
    except mp.InputError as refusal:
        said["folder"] = str(refusal)
    return said


def meta_checkpoint(rank: int, world: int, folder: Path) -> float:
    """A model on the meta device, and load_checkpoint into it."""
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    whole = olmoe(use_cache=False)
    plan = random_plan(np.random.default_rng(1), 1, world, spec_of(whole, (0, 1)))
    expected = whole(input_ids=tokens(2, 6)).logits
    mp.parallelize(whole, plan, mesh)
    mp.save_checkpoint(folder / "saved", whole)
    with torch.device("meta"):
        model = olmoe(use_cache=False)
    mp.parallelize(model, plan, mesh)
    mp.load_checkpoint(folder / "saved", model)
    error = float((model(input_ids=tokens(2, 6)).logits - expected).abs().max())
    dist.destroy_process_group()
    return error
