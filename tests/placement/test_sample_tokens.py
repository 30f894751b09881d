"""Tokens drawn from transitions show what was recorded, and search places by them where no token was recorded."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

import moeplace as mp
from moeplace.placement.step_mix import sample_tokens


def from_transitions(transitions: np.ndarray, top_k: int = 1) -> mp.RoutingStatistics:
    """transitions: [W, L-1, E, E]."""
    load = np.concatenate([transitions.sum(axis=3), transitions[:, -1:].sum(axis=2)], axis=1)
    return mp.RoutingStatistics(
        experts=load.shape[2],
        moe_layers=tuple(range(load.shape[1])),
        load=load,
        window_workload=np.arange(len(load)),
        workloads=tuple("abc"[: len(load)]),
        top_k=top_k,
        transitions=transitions,
    )


def distance(drawn: np.ndarray, recorded: np.ndarray) -> float:
    """Total variation."""
    return float(np.abs(drawn / drawn.sum() - recorded / recorded.sum()).sum() / 2)


def test_with_one_expert_a_token_the_recorded_chain_is_walked() -> None:
    rng = np.random.default_rng(0)
    first = rng.gamma(0.3, size=(6, 6)) * 1e5
    # The next transitions leave from where these arrive, as counts of one set of tokens do.
    second = rng.dirichlet(np.full(6, 0.3), size=6) * first.sum(axis=0)[:, None]
    statistics = from_transitions(np.stack([first, second])[None])
    drawn = sample_tokens(statistics, 1, 40_000)
    counted = mp.RoutingStatistics.from_trace(drawn)
    for layer in range(2):
        assert distance(counted.total_transitions[layer], statistics.total_transitions[layer]) < 0.02
    assert distance(counted.total_load, statistics.total_load) < 0.02


def test_with_several_experts_a_token_drawn_transitions_come_near_the_recorded(toy_trace: mp.RoutingTrace) -> None:
    recorded = mp.RoutingStatistics.from_trace(toy_trace)
    known = replace(recorded, sample=None, coactivation=None)
    drawn = sample_tokens(known, toy_trace.top_k, 30_000, seed=1)
    assert (np.diff(np.sort(drawn.expert_ids, axis=2), axis=2) > 0).all()
    counted = mp.RoutingStatistics.from_trace(drawn)
    for ours, theirs in zip(counted.total_transitions, recorded.total_transitions, strict=True):
        chance = ours.sum(axis=1, keepdims=True) * ours.sum(axis=0)
        assert distance(ours, theirs) < 0.6 * distance(chance, theirs) + 0.03
    assert distance(counted.total_load, recorded.total_load) < 0.03


def test_workloads_are_drawn_as_often_as_they_were_recorded_and_alike_for_a_seed() -> None:
    transitions = np.random.default_rng(2).gamma(1.0, size=(2, 1, 4, 4))
    transitions[1] *= 3 * transitions[0].sum() / transitions[1].sum()
    first, again, other = (sample_tokens(from_transitions(transitions), 1, 400, seed) for seed in (0, 0, 1))
    assert np.bincount(first.workload).tolist() == [100, 300]
    np.testing.assert_array_equal(first.expert_ids, again.expert_ids)
    assert (first.expert_ids != other.expert_ids).any()


def test_experts_of_no_load_are_not_drawn_and_what_is_missing_is_said() -> None:
    transitions = np.ones((1, 1, 4, 4))
    transitions[:, :, :, 3] = transitions[:, :, 3] = 0.0
    drawn = sample_tokens(from_transitions(transitions, top_k=2), 2, 500)
    assert not (drawn.expert_ids == 3).any()
    with pytest.raises(mp.UnsupportedError, match="transitions"):
        sample_tokens(mp.RoutingStatistics.from_counts(np.ones((2, 4))), 1, 10)
    with pytest.raises(mp.InputError, match=r"top_k \(5\) must be from 1"):
        sample_tokens(from_transitions(transitions), 5, 10)


@pytest.mark.slow
@pytest.mark.parametrize("risk", ["mean", "worst_workload", "regret"])
def test_context_coherent_search_keeps_recorded_transitions_local_without_tokens(risk: str) -> None:
    """Experts that follow each other in blocks: the plan that gathers blocks sends nothing."""
    rng = np.random.default_rng(3)
    order = [rng.permutation(8) for _ in range(3)]
    block = np.kron(np.eye(2), np.full((4, 4), 100.0))
    transitions = np.stack([block[np.ix_(np.argsort(a), np.argsort(b))] for a, b in itertools.pairwise(order)])
    statistics = from_transitions(np.stack([transitions, 2 * transitions]))
    device = {"compute": 1e12, "memory": 1e12, "memory_bandwidth": 1e12, "intra_bandwidth": 1e8}
    topology = mp.Topology.from_dict({"nodes": [{"inter_bandwidth": 1e8, "devices": [device, device]}]})
    model = mp.ModelSpec(layers=3, experts=8, top_k=1, hidden_size=512, ffn_size=64)
    objective = mp.Objective(execution="context_coherent", risk=risk)
    plan = mp.solve(mp.Problem(model, topology, statistics, objective), "search", step_tokens=64, proposals=1500)
    assert plan.certificate is not None
    assert "scenario steps of tokens drawn from recorded transitions" in plan.certificate.objective
    share = plan.device_share
    local = sum(np.einsum("ig,ij,jg->", share[layer], transitions[layer], share[layer + 1]) for layer in range(2))
    assert local == pytest.approx(transitions.sum())
    # Without the other term, the same statistics say nothing of dispatch and combine but load.
    dispatched = mp.Problem(model, topology, statistics, mp.Objective(risk=risk))
    balanced = mp.solve(dispatched, "search", proposals=1200)
    assert balanced.certificate is not None
    assert "load max/mean" in balanced.certificate.objective
