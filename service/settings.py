"""How a server runs."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from ..placement.errors import InputError


@dataclass(frozen=True)
class Settings:
    """db: address of the database. workers: processes that solve, 0 for none here, or a Ray address. auth: None to ask
    for tokens everywhere but on loopback. rate: requests a second and caller, 0 for any; burst: that many at once.
    check_windows: new windows of a deployment from which on it is checked for drift. lease_seconds: a worker that shows no
    sign of life for so long is given up.
    """

    db: str | None = None
    host: str = "127.0.0.1"
    port: int = 8311
    workers: int | str = 1
    auth: bool | None = None
    rate: float = 200.0
    burst: int = 400
    body_bytes: int = 32 << 20
    check_windows: int = 16
    lease_seconds: float = 30.0
    attempts: int = 3
    max_seconds: float = 3600.0
    idle_seconds: float = 0.5

    def __post_init__(self) -> None:
        if self.auth is False and not self.on_loopback:
            raise InputError(f"host {self.host!r} can be reached from elsewhere: tokens cannot be turned off there")
        if isinstance(self.workers, int) and not 0 <= self.workers <= 1024:
            raise InputError(f"workers ({self.workers}) must be 0 to 1024, or a ray:// address")

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
        return not self.on_loopback if self.auth is None else self.auth
