"""Runs the service until it is told to stop."""

from __future__ import annotations

import logging
import signal

from ..db.store import Store
from ..placement.errors import InputError
from .settings import Settings, configure

log = logging.getLogger("moeplace.service")

DRAIN_SECONDS = 20


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT: then no request is taken any more, those under way are answered, windows that
    wait are stored, and jobs under way are given back.

    Raises:
        StoreError: the database cannot be opened. InputError: the address cannot be listened on.
    """
    import uvicorn

    from .app import create_app

    configure()
    with Store.open(settings.db) as store:
        app = create_app(settings, store)
        if app.state.shards is not None:
            app.state.shards.check()
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            server_header=False,
        )
        server = uvicorn.Server(config)
        try:
            bound = config.bind_socket()
        except SystemExit:
            raise InputError(
                f"cannot listen on {settings.host} port {settings.port}; is something else there?"
            ) from None
        port = bound.getsockname()[1]
        told = {"url": f"http://{settings.host}:{port}", "db": store.url, "tokens": settings.asks_for_tokens}
        log.info("serving", extra=told)
        # uvicorn raises the signal that stopped it once more when it is done: being told to stop is not a failure.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[bound])
