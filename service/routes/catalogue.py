"""Models, topologies and statistics."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from ...db.records import ModelRecord, StatisticsRecord
from ..access import Operator, Reader, Submitter
from ..readers import Readers
from ..schemas import ModelIn, TopologyFull, TopologyView
from .common import ERRORS, Limit, Page, RefPath, Stored, etag_of, json_body, made, page_of, unchanged

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
