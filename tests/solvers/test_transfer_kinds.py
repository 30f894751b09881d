"""Solvers under the kinds of transfers that engines run: increments, exact prices and bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from annealed import annealed
from traces import make_trace

import moeplace as mp
from moeplace.placement.cost import Transfers
from moeplace.placement.evaluate import evaluate_on
from moeplace.placement.steps import Steps
from moeplace.solvers.search.scenario import deal_sources, scenario_from

pytestmark = pytest.mark.slow

MODEL = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=2048, ffn_size=768)
KINDS = [("low_latency", "normal"), ("normal", "all_to_all"), ("all_gather", "low_latency"), ("all_gather",) * 2]


@pytest.fixture(autouse=True)
def _small_decode_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeplace.placement.cost.MOST_DECODE_TOKENS", 4)


def problem(decode: str, prefill: str, slots: int = 8, engine: str = "sglang", **objective: str) -> mp.Problem:
    trace = make_trace(seed=1)
    topology = mp.Topology.preset("h100-sxm", nodes=2, devices_per_node=2, engine=engine)
    chosen = mp.Objective(decode_dispatch=decode, prefill_dispatch=prefill, **objective)  # type: ignore[arg-type]
    return mp.Problem(MODEL, topology, mp.RoutingStatistics.from_trace(trace), chosen, slots=slots)


def mixed_steps(small: int = 4, large: int = 3) -> Steps:
    """Decode steps of 8 tokens, then steps of 40 that are prefill."""
    trace = make_trace(seed=1)
    parts = [trace.decode_steps(8, small, seed=0), trace.decode_steps(40, large, seed=1)]
    return replace(Steps.join(parts), source=None, weight=None)


@pytest.mark.parametrize(("decode", "prefill"), KINDS)
@pytest.mark.parametrize(("slots", "rule"), [(8, "share"), (12, "share"), (12, "nearest")])
def test_the_kernels_price_steps_of_two_kinds_as_evaluation_does(
    decode: str, prefill: str, slots: int, rule: str
) -> None:
    given = problem(decode, prefill, slots, replica_choice=rule)
    steps = mixed_steps()
    if rule == "nearest":
        steps = deal_sources(steps, 4, seed=2)
    drawn = scenario_from(given, "decode", 8, 4, seed=0)
    scenario = replace(drawn, steps=steps, loads=steps.loads().astype(float), workload=steps.step_workload, walked=None)
    result = annealed(given, scenario, share_moves=False)
    judged = evaluate_on(result.plan, steps, MODEL, given.topology, given.objective)
    waits = sum(Transfers.of(MODEL, given.topology, given.objective).waits(steps))
    expected = judged.dispatch + judged.compute + judged.combine - np.asarray(waits)[:, None]
    np.testing.assert_allclose(result.costs, expected, rtol=1e-5)


@pytest.mark.parametrize(("decode", "prefill"), KINDS)
@pytest.mark.parametrize("engine", ["sglang", ""])
def test_chain_prices_as_evaluation_does_and_no_placement_drawn_is_better(
    decode: str, prefill: str, engine: str
) -> None:
    given = problem(decode, prefill, engine=engine)
    plan = mp.solve(given, "chain", step_tokens=20, steps=6)
    assert plan.certificate is not None
    assert plan.certificate.bound == pytest.approx(plan.certificate.value)
    drawn = make_trace(seed=1).decode_steps(20, 6, seed=0)
    steps = replace(drawn, batch=np.zeros(6, np.int64), batches=("decode 20",))
    rng, best = np.random.default_rng(0), np.full(3, np.inf)
    for _ in range(80):
        tried = mp.Plan(MODEL, given.topology, np.tile(rng.permutation(8), (3, 1)), given.slot_device)
        judged = evaluate_on(tried, steps, MODEL, given.topology, given.objective)
        best = np.minimum(best, (judged.dispatch + judged.compute + judged.combine).mean(axis=0))
    mine = evaluate_on(plan, steps, MODEL, given.topology, given.objective)
    assert mine.step_seconds.mean() == pytest.approx(plan.certificate.value)
    assert mine.step_seconds.mean() <= best.sum() * (1 + 1e-9)


@pytest.mark.parametrize(("decode", "prefill"), KINDS)
@pytest.mark.parametrize("slots", [8, 12])
@pytest.mark.parametrize("engine", ["sglang", "vllm", ""])
def test_bounds_hold_under_every_kind(decode: str, prefill: str, slots: int, engine: str) -> None:
    given = problem(decode, prefill, slots, engine)
    for tokens in (8, 40):
        plan = mp.solve(given, "search", step_tokens=tokens, steps=4, proposals=2000, seed=0, certify=0.5)
        assert plan.certificate is not None
        assert plan.certificate.bound is not None
        assert plan.certificate.bound <= plan.certificate.value * (1 + 1e-9)
