"""What a verdict says, and how sure its interval is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import moeplace as mp
from moeplace.placement.decide import Saving, applied_text, read_other_ms, saving, sentence, whole_step_text
from moeplace.placement.engines import engine_profile
from tests.support.traces import make_trace

MODEL = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=256, ffn_size=512)
DEVICE = mp.Device(compute=1e12, memory=8e10, memory_bandwidth=4e11, intra_bandwidth=4e9)
TOPOLOGY = mp.Topology(nodes=(mp.Node(devices=(DEVICE,) * 4, inter_bandwidth=1e9),))
BATCHES = (mp.Batch("decode", tokens=12, weight=3), mp.Batch("prefill", tokens=96))


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ((0.134, 0.119, 0.148, 0.19), "13.4 % less MoE time than X on held-out steps (95%: 11.9 to 14.8); no plan can"),
        (
            (0.004, 0.001, 0.006, 0.008),
            "At these batches no plan saves more than 0.8 % of the MoE time of X: leave it.",
        ),
        ((0.004, 0.001, 0.006, 0.2), "too little: leave it; no plan can save more than 20.0 %."),
        ((0.02, -0.01, 0.05, 0.2), "No gain over X is proven on held-out steps: 2.0 % (95%: -1.0 to 5.0); leave it"),
        ((-0.05, -0.07, -0.03, 0.2), "5.0 % more MoE time than X on held-out steps (95%: -7.0 to -3.0): leave it"),
        ((0.05, 0.03, 0.07, None), "5.0 % less MoE time than X on held-out steps (95%: 3.0 to 7.0)."),
    ],
)
def test_a_sentence_says_what_to_do(figures: tuple[Any, ...], words: str) -> None:
    assert words in sentence(*figures, 0.95, "X", "held-out steps")


def test_a_saving_is_of_the_weighted_steps_and_no_more_than_any_plan_can() -> None:
    given = mp.Problem(make_trace(seed=0), TOPOLOGY, model=MODEL, batches=BATCHES)
    steps = mp.problem_steps(make_trace(seed=5), given, seed=1)
    plain, better = (mp.evaluate(mp.solve(given, name), steps, given) for name in ("contiguous", "eplb"))
    saved = saving(better, plain, steps, given)
    assert saved.relative == pytest.approx(1 - better.mean_seconds / plain.mean_seconds)
    assert saved.most is not None
    assert saved.low < saved.relative < saved.high
    assert saved.relative < saved.most
    assert list(saved.times) == ["decode 12", "prefill 96"]
    none = saving(plain, plain, steps, given)
    assert (none.relative, none.low, none.high) == (0.0, 0.0, 0.0)
    with pytest.raises(mp.InputError, match="evaluate both plans on these steps"):
        saving(plain, plain, steps.select([0, 1]), given)


@pytest.mark.slow
def test_putting_a_plan_in_force_costs_what_its_engine_needs_for_it() -> None:
    saved = Saving(0.1, 0.08, 0.12, None, {}, seconds=1e-3)
    sglang, live = engine_profile("sglang"), engine_profile("moeplace")
    assert applied_text(saved, live, 60.0) is None
    assert applied_text(replace(saved, low=-0.01), sglang, 60.0) is None
    unknown, known = (applied_text(saved, sglang, seconds) or "" for seconds in (None, 60.0))
    assert "--init-expert-location, of unknown time: give --restart-seconds; 1,000 steps pay back a second" in unknown
    assert "its 60 s are paid back in 60,000 steps" in known


def test_counts_of_groups_widen_the_interval_and_show_the_other_answer() -> None:
    words = sentence(0.05, 0.02, 0.09, 0.3, 0.95, "X", "held-out steps", 0.08)
    assert (
        "5.0 % less MoE time than X on held-out steps (95%: 2.0 to 9.0; 8.0 % with a token's experts grouped" in words
    )


@pytest.mark.slow
def test_intervals_hold_what_other_recordings_give() -> None:
    """Recordings of 12 sequences: 95 % intervals of most of them hold the saving on 600 sequences of the same kind."""
    given = mp.Problem(make_trace(seed=0), TOPOLOGY, model=MODEL, batches=[mp.Batch("decode", tokens=48)])
    plans = [mp.solve(given, name) for name in ("contiguous", "eplb")]

    def judged(trace: mp.RoutingTrace) -> Any:
        steps = mp.problem_steps(trace, given, count=40, seed=1)
        return saving(*(mp.evaluate(plan, steps, given) for plan in reversed(plans)), steps, given)

    whole = make_trace(seed=0, sequences=600, length=20)
    truth = judged(whole).relative
    inside = 0
    for start in range(0, 600, 12):
        saved = judged(whole.select((whole.sequence >= start) & (whole.sequence < start + 12)))
        inside += saved.low <= truth <= saved.high
    assert inside >= 45, "of 50"


def test_steps_that_share_sequences_tell_no_more_than_these() -> None:
    given = mp.Problem(make_trace(seed=0), TOPOLOGY, model=MODEL, batches=[mp.Batch("decode", tokens=48)])
    plans = [mp.solve(given, name) for name in ("contiguous", "eplb")]
    widths = []
    for count in (50, 200):
        steps = mp.problem_steps(make_trace(seed=5), given, count=count, seed=1)
        saved = saving(*(mp.evaluate(plan, steps, given) for plan in reversed(plans)), steps, given)
        widths.append(saved.high - saved.low)
        alone = saving(
            *(mp.evaluate(plan, steps, given) for plan in reversed(plans)), replace(steps, worth=None), given
        )
        assert alone.high - alone.low == pytest.approx((saved.high - saved.low) / np.sqrt(count))
    assert widths[1] == pytest.approx(widths[0], rel=0.3)


def test_other_work_dilutes_what_is_saved() -> None:
    given = mp.Problem(make_trace(seed=0), TOPOLOGY, model=MODEL, batches=BATCHES)
    steps = mp.problem_steps(make_trace(seed=5), given, seed=1)
    plain, better = (mp.evaluate(mp.solve(given, name), steps, given) for name in ("contiguous", "eplb"))
    saved = saving(better, plain, steps, given)
    text = whole_step_text(saved, read_other_ms("decode:2,prefill:3"), 0.06)
    ours, theirs = (1e3 * seconds for seconds in saved.times["decode 12"])
    assert f"TPOT {theirs + 2:.4g} to {ours + 2:.4g} ms ({(ours + 2) / (theirs + 2) * 100 - 100:+.1f} %)" in text
    assert "TTFT" in text
    assert "expert time ±6 %" in text
    assert read_other_ms("5") == {"decode": 5.0, "prefill": 5.0}
    for wrong in ("", "fast", "decode:", "chat:3", "-1", "decode:inf", "nan"):
        with pytest.raises(mp.InputError, match="--other-ms"):
            read_other_ms(wrong)
