"""What may fail in a cluster, what of a plan is then left, its repair, and replicas that stand by.

L layers, E experts, G devices, P slots of a layer, F failures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .._arguments import check_fields, check_methods, check_types
from .._types import BoolArray, FloatArray, IntArray
from .errors import InputError
from .layer_slots import in_table, own_slots
from .plan import EMPTY, Certificate, Plan, Provenance, equal_shares
from .steps import Steps
from .topology import Topology
from .version import __version__

Kind = Literal["device", "node"]
KINDS: tuple[Kind, ...] = ("device", "node")


@check_methods
@check_fields
@dataclass(frozen=True)
class Failure:
    """Devices lost together."""

    name: str
    """`device:3`, `node:1`, or several joined by `+`."""
    devices: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.devices) or any(device < 0 for device in self.devices):
            raise InputError(f"Failure {self.name!r}: devices {tuple(self.devices)} must be one or more, from 0 on")

    @classmethod
    def named(cls, name: str, topology: Topology) -> Failure:
        """The failure of that name: `device:3`, `node:1`, or `device:3+node:1` for losing them together.

        Raises:
            InputError: not of that form, or the topology has no such device or node.
        """
        lost: set[int] = set()
        for part in name.split("+"):
            kind, _, number = part.strip().partition(":")
            if kind not in KINDS or not number.isdecimal():
                raise InputError(f"failure {part!r} must be device:N or node:N, such as device:3")
            count = topology.num_devices if kind == "device" else topology.num_nodes
            if int(number) >= count:
                raise InputError(f"failure {part!r}: the topology has {kind}s 0 to {count - 1}")
            lost.update(_members(kind, int(number), topology))
        return cls("+".join(part.strip() for part in name.split("+")), tuple(sorted(lost)))


@check_types
def single_failures(topology: Topology, kinds: Sequence[Kind] = KINDS) -> tuple[Failure, ...]:
    """The loss of each device, and of each node where there are several; what would leave no device is left out."""
    counts = {"device": topology.num_devices, "node": topology.num_nodes}
    return tuple(
        Failure(f"{kind}:{i}", _members(kind, i, topology))
        for kind in kinds
        if counts[kind] > 1
        for i in range(counts[kind])
    )


def failure_mask(failures: Sequence[Failure], devices: int) -> BoolArray:
    """[F, G] whether a failure takes a device, for F failures and G devices.

    Raises:
        InputError: a failure of a device that is not there, or of all devices; it is named.
    """
    mask = np.zeros((len(failures), devices), dtype=bool)
    for row, failure in zip(mask, failures, strict=True):
        if not failure.devices or not all(0 <= device < devices for device in failure.devices):
            raise InputError(f"failure {failure.name!r} takes devices {failure.devices}, there are 0 to {devices - 1}")
        row[list(failure.devices)] = True
        if row.all():
            raise InputError(f"failure {failure.name!r} takes all {devices} devices; no plan survives that")
    return mask


def lost_experts(plan: Plan, failure: Failure) -> BoolArray:
    """[L, E] experts of which a failure takes every replica."""
    holds = plan.holds.copy()
    holds[:, :, list(failure.devices)] = False
    return np.asarray(~holds.any(axis=2))


@check_types
def survives(plan: Plan, failures: Sequence[Failure]) -> BoolArray:
    """[F] whether every expert of every layer keeps a replica in each failure."""
    return np.array([not lost_experts(plan, failure).any() for failure in failures], dtype=bool)


def _members(kind: str, number: int, topology: Topology) -> tuple[int, ...]:
    if kind == "device":
        return (number,)
    return tuple(int(device) for device in np.flatnonzero(topology.node_of == number))


def survivors(devices: int, failure: Failure) -> IntArray:
    """Devices that a failure leaves, in order; their positions here are their new ranks."""
    return np.setdiff1d(np.arange(devices), failure.devices)


def degraded(plan: Plan, failure: Failure) -> Plan:
    """The plan as it runs after a failure, nothing moved: tokens of lost replicas go to the surviving ones.

    Surviving replicas of an expert keep the ratio of their shares; where all of them had none, they split its tokens
    equally.

    Args:
        plan: on the whole cluster.
        failure: the devices that go.

    Returns:
        The plan on the devices that are left, ranked anew in their order.

    Raises:
        InputError: an expert has no replica left; layer and expert are named.
    """
    lost = lost_experts(plan, failure)
    if lost.any():
        layer, expert = np.argwhere(lost)[0]
        raise InputError(
            f"without {failure.name} no replica is left of expert {expert} in layer {plan.moe_layers[layer]} "
            f"({int(lost.sum())} lost in all layers)"
        )
    left = survivors(plan.topology.num_devices, failure)
    remains = np.isin(plan.slot_device, left)
    table, shares = plan.physical_to_logical[:, remains], plan.shares[:, remains]
    rows = np.arange(len(table))[:, None]
    total = np.zeros((len(table), plan.model.experts))
    # An empty slot's share of 0 goes to some expert's total here, and stays 0 below.
    np.add.at(total, (rows, table), shares)
    remaining = total[rows, table]
    equal = equal_shares(table, plan.model.experts)
    has_ratio = (remaining > 0) | (table == EMPTY)
    return Plan(
        model=plan.model,
        topology=plan.topology.without(failure.devices),
        physical_to_logical=table,
        slot_device=np.searchsorted(left, plan.slot_device[remains]),
        shares=np.where(has_ratio, shares / np.where(remaining > 0, remaining, 1.0), equal),
        provenance=_after(failure, plan, "degraded"),
    )


def _after(failure: Failure, plan: Plan, solver: str) -> Provenance:
    """How a plan was made of another one that a failure hit."""
    return Provenance(
        solver=solver,
        version=__version__,
        options={"lost": failure.name, "plan": plan.fingerprint},
        stop="given",
        trace_fingerprint=plan.provenance.trace_fingerprint,
    )


def renumbered(plan: Plan, topology: Topology, ranks: IntArray) -> Plan:
    """The plan of survivors on the whole cluster: those left keep their numbers, the others have no slots.

    Args:
        plan: on the devices left.
        topology: of the whole cluster.
        ranks: [G left] each device's number in it.
    """
    return replace(plan, topology=topology, slot_device=ranks[plan.slot_device])


def on_survivors(plan: Plan, steps: Steps) -> tuple[Plan, Steps]:
    """A plan that leaves lost ranks their numbers, on the ranks that have slots, and the steps as those run them."""
    alive = np.flatnonzero(plan.slots_per_device.any(axis=0))
    if len(alive) == plan.topology.num_devices:
        return plan, steps
    lost = np.setdiff1d(np.arange(plan.topology.num_devices), alive)
    topology = plan.topology.without(tuple(lost.tolist()))
    return (
        replace(plan, topology=topology, slot_device=np.searchsorted(alive, plan.slot_device)),
        remap_source_ranks(steps, alive),
    )


def remap_source_ranks(steps: Steps, origin: IntArray) -> Steps:
    """The same tokens on another cluster.

    Args:
        steps: with the source ranks of the cluster before, or none.
        origin: [G] the rank that each device of the other cluster had before, -1 for a new one.

    Returns:
        Steps in which tokens of ranks that are gone are dealt to the others in turn; without source ranks, so that
        tokens are spread evenly, where devices are new.
    """
    if steps.source is None:
        return steps
    if (origin < 0).any():
        return replace(steps, source=None)
    rank = np.full(max(int(steps.source.max()), int(origin.max())) + 1, -1, dtype=np.int64)
    rank[origin] = np.arange(len(origin))
    source = rank[steps.source]
    orphaned = np.flatnonzero(source < 0)
    source[orphaned] = np.arange(len(orphaned)) % len(origin)
    return replace(steps, source=source)


# The least that makes a plan whole again after a failure: lost experts are loaded, nothing else moves.


def repaired(plan: Plan, failure: Failure, device_slots: IntArray, load: FloatArray) -> Plan:
    """The surviving slots as they stand, with every lost expert in an empty slot or in place of a spare replica.

    Heaviest first, lost experts go where the most loaded device stays least loaded. Slots still empty then take another
    replica of the experts with most load a replica. Replicas share equally.

    Args:
        plan: on the whole cluster.
        failure: the devices that go.
        device_slots: [G] slots a layer of each surviving device, or [L, G] of each layer, at least those it has.
        load: [L, E] tokens each expert gets.

    Raises:
        InputError: fewer slots than experts, or a device with fewer slots than it holds.
    """
    left = survivors(plan.topology.num_devices, failure)
    present = plan.slots_per_device[:, left]
    layer_slots = np.broadcast_to(device_slots, present.shape)
    short = (layer_slots.sum(axis=1) < plan.model.experts) | (layer_slots < present).any(axis=1)
    for layer in np.flatnonzero(short)[:1]:
        raise InputError(
            f"slots a device {layer_slots[layer].tolist()} must be at least the {present[layer].tolist()} in use and "
            f"{plan.model.experts} in all, in layer {plan.moe_layers[layer]}"
        )
    remains = plan.filled & np.isin(plan.slot_device, left)
    rows = []
    for layer, slots in enumerate(layer_slots):
        device = np.searchsorted(left, plan.slot_device[remains[layer]])
        more = np.repeat(np.arange(len(left)), slots - present[layer])
        order = np.argsort(np.concatenate([device, more]), kind="stable")
        row = np.concatenate([plan.physical_to_logical[layer, remains[layer]], np.full(len(more), EMPTY)])[order]
        rows.append(_fill(row, np.repeat(np.arange(len(left)), slots), load[layer]))
    return Plan(
        model=plan.model,
        topology=plan.topology.without(failure.devices),
        physical_to_logical=in_table(rows, own_slots(layer_slots)),
        slot_device=np.repeat(np.arange(len(left)), layer_slots.max(axis=0)),
        provenance=_after(failure, plan, "repaired"),
    )


def _fill(row: IntArray, slot_device: IntArray, load: FloatArray) -> IntArray:
    """[P] a layer's slots with every expert in one of them and none empty."""
    row = row.copy()
    count = np.bincount(row[row != EMPTY], minlength=len(load))
    missing = np.flatnonzero(count == 0)
    for expert in missing[np.argsort(-load[missing], kind="stable")]:
        empty = np.flatnonzero(row == EMPTY)
        spare = empty if len(empty) else np.flatnonzero(count[row] > 1)
        slot = min(spare, key=lambda slot: (_most_loaded(row, slot_device, load, int(slot), int(expert)), slot))
        if row[slot] != EMPTY:
            count[row[slot]] -= 1
        row[slot] = expert
        count[expert] += 1
    for slot in np.flatnonzero(row == EMPTY):
        here = np.zeros(len(load), dtype=bool)
        mine = row[slot_device == slot_device[slot]]
        here[mine[mine != EMPTY]] = True
        # Where the device holds every expert already, any expert serves.
        row[slot] = int(np.argmax(np.where(here, -1.0, load / count)))
        count[row[slot]] += 1
    return row


def _most_loaded(row: IntArray, slot_device: IntArray, load: FloatArray, slot: int, expert: int) -> float:
    """Load of the most loaded device when the slot goes to the expert, replicas sharing equally."""
    changed = row.copy()
    changed[slot] = expert
    filled = changed != EMPTY
    count = np.bincount(changed[filled], minlength=len(load))
    each = load[changed[filled]] / count[changed[filled]]
    return float(np.bincount(slot_device[filled], weights=each).max())


# Replicas that stand by: they hold weights and serve no tokens until others are lost.


def with_standbys(plan: Plan, device_slots: IntArray, failures: Sequence[Failure], load: FloatArray) -> Plan | None:
    """The plan with further slots, so that every expert keeps a replica in each failure; none is empty, step times
    stay.

    Args:
        plan: whose replicas keep their slots and shares.
        device_slots: [G] slots a layer of each device.
        failures: which every expert is to survive.
        load: [L, E] tokens each expert gets; slots that no expert needs go to the heaviest.

    Returns:
        The plan, or None where none was found. Each expert in need gets one standby (a matching of experts and slots),
        so None does not mean that no plan with these slots survives.

    Raises:
        InputError: a device has fewer slots than the plan uses.
    """
    present = plan.slots_per_device
    for used in present[(device_slots < present).any(axis=1)][:1]:
        raise InputError(f"slots a device {device_slots.tolist()} must be at least the {used.tolist()} in use")
    mask = failure_mask(failures, plan.topology.num_devices)
    tables, shares = [], []
    for layer, filled in enumerate(plan.filled):
        more = np.repeat(np.arange(len(device_slots)), device_slots - present[layer])
        row = _standbys(plan.holds[layer], more, mask, load[layer])
        if row is None:
            return None
        order = np.argsort(np.concatenate([plan.slot_device[filled], more]), kind="stable")
        tables.append(np.concatenate([plan.physical_to_logical[layer, filled], row])[order])
        shares.append(np.concatenate([plan.shares[layer, filled], np.zeros(len(row))])[order])
    certificate = plan.certificate
    return replace(
        plan,
        physical_to_logical=np.stack(tables),
        slot_device=np.repeat(np.arange(len(device_slots)), device_slots),
        shares=np.stack(shares),
        # The bound was proven for fewer slots; with these a plan might do better.
        certificate=None if certificate is None else Certificate(certificate.objective, certificate.value),
        provenance=replace(
            plan.provenance,
            options={
                **plan.provenance.options,
                "standbys": int(device_slots.sum() - present.sum(axis=1).min()),
                "tolerates": [f.name for f in failures],
            },
        ),
        predicted={},
    )


def _standbys(holds: BoolArray, slot_device: IntArray, failures: BoolArray, load: FloatArray) -> IntArray | None:
    """[n] experts of a layer's n further slots. holds: [E, G]. slot_device: [n]. failures: [F, G]. load: [E]."""
    from scipy.optimize import linear_sum_assignment

    # [E, F] failures that would take every replica.
    fatal = ~np.any(holds[:, None, :] & ~failures[None], axis=2)
    in_need = np.flatnonzero(fatal.any(axis=1))
    helps = ~holds & ~(fatal.astype(np.int64) @ failures.astype(np.int64) > 0)
    if len(in_need) > len(slot_device):
        return None
    result = np.full(len(slot_device), EMPTY, dtype=np.int64)
    if len(in_need):
        useless = ~helps[np.ix_(in_need, slot_device)]
        experts, slots = linear_sum_assignment(useless.astype(float))
        if useless[experts, slots].any():
            return None
        result[slots] = in_need[experts]
    holds = holds.copy()
    holds[result[result != EMPTY], slot_device[result != EMPTY]] = True
    for slot in np.flatnonzero(result == EMPTY):
        absent = ~holds[:, slot_device[slot]]
        if not absent.any():
            return None
        result[slot] = int(np.argmax(np.where(absent, load, -1.0)))
        holds[result[slot], slot_device[slot]] = True
    return result
