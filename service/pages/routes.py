"""The pages and their forms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

import numpy as np
from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool

from ..._types import FloatArray
from ...db.records import ROLES, Actor, CheckRecord, DecisionRecord, DeploymentRecord, EngineRecord, JobRecord, Role
from ...db.store import Store
from ...placement.errors import NotFoundError
from ...placement.plan import Plan
from ..access import COOKIE, Gate
from ..routes.common import KeyPath, NamePath, Stored
from ..routes.studies import submit_pareto, submit_what_if
from ..schemas import ParetoRequest, WhatIfRequest
from ..tasks.decide import default_plan
from . import figures
from .charts import Mark, Series, heat_map, line_chart, scatter

pages = Environment(
    loader=PackageLoader(__name__.rpartition(".")[0]), autoescape=select_autoescape(default=True), trim_blocks=True
)
pages.filters["minute"] = lambda moment: moment.strftime("%Y-%m-%d %H:%M")
pages.filters["figure"] = lambda value: "–" if value is None else f"{value:,.4g}"
pages.filters["percent"] = lambda value: "–" if value is None else f"{value:.2%}"
pages.filters["size"] = lambda value: "–" if value is None else f"{value / 1e9:,.2f} GB"
pages.filters["ms"] = lambda value: "–" if value is None else f"{value * 1e3:,.3f}"


async def visitor(request: Request) -> Actor:
    """Whose visit it is; without a valid token, the way to the sign-in page."""
    gate: Gate = request.app.state.gate
    try:
        return await run_in_threadpool(gate.actor, request, request.cookies.get(COOKIE))
    except HTTPException as error:
        if error.status_code == 401:
            raise HTTPException(303, "sign in", headers={"Location": "/sign-in"}) from None
        raise


Visitor = Annotated[Actor, Depends(visitor)]


def may(actor: Actor | None, role: Role) -> bool:
    """Whether the visitor has this role or a higher one."""
    return actor is not None and ROLES.index(actor.role) >= ROLES.index(role)


def needs(actor: Actor, role: Role) -> None:
    """Raises HTTPException 403 where the visitor has a lower role."""
    if not may(actor, role):
        raise HTTPException(403, f"token {actor.name!r} has role {actor.role!r}; this needs {role!r}")


async def form_of(request: Request) -> dict[str, str]:
    """The fields of a form."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(415, "expected a form")
    body = (await request.body())[:20_000].decode(errors="replace")
    return {key: values[0] for key, values in parse_qs(body, keep_blank_values=True, max_num_fields=20).items()}


def page(template: str, actor: Actor | None, **values: Any) -> HTMLResponse:
    """A page. Templates know what the visitor may."""
    allowed = {"approver": may(actor, "approve"), "submitter": may(actor, "submit")}
    html = pages.get_template(template).render(actor=actor, **allowed, **values)
    return HTMLResponse(html, headers={"Cache-Control": "no-store"})


def maps_of(found: figures.LoadComparison) -> dict[str, Any]:
    """Heat maps of device loads under two plans, and of the traffic under the second."""
    layers = [f"layer {layer}" for layer in found.plan.moe_layers]
    devices = [str(device) for device in range(found.plan.topology.num_devices)]
    low, high = 0.5, float(max(found.before.max(), found.after.max(), 1.2))
    maps = [
        (
            f"{name}: worst {values.max():.2f} times the mean",
            Markup(heat_map(f"Device load, {name}", values, layers, devices, low=low, high=high)),
        )
        for name, values in ((found.before_name, found.before), (found.after_name, found.after))
    ]
    traffic = device_map("Traffic between devices", found.traffic / 1e6)
    shades = {"low": low, "high": high}
    return {"load": maps, **shades, "traffic": Markup(traffic), "most": float(found.traffic.max() / 1e6)}


def device_map(title: str, values: FloatArray) -> Markup:
    """A heat map of something from device (row) to device (column), [G, G]."""
    devices = range(len(values))
    rows, columns = [f"from {d}" for d in devices], [f"to {d}" for d in devices]
    return Markup(heat_map(title, values, rows, columns, low=0.0, high=float(values.max()) or 1.0))


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
        job = await run_in_threadpool(submit_pareto, ParetoRequest(deployment=name), request, store, actor)
    elif kind == "what-if":
        job = await run_in_threadpool(submit_what_if, WhatIfRequest(deployment=name), request, store, actor)
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


HERE = Path(__file__).parent
STATIC = {"style.css": "text/css"}
CHECKS = 100


@router.get("/static/{name}")
async def static(name: str) -> FileResponse:
    """Files of the pages, by a list: what is asked for never becomes a path."""
    if name not in STATIC:
        raise HTTPException(404, "no such file")
    return FileResponse(HERE / "static" / name, media_type=STATIC[name], headers={"Cache-Control": "max-age=3600"})


@router.get("/sign-in")
def sign_in_page(request: Request) -> HTMLResponse:
    return page("sign_in.html", None, wrong=request.query_params.get("wrong") == "1")


@router.post("/sign-in")
async def sign_in(request: Request) -> Response:
    token = (await form_of(request)).get("token", "").strip()
    gate: Gate = request.app.state.gate
    try:
        await run_in_threadpool(gate.actor, request, token)
    except HTTPException as error:
        if error.status_code != 401:
            raise
        return RedirectResponse("/sign-in?wrong=1", 303)
    answer = RedirectResponse("/", 303)
    answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return answer


@router.post("/sign-out")
async def sign_out(_: Visitor) -> Response:
    answer = RedirectResponse("/sign-in", 303)
    answer.delete_cookie(COOKIE)
    return answer


@router.get("/")
def index(store: Stored, actor: Visitor) -> HTMLResponse:
    """All deployments, and what waits for a decision."""
    rows = []
    for deployment in store.deployments.page(limit=200):
        checks = store.deployments.checks(deployment.name, limit=1)
        rows.append(
            {
                "deployment": deployment,
                "model": store.model(deployment.model_id),
                "topology": store.topology(deployment.topology_id),
                "check": checks[0] if checks else None,
                "totals": store.windows.totals(deployment.name),
            }
        )
    waiting = store.decisions.page(limit=50, state="waiting")
    return page("index.html", actor, rows=rows, waiting=waiting, jobs=store.jobs.page(limit=10))


@router.get("/deployments/{name}")
def deployment_page(name: NamePath, store: Stored, actor: Visitor) -> HTMLResponse:
    """One deployment: its plan, how it fares, and its history."""
    deployment = store.deployments.get(name)
    checks = store.deployments.checks(name, limit=CHECKS)[::-1]
    decisions = store.decisions.page(name, limit=50)
    waiting = next((entry for entry in decisions if entry.state == "waiting"), None)
    front = latest_front(store, name)
    comparison = figures.compare(store, deployment, waiting.candidate_id if waiting else None)
    return page(
        "deployment.html",
        actor,
        deployment=deployment,
        model=store.model(deployment.model_id),
        topology=store.topology(deployment.topology_id),
        plan=store.plan(deployment.plan_id) if deployment.plan_id else None,
        publications=store.deployments.publications(name, limit=20),
        decisions=decisions,
        waiting=waiting,
        checks=checks[::-1],
        charts=_charts(checks, deployment.policy),
        maps=None if comparison is None else maps_of(comparison),
        totals=store.windows.totals(name),
        engine=_engine(store, name),
        front_job=front,
        front=None if front is None else front_of(front),
    )


@router.get("/decisions/{key}")
def decision_page(key: KeyPath, store: Stored, actor: Visitor) -> HTMLResponse:
    """One decision, and which experts it would move where."""
    decision = store.decisions.get(key)
    candidate = store.plan(decision.candidate_id).plan
    moved = figures.moves(_current(store, decision, candidate), candidate)
    return page(
        "decision.html",
        actor,
        decision=decision,
        moved=moved,
        moved_map=device_map("Experts moved between devices", moved.matrix) if moved.count else None,
        figures=sorted(decision.figures.items()),
    )


@router.post("/decisions/{key}")
async def close_decision(key: KeyPath, request: Request, actor: Visitor) -> Response:
    """The forms Approve and Reject."""
    form = await form_of(request)
    needs(actor, "approve")
    verdict = form.get("verdict")
    if verdict not in ("approve", "reject"):
        raise HTTPException(422, "verdict: expected approve or reject")
    store: Store = request.app.state.store
    comment = form.get("comment", "")
    closed = await run_in_threadpool(
        store.decisions.close, key, "approve" if verdict == "approve" else "reject", actor, comment
    )
    return RedirectResponse(f"/deployments/{closed.deployment}", 303)


@router.post("/deployments/{name}/rollback")
async def rollback(name: NamePath, request: Request, actor: Visitor) -> Response:
    """The button Roll back."""
    version = (await form_of(request)).get("version", "")
    needs(actor, "approve")
    if not version.isdigit() or len(version) > 9:
        raise HTTPException(422, "version: expected a whole number")
    store: Store = request.app.state.store

    def go() -> None:
        earlier = store.deployments.version_of(name, int(version))
        comment = f"back to version {version}"
        store.deployments.publish(name, earlier.plan_id, actor, cause="rollback", comment=comment)

    await run_in_threadpool(go)
    return RedirectResponse(f"/deployments/{name}", 303)


def _engine(store: Store, name: str) -> EngineRecord | None:
    try:
        return store.engines.get(name)
    except NotFoundError:
        return None


def _charts(checks: list[CheckRecord], policy: Any) -> dict[str, str]:
    labels = [check.created.strftime("%m-%d %H:%M") for check in checks]
    alarms = [position for position, check in enumerate(checks) if check.alarm]

    def of(*names: str) -> list[float | None]:
        found: list[float | None] = []
        for check in checks:
            value: Any = check.figures
            for part in names:
                value = value.get(part) if isinstance(value, dict) else None
            found.append(value)
        return found

    strength = [None if p is None else float(-np.log10(max(p, 1e-12))) for p in of("p")]
    threshold = float(-np.log10(policy.get("false_alarm", 0.001)))
    load = [
        Series("plan in force", of("load_max_mean"), "series-a"),
        Series("proven bound", of("bound"), "series-b"),
    ]
    charts = {
        "Load max/mean of the plan in force (blue), and the proven bound of any plan (grey)": line_chart(
            "Load over time", labels, load, marks=alarms
        ),
        "Regret, predicted loss against a fresh plan (blue), and load gap (grey)": line_chart(
            "Regret over time",
            labels,
            [Series("regret", of("regret"), "series-a"), Series("gap", of("gap"), "series-b")],
            level=(float(policy.get("min_regret", 0.02)), "matters from here"),
            marks=alarms,
        ),
        "Drift, the strength of the evidence that traffic has moved, -log10 p": line_chart(
            "Drift over time",
            labels,
            [Series("-log10 p", strength, "series-a")],
            level=(threshold, "alarm from here"),
            marks=alarms,
        ),
    }
    return {title: Markup(chart) for title, chart in charts.items() if chart}


def _current(store: Store, decision: DecisionRecord, candidate: Plan) -> Plan:
    if decision.current_id is not None:
        return store.plan(decision.current_id).plan
    return default_plan(candidate.model, candidate.topology)
