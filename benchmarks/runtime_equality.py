"""How far the distributed layer is from the layer in one process, over random plans, on real Gloo processes.

    python -m benchmarks runtime_equality [--plans 200] [--ranks 4 8] [--replica-choices share balanced]

Plans have replicas (on one device too), unequal and zero shares, devices with few slots or none; ranks have different
numbers of tokens, some none; gates are random. Dispatch alternates between flat and node-aware, experts between SwiGLU
and GELU. The reference computes one token and expert at a time in one process, in float64; an error is the largest
difference from it over its largest value. Beside the layer's worst error stands that of the same reference in float32,
which is what rounding alone does.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any, get_args

import numpy as np
import torch
from forked_ranks import on_ranks
from runner import Report
from torch.distributed.device_mesh import init_device_mesh

import moeplace as mp
from moeplace.runtime.moe.expert_mlps import GELU, ExpertMLP, SwiGLU
from moeplace.runtime.moe.experts import PlacedExperts, Replicas
from moeplace.runtime.moe.layer import reference_experts

SPEC = mp.ModelSpec(layers=1, experts=16, top_k=4, hidden_size=64, ffn_size=96, expert_dtype="fp32")
TOKENS = 24
"""Most tokens a rank."""

Batch = dict[str, list[torch.Tensor]]


def random_plan(rng: np.random.Generator, ranks: int) -> mp.Plan:
    slots = SPEC.experts + int(rng.integers(0, 2 * ranks))
    table = rng.permutation(
        np.concatenate([np.arange(SPEC.experts), rng.integers(SPEC.experts, size=slots - SPEC.experts)])
    )
    shares = rng.random(slots) * (rng.random(slots) > 0.15)
    shares[np.isin(table, np.flatnonzero(np.bincount(table, weights=shares) == 0))] = 1.0
    shares /= np.bincount(table, weights=shares)[table]
    return mp.Plan(
        model=SPEC,
        topology=mp.Topology.preset("a100-pcie", nodes=2, devices_per_node=ranks // 2),
        physical_to_logical=table[None],
        slot_device=np.sort(rng.integers(ranks, size=slots)),
        shares=shares[None],
    )


def random_batch(rng: np.random.Generator, ranks: int) -> Batch:
    counts = rng.integers(0, TOKENS + 1, size=ranks) * (rng.random(ranks) > 0.1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).float()

    return {
        "x": [drawn(n, SPEC.hidden_size) for n in counts],
        "gate": [drawn(n, SPEC.top_k).sigmoid() for n in counts],
        "up": [drawn(n, SPEC.hidden_size) for n in counts],
        "ids": [torch.from_numpy(rng.random((n, SPEC.experts)).argsort(axis=1)[:, : SPEC.top_k]) for n in counts],
    }


def reference(
    batch: Batch, weights: dict[str, torch.Tensor], kind: ExpertMLP, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Outputs and gradients on all ranks' tokens together."""
    own = {name: value.to(dtype).requires_grad_() for name, value in weights.items()}
    x, gate = (torch.cat(batch[name]).to(dtype).requires_grad_() for name in ("x", "gate"))
    out = reference_experts(x, torch.cat(batch["ids"]), gate, own, kind)
    (out * torch.cat(batch["up"])).sum().backward()
    rows = {"output": out.detach(), "input gradient": grad(x), "gate gradient": grad(gate)}
    return rows | {name: grad(value) for name, value in own.items()}


def grad(value: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(value) if value.grad is None else value.grad


def error(found: torch.Tensor, expected: torch.Tensor, whole: torch.Tensor) -> float:
    return float((found - expected).abs().max() / whole.abs().max()) if expected.numel() else 0.0


def differences(rank: int, ranks: int, plans: int, choice: Any) -> tuple[dict[str, float], dict[str, float]]:
    """The worst on this rank, and what float32 does in one process."""
    meshes = (init_device_mesh("cpu", (ranks,)), init_device_mesh("cpu", (2, ranks // 2)))
    worst: dict[str, float] = {}
    rounding: dict[str, float] = {}
    for number in range(plans):
        rng = np.random.default_rng([ranks, number])
        kind: ExpertMLP = (SwiGLU(), GELU())[number // 2 % 2]
        experts = PlacedExperts(
            SPEC, random_plan(rng, ranks), meshes[number % 2], 0, kind=kind, gradients="sum", replica_choice=choice
        )
        weights = {
            name: torch.from_numpy(rng.standard_normal((SPEC.experts, *shape))).float() / 8
            for name, shape in kind.shapes(SPEC).items()
        }
        experts.load_logical(weights)
        batch = random_batch(rng, ranks)
        x, gate = batch["x"][rank].clone().requires_grad_(), batch["gate"][rank].clone().requires_grad_()
        out = experts(x, batch["ids"][rank], gate)
        (out * batch["up"][rank]).sum().backward()
        expected = reference(batch, weights, kind, torch.float64)
        start = sum(len(part) for part in batch["x"][:rank])
        mine = slice(start, start + len(x))
        found = {"output": out.detach(), "input gradient": grad(x), "gate gradient": grad(gate)}
        for name, value in found.items():
            worst[name] = max(worst.get(name, 0.0), error(value, expected[name][mine], expected[name]))
        for name, parameter in experts.named_parameters():
            goal = expected[name]
            key = "weight gradient"
            rows = torch.from_numpy(experts.row_expert)
            worst[key] = max(worst.get(key, 0.0), error(grad(parameter), goal[rows], goal))
        if rank == number % ranks:
            for name, value in reference(batch, weights, kind, torch.float32).items():
                key = name if name in found else "weight gradient"
                rounding[key] = max(rounding.get(key, 0.0), error(value, expected[name], expected[name]))
    return worst, rounding


def measure(ranks: int, plans: int, choice: str) -> dict[str, dict[str, float]]:
    parts = on_ranks(differences, ranks, plans, choice)
    return {
        title: {name: max(part[i].get(name, 0.0) for part in parts) for name in parts[0][0]}
        for i, title in enumerate(("error", "rounding"))
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plans", type=int, default=200)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--replica-choices", nargs="+", choices=get_args(Replicas), default=list(get_args(Replicas)))


def run(options: argparse.Namespace, report: Report) -> None:
    for ranks, choice in itertools.product(options.ranks, options.replica_choices):
        for title, figures in measure(ranks, options.plans, choice).items():
            name = f"{ranks}, {choice}" if title == "error" else f"{ranks}, {choice}, one process, float32"
            table = report.table(
                "Equality with the layer in one process", ("ranks", *figures), dict.fromkeys(figures, ".1e")
            )
            table.row(name, *figures.values())
