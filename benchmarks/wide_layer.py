"""A layer of many ranks without their hardware: what the host does for one MoE layer at DeepSeek-V3's shapes.

    python -m benchmarks wide_layer [--ranks 64] [--tokens 512] [--repeats 20]

One rank of torch's fake process group, whose collectives give back what was sent, so nothing travels. The layer has 256
experts and 32 redundant slots, top-8 from 4 of 8 groups, on 8 ranks a node. Tokens are routed at hidden size 7168, and
then dispatched and combined 8 values wide and without expert products: what remains is planning (choosing replicas,
sorting, counting, packing). Times are medians of CPU seconds of one thread, in ms.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from runner import Report
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import moeplace as mp
from moeplace.runtime.moe.dispatcher import Dispatcher, flat, node_aware
from moeplace.runtime.moe.experts import GradientSum, ReplicaChoice, rows_of_slots
from moeplace.runtime.moe.layer import SigmoidRouter
from moeplace.runtime.moe.layer_placement import LayerPlacement
from moeplace.runtime.moe.mesh import ExpertMesh

NODE = 8
EXPERTS, SLOTS, TOP_K, GROUPS, OPEN_GROUPS, HIDDEN = 256, 288, 8, 8, 4, 7168


def plan_of(ranks: int) -> mp.Plan:
    """DeepSeek's own balance on loads that differ: 32 experts get a second replica."""
    rng = np.random.default_rng(0)
    spec = mp.ModelSpec(
        layers=1, experts=EXPERTS, top_k=TOP_K, hidden_size=HIDDEN, ffn_size=2048, groups=GROUPS, moe_layers=(3,)
    )
    load = rng.gamma(2.0, size=EXPERTS)
    table = np.concatenate([np.arange(EXPERTS), np.argsort(-load)[: SLOTS - EXPERTS]])
    return mp.Plan(
        model=spec,
        topology=mp.Topology.preset("h100-hgx", nodes=ranks // NODE),
        physical_to_logical=rng.permutation(table)[None],
        slot_device=np.sort(np.arange(SLOTS) % ranks),
    )


def median_ms(work: Callable[[], Any], repeats: int) -> float:
    work()
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return 1e3 * statistics.median(taken)


def measure(ranks: int, tokens: int, repeats: int) -> dict[str, float]:
    plan = plan_of(ranks)
    meshes = {
        "flat": ExpertMesh.of(init_device_mesh("cpu", (ranks,))),
        "node-aware": ExpertMesh.of(init_device_mesh("cpu", (ranks // NODE, NODE))),
    }
    torch.manual_seed(0)
    x_TD = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16)
    router = SigmoidRouter(HIDDEN, EXPERTS, TOP_K, GROUPS, OPEN_GROUPS, scale=2.5, dtype=torch.bfloat16)
    with torch.no_grad():
        _, weight_TK, expert_TK = router(x_TD)
    placement = LayerPlacement.of(plan, 3)
    device = torch.device("cpu")
    rows = placement.expert[placement.on_device(0)]
    row_of_slot = rows_of_slots(placement, 0, rows)
    figures: dict[str, float] = {
        "tokens": tokens,
        "tables of a new plan ms": median_ms(
            lambda: (ReplicaChoice(placement, 0, device), GradientSum(placement, meshes["flat"], row_of_slot, rows)), 3
        ),
    }
    narrow_TD = x_TD[:, :8].contiguous()
    choice = ReplicaChoice(placement, 0, device)
    figures["replica choice ms"] = median_ms(lambda: choice.slots(expert_TK), repeats)
    slot_TK = choice.slots(expert_TK)
    for name, make in (("flat", flat), ("node-aware", node_aware)):
        dispatcher = make(meshes[name])
        # What comes back is bound for other ranks' slots: as many rows as in truth, so let them count as this rank's.
        dispatcher.place(placement, torch.arange(SLOTS) % len(rows), len(rows))
        figures[f"{name}: dispatch and combine ms"] = median_ms(
            lambda dispatcher=dispatcher: round_trip(dispatcher, narrow_TD, slot_TK, weight_TK), repeats
        )
        figures[f"{name}: copies a token"] = sum(dispatcher.copies[0]) / tokens
    return figures


@torch.no_grad()
def round_trip(dispatcher: Dispatcher, x_TD: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor) -> None:
    metadata = dispatcher.dispatch(x_TD, slot_TK, weight_TK)
    row_ND, _ = dispatcher.receive(metadata)
    dispatcher.combine(row_ND, metadata)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--repeats", type=int, default=10)


def run(options: argparse.Namespace, report: Report) -> None:
    if options.ranks % NODE:
        raise SystemExit(f"--ranks {options.ranks}: expected a multiple of {NODE}, the ranks of a node")
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.ranks)
    for tokens in options.tokens:
        figures = measure(options.ranks, tokens, options.repeats)
        report.table(f"Planning at {options.ranks} ranks", figures, {"tokens": ","}).row(*figures.values())
    dist.destroy_process_group()
