"""The application: routes, limits, errors, and what runs beside them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from ..db.database import resolve
from ..db.store import Store
from ..placement.version import __version__
from . import background, problems
from .access import Gate
from .counts import WindowsIn
from .middleware import BodyLimit, Metrics, Observe, RateLimit
from .pages.routes import router as pages
from .polling import Poller
from .routes import ROUTERS
from .routes.common import ProblemDetails
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
            app.state.batcher = WindowBatcher(store)
            stack.callback(app.state.batcher.close)
            pool = Pool(store, settings, backend_for(settings, _address(settings)))
            reaper = Reaper(store, settings)
            app.state.pool = pool
            stack.callback(pool.close)
            poller = Poller(store, settings)
            stack.callback(poller.close)
            for name, every, function in (
                ("workers", 0.5, pool.tend),
                ("reaper", settings.lease_seconds / 6, reaper.look),
                ("drift", 2.0, background.DriftScheduler(store, settings).look),
                ("engines", min(1.0, settings.lease_seconds / 6), poller.look),
                ("webhooks", 1.0, WebhookSender(store).deliver),
                ("retention", 600.0, lambda: background.apply_retention(store)),
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
    app.state.shards = None if settings.traces is None else Shards(settings.traces)
    app.state.metrics, app.state.ready = Metrics(store), False
    problems.install(app)
    for router in (*ROUTERS, pages):
        app.include_router(router)

    _complete_description(app)
    app.add_middleware(BodyLimit, most=settings.body_bytes)
    app.add_middleware(RateLimit, rate=settings.rate, burst=settings.burst)
    app.add_middleware(Observe, metrics=app.state.metrics)
    return app


def _address(settings: Settings) -> str:
    return resolve(settings.db).render_as_string(hide_password=False)


def _complete_description(app: FastAPI) -> None:
    """Adds the schemas that routes refer to by name because they read or write bytes themselves."""
    found = app.openapi

    def complete() -> dict[str, Any]:
        document = found()
        _, named = models_json_schema(
            [(WindowsIn, "validation"), (ProblemDetails, "serialization")], ref_template="#/components/schemas/{model}"
        )
        document["components"]["schemas"] |= named["$defs"]
        return document

    app.openapi = complete  # type: ignore[method-assign]
