"""The steps a search judges its proposals on, laid out for the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ...placement.cost import combine_bytes, dispatch_bytes
from ...placement.drawn_tokens import draw_tokens
from ...placement.problem import Problem
from ...placement.statistics import RoutingStatistics
from ...placement.steps import Steps
from ...placement.trace import RoutingTrace
from . import Batch
from .layout import Aim, LayerTokens, Rates

SCENARIO_TOKENS = 16_384
"""Tokens of a scenario when the number of steps is not given: enough that held-out steps rank plans the same."""


@dataclass(frozen=True)
class Scenario:
    """Steps (None when only counts were recorded), loads [S, L, E] of each step, and the workload [S] of each.

    imagined: the steps' tokens were drawn from transitions, none having been recorded.
    """

    steps: Steps | None
    loads: npt.NDArray[np.float64]
    workload: npt.NDArray[np.int64]
    workloads: tuple[str, ...]
    imagined: bool = False

    @property
    def num_steps(self) -> int:
        return len(self.loads)

    def layer(self, index: int) -> LayerTokens:
        """One layer's tokens in the kernels' layout; no tokens when only counts are known."""
        experts = self.loads.shape[2]
        if self.steps is None:
            none = np.zeros((0, 1), dtype=np.int32)
            return LayerTokens(
                none, none[:, 0], np.zeros(experts + 1, np.int64), none[:, 0], self.loads[:, index].copy()
            )
        ids = np.ascontiguousarray(self.steps.expert_ids[:, index], dtype=np.int32)
        flat = ids.ravel()
        first = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=experts))]).astype(np.int64)
        tokens = (np.argsort(flat, kind="stable") // ids.shape[1]).astype(np.int32)
        step_of = self.steps.step_of.astype(np.int32)
        return LayerTokens(ids, step_of, first, tokens, self.loads[:, index].copy())


def scenario_from(problem: Problem, batch: Batch, step_tokens: int, steps: int | None, seed: int) -> Scenario:
    """Scenario steps drawn from the statistics' token sample, or the load windows when only counts are known.

    Context-coherent steps are drawn from transitions where these were recorded without tokens.

    Under a risk that compares workloads, each workload gets steps of its own tokens only.
    """
    statistics = problem.statistics
    count = max(4, min(64, SCENARIO_TOKENS // step_tokens)) if steps is None else steps
    sample, imagined = statistics.sample, False
    if sample is None or not sample.num_tokens:
        if problem.objective.execution != "context_coherent" or statistics.transitions is None:
            return _from_windows(statistics)
        # Without the combine it is transitions that cost: tokens that show the recorded ones can be priced.
        sample, imagined = draw_tokens(statistics, problem.model.top_k, count * step_tokens, seed), True
    if problem.objective.risk not in ("worst_workload", "regret") or len(statistics.workloads) == 1:
        drawn = _draw(sample, batch, step_tokens, count, seed)
    else:
        present = np.unique(sample.workload)
        share = max(2, count // len(present))
        drawn = _join(
            [_draw(sample.select(sample.workload == code), batch, step_tokens, share, seed) for code in present]
        )
    return Scenario(drawn, drawn.loads().astype(np.float64), drawn.step_workload, statistics.workloads, imagined)


def _draw(sample: RoutingTrace, batch: Batch, step_tokens: int, steps: int, seed: int) -> Steps:
    if batch == "prefill":
        return sample.prefill_steps(min(step_tokens, sample.num_tokens), steps, seed)
    return sample.decode_steps(step_tokens, steps, seed)


def _join(parts: list[Steps]) -> Steps:
    sizes = np.concatenate([part.tokens for part in parts])
    return replace(
        parts[0],
        expert_ids=np.concatenate([part.expert_ids for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        source=None,
        workload=np.concatenate([part.workload for part in parts if part.workload is not None]),
    )


def _from_windows(statistics: RoutingStatistics) -> Scenario:
    """Each window's loads scaled to one token-expert pair a layer, so that windows of any length count the same."""
    total = statistics.load.sum(axis=2, keepdims=True)
    loads = statistics.load / np.where(total > 0, total, 1.0)
    return Scenario(None, loads, statistics.window_workload, statistics.workloads)


def rates_for(problem: Problem, scenario: Scenario) -> Rates:
    """What the kernels charge. With counts alone only the spread of load is known: a pair costs its device's time,
    relative to all devices together, and the cost of a layer is its load max/mean."""
    topology, model, objective = problem.topology, problem.model, problem.objective
    nothing = np.zeros(topology.num_devices)
    if scenario.steps is None:
        return Rates(
            topology.compute.sum() / topology.compute,
            nothing,
            nothing,
            np.zeros(topology.num_nodes),
            0.0,
            topology.node_of,
            topology.node_size.astype(np.float64),
            objective.node_dedup,
        )
    out, back = dispatch_bytes(model, objective), combine_bytes(model, objective)
    return Rates(
        model.flops_per_token / topology.compute,
        model.bytes_per_expert / topology.memory_bandwidth,
        out / topology.intra_bandwidth,
        out / topology.inter_bandwidth,
        back / out,
        topology.node_of,
        topology.node_size.astype(np.float64),
        objective.node_dedup,
    )


def mean_aim(scenario: Scenario) -> Aim:
    """Every step counts the same."""
    even = np.full(scenario.num_steps, 1.0 / scenario.num_steps)
    return Aim(even, np.zeros(scenario.num_steps, np.int64), even, np.zeros(1), 0.0)


def worst_aim(scenario: Scenario, reference: npt.NDArray[np.float64] | None = None) -> Aim:
    """The worst workload counts, with a little of the mean so that the others are not left to drift.

    reference: [W] each workload's own best, subtracted (regret).
    """
    present, group = np.unique(scenario.workload, return_inverse=True)
    sizes = np.bincount(group)
    even = np.full(scenario.num_steps, 1.0 / scenario.num_steps)
    best = np.zeros(len(present)) if reference is None else reference
    return Aim(even, group.astype(np.int64), 1.0 / sizes[group], best, 0.95)


def weighted_aim(weight: npt.NDArray[np.float64]) -> Aim:
    """Steps count by weight (normalised here)."""
    scaled = weight / weight.sum()
    return Aim(scaled, np.zeros(len(scaled), np.int64), scaled, np.zeros(1), 0.0)
