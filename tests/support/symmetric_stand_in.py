"""torch's `symm_mem::all_to_all_vdev` for CPUs, and what each rank does with it in test_symmetric.py.

Memory is shared between processes, and read and written as the operator's sources do it
(torch/csrc/distributed/c10d/symm_mem/nvshmem_extension.cu): every rank writes its numbers of rows and where they begin
to all others, all meet once, and each then reads its rows out of the others' buffers, at a time of its own. Nobody
meets behind that. Ranks sleep before they read, so that who overwrites what others still read is found out.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from deep_ep_stand_in import attempt
from expert_ranks import KINDS, error, expected_of, replicas_equal, tokens
from random_plans import SPEC, logical_weights, random_plan
from ranks import join_group
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils.checkpoint import checkpoint

import moeplace as mp
from moeplace.runtime import SymmetricMemory
from moeplace.runtime.moe.expert_mlps import GptOss, SwiGLU
from moeplace.runtime.moe.experts import PlacedExperts
from moeplace.runtime.moe.symmetric import SymmetricBuffers

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks")]
from host_waits import host_waits  # noqa: E402

EIGHT = SymmetricMemory(8)
LIBRARY = torch.library.Library("symm_mem", "IMPL")


class StandIn:
    """Memory of all ranks in files of a folder, by number of the allocation. slow: the rank that reads late."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slow = -1
        self.calls = 0
        self.inside = False
        self._numbers: dict[int, int] = {}
        self._peers: dict[tuple[int, str], list[Tensor]] = {}
        self._chance = random.Random(dist.get_rank())

    def empty(self, *size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        assert device.type == "cpu"
        number = len(self._numbers)
        value = self._file(number, dist.get_rank(), int(np.prod(size)) * dtype.itemsize).view(dtype).view(size)
        # What is in new memory is anything.
        value.view(torch.uint8).fill_(255)
        self._numbers[value.data_ptr()] = number
        return value

    def _file(self, number: int, rank: int, size: int) -> Tensor:
        return torch.from_file(str(self.folder / f"memory-{number}-{rank}"), shared=True, size=size, dtype=torch.uint8)

    def rendezvous(self, value: Tensor, group: dist.ProcessGroup) -> None:
        number = self._numbers[value.data_ptr()]
        mine = (number, tuple(value.shape), str(value.dtype))
        every: list[Any] = [None] * group.size()
        dist.all_gather_object(every, mine, group=group)
        assert every == [mine] * group.size()
        ranks = dist.get_process_group_ranks(group)
        self._peers[number, group.group_name] = [
            self._file(number, rank, value.numel() * value.itemsize).view(value.dtype).view(value.shape)
            for rank in ranks
        ]

    def all_to_all_vdev(self, *arguments: Any) -> None:
        self.inside = True
        try:
            self._all_to_all_vdev(*arguments)
        finally:
            self.inside = False

    def _all_to_all_vdev(self, rows: Tensor, out: Tensor, in_splits: Tensor, out_so: Tensor, name: str) -> None:
        inputs, _, _, numbers = (self._peers[self._numbers[t.data_ptr()], name] for t in (rows, out, in_splits, out_so))
        group = _resolve_process_group(name)
        rank, peers = group.rank(), group.size()
        assert all(value.is_contiguous() for value in (rows, out, in_splits, out_so))
        assert rows.dtype == out.dtype
        assert rows.stride(0) == out.stride(0)
        assert in_splits.dtype == out_so.dtype == torch.int64
        assert in_splits.shape == (peers,)
        assert out_so.shape == (2, peers)
        sent = in_splits.tolist()
        assert min(sent) >= 0
        assert sum(sent) <= len(rows)
        begin = np.cumsum([0, *sent]).tolist()
        for peer in range(peers):
            numbers[peer][:, rank] = torch.tensor([sent[peer], begin[peer]])
        dist.barrier(group=group)
        self.calls += 1
        time.sleep(0.1 if rank == self.slow else self._chance.choice([0.0, 0.0, 0.002]))
        received, source = out_so.tolist()
        begin = np.cumsum([0, *received]).tolist()
        assert begin[-1] <= len(out), "written beyond the buffer"
        size = rows.numel() * rows.itemsize
        most = next(blocks for limit, blocks in ((1, 8), (2, 16), (4, 32), (1e9, 64)) if size < limit * 2**20)
        blocks = max(most // peers, 1)
        for peer in range(peers):
            assert received[peer] * rows.stride(0) * rows.itemsize % blocks == 0
            theirs = inputs[peer][source[peer] : source[peer] + received[peer]]
            out[begin[peer] : begin[peer + 1]] = theirs
        out_so[1] = torch.tensor(begin[:-1])


def install(folder: Path, backend: str = "NVSHMEM") -> StandIn:
    stand_in = StandIn(folder)
    module: Any = symmetric
    module.empty, module.rendezvous, module.get_backend = stand_in.empty, stand_in.rendezvous, lambda device: backend
    LIBRARY.impl("all_to_all_vdev", stand_in.all_to_all_vdev, "CPU")
    return stand_in


@contextmanager
def no_host_reads(stand_in: StandIn) -> Iterator[None]:
    """Whatever makes the host wait, outside the operator, is an error."""

    def refuse(name: str) -> None:
        if not stand_in.inside:
            raise AssertionError(f"{name} makes the host wait")

    with host_waits(refuse):
        yield


def equality(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Largest errors, over random plans with replicas, of two batches under way at once against one process."""
    join_group(rank, world, folder)
    mesh, worst = init_device_mesh("cpu", (world,)), {}
    install(folder)
    equal_replicas = True
    for number in range(12):
        rng = np.random.default_rng([14, number])
        plan, kind = random_plan(rng, 1, world), KINDS[number % 3]
        dispatch = SymmetricMemory(13, rank_capacity_factor=(None, float(world))[number % 2])
        settings: dict[str, Any] = {"replica_choice": ("share", "balanced")[number // 2 % 2]}
        experts = PlacedExperts(SPEC, plan, mesh, 1, kind=kind, dispatch=dispatch, gradients="sum", **settings)
        weights = logical_weights(number, kind.shapes(SPEC), SPEC.experts)
        experts.load_logical(weights)
        batches, leaves, losses = [tokens(rng, world) for _ in range(2)], [], []
        for batch in batches:
            x, gate = (batch[name][rank].clone().requires_grad_() for name in ("x", "gate"))
            ids = batch["ids"][rank]
            # The layer again in backward, between other batches' exchanges.
            out = checkpoint(experts, x, ids, gate, use_reentrant=False) if number % 4 > 1 else experts(x, ids, gate)
            leaves.append((out, x, gate))
            losses.append((out * batch["up"][rank]).sum())
        sum(losses).backward()  # type: ignore[union-attr]
        expected = [expected_of(batch, weights, kind, 1.0) for batch in batches]
        for (out, x, gate), one in zip(leaves, expected, strict=True):
            for name, value in {"out": out.detach(), "x": x.grad, "gate": gate.grad}.items():
                # Where no rank has tokens, nothing hangs on the gate.
                wanted = torch.zeros_like(value) if one[name][rank] is None else one[name][rank]
                worst[name] = max(worst.get(name, 0.0), error(value, wanted))
        for name, value in experts.named_parameters():
            rows = torch.from_numpy(experts.row_expert)
            whole = expected[0][name] + expected[1][name]
            worst[name] = max(worst.get(name, 0.0), error(value.grad, whole[rows]))
        equal_replicas &= replicas_equal(experts)
    dist.destroy_process_group()
    return {"worst": worst, "equal_replicas": equal_replicas}


def turns(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Errors while one rank reads late: with sets of buffers that calls take turns with, and with a single one."""
    join_group(rank, world, folder)
    mesh, found = init_device_mesh("cpu", (world,)), {}
    stand_in = install(folder)
    for sets in (SymmetricBuffers.SETS, 1):
        SymmetricBuffers.SETS = sets
        found[str(sets)] = 0.0
        for slow in range(world):
            stand_in.slow = slow
            rng = np.random.default_rng(15)
            # Buffers of their own.
            dispatch = SymmetricMemory(20 + sets)
            experts = PlacedExperts(SPEC, random_plan(rng, 1, world), mesh, 1, dispatch=dispatch, gradients="sum")
            weights = logical_weights(0, SwiGLU().shapes(SPEC), SPEC.experts)
            experts.load_logical(weights)
            batch = tokens(np.random.default_rng(3), world)
            x = batch["x"][rank].clone().requires_grad_()
            out = experts(x, batch["ids"][rank], batch["gate"][rank])
            (out * batch["up"][rank]).sum().backward()
            expected = expected_of(batch, weights, SwiGLU(), 1.0)
            worst = max(error(out.detach(), expected["out"][rank]), error(x.grad, expected["x"][rank]))
            # Garbage may be no number.
            found[str(sets)] = max(found[str(sets)], 1e9 if worst != worst else min(worst, 1e9))
    dist.destroy_process_group()
    return found


def unread(rank: int, world: int, folder: Path) -> dict[str, str]:
    """Where the host waits for the device: with this dispatch, evaluated first and then trained, and with another."""
    join_group(rank, world, folder)
    mesh, found = init_device_mesh("cpu", (world,)), {}
    stand_in = install(folder)
    x, ids, gate = torch.randn(6, SPEC.hidden_size), torch.tensor([[0, 1, 5]]).expand(6, 3), torch.rand(6, 3)
    every = {"symmetric": SymmetricMemory(8), "place for some": SymmetricMemory(8, 3.0), "flat": "flat"}
    for name, dispatch in every.items():
        plan = random_plan(np.random.default_rng(0), 1, world)
        experts = PlacedExperts(SPEC, plan, mesh, 1, kind=GptOss(), dispatch=dispatch, gradients="sum")
        # Buffers are made, and sums of replicas' gradients, whose numbers the plan says, are left out.
        with torch.inference_mode():
            experts(x, ids, gate)
        with no_host_reads(stand_in):
            try:
                with mp.no_sync(experts):
                    experts(x.clone().requires_grad_(), ids, gate).square().sum().backward()
                found[name] = ""
            except AssertionError as waits:
                found[name] = str(waits)
    dist.destroy_process_group()
    return found


def refused(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """What is refused by name, and what a batch does that a rank has no place for."""
    join_group(rank, world, folder)
    mesh = init_device_mesh("cpu", (world,))
    plan = random_plan(np.random.default_rng(0), 1, world)

    def build(dispatch: Any = EIGHT, **settings: Any) -> PlacedExperts:
        return PlacedExperts(SPEC, plan, mesh, 1, dispatch=dispatch, gradients="sum", **settings)

    found: dict[str, Any] = {"missing": attempt(build)}
    stand_in = install(folder, backend="CUDA")
    found["backend"] = attempt(build)
    stand_in = install(folder)
    found["other"] = attempt(lambda: build(SymmetricMemory(8 + rank % 2)))
    found["chunks"] = attempt(lambda: build(chunks=2))
    found["delayed"] = attempt(lambda: build(delay_weight_gradients=True))
    found["none"] = attempt(lambda: SymmetricMemory(0))
    found["factor"] = attempt(lambda: SymmetricMemory(8, rank_capacity_factor=0.5))
    x, ids, gate = torch.ones(9, SPEC.hidden_size), torch.zeros(9, 3, dtype=torch.int64), torch.ones(9, 3)
    found["tokens"] = attempt(lambda: build()(x, ids, gate))
    with mock.patch.multiple(torch.cuda, is_available=lambda: True, is_current_stream_capturing=lambda: True):
        found["graph"] = attempt(lambda: build()(x[:8], ids[:8], gate[:8]))
    # All tokens for three experts, on few ranks.
    ids = torch.tensor([[0, 1, 2]]).expand(8, 3)
    try:
        build(SymmetricMemory(8, rank_capacity_factor=1.0))(x[:8], ids, gate[:8])
    except mp.InputError as beyond:
        found["place"] = str(beyond)
    found["calls"] = stand_in.calls
    whole, narrow = build(kind=GptOss()), build(kind=GptOss(), capacity_factor=0.5)
    flat = build("flat", kind=GptOss(), capacity_factor=0.5)
    found["all"] = bool(torch.isfinite(whole(x[:8], ids, gate[:8])).all())
    found["dropped"] = error(narrow(x[:8], ids, gate[:8]), flat(x[:8], ids, gate[:8]))
    half = [build(dispatch, dtype=torch.bfloat16) for dispatch in (SymmetricMemory(8), "flat")]
    one, other = (layer(x[:8].bfloat16(), ids, gate[:8]) for layer in half)
    found["half"] = bool(torch.equal(one, other))
    dist.destroy_process_group()
    return found
