"""Replays traffic that changes and compares ways to run it: one fixed plan, EPLB every window, and the service's watch
with automatic publishing and its default policy.

    python -m benchmarks service_drift --write --figure docs/results/service_drift.svg

Each window is priced with the plan in
force before it was seen (`window_seconds`), against a plan that EPLB makes from that very window: its regret, which
nobody can bring to zero. The service's tasks run as its workers run them, on an SQLite file, one look every so many
windows as the server does. All plans are EPLB's, so that what differs is when they change. `--stationary N` replays
traffic that does not change.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
from drifting_traffic import Traffic, stationary, turns, week
from runner import Report, data_argument

import moeplace as mp
from moeplace.db import Store
from moeplace.db.records import Actor, CountWindow
from moeplace.placement.cost import window_seconds
from moeplace.placement.drift import can_tell, drift
from moeplace.placement.migration import migration
from moeplace.service.policy import Policy
from moeplace.service.settings import Settings
from moeplace.service.worker import task_of

WHO = Actor("benchmark", "approve")
DEFAULT = Policy()
CHECK = Settings().check_windows
ALPHAS = (0.05, 0.01, 0.001)
QUIET_WINDOWS = 144
FIRST = DEFAULT.recent
"""Windows that every way sees before it is judged."""


@dataclass
class Run:
    """regret: of each window from FIRST on. moves, bytes, seconds: plans changed, and what that moved."""

    regret: list[float] = field(default_factory=list)
    moves: int = 0
    bytes: float = 0.0
    seconds: float = 0.0
    alarms: list[int] = field(default_factory=list)

    def change(self, old: mp.Plan, new: mp.Plan) -> None:
        step = migration(old, new)
        if step.moves:
            self.moves, self.bytes, self.seconds = (
                self.moves + 1,
                self.bytes + step.bytes_moved,
                self.seconds + step.seconds,
            )


class Prices:
    """Regret of a plan on a window."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._possible: dict[int, float] = {}

    def problem(self, load: np.ndarray) -> mp.Problem:
        statistics = mp.RoutingStatistics.from_counts(load, top_k=self._traffic.model.top_k)
        return mp.Problem(self._traffic.model, self._traffic.topology, statistics, slots=self._traffic.slots)

    def eplb(self, load: np.ndarray) -> mp.Plan:
        return mp.solve(self.problem(load), "eplb")

    def seconds(self, plan: mp.Plan, number: int) -> float:
        load = self._traffic.load[number]
        return float(window_seconds(plan, load[None].astype(float), self.problem(load), self._traffic.step_tokens)[0])

    def regret(self, plan: mp.Plan, number: int) -> float:
        if number not in self._possible:
            self._possible[number] = self.seconds(self.eplb(self._traffic.load[number]), number)
        return self.seconds(plan, number) / self._possible[number] - 1.0


def fixed(traffic: Traffic, prices: Prices) -> Run:
    plan = prices.eplb(traffic.load[:FIRST])
    return Run([prices.regret(plan, number) for number in range(FIRST, len(traffic.load))])


def eplb(traffic: Traffic, prices: Prices, newest: int) -> Run:
    """Solved after every window on the `newest` ones."""
    plan, run = prices.eplb(traffic.load[FIRST - newest : FIRST]), Run()
    for number in range(FIRST, len(traffic.load)):
        run.regret.append(prices.regret(plan, number))
        new = prices.eplb(traffic.load[number - newest + 1 : number + 1])
        run.change(plan, new)
        plan = new
    return run


def known(traffic: Traffic, prices: Prices) -> Run:
    """One plan a phase, from all its windows, put in force when it begins: for comparison only, it looks ahead."""
    bounds, run = [0, *traffic.changes, len(traffic.load)], Run()
    plans = [prices.eplb(traffic.load[first:last]) for first, last in itertools.pairwise(bounds)]
    for number in range(FIRST, len(traffic.load)):
        run.regret.append(prices.regret(plans[int(np.searchsorted(bounds, number, side="right")) - 1], number))
    for old, new in itertools.pairwise(plans):
        run.change(old, new)
    return run


def service(traffic: Traffic, prices: Prices) -> Run:
    policy = Policy(solver="eplb", publish="automatic", slots=traffic.slots, step_tokens=traffic.step_tokens)
    plan, run = None, Run()
    with tempfile.TemporaryDirectory() as folder, Store.open(f"{folder}/store.db") as store:
        store.add_model(traffic.model)
        store.add_topology(traffic.topology, name="box")
        store.deployments.add("d", traffic.model.name, "box", policy.as_document(), WHO)
        start = datetime(2026, 1, 1, tzinfo=UTC)
        for number, load in enumerate(traffic.load):
            if number >= FIRST:
                assert plan is not None
                run.regret.append(prices.regret(plan, number))
            store.windows.add({"d": [CountWindow(start + timedelta(minutes=5 * number), load)]})
            if (number + 1) % CHECK:
                continue
            store.jobs.submit("watch", {}, WHO, deployment="d")
            job = store.jobs.claim("benchmark")
            assert job is not None
            store.jobs.finish(job, task_of("watch").run(job, store, lambda _: None))
            [check] = store.deployments.checks("d", limit=1)
            if check.alarm:
                run.alarms.append(number)
            in_force = store.deployments.get("d").plan_id
            if in_force is None:
                continue
            new = store.plan(in_force).plan
            if plan is not None and number >= FIRST:
                run.change(plan, new)
            plan = new
    return run


def ways(traffic: Traffic) -> dict[str, Run]:
    prices = Prices(traffic)
    return {
        "fixed plan": fixed(traffic, prices),
        "EPLB every window, on it": eplb(traffic, prices, 1),
        f"EPLB every window, on the newest {FIRST}": eplb(traffic, prices, FIRST),
        "service": service(traffic, prices),
        "a plan a phase, known before": known(traffic, prices),
    }


def quiet(data: Path, windows: int, seed: int) -> list[tuple[int, int]]:
    """(looks, changes found) for each of ALPHAS in one replay without change, looked at as the service does."""
    load = stationary(data, seed, windows).astype(float)
    found = []
    for alpha in ALPHAS:
        reference, looks, alarms = 2 * CHECK, 0, 0
        for now in range(3 * CHECK, windows + 1, CHECK):
            since = load[reference:now]
            if can_tell(reference, len(since), DEFAULT.block, alpha):
                looks += 1
                alarms += drift(load[:reference], since, block=DEFAULT.block, alpha=alpha).p <= alpha
            if reference < DEFAULT.recent and now >= 2 * reference:
                reference = min(DEFAULT.recent, now)
        found.append((looks, alarms))
    return found


def tell(report: Report, traffic: Traffic, runs: dict[str, Run], about: str) -> None:
    formats = {
        "way": "",
        "mean regret": ".2%",
        "p95": ".2%",
        "changes of plan": "",
        "moved, GB": ".1f",
        "spent moving, s": ".2f",
    }
    table = report.table(about, formats, formats)
    for name, run in runs.items():
        regret = float(np.mean(run.regret)), float(np.percentile(run.regret, 95))
        table.row(name, *regret, run.moves, run.bytes / 1e9, run.seconds)
    alarms = runs["service"].alarms
    # A change is found by an alarm before the next one begins; any further alarm of the phase tells of no change.
    spans = list(zip(traffic.changes, [*traffic.changes[1:], len(traffic.load)], strict=True))
    found = [next((alarm - first + 1 for alarm in alarms if first <= alarm < last), None) for first, last in spans]
    delays = [delay for delay in found if delay is not None]
    further = len(alarms) - len(delays)
    told = f"median {np.median(delays):.0f}, most {max(delays)} windows after they began" if delays else "none"
    note = f"{traffic.name}, changes found"
    report.note(
        note,
        f"{len(traffic.changes)} true changes, {len(delays)} found ({told}), "
        f"{further} further alarms in {len(traffic.load):,} windows.",
    )
    prices = Prices(traffic)
    missed = []
    for (first, last), delay in zip(spans, found, strict=True):
        if delay is None:
            before = prices.eplb(traffic.load[max(0, first - FIRST) : first])
            loss = np.mean([prices.regret(before, number) for number in range(first, last)])
            fresh = prices.eplb(traffic.load[first:last])
            least = np.mean([prices.regret(fresh, number) for number in range(first, last)])
            missed.append(f"{loss - least:.1%}")
    if missed:
        report.note(
            note, f"Of those not found, a plan from before loses against one made for the phase: {', '.join(missed)}."
        )


COLOURS = {"fixed plan": "#999999", "EPLB every window, on it": "#d08000", "service": "#0060c0"}


def figure(replays: list[tuple[Traffic, dict[str, Run]]]) -> str:
    """Regret over time, an SVG panel a replay."""
    wide, tall, left = 760, 190, 46
    parts = []
    for panel, (traffic, runs) in enumerate(replays):
        top, count = panel * (tall + 50) + 24, len(traffic.load)
        smooth = max(1, (count - FIRST) // 160)
        lines = {
            name: [float(np.mean(runs[name].regret[i : i + smooth])) for i in range(0, count - FIRST, smooth)]
            for name in COLOURS
        }
        most = max(max(values) for values in lines.values())
        across, down = partial(_across, wide, left, count), partial(_down, top, tall, most)
        parts.append(
            f'<text x="{left}" y="{top - 8}">{traffic.name}: regret (mean of {smooth} windows) over windows</text>'
        )
        for share in (0.0, 0.5, 1.0):
            y = down(share * most)
            parts.append(f'<line x1="{left}" x2="{wide}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{share * most:.0%}</text>')
        for change in traffic.changes:
            x = across(change)
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + tall}" stroke="#bbb" stroke-dasharray="3 3"/>'
            )
        for name, values in lines.items():
            points = " ".join(f"{across(FIRST + i * smooth):.1f},{down(value):.1f}" for i, value in enumerate(values))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}" stroke-width="1.3"/>')
        for alarm in runs["service"].alarms:
            x = across(alarm)
            parts.append(f'<path d="M{x:.1f} {top + tall} l-4 9 h8 z" fill="{COLOURS["service"]}"/>')
    bottom = len(replays) * (tall + 50)
    for place, (name, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{left + 190 * place}" y="{bottom + 14}" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{left + 450}" y="{bottom + 14}">dashed: true changes; triangles: alarms</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide + 10} {bottom + 24}" '
        'font-family="sans-serif" font-size="12">'
        '<rect width="100%" height="100%" fill="white"/>' + "".join(parts) + "</svg>\n"
    )


def _across(wide: int, left: int, count: int, number: float) -> float:
    return left + (wide - left) * number / count


def _down(top: int, tall: int, most: float, value: float) -> float:
    return top + tall * (1.0 - value / most)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--half-days", type=int, default=14)
    parser.add_argument("--turn", type=int, default=128, help="windows a DeepSeek-V3 workload")
    parser.add_argument("--stationary", type=int, default=200, help="replays without change")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--figure", type=Path, help="SVG file of regret over time")


def run(options: argparse.Namespace, report: Report) -> None:
    replays = [week(options.data, options.seed, options.half_days), turns(options.data, options.seed, options.turn)]
    with ProcessPoolExecutor(options.processes) as pool:
        runs = list(pool.map(ways, replays))
        replay: Callable[[int], list[tuple[int, int]]] = partial(quiet, options.data, QUIET_WINDOWS)
        quiets = list(pool.map(replay, range(options.stationary)))
    tell(
        report,
        replays[0],
        runs[0],
        f"A week of gpt-oss-20b: topics by the half day, Azure's arrivals, {len(replays[0].load):,} windows of 5 "
        "minutes",
    )
    tell(report, replays[1], runs[1], "DeepSeek-V3: five workloads in turn, 288 slots on 32 devices")
    columns = ("stated chance at a look", "looks", "changes found", "rate", "replays with any")
    table = report.table("False alarms", columns, {"looks": ",", "rate": ".4f"})
    for alpha, counts in zip(ALPHAS, zip(*quiets, strict=True), strict=False):
        looks, alarms = (sum(column) for column in zip(*counts, strict=True))
        table.row(alpha, looks, alarms, alarms / looks, sum(any_alarm > 0 for _, any_alarm in counts))
    if options.figure:
        options.figure.write_text(figure(list(zip(replays, runs, strict=True))))
