"""Runs the service until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from functools import partial

from .._interrupts import note as note_interrupt
from ..db.jobs import SERVICE
from ..db.secrets import has_key
from ..db.store import Store
from ..placement.errors import ConflictError, InputError
from .settings import Settings, configure

log = logging.getLogger("moeplace.service")

DRAIN_SECONDS = 20
METRICS_CONNECTIONS = 64
"""At a time, on the port for Prometheus."""
FIRST = "first"
"""Name of the token that is made at the first start."""


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT: then no request is taken any more, those under way are answered, windows that
    wait are stored, and jobs under way are given back.

    Raises:
        StoreError: the database cannot be opened. InputError: the address cannot be listened on.
    """
    import uvicorn

    from .app import create_app
    from .connections import IDLE_SECONDS, Limits, most_connections, protocol_within
    from .routes.operations import figures_alone

    configure()
    with Store.open(settings.db) as store:
        if has_key():
            store.webhooks.seal_all()
            store.engines.seal_all()
        first = _first_token(settings, store)
        app = create_app(settings, store)
        if app.state.shards is not None:
            app.state.shards.check()
        limits = Limits(most_connections(), settings.proxies)

        class Server(uvicorn.Server):
            """Ends what only waits as soon as it is told to stop."""

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if beside is not None:
                    alone, sock = beside
                    within = protocol_within(Limits(METRICS_CONNECTIONS))
                    protocol = partial(within, config=alone, server_state=self.server_state, app_state={})
                    self.servers.append(await asyncio.get_running_loop().create_server(protocol, sock=sock))

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                app.state.ready = False
                app.state.changes.stop()
                await super().shutdown(sockets)

        beside = None
        if settings.metrics_port is not None:
            # On all addresses, and within limits of its own: it is not for those whom the service is for.
            alone = uvicorn.Config(figures_alone(app), ws="none", lifespan="off", log_config=None, server_header=False)
            alone.load()
            try:
                beside = alone, socket.create_server(("", settings.metrics_port))
            except OSError as error:
                raise InputError(f"cannot listen on port {settings.metrics_port} for metrics ({error})") from None

        config = uvicorn.Config(
            app,
            http=protocol_within(limits),
            ws="none",
            # Of nobody else are the headers that say whose request it is believed.
            proxy_headers=bool(settings.proxies),
            forwarded_allow_ips=list(settings.proxies),
            root_path=settings.root_path,
            host=settings.host,
            port=settings.port,
            log_config=None,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            timeout_keep_alive=IDLE_SECONDS,
            server_header=False,
        )
        server = Server(config)
        try:
            bound = config.bind_socket()
        except SystemExit:
            raise InputError(
                f"cannot listen on {settings.host} port {settings.port}; is something else there?"
            ) from None
        port = bound.getsockname()[1]
        about = {"url": f"http://{settings.host}:{port}", "db": store.url, "tokens": settings.asks_for_tokens}
        log.info("serving", extra={**about, "sealed": has_key()})
        if first is not None:
            # Not into the log: it goes to whoever started the server, this once.
            at = f"http://{settings.host}:{port}{settings.root_path}"
            print(f"The first token, role approve, is not shown again: {first}\nSign in with it at {at}", flush=True)  # noqa: T201
        # uvicorn raises the signal that stopped it once more when it is done: being told to stop is not a failure.
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: note_interrupt())
        server.run(sockets=[bound])


def _first_token(settings: Settings, store: Store) -> str | None:
    """A token for whoever starts a server that asks for them, where there is none yet. Elsewhere than on a loopback
    address or at a terminal, what is printed is kept by others: there it is said how to make one."""
    if not settings.asks_for_tokens or not store.tokens.none_made():
        return None
    if not settings.on_loopback and not sys.stdout.isatty():
        log.warning("there is no token yet; make one: moeplace tokens add NAME --role approve")
        return None
    try:
        return store.tokens.add(FIRST, "approve", SERVICE)
    except ConflictError:
        # Another server on this database was faster.
        return None
