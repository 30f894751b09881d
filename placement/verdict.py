"""How much less time one plan takes than another, how sure that is, and what no plan can beat, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .bounds import step_seconds_bound
from .decide import WORTH_IT
from .engines import EngineProfile
from .errors import InputError
from .evaluate import Evaluation
from .objective import weighted_mean
from .problem import Problem
from .steps import PHASES, Steps

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
