"""Tells pages that what they show has changed, as server-sent events; they ask for themselves again."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from ...db.records import Actor, DeploymentRecord, JobRecord
from ..access import check_scope, still_may
from ..changes import Changes, Kind
from ..routes.common import KeyPath, NamePath
from .visitors import Visitor

LONGEST_SECONDS = 600.0
"""Of a stream; a browser comes back, and its token is looked at again."""
router = APIRouter(include_in_schema=False)


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
