"""Megatron-LM's router traces and the token-imbalance traces of its benchmark.

Router traces: `router_trace_rank{r}.jsonl` of --moe-routing-trace-path, one file or a folder of them. A line is one
router call: the experts of each token in one layer. The training hook reads them off a boolean map: they come in order
of expert, not of gate weight, and gate weights are not kept. Whatever looks at the first expert of a token alone is
wrong on such a trace. Source: megatron/core/transformer/moe/router_trace.py.

Token-imbalance traces (pull request 7488): workloads W0 to W7, a folder for each. `manifest.json` names shape,
workload, step, layer, and each tensor's file with its SHA-256; expert ids [T, K], gates [T, K] and source ranks [T] are
tensors. A trace is of one layer; a folder of such folders is put together by step and layer. Source:
benchmarks/moe/token_imbalance/trace.py.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..._tensor_files import array_of, load_plain, tensor_array
from ..._types import IntArray
from ...placement.errors import FileFormatError, InputError
from ...placement.files import parse_json
from ...placement.trace import RoutingTrace, id_dtype
from .arrays import MOST_EXPERTS
from .engine_counts import left_out, remark, trace_of, whole_number

START = 4096
BLOCKS = ("decoder", "mtp")

Ids = npt.NDArray[np.signedinteger[Any]]
Batches = dict[int, dict[int, list[Ids]]]
"""step -> layer -> [T, k] of each router call in turn."""


def is_megatron(path: Path) -> bool:
    """Whether `path` is such a file, or a folder with one in it."""
    return bool(_files(path))


def read_megatron(path: str | Path, *, num_experts: int | None = None) -> RoutingTrace:
    """Reads the trace of the decoder's layers; layers of multi-token prediction are left out.

    num_experts: E; without it, it is read off the logits' shape where those were captured, else the highest expert seen
    is the last. Each router call is a sequence of its own (a micro-batch: the file does not say where its sequences
    end). Several calls of a layer in a step are micro-batches, in order. Megatron skips calls that dropped
    tokens: a step that so lacks a layer's call is left out for that rank, and so are tokens with -1 for an expert. A
    rank whose whole record equals another's (tensor parallelism without sequence parallelism) counts once. Record
    without pipeline parallelism, which numbers each stage's layers from 0 again. Memory: one line at a time, and the
    trace.

    Raises:
        InputError: no such path. FileFormatError: no such record, damaged, or files of different models.
    """
    source = Path(path)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    files = _files(source)
    if not files:
        raise FileFormatError(f"{source}: no router trace of Megatron-LM")
    ranks: dict[int, Batches] = {}
    owners: dict[int, Path] = {}
    logits: set[int] = set()
    top_k: set[int] = set()
    for file in files:
        for where, record in _records(file):
            rank = whole_number(file, f"{where} rank", record.get("rank"), 0, 1 << 31)
            if owners.setdefault(rank, file) != file:
                raise FileFormatError(
                    f"{file}: {where} is of rank {rank}, as is {owners[rank].name}; give one run's files"
                )
            if record.get("block", "decoder") not in BLOCKS:
                raise FileFormatError(
                    f"{file}: {where} has block {str(record['block'])[:60]!r}, expected decoder or mtp"
                )
            if record.get("block") == "mtp":
                continue
            step = whole_number(file, f"{where} step", record.get("step"))
            layer = whole_number(file, f"{where} layer", record.get("layer"), 0, 1 << 20)
            ids = _ids(file, where, record)
            shape = record.get("logit_shape")
            if isinstance(shape, list) and len(shape) == 2:
                logits.add(whole_number(file, f"{where} logit_shape[1]", shape[1], 1, MOST_EXPERTS))
            top_k.add(ids.shape[1])
            ranks.setdefault(rank, {}).setdefault(step, {}).setdefault(layer, []).append(ids)
    layers = sorted({layer for steps in ranks.values() for calls in steps.values() for layer in calls})
    if len(top_k) > 1 or len(logits) > 1:
        raise FileFormatError(
            f"{source}: top_k is {sorted(top_k)}, experts {sorted(logits)}; files of different models"
        )
    return _trace(source, _once(ranks), layers, num_experts or (logits.pop() if logits else None))


def _files(path: Path) -> list[Path]:
    candidates = [path] if path.is_file() else sorted(path.glob("*.jsonl")) if path.is_dir() else []
    return [file for file in candidates if file.is_file() and _is_record(file)]


def _is_record(file: Path) -> bool:
    with file.open("rb") as handle:
        start = handle.read(START)
    return start.startswith(b"{") and b'"top_indices"' in start and b'"layer"' in start


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            record = parse_json(line, f"{file}: line {number}")
            if not isinstance(record, dict):
                raise FileFormatError(f"{file}: line {number} is a JSON {type(record).__name__}, expected an object")
            yield f"line {number}:", record


def _ids(file: Path, where: str, record: dict[str, Any]) -> Ids:
    """[T, k] of one router call."""
    tokens = whole_number(file, f"{where} num_tokens", record.get("num_tokens"))
    width = whole_number(file, f"{where} topk", record.get("topk"), 1, MOST_EXPERTS)
    rows = record.get("top_indices")
    try:
        # numpy tells in one pass what kinds and shapes are in a list; asking each element costs ten times as much.
        ids = np.array(rows if rows else np.empty((0, width), np.int64))
    except (ValueError, TypeError, OverflowError, RecursionError):
        ids = np.empty(0)
    if (
        not isinstance(rows, list)
        or ids.shape != (tokens, width)
        or ids.dtype.kind != "i"
        or (ids.size and (ids.min() < -1 or ids.max() >= MOST_EXPERTS))
    ):
        raise FileFormatError(
            f"{file}: {where} top_indices is not {tokens} lists of {width} experts, as num_tokens and topk say"
        )
    return ids.astype(np.int32 if ids.size and ids.max() >= 1 << 15 else np.int16)


def _once(ranks: dict[int, Batches]) -> dict[int, Batches]:
    """The ranks without those that hold copies of another's tokens."""
    first_rank: dict[bytes, int] = {}
    for rank in sorted(ranks):
        digest = hashlib.sha256()
        for step, calls in sorted(ranks[rank].items()):
            for layer, batches in sorted(calls.items()):
                for ids in batches:
                    digest.update(repr((step, layer, ids.shape)).encode() + ids.tobytes())
        first_rank.setdefault(digest.digest(), rank)
    return {rank: ranks[rank] for rank in first_rank.values()}


def _trace(source: Path, ranks: dict[int, Batches], layers: list[int], num_experts: int | None) -> RoutingTrace:
    ids: list[npt.NDArray[Any]] = []
    columns: dict[str, list[IntArray]] = {"sequence": [], "position": [], "step": [], "source": []}
    tokens = skipped = 0
    for rank in sorted(ranks):
        # Each step's arrays are let go once they are put together.
        steps = ranks.pop(rank)
        for step in sorted(steps):
            calls = steps.pop(step)
            counts = {len(batches) for batches in calls.values()}
            if len(calls) != len(layers) or len(counts) > 1:
                skipped += 1
                continue
            for batches in zip(*(calls[layer] for layer in layers), strict=True):
                if len({len(batch) for batch in batches}) > 1:
                    raise FileFormatError(f"{source}: layers of step {step} on rank {rank} differ in tokens")
                together = np.stack(batches, axis=1)
                whole = np.flatnonzero((together >= 0).all(axis=(1, 2)))
                for name, value in (("sequence", len(ids)), ("step", step), ("source", rank)):
                    columns[name].append(np.full(len(whole), value, np.int64))
                columns["position"].append(whole)
                tokens += len(together)
                rows = together[whole]
                ids.append(rows.astype(id_dtype(int(rows.max(initial=0)) + 1)))
    if not sum(len(part) for part in ids):
        raise FileFormatError(
            f"{source}: no step has a record of each of the {len(layers)} layers on one rank; record with no "
            "dropped tokens and without pipeline parallelism"
        )
    joined = np.concatenate(ids)
    if len(joined) < tokens:
        remark(f"{source}: {left_out(tokens - len(joined), tokens)}")
    if skipped:
        remark(
            f"{source}: {skipped:,} steps of a rank lack a layer's call (Megatron skips those that drop tokens), "
            "and are left out"
        )
    named: dict[str, Any] = {name: np.concatenate(parts) for name, parts in columns.items()}
    return trace_of(source, {"ids": joined, **named}, num_experts or int(joined.max()) + 1, layers)


MANIFEST = "manifest.json"
MANIFEST_LIMIT = 1 << 20
SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """One folder. ids, gates: [T, K]. ranks: [T]."""

    folder: Path
    workload: str
    experts: int
    pass_: tuple[str, int, int]
    layer: int
    ids: npt.NDArray[Any]
    gates: npt.NDArray[Any]
    ranks: npt.NDArray[Any]


def is_token_imbalance(path: Path) -> bool:
    """Whether `path` is such a folder, or a folder of them."""
    return bool(_folders(path))


def read_token_imbalance(path: str | Path) -> RoutingTrace:
    """Reads the trace: each folder's tokens, by workload, step and micro-batch, are a sequence.

    Raises:
        InputError: no such folder.
        FileFormatError: another version, a checksum that is not the file's, ids or gates that no top-k gives, or
            folders of different models.
    """
    source = Path(path)
    folders = _folders(source)
    if not folders:
        raise InputError(f"{source}: no folder with a {MANIFEST} of a token-imbalance trace")
    passes: dict[tuple[str, int, int], dict[int, LayerTrace]] = defaultdict(dict)
    for folder in folders:
        part = _read(folder)
        if part.layer in passes[part.pass_]:
            other = passes[part.pass_][part.layer].folder
            raise FileFormatError(f"{folder}: layer {part.layer} of {part.pass_}, which {other.name} holds too")
        passes[part.pass_][part.layer] = part
    parts = [part for layers in passes.values() for part in layers.values()]
    layers = sorted({part.layer for part in parts})
    shapes = {(part.experts, part.ids.shape[1]) for part in parts}
    if len(shapes) > 1:
        raise FileFormatError(
            f"{source}: experts and top-k are {sorted(shapes)}; keep the traces of one model together"
        )
    columns: dict[str, list[npt.NDArray[Any]]] = defaultdict(list)
    for number, (key, of_layer) in enumerate(sorted(passes.items())):
        first = next(iter(of_layer.values()))
        for layer in layers:
            if layer not in of_layer or len(of_layer[layer].ids) != len(first.ids):
                raise FileFormatError(
                    f"{source}: workload {key[0]!r}, step {key[1]}, micro-batch {key[2]} lacks layer {layer}, or has "
                    "other tokens there; each needs the same tokens in every layer"
                )
        tokens = len(first.ids)
        columns["ids"].append(np.stack([of_layer[layer].ids for layer in layers], axis=1))
        columns["gate_weights"].append(np.stack([of_layer[layer].gates for layer in layers], axis=1))
        columns["source"].append(first.ranks)
        columns["workload"].append(np.full(tokens, first.workload))
        columns["step"].append(np.full(tokens, key[1]))
        columns["sequence"].append(np.full(tokens, number))
    joined: dict[str, Any] = {name: np.concatenate(values) for name, values in columns.items()}
    return trace_of(source, joined, shapes.pop()[0], layers)


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return [folder for folder in [path, *sorted(path.iterdir())] if _is_manifest(folder / MANIFEST)]


def _is_manifest(file: Path) -> bool:
    if not file.is_file() or file.stat().st_size > MANIFEST_LIMIT:
        return False
    content = file.read_bytes()
    return b'"workload_checksum"' in content and b'"logical_num_tokens"' in content


def _read(folder: Path) -> LayerTrace:
    manifest = folder / MANIFEST
    fields = parse_json(manifest.read_bytes(), str(manifest))
    if not isinstance(fields, dict) or fields.get("schema_version") != SCHEMA_VERSION:
        raise FileFormatError(f"{manifest}: not a manifest of schema_version {SCHEMA_VERSION}")

    def number(name: str, least: int = 0, most: int = 1 << 40) -> int:
        return whole_number(manifest, name, fields.get(name), least, most)

    experts = number("num_experts", 1, MOST_EXPERTS)
    tokens, top_k = number("logical_num_tokens", 1), number("topk", 1, experts)
    ids_file, ids = _tensor(folder, fields, "expert_ids")
    ids = array_of(ids_file, "expert_ids", ids, 2)
    gates_file, gates = _tensor(folder, fields, "gates")
    gates = tensor_array(gates_file, "gates", gates)
    ranks_file, ranks = _tensor(folder, fields, "source_rank")
    ranks = array_of(ranks_file, "source_rank", ranks, 1)
    if ids.shape != (tokens, top_k) or gates.shape != ids.shape or ranks.shape != (tokens,):
        raise FileFormatError(
            f"{folder}: expert_ids {ids.shape}, gates {gates.shape}, source_rank {ranks.shape}; the manifest says "
            f"{tokens} tokens, top-{top_k}"
        )
    ordered = np.sort(ids, axis=1)
    if ids.min() < 0 or ids.max() >= experts or (np.diff(ordered, axis=1) == 0).any():
        raise FileFormatError(f"{folder}: expert_ids are not {top_k} different ones of {experts} experts a token")
    if not np.isfinite(gates).all() or gates.min() < 0 or np.abs(gates.sum(axis=1) - 1.0).max() > 1e-3:
        raise FileFormatError(f"{folder}: gates are not weights that add up to 1")
    if ranks.min() < 0 or ranks.max() >= number("world_size", 1, 1 << 20):
        raise FileFormatError(f"{folder}: source_rank holds {ranks.min()} to {ranks.max()}, beyond world_size")
    workload = str(fields.get("workload_id", ""))[:100]
    place = workload, number("step_id"), number("microbatch_id")
    return LayerTrace(folder, workload, experts, place, number("logical_layer_id", 0, 1 << 20), ids, gates, ranks)


def _tensor(folder: Path, fields: dict[str, Any], name: str) -> tuple[Path, Any]:
    """The file of a tensor, which must be the one of that name, and what it holds."""
    listed = fields.get("tensors")
    entry = listed.get(name) if isinstance(listed, dict) else None
    file = folder / "tensors" / f"{name}.pt"
    if not isinstance(entry, dict) or entry.get("file") != f"tensors/{name}.pt" or not file.is_file():
        raise FileFormatError(f"{folder / MANIFEST}: tensors.{name} is not the file tensors/{name}.pt")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if entry.get("sha256") != digest:
        raise FileFormatError(f"{file}: its SHA-256 is {digest[:16]}..., not the manifest's; damaged or exchanged")
    return file, load_plain(file)
