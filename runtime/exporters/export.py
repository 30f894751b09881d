"""The entry points: every engine, check a plan against it, write its file, read it back.

A new format is a file and a line here, or an entry point "moeplace.exporters" of another package.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from ..._arguments import check_types
from ..._plugins import Registry
from ...placement.engines import Constraint, check_plan, engine_profile
from ...placement.errors import InputError, nearest
from ...placement.files import write_bytes
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from ...placement.topology import Topology
from .base import Exporter
from .moeplace_json import MoeplaceJson
from .sglang import SGLang
from .trtllm import TensorRTLLM
from .vllm import VLLM
from .vllm_ascend import VLLMAscend

EXPORTERS: Registry[Exporter] = Registry(
    "engine",
    "moeplace.exporters",
    ("name", "profile", "content", "read", "usage"),
    MoeplaceJson(),
    SGLang(),
    VLLM(),
    VLLMAscend(),
    TensorRTLLM(),
)


def engine_names() -> tuple[str, ...]:
    """Names accepted by `export_plan`."""
    return EXPORTERS.names


def exporter_named(engine: str) -> Exporter:
    """The exporter of that engine, built in or plugged in.

    Raises:
        InputError: unknown engine (the nearest is told), or a plug-in that does not load.
    """
    return EXPORTERS.named(engine)


@check_types
def export_plan(plan: Plan, engine: str, path: str | Path, **options: Any) -> Path:
    """Writes `plan` in the form `engine` reads, whole or not at all.

    Args:
        plan: to write.
        engine: a name of `engine_names()`.
        path: of the file.
        options: the format's own (see the `content` method of its exporter).

    Returns:
        The path.

    Raises:
        InputError: unknown engine or option.
        UnsupportedError: the engine cannot express the plan; see `check_export`.
    """
    write_bytes(path, export_bytes(plan, engine, suffix=Path(path).suffix, **options))
    return Path(path)


def export_bytes(plan: Plan, engine: str, *, suffix: str = "", **options: Any) -> bytes:
    """What `export_plan` writes. suffix: of the file's name, by which some engines tell formats.

    Raises:
        InputError, UnsupportedError: as `export_plan`.
    """
    exporter = exporter_named(engine)
    _check_options(exporter, options)
    check_export(plan, engine)
    if suffix and "suffix" in inspect.signature(exporter.content).parameters:
        options["suffix"] = suffix
    content = exporter.content(plan, **options)
    return content.encode() if isinstance(content, str) else content


@check_types
def check_export(plan: Plan, engine: str) -> None:
    """Checks that the engine can express the plan; the engine `permute` is a permuted checkpoint.

    Raises:
        InputError: unknown engine.
        UnsupportedError: it cannot; names every constraint broken, what to change, and the versions meant.
    """
    check_plan(plan, engine)


@check_types
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
    return engine_profile(engine).constraints


def engine_usage(plan: Plan, engine: str, path: str | Path) -> str:
    """How to start the engine with the exported file: the options this plan needs."""
    return exporter_named(engine).usage(plan, Path(path))


def _check_options(exporter: Exporter, options: dict[str, Any]) -> None:
    known = set(inspect.signature(exporter.content).parameters) - {"plan", "suffix"}
    for name in options:
        if name not in known:
            listed = nearest(name, known) if known else "it takes none"
            raise InputError(f"export to {exporter.name!r} has no option {name!r}; {listed}")
