"""What test_gather_kernels.py runs in processes of their own: Triton decides at its import whether it interprets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks import join_group
from torch.distributed.device_mesh import init_device_mesh

import moeplace as mp
from moeplace.runtime.moe.dispatcher import AllToAllDispatcher, gathered_sum
from moeplace.runtime.moe.layer_placement import LayerPlacement
from moeplace.runtime.moe.mesh import ExpertMesh


def interpreting(interpret: bool) -> None:
    os.environ["TRITON_INTERPRET"] = "1" if interpret else "0"


def sums(rank: int, world: int, folder: Path) -> Any:
    """Sums and gradients by the kernels against those by torch's operations, of several widths, with places that have
    no rows and places that have most."""
    interpreting(True)
    from moeplace.runtime.moe import gather_kernels

    gather_kernels.WIDEST = 32
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {"float32": [], "bfloat16": [], "weights": [], "again": []}
    for dtype in (torch.float32, torch.bfloat16):
        for rows, pairs, width in ((12, 40, 8), (5, 33, 100), (7, 0, 16), (3, 9, 1)):
            y = torch.randn(pairs, width, generator=generator).to(dtype)
            weight = torch.rand(pairs, generator=generator)
            place = torch.randint(max(1, rows - 2), (pairs,), generator=generator)
            up = torch.randn(rows, width, generator=generator).to(dtype)
            results = []
            for interpret in (True, True, False):
                interpreting(interpret)
                own, gates, bare = y.clone().requires_grad_(), weight.clone().requires_grad_(), y.clone()
                bare.requires_grad_()
                total, plain = gathered_sum(own, place, rows, gates), gathered_sum(bare, place, rows)
                (total * up).sum().backward()
                (plain * up).sum().backward()
                results.append([total, plain, own.grad, bare.grad, gates.grad])
            kernel, again, reference = results
            pairs_of = list(zip(kernel[:4], reference[:4], strict=True))
            if dtype == torch.float32:
                found["float32"].append(all(torch.equal(a, b) for a, b in pairs_of))
            else:
                relative = [((a - b).abs() / b.abs().clamp(min=1e-6)).float() for a, b in pairs_of]
                found["bfloat16"].append(max(float(part.max()) if part.numel() else 0.0 for part in relative))
            found["again"].append(all(torch.equal(a, b) for a, b in zip(kernel, again, strict=True)))
            apart = (kernel[4] - reference[4]).abs()
            found["weights"].append(float((apart / reference[4].abs().clamp(min=1.0)).max()) if pairs else 0.0)
    return found


def combined(rank: int, world: int, folder: Path) -> Any:
    """A batch through the all-to-all and back, with its gradients, both ways."""
    join_group(rank, world, folder)
    spec = mp.ModelSpec(layers=1, experts=6, top_k=3, hidden_size=24, ffn_size=8)
    plan = mp.Plan(
        model=spec,
        topology=mp.Topology.preset("a100-pcie", devices_per_node=world),
        physical_to_logical=np.arange(6)[None],
        slot_device=np.repeat(np.arange(world), 6 // world),
    )
    dispatcher = AllToAllDispatcher(ExpertMesh.of(init_device_mesh("cpu", (world,))), two_stage=False)
    own = 6 // world
    row_of_slot = torch.full((6,), -1)
    row_of_slot[rank * own : (rank + 1) * own] = torch.arange(own)
    dispatcher.place(LayerPlacement.of(plan, 0), row_of_slot, own)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(10, 24, generator=generator)
    slot = torch.rand(10, 6, generator=generator).topk(3).indices
    gate = torch.rand(10, 3, generator=generator)
    results = []
    for interpret in (True, False):
        interpreting(interpret)
        rows, gates = x.clone().requires_grad_(), gate.clone().requires_grad_()
        metadata = dispatcher.dispatch(rows, slot, gates)
        row_ND, count_S = dispatcher.receive(metadata)
        factor = torch.repeat_interleave(torch.arange(own) + rank * own + 1.0, count_S)
        total = dispatcher.combine(torch.tanh(row_ND * factor[:, None]), metadata)
        total.square().sum().backward()
        results.append([total, rows.grad, gates.grad])
    dist.destroy_process_group()
    return [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]
