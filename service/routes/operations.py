"""For those who run the service: health, readiness, metrics, the audit log."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from ...db.records import Actor, AuditRecord
from ...placement.version import __version__
from ..access import Approver, Reader
from .common import ERRORS, Before, Limit, Page, Stored, page_of

router = APIRouter(tags=["operations"], responses=ERRORS)
Text = Annotated[str | None, Query(max_length=200, pattern=r"^[ -~]*$")]


@router.get("/health", responses={})
async def health() -> dict[str, str]:
    """Whether the process runs; asks nothing of the database."""
    return {"status": "ok", "version": __version__}


@router.get("/ready")
def ready(request: Request, store: Stored) -> dict[str, str]:
    """Whether requests can be served: started, not stopping, and the database answers."""
    if not request.app.state.ready:
        from fastapi import HTTPException

        raise HTTPException(503, "starting or stopping")
    store.jobs.waiting()
    return {"status": "ready"}


@router.get("/metrics", response_class=Response)
def metrics(request: Request, _: Reader) -> Response:
    """Figures for Prometheus."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/whoami")
def whoami(actor: Reader) -> Actor:
    """Name and role of the token sent."""
    return actor


@router.get("/v1/audit")
def audit(
    store: Stored, _: Approver, limit: Limit = 50, before: Before = None, action: Text = None, subject: Text = None
) -> Page[AuditRecord]:
    """Who did what, newest first."""
    found = store.audit.entries(limit=limit + 1, before=before, action=action, subject=subject)
    return page_of(found, limit, lambda entry: entry, lambda entry: entry.key)
