"""What each rank does in test_parallelize_families.py."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from random_plans import random_plan
from ranks import join_group
from torch.distributed.device_mesh import init_device_mesh

import moeplace as mp
from moeplace.runtime import save_checkpoint

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks")]

FAMILIES = (
    "deepseek_v4", "diffusion_gemma", "ernie4_5_vl_moe", "gemma4", "inkling2_loop", "jamba", "llama4", "longcat_flash",
    "muse_spark", "nemotron_h", "openai_privacy_filter", "qwen3_omni_moe", "zaya",
)  # fmt: skip


def every_family(rank: int, world: int, folder: Path) -> dict[str, dict[str, float]]:
    import families

    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for number, family in enumerate(FAMILIES):
        model = families.build(*families.families()[family])
        found[family] = one_family(rank, world, mesh, families.language_model(model), number)
        if family in ("diffusion_gemma", "muse_spark"):
            found[family]["checkpoint"] = read_back(rank, mesh, families.build, families.families()[family], folder)
        if family == "longcat_flash":
            found[family] |= written_again(mesh, families.build, families.families()[family], folder)
    dist.destroy_process_group()
    return found


def read_back(rank: int, mesh: Any, build: Any, family: Any, folder: Path) -> float:
    """How far tensors of a checkpoint, read into the model in one process, are from the model's."""
    whole, model = build(*family), build(*family)
    spec = mp.ModelSpec.from_config(model.config)
    mp.parallelize(model, random_plan(np.random.default_rng(5), 1, mesh.size(), spec), mesh)
    save_checkpoint(folder / f"{family[0]}-checkpoint", model)
    dist.barrier()
    state = {name: torch.zeros_like(value) for name, value in whole.state_dict().items()}
    dcp.load({"model": state}, checkpoint_id=str(folder / f"{family[0]}-checkpoint"), no_dist=True)
    return max(float((state[name] - value).abs().max()) for name, value in whole.state_dict().items())


def written_again(mesh: Any, build: Any, family: Any, folder: Path) -> dict[str, float]:
    """How far logits are from the model's that a checkpoint, and files as from_pretrained reads, are read into: by one
    process, and by ranks under another plan. Experts that compute nothing have rows of weights in one process only."""
    whole, model = build(*family), build(*family)
    expected = run(whole, 0)
    spec = mp.ModelSpec.from_config(model.config)
    first, second = (random_plan(np.random.default_rng(seed), 1, mesh.size(), spec) for seed in (5, 6))
    mp.parallelize(model, first, mesh)
    save_checkpoint(folder / "zero-checkpoint", model)
    mp.export_hf(model, folder / "zero-files")
    dist.barrier()

    def blank() -> Any:
        other = build(*family)
        with torch.no_grad():
            for value in other.parameters():
                value.zero_()
        return other

    alone = blank()
    state = alone.state_dict()
    dcp.load({"model": state}, checkpoint_id=str(folder / "zero-checkpoint"), no_dist=True)
    spread = blank()
    mp.parallelize(spread, second, mesh)
    mp.load_checkpoint(folder / "zero-checkpoint", spread)
    models = {
        "checkpoint": alone,
        "spread": spread,
        "files": type(whole).from_pretrained(folder / "zero-files"),
        "spread_files": mp.parallelize(blank(), second, mesh, weights=folder / "zero-files"),
    }
    return {name: float((run(other, 0) - expected).abs().max()) for name, other in models.items()}


def run(model: Any, rank: int) -> Any:
    """Logits of this rank's own tokens; ranks have different numbers of them."""
    ids = torch.randint(5, 140, (2, 5 + rank), generator=torch.Generator().manual_seed(rank))
    arguments = {"input_ids": ids}
    if type(model).__name__.startswith("DiffusionGemma"):
        arguments["decoder_input_ids"] = ids
    output = model(**arguments)
    return getattr(output, "logits", None) if hasattr(output, "logits") else output[0]


def loss(logits: torch.Tensor) -> torch.Tensor:
    """Drawn weights: the length of normed outputs has no gradient."""
    return (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))).mean()


def one_family(rank: int, world: int, mesh: Any, model: Any, number: int) -> dict[str, float]:
    spec = mp.ModelSpec.from_config(model.config)
    plan = random_plan(np.random.default_rng(number), 1, world, spec)
    whole = copy.deepcopy(model)
    mp.parallelize(model, plan, mesh, gradients="sum")
    mine = run(model, rank)
    loss(mine).backward()
    for other in range(world):
        logits = run(whole, other)
        loss(logits).backward()
        if other == rank:
            expected = logits
    shared = {name: value for name, value in model.named_parameters() if name.endswith("post_expert_norm.weight")}
    worst = 0.0
    for name, value in shared.items():
        dist.all_reduce(value.grad)
        goal = whole.get_parameter(name).grad
        worst = max(worst, float((value.grad - goal).abs().max() / goal.abs().max()))
    for name, module in model.named_modules():
        if type(module).__name__ != "PlacedExperts":
            continue
        rows = torch.from_numpy(module.row_expert)
        for parameter, value in module.named_parameters(recurse=False):
            goal = whole.get_submodule(name).get_parameter(parameter).grad[rows]
            worst = max(
                worst, float((value.grad - goal).abs().max() / goal.abs().max().clamp(min=1e-9)) if len(goal) else 0
            )
    names = set(dict(whole.named_parameters())) ^ set(dict(model.named_parameters()))
    return {
        "logits": float((mine - expected).abs().max() / expected.abs().max()),
        "gradients": worst,
        "shared": len(shared),
        "names": len(names),
    }
