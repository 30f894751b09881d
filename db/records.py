"""What callers of the store get, frozen and good after the database is closed: records, as the API answers with them,
and what workers and servers hand to and fro."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, InstanceOf

from .._types import IntArray
from ..placement.model import ModelSpec
from ..placement.objective import Objective
from ..placement.plan import Certificate, Plan, Provenance
from ..placement.statistics import RoutingStatistics
from ..placement.topology import Topology


class Stored(BaseModel):
    """A row as others see it."""

    model_config = ConfigDict(frozen=True, from_attributes=True, arbitrary_types_allowed=True)


class NamedRecord(Stored):
    """fingerprint: SHA-256 of the content. id: its first 12 digits, what people type. created: when stored, UTC."""

    id: str
    fingerprint: str
    name: str | None
    created: datetime


class ModelRecord(NamedRecord):
    spec: ModelSpec


class TopologyRecord(NamedRecord):
    topology: Topology


class TopologySummary(NamedRecord):
    """label: the name that the topology itself carries."""

    devices: int
    nodes: int
    label: str


class StatisticsRecord(NamedRecord):
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


class PlanSummary(NamedRecord):
    """A stored plan without its tables.

    model, topology: their names, or the label they carry, or their ids. statistics_id: what it was solved on, where
    that is stored. claimed_by: whose word the certificate is, None where it was proven here. provenance.history is left
    empty here.
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
    certificate: InstanceOf[Certificate] | None
    claimed_by: str | None
    provenance: InstanceOf[Provenance]

    @property
    def solver(self) -> str:
        return self.provenance.solver


class PlanRecord(PlanSummary):
    plan: InstanceOf[Plan]


class EvaluationRecord(Stored):
    """A plan judged on steps. steps: how they were made, in words. summary: figures by name."""

    id: str
    plan_id: str
    created: datetime
    steps: str
    steps_fingerprint: str
    objective: Objective | None
    summary: Mapping[str, float]


class ExportRecord(Stored):
    """A plan written in an engine's format. sha256: of the file, empty where a folder was written."""

    plan_id: str
    created: datetime
    format: str
    path: str
    sha256: str


class StoreDescription(Stored):
    """url: without its password. revision: of the tables. counts: rows by kind. size_bytes: what all of it takes."""

    url: str
    backend: str
    revision: str
    counts: Mapping[str, int]
    size_bytes: int


Role = Literal["read", "submit", "approve"]
ROLES: tuple[Role, ...] = ("read", "submit", "approve")
"""Each may do what those before it may."""

JobState = Literal["queued", "running", "done", "failed", "cancelled"]
DecisionState = Literal["kept", "waiting", "published", "rejected", "superseded"]
Cause = Literal["manual", "approved", "automatic", "rollback"]

LoadArray = IntArray


@dataclass(frozen=True)
class Actor:
    """Who does something: the name and role of a token. deployments: those that it is for, None for all. client: the
    address that the request came from, where one did."""

    name: str
    role: Role
    deployments: tuple[str, ...] | None = None
    client: str | None = None

    def may(self, role: Role) -> bool:
        """Whether its role is this or a higher one."""
        return ROLES.index(self.role) >= ROLES.index(role)

    def sees(self, deployment: str | None) -> bool:
        """Whether it is for this deployment; None for what belongs to none."""
        return self.deployments is None or deployment is None or deployment in self.deployments


class DeploymentRecord(Stored):
    """A model on a topology. plan_id: in force, None before the first. version: publications so far.

    reference_id: statistics of the traffic the plan was last judged on, which ended with window `reference_window`.
    checked: last window a drift check has seen. hold: why nothing is published automatically: who rolled back, when,
    and the plans that are not to come back. alarm: the alarm that nobody has acted on yet: when, and its figures.
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
    hold: Mapping[str, Any] | None
    alarm: Mapping[str, Any] | None


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


class UploadRecord(Stored):
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


class JobRecord(Stored):
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
class Heartbeat:
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
class JobOutcome:
    """All that a finished job leaves behind; stored whole or not at all.

    plan: with the statistics it was solved on and their file. plans: more, solved on the same. judgement: needs a plan.
    rebase: the deployment's traffic is compared with these statistics from now on, which end with this window.
    """

    result: Mapping[str, Any]
    plan: Plan | None = None
    plans: Sequence[Plan] = ()
    statistics: RoutingStatistics | None = None
    content: bytes = b""
    finding: Finding | None = None
    judgement: Judgement | None = None
    rebase: int | None = None


class CheckRecord(Stored):
    key: int
    created: datetime
    last_window: int
    alarm: bool
    figures: Mapping[str, Any]


class DeploymentOverview(Stored):
    """A deployment in a list: its model by name, the last check, and how many windows it has. regret: of the last check
    that knows one. alarms: so far. waiting: decisions for approval. jobs: by state, those that have not ended."""

    deployment: DeploymentRecord
    model: str
    devices: int
    check: CheckRecord | None
    windows: int
    regret: float | None
    alarms: int
    waiting: int
    jobs: Mapping[str, int]


class DecisionRecord(Stored):
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


class PublicationRecord(Stored):
    deployment: str
    version: int
    plan_id: str
    decision: int | None
    cause: Cause
    actor: str
    comment: str
    created: datetime


class AuditRecord(Stored):
    key: int
    created: datetime
    actor: str
    role: str
    action: str
    subject: str
    detail: Mapping[str, Any]
    client: str | None


class TokenRecord(Stored):
    """deployments: those that it is for, None for all. used: when it was last, to the minute."""

    name: str
    role: Role
    created: datetime
    revoked: datetime | None
    deployments: tuple[str, ...] | None
    expires: datetime | None
    used: datetime | None


class WebhookRecord(Stored):
    """Without its secret. events: kinds that are sent, None for all. old_until: until when the former secret signs,
    too."""

    key: int
    url: str
    created: datetime
    events: tuple[str, ...] | None = None
    old_until: datetime | None = None


class DeliveryRecord(Stored):
    """An event for a webhook. key: its id in what is sent. outcome: what came of the last attempt, at `attempted`. due:
    not sent before."""

    key: int
    created: datetime
    event: Mapping[str, Any]
    state: Literal["due", "sent", "given up"]
    attempts: int
    outcome: str
    attempted: datetime | None
    due: datetime | None


class EngineRecord(Stored):
    """An engine that is asked for its routing, without its key. recorder: name of the folder it writes to, as servers
    know it.

    every: seconds from one recording to the next, of `span` seconds each. polled: when windows last came, `windows` of
    them so far. failures: in a row since, the last at `failed`.
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
    """What a server needs to ask an engine. beat: grows while its holder lives. secret: the engine's key, as it
    is stored."""

    engine: EngineRecord
    key: int
    holder: str
    beat: int
    secret: str | None


@dataclass(frozen=True)
class DueDelivery:
    """An event to send. deployment: its key. secrets: each signs it; as they are stored."""

    key: int
    webhook: int
    deployment: int
    url: str
    secrets: Sequence[str]
    event: Mapping[str, Any]
    attempts: int
