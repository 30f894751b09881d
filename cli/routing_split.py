"""Which part of a recording solvers see and which part plans are judged on, and the steps made of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..placement.errors import InputError, UnsupportedError
from .command_line import refuse_idle
from .options import HeldOutBy, HeldOutOptions, ModelOptions, StudyOptions
from .output import Column, Table, Update, note, number
from .parse import reader_defaults

if TYPE_CHECKING:
    from ..placement.objective import Objective
    from ..placement.plan import Plan
    from ..placement.problem import Problem
    from ..placement.statistics import RoutingStatistics
    from ..placement.steps import Steps
    from ..placement.trace import RoutingTrace
    from ..profiler.read import Recording


@dataclass(frozen=True)
class RoutingSplit:
    """The part that solvers see and the part that plans are judged on (the same when nothing is held out)."""

    train: RoutingTrace
    judged: RoutingTrace
    description: str

    @property
    def is_held_out(self) -> bool:
        return self.train is not self.judged


def split_routing(recording: Recording, options: HeldOutOptions, seed: int) -> RoutingSplit:
    """Splits token-level routing as asked.

    Raises:
        InputError: counts only, or too little to split.
    """
    trace = recording.trace
    if options.held_out == 0.0:
        refuse_idle("where nothing is held out", "held_out_by")
        return RoutingSplit(trace, trace, "Nothing held out: judged on the routing that was solved on")
    by = options.held_out_by
    try:
        train, judged = trace.split(by.value, options.held_out, seed)
    except InputError as error:
        raise InputError(f"{recording.path}: {error}; or give --held-out-by, or --held-out 0") from None
    units = "of the tokens, the last" if by is HeldOutBy.time else f"of the {by.value}s"
    return RoutingSplit(train, judged, f"Held out: {options.held_out:.0%} {units}, seed {seed}")


def solving_statistics(recording: Recording, split: RoutingSplit) -> RoutingStatistics:
    """Statistics of the training part; whole statistics are used as they are when nothing is held out."""
    from ..placement.statistics import RoutingStatistics

    if not split.is_held_out and not recording.is_trace:
        return recording.statistics()
    return RoutingStatistics.from_trace(split.train)


@dataclass(frozen=True)
class CountSplit:
    """The windows of counts that solvers see and those that plans are judged on (the same when none is held out)."""

    train: RoutingStatistics
    judged: RoutingStatistics
    description: str

    @property
    def is_held_out(self) -> bool:
        return self.train is not self.judged


def holds_counts_only(recording: Recording) -> bool:
    """Whether plans can be judged on count windows alone."""
    return not recording.is_trace and recording.statistics().sample is None


def split_counts(recording: Recording, options: HeldOutOptions, seed: int) -> CountSplit:
    """Splits count windows as asked; a record of one window is used for both."""
    statistics = recording.statistics()
    if options.held_out == 0.0:
        refuse_idle("where nothing is held out", "held_out_by")
        return CountSplit(statistics, statistics, "Nothing held out: judged on the windows that were solved on")
    try:
        train, judged = statistics.split(options.held_out_by.value, options.held_out, seed)
    except InputError as error:
        return CountSplit(statistics, statistics, f"Nothing held out: {error}; judged on what was solved on")
    return CountSplit(
        train,
        judged,
        f"Held out: {len(judged.load)} of {len(train.load) + len(judged.load)} windows with tokens"
        + (", the last" if options.held_out_by is HeldOutBy.time else f", seed {seed}"),
    )


def count_row(name: str, plan: Plan, split: CountSplit, objective: Objective, seed: int) -> dict[str, Any]:
    """A plan's device load max/mean on the windows of either part, and how much of it chance alone makes."""
    from ..placement.bounds import sampling_noise, window_balance

    return {
        "plan": name,
        "solved_on": window_balance(plan, split.train.load, objective),
        "held_out": window_balance(plan, split.judged.load, objective),
        "noise": sampling_noise(plan, split.judged.load, objective, seed),
    }


def count_table(rows: list[dict[str, Any]], split: CountSplit) -> Table:
    """The rows as a table."""
    return Table(
        (
            Column("plan", "plan", right=False),
            Column("solved_on", "on the windows\nsolved on", number(4)),
            Column("held_out", "on held-out\nwindows", number(4)),
            Column("noise", "of it sampling\nnoise", number(4)),
        ),
        rows,
        title="device load max/mean, windows by their tokens",
        footnotes=[
            f"{split.description}.",
            "Sampling noise: what windows of so many tokens lie above the plan's balance on the mean load by chance "
            "alone; no plan made before its tokens come is without it. Counts tell no step times.",
        ],
    )


@dataclass(frozen=True)
class TrainingRouting:
    """train: to solve on. judged: what plans are judged on. description: which parts of the record these are.
    is_held_out: whether solvers saw nothing of what is judged on. counts: where the record holds counts only."""

    recording: Recording
    train: RoutingStatistics
    judged: RoutingTrace | RoutingStatistics
    description: str
    is_held_out: bool
    counts: CountSplit | None = None


def training_routing(
    path: Path, model: ModelOptions, held_out: HeldOutOptions, seed: int, update: Update
) -> TrainingRouting:
    """What to solve on, and what to judge on.

    A Parquet trace that is used whole is counted in bounded memory, whatever its size.
    """
    recording = open_recording(path, model.model)
    if holds_counts_only(recording):
        counts = split_counts(recording, held_out, seed)
        whole = counts.train is counts.judged
        return TrainingRouting(recording, counts.train, counts.judged, counts.description, not whole, counts)
    if not recording.is_trace or held_out.held_out == 0.0:
        if held_out.held_out == 0.0:
            refuse_idle("where nothing is held out", "held_out_by")
        else:
            refuse_idle(f"with {path}: statistics that keep a token sample are used whole", "held_out", "held_out_by")
        statistics = recording.statistics() if not recording.is_trace else counted(recording, update)
        used = f"solved on all of {path}" + ("" if recording.is_trace else ": statistics are used whole")
        return TrainingRouting(recording, statistics, statistics, used, False)
    split = split_routing(recording, held_out, seed)
    return TrainingRouting(recording, solving_statistics(recording, split), split.judged, split.description, True)


def open_recording(path: Path, model: Path | None = None, **options: Any) -> Recording:
    """A record of any format, and on stderr what its reader summed, left out or set apart.

    model: of --model. options: as `open_routing` takes them.
    """
    from ..profiler.read import open_routing

    recording = open_routing(path, defaults=reader_defaults(model), **options)
    for remark in recording.notes:
        note(remark)
    return recording


def counted(recording: Recording, update: Update, sample_tokens: int = 200_000) -> RoutingStatistics:
    """Statistics of all of a recording, with progress."""

    def listen(done: int, total: int) -> None:
        update(f"counted {done:,} of {total:,} tokens", done / max(total, 1))

    return recording.statistics(sample_tokens=sample_tokens, progress=listen)


def study_routing(
    recording: Recording, options: StudyOptions, objective: Objective, seed: int
) -> tuple[RoutingStatistics, RoutingSplit | CountSplit]:
    """What solvers see, and the split whose held-out part the plans of a study are judged on.

    Raises:
        InputError: too little to split; counts for a service. UnsupportedError: counts do not tell what is asked.
    """
    if not holds_counts_only(recording):
        split = split_routing(recording, options, seed)
        return solving_statistics(recording, split), split
    if options.server is not None:
        raise InputError(
            f"{recording.path} holds counts only, a service replays tokens that are sent to it: leave out --server, or "
            "push the counts to a deployment and ask for a study of that"
        )
    if objective.execution == "context_coherent":
        raise UnsupportedError("context-coherent step times depend on transitions, counts tell of none; record tokens")
    counts = split_counts(recording, options, seed)
    return counts.train, counts


def judged_steps(
    split: RoutingSplit | CountSplit | TrainingRouting, problem: Problem, count: int | None, seed: int
) -> Steps:
    """Held-out steps of the problem's batches."""
    from ..placement.step_mix import problem_steps

    return problem_steps(split.judged, problem, count=count, seed=seed)


def steps_in_words(steps: Steps, split: RoutingSplit | CountSplit) -> str:
    """`decode 512: 64 steps; prefill 8192: 4 steps`."""
    counted = "; ".join(f"{name}: {part.num_steps} steps" for name, part in steps.by_batch().items())
    return counted + (" drawn from counts" if isinstance(split, CountSplit) else "")


def held_out_in_words(steps: Steps, split: RoutingSplit | CountSplit) -> str:
    """What is held out, of counts with what steps drawn from them assume."""
    return " ".join([f"{split.description}.", *steps.notes]) if isinstance(split, CountSplit) else split.description


def described_steps(steps: Steps, split: RoutingSplit | CountSplit, prediction: str) -> str:
    """A footnote on the steps of a study. prediction: what their times rest on."""
    kinds = steps_in_words(steps, split)
    return " ".join([f"{kinds}. {split.description}.", *steps.notes, f"Step times: {prediction}."])
