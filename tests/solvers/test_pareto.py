"""The front of step time, memory, bytes moved and failures survived."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from traces import make_trace

import moeplace as mp
from moeplace.placement.degraded import failure_mask, single_failures, with_standbys
from moeplace.solvers.pareto import ParetoConfig, non_dominated, problem_for, redundancy_steps, tolerable
from moeplace.solvers.search.starts import tolerant_layer

pytestmark = pytest.mark.slow

QUICK = {"proposals": 100, "steps": 4}
STEPS = make_trace(1).decode_steps(8, steps=6)


def problem_of(nodes: int = 2, devices: int = 2, memory: float = 8e10, **fields: Any) -> mp.Problem:
    model = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=256, ffn_size=512)
    device = mp.Device(compute=1e14, memory=memory, memory_bandwidth=2e12, intra_bandwidth=3e11)
    topology = mp.Topology(nodes=(mp.Node(devices=(device,) * devices, inter_bandwidth=5e10),) * nodes)
    return mp.Problem(model, topology, mp.RoutingStatistics.from_trace(make_trace(0)), **fields)


@given(hnp.arrays(np.int64, st.tuples(st.integers(0, 12), st.integers(1, 4)), elements=st.integers(0, 3)))
def test_only_rows_that_nothing_beats_stay(figures: np.ndarray) -> None:
    expected = [
        not any(
            all(a <= b for a, b in zip(other, row, strict=True)) and any(a < b for a, b in zip(other, row, strict=True))
            for other in figures
        )
        for row in figures
    ]
    assert non_dominated(figures).tolist() == expected


def test_a_front_of_nothing_is_empty_and_infinite_figures_lose() -> None:
    assert non_dominated([]).tolist() == []
    assert non_dominated([[1.0, np.inf], [1.0, 2.0]]).tolist() == [False, True]


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(2, 12),
    st.integers(0, 16),
    st.sampled_from(["device", "node"]),
)
def test_failures_said_to_be_survivable_are(sizes: list[int], experts: int, redundant: int, kind: str) -> None:
    device = mp.Device(compute=1e14, memory=8e10, memory_bandwidth=2e12, intra_bandwidth=3e11)
    topology = mp.Topology(nodes=tuple(mp.Node(devices=(device,) * size, inter_bandwidth=5e10) for size in sizes))
    devices = topology.num_devices
    total = experts + redundant
    slots = np.full(devices, total // devices) + (np.arange(devices) < total % devices)
    if slots.max() > experts:
        return
    failures = single_failures(topology, (kind,))  # type: ignore[arg-type]
    chosen = tolerable(failures, slots, redundant)
    if redundant >= experts and kind == "device" and devices > 1:
        assert len(chosen) == len(failures)
    if chosen:
        mask = failure_mask(chosen, devices)
        table = tolerant_layer(np.ones(experts), slots, np.ones((experts, devices), bool), mask)
        owner = np.repeat(np.arange(devices), slots)
        for failure in mask:
            assert set(table[~failure[owner]].tolist()) == set(range(experts))


def test_the_sweep_solves_each_configuration_and_marks_what_nothing_beats() -> None:
    problem = problem_of()
    front = mp.pareto(problem, STEPS, seconds=None, options=QUICK)
    assert [point.name for point in front.points] == [
        "+0 slots",
        "+4 slots",
        "+4 slots, device failures",
        "+8 slots",
        "+8 slots, device failures",
        "+8 slots, node failures",
    ]
    assert [config.name for config, _ in front.refused] == ["+4 slots, node failures"]
    assert "too few to survive any node failure" in front.refused[0][1]
    assert front.failures == {"device": 4, "node": 2}
    for point in front.points:
        assert point.seconds == mp.evaluate(point.plan, STEPS, problem).step_seconds.mean()
        assert point.redundant == point.plan.num_slots - 8
        assert point.memory == max(np.bincount(point.plan.slot_device)) * 3 * problem.model.bytes_per_expert
        for kind, count in point.survived.items():
            assert count == mp.survives(point.plan, single_failures(problem.topology, (kind,))).sum()
    survived = {point.name: point.survived for point in front.points}
    assert survived["+4 slots, device failures"]["device"] >= 2
    assert survived["+8 slots, device failures"]["device"] == 4
    assert survived["+8 slots, node failures"] == {"device": 4, "node": 2}
    figures = [(p.seconds, p.redundant, -p.survived["device"], -p.survived["node"]) for p in front.points]
    assert front.best.tolist() == non_dominated(figures).tolist()


def test_bytes_are_counted_from_the_plan_in_force_which_is_a_point_itself() -> None:
    problem = problem_of()
    current = mp.solve(problem, "contiguous")
    front = mp.pareto(
        problem, STEPS, redundant=[0], tolerate=[None], current=current, max_moved=[None], seconds=None, options=QUICK
    )
    first, second = front.points
    assert (first.name, first.plan, first.bytes_moved) == ("in force", current, 0.0)
    assert second.migration is not None
    assert second.bytes_moved == second.migration.moves * problem.model.bytes_per_expert
    assert front.best[0]


def test_redundancy_is_swept_in_whole_slots_a_device_as_far_as_memory_goes() -> None:
    layer_bytes = 3 * problem_of().model.bytes_per_expert
    assert redundancy_steps(problem_of()) == [0, 4, 8]
    assert redundancy_steps(problem_of(memory=3.5 * layer_bytes)) == [0, 4]
    with pytest.raises(mp.SolveError, match="16 slots a layer are wanted, the devices hold 12"):
        problem_for(ParetoConfig(8), problem_of(memory=3.5 * layer_bytes))


def test_a_solver_that_cannot_tolerate_failures_still_gives_the_other_points() -> None:
    front = mp.pareto(problem_of(), STEPS, redundant=[0, 8], solver="eplb")
    assert [point.name for point in front.points] == ["+0 slots", "+8 slots"]
    assert all("these do: search" in reason for _, reason in front.refused)


def test_an_interrupt_keeps_the_points_finished() -> None:
    def stop(news: mp.Progress) -> None:
        if news.done == 2:
            raise KeyboardInterrupt

    front = mp.pareto(problem_of(), STEPS, solver="eplb", tolerate=[None], progress=stop)
    assert front.interrupted
    assert len(front.points) == 2
    assert len(front.best) == 2


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"slots": 12}, {}, "leave slots, device_slots and tolerates out"),
        ({}, {"redundant": [-1]}, "must not be negative"),
    ],
)
def test_a_wrong_sweep_is_refused(fields: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(mp.InputError, match=message):
        mp.pareto(problem_of(**fields), STEPS, **options)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 4))
def test_standbys_make_a_plan_survive_and_leave_its_steps_alone(seed: int, more: int) -> None:
    rng = np.random.default_rng(seed)
    problem = problem_of(slots=8)
    table = np.stack([rng.permutation(8) for _ in range(3)])
    plan = mp.Plan(problem.model, problem.topology, table, problem.slot_device)
    failures = single_failures(problem.topology)
    safe = with_standbys(plan, np.full(4, 4 + more // 4), failures, rng.random((3, 8)))
    assert safe is not None
    assert mp.survives(safe, failures).all()
    before, after = (mp.evaluate(p, STEPS, problem).step_seconds for p in (plan, safe))
    np.testing.assert_allclose(after, before, rtol=1e-6)
    assert all(
        len(set(row[safe.slot_device == g])) == (safe.slot_device == g).sum()
        for row in safe.physical_to_logical
        for g in range(4)
    )
    assert with_standbys(plan, np.full(4, 3), failures, rng.random((3, 8))) is None
    with pytest.raises(mp.InputError, match="must be at least"):
        with_standbys(plan, np.full(4, 1), failures, rng.random((3, 8)))


def test_with_free_shares_more_slots_are_never_worse_on_the_steps_solved_on() -> None:
    front = mp.pareto(problem_of(objective=mp.Objective(split="free")), STEPS, seconds=None, options=QUICK)
    values = {point.name: point.plan.certificate.value for point in front.points}  # type: ignore[union-attr]
    assert values["+4 slots"] <= values["+0 slots"]
    assert values["+8 slots"] <= min(values["+0 slots"], values["+4 slots"], values["+4 slots, device failures"])
    assert max(values["+8 slots, device failures"], values["+8 slots, node failures"]) <= values["+0 slots"]
    by_name = {point.name: point for point in front.points}
    assert by_name["+8 slots, node failures"].survived == {"device": 4, "node": 2}


def test_limits_of_bytes_moved_are_swept_and_kept() -> None:
    problem = problem_of()
    current = mp.solve(problem, "contiguous")
    size = problem.model.bytes_per_expert
    front = mp.pareto(
        problem,
        STEPS,
        redundant=[0, 8],
        tolerate=[None],
        current=current,
        max_moved=[None, 4 * size],
        seconds=None,
        options=QUICK,
    )
    assert [point.config.max_moved for point in front.points if point.config] == [None, 4 * size, None]
    limited = front.points[2]
    assert limited.migration is not None
    assert limited.migration.moves <= 4
    # Every one of 8 more slots a layer needs an expert that its device does not hold.
    ((config, reason),) = front.refused
    assert config == ParetoConfig(8, None, 4 * size)
    assert "move 24 experts" in reason
    assert config.name == f"+8 slots, {4 * size / 1e9:.3g} GB moved"
    with pytest.raises(mp.InputError, match="needs Problem.current"):
        mp.pareto(problem, STEPS, max_moved=[0.0])
