"""Plans in which every expert keeps a replica in given failures."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import make_trace

import moeplace as mp
from moeplace.placement.degraded import failure_mask, lost_experts
from moeplace.solvers.search import starts
from moeplace.solvers.search.starts import tolerant_layer

DEVICE = mp.Device(compute=1e14, memory=8e10, memory_bandwidth=2e12, intra_bandwidth=3e11)


def topology_of(*node_sizes: int) -> mp.Topology:
    return mp.Topology(nodes=tuple(mp.Node(devices=(DEVICE,) * size, inter_bandwidth=5e10) for size in node_sizes))


def problem_of(topology: mp.Topology, execution: str = "dispatch_combine", **fields: Any) -> mp.Problem:
    trace = make_trace(0)
    model = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=256, ffn_size=512)
    objective = mp.Objective(execution=execution)  # type: ignore[arg-type]
    return mp.Problem(model, topology, mp.RoutingStatistics.from_trace(trace), objective, **fields)


@pytest.mark.parametrize("node_sizes", [(2, 2), (1, 3), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("execution", ["dispatch_combine", "context_coherent"])
@pytest.mark.long
def test_search_keeps_a_replica_of_every_expert_in_every_failure(node_sizes: tuple[int, ...], execution: str) -> None:
    topology = topology_of(*node_sizes)
    failures = mp.single_failures(topology)
    slots = [8] + [3] * 3 if node_sizes == (1, 3) else None
    problem = problem_of(topology, execution, slots=None if slots else 17, device_slots=slots, tolerates=failures)
    plan = mp.solve(problem, "search", proposals=400, steps=4)
    for failure in failures:
        left = [g for g in range(topology.num_devices) if g not in failure.devices]
        for row in plan.physical_to_logical:
            assert {row[p] for p in range(plan.num_slots) if plan.slot_device[p] in left} == set(range(8))
    assert mp.survives(plan, failures).all()
    assert not any(lost_experts(plan, failure).any() for failure in failures)


def test_some_devices_may_be_tolerated_with_fewer_slots() -> None:
    topology = topology_of(4)
    tolerated = mp.single_failures(topology)[2:]
    with pytest.raises(mp.InputError, match=r"at most 5 experts.*at least 11 slots.*given 9"):
        problem_of(topology, slots=9, tolerates=tolerated)
    plan = mp.solve(problem_of(topology, slots=12, tolerates=tolerated), "search", proposals=300, steps=4)
    assert mp.survives(plan, tolerated).all()


def test_a_solver_that_cannot_tolerate_failures_says_who_can() -> None:
    problem = problem_of(topology_of(2), slots=16, tolerates=mp.single_failures(topology_of(2)))
    with pytest.raises(mp.UnsupportedError, match=r"failures to tolerate; these do: .*search"):
        mp.solve(problem, "eplb")


@pytest.mark.parametrize("name", ["device:4", "rack:1", "node:-1", "device", "node:9+device:0"])
def test_failures_that_are_not_there_are_refused_by_name(name: str) -> None:
    with pytest.raises(mp.InputError, match=r"must be device:N|the topology has"):
        mp.Failure.named(name, topology_of(2, 2))


def test_failures_have_the_names_and_devices_of_their_parts() -> None:
    topology = topology_of(1, 3)
    assert mp.Failure.named("device:1+node:0", topology).devices == (0, 1)
    names = [failure.name for failure in mp.single_failures(topology)]
    assert names == ["device:0", "device:1", "device:2", "device:3", "node:0", "node:1"]
    assert [f.name for f in mp.single_failures(topology_of(2))] == ["device:0", "device:1"]
    with pytest.raises(mp.InputError, match="takes all 2 devices"):
        problem_of(topology_of(2), slots=16, tolerates=[mp.Failure("node:0", (0, 1))])


def placements(experts: int, slots: np.ndarray, allowed: np.ndarray) -> Any:
    """All [E, G] tables with so many experts a device."""
    columns = [
        [c for c in itertools.combinations(range(experts), int(s)) if allowed[list(c), g].all()]
        for g, s in enumerate(slots)
    ]
    for chosen in itertools.product(*columns):
        holds = np.zeros((experts, len(slots)), dtype=bool)
        for g, column in enumerate(chosen):
            holds[list(column), g] = True
        yield holds


@settings(max_examples=60)
@given(st.data())
def test_a_start_is_found_exactly_when_brute_force_finds_one(data: st.DataObject) -> None:
    experts = data.draw(st.integers(2, 4))
    devices = data.draw(st.integers(2, 4))
    slots = np.array(data.draw(st.lists(st.integers(0, min(3, experts)), min_size=devices, max_size=devices)))
    allowed = np.array(
        data.draw(st.lists(st.booleans() | st.just(True), min_size=experts * devices, max_size=experts * devices))
    )
    allowed = allowed.reshape(experts, devices)
    sets = data.draw(
        st.lists(st.sets(st.integers(0, devices - 1), min_size=1, max_size=devices - 1), min_size=1, max_size=4)
    )
    failures = failure_mask([mp.Failure("f", tuple(sorted(s))) for s in sets], devices)
    load = np.arange(experts, dtype=float)

    def answers(holds: np.ndarray) -> bool:
        return all((holds & ~failure).any(axis=1).all() for failure in [*failures, np.zeros(devices, bool)])

    exists = any(answers(holds) for holds in placements(experts, slots, allowed))
    try:
        table = tolerant_layer(load, slots, allowed, failures)
    except mp.SolveError as error:
        assert not exists, error  # noqa: PT017
        assert "does not exist" in str(error)  # noqa: PT017
        return
    holds = np.zeros((experts, devices), dtype=bool)
    holds[table, np.repeat(np.arange(devices), slots)] = True
    assert (holds.sum(axis=0) == slots).all()
    assert (holds <= allowed).all()
    assert answers(holds)


def test_a_large_layer_is_dealt_without_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = topology_of(8, 8, 8, 8)
    failures = failure_mask(mp.single_failures(topology), 32)
    monkeypatch.setattr(starts, "_programmed", None)
    load = np.random.default_rng(0).pareto(1.5, 256) + 0.1
    table = tolerant_layer(load, np.full(32, 18), np.ones((256, 32), bool), failures)
    assert len(table) == 576


def test_with_free_shares_replicas_that_only_stand_by_cost_no_step_time() -> None:
    # Weights are read, not computed with: a replica that serves costs as much again as its expert.
    topology, trace = topology_of(2, 2), make_trace(0)
    model = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=2048, ffn_size=2048)
    fields = {"statistics": mp.RoutingStatistics.from_trace(trace), "objective": mp.Objective(split="free")}
    fields["batches"] = [mp.Batch("decode", tokens_per_device=16)]
    plain = mp.Problem(model, topology, **fields)  # type: ignore[arg-type]
    safe = mp.Problem(model, topology, slots=16, tolerates=mp.single_failures(topology), **fields)  # type: ignore[arg-type]
    values = [mp.solve(problem, "search", proposals=2000).certificate.value for problem in (plain, safe)]  # type: ignore[union-attr]
    assert values[1] <= 1.05 * values[0]
