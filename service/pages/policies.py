"""What each deployment wants done for it, and the form that changes it."""

from __future__ import annotations

import json
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.concurrency import run_in_threadpool

from ...db.records import DeploymentRecord
from ...db.store import Store
from ..access import check_role
from ..middleware import SMALL_BODY
from ..policy import Policy
from ..routes.common import NamePath, Stored
from ..routes.deployments import set_policy, tag_of
from .lists import SHOWN, Behind, Cell, listing
from .templating import page, words
from .visitors import Visitor, at, form_of

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

MEANINGS = {
    "objective": "what a solve minimises",
    "engine": "what plans are for: they keep to what it runs",
    "solver": "who solves",
    "options": "of the solver",
    "seconds": "a solve may take",
    "slots": "of a layer, over all devices",
    "batches": "steps that the deployment runs",
    "step_tokens": "for one batch: tokens of a decode step over all devices",
    "block": "neighbouring windows taken as one observation",
    "recent": "newest windows that a check compares",
    "false_alarm": "chance that one check finds a change although there is none",
    "min_regret": "predicted loss against a fresh plan from which on a change matters",
    "publish": "approval leaves it to a person; automatic puts it in force",
    "confidence": "that a candidate is better, before it is applied",
    "horizon_steps": "steps over which a move has to pay",
    "restart_seconds": "that an engine serves nothing when it takes a plan by starting anew",
    "keep_windows": "windows kept; older ones are dropped",
    "join": "old windows that are joined into one",
    "join_after_hours": "hours after which they are",
    "keep_traces": "uploaded traces kept",
}


@router.get("/policies")
def policies(request: Request, store: Stored, actor: Visitor, after: Behind = None) -> HTMLResponse:
    """How plans of all deployments are solved, judged and published."""

    def row(deployment: DeploymentRecord) -> list[Cell]:
        policy = Policy(**deployment.policy)
        return [
            Cell(deployment.name, f"/deployments/{quote(deployment.name, safe='')}/policy"),
            Cell(policy.publish),
            Cell(policy.engine),
            Cell(policy.solver),
            Cell(f"{policy.seconds:,.4g}", number=True),
            Cell(f"{policy.recent:,}", number=True),
            Cell(f"{policy.false_alarm:.4g}", number=True),
            Cell(f"{policy.min_regret:.2%}", number=True),
            Cell(f"{policy.keep_windows:,}", number=True),
        ]

    columns = (
        "deployment",
        "publishing",
        "engine",
        "solver",
        "seconds a solve",
        "windows compared",
        "false alarms",
        "regret that matters",
        "windows kept",
    )
    records = store.deployments.page(limit=SHOWN + 1, after=after or "", among=actor.deployments)
    return listing(request, actor, "policies", "By deployment", columns, records, row, ("after", lambda r: r.name))


@router.get("/deployments/{name}/policy")
def policy_page(name: NamePath, store: Stored, actor: Visitor) -> HTMLResponse:
    """One policy, field by field."""
    deployment = store.deployments.get(name)
    document, usual = Policy(**deployment.policy).as_document(), Policy().as_document()
    fields = [(field, words(document[field]), words(usual[field]), MEANINGS[field]) for field in MEANINGS]
    text = json.dumps({field: value for field, value in document.items() if value != usual[field]}, indent=2)
    return page(
        "policy.html",
        actor,
        section="policies",
        deployment=deployment,
        fields=fields,
        text=text,
        tag=tag_of(deployment),
    )


@router.post("/deployments/{name}/policy")
async def change(name: NamePath, request: Request, actor: Visitor) -> Response:
    """The button Save: of what was seen, so that nobody else's change is lost unseen."""
    form = await form_of(request, SMALL_BODY)
    check_role(actor, "approve")
    store: Store = request.app.state.store
    body = Policy.model_validate_json(form.get("policy", ""))
    await run_in_threadpool(set_policy, name, body, request, store, actor, form.get("tag") or '""')
    return RedirectResponse(at(request, f"/deployments/{quote(name, safe='')}/policy"), 303)
