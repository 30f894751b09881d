"""ExFlow's plans: optimal where they say so, never better than the best there is, and bounded by what holds for all."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pulp
import pytest
from affinity_problems import (
    crossing_share,
    devices_of,
    fewest_crossings,
    layer_placements,
    problem_of,
    random_transitions,
    statistics_of,
    topology_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.placement.layer_slots import even_slots
from moeplace.placement.plan import RELATIVE_TOLERANCE
from moeplace.placement.progress import Progress
from moeplace.solvers.base import Budget, Solution
from moeplace.solvers.exflow import (
    Exflow,
    assignment_sweeps,
    exflow_program,
    local_weight,
    local_weight_bound,
    together_program,
)
from moeplace.solvers.mip.program import BACKENDS, forbidden_names, renaming, solve_program

pytestmark = pytest.mark.slow

NODES = {"2": [[1.0, 1.0]], "1+1": [[1.0], [1.0]], "3": [[1.0] * 3], "2+1": [[1.0, 1.0], [1.0]]}
slow = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
shapes = {
    "seed": st.integers(0, 10**6),
    "layers": st.integers(2, 3),
    "experts": st.integers(4, 6),
    "sharpness": st.sampled_from([0.1, 0.5, 5.0]),
}


def solved(problem: mp.Problem, seconds: float | None = None, **options: object) -> Solution:
    return Exflow().solve(problem, Budget(seconds=seconds), **options)  # type: ignore[arg-type]


def proven(solution: Solution) -> bool:
    return solution.certificate.gap is not None and solution.certificate.gap <= RELATIVE_TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@given(nodes=st.sampled_from(sorted(NODES)), warm_start=st.booleans(), **shapes)
@slow
def test_the_direct_form_finds_and_proves_the_optimum(
    backend: str, seed: int, layers: int, experts: int, sharpness: float, nodes: str, warm_start: bool
) -> None:
    transitions = random_transitions(seed, layers, experts, sharpness=sharpness)
    problem = problem_of(transitions, topology_of(NODES[nodes]))
    solution = solved(problem, backend=backend, warm_start=warm_start)
    best = fewest_crossings(transitions, problem.slots_per_device)
    assert crossing_share(transitions, devices_of(problem, solution)) == pytest.approx(best, abs=1e-9)
    assert solution.certificate.value == pytest.approx(best, abs=1e-9)
    assert proven(solution)
    assert solution.stop == "finished"


@pytest.mark.parametrize("form", ["staged", "bisect"])
@given(nodes=st.sampled_from([[[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.0]], [[1.0] * 3]]), **shapes)
@slow
def test_the_other_forms_are_no_better_than_the_optimum_nor_their_bounds_above_it(
    form: str, seed: int, layers: int, experts: int, sharpness: float, nodes: list[list[float]]
) -> None:
    transitions = random_transitions(seed, layers, experts, sharpness=sharpness)
    problem = problem_of(transitions, topology_of(nodes))
    solution = solved(problem, form=form)
    value = crossing_share(transitions, devices_of(problem, solution))
    best = fewest_crossings(transitions, problem.slots_per_device)
    assert solution.certificate.value == pytest.approx(value, abs=1e-9)
    assert value >= best - 1e-9
    assert solution.certificate.bound is not None
    assert solution.certificate.bound <= best + 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_staged_form_first_sends_as_little_as_possible_between_nodes(backend: str) -> None:
    transitions = random_transitions(3, 3, 6)
    problem = problem_of(transitions, topology_of([[1.0, 1.0], [1.0]]), device_slots=[2, 1, 3])
    device_of = devices_of(problem, solved(problem, backend=backend, form="staged"))
    node_of = problem.topology.node_of[device_of]
    assert crossing_share(transitions, node_of) == pytest.approx(fewest_crossings(transitions, np.array([3, 3])))


@given(**shapes, devices=st.integers(2, 4))
@slow
def test_the_bound_without_search_holds_for_every_placement(
    seed: int, layers: int, experts: int, sharpness: float, devices: int
) -> None:
    transitions = random_transitions(seed, layers, experts, sharpness=sharpness)
    slots = even_slots(experts, devices)
    most_local = transitions.sum() * (1 - fewest_crossings(transitions, slots))
    assert local_weight_bound(transitions, slots, Budget()) >= most_local * (1 - 1e-12)
    assert local_weight_bound(transitions, slots, Budget(seconds=1e-9)) >= most_local * (1 - 1e-12)


def test_the_bound_without_search_is_the_program_s_relaxation_for_equal_slots() -> None:
    transitions = random_transitions(5, 4, 8, tokens=3000, sharpness=1.0)
    slots = np.array([2, 2, 2, 2])
    program = exflow_program(transitions, slots)
    # Without the order of device names, too.
    free = replace(program.program.relaxed(), upper=np.ones(program.program.variables))
    relaxed = 1.0 - solve_program(free, Budget()).value * program.unit
    assert local_weight_bound(transitions, slots, Budget()) / transitions.sum() == pytest.approx(relaxed, rel=1e-6)


def test_one_variable_an_expert_pair_is_the_paper_s_one_a_token() -> None:
    """ExFlow's own variables, one a token and layer, have the same optimum, value and number of crossings."""
    rng = np.random.default_rng(4)
    routes = rng.integers(4, size=(30, 3))
    model = pulp.LpProblem("per_token", pulp.LpMinimize)
    x = {
        key: model.add_variable("x_{}_{}_{}".format(*key), 0, 1, pulp.LpInteger)
        for key in itertools.product(range(3), range(4), range(2))
    }
    for layer in range(3):
        for expert in range(4):
            model += x[layer, expert, 0] + x[layer, expert, 1] == 1
        for device in range(2):
            model += pulp.lpSum(x[layer, expert, device] for expert in range(4)) == 2
    moves = []
    for token, route in enumerate(routes.tolist()):
        for layer in range(2):
            moved = model.add_variable(f"moved_{token}_{layer}", 0, 1)
            moves.append(moved)
            for device in range(2):
                here, there = x[layer, route[layer], device], x[layer + 1, route[layer + 1], device]
                model += moved >= here - there
    model += pulp.lpSum(moves)
    model.solve(pulp.HiGHS(msg=False, gapRel=0))
    transitions = np.zeros((2, 4, 4))
    for layer in range(2):
        np.add.at(transitions[layer], (routes[:, layer], routes[:, layer + 1]), 1.0)
    solution = solved(problem_of(transitions, topology_of([[1.0, 1.0]])))
    assert proven(solution)
    assert solution.certificate.value * transitions.sum() == pytest.approx(pulp.value(model.objective), abs=1e-6)


@given(seed=st.integers(0, 10**6), slots=st.sampled_from([[2, 2, 2], [3, 3], [4, 1, 1], [3, 0, 3], [1] * 6]))
@slow
def test_a_start_satisfies_the_whole_program_whichever_names_devices_have(seed: int, slots: list[int]) -> None:
    rng = np.random.default_rng(seed)
    transitions = random_transitions(seed, 3, 6)
    device_of = np.stack([rng.permutation(np.repeat(np.arange(len(slots)), slots)) for _ in range(3)])
    for form in (exflow_program, together_program):
        program = form(transitions, np.array(slots))
        values = program.start(device_of)
        assert program.program.violation(values) <= 1e-9
        share = crossing_share(transitions, device_of)
        assert program.program.value(values) * program.unit == pytest.approx(share)
        assert crossing_share(transitions, program.placement(values)) == pytest.approx(share)


@given(names=st.permutations([0, 0, 1, 1, 2, 3]), kinds=st.sampled_from(["aaaa", "aabb", "abca", "abcd"]))
def test_the_one_renaming_in_order_of_first_use_is_chosen_and_allowed(names: list[int], kinds: str) -> None:
    forbidden = set(forbidden_names(len(names), kinds))
    orders = [
        order
        for order in itertools.permutations(range(4))
        if all(kinds[new] == kinds[n] for n, new in enumerate(order))
    ]
    named = {order: [(rank, order[name]) for rank, name in enumerate(names)] for order in orders}
    new = tuple(renaming(np.array(names), kinds).tolist())
    assert not forbidden & set(named[new])
    for order, taken in named.items():
        firsts = list(dict.fromkeys(name for _, name in taken))
        in_order = all(
            [name for name in firsts if kinds[name] == kind] == [n for n in range(4) if kinds[n] == kind]
            for kind in set(kinds)
        )
        assert in_order == (order == new)


@given(**shapes, devices=st.integers(2, 3))
@slow
def test_assignment_sweeps_keep_the_slots_and_end_where_no_layer_improves(
    seed: int, layers: int, experts: int, sharpness: float, devices: int
) -> None:
    transitions = random_transitions(seed, layers, experts, sharpness=sharpness)
    slots = even_slots(experts, devices)
    device_of = assignment_sweeps(transitions, slots, Budget(seed=seed))
    weight = local_weight(transitions, device_of)
    for layer in range(layers):
        assert (np.bincount(device_of[layer], minlength=devices) == slots).all()
        for row in layer_placements(slots):
            other = device_of.copy()
            other[layer] = row
            assert local_weight(transitions, other) <= weight + 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_time_limit_gives_a_plan_with_its_gap_and_no_claim_of_optimality(backend: str) -> None:
    transitions = random_transitions(0, 8, 32, tokens=20_000, sharpness=0.5)
    problem = problem_of(transitions, topology_of([[1.0] * 4]))
    solution = solved(problem, seconds=4.0, backend=backend)
    assert solution.stop == "time limit"
    assert not proven(solution)
    assert solution.certificate.bound is not None
    assert 0 < solution.certificate.bound < solution.certificate.value
    assert solution.certificate.value == pytest.approx(crossing_share(transitions, devices_of(problem, solution)))
    swept = assignment_sweeps(transitions, problem.slots_per_device, Budget(), restarts=1)
    assert solution.certificate.value <= crossing_share(transitions, swept) + 1e-9


@pytest.mark.parametrize("form", ["direct", "staged", "bisect"])
def test_a_spent_budget_leaves_the_start_or_an_error_without_one(form: str) -> None:
    problem = problem_of(random_transitions(0, 4, 8, tokens=5000), topology_of([[1.0, 1.0], [1.0, 1.0]]))
    solution = solved(problem, seconds=1e-9, form=form)
    devices_of(problem, solution)
    assert solution.stop == "time limit"
    with pytest.raises(mp.SolveError, match="allow more seconds"):
        solved(problem, seconds=1e-9, form=form, warm_start=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["direct", "staged", "bisect"])
def test_same_seed_gives_the_same_plan(backend: str, form: str) -> None:
    problem = problem_of(random_transitions(2, 3, 6), topology_of([[1.0, 1.0], [1.0]]))
    one, two = (Exflow().solve(problem, Budget(seed=9), backend=backend, form=form) for _ in range(2))
    np.testing.assert_array_equal(one.physical_to_logical, two.physical_to_logical)
    assert one.certificate == two.certificate


@pytest.mark.parametrize("form", ["direct", "staged", "bisect"])
@pytest.mark.parametrize(
    ("experts", "nodes", "slots"),
    [
        (7, [[1.0] * 3], None),
        (5, [[1.0, 1.0], [1.0, 1.0]], None),
        (2, [[1.0] * 3], None),
        (6, [[1.0, 1.0], [1.0]], [4, 0, 2]),
        (6, [[1.0, 1.0], [1.0, 1.0]], [0, 0, 5, 1]),
    ],
)
def test_devices_may_hold_different_numbers_of_experts(
    form: str, experts: int, nodes: list[list[float]], slots: list[int] | None
) -> None:
    transitions = random_transitions(1, 3, experts)
    problem = problem_of(transitions, topology_of(nodes), device_slots=slots)
    solution = solved(problem, form=form)
    value = crossing_share(transitions, devices_of(problem, solution))
    best = fewest_crossings(transitions, problem.slots_per_device)
    assert solution.certificate.value == pytest.approx(value, abs=1e-9)
    if form == "direct":
        assert value == pytest.approx(best, abs=1e-9)
        assert proven(solution)
    assert solution.certificate.bound is not None
    assert solution.certificate.bound <= best + 1e-9


@pytest.mark.parametrize("form", ["direct", "staged", "bisect"])
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_layer_without_tokens_is_placed_too(form: str, empty: int) -> None:
    transitions = random_transitions(0, 3, 6, empty=empty)
    problem = problem_of(transitions, topology_of([[1.0, 1.0], [1.0]]))
    solution = solved(problem, form=form)
    assert solution.certificate.value == pytest.approx(crossing_share(transitions, devices_of(problem, solution)))
    assert form != "direct" or solution.certificate.value == pytest.approx(
        fewest_crossings(transitions, problem.slots_per_device), abs=1e-9
    )


@pytest.mark.parametrize("transitions", [np.zeros((2, 6, 6)), np.zeros((0, 6, 6))], ids=["no tokens", "one layer"])
def test_nothing_to_cross_is_proven_at_once(transitions: np.ndarray) -> None:
    statistics = statistics_of(transitions, load=np.ones((len(transitions) + 1, 6)))
    problem = problem_of(transitions, topology_of([[1.0, 1.0]]), statistics=statistics)
    solution = solved(problem)
    devices_of(problem, solution)
    assert (solution.certificate.value, solution.certificate.bound) == (0.0, 0.0)


def test_a_form_of_one_program_proves_its_plan_whatever_it_is_called() -> None:
    transitions = random_transitions(6, 3, 6, sharpness=5.0)
    for form, nodes in (("staged", [[1.0, 1.0]]), ("staged", [[1.0], [1.0]]), ("bisect", [[1.0, 1.0]])):
        assert proven(solved(problem_of(transitions, topology_of(nodes)), form=form))


def test_progress_of_the_direct_form_falls_in_value_with_bounds_below() -> None:
    heard: list[Progress] = []
    problem = problem_of(random_transitions(0, 5, 16, tokens=5000, sharpness=0.5), topology_of([[1.0] * 2]))
    budget = Budget(seconds=3.0, progress=heard.append)
    solution = Exflow().solve(problem, budget)
    values = [news.value for news in heard if news.value is not None]
    assert values == sorted(values, reverse=True)
    assert values[-1] == solution.certificate.value
    assert all(news.bound is not None and news.bound <= values[-1] + 1e-9 for news in heard)


def test_statistics_without_transitions_are_refused() -> None:
    transitions = random_transitions(0, 3, 6)
    statistics = replace(statistics_of(transitions), transitions=None)
    with pytest.raises(mp.UnsupportedError, match="transitions between layers is needed"):
        solved(problem_of(transitions, topology_of([[1.0, 1.0]]), statistics=statistics))


def test_a_program_too_large_to_build_is_refused_before_any_work() -> None:
    transitions = np.ones((10, 256, 256))
    problem = problem_of(transitions, topology_of([[1.0] * 8]))
    with pytest.raises(mp.UnsupportedError, match=r"5,242,880 pair variables \(limit 5,000,000\).*search"):
        solved(problem)


@pytest.mark.parametrize(
    ("option", "given_name", "wanted"),
    [("backend", "cbcc", "cbc"), ("form", "bisekt", "bisect"), ("form", "stage", "staged")],
)
def test_an_unknown_backend_or_form_names_the_nearest(option: str, given_name: str, wanted: str) -> None:
    problem = problem_of(random_transitions(0, 2, 4), topology_of([[1.0, 1.0]]))
    with pytest.raises(mp.InputError, match=f"{option} '{given_name}' is unknown; did you mean '{wanted}'"):
        solved(problem, **{option: given_name})
