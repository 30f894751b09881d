"""SGLang's per_token records: tokens of forward passes, put together into a trace."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..placement.errors import FileFormatError, InputError
from ..placement.trace import RoutingTrace, id_dtype
from .engine_counts import whole_number
from .torch_records import array_of

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pass:
    """One rank's tokens in one forward pass. ids: [T, L, K] physical, -1 where none was chosen. pieces: tokens of each
    sequence in turn."""

    file: Path
    where: str
    step: int
    ids: npt.NDArray[np.integer[Any]]
    positions: Ints
    pieces: list[int]


class TokenPasses:
    """Passes as they are read; `trace` puts them together."""

    def __init__(self) -> None:
        self._ranks: dict[int, dict[int, Pass]] = {}
        self._digests: dict[int, Any] = {}
        self._maps: dict[Path, Ints] = {}

    def add(self, file: Path, where: str, record: dict[str, Any], mapping: Ints) -> None:
        """Takes one record: `topk_ids_of_layer` [L, T, K], `positions` and `input_ids` [T], `extend_seq_lens`."""
        step = whole_number(file, f"{where}.forward_pass_id", record.get("forward_pass_id"))
        rank = whole_number(file, f"{where}.rank", record.get("rank"))
        ids = array_of(file, f"{where}.topk_ids_of_layer", record.get("topk_ids_of_layer"), 3)
        layers, tokens, _ = ids.shape
        if layers != len(mapping):
            raise FileFormatError(
                f"{file}: {where}.topk_ids_of_layer has {layers} layers, last_physical_to_logical_map {len(mapping)}"
            )
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
        kept = {digest.digest(): rank for rank, digest in sorted(self._digests.items(), reverse=True)}
        order = [
            (rank, self._ranks[rank][step]) for rank in sorted(kept.values()) for step in sorted(self._ranks[rank])
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
        joined = {name: np.concatenate(parts) for name, parts in columns.items()}
        if not len(joined["ids"]):
            raise FileFormatError(
                f"{source}: no token chose {top_k} experts in every one of the {len(names)} MoE layers"
            )
        try:
            return RoutingTrace.from_arrays(
                joined.pop("ids"), num_experts=experts, moe_layers=[int(layer) for layer in names], **joined
            )
        except InputError as error:
            raise FileFormatError(f"{source}: {error} (through last_physical_to_logical_map)") from None


class _Lanes:
    """Which sequence each token belongs to, told by positions: the record names no request."""

    def __init__(self) -> None:
        self._next = 0
        self._rank = -1
        self._open: tuple[Ints, Ints] = (np.empty(0, np.int64), np.empty(0, np.int64))

    def sequences(self, rank: int, part: Pass) -> Ints:
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


def _numbers(file: Path, field: str, value: Any, count: int) -> Ints:
    if (
        not isinstance(value, list)
        or len(value) != count
        or not all(type(n) is int and 0 <= n < 1 << 62 for n in value)
    ):
        raise FileFormatError(f"{file}: {field} is not a list of {count} whole numbers, one a token")
    return np.array(value, np.int64)
