"""Events sent to webhooks, signed, and again until they are taken."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections import Counter
from datetime import UTC, datetime

from standardwebhooks import Webhook

from .._http import Connections, Peers, UnansweredError
from ..db.records import DueDelivery
from ..db.secrets import unseal
from ..db.store import Store
from ..db.webhooks import AT_ONCE, OF_DEPLOYMENT

log = logging.getLogger("moeplace.service.webhooks")

TIMEOUT_SECONDS = 10.0
MOST_ATTEMPTS = 12
COURIERS = 32
END_SECONDS = 2.0
"""On stopping, what is being sent has so long; what is not answered by then is sent again by another server, later."""


class WebhookSender:
    """Sends what is due, each event in a thread of its own. A receiver that is away is tried again after 2, 4, 8 ...
    seconds, up to an hour, by whichever server comes first."""

    def __init__(self, store: Store, peers: Peers) -> None:
        self._store, self._connections = store, Connections(peers=peers)
        self._lock = threading.Lock()
        self._under_way: Counter[tuple[int, int]] = Counter()

    def deliver(self) -> None:
        """Begins to send what is due, as far as there are couriers."""
        with self._lock:
            free = COURIERS - self._under_way.total()
            busy = [hook for (_, hook), count in self._under_way.items() if count >= AT_ONCE]
            of_deployments: Counter[int] = Counter()
            for (deployment, _), count in self._under_way.items():
                of_deployments[deployment] += count
            full = [deployment for deployment, count in of_deployments.items() if count >= OF_DEPLOYMENT]
        if free <= 0:
            return
        for item in self._store.webhooks.take(free, busy, full):
            with self._lock:
                self._under_way[item.deployment, item.webhook] += 1
            threading.Thread(target=self._carry, args=(item,), name="courier", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Whether nothing is being sent any more, within so many seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with self._lock:
                if not self._under_way.total():
                    return True
            time.sleep(0.02)
        return False

    def close(self) -> None:
        """Does not wait for receivers that do not answer."""
        self.wait(END_SECONDS)

    def _carry(self, item: DueDelivery) -> None:
        try:
            try:
                outcome, accepted = self._send(item)
            except Exception as error:
                # Whatever a receiver brings about, the others' events are still to be sent.
                log.exception("unexpected error", extra={"delivery": item.key, "url": item.url})
                outcome, accepted = type(error).__name__, False
            last = item.attempts + 1 >= MOST_ATTEMPTS
            wait = min(3600.0, 2.0 ** (item.attempts + 1))
            state = "sent" if accepted else "given up" if last else "due"
            self._store.webhooks.sent(item.key, outcome, state=state, wait_seconds=0.0 if accepted else wait)
            if not accepted:
                log.warning("event not taken", extra={"delivery": item.key, "url": item.url, "outcome": outcome})
        except Exception:
            log.exception("unexpected error", extra={"delivery": item.key, "url": item.url})
        finally:
            with self._lock:
                self._under_way[item.deployment, item.webhook] -= 1
                self._under_way += Counter()

    def _send(self, item: DueDelivery) -> tuple[str, bool]:
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


def _signed(item: DueDelivery, body: str) -> dict[str, str]:
    """Headers of Standard Webhooks: who reads them can tell a forged, a changed, a repeated and an old message."""
    now, message = datetime.now(UTC), str(item.key)
    signatures = [Webhook(_key(unseal(secret))).sign(message, now, body) for secret in item.secrets]
    return {
        "webhook-id": message,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


def _key(secret: str) -> str:
    # Secrets made before they were Standard Webhooks' are keys as they are.
    return secret if secret.startswith("whsec_") else base64.b64encode(secret.encode()).decode()
