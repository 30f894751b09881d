"""Solves and decisions asked for, and how far they are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from ...db.jobs import ENDED
from ...db.records import JobRecord, JobState
from ..access import Approver, Reader, Submitter, check_scope, still_may
from ..changes import Changes
from ..policy import Policy
from ..requests import check_solve, job_bytes, solver_asked
from ..schemas import DecideRequest, SolveJob, SolveRequest
from ..settings import Settings
from .common import ERRORS, Before, KeyPath, Limit, Page, Stored, page_of

router = APIRouter(prefix="/v1", tags=["jobs"], responses=ERRORS)
Idempotency = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        pattern=r"^[!-~]+$",
        description="The same key and request again return the same job.",
    ),
]


@router.post("/solve", status_code=202)
def submit_solve(
    body: SolveRequest, request: Request, store: Stored, actor: Submitter, idempotency: Idempotency = None
) -> JobRecord:
    """A solve of a deployment's routing, or of a stored model, topology and statistics. The job's result names the
    plan."""
    check_scope(actor, body.deployment)
    policy = Policy()
    model, topology = body.model, body.topology
    if body.deployment is not None:
        deployment = store.deployments.get(body.deployment)
        if model is not None or topology is not None:
            raise HTTPException(422, "model, topology: those of the deployment are solved for; leave them out")
        model, topology, policy = deployment.model_id, deployment.topology_id, Policy(**deployment.policy)
    elif model is None or topology is None or body.statistics is None:
        raise HTTPException(422, "give deployment, or model, topology and statistics")
    settings: Settings = request.app.state.settings
    seconds = body.seconds if body.seconds is not None else policy.seconds
    if seconds > settings.max_seconds:
        raise HTTPException(422, f"seconds: {seconds:g} is more than the {settings.max_seconds:g} this server grants")
    asked = solver_asked(body, policy)
    known_model, known_topology = store.model(model), store.topology(topology)
    slots = body.slots if body.slots is not None else policy.slots
    check_solve(known_model.spec, known_topology.topology, slots=slots, job_bytes=job_bytes(settings), **asked)
    job = SolveJob.model_validate(
        body.model_dump()
        | asked
        | {
            "model": known_model.id,
            "topology": known_topology.id,
            "statistics": None if body.statistics is None else store.statistics(body.statistics).id,
            "seconds": seconds,
            "slots": slots,
            "batches": policy.asked if body.batches is None else body.batches,
        }
    )
    return store.jobs.submit(
        "solve",
        job.payload(),
        actor,
        deployment=body.deployment,
        idempotency=idempotency,
        seconds=seconds,
    )


@router.post("/decide", status_code=202)
def submit_decide(body: DecideRequest, store: Stored, actor: Submitter, idempotency: Idempotency = None) -> JobRecord:
    """Keep the plan in force, or apply a stored candidate? Judged on routing newer than any that was solved on."""
    check_scope(actor, body.deployment)
    store.deployments.get(body.deployment)
    job = body.model_copy(
        update={
            "candidate": store.plan(body.candidate).id,
            "current": None if body.current is None else store.plan(body.current).id,
        }
    )
    return store.jobs.submit("decide", job.payload(), actor, deployment=body.deployment, idempotency=idempotency)


@router.get("/jobs")
def jobs(
    store: Stored,
    actor: Reader,
    limit: Limit = 50,
    before: Before = None,
    deployment: Annotated[str | None, Query(max_length=100)] = None,
    state: JobState | None = None,
    kind: Literal["solve", "decide", "watch", "what-if", "pareto"] | None = None,
) -> Page[JobRecord]:
    """Newest first."""
    check_scope(actor, deployment)
    records = store.jobs.page(
        limit=limit + 1, before=before, deployment=deployment, state=state, kind=kind, among=actor.deployments
    )
    return page_of(records, limit, lambda record: record, lambda record: record.key)


@router.get("/jobs/{key}")
def job(key: KeyPath, store: Stored, actor: Reader) -> JobRecord:
    """How far a job is, and its result."""
    record = store.jobs.get(key)
    check_scope(actor, record.deployment)
    return record


@router.post("/jobs/{key}/cancel")
def cancel(key: KeyPath, store: Stored, actor: Submitter) -> JobRecord:
    """Ends a job that has not ended; its worker is stopped. Another one's takes the role approve."""
    check_scope(actor, store.jobs.get(key).deployment)
    return store.jobs.cancel(key, actor)


@router.delete("/jobs/{key}", status_code=204)
def remove_job(key: KeyPath, store: Stored, actor: Approver) -> None:
    """Removes a job that has ended; its plans and statistics stay. 409 where a decision tells of it."""
    check_scope(actor, store.jobs.get(key).deployment)
    store.jobs.remove(key, actor)


async def _job(key: KeyPath, request: Request, actor: Reader) -> JobRecord:
    # Before the stream begins: what is not there is a 404, not a stream that breaks off.
    record: JobRecord = await request.app.state.job(key)
    check_scope(actor, record.deployment)
    return record


@router.get("/jobs/{key}/events", response_class=EventSourceResponse)
async def events(
    record: Annotated[JobRecord, Depends(_job)], request: Request, actor: Reader
) -> AsyncIterator[ServerSentEvent]:
    """A job's progress as server-sent events, until it ends: `job` with a job each, `end` with its last state."""
    changes: Changes = request.app.state.changes
    shown: JobRecord | None = None
    async with changes.watch("job", record.key, actor.name) as topic:
        while True:
            seen = topic.version
            # Also the first time: what came before the watch began is seen by reading once more.
            record = await request.app.state.job(record.key)
            ended = record.state in ENDED
            if record != shown:
                yield ServerSentEvent(event="end" if ended else "job", data=record)
                shown = record
            if ended or changes.stopping:
                return
            await topic.wait(None, seen)
            if not await still_may(request):
                return
