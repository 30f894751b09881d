"""What solvers are shown of a record: statistics of its training part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .comparison import part, solving_statistics
from .options import HeldOutOptions
from .output import Update
from .parse import Routing, existing, read_routing, recorded_model

if TYPE_CHECKING:
    from ..placement.statistics import RoutingStatistics


def training_statistics(
    path: Path, held_out: HeldOutOptions, seed: int, update: Update
) -> tuple[Routing, RoutingStatistics, str]:
    """The record, the statistics to solve on, and which part of the record they are, in words.

    A Parquet trace that is used whole is counted in bounded memory, whatever its size.
    """
    from ..profiler.trace_files import is_trace

    if held_out.held_out == 0.0 and is_trace(existing(path)):
        statistics = count_parquet(path, update)
        return Routing(path, None, statistics, recorded_model(path)), statistics, f"solved on all of {path}"
    routing = read_routing(path)
    if routing.trace is None:
        assert routing.statistics is not None
        return routing, routing.statistics, f"solved on all of {path}: statistics are used whole"
    parted = part(routing, held_out, seed)
    return routing, solving_statistics(routing, parted), parted.description


def count_parquet(path: Path, update: Update, sample_tokens: int = 200_000) -> RoutingStatistics:
    """Statistics of a Parquet trace of any size."""
    from ..profiler.aggregate import aggregate

    def listen(done: int, total: int) -> None:
        update(f"counted {done:,} of {total:,} tokens", done / max(total, 1))

    return aggregate(path, sample_tokens=sample_tokens, progress=listen)
