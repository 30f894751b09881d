"""Which steps a problem is about, and how they are made of routing: read by all that solve, judge or decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from .._types import FloatArray
from .bounds import window_seconds_bound
from .cost import WindowTimes, window_seconds, window_times
from .errors import UnsupportedError
from .model import ModelSpec
from .plan import Plan
from .problem import Problem
from .statistics import RoutingStatistics, with_tokens
from .steps import USUAL_BATCHES, Batch, Phase, Steps
from .synthetic import sample_steps
from .trace import RoutingTrace

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
        UnsupportedError: counts alone and context-coherent execution, which depends on transitions.
    """
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
