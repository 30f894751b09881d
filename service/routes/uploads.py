"""Files sent in pieces: traces of deployments, and statistics."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Header, HTTPException, Request, Response
from starlette.concurrency import run_in_threadpool

from ...db.records import Actor, UploadRecord
from ...db.store import Store
from ...db.uploads import PIECE_LIMIT
from ..access import Reader, Submitter, check_scope
from ..readers import Readers
from ..schemas import UploadIn
from .common import ERRORS, OCTET_BODY, OCTETS, KeyPath, Stored

router = APIRouter(prefix="/v1/uploads", tags=["uploads"], responses=ERRORS)


@router.post("", status_code=201)
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


@router.get("/{key}")
def upload(key: KeyPath, store: Stored, actor: Reader) -> UploadRecord:
    """How far an upload is."""
    return _own(store, key, actor)


@router.patch(
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


@router.post("/{key}/finish", response_model=UploadRecord)
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
