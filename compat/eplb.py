"""DeepSeek's expert-parallel load balancer (EPLB) by its own signature: `rebalance_experts` in place of theirs.

Source of the signature and the semantics: github.com/deepseek-ai/EPLB. The published plan is made first, in single
precision as published, so that it is theirs; a search under the same constraints then lowers each layer's largest
device load, so the result is never worse. Devices, and nodes as wholes, are then named so that sums over layers are
level too.

L layers, E experts, P slots (their "replicas") of a layer. Slot i stands on device i // (P / devices), device g in node
g // (devices / nodes). Replicas of an expert share its load equally.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from .._types import BoolArray, FloatArray, IntArray
from ..placement.errors import InputError
from ..placement.packing import Weights, steepest_swap
from ..placement.plan import replica_counts
from ..solvers.device_names import renamed_tables
from ..solvers.eplb import rebalance
from ..solvers.table_packing import ENOUGH, level_tables, packed_tables, part_tables

if TYPE_CHECKING:
    import torch

__all__ = ["published_placement", "rebalance_experts"]

PROPOSALS = 1000
"""Exchanges tried first where a plan without an expert twice on a device is heavier than the published one."""

SingleArray = npt.NDArray[np.float32]


@overload
def rebalance_experts(
    weight: torch.Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int, *, improve: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


@overload
def rebalance_experts(
    weight: npt.NDArray[Any],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    improve: bool = True,
) -> tuple[IntArray, IntArray, IntArray]: ...


def rebalance_experts(
    weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int, *, improve: bool = True
) -> Any:
    """Places `num_replicas` replicas of the experts on devices, so that the heaviest device of each layer is light.

    Where num_groups divide over num_nodes all replicas of a group's experts stand on one node, each node having as many
    groups; elsewhere groups and nodes play no part. As in theirs, two replicas of an expert may share a GPU.

    Args:
        weight: [L, E] load of each logical expert, a torch tensor (of any device) or a NumPy array.
        num_replicas: physical experts of a layer, a multiple of num_gpus.
        num_groups: expert groups of a layer.
        num_nodes: nodes, each of as many GPUs.
        num_gpus: GPUs; physical expert i stands on GPU i // (num_replicas / num_gpus).
        improve: False leaves the published plan as it is, in a tenth of the time.

    Returns:
        physical_to_logical_map [L, num_replicas], the expert of each physical expert; logical_to_physical_map [L, E,
        X], the physical experts of each, padded with -1, X being the most replicas an expert has in any layer; and
        expert_count [L, E], its replicas. int64, of the kind of `weight`; tensors are on the CPU, as theirs.

    Raises:
        InputError: weights that are no [L, E] table of finite loads of at least 0, or numbers that do not divide.
    """
    instance = _read_instance(weight, num_replicas, num_groups, num_nodes, num_gpus)
    table = _improved(instance) if improve else _published(instance)
    counts = replica_counts(table, instance.load.shape[1])
    maps = (table, _positions(table, counts), counts)
    if isinstance(weight, np.ndarray):
        return maps
    import torch

    return tuple(torch.from_numpy(each) for each in maps)


def table_apart(weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> IntArray:
    """[L, num_replicas] as `rebalance_experts`, no expert twice on a GPU even where that is heavier than the published
    plan; where there are more slots than experts times GPUs it cannot be helped. Arguments and errors are the same."""
    return _improved(_read_instance(weight, num_replicas, num_groups, num_nodes, num_gpus), apart=True)


def published_placement(weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> IntArray:
    """[L, num_replicas] where the published algorithm puts experts, up to the order of nodes and devices.

    What `rebalance_experts` improves on, with its arguments and errors.
    """
    return _published(_read_instance(weight, num_replicas, num_groups, num_nodes, num_gpus))


@dataclass(frozen=True)
class _Instance:
    """What to place: the global form is that of one group on one node."""

    load: FloatArray
    """[L, E]"""
    single: SingleArray
    """[L, E] the same in float32, which the published code computes in."""
    groups_by_node: IntArray
    """[L, groups] expert groups, node by node, as published."""
    slots: int
    nodes: int
    devices: int


def _published(instance: _Instance) -> IntArray:
    """[L, P]"""
    return _balance_nodes(instance, instance.single, instance.groups_by_node)


def _improved(instance: _Instance, apart: bool = False) -> IntArray:
    """[L, P] the published plan lightened; where swapping groups between nodes evens them, the better of two plans.
    apart: rather above the published load than with an expert twice on a device."""
    load, nodes, devices = instance.load, instance.nodes, instance.devices
    order = instance.groups_by_node
    # Double precision, and experts in their own order, break ties otherwise, at times to the better.
    in_double = (
        packed_tables(load, instance.slots, devices)
        if nodes == 1
        else rebalance(load, instance.slots, order.shape[1], nodes, devices)
    )
    published = _published(instance)
    start = _better(load, published, in_double, devices)
    table = lighten(load, start, nodes, devices)

    if order.shape[1] > nodes:
        group_load = load.reshape(*order.shape, -1).sum(axis=2)
        swaps = steepest_swap(np.take_along_axis(group_load, order, axis=1), nodes)
        changed = np.flatnonzero((swaps != np.arange(order.shape[1])).any(axis=1))
        if len(changed):
            part, evened = load[changed], np.take_along_axis(order[changed], swaps[changed], axis=1)
            second = lighten(part, _balance_nodes(instance, part, evened), nodes, devices)
            table[changed] = _better(part, table[changed], second, devices)
    able = instance.slots * nodes <= load.shape[1] * devices
    if apart and able and (doubled := stacked(table, devices)).any():
        part, goal = load[doubled], largest_load(load, start, devices)[doubled]
        parted = table[doubled]
        part_tables(part, parted, goal, nodes, devices, PROPOSALS)
        above = largest_load(part, parted, devices) > part.sum(axis=1) / devices * (1.0 + ENOUGH)
        if above.any():
            plain = lighten(part[above], published[doubled][above], nodes, devices)
            better = _better(part[above], parted[above], plain, devices)
            parted[above] = np.where(stacked(plain, devices)[:, None], parted[above], better)
        table[doubled] = parted
    return renamed_tables(load, table, nodes, devices)


def _balance_nodes(instance: _Instance, load: Weights, groups_by_node: IntArray) -> IntArray:
    """[L, P] each node's groups balanced over its devices as published, in the precision of `load` [L, E]."""
    rows, experts = load.shape
    nodes, size = instance.nodes, experts // groups_by_node.shape[1]
    member = (groups_by_node[:, :, None] * size + np.arange(size)).reshape(rows, experts)
    in_node = np.take_along_axis(load, member, axis=1).reshape(rows * nodes, experts // nodes)
    local = packed_tables(in_node, instance.slots // nodes, instance.devices // nodes).reshape(rows, nodes, -1)
    local = local + (np.arange(nodes) * (experts // nodes))[:, None]
    return np.take_along_axis(member, local.reshape(rows, instance.slots), axis=1)


def _better(load: FloatArray, first: IntArray, second: IntArray, devices: int) -> IntArray:
    """[L, P] of two tables, each layer's with the lighter heaviest device."""
    lighter = largest_load(load, second, devices) < largest_load(load, first, devices)
    return np.where(lighter[:, None], second, first)


def largest_load(load: FloatArray, table: IntArray, devices: int) -> FloatArray:
    """[L] load of the heaviest device, from expert loads [L, E] and a slot table [L, P]."""
    return np.asarray(_slot_load(load, table).reshape(len(table), devices, -1).sum(axis=2).max(axis=1))


def _slot_load(load: FloatArray, table: IntArray) -> FloatArray:
    """[L, P]"""
    return np.take_along_axis(load / replica_counts(table, load.shape[1]), table, axis=1)


def stacked(table: IntArray, devices: int) -> BoolArray:
    """[L] whether a device has an expert twice, in a table [L, P]."""
    runs = np.sort(table.reshape(len(table), devices, -1), axis=2)
    return np.asarray((runs[:, :, 1:] == runs[:, :, :-1]).any(axis=(1, 2)))


def lighten(load: FloatArray, table: IntArray, nodes: int, devices: int) -> IntArray:
    """[L, P] a table whose largest device load is at most that of `table` in every layer; load [L, E].

    Takes turns on each layer's heaviest device: its slots change places with others of its node, one for one or two for
    two, then an expert of it takes over a slot of an expert with several; until nothing helps, or little is left to
    gain.
    """
    table = table.copy()
    level_tables(np.ascontiguousarray(load), table, nodes, devices)
    return table


def _positions(table: IntArray, counts: IntArray) -> IntArray:
    """[L, E, X] the slots of each expert in order, padded with -1."""
    layers, slots = table.shape
    result = np.full((*counts.shape, int(counts.max())), -1, dtype=np.int64)
    slot = np.argsort(table, axis=1, kind="stable")
    expert = np.take_along_axis(table, slot, axis=1)
    first = np.cumsum(counts, axis=1) - counts
    rank = np.arange(slots) - np.take_along_axis(first, expert, axis=1)
    result[np.arange(layers)[:, None], expert, rank] = slot
    return result


def _read_instance(weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> _Instance:
    numbers = _whole(num_replicas=num_replicas, num_groups=num_groups, num_nodes=num_nodes, num_gpus=num_gpus)
    slots, groups, nodes, devices = numbers
    load, single = _read(weight)
    hierarchical = groups % nodes == 0
    _check_division(load.shape[1], slots, groups, nodes, devices, hierarchical)
    if not hierarchical:
        groups = nodes = 1
    return _Instance(load, single, _groups_by_node(weight, single, groups, nodes), slots, nodes, devices)


def _groups_by_node(weight: Any, single: SingleArray, groups: int, nodes: int) -> IntArray:
    """[L, groups] groups packed on nodes as published, listed node by node."""
    layers = len(single)
    if groups == nodes:
        return np.tile(np.arange(groups), (layers, 1))
    group_load = single.reshape(layers, groups, -1)
    if isinstance(weight, np.ndarray):
        sums = group_load.sum(axis=2)
        by_load = np.argsort(-sums, axis=1, kind="stable")
    else:
        import torch

        # Torch's own sum and sort, so that rounding and the order of groups of one load are the published ones.
        tensor = torch.from_numpy(group_load).sum(-1)
        sums, by_load = tensor.numpy(), tensor.sort(-1, descending=True).indices.numpy()
    packed = rebalance(np.take_along_axis(sums, by_load, axis=1), groups, 1, 1, nodes)
    return np.take_along_axis(by_load, packed, axis=1)


def _read(weight: Any) -> tuple[FloatArray, SingleArray]:
    """The loads in double precision, and in single as published."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(weight, torch.Tensor):
        if weight.is_complex():
            raise InputError(f"weight: {weight.dtype}; expected real loads [L, E]")
        on_cpu = weight.detach().cpu()
        load, single = on_cpu.double().numpy(), on_cpu.float().contiguous().numpy()
    elif isinstance(weight, np.ndarray):
        if weight.dtype.kind not in "buif":
            raise InputError(f"weight: dtype {weight.dtype}; expected real loads [L, E]")
        with np.errstate(over="ignore"):
            load, single = weight.astype(np.float64), np.ascontiguousarray(weight, dtype=np.float32)
    else:
        raise InputError(f"weight: {type(weight).__name__}; expected a torch tensor or NumPy array of loads [L, E]")
    if load.ndim != 2 or 0 in load.shape:
        raise InputError(f"weight: shape {list(load.shape)}; expected [L, E], at least one layer and expert")
    with np.errstate(over="ignore", invalid="ignore"):
        bad = ~np.isfinite(single) | (single < 0)
        total = single.sum(axis=1)
    if bad.any():
        layer, expert = np.argwhere(bad)[0]
        raise InputError(
            f"weight[{layer}, {expert}] is {load[layer, expert]}; expected a finite load of at least 0, in float32"
        )
    if not np.isfinite(total).all():
        raise InputError(
            f"weight: loads of layer {int(np.argmin(np.isfinite(total)))} add up beyond float32; scale them"
        )
    return load, single


def _whole(**numbers: Any) -> list[int]:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise InputError(f"{name}: {value!r}; expected a whole number of at least 1")
    return [int(value) for value in numbers.values()]


def _check_division(experts: int, slots: int, groups: int, nodes: int, devices: int, hierarchical: bool) -> None:
    if slots < experts:
        raise InputError(f"num_replicas: {slots}; expected at least one for each of {experts} experts")
    if slots % devices:
        raise InputError(f"num_replicas: {slots}; expected a multiple of num_gpus ({devices})")
    if hierarchical and experts % groups:
        raise InputError(f"num_groups: {groups}; expected to divide the {experts} experts of weight")
    if hierarchical and devices % nodes:
        raise InputError(f"num_gpus: {devices}; expected a multiple of num_nodes ({nodes})")
