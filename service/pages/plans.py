"""The page of one plan."""

from __future__ import annotations

from typing import get_args
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.concurrency import run_in_threadpool

from ...db.store import Store
from ...placement.errors import MoeplaceError
from ...placement.plan import Plan
from ...runtime.exporters import check_export
from ...runtime.exporters.export import engine_usage
from ..access import check_role
from ..routes.common import NamePath, RefPath, Stored
from ..routes.plans import Engine, file_name
from .forms import form_of, whole_number
from .templating import page
from .visitors import Visitor, at

MOST_DEPLOYMENTS = 200
"""That a plan fits, which its page names."""
router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


@router.get("/plans/{ref}")
def plan_page(ref: RefPath, store: Stored, actor: Visitor) -> HTMLResponse:
    """What the plan is of, how it was made, and its files for engines."""
    record = store.plan(ref)
    files = [_file(record.plan, record.id, engine) for engine in get_args(Engine)]
    fitting = store.deployments.page(
        limit=MOST_DEPLOYMENTS + 1, among=actor.deployments, model=record.model_id, topology=record.topology_id
    )
    more = len(fitting) > MOST_DEPLOYMENTS
    fitting = fitting[:MOST_DEPLOYMENTS]
    return page("plan.html", actor, section="plans", record=record, files=files, fitting=fitting, more=more)


@router.post("/deployments/{name}/publish")
async def publish(name: NamePath, request: Request, actor: Visitor) -> Response:
    """The button Publish: of what was seen, so that nobody else's plan is replaced unseen."""
    form = await form_of(request)
    check_role(actor, "approve")
    version = whole_number(form, "version")
    store: Store = request.app.state.store
    await run_in_threadpool(
        store.deployments.publish, name, form.get("plan", ""), actor, cause="manual", expected=version
    )
    return RedirectResponse(at(request, f"/deployments/{quote(name)}"), 303)


def _file(plan: Plan, plan_id: str, engine: Engine) -> dict[str, str]:
    """A format's name, and how to use its file, or why there is none."""
    try:
        check_export(plan, engine)
        return {"engine": engine, "usage": engine_usage(plan, engine, file_name(plan_id, engine))}
    except MoeplaceError as error:
        return {"engine": engine, "refusal": str(error)}
