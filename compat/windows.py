"""Policies that look at a window of steps, by the signatures of three engines: DeepInfer, vLLM and vLLM-Ascend.

Each step has its own largest device load, and what is lowered is their sum. Replicas share an expert's load equally,
and no device has an expert twice, where slots are no more than experts times devices (of a node, where groups stay on
nodes). That comes first: an expert twice on a device takes a slot and the copying of its weights and brings nothing
that a rule other than equal shares could use. Theirs stack experts, and where they do the sum of a layer may be
lower than that of any table without; elsewhere none of ours was the higher one in a thousand random windows. Ranks are
named so that fewest experts are sent where a map is in force, and so that their loads summed over layers are level.

Sources of the signatures: DeepInfer 0.1.0 (`deepinfer/model_executor/eplb/policy.py`), vLLM 0.33.0
(`vllm/distributed/eplb/policy`), vLLM-Ascend (`vllm_ascend/eplb/core/policy`).

L layers, E experts, P slots of a layer, S steps, G ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .._types import FloatArray, IntArray
from ..placement.errors import InputError
from ..solvers.device_names import renamed_tables
from ..solvers.table_packing import APART, extrapolated, largest_loads, lower_to, pack_steps
from .eplb import stacked, table_apart

if TYPE_CHECKING:
    import torch

__all__ = ["AscendPolicy", "VllmPolicy", "rebalance_experts_global"]

PROPOSALS, SMALL = 1000, 1_000_000
"""Exchanges tried a layer: together with the greedy table, half of what DeepInfer's policy takes. Of small windows as
many more as keep exchanges x steps x slots at that."""
FOLLOWED = 600_000
"""Steps x slots x ranks up to which DeepInfer's rule is also followed in its own precision, at its own cost: small
windows have ties, which rounding breaks."""
FOR_WORKLOADS = 60_000
"""Exchanges tried a layer for a table of several workloads."""


def _packed(load: FloatArray, slots: int, devices: int) -> IntArray:
    """[L, P] of loads [S, L, E]."""
    return pack_steps(load, slots, devices, _proposals(load, slots), as_published=True)


def _proposals(load: FloatArray, slots: int) -> int:
    return max(PROPOSALS, min(20 * PROPOSALS, SMALL // (len(load) * slots)))


# DeepInfer.


def rebalance_experts_global(
    tokens_per_expert: torch.Tensor,
    num_physical_experts: int,
    num_local_physical_experts: int,
    *,
    workloads: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DeepInfer's: where experts and their replicas stand, from the tokens of a window of steps.

    Args:
        tokens_per_expert: [S, L, E] of each step.
        num_physical_experts: P, a multiple of the next.
        num_local_physical_experts: slots of a rank.
        workloads: ours alone: rows are the totals of different workloads, whose sizes do not count, and the one table
            is for others like them, too: mixes that lie further out are levelled with them.

    Returns:
        physical_to_logical_map [L, P], logical_to_physical_map [L, E, P - E + 1] padded with -1, and logical_count [L,
        E], int32 on the device of the tokens.

    Raises:
        InputError: tokens that are no [S, L, E] of finite numbers of at least 0, or slots that do not divide.
    """
    import torch

    load = _loads("tokens_per_expert", tokens_per_expert, 3)
    experts = load.shape[2]
    slots, width = (
        _whole("num_physical_experts", num_physical_experts),
        _whole("num_local_physical_experts", num_local_physical_experts),
    )
    if slots < experts or slots % width:
        raise InputError(
            f"num_physical_experts: {slots}; expected a multiple of num_local_physical_experts ({width}), at least one "
            f"for each of {experts} experts"
        )
    ranks = slots // width
    if workloads:
        new = pack_steps(extrapolated(load), slots, ranks, FOR_WORKLOADS)
    else:
        new = _packed(load, slots, ranks)
        if len(load) * slots * ranks <= FOLLOWED:
            # `pack_steps` has theirs in double precision: single breaks ties otherwise, at times to the better.
            published = deepinfers_rule(tokens_per_expert.detach().cpu(), slots, ranks)
            lower_to(load, new, published, ranks, 4 * _proposals(load, slots))
    table = renamed_tables(load.sum(axis=0), new, 1, ranks)
    counts = np.stack([np.bincount(row, minlength=experts) for row in table])
    maps = table, _positions(table, counts, slots - experts + 1), counts
    where = tokens_per_expert.device
    made = [torch.from_numpy(each.astype(np.int32)).to(where) for each in maps]
    return made[0], made[1], made[2]


def deepinfers_rule(tokens: torch.Tensor, slots: int, ranks: int) -> IntArray:
    """[L, P] of tokens [S, L, E] where DeepInfer's rule puts experts, in the precision of theirs."""
    import torch

    _, layers, experts = tokens.shape
    counts, number = torch.ones(layers, experts, dtype=torch.int32), torch.arange(experts, dtype=torch.int32)
    columns, apart = [number.expand(layers, -1).long()], tokens + number * APART
    for _ in range(slots - experts):
        each = apart / counts
        most, at = each.max(-1, keepdim=True)
        largest = most.expand_as(each).contiguous()
        each.scatter_(-1, at, (tokens / (counts + 1)).gather(-1, at))
        largest.scatter_(-1, at, each.max(-1, keepdim=True).values)
        chosen = largest.sum(0).argmin(-1, keepdim=True)
        counts.scatter_add_(-1, chosen, torch.ones_like(chosen, dtype=torch.int32))
        columns.append(chosen)
    replicas, width = torch.cat(columns, dim=1), slots // ranks
    total = tokens.sum(dim=0, dtype=torch.float32) / counts
    replicas = replicas.gather(-1, total.gather(-1, replicas).argsort(dim=-1, descending=True, stable=True))
    part = tokens.permute(1, 2, 0).float().contiguous() / counts.unsqueeze(-1)
    carried, peak = part.new_zeros(layers, ranks, len(tokens)), part.new_zeros(layers, len(tokens))
    filled, table = torch.zeros(layers, ranks, dtype=torch.int64), torch.empty_like(replicas)
    row = torch.arange(layers)
    for expert in replicas.T:
        load = part[row, expert]
        value = torch.maximum(carried + load.unsqueeze(1), peak.unsqueeze(1)).sum(dim=-1)
        rank = value.masked_fill(filled == width, torch.inf).argmin(-1)
        table[row, rank * width + filled[row, rank]] = expert
        filled[row, rank] += 1
        carried[row, rank] += load
        peak = torch.maximum(peak, carried[row, rank])
    return np.asarray(table.numpy())


# vLLM.


class VllmPolicy:
    """vLLM 0.33's `DefaultEplbPolicy`, by its class method."""

    @classmethod
    def rebalance_experts(
        cls,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Where experts stand, from one load table; as `compat.eplb.rebalance_experts`, but no expert twice on a rank.

        No layer is worse than theirs, except where theirs has an expert twice on a rank and nothing as light was found
        that has not.

        Args:
            weight: [L, E] load.
            num_replicas, num_groups, num_nodes, num_ranks: as there (ranks are GPUs).
            old_global_expert_indices: [L, P] the map in force: ranks are named so that fewest experts are sent, and
                what stays on its rank stays in its slot.

        Returns:
            [L, P] physical_to_logical_map, int64 on the device of `weight`.

        Raises:
            InputError: as there, or a map in force of another shape.
        """
        import torch

        new = table_apart(weight.detach().cpu(), num_replicas, num_groups, num_nodes, num_ranks)
        if old_global_expert_indices is not None:
            old = np.asarray(old_global_expert_indices.detach().cpu().numpy())
            if old.shape != new.shape:
                raise InputError(
                    f"old_global_expert_indices: shape {list(old.shape)}; expected {list(new.shape)}, as the new map"
                )
            load = weight.detach().cpu().double().numpy()
            together = num_nodes if num_groups % num_nodes == 0 else 1
            new = _in_old_slots(old, renamed_tables(load, new, together, num_ranks, old), num_ranks)
        return torch.from_numpy(new).to(weight.device)


# vLLM-Ascend.


class AscendPolicy:
    """vLLM-Ascend's `EplbPolicy`, by its method."""

    def rebalance_experts(self, current_expert_table: Any, expert_workload: Any) -> tuple[bool, IntArray, IntArray]:
        """Another table, from the workload of each slot of the table in force.

        Args:
            current_expert_table: [L, G, slots of a rank] experts.
            expert_workload: [L, G, slots] tokens of each slot, or [S, L, G, slots] of several steps.

        Returns:
            (whether some layer changes, [layers] those that do, most gained first, [L, G, slots] the new table: of
            other layers the one in force). A layer that gains nothing changes where it is as light without an expert
            twice on a rank.

        Raises:
            InputError: arrays that do not fit.
        """
        current = np.asarray(current_expert_table)
        if current.ndim != 3 or current.dtype.kind not in "iu" or not current.size or current.min() < 0:
            raise InputError(
                f"current_expert_table: {current.dtype} {list(current.shape)}; expected experts [L, ranks, slots]"
            )
        workload = _loads("expert_workload", expert_workload, np.ndim(expert_workload))
        workload = workload[None] if workload.ndim == 3 else workload
        if workload.shape[1:] != current.shape:
            raise InputError(
                f"expert_workload: shape {list(np.shape(expert_workload))}; expected {list(current.shape)}, with steps "
                "before or without"
            )
        layers, ranks, width = current.shape
        table, experts = current.reshape(layers, -1).astype(np.int64), int(current.max()) + 1
        missing = [layer for layer in range(layers) if len(np.unique(table[layer])) < experts]
        if missing:
            raise InputError(f"current_expert_table: layer {missing[0]} has not all of {experts} experts")
        load = np.zeros((len(workload), layers, experts))
        for step, of_slots in zip(load, workload.reshape(*load.shape[:2], -1), strict=True):
            np.add.at(step, (np.arange(layers)[:, None], table), of_slots)
        new = _packed(load, table.shape[1], ranks)
        before, after = (largest_loads(load, each, ranks).sum(axis=0) for each in (table, new))
        gain = np.where(before > 0, 1 - after / np.where(before > 0, before, 1.0), 0.0)
        order = np.argsort(-gain, kind="stable")
        doubled = stacked(table, ranks) & ~stacked(new, ranks)
        changed = order[(gain[order] > 0) | ((after <= before) & doubled)[order]]
        if len(changed):
            named = renamed_tables(load.sum(axis=0)[changed], new[changed], 1, ranks, table[changed])
            table[changed] = _in_old_slots(table[changed], named, ranks)
        return bool(len(changed)), changed, table.reshape(layers, ranks, width).astype(current.dtype)


# What they have in common.


def _in_old_slots(old: IntArray, new: IntArray, ranks: int) -> IntArray:
    """[L, P] the new map, every replica that stays on its rank in the slot that it had there."""
    result = np.full_like(new, -1)
    for layer in range(len(new)):
        for was, becomes, kept in zip(
            np.split(old[layer], ranks), np.split(new[layer], ranks), np.split(result[layer], ranks), strict=True
        ):
            left = becomes.tolist()
            for slot, expert in enumerate(was.tolist()):
                if expert in left:
                    left.remove(expert)
                    kept[slot] = expert
            kept[kept < 0] = left
    return result


def _positions(table: IntArray, counts: IntArray, most: int) -> IntArray:
    """[L, E, most] the slots of each expert in order, padded with -1."""
    result = np.full((*counts.shape, most), -1, dtype=np.int64)
    for layer, row in enumerate(table):
        slot = np.argsort(row, kind="stable")
        first = np.cumsum(counts[layer]) - counts[layer]
        result[layer, row[slot], np.arange(len(row)) - first[row[slot]]] = slot
    return result


def _loads(name: str, values: Any, dimensions: int) -> FloatArray:
    tensor = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    if tensor.dtype.kind not in "buif" or tensor.ndim != dimensions or tensor.ndim not in (3, 4) or 0 in tensor.shape:
        raise InputError(f"{name}: {tensor.dtype} {list(tensor.shape)}; expected loads of steps, layers and experts")
    load = tensor.astype(np.float64)
    if not np.isfinite(load).all() or load.min() < 0:
        raise InputError(f"{name}: loads run from {load.min()} to {load.max()}; expected finite ones of at least 0")
    return load


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError(f"{name}: {value!r}; expected a whole number of at least 1")
    return int(value)
