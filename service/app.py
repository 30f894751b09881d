"""The application: routes, limits, errors, and what it does on its own: tends workers, looks for drift, sends events,
compacts.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from ..db.database import resolve
from ..db.jobs import SERVICE
from ..db.store import Store
from ..placement.errors import MoeplaceError
from ..placement.version import __version__
from . import problems
from .access import Gate
from .changes import Changes
from .counts import WindowsIn
from .crowds import Kept, Reads, Turns
from .middleware import BodyLimit, Metrics, Observe, PagesCompressed, RateLimit, Unchanged
from .pages.routes import router as pages
from .pages.templating import pages as templates
from .policy import Policy
from .polling import Poller
from .readers import Readers
from .routes import catalogue, deployments, jobs, operations
from .routes.common import ProblemDetails
from .schemas import PlanIn, TopologyIn
from .settings import Settings
from .shards import Shards, remove
from .webhooks import WebhookSender
from .window_batcher import WindowBatcher
from .workers import Pool, Reaper, backend_for

log = logging.getLogger("moeplace.service.app")

STALE_UPLOAD = timedelta(hours=24)


class Loop:
    """Calls `function` every so many seconds in a thread, whatever it raises, until closed."""

    def __init__(self, name: str, every: float, function: Callable[[], None]) -> None:
        self._every, self._function, self._stop = every, function, threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._function()
            except MoeplaceError as error:
                log.warning("will be tried again", extra={"loop": self._thread.name, "error": str(error)})
            except Exception:
                log.exception("unexpected error", extra={"loop": self._thread.name})
            self._stop.wait(self._every)


class DriftScheduler:
    """Asks for a look at every deployment that sent enough new windows. Several servers may do so: one look is made."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._asked: dict[str, tuple[int, int]] = {}

    def look(self) -> None:
        asked: dict[str, tuple[int, int]] = {}
        for name, (count, checked) in self._store.windows.unchecked().items():
            before = self._asked.get(name)
            # A look that failed leaves `checked` as it was: it is made again once more has come, not again and again.
            threshold = before[0] + self._settings.check_windows if before and before[1] == checked else 0
            if count < max(threshold, self._settings.check_windows):
                asked |= {name: before} if before else {}
                continue
            job = self._store.jobs.submit("watch", {}, SERVICE, deployment=name, only=True)
            asked[name] = (count, checked)
            log.info("drift check", extra={"deployment": name, "job": job.key})
        self._asked = asked


def apply_retention(store: Store, keep_days: float) -> None:
    """Joins and drops old windows and uploads, deployment by deployment, as their policies say; drops jobs, deliveries,
    drift checks and statistics that are older than `keep_days` and that nothing refers to."""
    after = ""
    now = datetime.now(UTC)
    while deployments := store.deployments.page(limit=100, after=after):
        for deployment in deployments:
            policy = Policy(**deployment.policy)
            old = now - timedelta(hours=policy.join_after_hours)
            # Those that checks search stay single: what is one observation of many is of no use to them.
            joined, dropped = store.windows.compact(
                deployment.name, older_than=old, group=policy.join, keep=policy.keep_windows, spare=policy.searched
            )
            uploads, places = store.uploads.drop(
                kind="trace", owner=deployment.name, keep=policy.keep_traces, begun_before=now - STALE_UPLOAD
            )
            remove(places)
            if joined or dropped or uploads:
                about = {"deployment": deployment.name, "joined": joined, "dropped": dropped, "uploads": uploads}
                log.info("compacted", extra=about)
        after = deployments[-1].name
    store.uploads.drop(kind="statistics", owner="", keep=0, begun_before=now - STALE_UPLOAD)
    past = now - timedelta(days=keep_days)
    counts = {
        "jobs": store.jobs.drop(past),
        "deliveries": store.webhooks.drop(past),
        "checks": store.deployments.drop_checks(past),
        "statistics": store.drop_statistics(past),
    }
    if any(counts.values()):
        log.info("dropped", extra=counts)


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
                ("drift", 2.0, DriftScheduler(store, settings).look),
                ("engines", min(1.0, settings.lease_seconds / 6), poller.look),
                ("webhooks", 0.5, sender.deliver),
                ("retention", 600.0, lambda: apply_retention(store, settings.keep_days)),
            ):
                stack.callback(Loop(name, every, function).close)
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
    app.state.plan_file = Kept(partial(catalogue.plan_file, store))
    problems.install(app)
    for router in (
        operations.router,
        catalogue.router,
        catalogue.plans_router,
        deployments.router,
        catalogue.uploads_router,
        jobs.router,
        pages,
    ):
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
