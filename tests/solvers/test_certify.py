"""Bounds by relaxed Gram matrices: never above the best placement, whatever the cluster, the replicas and the risk, and
close."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from every_table import all_tables, bound_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import moeplace as mp
from moeplace.placement.bounds import step_seconds_bound
from moeplace.placement.cost import combine_bytes, dispatch_bytes
from moeplace.placement.evaluate import evaluate_on
from moeplace.placement.objective import risk_value, risk_weights
from moeplace.solvers.base import Budget
from moeplace.solvers.certify.blas import blas_threads, one_blas_thread
from moeplace.solvers.certify.device_sets import DeviceSets, least_over_partitions, link_floors, sets_fit
from moeplace.solvers.certify.sdp import (
    BusierWay,
    GramSpace,
    HoldersNeeded,
    SlowestDevice,
    SplitBetweenTwo,
    Triangles,
    _way_functions,
    shared_simplex,
    simplex_rows,
)
from moeplace.solvers.certify.set_pairs import least_over_pairs, price_pairs
from moeplace.solvers.certify.step_time import StepCertificate
from moeplace.solvers.chain import fastest_step
from moeplace.solvers.exflow import kept_at_most, spectral_kept

pytestmark = pytest.mark.slow

SLOW_LINKS = {"compute": 1e12, "memory": 8e10, "memory_bandwidth": 2e12, "intra_bandwidth": 2e8}


def cluster(nodes: list[int], uneven: bool = False) -> mp.Topology:
    """Links slow enough to count, and, if asked, devices and nodes of different speed."""
    entries = []
    for number, size in enumerate(nodes):
        factor = 1.0 + number if uneven else 1.0
        devices = [
            SLOW_LINKS | {"compute": 1e12 * factor, "intra_bandwidth": 2e8 * (1.0 + (uneven and d == 0))}
            for d in range(size)
        ]
        entries.append({"devices": devices, "inter_bandwidth": 1e8 * size * factor})
    return mp.Topology.from_dict({"nodes": entries, "intra_latency": 1e-6, "inter_latency": 1e-6})


def routed(rng: np.random.Generator, tokens: int, layers: int, experts: int, top_k: int) -> np.ndarray:
    """Ids with skew and co-activation: neighbours of a drawn centre are likelier."""
    ids = np.empty((tokens, layers, top_k), dtype=np.int64)
    skew = rng.dirichlet(np.full(experts, 0.8), size=layers)
    for t in range(tokens):
        centre = rng.integers(experts)
        for layer in range(layers):
            near = np.exp(-np.minimum((np.arange(experts) - centre) % experts, 3))
            odds = skew[layer] * near + 1e-3
            ids[t, layer] = rng.choice(experts, size=top_k, replace=False, p=odds / odds.sum())
    return ids


def problem_and_steps(
    seed: int, topology: mp.Topology, layers: int, experts: int, top_k: int, sources: bool = False, **fields: object
) -> tuple[mp.Problem, mp.Steps]:
    rng = np.random.default_rng(seed)
    tokens = 24
    ids = routed(rng, tokens, layers, experts, top_k)
    trace = mp.RoutingTrace.from_arrays(
        ids,
        num_experts=experts,
        step=np.arange(tokens) // 8,
        workload=np.where(np.arange(tokens) < 8, "a", "b"),
        source=rng.integers(topology.num_devices, size=tokens) if sources else None,
    )
    problem = mp.Problem(
        model=mp.ModelSpec(layers=layers, experts=experts, top_k=top_k, hidden_size=512, ffn_size=256),
        topology=topology,
        statistics=mp.RoutingStatistics.from_trace(trace),
        **fields,  # type: ignore[arg-type]
    )
    return problem, trace.recorded_steps()


def least_risk(problem: mp.Problem, steps: mp.Steps) -> float:
    """The least risk over all plans with equal shares (two layers at most)."""
    tables = all_tables(problem)
    best = np.inf
    for chosen in itertools.product(tables, repeat=problem.model.layers):
        plan = mp.Plan(problem.model, problem.topology, np.stack(chosen), problem.slot_device)
        seconds = evaluate_on(plan, steps, problem.model, problem.topology, problem.objective).step_seconds
        best = min(best, risk_value(seconds, steps.step_workload, problem.objective))
    return best


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    nodes=st.sampled_from([[3], [2, 2], [1, 1], [1, 2], [1, 1, 1]]),
    uneven=st.booleans(),
    spare=st.integers(0, 1),
    top_k=st.integers(1, 3),
    dedup=st.booleans(),
    sources=st.booleans(),
    risk=st.sampled_from(["mean", "cvar:0.5", "worst_workload"]),
)
def test_no_plan_of_one_layer_is_below_the_bound(
    seed: int, nodes: list[int], uneven: bool, spare: int, top_k: int, dedup: bool, sources: bool, risk: str
) -> None:
    problem, steps = problem_and_steps(
        seed,
        cluster(nodes, uneven),
        layers=1,
        experts=5,
        top_k=top_k,
        sources=sources,
        slots=5 + spare,
        objective=mp.Objective(risk=risk, node_dedup=dedup),
    )
    assert bound_of(problem, steps) <= least_risk(problem, steps) * (1 + 1e-12)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    nodes=st.sampled_from([[2], [1, 1], [2, 1], [2, 2]]),
    uneven=st.booleans(),
    spare=st.integers(0, 1),
    top_k=st.integers(1, 2),
    dedup=st.booleans(),
    sources=st.booleans(),
)
@pytest.mark.long
def test_no_context_coherent_plan_is_below_the_bound(
    seed: int, nodes: list[int], uneven: bool, spare: int, top_k: int, dedup: bool, sources: bool
) -> None:
    problem, steps = problem_and_steps(
        seed,
        cluster(nodes, uneven),
        layers=2,
        experts=4,
        top_k=top_k,
        sources=sources,
        slots=4 + (spare if sum(nodes) < 4 else 0),
        objective=mp.Objective(execution="context_coherent", node_dedup=dedup),
    )
    assert bound_of(problem, steps) <= least_risk(problem, steps) * (1 + 1e-12)


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, [1, 1], 8), (1, [2, 1], 6), (2, [1, 1], 6)]),
    top_k=st.integers(4, 6),
    execution=st.sampled_from(["dispatch_combine", "context_coherent"]),
    sources=st.booleans(),
)
def test_no_plan_on_two_nodes_is_below_the_bound_for_many_experts_a_token(
    seed: int, shape: tuple[int, list[int], int], top_k: int, execution: str, sources: bool
) -> None:
    layers, nodes, experts = shape
    problem, steps = problem_and_steps(
        seed,
        cluster(nodes),
        layers=layers,
        experts=experts,
        top_k=top_k,
        sources=sources,
        objective=mp.Objective(execution=execution),  # type: ignore[arg-type]
    )
    assert bound_of(problem, steps) <= least_risk(problem, steps) * (1 + 1e-12)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, [3], 6), (1, [1, 2], 6), (1, [1, 1], 6), (1, [2, 2], 4), (2, [2], 6), (2, [1, 1], 4)]),
    uneven=st.booleans(),
    top_k=st.integers(1, 3),
    dedup=st.booleans(),
    sources=st.booleans(),
    execution=st.sampled_from(["dispatch_combine", "context_coherent"]),
    risk=st.sampled_from(["mean", "cvar:0.5", "worst_workload"]),
)
def test_no_plan_is_below_the_bound_by_a_devices_sets(
    seed: int,
    shape: tuple[int, list[int], int],
    uneven: bool,
    top_k: int,
    dedup: bool,
    sources: bool,
    execution: str,
    risk: str,
) -> None:
    layers, nodes, experts = shape
    problem, steps = problem_and_steps(
        seed,
        cluster(nodes, uneven),
        layers=layers,
        experts=experts,
        top_k=top_k,
        sources=sources,
        objective=mp.Objective(execution=execution, risk=risk, node_dedup=dedup),  # type: ignore[arg-type]
    )
    assert sets_fit(problem)
    assert bound_of(problem, steps) <= least_risk(problem, steps) * (1 + 1e-12)


def test_sets_prove_one_expert_a_device_optimal_and_two_nearly() -> None:
    for experts, devices, most in ((4, 4, 1e-9), (6, 3, 0.03)):
        problem, steps = problem_and_steps(4, cluster([devices]), layers=1, experts=experts, top_k=2)
        least = least_risk(problem, steps)
        assert (1 - most) * least <= bound_of(problem, steps, seconds=1.0) <= least * (1 + 1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(4, 2), (6, 2), (6, 3), (4, 1)]), st.integers(1, 3))
def test_no_partition_costs_less_than_the_least_over_partitions(
    seed: int, shape: tuple[int, int], figures: int
) -> None:
    (experts, size), rng = shape, np.random.default_rng(seed)
    members = np.array(list(itertools.combinations(range(experts), size)))
    cost = rng.gamma(0.5, size=(figures, len(members)))
    count = experts // size
    best = min(
        cost[:, list(chosen)].max(axis=1).sum()
        for chosen in itertools.combinations(range(len(members)), count)
        if len(set(members[list(chosen)].ravel())) == experts
    )
    bound = least_over_partitions(members, cost, count, 5.0)
    assert 0.0 <= bound <= best * (1 + 1e-12)
    assert least_over_partitions(members, cost, count, 0.0) in (-np.inf, bound)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([([2], 4), ([3], 6), ([4], 4), ([2], 6)]),
    uneven=st.booleans(),
    top_k=st.integers(1, 3),
    groups=st.integers(1, 3),
)
def test_no_path_through_neighbouring_layers_is_below_the_bound_by_pairs_of_sets(
    seed: int, shape: tuple[list[int], int], uneven: bool, top_k: int, groups: int
) -> None:
    nodes, experts = shape
    problem, steps = problem_and_steps(
        seed,
        cluster(nodes, uneven),
        layers=2,
        experts=experts,
        top_k=top_k,
        objective=mp.Objective(execution="context_coherent"),
    )
    weight = np.full(steps.num_steps, 1.0 / steps.num_steps)
    sets = DeviceSets(problem, steps, weight, groups)
    costs, waits = sets.pairs(1)
    first = least_over_partitions(sets.members, np.concatenate([sets.work(0), sets.transfers(0)]), sets.devices, 60.0)
    bound = first + waits + least_over_pairs(costs, sets.devices, 60.0)
    least = fastest_step(problem, Budget(), steps, "steps").certificate
    assert least is not None
    assert bound <= least.value * (1 + 1e-12)


def test_leaders_that_stand_in_one_place_only_bound_dispatch_more_closely_than_the_best_for_every_set() -> None:
    problem, steps = problem_and_steps(
        3, cluster([4]), layers=2, experts=8, top_k=2, objective=mp.Objective(execution="context_coherent")
    )
    weight = np.full(steps.num_steps, 1.0 / steps.num_steps)
    sets = DeviceSets(problem, steps, weight)
    costs, waits = sets.pairs(1)
    apart = least_over_partitions(sets.members, np.concatenate([sets.work(1), sets.transfers(1)]), sets.devices, 60.0)
    assert waits + least_over_pairs(costs, sets.devices, 60.0) > 1.05 * apart


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_cheapest_pair_of_sets_is_that_of_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, groups = 5, 2
    members = np.array(list(itertools.combinations(range(experts), 2)))
    inside = np.zeros((len(members), experts), dtype=bool)
    np.put_along_axis(inside, members, True, axis=1)
    work = rng.random((groups, len(members)))
    led, owned = rng.integers(0, 9, size=(2, groups, len(members), experts)).astype(np.uint8)
    price, here, before = rng.random((5, groups, experts)), rng.normal(size=experts), rng.normal(size=experts)
    cheapest, best = np.empty(len(members)), np.empty(members.shape, np.int64)
    price_pairs(members, inside, work, led, owned, price, here, before, cheapest, best)

    def cost(a: int, b: np.ndarray) -> float:
        total = -here[members[a]].sum() - before[b].sum()
        for r in range(groups):
            away = ~np.isin(np.arange(experts), b)
            mine = price[:, r][:, members[a]].sum(axis=1)
            total += mine[0] * work[r, a] + ((mine[1] + price[2, r]) * led[r, a])[away].sum()
            total += ((mine[3] + price[4, r]) * owned[r, a])[~inside[a]].sum()
        return float(total)

    for a in range(len(members)):
        assert cheapest[a] == pytest.approx(min(cost(a, b) for b in members))
        assert cheapest[a] == pytest.approx(cost(a, best[a]))


def test_sets_are_added_until_many_are_bounded_as_closely_as_all_at_once() -> None:
    rng = np.random.default_rng(0)
    members = np.array(list(itertools.combinations(range(24), 4)))
    # A cost that one partition alone keeps to: every expert has three that it belongs with.
    home = rng.permutation(24) // 4
    apart = np.array([len(set(home[row])) - 1 for row in members])
    found = least_over_partitions(members, 1.0 + apart[None] + 0.1 * rng.random((2, len(members))), 6, 30.0)
    assert 2.0 <= found <= 2.2


def test_what_reaches_a_set_from_elsewhere_is_counted_as_by_hand() -> None:
    problem, steps = problem_and_steps(
        6, cluster([3]), layers=2, experts=6, top_k=2, objective=mp.Objective(execution="context_coherent")
    )
    sets = DeviceSets(problem, steps, np.full(steps.num_steps, 1.0 / steps.num_steps))
    floors = link_floors(problem, steps, steps.loads().astype(float))
    dispatch, combine = np.split(sets.transfers(1) * steps.num_steps, 2)
    out_bytes, back_bytes = (
        dispatch_bytes(problem.model, problem.objective),
        combine_bytes(problem.model, problem.objective),
    )
    for number, members in enumerate(sets.members):
        for s, block in enumerate(steps.blocks()):
            touched = np.isin(block[:, 1], members).any(axis=1)
            back = (touched & ~np.isin(block[:, 1, 0], members)).sum()
            there = np.sort(np.bincount(block[touched, 0, 0], minlength=6))[-2:].sum()
            out, links = touched.sum() - there, problem.topology.intra_bandwidth[0]
            assert dispatch[s, number] == pytest.approx(2e-6 + max(out / links * out_bytes, floors[0][s, 1]))
            assert combine[s, number] == pytest.approx(
                2e-6 + max(back / links * back_bytes, floors[1][s, 1] * back_bytes / out_bytes)
            )
    assert np.ptp(combine) > 0.0


@pytest.mark.parametrize("choice", ["share", "nearest"])
def test_shares_of_any_size_stay_above_the_bound(choice: str) -> None:
    problem, steps = problem_and_steps(
        3,
        cluster([2, 2], uneven=True),
        layers=2,
        experts=6,
        top_k=3,
        slots=10,
        objective=mp.Objective(split="free", replica_choice=choice),
    )
    bound = bound_of(problem, steps, seconds=1.0)
    rng = np.random.default_rng(0)
    tables = all_tables(problem)
    for _ in range(200):
        table = np.stack([tables[i] for i in rng.integers(len(tables), size=2)])
        raw = rng.random(table.shape) ** 3 + 1e-3
        sums = np.stack([np.bincount(row, weights=weight) for row, weight in zip(table, raw, strict=True)])
        plan = mp.Plan(
            problem.model,
            problem.topology,
            table,
            problem.slot_device,
            raw / np.take_along_axis(sums, table, axis=1),
        )
        judged = evaluate_on(plan, steps, problem.model, problem.topology, problem.objective)
        assert bound <= judged.risk() * (1 + 1e-12)


@pytest.mark.long
def test_the_bound_rises_with_time_and_is_far_above_that_of_single_terms() -> None:
    problem, steps = problem_and_steps(1, cluster([4]), layers=1, experts=8, top_k=2)
    weight = np.full(steps.num_steps, 1.0 / steps.num_steps)
    certificate = StepCertificate(problem, steps, weight)
    seen = [certificate.bound]
    assert seen[0] == pytest.approx(float(weight @ step_seconds_bound(steps, problem)))
    certificate.improve(20.0, seen.append, iterations=400)
    assert seen == sorted(seen)
    least = least_risk(problem, steps)
    assert seen[-1] <= least
    assert least - seen[-1] < 0.5 * (least - seen[0])


def test_search_proves_its_plan_closer_when_asked_to() -> None:
    problem, _ = problem_and_steps(2, cluster([2, 2]), layers=2, experts=8, top_k=2)
    plain = mp.solve(problem, "search", proposals=300, step_tokens=8)
    told: list[mp.Progress] = []
    certified = mp.solve(problem, "search", proposals=300, step_tokens=8, certify=1.0, progress=told.append)
    assert certified.fingerprint == plain.fingerprint
    assert plain.certificate is not None
    assert certified.certificate is not None
    assert certified.certificate.objective == plain.certificate.objective
    assert certified.certificate.value == plain.certificate.value
    assert plain.bound is not None
    assert certified.bound is not None
    assert plain.bound <= certified.bound <= certified.certificate.value
    bounds = [news.bound for news in told if news.bound is not None]
    assert bounds == sorted(bounds)
    with pytest.raises(mp.InputError, match="certify"):
        mp.solve(problem, "search", certify=-1.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["mean", "cvar:0.6", "worst_workload", "regret"]))
def test_weighted_steps_never_exceed_the_risk_and_meet_it_at_the_plan_they_are_from(seed: int, risk: str) -> None:
    rng = np.random.default_rng(seed)
    objective = mp.Objective(risk=risk)
    workload, best = rng.integers(3, size=12), rng.random(3)
    seconds, other = rng.random(12) + 1, rng.random(12) + 1
    weight, offset = risk_weights(seconds, workload, objective, best)
    assert weight.sum() == pytest.approx(1.0)
    assert weight @ other + offset <= risk_value(other, workload, objective, best) + 1e-12
    assert weight @ seconds + offset == pytest.approx(risk_value(seconds, workload, objective, best), rel=0.02)


def gram_of(device_of: np.ndarray) -> np.ndarray:
    return np.asarray(device_of[:, None] == device_of[None, :], dtype=float)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.integers(1, 2))
def test_least_cost_over_the_space_is_at_most_that_of_any_placement(seed: int, even: bool, layers: int) -> None:
    rng = np.random.default_rng(seed)
    slots = np.array([2, 2, 2] if even else [3, 2, 1])
    space = GramSpace.of(np.tile(slots, (layers, 1)), 6)
    assert space.even == even
    cost = rng.standard_normal((space.items, space.items))
    cost = cost + cost.T
    device_of = np.concatenate([rng.permutation(np.repeat(np.arange(3), slots)) for _ in range(layers)])
    gram = gram_of(device_of)
    assert space.least(cost) <= (cost * gram).sum() + 1e-9
    np.testing.assert_allclose(space.project(gram), gram, atol=1e-8)
    nearest = space.project(cost)
    np.testing.assert_allclose(space.project(nearest), nearest, atol=1e-7)
    # The nearest point: no member lies further along the way to where projection came from.
    assert ((cost - nearest) * (gram - nearest)).sum() <= 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.integers(1, 5))
def test_holders_needed_are_counted_exactly_and_bounded_by_every_line(seed: int, holders: int, top_k: int) -> None:
    rng = np.random.default_rng(seed)
    device_of = rng.integers(holders, size=9)
    ids = np.stack([rng.choice(9, size=top_k, replace=False) for _ in range(20)])
    weight = rng.random(20) + 0.1
    exact = float(weight @ [len(set(device_of[row])) for row in ids])
    terms = [HoldersNeeded(ids, weight, 9)] + ([SplitBetweenTwo(ids, weight, 9)] if holders == 2 else [])
    gram, elsewhere = gram_of(device_of), gram_of(rng.integers(holders, size=9))
    for term in terms:
        assert term.cost(gram) == pytest.approx(exact)
        term.start(elsewhere)
        for _ in range(3):
            assert (term.dual_matrix() * gram).sum() + term.constant() <= exact + 1e-9
            term.dual_step(rng.random((9, 9)), float(rng.random()))


def test_four_experts_between_two_holders_cost_what_the_cheapest_mixture_of_ways_to_part_them_does() -> None:
    """No function of pairs that bounds every way to part four experts is above the term's."""
    rng = np.random.default_rng(0)
    ways = np.array(list(itertools.product((0, 1), repeat=4)))[:8]
    apart = np.array([[way[i] != way[j] for i, j in itertools.combinations(range(4), 2)] for way in ways], float)
    needed = np.array([float(way.any()) for way in ways])
    for _ in range(20):
        mixture = rng.dirichlet(np.full(8, 0.3))
        gram = np.eye(4)
        for (i, j), share in zip(itertools.combinations(range(4), 2), mixture @ apart, strict=True):
            gram[i, j] = gram[j, i] = 1.0 - share
        rows = np.column_stack([apart, np.ones(8)]).T
        least = linprog(needed, A_eq=rows, b_eq=rows @ mixture).fun
        term = SplitBetweenTwo(np.arange(4)[None], np.ones(1), 4)
        assert term.cost(gram) == pytest.approx(1.0 + least)
        for _ in range(20):
            term.dual_step(gram, 1e6)
        assert (term.dual_matrix() * gram).sum() + term.constant() == pytest.approx(1.0 + least)


def busier_way(seed: int, members: int) -> tuple[np.ndarray, BusierWay, float, float]:
    """A placement of nine experts on two holders, the term, what the placement costs, and what is known of its split:
    of up to five experts a token all, half of both ways."""
    rng = np.random.default_rng(seed)
    device_of = rng.integers(2, size=9)
    ids = np.stack([rng.choice(9, size=members, replace=False) for _ in range(30)])
    weight = rng.random(30) + 0.1
    start, apart = device_of[ids[:, 0]], (device_of[ids] != device_of[ids[:, :1]]).any(axis=1)
    ways = [float(weight @ (apart & (start == holder))) for holder in (0, 1)]
    gram = gram_of(device_of)
    split = SplitBetweenTwo(ids, weight, 9).cost(gram)
    assert split <= weight.sum() + sum(ways) + 1e-9
    assert members > 5 or split == pytest.approx(weight.sum() + sum(ways))
    return gram, BusierWay(ids, weight, 9), weight.sum() + 2.0 * max(ways), split


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 7))
def test_the_busier_of_two_ways_is_never_exceeded_and_not_below_their_split(seed: int, members: int) -> None:
    rng = np.random.default_rng(seed)
    gram, term, exact, split = busier_way(seed, members)
    assert (term.dual_matrix() * gram).sum() + term.constant() <= exact + 1e-9
    for _ in range(5):
        noise = rng.random((9, 9))
        term.dual_step(noise + noise.T, 3.0 * float(rng.random()))
        assert (term.dual_matrix() * gram).sum() + term.constant() <= exact + 1e-9
        assert term.cost(gram) <= exact + 1e-9
    for _ in range(400):
        term.dual_step(gram, 1.0)
    assert split * 0.99 <= (term.dual_matrix() * gram).sum() + term.constant() <= exact + 1e-9


def test_the_busier_of_two_ways_is_met_in_the_end_by_most_placements() -> None:
    """References on both holders can stand still where none of the functions of their mixture tells the ways apart."""
    met = 0
    for seed in range(40):
        gram, term, exact, _ = busier_way(seed, 2 + seed % 6)
        for _ in range(400):
            term.dual_step(gram, 1.0)
        met += (term.dual_matrix() * gram).sum() + term.constant() >= exact * 0.99
    assert met >= 36


def test_what_goes_one_way_costs_what_the_cheapest_mixture_of_ways_to_part_four_items_does() -> None:
    rng = np.random.default_rng(0)
    # The reference is on the first holder; a token's start, two experts that it needs, the reference.
    ways = np.array([(*way, 0) for way in itertools.product((0, 1), repeat=3)])
    pairs, coming, leaving = _way_functions(3)
    apart = (ways[:, pairs[:, 0]] != ways[:, pairs[:, 1]]).astype(float)
    comes, goes = (
        np.array([(way[1:3] == holder).any() and way[0] != holder for way in ways], float) for holder in (0, 1)
    )
    rows = np.column_stack([apart, np.ones(8)]).T
    for functions, needed in ((coming, comes), (leaving, goes)):
        values = functions.constant + (apart[:, functions.pair] * functions.times).sum(axis=2)
        assert (values <= needed[:, None] + 1e-12).all()
        np.testing.assert_allclose(values.max(axis=1), needed)
        for _ in range(20):
            mixture = rng.dirichlet(np.full(8, 0.3))
            least = linprog(needed, A_eq=rows, b_eq=rows @ mixture).fun
            assert (mixture @ values).max() == pytest.approx(least, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_work_of_the_slowest_holder_is_bounded_by_what_is_known_of_all_rounds_together(seed: int, much: bool) -> None:
    rng = np.random.default_rng(seed)
    work, weight, floor = rng.random((3, 1, 6)), rng.random(3), rng.random(3)
    gram = gram_of(rng.integers(3, size=6))
    by_rounds = weight @ np.maximum((work[:, 0] @ gram).max(axis=1), floor)
    least = float(rng.random() * by_rounds) * (3.0 if much else 1.0)
    term, exact = SlowestDevice(work, weight, floor, least), max(by_rounds, least)
    assert term.cost(gram) == pytest.approx(exact)
    for _ in range(1000):
        assert (term.dual_matrix() * gram).sum() + term.constant() <= exact * (1 + 1e-9)
        term.dual_step(gram, 1.0)
    assert (term.dual_matrix() * gram).sum() + term.constant() == pytest.approx(exact, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4))
def test_triangle_prices_charge_no_placement(seed: int, holders: int) -> None:
    rng = np.random.default_rng(seed)
    gram = gram_of(rng.integers(holders, size=7))
    term = Triangles(7, holders)
    for _ in range(3):
        noise = rng.standard_normal((7, 7))
        term.dual_step(noise + noise.T, 0.3)
        assert (term.dual_matrix() * gram).sum() + term.constant() <= 1e-9


def test_rows_that_share_what_is_left_are_the_nearest_ones() -> None:
    rng = np.random.default_rng(0)
    for rest in (-np.inf, -2.0, 0.3, 1.5, 9.0):
        points = rng.standard_normal((5, 4))
        rows, left = shared_simplex(points, rest)
        assert 0.0 <= left <= 1.0
        np.testing.assert_allclose(rows.sum(axis=1), 1.0 - left)
        assert (rows >= 0).all()
        if np.isinf(rest):
            np.testing.assert_allclose(rows, simplex_rows(points), atol=1e-9)
            continue
        for _ in range(200):
            other = rng.random()
            elsewhere = rng.dirichlet(np.ones(4), size=5) * (1.0 - other)
            # The nearest point: no other one lies further along the way to where projection came from.
            assert ((points - rows) * (elsewhere - rows)).sum() + (rest - left) * (other - left) <= 1e-6


def test_linear_algebra_of_a_relaxation_takes_one_thread_and_gives_the_others_back() -> None:
    calls = blas_threads()
    if calls is None:
        pytest.skip("NumPy's linear algebra has no calls to set its threads here")
    get, put = calls
    before = get()
    put(2)
    try:
        with one_blas_thread():
            assert get() == 1
            with one_blas_thread():
                assert get() == 1
            assert get() == 1
        assert get() == 2
    finally:
        put(before)


def test_simplex_projection_is_the_nearest_point() -> None:
    rng = np.random.default_rng(0)
    points = rng.standard_normal((50, 6)) * 2
    nearest = simplex_rows(points)
    np.testing.assert_allclose(nearest.sum(axis=1), 1.0)
    assert (nearest >= 0).all()
    corners = np.eye(6)
    # No corner lies on the far side of the plane through the nearest point.
    assert (((points - nearest)[:, None] * (corners[None] - nearest[:, None])).sum(axis=2) <= 1e-9).all()


def most_kept(weights: np.ndarray, slots: list[int]) -> float:
    """The most weight any two placements keep, by going through all of them."""
    experts = len(weights)
    placements = {
        tuple(int(g) for g in order) for order in itertools.permutations(np.repeat(np.arange(len(slots)), slots))
    }
    held = np.stack([np.eye(len(slots))[list(placed)] for placed in placements])
    flat = held.reshape(len(held), -1)
    return float(((weights.T[None] @ held).reshape(len(held), experts * len(slots)) @ flat.T).max())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([[3, 3], [2, 2, 2], [3, 2, 1], [4, 2]]))
def test_no_two_placements_keep_more_transitions_than_the_bounds(seed: int, slots: list[int]) -> None:
    weights = np.random.default_rng(seed).random((6, 6)) ** 4
    best, sizes = most_kept(weights, slots), np.array(slots)
    assert spectral_kept(weights, sizes) >= best * (1 - 1e-9)
    closer = kept_at_most(weights[None], sizes, 5.0, iterations=200)
    assert best * (1 - 1e-9) <= closer <= spectral_kept(weights, sizes) + 1e-9
    assert kept_at_most(weights[None], sizes, 0.0) >= best * (1 - 1e-9)


def test_the_spectral_bound_is_the_formula_for_equal_slots() -> None:
    weights = np.random.default_rng(0).random((12, 12))
    centred = weights - weights.mean(axis=0) - weights.mean(axis=1)[:, None] + weights.mean()
    formula = weights.sum() / 4 + 3 * np.linalg.svd(centred)[1][:3].sum()
    assert spectral_kept(weights, np.full(4, 3)) == pytest.approx(formula)


def test_the_semidefinite_bound_is_nearly_exact_at_ten_experts() -> None:
    rng = np.random.default_rng(5)
    weights = rng.random((10, 10)) ** 6
    placed = [np.isin(np.arange(10), half) for half in itertools.combinations(range(10), 5)]
    held = np.array(placed, dtype=float)
    best = float((held @ weights @ held.T + (1 - held) @ weights @ (1 - held).T).max())
    bound = kept_at_most(weights[None], np.array([5, 5]), 20.0)
    assert best * (1 - 1e-9) <= bound <= 1.02 * best


def test_sixty_four_experts_are_bounded_far_below_the_spectrum() -> None:
    rng = np.random.default_rng(0)
    owner, after = rng.permutation(64) // 8, rng.permutation(64) // 8
    weights = rng.gamma(0.4, size=(64, 64)) * np.where(owner[:, None] == after[None, :], 6.0, 1.0)
    kept = float(weights[owner[:, None] == after[None, :]].sum() / weights.sum())
    spectral = spectral_kept(weights, np.full(8, 8)) / weights.sum()
    semidefinite = kept_at_most(weights[None], np.full(8, 8), 60.0, iterations=100) / weights.sum()
    assert kept <= semidefinite <= 0.8 * spectral
