"""What layers wait for, against the cost model's formulas applied step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from traces import make_trace

import moeplace as mp
from moeplace.placement.cost import all_to_all_latency
from moeplace.placement.evaluate import PHASES, TERMS, bottleneck_terms
from moeplace.placement.replay import replay

FAST = {"compute": 1e12, "memory": 1e12, "memory_bandwidth": 1e11, "intra_bandwidth": 1e9}
SLOW = {"compute": 4e10, "memory": 1e12, "memory_bandwidth": 7e10, "intra_bandwidth": 3e8}
MODEL = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=512, ffn_size=256)


def problem_on(nodes: list[dict[str, Any]], **objective: Any) -> mp.Problem:
    topology = mp.Topology.from_dict({"nodes": [{"inter_bandwidth": 4e8, **node} for node in nodes]})
    statistics = mp.RoutingStatistics.from_trace(make_trace(seed=1))
    return mp.Problem(MODEL, topology, statistics, mp.Objective(**objective), slots=10)


CLUSTERS = {
    "even": [{"devices": [FAST, FAST]}, {"devices": [FAST, FAST]}],
    "mixed": [{"devices": [FAST, SLOW, FAST], "inter_bandwidth": 2e9}, {"devices": [SLOW]}],
}


@pytest.mark.parametrize("execution", ["dispatch_combine", "context_coherent"])
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_terms_are_those_of_the_formulas_step_by_step(execution: str, cluster: str) -> None:
    problem = problem_on(CLUSTERS[cluster], execution=execution, dispatch_dtype="fp8")
    topology = problem.topology
    plan = mp.solve(problem, "round_robin")
    steps = make_trace(seed=2).decode_steps(concurrency=6, steps=9)
    found = bottleneck_terms(mp.evaluate(plan, steps, problem))
    seconds = np.zeros((3, len(PHASES), len(TERMS)))
    devices = np.zeros((3, len(PHASES), 4))
    (demand,) = replay(plan, steps, topology, problem.objective)
    latency = all_to_all_latency(topology, True)
    for s in range(steps.num_steps):
        for layer in range(3):
            work = [
                (max(a, r), "compute" if a >= r else "memory", g)
                for g in range(4)
                for a, r in [
                    (
                        demand.tokens[s, layer, g] * MODEL.flops_per_token / topology.compute[g],
                        demand.experts_hit[s, layer, g] * MODEL.bytes_per_expert / topology.memory_bandwidth[g],
                    )
                ]
            ]
            phases = {"compute": max(work, key=lambda entry: entry[0])}
            for name, flows, width in (("dispatch", demand.dispatch, 1), ("combine", demand.combine, 2)):
                assert flows is not None
                size = MODEL.hidden_size * width
                waits = [(flows.intra[s, layer, g] * size / topology.intra_bandwidth[g], "intra", g) for g in range(4)]
                waits += [
                    (flows.inter[s, layer, n] * size / topology.inter_bandwidth[n], "inter", -1) for n in range(2)
                ]
                longest = max(waits, key=lambda entry: entry[0])
                phases[name] = (
                    (latency + longest[0], *longest[1:])
                    if longest[0] >= latency
                    else (latency + longest[0], "latency", -1)
                )
            for name, (spent, term, g) in phases.items():
                seconds[layer, PHASES.index(name), TERMS.index(term)] += spent / steps.num_steps
                if g >= 0:
                    devices[layer, PHASES.index(name), g] += 1 / steps.num_steps
    np.testing.assert_allclose(found.seconds, seconds, rtol=1e-6)
    np.testing.assert_allclose(found.device_steps, devices)


@pytest.mark.parametrize("execution", ["dispatch_combine", "context_coherent"])
def test_terms_add_up_to_the_step(execution: str) -> None:
    problem = problem_on(CLUSTERS["mixed"], execution=execution)
    judged = mp.evaluate(mp.solve(problem, "eplb"), make_trace(seed=3).decode_steps(8, 20), problem)
    found = bottleneck_terms(judged)
    assert sum(found.term_seconds().values()) == pytest.approx(judged.step_seconds.mean())
    np.testing.assert_allclose(found.steps.sum(axis=2), 1.0)
    named = found.device_steps.sum(axis=2) + found.node_steps.sum(axis=2)
    np.testing.assert_allclose(named, 1.0 - found.steps[:, :, TERMS.index("latency")])


def test_one_device_waits_for_no_link() -> None:
    alone = problem_on([{"devices": [FAST]}])
    alone = mp.Problem(alone.model, alone.topology, alone.statistics)
    judged = mp.evaluate(mp.solve(alone, "contiguous"), make_trace(seed=3).decode_steps(8, 5), alone)
    found = bottleneck_terms(judged)
    assert found.seconds[:, [0, 2]].sum() == 0.0
    assert found.steps[:, [0, 2]].sum() == 0.0
    np.testing.assert_allclose(found.device_steps[:, 1], 1.0)


def test_the_old_name_still_works_and_says_what_to_write() -> None:
    with pytest.warns(DeprecationWarning, match="bottleneck_terms"):
        assert mp.binding_terms is mp.bottleneck_terms
