"""SGLang's expert distribution records: `expert_distribution_recorder_*.pt`, one file or a folder of them.

Modes stat and stat_approx count logical experts, summed over ranks by SGLang itself. per_pass and per_token hold
physical ids, mapped back through the file's `last_physical_to_logical_map`: passes before a rebalance that happened
while recording are mapped wrongly, so record without one. Source: python/sglang/srt/eplb/expert_distribution.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..placement.errors import FileFormatError, InputError
from ..placement.statistics import RoutingStatistics
from ..placement.trace import RoutingTrace
from .engine_counts import MOST_EXPERTS, statistics_of, whole_number
from .sglang_tokens import TokenPasses
from .torch_records import array_of, load_plain, start_of

Counts = npt.NDArray[np.int64]
Rows = npt.NDArray[np.integer[Any]]


def is_sglang(path: Path) -> bool:
    """Whether `path` is such a file, or a folder with one in it."""
    return bool(_files(path))


def read_sglang(path: str | Path) -> RoutingTrace | RoutingStatistics:
    """Reads the record of one run; files of several ranks lie in one folder, and are put together.

    stat, stat_approx: a window for each row of the buffer in use, in order of time unless the buffer was full, when
    the file does not say which row came first. per_pass: a window for each forward pass that every rank recorded.
    per_token: a trace, without gate weights, and with experts in whatever order SGLang kept them. Layers that count
    nothing are dense: dropped, the others keep their absolute indices. Processes that share a rank (expert parallelism
    narrower than tensor parallelism) write the same counts: those are taken once.

    Raises:
        InputError: no such path. FileFormatError: no such record, damaged, or files of different runs.
    """
    source = Path(path)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    files = _files(source)
    if not files:
        raise FileFormatError(f"{source}: no file of SGLang's expert distribution recorder")
    return read_sglang_files(files, source)


def read_sglang_files(files: Sequence[Path], source: Path) -> RoutingTrace | RoutingStatistics:
    """Reads the files of one run, in order of time. source: what errors about all of them are said of.

    Raises:
        FileFormatError: as `read_sglang`.
    """
    rows: list[Rows] = []
    whole: set[bytes] = set()
    passes = PassCounts()
    tokens = TokenPasses()
    modes: dict[str, Path] = {}
    for file in files:
        content = load_plain(file)
        if not isinstance(content, dict):
            raise FileFormatError(
                f"{file}: a {type(content).__name__}, expected a record with logical_count or records"
            )
        if "logical_count" in content:
            modes.setdefault("stat", file)
            buffer = _buffer(file, content["logical_count"])
            digest = sha256(np.ascontiguousarray(buffer).data).digest()
            if digest not in whole:
                whole.add(digest)
                rows += _rows_in_use(file, buffer)
            continue
        records = content.get("records")
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise FileFormatError(f"{file}: records is not a list of records")
        mapping = _mapping(file, content.get("last_physical_to_logical_map"))
        for number, record in enumerate(records):
            where = f"records[{number}]"
            into = tokens if "topk_ids_of_layer" in record else passes
            modes.setdefault("per_token" if into is tokens else "per_pass", file)
            into.add(file, where, record, mapping)
    if len(modes) != 1:
        found = " and ".join(f"{mode} ({file.name})" for mode, file in modes.items()) or "no forward pass"
        raise FileFormatError(f"{source}: holds {found}; give one record, of one mode, of a run that served requests")
    if "per_token" in modes:
        return tokens.trace(source)
    load = rows or passes.load(source)
    shapes = {window.shape for window in load}
    if len(shapes) > 1:
        raise FileFormatError(f"{source}: files of different models, [layers, experts] are {sorted(shapes)}")
    layers = range(len(load[0]))
    load.reverse()
    return statistics_of(source, (load.pop() for _ in range(len(load))), layers)


class PassCounts:
    """Partial counts of forward passes, summed over ranks."""

    def __init__(self) -> None:
        self._ranks: dict[int, dict[int, tuple[Path, bytes]]] = {}
        self._counts: dict[int, Rows] = {}
        self._shape: tuple[int, int] | None = None

    def add(self, file: Path, where: str, record: dict[str, Any], mapping: Counts) -> None:
        """Adds one rank's counts of one pass: `global_physical_count` [L, P]."""
        step = whole_number(file, f"{where}.forward_pass_id", record.get("forward_pass_id"))
        rank = whole_number(file, f"{where}.rank", record.get("rank"))
        given = array_of(file, f"{where}.global_physical_count", record.get("global_physical_count"), 2)
        if given.shape != mapping.shape:
            raise FileFormatError(
                f"{file}: {where}.global_physical_count has shape {given.shape}, last_physical_to_logical_map "
                f"{mapping.shape}; they must agree"
            )
        seen = self._ranks.setdefault(step, {})
        digest = sha256(np.ascontiguousarray(given).data).digest()
        if rank in seen:
            if seen[rank][0] != file and seen[rank][1] == digest:
                return
            raise FileFormatError(
                f"{file}: {where} is forward pass {step} of rank {rank}, which {seen[rank][0].name} holds too; "
                "keep the files of one run in a folder"
            )
        shape = (len(mapping), int(mapping.max()) + 1)
        if self._shape not in (None, shape):
            raise FileFormatError(f"{file}: {shape} layers and experts, other files {self._shape}; not of one model")
        self._shape = shape
        seen[rank] = file, digest
        total = self._counts.setdefault(step, np.zeros(shape, np.int64))
        np.add.at(total, (np.arange(len(mapping))[:, None], mapping), given)

    def load(self, source: Path) -> list[Rows]:
        """[L, E] of each pass that every rank recorded, in order."""
        everyone: set[int] = set().union(*self._ranks.values())
        whole = sorted(step for step, seen in self._ranks.items() if len(seen) == len(everyone))
        if not whole:
            raise FileFormatError(
                f"{source}: no forward pass was recorded by all of the {len(everyone)} ranks; "
                "keep the files of one run in a folder"
            )
        return [self._counts.pop(step) for step in whole]


def _files(path: Path) -> list[Path]:
    """The files of the recorder, in order of name, which is order of time."""
    candidates = [path] if path.is_file() else sorted(path.glob("*.pt")) if path.is_dir() else []
    return [file for file in candidates if file.is_file() and _is_record(start_of(file))]


def _is_record(start: bytes) -> bool:
    return b"logical_count" in start or (b"records" in start and start.startswith(b"\x80"))


def _buffer(file: Path, value: Any) -> Rows:
    """[rows, L, E] of a circular buffer, as it is."""
    dimensions = 2 if getattr(value, "ndim", 3) == 2 else 3
    buffer = array_of(file, "logical_count", value, dimensions).reshape(-1, *value.shape[-2:])
    if 0 in buffer.shape or buffer.shape[2] > MOST_EXPERTS:
        raise FileFormatError(f"{file}: logical_count has shape {buffer.shape}, expected [rows, layers, experts]")
    return buffer


def _rows_in_use(file: Path, buffer: Rows) -> list[Rows]:
    """[L, E] each: the rows of a buffer, from the one after its longest run of unused (zero) ones."""
    used = np.flatnonzero([bool(row.any()) for row in buffer])
    if not len(used):
        raise FileFormatError(
            f"{file}: logical_count is 0 everywhere; dump while recording, after requests were served"
        )
    gaps = np.diff(used, append=used[0] + len(buffer))
    first = (int(np.argmax(gaps)) + 1) % len(used) if gaps.max() > 1 else 0
    return [buffer[row] for row in np.roll(used, -first)]


def _mapping(file: Path, value: Any) -> Counts:
    """[L, P] logical expert of each slot."""
    mapping = array_of(file, "last_physical_to_logical_map", value, 2).astype(np.int64)
    if not mapping.size or mapping.min() < 0 or mapping.max() >= min(mapping.shape[1], MOST_EXPERTS):
        raise FileFormatError(
            f"{file}: last_physical_to_logical_map has shape {mapping.shape} and ids from "
            f"{mapping.min() if mapping.size else 'none'} to {mapping.max() if mapping.size else 'none'}; expected logical "
            f"ids of at least 0 and fewer experts than slots"
        )
    return mapping
