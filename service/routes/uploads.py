"""Files sent in pieces: traces of deployments, and statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Request
from starlette.concurrency import run_in_threadpool

from ...db.content import ID_DIGITS, statistics_fingerprint
from ...db.records import UploadRecord
from ...db.store import Store
from ...db.uploads import PIECE_LIMIT
from ..access import Reader, Submitter
from ..routing import check_trace, statistics_of
from ..schemas import UploadIn
from ..shards import Shards
from .common import ERRORS, OCTET_BODY, OCTETS, KeyPath, Stored

router = APIRouter(prefix="/v1/uploads", tags=["uploads"], responses=ERRORS)


@router.post("", status_code=201)
def begin(body: UploadIn, store: Stored, _: Submitter) -> UploadRecord:
    """The upload of this content: a new one, or one begun or finished before, with how many bytes of it are here."""
    if body.kind == "trace":
        if body.deployment is None:
            raise HTTPException(422, "deployment: a trace belongs to one")
        return store.uploads.begin("trace", store.deployments.get(body.deployment).name, body.sha256, body.total_bytes)
    if body.deployment is not None:
        raise HTTPException(422, "deployment: statistics belong to none; leave it out")
    return store.uploads.begin("statistics", "", body.sha256, body.total_bytes)


@router.get("/{key}")
def upload(key: KeyPath, store: Stored, _: Reader) -> UploadRecord:
    """How far an upload is."""
    return store.uploads.get(key)


@router.patch(
    "/{key}",
    openapi_extra=OCTET_BODY,
)
async def append(
    key: KeyPath,
    request: Request,
    _: Submitter,
    upload_offset: Annotated[int, Header(ge=0, le=1 << 40, description="Bytes that came before this piece.")],
) -> UploadRecord:
    """The next piece, at most 8 MiB. 409 when another one is next: get the upload and go on from `received_bytes`."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != OCTETS:
        raise HTTPException(415, f"expected Content-Type {OCTETS}")
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > PIECE_LIMIT:
        raise HTTPException(413, f"a piece of more than {PIECE_LIMIT:,} bytes; send several")
    piece = await request.body()
    store: Store = request.app.state.store
    return await run_in_threadpool(store.uploads.append, key, upload_offset, piece)


@router.post("/{key}/finish")
def finish(key: KeyPath, request: Request, store: Stored, _: Submitter) -> UploadRecord:
    """Checks the whole: its SHA-256, and that it is what it was announced as. Doing so again changes nothing."""
    record = store.uploads.get(key)

    def inspect(content: bytes) -> Mapping[str, Any]:
        if record.kind == "trace":
            return check_trace(content, store.model(store.deployments.get(record.owner).model_id).spec)
        statistics = statistics_of(content)
        store.add_statistics(statistics, content)
        return {"statistics": statistics_fingerprint(statistics)[:ID_DIGITS]}

    shards: Shards | None = request.app.state.shards
    move = shards.put if shards is not None and record.kind == "trace" else None
    return store.uploads.finish(key, inspect, move)
