"""Engines that are asked for their routing."""

from __future__ import annotations

from fastapi import APIRouter, Request

from ...db.records import EngineRecord
from ...placement.errors import InputError
from ..access import Approver, Reader
from ..schemas import EngineIn
from .common import ERRORS, NamePath, Stored

router = APIRouter(prefix="/v1/deployments/{name}/engine", tags=["deployments"], responses=ERRORS)


@router.put("")
def set_engine(name: NamePath, body: EngineIn, request: Request, store: Stored, actor: Approver) -> EngineRecord:
    """Has SGLang's recorder started, stopped and read on an interval; what it counts is stored as windows. Replaces any other."""
    known = request.app.state.settings.recorders
    if body.recorder not in known:
        named = ", ".join(map(repr, known)) or "none"
        raise InputError(
            f"recorder: {body.recorder!r} is no folder of this server (moeplace serve --recorder); known: {named}"
        )
    return store.engines.set(
        name, actor, url=body.url, recorder=body.recorder, every=body.every, span=body.span, secret=body.key
    )


@router.get("")
def engine(name: NamePath, store: Stored, _: Reader) -> EngineRecord:
    """The engine that is asked, when windows last came, and what failed since."""
    return store.engines.get(name)


@router.delete("", status_code=204)
def remove_engine(name: NamePath, store: Stored, actor: Approver) -> None:
    """Asks it no more."""
    store.engines.remove(name, actor)
