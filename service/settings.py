"""How a server runs."""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from .._http import Peers
from ..placement.errors import InputError

# Logs a machine can read: one JSON object a line, on standard error.


_KNOWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonLines(logging.Formatter):
    """time, level, logger, message, and whatever the caller gave as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {key: value for key, value in vars(record).items() if key not in _KNOWN}
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure(level: int = logging.INFO) -> None:
    """Sends every log to standard error in this form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    # One line a request comes from the service itself, with the route and the time it took.
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Settings:
    """db: address of the database. traces: where uploaded traces are kept, a folder or an address fsspec opens; None
    for the database. recorders: folders that engines' recorders write to, by name. workers: processes that solve, 0 for
    none here, or a Ray cluster: "ray://host:port", "ray" for the one this machine is part of, "ray:local" for one of
    this machine alone. ray_workers: processes on it, None for one a CPU. auth: whether to ask for tokens; not to is
    possible on loopback alone. root_path: where a proxy that strips it puts the service. proxies: addresses and
    networks whose X-Forwarded headers are believed. rate: requests a second and caller, 0 for any; burst: that many at
    once.
    check_windows: new windows of a deployment from which on it is checked for drift. lease_seconds: a worker that shows
    no sign of life for so long is given up. keep_days: ended jobs, sent deliveries and statistics that nothing refers
    to are dropped after so many days. peers: which addresses engines and webhooks may have. job_bytes: memory that a
    job may take, None for its share of the machine's. job_seconds: how long one may run. metrics_port: where
    figures for Prometheus are to be had without a token, on all addresses; None for nowhere.
    """

    db: str | None = None
    traces: str | None = None
    recorders: Mapping[str, Path] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8311
    workers: int | str = 1
    ray_workers: int | None = None
    auth: bool = True
    root_path: str = ""
    rate: float = 200.0
    burst: int = 400
    body_bytes: int = 32 << 20
    check_windows: int = 8
    lease_seconds: float = 30.0
    attempts: int = 3
    max_seconds: float = 3600.0
    idle_seconds: float = 0.5
    keep_days: float = 90.0
    peers: Peers = field(default_factory=Peers)
    proxies: Sequence[str] = ()
    job_bytes: int | None = None
    job_seconds: float = 7200.0
    metrics_port: int | None = None

    def __post_init__(self) -> None:
        if not self.auth and not self.on_loopback:
            raise InputError(f"host {self.host!r} can be reached from elsewhere: tokens cannot be turned off there")
        if self.root_path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", self.root_path):
            raise InputError(
                f"root_path ({self.root_path!r}) must be a path such as /moeplace, without a slash at its end"
            )
        for proxy in self.proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError:
                raise InputError(f"proxy {proxy!r} is neither an address nor a network (10.0.0.0/8)") from None
        if isinstance(self.workers, int) and not 0 <= self.workers <= 1024:
            raise InputError(f"workers ({self.workers}) must be 0 to 1024, or a Ray cluster")
        on_ray = isinstance(self.workers, str)
        if isinstance(self.workers, str) and self.workers not in ("ray", "ray:local"):
            parts = urlsplit(self.workers)
            if parts.scheme != "ray" or not parts.hostname:
                raise InputError(f"workers ({self.workers!r}) must be a number, ray://HOST:PORT, ray or ray:local")
        if self.ray_workers is not None and not (on_ray and 1 <= self.ray_workers <= 1024):
            raise InputError(f"ray_workers ({self.ray_workers}) must be 1 to 1024, and go with workers on Ray")

    @property
    def on_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def asks_for_tokens(self) -> bool:
        return self.auth
