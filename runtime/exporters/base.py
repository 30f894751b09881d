"""The contract between `export_plan` and the engines: write a file, read it back, say what the engine needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ...placement.errors import FileFormatError, InputError
from ...placement.files import read_text
from ...placement.layer_slots import spanned
from ...placement.model import ModelSpec
from ...placement.plan import EMPTY, Plan, equal_shares
from ...placement.topology import Topology

FILE_LIMIT = 1 << 24
"""Bytes a placement file may have; DeepSeek-V3's with 512 slots takes 120 KB."""


def read_json(path: Path) -> Any:
    """Parses a JSON file of bounded size.

    Raises:
        FileFormatError: too large, not UTF-8, not JSON, truncated, or nested too deep.
    """
    try:
        return json.loads(read_text(path, limit_bytes=FILE_LIMIT))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise FileFormatError(f"{path}: not JSON, or truncated ({error})") from None


def expert_row(row: Any, origin: str, model: ModelSpec, slots: int | None = None) -> list[int]:
    """Checks one layer's list: whole numbers within the model's experts, `slots` of them when given."""
    if not isinstance(row, list):
        raise FileFormatError(f"{origin}: expected a list of expert ids, found {type(row).__name__}")
    if slots is not None and len(row) != slots:
        raise FileFormatError(f"{origin}: {len(row)} slots, expected {slots} as in the other layers")
    for slot, expert in enumerate(row):
        if type(expert) is not int or not 0 <= expert < model.experts:
            raise FileFormatError(
                f"{origin}: slot {slot} holds {str(expert)[:40]!r}, expected an expert id from 0 to {model.experts - 1}"
            )
    return row


def plan_of_rows(rows: Sequence[list[int]], origin: str, model: ModelSpec, topology: Topology) -> Plan:
    """The plan of one checked row a MoE layer, its slots dealt to devices in equal runs.

    Raises:
        FileFormatError: slots that do not divide over the devices, or a layer that misses an expert.
    """
    slots, devices = len(rows[0]), topology.num_devices
    if slots % devices:
        raise FileFormatError(
            f"{origin}: {slots} slots a layer do not divide over {devices} devices; is this the file's topology?"
        )
    try:
        return Plan(
            model=model,
            topology=topology,
            physical_to_logical=np.array(rows, dtype=np.int64),
            slot_device=np.repeat(np.arange(devices), slots // devices),
        )
    except InputError as error:
        raise FileFormatError(f"{origin}: {error}") from None


class Constraint(Enum):
    """A limit of an engine that not every valid plan keeps to."""

    EQUAL_SLOTS = "every device has the same number of slots in every layer, and none is empty"
    EQUAL_SHARES = "an expert's replicas take equal shares of its tokens"
    SPREAD_REPLICAS = "no device holds an expert twice in a layer"
    NO_REPLICAS = "every expert has one slot"


def violations(plan: Plan, constraints: Iterable[Constraint]) -> list[str]:
    """A sentence for each constraint the plan breaks: what it has and what to change. Empty when it keeps to all."""
    asked = set(constraints)
    sentences = (check(plan) for constraint, check in _CHECKS.items() if constraint in asked)
    return [sentence for sentence in sentences if sentence is not None]


def _unequal_slots(plan: Plan) -> str | None:
    devices = plan.topology.num_devices
    if not plan.filled.all():
        return (
            f"every slot needs an expert in every layer, this plan's layers fill {spanned(plan.filled.sum(axis=1))} of "
            f"{plan.num_slots}: solve with one number of slots for all layers, a multiple of {devices}"
        )
    counts = np.bincount(plan.slot_device, minlength=devices)
    if counts.min() == counts.max():
        return None
    below, above = plan.num_slots // devices * devices, -(-plan.num_slots // devices) * devices
    choices = [str(slots) for slots in dict.fromkeys((below, above)) if slots >= plan.model.experts]
    return (
        f"every device needs the same number of slots, this plan's {plan.num_slots} slots a layer give its {devices} "
        f"devices from {counts.min()} to {counts.max()}: solve with slots={' or '.join(choices)} and no device_slots"
    )


def _unequal_shares(plan: Plan) -> str | None:
    if plan.has_equal_shares:
        return None
    expected = equal_shares(plan.physical_to_logical, plan.model.experts)
    layer, slot = np.unravel_index(int(np.abs(plan.shares - expected).argmax()), plan.shares.shape)
    expert = plan.physical_to_logical[layer, slot]
    return (
        f"replicas take equal shares of an expert's tokens, this plan gives slot {slot} a share of "
        f"{plan.shares[layer, slot]:.3f} of expert {expert} in layer {plan.moe_layers[layer]}, where an equal one is "
        f"{expected[layer, slot]:.3f}: solve with Objective(split='equal'), from here with Problem(current=plan, "
        "max_moved_bytes=0) to keep the placement, or more to fit it to equal shares (`moeplace solve --split equal "
        "--current PLAN --max-moved SIZE`)"
    )


def _stacked_replicas(plan: Plan) -> str | None:
    for table, layer in zip(plan.physical_to_logical, plan.moe_layers, strict=True):
        filled = table != EMPTY
        pairs, counts = np.unique(plan.slot_device[filled] * plan.model.experts + table[filled], return_counts=True)
        if counts.max() > 1:
            device, expert = divmod(int(pairs[counts.argmax()]), plan.model.experts)
            return (
                f"a device may hold an expert once, device {device} holds expert {expert} {counts.max()} times in "
                f"layer {layer}: solve with fewer slots, or with a solver that spreads replicas over devices"
            )
    return None


def _replicas(plan: Plan) -> str | None:
    if plan.num_slots == plan.model.experts:
        return None
    return (
        f"every expert needs exactly one slot, this plan has {plan.num_slots} slots a layer for {plan.model.experts} "
        f"experts: solve with slots={plan.model.experts} (the default)"
    )


_CHECKS: dict[Constraint, Callable[[Plan], str | None]] = {
    Constraint.EQUAL_SLOTS: _unequal_slots,
    Constraint.EQUAL_SHARES: _unequal_shares,
    Constraint.SPREAD_REPLICAS: _stacked_replicas,
    Constraint.NO_REPLICAS: _replicas,
}


class Exporter(Protocol):
    """One engine's file format. Instances are stateless.

    `text(plan, *, <options>) -> str` gets a plan that keeps to `constraints`; the options are keyword arguments of
    `export_plan`. `read(path, model, topology) -> Plan` takes an untrusted file and raises FileFormatError.
    """

    @property
    def name(self) -> str: ...

    @property
    def constraints(self) -> frozenset[Constraint]: ...

    @property
    def requires(self) -> str:
        """The engine and the versions that read the file."""
        ...

    @property
    def replica_choice(self) -> Literal["share", "nearest"]:
        """Which replica the engine lets serve a token, in the objective's terms."""
        ...

    @property
    def text(self) -> Callable[..., str]: ...

    def read(self, path: Path, model: ModelSpec, topology: Topology) -> Plan: ...

    def usage(self, plan: Plan, path: Path) -> str:
        """How to give the file to the engine: the options this very plan needs."""
        ...
