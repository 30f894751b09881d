"""Plans, and the files engines read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from ...db.store import Store
from ...runtime.exporters import export_bytes
from ...runtime.exporters.export import engine_usage
from ..access import Operator, Reader, Submitter, check_scope
from ..readers import Readers
from ..schemas import PlanFull, PlanView, Ref
from .catalogue import Older
from .common import (
    ERRORS,
    OCTET_BODY,
    OCTETS,
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

router = APIRouter(prefix="/v1", tags=["plans"], responses=ERRORS)
Engine = Literal["moeplace", "sglang", "sglang-lp", "vllm", "vllm-ascend", "trtllm"]
KINDS = {".json": "application/json", ".yaml": "application/yaml", ".pt": OCTETS}
Text = Annotated[str | None, Query(max_length=100, pattern=r"^[ -~]*$")]


class Usage(BaseModel):
    """How to give the file to its engine."""

    format: Engine
    usage: str


@router.get("/plans")
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


@router.post("/plans", status_code=201, response_model=PlanView, openapi_extra=json_body("PlanIn"))
async def add_plan(request: Request, actor: Submitter) -> Response:
    """Keeps a plan made elsewhere; one that is stored already is returned."""
    readers: Readers = request.app.state.readers
    return made(await readers.document("plan", await request.body(), actor))


@router.post("/plans/file", status_code=201, response_model=PlanView, openapi_extra=OCTET_BODY)
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


@router.get("/plans/{ref}", response_model=PlanFull)
def plan(ref: RefPath, request: Request, response: Response, store: Stored, _: Reader) -> PlanFull | Response:
    """A plan with its tables."""
    record = store.plan(ref)
    return unchanged(request, response, etag_of(record.fingerprint, record.name)) or PlanFull.of(record)


@router.delete("/plans/{ref}", status_code=204)
def remove_plan(ref: RefPath, store: Stored, actor: Operator) -> None:
    """Removes a plan that no deployment has, or had, in force or under decision."""
    store.remove("plan", ref, actor)


@router.get(
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


@router.get("/plans/{ref}/usage")
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
