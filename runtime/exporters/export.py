"""The entry points: check a plan against an engine, write its file, read it back."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from ...placement.errors import InputError, UnsupportedError, nearest
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from ...placement.topology import Topology
from .base import Constraint, Exporter, violations
from .registry import exporter_named


def export_plan(plan: Plan, engine: str, path: str | Path, **options: Any) -> Path:
    """Writes `plan` in the form `engine` reads, whole or not at all.

    Args:
        plan: to write.
        engine: a name of `engine_names()`.
        path: of the file.
        options: the format's own (see the `write` method of its exporter).

    Returns:
        The path.

    Raises:
        InputError: unknown engine or option.
        UnsupportedError: the engine cannot express the plan; see `check_export`.
    """
    exporter = exporter_named(engine)
    _check_options(exporter, options)
    check_export(plan, engine)
    exporter.write(plan, Path(path), **options)
    return Path(path)


def check_export(plan: Plan, engine: str) -> None:
    """Checks that the engine can express the plan.

    Raises:
        InputError: unknown engine.
        UnsupportedError: it cannot; names every constraint broken, what to change, and the versions meant.
    """
    exporter = exporter_named(engine)
    broken = violations(plan, exporter.constraints)
    if broken:
        raise UnsupportedError(f"{engine} cannot express this plan ({exporter.requires}): {'; '.join(broken)}")


def read_exported(path: str | Path, engine: str, model: ModelSpec, topology: Topology) -> Plan:
    """Reads an engine's file back into a plan of `model` on `topology`. The file is untrusted: it is checked
    throughout.

    Args:
        path: of the file.
        engine: a name of `engine_names()`.
        model: that the file is for.
        topology: that the file is for.

    Returns:
        The plan; its shares are equal, except from moeplace's own file.

    Raises:
        InputError: unknown engine, no such file.
        FileFormatError: not that engine's file, or not one of that model on that topology; the layer and field are
            named.
    """
    return exporter_named(engine).read(Path(path), model, topology)


def engine_constraints(engine: str) -> frozenset[Constraint]:
    """What a plan for that engine must keep to."""
    return exporter_named(engine).constraints


def engine_usage(plan: Plan, engine: str, path: str | Path) -> str:
    """How to start the engine with the exported file: the options this plan needs."""
    return exporter_named(engine).usage(plan, Path(path))


def _check_options(exporter: Exporter, options: dict[str, Any]) -> None:
    known = set(inspect.signature(exporter.write).parameters) - {"plan", "path"}
    for name in options:
        if name not in known:
            listed = nearest(name, known) if known else "it takes none"
            raise InputError(f"export to {exporter.name!r} has no option {name!r}; {listed}")
