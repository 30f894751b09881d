"""Templates, what they know of the visitor, and the page of an error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlsplit

from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, select_autoescape
from starlette.datastructures import Headers
from starlette.types import Scope

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


# What went wrong, for people: a page with a way on.

ADVICE = {
    401: "Sign in with a token, then open this page again.",
    403: "Ask whoever runs this server for a token that allows it.",
    404: "It may have been removed, or the address is not what it was meant to be.",
    409: "Look at its present state first.",
    412: "Look at its present state first.",
    429: "Wait a moment, then try again.",
    500: "Try again; if it stays, tell whoever runs this server when it happened.",
    503: "Wait a moment, then try again.",
}
WHAT = {404: "There is nothing at this address.", 405: "This address does not answer such a request."}
"""Instead of what the framework says."""


def wants_page(scope: Scope) -> bool:
    """Whether a browser asked: it names HTML among what it takes, and JSON not before it."""
    weights = {}
    for entry in Headers(scope=scope).get("accept", "").split(","):
        kind, _, parameters = entry.partition(";")
        weights[kind.strip().lower()] = _weight(parameters)
    json = max(weights.get("application/json", 0.0), weights.get("application/problem+json", 0.0))
    return weights.get("text/html", 0.0) > 0 and weights["text/html"] >= json


def _weight(parameters: str) -> float:
    for parameter in parameters.split(";"):
        name, _, value = parameter.strip().partition("=")
        if name == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def error_page(scope: Scope, status: int, title: str, detail: str, headers: Mapping[str, str]) -> HTMLResponse:
    """The page of an error: its status, what happened, what to do, and links on."""
    answer = page(
        "error.html",
        scope.get("state", {}).get("visitor"),
        status,
        number=status,
        title=title,
        detail=WHAT.get(status, detail) if detail in ("Not Found", "Method Not Allowed") else detail,
        advice=ADVICE.get(status),
        back=_back(scope),
        again=_address(quote(scope["path"], errors="replace"), scope["query_string"].decode("latin-1"))
        if scope["method"] == "GET" and status in (429, 500, 503)
        else None,
    )
    answer.headers.update(headers)
    return answer


def _back(scope: Scope) -> str | None:
    """The page that the visitor came from, where that is one of this server."""
    headers = Headers(scope=scope)
    try:
        came_from = urlsplit(headers.get("referer", ""))
    except ValueError:
        return None
    if came_from.scheme not in ("http", "https") or came_from.netloc != headers.get("host"):
        return None
    if scope["method"] == "GET" and came_from.path == scope["path"]:
        return None
    return _address(came_from.path, came_from.query)


def _address(path: str, query: str) -> str:
    # Two slashes at the beginning would be another host's address.
    return "/" + path.lstrip("/") + (f"?{query}" if query else "")
