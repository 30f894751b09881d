"""A deployment's charts over time, and the span of time they show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from markupsafe import Markup

from ...charts.svg import Series, time_chart
from ...db.records import CheckRecord
from ...placement.errors import InputError

SPANS = {
    "1h": ("Last hour", timedelta(hours=1)),
    "6h": ("6 hours", timedelta(hours=6)),
    "24h": ("24 hours", timedelta(days=1)),
    "7d": ("7 days", timedelta(days=7)),
    "30d": ("30 days", timedelta(days=30)),
}
CHECKS = 100
"""Drift checks that are shown where no span is asked for: the newest."""
MOST_CHECKS = 500
"""That are shown of a span."""


@dataclass(frozen=True)
class Span:
    """What is shown: from one moment to another, or without these the newest checks. chosen: one of `SPANS`, "" for the
    newest, "between" for moments of one's own."""

    since: datetime | None = None
    until: datetime | None = None
    chosen: str = ""

    @property
    def limit(self) -> int:
        """How many checks it shows at most."""
        return MOST_CHECKS if self.chosen else CHECKS

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Both ends since 1970, where both are known."""
        return None if self.since is None or self.until is None else (self.since.timestamp(), self.until.timestamp())

    def links(self) -> list[tuple[str, str, bool]]:
        """What else may be shown: words, the query of the address, whether it is what is shown."""
        named = [(words, urlencode({"range": name}), self.chosen == name) for name, (words, _) in SPANS.items()]
        return [("Newest checks", "", not self.chosen), *named]


def span_of(named: str | None, since: str | None, until: str | None) -> Span:
    """What an address asks for: one of `SPANS` by name, or moments in UTC.

    Raises:
        InputError: no such span, no moment, or one that ends before it begins.
    """
    now = datetime.now(UTC)
    if named:
        if named not in SPANS:
            raise InputError(f"range: {named!r}, expected one of {', '.join(SPANS)}")
        return Span(now - SPANS[named][1], now, named)
    if not since and not until:
        return Span()
    begin, end = _moment("since", since), _moment("until", until)
    begin = (end or now) - timedelta(days=1) if begin is None else begin
    end = max(now, begin + timedelta(minutes=1)) if end is None else end
    if end <= begin:
        raise InputError("until: it must be after since")
    return Span(begin, end, "between")


def _moment(name: str, text: str | None) -> datetime | None:
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise InputError(f"{name}: not a date and time, such as 2026-01-31T12:00") from None
    if not 1970 < moment.year < 9999:
        raise InputError(f"{name}: a year between 1971 and 9998 is expected")
    return moment


def charts_over_time(checks: list[CheckRecord], policy: Any, span: Span) -> dict[str, Markup]:
    """Load, regret and drift by what each is called; each of one unit. checks: oldest first."""
    at = [check.created.timestamp() for check in checks]
    alarms = [position for position, check in enumerate(checks) if check.alarm]

    def of(name: str) -> list[float | None]:
        values = [check.figures.get(name) for check in checks]
        return [value if isinstance(value, int | float) else None for value in values]

    strength = [None if p is None else -math.log10(max(p, 1e-12)) for p in of("p")]
    charts = {
        "Load of the busiest device over the mean; what lies between the lines is the gap": time_chart(
            "Load over time",
            at,
            [
                Series("plan in force", of("load_max_mean"), "series-a"),
                Series("proven bound of any plan", of("bound"), "series-b"),
            ],
            "{:.4g}".format,
            alarms=alarms,
            span=span.seconds,
        ),
        "Regret: step time that a fresh plan would save": time_chart(
            "Regret over time",
            at,
            [Series("regret", of("regret"), "series-a")],
            lambda value: f"{100 * value:.3g}%",
            level=(float(policy.get("min_regret", 0.02)), "matters from here"),
            alarms=alarms,
            span=span.seconds,
        ),
        "Drift: the strength of the evidence that traffic has moved, in powers of ten": time_chart(
            "Drift over time",
            at,
            [Series("-log10 p", strength, "series-a")],
            "{:.3g}".format,
            level=(-math.log10(policy.get("false_alarm", 0.001)), "alarm from here"),
            alarms=alarms,
            span=span.seconds,
        ),
    }
    return {title: Markup(chart) for title, chart in charts.items() if chart}
