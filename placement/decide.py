"""Keep the plan in force, or apply a candidate? A paired bootstrap on held-out routing, with the migration charged."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .._arguments import check_types
from .._deprecated import old_listener, renamed_argument
from .._display import Displayed, data_size
from .._types import FloatArray, IntArray
from .cost import window_seconds
from .engines import check_plan
from .errors import InputError, UnsupportedError
from .evaluate import evaluate
from .migration import Migration, migration
from .plan import Plan
from .problem import Problem
from .progress import Listener, Progress
from .risk import best_by_workload, risk_value, workload_means
from .statistics import RoutingStatistics, window_weights, with_tokens
from .steps import Steps
from .trace import RoutingTrace

RESAMPLED_STEPS = 50
"""Steps built from each draw of sequences: beyond these, the sequences drawn and not the steps decide the figure."""
LEAST_BLOCKS, BLOCK = 4, 4
"""Blocks of count windows that can be judged on, and windows a block where there are many."""


@dataclass(frozen=True)
class Verdict:
    """One candidate against the plan in force, in seconds of the objective's figure a step.

    gain: saved on all held-out routing. gain_low, gain_high: ends of its confidence interval. payback_steps: steps
    until the gain has paid the migration's stall, and at the interval's lower end (infinite where that end is not
    positive).
    """

    current: float
    candidate: float
    gain: float
    gain_low: float
    gain_high: float
    migration: Migration
    payback_steps: float
    payback_steps_high: float


@dataclass(frozen=True, repr=False)
class Decision(Displayed):
    """keep, or apply candidate number `chosen`, and why; a verdict for each candidate."""

    action: Literal["keep", "apply"]
    chosen: int | None
    reason: str
    verdicts: tuple[Verdict, ...]
    confidence: float
    horizon_steps: float

    def _summary(self) -> tuple[str, dict[str, str]]:
        rows = {"why": self.reason}
        for number, verdict in enumerate(self.verdicts):
            rows[f"candidate {number}"] = (
                f"{verdict.candidate * 1e3:.4g} ms a step against {verdict.current * 1e3:.4g}, saves "
                f"{verdict.gain * 1e3:.3g} ms ({verdict.gain_low * 1e3:.3g} to {verdict.gain_high * 1e3:.3g}); moves "
                f"{data_size(verdict.migration.bytes_moved)}, pays back in {verdict.payback_steps:,.0f} steps"
            )
        title = "keep the plan in force" if self.chosen is None else f"apply candidate {self.chosen}"
        return f"{title}, at confidence {self.confidence:g}", rows


@renamed_argument("held", "held_out")
@check_types
def decide(
    current: Plan,
    candidates: Sequence[Plan],
    held_out: RoutingTrace | Steps | RoutingStatistics,
    problem: Problem,
    *,
    concurrency: int = 128,
    resamples: int = 200,
    confidence: float = 0.95,
    horizon_steps: float = 100_000.0,
    bytes_per_expert: float | None = None,
    seed: int = 0,
    progress: Listener | None = None,
) -> Decision:
    """Judges candidates on held-out routing; keeping is always one of the choices.

    Args:
        current: the plan in force.
        candidates: at least one plan of the same model on as many devices.
        held_out: a trace, whose sequences are drawn with replacement `resamples` times, each draw made into decode
            steps of `concurrency` tokens that all plans replay (tokens of a sequence are alike: sequences, not steps,
            are independent); or steps, which are then taken to be independent draws themselves; or statistics, whose
            count windows are judged on as `decide_on_counts` does.
        problem: gives the model, topology and objective.
        concurrency: tokens of a decode step made from a trace, or of a step priced on counts.
        resamples: draws.
        confidence: of the intervals, one-sided at their lower end, shared among the candidates (Bonferroni).
        horizon_steps: for how many steps the choice is expected to stand. A candidate is applied when the lower end of
            its gain is positive and pays the migration back within them; of several, the one that saves most.
        bytes_per_expert: what travels an expert; default its weights.
        seed: of the draws.
        progress: called after each draw with a `Progress` of the draws done and their number.

    Raises:
        InputError: no candidate, a level out of range, too few resamples for it, plans of another model or cluster,
            counts of another model or of too few windows.
        UnsupportedError: the problem's engine cannot run a candidate, or counts and context-coherent execution.
    """
    if isinstance(held_out, RoutingStatistics):
        model = problem.model
        if held_out.moe_layers != model.moe_layers or held_out.top_k not in (None, model.top_k):
            raise InputError(
                f"held-out counts are of layers {held_out.moe_layers} and top {held_out.top_k}, the problem's model "
                f"has {model.moe_layers} and top {model.top_k}"
            )
        return decide_on_counts(
            current,
            candidates,
            held_out.load,
            problem,
            step_tokens=concurrency,
            workload=held_out.window_workload,
            block=count_block(held_out.load),
            resamples=resamples,
            confidence=confidence,
            horizon_steps=horizon_steps,
            bytes_per_expert=bytes_per_expert,
            seed=seed,
        )
    check_levels(len(candidates), resamples, confidence, horizon_steps)
    _check_engine(candidates, problem)
    moves = [migration(current, plan, bytes_per_expert) for plan in candidates]
    listener = old_listener(progress, ("done",), "decide")
    figures = _figures([current, *candidates], held_out, problem, concurrency, resamples, seed, listener)
    return conclude(figures, moves, confidence, horizon_steps)


def _check_engine(candidates: Sequence[Plan], problem: Problem) -> None:
    for number, plan in enumerate(candidates):
        if problem.engine is not None:
            try:
                check_plan(plan, problem.engine)
            except UnsupportedError as error:
                raise UnsupportedError(f"candidate {number}: {error}") from None


def check_levels(candidates: int, resamples: int, confidence: float, horizon_steps: float) -> None:
    """Raises InputError for no candidate, a level out of range, or too few resamples for it."""
    if not candidates:
        raise InputError("decide needs at least one candidate plan")
    if not 0.5 <= confidence < 1.0:
        raise InputError(f"confidence ({confidence}) must be at least 0.5 and below 1")
    if not horizon_steps > 0:
        raise InputError(f"horizon_steps ({horizon_steps}) must be positive")
    tail = (1.0 - confidence) / candidates
    if resamples * tail < 1.0:
        raise InputError(
            f"resamples ({resamples}) are too few for {candidates} candidates at confidence {confidence}; "
            f"at least {int(np.ceil(1.0 / tail))} are needed"
        )


def conclude(figures: FloatArray, moves: Sequence[Migration], confidence: float, horizon_steps: float) -> Decision:
    """Keep or apply, from figures of plans.

    Args:
        figures: [1 + candidates, 1 + resamples] the objective's figure of each plan, the one in force first, on
            everything and then on each draw.
        moves: what going to each candidate moves.
        confidence: as in `decide`.
        horizon_steps: as in `decide`.
    """
    tail = (1.0 - confidence) / len(moves)
    verdicts = tuple(_verdict(figures[0], figures[i + 1], moves[i], tail) for i in range(len(moves)))
    saved = [verdict.gain_low * horizon_steps - verdict.migration.seconds for verdict in verdicts]
    best = int(np.argmax(saved))
    chosen = best if saved[best] > 0 and verdicts[best].gain_low > 0 else None
    return Decision(
        action="keep" if chosen is None else "apply",
        chosen=chosen,
        reason=_reason(verdicts[best], chosen is not None, confidence, horizon_steps),
        verdicts=verdicts,
        confidence=confidence,
        horizon_steps=horizon_steps,
    )


def _figures(
    plans: Sequence[Plan],
    held_out: RoutingTrace | Steps,
    problem: Problem,
    concurrency: int,
    resamples: int,
    seed: int,
    progress: Listener | None,
) -> FloatArray:
    """[plans, 1 + resamples] the objective's figure of each plan, on all of `held_out` and then on each draw."""
    began = time.perf_counter()
    rng = np.random.default_rng(seed)
    steps = held_out if isinstance(held_out, Steps) else held_out.decode_steps(concurrency, steps=200, seed=seed)
    whole = [evaluate(plan, steps, problem) for plan in plans]
    # Regret compares with each workload's best plan at hand.
    best = best_by_workload([e.step_seconds for e in whole], steps.step_workload, len(steps.workloads))
    result = np.empty((len(plans), resamples + 1))
    result[:, 0] = [evaluation.risk(best) for evaluation in whole]
    for draw in range(1, resamples + 1):
        if isinstance(held_out, Steps):
            chosen = rng.integers(steps.num_steps, size=steps.num_steps)
            result[:, draw] = [
                risk_value(e.step_seconds[chosen], e.step_workload[chosen], problem.objective, best) for e in whole
            ]
        else:
            drawn = _redraw_sequences(held_out, rng).decode_steps(concurrency, RESAMPLED_STEPS, seed + draw)
            result[:, draw] = [evaluate(plan, drawn, problem).risk(best) for plan in plans]
        if progress is not None:
            progress(Progress(time.perf_counter() - began, message="draws replayed", done=draw, total=resamples))
    return result


def _redraw_sequences(trace: RoutingTrace, rng: np.random.Generator) -> RoutingTrace:
    """As many whole sequences as the trace has, drawn with replacement; a repeated one counts as another sequence."""
    order = np.argsort(trace.sequence, kind="stable")
    _, starts, lengths = np.unique(trace.sequence[order], return_index=True, return_counts=True)
    chosen = rng.integers(len(starts), size=len(starts))
    tokens = np.concatenate([order[starts[i] : starts[i] + lengths[i]] for i in chosen])
    return replace(trace.select(tokens), sequence=np.repeat(np.arange(len(chosen)), lengths[chosen]))


def _verdict(current: FloatArray, candidate: FloatArray, moved: Migration, tail: float) -> Verdict:
    gains = current - candidate
    low, high = np.quantile(gains[1:], [tail, 1.0 - tail])
    gain = float(gains[0])
    # Where the draws lie above the figure on everything, believe the smaller of the two.
    low = min(float(low), gain)
    return Verdict(
        current=float(current[0]),
        candidate=float(candidate[0]),
        gain=gain,
        gain_low=low,
        gain_high=max(float(high), gain),
        migration=moved,
        payback_steps=moved.seconds / gain if gain > 0 else float("inf"),
        payback_steps_high=moved.seconds / low if low > 0 else float("inf"),
    )


def _reason(verdict: Verdict, applied: bool, confidence: float, horizon: float) -> str:
    gain = verdict.gain / verdict.current
    low, high = verdict.gain_low / verdict.current, verdict.gain_high / verdict.current
    measured = f"saves {gain:.2%} of the figure ({confidence:.0%} interval {low:.2%} to {high:.2%})"
    cost = f"moving {verdict.migration.bytes_moved / 1e9:.2f} GB takes {verdict.migration.seconds:.3g} s"
    if applied:
        return f"{measured}; {cost}, paid back within {verdict.payback_steps_high:,.0f} steps"
    if verdict.gain_low <= 0:
        return f"no candidate is proven better: the best {measured}"
    return f"the best candidate {measured}, but {cost}, not paid back within {horizon:,.0f} steps"


# Judged on count windows: what `decide` is for tokens.


def count_block(load: FloatArray, longest: int = BLOCK) -> int:
    """Neighbouring windows of loads [S, L, E] to draw together: `longest`, or fewer where few windows hold tokens."""
    return max(1, min(longest, int(with_tokens(load).sum()) // LEAST_BLOCKS))


def decide_on_counts(
    current: Plan,
    candidates: Sequence[Plan],
    load: FloatArray,
    problem: Problem,
    *,
    step_tokens: int,
    workload: IntArray | None = None,
    block: int = BLOCK,
    resamples: int = 400,
    confidence: float = 0.95,
    horizon_steps: float = 100_000.0,
    bytes_per_expert: float | None = None,
    seed: int = 0,
) -> Decision:
    """Judges candidates on held-out count windows, priced by `window_seconds`.

    Windows count by the tokens they hold, those without any not at all (see `window_weights`). Draws are of blocks of
    neighbouring windows with replacement, since neighbours are alike (Kuensch 1989).

    Args:
        current: the plan in force.
        candidates: at least one plan of the same model on as many devices.
        load: [S, L, E] tokens that chose each expert in held-out windows, in time order.
        problem: gives the model, topology and objective.
        step_tokens: tokens of a step, over all devices.
        workload: [S] codes of the windows' workloads; default one for all.
        block: neighbouring windows drawn together.
        resamples: draws.
        confidence: as in `decide`.
        horizon_steps: as in `decide`.
        bytes_per_expert: as in `decide`.
        seed: of the draws.

    Raises:
        InputError: fewer than 4 blocks of windows with tokens, a level out of range, plans of another model or cluster.
    """
    check_levels(len(candidates), resamples, confidence, horizon_steps)
    _check_engine(candidates, problem)
    known = with_tokens(load)
    load, codes = load[known], np.zeros(int(known.sum()), np.int64) if workload is None else workload[known]
    count = len(load) // block
    if count < LEAST_BLOCKS:
        raise InputError(
            f"{len(load)} held-out windows with tokens make {count} blocks of {block}; at least "
            f"{LEAST_BLOCKS} are needed to judge on"
        )
    moves = [migration(current, plan, bytes_per_expert) for plan in candidates]
    newest = slice(len(load) - count * block, None)
    judged, codes = load[newest], codes[newest]
    seconds = np.stack([window_seconds(plan, judged, problem, step_tokens) for plan in (current, *candidates)])
    compared = problem.objective.risk in ("worst_workload", "regret")
    weight = window_weights(judged, codes if compared else None).sum(axis=1)
    best = np.zeros(int(codes.max()) + 1)
    best[np.unique(codes)] = np.min([workload_means(row, codes, weight)[1] for row in seconds], axis=0)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(count, size=(resamples, count))[:, :, None] * block + np.arange(block)).reshape(resamples, -1)
    figures = np.array(
        [
            [
                risk_value(row[chosen], codes[chosen], problem.objective, best, weight[chosen])
                for chosen in (np.arange(len(judged)), *draws)
            ]
            for row in seconds
        ]
    )
    return conclude(figures, moves, confidence, horizon_steps)
