"""What the server does on its own: tends workers, looks for drift, sends events, compacts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from ..db.jobs import SERVICE
from ..db.store import Store
from ..placement.errors import MoeplaceError
from .policy import Policy
from .settings import Settings
from .shards import remove

log = logging.getLogger("moeplace.service.background")

STALE_UPLOAD = timedelta(hours=24)
JOIN_AT_ONCE = 200


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
