"""Figures for Prometheus: of this server's requests, and of what is stored."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ..db.store import Store


class Metrics:
    """A registry of its own: several applications may run in one process."""

    def __init__(self, store: Store) -> None:
        self._registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self._requests = Counter("moeplace_requests", "Requests answered.", labels, registry=self._registry)
        self._seconds = Histogram(
            "moeplace_request_seconds", "Time to answer.", ("method", "route"), registry=self._registry
        )
        self._windows = Counter("moeplace_windows", "Count windows stored by this server.", registry=self._registry)
        self._registry.register(_Stored(store))

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def windows(self, count: int) -> None:
        """Counts stored windows."""
        self._windows.inc(count)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Stored(Collector):
    """Looked up when asked for, so that every server tells the same."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        jobs = GaugeMetricFamily("moeplace_jobs", "Jobs that have not ended.", labels=["state"])
        for state, count in self._store.jobs.waiting().items():
            jobs.add_metric([state], count)
        yield jobs
        names = ("deployment",)
        version = GaugeMetricFamily("moeplace_plan_version", "Publications so far.", labels=names)
        gap = GaugeMetricFamily("moeplace_plan_gap", "Load gap of the plan in force at the last check.", labels=names)
        p = GaugeMetricFamily("moeplace_drift_p", "P-value of the last drift check.", labels=names)
        alarms = GaugeMetricFamily("moeplace_drift_alarm", "1 when the last check was an alarm.", labels=names)
        for deployment in self._store.deployments.page(limit=1000):
            version.add_metric([deployment.name], deployment.version)
            for check in self._store.deployments.checks(deployment.name, limit=1):
                alarms.add_metric([deployment.name], float(check.alarm))
                for family, key in ((gap, "gap"), (p, "p")):
                    if key in check.figures:
                        family.add_metric([deployment.name], check.figures[key])
        yield from (version, gap, p, alarms)
        waiting = len(self._store.decisions.page(limit=1000, state="waiting"))
        yield GaugeMetricFamily("moeplace_decisions_waiting", "Decisions that wait for approval.", value=waiting)
