"""Deployments: their windows, the plan in force, checks, decisions, publications, webhooks, engines asked for their
routing."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Header, HTTPException, Query, Request, Response
from pydantic import AwareDatetime
from starlette.concurrency import run_in_threadpool

from ...db.deployments import Condition
from ...db.records import (
    Actor,
    CheckRecord,
    CountWindow,
    DecisionRecord,
    DecisionState,
    DeliveryRecord,
    DeploymentRecord,
    EngineRecord,
    PublicationRecord,
    WebhookRecord,
)
from ...db.store import Store
from ...placement.errors import InputError, NotFoundError
from ..access import Approver, Operator, Reader, Submitter, check_scope, still_may
from ..changes import Changes, leaving
from ..counts import ARROW, JSON, read_windows
from ..crowds import Reads
from ..middleware import SMALL_BODY
from ..policy import Policy
from ..readers import Readers, unpack_windows
from ..requests import check_policy
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
from ..settings import Settings
from ..shards import remove
from .catalogue import Engine, download
from .common import ERRORS, OCTETS, Before, KeyPath, Limit, NamePath, Page, Stored, etag_of, matches, page_of, unchanged

router = APIRouter(prefix="/v1", tags=["deployments"], responses=ERRORS)
WAIT_AT_LEAST = 0.8
"""Part of the seconds asked for after which an answer may come without another plan."""
MOST_COUNTS = 1 << 20
"""Of the windows in one answer: each takes many times in memory what it does in a database."""
IfMatch = Annotated[str | None, Header(description="The ETag of what is to be changed; 412 when it is another now.")]


@router.post("/deployments", status_code=201)
def add_deployment(body: DeploymentIn, request: Request, store: Stored, actor: Operator) -> DeploymentRecord:
    """A model on a topology, to be kept under watch. The same again returns what is there. 422 where its policy asks
    for what could not be solved."""
    model, topology = store.model(body.model).spec, store.topology(body.topology).topology
    check_policy(body.policy, model, topology, request.app.state.settings)
    return store.deployments.add(body.name, body.model, body.topology, body.policy.as_document(), actor)


@router.get("/deployments")
def deployments(
    store: Stored, actor: Reader, limit: Limit = 50, after: Annotated[str, Query(max_length=100)] = ""
) -> Page[DeploymentRecord]:
    """In order of their names."""
    records = store.deployments.page(
        limit=limit + 1, after=after if after.isprintable() else "", among=actor.deployments
    )
    return page_of(records, limit, lambda record: record, lambda record: record.name)


@router.get("/deployments/{name}", response_model=DeploymentRecord)
def deployment(
    name: NamePath, request: Request, response: Response, store: Stored, _: Reader
) -> DeploymentRecord | Response:
    """One deployment. Its ETag changes with its policy and its plan."""
    record = store.deployments.get(name)
    return unchanged(request, response, tag_of(record)) or record


@router.delete("/deployments/{name}", status_code=204)
def remove_deployment(name: NamePath, store: Stored, actor: Approver) -> None:
    """Ends it, with its windows, checks, decisions, publications, jobs, webhooks, engine and traces. Plans, and what
    the audit log says, stay."""
    places = store.deployments.remove(name, actor)
    store.windows.forget(name)
    remove(places)


@router.delete("/deployments/{name}/windows")
def remove_windows(
    name: NamePath,
    store: Stored,
    actor: Approver,
    ended_before: Annotated[
        AwareDatetime | None, Query(description="Those that ended before this moment; left out, all.")
    ] = None,
) -> dict[str, int]:
    """Removes count windows; `removed` says how many. Sent again, they count again."""
    return {"removed": store.windows.remove(name, actor, ended_before=ended_before)}


@router.put("/deployments/{name}/policy")
def set_policy(
    name: NamePath, body: Policy, request: Request, store: Stored, actor: Approver, if_match: IfMatch = None
) -> DeploymentRecord:
    """Replaces the policy; what is left out gets its default. 422 where it asks for what could not be solved."""
    condition = _only_if(if_match)
    record = store.deployments.get(name)
    if condition is not None:
        condition(record)
    model, topology = store.model(record.model_id).spec, store.topology(record.topology_id).topology
    check_policy(body, model, topology, request.app.state.settings)
    return store.deployments.set_policy(name, body.as_document(), actor, condition=condition)


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
async def add_windows(name: NamePath, request: Request, actor: Submitter) -> Taken:
    """Count windows, as JSON or as an Arrow stream (columns ended, load, and where wanted workload and source).

    Stored when the answer comes, each once: what got no answer is sent again.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (JSON, ARROW):
        raise HTTPException(415, f"Content-Type {kind!r}; expected {JSON} or {ARROW}")
    body = await request.body()
    store: Store = request.app.state.store
    shape = store.windows.known_shape(name)
    if shape is None:
        shape = await run_in_threadpool(store.windows.shape, name)
    try:
        windows = await _read(request, kind, body, name, shape, actor)
    except InputError:
        # Another server may have removed the deployment, and made one of another model under its name.
        if not await run_in_threadpool(store.windows.renewed, name, shape):
            raise
        windows = await _read(request, kind, body, name, store.windows.shape(name), actor)
    new = await asyncio.wrap_future(request.app.state.batcher.put(name, windows))
    request.app.state.metrics.windows(new)
    return Taken(received=len(windows), new=new)


async def _read(
    request: Request, kind: str, body: bytes, name: str, shape: tuple[int, int], actor: Actor
) -> Sequence[CountWindow]:
    if len(body) <= SMALL_BODY:
        return await run_in_threadpool(read_windows, kind, body, shape)
    readers: Readers = request.app.state.readers
    asked = {"operation": "windows", "kind": kind, "deployment": name, "shape": shape}
    return unpack_windows(*await readers.requests.ask(asked, body, actor.name))


@router.get("/deployments/{name}/windows")
def windows(
    name: NamePath,
    store: Stored,
    _: Reader,
    limit: Annotated[int, Query(ge=1, le=64)] = 16,
    before: Annotated[int | None, Query(ge=1, le=(1 << 63) - 1)] = None,
) -> Page[WindowView]:
    """Newest first, with their loads."""
    layers, experts = store.windows.shape(name)
    limit = min(limit, max(1, MOST_COUNTS // (layers * experts)))
    records = store.windows.page(name, limit=limit + 1, before=before)[::-1]
    return page_of(records, limit, WindowView.of, lambda record: record.key)


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
    actor: Reader,
    format: Engine = "moeplace",  # noqa: A002
    wait: Annotated[float, Query(ge=0.0, le=60.0, description="Seconds to wait for another plan than the one named "
        "by If-None-Match.")] = 0.0,
) -> Response:  # fmt: skip
    """The plan in force, as its engine reads it. For polling: with If-None-Match, 304 while it is the same."""
    changes: Changes = request.app.state.changes
    stored: Reads[str, DeploymentRecord] = request.app.state.deployment
    # Those that came together are not answered together, nor come again so.
    deadline = time.monotonic() + wait * random.uniform(WAIT_AT_LEAST, 1.0)
    known = request.headers.get("if-none-match")
    if wait and known:
        async with changes.watch("deployment", name, actor.name) as topic, leaving(request) as gone:
            while True:
                seen = topic.version
                record = await stored(name)
                if changes.stopping or not matches(known, _plan_tag(record, format)):
                    break
                changed = await topic.wait(deadline - time.monotonic(), seen, gone)
                if not await still_may(request):
                    raise HTTPException(401, "the token was revoked, or is over, meanwhile")
                if not changed:
                    break
    else:
        record = await stored(name)
    if record.plan_id is None:
        raise NotFoundError(f"no plan was published for {name!r} yet")
    response.headers["X-Moeplace-Version"] = str(record.version)
    unmodified = unchanged(request, response, _plan_tag(record, format))
    if unmodified is not None:
        return unmodified
    content = await request.app.state.plan_file((record.plan_id, format))
    return download(content, record.plan_id, format, dict(response.headers))


@router.put("/deployments/{name}/plan")
def publish(
    name: NamePath, body: PublishIn, store: Stored, actor: Approver, if_match: IfMatch = None
) -> PublicationRecord:
    """Puts a stored plan in force."""
    condition = _only_if(if_match)
    return store.deployments.publish(name, body.plan, actor, cause="manual", comment=body.comment, condition=condition)


@router.post("/deployments/{name}/rollback")
def rollback(name: NamePath, body: RollbackIn, store: Stored, actor: Approver) -> PublicationRecord:
    """Puts an earlier version's plan in force again, as a new version. Nothing is published automatically from then on
    until traffic has changed or `release`; the plan that was rolled back not before `release`."""
    earlier = store.deployments.version_of(name, body.version)
    comment = body.comment or f"back to version {body.version}"
    return store.deployments.publish(name, earlier.plan_id, actor, cause="rollback", comment=comment)


@router.post("/deployments/{name}/release")
def release(name: NamePath, store: Stored, actor: Approver) -> DeploymentRecord:
    """Lets automatic publication go on, which a roll-back holds until traffic changes."""
    return store.deployments.release(name, actor)


@router.get("/deployments/{name}/publications")
def publications(
    name: NamePath, store: Stored, _: Reader, limit: Limit = 50, before: Before = None
) -> Page[PublicationRecord]:
    """Every plan that was in force, newest first."""
    records = store.deployments.publications(name, limit=limit + 1, before=before)
    return page_of(records, limit, lambda record: record, lambda record: record.version)


@router.get("/deployments/{name}/checks")
def checks(name: NamePath, store: Stored, _: Reader, limit: Limit = 50, before: Before = None) -> Page[CheckRecord]:
    """Drift checks, newest first."""
    records = store.deployments.checks(name, limit=limit + 1, before=before)
    return page_of(records, limit, lambda record: record, lambda record: record.key)


@router.get("/decisions")
def decisions(
    store: Stored,
    actor: Reader,
    limit: Limit = 50,
    before: Before = None,
    deployment: Annotated[str | None, Query(max_length=100)] = None,
    state: DecisionState | None = None,
) -> Page[DecisionRecord]:
    """Newest first, of one deployment or of all."""
    check_scope(actor, deployment)
    records = store.decisions.page(deployment, limit=limit + 1, before=before, state=state, among=actor.deployments)
    return page_of(records, limit, lambda record: record, lambda record: record.key)


@router.get("/decisions/{key}")
def decision(key: KeyPath, store: Stored, actor: Reader) -> DecisionRecord:
    """One decision, with its figures."""
    record = store.decisions.get(key)
    check_scope(actor, record.deployment)
    return record


@router.post("/decisions/{key}/approve")
def approve(key: KeyPath, body: CommentIn, store: Stored, actor: Approver) -> DecisionRecord:
    """Puts the candidate in force. The same approval again changes nothing."""
    check_scope(actor, store.decisions.get(key).deployment)
    return store.decisions.close(key, "approve", actor, body.comment)


@router.post("/decisions/{key}/reject")
def reject(key: KeyPath, body: CommentIn, store: Stored, actor: Approver) -> DecisionRecord:
    """Keeps the plan in force."""
    check_scope(actor, store.decisions.get(key).deployment)
    return store.decisions.close(key, "reject", actor, body.comment)


@router.post("/deployments/{name}/webhooks", status_code=201)
def add_webhook(name: NamePath, body: WebhookIn, request: Request, store: Stored, actor: Approver) -> WebhookMade:
    """Has drift.alarm, decision.made, decision.rejected and plan.published sent to a URL, signed; or some of them."""
    settings: Settings = request.app.state.settings
    settings.peers.check(body.url)
    record, secret = store.webhooks.add(name, body.url, actor, events=body.events)
    return WebhookMade(**record.model_dump(), secret=secret)


@router.get("/deployments/{name}/webhooks")
def webhooks(name: NamePath, store: Stored, _: Approver) -> list[WebhookRecord]:
    """Without their secrets."""
    return store.webhooks.all(name)


@router.delete("/deployments/{name}/webhooks/{key}", status_code=204)
def remove_webhook(name: NamePath, key: KeyPath, store: Stored, actor: Approver) -> None:
    """Ends a webhook; what was not sent yet is not sent any more."""
    store.webhooks.remove(name, key, actor)


@router.post("/deployments/{name}/webhooks/{key}/rotate")
def rotate_webhook(name: NamePath, key: KeyPath, store: Stored, actor: Approver) -> WebhookMade:
    """A new secret. For 24 hours events carry a signature of the former one, too."""
    record, secret = store.webhooks.rotate(name, key, actor)
    return WebhookMade(**record.model_dump(), secret=secret)


@router.post("/deployments/{name}/webhooks/{key}/test", status_code=202)
def test_webhook(name: NamePath, key: KeyPath, store: Stored, actor: Approver) -> DeliveryRecord:
    """Sends webhook.test, an event that tells of nothing."""
    return store.webhooks.test(name, key, actor)


@router.get("/deployments/{name}/webhooks/{key}/deliveries")
def deliveries(
    name: NamePath, key: KeyPath, store: Stored, _: Approver, limit: Limit = 50, before: Before = None
) -> Page[DeliveryRecord]:
    """Events of a webhook, newest first, and what came of sending them."""
    records = store.webhooks.deliveries(name, key, limit=limit + 1, before=before)
    return page_of(records, limit, lambda record: record, lambda record: record.key)


@router.post("/deployments/{name}/webhooks/{key}/deliveries/{delivery}", status_code=202)
def redeliver(name: NamePath, key: KeyPath, delivery: KeyPath, store: Stored, actor: Approver) -> DeliveryRecord:
    """Sends an event again, with the same id. 409 where it is on its way."""
    return store.webhooks.redeliver(name, key, delivery, actor)


@router.put("/deployments/{name}/engine")
def set_engine(name: NamePath, body: EngineIn, request: Request, store: Stored, actor: Approver) -> EngineRecord:
    """Has SGLang's recorder started, stopped and read on an interval; what it counts is stored as windows. Replaces any
    other."""
    settings: Settings = request.app.state.settings
    settings.peers.check(body.url)
    known = settings.recorders
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


def _plan_tag(record: DeploymentRecord, engine: Engine) -> str:
    return etag_of(record.name, record.version, record.plan_id, engine)


def tag_of(record: DeploymentRecord) -> str:
    """Changes with the policy and with the plan in force."""
    return etag_of(record.name, record.version, record.policy)


def _only_if(if_match: str | None) -> Condition | None:
    """Raises HTTPException 412 for a deployment whose tag is another; None where any will do."""
    if if_match is None:
        return None

    def condition(record: DeploymentRecord) -> None:
        if not matches(if_match, tag_of(record)):
            tag = {"ETag": tag_of(record)}
            raise HTTPException(412, f"{record.name!r} changed meanwhile; get it again", headers=tag)

    return condition
