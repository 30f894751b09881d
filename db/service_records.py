"""What callers get of the service's tables: frozen copies, good after the database is closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..placement.plan import Plan
from ..placement.statistics import RoutingStatistics

Role = Literal["read", "submit", "approve"]
ROLES: tuple[Role, ...] = ("read", "submit", "approve")
"""Each may do what those before it may."""

JobState = Literal["queued", "running", "done", "failed", "cancelled"]
DecisionState = Literal["kept", "waiting", "published", "rejected", "superseded"]
Cause = Literal["manual", "approved", "automatic", "rollback"]

LoadArray = npt.NDArray[np.int64]


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
