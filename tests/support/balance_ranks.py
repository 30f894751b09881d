"""What each rank does in test_balance.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from data_parallel_ranks import plan_of
from family_ranks import spec_of
from random_plans import SPEC, logical_weights, random_plan
from ranks import join_group
from small_models import deepseek_v3, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import moeplace as mp
from moeplace.runtime import BalanceLoss, BiasBalancing, Muon, balance_loss
from moeplace.runtime.moe.data_parallel import expert_layers
from moeplace.runtime.moe.expert_mlps import SwiGLU
from moeplace.runtime.moe.experts import PlacedExperts
from moeplace.runtime.moe.layer import ExpertParallelMoE, SigmoidRouter, SoftmaxRouter, reference_experts


def batch(rank: int, step: int = 0, rows: int = 8) -> Tensor:
    return torch.randn(rows, SPEC.hidden_size, generator=torch.Generator().manual_seed(100 * step + rank))


def balance(rank: int, world: int, folder: Path) -> dict[str, Any]:
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "ep"))["ep"]
    found = {
        "bias": bias(rank, world, mesh),
        "transformers": transformers_bias(rank, world),
        "losses": losses(rank, world, mesh),
        "muon": muon(rank, world, mesh),
        "refused": refused(world, mesh),
        "capacity": capacity(rank, world, mesh, None),
        "padded": capacity(rank, world, mesh, 14),
    }
    dist.destroy_process_group()
    return found


def layer_of(mesh: Any, world: int, router: nn.Module) -> ExpertParallelMoE:
    return ExpertParallelMoE(SPEC, plan_of(1, world // 2), mesh, 1, router=router)


def bias(rank: int, world: int, mesh: Any) -> dict[str, Any]:
    """Three steps of two checkpointed micro-batches, against the same router in one process on all ranks' tokens."""
    torch.manual_seed(3)
    layer = layer_of(mesh, world, SigmoidRouter(SPEC.hidden_size, SPEC.experts, SPEC.top_k))
    whole = SigmoidRouter(SPEC.hidden_size, SPEC.experts, SPEC.top_k)
    whole.load_state_dict(layer.gate.state_dict())
    balancing = BiasBalancing(layer, rate=0.1)
    same = True
    for step in range(3):
        counts = torch.zeros(SPEC.experts)
        for part in range(2):
            x = batch(rank, 2 * step + part)
            torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
            for other in range(world):
                counts += torch.bincount(whole(batch(other, 2 * step + part))[2].flatten(), minlength=SPEC.experts)
        layer.eval()
        layer(batch(rank, 99))
        layer.train()
        balancing.step()
        whole.bias += 0.1 * torch.sign(counts.mean() - counts)
        same &= balancing.tokens_per_expert[0].tolist() == counts.tolist()
    balancing.close()
    return {"counts": same, "bias": torch.equal(layer.gate.bias, whole.bias), "moved": bool(whole.bias.any())}


def transformers_bias(rank: int, world: int) -> list[int]:
    """DeepSeek-V3 of Transformers: its own bias moves."""
    model = deepseek_v3(use_cache=False).train()
    spec = spec_of(model, (1, 2))
    mesh = init_device_mesh("cpu", (world,))
    mp.parallelize(model, random_plan(np.random.default_rng(2), 1, world, spec), mesh)
    before = [module.gate.e_score_correction_bias.clone() for module in model.modules() if hasattr(module, "gate")]
    balancing = BiasBalancing(model, rate=0.5)
    model(input_ids=tokens(2, 6, seed=rank))
    balancing.step()
    after = [module.gate.e_score_correction_bias for module in model.modules() if hasattr(module, "gate")]
    moved = [int(((b - a).abs() > 0.4).sum()) for a, b in zip(before, after, strict=True)]
    return [*moved, int(balancing.tokens_per_expert.sum())]


def losses(rank: int, world: int, mesh: Any) -> dict[str, float]:
    """Gradients of the router averaged over ranks, against those of the loss in one process on all tokens."""
    result = {}
    for over in ("batch", "sequence"):
        torch.manual_seed(4)
        layer = layer_of(mesh, world, SoftmaxRouter(SPEC.hidden_size, SPEC.experts, SPEC.top_k))
        rows = 8 if over == "sequence" else 4 + 2 * rank
        loss = BalanceLoss(layer, 0.5, over=over, sequence_length=4 if over == "sequence" else None)
        layer(batch(rank, rows=rows))
        value = loss()
        value.backward()
        mean = layer.gate.weight.grad.clone()
        dist.all_reduce(mean)
        total = value.detach().clone()
        dist.all_reduce(total)
        weight = layer.gate.weight.detach().clone().requires_grad_()
        every = torch.cat([batch(r, rows=8 if over == "sequence" else 4 + 2 * r) for r in range(world)])
        score = (every @ weight.T).softmax(dim=-1)
        chosen = score.topk(SPEC.top_k, dim=-1).indices
        expected = 0.5 * balance_loss(score, chosen, sequence_length=4 if over == "sequence" else None)
        expected.backward()
        result[f"{over} loss"] = float((total / world - expected.detach()).abs())
        result[f"{over} gradient"] = float((mean / world - weight.grad).abs().max())
    return result


def muon(rank: int, world: int, mesh: Any) -> dict[str, float]:
    """Experts under Muon, with a change of plan between, against torch.optim.Muon on every expert's matrix alone."""
    layer = layer_of(mesh, world, SoftmaxRouter(SPEC.hidden_size, SPEC.experts, SPEC.top_k))
    weights = logical_weights(5, SwiGLU().shapes(SPEC), SPEC.experts)
    layer.experts.load_logical(weights)
    matrices = {name: [nn.Parameter(row.clone()) for row in value] for name, value in weights.items()}
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    whole = torch.optim.Muon([m for part in matrices.values() for m in part], **settings)
    optimizer = Muon(layer.experts.parameters(), **settings)
    generator = torch.Generator().manual_seed(6)
    for step in range(3):
        grads = {name: torch.randn(value.shape, generator=generator) for name, value in weights.items()}
        for name, value in layer.experts.named_parameters():
            value.grad = grads[name][torch.from_numpy(layer.experts.row_expert)].clone()
            for matrix, grad in zip(matrices[name], grads[name], strict=True):
                matrix.grad = grad.clone()
        optimizer.step()
        whole.step()
        optimizer.zero_grad()
        if step == 0:
            mp.apply(nn.Sequential(layer), plan_of(2, world // 2).select([1, 4]), optimizer)
    worst = 0.0
    for name, value in layer.experts.named_parameters():
        for row, expert in enumerate(layer.experts.row_expert.tolist()):
            worst = max(worst, float((value[row] - matrices[name][expert]).abs().max()))
    # From a plan under which the second rank has no expert.
    plan = plan_of(2, world // 2).select([1])
    alone = mp.Plan(plan.model, plan.topology, np.arange(SPEC.experts)[None], np.zeros(SPEC.experts, dtype=np.int64))
    one = ExpertParallelMoE(SPEC.replace(layers=1, moe_layers=(1,)), alone, mesh, 1, router="softmax")
    stepping = Muon(one.experts.parameters())
    one(batch(rank)).square().mean().backward()
    stepping.step()
    stepping.zero_grad()
    mp.apply(one, plan, stepping)
    moment = stepping.state[one.experts.down_proj]["momentum_buffer"]
    return {"worst": worst, "rows": len(moment) - len(one.experts.row_expert)}


def capacity(rank: int, world: int, mesh: Any, padded: int | None) -> dict[str, float]:
    """Each rank's batch with an expert's least weighted tokens left out, against the same in one process. padded: to
    messages for so many tokens; ranks have different numbers of them then, the last none."""
    torch.manual_seed(8)
    factor = 1.0 if padded is None else 0.6
    experts = PlacedExperts(
        SPEC, plan_of(1, world // 2), mesh, 1, gradients="sum", capacity_factor=factor, padded_tokens=padded
    )
    weights = logical_weights(9, SwiGLU().shapes(SPEC), SPEC.experts)
    experts.load_logical(weights)
    own = {name: value.clone().requires_grad_() for name, value in weights.items()}
    worst, dropped = 0.0, 0
    for other in range(world):
        generator = torch.Generator().manual_seed(other)
        rows = 9 if padded is None else (14, 9, 11, 0)[other % 4]
        most = math.ceil(factor * (padded or rows) * SPEC.top_k / SPEC.experts)
        x = batch(other, rows=rows)
        gate, ids = torch.rand(rows, SPEC.experts, generator=generator).topk(SPEC.top_k)
        taken = torch.zeros_like(gate)
        for expert in range(SPEC.experts):
            pairs = sorted(((float(gate[t, k]), t, k) for t, k in (ids == expert).nonzero().tolist()), reverse=True)
            for _, t, k in pairs[:most]:
                taken[t, k] = 1.0
        expected = reference_experts(x, ids, gate * taken, own, SwiGLU())
        if rows:
            expected.square().sum().backward()
        if other == rank:
            dropped = int((taken == 0).sum())
            out = experts(x, ids, gate)
            out.square().sum().backward()
            worst = float((out - expected).abs().max()) if rows else 0.0
    for name, value in experts.named_parameters():
        goal = own[name].grad[torch.from_numpy(experts.row_expert)]
        worst = max(worst, float((value.grad - goal).abs().max()) if len(goal) else 0.0)
    return {"worst": worst, "dropped": dropped}


def refused(world: int, mesh: Any) -> dict[str, str]:
    layer = layer_of(mesh, world, SoftmaxRouter(SPEC.hidden_size, SPEC.experts, SPEC.top_k))
    few = PlacedExperts(SPEC, plan_of(1, world // 2), mesh, 1, capacity_factor=1.0, padded_tokens=4)
    cases = {
        "bias": lambda: BiasBalancing(layer),
        "scope": lambda: BalanceLoss(layer, over="sequences"),
        "length": lambda: BalanceLoss(layer, over="sequence"),
        "unseen": lambda: BalanceLoss(layer)(),
        "factor": lambda: PlacedExperts(SPEC, plan_of(1, world // 2), mesh, 1, capacity_factor=0.0),
        "no factor": lambda: PlacedExperts(SPEC, plan_of(1, world // 2), mesh, 1, padded_tokens=4),
        "no tokens": lambda: PlacedExperts(SPEC, plan_of(1, world // 2), mesh, 1, capacity_factor=1.0, padded_tokens=0),
        "two stages": lambda: PlacedExperts(
            SPEC, plan_of(1, world // 2), mesh, 1, dispatch="node_aware", capacity_factor=1.0, padded_tokens=4
        ),
        "too many": lambda: few(batch(0, rows=9), torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1)),
        "muon": lambda: Muon([nn.Parameter(torch.zeros(3))]),
    }
    said = {}
    for name, attempt in cases.items():
        try:
            attempt()
        except mp.InputError as refusal:
            said[name] = str(refusal)
    assert len(expert_layers(layer)) == 1
    return said
