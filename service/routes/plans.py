"""Plans, and the files engines read."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from ...db.store import Store
from ...placement.errors import FileFormatError, InputError
from ...placement.plan import Plan, plan_from_dict
from ...runtime.exporters import export_bytes, read_plan_file
from ...runtime.exporters.export import engine_usage
from ..access import Reader, Submitter
from ..schemas import PlanFull, PlanIn, PlanView, Ref
from .catalogue import Older
from .common import ERRORS, OCTET_BODY, OCTETS, Limit, Page, RefPath, Stored, etag_of, page_of, unchanged

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
    found = store.plans(limit=limit + 1, before=before, model=model, solver=solver)
    return page_of(found, limit, PlanView.of, lambda record: record.id)


@router.post("/plans", status_code=201)
def add_plan(body: PlanIn, store: Stored, _: Submitter) -> PlanView:
    """Keeps a plan made elsewhere; one that is stored already is returned."""
    try:
        plan = plan_from_dict(body.document, "document")
    except (AttributeError, KeyError, IndexError, OverflowError) as error:
        raise FileFormatError(f"document: not a plan ({type(error).__name__})") from None
    return PlanView.of(store.add_plan(plan, name=body.name))


@router.post(
    "/plans/file",
    status_code=201,
    openapi_extra=OCTET_BODY,
)
async def add_plan_file(
    request: Request,
    store: Stored,
    _: Submitter,
    model: Ref | None = None,
    topology: Ref | None = None,
    deployment: Ref | None = None,
    name: Text = None,
) -> PlanView:
    """Keeps the plan in an engine's own file (SGLang's, vLLM's, vLLM-Ascend's, TensorRT-LLM's; or moeplace's), told by
    what it holds. Of a stored model on a stored topology, or a deployment's."""
    content = await request.body()
    return await run_in_threadpool(_kept, store, content, model, topology, deployment, name)


def _kept(
    store: Store, content: bytes, model: str | None, topology: str | None, deployment: str | None, name: str | None
) -> PlanView:
    if deployment is not None:
        known = store.deployments.get(deployment)
        model, topology = known.model_id, known.topology_id
    with TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        file.write_bytes(content)
        try:
            plan = read_plan_file(
                file,
                None if model is None else store.model(model).spec,
                None if topology is None else store.topology(topology).topology,
            )
        except InputError as error:
            # Where it lay meanwhile is nobody's business.
            raise type(error)(str(error).replace(str(file), "file")) from None
    return PlanView.of(store.add_plan(plan, name=name))


@router.get("/plans/{ref}", response_model=PlanFull)
def plan(ref: RefPath, request: Request, response: Response, store: Stored, _: Reader) -> PlanFull | Response:
    """A plan with its tables."""
    record = store.plan(ref)
    return unchanged(request, response, etag_of(record.fingerprint, record.name)) or PlanFull.of(record)


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
    return unchanged(request, response, etag, forever=ref == record.fingerprint) or exported(
        record.plan, record.id, format, dict(response.headers)
    )


@router.get("/plans/{ref}/usage")
def usage(ref: RefPath, store: Stored, _: Reader, format: Engine = "moeplace") -> Usage:  # noqa: A002
    """How to start an engine with the exported file."""
    record = store.plan(ref)
    return Usage(format=format, usage=engine_usage(record.plan, format, file_name(record.id, format)))


def exported(plan: Plan, plan_id: str, engine: Engine, headers: dict[str, str]) -> Response:
    """The engine's file as a download."""
    name = file_name(plan_id, engine)
    content = export_bytes(plan, engine)
    kind = KINDS[Path(name).suffix]
    disposition = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type=kind, headers={**headers, **disposition})


def file_name(plan_id: str, engine: Engine) -> str:
    """What a download is called."""
    suffix = {"trtllm": ".yaml", "sglang-lp": ".pt"}.get(engine, ".json")
    return f"plan-{plan_id}-{engine}{suffix}"
