"""What each rank does in test_migration.py."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from random_plans import SPEC, random_plan
from ranks import join_group
from torch.distributed.device_mesh import init_device_mesh

import moeplace as mp
from moeplace.placement.migration import migration
from moeplace.runtime.moe import migrate
from moeplace.runtime.moe.data_parallel import exclude_from_ddp, expert_layers
from moeplace.runtime.moe.layer import ExpertParallelMoE
from moeplace.runtime.moe.migrate import Migration, apply, slot_tensors

Rows = dict[tuple[int, int, str], list[Any]]


def plan_of(number: int, world: int) -> mp.Plan:
    return random_plan(np.random.default_rng([11, number]), 1, world)


class Training:
    """Two layers under DDP and AdamW; batches depend on rank and step alone."""

    def __init__(self, rank: int, world: int, mesh: Any, plan: mp.Plan, steps: int = 2) -> None:
        torch.manual_seed(0)
        self.rank, self.taken = rank, 0
        self.model = torch.nn.Sequential(*(ExpertParallelMoE(SPEC, plan, mesh, layer, seed=5) for layer in (1, 4)))
        for _, layer in expert_layers(self.model):
            with torch.no_grad():
                for value in layer.parameters():
                    value.mul_(15.0)
        exclude_from_ddp(self.model)
        self.parallel = torch.nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        for _ in range(steps):
            self.step()

    def step(self) -> float:
        generator = torch.Generator().manual_seed(self.taken % 3 * 1000 + self.rank)
        x = torch.randn(7 + self.rank, SPEC.hidden_size, generator=generator)
        loss = (self.parallel(x) + x - x.roll(1, dims=1)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.taken += 1
        self.last = loss  # as a loop's variable does, it keeps the graph alive until the next step
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return float(mean)

    def rows(self) -> Rows:
        """{(layer, expert, tensor): its row}; twins must be equal."""
        result: Rows = {}
        for _, layer in expert_layers(self.model):
            for tensor in slot_tensors(layer, self.optimizer):
                assert len(tensor.value) == len(layer.row_expert)
                for expert, row in zip(layer.row_expert.tolist(), tensor.value, strict=True):
                    values = row.flatten().tolist()
                    assert result.setdefault((layer.layer, expert, tensor.name), values) == values
        return result

    def everywhere(self) -> Rows:
        """The rows of all ranks; replicas must be equal."""
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, self.rows())
        result: Rows = {}
        for part in every:
            for key, values in part.items():
                assert result.setdefault(key, values) == values
        return result

    @property
    def plans(self) -> set[str]:
        return {layer.plan.fingerprint for _, layer in expert_layers(self.model)}


def moves(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Everything where all ranks live, in one spawn."""
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    found = {
        check.__name__: check(rank, world, mesh) for check in (back_and_forth, spread, failing, cancelled, refused)
    }
    dist.destroy_process_group()
    return found


def back_and_forth(rank: int, world: int, mesh: Any) -> dict[str, Any]:
    training = Training(rank, world, mesh, plan_of(0, world))
    before = training.everywhere()
    result: dict[str, Any] = {
        "kept": True,
        "fewest": True,
        "placed": True,
        "bytes": True,
        "names": sorted({k[2] for k in before}),
    }
    row_bytes = sum(t.row_bytes for t in slot_tensors(training.model[0].experts, training.optimizer))
    for number in [1, 2, 3, 4, 5, 0]:
        plan = plan_of(number, world)
        current = training.model[0].experts.plan
        done = apply(training.model, plan, training.optimizer, chunk_bytes=(1, 100, 1 << 20)[number % 3] * 100)
        result["kept"] &= training.everywhere() == before
        result["fewest"] &= done.moves == migration(current, plan).moves
        result["bytes"] &= done.bytes_total == done.bytes_moved == done.moves * row_bytes
        for _, layer in expert_layers(training.model):
            mine = layer.placement.expert[layer.placement.device == rank]
            result["placed"] &= sorted(mine.tolist()) == sorted(layer.row_expert.tolist())
        result["placed"] &= training.plans == {plan.fingerprint}
    result["again"] = apply(training.model, plan_of(0, world), training.optimizer).moves
    return result


def spread(rank: int, world: int, mesh: Any) -> dict[str, Any]:
    """Loss curves without and with two changes of plan, at once and spread over steps; a third is in half precision."""
    first, second = plan_of(0, world), plan_of(7, world)
    curves: dict[str, Any] = {}
    for name in ("none", "at_once", "spread"):
        training = Training(rank, world, mesh, first, steps=3)
        curve, rounds, old = [], 0, True
        change = None
        for step in range(18):
            if name != "none" and step in (2, 8):
                change = Migration(training.model, second if step == 2 else first, training.optimizer)
            if change is not None and not change.done:
                before = training.plans
                limit = None if name == "at_once" else change.bytes_total // 3
                old &= change.advance(limit) or training.plans == before
                rounds += 1
            curve.append(training.step())
        training.everywhere()
        curves[name] = {
            "curve": curve,
            "rounds": rounds,
            "old_until_last": old,
            "plans": training.plans == {first.fingerprint},
        }
    return curves


def failing(rank: int, world: int, mesh: Any) -> dict[str, Any]:
    """Rank 1 fails in the middle of a transfer; later the same change succeeds."""
    training = Training(rank, world, mesh, plan_of(0, world))
    before, plans = training.everywhere(), training.plans
    whole = migrate.transfer

    def broken(messages: Any, *rest: Any) -> None:
        whole(messages[: len(messages) // 2], *rest)
        raise OSError("no buffer space available")

    if rank == 1:
        migrate.transfer = broken
    said = ""
    began = time.monotonic()
    try:
        apply(training.model, plan_of(2, world), training.optimizer, timeout=timedelta(seconds=20))
    except mp.RankError as error:
        said = str(error)
    seconds = time.monotonic() - began
    migrate.transfer = whole
    kept = training.everywhere() == before and training.plans == plans
    apply(training.model, plan_of(2, world), training.optimizer)
    return {
        "said": said,
        "seconds": seconds,
        "kept": kept,
        "later": training.everywhere() == before and training.plans != plans,
    }


def cancelled(rank: int, world: int, mesh: Any) -> bool:
    training = Training(rank, world, mesh, plan_of(0, world))
    before = training.everywhere()
    change = Migration(training.model, plan_of(2, world), training.optimizer)
    change.advance(1)
    change.advance(1)
    change.cancel()
    plan, kept = plan_of(0, world), training.everywhere() == before
    shapes = all(
        len(layer.row_expert) == plan.slots_per_device[row, rank]
        for row, (_, layer) in enumerate(expert_layers(training.model))
    )
    return shapes and kept and training.plans == {plan.fingerprint}


def refused(rank: int, world: int, mesh: Any) -> dict[str, str]:
    training = Training(rank, world, mesh, plan_of(0, world))
    other = random_plan(np.random.default_rng(0), 1, world, SPEC.replace(experts=7))
    larger = random_plan(np.random.default_rng(0), 1, world + 2)

    def with_gradient() -> None:
        training.parallel(torch.ones(2, SPEC.hidden_size)).sum().backward()
        apply(training.model, plan_of(1, world), training.optimizer)

    def with_strange_state() -> None:
        training.optimizer.zero_grad()
        for value in training.model[0].experts.parameters():
            training.optimizer.state[value]["norm"] = torch.zeros(99)
        apply(training.model, plan_of(1, world), training.optimizer)

    cases = {
        "other": lambda: apply(training.model, other),
        "larger": lambda: apply(training.model, larger),
        "different": lambda: apply(training.model, plan_of(1 + (rank == 3), world)),
        "without_state": lambda: apply(training.model, plan_of(1, world), training.optimizer if rank else None),
        "nothing": lambda: apply(torch.nn.Linear(2, 2), plan_of(1, world)),
        "chunk": lambda: apply(training.model, plan_of(1, world), chunk_bytes=0),
        "gradient": with_gradient,
        "state": with_strange_state,
    }
    said = {}
    for name, attempt in cases.items():
        try:
            attempt()
        except (mp.InputError, mp.UnsupportedError) as refusal:
            said[name] = str(refusal)
    return said


def killed(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Rank 1 is killed at a moment of a migration that the file `delay` says, in seconds."""
    join_group(rank, world, folder, timeout=timedelta(seconds=20))
    training = Training(rank, world, init_device_mesh("cpu", (world,)), plan_of(0, world))
    before = training.everywhere()
    change = Migration(
        training.model, plan_of(2, world), training.optimizer, chunk_bytes=512, timeout=timedelta(seconds=6)
    )
    dist.barrier()
    if rank == 1:
        delay = float((folder / "delay").read_text())
        threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
    said = ""
    try:
        while not change.advance(change.bytes_total // 3):
            pass
    except mp.RankError as error:
        said = str(error)
    if rank == 1:
        time.sleep(60)
    mine = training.rows()
    return {
        "said": said,
        "plans": sorted(training.plans),
        "intact": all(before[key] == values for key, values in mine.items()),
    }
