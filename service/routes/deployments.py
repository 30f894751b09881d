"""Deployments: their windows, the plan in force, checks, decisions, publications, webhooks, engines asked for their
routing."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Header, HTTPException, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from ...db.records import (
    CheckRecord,
    DecisionRecord,
    DecisionState,
    DeploymentRecord,
    EngineRecord,
    PublicationRecord,
    WebhookRecord,
)
from ...db.store import Store
from ...placement.errors import InputError, NotFoundError
from ..access import Approver, Reader, Submitter
from ..counts import ARROW, JSON, from_arrow, from_json
from ..policy import Policy
from ..schemas import (
    CommentIn,
    DeploymentIn,
    EngineIn,
    PublishIn,
    RollbackIn,
    Taken,
    WebhookIn,
    WebhookMade,
    WindowView,
)
from .common import ERRORS, OCTETS, Before, KeyPath, Limit, NamePath, Page, Stored, etag_of, matches, page_of, unchanged
from .plans import Engine, exported

router = APIRouter(prefix="/v1", tags=["deployments"], responses=ERRORS)
IfMatch = Annotated[str | None, Header(description="The ETag of what is to be changed; 412 when it is another now.")]


@router.post("/deployments", status_code=201)
def add_deployment(body: DeploymentIn, store: Stored, actor: Approver) -> DeploymentRecord:
    """A model on a topology, to be kept under watch. The same again returns what is there."""
    return store.deployments.add(body.name, body.model, body.topology, body.policy.as_document(), actor)


@router.get("/deployments")
def deployments(
    store: Stored, _: Reader, limit: Limit = 50, after: Annotated[str, Query(max_length=100)] = ""
) -> Page[DeploymentRecord]:
    """In order of their names."""
    found = store.deployments.page(limit=limit + 1, after=after if after.isprintable() else "")
    return page_of(found, limit, lambda record: record, lambda record: record.name)


@router.get("/deployments/{name}", response_model=DeploymentRecord)
def deployment(
    name: NamePath, request: Request, response: Response, store: Stored, _: Reader
) -> DeploymentRecord | Response:
    """One deployment. Its ETag changes with its policy and its plan."""
    record = store.deployments.get(name)
    return unchanged(request, response, tag_of(record)) or record


@router.put("/deployments/{name}/policy")
def set_policy(
    name: NamePath, body: Policy, store: Stored, actor: Approver, if_match: IfMatch = None
) -> DeploymentRecord:
    """Replaces the policy; what is left out gets its default."""
    _check(store, name, if_match)
    return store.deployments.set_policy(name, body.as_document(), actor)


@router.post(
    "/deployments/{name}/windows",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": {"$ref": "#/components/schemas/WindowsIn"}},
                ARROW: {"schema": {"type": "string", "format": "binary"}},
            },
        }
    },
)
async def add_windows(name: NamePath, request: Request, _: Submitter) -> Taken:
    """Count windows, as JSON or as an Arrow stream (columns ended, load, and where wanted workload and source).

    Stored when the answer comes, each once: what got no answer is sent again.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await request.body()
    store: Store = request.app.state.store
    if kind == JSON:
        windows = await run_in_threadpool(from_json, body)
    elif kind == ARROW:
        shape = store.windows.known_shape(name)
        if shape is None:
            shape = await run_in_threadpool(store.windows.shape, name)
        windows = await run_in_threadpool(from_arrow, body, *shape)
    else:
        raise HTTPException(415, f"Content-Type {kind!r}; expected {JSON} or {ARROW}")
    new = await asyncio.wrap_future(request.app.state.batcher.put(name, windows))
    request.app.state.metrics.windows(new)
    return Taken(received=len(windows), new=new)


@router.get("/deployments/{name}/windows")
def windows(
    name: NamePath,
    store: Stored,
    _: Reader,
    limit: Annotated[int, Query(ge=1, le=64)] = 16,
    before: Annotated[int | None, Query(ge=1, le=(1 << 63) - 1)] = None,
) -> Page[WindowView]:
    """Newest first, with their loads."""
    found = store.windows.page(name, limit=limit + 1, before=before)[::-1]
    return page_of(found, limit, WindowView.of, lambda record: record.key)


@router.get("/deployments/{name}/windows/totals")
def totals(name: NamePath, store: Stored, _: Reader) -> dict[str, int]:
    """How many windows are kept, and how many token-expert pairs they count."""
    merged, pairs = store.windows.totals(name)
    return {"windows": merged, "pairs": pairs}


@router.get(
    "/deployments/{name}/plan",
    response_class=Response,
    responses={
        200: {"description": "The file.", "content": {"application/json": {}, "application/yaml": {}, OCTETS: {}}}
    },
)
async def plan_in_force(
    name: NamePath,
    request: Request,
    response: Response,
    _: Reader,
    format: Engine = "moeplace",  # noqa: A002
    wait: Annotated[float, Query(ge=0.0, le=60.0, description="Seconds to wait for another plan than the one named "
        "by If-None-Match.")] = 0.0,
) -> Response:  # fmt: skip
    """The plan in force, as its engine reads it. For polling: with If-None-Match, 304 while it is the same."""
    store: Store = request.app.state.store
    deadline = time.monotonic() + wait
    while True:
        record = await run_in_threadpool(store.deployments.get, name)
        etag = etag_of(record.name, record.version, record.plan_id, format)
        same = matches(request.headers.get("if-none-match"), etag)
        if not same or time.monotonic() >= deadline or await request.is_disconnected():
            break
        await asyncio.sleep(0.5)
    if record.plan_id is None:
        raise NotFoundError(f"no plan was published for {name!r} yet")
    response.headers["X-Moeplace-Version"] = str(record.version)
    unmodified = unchanged(request, response, etag)
    if unmodified is not None:
        return unmodified
    return await run_in_threadpool(_file, store, record.plan_id, format, dict(response.headers))


@router.put("/deployments/{name}/plan")
def publish(
    name: NamePath, body: PublishIn, store: Stored, actor: Approver, if_match: IfMatch = None
) -> PublicationRecord:
    """Puts a stored plan in force."""
    expected = _check(store, name, if_match)
    return store.deployments.publish(name, body.plan, actor, cause="manual", comment=body.comment, expected=expected)


@router.post("/deployments/{name}/rollback")
def rollback(name: NamePath, body: RollbackIn, store: Stored, actor: Approver) -> PublicationRecord:
    """Puts an earlier version's plan in force again, as a new version."""
    earlier = store.deployments.version_of(name, body.version)
    comment = body.comment or f"back to version {body.version}"
    return store.deployments.publish(name, earlier.plan_id, actor, cause="rollback", comment=comment)


@router.get("/deployments/{name}/publications")
def publications(
    name: NamePath, store: Stored, _: Reader, limit: Limit = 50, before: Before = None
) -> Page[PublicationRecord]:
    """Every plan that was in force, newest first."""
    found = store.deployments.publications(name, limit=limit + 1, before=before)
    return page_of(found, limit, lambda record: record, lambda record: record.version)


@router.get("/deployments/{name}/checks")
def checks(name: NamePath, store: Stored, _: Reader, limit: Limit = 50, before: Before = None) -> Page[CheckRecord]:
    """Drift checks, newest first."""
    found = store.deployments.checks(name, limit=limit + 1, before=before)
    return page_of(found, limit, lambda record: record, lambda record: record.key)


@router.get("/decisions")
def decisions(
    store: Stored,
    _: Reader,
    limit: Limit = 50,
    before: Before = None,
    deployment: Annotated[str | None, Query(max_length=100)] = None,
    state: DecisionState | None = None,
) -> Page[DecisionRecord]:
    """Newest first, of one deployment or of all."""
    found = store.decisions.page(deployment, limit=limit + 1, before=before, state=state)
    return page_of(found, limit, lambda record: record, lambda record: record.key)


@router.get("/decisions/{key}")
def decision(key: KeyPath, store: Stored, _: Reader) -> DecisionRecord:
    """One decision, with its figures."""
    return store.decisions.get(key)


@router.post("/decisions/{key}/approve")
def approve(key: KeyPath, body: CommentIn, store: Stored, actor: Approver) -> DecisionRecord:
    """Puts the candidate in force. The same approval again changes nothing."""
    return store.decisions.close(key, "approve", actor, body.comment)


@router.post("/decisions/{key}/reject")
def reject(key: KeyPath, body: CommentIn, store: Stored, actor: Approver) -> DecisionRecord:
    """Keeps the plan in force."""
    return store.decisions.close(key, "reject", actor, body.comment)


@router.post("/deployments/{name}/webhooks", status_code=201)
def add_webhook(name: NamePath, body: WebhookIn, store: Stored, actor: Approver) -> WebhookMade:
    """Has drift.alarm, decision.made, decision.rejected and plan.published sent to a URL, signed."""
    record, secret = store.webhooks.add(name, body.url, actor)
    return WebhookMade(key=record.key, url=record.url, created=record.created, secret=secret)


@router.get("/deployments/{name}/webhooks")
def webhooks(name: NamePath, store: Stored, _: Approver) -> list[WebhookRecord]:
    """Without their secrets."""
    return store.webhooks.all(name)


@router.delete("/deployments/{name}/webhooks/{key}", status_code=204)
def remove_webhook(name: NamePath, key: KeyPath, store: Stored, actor: Approver) -> None:
    """Ends a webhook; what was not sent yet is not sent any more."""
    store.webhooks.remove(name, key, actor)


@router.put("/deployments/{name}/engine")
def set_engine(name: NamePath, body: EngineIn, request: Request, store: Stored, actor: Approver) -> EngineRecord:
    """Has SGLang's recorder started, stopped and read on an interval; what it counts is stored as windows. Replaces any
    other."""
    known = request.app.state.settings.recorders
    if body.recorder not in known:
        named = ", ".join(map(repr, known)) or "none"
        raise InputError(
            f"recorder: {body.recorder!r} is no folder of this server (moeplace serve --recorder); known: {named}"
        )
    return store.engines.set(
        name, actor, url=body.url, recorder=body.recorder, every=body.every, span=body.span, secret=body.key
    )


@router.get("/deployments/{name}/engine")
def engine(name: NamePath, store: Stored, _: Reader) -> EngineRecord:
    """The engine that is asked, when windows last came, and what failed since."""
    return store.engines.get(name)


@router.delete("/deployments/{name}/engine", status_code=204)
def remove_engine(name: NamePath, store: Stored, actor: Approver) -> None:
    """Asks it no more."""
    store.engines.remove(name, actor)


def tag_of(record: DeploymentRecord) -> str:
    """Changes with the policy and with the plan in force."""
    return etag_of(record.name, record.version, record.policy)


def _check(store: Store, name: str, if_match: str | None) -> int | None:
    """The version that may be followed; None for any. 412 where the tag is not today's."""
    if if_match is None:
        return None
    record = store.deployments.get(name)
    if not matches(if_match, tag_of(record)):
        raise HTTPException(412, f"{name!r} changed meanwhile; get it again", headers={"ETag": tag_of(record)})
    return record.version


def _file(store: Store, plan_id: str, engine: Engine, headers: dict[str, str]) -> Response:
    return exported(store.plan(plan_id).plan, plan_id, engine, headers)
