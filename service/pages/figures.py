"""What the pages show of plans on routing, loads and traffic by device and what a change of plan moves, and of a
deployment over time.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import numpy as np
from markupsafe import Markup

from ..._types import FloatArray
from ...charts.svg import Series, time_chart
from ...db.records import CheckRecord, DeploymentRecord
from ...db.store import Store
from ...placement.bounds import device_loads
from ...placement.cost import dispatch_bytes, slot_shares
from ...placement.errors import InputError
from ...placement.migration import migration
from ...placement.objective import Objective
from ...placement.plan import Plan
from ...placement.replay import traffic_from_counts
from ...placement.step_mix import step_mix
from ..policy import Policy
from ..routing import from_windows
from ..tasks.decide import default_plan, problem_of

SHOWN_MOVES = 200
MOST_COUNTS = 1 << 22
"""Of the windows that a page is drawn from: for models of today hundreds of windows."""


@dataclass(frozen=True)
class LoadComparison:
    """Two plans of a deployment on its newest windows. before, after: [L, G] device load over the layer's mean device
    load. traffic: [G, G] bytes a step from each device to each other under `plan`, of dispatch, as copies travel.
    """

    plan: Plan
    before_name: str
    after_name: str
    before: FloatArray
    after: FloatArray
    traffic: FloatArray


def compare(store: Store, deployment: DeploymentRecord, candidate: str | None) -> LoadComparison | None:
    """The plan in force against a candidate, or without one, index order against the plan in force; None without any
    plan or window."""
    if deployment.plan_id is None and candidate is None:
        return None
    base = index_order(store, deployment)
    in_force = store.plan(deployment.plan_id).plan if deployment.plan_id else base
    if candidate is None:
        return compared(store, deployment, (base, "index order"), (in_force, "in force"))
    name = "in force" if deployment.plan_id else "index order"
    return compared(store, deployment, (in_force, name), (store.plan(candidate).plan, f"candidate {candidate}"))


def index_order(store: Store, deployment: DeploymentRecord) -> Plan:
    """What the deployment's engine does without a plan."""
    return default_plan(store.model(deployment.model_id).spec, store.topology(deployment.topology_id).topology)


def compared(
    store: Store, deployment: DeploymentRecord, before: tuple[Plan, str], after: tuple[Plan, str]
) -> LoadComparison | None:
    """Two plans, with what to call them, on the newest windows; None without any."""
    policy = Policy(**deployment.policy)
    layers, experts = store.windows.shape(deployment.name)
    most = max(1, MOST_COUNTS // (layers * experts))
    windows = store.windows.page(deployment.name, limit=min(policy.recent, most))
    if not windows:
        return None
    model = store.model(deployment.model_id).spec
    problem = problem_of(after[0], from_windows(windows, model), policy.objective, policy.engine, policy.asked)
    load, objective, tokens = problem.statistics.total_load, problem.objective, step_mix(problem).mean_tokens
    traffic = traffic_from_counts(after[0], load, round(tokens), objective)
    return LoadComparison(
        plan=after[0],
        before_name=before[1],
        after_name=after[1],
        before=_relative(before[0], load, objective),
        after=_relative(after[0], load, objective),
        traffic=traffic.dispatch * dispatch_bytes(after[0].model, objective),
    )


@dataclass(frozen=True)
class ExpertMoves:
    """What going from one plan to another moves. by_pair: (source, target, experts), most first. listed: (layer,
    expert, source, target), the first of them. matrix: [G, G] experts from each device to each."""

    count: int
    bytes_moved: float
    seconds: float
    by_pair: list[tuple[int, int, int]]
    by_layer: list[tuple[int, int]]
    listed: list[tuple[int, int, int, int]]
    matrix: FloatArray


def moves(current: Plan, candidate: Plan) -> ExpertMoves:
    """Which experts move where."""
    moved = migration(current, candidate)
    layers = [candidate.moe_layers[layer] for layer in moved.layer]
    pairs = Counter(zip(moved.source.tolist(), moved.target.tolist(), strict=True))
    listed = list(zip(layers, moved.expert.tolist(), moved.source.tolist(), moved.target.tolist(), strict=True))
    matrix = np.zeros((candidate.topology.num_devices,) * 2)
    np.add.at(matrix, (moved.source, moved.target), 1.0)
    return ExpertMoves(
        moved.moves,
        moved.bytes_moved,
        moved.seconds,
        [(source, target, count) for (source, target), count in pairs.most_common(32)],
        sorted(Counter(layers).items()),
        listed[:SHOWN_MOVES],
        matrix,
    )


def _relative(plan: Plan, load: FloatArray, objective: Objective) -> FloatArray:
    devices, shares = plan.topology.num_devices, slot_shares(plan, load, objective)
    loads = device_loads(load, plan.physical_to_logical, shares, plan.slot_device, devices)
    mean = loads.mean(axis=1, keepdims=True)
    return np.asarray(loads / np.where(mean > 0, mean, 1.0))


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
