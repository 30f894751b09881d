"""What an engine runs with: its map, against itself and against the plan it should be, and the weights in its slots,
against a checkpoint. The fault behind answers that are wrong in silence is a map that is not the one the weights were
loaded by.

Maps read (plain data, of any file that `load_content` takes):

- SGLang's recorder in modes per_pass and per_token: `last_physical_to_logical_map`, a row a layer of the model.
- SGLang's own placement file, or a tensor file of its map: `physical_to_logical_map`, a row a layer of the model.
- vLLM: rows of MoE layers, a record of pull request 41141 (`p2l_map` of its load statistics, or its mapping).
- vLLM-Ascend's `expert_map_record_path`, and TensorRT-LLM's load balancer, as their placement files.

A map may be sound and the plan's, and the weights in its slots those of another expert, or of another layer. No engine
says which expert's weights a slot holds, and no two keep them alike: gate and up joined or exchanged, matrices
transposed, blocks shuffled for a kernel. So a slot is known by how often each bit pattern occurs in its weights, which
none of that changes; what is computed anew at loading (quantised, scaled, packed otherwise) is told apart from what is
wrong by matching no expert at all.

Weights read: a folder with one of

- files that `write_expert_fingerprints` writes inside the engine, one a rank;
- an engine's own sharded state, `model-rank-<rank>-part-<n>.safetensors`, as SGLang's `Engine.save_sharded_model` and
  vLLM's `save_sharded_state` write it: tensors of the model's layers with a slot a row.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..._arguments import check_types
from ..._tensor_files import array_of
from ..._types import IntArray
from ...placement.engines import engine_profile
from ...placement.errors import FileFormatError, InputError, UnsupportedError
from ...placement.files import no_file, parse_json, write_text
from ...placement.model import MOST_EXPERTS, MOST_LAYERS, ModelSpec
from ...placement.plan import Plan
from ..permute.checkpoint import (
    DTYPE_BITS,
    StoredTensor,
    checkpoint_model,
    json_object,
    read_header,
    read_weight_headers,
    tensor_roles,
)
from .base import FILE_LIMIT, load_content
from .sglang import KEY, with_lost_ranks
from .trtllm import ASSIGNMENTS, assigned_layers
from .vllm import RECORD, map_rows

if TYPE_CHECKING:
    import torch


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


# Weights, slot by slot.

SCHEMA = "moeplace/expert-weights/1"
FILE = "expert-weights-rank-{rank}.json"
Fingerprints: TypeAlias = "dict[int, dict[str, list[str]]]"
"""By layer, by kind of tensor ("weight/2": weights of two bytes), one for each slot or expert."""

CHUNK = 1 << 20
"""Elements counted at once."""
_ROUTED = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.(?:.+\.)?experts\.(.+)")
_RANK = re.compile(r"rank-?(\d{1,6})")
_NO_WEIGHTS = re.compile(r"shared|input_scale|input_global_scale|act_scale|g_idx|indices|router|e_score|expert_map")
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
_NORMS = re.compile(r"norm\.(?:weight|bias)$")


@check_types
def write_expert_fingerprints(model: torch.nn.Module, folder: str | Path, rank: int | None = None) -> Path:
    """Writes what tells the experts' weights in this rank's slots apart, from inside an engine's process.

    Of each layer's routed experts (parameters below `layers.N...experts`, a slot a row) 16 hex digits a slot and kind
    of tensor: kilobytes a rank, whatever the model's size. Every rank calls it with a folder that all of them reach, or
    the files are brought together afterwards.

    Args:
        model: the rank's model, as the engine holds it. folder: where the rank's file goes. rank: among those that
            share the experts; that of torch.distributed where it is not said.

    Returns:
        The file.

    Raises:
        InputError: the model has no layer with routed experts.

    Example:
        >>> llm.apply_model(partial(mp.write_expert_fingerprints, folder="/shared/weights"))  # doctest: +SKIP
    """
    import torch

    if rank is None:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    histograms: dict[tuple[int, str], IntArray] = {}
    for name, tensor in model.named_parameters():
        place = _place(name, tuple(tensor.shape), tensor.element_size())
        if place is None:
            continue
        # Engines' own kinds of parameters are plain tensors underneath.
        plain = tensor.detach().as_subclass(torch.Tensor)
        rows = [_torch_histogram(slot, plain.element_size()) for slot in plain]
        _add(histograms, place, np.stack(rows))
    if not histograms:
        raise InputError("no parameter below 'layers.N...experts' has a slot a row; which module holds the experts?")
    path = Path(folder) / FILE.format(rank=rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    layers: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for (layer, kind), counts in histograms.items():
        layers[str(layer)][kind] = [_digest(count) for count in counts]
    write_text(path, json.dumps({"schema": SCHEMA, "rank": rank, "layers": layers}))
    return path


class VllmWorkerExtension:
    """For `vllm serve --worker-extension-cls moeplace.runtime.exporters.running.VllmWorkerExtension`: the
    workers of a server that runs in development mode (VLLM_SERVER_DEV_MODE=1) then write their fingerprints on
    `POST /collective_rpc` with {"method": "write_expert_fingerprints", "kwargs": {"folder": "/shared/weights"}}."""

    def write_expert_fingerprints(self, folder: str) -> str:
        model: torch.nn.Module = self.get_model()  # type: ignore[attr-defined]  # vLLM's Worker, which this is mixed into
        return str(write_expert_fingerprints(model, folder))


def read_weights(folder: str | Path, layers: Sequence[int]) -> tuple[Fingerprints, int]:
    """The fingerprints of a dump's slots in order of ranks, for those of `layers` that it has, and how many ranks.

    Raises:
        InputError: no such folder. FileFormatError: no dump, or a damaged one; ranks missing or of different sizes.
    """
    source = Path(folder)
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; a dump of weights is one, with a file or more for each rank")
    written = sorted(source.glob(FILE.format(rank="*")))
    stored = sorted(source.glob("*.safetensors"))
    if not written and not stored:
        raise FileFormatError(
            f"{source}: neither {FILE.format(rank='<rank>')} nor model-rank-<rank>-part-<n>.safetensors; "
            "write_expert_fingerprints writes the first inside an engine, SGLang and vLLM write their sharded state"
        )
    parts = _written_ranks(written) if written else _stored_ranks(stored, set(layers))
    by_layer: dict[int, dict[int, dict[str, list[str]]]] = defaultdict(dict)
    for rank, layer, prints in parts:
        if layer in layers:
            by_layer[layer].setdefault(rank, {}).update(prints)
    if not by_layer:
        raise FileFormatError(f"{source}: no experts of the model's layers {layers[0]} to {layers[-1]} in it")
    ranks = {len(of_ranks) for of_ranks in by_layer.values()}
    if len(ranks) > 1:
        raise FileFormatError(
            f"{source}: from {min(ranks)} to {max(ranks)} ranks hold a layer; is a rank's file missing?"
        )
    result: Fingerprints = {}
    for layer, of_ranks in sorted(by_layer.items()):
        ordered = [of_ranks[rank] for rank in sorted(of_ranks)]
        shapes = {tuple(sorted((kind, len(slots)) for kind, slots in prints.items())) for prints in ordered}
        if len(shapes) > 1:
            raise FileFormatError(
                f"{source}: layer {layer}: ranks hold different tensors, or different numbers of slots"
            )
        result[layer] = {kind: [slot for prints in ordered for slot in prints[kind]] for kind in ordered[0]}
    return result, ranks.pop()


def reference_weights(
    path: str | Path, model: ModelSpec, layers: Sequence[int], progress: Callable[[int, int], None] | None = None
) -> Fingerprints:
    """The fingerprints of each layer's experts, by expert: of a Transformers checkpoint, or a dump of the same engine
    that runs experts in their default places (slot s holds expert s), for an engine that stores them in its own way.

    Args:
        path: the folder. model: of the map. layers: those to read. progress: called with layers read and in all.

    Raises:
        InputError, FileFormatError, UnsupportedError: no such folder, not this model's, or tensors that are not clear.
    """
    source = Path(path)
    if source.is_dir() and not (source / "config.json").is_file():
        prints, _ = read_weights(source, layers)
        short = [
            layer for layer, kinds in prints.items() if any(len(slots) < model.experts for slots in kinds.values())
        ]
        if short:
            raise FileFormatError(f"{source}: layer {short[0]} has fewer than {model.experts} slots: of another model")
        return {
            layer: {kind: slots[: model.experts] for kind, slots in kinds.items()} for layer, kinds in prints.items()
        }
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; a checkpoint's is expected, or a dump of weights")
    reading, mtp_layers = checkpoint_model(source)
    spec = ModelSpec(**reading.fields)
    if (spec.experts, spec.moe_layers) != (model.experts, model.moe_layers):
        raise InputError(
            f"{source}: of another model: {spec.experts} experts in layers {spec.moe_layers[0]} to "
            f"{spec.moe_layers[-1]}, the map's has {model.experts} in {model.moe_layers[0]} to {model.moe_layers[-1]}"
        )
    tensors = [tensor for header in read_weight_headers(source) for tensor in header.tensors]
    roles = tensor_roles(tensors, spec, reading, mtp_layers)
    by_layer: dict[int, list[tuple[StoredTensor, int]]] = defaultdict(list)
    for tensor in tensors:
        role = roles[tensor.name]
        if role is not None and role.kind in ("expert", "fused") and role.layer in layers:
            by_layer[role.layer].append((tensor, role.expert))
    result: Fingerprints = {}
    for done, (layer, own) in enumerate(sorted(by_layer.items())):
        histograms: dict[tuple[int, str], IntArray] = {}
        for tensor, expert in own:
            kind = _kind(tensor.name, DTYPE_BITS[tensor.dtype] // 8)
            if kind is None or (expert < 0 and tensor.nbytes % spec.experts) or expert >= spec.experts:
                continue
            counts = histograms.setdefault((layer, kind), _empty(spec.experts, kind))
            if expert >= 0:
                counts[expert] += _histogram(_bytes(tensor), kind)
            else:
                for row, raw in enumerate(_bytes(tensor).reshape(spec.experts, -1)):
                    counts[row] += _histogram(raw, kind)
        result[layer] = {kind: [_digest(row) for row in counts] for (_, kind), counts in histograms.items()}
        if progress is not None:
            progress(done + 1, len(by_layer))
    return result


def check_weights(
    rows: Mapping[int, Sequence[int]], weights: Fingerprints, reference: Fingerprints | None, experts: int
) -> tuple[list[Finding], list[str]]:
    """Where the weights in slots are not those of the experts that the map has there.

    Without a reference: slots of one expert that differ, slots of different experts that do not, layers that hold the
    same weights. With one: slots with another expert's weights, another layer's, or no expert's.

    Args:
        rows: the expert in each slot, by layer. weights: as `read_weights` gives them. reference: as
            `reference_weights` does. experts: how many the model has a layer.

    Returns:
        What is wrong, and what could not be compared.

    Raises:
        FileFormatError: the dump has other slots than the map. UnsupportedError: no weights of the reference occur in
            the engine at all: it stores them in another form.
    """
    for layer, kinds in weights.items():
        for slots in kinds.values():
            if len(slots) != len(rows[layer]):
                raise FileFormatError(
                    f"layer {layer}: the dump has {len(slots)} slots, the map {len(rows[layer])}: of another run, "
                    "ranks missing, or shared experts among them"
                )
    if reference is None:
        return _within(rows, weights), []
    owners: dict[tuple[str, str], tuple[int, int]] = {}
    for layer, kinds in reference.items():
        for kind, prints in kinds.items():
            for expert, fingerprint in enumerate(prints):
                owners.setdefault((kind, fingerprint), (layer, expert))
    present = Counter(
        kind
        for kinds in weights.values()
        for kind, slots in kinds.items()
        for fingerprint in slots
        if (kind, fingerprint) in owners
    )
    kinds_run = sorted({kind for kinds in weights.values() for kind in kinds})
    compared = [kind for kind in kinds_run if present[kind]]
    if not any(kind.startswith("weight/") for kind in compared):
        raise UnsupportedError(
            f"no slot holds any expert's weights as the reference has them ({', '.join(kinds_run)}): the engine stores "
            "them in another form (quantised, scaled or packed at loading), or they are of another model. Give a dump "
            "of the same engine without a plan, in which slot s holds expert s, as the reference"
        )
    notes = [
        f"{kind}: stored in another form than in the reference, compared among the slots alone"
        for kind in kinds_run
        if kind not in compared
    ]
    left = [layer for layer in weights if layer not in reference]
    if left:
        notes.append(f"layers {some(left)} are not in the reference, and were compared among the slots alone")
    findings = _within(rows, weights)
    if _default_places(rows, weights, owners, compared, experts):
        findings.insert(
            0,
            Finding(
                "weights", None, "every slot holds the expert of the default map: the weights did not move with it"
            ),
        )
    for layer in weights:
        if layer in reference:
            findings += _against(layer, rows[layer], weights[layer], reference[layer], owners, compared)
    return findings, notes


def fits(rows: Mapping[int, Sequence[int]], weights: Fingerprints, reference: Fingerprints) -> bool:
    """Whether every slot holds the weights of its expert."""
    return all(
        reference.get(layer, {}).get(kind, [])[expert : expert + 1] == [fingerprint]
        for layer, kinds in weights.items()
        for kind, slots in kinds.items()
        for expert, fingerprint in zip(rows[layer], slots, strict=False)
    )


def _against(
    layer: int,
    row: Sequence[int],
    running: Mapping[str, Sequence[str]],
    expected: Mapping[str, Sequence[str]],
    owners: Mapping[tuple[str, str], tuple[int, int]],
    compared: Sequence[str],
) -> Iterator[Finding]:
    for kind in compared:
        if kind not in running or kind not in expected:
            continue
        wrong = [
            (slot, owners.get((kind, fingerprint)))
            for slot, (expert, fingerprint) in enumerate(zip(row, running[kind], strict=True))
            if not 0 <= expert < len(expected[kind]) or expected[kind][expert] != fingerprint
        ]
        if not wrong:
            continue
        what = kind.partition("/")[0] + "s"
        sources = {owner[0] for _, owner in wrong if owner is not None}
        slot, owner = wrong[0]
        if len(wrong) == len(row) and len(sources) == 1 and sources != {layer} and all(o for _, o in wrong):
            yield Finding("weights", layer, f"layer {layer} holds the {what} of layer {sources.pop()}")
            continue
        holds = f"those of expert {owner[1]} of layer {owner[0]}" if owner else "those of no expert that was read"
        yield Finding(
            "weights",
            layer,
            f"layer {layer}: {len(wrong)} of {len(row)} slots hold other {what} than the map's, as slot {slot}: expert "
            f"{row[slot]} by the map, {holds}",
        )


def _within(rows: Mapping[int, Sequence[int]], weights: Fingerprints) -> list[Finding]:
    """What is wrong whatever the experts' weights should be."""
    findings = []
    seen: dict[tuple[str, tuple[str, ...]], int] = {}
    for layer, kinds in weights.items():
        for kind, slots in kinds.items():
            if len(set(slots)) == 1 and not kind.startswith("weight/"):
                # Biases and scales may well be the same everywhere.
                continue
            what = kind.partition("/")[0] + "s"
            own: dict[int, set[str]] = defaultdict(set)
            for expert, fingerprint in zip(rows[layer], slots, strict=True):
                own[expert].add(fingerprint)
            torn = [expert for expert, prints in own.items() if len(prints) > 1]
            if torn:
                text = f"layer {layer}: replicas of expert {some(torn)} hold different {what}"
                findings.append(Finding("weights", layer, text))
            if not kind.startswith("weight/"):
                continue
            twins: dict[str, set[int]] = defaultdict(set)
            for expert, fingerprint in zip(rows[layer], slots, strict=True):
                twins[fingerprint].add(expert)
            if same := next((sorted(experts) for experts in twins.values() if len(experts) > 1), None):
                text = f"layer {layer}: slots of experts {some(same)} hold the same {what}"
                findings.append(Finding("weights", layer, text))
            other = seen.setdefault((kind, tuple(sorted(set(slots)))), layer)
            if other != layer:
                findings.append(Finding("weights", layer, f"layers {other} and {layer} hold the same {what}"))
    return findings


def _default_places(
    rows: Mapping[int, Sequence[int]],
    weights: Fingerprints,
    owners: Mapping[tuple[str, str], tuple[int, int]],
    compared: Sequence[str],
    experts: int,
) -> bool:
    """Whether every slot holds the expert that it has without a plan, and the map says otherwise."""
    differs = False
    for layer, kinds in weights.items():
        default = np.arange(len(rows[layer])) % experts
        differs |= not np.array_equal(default, np.asarray(rows[layer]))
        for kind in compared:
            owners_of_slots = [owners.get((kind, fingerprint)) for fingerprint in kinds.get(kind, ())]
            if any(owner != (layer, expert) for owner, expert in zip(owners_of_slots, default.tolist(), strict=False)):
                return False
    return differs


# Dumps of weights.


def _written_ranks(files: Sequence[Path]) -> Iterator[tuple[int, int, dict[str, list[str]]]]:
    for file in files:
        content = json_object(file)
        layers = content.get("layers")
        if content.get("schema") != SCHEMA or type(content.get("rank")) is not int or not isinstance(layers, dict):
            raise FileFormatError(f"{file}: not a {SCHEMA} file")
        if file.name != FILE.format(rank=content["rank"]):
            raise FileFormatError(f"{file}: it says it is of rank {content['rank']}; was it renamed or copied?")
        for layer, kinds in layers.items():
            if not layer.isdecimal() or len(layer) > 6 or not isinstance(kinds, dict):
                raise FileFormatError(f"{file}: layer {layer[:20]!r}: expected fingerprints by kind")
            for kind, slots in kinds.items():
                ok = isinstance(slots, list) and all(isinstance(f, str) and _FINGERPRINT.fullmatch(f) for f in slots)
                if not ok or "/" not in kind:
                    raise FileFormatError(f"{file}: layer {layer}: {kind[:40]}: expected 16 hex digits for each slot")
            yield content["rank"], int(layer), kinds


def _stored_ranks(files: Sequence[Path], layers: set[int]) -> Iterator[tuple[int, int, dict[str, list[str]]]]:
    histograms: dict[int, dict[tuple[int, str], IntArray]] = defaultdict(dict)
    for file in files:
        numbers = _RANK.findall(file.name)
        if not numbers:
            raise FileFormatError(f"{file}: its name says no rank, as model-rank-0-part-0.safetensors does")
        for tensor in read_header(file).tensors:
            place = _place(tensor.name, tensor.shape, DTYPE_BITS[tensor.dtype] // 8)
            if place is None or place[0] not in layers:
                continue
            slots = _bytes(tensor).reshape(tensor.shape[0], -1)
            _add(histograms[int(numbers[-1])], place, np.stack([_histogram(slot, place[1]) for slot in slots]))
    for rank, own in histograms.items():
        for (layer, kind), counts in own.items():
            yield rank, layer, {kind: [_digest(count) for count in counts]}


def _place(name: str, shape: tuple[int, ...], itemsize: int) -> tuple[int, str] | None:
    """The layer and kind of a running engine's tensor with a slot a row."""
    match = _ROUTED.search(name)
    kind = None if match is None else _kind(name, itemsize)
    if match is None or kind is None or not shape or not shape[0] or 0 in shape:
        return None
    if kind.startswith("weight/") and len(shape) < 2:
        return None
    return int(match[1]), kind


def _kind(name: str, itemsize: int) -> str | None:
    if _NO_WEIGHTS.search(name) or _NORMS.search(name) or itemsize < 1:
        return None
    what = "scale" if re.search(r"scale|zero|absmax", name) else "bias" if "bias" in name else "weight"
    return f"{what}/{itemsize}"


# Fingerprints.


def _histogram(raw: npt.NDArray[np.uint8], kind: str) -> IntArray:
    """How often each value of a byte, or of two bytes, occurs."""
    values, size = (raw, 1 << 8) if kind.endswith("/1") else (raw.view(np.uint16), 1 << 16)
    counts = np.zeros(size, dtype=np.int64)
    for start in range(0, len(values), CHUNK):
        counts += np.bincount(values[start : start + CHUNK], minlength=size)
    return counts


def _torch_histogram(slot: torch.Tensor, itemsize: int) -> IntArray:
    import torch

    flat = slot.reshape(-1).contiguous()
    values = flat.view(torch.uint8) if itemsize == 1 else flat.view(torch.int16)
    size = 1 << (8 if itemsize == 1 else 16)
    counts = torch.zeros(size, dtype=torch.int64, device=slot.device)
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK]
        counts += torch.bincount(part.to(torch.int32) & (size - 1), minlength=size)
    return np.asarray(counts.cpu().numpy())


def _digest(counts: IntArray) -> str:
    # Zeros say nothing: kernels pad with them.
    return hashlib.blake2b(counts[1:].astype("<i8").tobytes(), digest_size=8).hexdigest()


def _empty(rows: int, kind: str) -> IntArray:
    return np.zeros((rows, 1 << (8 if kind.endswith("/1") else 16)), dtype=np.int64)


def _add(histograms: dict[tuple[int, str], IntArray], place: tuple[int, str], counts: IntArray) -> None:
    other = histograms.get(place)
    if other is not None and other.shape != counts.shape:
        raise FileFormatError(f"layer {place[0]}: tensors of {len(other)} and of {len(counts)} slots")
    histograms[place] = counts if other is None else other + counts


def _bytes(tensor: StoredTensor) -> npt.NDArray[np.uint8]:
    if not tensor.nbytes:
        return np.zeros(0, dtype=np.uint8)
    return np.memmap(tensor.file, dtype=np.uint8, mode="r", offset=tensor.start, shape=(tensor.nbytes,))
