"""For those who run the service: health, readiness, metrics, the audit log."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request, Response

from ...db.records import Actor, AuditRecord
from ...placement.version import __version__
from ..access import Operator, Overseer, Reader
from ..workers import Pool
from .common import ERRORS, Before, Limit, Page, Stored, page_of

router = APIRouter(tags=["operations"], responses=ERRORS)
Text = Annotated[str | None, Query(max_length=200, pattern=r"^[ -~]*$")]


@router.get("/health", responses={})
async def health() -> dict[str, str]:
    """Whether the process runs; asks nothing of the database."""
    return {"status": "ok", "version": __version__}


@router.get("/ready")
def ready(request: Request, store: Stored) -> dict[str, str]:
    """Whether requests can be served: started, not stopping, the database answers, and workers live."""
    if not request.app.state.ready:
        raise HTTPException(503, "starting or stopping")
    store.jobs.waiting()
    pool: Pool = request.app.state.pool
    if pool.trouble is not None:
        raise HTTPException(503, pool.trouble)
    return {"status": "ready"}


@router.get("/metrics", response_class=Response)
def metrics(request: Request, _: Overseer) -> Response:
    """Figures for Prometheus."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/whoami")
def whoami(actor: Reader) -> Actor:
    """Name and role of the token sent."""
    return actor


@router.get("/v1/audit")
def audit(
    store: Stored, _: Operator, limit: Limit = 50, before: Before = None, action: Text = None, subject: Text = None
) -> Page[AuditRecord]:
    """Who did what, newest first."""
    records = store.audit.entries(limit=limit + 1, before=before, action=action, subject=subject)
    return page_of(records, limit, lambda entry: entry, lambda entry: entry.key)
