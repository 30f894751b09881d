"""A look at a deployment: has its traffic moved, does that matter, and if so, is a new plan worth its migration?

1. All windows since the plan was last judged are searched for a change against those it was judged on and against each
   other (`placement.drift`), which also says when it was.
2. Once a change is found and enough windows came after it, a fresh plan is solved on the older half of those. What the
   plan in force loses against it on the newer half is the regret. An alarm is a change found and a regret that matters,
   so alarms without a change come no more often than the test's stated rate.
3. On an alarm, `decide` judges the fresh plan on the newer half, with its migration. Its answer waits for approval or
   is published, as the policy says.
4. A plan judged on few windows is looked at again when there are twice as many, until `recent`: without an alarm, for
   nothing changed but what is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..._types import FloatArray
from ...db.records import ClaimedJob, DeploymentRecord, Finding, JobOutcome, Judgement, WindowRecord
from ...db.store import Store
from ...placement.decide import LEAST_BLOCKS
from ...placement.drift import can_tell, drift
from ...placement.errors import InputError
from ...placement.model import ModelSpec
from ...placement.objective import weighted_mean
from ...placement.plan import Plan
from ...placement.problem import Problem
from ...placement.statistics import RoutingStatistics, window_weights, with_tokens
from ...placement.step_mix import mixed_window_seconds
from ...placement.topology import Topology
from ...solvers import solve
from ..policy import Policy
from ..routing import from_windows, stored_statistics, to_bytes
from . import Report
from .decide import balance, decision_figures, default_plan, on_counts


class WatchTask:
    """Request: empty."""

    kind = "watch"

    def run(self, job: ClaimedJob, store: Store, report: Report) -> JobOutcome:
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
        self._reference = None if deployment.reference_id is None else stored_statistics(store, deployment.reference_id)
        newest = store.windows.page(deployment.name, limit=self._policy.searched)
        self._last = newest[-1].key if newest else 0
        # What was joined is one observation of many windows: it cannot stand beside single ones. What is empty is none.
        self._windows = [window for window in newest if window.merged == 1 and window.pairs]
        self._since = [window for window in self._windows if window.key > deployment.reference_window]

    def outcome(self, report: Report) -> JobOutcome:
        policy = self._policy
        if self._reference is None and len(self._since) < self._least:
            return self._quiet({"status": "waiting for windows", "windows": len(self._since)})
        if not self._since:
            return self._quiet({"status": "no new windows"})
        routing = from_windows(self._since[-policy.recent :], self._model)
        seconds = mixed_window_seconds(self._current, routing.load, self._problem(routing))
        figures: dict[str, Any] = {
            **balance(self._current, routing),
            "step_seconds": weighted_mean(seconds, _weight(routing)),
        }
        if self._reference is None:
            return self._judged(self._since[-policy.recent :], "first plan", figures, report)
        known = int(with_tokens(self._reference.load).sum())
        if can_tell(known, len(self._since), policy.block, policy.false_alarm):
            load = from_windows(self._since, self._model).load
            change = drift(self._reference.load, load, block=policy.block, alpha=policy.false_alarm)
            figures |= {
                "p": change.p,
                "divergence": change.divergence,
                "layer": self._model.moe_layers[change.layer],
                "layer_divergence": change.layer_divergence,
                "dependence": change.dependence,
            }
            if change.p <= policy.false_alarm:
                figures["windows_since"] = change.since
                if change.since < self._least:
                    return self._quiet({"status": "changed, waiting for windows to judge on", **figures})
                return self._judged(self._since[-min(change.since, policy.recent) :], "alarm", figures, report)
        enough = min(policy.recent, known + len(self._since), len(self._windows))
        if enough >= 2 * known:
            return self._judged(self._windows[-enough:], "looked at again", figures, report)
        return self._quiet({"status": "no change", **figures})

    @property
    def _least(self) -> int:
        """Windows that a plan can be solved and judged on."""
        return max(2 * LEAST_BLOCKS, 4 * self._policy.block)

    def _judged(
        self, windows: Sequence[WindowRecord], cause: str, figures: dict[str, Any], report: Report
    ) -> JobOutcome:
        half = len(windows) // 2
        older, newer = from_windows(windows[:half], self._model), from_windows(windows[half:], self._model)
        routing = from_windows(windows, self._model)
        fresh = solve(
            replace(self._problem(older), current=self._current),
            self._policy.solver,
            seconds=self._policy.seconds,
            progress=report,
            **self._policy.options,
        )
        paid, possible = (
            weighted_mean(mixed_window_seconds(plan, newer.load, self._problem(newer)), _weight(newer))
            for plan in (self._current, fresh)
        )
        regret = paid / possible - 1.0
        figures |= {"regret": regret, "fresh_step_seconds": possible, "fresh": balance(fresh, newer)}
        # Whatever caused the look, a loss that does not matter moves nothing; without any plan `decide` alone says.
        if regret < (0.0 if cause == "first plan" else self._policy.min_regret):
            holds = "changed, the plan still holds" if cause == "alarm" else "the plan still holds"
            return self._quiet({"status": holds, **figures}, rebased=routing)
        decision = on_counts(self._current, fresh, newer, self._policy)
        judged = decision_figures(decision)
        judgement = Judgement(
            self._deployment.version, decision.action, decision.reason, judged, self._policy.publish == "automatic"
        )
        figures["status"] = cause
        return JobOutcome(
            {"figures": figures, "action": decision.action, "reason": decision.reason},
            plan=fresh,
            # What traffic is compared with from now on: all windows after the change, half of which it was solved on.
            statistics=routing,
            content=to_bytes(routing),
            finding=Finding(self._last, cause == "alarm", figures),
            judgement=judgement,
            rebase=self._last,
        )

    def _quiet(self, figures: dict[str, Any], rebased: RoutingStatistics | None = None) -> JobOutcome:
        finding = Finding(self._last, alarm=False, figures=figures)
        if rebased is None:
            return JobOutcome({"figures": figures}, finding=finding)
        return JobOutcome(
            {"figures": figures},
            statistics=rebased,
            content=to_bytes(rebased),
            finding=finding,
            rebase=self._last,
        )

    def _problem(self, routing: RoutingStatistics) -> Problem:
        policy = self._policy
        return Problem(
            self._model,
            self._topology,
            routing,
            policy.objective,
            slots=policy.slots,
            engine=policy.engine,
            batches=policy.asked,
        )


def _weight(routing: RoutingStatistics) -> FloatArray:
    """[S] what each window counts."""
    return np.asarray(window_weights(routing.load).sum(axis=1))


def _plan_in_force(deployment: DeploymentRecord, store: Store, model: ModelSpec, topology: Topology) -> Plan:
    if deployment.plan_id is None:
        return default_plan(model, topology)
    return store.plan(deployment.plan_id).plan
