"""The pages, their forms and lists, and what they show: of plans on routing, loads and traffic by device, what a change
of plan moves, and a deployment over time.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args
from urllib.parse import parse_qs, quote, urlencode

import numpy as np
from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool

from ..._types import FloatArray
from ...charts.svg import (
    POINT_KINDS,
    Mark,
    Series,
    Shades,
    device_map,
    line_chart,
    load_map,
    load_shades,
    scatter,
    time_chart,
)
from ...charts.svg import STATIC as CHARTS
from ...db.jobs import ENDED
from ...db.records import (
    Actor,
    AuditRecord,
    CheckRecord,
    DecisionRecord,
    DeploymentRecord,
    EngineRecord,
    JobRecord,
    PlanSummary,
    WebhookRecord,
)
from ...db.store import Store
from ...placement.bounds import device_loads
from ...placement.cost import dispatch_bytes, slot_shares
from ...placement.errors import InputError, MoeplaceError, NotFoundError
from ...placement.migration import migration
from ...placement.objective import Objective
from ...placement.plan import Plan
from ...placement.replay import traffic_from_counts
from ...placement.step_mix import step_mix
from ...placement.topology import Topology
from ...runtime.exporters.export import check_export, engine_usage
from ..access import COOKIE, Gate, actor_of, check_role, check_scope, check_unscoped, still_may
from ..changes import Changes, Kind
from ..middleware import SMALL_BODY
from ..policy import Policy
from ..routes.catalogue import Engine, file_name
from ..routes.common import Before, KeyPath, NamePath, RefPath, Stored
from ..routes.deployments import set_policy, tag_of
from ..routes.jobs import submit_pareto, submit_what_if
from ..routing import from_windows
from ..schemas import ParetoRequest, WhatIfRequest
from ..tasks import default_plan, problem_of
from .templating import minute, page, words

SHOWN_MOVES = 200
MOST_COUNTS = 1 << 22
"""Of the windows that a page is drawn from: for models of today hundreds of windows."""


@dataclass(frozen=True)
class LoadComparison:
    """Two plans of a deployment on its newest windows. before, after: [L, G] device load over the layer's mean device
    load. traffic: [G, G] bytes a step from each device to each other under `plan`, of dispatch, as copies travel.
    """

    plan: Plan
    before_name: str
    after_name: str
    before: FloatArray
    after: FloatArray
    traffic: FloatArray


def compare(store: Store, deployment: DeploymentRecord, candidate: str | None) -> LoadComparison | None:
    """The plan in force against a candidate, or without one, index order against the plan in force; None without any
    plan or window."""
    if deployment.plan_id is None and candidate is None:
        return None
    base = index_order(store, deployment)
    in_force = store.plan(deployment.plan_id).plan if deployment.plan_id else base
    if candidate is None:
        return compared(store, deployment, (base, "index order"), (in_force, "in force"))
    name = "in force" if deployment.plan_id else "index order"
    return compared(store, deployment, (in_force, name), (store.plan(candidate).plan, f"candidate {candidate}"))


def index_order(store: Store, deployment: DeploymentRecord) -> Plan:
    """What the deployment's engine does without a plan."""
    return default_plan(store.model(deployment.model_id).spec, store.topology(deployment.topology_id).topology)


def compared(
    store: Store, deployment: DeploymentRecord, before: tuple[Plan, str], after: tuple[Plan, str]
) -> LoadComparison | None:
    """Two plans, with what to call them, on the newest windows; None without any."""
    policy = Policy(**deployment.policy)
    layers, experts = store.windows.shape(deployment.name)
    most = max(1, MOST_COUNTS // (layers * experts))
    windows = store.windows.page(deployment.name, limit=min(policy.recent, most))
    if not windows:
        return None
    model = store.model(deployment.model_id).spec
    problem = problem_of(after[0], from_windows(windows, model), policy.objective, policy.engine, policy.asked)
    load, objective, tokens = problem.statistics.total_load, problem.objective, step_mix(problem).mean_tokens
    traffic = traffic_from_counts(after[0], load, round(tokens), objective)
    return LoadComparison(
        plan=after[0],
        before_name=before[1],
        after_name=after[1],
        before=_relative(before[0], load, objective),
        after=_relative(after[0], load, objective),
        traffic=traffic.dispatch * dispatch_bytes(after[0].model, objective),
    )


@dataclass(frozen=True)
class ExpertMoves:
    """What going from one plan to another moves. by_pair: (source, target, experts), most first. listed: (layer,
    expert, source, target), the first of them. matrix: [G, G] experts from each device to each."""

    count: int
    bytes_moved: float
    seconds: float
    by_pair: list[tuple[int, int, int]]
    by_layer: list[tuple[int, int]]
    listed: list[tuple[int, int, int, int]]
    matrix: FloatArray


def moves(current: Plan, candidate: Plan) -> ExpertMoves:
    """Which experts move where."""
    moved = migration(current, candidate)
    layers = [candidate.moe_layers[layer] for layer in moved.layer]
    pairs = Counter(zip(moved.source.tolist(), moved.target.tolist(), strict=True))
    listed = list(zip(layers, moved.expert.tolist(), moved.source.tolist(), moved.target.tolist(), strict=True))
    matrix = np.zeros((candidate.topology.num_devices,) * 2)
    np.add.at(matrix, (moved.source, moved.target), 1.0)
    return ExpertMoves(
        moved.moves,
        moved.bytes_moved,
        moved.seconds,
        [(source, target, count) for (source, target), count in pairs.most_common(32)],
        sorted(Counter(layers).items()),
        listed[:SHOWN_MOVES],
        matrix,
    )


def _relative(plan: Plan, load: FloatArray, objective: Objective) -> FloatArray:
    devices, shares = plan.topology.num_devices, slot_shares(plan, load, objective)
    loads = device_loads(load, plan.physical_to_logical, shares, plan.slot_device, devices)
    mean = loads.mean(axis=1, keepdims=True)
    return np.asarray(loads / np.where(mean > 0, mean, 1.0))


SPANS = {
    "1h": ("Last hour", timedelta(hours=1)),
    "6h": ("6 hours", timedelta(hours=6)),
    "24h": ("24 hours", timedelta(days=1)),
    "7d": ("7 days", timedelta(days=7)),
    "30d": ("30 days", timedelta(days=30)),
}
CHECKS = 100
"""Drift checks that are shown where no span is asked for: the newest."""
MOST_CHECKS = 500
"""That are shown of a span."""


@dataclass(frozen=True)
class Span:
    """What is shown: from one moment to another, or without these the newest checks. chosen: one of `SPANS`, "" for the
    newest, "between" for moments of one's own."""

    since: datetime | None = None
    until: datetime | None = None
    chosen: str = ""

    @property
    def limit(self) -> int:
        """How many checks it shows at most."""
        return MOST_CHECKS if self.chosen else CHECKS

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Both ends since 1970, where both are known."""
        return None if self.since is None or self.until is None else (self.since.timestamp(), self.until.timestamp())

    def links(self) -> list[tuple[str, str, bool]]:
        """What else may be shown: words, the query of the address, whether it is what is shown."""
        named = [(words, urlencode({"range": name}), self.chosen == name) for name, (words, _) in SPANS.items()]
        return [("Newest checks", "", not self.chosen), *named]


def span_of(named: str | None, since: str | None, until: str | None) -> Span:
    """What an address asks for: one of `SPANS` by name, or moments in UTC.

    Raises:
        InputError: no such span, no moment, or one that ends before it begins.
    """
    now = datetime.now(UTC)
    if named:
        if named not in SPANS:
            raise InputError(f"range: {named!r}, expected one of {', '.join(SPANS)}")
        return Span(now - SPANS[named][1], now, named)
    if not since and not until:
        return Span()
    begin, end = _moment("since", since), _moment("until", until)
    begin = (end or now) - timedelta(days=1) if begin is None else begin
    end = max(now, begin + timedelta(minutes=1)) if end is None else end
    if end <= begin:
        raise InputError("until: it must be after since")
    return Span(begin, end, "between")


def _moment(name: str, text: str | None) -> datetime | None:
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise InputError(f"{name}: not a date and time, such as 2026-01-31T12:00") from None
    if not 1970 < moment.year < 9999:
        raise InputError(f"{name}: a year between 1971 and 9998 is expected")
    return moment


def charts_over_time(checks: list[CheckRecord], policy: Any, span: Span) -> dict[str, Markup]:
    """Load, regret and drift by what each is called; each of one unit. checks: oldest first."""
    at = [check.created.timestamp() for check in checks]
    alarms = [position for position, check in enumerate(checks) if check.alarm]

    def of(name: str) -> list[float | None]:
        values = [check.figures.get(name) for check in checks]
        return [value if isinstance(value, int | float) else None for value in values]

    strength = [None if p is None else -math.log10(max(p, 1e-12)) for p in of("p")]
    charts = {
        "Load of the busiest device over the mean; what lies between the lines is the gap": time_chart(
            "Load over time",
            at,
            [
                Series("plan in force", of("load_max_mean"), "series-a"),
                Series("proven bound of any plan", of("bound"), "series-b"),
            ],
            "{:.4g}".format,
            alarms=alarms,
            span=span.seconds,
        ),
        "Regret: step time that a fresh plan would save": time_chart(
            "Regret over time",
            at,
            [Series("regret", of("regret"), "series-a")],
            lambda value: f"{100 * value:.3g}%",
            level=(float(policy.get("min_regret", 0.02)), "matters from here"),
            alarms=alarms,
            span=span.seconds,
        ),
        "Drift: the strength of the evidence that traffic has moved, in powers of ten": time_chart(
            "Drift over time",
            at,
            [Series("-log10 p", strength, "series-a")],
            "{:.3g}".format,
            level=(-math.log10(policy.get("false_alarm", 0.001)), "alarm from here"),
            alarms=alarms,
            span=span.seconds,
        ),
    }
    return {title: Markup(chart) for title, chart in charts.items() if chart}


def maps_of(comparison: LoadComparison) -> dict[str, Any]:
    """Heat maps of device loads under two plans, and of the traffic under the second."""
    topology = comparison.plan.topology
    shades = load_shades([comparison.before, comparison.after])
    maps = [
        (
            f"{name}: worst {values.max():.2f} times the mean",
            Markup(load_map(f"Device load, {name}", values, comparison.plan.moe_layers, topology.node_size, shades)),
        )
        for name, values in ((comparison.before_name, comparison.before), (comparison.after_name, comparison.after))
    ]
    traffic = _device_map("Traffic between devices", comparison.traffic / 1e6, topology, "{:.3g} MB")
    return {"load": maps, "traffic": traffic, "most": float(comparison.traffic.max() / 1e6)}


def _device_map(title: str, values: FloatArray, topology: Topology, form: str) -> Markup:
    shades = Shades(0.0, float(values.max()) or 1.0, form.format)
    return Markup(device_map(title, values, topology.node_size, shades))


# Whose visit a page is, and what its forms send.


async def visitor(request: Request) -> Actor:
    """Whose visit it is; without a valid token, the way to the sign-in page."""
    try:
        actor = await actor_of(request, request.cookies.get(COOKIE))
    except HTTPException as error:
        if error.status_code == 401:
            raise HTTPException(303, "sign in", headers={"Location": at(request, "/sign-in")}) from None
        raise
    request.state.visitor = actor
    check_scope(actor, request.path_params.get("name"))
    return actor


def at(request: Request, path: str) -> str:
    """An address of this service, wherever a proxy has put it."""
    return str(request.scope.get("root_path", "")) + path


Visitor = Annotated[Actor, Depends(visitor)]


MOST_BYTES = 20_000


async def form_of(request: Request, most: int = MOST_BYTES) -> dict[str, str]:
    """The fields of a form. Raises HTTPException 413 where it is of more bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(415, "expected a form")
    body = await request.body()
    if len(body) > most:
        raise HTTPException(413, f"a form of {len(body):,} bytes; at most {most:,} are taken")
    text = body.decode(errors="replace")
    try:
        return {key: values[0] for key, values in parse_qs(text, keep_blank_values=True, max_num_fields=20).items()}
    except ValueError:
        raise HTTPException(422, "more fields than any form here has") from None


def whole_number(form: Mapping[str, str], field: str) -> int:
    """Raises HTTPException 422 where the field holds anything else."""
    text = form.get(field, "")
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise HTTPException(422, f"{field}: expected a whole number")
    return int(text)


router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)
INDEX = "index order"
Moment = Annotated[str | None, Query(max_length=40)]


@router.get("/jobs/{key}")
def job_page(key: KeyPath, store: Stored, actor: Visitor) -> HTMLResponse:
    """A job: how far it is, and what came of it."""
    job = store.jobs.get(key)
    check_scope(actor, job.deployment)
    return page(
        "job.html",
        actor,
        section="jobs",
        live=_live(job),
        job=job,
        front=front_of(job),
        course=_course(job),
        told=_told(job),
    )


def _live(job: JobRecord) -> str | None:
    """Where its page is told that it has gone on; what has ended does not."""
    return None if job.state in ENDED else f"/jobs/{job.key}/live"


@router.post("/deployments/{name}/studies")
async def ask(name: NamePath, request: Request, actor: Visitor) -> Response:
    """The buttons that ask for a front or a what-if."""
    kind = (await form_of(request)).get("kind")
    check_role(actor, "submit")
    store: Store = request.app.state.store
    if kind == "pareto":
        job = await run_in_threadpool(submit_pareto, ParetoRequest(deployment=name), request, store, actor)
    elif kind == "what-if":
        job = await run_in_threadpool(submit_what_if, WhatIfRequest(deployment=name), request, store, actor)
    else:
        raise HTTPException(422, "kind: expected pareto or what-if")
    return RedirectResponse(at(request, f"/jobs/{job.key}"), 303)


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
    moved = moves(*plans)
    named = [choices.get(ref, f"plan {ref}") for ref in (first, second)]
    comparison = compared(store, deployment, (plans[0], named[0]), (plans[1], named[1]))
    return page(
        "diff.html",
        actor,
        section="deployments",
        deployment=deployment,
        choices={**{ref: f"plan {ref}" for ref in (first, second) if ref not in choices}, **choices},
        before=first,
        after=second,
        named=named,
        moved=moved,
        moved_map=_moved_map(moved, plans[1].topology),
        maps=None if comparison is None else maps_of(comparison),
    )


def _moved_map(moved: ExpertMoves, topology: Topology) -> Markup | None:
    title = "Experts moved between devices"
    return _device_map(title, moved.matrix, topology, "{:.0f} experts") if moved.count else None


def latest_front(store: Store, deployment: str) -> JobRecord | None:
    """The newest front of a deployment."""
    page = store.jobs.page(limit=1, deployment=deployment, kind="pareto", state="done")
    return page[0] if page else None


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
            *POINT_KINDS["in force" if point["point"] == "in force" else point["tolerate"] or "nothing asked"],
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
    series = [
        Series("best so far", [entry[1] for entry in history], "series-a"),
        Series("proven bound", [entry[2] for entry in history], "series-b"),
    ]
    at = [entry[0] for entry in history]
    return Markup(line_chart("Value over time", at, series, "{:.6g}".format, "s since it began"))


def _choices(store: Store, deployment: DeploymentRecord) -> dict[str, str]:
    """Plans to compare, by id, newest first, and index order."""
    choices: dict[str, str] = {}
    for decision in store.decisions.page(deployment.name, limit=20, state="waiting"):
        choices.setdefault(decision.candidate_id, f"candidate of decision {decision.key}")
    for entry in store.deployments.publications(deployment.name, limit=50):
        choices.setdefault(
            entry.plan_id, f"version {entry.version}" + (" (in force)" if entry.version == deployment.version else "")
        )
    front = latest_front(store, deployment.name)
    for point in [] if front is None or front.result is None else front.result["points"]:
        choices.setdefault(point["stored_as"], f"front of job {front.key if front else ''}: {point['point']}")
    return {**choices, INDEX: INDEX}


def _plan(store: Store, deployment: DeploymentRecord, ref: str) -> Plan:
    return index_order(store, deployment) if ref == INDEX else store.plan(ref).plan


HERE = Path(__file__).parent
OWN = HERE / "static"
STATIC = {
    "style.css": (OWN, "text/css"),
    "live.js": (OWN, "text/javascript"),
    "charts.css": (CHARTS, "text/css"),
    "charts.js": (CHARTS, "text/javascript"),
}


@router.get("/static/{name}")
async def static(name: str) -> FileResponse:
    """Files of the pages, by a list: what is asked for never becomes a path."""
    if name not in STATIC:
        raise HTTPException(404, "no such file")
    folder, kind = STATIC[name]
    return FileResponse(folder / name, media_type=kind, headers={"Cache-Control": "max-age=3600"})


@router.get("/sign-in")
def sign_in_page(request: Request) -> HTMLResponse:
    return page("sign_in.html", None, wrong=request.query_params.get("wrong") == "1")


@router.post("/sign-in")
async def sign_in(request: Request) -> Response:
    token = (await form_of(request)).get("token", "").strip()
    gate: Gate = request.app.state.gate
    try:
        await gate.actor(request, token)
    except HTTPException as error:
        if error.status_code != 401:
            raise
        return RedirectResponse(at(request, "/sign-in?wrong=1"), 303)
    answer = RedirectResponse(at(request, "/"), 303)
    answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return answer


@router.post("/sign-out")
async def sign_out(request: Request, _: Visitor) -> Response:
    answer = RedirectResponse(at(request, "/sign-in"), 303)
    answer.delete_cookie(COOKIE)
    return answer


@router.get("/")
def index(store: Stored, actor: Visitor, after: Annotated[str, Query(max_length=100)] = "") -> HTMLResponse:
    """Deployments, a page of them at a time, and what waits for a decision."""
    known = actor.deployments
    rows = store.deployments.overview(limit=SHOWN + 1, after=after if after.isprintable() else "", among=known)
    following = rows[SHOWN - 1].deployment.name if len(rows) > SHOWN else None
    waiting = store.decisions.page(limit=50, state="waiting", among=known)
    return page(
        "index.html",
        actor,
        live="/live",
        section="deployments",
        rows=rows[:SHOWN],
        following=following,
        after=after,
        waiting=waiting,
        jobs=store.jobs.page(limit=10, among=known),
    )


@router.get("/deployments/{name}")
def deployment_page(
    name: NamePath,
    store: Stored,
    actor: Visitor,
    span_name: Annotated[str | None, Query(alias="range", max_length=10)] = None,
    since: Moment = None,
    until: Moment = None,
) -> HTMLResponse:
    """One deployment: its plan, how it fares, and its history."""
    deployment = store.deployments.get(name)
    span = span_of(span_name, since, until)
    checks = store.deployments.checks(name, limit=span.limit, since=span.since, until=span.until)
    decisions = store.decisions.page(name, limit=50)
    waiting = next((entry for entry in decisions if entry.state == "waiting"), None)
    front = latest_front(store, name)
    comparison = compare(store, deployment, waiting.candidate_id if waiting else None)
    return page(
        "deployment.html",
        actor,
        live=f"/deployments/{quote(name, safe='')}/live",
        section="deployments",
        deployment=deployment,
        model=store.model(deployment.model_id),
        topology=store.topology(deployment.topology_id),
        plan=store.plan(deployment.plan_id) if deployment.plan_id else None,
        publications=store.deployments.publications(name, limit=20),
        decisions=decisions,
        waiting=waiting,
        checks=checks,
        span=span,
        charts=charts_over_time(checks[::-1], deployment.policy, span),
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
    check_scope(actor, decision.deployment)
    deployment = store.deployments.get(decision.deployment)
    candidate = store.plan(decision.candidate_id).plan
    current = _current(store, decision, candidate)
    moved = moves(current, candidate)
    loads = compared(store, deployment, (current, "now"), (candidate, "candidate"))
    publications = store.deployments.publications(deployment.name, limit=200)
    return page(
        "decision.html",
        actor,
        live=f"/deployments/{quote(decision.deployment, safe='')}/live",
        section="decisions",
        decision=decision,
        deployment=deployment,
        publication=next((entry for entry in publications if entry.decision == key), None),
        worst=None if loads is None else (float(loads.before.max()), float(loads.after.max())),
        moved=moved,
        moved_map=_moved_map(moved, candidate.topology),
        figures=sorted(decision.figures.items()),
    )


@router.post("/decisions/{key}")
async def close_decision(key: KeyPath, request: Request, actor: Visitor) -> Response:
    """The forms Approve and Reject."""
    form = await form_of(request)
    check_role(actor, "approve")
    verdict = form.get("verdict")
    if verdict not in ("approve", "reject"):
        raise HTTPException(422, "verdict: expected approve or reject")
    store: Store = request.app.state.store
    comment = form.get("comment", "")
    check_scope(actor, (await run_in_threadpool(store.decisions.get, key)).deployment)
    closed = await run_in_threadpool(
        store.decisions.close, key, "approve" if verdict == "approve" else "reject", actor, comment
    )
    return RedirectResponse(at(request, f"/deployments/{quote(closed.deployment)}"), 303)


@router.post("/deployments/{name}/rollback")
async def rollback(name: NamePath, request: Request, actor: Visitor) -> Response:
    """The button Roll back."""
    form = await form_of(request)
    check_role(actor, "approve")
    version = whole_number(form, "version")
    store: Store = request.app.state.store

    def go() -> None:
        earlier = store.deployments.version_of(name, version)
        comment = f"back to version {version}"
        store.deployments.publish(name, earlier.plan_id, actor, cause="rollback", comment=comment)

    await run_in_threadpool(go)
    return RedirectResponse(at(request, f"/deployments/{quote(name)}"), 303)


@router.post("/deployments/{name}/release")
def release(name: NamePath, request: Request, store: Stored, actor: Visitor) -> Response:
    """The button Let it publish again."""
    check_role(actor, "approve")
    store.deployments.release(name, actor)
    return RedirectResponse(at(request, f"/deployments/{quote(name)}"), 303)


def _engine(store: Store, name: str) -> EngineRecord | None:
    try:
        return store.engines.get(name)
    except NotFoundError:
        return None


def _current(store: Store, decision: DecisionRecord, candidate: Plan) -> Plan:
    if decision.current_id is not None:
        return store.plan(decision.current_id).plan
    return default_plan(candidate.model, candidate.topology)


# The page of one plan.

MOST_DEPLOYMENTS = 200
"""That a plan fits, which its page names."""


@router.get("/plans/{ref}")
def plan_page(ref: RefPath, store: Stored, actor: Visitor) -> HTMLResponse:
    """What the plan is of, how it was made, and its files for engines."""
    record = store.plan(ref)
    files = [_file(record.plan, record.id, engine) for engine in get_args(Engine)]
    fitting = store.deployments.page(
        limit=MOST_DEPLOYMENTS + 1, among=actor.deployments, model=record.model_id, topology=record.topology_id
    )
    more = len(fitting) > MOST_DEPLOYMENTS
    fitting = fitting[:MOST_DEPLOYMENTS]
    return page("plan.html", actor, section="plans", record=record, files=files, fitting=fitting, more=more)


@router.post("/deployments/{name}/publish")
async def publish(name: NamePath, request: Request, actor: Visitor) -> Response:
    """The button Publish: of what was seen, so that nobody else's plan is replaced unseen."""
    form = await form_of(request)
    check_role(actor, "approve")
    version = whole_number(form, "version")
    store: Store = request.app.state.store
    await run_in_threadpool(
        store.deployments.publish, name, form.get("plan", ""), actor, cause="manual", expected=version
    )
    return RedirectResponse(at(request, f"/deployments/{quote(name)}"), 303)


def _file(plan: Plan, plan_id: str, engine: Engine) -> dict[str, str]:
    """A format's name, and how to use its file, or why there is none."""
    try:
        check_export(plan, engine)
        return {"engine": engine, "usage": engine_usage(plan, engine, file_name(plan_id, engine))}
    except MoeplaceError as error:
        return {"engine": engine, "refusal": str(error)}


# Tells pages that what they show has changed, as server-sent events; they ask for themselves again.

LONGEST_SECONDS = 600.0
"""Of a stream; a browser comes back, and its token is looked at again."""


async def _deployment(name: NamePath, request: Request, actor: Visitor) -> str:
    # Before the stream begins: what is not there is a 404, not a stream that breaks off.
    record: DeploymentRecord = await request.app.state.deployment(name)
    return record.name


async def _job(key: KeyPath, request: Request, actor: Visitor) -> int:
    job: JobRecord = await request.app.state.job(key)
    check_scope(actor, job.deployment)
    return job.key


@router.get("/live", response_class=EventSourceResponse)
async def live(request: Request, actor: Visitor) -> AsyncIterator[ServerSentEvent]:
    """Whenever anything has changed."""
    async for event in _changes(request, actor, "page", ""):
        yield event


@router.get("/deployments/{name}/live", response_class=EventSourceResponse)
async def live_deployment(
    name: Annotated[str, Depends(_deployment)], request: Request, actor: Visitor
) -> AsyncIterator[ServerSentEvent]:
    """Whenever a deployment has changed, what was looked at, decided or asked of it."""
    async for event in _changes(request, actor, "page", name):
        yield event


@router.get("/jobs/{key}/live", response_class=EventSourceResponse)
async def live_job(
    key: Annotated[int, Depends(_job)], request: Request, actor: Visitor
) -> AsyncIterator[ServerSentEvent]:
    """Whenever a job has gone on."""
    async for event in _changes(request, actor, "job", key):
        yield event


async def _changes(request: Request, actor: Actor, kind: Kind, key: str | int) -> AsyncIterator[ServerSentEvent]:
    changes: Changes = request.app.state.changes
    end = time.monotonic() + LONGEST_SECONDS
    async with changes.watch(kind, key, actor.name) as topic:
        # What changed since the page was drawn is not missed: it looks again once.
        changed = True
        while not changes.stopping and time.monotonic() < end:
            seen = topic.version
            if not await still_may(request):
                return
            if changed:
                yield ServerSentEvent(event="changed", data="")
            changed = await topic.wait(end - time.monotonic(), seen)


# What each deployment wants done for it, and the form that changes it.

MEANINGS = {
    "objective": "what a solve minimises",
    "engine": "what plans are for: they keep to what it runs",
    "solver": "who solves",
    "options": "of the solver",
    "seconds": "a solve may take",
    "slots": "of a layer, over all devices",
    "batches": "steps that the deployment runs",
    "step_tokens": "for one batch: tokens of a decode step over all devices",
    "block": "neighbouring windows taken as one observation",
    "recent": "newest windows that a check compares",
    "false_alarm": "chance that one check finds a change although there is none",
    "min_regret": "predicted loss against a fresh plan from which on a change matters",
    "publish": "approval leaves it to a person; automatic puts it in force",
    "confidence": "that a candidate is better, before it is applied",
    "horizon_steps": "steps over which a move has to pay",
    "restart_seconds": "that an engine serves nothing when it takes a plan by starting anew",
    "keep_windows": "windows kept; older ones are dropped",
    "join": "old windows that are joined into one",
    "join_after_hours": "hours after which they are",
    "keep_traces": "uploaded traces kept",
}


@router.get("/policies")
def policies(request: Request, store: Stored, actor: Visitor, after: Behind = None) -> HTMLResponse:
    """How plans of all deployments are solved, judged and published."""

    def row(deployment: DeploymentRecord) -> list[Cell]:
        policy = Policy(**deployment.policy)
        return [
            Cell(deployment.name, f"/deployments/{quote(deployment.name, safe='')}/policy"),
            Cell(policy.publish),
            Cell(policy.engine),
            Cell(policy.solver),
            Cell(f"{policy.seconds:,.4g}", number=True),
            Cell(f"{policy.recent:,}", number=True),
            Cell(f"{policy.false_alarm:.4g}", number=True),
            Cell(f"{policy.min_regret:.2%}", number=True),
            Cell(f"{policy.keep_windows:,}", number=True),
        ]

    columns = (
        "deployment",
        "publishing",
        "engine",
        "solver",
        "seconds a solve",
        "windows compared",
        "false alarms",
        "regret that matters",
        "windows kept",
    )
    records = store.deployments.page(limit=SHOWN + 1, after=after or "", among=actor.deployments)
    return listing(request, actor, "policies", "By deployment", columns, records, row, ("after", lambda r: r.name))


@router.get("/deployments/{name}/policy")
def policy_page(name: NamePath, store: Stored, actor: Visitor) -> HTMLResponse:
    """One policy, field by field."""
    deployment = store.deployments.get(name)
    document, usual = Policy(**deployment.policy).as_document(), Policy().as_document()
    fields = [(field, words(document[field]), words(usual[field]), MEANINGS[field]) for field in MEANINGS]
    text = json.dumps({field: value for field, value in document.items() if value != usual[field]}, indent=2)
    return page(
        "policy.html",
        actor,
        section="policies",
        deployment=deployment,
        fields=fields,
        text=text,
        tag=tag_of(deployment),
    )


@router.post("/deployments/{name}/policy")
async def change(name: NamePath, request: Request, actor: Visitor) -> Response:
    """The button Save: of what was seen, so that nobody else's change is lost unseen."""
    form = await form_of(request, SMALL_BODY)
    check_role(actor, "approve")
    store: Store = request.app.state.store
    body = Policy.model_validate_json(form.get("policy", ""))
    await run_in_threadpool(set_policy, name, body, request, store, actor, form.get("tag") or '""')
    return RedirectResponse(at(request, f"/deployments/{quote(name, safe='')}/policy"), 303)


# Everything of a kind as a table, a page at a time.

T = TypeVar("T")

SHOWN = 100
"""Rows of one page."""
Behind = Annotated[str | None, Query(max_length=200, pattern=r"^[ -~]*$")]


@dataclass(frozen=True)
class Cell:
    """text: None where there is none. path: of the page it leads to. wide: sentences, which may break."""

    text: object
    path: str | None = None
    number: bool = False
    wide: bool = False


def listing(
    request: Request,
    actor: Actor,
    section: str,
    caption: str,
    columns: Sequence[str],
    records: Sequence[T],
    row: Callable[[T], Sequence[Cell]],
    cursor: tuple[str, Callable[[T], object]],
) -> HTMLResponse:
    """The page. records: one more than `SHOWN` where others follow. cursor: the field of the address that says where
    the next page begins, and its value behind a record."""
    field, value = cursor
    following = urlencode({field: value(records[SHOWN - 1])}) if len(records) > SHOWN else None
    return page(
        "list.html",
        actor,
        live=None if field in request.query_params else "/live",
        section=section,
        caption=caption,
        columns=columns,
        rows=[row(record) for record in records[:SHOWN]],
        here=at(request, f"/{section}"),
        following=following,
        begun=field in request.query_params,
    )


def _minute(moment: datetime | None) -> str | None:
    return None if moment is None else minute(moment)


def _deployment_cell(name: str | None) -> Cell:
    return Cell(name, None if name is None else f"/deployments/{quote(name, safe='')}")


def _plan_cell(plan_id: str | None, otherwise: str | None = None) -> Cell:
    return Cell(plan_id or otherwise, None if plan_id is None else f"/plans/{plan_id}")


@router.get("/decisions")
def decisions(request: Request, store: Stored, actor: Visitor, before: Before = None) -> HTMLResponse:
    """What was decided, and what waits."""

    def row(entry: DecisionRecord) -> list[Cell]:
        closed = None if entry.closed_by is None else f"{entry.closed_by}, {_minute(entry.closed)}"
        return [
            Cell(entry.key, f"/decisions/{entry.key}"),
            _deployment_cell(entry.deployment),
            Cell(_minute(entry.created)),
            Cell(entry.action),
            Cell(entry.state),
            _plan_cell(entry.current_id, "index order"),
            _plan_cell(entry.candidate_id),
            Cell(entry.reason, wide=True),
            Cell(closed),
        ]

    columns = ("decision", "deployment", "at (UTC)", "answer", "state", "in force", "candidate", "reason", "closed by")
    records = store.decisions.page(limit=SHOWN + 1, before=before, among=actor.deployments)
    return listing(request, actor, "decisions", "Newest first", columns, records, row, ("before", lambda r: r.key))


@router.get("/jobs")
def jobs(request: Request, store: Stored, actor: Visitor, before: Before = None) -> HTMLResponse:
    """What was asked for, and how far it is."""

    def row(job: JobRecord) -> list[Cell]:
        return [
            Cell(job.key, f"/jobs/{job.key}"),
            Cell(job.kind),
            _deployment_cell(job.deployment),
            Cell(job.state),
            Cell(job.actor),
            Cell(_minute(job.created)),
            Cell(_minute(job.finished)),
            Cell(job.error, wide=True),
        ]

    columns = ("job", "kind", "deployment", "state", "asked for by", "at (UTC)", "ended (UTC)", "note")
    records = store.jobs.page(limit=SHOWN + 1, before=before, among=actor.deployments)
    return listing(request, actor, "jobs", "Newest first", columns, records, row, ("before", lambda r: r.key))


@router.get("/plans")
def plans(request: Request, store: Stored, actor: Visitor, before: Behind = None) -> HTMLResponse:
    """Stored plans."""

    def row(plan: PlanSummary) -> list[Cell]:
        gap = None if plan.certificate is None else plan.certificate.gap
        return [
            _plan_cell(plan.id),
            Cell(plan.name),
            Cell(plan.model),
            Cell(plan.topology),
            Cell(plan.solver),
            Cell(f"{plan.devices:,}", number=True),
            Cell(f"{plan.slots:,}", number=True),
            Cell(None if gap is None else f"{gap:.2%}", number=True),
            Cell(_minute(plan.created)),
        ]

    columns = (
        "plan",
        "name",
        "model",
        "topology",
        "solver",
        "devices",
        "slots a layer",
        "gap when solved",
        "stored (UTC)",
    )
    records = store.plans(limit=SHOWN + 1, before=before)
    return listing(request, actor, "plans", "Newest first", columns, records, row, ("before", lambda r: r.id))


@router.get("/engines")
def engines(request: Request, store: Stored, actor: Visitor, after: Behind = None) -> HTMLResponse:
    """Engines that are asked for their routing."""

    def row(engine: EngineRecord) -> list[Cell]:
        return [
            _deployment_cell(engine.deployment),
            Cell(engine.url),
            Cell(f"{engine.every:,.4g}", number=True),
            Cell(_minute(engine.polled)),
            Cell(f"{engine.windows:,}", number=True),
            Cell(f"{engine.failures:,}", number=True),
            Cell(engine.error, wide=True),
        ]

    columns = (
        "deployment",
        "address",
        "asked every, s",
        "last windows (UTC)",
        "windows",
        "failures in a row",
        "last failure",
    )
    records = store.engines.page(limit=SHOWN + 1, after=after or "", among=actor.deployments)
    caption = "Asked for their routing, by deployment"
    return listing(request, actor, "engines", caption, columns, records, row, ("after", lambda r: r.deployment))


@router.get("/webhooks")
def webhooks(request: Request, store: Stored, actor: Visitor, before: Before = None) -> HTMLResponse:
    """Who is told of events."""
    check_role(actor, "approve")

    def row(entry: tuple[str, WebhookRecord]) -> list[Cell]:
        deployment, hook = entry
        return [
            Cell(hook.key),
            _deployment_cell(deployment),
            Cell(hook.url),
            Cell("all" if hook.events is None else ", ".join(hook.events), wide=True),
            Cell(_minute(hook.created)),
        ]

    columns = ("webhook", "deployment", "address", "events", "since (UTC)")
    records = store.webhooks.page(limit=SHOWN + 1, before=before, among=actor.deployments)
    return listing(request, actor, "webhooks", "Newest first", columns, records, row, ("before", lambda r: r[1].key))


@router.get("/audit")
def audit(request: Request, store: Stored, actor: Visitor, before: Before = None) -> HTMLResponse:
    """Who did what."""
    check_role(actor, "approve")
    check_unscoped(actor)

    def row(entry: AuditRecord) -> list[Cell]:
        detail = ", ".join(f"{name}: {words(value)}" for name, value in entry.detail.items())
        return [
            Cell(entry.key),
            Cell(_minute(entry.created)),
            Cell(entry.actor),
            Cell(entry.role),
            Cell(entry.action),
            Cell(entry.subject),
            Cell(detail[:500], wide=True),
            Cell(entry.client),
        ]

    columns = ("entry", "at (UTC)", "who", "role", "did", "to", "detail", "from")
    records = store.audit.entries(limit=SHOWN + 1, before=before)
    return listing(request, actor, "audit", "Newest first", columns, records, row, ("before", lambda r: r.key))
