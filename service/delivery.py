"""Events sent to webhooks, signed, and again until they are taken."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import logging
import ssl
import time
from urllib.parse import urlsplit

from ..db.records import DeliveryRecord
from ..db.store import Store

log = logging.getLogger("moeplace.service.delivery")

TIMEOUT_SECONDS = 10.0
MOST_ATTEMPTS = 12
SIGNATURE = "X-Moeplace-Signature"
"""sha256=HMAC-SHA256 of the body under the webhook's secret, in hexadecimal."""


class Courier:
    """Sends what is due. A receiver that is away is tried again after 2, 4, 8 ... seconds, up to an hour."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._not_before: dict[int, float] = {}

    def deliver(self) -> None:
        now = time.monotonic()
        due = self._store.webhooks.due(limit=200)
        self._not_before = {item.key: self._not_before.get(item.key, 0.0) for item in due}
        for item in due:
            if self._not_before[item.key] > now:
                continue
            try:
                outcome, taken = send(item)
            except Exception as error:
                # Whatever a receiver brings about, the others' events are still to be sent.
                log.exception("unexpected error", extra={"delivery": item.key, "url": item.url})
                outcome, taken = type(error).__name__, False
            last = item.attempts + 1 >= MOST_ATTEMPTS
            self._not_before[item.key] = time.monotonic() + min(3600.0, 2.0 ** (item.attempts + 1))
            self._store.webhooks.sent(item.key, outcome, state="sent" if taken else "given up" if last else "due")
            if not taken:
                log.warning("event not taken", extra={"delivery": item.key, "url": item.url, "outcome": outcome})


def send(item: DeliveryRecord) -> tuple[str, bool]:
    """(what came of it, whether it was taken). Redirects are not followed: they could lead anywhere."""
    body = json.dumps({"id": item.key, **item.event}).encode()
    signature = hmac.new(item.secret.encode(), body, hashlib.sha256).hexdigest()
    headers = {"Content-Type": "application/json", SIGNATURE: f"sha256={signature}", "User-Agent": "moeplace"}
    try:
        target = urlsplit(item.url)
        path = (target.path or "/") + (f"?{target.query}" if target.query else "")
        connection = _connection(target.scheme, target.hostname or "", target.port)
        try:
            connection.request("POST", path, body, headers)
            status = connection.getresponse().status
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        # What a receiver answered may stand in it, and no database keeps a NUL in text.
        return f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace").decode().replace(
            "\0", "\\0"
        ), False
    return str(status), 200 <= status < 300


def _connection(scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
    if scheme == "https":
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(host, port, timeout=TIMEOUT_SECONDS, context=context)
    return http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
