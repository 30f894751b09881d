"""A trace on disk, of any size, into statistics: streamed over row groups, on several cores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise

import numpy as np

from .._arguments import check_types
from ..placement.errors import InputError, MoeplaceError
from ..placement.statistics import RoutingStatistics, StatisticsAccumulator, Stream
from .files import Source
from .trace_files import TraceShard, count_streams, read_row_group, trace_shards

IDS_PER_TASK = 1 << 28
IDS_WORTH_A_PROCESS = 1 << 26
MOST_WORKERS = 8
"""Processes taken unasked: each holds its own tables and sample, about 0.4 GB for 58 layers of 256 experts."""

Unit = tuple[TraceShard, int]
"""A row group: its shard and number."""


@check_types
def aggregate(
    path: Source | Sequence[Source],
    *,
    sample_tokens: int = 200_000,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RoutingStatistics:
    """Counts a folder of shards, or one shard, into statistics; the same as `RoutingStatistics.from_trace` would give.

    Memory is bounded: one row group, the pair tables and the sample a process, whatever the size of the trace. The
    result does not depend on `workers`.

    Args:
        path: a folder of shards, one shard, or several in order; shards may be binary file objects.
        sample_tokens: tokens kept for building steps, as whole sequences.
        workers: processes (default: one a core up to 8, fewer for a small trace).
        progress: called with (tokens done, tokens in all) in this process.

    Returns:
        Loads by window, co-activation, transitions and the token sample.

    Raises:
        FileFormatError: damaged shards, see `scan_trace`. InputError: no tokens, or no such path.
        MoeplaceError: a worker process was killed.
    """
    return aggregate_shards(trace_shards(path), sample_tokens=sample_tokens, workers=workers, progress=progress)


def aggregate_shards(
    shards: Sequence[TraceShard],
    *,
    sample_tokens: int = 200_000,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RoutingStatistics:
    """As `aggregate`, of shards that are open already."""
    if workers is not None and workers < 1:
        raise InputError(f"workers ({workers}) must be at least 1, or None for one a core")
    units = [(shard, group) for shard in shards for group in range(shard.row_groups)]
    total = sum(sum(shard.rows) for shard in shards)
    ids = total * shards[0].header.ids_per_token
    used = min(_cores(), MOST_WORKERS, -(-ids // IDS_WORTH_A_PROCESS)) if workers is None else workers
    used = max(1, min(used, len(units)))
    done = 0
    if used == 1:
        statistics = _empty(shards[0], sample_tokens, {})
        for shard, group in units:
            _count(statistics, shard, group)
            done += shard.rows[group]
            if progress is not None:
                progress(done, total)
        return statistics.finish()
    tasks = _tasks(units, max(used, -(-ids // IDS_PER_TASK)))
    parts = _parts(tasks, sample_tokens, used)
    for number, task in enumerate(tasks):
        if number == 0:
            statistics = next(parts)
        else:
            statistics.merge(next(parts))
        done += sum(shard.rows[group] for shard, group in task)
        if progress is not None:
            progress(done, total)
    parts.close()
    return statistics.finish()


def _cores() -> int:
    import joblib

    return int(joblib.cpu_count())


def _empty(
    shard: TraceShard, sample_tokens: int, preceding: Counter[Stream] | dict[Stream, int]
) -> StatisticsAccumulator:
    return StatisticsAccumulator(
        num_experts=shard.header.num_experts,
        moe_layers=shard.header.moe_layers,
        top_k=shard.header.top_k,
        sample_tokens=sample_tokens,
        preceding=preceding,
        model=shard.header.model,
        batches=shard.header.batches,
    )


def _count(statistics: StatisticsAccumulator, shard: TraceShard, group: int) -> None:
    for block in read_row_group(shard, group, tokens=1 << 16, routing_only=True):
        statistics.add(block)


def _tasks(units: list[Unit], count: int) -> list[list[Unit]]:
    """Runs of row groups with about equally many tokens each."""
    ends = np.cumsum([shard.rows[group] for shard, group in units])
    cuts = np.searchsorted(ends, np.arange(1, count) * (ends[-1] / count), side="left") + 1
    bounds = sorted({0, *cuts.tolist(), len(units)})
    return [units[start:stop] for start, stop in pairwise(bounds)]


def _parts(tasks: list[list[Unit]], sample_tokens: int, workers: int) -> Generator[StatisticsAccumulator, None, None]:
    """The tasks' counts, in their order, from worker processes that need no `__main__` guard in the caller's script."""
    import joblib

    preceding: Counter[Stream] = Counter()
    jobs = []
    for task in tasks:
        jobs.append(joblib.delayed(_run)(task, sample_tokens, dict(preceding)))
        if task is not tasks[-1]:
            for shard, group in task:
                preceding.update(count_streams(shard, group))
    try:
        yield from joblib.Parallel(n_jobs=workers, backend="loky", return_as="generator")(jobs)
    except BrokenProcessPool as error:
        raise MoeplaceError(
            f"a worker process was killed while counting ({error}); most likely memory ran out: use fewer workers, "
            "or a smaller sample_tokens"
        ) from None


def _run(task: list[Unit], sample_tokens: int, preceding: dict[Stream, int]) -> StatisticsAccumulator:
    statistics = _empty(task[0][0], sample_tokens, preceding)
    for shard, group in task:
        _count(statistics, shard, group)
    return statistics
