"""What all pages share: templates, who visits, and forms."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import Depends, HTTPException, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool

from ...db.service_records import ROLES, Actor, Role
from ..access import COOKIE, Gate
from . import figures
from .charts import heat_map

pages = Environment(
    loader=PackageLoader(__name__.rpartition(".")[0]), autoescape=select_autoescape(default=True), trim_blocks=True
)
pages.filters["minute"] = lambda moment: moment.strftime("%Y-%m-%d %H:%M")
pages.filters["figure"] = lambda value: "–" if value is None else f"{value:,.4g}"
pages.filters["percent"] = lambda value: "–" if value is None else f"{value:.2%}"
pages.filters["size"] = lambda value: "–" if value is None else f"{value / 1e9:,.2f} GB"
pages.filters["ms"] = lambda value: "–" if value is None else f"{value * 1e3:,.3f}"


async def visitor(request: Request) -> Actor:
    """Whose visit it is; without a valid token, the way to the sign-in page."""
    gate: Gate = request.app.state.gate
    try:
        return await run_in_threadpool(gate.actor, request, request.cookies.get(COOKIE))
    except HTTPException as error:
        if error.status_code == 401:
            raise HTTPException(303, "sign in", headers={"Location": "/sign-in"}) from None
        raise


Visitor = Annotated[Actor, Depends(visitor)]


def may(actor: Actor | None, role: Role) -> bool:
    """Whether the visitor has this role or a higher one."""
    return actor is not None and ROLES.index(actor.role) >= ROLES.index(role)


def needs(actor: Actor, role: Role) -> None:
    """Raises HTTPException 403 where the visitor has a lower role."""
    if not may(actor, role):
        raise HTTPException(403, f"token {actor.name!r} has role {actor.role!r}; this needs {role!r}")


async def form_of(request: Request) -> dict[str, str]:
    """The fields of a form."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(415, "expected a form")
    body = (await request.body())[:20_000].decode(errors="replace")
    return {key: values[0] for key, values in parse_qs(body, keep_blank_values=True, max_num_fields=20).items()}


def page(template: str, actor: Actor | None, **values: Any) -> HTMLResponse:
    """A page. Templates know what the visitor may."""
    allowed = {"approver": may(actor, "approve"), "submitter": may(actor, "submit")}
    html = pages.get_template(template).render(actor=actor, **allowed, **values)
    return HTMLResponse(html, headers={"Cache-Control": "no-store"})


def maps_of(found: figures.Comparison) -> dict[str, Any]:
    """Heat maps of device loads under two plans, and of the traffic under the second."""
    layers = [f"layer {layer}" for layer in found.plan.moe_layers]
    devices = [str(device) for device in range(found.plan.topology.num_devices)]
    low, high = 0.5, float(max(found.before.max(), found.after.max(), 1.2))
    maps = [
        (
            f"{name}: worst {values.max():.2f} times the mean",
            Markup(heat_map(f"Device load, {name}", values, layers, devices, low=low, high=high)),
        )
        for name, values in ((found.before_name, found.before), (found.after_name, found.after))
    ]
    traffic = device_map("Traffic between devices", found.traffic / 1e6)
    shades = {"low": low, "high": high}
    return {"load": maps, **shades, "traffic": Markup(traffic), "most": float(found.traffic.max() / 1e6)}


def device_map(title: str, values: figures.FloatArray) -> Markup:
    """A heat map of something from device (row) to device (column), [G, G]."""
    devices = range(len(values))
    rows, columns = [f"from {d}" for d in devices], [f"to {d}" for d in devices]
    return Markup(heat_map(title, values, rows, columns, low=0.0, high=float(values.max()) or 1.0))
