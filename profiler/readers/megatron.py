"""Megatron-LM's router traces: `router_trace_rank{r}.jsonl` of --moe-routing-trace-path, one file or a folder of them.

A line is one router call: the experts of each token in one layer. The training hook reads them off a boolean map: they
come in order of expert, not of gate weight, and gate weights are not kept. Whatever looks at the first expert of a
token alone is wrong on such a trace. Source: megatron/core/transformer/moe/router_trace.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..._types import IntArray
from ...placement.errors import FileFormatError, InputError
from ...placement.trace import RoutingTrace, id_dtype
from ..notes import remark
from .engine_counts import MOST_EXPERTS, left_out, whole_number

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
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FileFormatError(f"{file}: line {number} is damaged or cut off ({error})") from None
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
    try:
        return RoutingTrace.from_arrays(
            joined, num_experts=num_experts or int(joined.max()) + 1, moe_layers=layers, **named
        )
    except InputError as error:
        raise FileFormatError(f"{source}: {error}") from None
