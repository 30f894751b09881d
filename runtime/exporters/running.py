"""The map that an engine runs with, against itself and against the plan it should be: the fault behind answers that
are wrong in silence is a map that is not the one the weights were loaded by.

Dumps read (plain data, of any file that `load_content` takes):

- SGLang's recorder in modes per_pass and per_token: `last_physical_to_logical_map`, a row a layer of the model.
- SGLang's own placement file, or a tensor file of its map: `physical_to_logical_map`, a row a layer of the model.
- vLLM: rows of MoE layers, a record of pull request 41141 (`p2l_map` of its load statistics, or its mapping).
- vLLM-Ascend's `expert_map_record_path`, and TensorRT-LLM's load balancer, as their placement files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..._tensor_files import array_of
from ..._types import IntArray
from ...placement.documents import parse_json
from ...placement.engines import engine_profile
from ...placement.errors import FileFormatError
from ...placement.files import no_file
from ...placement.model import MOST_EXPERTS, MOST_LAYERS, ModelSpec
from ...placement.plan import Plan
from .base import FILE_LIMIT, load_content
from .sglang import KEY, with_lost_ranks
from .trtllm import ASSIGNMENTS, assigned_layers
from .vllm import RECORD, map_rows

LAST = "last_physical_to_logical_map"
SHOWN = 8
"""Experts or slots that a finding names."""


@dataclass(frozen=True)
class Finding:
    """What is wrong. kind: for programs. layer: the model's number of it, None for all. text: for people."""

    kind: str
    layer: int | None
    text: str


def read_running(path: str | Path, model: ModelSpec) -> dict[int, list[int]]:
    """The expert in each slot of each MoE layer, as a dump has them.

    Raises:
        InputError: no such file. FileFormatError: no such dump, rows that are not the model's; says which.
    """
    source = Path(path)
    rows, engine = _rows(_last_line(source) if source.suffix == ".jsonl" else load_content(source), source)
    if not isinstance(rows, list | dict):
        raise FileFormatError(f"{source}: a {type(rows).__name__}, expected rows of experts")
    if not isinstance(rows, dict):
        counted = engine_profile(engine).layer_rows == "model"
        last = model.moe_layers[-1]
        if len(rows) <= last if counted else len(rows) != model.layers:
            raise FileFormatError(
                f"{source}: {len(rows)} rows, {engine} has one for each "
                + (f"of at least {last + 1} layers, dense ones counted" if counted else f"of {model.layers} MoE layers")
                + ": of another model, of a stage of a pipeline, or numbered as another engine does"
            )
        rows = {layer: rows[layer if counted else index] for index, layer in enumerate(model.moe_layers)}
    missing = [layer for layer in model.moe_layers if layer not in rows]
    if missing:
        raise FileFormatError(f"{source}: no row for MoE layer {missing[0]} ({len(missing)} missing)")
    return {layer: _whole(rows[layer], f"{source}: layer {layer}") for layer in model.moe_layers}


def check_map(
    rows: Mapping[int, Sequence[int]], experts: int, devices: int, lost: Collection[int] = ()
) -> list[Finding]:
    """What is wrong with a map whatever was meant: an expert missing, unknown or twice on a rank, slots that do not
    divide over ranks, layers of different length. lost: ranks whose slots nothing runs in."""
    findings = []
    widths = {len(row) for row in rows.values()}
    if len(widths) > 1:
        findings.append(Finding("lengths", None, f"layers have from {min(widths)} to {max(widths)} slots"))
    for layer, row in rows.items():
        table = np.asarray(row)
        unknown = sorted(set(table[(table < 0) | (table >= experts)].tolist()))
        missing = np.setdiff1d(np.arange(experts), table).tolist()
        if unknown:
            text = f"layer {layer} holds {some(unknown)}, experts are 0 to {experts - 1}"
            findings.append(Finding("unknown", layer, text))
        if missing:
            findings.append(Finding("missing", layer, f"layer {layer} has no slot for expert {some(missing)}"))
        if len(row) % devices:
            text = f"layer {layer}: {len(row)} slots do not divide over {devices} ranks"
            findings.append(Finding("divide", layer, text))
            continue
        for rank, ids in enumerate(table.reshape(devices, -1)):
            values, counts = np.unique(ids, return_counts=True)
            if (counts > 1).any() and rank not in lost:
                text = f"layer {layer}: rank {rank} holds expert {some(values[counts > 1].tolist())} more than once"
                findings.append(Finding("twice", layer, text))
    return findings


def compare_map(rows: Mapping[int, Sequence[int]], plan: Plan) -> list[Finding]:
    """Where a running map is not the plan's: rows of another layer, or experts on other devices. Slots exchanged inside
    a device change nothing, and are no finding."""
    devices = plan.topology.num_devices
    slots = plan.slots_per_device[0]
    masked = len(set(slots[slots > 0].tolist())) == 1 and not slots.all()
    planned = dict(zip(plan.moe_layers, with_lost_ranks(plan) if masked else plan.physical_to_logical, strict=True))
    findings, offsets = [], []
    for layer, expected in planned.items():
        row = np.asarray(rows[layer])
        if len(row) != len(expected):
            text = f"layer {layer} runs with {len(row)} slots, the plan has {len(expected)}"
            findings.append(Finding("slots", layer, text))
        elif not _same(row, expected, devices):
            twin = next((other for other, its in planned.items() if other != layer and _same(row, its, devices)), None)
            if twin is not None:
                offsets.append(layer - twin)
                findings.append(Finding("other layer", layer, f"layer {layer} runs the plan's map of layer {twin}"))
                continue
            slot = int(np.flatnonzero(row != expected)[0])
            findings.append(
                Finding(
                    "experts",
                    layer,
                    f"layer {layer}: {(row != expected).sum()} of {len(row)} slots differ, as slot {slot} (rank "
                    f"{slot * devices // len(row)}): expert {row[slot]} runs, {expected[slot]} is planned",
                )
            )
    if len(offsets) > 1 and len(set(offsets)) == 1:
        text = (
            f"{len(offsets)} layers run the map of a layer {abs(offsets[0])} {'before' if offsets[0] > 0 else 'after'}"
        )
        text += ": rows of the file and layers of the engine are counted otherwise (dense layers counted or not)"
        findings.insert(0, Finding("shifted", None, text))
    if findings and all(np.array_equal(row, np.arange(len(row)) % plan.model.experts) for row in rows.values()):
        findings.insert(0, Finding("not applied", None, "every layer runs the default map: the plan was not applied"))
    return findings


def compare_settings(info: Mapping[str, Any], plan: Plan) -> list[Finding]:
    """What SGLang's /server_info says against what the plan needs; what it does not say is not looked at."""
    redundant = plan.num_slots - plan.model.experts
    texts = [
        f"the server runs with {name} {info[name]}, the plan is for {expected}"
        for name, expected in (("ep_size", plan.topology.num_devices), ("ep_num_redundant_experts", redundant))
        if name in info and info[name] != expected
    ]
    if redundant and "moe_a2a_backend" in info and info["moe_a2a_backend"] in (None, "none"):
        texts.append("the server has no --moe-a2a-backend: with replicas older releases answer wrongly")
    if info.get("enable_eplb"):
        texts.append("the server rebalances by itself (--enable-eplb), away from any plan")
    if "init_expert_location" in info and info["init_expert_location"] in (None, "trivial"):
        texts.append("the server was started without --init-expert-location")
    return [Finding("settings", None, text) for text in texts]


def _rows(content: Any, path: Path) -> tuple[Any, str]:
    """Rows of a dump's content, by layer number or in order, and the engine that numbers them so."""
    if isinstance(content, dict):
        for name in (LAST, KEY):
            if name in content:
                value = content[name]
                return (value if isinstance(value, list) else array_of(path, name, value, 2).tolist()), "sglang"
        if "p2l_map" in content:
            return content["p2l_map"], "vllm"
        if "layer_list" in content:
            return _ascend_rows(content, path), "vllm-ascend"
        if content.get("record_type") == RECORD:
            return map_rows(content, path), "vllm"
        if isinstance(content.get(ASSIGNMENTS), dict):
            return assigned_layers(content[ASSIGNMENTS], f"{path}: {ASSIGNMENTS}"), "trtllm"
        fields = ", ".join(sorted(map(str, content))[:5])
        raise FileFormatError(
            f"{path}: an object with {fields or 'nothing in it'}, no map that runs; SGLang's recorder writes one in "
            "modes per_pass and per_token"
        )
    if isinstance(content, list) and content:
        return content, "vllm"
    raise FileFormatError(f"{path}: a {type(content).__name__}, expected rows of experts")


def _ascend_rows(content: dict[str, Any], path: Path) -> list[Any]:
    try:
        return [
            [expert for device in layer["device_list"] for expert in device["device_expert"]]
            for layer in content["layer_list"]
        ]
    except (TypeError, KeyError):
        raise FileFormatError(f"{path}: layer_list must hold device_list with device_expert each") from None


def _last_line(path: Path) -> Any:
    """The last record of a file with a JSON object a line that has a map."""
    if not path.is_file():
        raise no_file(path)
    last = None
    with path.open("rb") as handle:
        while line := handle.readline(FILE_LIMIT + 1):
            if len(line) > FILE_LIMIT:
                raise FileFormatError(f"{path}: a line of more than {FILE_LIMIT:,} bytes")
            if b"p2l_map" in line or RECORD.encode() in line:
                last = line
    if last is None:
        raise FileFormatError(f"{path}: no line has p2l_map, as vLLM's load statistics have")
    return parse_json(last, str(path))


def _whole(row: Any, origin: str) -> list[int]:
    most = MOST_EXPERTS
    if not isinstance(row, list) or not 0 < len(row) <= most * 2 or any(type(expert) is not int for expert in row):
        raise FileFormatError(f"{origin}: expected a list of expert ids")
    if any(abs(expert) > most * MOST_LAYERS for expert in row):
        raise FileFormatError(f"{origin}: ids beyond any model's")
    return row


def _same(row: IntArray, expected: IntArray, devices: int) -> bool:
    """Whether every device holds the same experts."""
    if len(row) != len(expected) or len(row) % devices:
        return False
    return bool((np.sort(row.reshape(devices, -1)) == np.sort(expected.reshape(devices, -1))).all())


def some(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:SHOWN]))
    return shown if len(values) <= SHOWN else f"{shown} and {len(values) - SHOWN} more"
