"""Events sent to webhooks, signed, and again until they are taken."""

from __future__ import annotations

import base64
import json
import logging
import time
from datetime import UTC, datetime

from standardwebhooks import Webhook

from .._http import Connections, UnansweredError
from ..db.records import DeliveryRecord
from ..db.store import Store

log = logging.getLogger("moeplace.service.webhooks")

TIMEOUT_SECONDS = 10.0
MOST_ATTEMPTS = 12


class WebhookSender:
    """Sends what is due. A receiver that is away is tried again after 2, 4, 8 ... seconds, up to an hour."""

    def __init__(self, store: Store) -> None:
        self._store, self._connections = store, Connections()
        self._not_before: dict[int, float] = {}

    def deliver(self) -> None:
        now = time.monotonic()
        due = self._store.webhooks.due(limit=200)
        self._not_before = {item.key: self._not_before.get(item.key, 0.0) for item in due}
        for item in due:
            if self._not_before[item.key] > now:
                continue
            try:
                outcome, taken = self._send(item)
            except Exception as error:
                # Whatever a receiver brings about, the others' events are still to be sent.
                log.exception("unexpected error", extra={"delivery": item.key, "url": item.url})
                outcome, taken = type(error).__name__, False
            last = item.attempts + 1 >= MOST_ATTEMPTS
            self._not_before[item.key] = time.monotonic() + min(3600.0, 2.0 ** (item.attempts + 1))
            self._store.webhooks.sent(item.key, outcome, state="sent" if taken else "given up" if last else "due")
            if not taken:
                log.warning("event not taken", extra={"delivery": item.key, "url": item.url, "outcome": outcome})

    def _send(self, item: DeliveryRecord) -> tuple[str, bool]:
        """(what came of it, whether it was taken). What a receiver answers besides its status is not read."""
        body = json.dumps({"id": item.key, **item.event})
        headers = {"Content-Type": "application/json", "User-Agent": "moeplace", **_signed(item, body)}
        try:
            answer = self._connections.request(
                "POST", item.url, body.encode(), headers, timeout=TIMEOUT_SECONDS, most=0
            )
        except UnansweredError as error:
            # What a receiver answered may stand in it, and no database keeps a NUL in text.
            return str(error).encode("ascii", "backslashreplace").decode().replace("\0", "\\0"), False
        return str(answer.status), 200 <= answer.status < 300


def _signed(item: DeliveryRecord, body: str) -> dict[str, str]:
    """Headers of Standard Webhooks: who reads them can tell a forged, a changed, a repeated and an old message."""
    now = datetime.now(UTC)
    # Secrets made before they were Standard Webhooks' are keys as they are.
    secret = item.secret if item.secret.startswith("whsec_") else base64.b64encode(item.secret.encode()).decode()
    message = str(item.key)
    return {
        "webhook-id": message,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(secret).sign(message, now, body),
    }
