"""Values and bounds of whole placements on the scenario, by the public cost model rather than the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..._types import FloatArray, IntArray
from ...placement.bounds import chance_windows, device_loads, least_layer_load, step_seconds_bound
from ...placement.cost import slot_shares
from ...placement.evaluate import evaluate_on
from ...placement.objective import risk_value
from ...placement.plan import Certificate, Plan
from ...placement.problem import Problem
from ..base import working_seconds
from .scenario import Scenario, scenario_from

# What no placement can beat on load vectors alone, window by window and layer by layer.


def window_bounds(problem: Problem, loads: FloatArray) -> FloatArray:
    """[S, L] lower bounds of the largest device load over the mean, devices counted by speed, at least 1.

    loads: [S, L, E], each layer of each window summing to 1, or to 0 where it is empty.
    """
    speed = problem.topology.compute
    packed = least_layer_load(loads, problem.layer_slots) * (speed.sum() / speed.max())
    return np.asarray(np.maximum(1.0, packed))


PATIENCE = 6
"""Time between evaluations of whole plans, in the time one takes, where time is limited."""


class Answer(NamedTuple):
    """A whole placement: slot table [L, P], its value and bound, shares [L, P]."""

    table: IntArray
    certificate: Certificate
    shares: FloatArray

    @property
    def value(self) -> float:
        return self.certificate.value

    @property
    def bound(self) -> float | None:
        return self.certificate.bound


def better(first: Answer, second: Answer) -> Answer:
    """The one of less value, the first of equals."""
    return second if second.value < first.value else first


@dataclass
class Evaluator:
    """Prices placements of a problem.

    reference: [W] what regret is measured against, in the figure's unit. proven: a lower bound of the risk's value
    known from elsewhere, for that reference.
    """

    problem: Problem
    scenario: Scenario
    reference: FloatArray | None = None
    proven: float = -np.inf
    seconds: float = field(init=False, default=0.0)
    _ended: float = field(init=False, default=0.0)
    _known: list[tuple[IntArray, FloatArray, FloatArray]] = field(init=False, default_factory=list)

    @cached_property
    def window_bounds(self) -> FloatArray:
        """[S, L] of windows, see `window_bounds`."""
        return window_bounds(self.problem, self.scenario.loads)

    @cached_property
    def bound(self) -> FloatArray:
        """[S] what no placement's figures are below."""
        steps = self.scenario.steps
        if steps is None:
            return self.scenario.over_layers(self.window_bounds)
        return step_seconds_bound(steps, self.problem)

    @property
    def figure(self) -> str:
        """What is minimised, with its unit."""
        objective = self.problem.objective
        risk = objective.risk
        if self.scenario.steps is None:
            divided = "" if objective.replica_choice != "balanced" else f", divided by {objective.division!r}"
            more = f" and {self.scenario.drawn} drawn around them" if self.scenario.drawn else ""
            return f"device load max/mean of recorded windows{more} by their tokens, mean over layers, {risk}{divided}"
        origin = " of tokens drawn from recorded transitions" if self.scenario.synthetic else ""
        chosen = {
            "share": "",
            "nearest": ", nearest replicas",
            "balanced": f", steps divided by {objective.division!r}",
        }[objective.replica_choice]
        copied = f", {objective.online} experts a device copied by the step" if objective.online else ""
        kinds = " and ".join(self.scenario.steps.batches)
        steps = f"{self.scenario.num_steps} scenario steps{origin} ({kinds})"
        return f"predicted step seconds on {steps}, {risk}{chosen}{copied}"

    @property
    def due(self) -> bool:
        """Whether the last evaluation is long enough ago for another, beside what it takes (`seconds`)."""
        return working_seconds() - self._ended >= PATIENCE * self.seconds

    def figures(self, table: IntArray, shares: FloatArray) -> FloatArray:
        """[S] the figure of each scenario step."""
        for known_table, known_shares, known in self._known:
            if np.array_equal(table, known_table) and np.array_equal(shares, known_shares):
                return known
        started = working_seconds()
        result = self._figures(table, shares)
        self._ended = working_seconds()
        self.seconds = self._ended - started
        # The best placement is asked for again after others.
        self._known = [*self._known[-3:], (table.copy(), shares.copy(), result)]
        return result

    def _figures(self, table: IntArray, shares: FloatArray) -> FloatArray:
        problem = self.problem
        if self.scenario.steps is None:
            return self._load_figures(table, shares)
        plan = Plan(problem.model, problem.topology, table, problem.slot_device, shares)
        return evaluate_on(plan, self.scenario.steps, problem.model, problem.topology, problem.objective).step_seconds

    def answer(
        self, tables: Sequence[IntArray], shares: Sequence[FloatArray], figures: FloatArray | None = None
    ) -> Answer:
        """The placement of slot tables [P_l] and shares [E, G], one of each a layer. figures: [S] where known."""
        table, slot_shares = self.problem.slot_table(tables), self.problem.slot_shares(tables, shares)
        return Answer(table, self.certificate(table, slot_shares, figures), slot_shares)

    def value(self, table: IntArray, shares: FloatArray) -> float:
        """The risk's value of a placement."""
        return self._risk(self.figures(table, shares))

    def certificate(self, table: IntArray, shares: FloatArray, figures: FloatArray | None = None) -> Certificate:
        """The risk's value of a placement and its bound. figures: [S] where known."""
        value = self._risk(self.figures(table, shares) if figures is None else figures)
        return Certificate(self.figure, value, min(value, max(self._risk(self.bound), self.proven)))

    def _risk(self, figures: FloatArray) -> float:
        objective = self.problem.objective
        if objective.risk == "regret" and self.reference is None:
            objective = objective.replace(risk="worst_workload")
        scenario = self.scenario
        return risk_value(figures, scenario.workload, objective, self.reference, scenario.risk_weight, scenario.kind)

    def _load_figures(self, table: IntArray, shares: FloatArray) -> FloatArray:
        problem, speed = self.problem, self.problem.topology.compute
        slowness = speed.sum() / speed
        peaks = np.empty((self.scenario.num_steps, problem.model.layers))
        plan = Plan(problem.model, problem.topology, table, problem.slot_device, shares)
        for s, loads in enumerate(self.scenario.loads):
            shares = slot_shares(plan, loads, problem.objective)
            carried = device_loads(loads, table, shares, problem.slot_device, problem.num_devices) * slowness
            peaks[s] = np.maximum(1.0, carried.max(axis=1))
        return self.scenario.over_layers(peaks)


def with_noise(problem: Problem, answer: Answer, seed: int) -> Certificate:
    """The certificate of a placement searched on count windows, with what chance alone adds to its value: the risk of
    windows drawn from the mean of their workload, less the risk of these means. Of regret nothing is told: it is
    against plans that chance favours as well."""
    statistics, objective = problem.statistics, problem.objective
    if objective.risk == "regret":
        return answer.certificate
    parts = []
    for workload in np.unique(statistics.window_workload):
        windows = chance_windows(statistics.load[statistics.window_workload == workload], seed)
        if windows is None:
            return answer.certificate
        parts.append((windows, np.full(len(windows[0]), workload)))
    values = []
    for side in (0, 1):
        load = np.concatenate([windows[side] for windows, _ in parts])
        changed = replace(statistics, load=load, window_workload=np.concatenate([codes for _, codes in parts]))
        windows_of = replace(problem, statistics=changed)
        evaluator = Evaluator(windows_of, scenario_from(windows_of, None, None, None, seed))
        values.append(evaluator.value(answer.table, answer.shares))
    return replace(answer.certificate, noise=max(0.0, values[0] - values[1]))
