"""Plans on disk: one JSON object with a format name and a version."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from .errors import FileFormatError, InputError
from .files import read_text, write_text
from .model import ModelSpec
from .plan import Certificate, Plan, Provenance
from .topology import Topology
from .validation import describe

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")

FORMAT = "moeplace.plan"
VERSION = 2
"""Version 1 knows no empty slots; plans without any are still written as such, for releases that read no other."""


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, in the file's form. Equal shares are left out: they follow from the table."""
    certificate, provenance = plan.certificate, plan.provenance
    return {
        "format": FORMAT,
        "version": 1 if plan.filled.all() else 2,
        "model": plan.model.model_dump(mode="json"),
        "topology": plan.topology.model_dump(mode="json"),
        "physical_to_logical": plan.physical_to_logical.tolist(),
        "slot_device": plan.slot_device.tolist(),
        "shares": None if plan.has_equal_shares else plan.shares.tolist(),
        "certificate": None
        if certificate is None
        else {"objective": certificate.objective, "value": certificate.value, "bound": certificate.bound},
        "provenance": {
            "solver": provenance.solver,
            "version": provenance.version,
            "seed": provenance.seed,
            "options": provenance.options,
            "seconds": provenance.seconds,
            "stop": provenance.stop,
            "trace_fingerprint": provenance.trace_fingerprint,
            "history": [list(entry) for entry in provenance.history],
            "choice": provenance.choice,
        },
        "predicted": plan.predicted,
    }


def plan_from_dict(data: Any, origin: str = "plan") -> Plan:
    """Builds a plan from the file's form.

    Raises:
        FileFormatError: a field is missing or wrong, or the version is newer than this release reads.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FileFormatError(f"{origin}: not a {FORMAT} file (no such 'format' field); `moeplace export` writes one")
    version = data.get("version")
    if not isinstance(version, int) or version < 1:
        raise FileFormatError(f"{origin}: version is {version!r}, expected a whole number")
    if version > VERSION:
        raise FileFormatError(
            f"{origin}: plan file of version {version}, this release reads up to {VERSION}; upgrade moeplace"
        )
    try:
        return Plan(
            model=ModelSpec(**_mapping(data, "model")),
            topology=Topology(**_mapping(data, "topology")),
            physical_to_logical=_array(data, "physical_to_logical", np.int64),
            slot_device=_array(data, "slot_device", np.int64),
            shares=np.empty(0) if data.get("shares") is None else _array(data, "shares", np.float64),
            certificate=None if data.get("certificate") is None else _typed(Certificate, data, "certificate"),
            provenance=_typed(Provenance, data, "provenance"),
            predicted={str(k): float(v) for k, v in _mapping(data, "predicted").items()},
        )
    except (InputError, TypeError, ValueError) as error:
        raise FileFormatError(f"{origin}: {error}") from None


def write_plan(plan: Plan, path: str | Path) -> None:
    """Writes the plan whole or not at all."""
    write_text(path, json.dumps(plan_to_dict(plan), allow_nan=False))


def read_plan(path: str | Path) -> Plan:
    """Reads a plan file; see `plan_from_dict` for what is refused."""
    try:
        data = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileFormatError(f"{path}: not JSON, or truncated ({error})") from None
    return plan_from_dict(data, origin=str(path))


def _mapping(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name)
    if not isinstance(value, dict):
        raise InputError(f"field {name!r} must be an object, found {type(value).__name__}")
    return value


def _array(data: Mapping[str, Any], name: str, dtype: type[np.int64] | type[np.float64]) -> Any:
    value = data.get(name)
    if not isinstance(value, list):
        raise InputError(f"field {name!r} must be a list, found {type(value).__name__}")
    try:
        array = np.array(value)
    except ValueError:
        raise InputError(f"field {name!r} has rows of different lengths") from None
    whole = np.issubdtype(array.dtype, np.integer)
    if not (whole or (dtype is np.float64 and np.issubdtype(array.dtype, np.floating))):
        raise InputError(f"field {name!r} must hold {'whole ' if dtype is np.int64 else ''}numbers only")
    return array.astype(dtype)


def _typed(kind: type[T], data: Mapping[str, Any], name: str) -> T:
    """A dataclass from its fields, each of the type it declares."""
    from pydantic import TypeAdapter, ValidationError

    fields = _mapping(data, name)
    unknown = set(fields) - {field.name for field in dataclasses.fields(cast(Any, kind))}
    if unknown:
        raise InputError(f"field {name!r} has unknown entries {sorted(map(str, unknown))[:5]}")
    try:
        return TypeAdapter(kind).validate_python(fields)
    except ValidationError as error:
        raise InputError(describe(name, error)) from None
