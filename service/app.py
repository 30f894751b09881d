"""The application: routes, limits, errors, and what runs beside them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from ..db.database import resolve
from ..db.store import Store
from ..placement.version import __version__
from . import background, problems
from .access import Gate
from .changes import Changes
from .counts import WindowsIn
from .crowds import Kept, Reads, Turns
from .middleware import BodyLimit, Metrics, Observe, PagesCompressed, RateLimit, Unchanged
from .pages import lists, live
from .pages import plans as plan_pages
from .pages import policies as policy_pages
from .pages.routes import router as pages
from .pages.templating import pages as templates
from .polling import Poller
from .readers import Readers
from .routes import ROUTERS
from .routes.common import ProblemDetails
from .routes.plans import plan_file
from .schemas import PlanIn, TopologyIn
from .settings import Settings
from .shards import Shards
from .webhooks import WebhookSender
from .window_batcher import WindowBatcher
from .workers import Pool, Reaper, backend_for

DESCRIPTION = """Keeps expert placements of mixture-of-experts deployments right while their traffic drifts.

Errors are `application/problem+json`. Lists come in pages: give `next` of one as `before` (or `after`) of the next."""


def create_app(settings: Settings, store: Store) -> FastAPI:
    """The application on a store. What it starts beside requests begins and ends with its lifespan."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with contextlib.ExitStack() as stack:
            app.state.changes.listen(app.state.gate.told)
            stack.callback(app.state.changes.close)
            app.state.batcher = WindowBatcher(store)
            stack.callback(app.state.batcher.close)
            app.state.readers = Readers(store, _address(settings), app.state.shards)
            stack.callback(app.state.readers.close)
            pool = Pool(store, settings, backend_for(settings, _address(settings)))
            reaper = Reaper(store, settings)
            app.state.pool = pool
            app.state.metrics.workers(lambda: pool.size)
            stack.callback(pool.close)
            poller = Poller(store, settings)
            stack.callback(poller.close)
            sender = WebhookSender(store, settings.peers)
            stack.callback(sender.close)
            for name, every, function in (
                ("tokens", 0.05, app.state.gate.look),
                ("workers", 0.5, pool.tend),
                ("reaper", settings.lease_seconds / 6, reaper.look),
                ("drift", 2.0, background.DriftScheduler(store, settings).look),
                ("engines", min(1.0, settings.lease_seconds / 6), poller.look),
                ("webhooks", 0.5, sender.deliver),
                ("retention", 600.0, lambda: background.apply_retention(store, settings.keep_days)),
            ):
                stack.callback(background.Loop(name, every, function).close)
            app.state.ready = True
            yield
            app.state.ready = False

    app = FastAPI(
        title="moeplace",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
    )
    app.state.settings, app.state.store, app.state.gate = settings, store, Gate(store, settings)
    templates.globals["root"] = settings.root_path
    app.state.shards = None if settings.traces is None else Shards(settings.traces)
    app.state.metrics, app.state.ready, app.state.changes = Metrics(store), False, Changes(store)
    app.state.deployment, app.state.job = Reads(store.deployments.get), Reads(store.jobs.get)
    metrics: Metrics = app.state.metrics
    # Asked by whoever can reach them, as often as they like.
    app.state.alive, app.state.figures = Reads(lambda _: store.jobs.waiting()), Reads(lambda _: metrics.text())
    app.state.plan_file = Kept(partial(plan_file, store))
    problems.install(app)
    for router in (*ROUTERS, live.router, pages, lists.router, plan_pages.router, policy_pages.router):
        app.include_router(router)

    _complete_description(app)
    app.add_middleware(BodyLimit, most=settings.body_bytes)
    app.add_middleware(PagesCompressed, minimum_size=2048, compresslevel=5)
    app.add_middleware(Unchanged)
    app.add_middleware(Turns)
    app.add_middleware(RateLimit, rate=settings.rate, burst=settings.burst)
    app.add_middleware(Observe, metrics=app.state.metrics)
    return app


def _address(settings: Settings) -> str:
    return resolve(settings.db).render_as_string(hide_password=False)


def _complete_description(app: FastAPI) -> None:
    """Adds the schemas that routes refer to by name because they read or write bytes themselves."""
    of_routes = app.openapi

    def complete() -> dict[str, Any]:
        document = of_routes()
        _, named = models_json_schema(
            [
                (WindowsIn, "validation"),
                (TopologyIn, "validation"),
                (PlanIn, "validation"),
                (ProblemDetails, "serialization"),
            ],
            ref_template="#/components/schemas/{model}",
        )
        document["components"]["schemas"] |= named["$defs"]
        return document

    app.openapi = complete  # type: ignore[method-assign]
