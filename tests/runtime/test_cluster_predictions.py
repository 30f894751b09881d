"""Predictions of benchmarks/cluster: a step's timeline against the cost model's sum and against times worked out by
hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import moeplace as mp
from moeplace.placement.evaluate import evaluate_on

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "cluster"))
import plans
from predictions import Predictions
from timeline import LayerDemand, Timeline, demands

DEVICE = {"compute": 5e9, "memory": 1e9, "memory_bandwidth": 9e8, "intra_bandwidth": 5e7, "count": 2}
TOPOLOGY = mp.Topology.from_dict(
    {
        "nodes": [{"devices": [DEVICE], "inter_bandwidth": 2.2e7, "count": 2}],
        "intra_latency": 1e-4,
        "inter_latency": 3e-4,
    }
)
ROUND = mp.Topology.from_dict(
    {
        "nodes": [
            {"devices": [DEVICE | {"compute": 1e9, "intra_bandwidth": 100.0}], "inter_bandwidth": 50.0, "count": 2}
        ],
        "intra_latency": 0.0,
        "inter_latency": 0.0,
    }
)
"""For rows of one byte: 0.01 s a row inside a node, 0.02 s between nodes."""
SECOND = 1e9 / plans.SPEC.flops_per_token
"""Token-expert pairs that take a device of ROUND a second."""


def calibration(copy_seconds: float) -> dict[str, Any]:
    timed = [
        {"dispatch": dispatch, "copies": 500.0, "seconds": 0.01 + 500 * copy_seconds, "links": 0.01}
        for dispatch in ("flat", "node_aware")
    ]
    return {"topology": TOPOLOGY.model_dump(mode="json"), "dispatches": timed}


def case(solver: str = "random", seed: int = 0, extra: int = 0) -> tuple[mp.Plan, mp.Steps]:
    train, held = plans.routing()
    problem = plans.problem_for(TOPOLOGY, train, extra)
    options = {"seed": seed} if solver == "random" else {}
    return mp.solve(problem, solver, **options), plans.held_steps(held, 512, 2, TOPOLOGY.num_devices)


def layer(going: dict[tuple[int, tuple[int, ...]], int], seconds: tuple[float, ...]) -> LayerDemand:
    """going: tokens by (home, ranks that serve them). seconds: of each rank's expert work."""
    home = np.repeat([home for home, _ in going], list(going.values()))
    hit = np.zeros((len(home), 4))
    first = 0
    for (_, ranks), tokens in going.items():
        hit[first : first + tokens, list(ranks)] = 1.0
        first += tokens
    return LayerDemand(hit, home, np.array(seconds) * SECOND, np.zeros(4))


@pytest.mark.parametrize("seed", range(3))
def test_one_hop_takes_no_longer_than_the_sum_of_the_longest_parts(seed: int) -> None:
    plan, steps = case(seed=seed)
    found = Predictions(calibration(0.0)).of(plan, steps, "flat", "dispatch_combine")
    judged = evaluate_on(plan, steps, plan.model, TOPOLOGY, plans.OBJECTIVE.replace(node_dedup=False))
    assert found["model"] == pytest.approx(judged.step_seconds)
    assert (np.array(found["seconds"]) < found["model"]).all()
    # At least the longest way there and the longest expert work.
    assert (found["seconds"] > (judged.dispatch + judged.compute).sum(axis=1)).all()


def test_demands_are_those_that_the_cost_model_replays() -> None:
    plan, steps = case()
    judged = evaluate_on(plan, steps, plan.model, TOPOLOGY, plans.OBJECTIVE)
    for step, layers in enumerate(demands(plan, steps)):
        assert np.array([one.pairs for one in layers]) == pytest.approx(judged.device_tokens[step])
        assert [one.hit.sum() for one in layers] == pytest.approx(judged.reached[step].tolist())


def test_replicas_serve_tokens_near_them_as_in_the_runtime() -> None:
    plan, steps = case("eplb", extra=2)
    judged = evaluate_on(plan, steps, plan.model, TOPOLOGY, plans.OBJECTIVE)
    away = served = 0.0
    for layers in demands(plan, steps):
        for one in layers:
            away += float(one.hit.sum() - one.hit[np.arange(len(one.home)), one.home].sum())
            served += float(one.pairs.sum())
    assert away < judged.crossing.sum()
    assert served == steps.expert_ids.size


def test_a_rank_that_is_done_returns_its_rows_while_others_compute() -> None:
    # Ten rows from each rank of node 1 to each rank of node 0: 20 rows a rank, 0.8 s on node 0's link each way.
    going = {(2, (0,)): 10, (3, (0,)): 10, (2, (1,)): 10, (3, (1,)): 10}
    line = Timeline(plans.SPEC, ROUND, 0.0, 1.0)
    # Rank 0 is done at 1.8 s and returns its rows by 2.2 s, rank 1 at 3.8 s and by 4.2 s.
    assert line.seconds([layer(going, (1.0, 3.0, 0.0, 0.0))], False) == pytest.approx(0.8 + 3.0 + 0.4)
    # Both done at once share the link.
    assert line.seconds([layer(going, (3.0, 3.0, 0.0, 0.0))], False) == pytest.approx(0.8 + 3.0 + 0.8)
    # Rank 1's rows wait for rank 0's to have gone.
    assert line.seconds([layer(going, (2.9, 3.0, 0.0, 0.0))], False) == pytest.approx(0.8 + 2.9 + 0.8)


def test_two_hops_send_a_token_once_to_a_node_and_then_on() -> None:
    # Rank 2's tokens go to rank 0, of equal place, which hands them on to rank 1 too.
    going = {(2, (0, 1)): 10}
    line = Timeline(plans.SPEC, ROUND, 0.0, 1.0)
    hops = 0.2 + 0.1
    assert line.seconds([layer(going, (1.0, 2.0, 0.0, 0.0))], True) == pytest.approx(2 * hops + 2.0)
    # In one hop both copies cross the link: 0.4 s there; back 0.2 s each, rank 0's while rank 1 computes.
    assert line.seconds([layer(going, (1.0, 2.0, 0.0, 0.0))], False) == pytest.approx(0.4 + 2.0 + 0.2)


def test_copies_cost_what_the_timed_dispatch_took_beside_links() -> None:
    plan, steps = case()
    reached = evaluate_on(plan, steps, plan.model, TOPOLOGY, plans.OBJECTIVE).reached.sum(axis=1) / 4
    for dispatch in ("flat", "node_aware"):
        bare, handled = (Predictions(calibration(c)).of(plan, steps, dispatch, "dispatch_combine") for c in (0.0, 1e-5))
        more = np.array(handled["seconds"]) - bare["seconds"]
        if dispatch == "flat":
            assert more == pytest.approx(1e-5 * reached)
        else:
            # Also the copies to nodes: at least one a token and layer.
            assert (more >= 1e-5 * (reached + steps.tokens * steps.num_layers / 4) - 1e-12).all()


def test_tokens_that_do_not_come_back_are_predicted_by_the_cost_model() -> None:
    plan, steps = case()
    found = Predictions(calibration(1e-5)).of(plan, steps, "flat", "context_coherent")
    objective = plans.OBJECTIVE.replace(node_dedup=False, execution="context_coherent")
    assert found["seconds"] == found["model"]
    assert found["model"] == pytest.approx(evaluate_on(plan, steps, plan.model, TOPOLOGY, objective).step_seconds)
