"""The steps a search judges its proposals on, laid out for the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..._types import FloatArray, IntArray
from ...placement.cost import ExpertCost, Transfers
from ...placement.memory import check_memory
from ...placement.problem import Problem
from ...placement.statistics import window_weights, with_tokens
from ...placement.step_mix import batch_steps, mixed_steps, named_batch, sample_tokens, step_mix
from ...placement.steps import Batch, Phase, Steps
from ...placement.validation import generator
from .moves import LayerTokens, Rates, RiskWeights, SourceTokens

SCENARIO_TOKENS, MOST_SCENARIO_TOKENS = 65_536, 262_144
"""Tokens of a scenario when the number of steps is not given, at most: whole plans are judged on all of them. More
where that is quick, so that loads are those of all that was recorded: with a third of it, gpt-oss-20b's prefill steps
take 0.7 % longer on sequences that search has not seen."""
QUICK_WORK = 50_000_000
"""Tokens times layers times devices whose replay takes seconds."""
WALKED_TOKENS = 16_384
"""Tokens proposals are priced on. Loads are known from all tokens of every step; which devices tokens coverage is
counted on so many of them, evenly over steps: many sequences thinly tell more of unseen ones than few sequences
wholly."""
LEAST_LOAD = 0.01
"""Of the mean load, below which loads tell nothing of how they vary."""
BYTES_A_CHOICE = 48
"""Memory that search takes for an expert choice of the steps it prices, measured with 16 a token."""
MOST_STEPS = 64


@dataclass(frozen=True)
class Scenario:
    """Steps (None when only counts were recorded), loads [S, L, E] of each step, and the workload [S] of each.

    synthetic: the steps' tokens were drawn from transitions, none having been recorded. walked: the tokens of the steps
    that proposals are priced on, in order; None for all. weight: [S, L] how much each layer of each window counts (see
    `window_weights`); None for steps, which all count alike. drawn: how many of the last windows were drawn around the
    others.
    """

    steps: Steps | None
    loads: FloatArray
    workload: IntArray
    workloads: tuple[str, ...]
    synthetic: bool = False
    walked: IntArray | None = None
    weight: FloatArray | None = None
    drawn: int = 0

    @property
    def step_weight(self) -> FloatArray:
        """[S] how much each step or window counts, all together 1."""
        if self.weight is not None:
            return np.asarray(self.weight.sum(axis=1))
        assert self.steps is not None
        return self.steps.step_weight

    @property
    def risk_weight(self) -> FloatArray | None:
        """[S] as of `step_weight`, None where all count alike; see `risk_value`."""
        return self.step_weight if self.steps is None else self.steps.weight

    @property
    def kind(self) -> IntArray | None:
        """[S] which batch each step is of; None for one."""
        return None if self.steps is None else self.steps.batch

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
    def windows(self) -> Scenario:
        """The steps' loads alone, as windows that count by their tokens and by what their steps count."""
        tokens = self.loads.sum(axis=2)
        weight = self.step_weight[:, None] * tokens
        rows = self.loads / np.maximum(tokens, 1e-300)[:, :, None]
        return Scenario(None, rows, self.workload, self.workloads, weight=weight / weight.sum())

    @property
    def beginning(self) -> Scenario:
        """The first of its steps of each batch, no more than hold the tokens that proposals are priced on; at least
        one."""
        if self.steps is None or self.walked is None:
            return self
        batch = np.zeros(self.num_steps, np.int64) if self.steps.batch is None else self.steps.batch
        first = []
        for code in np.unique(batch):
            mine = np.flatnonzero(batch == code)
            part = WALKED_TOKENS * self.steps.tokens[mine].sum() / len(self.steps.expert_ids)
            first.append(mine[: max(1, int((np.cumsum(self.steps.tokens[mine]) <= part).sum()))])
        chosen = np.concatenate(first)
        # A batch of fewer steps counts as much as of all.
        share = np.bincount(batch, weights=self.steps.step_weight) / np.maximum(1, np.bincount(batch[chosen]))
        steps = replace(self.steps.select(chosen), weight=share[batch[chosen]])
        return Scenario(steps, self.loads[chosen], self.workload[chosen], self.workloads, self.synthetic)

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


def scenario_from(
    problem: Problem, phase: Phase | None, step_tokens: int | None, steps: int | None, seed: int
) -> Scenario:
    """Scenario steps of the problem's batches, drawn from the statistics' token sample, or the load windows when only
    counts are known.

    phase, step_tokens: of the one batch to look at instead.

    Context-coherent steps are drawn from transitions where these were recorded without tokens.
    """
    if priced_on_windows(problem):
        return _from_windows(problem)
    if phase is not None or step_tokens is not None:
        problem = replace(problem, batches=(named_batch(phase, step_tokens),))
    mix = step_mix(problem)
    quick = QUICK_WORK // (problem.model.layers * problem.num_devices)
    most = max(SCENARIO_TOKENS, min(MOST_SCENARIO_TOKENS, quick)) // len(mix.batches)
    for batch in mix.batches:
        tokens = batch.step_tokens(problem.num_devices)
        count = _steps_drawn(tokens, steps, most)
        # Steps of the usual size take little; larger ones were asked for.
        check_memory(
            max(0, count * tokens - SCENARIO_TOKENS) * problem.model.layers * problem.model.top_k * BYTES_A_CHOICE,
            f"search on {count:,} {batch.phase} steps of {tokens:,} tokens",
            "give a smaller step_tokens or fewer steps",
        )
    drawn = mixed_steps([_drawn_steps(problem, batch, steps, most, seed) for batch in mix.batches], mix)
    sample = problem.statistics.sample
    return Scenario(
        drawn,
        drawn.loads().astype(np.float64),
        drawn.step_workload,
        problem.statistics.workloads,
        synthetic=sample is None or not sample.num_tokens,
        walked=_thinned(drawn, seed),
    )


def _steps_drawn(step_tokens: int, steps: int | None, most_tokens: int) -> int:
    return max(4, min(MOST_STEPS, most_tokens // step_tokens)) if steps is None else steps


def _drawn_steps(problem: Problem, batch: Batch, steps: int | None, most_tokens: int, seed: int) -> Steps:
    """Steps of one batch. Under a risk that compares workloads, each workload gets steps of its own tokens only."""
    statistics, step_tokens = problem.statistics, batch.step_tokens(problem.num_devices)
    count = _steps_drawn(step_tokens, steps, most_tokens)
    sample = statistics.sample
    if sample is None or not sample.num_tokens:
        # Without the combine it is transitions that cost: tokens that show the recorded ones can be priced.
        sample = sample_tokens(statistics, problem.model.top_k, count * step_tokens, seed)
    if batch.phase == "prefill" and steps is None:
        # More steps than the sample fills would only be its sequences in another order.
        count = max(4, min(count, sample.num_tokens // step_tokens))
    if problem.objective.risk not in ("worst_workload", "regret") or len(statistics.workloads) == 1:
        return batch_steps(sample, batch.phase, step_tokens, count, seed)
    present = np.unique(sample.workload)
    share = max(2, count // len(present))
    of_each = [sample.select(sample.workload == code) for code in present]
    return Steps.join([batch_steps(tokens, batch.phase, step_tokens, share, seed) for tokens in of_each])


def _thinned(steps: Steps, seed: int) -> IntArray | None:
    """Tokens to walk over, the same part of every step drawn at random; None for all."""
    part = WALKED_TOKENS / max(1, len(steps.expert_ids))
    if part >= 1.0:
        return None
    rng = generator(seed)
    drawn = [
        start + np.sort(rng.permutation(size)[: max(1, round(part * size))])
        for start, size in zip(steps.offsets[:-1].tolist(), steps.tokens.tolist(), strict=True)
    ]
    return np.concatenate(drawn).astype(np.int64)


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


WINDOWS = 16
"""Windows to divide anew, the ones drawn included."""
SPREAD = 0.5
"""Of how far experts' loads are apart between windows, how far drawn windows are from theirs."""


def with_drawn_windows(scenario: Scenario, seed: int) -> Scenario:
    """The scenario with windows drawn around few recorded ones: a placement can level these each by its own division,
    and what is left to choose decides how far others can be.

    An expert's load is that of a recorded window times a log-normal factor, as wide as half of what its loads and all
    experts' differ by between windows. One window tells nothing of that, and stays alone.
    """
    count = WINDOWS - scenario.num_steps
    if scenario.weight is None or scenario.num_steps < 2 or count <= 0:
        return scenario
    rng = np.random.default_rng(seed)
    logs = np.log(np.maximum(scenario.loads, LEAST_LOAD / scenario.loads.shape[2]))
    variance = logs.var(axis=0, ddof=1)
    spread = SPREAD * np.sqrt(0.5 * (variance + variance.mean(axis=1, keepdims=True)))
    base = rng.permutation(np.arange(count) % scenario.num_steps)
    drawn = scenario.loads[base] * np.exp(spread * rng.standard_normal((count, *spread.shape)))
    total = drawn.sum(axis=2, keepdims=True)
    weight = np.concatenate([scenario.weight, scenario.weight[base]])
    return replace(
        scenario,
        loads=np.concatenate([scenario.loads, drawn / np.where(total > 0, total, 1.0)]),
        workload=np.concatenate([scenario.workload, scenario.workload[base]]),
        weight=weight / weight.sum(),
        drawn=count,
    )


def rates_for(problem: Problem, scenario: Scenario) -> Rates:
    """What the kernels charge. With counts alone only the spread of load is known: a pair costs its device's time,
    relative to all devices together, and the cost of a layer is its load max/mean."""
    topology, model, objective = problem.topology, problem.model, problem.objective
    nodes = topology.node_of, topology.node_size.astype(np.float64)
    if scenario.steps is None:
        nothing, no_kind = np.zeros(topology.num_devices), np.zeros(1, np.bool_)
        return Rates(
            *ExpertCost.roofline(topology.compute.sum() / topology.compute, nothing),
            nothing[None],
            np.zeros((1, topology.num_nodes)),
            np.zeros(1),
            no_kind,
            no_kind,
            np.zeros(scenario.num_steps, np.int64),
            *nodes,
        )
    transfers = Transfers.of(model, topology, objective)
    # Pairs are known of all tokens, what tokens share of those walked over.
    stands_for = np.array([[1.0 if each.pairs else scenario.tokens_each] for each in transfers.each])
    return Rates(
        *ExpertCost.of(model, topology),
        stands_for * np.array([each.per_copy for each in transfers.each]),
        stands_for * np.array([each.per_node_copy for each in transfers.each]),
        np.array([each.back for each in transfers.each]),
        np.array([each.pairs for each in transfers.each]),
        np.array([each.dedup for each in transfers.each]),
        transfers.which(scenario.steps),
        *nodes,
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
    needed = problem.objective.replica_choice != "share" and problem.has_replicas
    if scenario.steps is None or scenario.steps.source is not None or not needed:
        return scenario
    return replace(scenario, steps=deal_sources(scenario.steps, problem.num_devices, seed))


def deal_sources(steps: Steps, devices: int, seed: int) -> Steps:
    """The steps, each one's tokens dealt evenly over devices."""
    rng = generator(seed)
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
        problem.objective.replica_choice != "share" and problem.objective.division == "local",
        problem.objective.replica_choice == "balanced" and problem.has_replicas,
        1.0 / scenario.tokens_each,
    )
