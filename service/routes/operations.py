"""For those who run the service: health, readiness, metrics, the audit log."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ...db.records import Actor, AuditRecord
from ...placement.errors import StoreError
from ...placement.version import __version__
from ..access import Operator, Overseer, Reader
from ..problems import problem
from ..workers import Pool
from .common import ERRORS, Before, Limit, Page, Stored, page_of

router = APIRouter(tags=["operations"], responses=ERRORS)
Text = Annotated[str | None, Query(max_length=200, pattern=r"^[ -~]*$")]


@router.get("/health", responses={})
async def health() -> dict[str, str]:
    """Whether the process runs; asks nothing of the database."""
    return {"status": "ok", "version": __version__}


@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """Whether requests can be served: started, not stopping, the database answers, and workers live."""
    if not request.app.state.ready:
        raise HTTPException(503, "starting or stopping")
    await request.app.state.alive(None)
    pool: Pool = request.app.state.pool
    if pool.trouble is not None:
        raise HTTPException(503, pool.trouble)
    return {"status": "ready"}


@router.get("/metrics", response_class=Response)
async def metrics(request: Request, _: Overseer) -> Response:
    """Figures for Prometheus."""
    return await figures(request.app)


async def figures(app: FastAPI) -> Response:
    """What Prometheus reads, looked up once for all who ask at about the same time."""
    return Response(await app.state.figures(None), media_type="text/plain; version=0.0.4; charset=utf-8")


def figures_alone(app: FastAPI) -> ASGIApp:
    """Answers Prometheus, without a token, and nothing else."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        response: Response
        if scope["method"] not in ("GET", "HEAD") or scope["path"] not in ("/", "/metrics"):
            response = problem(404, "here is GET /metrics alone")
        else:
            try:
                response = await figures(app)
            except StoreError as error:
                response = problem(503, str(error))
        await response(scope, receive, send)

    return answer


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
