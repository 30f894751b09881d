"""The contract between `export_plan` and the engines: write a file, read it back, say what the engine needs."""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..._tensor_files import load_plain
from ..._types import IntArray
from ...placement.engines import EngineProfile
from ...placement.errors import FileFormatError, InputError, UnsupportedError
from ...placement.files import no_file, parse_json, parse_yaml, read_text
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from ...placement.topology import Topology

FILE_LIMIT = 1 << 24
"""Bytes a placement file may have; DeepSeek-V3's with 512 slots takes 120 KB."""
DEEPEST = 6
"""Collections inside one another that a placement file needs, within TensorRT-LLM's options."""
OPTIONS = ("moe_config", "load_balancer")
"""Where TensorRT-LLM's own options (--extra_llm_api_options) hold a placement, or name its file."""


# What a file holds, as plain data, whichever engine's it is.


def load_content(path: Path) -> Any:
    """What a placement file holds: of `torch.save` (tensors as they are), JSON, or YAML; told apart by how it begins.
    Of TensorRT-LLM's options, the placement in them.

    Raises:
        InputError: no such file, or options that name another. FileFormatError: too large, damaged, none of them, or
            nested too deep.
    """
    if not path.is_file():
        raise no_file(path)
    with path.open("rb") as handle:
        start = handle.read(64)
    if start.startswith(b"PK"):
        if path.stat().st_size > FILE_LIMIT:
            raise FileFormatError(f"{path}: {path.stat().st_size:,} bytes, at most {FILE_LIMIT:,} are read")
        return load_plain(path)
    text = read_text(path, limit_bytes=FILE_LIMIT)
    if text.lstrip()[:1] in ("{", "["):
        try:
            return _placement(parse_json(text, str(path)), path)
        except FileFormatError:
            # Bare keys are YAML's, which may begin like JSON.
            if text.lstrip()[0] == "[":
                raise
    return _placement(parse_yaml(text, str(path), DEEPEST), path)


def _placement(content: Any, path: Path) -> Any:
    for name in OPTIONS:
        if isinstance(content, dict) and isinstance(content.get(name), dict | str):
            content = content[name]
            if isinstance(content, str):
                raise InputError(f"{path}: {name} is the file {content[:200]}; give that one")
    return content


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


def plan_of_rows(rows: Sequence[list[int]], origin: str, model: ModelSpec, topology: Topology, **more: Any) -> Plan:
    """The plan of one checked row a MoE layer, its slots dealt to devices in equal runs. more: fields of the plan.

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
            **more,
        )
    except InputError as error:
        raise FileFormatError(f"{origin}: {error}") from None


# What is written.


MOST_LAYERS = 65_536
"""Far more than any model has: a larger number is a slip."""


def check_layer_count(name: str, count: int) -> None:
    """Raises InputError for more layers than any model has."""
    if count > MOST_LAYERS:
        raise InputError(f"{name} ({count}) must be at most {MOST_LAYERS}, which is more layers than any model has")


def model_rows(plan: Plan, table: IntArray, hidden_layers: int | None) -> IntArray:
    """[layers of the model, P] the table [L, P], and slot i mod E in the layers that the plan does not know.

    hidden_layers: of the model; default up to the last MoE layer.

    Raises:
        InputError: fewer than the plan's layers need.
    """
    count = plan.moe_layers[-1] + 1 if hidden_layers is None else hidden_layers
    if count <= plan.moe_layers[-1]:
        raise InputError(f"hidden_layers ({count}) must exceed the last MoE layer's index ({plan.moe_layers[-1]})")
    check_layer_count("hidden_layers", count)
    rows = np.tile(np.arange(table.shape[1]) % plan.model.experts, (count, 1))
    rows[list(plan.moe_layers)] = table
    return rows


def tensor_file(name: str, **arrays: Any) -> bytes:
    """A dict of tensors as `torch.save` writes it.

    Raises:
        UnsupportedError: torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise UnsupportedError(f"writing {name} needs torch; pip install 'moeplace[torch]'") from None
    file = io.BytesIO()
    torch.save({key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}, file)
    return file.getvalue()


# How to use it: whole commands.


def quoted(word: object) -> str:
    """The word as a shell takes it."""
    return shlex.quote(str(word))


@dataclass(frozen=True)
class Usage:
    """How a file gets to its engine.

    commands: one a node. needs: what else must be there. files: which nodes read the file, in words. applied: how to
    see that it was. back: how to undo it. notes: what to know besides.
    """

    commands: Sequence[str]
    files: str
    applied: str
    back: str
    needs: str = ""
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Commands first, then a line each."""
        many = len(self.commands) > 1
        lines = [f"# node {node}\n{line}" if many else line for node, line in enumerate(self.commands)]
        entries = {"Needs": self.needs, "File": self.files, "Applied": self.applied, "Roll back": self.back}
        return "\n".join([*lines, *(f"{name}: {text}" for name, text in entries.items() if text), *self.notes])


def every_node(path: Path, plan: Plan) -> str:
    """Which nodes need the file."""
    nodes = plan.topology.num_nodes
    where = "the machine" if nodes == 1 else f"all {nodes} nodes"
    return f"{quoted(path)} must be readable under this path on {where}."


def checked(running: str) -> str:
    """How to see that the plan runs. running: what `moeplace check` takes."""
    return f"`moeplace check PLAN --running {running}` compares what runs with the plan."


class Exporter(Protocol):
    """One engine's file format. Instances are stateless.

    `content(plan, *, <options>) -> str | bytes` gets a plan that keeps to the profile's constraints; the options are
    keyword arguments of `export_plan`. An option `suffix` is the file's own, for an engine that tells formats by it.
    `read(path, model, topology) -> Plan` takes an untrusted file and raises FileFormatError. An exporter that also has
    `recognises(content) -> bool`, given what the file holds as plain data, is found by `read_plan_file`.
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

    @property
    def usage(self) -> Callable[..., str]:
        """`usage(plan, path, model_path)`: whole commands that give the file to the engine, with the options this very
        plan needs. model_path: what the engine serves."""
        ...
