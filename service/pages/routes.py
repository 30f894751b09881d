"""The pages and their forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool

from ...db.service_records import CheckRecord, DecisionRecord, EngineRecord
from ...db.store import Store
from ...placement.errors import NotFoundError
from ...placement.plan import Plan
from ..access import COOKIE, Gate
from ..routes.common import KeyPath, NamePath, Stored
from ..tasks.judge import default_plan
from . import figures
from .charts import Series, line_chart
from .shared import Visitor, device_map, form_of, maps_of, needs, page
from .studies import front_of, latest_front

HERE = Path(__file__).parent
STATIC = {"style.css": "text/css"}
CHECKS = 100
router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


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
