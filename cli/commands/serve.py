"""`moeplace serve`: the service."""

from __future__ import annotations

from typing import Annotated

import typer

from ...placement.errors import UnsupportedError
from ..options import StoreOptions

SERVER, WORK = "Server", "Work"


def serve_command(
    storage: StoreOptions,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.", rich_help_panel=SERVER)] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 for any.", rich_help_panel=SERVER)
    ] = 8311,
    auth: Annotated[
        bool | None,
        typer.Option(
            "--auth/--no-auth",
            help="Ask for tokens. Default: everywhere but on a loopback address, where alone it can be turned off.",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = None,
    rate: Annotated[
        float,
        typer.Option("--rate", min=0, help="Requests a second an address may make; 0 for any.", rich_help_panel=SERVER),
    ] = 200.0,
    workers: Annotated[
        int,
        typer.Option(
            "--workers",
            min=0,
            max=1024,
            help="Processes that solve; 0 leaves it to other servers.",
            rich_help_panel=WORK,
        ),
    ] = 1,
    check_windows: Annotated[
        int,
        typer.Option(
            "--check-windows",
            min=1,
            help="New count windows of a deployment after which it is checked for drift.",
            rich_help_panel=WORK,
        ),
    ] = 16,
    lease: Annotated[
        float,
        typer.Option(
            "--lease",
            min=1,
            metavar="SECONDS",
            help="A worker that shows no sign of life for so long is given up, and its job begun again.",
            rich_help_panel=WORK,
        ),
    ] = 30.0,
) -> None:
    """Run the service: takes routing continuously, notices drift, solves, decides, and hands plans out.

    One process on an SQLite file needs nothing else. For a team, give a PostgreSQL database, and start as many of these
    as wanted on it.

    Example:

      moeplace serve --db postgresql://moeplace@db/moeplace --host 0.0.0.0
    """
    from importlib.util import find_spec

    from ...service.settings import Settings

    if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client")):
        raise UnsupportedError("the service is not installed; pip install 'moeplace[service]'")
    settings = Settings(
        db=storage.db,
        host=host,
        port=port,
        workers=workers,
        auth=auth,
        rate=rate,
        burst=max(1, int(2 * rate)),
        check_windows=check_windows,
        lease_seconds=lease,
    )
    from ...service.server import serve

    serve(settings)
