"""Layers with slots of their own: what a problem says of them, who fills them, and what is proven of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from emptied_slots import empty_some
from every_table import bound_of
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import make_trace

import moeplace as mp
from moeplace.placement.bounds import step_seconds_bound
from moeplace.placement.cost import window_seconds
from moeplace.placement.evaluate import evaluate_on
from moeplace.placement.migration import migration
from moeplace.placement.plan import EMPTY
from moeplace.solvers.base import Feature
from moeplace.solvers.search.evaluator import Evaluator
from moeplace.solvers.search.scenario import scenario_from
from moeplace.solvers.solve import SOLVERS

pytestmark = pytest.mark.slow

MODEL = mp.ModelSpec(layers=3, experts=4, top_k=2, hidden_size=256, ffn_size=512, moe_layers=(2, 3, 7))
FAST = mp.Device(compute=2e14, memory=8e10, memory_bandwidth=2e12, intra_bandwidth=3e9)
SLOW = mp.Device(compute=1e14, memory=8e10, memory_bandwidth=1e12, intra_bandwidth=1e9)
CLUSTER = mp.Topology(
    nodes=(mp.Node(devices=(FAST, SLOW), inter_bandwidth=4e8), mp.Node(devices=(SLOW,), inter_bandwidth=4e8))
)
ABLE = [solver.name for solver in SOLVERS if Feature.LAYER_SLOTS in solver.supports]


def counts(seed: int = 0, layers: int = 3, experts: int = 4, windows: int = 2) -> mp.RoutingStatistics:
    load = np.random.default_rng(seed).gamma(1.0, size=(windows, layers, experts))
    return mp.RoutingStatistics(
        experts=experts,
        moe_layers=(2, 3, 7)[:layers],
        load=load,
        window_workload=np.zeros(windows, np.int64),
        top_k=2,
    )


def tokens(seed: int = 0, top_k: int = 2) -> mp.RoutingTrace:
    rng = np.random.default_rng(seed)
    skew = np.exp(1.5 * rng.normal(size=(3, 4)))
    ids = np.argsort(rng.gumbel(size=(64, 3, 4)) + np.log(skew), axis=2)[:, :, ::-1][:, :, :top_k]
    return mp.RoutingTrace.from_arrays(
        ids.copy(), num_experts=4, moe_layers=(2, 3, 7), sequence=np.arange(64) // 8, step=np.arange(64) // 16
    )


def problem(
    statistics: mp.RoutingStatistics | None = None, topology: mp.Topology = CLUSTER, **fields: Any
) -> mp.Problem:
    objective = mp.Objective(**fields.pop("objective", {}))
    return mp.Problem(MODEL, topology, statistics or counts(), objective, **fields)


def fillings(slots: np.ndarray, experts: int) -> list[np.ndarray]:
    """Every [P_l] with all experts and none twice on a device, for slots [G]."""
    contents = [list(itertools.combinations(range(experts), int(size))) for size in slots]
    rows = (list(itertools.chain(*chosen)) for chosen in itertools.product(*contents))
    return [np.array(row) for row in rows if len(set(row)) == experts]


def test_each_layer_has_its_own_slots_at_the_front_of_every_device_s_run() -> None:
    asked = problem(slots=[4, 8, 5])
    assert asked.layer_slots.tolist() == [[2, 1, 1], [3, 3, 2], [2, 2, 1]]
    assert asked.num_slots == 8
    assert asked.slot_device.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert asked.layer_slot_device(2).tolist() == [0, 0, 1, 1, 2]
    assert asked.slot_table([np.arange(4), np.arange(8) % 4, np.arange(5) % 4]).tolist() == [
        [0, 1, EMPTY, 2, EMPTY, EMPTY, 3, EMPTY],
        [0, 1, 2, 3, 0, 1, 2, 3],
        [0, 1, EMPTY, 2, 3, EMPTY, 0, EMPTY],
    ]
    uneven = problem(device_slots=[[2, 1, 1], [1, 0, 3], [3, 3, 3]])
    assert uneven.slots_per_device.tolist() == [3, 3, 3]
    assert uneven.layer_slot_device(1).tolist() == [0, 2, 2, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slots": [4, 5]}, r"\[4, 5\].*one for each of the 3 MoE layers \(2, 3, 7\)"),
        ({"slots": [4, 5, 6.5]}, r"slots is \[4, 5, 6.5\].*expected a whole number or a sequence of whole numbers"),
        ({"slots": [4, 3, 5]}, r"slots \(3\) must be at least the number of experts \(4\).*layer 3"),
        ({"slots": [4, 5, 13]}, r"slots \(13\) of layer 7 are more than 4 experts on 3 devices fill \(12\)"),
        ({"device_slots": [[2, 1, 1]] * 2}, "one a device, or such a list for each of the 3 MoE layers"),
        ({"device_slots": [[2, 1, 1], [2, 2], [2, 1, 1]]}, "must name 3 non-negative slot counts"),
        ({"device_slots": [[2, 1, 1], [4, 0, 0], [1, 1, 1]]}, r"slots \(3\) must be at least.*layer 7"),
        ({"slots": [4, 5, 6], "device_slots": [2, 2, 1]}, r"slots \(4\) is not the sum of device_slots \(5\)"),
        ({"slots": [8, 7, 8], "tolerates": [mp.Failure("device:0", (0,))]}, None),
        (
            {"slots": [8, 5, 8], "tolerates": mp.single_failures(CLUSTER, ("device",))},
            "at least 8 slots.*given 5 in layer 3",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused_with_the_layer(fields: dict[str, Any], message: str | None) -> None:
    if message is None:
        problem(**fields)
        return
    with pytest.raises(mp.InputError, match=message):
        problem(**fields)


def test_memory_holds_the_sum_over_layers_not_the_widest_of_them() -> None:
    # Room for 6 experts a device: 2 + 1 + 3 in layers of their own, while 3 a layer would take 9.
    room = 6.5 * MODEL.bytes_per_expert
    device = FAST.model_copy(update={"memory": room})
    small = mp.Topology(nodes=(mp.Node(devices=(device,) * 4, inter_bandwidth=4e8),))
    plan = mp.solve(problem(topology=small, slots=[8, 4, 12]), "search", proposals=20)
    steps = tokens().decode_steps(8, 2, 0)
    memory = mp.evaluate(plan, steps, problem(topology=small)).device_memory
    assert memory.tolist() == [6 * MODEL.bytes_per_expert] * 4
    with pytest.raises(mp.InputError, match="device 0 would hold .* in its 1 to 4 slots a layer"):
        problem(topology=small, slots=[8, 4, 16])
    with pytest.raises(mp.InputError, match="in its 3 slots a layer"):
        problem(topology=small, slots=12)


@pytest.mark.parametrize("solver", ABLE)
@pytest.mark.parametrize("recorded", ["counts", "tokens"])
def test_a_list_of_one_number_is_that_number(solver: str, recorded: str) -> None:
    statistics = counts() if recorded == "counts" else mp.RoutingStatistics.from_trace(tokens())
    options = {"proposals": 60} if solver == "search" else {}
    one, listed = (mp.solve(problem(statistics, slots=slots), solver, **options) for slots in (6, [6, 6, 6]))
    assert one.fingerprint == listed.fingerprint
    assert one.certificate == listed.certificate


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000),
    slots=st.lists(st.integers(4, 12), min_size=3, max_size=3),
    split=st.sampled_from(["equal", "free"]),
    replicas=st.sampled_from(["share", "nearest"]),
    recorded=st.sampled_from(["counts", "tokens", "coherent"]),
)
def test_every_layer_of_a_search_fills_its_own_slots_and_no_device_holds_an_expert_twice(
    seed: int, slots: list[int], split: str, replicas: str, recorded: str
) -> None:
    objective = {"split": split}
    if recorded == "coherent":
        objective["execution"] = "context_coherent"
    elif recorded == "tokens":
        objective["replica_choice"] = replicas
    statistics = counts(seed) if recorded == "counts" else mp.RoutingStatistics.from_trace(tokens(seed))
    asked = problem(statistics, slots=slots, objective=objective)
    plan = mp.solve(asked, "search", proposals=40, seed=seed)
    assert plan.slots_per_device.tolist() == asked.layer_slots.tolist()
    assert plan.slots_per_device.sum(axis=1).tolist() == slots
    assert (plan.holds.sum(axis=(1, 2)) == slots).all(), "none twice on a device"
    assert (plan.shares[~plan.filled] == 0).all()
    assert plan.certificate is not None
    assert plan.certificate.bound is not None
    assert plan.certificate.bound <= plan.certificate.value


@pytest.mark.parametrize("solver", ABLE)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1000), slots=st.lists(st.integers(4, 12), min_size=3, max_size=3))
def test_every_solver_that_can_fills_exactly_the_slots_asked_for(solver: str, seed: int, slots: list[int]) -> None:
    asked = problem(counts(seed), slots=slots)
    plan = mp.solve(asked, solver, seed=seed, **({"proposals": 10} if solver == "search" else {}))
    assert plan.slots_per_device.tolist() == asked.layer_slots.tolist()
    assert (plan.filled == asked.own_slots).all(), "empty slots are the last of a device's run"


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1000), slots=st.permutations([4, 5, 6]), recorded=st.sampled_from(["counts", "tokens"]))
def test_search_finds_the_brute_force_optimum_of_layers_with_their_own_slots(
    seed: int, slots: list[int], recorded: str
) -> None:
    statistics = counts(seed) if recorded == "counts" else mp.RoutingStatistics.from_trace(tokens(seed))
    asked = problem(statistics, slots=slots, objective={"split": "equal"})
    arguments = {"step_tokens": 8, "steps": 3}
    plan = mp.solve(asked, "search", proposals=6000, seed=seed, **arguments)
    evaluator = Evaluator(asked, scenario_from(asked, "decode", 8, 3, seed))
    rows = [fillings(own, 4) for own in asked.layer_slots]
    first = [choices[0] for choices in rows]

    def value(chosen: list[np.ndarray]) -> float:
        table = asked.slot_table(chosen)
        shares = mp.Plan(MODEL, CLUSTER, table, asked.slot_device).shares
        # Windows count by their tokens, steps alike.
        return evaluator.certificate(table, shares).value

    # Layers add up, so that each may be tried with the others as they are.
    base = value(first)
    best = base
    for layer, choices in enumerate(rows):
        best += min(value([*first[:layer], row, *first[layer + 1 :]]) for row in choices) - base
    assert plan.certificate is not None
    assert plan.certificate.value == pytest.approx(best, rel=1e-9)
    assert plan.certificate.bound is not None
    assert plan.certificate.bound <= best * (1 + 1e-12)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), near=st.booleans(), homes=st.booleans())
def test_a_layer_with_empty_slots_costs_what_it_costs_without_them(seed: int, near: bool, homes: bool) -> None:
    rng = np.random.default_rng(seed)
    table = np.stack([rng.permutation(np.concatenate([np.arange(4), rng.integers(4, size=5)])) for _ in range(3)])
    empty_some(rng, table)
    owner = np.sort(rng.integers(3, size=9))
    weight = np.where(table == EMPTY, 0.0, rng.random((3, 9)) + 0.1)
    sums = [np.bincount(row[row >= 0], share[row >= 0], 4) for row, share in zip(table, weight, strict=True)]
    shares = weight / np.take_along_axis(np.stack(sums), table, axis=1)
    objective = mp.Objective(replica_choice="nearest" if near else "share")
    steps = tokens(seed).decode_steps(8, 3, seed)
    if homes:
        steps = replace(steps, source=rng.integers(3, size=len(steps.expert_ids)))
    whole = mp.Plan(MODEL, CLUSTER, table, owner, shares)
    found = evaluate_on(whole, steps, MODEL, CLUSTER, objective)
    load = steps.loads().astype(float)
    on_counts = window_seconds(whole, load, problem(objective={"replica_choice": objective.replica_choice}), 8)
    memory = np.zeros(3)
    for layer, name in enumerate(MODEL.moe_layers):
        model = MODEL.replace(layers=1, moe_layers=(name,))
        held = table[layer] != EMPTY
        alone = mp.Plan(model, CLUSTER, table[[layer]][:, held], owner[held], shares[[layer]][:, held])
        own = replace(steps, expert_ids=steps.expert_ids[:, [layer]], moe_layers=(name,))
        expected = evaluate_on(alone, own, model, CLUSTER, objective)
        for figure in ("dispatch", "compute", "combine", "device_tokens", "reached", "crossing"):
            np.testing.assert_allclose(getattr(found, figure)[:, layer], getattr(expected, figure)[:, 0], rtol=1e-6)
        statistics = replace(counts(), moe_layers=(name,), load=counts().load[:, [layer]])
        single = mp.Problem(model, CLUSTER, statistics, objective)
        on_counts = on_counts - window_seconds(alone, load[:, [layer]], single, 8)
        memory += expected.device_memory
    np.testing.assert_allclose(on_counts, 0.0, atol=1e-12)
    assert found.device_memory.tolist() == memory.tolist()


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    by_device=st.booleans(),
    execution=st.sampled_from(["dispatch_combine", "context_coherent"]),
    near=st.booleans(),
    homes=st.booleans(),
)
def test_no_plan_beats_the_bounds_of_its_layers_slots(
    seed: int, by_device: bool, execution: str, near: bool, homes: bool
) -> None:
    rng = np.random.default_rng(seed)
    objective = {"execution": execution}
    if near and execution == "dispatch_combine":
        objective["replica_choice"] = "nearest"
    # As many slots as experts in every layer, on other devices each, is the case in which experts stand whole.
    slots = [[2, 1, 1], [1, 1, 2], [0, 3, 1]] if by_device else [[2, 1, 1], [2, 2, 2], [3, 1, 2]]
    asked = problem(mp.RoutingStatistics.from_trace(tokens(seed)), device_slots=slots, objective=objective)
    steps = tokens(seed).decode_steps(8, 3, seed)
    if homes:
        steps = replace(steps, source=rng.integers(3, size=len(steps.expert_ids)))
    rows = [fillings(own, 4) for own in asked.layer_slots]
    bound = step_seconds_bound(steps, asked)
    proven = bound_of(asked, steps, 0.1)
    for _ in range(12):
        chosen = [choices[int(rng.integers(len(choices)))] for choices in rows]
        plan = mp.Plan(MODEL, CLUSTER, asked.slot_table(chosen), asked.slot_device)
        seconds = mp.evaluate(plan, steps, asked).step_seconds
        assert (seconds >= bound * (1 - 1e-5)).all()
        assert seconds.mean() >= proven * (1 - 1e-5)


@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver.name not in ABLE])
def test_solvers_of_one_table_for_all_layers_refuse(solver: Any) -> None:
    asked = problem(mp.RoutingStatistics.from_trace(tokens()), device_slots=[[2, 1, 1], [1, 1, 2], [1, 2, 1]])
    with pytest.raises(mp.UnsupportedError, match="layers with different numbers of slots; these do: .*search"):
        mp.solve(asked, solver.name)


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 1000),
    most=st.integers(3, 8),
    execution=st.sampled_from(["dispatch_combine", "context_coherent"]),
)
def test_moves_from_a_plan_in_force_stay_within_their_limit(seed: int, most: int, execution: str) -> None:
    statistics = mp.RoutingStatistics.from_trace(tokens(seed))
    objective = {"execution": execution}
    start = mp.solve(problem(statistics, slots=[4, 6, 5], objective=objective), "contiguous")
    asked = problem(
        statistics,
        slots=[6, 5, 5],
        objective=objective,
        current=start,
        max_moved_bytes=most * MODEL.bytes_per_expert,
    )
    plan = mp.solve(asked, "search", proposals=40, seed=seed)
    assert migration(start, plan).moves <= most
    assert plan.slots_per_device.tolist() == asked.layer_slots.tolist()


def test_failures_are_tolerated_in_every_layer() -> None:
    failures = mp.single_failures(CLUSTER, ("device",))
    asked = problem(mp.RoutingStatistics.from_trace(tokens()), slots=[8, 10, 9], tolerates=failures)
    plan = mp.solve(asked, "search", proposals=40)
    assert mp.survives(plan, failures).all()
    assert plan.slots_per_device.sum(axis=1).tolist() == [8, 10, 9]


def test_eplb_places_groups_on_nodes_layer_by_layer() -> None:
    trace = make_trace(0, layers=2, experts=8)
    model = mp.ModelSpec(layers=2, experts=8, top_k=2, hidden_size=64, ffn_size=64, groups=4)
    topology = mp.Topology.preset("h100-hgx", nodes=2, devices_per_node=2)
    statistics = mp.RoutingStatistics.from_trace(trace)
    asked = mp.Problem(model, topology, statistics, slots=[8, 12])
    plan = mp.solve(asked, "eplb", hierarchical=True)
    for layer, slots in enumerate((8, 12)):
        alone = mp.solve(mp.Problem(model, topology, statistics, slots=slots), "eplb", hierarchical=True)
        row = plan.physical_to_logical[layer, plan.filled[layer]]
        assert row.tolist() == alone.physical_to_logical[layer].tolist()
