"""Distributed checkpoints in logical expert order: written under one plan, read under any, by any number of ranks.

On the way, rows of experts are dealt anew, so that every rank has one run of experts in order: torch then plans and
writes one piece a rank and tensor, where experts placed by a plan would be one each.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from ..._arguments import check_types
from ...placement.errors import InputError
from ...placement.plan import Plan
from .coordination import naming_unresponsive_ranks
from .data_parallel import WRAPPERS, expert_layers
from .experts import PlacedExperts

_beside: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()
"""For each world, the group over which its ranks write beside training."""

PLAN = "plan.json"
"""The plan that a checkpoint was written under, beside its tensors."""


@check_types
def save_checkpoint(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Writes the model, and the optimizer's state, with torch.distributed.checkpoint. Every rank calls it.

    Experts are rows of [E, ...] tensors under the names that the model has in one process; so the same folder is read
    by `load_checkpoint` under another plan, and by `torch.distributed.checkpoint` into the model in one process. A rank
    holds its part of the experts once more in the memory of its host meanwhile. The plan in force stands beside the
    tensors (`checkpoint_plan`).

    Args:
        path: of the folder.
        model: with layers of placed experts, wrapped or not.
        optimizer: whose state goes along.
    """
    save(_dealt(model, optimizer), checkpoint_id=str(path))
    _write_plan(path, model)


@check_types
def async_save_checkpoint(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Future[None]:
    """As `save_checkpoint`, written beside training: returns as soon as a copy is in the host's memory.

    The ranks talk over a Gloo group of their own meanwhile, which does not meddle with training's messages.

    Returns:
        What to wait for (`result()`), on every rank, before the next checkpoint and before the program ends.
    """
    world = dist.group.WORLD
    assert world is not None
    if world not in _beside:
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        _beside[world] = group
    pending = async_save(_dealt(model, optimizer), checkpoint_id=str(path), process_group=_beside[world])
    _write_plan(path, model)
    return cast("Future[None]", pending)


@check_types
def load_checkpoint(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Reads what `save_checkpoint` wrote into a model of the same shapes, whatever its plan. Every rank calls it.

    The format is torch's and may hold pickled values: read only checkpoints you trust.

    Args:
        path: of the folder.
        model: to read into.
        optimizer: whose state to read.

    Raises:
        InputError: no checkpoint there, or it lacks tensors of this model, or has them in other shapes.
    """
    if not (Path(path) / ".metadata").is_file():
        raise InputError(f"{path}: no checkpoint of torch.distributed.checkpoint there (no file .metadata)")
    state, rows = _state(model, optimizer)
    parts = []
    for holder, key, module, unused in rows:
        parts.append((holder, key, module, unused, holder[key]))
        holder[key] = _empty_run(holder[key], module, unused)
    try:
        load(state, checkpoint_id=str(path))
    except (CheckpointException, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a checkpoint of this model and optimizer: {_last_line(error)}") from error
    for holder, key, module, unused, local in parts:
        _from_run(holder[key].to_local(), module, unused, local)
        holder[key] = local
    optimizers = [] if optimizer is None else [optimizer]
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state.get("optimizer", {}))


@check_types
def checkpoint_plan(path: str | Path) -> Plan:
    """The plan that was in force when a checkpoint was written: to `parallelize` with, on as many ranks.

    Raises:
        FileFormatError, InputError: no checkpoint of `save_checkpoint` there.
    """
    return Plan.load(Path(path) / PLAN)


def _write_plan(path: str | Path, model: nn.Module) -> None:
    layers = expert_layers(model)
    if layers and layers[0][1].mesh.first:
        Path(path).mkdir(parents=True, exist_ok=True)
        layers[0][1].plan.save(Path(path) / PLAN)


def _dealt(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """The state to save, each rank with a run of experts in order."""
    state, rows = _state(model, optimizer)
    for holder, key, module, unused in rows:
        holder[key] = _to_run(holder[key], module, unused)
    return state


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], str, PlacedExperts, int]]]:
    """(the state to save or to load into, where in it rows of experts stand, and how many unused ones are behind)."""
    optimized: Any
    weights, optimized = get_state_dict(model, [] if optimizer is None else [optimizer])
    state: dict[str, Any] = {"model": dict(weights)}
    moments: dict[str, Any] = {}
    if optimizer is not None:
        # Copies of the dictionaries, which are the optimizer's own; not of the tensors in them.
        moments = {name: dict(entries) for name, entries in optimized["state"].items()}
        state["optimizer"] = {**optimized, "state": moments}
    rows: list[tuple[dict[str, Any], str, PlacedExperts, int]] = []
    # Parts of a model that share experts have them under a name each.
    layers = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, PlacedExperts)]
    for path, module in sorted(layers, key=lambda pair: pair[1].layer):
        prefix = ".".join(part for part in path.split(".") if part and part not in WRAPPERS)
        for name, _ in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            entries = moments.get(full, {})
            unused = module.unused_rows.get(name, 0)
            rows.append((state["model"], full, module, unused))
            rows += [(entries, key, module, unused) for key, value in entries.items() if value.ndim]
    return state, rows


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


# Rows of experts to runs in logical order, and back. Runs are those that torch cuts a dimension of a DTensor into.
# Behind the experts may stand unused rows, of experts that compute nothing: zeros on the way out, skipped on the way
# in.


def _runs(experts: int, ranks: int) -> list[tuple[int, int]]:
    """First expert and end of each rank's run."""
    size = -(-experts // ranks)
    return [(min(rank * size, experts), min((rank + 1) * size, experts)) for rank in range(ranks)]


def _spread(run: Tensor, module: PlacedExperts, rows: int, ranks: Sequence[int]) -> DTensor:
    """[rows, ...] of which each of `ranks` has its run; where experts are cut over copies, each rank its part of its
    run."""
    shape = torch.Size([rows, *run.shape[1:]])
    mesh = DeviceMesh("cpu", list(ranks), _init_backend=False)
    placements: list[Placement] = [Shard(0)]
    if module.shards is not None:
        shape = torch.Size([rows, run.shape[1] * module.mesh.copies, *run.shape[2:]])
        mesh = DeviceMesh("cpu", module.mesh.grid.tolist(), _init_backend=False)
        placements = [Shard(1), Shard(0)]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(run, mesh, placements, run_check=False, shape=shape, stride=stride)


def _to_run(value: Tensor, module: PlacedExperts, unused: int) -> DTensor:
    """[E + unused, ...] of which this rank has its run, in the host's memory, from the rows [S, ...] that all ranks
    hold."""
    mesh, experts = module.mesh, module.num_experts
    first_E = module.placement.device[module.placement.slots_of[:, 0]]
    if module.shards is None:
        mine = _runs(experts + unused, mesh.grid.size)[mesh.copy * mesh.size : (mesh.copy + 1) * mesh.size]
    else:
        mine = _runs(experts + unused, mesh.size)
    row = dict(zip(module.row_expert[::-1].tolist(), range(len(module.row_expert) - 1, -1, -1), strict=True))
    sent = [[e for e in range(*run) if e < experts and first_E[e] == mesh.rank] for run in mine]
    own = range(*mine[mesh.rank])
    received = [[e for e in own if e < experts and first_E[e] == device] for device in range(mesh.size)]
    arrived = _exchange(value, [[row[e] for e in part] for part in sent], [len(part) for part in received], module)
    order = np.argsort([e for part in received for e in part])
    run = arrived[torch.from_numpy(order).to(arrived.device)].cpu()
    run = torch.cat([run, run.new_zeros(len(own) - len(run), *run.shape[1:])]) if len(run) < len(own) else run
    return _spread(run, module, experts + unused, mesh.grid.flatten().tolist())


def _empty_run(value: Tensor, module: PlacedExperts, unused: int) -> DTensor:
    rows = module.num_experts + unused
    first, end = _runs(rows, module.mesh.size)[module.mesh.rank]
    run = torch.empty(end - first, *value.shape[1:], dtype=value.dtype)
    return _spread(run, module, rows, module.mesh.members)


def _from_run(run: Tensor, module: PlacedExperts, unused: int, value: Tensor) -> None:
    """Fills the rows [S, ...] of each rank from all ranks' runs."""
    mesh = module.mesh
    runs = _runs(module.num_experts + unused, mesh.size)
    first, end = runs[mesh.rank]
    holders = [np.unique(module.placement.expert[module.placement.on_device(device)]) for device in range(mesh.size)]
    sent = [[int(e) - first for e in part if first <= e < end] for part in holders]
    received = [[int(e) for e in holders[mesh.rank] if run_first <= e < run_end] for run_first, run_end in runs]
    arrived = _exchange(run.to(value.device), sent, [len(part) for part in received], module)
    place = {expert: place for place, expert in enumerate(e for part in received for e in part)}
    if len(value):
        value.copy_(arrived[torch.tensor([place[e] for e in module.row_expert.tolist()], device=value.device)])


def _exchange(value: Tensor, sent: list[list[int]], received: list[int], module: PlacedExperts) -> Tensor:
    """[rows, ...] from all ranks, by rank. sent: rows of `value` to each."""
    every = torch.tensor([row for part in sent for row in part], dtype=torch.int64, device=value.device)
    width = int(np.prod(value.shape[1:], dtype=np.int64))
    message = value.detach().index_select(0, every).reshape(len(every), width).view(torch.uint8)
    buffer = message.new_empty(sum(received), width * value.element_size())
    group = module.mesh.group
    with naming_unresponsive_ranks(group):
        dist.all_to_all_single(buffer, message, received, [len(part) for part in sent], group=group)
    return buffer.view(value.dtype).view(len(buffer), *value.shape[1:])
