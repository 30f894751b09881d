"""The entry points: every engine, check a plan against it, write its file, read it back.

A new format is a file and a line here, or an entry point "moeplace.exporters" of another package.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..._arguments import check_types
from ..._plugins import Registry
from ...placement.engines import Constraint, check_plan, engine_profile
from ...placement.errors import FileFormatError, InputError, nearest
from ...placement.files import write_bytes
from ...placement.model import ModelSpec
from ...placement.plan import FORMAT, Plan, plan_to_dict
from ...placement.topology import Topology
from .base import Exporter, load_content
from .sglang import SGLang, SGLangShares
from .trtllm import TensorRTLLM
from .vllm import VLLM
from .vllm_ascend import VLLMAscend


class MoeplaceJson:
    """What `Plan.save` writes. Any plan fits."""

    name = "moeplace"
    profile = engine_profile("moeplace")

    def content(self, plan: Plan) -> str:
        return json.dumps(plan_to_dict(plan), allow_nan=False)

    def read(self, path: Path, model: ModelSpec, topology: Topology) -> Plan:
        """Reads a plan file, which must be for that model and topology.

        Raises:
            FileFormatError: see `Plan.load`. InputError: the plan is for another model or topology.
        """
        plan = Plan.load(path)
        for field, expected, stored in (("model", model, plan.model), ("topology", topology, plan.topology)):
            if expected != stored:
                raise InputError(
                    f"{path}: this plan is for another {field} ({_short(stored)}) than the one given "
                    f"({_short(expected)}); Plan.load reads it with its own"
                )
        return plan

    def recognises(self, content: Any) -> bool:
        return isinstance(content, dict) and content.get("format") == FORMAT

    def usage(self, plan: Plan, path: Path, model_path: str = "MODEL") -> str:
        return f"mp.Plan.load({str(path)!r})"


def _short(record: ModelSpec | Topology) -> str:
    if isinstance(record, ModelSpec):
        return f"{record.layers} layers, {record.experts} experts, top-{record.top_k}"
    return f"{record.num_devices} devices in {record.num_nodes} nodes, {record.name}"


EXPORTERS: Registry[Exporter] = Registry(
    "engine",
    "moeplace.exporters",
    ("name", "profile", "content", "read", "usage"),
    MoeplaceJson(),
    SGLang(),
    SGLangShares(),
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


@check_types
def read_plan_file(
    path: str | Path, model: ModelSpec | None = None, topology: Topology | None = None, engine: str | None = None
) -> Plan:
    """Reads a plan from moeplace's file or an engine's own, told by what it holds.

    Args:
        path: of the file, which is untrusted: it is checked throughout.
        model: that an engine's file is for; moeplace's says itself.
        topology: that an engine's file is for; moeplace's says itself.
        engine: whose file it is, where that is known.

    Returns:
        The plan. One from an engine's file is that engine's: what asks about it keeps to what the engine runs.

    Raises:
        InputError: no such file, or an engine's without model or topology.
        FileFormatError: no engine's file, or damaged, or not of that model on that topology; layer and field are named.
    """
    source = Path(path)
    exporter = exporter_named(engine) if engine is not None else recognised(source)
    if exporter.name == "moeplace":
        return Plan.load(source)
    if model is None or topology is None:
        missing = " and ".join(name for name, value in (("model", model), ("topology", topology)) if value is None)
        raise InputError(
            f"{source} is {exporter.name}'s own file, which does not say its {missing}; give that too "
            "(--plan-model, --plan-topology; in Python model=, topology=)"
        )
    plan = exporter.read(source, model, topology)
    return replace(plan, provenance=replace(plan.provenance, engine=exporter.name))


def recognised(path: Path) -> Exporter:
    """The exporter whose file this is, told by what it holds.

    Raises:
        InputError: no such file. FileFormatError: damaged, or no engine's; says what it holds.
    """
    content = load_content(path)
    for exporter in EXPORTERS:
        recognises = getattr(exporter, "recognises", None)
        if recognises is not None and recognises(content):
            return exporter
    if isinstance(content, dict):
        description = f"an object with {', '.join(sorted(map(str, content))[:5]) or 'nothing in it'}"
        description += "; those are loads, `moeplace import` reads them" if "logical_count" in content else ""
    else:
        description = f"a {type(content).__name__}"
    raise FileFormatError(f"{path} holds {description}: no plan of {', '.join(engine_names())}")


def engine_constraints(engine: str) -> frozenset[Constraint]:
    """What a plan for that engine must keep to."""
    return engine_profile(engine).constraints


def engine_usage(plan: Plan, engine: str, path: str | Path, model_path: str = "MODEL") -> str:
    """How to give the exported file to the engine: whole commands with the options this plan needs, which nodes read
    the file, how to see that it was applied, and how to undo it. model_path: what the engine serves."""
    return exporter_named(engine).usage(plan, Path(path), model_path)


def _check_options(exporter: Exporter, options: dict[str, Any]) -> None:
    known = _options(exporter)
    for name in options:
        if name not in known:
            takers = [engine for engine in engine_names() if name in _options(exporter_named(engine))]
            hint = f"it is for {', '.join(takers)}; leave it out" if takers else nearest(name, known or {"none"})
            raise InputError(f"export to {exporter.name!r} has no option {name!r}; {hint}")


def _options(exporter: Exporter) -> set[str]:
    return set(inspect.signature(exporter.content).parameters) - {"plan", "suffix"}
