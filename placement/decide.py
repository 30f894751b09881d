"""Keep the plan in force, or apply a candidate? A paired bootstrap on held-out routing, with the migration charged; and
what one plan saves against another, in a sentence."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .._arguments import check_types
from .._deprecated import old_listener, renamed_argument
from .._display import Displayed, data_size
from .._types import FloatArray, IntArray
from .bounds import step_seconds_bound, with_room
from .engines import EngineProfile, check_plan
from .errors import InputError, UnsupportedError
from .evaluate import Evaluation, evaluate
from .migration import Migration, migration
from .objective import best_by_workload, risk_value, weighted_mean
from .plan import Plan
from .problem import Problem
from .progress import Listener, Progress
from .statistics import RoutingStatistics, window_weights, with_tokens
from .step_mix import mixed_window_bound, mixed_window_times, problem_steps
from .steps import PHASES, Batch, Steps
from .trace import RoutingTrace
from .validation import generator

WORTH_IT = 0.01
"""Of the time: what saves less is not worth a change."""
RESAMPLED_TOKENS = 16_384
"""Of the steps of each batch built from a draw of sequences: beyond these, the sequences drawn and not the steps decide
the figure."""
LEAST_BLOCKS, BLOCK = 4, 4
"""Blocks of count windows that can be judged on, and windows a block where there are many."""


@dataclass(frozen=True)
class Verdict:
    """One candidate against the plan in force, in seconds of the objective's figure a step.

    gain: saved on all held-out routing. gain_low, gain_high: ends of its confidence interval. payback_steps: steps
    until the gain has paid the migration's stall, and at the interval's lower end (infinite where that end is not
    positive); None where the stall is not known. current_ideal_share, ideal_share: of the force-balanced ideal (see
    `Evaluation.ideal_share`), of the plan in force and of the candidate. gain_grouped: saved if a token's experts are
    of as few groups as the model limits them to, where counts do not tell; the interval spans both answers.
    """

    current: float
    candidate: float
    gain: float
    gain_low: float
    gain_high: float
    migration: Migration
    payback_steps: float | None
    payback_steps_high: float | None
    current_ideal_share: float
    ideal_share: float
    gain_grouped: float | None = None


@dataclass(frozen=True, repr=False)
class Decision(Displayed):
    """keep, or apply candidate number `chosen`, and why; a verdict for each candidate. most: part of the figure in
    force that no plan can save more than with as many slots as any of these plans has, where it is known."""

    action: Literal["keep", "apply"]
    chosen: int | None
    reason: str
    verdicts: tuple[Verdict, ...]
    confidence: float
    horizon_steps: float
    most: float | None = None

    def _summary(self) -> tuple[str, dict[str, str]]:
        rows = {"why": self.reason}
        for number, verdict in enumerate(self.verdicts):
            back = "an unknown number of" if verdict.payback_steps is None else f"{verdict.payback_steps:,.0f}"
            rows[f"candidate {number}"] = (
                f"{verdict.candidate * 1e3:.4g} ms a step against {verdict.current * 1e3:.4g}, saves "
                f"{verdict.gain * 1e3:.3g} ms ({verdict.gain_low * 1e3:.3g} to {verdict.gain_high * 1e3:.3g}); moves "
                f"{data_size(verdict.migration.bytes_moved)}, pays back in {back} steps"
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
    concurrency: int | None = None,
    resamples: int = 200,
    confidence: float = 0.95,
    horizon_steps: float = 100_000.0,
    bytes_per_expert: float | None = None,
    restart_seconds: float | None = None,
    seed: int = 0,
    progress: Listener | None = None,
) -> Decision:
    """Judges candidates on held-out routing; keeping is always one of the choices.

    Args:
        current: the plan in force.
        candidates: at least one plan of the same model on as many devices.
        held_out: a trace, whose sequences are drawn with replacement `resamples` times, each draw made into steps of
            the problem's batches that all plans replay (tokens of a sequence are alike: sequences, not steps, are
            independent); or steps, which are then taken to be independent draws themselves; or statistics, whose count
            windows are judged on as `decide_on_counts` does.
        problem: gives the model, topology, objective and batches.
        concurrency: in place of the problem's batches, decode steps of so many tokens over all devices.
        resamples: draws.
        confidence: of the intervals, one-sided at their lower end, shared among the candidates (Bonferroni).
        horizon_steps: for how many steps the choice is expected to stand. A candidate is applied when the lower end of
            its gain is positive and pays the migration back within them; of several, the one that saves most.
        bytes_per_expert: what travels an expert; default its weights.
        restart_seconds: in which nothing is served, where the problem's engine takes a plan only when it is started
            anew (`EngineProfile.restart`): charged in place of the moves. Where that is not given, nothing is charged
            and the reason says so.
        seed: of the draws.
        progress: called after each draw with a `Progress` of the draws done and their number.

    Raises:
        InputError: no candidate, a level out of range, too few resamples for it, plans of another model or cluster,
            counts of another model or of too few windows.
        UnsupportedError: the problem's engine cannot run a candidate, or counts and context-coherent execution.
    """
    if concurrency is not None:
        problem = replace(problem, batches=(Batch("decode", tokens=concurrency),))
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
            workload=held_out.window_workload,
            block=count_block(held_out.load),
            resamples=resamples,
            confidence=confidence,
            horizon_steps=horizon_steps,
            bytes_per_expert=bytes_per_expert,
            restart_seconds=restart_seconds,
            seed=seed,
        )
    check_levels(len(candidates), resamples, confidence, horizon_steps)
    _check_engine(candidates, problem)
    moves = _moves(current, candidates, problem, bytes_per_expert, restart_seconds)
    problem = replace(problem, current=current)
    listener = old_listener(progress, ("done",), "decide")
    steps = problem_steps(held_out, problem, seed=seed)
    whole = [evaluate(plan, steps, problem) for plan in (current, *candidates)]
    figures = _figures([current, *candidates], whole, held_out, steps, problem, resamples, seed, listener)
    most = None
    if (roomy := _bounding(problem, (current, *candidates))) is not None:
        most = _most(_risk_of(step_seconds_bound(steps, roomy), steps, problem), figures)
    shares = [evaluation.ideal_share for evaluation in whole]
    return conclude(figures, moves, shares, confidence, horizon_steps, most)


def _moves(
    current: Plan,
    candidates: Sequence[Plan],
    problem: Problem,
    bytes_per_expert: float | None,
    restart_seconds: float | None,
) -> list[Migration]:
    """To each candidate, as the problem's engine takes it."""
    if restart_seconds is not None and not 0 <= restart_seconds < np.inf:
        raise InputError(f"restart_seconds ({restart_seconds}) must be at least 0 and finite")
    restart = "" if problem.profile is None else problem.profile.restart
    return [migration(current, plan, bytes_per_expert).applied_by(restart, restart_seconds) for plan in candidates]


def _bounding(problem: Problem, plans: Sequence[Plan]) -> Problem | None:
    """The problem whose bounds hold for the plans; None where there is none."""
    # Regret has no bound without each workload's own best plan.
    return None if problem.objective.risk == "regret" else with_room(problem, plans)


def _most(least: float, figures: FloatArray) -> float:
    """Part of the figure in force that is saved where it falls to `least`."""
    return max(0.0, 1.0 - least / float(figures[0, 0]))


def _check_engine(candidates: Sequence[Plan], problem: Problem) -> None:
    for number, plan in enumerate(candidates):
        if problem.engine is not None:
            try:
                check_plan(plan, problem.engine)
            except UnsupportedError as error:
                raise UnsupportedError(f"candidate {number}: {error}") from None


MOST_RESAMPLES = 100_000


def check_levels(candidates: int, resamples: int, confidence: float, horizon_steps: float) -> None:
    """Raises InputError for no candidate, a level out of range, or too few resamples for it."""
    if not candidates:
        raise InputError("decide needs at least one candidate plan")
    if not 0.5 <= confidence < 1.0:
        raise InputError(f"confidence ({confidence}) must be at least 0.5 and below 1")
    if not horizon_steps > 0:
        raise InputError(f"horizon_steps ({horizon_steps}) must be positive")
    if resamples > MOST_RESAMPLES:
        raise InputError(f"resamples ({resamples}) must be at most {MOST_RESAMPLES}: intervals stand long before")
    tail = (1.0 - confidence) / candidates
    if resamples * tail < 1.0:
        raise InputError(
            f"resamples ({resamples}) are too few for {candidates} candidates at confidence {confidence}; "
            f"at least {int(np.ceil(1.0 / tail))} are needed"
        )


def conclude(
    figures: FloatArray,
    moves: Sequence[Migration],
    shares: Sequence[float],
    confidence: float,
    horizon_steps: float,
    most: float | None = None,
    grouped: FloatArray | None = None,
) -> Decision:
    """Keep or apply, from figures of plans.

    Args:
        figures: [1 + candidates, 1 + resamples] the objective's figure of each plan, the one in force first, on
            everything and then on each draw.
        moves: what going to each candidate moves.
        shares: [1 + candidates] of the force-balanced ideal.
        confidence: as in `decide`.
        horizon_steps: as in `decide`.
        most: part of the figure in force that no plan can save more than, where it is known.
        grouped: `figures` under the other thing that counts allow (see `Verdict`), where there is one.
    """
    tail = (1.0 - confidence) / len(moves)
    verdicts = tuple(
        _verdict(
            figures[[0, i + 1]],
            None if grouped is None else grouped[[0, i + 1]],
            moves[i],
            (shares[0], shares[i + 1]),
            tail,
        )
        for i in range(len(moves))
    )
    saved = [verdict.gain_low * horizon_steps - (verdict.migration.stall or 0.0) for verdict in verdicts]
    best = int(np.argmax(saved))
    chosen = best if saved[best] > 0 and verdicts[best].gain_low > 0 else None
    return Decision(
        action="keep" if chosen is None else "apply",
        chosen=chosen,
        reason=_reason(verdicts[best], chosen is not None, confidence, horizon_steps, most),
        verdicts=verdicts,
        confidence=confidence,
        horizon_steps=horizon_steps,
        most=most,
    )


def _risk_of(seconds: FloatArray, steps: Steps, problem: Problem) -> float:
    return risk_value(seconds, steps.step_workload, problem.objective, None, steps.weight, steps.batch)


def _figures(
    plans: Sequence[Plan],
    whole: Sequence[Evaluation],
    held_out: RoutingTrace | Steps,
    steps: Steps,
    problem: Problem,
    resamples: int,
    seed: int,
    progress: Listener | None,
) -> FloatArray:
    """[plans, 1 + resamples] the objective's figure of each plan, on all of `held_out` (`whole`) and on each draw."""
    began = time.perf_counter()
    rng = generator(seed)
    # Regret compares with each workload's best plan at hand.
    best = best_by_workload([e.step_seconds for e in whole], steps.step_workload, len(steps.workloads), steps.weight)
    result = np.empty((len(plans), resamples + 1))
    result[:, 0] = [evaluation.risk(best) for evaluation in whole]
    for draw in range(1, resamples + 1):
        if isinstance(held_out, Steps):
            chosen = _redraw_steps(steps, rng)
            result[:, draw] = [e.select(chosen).risk(best) for e in whole]
        else:
            drawn = problem_steps(
                _redraw_sequences(held_out, rng), problem, most_tokens=RESAMPLED_TOKENS, seed=seed + draw
            )
            result[:, draw] = [evaluate(plan, drawn, problem).risk(best) for plan in plans]
        if progress is not None:
            progress(Progress(time.perf_counter() - began, message="draws replayed", done=draw, total=resamples))
    return result


def _redraw_steps(steps: Steps, rng: np.random.Generator) -> IntArray:
    """As many steps of each batch as there are, drawn with replacement."""
    if steps.batch is None:
        return rng.integers(steps.num_steps, size=steps.num_steps)
    by_batch = [np.flatnonzero(steps.batch == code) for code in np.unique(steps.batch)]
    return np.concatenate([rng.choice(mine, len(mine)) for mine in by_batch])


def _redraw_sequences(trace: RoutingTrace, rng: np.random.Generator) -> RoutingTrace:
    """As many whole sequences as the trace has, drawn with replacement; a repeated one counts as another sequence."""
    order = np.argsort(trace.sequence, kind="stable")
    _, starts, lengths = np.unique(trace.sequence[order], return_index=True, return_counts=True)
    chosen = rng.integers(len(starts), size=len(starts))
    tokens = np.concatenate([order[starts[i] : starts[i] + lengths[i]] for i in chosen])
    return replace(trace.select(tokens), sequence=np.repeat(np.arange(len(chosen)), lengths[chosen]))


def _verdict(
    figures: FloatArray, grouped: FloatArray | None, moved: Migration, shares: tuple[float, float], tail: float
) -> Verdict:
    """figures, grouped: [2, 1 + resamples] of the plan in force and of the candidate."""
    gains = [of[0] - of[1] for of in (figures, grouped) if of is not None]
    ends = [np.quantile(draws[1:], [tail, 1.0 - tail]) for draws in gains]
    gain, every = float(gains[0][0]), [float(draws[0]) for draws in gains]
    # Where the draws lie above the figure on everything, believe the smaller of the two.
    low, high = min(float(min(end[0] for end in ends)), *every), max(float(max(end[1] for end in ends)), *every)
    stall = moved.stall

    def payback(saved: float) -> float | None:
        return None if stall is None else stall / saved if saved > 0 else float("inf")

    return Verdict(
        current=float(figures[0, 0]),
        candidate=float(figures[1, 0]),
        gain=gain,
        gain_low=low,
        gain_high=high,
        migration=moved,
        payback_steps=payback(gain),
        payback_steps_high=payback(low),
        gain_grouped=None if grouped is None else every[1],
        current_ideal_share=shares[0],
        ideal_share=shares[1],
    )


def _reason(verdict: Verdict, applied: bool, confidence: float, horizon: float, most: float | None) -> str:
    gain = verdict.gain / verdict.current
    low, high = verdict.gain_low / verdict.current, verdict.gain_high / verdict.current
    measured = f"saves {gain:.2%} of the MoE step time ({confidence:.0%} interval {low:.2%} to {high:.2%}"
    if verdict.gain_grouped is not None:
        measured += f", which spans {verdict.gain_grouped / verdict.current:.2%} with a token's experts grouped"
    measured += ")"
    beaten = "" if most is None else f"; no plan can save more than {most:.2%}"
    cost = verdict.migration.text
    if applied and verdict.payback_steps_high is None:
        return f"{measured}; {cost}; {1.0 / verdict.gain_low:,.0f} steps pay back a second of it{beaten}"
    if applied:
        return f"{measured}; {cost}, paid back within {verdict.payback_steps_high:,.0f} steps{beaten}"
    if most is not None and most < WORTH_IT:
        return f"at these batches no plan saves more than {most:.2%}: leave it; the best candidate {measured}"
    if verdict.gain_low <= 0:
        return f"no candidate is proven better: the best {measured}{beaten}"
    return f"the best candidate {measured}, but {cost}, not paid back within {horizon:,.0f} steps{beaten}"


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
    step_tokens: int | None = None,
    workload: IntArray | None = None,
    block: int = BLOCK,
    resamples: int = 400,
    confidence: float = 0.95,
    horizon_steps: float = 100_000.0,
    bytes_per_expert: float | None = None,
    restart_seconds: float | None = None,
    seed: int = 0,
) -> Decision:
    """Judges candidates on held-out count windows, priced by `window_seconds`.

    Where the model limits a token to groups of experts, windows are priced twice, choices independent and grouped, and
    intervals span both answers.

    Windows count by the tokens they hold, those without any not at all (see `window_weights`). Draws are of blocks of
    neighbouring windows with replacement, since neighbours are alike (Kuensch 1989).

    Args:
        current: the plan in force.
        candidates: at least one plan of the same model on as many devices.
        load: [S, L, E] tokens that chose each expert in held-out windows, in time order.
        problem: gives the model, topology, objective and batches.
        step_tokens: tokens of a step, over all devices, in place of the problem's batches.
        workload: [S] codes of the windows' workloads; default one for all.
        block: neighbouring windows drawn together.
        resamples: draws.
        confidence: as in `decide`.
        horizon_steps: as in `decide`.
        bytes_per_expert: as in `decide`.
        restart_seconds: as in `decide`.
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
    moves = _moves(current, candidates, problem, bytes_per_expert, restart_seconds)
    problem = replace(problem, current=current)
    newest = slice(len(load) - count * block, None)
    judged, codes = load[newest], codes[newest]
    if step_tokens is not None:
        problem = replace(problem, batches=(Batch("decode", tokens=step_tokens),))
    plans = (current, *candidates)
    times = [mixed_window_times(plan, judged, problem) for plan in plans]
    compared = problem.objective.risk in ("worst_workload", "regret")
    weight = window_weights(judged, codes if compared else None).sum(axis=1)
    rng = generator(seed)
    draws = (rng.integers(count, size=(resamples, count))[:, :, None] * block + np.arange(block)).reshape(resamples, -1)

    def figures_of(seconds: Sequence[FloatArray]) -> FloatArray:
        best = best_by_workload(seconds, codes, int(codes.max()) + 1, weight)
        chosen_in = (np.arange(len(judged)), *draws)
        return np.array(
            [
                [
                    risk_value(row[chosen], codes[chosen], problem.objective, best, weight[chosen])
                    for chosen in chosen_in
                ]
                for row in seconds
            ]
        )

    roomy, mosts = _bounding(problem, plans), []

    def bounded(figures: FloatArray, grouped: bool) -> FloatArray:
        if roomy is not None:
            bound = mixed_window_bound(judged, roomy, grouped)
            mosts.append(_most(risk_value(bound, codes, problem.objective, None, weight), figures))
        return figures

    figures = bounded(figures_of([of_plan.seconds for of_plan in times]), False)
    grouped = None
    if problem.model.limits_groups:
        seconds = [mixed_window_times(plan, judged, problem, grouped=True).seconds for plan in plans]
        grouped = bounded(figures_of(seconds), True)
    by_tokens = window_weights(judged).sum(axis=1)
    shares = [float(by_tokens @ of_plan.ideal / (by_tokens @ of_plan.seconds)) for of_plan in times]
    return conclude(figures, moves, shares, confidence, horizon_steps, max(mosts, default=None), grouped)


# How much less time one plan takes than another, how sure that is, and what no plan can beat, in a sentence.

LEVEL, DEVIATIONS = 0.95, 1.96
"""Of intervals, and the standard deviations of a normal distribution they reach to either side."""


@dataclass(frozen=True)
class Saving:
    """Of a plan against another, as parts of the other's mean step time.

    relative: saved on the steps judged on. low, high: its interval at `level`. most: what no plan can save more than,
    where that is known. times: (this plan's, the other's) mean seconds on the steps of each batch, by its name.
    seconds: saved a step. grouped: saved if a token's experts are of as few groups as the model limits them to, where
    counts do not tell; the interval spans both answers.
    """

    relative: float
    low: float
    high: float
    most: float | None
    times: Mapping[str, tuple[float, float]]
    seconds: float = 0.0
    grouped: float | None = None
    level: float = LEVEL

    @property
    def nothing_pays(self) -> bool:
        """Whether no plan is worth a change."""
        return self.most is not None and self.most < WORTH_IT

    def text(self, reference: str, where: str = "held-out steps") -> str:
        """A sentence. reference: what the other plan is called, after "than"; where: the steps judged on."""
        return sentence(self.relative, self.low, self.high, self.most, self.level, reference, where, self.grouped)

    def to_dict(self, reference: str, where: str = "held-out steps") -> dict[str, object]:
        """As JSON has it."""
        return {
            "than": reference,
            "saves": self.relative,
            "low": self.low,
            "high": self.high,
            "grouped": self.grouped,
            "confidence": self.level,
            "most": self.most,
            "text": self.text(reference, where),
        }


def saving(evaluation: Evaluation, reference: Evaluation, steps: Steps, problem: Problem | None) -> Saving:
    """What one evaluation saves against another, on the same steps.

    The interval is of the mean difference of a step (normal approximation), as of so many steps as are independent:
    those that share sequences are not (`Steps.worth`). problem: whose bounds hold for both plans, where there is one.

    Raises:
        InputError: the evaluations are not of these steps.
    """
    if len(evaluation.tokens) != steps.num_steps or len(reference.tokens) != steps.num_steps:
        raise InputError(
            f"saving: evaluations of {len(evaluation.tokens)} and {len(reference.tokens)} steps, given "
            f"{steps.num_steps}; evaluate both plans on these steps"
        )
    base = reference.mean_seconds
    less = (reference.step_seconds - evaluation.step_seconds) / base
    weight, error = steps.step_weight, 0.0
    for code in np.unique(batch := np.zeros(steps.num_steps, np.int64) if steps.batch is None else steps.batch):
        mine = batch == code
        independent = max(1.0, float(mine.sum() if steps.worth is None else steps.worth[mine].sum()))
        deviation = float(less[mine].std(ddof=1)) if mine.sum() > 1 else 0.0
        # Batches are made of the same sequences, so that their errors go together.
        error += float(weight[mine].sum()) * deviation / np.sqrt(independent)
    relative = weighted_mean(less, steps.weight)
    grouped = None
    if evaluation.grouped is not None and reference.grouped is not None:
        ours, theirs = (weighted_mean(seconds, steps.weight) for seconds in (evaluation.grouped, reference.grouped))
        grouped = 1.0 - ours / theirs
    answers = [relative, *([] if grouped is None else [grouped])]
    most = None
    if problem is not None:
        most = max(0.0, 1.0 - weighted_mean(step_seconds_bound(steps, problem), steps.weight) / base)
    parts, others = evaluation.by_batch(), reference.by_batch()
    return Saving(
        relative=relative,
        low=min(answers) - DEVIATIONS * error,
        high=max(answers) + DEVIATIONS * error,
        most=most,
        times={name: (parts[name].mean_seconds, others[name].mean_seconds) for name in parts},
        seconds=relative * base,
        grouped=grouped,
    )


def sentence(
    relative: float,
    low: float,
    high: float,
    most: float | None,
    level: float,
    reference: str,
    where: str,
    grouped: float | None = None,
) -> str:
    """What figures of a saving, as parts, say."""
    if most is not None and most < WORTH_IT:
        return f"At these batches no plan saves more than {_percent(most)} of the MoE time of {reference}: leave it."
    also = "" if grouped is None else f"; {_percent(grouped)} with a token's experts grouped as the router limits them"
    interval = f"({level:.0%}: {low * 100:.1f} to {high * 100:.1f}{also})"
    beaten = "" if most is None else f"; no plan can save more than {_percent(most)}"
    if low > 0 and relative >= WORTH_IT:
        return f"{_percent(relative)} less MoE time than {reference} on {where} {interval}{beaten}."
    if high < 0:
        return f"{_percent(-relative)} more MoE time than {reference} on {where} {interval}: leave it{beaten}."
    if low > 0:
        return (
            f"{_percent(relative)} less MoE time than {reference} on {where} {interval}, too little: leave it{beaten}."
        )
    return f"No gain over {reference} is proven on {where}: {_percent(relative)} {interval}; leave it{beaten}."


def _percent(part: float) -> str:
    return f"{part:.1%}".replace("%", " %")


def applied_text(saved: Saving, profile: EngineProfile, restart_seconds: float | None) -> str | None:
    """What it takes to put the plan in force and when that is paid back, where the engine restarts for it; None where
    it does not, or where too little is saved."""
    if not profile.restart or saved.low <= 0 or saved.relative < WORTH_IT or saved.nothing_pays:
        return None
    engine = "the engine" if profile.name == "permute" else profile.name
    applied = f"{engine} takes a plan by a restart with {profile.restart}"
    if restart_seconds is None:
        return (
            f"{applied}, of unknown time: give --restart-seconds; {1.0 / saved.seconds:,.0f} steps pay back a second."
        )
    return f"{applied}: its {restart_seconds:.4g} s are paid back in {restart_seconds / saved.seconds:,.0f} steps."


# With the time of all that is not MoE.


def read_other_ms(text: str) -> dict[str, float]:
    """Milliseconds of attention, dense layers and all else of a step, by phase: `12`, or `decode:12,prefill:80`.

    Raises:
        InputError: not of that form.
    """
    result: dict[str, float] = {}
    for entry in text.split(","):
        phase, colon, number = entry.strip().rpartition(":")
        try:
            value = float(number)
        except ValueError:
            value = np.nan
        if not 0.0 <= value < np.inf or (colon and phase not in PHASES):
            raise InputError(f"--other-ms {text!r} must be milliseconds a step, 12, or decode:12,prefill:80")
        result |= {phase: value} if colon else dict.fromkeys(PHASES, value)
    return result


def whole_step_text(
    saved: Saving, other_ms: Mapping[str, float], error: float | None, source: str = "the other work of a step"
) -> str:
    """What a saving does to whole steps, whose other work takes `other_ms` by phase.

    error: median relative error of the predicted times, where it is known. source: what the other work is, and how
    sure.
    """
    parts = []
    for name, (ours, theirs) in saved.times.items():
        phase = name.partition(" ")[0]
        if phase not in other_ms:
            continue
        other = other_ms[phase] / 1e3
        change = (ours + other) / (theirs + other) - 1.0
        label = {"decode": "TPOT", "prefill": "TTFT"}[phase]
        parts.append(
            f"{name}: {label} {theirs * 1e3 + other_ms[phase]:.4g} to {ours * 1e3 + other_ms[phase]:.4g} ms "
            f"({change * 100:+.1f} %), {(1.0 / (1.0 + change) - 1.0) * 100:+.1f} % tokens a second"
        )
    sure = (
        "links and kernels as the model has them" if error is None else f"expert time ±{error:.0%}".replace("%", " %")
    )
    return f"With {source}: {'; '.join(parts)} ({sure})."
