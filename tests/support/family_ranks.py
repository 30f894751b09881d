"""What each rank does in test_parallelize.py."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from random_plans import random_plan
from ranks import join_group
from small_models import FAMILIES, olmoe, tokens
from torch.distributed.device_mesh import init_device_mesh
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

import moeplace as mp


def spec_of(model: Any, layers: tuple[int, ...]) -> mp.ModelSpec:
    return mp.ModelSpec.from_config(model.config).replace(layers=len(layers), moe_layers=layers)


def families(rank: int, world: int, folder: Path) -> dict[str, Any]:
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world // 2, 2))
    found: dict[str, Any] = {}
    for number, (name, (build, layers)) in enumerate(FAMILIES.items()):
        found[name] = one_family(rank, mesh, build(use_cache=False), layers, number, folder / name)
    found["refused"] = refused(mesh)
    found["frozen"] = frozen(mesh)
    dist.destroy_process_group()
    return found


def one_family(rank: int, mesh: Any, model: Any, layers: tuple[int, ...], number: int, folder: Path) -> dict[str, Any]:
    plan = random_plan(np.random.default_rng(number), *mesh.mesh.shape, spec_of(model, layers))
    whole = copy.deepcopy(model)
    mp.parallelize(model, plan, mesh, gradients="sum")
    mine = tokens(2, 5 + rank, seed=rank)
    every = [tokens(2, 5 + r, seed=r) for r in range(mesh.size())]
    with mp.profile(model, folder / "trace") as recorder:
        logits = model(input_ids=mine, output_router_logits=True)
    expected = whole(input_ids=mine, output_router_logits=True)
    # Each rank's loss is its own; the experts' gradients are of the sum.
    logits.logits.logsumexp(-1).mean().backward()
    for ids in every:
        whole(input_ids=ids).logits.logsumexp(-1).mean().backward()
    worst = 0.0
    for (_, parts), (_, experts) in zip(placed(model), placed(whole), strict=True):
        for parameter, value in parts.named_parameters():
            goal = dict(experts.named_parameters())[parameter].grad[torch.from_numpy(parts.row_expert)]
            worst = max(worst, float((value.grad - goal).abs().max() / goal.abs().max()) if goal.numel() else 0.0)
    dist.barrier()
    trace = mp.read_trace(folder / "trace")
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)
    router = (
        []
        if logits.router_logits is None
        else [float((a - b).abs().max()) for a, b in zip(logits.router_logits, expected.router_logits, strict=True)]
    )
    return {
        "logits": float((logits.logits - expected.logits).abs().max() / expected.logits.abs().max()),
        "gradients": worst,
        "router": max(router, default=0.0),
        "recorded": [int((trace.source == rank).sum()), mine.numel(), recorder.model_spec == plan.model.replace(name="")
                     or recorder.model_spec.experts == plan.model.experts],
        "names": sorted(set(dict(whole.named_parameters())) ^ set(dict(model.named_parameters()))),
        "training": [model.training, *(part.training for _, part in placed(model))],
    }  # fmt: skip


def frozen(mesh: Any) -> list[tuple[str, bool]]:
    """Which parameters are trained where some were frozen before, and nothing recorded gradients meanwhile."""
    model = olmoe(use_cache=False)
    placed(model)[0][1].down_proj.requires_grad_(False)
    with torch.no_grad():
        mp.parallelize(model, random_plan(np.random.default_rng(0), *mesh.mesh.shape, spec_of(model, (0, 1))), mesh)
    return [(name, value.requires_grad) for _, part in placed(model) for name, value in part.named_parameters()]


def placed(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if name.endswith(".experts")]


def refused(mesh: Any) -> dict[str, str]:
    model = olmoe()
    spec = spec_of(model, (0, 1))
    rng = np.random.default_rng(0)
    cases = {
        "plain": lambda: mp.parallelize(torch.nn.Linear(2, 2), random_plan(rng, 2, 2, spec), mesh),
        "other": lambda: mp.parallelize(model, random_plan(rng, 2, 2, spec.replace(hidden_size=32)), mesh),
        "layers": lambda: mp.parallelize(model, random_plan(rng, 2, 2, spec.replace(layers=1, moe_layers=(0,))), mesh),
    }
    said = {}
    for name, attempt in cases.items():
        try:
            attempt()
        except mp.InputError as refusal:
            said[name] = str(refusal)
    try:
        model.model.layers[0].mlp.experts.has_strange_part = True
        mp.parallelize(model, random_plan(rng, 2, 2, spec), mesh)
    except mp.UnsupportedError as refusal:
        said["function"] = str(refusal)
    said |= {name: changed(mesh, change) for name, change in CHANGES.items()}
    for name in ("layout", "one_rank_only"):
        # On one rank alone the module computes something else than its class says.
        other = olmoe()
        if name == "layout":
            other.model.layers[0].mlp.experts.__class__ = Halved
        elif dist.get_rank() == 2:
            other.model.layers[1].mlp.experts.__class__ = Halved
        plan = random_plan(np.random.default_rng(0), 2, 2, spec_of(other, (0, 1)))
        before = torch.get_rng_state()
        try:
            mp.parallelize(other, plan, mesh)
        except mp.MoeplaceError as refusal:
            said[name] = f"{type(refusal).__name__}: {refusal}"
        assert torch.equal(before, torch.get_rng_state())
    for name in ("seeds", "one_bit"):
        other = olmoe()
        with torch.no_grad():
            if name == "seeds":
                torch.manual_seed(dist.get_rank())
                other.model.layers[0].mlp.gate.weight.normal_()
            elif dist.get_rank() == 1:
                other.model.layers[1].mlp.experts.down_proj[-1, 0, 0].nextafter_(torch.tensor(9.0))
        try:
            mp.parallelize(other, random_plan(np.random.default_rng(0), 2, 2, spec_of(other, (0, 1))), mesh)
        except mp.InputError as refusal:
            said[name] = str(refusal)
    with torch.device("meta"):
        other = olmoe()
    other.model.layers[0].mlp.experts.__class__ = Halved
    try:
        mp.parallelize(other, random_plan(np.random.default_rng(0), 2, 2, spec_of(other, (0, 1))), mesh)
    except mp.UnsupportedError as refusal:
        said["meta"] = str(refusal)
    return said


def changed(mesh: Any, change: Any) -> str:
    """What is said of a model whose first experts were changed."""
    model = olmoe()
    change(model.model.layers[0].mlp.experts)
    try:
        mp.parallelize(model, random_plan(np.random.default_rng(0), 2, 2, spec_of(model, (0, 1))), mesh)
    except mp.UnsupportedError as refusal:
        return str(refusal)
    return "nothing was refused"


def _replace_forward(experts: Any) -> None:
    experts.forward = lambda *arguments: 2 * type(experts).forward(experts, *arguments)


def _quantise(experts: Any) -> None:
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)


CHANGES = {
    "forward": _replace_forward,
    "hook": lambda experts: experts.register_forward_hook(lambda module, arguments, output: 2 * output),
    "quantised": _quantise,
}


class Halved(OlmoeExperts):
    """Looks like the class that it derives from."""

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        half: torch.Tensor = OlmoeExperts.forward.__wrapped__(self, *arguments) / 2
        return half
