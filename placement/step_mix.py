"""Which steps a problem is about, how they are made of routing, and how they are sampled where no token was recorded:
read by all that solve, judge or decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from .._arguments import check_types
from .._types import FloatArray, IntArray
from .bounds import window_seconds_bound
from .cost import WindowTimes, window_seconds, window_times
from .errors import InputError, UnsupportedError
from .model import ModelSpec
from .plan import Plan
from .problem import Problem
from .statistics import RoutingStatistics, with_tokens
from .steps import MOST_TOKENS, USUAL_BATCHES, Batch, Phase, Steps
from .trace import RoutingTrace, id_dtype
from .validation import check_range, check_seed, check_shape, generator

JUDGED_TOKENS = 131_072
"""Of the steps of one batch that a plan is judged on, as far as `FEWEST_STEPS` go."""
MOST_STEPS: Mapping[Phase, int] = {"decode": 200, "prefill": 32}
FEWEST_STEPS = 2


@dataclass(frozen=True)
class StepMix:
    """The batches a problem is solved and judged for.

    batches: their weights, shares of steps, sum to 1. origin: named in the problem ("asked"), the forward calls that
    were recorded ("recorded"), or the usual sizes. devices: of the problem. even_under: of usual sizes, the plan with
    which all of them take equal parts of the time.
    """

    batches: tuple[Batch, ...]
    origin: Literal["asked", "recorded", "usual"]
    devices: int
    even_under: str = ""

    @property
    def text(self) -> str:
        """The batches in a line, and why these."""
        shares = len(self.batches) > 1
        named = " and ".join(
            batch.text + (f" ({batch.weight:.1%} of steps)" if shares else "") for batch in self.batches
        )
        why = {
            "asked": "as asked for",
            "recorded": "the recorded forward calls",
            "usual": "usual sizes, as none were named" + (f"; equal time with {self.even_under}" if shares else ""),
        }
        return f"Steps: {named}; {why[self.origin]}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "text": self.text,
            "origin": self.origin,
            "batches": [
                {
                    "phase": batch.phase,
                    "tokens_per_device": batch.step_tokens(self.devices) / self.devices,
                    "tokens": batch.step_tokens(self.devices),
                    "weight": batch.weight,
                }
                for batch in self.batches
            ],
        }

    @property
    def mean_tokens(self) -> float:
        """Of a step over all devices."""
        return sum(batch.weight * batch.step_tokens(self.devices) for batch in self.batches)

    def names(self) -> tuple[str, ...]:
        """`decode 512`, one a batch."""
        return tuple(batch.name(self.devices) for batch in self.batches)


@check_types
def step_mix(problem: Problem) -> StepMix:
    """The problem's batches; else the recording's own forward calls; else usual sizes, weighed so that each takes the
    same part of the time with the plan in force (contiguous where there is none): a plan is then good at all of them.
    """
    asked = problem.batches or problem.statistics.batches
    if asked:
        total = sum(batch.weight for batch in asked)
        scaled = tuple(replace(batch, weight=batch.weight / total) for batch in asked)
        return StepMix(scaled, "asked" if problem.batches else "recorded", problem.num_devices)
    times = np.array([_mean_seconds(problem, batch) for batch in USUAL_BATCHES])
    shares = (1.0 / times) / (1.0 / times).sum()
    usual = tuple(replace(batch, weight=float(share)) for batch, share in zip(USUAL_BATCHES, shares, strict=True))
    plan = "contiguous placement" if problem.current is None else "the plan in force"
    return StepMix(usual, "usual", problem.num_devices, plan)


def named_batch(phase: Phase | None, step_tokens: int | None) -> Batch:
    """The batch that a phase, a size over all devices, or both name: a size alone is of decode steps, a phase alone
    has its usual size."""
    if step_tokens is not None:
        return Batch(phase or "decode", tokens=step_tokens)
    return next(batch for batch in USUAL_BATCHES if batch.phase == (phase or "decode"))


def _mean_seconds(problem: Problem, batch: Batch) -> float:
    """Of a step with the plan in force, or contiguous, by the mean loads: as near as weights need it."""
    plan = problem.current
    if plan is None:
        plan = Plan(problem.model, problem.topology, problem.index_order, problem.slot_device)
    load = problem.statistics.total_load
    if not load.any():
        load = np.ones_like(load)
    returning = replace(problem, objective=problem.objective.replace(execution="dispatch_combine", online=0))
    return float(window_seconds(plan, load[None], returning, batch.step_tokens(problem.num_devices))[0])


# Steps of a batch.


def batch_steps(trace: RoutingTrace, phase: Phase, tokens: int, count: int, seed: int) -> Steps:
    """So many steps of recorded tokens."""
    return trace.decode_steps(tokens, count, seed) if phase == "decode" else trace.prefill_steps(tokens, count, seed)


def judged_count(trace: RoutingTrace | None, phase: Phase, tokens: int, most_tokens: int = JUDGED_TOKENS) -> int:
    """Steps of a batch that judge a plan: no more prefill steps than the trace fills, which would only be its sequences
    in another order. trace: None where tokens are drawn."""
    most = min(MOST_STEPS[phase], most_tokens // tokens)
    if phase == "prefill" and trace is not None:
        most = min(most, trace.num_tokens // tokens)
    return max(FEWEST_STEPS, most)


def mixed_steps(parts: Sequence[Steps], mix: StepMix) -> Steps:
    """The steps of each batch of a mix, one after the other: each batch counts by its weight, whatever its steps are in
    number."""
    if len(parts) == 1:
        return replace(parts[0], batch=np.zeros(parts[0].num_steps, np.int64), batches=mix.names())
    return Steps.join(parts, [batch.weight for batch in mix.batches], mix.names())


@check_types
def problem_steps(
    routing: RoutingTrace | RoutingStatistics | Steps,
    problem: Problem,
    *,
    count: int | None = None,
    most_tokens: int = JUDGED_TOKENS,
    seed: int = 0,
) -> Steps:
    """Steps of the problem's batches made of routing, to judge plans on; steps are what they are.

    Args:
        routing: a trace; statistics, whose token sample is used, or where there is none, windows that tokens are drawn
            from (see `sample_steps`); or steps.
        problem: names the batches.
        count: steps of each batch; default 200 of decode and 32 of prefill, fewer where they are large.
        most_tokens: of all steps of a batch, as far as two of them go, where no count is given.
        seed: of the draws.

    Raises:
        InputError: `count` or `most_tokens` below 1.
        UnsupportedError: counts alone and context-coherent execution, which depends on transitions.
    """
    check_range("most_tokens", most_tokens, 1)
    if count is not None:
        check_range("count", count, 1)
    check_seed(seed)
    if isinstance(routing, Steps):
        return routing
    mix = step_mix(problem)
    trace = routing.sample if isinstance(routing, RoutingStatistics) else routing
    trace = trace if trace is not None and trace.num_tokens else None
    parts = []
    for batch in mix.batches:
        tokens = batch.step_tokens(problem.num_devices)
        steps = count or judged_count(trace, batch.phase, tokens, most_tokens)
        if trace is not None:
            parts.append(batch_steps(trace, batch.phase, tokens, steps, seed))
            continue
        assert isinstance(routing, RoutingStatistics)
        if problem.objective.execution == "context_coherent":
            raise UnsupportedError(
                "context-coherent step times depend on transitions, counts tell of none; record tokens"
            )
        parts.append(steps_of_counts(routing, problem.model, tokens, steps, seed))
    return mixed_steps(parts, mix)


def steps_of_counts(statistics: RoutingStatistics, model: ModelSpec, tokens: int, count: int, seed: int) -> Steps:
    """Steps drawn from the windows that hold tokens, each of its window's workload (see `sample_steps`); beside them,
    where the model limits tokens to groups of experts, steps drawn so (`Steps.grouped`)."""
    known = with_tokens(statistics.load)
    load, workload = statistics.load[known], statistics.window_workload[known]
    codes = np.repeat(workload[np.arange(count) * len(load) // count], tokens)

    def drawn(groups: tuple[int, int], *notes: str) -> Steps:
        steps = sample_steps(
            load, model.top_k, statistics.moe_layers, step_tokens=tokens, steps=count, seed=seed, groups=groups
        )
        return replace(steps, workload=codes, workloads=statistics.workloads, notes=notes)

    if not model.limits_groups:
        return drawn((1, 1), COUNTS_ASSUME)
    groups = (model.groups, model.top_groups)
    return replace(drawn((1, 1), COUNTS_ASSUME, grouped_text(model)), grouped=drawn(groups))


def mixed_window_seconds(plan: Plan, load: FloatArray, problem: Problem) -> FloatArray:
    """[S] the seconds of `mixed_window_times`."""
    return mixed_window_times(plan, load, problem).seconds


def mixed_window_times(plan: Plan, load: FloatArray, problem: Problem, grouped: bool = False) -> WindowTimes:
    """[S] means of a step of the problem's batches, for the loads [S, L, E] of each window; see `window_times`."""
    batches = step_mix(problem).batches
    parts = [window_times(plan, load, problem, batch.step_tokens(problem.num_devices), grouped) for batch in batches]
    return WindowTimes(
        *(
            np.asarray(sum(batch.weight * part for batch, part in zip(batches, column, strict=True)))
            for column in zip(*parts, strict=True)
        )
    )


def mixed_window_bound(load: FloatArray, problem: Problem, grouped: bool = False) -> FloatArray:
    """[S] seconds below which no plan for the problem can bring `mixed_window_times`."""
    parts = [
        batch.weight * window_seconds_bound(load, problem, batch.step_tokens(problem.num_devices), grouped)
        for batch in step_mix(problem).batches
    ]
    return np.asarray(sum(parts))


def grouped_text(model: ModelSpec) -> str:
    """What stands beside figures of independent choices, where a model limits tokens to groups of experts."""
    return (
        f"The model takes a token's experts from {model.top_groups} of {model.groups} groups: beside it stands what is "
        "predicted with choices grouped so."
    )


COUNTS_ASSUME = (
    "Counts tell neither which experts a token chose together nor where tokens lie: choices are taken to be "
    "independent, and tokens to be spread evenly over devices."
)


# Steps and tokens sampled from loads or transitions, to replay plans on where no token was recorded.

BLOCK_VALUES = 1 << 21
"""Floats a working array may hold."""
MOST_VALUES = 1 << 32
"""Tokens times layers times experts: more takes minutes to sample."""
PASSES = 4
"""Times a layer is sampled from transitions, with weights corrected by what the last gave too much or too little of."""
SHRINK = 5.0
"""Transitions by which a pair is taken to be nearer to chance: few counts say little, and k of them are multiplied."""

# From loads. What counts cannot tell is assumed as in `window_seconds`: experts of a token are chosen independently of
# each other, of those of other layers, and of other tokens. Unlike there, no expert twice for one token, and steps vary
# as draws do.


@check_types
def sample_steps(
    load: FloatArray,
    top_k: int,
    moe_layers: tuple[int, ...],
    *,
    step_tokens: int,
    steps: int,
    seed: int = 0,
    groups: tuple[int, int] = (1, 1),
) -> Steps:
    """Steps whose experts follow recorded loads; step s those of window s * S // steps.

    In every step and layer the expected load of an expert is its recorded share, up to the most an expert can have, one
    choice of every token (systematic sampling with unequal chances, Madow 1949, in an order drawn for each token).

    Args:
        load: [S, L, E] tokens that chose each expert in each of S windows.
        top_k: experts a token.
        moe_layers: the model's absolute indices of the L layers.
        step_tokens: tokens of each step.
        steps: how many to sample.
        seed: of the draws.
        groups: (H, M) experts stand in H groups, and those of a token are of M of them, as group-limited routing has
            it. Groups are drawn first, by their loads, then experts inside; an expert that groups leave too few choices
            gets as many as they do.

    Raises:
        InputError: load of another shape, a size below 1, fewer experts than `top_k`, groups that do not hold them, or
            more to sample than fits.
    """
    windows, layers, experts = check_shape("load", load, ("S", len(moe_layers), "E")).shape
    if step_tokens < 1 or steps < 1 or not 1 <= top_k <= experts:
        raise InputError(f"cannot sample {steps} steps of {step_tokens} tokens with {top_k} of {experts} experts each")
    if not 1 <= groups[1] <= groups[0] or experts % groups[0] or top_k > groups[1] * experts // groups[0]:
        raise InputError(f"{top_k} of {experts} experts cannot be of {groups[1]} of {groups[0]} groups")
    if steps * step_tokens * layers * experts > MOST_VALUES:
        raise InputError(
            f"{steps} steps of {step_tokens} tokens are too much to sample here; ask for fewer, or smaller ones"
        )
    rng = generator(seed)
    ids = np.empty((steps, step_tokens, layers, top_k), dtype=id_dtype(experts))
    block = max(1, BLOCK_VALUES // experts)
    for step in range(steps):
        for layer in range(layers):
            chance = _inclusion(load[step * windows // steps, layer], top_k)
            for first in range(0, step_tokens, block):
                count = min(block, step_tokens - first)
                each = np.broadcast_to(chance, (count, experts))
                if groups[1] < groups[0]:
                    each = _in_groups(chance, top_k, count, groups, rng)
                ids[step, first : first + count, layer] = _systematic(each, top_k, rng)
    return Steps(
        expert_ids=ids.reshape(-1, layers, top_k),
        offsets=np.arange(steps + 1, dtype=np.int64) * step_tokens,
        num_experts=experts,
        moe_layers=moe_layers,
    )


def _inclusion(load: FloatArray, top_k: int) -> FloatArray:
    """[E] chances that a token chooses each expert, adding up to k, none above 1."""
    total = load.sum()
    chance = np.asarray(load / total if total else np.full(len(load), 1.0 / len(load))) * top_k
    for _ in range(len(load)):
        full = chance >= 1.0
        rest = chance[~full].sum()
        left = top_k - int(full.sum())
        chance = np.where(full, 1.0, chance)
        if left <= 0 or abs(rest - left) < 1e-9:
            break
        # What is above one choice a token, others get, each in its proportion; where there is none, all alike.
        spread = chance * (left / rest) if rest > 0 else np.full(len(load), left / max(1, int((~full).sum())))
        chance = np.where(full, 1.0, spread)
    return np.asarray(np.minimum(chance, 1.0))


def _in_groups(
    chance: FloatArray, top_k: int, tokens: int, groups: tuple[int, int], rng: np.random.Generator
) -> FloatArray:
    """[T, E] chances of each expert for a token, adding up to k, in M of H groups drawn for each token, from the
    chances [E] over all tokens."""
    of_group = chance.reshape(groups[0], -1).sum(axis=1)
    taken = _inclusion(of_group, groups[1])
    drawn = np.zeros((tokens, groups[0]))
    np.put_along_axis(drawn, _systematic(np.broadcast_to(taken, drawn.shape), groups[1], rng), 1.0, axis=1)
    inside = np.repeat(drawn / np.where(taken > 0, taken, 1.0), len(chance) // groups[0], axis=1)
    # What is above one choice a token goes to others of its groups, which have room for it.
    result = np.minimum(inside * chance, 1.0)
    room = np.where(inside > 0, 1.0 - result, 0.0)
    missing = top_k - result.sum(axis=1, keepdims=True)
    return np.asarray(result + room * missing / np.maximum(room.sum(axis=1, keepdims=True), 1e-300))


def _systematic(chance: FloatArray, top_k: int, rng: np.random.Generator) -> IntArray:
    """[T, k] experts, none twice in a token, each with its chance [T, E]; those of a token add up to k."""
    tokens = len(chance)
    order = np.argsort(rng.random(chance.shape), axis=1)
    ends = np.cumsum(np.take_along_axis(chance, order, axis=1), axis=1)
    ends[:, -1] = top_k
    # Expert i of the order is chosen when one of start, start + 1, ... lies in its part of the line.
    passed = np.clip(np.ceil(ends - rng.random((tokens, 1))), 0, top_k)
    chosen = np.diff(passed, axis=1, prepend=0.0) > 0.5
    return np.asarray(order[chosen].reshape(tokens, top_k))


# From transitions, which a context-coherent step is priced on.


@check_types
def sample_tokens(statistics: RoutingStatistics, top_k: int, tokens: int, seed: int = 0) -> RoutingTrace:
    """About `tokens` tokens, each a sequence of its own, dealt to workloads by their recorded loads.

    An expert's chance is its load times, for each expert of the token in the layer before, what the recorded
    transitions of the workload show above or below chance between the two; k are drawn without repetition, and loads
    brought to the recorded ones. With one expert a token that is the recorded Markov chain. With more, the transitions
    of what is drawn come near the recorded ones, while which experts a layer chooses together beyond that, transitions
    do not tell.

    Args:
        statistics: with transitions.
        top_k: experts a token.
        tokens: how many, at least one of every workload that has load.
        seed: of the draws.

    Raises:
        UnsupportedError: the statistics hold no transitions.
        InputError: fewer experts than `top_k`; tokens below 1 or above ten million.
    """
    check_range("tokens", tokens, 1, MOST_TOKENS)
    _ = statistics.total_transitions
    if not 1 <= top_k <= statistics.experts:
        raise InputError(f"top_k ({top_k}) must be from 1 to the number of experts ({statistics.experts})")
    assert statistics.transitions is not None
    rng = generator(seed)
    recorded = statistics.workload_load.sum(axis=(1, 2))
    present = np.flatnonzero(recorded)
    parts, codes = [], []
    for code in present:
        count = max(1, round(tokens * recorded[code] / recorded.sum()))
        parts.append(_walk(statistics.workload_load[code], statistics.transitions[code], top_k, count, rng))
        codes.append(np.full(count, code))
    ids = np.concatenate(parts)
    workload = np.concatenate(codes)
    return RoutingTrace(
        expert_ids=ids.astype(id_dtype(statistics.experts)),
        num_experts=statistics.experts,
        moe_layers=statistics.moe_layers,
        sequence=np.arange(len(ids)),
        position=np.zeros(len(ids), np.int64),
        workload=workload,
        workloads=statistics.workloads,
    )


def _walk(load: FloatArray, transitions: FloatArray, top_k: int, tokens: int, rng: np.random.Generator) -> IntArray:
    """[T, L, k] experts of one workload; load [L, E], transitions [L-1, E, E]."""
    layers, experts = load.shape
    ids = np.empty((tokens, layers, top_k), dtype=np.int64)
    for layer in range(layers):
        total = load[layer].sum()
        target = load[layer] / total if total else np.full(experts, 1.0 / experts)
        lift = np.zeros((experts, experts)) if layer == 0 else _log_lift(transitions[layer - 1])
        before = ids[:, layer - 1] if layer else np.tile(np.arange(top_k), (tokens, 1))
        weight = target.copy()
        for _ in range(PASSES):
            drawn = _distinct(weight, lift, before, rng)
            share = np.bincount(drawn.ravel(), minlength=experts) / drawn.size
            weight = weight * np.where(share > 0, target / np.where(share > 0, share, 1.0), 1.0)
        ids[:, layer] = drawn
    return ids


def _log_lift(transitions: FloatArray) -> FloatArray:
    """[E, E] logarithm of transitions over what they were if the two layers had nothing to do with each other."""
    total = max(float(transitions.sum()), 1e-300)
    chance = transitions.sum(axis=1, keepdims=True) * transitions.sum(axis=0) / total
    return np.asarray(np.log((transitions + SHRINK) / (chance + SHRINK)))


def _distinct(weight: FloatArray, lift: FloatArray, before: IntArray, rng: np.random.Generator) -> IntArray:
    """[T, k] experts by weight [E] and the lifts [E, E] of before [T, k], none twice in a token, the likeliest first.

    The k largest of log chance plus Gumbel noise are draws without replacement (Gumbel 1954; Yellott 1977).
    """
    tokens, top_k = before.shape
    experts = len(weight)
    with np.errstate(divide="ignore"):
        # An expert of no chance is taken only where all of some chance are.
        base = np.maximum(np.log(weight), -1e3)
    result = np.empty((tokens, top_k), dtype=np.int64)
    block = max(1, BLOCK_VALUES // experts)
    for first in range(0, tokens, block):
        some = before[first : first + block]
        chosen = np.zeros((len(some), experts))
        np.put_along_axis(chosen, some, 1.0, axis=1)
        score = base + chosen @ lift
        largest = np.argpartition(score + rng.gumbel(size=score.shape), experts - top_k, axis=1)[:, experts - top_k :]
        order = np.argsort(-np.take_along_axis(score, largest, axis=1), axis=1, kind="stable")
        result[first : first + block] = np.take_along_axis(largest, order, axis=1)
    return result
