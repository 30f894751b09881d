"""Routing as the service keeps it, turned into what solvers read."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..db.records import WindowRecord
from ..db.store import Store
from ..placement.errors import InputError
from ..placement.model import ModelSpec
from ..placement.statistics import RoutingStatistics
from ..placement.trace import RoutingTrace
from ..profiler.aggregate import aggregate
from ..profiler.statistics_file import read_statistics, write_statistics
from ..profiler.trace_files import read_trace, trace_of_shards, trace_shards
from .policy import Policy
from .shards import content_of

SAMPLE_TOKENS = 200_000
UNPACKED_LIMIT = 1 << 30
"""Bytes a statistics file may unpack to: what compresses well fits a small upload and not the memory."""
TRACE_LIMIT = 1 << 28
"""Expert ids in one uploaded trace."""


def from_windows(windows: Sequence[WindowRecord], model: ModelSpec) -> RoutingStatistics:
    """Statistics of count windows, in their order.

    Raises:
        InputError: no windows.
    """
    if not windows:
        raise InputError("there are no count windows to solve on yet; send some to the deployment")
    workloads = tuple(dict.fromkeys(window.workload for window in windows))
    load = np.stack([window.load for window in windows]).astype(np.float64)
    codes = np.array([workloads.index(window.workload) for window in windows], dtype=np.int64)
    identity = repr((workloads, codes.tolist(), model.moe_layers)).encode()
    return RoutingStatistics(
        experts=model.experts,
        moe_layers=model.moe_layers,
        load=load,
        window_workload=codes,
        workloads=workloads,
        top_k=model.top_k,
        tokens=int(load.sum(axis=(0, 2)).max() / model.top_k),
        fingerprint=hashlib.sha256(identity + load.tobytes()).hexdigest(),
    )


class Upload(io.BytesIO):
    """A file somebody sent, in memory."""

    name = "upload"


def to_bytes(statistics: RoutingStatistics) -> bytes:
    """The statistics as their file."""
    file = io.BytesIO()
    write_statistics(statistics, file)
    return file.getvalue()


def statistics_of(content: bytes) -> RoutingStatistics:
    """Reads a statistics file.

    Raises:
        FileFormatError: it is not one, or damaged.
    """
    return read_statistics(Upload(content), limit=UNPACKED_LIMIT)


def stored_statistics(store: Store, ref: str) -> RoutingStatistics:
    """Statistics kept in the store."""
    return statistics_of(store.statistics_content(ref))


def check_trace(content: bytes, model: ModelSpec) -> Mapping[str, Any]:
    """What a Parquet shard holds, when it is one of this model.

    Raises:
        FileFormatError: not a shard, or damaged. InputError: of another model.
    """
    shards = trace_shards(Upload(content))
    header = shards[0].header
    shape = (header.num_experts, header.top_k, header.moe_layers)
    if shape != (model.experts, model.top_k, model.moe_layers):
        raise InputError(
            f"the trace has {shape[0]} experts, top-{shape[1]}, MoE layers {list(shape[2])}; the deployment's model "
            f"has {model.experts}, top-{model.top_k}, {list(model.moe_layers)}"
        )
    ids = sum(sum(shard.rows) for shard in shards) * header.ids_per_token
    if ids > TRACE_LIMIT:
        raise InputError(f"the trace holds {ids:,} expert ids, at most {TRACE_LIMIT:,} are taken; send several")
    trace = trace_of_shards(shards)
    if not trace.num_tokens:
        raise InputError("the trace holds no token")
    return {"tokens": trace.num_tokens, "workloads": list(trace.workloads)}


def trace_statistics(contents: Sequence[bytes]) -> RoutingStatistics:
    """Statistics of uploaded traces, oldest first."""
    return aggregate([Upload(content) for content in contents], sample_tokens=SAMPLE_TOKENS, workers=1)


def trace_of(content: bytes) -> RoutingTrace:
    """An uploaded trace, in memory."""
    return read_trace(Upload(content))


# Which of a deployment's routing is solved on and which is held out: always the newest is, so that a plan is judged
# on what came after all it was made from.


def held_windows(count: int, policy: Policy) -> int:
    """How many of the newest of `count` windows are held out."""
    return min(policy.recent // 2, count // 4)


def solving_windows(store: Store, deployment: str, policy: Policy, most: int) -> Sequence[WindowRecord]:
    """The newest windows that may be solved on, at most so many."""
    windows = store.windows.page(deployment, limit=most + policy.recent // 2)
    return windows[: len(windows) - held_windows(len(windows), policy)][-most:]


def judging_windows(store: Store, deployment: str, policy: Policy) -> Sequence[WindowRecord]:
    """The newest windows, held out of every solve."""
    windows = store.windows.page(deployment, limit=2 * policy.recent)
    return windows[len(windows) - held_windows(len(windows), policy) :]


def solving_traces(store: Store, deployment: str, policy: Policy) -> RoutingStatistics:
    """Statistics of all uploaded traces but the newest.

    Raises:
        InputError: fewer than two were uploaded.
    """
    uploads = store.uploads.complete("trace", deployment, limit=policy.keep_traces)
    if len(uploads) < 2:
        raise InputError(f"{len(uploads)} traces are uploaded; solving on tokens takes two, the newest is held out")
    return trace_statistics([content_of(store, upload) for upload in reversed(uploads[1:])])


def judging_trace(store: Store, deployment: str) -> RoutingTrace:
    """The newest uploaded trace, held out of every solve.

    Raises:
        InputError: none was uploaded.
    """
    uploads = store.uploads.complete("trace", deployment, limit=1)
    if not uploads:
        raise InputError("no trace is uploaded to judge on; upload one, or judge on counts")
    return trace_of(content_of(store, uploads[0]))
