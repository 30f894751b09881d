"""A change of plan between two training steps: experts move, all ranks flip together, or none does.

`apply` and `Migration` come first, then the change of one layer, what belongs to an expert, and how rows travel. S
slots of a rank (rows of expert weights), S' after the change.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..._arguments import check_fields, check_methods, check_types
from ..._types import IntArray
from ...placement.errors import InputError, MoeplaceError, RankError, UnsupportedError
from ...placement.migration import migration
from ...placement.plan import Plan
from .coordination import TwoPhaseCommit, check_consistent, unresponsive_ranks
from .data_parallel import expert_layers
from .experts import PlacedExperts, check_plan
from .layer_placement import LayerPlacement
from .managers import follow
from .mesh import ExpertMesh
from .online import check_homes

CHUNK_BYTES = 64 << 20

_serial = count()
_transfer_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


@check_types
def apply(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    timeout: timedelta = timedelta(minutes=5),
) -> Migration:
    """Puts `plan` in force between two steps, on all ranks or on none; every rank calls it.

    `Migration` takes the same arguments, raises the same errors, and spreads the change over steps.

    Returns:
        The migration, done.
    """
    change = Migration(model, plan, optimizer, chunk_bytes=chunk_bytes, timeout=timeout)
    change.advance()
    return change


@check_methods
@check_fields
class Migration:
    """A change from the plan in force to another, all at once or spread over several steps. Every rank makes one and
    calls the same methods.

    Experts that a rank must newly hold arrive as replicas without any share: the old plan serves all tokens, while
    gradients keep the newcomers equal to the others. Once every rank has everything, the new plan comes into force on
    all of them. A rank that dies or fails before leaves the old plan in force, with nothing lost.

    moves: experts that go to a device which does not hold them, the fewest possible. bytes_total: of all of them,
    weights and optimizer state. bytes_moved: so far. pauses: seconds of each `advance`. done: whether the new plan is
    in force.

    Args:
        model: with layers of placed experts.
        plan: to put in force.
        optimizer: whose state (Adam's moments) travels along; row by row, so those that work element by element.
        chunk_bytes: most bytes a rank has under way.
        timeout: for a message or for the slowest rank.

    Raises:
        InputError: on all ranks: no expert layers, a plan for another model or number of ranks, gradients not yet used,
            ranks with different plans or optimizer state.
        RankError: a rank is gone.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        timeout: timedelta = timedelta(minutes=5),
    ) -> None:
        self._layers = {module.layer: module for _, module in expert_layers(model)}
        if not self._layers:
            raise InputError(f"{type(model).__name__} has no layer of placed experts; build or parallelize it first")
        if chunk_bytes < 1:
            raise InputError(f"chunk_bytes ({chunk_bytes}) must be at least 1")
        self.plan, self._optimizer = plan, optimizer
        self._chunk_bytes, self._timeout = chunk_bytes, timeout
        self._mesh = next(iter(self._layers.values())).mesh
        self._check()
        self._serial = next(_serial)
        self._rounds = 0
        self._moves = self._planned()
        self.moves = len(self._moves)
        self.bytes_total = sum(self._bytes(move) for move in self._moves)
        self.bytes_moved = 0
        self.pauses: list[float] = []
        self.done = False

    def advance(self, limit_bytes: int | None = None) -> bool:
        """Moves some experts, and flips after the last. Call between optimizer.zero_grad() and the next forward.

        Args:
            limit_bytes: most bytes of them in all, though one expert at least; all experts when None.

        Returns:
            Whether the new plan is in force.

        Raises:
            RankError: a rank failed, died or was late. What this call moved is dropped on all ranks; the plan in
                force stays. Unless a rank died, calling again tries again.
        """
        if self.done:
            return True
        began = time.perf_counter()
        moves = self._next(limit_bytes)
        self._rounds += 1
        commit = TwoPhaseCommit(self._mesh, f"{self._mesh.grid.tolist()}/{self._serial}/{self._rounds}")
        try:
            changes = self._stage(moves, last=len(moves) == len(self._moves))
        except (MoeplaceError, dist.DistError, RuntimeError, OSError) as error:
            raise self._give_up(commit, error) from error
        except BaseException as error:
            self._give_up(commit, error)
            raise
        try:
            commit.ready(self._timeout)
        except RankError as error:
            raise self._give_up(commit, error) from error
        for change in changes:
            change.install()
        self._moves = self._moves[len(moves) :]
        self.bytes_moved += sum(self._bytes(move) for move in moves)
        self.done = not self._moves
        self.pauses.append(time.perf_counter() - began)
        return self.done

    def cancel(self) -> None:
        """Drops what has arrived so far; the old plan was in force all the time. No message is needed."""
        if not self.done:
            for module in self._layers.values():
                _Change(module, self._optimizer, module.plan, {}, self._mesh.rank).install()
            self._moves, self.done = [], True

    def _check(self) -> None:
        failure: Exception | None = None
        content = [self.plan.fingerprint, str(self._chunk_bytes)]
        try:
            for module in self._layers.values():
                check_plan(module.spec, self.plan, self._mesh)
                check_homes(LayerPlacement.of(self.plan, module.layer), module.online_slots)
                content += [str(tensor) for tensor in slot_tensors(module, self._optimizer)]
        except MoeplaceError as error:
            failure = error
        check_consistent(self._mesh, "new plan and optimizer state", "\n".join(content), failure)

    def _planned(self) -> list[_Move]:
        current = next(iter(self._layers.values())).plan
        needed = migration(current, self.plan)
        absolute = np.array(self.plan.moe_layers)[needed.layer]
        moves = zip(absolute, needed.expert, needed.source, needed.target, strict=True)
        return [_Move(*(int(part) for part in move)) for move in moves if int(move[0]) in self._layers]

    def _bytes(self, move: _Move) -> int:
        return sum(tensor.row_bytes for tensor in self._tensors(move.layer))

    def _tensors(self, layer: int) -> list[SlotTensor]:
        return slot_tensors(self._layers[layer], self._optimizer)

    def _next(self, limit_bytes: int | None) -> list[_Move]:
        if limit_bytes is None:
            return self._moves
        chosen: list[_Move] = []
        total = 0
        for move in self._moves:
            total += self._bytes(move)
            if chosen and total > limit_bytes:
                break
            chosen.append(move)
        return chosen

    def _stage(self, moves: list[_Move], last: bool) -> list[_Change]:
        """Receives rows beside the present ones, and prepares all that could fail before the vote."""
        tensors = {layer: self._tensors(layer) for layer in {move.layer for move in moves}}
        arrived: dict[int, dict[int, list[Tensor]]] = {}
        messages = []
        for move in moves:
            own = self._layers[move.layer]
            row = int(np.flatnonzero(own.row_expert == move.expert)[0]) if move.source == self._mesh.rank else -1
            for tensor in tensors[move.layer]:
                content = None
                if move.source == self._mesh.rank:
                    content = tensor.value[row]
                elif move.target == self._mesh.rank:
                    content = torch.empty_like(tensor.value[:0]).new_empty(tensor.value.shape[1:])
                    arrived.setdefault(move.layer, {}).setdefault(move.expert, []).append(content)
                messages.append(SlotMessage(move.source, move.target, tensor.row_bytes, content))
        if messages:
            group = message_group(self._mesh, self._timeout)
            transfer(messages, self._mesh, group, self._chunk_bytes, self._timeout)
        if last:
            layers, target = list(self._layers), self.plan
        else:
            layers, target = list(tensors), None
        return [
            _Change(
                self._layers[layer],
                self._optimizer,
                target or self._layers[layer].plan,
                arrived.get(layer, {}),
                self._mesh.rank,
                [] if target else [move for move in moves if move.layer == layer],
            )
            for layer in layers
        ]

    def _give_up(self, commit: TwoPhaseCommit, error: BaseException) -> RankError:
        """Tells the other ranks, and says what all of them know."""
        reason = commit.abort(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        close_messages(self._mesh, error)
        unresponsive = unresponsive_ranks(self._mesh.grid.flatten().tolist(), "migration")
        if unresponsive:
            reason = f"rank {', '.join(map(str, unresponsive))} does not answer any more; {reason}"
        return RankError(f"migration given up, the plan in force stays: {reason}")


@dataclass(frozen=True)
class _Move:
    layer: int
    expert: int
    source: int
    target: int


class _Change:
    """One layer's next rows and placement, ready to come into force without anything that could fail."""

    def __init__(
        self,
        module: PlacedExperts,
        optimizer: torch.optim.Optimizer | None,
        plan: Plan,
        arrived: dict[int, list[Tensor]],
        rank: int,
        moves: list[_Move] | None = None,
    ) -> None:
        self._module, self._optimizer, self._plan = module, optimizer, plan
        self._placement = LayerPlacement.of(plan, module.layer)
        if moves:
            self._placement = module.placement.with_slots(
                np.array([move.expert for move in moves]),
                np.array([move.target for move in moves]),
                np.zeros(len(moves)),
            )
        self._row_expert, source = assign_rows(self._placement, rank, module.row_expert)
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._replacements: list[tuple[SlotTensor, Tensor]] = []
        for index, tensor in enumerate(slot_tensors(module, optimizer)):
            same = len(self._row_expert) == len(module.row_expert)
            target = tensor.value if same else tensor.value.new_empty(len(self._row_expert), *tensor.value.shape[1:])
            copies = [
                (target[row], tensor.value[old] if old >= 0 else arrived[int(self._row_expert[row])][index])
                for row, old in source.items()
            ]
            if same:
                self._copies += copies
            else:
                for row, content in copies:
                    row.copy_(content)
                self._replacements.append((tensor, target))

    @torch.no_grad()
    def install(self) -> None:
        for row, content in self._copies:
            row.copy_(content)
        for tensor, value in self._replacements:
            tensor.replace(value)
        self._module.row_expert = self._row_expert
        self._module.put_in_force(self._plan, self._placement)
        if self._optimizer is not None:
            follow(self._optimizer, [self._module])


def assign_rows(placement: LayerPlacement, rank: int, row_expert: IntArray) -> tuple[IntArray, dict[int, int]]:
    """Which expert each row holds once `placement` is in force, and where the changed rows' content comes from.

    Experts that stay keep their rows (in their order, where the number of rows changes).

    Args:
        placement: of the layer, from now on.
        rank: of this device.
        row_expert: [S] expert of each row so far.

    Returns:
        ([S'] expert of each row, {row: the old row it takes its content from, or -1 where it has to come from another
        rank}) for the rows that change.
    """
    arriving = placement.expert[placement.on_device(rank)].tolist()
    staying: list[int] = []
    for row, expert in enumerate(row_expert.tolist()):
        if expert in arriving:
            arriving.remove(expert)
            staying.append(row)
    size = len(staying) + len(arriving)
    places = {row: row for row in staying} if size == len(row_expert) else dict(zip(staying, range(size), strict=False))
    result = np.full(size, -1, dtype=np.int64)
    source = {}
    for row, place in places.items():
        result[place] = row_expert[row]
        if size != len(row_expert):
            source[place] = row
    for place, expert in zip(np.flatnonzero(result < 0).tolist(), sorted(arriving), strict=True):
        result[place] = expert
        twins = [row for row in staying if row_expert[row] == expert]
        source[place] = twins[0] if twins else -1
    return result, source


@dataclass(frozen=True, eq=False)
class SlotTensor:
    """One tensor [S, ...] with a row for each of a rank's slots: a parameter, or what an optimizer keeps for it.

    replace: puts a tensor of more or fewer rows there.
    """

    name: str
    value: Tensor
    replace: Callable[[Tensor], None]

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.value)

    def __str__(self) -> str:
        return f"{self.name} {self.value.dtype} {list(self.value.shape[1:])}"


def row_bytes(tensor: Tensor) -> int:
    """Bytes of each row of a tensor [S, ...]."""
    return int(np.prod(tensor.shape[1:], dtype=np.int64)) * tensor.element_size()


def slot_tensors(module: PlacedExperts, optimizer: torch.optim.Optimizer | None) -> list[SlotTensor]:
    """The layer's parameters, each followed by its optimizer state.

    Raises:
        InputError: a gradient waits to be used; it would be lost.
        UnsupportedError: optimizer state that has no row for each expert.
    """
    result = []
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.grad is not None and bool(parameter.grad.any()):
            raise InputError(
                f"layer {module.layer}: {name} has a gradient; change the plan between optimizer.zero_grad() and the "
                "next backward"
            )
        result.append(SlotTensor(name, parameter.detach().as_subclass(Tensor), _replace_data(parameter)))
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for key in sorted(state, key=str):
            value = state[key]
            if not isinstance(value, Tensor) or value.ndim == 0:
                continue
            if len(value) != len(parameter):
                raise UnsupportedError(
                    f"layer {module.layer}: {type(optimizer).__name__} keeps {key!r} of shape {list(value.shape)} for "
                    f"{name} {list(parameter.shape)}, which has no row for each expert; use an optimizer that works "
                    "element by element, as Adam does"
                )
            result.append(SlotTensor(f"{name}.{key}", value, _replace_entry(state, key)))
    return result


def _replace_data(parameter: nn.Parameter) -> Callable[[Tensor], None]:
    def replace(value: Tensor) -> None:
        parameter.grad = None
        # A loss of an earlier step that is still alive keeps the parameter's gradient accumulator, with the old shape;
        # torch makes a new one when the type changes, on the way.
        other = torch.float32 if value.dtype == torch.float64 else torch.float64
        parameter.data = value.new_empty(0, dtype=other)
        parameter.data = value

    return replace


def _replace_entry(state: dict[str, Tensor], key: str) -> Callable[[Tensor], None]:
    def replace(value: Tensor) -> None:
        state[key] = value

    return replace


@dataclass(frozen=True, eq=False)
class SlotMessage:
    """One row of one tensor from device to device. content: what to send or where to receive, None on other ranks."""

    source: int
    target: int
    bytes: int
    content: Tensor | None


def message_group(mesh: ExpertMesh, timeout: timedelta) -> dist.ProcessGroup:
    """The mesh's ranks, for rows alone: a group that breaks with a message must not take training with it."""
    if mesh.group not in _transfer_groups:
        whole = mesh.size == dist.get_world_size()
        group = dist.new_group(list(mesh.members), timeout=timeout, use_local_synchronization=not whole)
        assert isinstance(group, dist.ProcessGroup)
        _transfer_groups[mesh.group] = group
    return _transfer_groups[mesh.group]


def close_messages(mesh: ExpertMesh, error: BaseException) -> None:
    """Ends the group of a mesh's messages after an error, which tells peers that wait for one at once."""
    group = _transfer_groups.pop(mesh.group, None)
    if group is not None:
        # Connections close with the last reference, and the frames that the error came through have some.
        dist.destroy_process_group(group)
        del group
        traceback.clear_frames(error.__traceback__)


def transfer(
    messages: list[SlotMessage], mesh: ExpertMesh, group: dist.ProcessGroup, chunk_bytes: int, timeout: timedelta
) -> None:
    """Sends and receives all messages, peer to peer. Every rank calls this with the same list, contents aside.

    Args:
        messages: rows to move.
        mesh: whose ranks they are between.
        group: its ranks, for this alone.
        chunk_bytes: most bytes a rank has under way, in and out.
        timeout: for a message.

    Raises:
        RuntimeError: of the backend, when a peer is gone or `timeout` has passed.
    """
    for window in _windows(messages, chunk_bytes):
        pending = []
        for message, start, stop in window:
            if message.content is None:
                continue
            piece = message.content.flatten().view(torch.uint8)[start:stop]
            if message.source == mesh.rank:
                pending.append(dist.P2POp(dist.isend, piece, mesh.members[message.target], group))
            else:
                pending.append(dist.P2POp(dist.irecv, piece, mesh.members[message.source], group))
        if pending:
            for work in dist.batch_isend_irecv(pending):
                work.wait(timeout)


def _windows(messages: list[SlotMessage], chunk_bytes: int) -> Iterator[list[tuple[SlotMessage, int, int]]]:
    """Runs of (message, first byte, end) in which no rank has more than `chunk_bytes` under way."""
    window: list[tuple[SlotMessage, int, int]] = []
    busy: dict[int, int] = {}
    for message in messages:
        for start in range(0, message.bytes, chunk_bytes):
            stop = min(start + chunk_bytes, message.bytes)
            size = stop - start
            if max(busy.get(message.source, 0), busy.get(message.target, 0)) + size > chunk_bytes:
                yield window
                window, busy = [], {}
            window.append((message, start, stop))
            for device in (message.source, message.target):
                busy[device] = busy.get(device, 0) + size
    if window:
        yield window
