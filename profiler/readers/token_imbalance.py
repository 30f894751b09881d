"""Token-imbalance traces of Megatron-LM's benchmark (pull request 7488): workloads W0 to W7, a folder for each trace.

`manifest.json` names shape, workload, step, layer, and each tensor's file with its SHA-256; expert ids [T, K], gates
[T, K] and source ranks [T] are tensors. A trace is of one layer; a folder of such folders is put together by step and
layer. Source: benchmarks/moe/token_imbalance/trace.py.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..._tensor_files import array_of, load_plain, tensor_array
from ...placement.errors import FileFormatError, InputError
from ...placement.trace import RoutingTrace
from .engine_counts import MOST_EXPERTS, whole_number

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
    try:
        return RoutingTrace.from_arrays(joined.pop("ids"), num_experts=shapes.pop()[0], moe_layers=layers, **joined)
    except InputError as error:
        raise FileFormatError(f"{source}: {error}") from None


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
    try:
        fields = json.loads(manifest.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{manifest}: damaged JSON ({error})") from None
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
