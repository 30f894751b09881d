"""Pages of jobs (fronts and what-ifs among them) and of what one plan changes against another."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool

from ...db.service_records import DeploymentRecord, JobRecord
from ...db.store import Store
from ...placement.plan import Plan
from ..routes.common import KeyPath, NamePath, Stored
from ..routes.studies import submit_pareto, submit_what_if
from ..views_studies import ParetoIn, WhatIfIn
from . import figures
from .charts import Mark, Series, line_chart, scatter
from .shared import Visitor, device_map, form_of, maps_of, needs, page

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)
INDEX = "index order"
KINDS = {
    None: ("circle", "nothing asked"),
    "device": ("diamond", "device failures"),
    "node": ("square", "node failures"),
}


@router.get("/jobs/{key}")
def job_page(key: KeyPath, store: Stored, actor: Visitor) -> HTMLResponse:
    """A job: how far it is, and what came of it."""
    job = store.jobs.get(key)
    return page("job.html", actor, job=job, front=front_of(job), course=_course(job), told=_told(job))


@router.post("/deployments/{name}/studies")
async def ask(name: NamePath, request: Request, actor: Visitor) -> Response:
    """The buttons that ask for a front or a what-if."""
    kind = (await form_of(request)).get("kind")
    needs(actor, "submit")
    store: Store = request.app.state.store
    if kind == "pareto":
        job = await run_in_threadpool(submit_pareto, ParetoIn(deployment=name), request, store, actor)
    elif kind == "what-if":
        job = await run_in_threadpool(submit_what_if, WhatIfIn(deployment=name), request, store, actor)
    else:
        raise HTTPException(422, "kind: expected pareto or what-if")
    return RedirectResponse(f"/jobs/{job.key}", 303)


@router.get("/deployments/{name}/diff")
def diff_page(
    name: NamePath, store: Stored, actor: Visitor, before: str | None = None, after: str | None = None
) -> HTMLResponse:
    """Which experts move where from one plan to another, how many bytes that is, and what it does to loads."""
    deployment = store.deployments.get(name)
    choices = _choices(store, deployment)
    first = before or (list(choices)[1] if len(choices) > 2 else INDEX)
    second = after or next(iter(choices))
    plans = [_plan(store, deployment, ref) for ref in (first, second)]
    moved = figures.moves(*plans)
    named = [choices.get(ref, f"plan {ref}") for ref in (first, second)]
    comparison = figures.compared(store, deployment, (plans[0], named[0]), (plans[1], named[1]))
    return page(
        "diff.html",
        actor,
        deployment=deployment,
        choices={**{ref: f"plan {ref}" for ref in (first, second) if ref not in choices}, **choices},
        before=first,
        after=second,
        named=named,
        moved=moved,
        moved_map=device_map("Experts moved between devices", moved.matrix) if moved.count else None,
        maps=None if comparison is None else maps_of(comparison),
    )


def latest_front(store: Store, deployment: str) -> JobRecord | None:
    """The newest front of a deployment."""
    found = store.jobs.page(limit=1, deployment=deployment, kind="pareto", state="done")
    return found[0] if found else None


def front_of(job: JobRecord) -> dict[str, Any] | None:
    """A front's points and plots; None for other jobs, and before it is done."""
    if job.kind != "pareto" or job.result is None or not job.result["points"]:
        return None
    points = job.result["points"]
    plots = {
        "Step time over memory": _plot(
            points, "weights on the fullest device, GB", lambda p: p["device_memory_max"] / 1e9
        ),
        "Step time over failures survived": _plot(
            points,
            "single failures in which every expert keeps a replica",
            lambda p: sum(kind["survived"] for kind in p["survives"].values()),
            more_is_better=True,
        ),
    }
    if any(point["bytes_moved"] is not None for point in points):
        plots["Step time over bytes moved"] = _plot(
            points, "moved from the plan in force, GB", lambda p: (p["bytes_moved"] or 0.0) / 1e9
        )
    return {"points": points, "plots": plots, "refused": job.result["refused"], "steps": job.result["steps"]}


def _plot(points: Any, x_title: str, value: Any, more_is_better: bool = False) -> Markup:
    marks = [
        Mark(
            float(value(point)),
            point["risk_seconds"] * 1e3,
            "cross" if point["point"] == "in force" else KINDS[point["tolerate"]][0],
            f"{point['point']}: {point['risk_seconds'] * 1e3:.4g} ms, {value(point):.4g}",
            point["best"],
        )
        for point in points
    ]
    title = f"Step time over {x_title.partition(',')[0]}"
    return Markup(scatter(title, x_title, "predicted step time, ms", marks, more_is_better=more_is_better))


def _told(job: JobRecord) -> dict[str, str | float]:
    """What a job's result says in words and numbers, what it figured out beside the rest."""
    result = job.result or {}
    return {
        name: value
        for name, value in {**result, **result.get("figures", {})}.items()
        if isinstance(value, str | float | int)
    }


def _course(job: JobRecord) -> Markup | None:
    """How a solve's value and bound went."""
    history = job.progress.get("history") or []
    if len(history) < 2:
        return None
    labels = [f"{entry[0]:.1f} s" for entry in history]
    series = [
        Series("best so far", [entry[1] for entry in history], "series-a"),
        Series("proven bound", [entry[2] for entry in history], "series-b"),
    ]
    return Markup(line_chart("Value over time", labels, series))


def _choices(store: Store, deployment: DeploymentRecord) -> dict[str, str]:
    """Plans to compare, by id, newest first, and index order."""
    found: dict[str, str] = {}
    for decision in store.decisions.page(deployment.name, limit=20, state="waiting"):
        found.setdefault(decision.candidate_id, f"candidate of decision {decision.key}")
    for entry in store.deployments.publications(deployment.name, limit=50):
        found.setdefault(
            entry.plan_id, f"version {entry.version}" + (" (in force)" if entry.version == deployment.version else "")
        )
    front = latest_front(store, deployment.name)
    for point in [] if front is None or front.result is None else front.result["points"]:
        found.setdefault(point["stored_as"], f"front of job {front.key if front else ''}: {point['point']}")
    return {**found, INDEX: INDEX}


def _plan(store: Store, deployment: DeploymentRecord, ref: str) -> Plan:
    return figures.index_order(store, deployment) if ref == INDEX else store.plan(ref).plan
