"""The traffic matrix agrees with the link totals the cost model prices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.placement.replay import device_traffic, replay, traffic_from_counts

DEVICE = {"compute": 1e12, "memory": 1e12, "memory_bandwidth": 1e11, "intra_bandwidth": 1e10}


@st.composite
def one_layer_cases(draw: st.DrawFn) -> tuple[mp.Plan, mp.Steps, mp.Objective]:
    """One step through one layer on small, also lopsided, clusters; plans with and without replicas."""
    nodes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    cluster = mp.Topology.from_dict({"nodes": [{"devices": [DEVICE] * n, "inter_bandwidth": 1e9} for n in nodes]})
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts, top_k, tokens = 6, draw(st.integers(1, 3)), draw(st.integers(1, 9))
    ids = rng.random((tokens, 1, experts)).argsort(axis=2)[:, :, :top_k]
    trace = mp.RoutingTrace.from_arrays(ids, experts)
    source = rng.integers(cluster.num_devices, size=tokens) if draw(st.booleans()) else None
    steps = mp.Steps(trace.expert_ids, np.array([0, tokens]), experts, trace.moe_layers, source=source)
    slots = experts + draw(st.integers(0, 3))
    table = np.concatenate([rng.permutation(experts), rng.integers(experts, size=slots - experts)])
    plan = mp.Plan(
        mp.ModelSpec(layers=1, experts=experts, top_k=top_k, hidden_size=8, ffn_size=8),
        cluster,
        rng.permutation(table)[None],
        np.sort(rng.integers(cluster.num_devices, size=slots)),
    )
    objective = mp.Objective(
        execution=draw(st.sampled_from(["dispatch_combine", "context_coherent"])), node_dedup=draw(st.booleans())
    )
    return plan, steps, objective


@settings(max_examples=150, deadline=None)
@given(one_layer_cases())
def test_row_and_column_sums_are_the_priced_flows(case: tuple[mp.Plan, mp.Steps, mp.Objective]) -> None:
    plan, steps, objective = case
    topology = plan.topology
    traffic = device_traffic(plan, steps, topology, objective)
    demand = next(replay(plan, steps, topology, objective))
    same = topology.node_of[:, None] == topology.node_of[None, :]
    for matrix, reach in ((traffic.dispatch, demand.dispatch), (traffic.combine, demand.combine)):
        assert (matrix is None) == (reach is None)
        if matrix is None or reach is None:
            continue
        flows = reach.flows(topology, objective.node_dedup)
        inside, across = np.where(same, matrix, 0.0), np.where(same, 0.0, matrix)
        intra = np.maximum(inside.sum(axis=1), inside.sum(axis=0))
        members = np.eye(topology.num_nodes)[topology.node_of]
        inter = np.maximum(across.sum(axis=1) @ members, across.sum(axis=0) @ members)
        assert intra == pytest.approx(flows.intra[0, 0], abs=1e-4)
        assert inter == pytest.approx(flows.inter[0, 0], abs=1e-4)
        assert not matrix.diagonal().any()


def test_context_coherent_follows_the_token_from_layer_to_layer() -> None:
    cluster = mp.Topology.from_dict({"nodes": [{"devices": [DEVICE] * 3, "inter_bandwidth": 1e9}]})
    ids = np.array([[[0], [1], [1]]])
    trace = mp.RoutingTrace.from_arrays(ids, 3)
    steps = mp.Steps(trace.expert_ids, np.array([0, 1]), 3, trace.moe_layers, source=np.array([2]))
    spec = mp.ModelSpec(layers=3, experts=3, top_k=1, hidden_size=8, ffn_size=8)
    plan = mp.Plan(spec, cluster, np.tile(np.arange(3), (3, 1)), np.arange(3))
    objective = mp.Objective(execution="context_coherent")
    traffic = device_traffic(plan, steps, cluster, objective)
    expected = np.zeros((3, 3))
    expected[2, 0] = expected[0, 1] = 1.0
    assert traffic.dispatch == pytest.approx(expected)
    assert traffic.combine is None
    assert traffic.bytes_between(spec, objective) == pytest.approx(expected * 8 * 2)


@pytest.mark.parametrize(("dedup", "between", "inside"), [(True, 3.0, 3.5), (False, 3.5, 1.75)])
def test_traffic_from_counts_merges_copies_by_node(dedup: bool, between: float, inside: float) -> None:
    """8 tokens with 2 of 4 equally likely experts, one a device, on two nodes of two devices.

    A token needs a device with chance 7/16 and a node with chance 3/4; half of the tokens live on the other node.
    Inside a node 4 tokens need the other device with chance 7/16; merged, half of the 3.5 visits from outside are
    fanned out too.
    """
    cluster = mp.Topology.from_dict({"nodes": [{"devices": [DEVICE] * 2, "inter_bandwidth": 1e9}] * 2})
    spec = mp.ModelSpec(layers=1, experts=4, top_k=2, hidden_size=8, ffn_size=8)
    plan = mp.Plan(spec, cluster, np.arange(4)[None], np.arange(4))
    dispatch = traffic_from_counts(plan, np.full((1, 4), 5.0), 8, mp.Objective(node_dedup=dedup)).dispatch
    assert dispatch[:2, 2:].sum() == pytest.approx(between)
    assert dispatch[2:, :2].sum() == pytest.approx(between)
    assert dispatch[:2, :2].sum() == pytest.approx(inside)
    assert not dispatch.diagonal().any()
