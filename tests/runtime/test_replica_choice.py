"""Which replica serves which token: shares kept over all ranks, near replicas first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from random_plans import SPEC, random_plan  # noqa: E402

from moeplace.runtime.moe.experts import ReplicaChoice  # noqa: E402
from moeplace.runtime.moe.layer_placement import LayerPlacement  # noqa: E402


def placement_of(seed: int) -> LayerPlacement:
    return LayerPlacement.of(random_plan(np.random.default_rng(seed), 2, 3), 4)


@given(st.integers(0, 10_000))
def test_quotas_add_up_to_the_shares_over_all_devices(seed: int) -> None:
    placement = placement_of(seed)
    quotas = np.stack([placement.quota(device) for device in range(placement.devices)])
    np.testing.assert_allclose(quotas.sum(axis=2), 1.0)
    for expert in range(placement.experts):
        slots = placement.slots_of[expert, : placement.replicas[expert]]
        served = quotas[:, expert, : len(slots)].mean(axis=0)
        np.testing.assert_allclose(served, placement.share[slots], atol=1e-9)


@given(st.integers(0, 10_000))
def test_tokens_stay_on_their_device_and_then_in_their_node_as_far_as_shares_allow(seed: int) -> None:
    placement = placement_of(seed)
    quotas = np.stack([placement.quota(device) for device in range(placement.devices)])
    for expert in range(placement.experts):
        slots = placement.slots_of[expert, : placement.replicas[expert]]
        share, at = placement.share[slots] * placement.devices, placement.device[slots]
        flow = quotas[:, expert, : len(slots)]
        own = at[None, :] == np.arange(placement.devices)[:, None]
        near = placement.node_of[at][None, :] == placement.node_of[:, None]
        for device in range(placement.devices):
            assert flow[device, own[device]].sum() == pytest.approx(min(1.0, share[own[device]].sum()))
        for node in range(2):
            rows, columns = placement.node_of == node, near[placement.node_of == node][0]
            kept = flow[np.ix_(rows, columns)].sum()
            assert kept == pytest.approx(min(rows.sum(), share[columns].sum()))


@given(st.integers(0, 10_000), st.integers(0, 40))
def test_each_replica_gets_its_quota_of_a_batch_to_within_one_token(seed: int, tokens: int) -> None:
    placement = placement_of(seed)
    rank = seed % placement.devices
    ids = torch.from_numpy(np.random.default_rng(seed).integers(placement.experts, size=(tokens, SPEC.top_k)))
    slots = ReplicaChoice(placement, rank, torch.device("cpu")).slots(ids)
    assert torch.equal(torch.from_numpy(placement.expert.copy())[slots], ids)
    quota = placement.quota(rank)
    for expert in range(placement.experts):
        total = int((ids == expert).sum())
        for place, slot in enumerate(placement.slots_of[expert, : placement.replicas[expert]]):
            assert abs(int((slots == slot).sum()) - total * quota[expert, place]) < 1.0 + 1e-6


def test_one_token_a_rank_is_balanced_over_the_ranks() -> None:
    placement = LayerPlacement(np.array([0, 0]), np.array([4, 5]), np.array([0.5, 0.5]), np.zeros(6, dtype=np.int64), 1)
    one = torch.zeros(1, 1, dtype=torch.int64)
    chosen = [int(ReplicaChoice(placement, rank, torch.device("cpu")).slots(one)) for rank in range(4)]
    assert sorted(chosen) == [0, 0, 1, 1]


@given(st.integers(0, 10_000), st.integers(0, 40))
def test_a_map_of_experts_is_spread_to_the_slots_that_serve_its_tokens(seed: int, tokens: int) -> None:
    placement = placement_of(seed)
    choice = ReplicaChoice(placement, seed % placement.devices, torch.device("cpu"))
    draw = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, placement.experts, generator=draw).topk(SPEC.top_k, dim=1).indices
    weights = torch.rand(tokens, placement.experts, generator=draw)
    chosen = torch.zeros(tokens, placement.experts, dtype=torch.bool).scatter_(1, ids, True)
    slots = choice.slots(ids)
    expected = torch.zeros(tokens, len(placement.expert), dtype=torch.bool).scatter_(1, slots, True)
    spread_weights, spread = choice.spread(weights, chosen)
    assert torch.equal(spread, expected)
    assert torch.equal(spread_weights.gather(1, slots), weights.gather(1, ids))
    assert not spread_weights[~expected].any()
