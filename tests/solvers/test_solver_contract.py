"""What every registered solver must do, whatever it minimises. A new solver is held to it by being registered."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Any, get_type_hints

import numpy as np
import pytest

import moeplace as mp
from moeplace.placement.progress import Progress
from moeplace.solvers.base import Feature, Needs, Solver, SolverOptions
from moeplace.solvers.solve import SOLVERS, read_options, required_features, solver_named

EXPERTS, LAYERS = 6, 3
# Budgets small enough for a test; solvers not named here run as a user would run them.
OPTIONS: dict[str, dict[str, int]] = {"search": {"proposals": 200, "steps": 4}}
EVERY = [pytest.param(solver, id=solver.name) for solver in SOLVERS]
# Search compiles as much again for context-coherent execution as for the other: what quick runs have no time for.
EXECUTED = [
    pytest.param(
        solver,
        execution,
        id=f"{execution}-{solver.name}",
        marks=[pytest.mark.slow] if (solver.name, execution) == ("search", "context_coherent") else [],
    )
    for execution in ("dispatch_combine", "context_coherent")
    for solver in SOLVERS
]
DEVICE = mp.Device(compute=1e14, memory=8e10, memory_bandwidth=2e12, intra_bandwidth=3e11)


def topology_of(*node_sizes: int) -> mp.Topology:
    return mp.Topology(nodes=tuple(mp.Node(devices=(DEVICE,) * size, inter_bandwidth=5e10) for size in node_sizes))


def routing(experts: int = EXPERTS, layers: int = LAYERS, top_k: int = 2, seed: int = 0) -> mp.RoutingTrace:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((300, layers, experts)) + 0.7 * rng.random((layers, experts)), axis=2)[:, :, :top_k]
    return mp.RoutingTrace.from_arrays(ids, num_experts=experts, sequence=np.arange(300) // 20)


def problem_of(
    trace: mp.RoutingTrace | None = None, topology: mp.Topology | None = None, **fields: object
) -> mp.Problem:
    trace = trace or routing()
    model = mp.ModelSpec(
        layers=trace.num_layers, experts=trace.num_experts, top_k=trace.top_k, hidden_size=512, ffn_size=512
    )
    statistics = fields.pop("statistics", None) or mp.RoutingStatistics.from_trace(trace)
    return mp.Problem(model, topology or topology_of(2), statistics, **fields)  # type: ignore[arg-type]


def solved(problem: mp.Problem, solver: Solver, **arguments: Any) -> mp.Plan:
    return mp.solve(problem, solver.name, **OPTIONS.get(solver.name, {}), **arguments)


def check(plan: mp.Plan, problem: mp.Problem, solver: Solver) -> None:
    """The plan answers the problem, and its figures are in range. Plan's constructor has checked the table itself."""
    assert plan.physical_to_logical.shape == (problem.model.layers, problem.num_slots)
    held = np.bincount(plan.slot_device, minlength=problem.num_devices)
    np.testing.assert_array_equal(held, problem.slots_per_device)
    np.testing.assert_array_equal(plan.slots_per_device, problem.layer_slots)
    for (layer, expert), device in problem.pinned.items():
        assert plan.device_share[layer, expert, device] == pytest.approx(1.0)
    for (layer, expert), devices in problem.forbidden.items():
        assert plan.device_share[layer, expert, list(devices)].max() == 0.0
    assert mp.survives(plan, problem.tolerates).all()
    assert plan.certificate is not None
    assert plan.certificate.objective
    assert np.isfinite(plan.certificate.value)
    if plan.bound is not None:
        assert plan.bound <= plan.certificate.value * (1 + 1e-9) + 1e-12
        assert plan.gap is not None
        assert 0.0 <= plan.gap <= 1.0 + 1e-9
    assert plan.provenance.solver == solver.name
    assert plan.provenance.version == mp.__version__
    assert plan.provenance.trace_fingerprint == problem.statistics.fingerprint


def solve_or_refuse(problem: mp.Problem, solver: Solver) -> mp.Plan | None:
    """A checked plan, or None after a refusal that names a solver which can."""
    try:
        plan = solved(problem, solver)
    except mp.UnsupportedError as error:
        refusal = str(error)
    else:
        check(plan, problem, solver)
        return plan
    named = [other.name for other in SOLVERS if other is not solver and other.name in refusal]
    assert named, f"the refusal names no solver that can: {refusal}"
    return None


@pytest.mark.parametrize(("solver", "execution"), EXECUTED)
@pytest.mark.parametrize("node_sizes", [(2,), (1, 1), (3,)], ids=str)
def test_solves_the_plain_problem(solver: Solver, execution: str, node_sizes: tuple[int, ...]) -> None:
    objective = mp.Objective(execution=execution)  # type: ignore[arg-type]
    problem = problem_of(topology=topology_of(*node_sizes), objective=objective)
    plan = solved(problem, solver, seed=3)
    check(plan, problem, solver)
    assert plan.provenance.seed == 3
    assert plan.provenance.seconds > 0


@pytest.mark.parametrize("solver", EVERY)
def test_same_seed_gives_the_same_plan(solver: Solver) -> None:
    problem = problem_of(topology=topology_of(1, 1))
    one, two = (solved(problem, solver, seed=5) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    assert one.certificate == two.certificate


FEATURES = {
    "replicas": ({"slots": 8}, {Feature.REPLICAS}),
    "a replica on every device": ({"slots": 12}, {Feature.REPLICAS}),
    "uneven slots": ({"device_slots": [4, 2]}, {Feature.UNEVEN_SLOTS}),
    "an empty device": ({"device_slots": [6, 0]}, {Feature.UNEVEN_SLOTS}),
    "uneven replicas": ({"slots": 7}, {Feature.REPLICAS, Feature.UNEVEN_SLOTS}),
    "layers of their own": (
        {"slots": [6, 8, 7]},
        {Feature.REPLICAS, Feature.UNEVEN_SLOTS, Feature.LAYER_SLOTS},
    ),
    "layers on their own devices": (
        {"device_slots": [[4, 2], [3, 3], [1, 5]]},
        {Feature.UNEVEN_SLOTS, Feature.LAYER_SLOTS},
    ),
    "pinned": ({"pinned": {(0, 0): 1, (2, 5): 0}, "forbidden": {(1, 3): [0]}}, {Feature.PINNED}),
    "tolerates": (
        {"slots": 12, "tolerates": [mp.Failure("device:0", (0,)), mp.Failure("device:1", (1,))]},
        {Feature.REPLICAS, Feature.TOLERATES},
    ),
}


@pytest.mark.parametrize("solver", EVERY)
@pytest.mark.parametrize("asked", FEATURES)
def test_features_are_honoured_or_refused_by_name(solver: Solver, asked: str) -> None:
    fields, features = FEATURES[asked]
    problem = problem_of(**fields)
    assert required_features(problem) == features
    if features <= solver.supports:
        check(solved(problem, solver), problem, solver)
        return
    able = [other.name for other in SOLVERS if features <= other.supports]
    with pytest.raises(mp.UnsupportedError, match=f"solver '{solver.name}' does not support") as refusal:
        solved(problem, solver)
    assert all(name in str(refusal.value) for name in able)
    assert able or "no solver does all" in str(refusal.value)


@pytest.mark.parametrize("solver", EVERY)
@pytest.mark.parametrize("experts", [7, 2])
def test_experts_that_do_not_divide_over_devices_work_or_name_who_can(solver: Solver, experts: int) -> None:
    problem = problem_of(routing(experts=experts), topology_of(3))
    plan = solve_or_refuse(problem, solver)
    assert (plan is not None) == (Feature.UNEVEN_SLOTS in solver.supports)


@pytest.mark.parametrize("solver", EVERY)
def test_layers_without_tokens_are_placed_too(solver: Solver) -> None:
    statistics = mp.RoutingStatistics.from_trace(routing())
    load, transitions = statistics.load.copy(), statistics.total_transitions[None].copy()
    load[:, 1], transitions[:] = 0, 0
    problem = problem_of(
        statistics=replace(statistics, load=load, transitions=transitions, workloads=("",), coactivation=None)
    )
    check(solved(problem, solver), problem, solver)


@pytest.mark.parametrize("solver", EVERY)
@pytest.mark.parametrize(
    ("layers", "experts", "top_k", "node_sizes"), [(1, 6, 2, (2,)), (3, 6, 1, (2,)), (3, 6, 6, (2,)), (3, 6, 2, (1,))]
)
def test_the_smallest_and_largest_cases_are_solved(
    solver: Solver, layers: int, experts: int, top_k: int, node_sizes: tuple[int, ...]
) -> None:
    problem = problem_of(routing(experts, layers, top_k), topology_of(*node_sizes))
    check(solved(problem, solver), problem, solver)


@pytest.mark.parametrize("solver", EVERY)
@pytest.mark.parametrize("node_sizes", [(2, 1), (4, 2)], ids=str)
def test_nodes_of_unequal_size_are_solved_or_refused_by_name(solver: Solver, node_sizes: tuple[int, ...]) -> None:
    solve_or_refuse(problem_of(topology=topology_of(*node_sizes)), solver)


@pytest.mark.parametrize("solver", EVERY)
def test_counts_alone_suffice_or_what_is_missing_is_said(solver: Solver) -> None:
    counts = np.random.default_rng(0).integers(1, 100, size=(LAYERS, EXPERTS))
    problem = problem_of(statistics=mp.RoutingStatistics.from_counts(counts, top_k=2))
    if not solver.needs:
        check(solved(problem, solver), problem, solver)
        return
    wanted = "transitions" if Needs.TRANSITIONS in solver.needs else "token sample"
    with pytest.raises(mp.UnsupportedError, match=rf"loads only, .*{wanted}.* is needed"):
        solved(problem, solver)


@pytest.mark.parametrize("solver", EVERY)
def test_an_unknown_option_is_refused_with_the_nearest_name(solver: Solver) -> None:
    options = [name for name in inspect.signature(solver.solve).parameters if name not in ("problem", "budget")]
    with pytest.raises(mp.InputError, match=f"solver '{solver.name}' has no option") as refusal:
        mp.solve(problem_of(), solver.name, **{f"{options[0]}_" if options else "anything": 1})
    assert (f"did you mean {options[0]!r}" if options else "it takes none") in str(refusal.value)


@pytest.mark.parametrize("solver", EVERY)
def test_progress_is_reported_in_order_and_in_range(solver: Solver) -> None:
    heard: list[Progress] = []
    plan = solved(problem_of(), solver, progress=heard.append)
    assert [news.seconds for news in heard] == sorted(news.seconds for news in heard)
    for news in heard:
        if news.value is not None and news.bound is not None:
            assert news.bound <= news.value * (1 + 1e-6) + 1e-9
    assert len(plan.provenance.history) <= len(heard)


@pytest.mark.parametrize("execution", ["dispatch_combine", pytest.param("context_coherent", marks=pytest.mark.slow)])
def test_what_one_solver_proves_holds_for_the_plans_of_all(execution: str) -> None:
    problem = problem_of(topology=topology_of(3), objective=mp.Objective(execution=execution))  # type: ignore[arg-type]
    bounds: dict[str, float] = {}
    values: dict[str, float] = {}
    for solver in SOLVERS:
        certificate = solved(problem, solver).certificate
        assert certificate is not None
        name, value, bound = certificate.objective, certificate.value, certificate.bound
        values[name] = min(values.get(name, np.inf), value)
        bounds[name] = max(bounds.get(name, -np.inf), -np.inf if bound is None else bound)
    for name, bound in bounds.items():
        assert bound <= values[name] + 1e-9, name


@pytest.mark.parametrize("solver", EVERY)
def test_plans_survive_their_file(solver: Solver, tmp_path: pytest.TempPathFactory) -> None:
    plan = solved(problem_of(), solver)
    plan.save(f"{tmp_path}/plan.json")
    read = mp.Plan.load(f"{tmp_path}/plan.json")
    assert read.fingerprint == plan.fingerprint
    assert read.certificate == plan.certificate
    assert read.provenance == plan.provenance


def test_names_are_unique_and_listed_in_the_order_of_comparisons() -> None:
    names = mp.solver_names()
    assert len(set(names)) == len(names)
    order = ["contiguous", "round_robin", "random", "eplb", "exflow", "moetuner", "chain"]
    assert [name for name in names if name in order] == [name for name in order if name in names]


def test_an_unknown_solver_names_the_nearest() -> None:
    with pytest.raises(mp.InputError, match=r"solver 'elpb' is unknown; did you mean 'eplb'\?"):
        mp.solve(problem_of(), "elpb")


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf")])
def test_a_time_limit_must_be_positive(seconds: float) -> None:
    with pytest.raises(mp.InputError, match="must be positive"):
        mp.solve(problem_of(), "contiguous", seconds=seconds)


def test_options_given_as_text_are_what_the_solver_takes() -> None:
    eplb, search, exflow = (solver_named(name) for name in ("eplb", "search", "exflow"))
    for text, value in {
        "False": False,
        "0": False,
        "no": False,
        "off": False,
        "true": True,
        "On": True,
        "none": None,
    }.items():
        assert read_options(eplb, {"hierarchical": text}) == {"hierarchical": value}
    read = read_options(search, {"batch": "prefill", "steps": "4", "certify": "1e1", "proposals": "none"})
    assert read == {"batch": "prefill", "steps": 4, "certify": 10.0, "proposals": None}
    assert type(read["certify"]) is float
    assert read_options(exflow, {"form": "1", "warm_start": "no"}) == {"form": "1", "warm_start": False}


@pytest.mark.parametrize(
    ("solver", "option", "text", "accepted"),
    [
        ("eplb", "hierarchical", "banana", "true or false or none"),
        ("search", "proposals", "abc", "a whole number or none"),
        ("search", "steps", "1.5", "a whole number or none"),
        ("search", "batch", "train", "'decode' or 'prefill'"),
        ("moetuner", "tolerance", "little", "a number"),
    ],
)
def test_a_wrong_value_names_the_option_the_text_and_what_is_accepted(
    solver: str, option: str, text: str, accepted: str
) -> None:
    wrong = f"solver '{solver}': option {option} is '{text}', it takes {accepted}"
    with pytest.raises(mp.InputError, match=wrong):
        read_options(solver_named(solver), {option: text})
    with pytest.raises(mp.InputError, match=wrong):
        mp.solve(problem_of(), solver, **{option: text})


@pytest.mark.parametrize("given", [{"hierarchical": "False"}, {"hierarchical": 0}, {"hierarchical": 1.0}])
def test_a_value_of_another_type_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(mp.InputError, match="it takes true or false or none"):
        mp.solve(problem_of(), "eplb", **given)
    with pytest.raises(mp.InputError, match="it takes a whole number or none"):
        mp.solve(problem_of(), "search", proposals=True)
    mp.solve(problem_of(), "search", proposals=np.int64(12), certify=0, steps=4)


@pytest.mark.slow
def test_exflow_in_stages_is_no_worse_than_the_plan_in_force() -> None:
    problem = problem_of(routing(8, 3), topology_of(2, 2))
    current = mp.solve(problem, "exflow")
    plan = mp.solve(replace(problem, current=current), "exflow", form="bisect")
    assert current.certificate is not None
    assert plan.certificate is not None
    assert plan.certificate.value <= current.certificate.value * (1 + 1e-12)


class Reversed:
    """The smallest solver."""

    name = "reversed"
    supports: frozenset[Feature] = frozenset()
    needs: frozenset[Needs] = frozenset()

    def solve(self, problem: mp.Problem, budget: mp.Budget, *, forward: bool = False) -> mp.Solution:
        row = np.arange(problem.model.experts)[:: 1 if forward else -1]
        table = problem.slot_table([row] * problem.model.layers)
        return mp.Solution(table, mp.device_load_certificate(problem, table))


def test_a_solver_of_ones_own_is_handed_over_as_an_object() -> None:
    problem = problem_of()
    solver = Reversed()
    plan = mp.solve(problem, solver)
    check(plan, problem, solver)
    assert plan.physical_to_logical[0].tolist() == [5, 4, 3, 2, 1, 0]
    assert mp.solve(problem, solver, forward=True).provenance.options == {"forward": True}
    with pytest.raises(mp.InputError, match="has no option 'backward'"):
        mp.solve(problem, solver, backward=True)
    with pytest.raises(mp.UnsupportedError, match="solver 'reversed' does not support replicas; these do:"):
        mp.solve(problem_of(slots=8), solver)


def test_what_is_no_solver_is_told_what_it_lacks() -> None:
    class Nameless:
        def solve(self) -> None: ...

    with pytest.raises(mp.ArgumentTypeError, match="Nameless lacks name, supports, needs"):
        mp.solve(problem_of(), Nameless())  # type: ignore[arg-type]


def test_typed_options_are_the_keyword_options() -> None:
    problem = problem_of()
    typed = mp.solve(problem, mp.SearchOptions(proposals=200, steps=4), seed=1)
    keywords = mp.solve(problem, "search", proposals=200, steps=4, seed=1)
    assert typed.fingerprint == keywords.fingerprint
    assert typed.provenance.options == keywords.provenance.options == {"proposals": 200, "steps": 4}
    over = mp.solve(problem, mp.SearchOptions(proposals=200, steps=4), steps=8)
    assert over.provenance.options == {"proposals": 200, "steps": 8}
    with pytest.raises(mp.InputError, match="proposals is 'many'"):
        mp.solve(problem, mp.SearchOptions(proposals="many"))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", SolverOptions.__subclasses__(), ids=lambda kind: kind.solver)
def test_typed_options_have_the_names_types_and_defaults_of_the_solvers_own(kind: type[SolverOptions]) -> None:
    solve = solver_named(kind.solver).solve
    hints, own = get_type_hints(solve), get_type_hints(kind)
    taken = {
        name: (hints[name], parameter.default)
        for name, parameter in inspect.signature(solve).parameters.items()
        if name not in ("problem", "budget")
    }
    assert {field.name: (own[field.name], field.default) for field in fields(kind)} == taken


def test_every_solver_with_options_has_them_typed() -> None:
    with_options = {solver.name for solver in SOLVERS if len(inspect.signature(solver.solve).parameters) > 2}
    assert {kind.solver for kind in SolverOptions.__subclasses__()} == with_options
