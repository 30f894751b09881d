"""`moeplace serve`: the service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...placement.errors import UnsupportedError
from ..options import STORE, StoreOptions
from ..output import interrupted

SERVER, WORK = "Server", "Work"


def serve_command(
    storage: StoreOptions,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.", rich_help_panel=SERVER)] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 for any.", rich_help_panel=SERVER)
    ] = 8311,
    auth: Annotated[
        bool,
        typer.Option(
            "--auth/--no-auth",
            help="Ask for tokens; the first is printed at the first start. On a loopback address it can be turned off.",
            rich_help_panel=SERVER,
        ),
    ] = True,
    root_path: Annotated[
        str,
        typer.Option(
            "--root-path",
            metavar="PATH",
            help="Where a proxy that strips it puts the service, such as /moeplace.",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = "",
    proxy: Annotated[
        list[str] | None,
        typer.Option(
            "--proxy",
            metavar="ADDRESS|NETWORK",
            help="A proxy whose X-Forwarded-For and -Proto are believed, so that rates are by its clients; may be "
            "given again.",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = None,
    rate: Annotated[
        float,
        typer.Option("--rate", min=0, help="Requests a second an address may make; 0 for any.", rich_help_panel=SERVER),
    ] = 200.0,
    traces: Annotated[
        str | None,
        typer.Option(
            "--traces",
            metavar="URL|FOLDER",
            help="Where uploaded traces are kept: a folder, or an address that fsspec opens (s3://bucket/prefix). "
            "Default: the database. Workers on other machines must reach it too.",
            envvar="MOEPLACE_TRACES",
            show_default=False,
            rich_help_panel=STORE,
        ),
    ] = None,
    recorder: Annotated[
        list[str] | None,
        typer.Option(
            "--recorder",
            metavar="NAME=DIR",
            help="A folder that engines' recorders write to, as this machine sees it, under the name by which "
            "deployments choose it; may be given again. Without any, engines are not asked.",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ] = None,
    workers: Annotated[
        str,
        typer.Option(
            "--workers",
            metavar="N|RAY",
            help="Processes that solve; 0 leaves it to other servers. Or a Ray cluster that does: ray://HOST:PORT, "
            "ray for the one this machine is part of, ray:local for one of this machine alone.",
            rich_help_panel=WORK,
        ),
    ] = "1",
    ray_workers: Annotated[
        int | None,
        typer.Option(
            "--ray-workers",
            min=1,
            max=1024,
            help="Processes on the Ray cluster. Default: one a CPU that it has.",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ] = None,
    job_memory: Annotated[
        float | None,
        typer.Option(
            "--job-memory",
            metavar="GB",
            min=0.5,
            help="Memory that a job may take. Default: three quarters of the machine's, divided among workers.",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ] = None,
    job_seconds: Annotated[
        float,
        typer.Option("--job-seconds", metavar="SECONDS", min=1, help="How long a job may run.", rich_help_panel=WORK),
    ] = 7200.0,
    check_windows: Annotated[
        int,
        typer.Option(
            "--check-windows",
            min=1,
            help="New count windows of a deployment after which it is checked for drift.",
            rich_help_panel=WORK,
        ),
    ] = 8,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            metavar="NETWORK|NAME",
            help="Where engines and webhooks may be (10.0.0.0/8, engine.internal); may be given again. Default: "
            "everywhere but link-local and metadata addresses.",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            "--metrics-port",
            min=1,
            max=65535,
            help="Answer Prometheus on this port of all addresses, without a token; let nobody else reach it. "
            "Default: at /metrics, with a token.",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = None,
    keep_days: Annotated[
        float,
        typer.Option(
            "--keep-days",
            min=0,
            help="Ended jobs, sent deliveries and statistics that nothing refers to are dropped after so many days.",
            rich_help_panel=STORE,
        ),
    ] = 90.0,
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
      moeplace serve --db postgresql://moeplace@db/moeplace --workers ray://head:10001
    """
    from importlib.util import find_spec

    from ..._http import Peers
    from ...service.settings import Settings

    if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client")):
        raise UnsupportedError("the service is not installed; pip install 'moeplace[service]'")
    if not workers.isdecimal() and find_spec("ray") is None and workers.startswith("ray"):
        raise UnsupportedError("Ray is not installed; pip install 'moeplace[ray]', or give --workers a number")
    settings = Settings(
        db=storage.db,
        traces=traces,
        recorders=recorders(recorder or []),
        host=host,
        port=port,
        workers=int(workers) if workers.lstrip("-").isdecimal() else workers,
        ray_workers=ray_workers,
        auth=auth,
        root_path=root_path,
        proxies=tuple(proxy or ()),
        rate=rate,
        burst=max(1, int(2 * rate)),
        check_windows=check_windows,
        job_bytes=None if job_memory is None else int(job_memory * 1e9),
        job_seconds=job_seconds,
        lease_seconds=lease,
        keep_days=keep_days,
        metrics_port=metrics_port,
        peers=Peers.of(peer or []),
    )
    from ... import _interrupts
    from ...service.server import serve

    serve(settings)
    if _interrupts.pressed():
        interrupted("interrupted; the server has stopped, and what it took is in its database")


def recorders(entries: list[str]) -> dict[str, Path]:
    """Recorder folders by name."""
    from ...service.polling import recorder_folders

    named = {}
    for entry in entries:
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder):
            raise typer.BadParameter(f"--recorder {entry!r} is not NAME=DIR")
        named[name] = folder
    return recorder_folders(named)
