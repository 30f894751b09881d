"""Solves and decisions asked for, and how far they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from ...db.jobs import ENDED
from ...db.records import JobRecord, JobState
from ...solvers.solve import check_options, solver_named
from ..access import Reader, Submitter
from ..policy import Policy
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
LOOK_SECONDS = 0.3


@router.post("/solve", status_code=202)
def submit_solve(
    body: SolveRequest, request: Request, store: Stored, actor: Submitter, idempotency: Idempotency = None
) -> JobRecord:
    """A solve of a deployment's routing, or of a stored model, topology and statistics. The job's result names the
    plan."""
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
    solver = body.solver if body.solver is not None else policy.solver
    options = body.options if body.options is not None else (policy.options if body.solver is None else {})
    check_options(solver_named(solver), options)
    job = SolveJob.model_validate(
        body.model_dump()
        | {
            "model": store.model(model).id,
            "topology": store.topology(topology).id,
            "statistics": None if body.statistics is None else store.statistics(body.statistics).id,
            "solver": solver,
            "options": options,
            "seconds": seconds,
            "slots": body.slots if body.slots is not None else policy.slots,
            "objective": body.objective or policy.objective,
            "engine": body.engine or policy.engine,
        }
    )
    return store.jobs.submit("solve", job.payload(), actor, deployment=body.deployment, idempotency=idempotency)


@router.post("/decide", status_code=202)
def submit_decide(body: DecideRequest, store: Stored, actor: Submitter, idempotency: Idempotency = None) -> JobRecord:
    """Keep the plan in force, or apply a stored candidate? Judged on routing newer than any that was solved on."""
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
    _: Reader,
    limit: Limit = 50,
    before: Before = None,
    deployment: Annotated[str | None, Query(max_length=100)] = None,
    state: JobState | None = None,
    kind: Literal["solve", "decide", "watch", "what-if", "pareto"] | None = None,
) -> Page[JobRecord]:
    """Newest first."""
    found = store.jobs.page(limit=limit + 1, before=before, deployment=deployment, state=state, kind=kind)
    return page_of(found, limit, lambda record: record, lambda record: record.key)


@router.get("/jobs/{key}")
def job(key: KeyPath, store: Stored, _: Reader) -> JobRecord:
    """How far a job is, and its result."""
    return store.jobs.get(key)


@router.post("/jobs/{key}/cancel")
def cancel(key: KeyPath, store: Stored, actor: Submitter) -> JobRecord:
    """Ends a job that has not ended; its worker is stopped."""
    return store.jobs.cancel(key, actor)


async def _job(key: KeyPath, store: Stored, _: Reader) -> JobRecord:
    # Before the stream begins: what is not there is a 404, not a stream that breaks off.
    return await run_in_threadpool(store.jobs.get, key)


@router.get("/jobs/{key}/events", response_class=EventSourceResponse)
async def events(
    record: Annotated[JobRecord, Depends(_job)], request: Request, store: Stored
) -> AsyncIterator[ServerSentEvent]:
    """A job's progress as server-sent events, until it ends: `job` with a job each, `end` with its last state."""
    shown: JobRecord | None = None
    while True:
        ended = record.state in ENDED
        if record != shown:
            yield ServerSentEvent(event="end" if ended else "job", data=record)
            shown = record
        if ended or not request.app.state.ready:
            return
        await asyncio.sleep(LOOK_SECONDS)
        record = await run_in_threadpool(store.jobs.get, record.key)
