"""A look at a deployment: has its traffic moved, does that matter, and if so, is a new plan worth its migration?

1. The newest windows since the plan was last judged are compared with those it was judged on (`placement.drift`).
2. Where that test finds a change, a fresh plan is solved on the older half of the newest windows. What the plan in force
   loses against it on the newer half is the regret. An alarm is a change found and a regret that matters, so alarms without
   a change come no more often than the test's stated rate.
3. On an alarm, `decide` judges the fresh plan on the newer half, with its migration. Its answer waits for approval or is
   published, as the policy says.
"""

from __future__ import annotations

from typing import Any

from ...db.service_records import ClaimedJob, DeploymentRecord, Finding, Judgement, Outcome, WindowRecord
from ...db.store import Store
from ...placement.drift import drift, least_windows
from ...placement.errors import InputError
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from ...placement.problem import Problem
from ...placement.statistics import RoutingStatistics
from ...placement.topology import Topology
from ...placement.window_cost import window_seconds
from ...solvers import solve
from ..policy import Policy
from ..routing import from_windows, stored_statistics, to_bytes
from .base import Report
from .figures import balance, decision_figures
from .judge import default_plan, on_counts


class Watch:
    """Request: empty."""

    kind = "watch"

    def run(self, job: ClaimedJob, store: Store, report: Report) -> Outcome:
        if job.deployment is None:
            raise InputError("a watch is kept over a deployment")
        deployment = store.deployments.get(job.deployment)
        look = _Look(deployment, store)
        return look.outcome(report)


class _Look:
    """One deployment at one moment."""

    def __init__(self, deployment: DeploymentRecord, store: Store) -> None:
        self._deployment = deployment
        self._policy = Policy(**deployment.policy)
        self._model = store.model(deployment.model_id).spec
        self._topology = store.topology(deployment.topology_id).topology
        self._current = _plan_in_force(deployment, store, self._model, self._topology)
        newest = store.windows.page(deployment.name, limit=1)
        since = store.windows.page(deployment.name, limit=self._policy.recent)
        self._since: list[WindowRecord] = [window for window in since if window.key > deployment.reference_window]
        self._last = newest[-1].key if newest else 0
        self._reference = None if deployment.reference_id is None else stored_statistics(store, deployment.reference_id)

    def outcome(self, report: Report) -> Outcome:
        if len(self._since) < self._policy.recent:
            return self._quiet({"status": "waiting for windows", "windows": len(self._since)})
        routing = from_windows(self._since, self._model)
        seconds = window_seconds(self._current, routing.load, self._problem(routing), self._policy.step_tokens)
        figures: dict[str, Any] = {**balance(self._current, routing), "step_seconds": float(seconds.mean())}
        changed = True
        if self._reference is not None:
            if len(self._reference.load) < least_windows(
                len(routing.load), self._policy.block, self._policy.false_alarm
            ):
                return self._quiet({"status": "compared from now on", **figures}, rebased=routing)
            found = drift(self._reference.load, routing.load, block=self._policy.block, alpha=self._policy.false_alarm)
            figures |= {
                "p": found.p,
                "divergence": found.divergence,
                "layer": self._model.moe_layers[found.layer],
                "layer_divergence": found.layer_divergence,
                "dependence": found.dependence,
            }
            changed = found.p <= self._policy.false_alarm
        if not changed:
            return self._quiet({"status": "no change", **figures})
        return self._judged(routing, figures, report)

    def _judged(self, routing: RoutingStatistics, figures: dict[str, Any], report: Report) -> Outcome:
        half = len(self._since) // 2
        older = from_windows(self._since[:half], self._model)
        newer = from_windows(self._since[half:], self._model)
        fresh = solve(
            self._problem(older),
            self._policy.solver,
            seconds=self._policy.seconds,
            progress=report,
            **self._policy.options,
        )
        paid, possible = (
            float(window_seconds(plan, newer.load, self._problem(newer), self._policy.step_tokens).mean())
            for plan in (self._current, fresh)
        )
        regret = paid / possible - 1.0
        figures |= {"regret": regret, "fresh_step_seconds": possible, "fresh": balance(fresh, newer)}
        if regret < self._policy.min_regret:
            return self._quiet({"status": "changed, the plan still holds", **figures}, rebased=routing)
        decision = on_counts(self._current, fresh, newer, self._policy)
        judged = decision_figures(decision)
        judgement = Judgement(
            self._deployment.version, decision.action, decision.reason, judged, self._policy.publish == "automatic"
        )
        figures["status"] = "first plan" if self._reference is None else "alarm"
        return Outcome(
            {"figures": figures, "action": decision.action, "reason": decision.reason},
            plan=fresh,
            # What the plan is compared with from now on: all of the newest windows, half of which it was solved on.
            statistics=routing,
            content=to_bytes(routing),
            finding=Finding(self._last, self._reference is not None, figures),
            judgement=judgement,
            rebase=self._last,
        )

    def _quiet(self, figures: dict[str, Any], rebased: RoutingStatistics | None = None) -> Outcome:
        finding = Finding(self._last, alarm=False, figures=figures)
        if rebased is None:
            return Outcome({"figures": figures}, finding=finding)
        return Outcome(
            {"figures": figures},
            statistics=rebased,
            content=to_bytes(rebased),
            finding=finding,
            rebase=self._last,
        )

    def _problem(self, routing: RoutingStatistics) -> Problem:
        return Problem(self._model, self._topology, routing, self._policy.objective, slots=self._policy.slots)


def _plan_in_force(deployment: DeploymentRecord, store: Store, model: ModelSpec, topology: Topology) -> Plan:
    if deployment.plan_id is None:
        return default_plan(model, topology)
    return store.plan(deployment.plan_id).plan
