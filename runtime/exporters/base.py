"""The contract between `export_plan` and the engines: write a file, read it back, say what the engine needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...placement.engines import EngineProfile
from ...placement.errors import FileFormatError, InputError
from ...placement.files import read_text
from ...placement.model import ModelSpec
from ...placement.plan import Plan
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


class Exporter(Protocol):
    """One engine's file format. Instances are stateless.

    `content(plan, *, <options>) -> str | bytes` gets a plan that keeps to the profile's constraints; the options are
    keyword arguments of `export_plan`. An option `suffix` is the file's own, for an engine that tells formats by it.
    `read(path, model, topology) -> Plan` takes an untrusted file and raises FileFormatError.
    """

    @property
    def name(self) -> str: ...

    @property
    def profile(self) -> EngineProfile:
        """What the engine can run."""
        ...

    @property
    def content(self) -> Callable[..., str | bytes]: ...

    def read(self, path: Path, model: ModelSpec, topology: Topology) -> Plan: ...

    def usage(self, plan: Plan, path: Path) -> str:
        """How to give the file to the engine: the commands this very plan needs."""
        ...
