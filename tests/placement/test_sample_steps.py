"""Steps drawn from counts: loads as recorded, no expert twice in a token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeplace as mp
from moeplace.placement.synthetic import sample_steps


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
