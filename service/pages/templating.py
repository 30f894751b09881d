"""Templates, and what they know of the visitor."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, select_autoescape

from ...db.records import Actor, Role


def minute(moment: datetime | str) -> str:
    """A moment as pages tell it."""
    moment = datetime.fromisoformat(moment).astimezone(UTC) if isinstance(moment, str) else moment
    return moment.strftime("%Y-%m-%d %H:%M")


pages = Environment(
    loader=PackageLoader(__name__.rpartition(".")[0]), autoescape=select_autoescape(default=True), trim_blocks=True
)
pages.filters["minute"] = minute
pages.filters["second"] = lambda moment: moment.strftime("%Y-%m-%dT%H:%M:%S")
pages.filters["figure"] = lambda value: "–" if value is None else f"{value:,.4g}"
pages.filters["percent"] = lambda value: "–" if value is None else f"{value:.2%}"
pages.filters["size"] = lambda value: "–" if value is None else f"{value / 1e9:,.2f} GB"
pages.filters["ms"] = lambda value: "–" if value is None else f"{value * 1e3:,.3f}"


def words(value: object) -> str:
    """Plain data in a cell."""
    if value is None or value == {} or value == []:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def sections(actor: Actor | None) -> list[str]:
    """What the navigation leads to: what this visitor may see, or anybody."""
    names = ["decisions", "plans", "jobs", "policies", "engines"]
    if actor is not None and actor.may("approve"):
        names.append("webhooks")
        if actor.deployments is None:
            names.append("audit")
    return names


def page(template: str, actor: Actor | None, status: int = 200, **values: Any) -> HTMLResponse:
    """A page. Templates know what the visitor may."""
    roles: dict[str, Role] = {"approver": "approve", "submitter": "submit"}
    allowed = {name: actor is not None and actor.may(role) for name, role in roles.items()}
    html = pages.get_template(template).render(actor=actor, sections=sections(actor), **allowed, **values)
    return HTMLResponse(html, status, headers={"Cache-Control": "no-store"})
