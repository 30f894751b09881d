"""SGLang's expert distribution records: `expert_distribution_recorder_*.pt`, one file or a folder of them.

Modes stat and stat_approx count logical experts, summed over ranks by SGLang itself. per_pass and per_token hold
physical ids, mapped back through the file's `last_physical_to_logical_map`: passes before a rebalance that happened
while recording are mapped wrongly, so record without one. Source: python/sglang/srt/eplb/expert_distribution.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..._tensor_files import array_of, load_plain
from ..._types import IntArray
from ...placement.errors import FileFormatError, InputError
from ...placement.statistics import RoutingStatistics
from ...placement.trace import RoutingTrace, id_dtype
from .arrays import MOST_EXPERTS
from .engine_counts import (
    RankCounts,
    left_out,
    remark,
    set_apart,
    statistics_of,
    sum_ranks,
    trace_of,
    whole_number,
)

START = 8192
RANKS_FIRST = "rank_layer_expert"

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
    buffers: list[RankCounts] = []
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
            buffers.append(_buffer(file, content))
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
        content_modes = " and ".join(f"{mode} ({file.name})" for mode, file in modes.items()) or "no forward pass"
        raise FileFormatError(
            f"{source}: holds {content_modes}; give one record, of one mode, of a run that served requests"
        )
    if "per_token" in modes:
        return tokens.trace(source)
    load = [row for buffer in sum_ranks(buffers) for row in _rows_in_use(source, buffer)] or passes.load(source)
    shapes = {window.shape for window in load}
    if len(shapes) > 1:
        raise FileFormatError(f"{source}: files of different models, [layers, experts] are {sorted(shapes)}")
    layers = range(len(load[0]))
    load.reverse()
    return statistics_of(source, (load.pop() for _ in range(len(load))), layers)


def _files(path: Path) -> list[Path]:
    """The files of the recorder, in order of name, which is order of time."""
    candidates = [path] if path.is_file() else sorted(path.glob("*.pt")) if path.is_dir() else []
    return [file for file in candidates if file.is_file() and _is_record(start_of(file))]


def _is_record(start: bytes) -> bool:
    return b"logical_count" in start or (b"records" in start and start.startswith(b"\x80"))


def _mapping(file: Path, value: Any) -> IntArray:
    """[L, P] logical expert of each slot."""
    mapping = array_of(file, "last_physical_to_logical_map", value, 2).astype(np.int64)
    if not mapping.size or mapping.min() < 0 or mapping.max() >= min(mapping.shape[1], MOST_EXPERTS):
        raise FileFormatError(
            f"{file}: last_physical_to_logical_map has shape {mapping.shape} and ids from "
            f"{mapping.min() if mapping.size else 'none'} to {mapping.max() if mapping.size else 'none'}; expected "
            f"logical ids of at least 0 and fewer experts than slots"
        )
    return mapping


# stat and stat_approx: a circular buffer of counts of logical experts.


def _buffer(file: Path, content: dict[str, Any]) -> RankCounts:
    """[rows, L, E] of a circular buffer, as it is; ranks that lie side by side in it are summed."""
    value, layout = content["logical_count"], content.get("logical_count_layout")
    dimensions = 2 if getattr(value, "ndim", 3) == 2 else 3
    buffer = array_of(file, "logical_count", value, dimensions).reshape(-1, *value.shape[-2:])
    if 0 in buffer.shape or buffer.shape[2] > MOST_EXPERTS:
        raise FileFormatError(f"{file}: logical_count has shape {buffer.shape}, expected [rows, layers, experts]")
    if layout == RANKS_FIRST:
        remark(f"{file.name} counts {len(buffer)} ranks of one window (logical_count_layout), which were summed")
        buffer = buffer.sum(axis=0, keepdims=True, dtype=np.int64)
    elif layout is not None:
        raise FileFormatError(f"{file}: logical_count_layout is {str(layout)[:60]!r}; {RANKS_FIRST!r} is known")
    rank = content.get("rank")
    return RankCounts(file, rank if type(rank) is int else None, buffer)


def _rows_in_use(source: Path, buffer: Rows) -> list[Rows]:
    """[L, E] each: the rows of a buffer, from the one after its longest run of unused (zero) ones."""
    used = np.flatnonzero([bool(row.any()) for row in buffer])
    if not len(used):
        raise FileFormatError(
            f"{source}: logical_count is 0 everywhere; dump while recording, after requests were served"
        )
    gaps = np.diff(used, append=used[0] + len(buffer))
    first = (int(np.argmax(gaps)) + 1) % len(used) if gaps.max() > 1 else 0
    return [buffer[row] for row in np.roll(used, -first)]


# per_pass: counts of slots, a record a rank and forward pass.


class PassCounts:
    """Partial counts of forward passes, summed over ranks."""

    def __init__(self) -> None:
        self._ranks: dict[int, dict[int, tuple[Path, bytes]]] = {}
        self._counts: dict[int, Rows] = {}
        self._shape: tuple[int, int] | None = None

    def add(self, file: Path, where: str, record: dict[str, Any], mapping: IntArray) -> None:
        """Adds one rank's counts of one pass: `global_physical_count` [L, P]."""
        step = whole_number(file, f"{where}.forward_pass_id", record.get("forward_pass_id"))
        rank = whole_number(file, f"{where}.rank", record.get("rank"))
        counts = array_of(file, f"{where}.global_physical_count", record.get("global_physical_count"), 2)
        if counts.shape != mapping.shape:
            raise FileFormatError(
                f"{file}: {where}.global_physical_count has shape {counts.shape}, last_physical_to_logical_map "
                f"{mapping.shape}; they must agree"
            )
        seen = self._ranks.setdefault(step, {})
        digest = hashlib.sha256(np.ascontiguousarray(counts).data).digest()
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
        np.add.at(total, (np.arange(len(mapping))[:, None], mapping), counts)

    def load(self, source: Path) -> list[Rows]:
        """[L, E] of each pass that every rank recorded, in order."""
        everyone: set[int] = set().union(*self._ranks.values())
        if len(everyone) == 1:
            remark(
                f"{source}: forward passes of rank {min(everyone)} alone, and each rank counts its own tokens; of a "
                "run on several ranks bring the files of all into one folder"
            )
        whole = sorted(step for step, seen in self._ranks.items() if len(seen) == len(everyone))
        if not whole:
            raise FileFormatError(
                f"{source}: no forward pass was recorded by all of the {len(everyone)} ranks; "
                "keep the files of one run in a folder"
            )
        return [self._counts.pop(step) for step in whole]


# per_token: the slots of each token, put together into a trace.


@dataclass(frozen=True)
class Pass:
    """One rank's tokens in one forward pass. ids: [T, L, K] physical, -1 where none was chosen. pieces: tokens of each
    sequence in turn."""

    file: Path
    where: str
    step: int
    ids: npt.NDArray[np.integer[Any]]
    positions: IntArray
    pieces: list[int]


class TokenPasses:
    """Passes as they are read; `trace` puts them together."""

    def __init__(self) -> None:
        self._ranks: dict[int, dict[int, Pass]] = {}
        self._digests: dict[int, Any] = {}
        self._maps: dict[Path, IntArray] = {}

    def add(self, file: Path, where: str, record: dict[str, Any], mapping: IntArray) -> None:
        """Takes one record: `topk_ids_of_layer` [L, T, K], `positions` and `input_ids` [T], `extend_seq_lens`."""
        step = whole_number(file, f"{where}.forward_pass_id", record.get("forward_pass_id"))
        rank = whole_number(file, f"{where}.rank", record.get("rank"))
        ids = array_of(file, f"{where}.topk_ids_of_layer", record.get("topk_ids_of_layer"), 3)
        layers, tokens, _ = ids.shape
        if layers != len(mapping):
            raise FileFormatError(
                f"{file}: {where}.topk_ids_of_layer has {layers} layers, last_physical_to_logical_map {len(mapping)}"
            )
        above = (ids >= mapping.shape[1]).sum(axis=2)[(ids >= 0).any(axis=2)]
        if above.any() and above.min() == above.max():
            remark(set_apart(file, int(above[0]), int(mapping.max()) + 1))
            ids = np.where(ids >= mapping.shape[1], np.array(-1, ids.dtype), ids)
        if ids.size and (ids.min() < -1 or ids.max() >= mapping.shape[1]):
            raise FileFormatError(
                f"{file}: {where}.topk_ids_of_layer holds ids from {ids.min()} to {ids.max()}, expected -1 or 0 to "
                f"{mapping.shape[1] - 1}; record with shared experts not fused (--disable-shared-experts-fusion)"
            )
        positions = _numbers(file, f"{where}.positions", record.get("positions"), tokens)
        inputs = _numbers(file, f"{where}.input_ids", record.get("input_ids"), tokens)
        passes = self._ranks.setdefault(rank, {})
        if step in passes:
            if passes[step].file != file and np.array_equal(passes[step].ids, np.swapaxes(ids, 0, 1)):
                return
            raise FileFormatError(
                f"{file}: {where} is forward pass {step} of rank {rank}, which {passes[step].file.name} holds too; "
                "keep the files of one run in a folder"
            )
        lengths = record.get("extend_seq_lens")
        pieces = [1] * tokens
        if isinstance(lengths, list) and all(type(n) is int and n >= 0 for n in lengths) and sum(lengths) == tokens:
            pieces = [n for n in lengths if n]
        self._maps[file] = mapping
        passes[step] = Pass(file, where, step, np.swapaxes(ids, 0, 1), positions, pieces)
        digest = self._digests.setdefault(rank, hashlib.sha256())
        digest.update(repr((step, ids.shape)).encode() + inputs.tobytes() + positions.tobytes())
        digest.update(np.ascontiguousarray(ids).tobytes())

    def trace(self, source: Path) -> RoutingTrace:
        """The trace of all ranks. A rank whose whole record equals another's held copies of its tokens, as ranks of one
        attention-tensor-parallel group do: taken once. A pass that goes on where the one before it ended, lane by
        lane, continues its sequences; all others start new ones.

        Raises:
            FileFormatError: ranks that disagree in shape, or no token with k experts in every MoE layer.
        """
        distinct = {digest.digest(): rank for rank, digest in sorted(self._digests.items(), reverse=True)}
        order = [
            (rank, self._ranks[rank][step]) for rank in sorted(distinct.values()) for step in sorted(self._ranks[rank])
        ]
        shapes = {(p.ids.shape[1:], int(self._maps[p.file].max()) + 1) for _, p in order}
        if len(shapes) != 1:
            raise FileFormatError(f"{source}: files of different models: [layers, k] and experts are {sorted(shapes)}")
        ((layers, width), experts) = shapes.pop()
        used, top_k = np.zeros(layers, bool), 0
        for _, part in order:
            chosen = (part.ids >= 0).sum(axis=2)
            used |= chosen.any(axis=0)
            top_k = max(top_k, int(chosen.max(initial=0)))
        if not top_k:
            raise FileFormatError(f"{source}: no token chose any expert; record while the engine serves requests")
        names = np.flatnonzero(used)
        columns: dict[str, list[npt.NDArray[Any]]] = {
            "ids": [],
            "sequence": [],
            "position": [],
            "step": [],
            "source": [],
        }
        lanes = _Lanes()
        for rank, part in order:
            ids = part.ids[:, names]
            whole = ((ids >= 0).sum(axis=2) == top_k).all(axis=1)
            sequence = lanes.sequences(rank, part)[whole]
            ids = ids[whole]
            if width > top_k:
                first = np.argsort(ids < 0, axis=2, kind="stable")[:, :, :top_k]
                ids = np.take_along_axis(ids, first, axis=2)
            logical = self._maps[part.file].astype(id_dtype(experts))[names][np.arange(len(names))[:, None], ids]
            for name, values in (
                ("ids", logical),
                ("sequence", sequence),
                ("position", part.positions[whole]),
                ("step", np.full(len(sequence), part.step)),
                ("source", np.full(len(sequence), rank)),
            ):
                columns[name].append(values)
        joined: dict[str, Any] = {name: np.concatenate(parts) for name, parts in columns.items()}
        tokens = sum(len(part.ids) for _, part in order)
        if len(joined["ids"]) < tokens:
            remark(f"{source}: {left_out(tokens - len(joined['ids']), tokens)}")
        if not len(joined["ids"]):
            raise FileFormatError(
                f"{source}: no token chose {top_k} experts in every one of the {len(names)} MoE layers"
            )
        return trace_of(source, joined, experts, names, " (through last_physical_to_logical_map)")


class _Lanes:
    """Which sequence each token belongs to, told by positions: the record names no request."""

    def __init__(self) -> None:
        self._next = 0
        self._rank = -1
        self._open: tuple[IntArray, IntArray] = (np.empty(0, np.int64), np.empty(0, np.int64))

    def sequences(self, rank: int, part: Pass) -> IntArray:
        """[T] sequence numbers."""
        lengths = np.array(part.pieces, np.int64)
        if not len(lengths):
            return lengths
        ends = np.cumsum(lengths)
        numbers, last = self._open
        starts = part.positions[ends - lengths]
        if rank != self._rank or len(numbers) != len(lengths) or (starts != last + 1).any():
            numbers = np.arange(self._next, self._next + len(lengths))
            self._next += len(lengths)
        self._rank, self._open = rank, (numbers, part.positions[ends - 1])
        return np.repeat(numbers, lengths)


def _numbers(file: Path, field: str, value: Any, count: int) -> IntArray:
    if (
        not isinstance(value, list)
        or len(value) != count
        or not all(type(n) is int and 0 <= n < 1 << 62 for n in value)
    ):
        raise FileFormatError(f"{file}: {field} is not a list of {count} whole numbers, one a token")
    return np.array(value, np.int64)


# Opening a file of `torch.save` that nobody vouches for.


def start_of(path: Path) -> bytes:
    """The first bytes of the pickled structure, where `torch.save` puts it first; empty for any other file."""
    with path.open("rb") as handle:
        start = handle.read(START)
    if not start.startswith(b"PK\x03\x04") or len(start) < 30:
        return b""
    name_ends = 30 + int.from_bytes(start[26:28], "little")
    content = name_ends + int.from_bytes(start[28:30], "little")
    return start[content:] if start[30:name_ends].endswith(b"/data.pkl") else b""
