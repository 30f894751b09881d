"""What is stored: models, topologies and statistics; plans, and the files engines read; files sent in pieces."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Header, HTTPException, Query, Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from ...db.records import Actor, ModelRecord, StatisticsRecord, UploadRecord
from ...db.store import Store
from ...db.uploads import PIECE_LIMIT
from ...runtime.exporters.export import engine_usage, export_bytes
from ..access import Operator, Reader, Submitter, check_scope
from ..readers import Readers
from ..schemas import ModelIn, PlanFull, PlanView, Ref, TopologyFull, TopologyView, UploadIn
from .common import (
    ERRORS,
    OCTET_BODY,
    OCTETS,
    KeyPath,
    Limit,
    Page,
    RefPath,
    Stored,
    etag_of,
    json_body,
    made,
    page_of,
    unchanged,
)

router = APIRouter(prefix="/v1", tags=["catalogue"], responses=ERRORS)
Older = Annotated[str | None, Query(max_length=64, pattern="^[0-9a-f]+$", description="`next` of the page before.")]


@router.post("/models", status_code=201)
def add_model(body: ModelIn, store: Stored, actor: Submitter) -> ModelRecord:
    """Keeps a model; one that is stored already is returned."""
    return store.add_model(body.spec, name=body.name, by=actor)


@router.get("/models")
def models(store: Stored, _: Reader, limit: Limit = 50, before: Older = None) -> Page[ModelRecord]:
    """Newest first."""
    records = store.models(limit=limit + 1, before=before)
    return page_of(records, limit, lambda record: record, lambda record: record.id)


@router.get("/models/{ref}", response_model=ModelRecord)
def model(ref: RefPath, request: Request, response: Response, store: Stored, _: Reader) -> ModelRecord | Response:
    """One model."""
    record = store.model(ref)
    return unchanged(request, response, etag_of(record.fingerprint, record.name)) or record


@router.delete("/models/{ref}", status_code=204)
def remove_model(ref: RefPath, store: Stored, actor: Operator) -> None:
    """Removes it; 422 where plans or deployments would lose it."""
    store.remove("model", ref, actor)


@router.post("/topologies", status_code=201, response_model=TopologyFull, openapi_extra=json_body("TopologyIn"))
async def add_topology(request: Request, actor: Submitter) -> Response:
    """Keeps a cluster; one that is stored already is returned."""
    readers: Readers = request.app.state.readers
    return made(await readers.document("topology", await request.body(), actor))


@router.get("/topologies")
def topologies(store: Stored, _: Reader, limit: Limit = 50, before: Older = None) -> Page[TopologyView]:
    """Newest first."""
    records = store.topology_summaries(limit=limit + 1, before=before)
    return page_of(records, limit, TopologyView.of, lambda record: record.id)


@router.get("/topologies/{ref}", response_model=TopologyFull)
def topology(ref: RefPath, request: Request, response: Response, store: Stored, _: Reader) -> TopologyFull | Response:
    """One cluster, in full."""
    record = store.topology(ref)
    return unchanged(request, response, etag_of(record.fingerprint, record.name)) or TopologyFull.full(record)


@router.delete("/topologies/{ref}", status_code=204)
def remove_topology(ref: RefPath, store: Stored, actor: Operator) -> None:
    """Removes it; 422 where plans or deployments would lose it."""
    store.remove("topology", ref, actor)


@router.get("/statistics")
def statistics(store: Stored, _: Reader, limit: Limit = 50, before: Older = None) -> Page[StatisticsRecord]:
    """What was recorded or counted, newest first. They come in as uploads."""
    records = store.statistics_records(limit=limit + 1, before=before)
    return page_of(records, limit, lambda record: record, lambda record: record.id)


@router.get("/statistics/{ref}")
def one_statistics(ref: RefPath, store: Stored, _: Reader) -> StatisticsRecord:
    """What stored statistics hold."""
    return store.statistics(ref)


@router.delete("/statistics/{ref}", status_code=204)
def remove_statistics(ref: RefPath, store: Stored, actor: Operator) -> None:
    """Removes it; 422 where plans or deployments would lose it."""
    store.remove("statistics", ref, actor)


# Plans, and the files engines read.

plans_router = APIRouter(prefix="/v1", tags=["plans"], responses=ERRORS)
Engine = Literal["moeplace", "sglang", "sglang-lp", "vllm", "vllm-ascend", "trtllm"]
KINDS = {".json": "application/json", ".yaml": "application/yaml", ".pt": OCTETS}
Text = Annotated[str | None, Query(max_length=100, pattern=r"^[ -~]*$")]


class Usage(BaseModel):
    """How to give the file to its engine."""

    format: Engine
    usage: str


@plans_router.get("/plans")
def plans(
    store: Stored,
    _: Reader,
    limit: Limit = 50,
    before: Older = None,
    model: Text = None,
    solver: Text = None,
) -> Page[PlanView]:
    """Without their tables, newest first."""
    records = store.plans(limit=limit + 1, before=before, model=model, solver=solver)
    return page_of(records, limit, PlanView.of, lambda record: record.id)


@plans_router.post("/plans", status_code=201, response_model=PlanView, openapi_extra=json_body("PlanIn"))
async def add_plan(request: Request, actor: Submitter) -> Response:
    """Keeps a plan made elsewhere; one that is stored already is returned."""
    readers: Readers = request.app.state.readers
    return made(await readers.document("plan", await request.body(), actor))


@plans_router.post("/plans/file", status_code=201, response_model=PlanView, openapi_extra=OCTET_BODY)
async def add_plan_file(
    request: Request,
    actor: Submitter,
    model: Ref | None = None,
    topology: Ref | None = None,
    deployment: Ref | None = None,
    name: Text = None,
) -> Response:
    """Keeps the plan in an engine's own file (SGLang's, vLLM's, vLLM-Ascend's, TensorRT-LLM's; or moeplace's), told by
    what it holds. Of a stored model on a stored topology, or a deployment's."""
    check_scope(actor, deployment)
    readers: Readers = request.app.state.readers
    asked = {
        "actor": asdict(actor),
        "operation": "plan file",
        "model": model,
        "topology": topology,
        "deployment": deployment,
        "name": name,
    }
    return made((await readers.requests.ask(asked, await request.body(), actor.name))[1])


@plans_router.get("/plans/{ref}", response_model=PlanFull)
def plan(ref: RefPath, request: Request, response: Response, store: Stored, _: Reader) -> PlanFull | Response:
    """A plan with its tables."""
    record = store.plan(ref)
    return unchanged(request, response, etag_of(record.fingerprint, record.name)) or PlanFull.of(record)


@plans_router.delete("/plans/{ref}", status_code=204)
def remove_plan(ref: RefPath, store: Stored, actor: Operator) -> None:
    """Removes a plan that no deployment has, or had, in force or under decision."""
    store.remove("plan", ref, actor)


@plans_router.get(
    "/plans/{ref}/export",
    response_class=Response,
    responses={
        200: {"description": "The file.", "content": {"application/json": {}, "application/yaml": {}, OCTETS: {}}}
    },
)
def export(
    ref: RefPath,
    request: Request,
    response: Response,
    store: Stored,
    _: Reader,
    format: Engine = "moeplace",  # noqa: A002
) -> Response:
    """The plan as the file an engine reads. 422 where the engine cannot express it; the message says what to change."""
    record = store.plan(ref)
    etag = etag_of(record.fingerprint, format)
    known = unchanged(request, response, etag, forever=ref == record.fingerprint)
    return known or download(export_bytes(record.plan, format), record.id, format, dict(response.headers))


@plans_router.get("/plans/{ref}/usage")
def usage(ref: RefPath, store: Stored, _: Reader, format: Engine = "moeplace") -> Usage:  # noqa: A002
    """How to start an engine with the exported file."""
    record = store.plan(ref)
    return Usage(format=format, usage=engine_usage(record.plan, format, file_name(record.id, format)))


def plan_file(store: Store, asked: tuple[str, Engine]) -> bytes:
    """The file that an engine reads of a stored plan, by its id."""
    ref, engine = asked
    return export_bytes(store.plan(ref).plan, engine)


def download(content: bytes, plan_id: str, engine: Engine, headers: dict[str, str]) -> Response:
    """An engine's file as an answer."""
    name = file_name(plan_id, engine)
    disposition = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type=KINDS[Path(name).suffix], headers={**headers, **disposition})


def file_name(plan_id: str, engine: Engine) -> str:
    """What a download is called."""
    suffix = {"trtllm": ".yaml", "sglang-lp": ".pt"}.get(engine, ".json")
    return f"plan-{plan_id}-{engine}{suffix}"


# Files sent in pieces: traces of deployments, and statistics.

uploads_router = APIRouter(prefix="/v1/uploads", tags=["uploads"], responses=ERRORS)


@uploads_router.post("", status_code=201)
def begin(body: UploadIn, store: Stored, actor: Submitter) -> UploadRecord:
    """The upload of this content: a new one, or one begun or finished before, with how many bytes of it are here."""
    check_scope(actor, body.deployment)
    if body.kind == "trace":
        if body.deployment is None:
            raise HTTPException(422, "deployment: a trace belongs to one")
        return store.uploads.begin("trace", store.deployments.get(body.deployment).name, body.sha256, body.total_bytes)
    if body.deployment is not None:
        raise HTTPException(422, "deployment: statistics belong to none; leave it out")
    return store.uploads.begin("statistics", "", body.sha256, body.total_bytes)


@uploads_router.get("/{key}")
def upload(key: KeyPath, store: Stored, actor: Reader) -> UploadRecord:
    """How far an upload is."""
    return _own(store, key, actor)


@uploads_router.patch(
    "/{key}",
    openapi_extra=OCTET_BODY,
)
async def append(
    key: KeyPath,
    request: Request,
    actor: Submitter,
    upload_offset: Annotated[int, Header(ge=0, le=1 << 40, description="Bytes that came before this piece.")],
) -> UploadRecord:
    """The next piece, at most 8 MiB. 409 when another one is next: get the upload and go on from `received_bytes`."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != OCTETS:
        raise HTTPException(415, f"expected Content-Type {OCTETS}")
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > PIECE_LIMIT:
        raise HTTPException(413, f"a piece of more than {PIECE_LIMIT:,} bytes; send several")
    store: Store = request.app.state.store
    await run_in_threadpool(_own, store, key, actor)
    piece = await request.body()
    return await run_in_threadpool(store.uploads.append, key, upload_offset, piece)


@uploads_router.post("/{key}/finish", response_model=UploadRecord)
async def finish(key: KeyPath, request: Request, store: Stored, actor: Submitter) -> Response:
    """Checks the whole: its SHA-256, and that it is what it was announced as. Doing so again changes nothing."""
    readers: Readers = request.app.state.readers
    await run_in_threadpool(_own, store, key, actor)
    asked = {"operation": "finish", "upload": key, "actor": asdict(actor)}
    content = (await readers.uploads.ask(asked, b"", actor.name))[1]
    return Response(content, media_type="application/json")


def _own(store: Store, key: int, actor: Actor) -> UploadRecord:
    """An upload of a deployment that the token is for, or of none."""
    record = store.uploads.get(key)
    check_scope(actor, record.owner or None)
    return record
