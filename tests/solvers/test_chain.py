"""The chain solver's plans are optimal: compared with every placement there is on small models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.placement.plan import RELATIVE_TOLERANCE
from moeplace.solvers.base import fill_slots
from moeplace.solvers.chain import PlacementSpace, cheapest_path

pytestmark = pytest.mark.slow

TRANSITIONS = "cross-device transitions, share of all"


def random_trace(rng: np.random.Generator, layers: int, experts: int, top_k: int, tokens: int = 40) -> mp.RoutingTrace:
    keys = rng.random((tokens, layers, experts)) + 2 * rng.random((layers, experts))
    return mp.RoutingTrace.from_arrays(
        np.argsort(keys, axis=2)[:, :, :top_k], num_experts=experts, sequence=np.arange(tokens) // 5
    )


def topology_named(kind: str) -> mp.Topology:
    base = mp.Device(compute=1e12, memory=1e12, memory_bandwidth=1e10, intra_bandwidth=1e9)
    slow = base.replace(compute=3e11, intra_bandwidth=4e8)
    nodes = {
        "2": [[base, base]],
        "1+1": [[base], [base]],
        "3": [[base, base, base]],
        "2+1": [[base, base], [base]],
        "unequal": [[base, slow], [slow]],
    }[kind]
    return mp.Topology(nodes=tuple(mp.Node(devices=tuple(node), inter_bandwidth=3e8) for node in nodes))


def problem_of(trace: mp.RoutingTrace, topology: mp.Topology, **fields: object) -> mp.Problem:
    model = mp.ModelSpec(
        layers=trace.num_layers, experts=trace.num_experts, top_k=trace.top_k, hidden_size=256, ffn_size=16
    )
    return mp.Problem(model, topology, mp.RoutingStatistics.from_trace(trace), **fields)  # type: ignore[arg-type]


def layer_placements(problem: mp.Problem, layer: int) -> list[np.ndarray]:
    """[E] device of each expert, every way the problem allows."""
    result = []
    for row in itertools.product(range(problem.num_devices), repeat=problem.model.experts):
        if (np.bincount(row, minlength=problem.num_devices) != problem.slots_per_device).any():
            continue
        pinned = all(row[e] == g for (at, e), g in problem.pinned.items() if at == layer)
        forbidden = any(row[e] in devices for (at, e), devices in problem.forbidden.items() if at == layer)
        if pinned and not forbidden:
            result.append(np.array(row))
    return result


def all_placements(problem: mp.Problem) -> Iterator[np.ndarray]:
    """[L, E] device of each expert, every way the problem allows."""
    for rows in itertools.product(*(layer_placements(problem, layer) for layer in range(problem.model.layers))):
        yield np.stack(rows)


def crossing_share(problem: mp.Problem, device_of: np.ndarray) -> float:
    transitions = problem.statistics.total_transitions
    crossed = sum(
        matrix[here[:, None] != after].sum()
        for matrix, here, after in zip(transitions, device_of, device_of[1:], strict=False)
    )
    return float(crossed / transitions.sum())


def plan_devices(plan: mp.Plan) -> np.ndarray:
    return plan.device_share.argmax(axis=2)


@st.composite
def constraints(draw: st.DrawFn, layers: int, experts: int, devices: int) -> dict[str, object]:
    at = st.tuples(st.integers(0, layers - 1), st.integers(0, experts - 1))
    device = st.integers(0, devices - 1)
    return {
        "pinned": draw(st.dictionaries(at, device, max_size=2)),
        "forbidden": draw(st.dictionaries(at, st.lists(device, min_size=1, max_size=1), max_size=2)),
    }


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_transitions_are_the_fewest_of_all_placements(data: st.DataObject) -> None:
    layers, experts, devices = data.draw(
        st.sampled_from([(2, 4, 2), (2, 6, 2), (2, 4, 3), (2, 5, 3), (2, 6, 3), (3, 4, 2), (3, 5, 2), (3, 4, 3)])
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    slots = None
    if data.draw(st.booleans()):
        slots = np.bincount(rng.integers(devices, size=experts), minlength=devices).tolist()
    bound = data.draw(st.one_of(st.just({}), constraints(layers, experts, devices)))
    problem = problem_of(
        random_trace(rng, layers, experts, top_k=int(rng.integers(1, 3))),
        topology_named(str(devices)),
        device_slots=slots,
        **bound,
    )
    options = [crossing_share(problem, device_of) for device_of in all_placements(problem)]
    if not options:
        with pytest.raises(mp.SolveError, match="pinned and forbidden"):
            mp.solve(problem, "chain", minimise="transitions")
        return
    plan = mp.solve(problem, "chain", minimise="transitions")
    assert plan.certificate is not None
    assert plan.certificate.objective == TRANSITIONS
    assert plan.certificate.value == pytest.approx(min(options), abs=1e-12)
    assert crossing_share(problem, plan_devices(plan)) == pytest.approx(plan.certificate.value, abs=1e-12)
    assert plan.bound == plan.certificate.value
    assert plan.gap == 0
    assert plan.proven_optimal
    assert any((plan_devices(plan) == device_of).all() for device_of in all_placements(problem))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
@pytest.mark.long
def test_step_time_is_the_least_of_all_placements(data: st.DataObject) -> None:
    kind, layers, experts = data.draw(
        st.sampled_from(
            [
                ("3", 3, 3),
                ("2", 2, 4),
                ("2", 3, 4),
                ("1+1", 2, 5),
                ("3", 2, 4),
                ("2+1", 2, 4),
                ("unequal", 2, 3),
                ("unequal", 2, 4),
            ]
        )
    )
    execution = data.draw(st.sampled_from(["dispatch_combine", "context_coherent"]))
    topology = topology_named(kind)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    trace = random_trace(rng, layers, experts, top_k=int(rng.integers(1, 4)))
    objective = mp.Objective(
        execution=execution,
        node_dedup=data.draw(st.booleans()),
        dispatch_dtype=data.draw(st.sampled_from(["fp8", "bf16"])),
    )
    bound = data.draw(st.one_of(st.just({}), constraints(layers, experts, topology.num_devices)))
    problem = problem_of(trace, topology, objective=objective, **bound)
    if data.draw(st.booleans()):
        homes = rng.integers(topology.num_devices, size=trace.num_tokens)
        sample = replace(trace, source=homes)
        problem = replace(problem, statistics=replace(problem.statistics, sample=sample))
    assert_fastest(problem)


@pytest.mark.parametrize("seed", range(6))
def test_devices_renamed_in_circles_keep_step_time_the_least(seed: int) -> None:
    # Three like devices: renamings that are not their own inverse, which two devices never show.
    trace = random_trace(np.random.default_rng(seed), layers=3, experts=3, top_k=1 + seed % 2)
    assert_fastest(problem_of(trace, topology_named("3"), objective=mp.Objective(execution="context_coherent")))


def assert_fastest(problem: mp.Problem) -> None:
    """Chain's plan, where there is any, has the least mean step time of all placements, and proves it."""
    steps = problem.statistics.require_sample().decode_steps(concurrency=6, steps=3, seed=7)
    seconds = [
        mp.evaluate(
            mp.Plan(problem.model, problem.topology, fill_slots(device_of), problem.slot_device), steps, problem
        ).step_seconds.mean()
        for device_of in all_placements(problem)
    ]
    if not seconds:
        return
    plan = mp.solve(problem, "chain", minimise="step", step_tokens=6, steps=3, seed=7)
    assert plan.certificate is not None
    assert "step seconds" in plan.certificate.objective
    assert plan.certificate.value == pytest.approx(min(seconds), rel=1e-6)
    assert mp.evaluate(plan, steps, problem).step_seconds.mean() == pytest.approx(plan.certificate.value, rel=1e-9)
    assert plan.bound is not None
    assert plan.bound <= min(seconds) * (1 + 1e-6)
    assert plan.gap is not None
    assert plan.gap <= RELATIVE_TOLERANCE


@pytest.mark.parametrize(("devices", "layers"), [(2, 32), (4, 4)])
def test_mixtral_size_equals_the_path_through_all_placements(devices: int, layers: int) -> None:
    problem = mixtral_problem(devices, layers)
    transitions = problem.statistics.total_transitions
    placed = np.eye(devices)[layer_placements(problem, 0)].reshape(-1, 8 * devices)

    def crossing(layer: int) -> np.ndarray:
        same = np.kron(transitions[layer], np.eye(devices))
        return transitions[layer].sum() - placed @ same @ placed.T

    _, least = cheapest_path([np.zeros(len(placed))] * layers, crossing)
    plan = mp.solve(problem, "chain", minimise="transitions")
    assert plan.certificate is not None
    assert plan.certificate.value == pytest.approx(least / transitions.sum(), abs=1e-12)


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("minimise", ["transitions", "step"])
def test_mixtral_size_is_proven_optimal(devices: int, minimise: str) -> None:
    plan = mp.solve(mixtral_problem(devices, 32), "chain", minimise=minimise)
    assert plan.proven_optimal
    assert plan.provenance.stop == "finished"
    assert (np.bincount(plan.slot_device) == 8 // devices).all()


def mixtral_problem(devices: int, layers: int, execution: str = "dispatch_combine") -> mp.Problem:
    trace = random_trace(np.random.default_rng(0), layers, 8, 2, tokens=2000)
    model = mp.ModelSpec(layers=layers, experts=8, top_k=2, hidden_size=4096, ffn_size=14336)
    topology = mp.Topology.preset("h100-hgx", devices_per_node=devices)
    objective = mp.Objective(execution=execution)  # type: ignore[arg-type]
    return mp.Problem(model, topology, mp.RoutingStatistics.from_trace(trace), objective=objective)


def test_coherent_steps_are_proven_on_two_devices() -> None:
    problem = mixtral_problem(2, 32, "context_coherent")
    plan = mp.solve(problem, "chain", minimise="step", steps=8)
    assert plan.proven_optimal
    steps = problem.statistics.require_sample().decode_steps(128, 8, seed=0)
    affine = mp.solve(problem, "chain", minimise="transitions")
    fastest, fewest = (mp.evaluate(each, steps, problem).step_seconds.mean() for each in (plan, affine))
    assert fastest <= fewest


def test_what_is_minimised_by_default_follows_the_execution() -> None:
    combined = mp.solve(mixtral_problem(2, 3), "chain", steps=2)
    coherent = mp.solve(mixtral_problem(2, 3, "context_coherent"), "chain")
    assert combined.certificate is not None
    assert coherent.certificate is not None
    assert "step seconds" in combined.certificate.objective
    assert coherent.certificate.objective == TRANSITIONS


def test_a_single_layer_has_no_transitions_and_is_optimal() -> None:
    plan = mp.solve(mixtral_problem(2, 1), "chain", minimise="transitions")
    assert (plan.certificate, plan.gap) == (mp.Certificate(TRANSITIONS, 0.0, 0.0), 0.0)


@pytest.mark.parametrize("minimise", ["transitions", None])
def test_too_many_placements_are_counted_and_others_named(minimise: str | None) -> None:
    trace = random_trace(np.random.default_rng(0), 3, 32, 4)
    problem = problem_of(trace, mp.Topology.preset("h100-hgx", devices_per_node=4))
    ways = "99,561,092,450,391,000"
    with pytest.raises(mp.UnsupportedError, match=rf"{ways}.*(exflow|moetuner)"):
        mp.solve(problem, "chain", minimise=minimise)


def test_too_many_steps_are_refused_with_a_number_that_fits() -> None:
    problem = mixtral_problem(8, 32, "context_coherent")
    with pytest.raises(mp.UnsupportedError, match=r"steps=(\d+) fits") as refusal:
        mp.solve(problem, "chain", minimise="step", steps=100_000, step_tokens=1)
    assert "s of work" in str(refusal.value)


@pytest.mark.parametrize("risk", ["cvar:0.9", "worst_workload", "regret"])
def test_risks_that_do_not_add_over_layers_are_refused(risk: str) -> None:
    problem = replace(mixtral_problem(2, 3), objective=mp.Objective(risk=risk))
    with pytest.raises(mp.UnsupportedError, match=f"risk '{risk}' does not add up"):
        mp.solve(problem, "chain")
    assert mp.solve(problem, "chain", minimise="transitions").proven_optimal


def test_prefill_steps_are_minimised_when_asked() -> None:
    problem = mixtral_problem(2, 3)
    plan = mp.solve(problem, "chain", batch="prefill", step_tokens=500, seed=1)
    assert plan.certificate is not None
    assert "32 sampled steps (prefill 500)" in plan.certificate.objective
    steps = problem.statistics.require_sample().prefill_steps(500, 32, seed=1)
    assert mp.evaluate(plan, steps, problem).step_seconds.mean() == pytest.approx(plan.certificate.value)
    with pytest.raises(mp.InputError, match="did you mean 'prefill'"):
        mp.solve(problem, "chain", batch="prefil")
    with pytest.raises(mp.InputError, match=r"step_tokens \(0\)"):
        mp.solve(problem, "chain", step_tokens=0)


def test_an_unknown_figure_to_minimise_names_the_nearest() -> None:
    with pytest.raises(mp.InputError, match="did you mean 'transitions'"):
        mp.solve(mixtral_problem(2, 2), "chain", minimise="transition")


def test_statistics_without_a_token_sample_are_refused_for_steps() -> None:
    problem = mixtral_problem(2, 2)
    bare = replace(problem, statistics=replace(problem.statistics, sample=None))
    with pytest.raises(mp.UnsupportedError, match="a token sample is needed"):
        mp.solve(bare, "chain", minimise="step")
    assert mp.solve(bare, "chain", minimise="transitions").proven_optimal


def test_running_out_of_time_is_an_error_since_there_is_no_plan_before_the_end() -> None:
    with pytest.raises(mp.SolveError, match=r"layer \d+ of 32 when its 1e-06 s ran out"):
        mp.solve(mixtral_problem(4, 32), "chain", minimise="transitions", seconds=1e-6)


@pytest.mark.parametrize(
    ("slots", "kind", "count", "representatives"),
    [
        ((4, 4), "aa", 70, 35),
        ((2, 2, 2, 2), "aaaa", 2520, 105),
        ((2, 2, 2, 2), "aabb", 2520, 630),
        ((3, 3, 2), "aaa", 560, 280),
        ((3, 0, 0, 2), "aaaa", 10, 10),
        ((1, 1, 1, 1), "abca", 24, 12),
    ],
)
def test_placements_are_all_there_once_up_to_renaming_devices(
    slots: tuple[int, ...], kind: str, count: int, representatives: int
) -> None:
    space = PlacementSpace(slots, tuple(kind))
    placed = {tuple(name[row]) for name in space.renamings for row in space.representatives}
    assert (space.count, space.count_representatives) == (count, representatives)
    assert (len(placed), len(space.representatives)) == (count, representatives)
    assert all((np.bincount(row, minlength=len(slots)) == slots).all() for row in placed)
    assert (space.renamings[0] == np.arange(len(slots))).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_cheapest_path_is_the_cheapest_of_all(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    unary = [np.where(rng.random(size) < 0.2, np.inf, rng.integers(-5, 5, size)) for size in sizes]
    pairs = [rng.integers(-5, 5, shape).astype(float) for shape in itertools.pairwise(sizes)]
    states, value = cheapest_path(unary, pairs.__getitem__)

    def cost(path: tuple[int, ...]) -> float:
        alone = sum(float(costs[state]) for costs, state in zip(unary, path, strict=True))
        return alone + sum(float(matrix[a, b]) for matrix, (a, b) in zip(pairs, itertools.pairwise(path), strict=True))

    assert value == min(cost(path) for path in itertools.product(*map(range, sizes)))
    assert cost(tuple(states.tolist())) == value


def test_cheapest_path_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(mp.InputError, match="at least one state"):
        cheapest_path([], lambda layer: np.zeros((1, 1)))
    with pytest.raises(mp.InputError, match=r"pair\(0\) has shape \(3, 2\), expected \(2, 3\)"):
        cheapest_path([np.zeros(2), np.zeros(3)], lambda layer: np.zeros((3, 2)))
