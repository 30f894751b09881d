"""Models, topologies and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request, Response

from ...db.records import ModelRecord, NamedRecord, StatisticsRecord
from ...placement.errors import InputError, NotFoundError
from ...placement.topology import Topology
from ..access import Reader, Submitter
from ..schemas import ModelIn, TopologyFull, TopologyIn, TopologyView
from .common import ERRORS, Limit, Page, RefPath, Stored, etag_of, page_of, unchanged

router = APIRouter(prefix="/v1", tags=["catalogue"], responses=ERRORS)
MOST_DEVICES = 4096
Older = Annotated[str | None, Query(max_length=64, pattern="^[0-9a-f]+$", description="`next` of the page before.")]
R = TypeVar("R", bound=NamedRecord)


@router.post("/models", status_code=201)
def add_model(body: ModelIn, store: Stored, _: Submitter) -> ModelRecord:
    """Keeps a model; one that is stored already is returned."""
    return store.add_model(body.spec, name=body.name)


@router.get("/models")
def models(store: Stored, _: Reader, limit: Limit = 50, before: Older = None) -> Page[ModelRecord]:
    """Newest first."""
    return page_of(_behind(store.models(), before, limit), limit, lambda record: record, lambda record: record.id)


@router.get("/models/{ref}", response_model=ModelRecord)
def model(ref: RefPath, request: Request, response: Response, store: Stored, _: Reader) -> ModelRecord | Response:
    """One model."""
    record = store.model(ref)
    return unchanged(request, response, etag_of(record.fingerprint, record.name)) or record


@router.post("/topologies", status_code=201)
def add_topology(body: TopologyIn, store: Stored, _: Submitter) -> TopologyFull:
    """Keeps a cluster; one that is stored already is returned."""
    cluster = Topology.from_dict(body.topology, "topology")
    if cluster.num_devices > MOST_DEVICES:
        raise InputError(f"topology: {cluster.num_devices} devices, at most {MOST_DEVICES} are taken")
    return TopologyFull.of(store.add_topology(cluster, name=body.name))


@router.get("/topologies")
def topologies(store: Stored, _: Reader, limit: Limit = 50, before: Older = None) -> Page[TopologyView]:
    """Newest first."""
    return page_of(_behind(store.topologies(), before, limit), limit, TopologyView.of, lambda record: record.id)


@router.get("/topologies/{ref}", response_model=TopologyFull)
def topology(ref: RefPath, request: Request, response: Response, store: Stored, _: Reader) -> TopologyFull | Response:
    """One cluster, in full."""
    record = store.topology(ref)
    return unchanged(request, response, etag_of(record.fingerprint, record.name)) or TopologyFull.of(record)


@router.get("/statistics")
def statistics(store: Stored, _: Reader, limit: Limit = 50, before: Older = None) -> Page[StatisticsRecord]:
    """What was recorded or counted, newest first. They come in as uploads."""
    found = _behind(store.statistics_records(), before, limit)
    return page_of(found, limit, lambda record: record, lambda record: record.id)


@router.get("/statistics/{ref}")
def one_statistics(ref: RefPath, store: Stored, _: Reader) -> StatisticsRecord:
    """What stored statistics hold."""
    return store.statistics(ref)


def _behind(records: Sequence[R], before: str | None, limit: int) -> Sequence[R]:
    """The first of those behind the one whose id is `before`, and one more where there are more."""
    if before is None:
        return records[: limit + 1]
    for position, record in enumerate(records):
        if record.id == before:
            return records[position + 1 : position + 2 + limit]
    raise NotFoundError(f"before: no {before!r} in this list; start again without it")
