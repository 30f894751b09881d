"""Solves and decisions asked for, and how far they are; what-if and Pareto, which solve many times and are judged on
held-out steps.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from ...db.jobs import ENDED
from ...db.records import DeploymentRecord, JobRecord, JobState, PlanRecord
from ...db.store import Store
from ...placement.step_mix import FEWEST_STEPS, JUDGED_TOKENS
from ...placement.steps import USUAL_BATCHES
from ...solvers.solve import check_options, solver_named
from ..access import Approver, Reader, Submitter, check_scope, still_may
from ..changes import Changes
from ..policy import Policy
from ..requests import check_solve, check_steps, job_bytes, solver_asked
from ..schemas import (
    MOST_DEVICES,
    MOST_PARTS,
    ChangesRequest,
    DecideRequest,
    ParetoJob,
    ParetoRequest,
    SolveJob,
    SolveRequest,
    StudyRequest,
    WhatIfJob,
    WhatIfRequest,
)
from ..settings import Settings
from ..tasks import changes_of, default_plan
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


# What-if and Pareto.

DEFAULT_REDUNDANCIES, DEFAULT_LIMITS = 5, 3
"""How many `pareto` takes at most where none are given."""


@router.post("/what-if", status_code=202)
def submit_what_if(
    body: WhatIfRequest, request: Request, store: Stored, actor: Submitter, idempotency: Idempotency = None
) -> JobRecord:
    """What failures or another cluster do to a plan, and a plan ready for each. The job's result has a row a change;
    its plans are stored."""
    check_scope(actor, body.deployment)
    deployment, policy = _watched(body, store)
    filled = _filled(body, store, policy)
    plan = body.plan
    record: PlanRecord | None = None
    if deployment is not None:
        plan = plan or deployment.plan_id
        model, topology = store.model(deployment.model_id).spec, store.topology(deployment.topology_id).topology
        record = store.plan(plan) if plan else None
        asked = default_plan(model, topology) if record is None else record.plan
        if asked.model != model:
            raise HTTPException(422, f"plan: {plan!r} is for another model than {body.deployment!r}")
    elif plan is None:
        raise HTTPException(422, "plan: name the plan to ask about, or a deployment")
    else:
        record = store.plan(plan)
        asked = record.plan
    changes = body.changes
    single = changes.n_1 or changes == ChangesRequest()
    most = len(changes.lose) + (asked.topology.num_devices + asked.topology.num_nodes) * single
    _bounded(most, "changes", 0.0, request)
    if changes.topology is not None:
        changes = changes.model_copy(update={"topology": store.topology(changes.topology).id})
    # Made once here as well: what cannot be is refused at once.
    made = changes_of(asked.topology, changes, store)
    most = max(change.topology.num_devices for change in made)
    if most > MOST_DEVICES:
        raise HTTPException(422, f"changes: {most} devices, at most {MOST_DEVICES} are taken")
    _bounded(len(made), "changes", body.seconds if body.ready else 0.0, request)
    drawn = _drawn(body, policy, asked.topology.num_devices)
    check_steps(asked.model, *drawn, job_bytes(request.app.state.settings), "steps")
    filled |= {"plan": None if record is None else record.id, "changes": changes}
    job = WhatIfJob.model_validate(body.model_dump() | filled)
    return store.jobs.submit(
        "what-if",
        job.payload(),
        actor,
        deployment=body.deployment,
        idempotency=idempotency,
        seconds=len(made) * body.seconds * body.ready,
    )


@router.post("/pareto", status_code=202)
def submit_pareto(
    body: ParetoRequest, request: Request, store: Stored, actor: Submitter, idempotency: Idempotency = None
) -> JobRecord:
    """The front of step time against memory, bytes moved and failures survived. The job's result has a row a point; its
    plans are stored."""
    check_scope(actor, body.deployment)
    deployment, policy = _watched(body, store)
    filled = _filled(body, store, policy)
    model, topology, current = body.model, body.topology, body.current
    if deployment is not None:
        if model is not None or topology is not None:
            raise HTTPException(422, "model, topology: those of the deployment are solved for; leave them out")
        model, topology, current = deployment.model_id, deployment.topology_id, current or deployment.plan_id
    elif model is None or topology is None:
        raise HTTPException(422, "give deployment, or model, topology, statistics and held_out")
    if body.max_moved is not None and current is None:
        raise HTTPException(422, "max_moved: bytes are moved from a plan in force; name it as current")
    limits = len(body.max_moved) if body.max_moved is not None else DEFAULT_LIMITS if current else 1
    points = (len(body.redundant) if body.redundant is not None else DEFAULT_REDUNDANCIES) * len(body.tolerate) * limits
    _bounded(points, "points", body.seconds, request)
    known_topology, known_model = store.topology(topology), store.model(model)
    drawn = _drawn(body, policy, known_topology.topology.num_devices)
    check_steps(known_model.spec, *drawn, job_bytes(request.app.state.settings), "steps")
    filled |= {
        "model": known_model.id,
        "topology": known_topology.id,
        "current": None if current is None else store.plan(current).id,
    }
    job = ParetoJob.model_validate(body.model_dump() | filled)
    return store.jobs.submit(
        "pareto",
        job.payload(),
        actor,
        deployment=body.deployment,
        idempotency=idempotency,
        seconds=points * body.seconds,
    )


def _drawn(body: StudyRequest, policy: Policy, devices: int) -> tuple[int, int]:
    """Tokens of the largest step that plans are replayed on, and steps of that size."""
    tokens = max(batch.step_tokens(devices) for batch in body.steps.named or policy.asked or USUAL_BATCHES)
    return tokens, body.steps.count or max(FEWEST_STEPS, JUDGED_TOKENS // tokens)


def _watched(body: StudyRequest, store: Store) -> tuple[DeploymentRecord | None, Policy]:
    """The deployment that is asked about, and its policy; None and the usual one where statistics are."""
    if body.deployment is not None:
        if body.statistics is not None or body.held_out is not None:
            raise HTTPException(422, "statistics, held_out: the deployment's routing is used; leave them out")
        deployment = store.deployments.get(body.deployment)
        return deployment, Policy(**deployment.policy)
    if body.statistics is None or body.held_out is None:
        raise HTTPException(422, "give deployment, or statistics and held_out")
    return None, Policy()


def _filled(body: StudyRequest, store: Store, policy: Policy) -> dict[str, Any]:
    """Of what both have in common, ids for names, and what a policy decides."""
    asked = solver_asked(body, policy)
    check_options(solver_named(asked["solver"]), asked["options"])
    return asked | {
        "statistics": None if body.statistics is None else store.statistics(body.statistics).id,
        "held_out": None if body.held_out is None else store.statistics(body.held_out).id,
    }


def _bounded(parts: int, what: str, seconds: float, request: Request) -> None:
    settings: Settings = request.app.state.settings
    if parts > MOST_PARTS:
        raise HTTPException(422, f"{parts} {what}, at most {MOST_PARTS} are taken")
    if parts * seconds > settings.max_seconds:
        raise HTTPException(
            422,
            f"seconds: {parts} {what} of {seconds:g} s are more than the {settings.max_seconds:g} s this server grants",
        )
