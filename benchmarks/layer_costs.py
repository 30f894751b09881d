"""What one MoE layer keeps and does in a training step: bytes for backward, operations, waits of the host, messages.

On the CPU, so that operations stand for launches on a GPU: what the host asks for is the same. Where a layer goes
another way on a CPU (LSH compares tokens slot by slot there), the GPU's is taken. Bytes are those of all storages that
autograd keeps between forward and backward, the layer's weights aside, over the bytes of its input.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from forked_ranks import on_ranks
from host_waits import host_waits
from runner import Report
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import moeplace as mp
from moeplace.runtime import LSHCompression
from moeplace.runtime.moe import lsh

SPEC = mp.ModelSpec(layers=1, experts=16, top_k=8, hidden_size=128, ffn_size=64, expert_dtype="bf16")
TOKENS = 256
VIEWS = ("view", "t.default", "transpose", "slice", "split", "detach", "alias", "select.int", "expand", "unsqueeze",
         "squeeze", "as_strided", "chunk", "_unsafe_view", "permute", "reshape")  # fmt: skip
"""Operations that launch nothing."""


class Operations(TorchDispatchMode):
    """Counts what is asked of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).removeprefix("aten.")
        self.count += not name.startswith(VIEWS) and not name.startswith("c10d")
        return function(*args, **(kwargs or {}))


@contextmanager
def calls(counts: Counter[str]) -> Iterator[None]:
    """Counts messages, and what makes the host wait for the device."""
    names = ("all_to_all_single", "all_reduce", "all_gather")
    before = {name: getattr(dist, name) for name in names}

    def counting(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts["messages"] += 1
            return function(*args, **kwargs)

        return call

    def wait(name: str) -> None:
        counts["waits"] += 1

    try:
        for name, function in before.items():
            setattr(dist, name, counting(function))
        with host_waits(wait):
            yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def costs_of(layer: nn.Module, x: Tensor) -> dict[str, float]:
    """Of one forward and backward. kept: bytes over the input's."""
    weights = {value.untyped_storage().data_ptr() for value in layer.parameters()}
    storages: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return value

    x = x.clone().requires_grad_()
    counts: Counter[str] = Counter()
    layer(x).float().square().mean().backward()
    layer.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        out = layer(x)
    out.float().square().mean().backward()
    layer.zero_grad()
    with Operations() as operations, calls(counts):
        out = layer(x)
    forward = (operations.count, counts["waits"], counts["messages"])
    loss = out.float().square().mean()
    with Operations() as operations, calls(counts):
        loss.backward()
    return {
        "kept": sum(storages.values()) / x.nbytes,
        "operations forward": forward[0],
        "operations backward": operations.count,
        "waits forward": forward[1],
        "waits backward": counts["waits"] - forward[1],
        "messages forward": forward[2],
        "messages backward": counts["messages"] - forward[2],
    }


def plan_of(devices: int, nodes: int = 1, extra: int = 0) -> mp.Plan:
    table = np.concatenate([np.arange(SPEC.experts), np.arange(extra)])
    return mp.Plan(
        model=SPEC,
        topology=mp.Topology.preset("h100-sxm", nodes=nodes, devices_per_node=devices // nodes),
        physical_to_logical=table[None],
        slot_device=np.sort(np.arange(len(table)) % devices),
    )


def measured(rank: int, ranks: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    flat, deep = init_device_mesh("cpu", (ranks,)), init_device_mesh("cpu", (2, ranks // 2))
    x = torch.randn(TOKENS, SPEC.hidden_size, generator=torch.Generator().manual_seed(rank)).to(dtype)
    cases: dict[str, dict[str, Any]] = {
        "flat": {"plan": plan_of(ranks), "mesh": flat},
        "flat, 4 replicas": {"plan": plan_of(ranks, extra=4), "mesh": flat},
        "node by node": {"plan": plan_of(ranks, 2), "mesh": deep},
        "padded to 1.25 of the mean": {
            "plan": plan_of(ranks),
            "mesh": flat,
            "capacity_factor": 1.25,
            "padded_tokens": TOKENS,
        },
        "flat, LSH at 0.2": {"plan": plan_of(ranks), "mesh": flat, "compression": LSHCompression(rate=0.2)},
    }
    found = {}
    for name, settings in cases.items():
        torch.manual_seed(0)
        layer = mp.ExpertParallelMoE(SPEC, settings.pop("plan"), layer=0, dtype=dtype, **settings)
        with mock.patch.object(lsh, "nearest_in_slots", lsh.nearest_of_all):
            found[name] = costs_of(layer, x)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=4)


def run(options: argparse.Namespace, report: Report) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        parts = on_ranks(measured, options.ranks, dtype)
        for name in parts[0]:
            figures = {key: float(np.mean([part[name][key] for part in parts])) for key in parts[0][name]}
            table = report.table(
                "One layer's training step", ("dtype", "layer", *figures), dict.fromkeys(figures, ".1f")
            )
            table.row(str(dtype).removeprefix("torch."), name, *figures.values())
