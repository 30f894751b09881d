"""Problems: slots dealt to devices, and everything that must agree before a solver starts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import moeplace as mp

MODEL = mp.ModelSpec(layers=2, experts=6, top_k=2, hidden_size=64, ffn_size=64)
TOPOLOGY = mp.Topology.preset("h100-hgx", nodes=2, devices_per_node=2)
STATISTICS = mp.RoutingStatistics.from_counts(np.ones((2, 6)))


def problem(**changes: Any) -> mp.Problem:
    return mp.Problem(**{"model": MODEL, "topology": TOPOLOGY, "statistics": STATISTICS} | changes)


def test_slots_default_to_one_an_expert_dealt_evenly() -> None:
    assert problem().slots_per_device.tolist() == [2, 2, 1, 1]
    assert problem().slot_device.tolist() == [0, 0, 1, 1, 2, 3]
    assert problem(slots=8).slots_per_device.tolist() == [2, 2, 2, 2]
    assert problem(device_slots=[3, 1, 1, 1]).slot_device.tolist() == [0, 0, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": 5}, r"slots \(5\) must be at least the number of experts \(6\)"),
        ({"device_slots": [3, 3]}, "must name 4"),
        ({"device_slots": [3, 3, -1, 1]}, "non-negative"),
        ({"device_slots": [3, 3, 1, 1], "slots": 9}, "not the sum"),
        ({"pinned": {(0, 6): 0}}, r"pinned\[0, 6\].*out of range"),
        ({"forbidden": {(0, 0): [4]}}, r"forbidden\[0, 0\].*out of range"),
        ({"model": MODEL.replace(experts=8)}, "another model: experts is 6, ModelSpec.experts is 8"),
        ({"model": MODEL.replace(moe_layers=(3, 4))}, r"moe_layers is \(0, 1\).*same moe_layers"),
        ({"statistics": dataclasses.replace(STATISTICS, top_k=4)}, "top_k is 4"),
        ({"model": MODEL.replace(hidden_size=10**6, ffn_size=10**5)}, "device 0 would hold .* GB"),
    ],
)
def test_what_does_not_agree_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(mp.InputError, match=message):
        problem(**changes)


@pytest.mark.parametrize("risk", ["median", "cvar", "cvar:1.0", "cvar:high"])
def test_an_unknown_risk_lists_the_known_ones(risk: str) -> None:
    with pytest.raises(mp.InputError, match=r"cvar:q.*worst_workload or regret"):
        mp.Objective(risk=risk)


def test_an_unknown_execution_or_dtype_is_refused() -> None:
    with pytest.raises(mp.InputError, match="dispatch_combine"):
        mp.Objective(execution="magic")
    with pytest.raises(mp.InputError, match="dispatch_dtype.*fp8"):
        mp.Objective(dispatch_dtype="fp6")


def test_counts_are_checked_by_workload() -> None:
    with pytest.raises(mp.InputError, match=r"workload 'prefill' has shape \(2, 5\), expected \[2, 6\]"):
        mp.RoutingStatistics.from_counts({"decode": np.ones((2, 6)), "prefill": np.ones((2, 5))})
    with pytest.raises(mp.InputError, match="'decode' holds negative"):
        mp.RoutingStatistics.from_counts({"decode": -np.ones((2, 6))})
    with pytest.raises(mp.InputError, match="names 3 layers"):
        mp.RoutingStatistics.from_counts(np.ones((2, 6)), moe_layers=range(3))


def test_windows_of_each_workload_are_kept_apart() -> None:
    statistics = mp.RoutingStatistics.from_counts({"a": np.ones((3, 2, 4)), "b": 2 * np.ones((2, 4))})
    assert statistics.load.shape == (4, 2, 4)
    assert statistics.workload_load[:, 0, 0].tolist() == [3.0, 2.0]
    with pytest.raises(mp.UnsupportedError, match="transitions between layers is needed"):
        _ = statistics.total_transitions


def recorded(model: mp.ModelSpec | None = None, layers: tuple[int, ...] | None = None) -> mp.RoutingTrace:
    ids = np.argsort(np.random.default_rng(0).random((40, 2, 6)), axis=2)[:, :, :2]
    return mp.RoutingTrace.from_arrays(ids, num_experts=6, moe_layers=layers, model=model)


def test_a_trace_that_knows_its_model_and_a_topology_make_a_problem() -> None:
    trace = recorded(MODEL)
    made = mp.Problem(trace, TOPOLOGY, slots=8)
    assert made.model == MODEL
    assert made.num_slots == 8
    assert made.statistics.fingerprint == mp.RoutingStatistics.from_trace(trace).fingerprint
    again = mp.Problem(mp.RoutingStatistics.from_trace(trace), TOPOLOGY)
    assert (again.model, again.statistics.fingerprint) == (MODEL, made.statistics.fingerprint)
    given = mp.Problem(recorded(), TOPOLOGY, model=MODEL)
    assert given.model == MODEL
    assert mp.Problem(MODEL, TOPOLOGY, STATISTICS, mp.Objective(risk="cvar:0.9")).objective.tail == 0.9
    assert mp.Problem(recorded(MODEL), TOPOLOGY, model=MODEL.replace(ffn_size=128)).model.ffn_size == 128


def test_a_problem_is_changed_by_replace() -> None:
    changed = dataclasses.replace(mp.Problem(recorded(MODEL), TOPOLOGY), slots=8, topology=TOPOLOGY.resized(nodes=1))
    assert (changed.num_slots, changed.num_devices) == (8, 2)


def test_where_no_model_is_known_the_error_says_how_to_give_it() -> None:
    for routing in (recorded(), STATISTICS):
        with pytest.raises(mp.InputError, match=r"does not say which model.*Problem\(trace, topology, model=ModelSpec"):
            mp.Problem(routing, TOPOLOGY)


def test_routing_and_model_are_given_once() -> None:
    with pytest.raises(mp.InputError, match="the model is given twice"):
        mp.Problem(MODEL, TOPOLOGY, STATISTICS, model=MODEL)
    with pytest.raises(mp.InputError, match="the routing is given twice"):
        mp.Problem(recorded(MODEL), TOPOLOGY, STATISTICS)


def test_a_model_without_layer_numbers_takes_those_of_the_routing() -> None:
    made = mp.Problem(recorded(layers=(3, 7)), TOPOLOGY, model=MODEL)
    assert made.model.moe_layers == (3, 7)
    assert mp.solve(made, "contiguous").moe_layers == (3, 7)
    with pytest.raises(mp.InputError, match=r"moe_layers is \(3, 7\), ModelSpec.moe_layers is \(0, 1\)"):
        mp.Problem(recorded(layers=(3, 7)), TOPOLOGY, model=MODEL.replace(moe_layers=(0, 1)))
    counts = mp.RoutingStatistics.from_counts(np.ones((58, 6)), moe_layers=range(3, 61))
    assert mp.Problem(MODEL.replace(layers=58), TOPOLOGY, counts).model.moe_layers == tuple(range(3, 61))


def _two_sizes(small: float, large: float, reserve: float = 0.0) -> mp.Topology:
    rates = {"compute": 1e14, "memory_bandwidth": 1e12, "intra_bandwidth": 1e11}
    devices = [{"memory": memory, "reserve": reserve, **rates} for memory in (small, large)]
    return mp.Topology.from_dict({"nodes": [{"devices": devices, "inter_bandwidth": 1e10}]})


def _large_experts(topology: mp.Topology, **settings: Any) -> mp.Problem:
    """64 experts of 1 GB in one layer."""
    model = mp.ModelSpec(layers=1, experts=64, top_k=2, hidden_size=1000, ffn_size=250_000, matrices=2)
    statistics = mp.RoutingStatistics.from_counts(np.ones((1, 1, 64), dtype=np.int64), top_k=2)
    return mp.Problem(model, topology, statistics, **settings)


def test_slots_go_where_memory_is_when_devices_differ_in_it() -> None:
    assert _large_experts(_two_sizes(512e9, 24e9)).slots_per_device.tolist() == [40, 24]
    assert _large_experts(_two_sizes(512e9, 100e9)).slots_per_device.tolist() == [32, 32], "both hold half"
    assert _large_experts(_two_sizes(512e9, 24e9, reserve=4e9)).slots_per_device.tolist() == [44, 20]


def test_memory_that_is_reserved_is_not_for_experts() -> None:
    fitting = mp.Topology.preset("h100-hgx", devices_per_node=1)
    assert "nothing reserved" in str(_large_experts(fitting))
    with pytest.raises(mp.InputError, match="64.0 GB of experts.* 80.0 GB, 30.0 GB of it reserved.*device_slots"):
        _large_experts(fitting.reserving(30e9))
    assert "16 GB reserved" in str(_large_experts(fitting.reserving(0.2, share=True)))
    with pytest.raises(mp.InputError, match="reserve .* must be below memory"):
        fitting.reserving(80e9)


def test_a_topology_without_reserve_is_written_as_before() -> None:
    plain = mp.Topology.preset("h100-hgx")
    assert "reserve" not in plain.model_dump_json()
    kept = plain.reserving(1e9)
    assert mp.Topology.from_dict({"preset": "h100-hgx", "reserve": 1e9}) == kept
    assert mp.Topology.from_dict(kept.model_dump(mode="json")) == kept
