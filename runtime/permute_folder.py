"""The files of a checkpoint's folder: which hold weights, which go along, and the record of a permuted order."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..placement.errors import FileFormatError, InputError
from ..placement.files import read_text, write_text
from .permute_rows import IntArray
from .permute_safetensors import Header, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ORDER_FILE = "moeplace_expert_order.json"
ORDER_FORMAT = "moeplace.expert_order"
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".bin.index.json")


def write_expert_order(folder: Path, moe_layers: Sequence[int], order: IntArray) -> None:
    """Records in a model's folder which original expert each row holds."""
    rows = {str(layer): row.tolist() for layer, row in zip(moe_layers, order, strict=True)}
    write_text(folder / ORDER_FILE, json.dumps({"format": ORDER_FORMAT, "version": 1, "expert_order": rows}))


def read_expert_order(folder: str | Path) -> dict[int, IntArray] | None:
    """The order recorded in a permuted model's folder, by absolute layer; None when the folder has none.

    Routing recorded on the permuted model is in the original's experts after `order[layer][recorded_ids]`.

    Raises:
        FileFormatError: the file is malformed, or a row is not a permutation; the layer is named.
    """
    path = Path(folder) / ORDER_FILE
    if not path.is_file():
        return None
    data = json_object(path)
    rows = data.get("expert_order")
    if data.get("format") != ORDER_FORMAT or data.get("version") != 1 or not isinstance(rows, dict):
        raise FileFormatError(f"{path}: not a {ORDER_FORMAT} file of version 1")
    result = {}
    for layer, row in rows.items():
        is_row = isinstance(row, list) and all(type(expert) is int for expert in row)
        if not layer.isdecimal() or not is_row or sorted(row) != list(range(len(row))):
            raise FileFormatError(f"{path}: layer {layer}: expected every expert once")
        result[int(layer)] = np.array(row, dtype=np.int64)
    return result


def read_weight_headers(folder: Path) -> list[Header]:
    """The checked headers of a checkpoint's weight files: `model.safetensors`, or all that the index names.

    Raises:
        InputError: no weights, or both forms. FileFormatError: a missing shard, a tensor that the index places in
            another shard or does not know, a shard name that leaves the folder.
    """
    single, index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    if single == index:
        problem = f"both {SINGLE} and {INDEX}; remove the stale one" if single else f"neither {SINGLE} nor {INDEX}"
        hint = "" if single else "; save the model with save_pretrained first"
        raise InputError(f"{folder}: there is {problem}{hint}")
    if single:
        return [read_header(folder / SINGLE)]
    placed = json_object(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise FileFormatError(f"{folder / INDEX}: no weight_map")
    files: dict[str, set[str]] = {}
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise FileFormatError(f"{folder / INDEX}: tensor {name}: {str(file)[:100]!r} is not a shard of this folder")
        files.setdefault(file, set()).add(name)
    headers = []
    for file, expected in sorted(files.items()):
        if not (folder / file).is_file():
            raise FileFormatError(f"{folder}: shard {file} is missing, the index places {len(expected)} tensors in it")
        header = read_header(folder / file)
        different = expected ^ {tensor.name for tensor in header.tensors}
        if different:
            raise FileFormatError(
                f"{folder / file}: the index and the shard disagree about tensor {min(different)} "
                f"({len(different)} in all)"
            )
        headers.append(header)
    return headers


def other_files(folder: Path, weights: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names to copy, and names left out: folders, and weights that stay in the old order."""
    copied: list[str] = []
    left_out: list[str] = []
    for entry in sorted(folder.iterdir()):
        if entry.name in weights or entry.name == ORDER_FILE:
            continue
        skip = not entry.is_file() or entry.name.endswith(OTHER_WEIGHTS)
        (left_out if skip else copied).append(entry.name)
    return tuple(copied), tuple(left_out)


@contextlib.contextmanager
def new_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """A scratch folder beside `target`, renamed to it when the block ends well and removed when not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < nbytes:
        raise InputError(f"{target.parent}: the permuted weights take {nbytes:,} bytes, {free:,} are free")
    scratch = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    scratch.mkdir()
    try:
        yield scratch
        if target.exists():
            raise InputError(f"{target}: appeared meanwhile; nothing was overwritten")
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def json_object(path: Path) -> dict[str, Any]:
    """Parses a JSON file that must hold an object, and raises FileFormatError when it does not."""
    try:
        data = json.loads(read_text(path, limit_bytes=1 << 28))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise FileFormatError(f"{path}: not JSON, or truncated ({error})") from None
    if not isinstance(data, dict):
        raise FileFormatError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data
