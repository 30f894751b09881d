"""Steps drawn from counts: loads as recorded, no expert twice in a token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeplace as mp
from moeplace.placement.step_mix import mixed_window_bound, mixed_window_times, sample_steps


@given(
    seed=st.integers(0, 1000),
    experts=st.integers(2, 12),
    top_k=st.integers(1, 4),
    zeros=st.integers(0, 11),
)
def test_tokens_choose_distinct_experts_for_any_loads(seed: int, experts: int, top_k: int, zeros: int) -> None:
    top_k = min(top_k, experts)
    rng = np.random.default_rng(seed)
    load = rng.dirichlet(np.full(experts, 0.2), size=(2, 3)) * 1000
    load[:, :, : min(zeros, experts)] = 0
    steps = sample_steps(load, top_k, (1, 2, 5), step_tokens=17, steps=3, seed=seed)
    assert steps.expert_ids.shape == (51, 3, top_k)
    ordered = np.sort(steps.expert_ids, axis=2)
    assert (np.diff(ordered.astype(int), axis=2) > 0).all()
    assert (steps.num_steps, steps.moe_layers) == (3, (1, 2, 5))


def test_expected_loads_are_the_recorded_ones_window_by_window() -> None:
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(16, 2.0), size=(2, 2))
    assert share.max() < 1 / 3
    steps = sample_steps(share * 5000, 3, (0, 1), step_tokens=20_000, steps=2, seed=1)
    drawn = steps.loads() / (3 * 20_000)
    # Of a chance p, the deviation over 20,000 tokens is at most sqrt(p (1 - p) / 20,000) < 0.0036 choices a token.
    assert np.abs(3 * (drawn - share)).max() < 5 * 0.0036


def test_an_expert_of_more_than_one_choice_a_token_gets_one_of_each() -> None:
    load = np.array([[[900.0, 50.0, 50.0, 0.0]]])
    drawn = sample_steps(load, 2, (0,), step_tokens=4000, steps=1).loads()[0, 0]
    assert drawn[0] == 4000
    assert abs(drawn[1] - 2000) < 200
    assert drawn[3] == 0


def test_more_than_can_be_drawn_is_refused() -> None:
    with pytest.raises(mp.InputError, match="too much to sample"):
        sample_steps(np.ones((1, 60, 256)), 8, tuple(range(60)), step_tokens=100_000, steps=1000)
    with pytest.raises(mp.InputError, match="5 of 4 experts"):
        sample_steps(np.ones((1, 1, 4)), 5, (0,), step_tokens=1, steps=1)


def test_choices_in_groups_keep_loads_and_stay_in_as_few_groups_as_asked() -> None:
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(32, 20.0), size=(1, 2))
    steps = sample_steps(share * 5000, 4, (0, 1), step_tokens=20_000, steps=1, groups=(8, 2))
    for layer in range(2):
        groups = np.sort(steps.expert_ids[:, layer] // 4, axis=1)
        assert (1 + (np.diff(groups, axis=1) > 0).sum(axis=1)).max() == 2
    drawn = steps.loads() / (4 * 20_000)
    assert np.abs(4 * (drawn - share)).max() < 0.02
    with pytest.raises(mp.InputError, match="of 1 of 8 groups"):
        sample_steps(share, 5, (0, 1), step_tokens=1, steps=1, groups=(8, 1))


DEEPSEEK_LIKE = mp.ModelSpec(
    layers=2, experts=32, top_k=4, hidden_size=512, ffn_size=256, groups=8, top_groups=2, name="limited"
)


def grouped_case() -> tuple[mp.Problem, mp.RoutingStatistics]:
    load = np.random.default_rng(1).gamma(2.0, 100.0, size=(16, 2, 32)).round()
    statistics = mp.RoutingStatistics.from_counts(load, top_k=4)
    cluster = mp.Topology.preset("a100-pcie", nodes=4, devices_per_node=2)
    return mp.Problem(DEEPSEEK_LIKE, cluster, statistics, batches=[mp.Batch("prefill", tokens=4096)]), statistics


@pytest.mark.slow
def test_counts_of_a_model_that_limits_groups_have_two_answers_which_differ_where_groups_stay_together() -> None:
    problem, statistics = grouped_case()
    whole, parted = mp.solve(problem, "contiguous"), mp.solve(problem, "round_robin")
    figures = {name: mp.evaluate(plan, statistics, problem) for name, plan in (("whole", whole), ("parted", parted))}
    gain = {}
    for name, evaluation in figures.items():
        assert evaluation.grouped is not None
        assert evaluation.summary()["step_seconds_grouped"] == pytest.approx(evaluation.grouped.mean())
        gain[name] = 1 - evaluation.grouped.mean() / evaluation.mean_seconds
    # Contiguous placement keeps a group on one device: choices in two groups then reach two devices, not four.
    assert gain["whole"] > 0.15
    # Dealt in turn, experts of a group are all on different devices.
    assert gain["parted"] < gain["whole"] - 0.05
    assert "2 of 8 groups" in str(figures["whole"])
    free = dataclasses.replace(problem, model=DEEPSEEK_LIKE.replace(top_groups=0))
    assert mp.evaluate(whole, statistics, free).grouped is None


def test_windows_priced_with_choices_in_groups_are_as_steps_drawn_so() -> None:
    problem, statistics = grouped_case()
    plan = mp.solve(problem, "contiguous")
    drawn = mp.evaluate(plan, statistics, problem)
    assert drawn.grouped is not None
    for grouped, seconds in ((False, drawn.mean_seconds), (True, float(drawn.grouped.mean()))):
        priced = mixed_window_times(plan, statistics.load, problem, grouped).seconds.mean()
        assert priced == pytest.approx(seconds, rel=0.1)
        bound = mixed_window_bound(statistics.load, problem, grouped)
        assert (bound <= mixed_window_times(plan, statistics.load, problem, grouped).seconds).all()


def test_a_decision_on_counts_spans_both_answers() -> None:
    problem, statistics = grouped_case()
    parted, whole = mp.solve(problem, "round_robin"), mp.solve(problem, "contiguous")
    [verdict] = mp.decide(parted, [whole], statistics, problem).verdicts
    assert verdict.gain_grouped is not None
    assert verdict.gain_grouped > verdict.gain
    assert verdict.gain_low <= verdict.gain <= verdict.gain_grouped <= verdict.gain_high
    decision = mp.decide(parted, [whole], statistics, problem)
    assert "with a token's experts grouped" in decision.reason
    assert decision.most is not None
    assert verdict.gain_grouped / verdict.current <= decision.most
