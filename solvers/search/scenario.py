"""The steps a search judges its proposals on, laid out for the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..._types import FloatArray, IntArray
from ...placement.cost import ExpertCost, combine_bytes, dispatch_bytes
from ...placement.problem import Problem
from ...placement.statistics import window_weights, with_tokens
from ...placement.steps import Steps
from ...placement.synthetic import sample_tokens
from ...placement.trace import RoutingTrace
from ..base import TOKENS_PER_DEVICE, Batch
from .kernel_types import LayerTokens, Rates, RiskWeights, SourceTokens

SCENARIO_TOKENS = 65_536
"""Tokens of a scenario when the number of steps is not given, at most: whole plans are judged on all of them."""
WALKED_TOKENS = 16_384
"""Tokens proposals are priced on. Loads are known from all tokens of every step; which devices tokens coverage is
counted on so many of them, evenly over steps: many sequences thinly tell more of unseen ones than few sequences
wholly."""
MOST_STEPS = 64


@dataclass(frozen=True)
class Scenario:
    """Steps (None when only counts were recorded), loads [S, L, E] of each step, and the workload [S] of each.

    synthetic: the steps' tokens were drawn from transitions, none having been recorded. walked: the tokens of the steps
    that proposals are priced on, in order; None for all. weight: [S, L] how much each layer of each window counts (see
    `window_weights`); None for steps, which all count alike.
    """

    steps: Steps | None
    loads: FloatArray
    workload: IntArray
    workloads: tuple[str, ...]
    synthetic: bool = False
    walked: IntArray | None = None
    weight: FloatArray | None = None

    @property
    def step_weight(self) -> FloatArray:
        """[S] how much each step or window counts, all together 1."""
        if self.weight is None:
            return np.full(self.num_steps, 1.0 / self.num_steps)
        return np.asarray(self.weight.sum(axis=1))

    def layer_weights(self, weight: FloatArray) -> FloatArray:
        """[S, L] what each layer's figures count, where steps or windows count by `weight` [S].

        As many times the number of layers that hold tokens as sums over layers want: each sums to 1 where it is
        `step_weight`.
        """
        if self.weight is None:
            return np.repeat(weight[:, None], self.loads.shape[1], axis=1)
        busy = int((self.weight > 0).any(axis=0).sum())
        return np.asarray(self.weight * (weight / self.weight.sum(axis=1))[:, None] * busy)

    def over_layers(self, figures: FloatArray) -> FloatArray:
        """[S] one figure a step or window from those of its layers [S, L]: their sum, or on windows their weighted
        mean."""
        if self.weight is None:
            return np.asarray(figures.sum(axis=1))
        # Above 1, which no layer is below, so that rounding does not end there.
        return np.asarray(1.0 + (self.weight * (figures - 1.0)).sum(axis=1) / self.weight.sum(axis=1))

    @property
    def num_steps(self) -> int:
        return len(self.loads)

    @property
    def beginning(self) -> Scenario:
        """The first of its steps, no more than hold the tokens that proposals are priced on."""
        if self.steps is None or self.walked is None:
            return self
        count = max(1, int(np.searchsorted(self.steps.offsets, WALKED_TOKENS, side="right")) - 1)
        steps = self.steps.select(np.arange(count))
        return Scenario(steps, self.loads[:count], self.workload[:count], self.workloads, self.synthetic)

    def layer(self, index: int) -> LayerTokens:
        """One layer's tokens in the kernels' layout; no tokens when only counts are known."""
        experts = self.loads.shape[2]
        if self.steps is None:
            none = np.zeros((0, 1), dtype=np.int32)
            return LayerTokens(
                none, none[:, 0], np.zeros(experts + 1, np.int64), none[:, 0], self.loads[:, index].copy()
            )
        ids = np.ascontiguousarray(self.walked_ids[:, index], dtype=np.int32)
        flat = ids.ravel()
        first = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=experts))]).astype(np.int64)
        tokens = (np.argsort(flat, kind="stable") // ids.shape[1]).astype(np.int32)
        step_of = self.steps.step_of if self.walked is None else self.steps.step_of[self.walked]
        return LayerTokens(ids, step_of.astype(np.int32), first, tokens, self.loads[:, index].copy())

    @property
    def walked_ids(self) -> npt.NDArray[np.unsignedinteger]:
        """[T, L, k] experts of the tokens walked over."""
        assert self.steps is not None
        return self.steps.expert_ids if self.walked is None else self.steps.expert_ids[self.walked]

    @property
    def tokens_each(self) -> float:
        """How many tokens of the steps each token walked over stands for."""
        return 1.0 if self.steps is None or self.walked is None else len(self.steps.expert_ids) / len(self.walked)


def priced_on_windows(problem: Problem) -> bool:
    """Whether counts alone are known: loads of windows are then minimised, and no steps are drawn."""
    sample, transitions = problem.statistics.sample, problem.statistics.transitions
    coherent = problem.objective.execution == "context_coherent" and transitions is not None
    return (sample is None or not sample.num_tokens) and not coherent


def default_steps(problem: Problem) -> dict[Batch, int]:
    """Tokens a step by kind that search takes where nobody names one: of both under the risk "mean", so that the plan
    is good at both; else of decode, as a risk over steps of two sizes would look at the larger alone."""
    kinds: tuple[Batch, ...] = ("decode", "prefill") if problem.objective.risk == "mean" else ("decode",)
    return {kind: TOKENS_PER_DEVICE[kind] * problem.num_devices for kind in kinds}


def scenario_from(
    problem: Problem, batch: Batch | None, step_tokens: int | None, steps: int | None, seed: int
) -> Scenario:
    """Scenario steps drawn from the statistics' token sample, or the load windows when only counts are known.

    Without batch and step_tokens, steps of `default_steps` share the tokens. Their seconds are added up as they are:
    the larger steps weigh more, and small ones decide where these don't care.

    Context-coherent steps are drawn from transitions where these were recorded without tokens.
    """
    if priced_on_windows(problem):
        return _from_windows(problem)
    kinds = default_steps(problem)
    if batch is not None or step_tokens is not None:
        named: Batch = batch or "decode"
        kinds = {named: step_tokens or TOKENS_PER_DEVICE[named] * problem.num_devices}
    most = SCENARIO_TOKENS // len(kinds)
    parts = [_drawn_steps(problem, kind, tokens, steps, most, seed) for kind, tokens in kinds.items()]
    drawn = parts[0] if len(parts) == 1 else _join(parts)
    sample = problem.statistics.sample
    return Scenario(
        drawn,
        drawn.loads().astype(np.float64),
        drawn.step_workload,
        problem.statistics.workloads,
        synthetic=sample is None or not sample.num_tokens,
        walked=_thinned(drawn, seed),
    )


def _drawn_steps(
    problem: Problem, batch: Batch, step_tokens: int, steps: int | None, most_tokens: int, seed: int
) -> Steps:
    """Steps of one kind. Under a risk that compares workloads, each workload gets steps of its own tokens only."""
    statistics = problem.statistics
    count = max(4, min(MOST_STEPS, most_tokens // step_tokens)) if steps is None else steps
    sample = statistics.sample
    if sample is None or not sample.num_tokens:
        # Without the combine it is transitions that cost: tokens that show the recorded ones can be priced.
        sample = sample_tokens(statistics, problem.model.top_k, count * step_tokens, seed)
    if batch == "prefill" and steps is None:
        # More steps than the sample fills would only be its sequences in another order.
        count = max(4, min(count, sample.num_tokens // step_tokens))
    if problem.objective.risk not in ("worst_workload", "regret") or len(statistics.workloads) == 1:
        return _draw(sample, batch, step_tokens, count, seed)
    present = np.unique(sample.workload)
    share = max(2, count // len(present))
    return _join([_draw(sample.select(sample.workload == code), batch, step_tokens, share, seed) for code in present])


def _thinned(steps: Steps, seed: int) -> IntArray | None:
    """Tokens to walk over, the same part of every step drawn at random; None for all."""
    part = WALKED_TOKENS / max(1, len(steps.expert_ids))
    if part >= 1.0:
        return None
    rng = np.random.default_rng(seed)
    drawn = [
        start + np.sort(rng.permutation(size)[: max(1, round(part * size))])
        for start, size in zip(steps.offsets[:-1].tolist(), steps.tokens.tolist(), strict=True)
    ]
    return np.concatenate(drawn).astype(np.int64)


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
        workload=None
        if parts[0].workload is None
        else np.concatenate([part.workload for part in parts if part.workload is not None]),
    )


def _from_windows(problem: Problem) -> Scenario:
    """The windows that hold tokens, each scaled to one token-expert pair a layer; what they count is kept beside
    them."""
    statistics = problem.statistics
    counted = with_tokens(statistics.load)
    if not counted.any():
        counted[0] = True
    load = statistics.load[counted]
    total = load.sum(axis=2, keepdims=True)
    loads = load / np.where(total > 0, total, 1.0)
    workload = statistics.window_workload[counted]
    compared = workload if problem.objective.risk in ("worst_workload", "regret") else None
    return Scenario(None, loads, workload, statistics.workloads, weight=window_weights(load, compared))


def rates_for(problem: Problem, scenario: Scenario) -> Rates:
    """What the kernels charge. With counts alone only the spread of load is known: a pair costs its device's time,
    relative to all devices together, and the cost of a layer is its load max/mean."""
    topology, model, objective = problem.topology, problem.model, problem.objective
    nothing = np.zeros(topology.num_devices)
    if scenario.steps is None:
        return Rates(
            *ExpertCost.roofline(topology.compute.sum() / topology.compute, nothing),
            nothing,
            np.zeros(topology.num_nodes),
            0.0,
            topology.node_of,
            topology.node_size.astype(np.float64),
            objective.node_dedup,
        )
    out, back = dispatch_bytes(model, objective), combine_bytes(model, objective)
    return Rates(
        *ExpertCost.of(model, topology),
        scenario.tokens_each * out / topology.intra_bandwidth,
        scenario.tokens_each * out / topology.inter_bandwidth,
        back / out,
        topology.node_of,
        topology.node_size.astype(np.float64),
        objective.node_dedup,
    )


def mean_risks(scenario: Scenario) -> list[RiskWeights]:
    """One a layer: every step counts the same, every window by its tokens."""
    return weighted_risks(scenario, scenario.step_weight)


def worst_risks(scenario: Scenario, reference: FloatArray | None = None) -> list[RiskWeights]:
    """One a layer: the worst workload counts, with a little of the mean so that the others are not left to drift.

    reference: [W, L] each workload's own best, subtracted (regret).
    """
    present, group = np.unique(scenario.workload, return_inverse=True)
    size = np.bincount(group, weights=scenario.step_weight)
    even = scenario.layer_weights(scenario.step_weight)
    alone = scenario.layer_weights(scenario.step_weight / size[group])
    best = np.zeros((len(present), even.shape[1])) if reference is None else reference
    return [
        RiskWeights(even[:, layer].copy(), group.astype(np.int64), alone[:, layer].copy(), best[:, layer].copy(), 0.95)
        for layer in range(even.shape[1])
    ]


def weighted_risks(scenario: Scenario, weight: FloatArray) -> list[RiskWeights]:
    """One a layer: steps or windows count by weight [S] (normalised here)."""
    none = np.zeros(scenario.num_steps, np.int64)
    return [
        RiskWeights(mine.copy(), none, mine.copy(), np.zeros(1), 0.0)
        for mine in scenario.layer_weights(weight / weight.sum()).T
    ]


# Scenario tokens with a source rank each.


def with_sources(scenario: Scenario, problem: Problem, seed: int) -> Scenario:
    """The scenario, its tokens dealt to source ranks where the choice of replicas depends on them.

    Each step's tokens are dealt evenly in random order: one draw of what an even spread means, so that a token is
    priced once rather than once a device.
    """
    wanted = problem.objective.replica_choice == "nearest" and problem.has_replicas
    if scenario.steps is None or scenario.steps.source is not None or not wanted:
        return scenario
    return replace(scenario, steps=deal_sources(scenario.steps, problem.num_devices, seed))


def deal_sources(steps: Steps, devices: int, seed: int) -> Steps:
    """The steps, each one's tokens dealt evenly over devices."""
    rng = np.random.default_rng(seed)
    source = np.empty(len(steps.expert_ids), np.int64)
    for start, end in zip(steps.offsets[:-1], steps.offsets[1:], strict=True):
        # What does not divide evenly goes to devices drawn anew, not always to the first.
        rounds = -(-int(end - start) // devices)
        dealt = np.concatenate([rng.permutation(devices) for _ in range(rounds)])[: end - start]
        source[start:end] = rng.permutation(dealt)
    return replace(steps, source=source)


def source_tokens(scenario: Scenario, layer: int, problem: Problem) -> SourceTokens:
    """One layer of a scenario whose tokens have source ranks."""
    steps, devices = scenario.steps, problem.num_devices
    assert steps is not None
    assert steps.source is not None
    groups = problem.model.experts * devices
    cell = (steps.expert_ids[:, layer].astype(np.int64) * devices + steps.source[:, None]) * steps.num_steps
    counts = np.bincount((cell + steps.step_of[:, None]).ravel(), minlength=groups * steps.num_steps).astype(np.float64)
    walked = np.arange(len(steps.source)) if scenario.walked is None else scenario.walked
    order = walked[np.argsort(steps.source[walked], kind="stable")]
    ids = np.ascontiguousarray(steps.expert_ids[order, layer], dtype=np.int32)
    source, step_of = steps.source[order].astype(np.int32), steps.step_of[order].astype(np.int32)
    group = (ids * devices + source[:, None]).ravel()
    first = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=groups))]).astype(np.int64)
    tokens = (np.argsort(group, kind="stable") // ids.shape[1]).astype(np.int32)
    return SourceTokens(
        ids,
        source,
        step_of,
        first,
        tokens,
        counts.reshape(problem.model.experts, devices, steps.num_steps),
        problem.objective.replica_choice == "nearest",
    )
