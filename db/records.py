"""What callers of the store get: frozen copies, good after the database is closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .._types import IntArray
from ..placement.errors import StoreError
from ..placement.model import ModelSpec
from ..placement.objective import Objective
from ..placement.plan import Certificate, Plan, Provenance
from ..placement.statistics import RoutingStatistics
from ..placement.topology import Topology


@dataclass(frozen=True)
class Record:
    """fingerprint: SHA-256 of the content. id: its first 12 digits, what people type. created: when stored, UTC."""

    id: str
    fingerprint: str
    name: str | None
    created: datetime


@dataclass(frozen=True)
class ModelRecord(Record):
    spec: ModelSpec


@dataclass(frozen=True)
class TopologyRecord(Record):
    topology: Topology


@dataclass(frozen=True)
class StatisticsRecord(Record):
    """What stored statistics hold; `Store.statistics_content` has the arrays.

    trace_fingerprint: `RoutingStatistics.fingerprint`, what was counted. tokens: 0 when unknown. sample_tokens: 0
    without a sample. content_bytes: size of the stored file. content_sha256: its SHA-256.
    """

    trace_fingerprint: str
    experts: int
    moe_layers: tuple[int, ...]
    top_k: int | None
    workloads: tuple[str, ...]
    windows: int
    tokens: int
    has_coactivation: bool
    has_transitions: bool
    sample_tokens: int
    content_bytes: int
    content_sha256: str


@dataclass(frozen=True)
class PlanSummary(Record):
    """A stored plan without its tables.

    model, topology: their names, or the label they carry, or their ids. statistics_id: what it was solved on, where
    that is stored. provenance.history is left empty here.
    """

    model_id: str
    model: str
    topology_id: str
    topology: str
    statistics_id: str | None
    layers: int
    experts: int
    devices: int
    slots: int
    certificate: Certificate | None
    provenance: Provenance

    @property
    def solver(self) -> str:
        return self.provenance.solver


@dataclass(frozen=True)
class PlanRecord(PlanSummary):
    plan: Plan


@dataclass(frozen=True)
class EvaluationRecord:
    """A plan judged on steps. steps: how they were made, in words. summary: figures by name."""

    id: str
    plan_id: str
    created: datetime
    steps: str
    steps_fingerprint: str
    objective: Objective | None
    summary: Mapping[str, float]


@dataclass(frozen=True)
class ExportRecord:
    """A plan written in an engine's format. sha256: of the file, empty where a folder was written."""

    plan_id: str
    created: datetime
    format: str
    path: str
    sha256: str


@dataclass(frozen=True)
class StoreDescription:
    """url: without its password. revision: of the tables. counts: rows by kind. size_bytes: what all of it takes."""

    url: str
    backend: str
    revision: str
    counts: Mapping[str, int]
    size_bytes: int


# What callers get of the service's tables: frozen copies, good after the database is closed.


Role = Literal["read", "submit", "approve"]
ROLES: tuple[Role, ...] = ("read", "submit", "approve")
"""Each may do what those before it may."""

JobState = Literal["queued", "running", "done", "failed", "cancelled"]
DecisionState = Literal["kept", "waiting", "published", "rejected", "superseded"]
Cause = Literal["manual", "approved", "automatic", "rollback"]

LoadArray = IntArray


@dataclass(frozen=True)
class Actor:
    """Who does something: the name and role of a token."""

    name: str
    role: Role


@dataclass(frozen=True)
class DeploymentRecord:
    """A model on a topology. plan_id: in force, None before the first. version: publications so far.

    reference_id: statistics of the traffic the plan was last judged on, which ended with window `reference_window`.
    checked: last window a drift check has seen.
    """

    key: int
    name: str
    created: datetime
    model_id: str
    topology_id: str
    policy: Mapping[str, Any]
    plan_id: str | None
    reference_id: str | None
    reference_window: int
    version: int
    checked: int


@dataclass(frozen=True)
class CountWindow:
    """Loads [L, E] of one span of traffic that ended at `ended`.

    source: who counted (a rank, a replica of the engine); the same source, end, workload and counts are one window.
    """

    ended: datetime
    load: LoadArray = field(repr=False)
    workload: str = ""
    source: str = ""


@dataclass(frozen=True)
class WindowRecord:
    """A stored window, or `merged` of them after compaction. pairs: token-expert pairs over all layers."""

    key: int
    ended: datetime
    received: datetime
    workload: str
    pairs: int
    merged: int
    load: LoadArray = field(repr=False)


@dataclass(frozen=True)
class UploadRecord:
    """state: open until all bytes are here, then complete, or refused when they are not what was announced."""

    key: int
    kind: str
    owner: str
    sha256: str
    total_bytes: int
    received_bytes: int
    state: Literal["open", "complete", "refused"]
    created: datetime
    about: Mapping[str, Any] | None


@dataclass(frozen=True)
class JobRecord:
    key: int
    kind: str
    state: JobState
    deployment: str | None
    actor: str
    created: datetime
    started: datetime | None
    finished: datetime | None
    attempts: int
    worker: str
    request: Mapping[str, Any]
    progress: Mapping[str, Any]
    result: Mapping[str, Any] | None
    error: str | None


@dataclass(frozen=True)
class ClaimedJob:
    """A job in the hands of one worker. claim: proves it; void once another worker was given the job."""

    key: int
    kind: str
    deployment: str | None
    request: Mapping[str, Any]
    claim: str
    attempts: int


@dataclass(frozen=True)
class Pulse:
    """A sign of life of a running job: when neither figure changes for long, its worker is gone."""

    key: int
    worker: str
    claim: str
    beat: int


@dataclass(frozen=True)
class Finding:
    """A drift check: alarm or not, with its figures. last_window: the newest window looked at."""

    last_window: int
    alarm: bool
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Judgement:
    """A candidate judged against version `version` of a deployment's plan. publish: put it in force when applied."""

    version: int
    action: Literal["keep", "apply"]
    reason: str
    figures: Mapping[str, Any]
    publish: bool


@dataclass(frozen=True, eq=False)
class Outcome:
    """All that a finished job leaves behind; stored whole or not at all.

    plan: with the statistics it was solved on and their file. plans: more, solved on the same. judgement: needs a plan. rebase: the deployment's
    traffic is compared with these statistics from now on, which end with this window.
    """

    result: Mapping[str, Any]
    plan: Plan | None = None
    plans: Sequence[Plan] = ()
    statistics: RoutingStatistics | None = None
    content: bytes = b""
    finding: Finding | None = None
    judgement: Judgement | None = None
    rebase: int | None = None


@dataclass(frozen=True)
class CheckRecord:
    key: int
    created: datetime
    last_window: int
    alarm: bool
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class DecisionRecord:
    key: int
    deployment: str
    job: int
    created: datetime
    current_id: str | None
    candidate_id: str
    action: Literal["keep", "apply"]
    state: DecisionState
    reason: str
    figures: Mapping[str, Any]
    closed: datetime | None
    closed_by: str | None
    comment: str


@dataclass(frozen=True)
class PublicationRecord:
    deployment: str
    version: int
    plan_id: str
    decision: int | None
    cause: Cause
    actor: str
    comment: str
    created: datetime


@dataclass(frozen=True)
class AuditRecord:
    key: int
    created: datetime
    actor: str
    role: str
    action: str
    subject: str
    detail: Mapping[str, Any]


@dataclass(frozen=True)
class TokenRecord:
    name: str
    role: Role
    created: datetime
    revoked: datetime | None


@dataclass(frozen=True)
class WebhookRecord:
    """Without its secret."""

    key: int
    url: str
    created: datetime


@dataclass(frozen=True)
class EngineRecord:
    """An engine that is asked for its routing, without its key. recorder: name of the folder it writes to, as servers know it.

    every: seconds from one recording to the next, of `span` seconds each. polled: when windows last came, `windows` of them so
    far. failures: in a row since, the last at `failed`.
    """

    deployment: str
    url: str
    recorder: str
    every: float
    span: float
    created: datetime
    polled: datetime | None
    windows: int
    failures: int
    failed: datetime | None
    error: str | None


@dataclass(frozen=True)
class EngineHold:
    """What a server needs to ask an engine. beat: grows while its holder lives. secret: the engine's key."""

    engine: EngineRecord
    key: int
    holder: str
    beat: int
    secret: str | None


@dataclass(frozen=True)
class DeliveryRecord:
    """An event to send. secret: signs it."""

    key: int
    url: str
    secret: str
    event: Mapping[str, Any]
    attempts: int


# Loads in few bytes: the narrowest integers that hold them, byte by byte of their places, compressed. High bytes of
# counts are nearly all alike: standing together they cost next to nothing.


WIDTHS = (1, 2, 4, 8)


def narrow(load: LoadArray) -> npt.NDArray[np.unsignedinteger]:
    """The same counts, none of them negative, as unsigned integers of 1, 2, 4 or 8 bytes, whichever is enough."""
    return load.astype(f"<u{_width(int(load.max(initial=0)))}")


def pack(counts: npt.NDArray[np.unsignedinteger]) -> bytes:
    """What `unpack` reads: the width of `narrow` counts as a digit, then their bytes."""
    import pyarrow as pa

    width = counts.dtype.itemsize
    places = np.ascontiguousarray(np.ascontiguousarray(counts).reshape(-1).view(np.uint8).reshape(-1, width).T)
    packed: bytes = pa.Codec("zstd", compression_level=1).compress(places).to_pybytes()
    return b"%d" % width + packed


def unpack(content: bytes, shape: tuple[int, int]) -> LoadArray:
    """Raises StoreError for what is damaged."""
    import pyarrow as pa

    try:
        width = WIDTHS[WIDTHS.index(int(content[:1]))]
        raw = pa.decompress(content[1:], decompressed_size=shape[0] * shape[1] * width, codec="zstd")
        places = np.frombuffer(raw, np.uint8).reshape(width, -1).T
        counts = np.ascontiguousarray(places).view(f"<u{width}").reshape(shape)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise StoreError(f"a count window was damaged after it was stored ({error}); restore a copy") from None
    return counts.astype(np.int64)


def _width(largest: int) -> int:
    return next(width for width in WIDTHS if largest < 1 << 8 * width)
