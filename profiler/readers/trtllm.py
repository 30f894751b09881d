"""TensorRT-LLM's expert statistics: a folder of `meta_info.json` and `rank{r}.safetensors`.

Written with EXPERT_STATISTIC_ITER_RANGE set; each rank counts its own tokens, a tensor "{iteration}_{layer}" of
[num_experts] int64 each. Source: tensorrt_llm/_torch/expert_statistic.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..._types import IntArray
from ...placement.errors import FileFormatError, InputError
from ...placement.files import parse_json
from ...placement.statistics import RoutingStatistics
from .arrays import MOST_EXPERTS
from .engine_counts import statistics_of, whole_number

META = "meta_info.json"
META_LIMIT = 1 << 20
RANK = re.compile(r"rank(\d{1,6})\.safetensors")
KEY = re.compile(r"(\d{1,12})_(\d{1,6})")

Counts = IntArray


def is_trtllm(path: Path) -> bool:
    """Whether `path` is such a folder."""
    return path.is_dir() and (path / META).is_file() and bool(_rank_files(path))


def read_trtllm(path: str | Path, *, assignments: Mapping[int, Sequence[int]] | None = None) -> RoutingStatistics:
    """Reads the counts, summed over ranks: a window for each iteration that counted every layer.

    assignments: where the engine ran with a load balancer its ids are slots, and the files do not say so; this is the
    balancer's `initial_global_assignments`, for each layer the expert in each slot. Without it ids are experts.

    Raises:
        InputError: no such folder, or assignments that do not fit. FileFormatError: not such a record, damaged, or
            without some rank's file.
    """
    source = Path(path)
    if not is_trtllm(source):
        raise InputError(f"{source}: not a folder with {META} and rank0.safetensors, ...")
    slots, top_k = _meta(source / META)
    ranks = _rank_files(source)
    if sorted(ranks) != list(range(len(ranks))):
        missing = min(set(range(max(ranks))) - set(ranks))
        raise FileFormatError(f"{source}: rank{missing}.safetensors is missing; counts are needed of every rank")
    totals: dict[tuple[int, int], Counts] = {}
    for rank in sorted(ranks):
        _add_rank(ranks[rank], slots, totals)
    layers = sorted({layer for _, layer in totals})
    known: dict[int, int] = {}
    for iteration, _ in totals:
        known[iteration] = known.get(iteration, 0) + 1
    iterations = sorted(iteration for iteration, count in known.items() if count == len(layers))
    if not iterations:
        raise FileFormatError(
            f"{source}: no iteration counted each of the {len(layers)} layers; record more iterations"
        )
    load = np.stack([np.stack([totals[i, layer] for layer in layers]) for i in iterations])
    return statistics_of(source, load if assignments is None else _logical(load, layers, assignments), layers, top_k)


def _rank_files(path: Path) -> dict[int, Path]:
    return {int(match[1]): file for file in path.iterdir() if (match := RANK.fullmatch(file.name)) and file.is_file()}


def _meta(path: Path) -> tuple[int, int]:
    """(experts or slots, experts a token)."""
    if path.stat().st_size > META_LIMIT:
        raise FileFormatError(f"{path}: {path.stat().st_size:,} bytes, expected two numbers")
    content = _parsed(path, path.read_bytes())
    experts = whole_number(path, "num_experts", content.get("num_experts"), 1, MOST_EXPERTS)
    return experts, whole_number(path, "num_experts_per_token", content.get("num_experts_per_token"), 1, experts)


def _add_rank(path: Path, experts: int, totals: dict[tuple[int, int], Counts]) -> None:
    """Adds one rank's counts to the totals of (iteration, layer)."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise FileFormatError(
                f"{path}: a header of {length:,} bytes in a file of {size:,}; truncated or not safetensors"
            )
        header = _parsed(path, handle.read(length))
        content = handle.read()
    header.pop("__metadata__", None)
    length_needed = 8 * experts
    for key, entry in header.items():
        name = KEY.fullmatch(key)
        if name is None:
            raise FileFormatError(f"{path}: a tensor named {key[:60]!r}, expected iteration_layer as in '100_3'")
        if not isinstance(entry, dict) or entry.get("dtype") != "I64" or entry.get("shape") != [experts]:
            raise FileFormatError(f"{path}: tensor {key} is not I64 [{experts}], which {META} calls for")
        offsets = entry.get("data_offsets")
        if not isinstance(offsets, list) or len(offsets) != 2 or any(type(at) is not int for at in offsets):
            raise FileFormatError(f"{path}: tensor {key} has data_offsets {str(offsets)[:60]}, expected two numbers")
        start, end = offsets
        if not 0 <= start <= end <= len(content) or end - start != length_needed:
            raise FileFormatError(
                f"{path}: tensor {key} lies at {start}:{end} of {len(content)} bytes and takes {length_needed}; "
                "truncated"
            )
        counts = np.frombuffer(content, "<i8", experts, start)
        if counts.min() < 0 or counts.max() >= 1 << 48:
            raise FileFormatError(
                f"{path}: tensor {key} holds {counts.min()} to {counts.max()}, which are no token counts"
            )
        place = int(name[1]), int(name[2])
        totals[place] = totals[place] + counts if place in totals else counts


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    content = parse_json(text, str(path))
    if not isinstance(content, dict):
        raise FileFormatError(f"{path}: a JSON {type(content).__name__}, expected an object")
    return content


def _logical(load: Counts, layers: Sequence[int], assignments: Mapping[int, Sequence[int]]) -> Counts:
    """[S, L, E] from counts of slots."""
    tables: list[IntArray] = []
    for layer in layers:
        if layer not in assignments:
            raise InputError(f"assignments lack layer {layer}, which the record counts")
        table = np.asarray(assignments[layer])
        if (
            table.shape != load.shape[2:]
            or table.dtype.kind not in "iu"
            or table.min() < 0
            or table.max() >= len(table)
        ):
            raise InputError(f"assignments of layer {layer} are not {load.shape[2]} expert ids, one a slot")
        tables.append(table.astype(np.int64))
    mapping = np.stack(tables)
    result = np.zeros((len(load), len(layers), int(mapping.max()) + 1), np.int64)
    places: Any = slice(None), np.arange(len(layers))[:, None], mapping
    np.add.at(result, places, load)
    return result
