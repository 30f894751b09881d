"""The steps a deployment runs: one description, read by all that solve and judge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import moeplace as mp
from moeplace.placement.objective import percentiles, risk_value, risk_weights
from moeplace.placement.steps import USUAL_BATCHES
from moeplace.solvers.chain import Chain
from tests.support.traces import make_trace

MODEL = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=256, ffn_size=512)
SMALL = mp.Batch("decode", tokens_per_device=4, weight=3)
LARGE = mp.Batch("prefill", tokens=96, weight=1)


def cluster(devices: int = 4) -> mp.Topology:
    device = mp.Device(compute=1e12, memory=8e10, memory_bandwidth=4e11, intra_bandwidth=4e9)
    return mp.Topology(nodes=(mp.Node(devices=(device,) * devices, inter_bandwidth=1e9),))


def problem(**fields: Any) -> mp.Problem:
    return mp.Problem(make_trace(seed=0), cluster(), model=MODEL, **fields)


def test_a_batch_counts_tokens_a_device_or_over_all() -> None:
    assert mp.Batch("decode", tokens_per_device=64).step_tokens(8) == 512
    assert mp.Batch("prefill", tokens=4096).step_tokens(8) == 4096
    assert mp.Batch.parse("prefill:2048@0.1") == mp.Batch("prefill", tokens_per_device=2048, weight=0.1)
    assert mp.Batch.parse("decode:64") == mp.Batch("decode", tokens_per_device=64)
    for batch in (SMALL, LARGE, mp.Batch("decode", tokens=7, weight=1 / 3)):
        assert mp.Batch.parse(batch.written) == batch
    with pytest.raises(AttributeError):
        SMALL.weight = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"phase": "train", "tokens": 8}, "phase 'train' is unknown"),
        ({"phase": "decode"}, "given neither"),
        ({"phase": "decode", "tokens": 8, "tokens_per_device": 2}, "one of them"),
        ({"phase": "decode", "tokens": 0}, "from 1 to"),
        ({"phase": "decode", "tokens": True}, "a whole number"),
        ({"phase": "decode", "tokens": 2.5}, "a whole number"),
        ({"phase": "decode", "tokens": 8, "weight": 0}, "above 0"),
        ({"phase": "decode", "tokens": 8, "weight": float("nan")}, "a number"),
        ({"phase": "decode", "tokens": 8, "weight": float("inf")}, "above 0"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(mp.InputError, match=words):
        mp.Batch(**fields)


@pytest.mark.parametrize("text", ["decode", "decode:", "decode:64@", "chat:64", "decode:6.5", "decode:64@-1", "64"])
def test_text_that_names_no_batch_is_refused(text: str) -> None:
    with pytest.raises(mp.InputError, match="PHASE:TOKENS"):
        mp.Batch.parse(text)


def test_a_problem_takes_a_batch_or_several_and_nothing_else() -> None:
    assert problem(batches=SMALL).batches == (SMALL,)
    assert problem(batches=[SMALL, LARGE]).batches == (SMALL, LARGE)
    with pytest.raises(mp.InputError, match="batches is .*, expected a sequence of Batch or Batch"):
        problem(batches=["decode:64"])
    with pytest.raises(mp.InputError, match="batches is .*, expected a sequence of Batch or Batch"):
        problem(batches="decode:64")
    with pytest.raises(mp.InputError, match="twice"):
        problem(batches=[SMALL, replace(SMALL, weight=1)])


def test_what_steps_are_about_is_asked_recorded_or_usual() -> None:
    asked = mp.step_mix(problem(batches=[SMALL, LARGE]))
    assert (asked.origin, [batch.weight for batch in asked.batches]) == ("asked", [0.75, 0.25])
    assert asked.text == (
        "Steps: decode steps of 4 tokens a device (75.0% of steps) and prefill steps of 96 tokens (25.0% of steps); as "
        "asked for"
    )
    trace = make_trace(seed=0)
    recorded = mp.Problem(replace(trace, step=trace.position), cluster(), model=MODEL)
    assert mp.step_mix(recorded).origin == "recorded"
    assert mp.step_mix(recorded).batches == (mp.Batch("decode", tokens=12, weight=1.0),)
    assert mp.step_mix(replace(recorded, batches=(SMALL,))).origin == "asked"
    assert mp.step_mix(problem()).origin == "usual"


def test_usual_batches_take_equal_parts_of_the_time_of_the_plan_in_force() -> None:
    plain = problem()
    current = mp.solve(plain, "random", seed=3)
    for given, named in ((plain, "contiguous placement"), (replace(plain, current=current), "the plan in force")):
        mix = mp.step_mix(given)
        assert mix.even_under == named
        assert [(batch.phase, batch.tokens_per_device) for batch in mix.batches] == [
            (batch.phase, batch.tokens_per_device) for batch in USUAL_BATCHES
        ]
        plan = current if given.current is not None else mp.solve(plain, "contiguous")
        parts = mp.evaluate(plan, make_trace(seed=0), given).by_batch()
        times = [part.mean_seconds * batch.weight for part, batch in zip(parts.values(), mix.batches, strict=True)]
        assert times[0] == pytest.approx(times[1], rel=0.1)


@pytest.mark.parametrize("held_out", ["trace", "statistics", "counts"])
def test_a_plan_is_judged_on_steps_of_the_problems_batches(held_out: str) -> None:
    given = problem(batches=[SMALL, LARGE])
    trace = make_trace(seed=5)
    statistics = mp.RoutingStatistics.from_trace(trace)
    routing: Any = {
        "trace": trace,
        "statistics": statistics,
        "counts": mp.RoutingStatistics.from_counts(statistics.load, top_k=2),
    }[held_out]
    plan = mp.solve(given, "contiguous")
    evaluation = mp.evaluate(plan, routing, given, seed=1)
    parts = evaluation.by_batch()
    assert list(parts) == ["decode 16", "prefill 96"]
    assert set(parts["decode 16"].tokens) == {16}
    assert set(parts["prefill 96"].tokens) == {96}
    expected = 0.75 * parts["decode 16"].step_seconds.mean() + 0.25 * parts["prefill 96"].step_seconds.mean()
    assert evaluation.summary()["step_seconds_mean"] == pytest.approx(expected)
    assert evaluation.risk() == pytest.approx(expected)
    terms = mp.bottleneck_terms(evaluation)
    assert terms.seconds.sum() == pytest.approx(expected)
    assert any("Counts tell" in note for note in evaluation.notes) == (held_out == "counts")
    assert 0.0 < evaluation.ideal_share <= 1.0


def test_the_share_of_the_ideal_is_one_where_every_device_carries_the_mean() -> None:
    """Every token takes experts 0 and 1, each in a slot on each of two devices."""
    ids = np.tile(np.array([0, 1]), (64, 3, 1))
    trace = mp.RoutingTrace.from_arrays(ids, num_experts=2, sequence=np.arange(64))
    model = mp.ModelSpec(layers=3, experts=2, top_k=2, hidden_size=256, ffn_size=512)
    given = mp.Problem(trace, cluster(2), model=model, slots=4, batches=[mp.Batch("decode", tokens=32)])
    even = mp.Plan(model, given.topology, np.tile([0, 1, 0, 1], (3, 1)), given.slot_device)
    assert mp.evaluate(even, trace, given).ideal_share == pytest.approx(1.0)
    single = mp.Problem(trace, cluster(2), model=model, device_slots=[2, 1], batches=given.batches)
    uneven = mp.Plan(model, given.topology, np.tile([0, 1, 0], (3, 1)), single.slot_device)
    judged = mp.evaluate(uneven, trace, single)
    assert judged.ideal_share == pytest.approx(float((judged.ideal / judged.step_seconds).mean()))
    assert judged.ideal_share < 0.8


@pytest.mark.slow
def test_solvers_price_the_problems_batches_by_their_weights() -> None:
    """What search certifies is the weighted mean over batches, and moves with the weights."""
    for weights in ((1.0, 9.0), (9.0, 1.0)):
        batches = [replace(batch, weight=weight) for batch, weight in zip((SMALL, LARGE), weights, strict=True)]
        given = problem(batches=batches)
        plan = mp.solve(given, "search", proposals=300)
        assert plan.certificate is not None
        assert "(decode 16 and prefill 96)" in plan.certificate.objective
        each = [
            mp.solve(replace(given, batches=(batch,)), "search", proposals=300).certificate for batch in (SMALL, LARGE)
        ]
        ends = [certificate.value for certificate in each if certificate is not None]
        mixed = float(np.average(ends, weights=weights))
        assert plan.certificate.value == pytest.approx(mixed, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["dispatch_combine", "context_coherent"])
def test_chain_proves_the_least_weighted_mean_of_all_placements(execution: str) -> None:
    trace = make_trace(seed=0, experts=4)
    model = mp.ModelSpec(layers=3, experts=4, top_k=2, hidden_size=256, ffn_size=512)
    objective = mp.Objective.model_validate({"execution": execution})
    given = mp.Problem(trace, cluster(2), objective=objective, model=model, batches=[SMALL, LARGE])
    plan = mp.solve(given, "chain", minimise="step", steps=4)
    assert plan.certificate is not None
    assert plan.proven_optimal
    assert "decode 8 and prefill 96" in plan.certificate.objective
    assert Chain().work(given, steps=4) == pytest.approx(Chain().work_on(given, 8))
    steps = mp.problem_steps(trace, given, count=4)
    every = [mp.evaluate(mp.solve(given, "random", seed=seed), steps, given).mean_seconds for seed in range(12)]
    assert plan.certificate.value <= min(every) * (1 + 1e-9)


def test_the_tail_is_of_the_steps_of_each_batch() -> None:
    figures, kind = np.array([1.0, 2.0, 10.0, 20.0]), np.array([0, 0, 1, 1])
    weight, codes = np.array([0.4, 0.4, 0.1, 0.1]), np.zeros(4, np.int64)
    tail = mp.Objective(risk="cvar:0.5")
    assert risk_value(figures, codes, tail, None, weight, kind) == pytest.approx(0.8 * 2.0 + 0.2 * 20.0)
    weights, offset = risk_weights(figures, codes, tail, None, weight, kind)
    assert weights @ figures + offset == pytest.approx(0.8 * 2.0 + 0.2 * 20.0)
    assert percentiles(figures, (50, 95), weight) == [2.0, 20.0]
    worst = mp.Objective(risk="worst_workload")
    workload = np.array([0, 1, 0, 1])
    weights, offset = risk_weights(figures, workload, worst, None, weight)
    assert weights @ figures + offset == pytest.approx(risk_value(figures, workload, worst, None, weight))


def routing_of(kind: str, seed: int) -> Any:
    trace = make_trace(seed=seed)
    load = mp.RoutingStatistics.from_trace(trace).load
    windows = np.random.default_rng(seed).poisson(np.tile(load[:1] / 10, (12, 1, 1))).astype(float)
    return trace if kind == "trace" else mp.RoutingStatistics.from_counts(windows, top_k=2)


@pytest.mark.parametrize("kind", ["trace", "counts"])
def test_decisions_are_on_the_problems_batches(kind: str) -> None:
    """The figures are weighted means over batches, so that a batch alone gives others."""
    given = problem(batches=[SMALL, LARGE])
    plans = [mp.solve(given, "contiguous"), mp.solve(given, "eplb")]
    held = routing_of(kind, 5)
    mixed, small, large = (
        mp.decide(plans[0], plans[1:], held, replace(given, batches=batches), resamples=20).verdicts[0].current
        for batches in (given.batches, (SMALL,), (LARGE,))
    )
    assert mixed == pytest.approx(0.75 * small + 0.25 * large, rel=1e-6)
    assert small < mixed < large


def test_a_decision_says_what_no_plan_can_save() -> None:
    given = problem(batches=[SMALL])
    plan = mp.solve(given, "contiguous")
    decision = mp.decide(plan, [mp.solve(given, "eplb")], make_trace(seed=5), given, resamples=20)
    assert decision.most is not None
    assert decision.verdicts[0].gain / decision.verdicts[0].current <= decision.most
    assert f"no plan can save more than {decision.most:.2%}" in decision.reason


@pytest.mark.parametrize("kind", ["trace", "counts"])
def test_what_if_and_pareto_make_the_steps_of_traces_and_counts(kind: str) -> None:
    held = routing_of(kind, 5)
    known = mp.Problem(routing_of(kind, 0), cluster(), model=MODEL, batches=[SMALL, LARGE])
    plan = mp.solve(known, "contiguous")
    result = mp.what_if(
        plan, known, held, [mp.Change.losing(mp.single_failures(known.topology)[0], known.topology)], ready=False
    )
    assert result.before.batches == ("decode 16", "prefill 96")
    front = mp.pareto(known, held, redundant=[0], tolerate=[None], solver="eplb")
    assert front.points[0].evaluation.batches == ("decode 16", "prefill 96")
