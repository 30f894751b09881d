"""Predictions of benchmarks/cluster: the cost model's, stage after stage, and what dispatch takes beside links."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp
from moeplace.placement.evaluate import Evaluation, evaluate_on

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "cluster"))
import plans
from predictions import Predictions

DEVICE = {"compute": 5e9, "memory": 1e9, "memory_bandwidth": 9e8, "intra_bandwidth": 5e7, "count": 2}
TOPOLOGY = mp.Topology.from_dict(
    {
        "nodes": [{"devices": [DEVICE], "inter_bandwidth": 2.2e7, "count": 2}],
        "intra_latency": 1e-4,
        "inter_latency": 3e-4,
    }
)


def calibration(copy_seconds: float) -> dict[str, Any]:
    timed = [
        {"dispatch": dispatch, "copies": 500.0, "seconds": 0.01 + 500 * copy_seconds, "links": 0.01}
        for dispatch in ("flat", "node_aware")
    ]
    return {"topology": TOPOLOGY.model_dump(mode="json"), "dispatches": timed}


@pytest.fixture(scope="module")
def case() -> tuple[mp.Plan, mp.Steps]:
    train, held = plans.routing()
    problem = plans.problem_for(TOPOLOGY, train)
    return mp.solve(problem, "random", seed=0), plans.held_steps(held, 512, 2, TOPOLOGY.num_devices)


@pytest.mark.parametrize("execution", ["dispatch_combine", "context_coherent"])
def test_one_hop_is_predicted_as_the_cost_model_does(case: tuple[mp.Plan, mp.Steps], execution: str) -> None:
    plan, steps = case
    found = Predictions(calibration(0.0)).of(plan, steps, "flat", execution)
    objective = plans.OBJECTIVE.replace(node_dedup=False, execution=execution)
    expected = evaluate_on(plan, steps, plan.model, TOPOLOGY, objective).step_seconds
    assert found["seconds"] == pytest.approx(expected)
    assert found["model"] == pytest.approx(expected)


def test_two_stages_take_their_sum(case: tuple[mp.Plan, mp.Steps]) -> None:
    plan, steps = case
    found = Predictions(calibration(0.0)).of(plan, steps, "node_aware", "dispatch_combine")

    def one_stage(intra: float, inter: float) -> Evaluation:
        node = {"devices": [DEVICE | {"intra_bandwidth": intra}], "inter_bandwidth": inter, "count": 2}
        topology = mp.Topology.from_dict({"nodes": [node], "intra_latency": 1e-4, "inter_latency": 3e-4})
        return evaluate_on(plan, steps, plan.model, topology, plans.OBJECTIVE)

    between, inside = one_stage(1e15, 2.2e7), one_stage(5e7, 1e15)
    latency = 2 * steps.num_layers * (1e-4 + 3e-4)
    summed = between.step_seconds + (inside.dispatch + inside.combine).sum(axis=1) - latency
    assert found["seconds"] == pytest.approx(summed, rel=1e-6)
    assert (np.array(found["seconds"]) > found["model"]).all()


def test_copies_cost_what_the_timed_dispatch_took_beside_links(case: tuple[mp.Plan, mp.Steps]) -> None:
    plan, steps = case
    bare, with_handling = (Predictions(calibration(c)).of(plan, steps, "flat", "dispatch_combine") for c in (0.0, 1e-5))
    reached = evaluate_on(plan, steps, plan.model, TOPOLOGY, plans.OBJECTIVE).reached.sum(axis=1) / TOPOLOGY.num_devices
    assert np.array(with_handling["seconds"]) - bare["seconds"] == pytest.approx(1e-5 * reached)
