"""Rows of expert tensors that a framework owns: where they stand, how they move, and how replicas' gradients add up.

A framework keeps an expert's weights as rows of tensors that it shards itself. What is common to all of them: every row
holds an expert, every row stands on a rank, a plan names the experts of slots, and a checkpoint has each expert once
and in order. So rows are dealt anew between two such tables, whatever lies behind them: to write a checkpoint, to read
one, or to put another plan in force.

n rows over all ranks, in the order in which each rank has its own; P slots, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from itertools import count
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .._types import IntArray
from ..placement.errors import InputError, MoeplaceError, RankError, UnsupportedError
from ..placement.plan import Plan
from ..runtime.moe.coordination import TwoPhaseCommit, check_consistent
from ..runtime.moe.experts import GradientSum
from ..runtime.moe.layer_placement import LayerPlacement
from ..runtime.moe.mesh import ExpertMesh
from ..runtime.moe.migrate import CHUNK_BYTES, SlotMessage, close_messages, message_group, row_bytes, transfer

TIMEOUT = timedelta(minutes=5)
"""For a message, and for the slowest rank."""

_serial = count()


@dataclass(frozen=True, eq=False)
class Rows:
    """expert: [n] what each row holds. rank: [n] the place in the mesh of the rank that has it; a rank's own rows are
    those of its place, in this order."""

    expert: IntArray
    rank: IntArray

    @cached_property
    def place(self) -> IntArray:
        """[n] number of each row on its rank."""
        result = np.empty(len(self.rank), dtype=np.int64)
        for rank in np.unique(self.rank):
            mine = self.rank == rank
            result[mine] = np.arange(int(mine.sum()))
        return result

    def entries(self) -> Iterator[tuple[int, int, int]]:
        """(expert, rank, number there) of each row."""
        return zip(self.expert.tolist(), self.rank.tolist(), self.place.tolist(), strict=True)

    def on(self, rank: int) -> IntArray:
        """The rows of a rank."""
        return np.flatnonzero(self.rank == rank)

    def holding(self, expert: IntArray) -> Rows:
        """The same rows with other experts."""
        return Rows(expert, self.rank)


@dataclass(frozen=True)
class _Move:
    """A row that changes its rank. source, target: ranks. old, new: its number there."""

    source: int
    target: int
    old: int
    new: int


class RowExchange:
    """From the rows of one table to those of another, on the ranks of a mesh.

    moves: rows that come from another rank, each expert once a rank, from the least busy of those that have it. bytes
    are counted by `bytes_of`.

    Args:
        source: rows as they stand.
        target: rows as they shall stand; each of its experts is in `source`.
        mesh: whose ranks have them.
    """

    def __init__(self, source: Rows, target: Rows, mesh: ExpertMesh) -> None:
        self._mesh = mesh
        self.size = int((target.rank == mesh.rank).sum())
        holders: dict[int, dict[int, int]] = {}
        present: dict[tuple[int, int], int] = {}
        for expert, rank, place in source.entries():
            holders.setdefault(expert, {}).setdefault(rank, place)
            present[rank, place] = expert
        self.moves: list[_Move] = []
        self._local: list[tuple[int, int]] = []
        """(new row, old row) of this rank's own."""
        self._twins: list[tuple[int, int]] = []
        """(new row, new row that has arrived) of experts that a rank gets more than once."""
        sent = np.zeros(mesh.size, dtype=np.int64)
        arriving: dict[tuple[int, int], int] = {}
        for expert, rank, place in target.entries():
            if present.get((rank, place)) == expert:
                if rank == mesh.rank:
                    self._local.append((place, place))
            elif rank in holders[expert]:
                if rank == mesh.rank:
                    self._local.append((place, holders[expert][rank]))
            elif (rank, expert) in arriving:
                if rank == mesh.rank:
                    self._twins.append((place, arriving[rank, expert]))
            else:
                arriving[rank, expert] = place
                origin = min(holders[expert], key=lambda holder: (int(sent[holder]), holder))
                sent[origin] += 1
                self.moves.append(_Move(origin, rank, holders[expert][origin], place))

    @property
    def changed(self) -> list[int]:
        """This rank's rows that hold something else afterwards, where both tables have as many here."""
        moved = [move.new for move in self.moves if move.target == self._mesh.rank]
        return sorted([*moved, *(new for new, old in self._local if new != old), *(new for new, _ in self._twins)])

    def bytes_of(self, tensors: Sequence[Tensor]) -> int:
        """Bytes that all moves of the mesh take; tensors: [rows here, ...] each."""
        return len(self.moves) * sum(row_bytes(tensor) for tensor in tensors)

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor], chunk_bytes: int = CHUNK_BYTES) -> list[Tensor]:
        """The rows [rows here, ...] of the target, of each of `tensors`; every rank of the mesh calls it.

        Raises:
            RuntimeError: of the backend, when a rank is gone.
        """
        result = [tensor.new_empty(self.size, *tensor.shape[1:]) for tensor in tensors]
        mine = self._mesh.rank
        messages = []
        for move in self.moves:
            for before, after in zip(tensors, result, strict=True):
                content = None
                if move.source == mine:
                    content = before[move.old].contiguous()
                elif move.target == mine:
                    content = after[move.new]
                messages.append(SlotMessage(move.source, move.target, row_bytes(before), content))
        if messages:
            transfer(messages, self._mesh, message_group(self._mesh, TIMEOUT), chunk_bytes, TIMEOUT)
        for before, after in zip(tensors, result, strict=True):
            for new, old in self._local:
                after[new].copy_(before[old])
            for new, other in self._twins:
                after[new].copy_(after[other])
        return result


class ReplicaSums:
    """Gradients of replicas, summed so that each has the sum, in parts that a norm over all ranks counts once.

    any: whether an expert has replicas. `sum_` comes after the framework's own reduction and before its clipping: rows
    with replicas then hold the sum over all h of them, divided by the square root of h, and the squares of all replicas
    add up to that of one expert. `undo_` comes after clipping, before the optimizer. Every replica gets the same bits.

    Args:
        rows: what stands where.
        mesh: the ranks that share them.
        experts: E.
    """

    def __init__(self, rows: Rows, mesh: ExpertMesh, experts: int) -> None:
        placement = LayerPlacement(
            rows.expert, rows.rank, np.ones(len(rows.expert)), np.zeros(mesh.size, dtype=np.int64), experts
        )
        here = rows.on(mesh.rank)
        shared = placement.replicas[rows.expert[here]] > 1
        self.any = bool((placement.replicas > 1).any())
        self._rows = np.flatnonzero(shared)
        row_of_slot = np.full(len(rows.expert), -1, dtype=np.int64)
        row_of_slot[here[shared]] = np.arange(len(self._rows))
        self._factor = placement.replicas[rows.expert[here[shared]]] ** -0.5
        self._sum = GradientSum(placement, mesh, row_of_slot, rows.expert[here[shared]], over_copies=False)

    @property
    def rows(self) -> list[int]:
        """The rows here whose experts have replicas."""
        result: list[int] = self._rows.tolist()
        return result

    @torch.no_grad()
    def totals(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients [len(self.rows), ...] of those rows, each the sum over its replicas; every rank of the mesh calls
        it where `any`."""
        return self._sum.reduce(list(grads))

    @torch.no_grad()
    def sum_(self, grads: Sequence[Tensor]) -> None:
        """Sums gradients [rows here, ...] in place; every rank of the mesh calls it."""
        if not self.any:
            return
        rows = torch.from_numpy(self._rows).to(grads[0].device)
        for grad, part in zip(grads, self.totals([grad[rows] for grad in grads]), strict=True):
            grad[rows] = part * self._factor_of(part)

    @torch.no_grad()
    def undo_(self, grads: Sequence[Tensor]) -> None:
        """Gives each replica the whole sum, in place."""
        if not self.any:
            return
        rows = torch.from_numpy(self._rows).to(grads[0].device)
        for grad in grads:
            part = grad[rows]
            grad[rows] = part / self._factor_of(part)

    def _factor_of(self, like: Tensor) -> Tensor:
        return torch.from_numpy(self._factor).to(like).view(-1, *[1] * (like.ndim - 1))


class RowLayer(Protocol):
    """One MoE layer whose expert tensors a framework shards.

    layer: the model's absolute index. plan: what routes its tokens. mesh: the ranks that its rows are dealt over.
    """

    @property
    def layer(self) -> int: ...

    @property
    def plan(self) -> Plan: ...

    @property
    def mesh(self) -> ExpertMesh: ...

    def rows(self, plan: Plan) -> Rows:
        """Where the rows stand under a plan."""
        ...

    def tensors(self) -> list[Tensor]:
        """[rows here, ...] weights and what the optimizer keeps for them, in one order on all ranks."""
        ...

    def write(self, tensors: Sequence[Tensor], rows: Sequence[int]) -> None:
        """Puts these rows of `tensors`, which are as `tensors()` has them, in their places."""
        ...

    def put_in_force(self, plan: Plan) -> None:
        """Routes by `plan` from now on; its rows stand already."""
        ...


@torch.no_grad()
def equalize_replicas(layer: RowLayer) -> None:
    """Gives every replica the rows of its expert's first slot; every rank of the layer's mesh calls it."""
    rows = layer.rows(layer.plan)
    _, first = np.unique(rows.expert, return_index=True)
    source = rows.holding(np.where(np.isin(np.arange(len(rows.expert)), first), rows.expert, -1))
    values = RowExchange(source, rows, layer.mesh)(layer.tensors())
    layer.write(values, range(len(rows.on(layer.mesh.rank))))


class RowMigration:
    """A change of plan between two steps, layer by layer. Every rank makes one and calls the same methods.

    A layer's rows arrive beside the present ones, and come into force once every rank of `mesh` has all of its own; a
    rank that fails before leaves the layer as it was. Each layer is whole at any time, under the old plan or the new.

    moves: rows that travel, over all ranks that hold the same layers. bytes_total, bytes_moved: of these. pauses:
    seconds of each `advance`. done: whether the new plan is in force in all layers.

    Args:
        layers: of this rank.
        plan: to put in force; has as many slots on each device as the one in force.
        mesh: all ranks that go on together.
        chunk_bytes: most bytes a rank has under way.

    Raises:
        InputError: on all ranks: ranks with different plans or optimizer state, or a plan for another model or number
            of ranks. UnsupportedError: other numbers of slots.
    """

    def __init__(
        self, layers: Sequence[RowLayer], plan: Plan, mesh: ExpertMesh, *, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.plan, self._mesh, self._chunk_bytes = plan, mesh, chunk_bytes
        self._layers = list(layers)
        self._check()
        self.plan = plan = aligned(plan, whole_plan(self._layers))
        self._serial, self._rounds = next(_serial), 0
        self._exchanges = [RowExchange(layer.rows(layer.plan), layer.rows(plan), layer.mesh) for layer in self._layers]
        self.moves = sum(len(exchange.moves) for exchange in self._exchanges)
        self.bytes_total = sum(
            exchange.bytes_of(layer.tensors()) for layer, exchange in zip(self._layers, self._exchanges, strict=True)
        )
        self.bytes_moved = 0
        self.pauses: list[float] = []
        self.done = False

    def advance(self, limit_bytes: int | None = None) -> bool:
        """Moves layers of at least one and at most `limit_bytes` of rows; all that are left when None.

        Returns:
            Whether the plan is in force in all layers.

        Raises:
            RankError: on all ranks: one failed, died or was late. The layers of this call stay as they were.
        """
        if self.done:
            return True
        began = time.perf_counter()
        number = self._count(limit_bytes)
        self._rounds += 1
        commit = TwoPhaseCommit(self._mesh, f"rows/{self._mesh.grid.tolist()}/{self._serial}/{self._rounds}")
        chosen = list(zip(self._layers[:number], self._exchanges[:number], strict=True))
        try:
            arrived = [exchange(layer.tensors(), self._chunk_bytes) for layer, exchange in chosen]
            commit.ready(TIMEOUT)
        except (MoeplaceError, dist.DistError, RuntimeError, OSError) as error:
            reason = commit.abort(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            for layer, _ in chosen:
                close_messages(layer.mesh, error)
            raise RankError(f"migration given up, the plan in force stays: {reason}") from error
        for (layer, exchange), values in zip(chosen, arrived, strict=True):
            self.bytes_moved += exchange.bytes_of(layer.tensors())
            self._install(layer, exchange, values)
        del self._layers[:number], self._exchanges[:number]
        self.done = not self._layers
        self.pauses.append(time.perf_counter() - began)
        return self.done

    def cancel(self) -> None:
        """Leaves the layers that have not changed yet as they are."""
        self._layers, self._exchanges, self.done = [], [], True

    @torch.no_grad()
    def _install(self, layer: RowLayer, exchange: RowExchange, values: list[Tensor]) -> None:
        if changed := exchange.changed:
            layer.write(values, changed)
        layer.put_in_force(self.plan)

    def _count(self, limit_bytes: int | None) -> int:
        if limit_bytes is None:
            return len(self._layers)
        total = 0
        for number, (layer, exchange) in enumerate(zip(self._layers, self._exchanges, strict=True)):
            total += exchange.bytes_of(layer.tensors())
            if number and total > limit_bytes:
                return number
        return len(self._layers)

    def _check(self) -> None:
        failure: MoeplaceError | None = None
        content = [self.plan.fingerprint, str(self._chunk_bytes)]
        # Tensors first, on every rank: a framework may gather them.
        for layer in self._layers:
            try:
                content += [f"{tensor.dtype} {list(tensor.shape[1:])}" for tensor in layer.tensors()]
                check_slots(self.plan, layer.plan, layer.layer)
            except MoeplaceError as error:
                failure = failure or error
        check_consistent(self._mesh, "new plan and optimizer state", "\n".join(content), failure)


def check_slots(plan: Plan, current: Plan, layer: int) -> None:
    """Raises unless `plan` places the same experts of a layer in as many slots on each device as `current`."""
    if layer not in plan.moe_layers:
        raise InputError(f"the plan places the layers {list(plan.moe_layers)}, not layer {layer}")
    if plan.model.experts != current.model.experts:
        raise InputError(f"the plan is for {plan.model.experts} experts, this model has {current.model.experts}")
    if not np.array_equal(plan.slot_device, current.slot_device):
        raise UnsupportedError(
            f"the plan in force has {np.bincount(current.slot_device).tolist()} slots on the devices, the new one "
            f"{np.bincount(plan.slot_device).tolist()}; the framework's tensors have a row for each slot, so solve "
            "with as many: Problem(..., device_slots=...)"
        )


def even_slots(plan: Plan, devices: int, framework: str) -> int:
    """Slots that each device has, of a plan that a framework can run whose ranks all have as many rows.

    Raises:
        InputError: the plan is for another number of devices. UnsupportedError: devices with different numbers of
            slots, or empty slots.
    """
    if plan.topology.num_devices != devices:
        raise InputError(
            f"the plan is for {plan.topology.num_devices} devices, expert parallelism has {devices} ranks; solve again "
            "with a topology of as many devices, or change the number of ranks"
        )
    counts = np.bincount(plan.slot_device, minlength=devices)
    if not plan.filled.all() or len(set(counts.tolist())) > 1:
        low, high = int(plan.slots_per_device.min()), int(plan.slots_per_device.max())
        raise UnsupportedError(
            f"{framework} gives every rank as many rows of experts, the plan has {low} to {high} slots on a device; "
            f"solve with equally many, for instance Problem(..., device_slots={high})"
        )
    return int(counts[0])


def whole_plan(layers: Sequence[RowLayer]) -> Plan:
    """The plan that is in force over all layers, some of which may have changed before others."""
    plan = layers[0].plan
    table, shares = plan.physical_to_logical.copy(), plan.shares.copy()
    for layer in layers:
        row = plan.moe_layers.index(layer.layer)
        table[row], shares[row] = layer.plan.physical_to_logical[row], layer.plan.shares[row]
    if np.array_equal(table, plan.physical_to_logical) and np.array_equal(shares, plan.shares):
        return plan
    return replace(plan, physical_to_logical=table, shares=shares, certificate=None, predicted={})


def aligned(plan: Plan, current: Plan) -> Plan:
    """The same placement with slots of a device in an order in which as many as possible hold what they do now.

    Both plans have the same slots on each device; in which of its slots a device holds an expert says nothing.
    """
    table, shares = plan.physical_to_logical.copy(), plan.shares.copy()
    for row, layer in enumerate(plan.moe_layers):
        now = current.physical_to_logical[current.moe_layers.index(layer)]
        for device in range(plan.topology.num_devices):
            slots = np.flatnonzero(plan.slot_device == device)
            arriving = slots.tolist()
            order: dict[int, int] = {}
            for slot in slots.tolist():
                same = next((other for other in arriving if table[row, other] == now[slot]), None)
                if same is not None:
                    order[slot] = same
                    arriving.remove(same)
            order |= dict(zip([slot for slot in slots.tolist() if slot not in order], arriving, strict=True))
            taken = [order[slot] for slot in slots.tolist()]
            table[row, slots], shares[row, slots] = table[row, taken], shares[row, taken]
    return replace(plan, physical_to_logical=table, shares=shares)


class ChangesPlans:
    """A model in training whose plan changes at once, or as a `Rebalancer` goes about it."""

    def change(self, plan: Plan) -> RowMigration:
        """A change to `plan`, to be made between steps."""
        raise NotImplementedError

    def apply_plan(self, plan: Plan) -> RowMigration:
        """Puts `plan` in force between two steps; every rank calls it.

        Raises:
            InputError, UnsupportedError: on all ranks: it does not fit the one in force; see `RowMigration`.
            RankError: a rank is gone; the plan in force stays.
        """
        change = self.change(plan)
        change.advance()
        return change
