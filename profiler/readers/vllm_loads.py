"""vLLM's expert-load statistics (pull request 41141): a line of JSON for each interval, loads of slots and their map.

    {"record_type": "eplb_load_meta", "version": 1, "num_layers": L, ...}
    {"record_type": "eplb_load_stats", "version": 1, "step": 1, "expert_load": [L][P], "p2l_map": [L][P]}

As its tools/generate_static_mapping.py reads them: loads of one interval each, of MoE layers alone, all ranks summed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..._types import FloatArray
from ...placement.errors import FileFormatError, InputError
from ...placement.files import parse_json
from ...placement.statistics import RoutingStatistics
from .engine_counts import remark, statistics_of
from .tables import nested_numbers

START = 4096
STATS, META = "eplb_load_stats", "eplb_load_meta"


def is_vllm_loads(path: Path) -> bool:
    """Whether `path` begins with a line of vLLM's load statistics."""
    if not path.is_file():
        return False
    with path.open("rb") as handle:
        start = handle.read(START)
    return start.lstrip().startswith(b"{") and (f'"{STATS}"'.encode() in start or f'"{META}"'.encode() in start)


def read_vllm_loads(path: str | Path) -> RoutingStatistics:
    """Reads the intervals as windows, in the order of their lines; replicas' loads are summed by their map.

    Raises:
        InputError: no such file.
        FileFormatError: damaged, cut off, another version, or lines that differ in shape; the line is named.
    """
    source = Path(path)
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    windows: list[FloatArray] = []
    last, again = -1, 0
    with source.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            record = _record(source, number, line)
            if record is None:
                continue
            load = _load(source, number, record)
            if windows and load.shape[0] != windows[0].shape[0]:
                raise FileFormatError(
                    f"{source}: line {number} has {load.shape[0]} layers, an earlier one {windows[0].shape[0]}"
                )
            windows.append(load)
            step = record.get("step")
            if type(step) is int:
                again = again or (number if step <= last else 0)
                last = step
    if again:
        remark(
            f"{source}: steps begin again at line {again}, as of two runs or of two ranks; each line was taken for a "
            "window of its own"
        )
    if not windows:
        raise FileFormatError(f"{source}: no line is a {STATS}; record while the engine serves requests")
    experts = {load.shape[1] for load in windows}
    if len(experts) > 1:
        raise FileFormatError(f"{source}: lines map {min(experts)} to {max(experts)} experts, expected as many in each")
    layers = range(len(windows[0]))
    windows.reverse()
    return statistics_of(source, (windows.pop() for _ in range(len(windows))), layers)


def _record(source: Path, number: int, line: bytes) -> dict[str, Any] | None:
    """The line's statistics; None for another line of the format."""
    if not line.strip():
        return None
    record = parse_json(line, f"{source}: line {number}")
    kind = record.get("record_type") if isinstance(record, dict) else None
    if kind not in (STATS, META):
        raise FileFormatError(f"{source}: line {number} is no {META} or {STATS}")
    if record.get("version") != 1:
        raise FileFormatError(f"{source}: line {number} has version {str(record.get('version'))[:40]}, expected 1")
    return record if kind == STATS else None


def _load(source: Path, number: int, record: dict[str, Any]) -> FloatArray:
    """[L, E] loads of experts, from those of slots."""
    load, expert = (
        nested_numbers(source, f"line {number} {field}", record.get(field)) for field in ("expert_load", "p2l_map")
    )
    if load.ndim != 2 or load.shape != expert.shape:
        raise FileFormatError(
            f"{source}: line {number} has expert_load of shape {load.shape} and p2l_map of {expert.shape}, expected "
            "[layers][slots] of both"
        )
    if expert.dtype != np.int64 or expert.min() < 0 or expert.max() >= expert.shape[1]:
        raise FileFormatError(
            f"{source}: line {number} p2l_map must hold experts from 0 on, fewer than its {expert.shape[1]} slots allow"
        )
    logical = np.zeros((len(load), int(expert.max()) + 1))
    np.add.at(logical, (np.arange(len(load))[:, None], expert), load)
    return logical
