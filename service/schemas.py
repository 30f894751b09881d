"""What the API takes, and what it gives where that is not a record of the store as it is.

A request is one model from end to end: the route's body, the client's and so the command's, and what its job keeps. The
job's, a subclass, has ids for names and nothing left out that a policy decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from .._http import check_address
from ..db.records import ClaimedJob, PlanRecord, PlanSummary, TopologyRecord, TopologySummary, WindowRecord
from ..db.uploads import UPLOAD_LIMIT
from ..placement.degraded import Kind
from ..placement.errors import InputError
from ..placement.model import ModelSpec
from ..placement.plan import plan_to_dict
from ..placement.step_mix import named_batch
from ..placement.steps import Batch
from ..placement.topology import Topology
from ..profiler.engine_servers import EngineServer
from .policy import AskedBatches, AskedObjective, EngineName, PlainObject, Policy, SlotCounts, check_plain

Name = Annotated[str, Field(min_length=1, max_length=100, description="A name, not one that reads as an id.")]
Ref = Annotated[str, Field(min_length=1, max_length=200, description="A name, or the first digits of an id.")]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _is_plain(cls, data: Any) -> Any:
        return check_plain(data)


class JobBody(Body):
    """A body that asks for a job."""

    @classmethod
    def of(cls, job: ClaimedJob) -> Self:
        """The request of a job."""
        return cls.model_validate({**job.request, "deployment": job.deployment})

    def payload(self) -> dict[str, Any]:
        """What a job keeps of it: the job knows its deployment."""
        return self.model_dump(mode="json", exclude={"deployment"})


MOST_CELLS = 1 << 20
"""Layers times experts of a model: what every window and plan holds one or more of."""


def _bounded(spec: ModelSpec) -> ModelSpec:
    if spec.layers * spec.experts > MOST_CELLS:
        raise ValueError(f"{spec.layers} layers of {spec.experts} experts; at most {MOST_CELLS} together are taken")
    return spec


class ModelIn(Body):
    spec: Annotated[ModelSpec, AfterValidator(_bounded)]
    name: Name | None = None


MOST_DEVICES = 4096


class TopologyIn(Body):
    """topology: in full, with counts, or {"preset": NAME, "nodes": n, "devices_per_node": m}."""

    topology: dict[str, Any]
    name: Name | None = None


class DeploymentIn(Body):
    name: Name
    model: Ref
    topology: Ref
    policy: Policy = Policy()


class TopologyView(BaseModel):
    id: str
    name: str | None
    created: datetime
    devices: int
    nodes: int
    label: str

    @classmethod
    def of(cls, record: TopologySummary) -> TopologyView:
        return cls(**record.model_dump(include=set(cls.model_fields)))


class TopologyFull(TopologyView):
    topology: Topology

    @classmethod
    def full(cls, record: TopologyRecord) -> TopologyFull:
        cluster = record.topology
        return cls(
            id=record.id,
            name=record.name,
            created=record.created,
            devices=cluster.num_devices,
            nodes=cluster.num_nodes,
            label=cluster.name,
            topology=cluster,
        )


class PlanView(BaseModel):
    """A plan without its tables. value, bound, gap: of its solver's own objective. noise, noise_gap: how much of value
    and gap sampling noise alone makes, of plans searched on counts. claimed_by: whose word they are;
    null where they were proven by this service."""

    id: str
    name: str | None
    created: datetime
    model_id: str
    topology_id: str
    statistics_id: str | None
    layers: int
    experts: int
    devices: int
    slots: int
    solver: str
    seed: int
    options: Mapping[str, Any]
    seconds: float
    stop: str
    trace_fingerprint: str
    objective: str | None
    value: float | None
    bound: float | None
    gap: float | None
    noise: float | None
    noise_gap: float | None
    claimed_by: str | None

    @classmethod
    def of(cls, record: PlanSummary) -> PlanView:
        certificate, made = record.certificate, record.provenance
        return cls(
            **{name: getattr(record, name) for name in cls.model_fields if hasattr(record, name) and name != "solver"},
            solver=made.solver,
            seed=made.seed,
            options=made.options,
            seconds=made.seconds,
            stop=made.stop,
            trace_fingerprint=made.trace_fingerprint,
            objective=certificate.objective if certificate else None,
            value=certificate.value if certificate else None,
            bound=certificate.bound if certificate else None,
            gap=certificate.gap if certificate else None,
            noise=certificate.noise if certificate else None,
            noise_gap=certificate.noise_gap if certificate else None,
        )


class PlanFull(PlanView):
    """document: the plan as its file holds it."""

    document: Mapping[str, Any]

    @classmethod
    def of(cls, record: PlanSummary) -> PlanFull:
        assert isinstance(record, PlanRecord)
        return cls(**PlanView.of(record).model_dump(), document=plan_to_dict(record.plan))


class PlanIn(Body):
    """document: a plan as its file holds it."""

    document: dict[str, Any]
    name: Name | None = None


class WindowView(BaseModel):
    key: int
    ended: datetime
    received: datetime
    workload: str
    pairs: int
    merged: int
    load: list[list[int]]

    @classmethod
    def of(cls, record: WindowRecord) -> WindowView:
        fields = {name: getattr(record, name) for name in cls.model_fields if name != "load"}
        return cls(**fields, load=record.load.tolist())


class Taken(BaseModel):
    """received: windows in the request. new: of them, not stored before."""

    received: int
    new: int


class UploadIn(Body):
    """kind: "trace" for a Parquet shard of a deployment's routing, "statistics" for a statistics file."""

    kind: Literal["trace", "statistics"]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    total_bytes: Annotated[int, Field(ge=1, le=UPLOAD_LIMIT)]
    deployment: Ref | None = None


class SolveRequest(JobBody):
    """Of a deployment, or of a stored model, topology and statistics.

    routing: what of a deployment's record to solve on, its newest `windows` count windows or its uploaded traces.
    slots: one number for all layers, or one for each. engine: what the plan is for. batches: the steps it is for. Left
    out: solver, options, seconds, slots, objective, engine and batches are those of the deployment's policy.
    """

    deployment: Ref | None = None
    routing: Literal["counts", "tokens"] = "counts"
    windows: Annotated[int, Field(ge=1, le=10_000)] = 256
    model: Ref | None = None
    topology: Ref | None = None
    statistics: Ref | None = None
    solver: Annotated[str, Field(max_length=50)] | None = None
    options: PlainObject | None = None
    seconds: Annotated[float, Field(gt=0.0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    slots: SlotCounts | None = None
    objective: AskedObjective | None = None
    engine: EngineName | None = None
    batches: AskedBatches | None = None


class SolveJob(SolveRequest):
    model: Ref
    topology: Ref
    solver: Annotated[str, Field(max_length=50)]
    options: PlainObject
    seconds: Annotated[float, Field(gt=0.0)]
    objective: AskedObjective


class DecideRequest(JobBody):
    """candidate: a stored plan, judged against the one in force on the deployment's newest routing.

    current: judge against this one instead. record: keep the decision, to be approved or published as the policy says;
    otherwise it is a what-if.
    """

    deployment: Ref
    candidate: Ref
    current: Ref | None = None
    routing: Literal["counts", "tokens"] = "counts"
    record: bool = True


class PublishIn(Body):
    plan: Ref
    comment: Annotated[str, Field(max_length=2000)] = ""


class RollbackIn(Body):
    version: Annotated[int, Field(ge=1, le=(1 << 31) - 1)]
    comment: Annotated[str, Field(max_length=2000)] = ""


class CommentIn(Body):
    comment: Annotated[str, Field(max_length=2000)] = ""


def _callable(url: str) -> str:
    try:
        check_address(url)
    except InputError as error:
        raise ValueError(str(error)) from None
    return url


Address = Annotated[str, Field(max_length=2000, pattern=r"^https?://[!-~]+$"), AfterValidator(_callable)]


EventKind = Literal["drift.alarm", "decision.made", "decision.rejected", "plan.published"]


class WebhookIn(Body):
    """events: kinds to send; left out, all."""

    url: Address
    events: Annotated[list[EventKind], Field(min_length=1, max_length=10)] | None = None


class EngineIn(Body):
    """An SGLang that serves the deployment, started with --expert-distribution-recorder-mode stat.

    url: called by the servers as given. recorder: name of the folder it writes to, as `moeplace serve --recorder` gave
    it. every: seconds from one recording to the next. span: seconds of each. key: the engine's, sent as a bearer token;
    it is not shown again.
    """

    url: Address
    recorder: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[ -~]+$")] = "default"
    every: Annotated[float, Field(ge=1.0, le=86_400.0)] = 60.0
    span: Annotated[float, Field(ge=0.05, le=3600.0)] = 10.0
    key: Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[!-~]+$")] | None = None

    @model_validator(mode="after")
    def _in_time(self) -> Self:
        EngineServer(self.url)
        if self.span > self.every:
            raise ValueError(f"span ({self.span:g}) must not be longer than every ({self.every:g})")
        return self


class WebhookMade(BaseModel):
    """secret: signs what is sent; it is not shown again. old_until: until when the former one does, too."""

    key: int
    url: str
    created: datetime
    events: tuple[str, ...] | None
    old_until: datetime | None
    secret: str


MOST_PARTS = 512
"""Changes of a what-if, points of a front."""
Size = Annotated[float, Field(ge=0.0, le=1e18, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=65_536)]


class StepsRequest(Body):
    """The steps plans are replayed on: of one token of each of `tokens` sequences (decode), or of whole sequences
    (prefill).

    Several kinds by `batches`. Where a deployment has counts only, steps are drawn from them. Left out,
    batch and tokens: the policy's batches, else the recorded or usual ones; count: 200 of decode and 32 of prefill,
    fewer where steps are large.
    """

    batch: Literal["decode", "prefill"] | None = None
    tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    batches: AskedBatches = []
    count: Annotated[int, Field(ge=1, le=2000)] | None = None

    @property
    def named(self) -> tuple[Batch, ...]:
        """The batches that were named."""
        if self.batch is None and self.tokens is None:
            return tuple(self.batches)
        return (named_batch(self.batch, self.tokens),)


class StudyRequest(JobBody):
    """On a deployment's routing (`routing` and `windows` as for a solve; the newest is held out to replay), or on
    stored statistics, with the token sample of `held_out`, other stored statistics, to replay.

    solver, options, seconds, seed, objective, engine: of each solve; left out, those of the deployment's policy.
    """

    deployment: Ref | None = None
    routing: Literal["counts", "tokens"] = "counts"
    windows: Annotated[int, Field(ge=1, le=10_000)] = 256
    statistics: Ref | None = None
    held_out: Ref | None = None
    steps: StepsRequest = StepsRequest()
    solver: Annotated[str, Field(max_length=50)] | None = None
    options: PlainObject | None = None
    seconds: Annotated[float, Field(gt=0.0, le=3600.0)] = 10.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    objective: AskedObjective | None = None
    engine: EngineName | None = None


class ChangesRequest(Body):
    """lose: failures such as "device:3", "node:1" or "device:3+node:1". n_1: every single device and node, as is the
    default when nothing else is asked. devices, nodes: the plan's cluster with so many. topology: another, stored one.
    slots: a layer of the ready plans, or one number for each layer. keep_ranks: lost devices keep their numbers, with
    no slots, where the engine knows masked ranks."""

    lose: Annotated[list[Annotated[str, Field(max_length=2000)]], Field(max_length=MOST_PARTS)] = []
    n_1: bool = False
    devices: Annotated[int, Field(ge=1, le=4096)] | None = None
    nodes: Annotated[int, Field(ge=1, le=4096)] | None = None
    topology: Ref | None = None
    slots: SlotCounts | None = None
    keep_ranks: bool = False


class WhatIfRequest(StudyRequest):
    """plan: the one asked about; left out, the deployment's in force. ready: solve a plan for each change.
    max_moved_bytes: most that ready plans may move between survivors."""

    plan: Ref | None = None
    changes: ChangesRequest = ChangesRequest()
    ready: bool = True
    max_moved_bytes: Size | None = None


class ParetoRequest(StudyRequest):
    """model, topology: where no deployment is named. current: bytes moved are counted from this plan; left out, from
    the deployment's in force. redundant: slots a layer beyond one an expert. tolerate: single failures to survive, null
    for none. max_moved: most bytes moved, null for any. What is left out, `pareto` chooses."""

    model: Ref | None = None
    topology: Ref | None = None
    current: Ref | None = None
    redundant: Annotated[list[Annotated[int, Field(ge=0, le=65_536)]], Field(min_length=1, max_length=32)] | None = None
    tolerate: Annotated[list[Kind | None], Field(min_length=1, max_length=3)] = [None, "device", "node"]
    max_moved: Annotated[list[Size | None], Field(min_length=1, max_length=16)] | None = None


class WhatIfJob(WhatIfRequest):
    solver: Annotated[str, Field(max_length=50)]
    options: PlainObject
    objective: AskedObjective


class ParetoJob(ParetoRequest):
    model: Ref
    topology: Ref
    solver: Annotated[str, Field(max_length=50)]
    options: PlainObject
    objective: AskedObjective


StudyJob = WhatIfJob | ParetoJob


# Values that are refused, each named by its field; without anything of the web, since reading processes tell them too.

MOST_FIELDS, MOST_FIELD = 100, 300
"""Of one answer: fields that are named, and characters of a name."""


class Refusal(Protocol):
    """What pydantic and FastAPI raise."""

    def errors(self) -> Sequence[Any]: ...


class FieldsError(InputError):
    """Values that are refused: a field and a message each."""

    def __init__(self, fields: Sequence[Mapping[str, str]]) -> None:
        super().__init__("; ".join(f"{entry['field']}: {entry['message']}" for entry in fields)[:4000])
        self.fields = fields


def fields_of(error: Refusal) -> list[dict[str, str]]:
    """What pydantic refuses, a field each: `windows.0.load`, and why."""
    fields = []
    for entry in error.errors()[:MOST_FIELDS]:
        parts = [str(part) for part in entry["loc"]]
        if parts[:1] == ["body"] and len(parts) > 1:
            parts = parts[1:]
        field = ".".join(parts)[:MOST_FIELD] or "body"
        message = str(entry["msg"]).removeprefix("Value error, ").encode(errors="backslashreplace").decode()
        fields.append({"field": field, "message": message})
    return fields
