"""Parquet traces: one row a token, written in shards, one writer a rank, read back in bounded memory.

Columns: `step` int64 (forward call), `source` int32 (rank that recorded the token), `sequence` int64, `position` int32,
`workload` dictionary of strings, `expert_ids` fixed-size list of L*k uint8 or uint16 (layer by layer, highest gate
weight first), `gate_weights` fixed-size list of L*k float32 that hold float16 values (Spark knows no half floats; split
into byte streams the empty bytes compress away). `step`, `source` and `gate_weights` may be absent. One list column,
dictionary-encoded under zstd, was both smaller and quicker to read than a column a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from ..placement.errors import InputError
from ..placement.model import ModelSpec
from ..placement.trace import RoutingTrace
from .shard_sequence import ShardSequence
from .trace_header import TraceHeader, trace_schema
from .trace_shards import empty_trace, read_row_group, trace_shards

RANK_SHIFT = 40


class TraceWriter:
    """Writes tokens of one rank as shards `rank00000-00000.parquet`, ... in `folder`.

    A shard appears under its name only when complete: a killed process leaves whole shards and no torn one. Memory is
    bounded by one row group (about four million expert ids). Ranks number their sequences independently; the rank is
    put above bit 40 of the stored sequence number, so that they stay distinct in the folder they share.

    Use it as a context manager, or call `close`. Not for concurrent use; ranks each have their own.

    Raises:
        InputError: the folder already holds shards of this rank, or the shape is impossible.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        num_experts: int,
        top_k: int,
        moe_layers: Sequence[int],
        rank: int = 0,
        gate_weights: bool = True,
        rows_per_shard: int = 1 << 18,
        model: ModelSpec | None = None,
    ) -> None:
        if not 0 <= rank < 1 << 22 or rows_per_shard < 1:
            raise InputError(f"rank ({rank}) must be 0 or more and rows_per_shard ({rows_per_shard}) at least 1")
        layers = tuple(int(layer) for layer in moe_layers)
        self._header = TraceHeader(int(num_experts), int(top_k), layers, model)
        schema = trace_schema(self._header, gate_weights=gate_weights)
        self._rank = rank
        self._shards = ShardSequence(Path(folder), schema, self._header, rank, rows_per_shard)

    def add(
        self,
        expert_ids: npt.ArrayLike,
        *,
        gate_weights: npt.ArrayLike | None = None,
        sequence: npt.ArrayLike,
        position: npt.ArrayLike,
        step: int | npt.ArrayLike,
        workload: str = "",
    ) -> None:
        """Appends tokens: expert_ids and gate_weights [T, L, k], sequence and position [T], step one number or [T].

        Raises:
            InputError: shapes, ids or numbers that are not valid; nothing of the call is written then.
        """
        ids = np.asarray(expert_ids)
        shape = (len(self._header.moe_layers), self._header.top_k)
        if ids.ndim != 3 or ids.shape[1:] != shape:
            raise InputError(
                f"expert_ids has shape {ids.shape}, expected [tokens, {shape[0]} layers, {shape[1]} experts]"
            )
        if (gate_weights is not None) != ("gate_weights" in self._shards.columns):
            wanted, given = ("with", "without") if gate_weights is None else ("without", "with")
            raise InputError(f"this TraceWriter was opened {wanted} gate_weights, but add was called {given} them")
        steps = np.full(len(ids), step, dtype=np.int64) if np.ndim(step) == 0 else step
        block = RoutingTrace.from_arrays(
            ids,
            num_experts=self._header.num_experts,
            gate_weights=gate_weights,
            sequence=sequence,
            position=position,
            step=steps,
            source=np.full(len(ids), self._rank, dtype=np.int64),
            moe_layers=self._header.moe_layers,
        )
        if block.num_tokens and not (block.sequence.min() >= 0 and block.sequence.max() < 1 << RANK_SHIFT):
            raise InputError(
                f"sequence numbers run from {block.sequence.min()} to {block.sequence.max()}; they must be from 0 to "
                f"2**{RANK_SHIFT} - 1, since the rank is stored above them"
            )
        self._shards.add(block, (workload,), block.sequence + (self._rank << RANK_SHIFT))

    def close(self) -> None:
        """Completes the last shard; a writer that was given no token leaves one empty shard, so the shape is known."""
        self._shards.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What was recorded before an error elsewhere is good, and often dear: keep it.
        self.close()


def write_trace(trace: RoutingTrace, folder: str | Path, *, model: ModelSpec | None = None) -> None:
    """Writes a trace held in memory as shards; `read_trace` gives the same trace back.

    Raises:
        InputError: the folder already holds a trace.
    """
    header = TraceHeader(trace.num_experts, trace.top_k, trace.moe_layers, model)
    schema = trace_schema(
        header,
        gate_weights=trace.gate_weights is not None,
        step=trace.step is not None,
        source=trace.source is not None,
    )
    shards = ShardSequence(Path(folder), schema, header, 0, 1 << 18)
    shards.add(trace, trace.workloads, trace.sequence)
    shards.close()


def scan_trace(path: str | Path, tokens: int = 65536) -> Iterator[RoutingTrace]:
    """Blocks of at most `tokens` tokens of a folder of shards or of one shard, in the order of the files' names.

    One row group is in memory at a time. Everything read is validated.

    Raises:
        FileFormatError: a file that is truncated, ragged, of a newer version, or at odds with the other shards.
    """
    if tokens < 1:
        raise InputError(f"tokens ({tokens}) must be at least 1")
    for shard in trace_shards(path):
        for group in range(shard.row_groups):
            yield from read_row_group(shard, group, tokens=tokens)


def read_trace(path: str | Path) -> RoutingTrace:
    """The whole trace of a folder of shards, or of one shard, in memory.

    Raises:
        FileFormatError: as `scan_trace`.
    """
    shards = trace_shards(path)
    blocks = [block for shard in shards for group in range(shard.row_groups) for block in read_row_group(shard, group)]
    return RoutingTrace.concatenate(blocks) if blocks else empty_trace(shards[0].header)


def read_header(path: str | Path) -> TraceHeader:
    """Shape and model of a trace, without its tokens.

    Raises:
        FileFormatError: as `scan_trace`.
    """
    return trace_shards(path)[0].header
