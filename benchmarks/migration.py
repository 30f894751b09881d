"""What a change of plan in training costs, and what is left when a rank is killed in the middle of one.

    python -m benchmarks migration [--ranks 4] [--kills 50]

Real Gloo processes, one thread each, on one machine. Two layers of 32 experts, hidden size 128, AdamW; from index order to a
random plan of as many slots, and back. Bytes: weights and both moments, against the fewest experts that have to change
device. Pause: wall seconds of `Migration.advance` on the slowest rank, all at once and spread over steps of an eighth of the
bytes, beside the median of an ordinary training step. Kills: rank 1 is killed (SIGKILL) at a moment drawn evenly over
the time that a migration takes; a run is consistent when all survivors have one and the same plan in force, with every
weight and moment that they held or received bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import statistics
import tempfile
import threading
import time
from datetime import timedelta
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from runner import Report
from torch.distributed.device_mesh import init_device_mesh

import moeplace as mp
from moeplace.runtime.moe.data_parallel import exclude_from_ddp, expert_layers
from moeplace.runtime.moe.migrate import Migration, slot_tensors

SPEC = mp.ModelSpec(layers=2, experts=32, top_k=2, hidden_size=128, ffn_size=256, expert_dtype="fp32")
TOKENS, PARTS = 128, 8


def plan_of(ranks: int, order: np.ndarray[Any, Any]) -> mp.Plan:
    return mp.Plan(
        model=SPEC,
        topology=mp.Topology.preset("a100-pcie", devices_per_node=ranks),
        physical_to_logical=order,
        slot_device=np.arange(SPEC.experts) * ranks // SPEC.experts,
    )


def plans_of(ranks: int, seed: int) -> tuple[mp.Plan, mp.Plan]:
    rng = np.random.default_rng(seed)
    index = np.tile(np.arange(SPEC.experts), (SPEC.layers, 1))
    return plan_of(ranks, index), plan_of(ranks, rng.permuted(index, axis=1))


def newcomers(current: mp.Plan, plan: mp.Plan) -> int:
    """Experts that a device must hold and does not hold yet."""
    return sum(
        len(set(new[plan.slot_device == device]) - set(old[current.slot_device == device]))
        for old, new in zip(current.physical_to_logical, plan.physical_to_logical, strict=True)
        for device in range(plan.topology.num_devices)
    )


class Training:
    def __init__(self, rank: int, ranks: int, plan: mp.Plan, address: str) -> None:
        torch.set_num_threads(1)
        timeout = timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks, timeout=timeout)
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", (ranks,))
        layers = (mp.ExpertParallelMoE(SPEC, plan, mesh, layer) for layer in SPEC.moe_layers)
        self.model = torch.nn.Sequential(*layers)
        exclude_from_ddp(self.model)
        self.parallel = torch.nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def step(self) -> float:
        began = time.perf_counter()
        x = torch.randn(TOKENS, SPEC.hidden_size)
        (self.parallel(x) - x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began

    def rows(self) -> dict[tuple[int, int, str], bytes]:
        return {
            (layer.layer, int(expert), tensor.name): row.numpy().tobytes()
            for _, layer in expert_layers(self.model)
            for tensor in slot_tensors(layer, self.optimizer)
            for expert, row in zip(layer.row_expert, tensor.value, strict=True)
        }

    @property
    def plans(self) -> set[str]:
        return {layer.plan.fingerprint for _, layer in expert_layers(self.model)}


def pauses(rank: int, ranks: int, address: str, delay: float, results: Queue[Any]) -> None:
    """Times of both ways of changing the plan, there and back, and of training steps in between."""
    first, second = plans_of(ranks, 0)
    training = Training(rank, ranks, first, address)
    steps = [training.step() for _ in range(12)][2:]
    found: dict[str, Any] = {"at once": [], "spread": [], "moves": 0, "bytes": 0, "rounds": 0}
    for name in ("at once", "spread"):
        for plan in (second, first, second, first):
            current = next(iter(expert_layers(training.model)))[1].plan
            change = Migration(training.model, plan, training.optimizer)
            while not change.done:
                change.advance(None if name == "at once" else -(-change.bytes_total // PARTS))
                training.step()
            found[name].append(max(change.pauses))
            found["rounds"] = len(change.pauses)
            found["moves"], found["bytes"] = change.moves, change.bytes_moved
            found["fewest"] = newcomers(current, plan)
    found["step"] = statistics.median(steps)
    dist.destroy_process_group()
    results.put((rank, found))


def killed(rank: int, ranks: int, address: str, delay: float, results: Queue[Any]) -> None:
    """One run with a rank killed `delay` seconds after the migration began."""
    first, second = plans_of(ranks, 0)
    training = Training(rank, ranks, first, address)
    for _ in range(2):
        training.step()
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, training.rows())
    before = {key: value for part in every for key, value in part.items()}
    change = Migration(training.model, second, training.optimizer, chunk_bytes=1 << 16, timeout=timedelta(seconds=20))
    dist.barrier()
    if rank == 1:
        threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
    began = time.perf_counter()
    with contextlib.suppress(mp.RankError):
        while not change.done:
            change.advance(-(-change.bytes_total // PARTS))
    if rank == 1:
        time.sleep(60)
    intact = all(before[key] == value for key, value in training.rows().items())
    told = time.perf_counter() - began
    results.put((rank, {"plans": sorted(training.plans), "intact": intact, "new": change.done, "seconds": told}))
    results.close()
    results.join_thread()
    os._exit(0)  # the process group cannot be taken down in order any more


def of_processes(target: Any, ranks: int, delay: float, expected: int) -> list[Any]:
    context = multiprocessing.get_context("fork")
    results: Queue[Any] = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{Path(folder)}/rendezvous"
        processes = [context.Process(target=target, args=(r, ranks, address, delay, results)) for r in range(ranks)]
        for process in processes:
            process.start()
        found = []
        with contextlib.suppress(Empty):  # a rank may not answer; it is counted then
            for _ in range(expected):
                found.append(results.get(timeout=180))  # noqa: PERF401
        for process in processes:
            process.kill()
            process.join()
    return [answer for _, answer in sorted(found, key=lambda pair: pair[0])]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kills", type=int, default=50)


def run(options: argparse.Namespace, report: Report) -> None:
    timed = of_processes(pauses, options.ranks, 0.0, options.ranks)
    seconds = {name: max(statistics.median(rank[name]) for rank in timed) for name in ("at once", "spread")}
    whole = seconds["spread"] * timed[0]["rounds"]
    rng = np.random.default_rng(0)
    outcomes = [
        of_processes(killed, options.ranks, float(rng.uniform(0.0, 1.2 * whole)), options.ranks - 1)
        for _ in range(options.kills)
    ]
    consistent = [
        len(found) == options.ranks - 1
        and all(rank["intact"] for rank in found)
        and len({tuple(rank["plans"]) for rank in found}) == 1
        and len(found[0]["plans"]) == 1
        for found in outcomes
    ]
    new = sum(found[0]["new"] for found in outcomes if found)
    slowest = max((rank["seconds"] for found in outcomes for rank in found), default=None)
    result = {
        "ranks": options.ranks,
        "experts moved": timed[0]["moves"],
        "fewest possible": timed[0]["fewest"],
        "MB moved": timed[0]["bytes"] / 1e6,
        "step ms": 1e3 * max(rank["step"] for rank in timed),
        "pause at once ms": 1e3 * seconds["at once"],
        "longest pause spread ms": 1e3 * seconds["spread"],
        "steps of the spread": timed[0]["rounds"],
        "runs with a rank killed": options.kills,
        "inconsistent": options.kills - sum(consistent),
        "old plan in force": options.kills - new,
        "new plan in force": new,
        "slowest survivor told after s": slowest,
    }
    table = report.table("Changing the plan, and losing a rank in the middle", ("figure", "value"))
    for name, value in result.items():
        table.row(name, value)
