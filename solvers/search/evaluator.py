"""Values and bounds of whole placements on the scenario, by the public cost model rather than the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..._types import FloatArray, IntArray
from ...placement.bounds import device_loads, least_layer_load, step_seconds_bound
from ...placement.evaluate import evaluate_on
from ...placement.plan import Certificate, Plan
from ...placement.problem import Problem
from ...placement.risk import risk_value
from ..base import working_seconds
from .scenario import Scenario

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

    reference: [W] what regret is measured against, in the figure's unit. proven: a lower bound of the risk's value known
    from elsewhere, for that reference.
    """

    problem: Problem
    scenario: Scenario
    reference: FloatArray | None = None
    proven: float = -np.inf
    bound: FloatArray = field(init=False)
    seconds: float = field(init=False, default=0.0)
    _ended: float = field(init=False, default=0.0)
    _known: list[tuple[IntArray, FloatArray, FloatArray]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        steps = self.scenario.steps
        self.bound = (
            self.scenario.over_layers(window_bounds(self.problem, self.scenario.loads))
            if steps is None
            else step_seconds_bound(steps, self.problem)
        )

    @property
    def figure(self) -> str:
        """What is minimised, with its unit."""
        risk = self.problem.objective.risk
        if self.scenario.steps is None:
            return f"device load max/mean of recorded windows by their tokens, mean over layers, {risk}"
        origin = " of tokens drawn from recorded transitions" if self.scenario.synthetic else ""
        chosen = ", nearest replicas" if self.problem.objective.replica_choice == "nearest" else ""
        return f"predicted step seconds on {self.scenario.num_steps} scenario steps{origin}, {risk}{chosen}"

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

    def answer(self, tables: Sequence[IntArray], shares: Sequence[FloatArray]) -> Answer:
        """The placement of slot tables [P_l] and shares [E, G], one of each a layer."""
        table, slot_shares = self.problem.slot_table(tables), self.problem.slot_shares(tables, shares)
        return Answer(table, self.certificate(table, slot_shares), slot_shares)

    def certificate(self, table: IntArray, shares: FloatArray) -> Certificate:
        """The risk's value of a placement and its bound."""
        value = self._risk(self.figures(table, shares))
        return Certificate(self.figure, value, min(value, max(self._risk(self.bound), self.proven)))

    def _risk(self, figures: FloatArray) -> float:
        objective = self.problem.objective
        if objective.risk == "regret" and self.reference is None:
            objective = objective.replace(risk="worst_workload")
        weight = None if self.scenario.weight is None else self.scenario.step_weight
        return risk_value(figures, self.scenario.workload, objective, self.reference, weight)

    def _load_figures(self, table: IntArray, shares: FloatArray) -> FloatArray:
        problem, speed = self.problem, self.problem.topology.compute
        slowness = speed.sum() / speed
        peaks = np.empty((self.scenario.num_steps, problem.model.layers))
        for s, loads in enumerate(self.scenario.loads):
            carried = device_loads(loads, table, shares, problem.slot_device, problem.num_devices) * slowness
            peaks[s] = np.maximum(1.0, carried.max(axis=1))
        return self.scenario.over_layers(peaks)
