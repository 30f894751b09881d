"""What-if and Pareto: jobs that solve many times and are judged on held-out steps."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request

from ...db.records import DeploymentRecord, JobRecord, PlanRecord
from ...db.store import Store
from ...placement.step_mix import FEWEST_STEPS, JUDGED_TOKENS
from ...placement.steps import USUAL_BATCHES
from ...solvers.solve import check_options, solver_named
from ..access import Submitter, check_scope
from ..policy import Policy
from ..requests import check_steps, job_bytes, solver_asked
from ..schemas import (
    MOST_DEVICES,
    MOST_PARTS,
    ChangesRequest,
    ParetoJob,
    ParetoRequest,
    StudyRequest,
    WhatIfJob,
    WhatIfRequest,
)
from ..settings import Settings
from ..tasks.decide import default_plan
from ..tasks.studies import changes_of
from .common import ERRORS, Stored
from .jobs import Idempotency

router = APIRouter(prefix="/v1", tags=["jobs"], responses=ERRORS)
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
