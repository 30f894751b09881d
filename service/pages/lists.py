"""Everything of a kind as a table, a page at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, TypeVar
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from ...db.records import Actor, AuditRecord, DecisionRecord, EngineRecord, JobRecord, PlanSummary, WebhookRecord
from ..access import check_role, check_unscoped
from ..routes.common import Before, Stored
from .templating import minute, page, words
from .visitors import Visitor, at

T = TypeVar("T")
router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)
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


def _deployment(name: str | None) -> Cell:
    return Cell(name, None if name is None else f"/deployments/{quote(name, safe='')}")


def _plan(plan_id: str | None, otherwise: str | None = None) -> Cell:
    return Cell(plan_id or otherwise, None if plan_id is None else f"/plans/{plan_id}")


@router.get("/decisions")
def decisions(request: Request, store: Stored, actor: Visitor, before: Before = None) -> HTMLResponse:
    """What was decided, and what waits."""

    def row(entry: DecisionRecord) -> list[Cell]:
        closed = None if entry.closed_by is None else f"{entry.closed_by}, {_minute(entry.closed)}"
        return [
            Cell(entry.key, f"/decisions/{entry.key}"),
            _deployment(entry.deployment),
            Cell(_minute(entry.created)),
            Cell(entry.action),
            Cell(entry.state),
            _plan(entry.current_id, "index order"),
            _plan(entry.candidate_id),
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
            _deployment(job.deployment),
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
            _plan(plan.id),
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
            _deployment(engine.deployment),
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
            _deployment(deployment),
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
