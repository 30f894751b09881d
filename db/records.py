"""What callers of the store get: frozen copies, good after the database is closed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from ..placement.model import ModelSpec
from ..placement.objective import Objective
from ..placement.plan import Certificate, Plan, Provenance
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
