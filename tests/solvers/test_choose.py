"""No solver named: chain where it proves the asked figure quickly, search elsewhere, and the plan says why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import moeplace as mp
from moeplace.placement.evaluate import evaluate_on

DEVICE = mp.Device(compute=1e14, memory=8e11, memory_bandwidth=2e12, intra_bandwidth=3e11)


def problem_of(experts: int = 8, devices: int = 2, layers: int = 3, **fields: Any) -> mp.Problem:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((400, layers, experts)) + rng.random((layers, experts)), axis=2)[:, :, :2]
    trace = mp.RoutingTrace.from_arrays(ids, num_experts=experts, sequence=np.arange(400) // 20)
    model = mp.ModelSpec(layers=layers, experts=experts, top_k=2, hidden_size=512, ffn_size=512)
    topology = mp.Topology(nodes=(mp.Node(devices=(DEVICE,) * devices, inter_bandwidth=5e10),))
    return mp.Problem(model, topology, mp.RoutingStatistics.from_trace(trace), **fields)


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["dispatch_combine", "context_coherent"])
@pytest.mark.parametrize("devices", [2, 4])
def test_few_placements_a_layer_are_proven_optimal_on_the_step_time(execution: str, devices: int) -> None:
    objective = mp.Objective(execution=execution)  # type: ignore[arg-type]
    problem = problem_of(devices=devices, layers=4, objective=objective)
    plan = mp.solve(problem, steps=4)
    assert plan.provenance.solver == "chain"
    assert "few placements" in plan.provenance.choice
    assert plan.proven_optimal
    assert plan.certificate is not None
    assert "step seconds" in plan.certificate.objective
    searched = mp.solve(problem, "search", proposals=100, steps=4)
    steps = mp.problem_steps(problem.statistics, problem, count=4)
    seconds = evaluate_on(searched, steps, problem.model, problem.topology, objective).mean_seconds
    assert plan.certificate.value <= seconds * (1 + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"slots": 10}, "does not support replicas"),
        ({"objective": mp.Objective(risk="cvar:0.9")}, "minimises means, not cvar:0.9"),
        ({"experts": 32, "devices": 4}, "cannot go through this many placements"),
    ],
)
def test_search_answers_what_chain_cannot_and_the_plan_says_why(fields: dict[str, Any], reason: str) -> None:
    plan = mp.solve(problem_of(**fields), step_tokens=16, steps=2, seconds=1.0)
    assert plan.provenance.solver == "search"
    assert reason in plan.provenance.choice


def test_counts_alone_go_to_search() -> None:
    problem = problem_of()
    counts = mp.RoutingStatistics.from_counts(np.ones((3, 8)), top_k=2)
    plan = mp.solve(replace(problem, statistics=counts), seconds=0.5)
    assert plan.provenance.solver == "search"
    assert "counts alone" in plan.provenance.choice


@pytest.mark.slow
def test_work_that_does_not_fit_the_time_goes_to_search(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(experts=12, objective=mp.Objective(execution="context_coherent"))
    assert mp.solve(problem, seconds=0.05, steps=8).provenance.solver == "search"
    # An estimate that was wrong costs half of the time, not the plan.
    monkeypatch.setattr("moeplace.solvers.chain.Chain.work", lambda *_, **__: 0.0)
    late = mp.solve(problem, seconds=0.02, steps=8).provenance
    assert (late.solver, "half of the time" in late.choice) == ("search", True)
    monkeypatch.undo()
    assert mp.solve(problem, steps=8).provenance.solver == "chain"


def test_options_decide_among_the_solvers_that_know_them() -> None:
    problem = problem_of()
    assert mp.solve(problem, proposals=20, steps=2).provenance.solver == "search"
    affine = mp.solve(problem, minimise="transitions")
    assert affine.provenance.solver == "chain"
    assert affine.certificate is not None
    assert "transitions" in affine.certificate.objective
    with pytest.raises(mp.InputError, match="has no option 'form'"):
        mp.solve(problem, form="staged")


def test_the_choice_survives_the_plan_file(tmp_path: Any) -> None:
    plan = mp.solve(problem_of())
    plan.save(tmp_path / "plan.json")
    assert mp.Plan.load(tmp_path / "plan.json").provenance == plan.provenance
