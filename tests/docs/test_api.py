"""The public interface: what is on `mp`, how its objects show themselves, what wrong arguments are told, one form
each."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traces import make_trace

import moeplace as mp
from moeplace._deprecated import renamed, warn_deprecated

ROOT = Path(__file__).resolve().parents[2]
MODEL = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=64, ffn_size=64)
TOPOLOGY = mp.Topology.preset("h100-hgx", devices_per_node=2)
TRACE = make_trace(seed=0)
PROBLEM = mp.Problem(
    TRACE,
    TOPOLOGY,
    model=mp.ModelSpec(
        layers=TRACE.num_layers, experts=TRACE.num_experts, top_k=TRACE.top_k, hidden_size=64, ffn_size=64
    ),
)
PLAN = mp.solve(PROBLEM, "contiguous")
STEPS = TRACE.decode_steps(8, steps=4)
EVALUATION = mp.evaluate(PLAN, STEPS, PROBLEM)
DECISION = mp.decide(PLAN, [PLAN], STEPS, PROBLEM, resamples=40)


def large_problem() -> mp.Problem:
    """58 layers of 256 experts with names of their own, on 64 devices."""
    model = mp.ModelSpec(layers=58, experts=256, top_k=8, hidden_size=64, ffn_size=64)
    loads = np.random.default_rng(0).integers(1, 1000, size=(58, 256))
    statistics = mp.RoutingStatistics.from_counts(loads, moe_layers=range(3, 61), top_k=8)
    return mp.Problem(model, mp.Topology.preset("h100-hgx", nodes=8), statistics, slots=320)


LARGE = large_problem()


@pytest.mark.parametrize(
    "thing",
    [
        LARGE,
        mp.solve(LARGE, "round_robin"),
        LARGE.statistics,
        LARGE.topology,
        TRACE,
        PROBLEM,
        PLAN,
        EVALUATION,
        DECISION,
        STEPS,
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_objects_fit_a_line_and_a_screen(thing: Any) -> None:
    assert repr(thing).startswith(f"<{type(thing).__name__}: ")
    assert "\n" not in repr(thing)
    assert len(repr(thing)) < 200
    lines = str(thing).splitlines()
    assert 2 <= len(lines) <= 30
    assert max(map(len, lines)) <= 140
    assert thing._repr_html_().count("<tr>") == thing._repr_html_().count("</tr>") >= 2


def test_a_printed_plan_says_who_solved_how_good_it_is_and_how_to_use_it() -> None:
    moved = mp.solve(mp.Problem(PROBLEM.statistics, TOPOLOGY, model=PROBLEM.model, current=PLAN), "random", seed=4)
    shown = str(moved)
    assert moved.certificate is not None
    assert "random 0." in shown
    assert "seed 4" in shown
    assert f"{moved.certificate.value:.6g}" in shown
    assert f"{moved.gap:.2%}" in shown
    assert f"{moved.predicted['load_max_mean']:.3f} times the mean" in shown
    moves = mp.decide(PLAN, [moved], STEPS, PROBLEM, resamples=40).verdicts[0].migration.moves
    assert moved.predicted["moves"] == moves > 0
    assert f"{moves} experts to another device" in shown
    assert "export_plan(plan, engine, path)" in shown


def test_text_of_others_does_not_become_markup_in_notebooks() -> None:
    hostile = TOPOLOGY.replace(name="<script>")
    assert "<script>" not in hostile._repr_html_()
    assert "&lt;script&gt;" in hostile._repr_html_()


@pytest.mark.parametrize(
    ("call", "argument", "expected"),
    [
        (lambda: mp.evaluate(1, 2, 3), "plan is 1 (int)", "expected Plan"),  # type: ignore[arg-type]
        (lambda: mp.evaluate(PLAN, PROBLEM, PROBLEM), "held_out is <Problem", "RoutingTrace or"),  # type: ignore[arg-type]
        (lambda: mp.evaluate(PLAN, STEPS, None), "problem is missing", "Problem(trace, topology)"),  # type: ignore[arg-type]
        (lambda: mp.bottleneck_terms(PLAN), "evaluation is <Plan", "expected Evaluation"),  # type: ignore[arg-type]
        (lambda: mp.solve(TRACE), "problem is <RoutingTrace", "expected Problem"),  # type: ignore[arg-type]
        (lambda: mp.solve(PROBLEM, 3), "lacks name", "supports, needs, solve"),  # type: ignore[arg-type]
        (lambda: mp.decide(PLAN, PLAN, STEPS, PROBLEM), "candidates is <Plan", "a sequence of Plan"),  # type: ignore[arg-type]
        (lambda: mp.what_if(PLAN, STEPS, PROBLEM), "problem is <Steps", "expected Problem"),  # type: ignore[arg-type]
        (lambda: mp.pareto(PROBLEM, PLAN), "held_out is <Plan", "trace.decode_steps()"),  # type: ignore[arg-type]
        (lambda: mp.optimal_shares(PLAN, PROBLEM, STEPS), "steps is <Problem", "expected Steps"),  # type: ignore[arg-type]
        (lambda: mp.survives(PROBLEM, []), "plan is <Problem", "Plan.load(path)"),  # type: ignore[arg-type]
        (lambda: mp.single_failures(PLAN), "topology is <Plan", "Topology.preset(name)"),  # type: ignore[arg-type]
        (lambda: mp.export_plan("plan.json", "sglang", "x"), "plan is 'plan.json' (str)", "expected Plan"),  # type: ignore[arg-type]
        (lambda: mp.read_exported("x", "sglang", TOPOLOGY, MODEL), "model is <Topology", "expected ModelSpec"),  # type: ignore[arg-type]
        (lambda: mp.write_trace("trace", "x"), "trace is 'trace' (str)", "read_trace(path)"),  # type: ignore[arg-type]
        (lambda: mp.RoutingStatistics.from_trace("trace"), "trace is 'trace'", "expected RoutingTrace"),  # type: ignore[arg-type]
        (lambda: mp.Problem("trace", TOPOLOGY), "routing is 'trace' (str)", "RoutingTrace or RoutingStatistics"),  # type: ignore[arg-type]
        (lambda: mp.Problem(TRACE, 8, model=MODEL), "topology is 8 (int)", "expected Topology"),  # type: ignore[arg-type]
        (lambda: mp.Problem(TRACE, TOPOLOGY, model="olmoe"), "model is 'olmoe' (str)", "ModelSpec.from_config"),  # type: ignore[arg-type]
        (lambda: mp.Problem(TRACE, TOPOLOGY, objective="mean", model=MODEL), "objective is 'mean'", "Objective"),  # type: ignore[arg-type]
        (lambda: mp.Plan(MODEL, 8, np.zeros((1, 1)), np.zeros(1)), "topology is 8 (int)", "expected Topology"),  # type: ignore[arg-type]
    ],
)
def test_an_argument_of_another_type_is_named_with_what_is_expected(
    call: Callable[[], object], argument: str, expected: str
) -> None:
    with pytest.raises(TypeError) as refusal:
        call()
    assert isinstance(refusal.value, mp.InputError)
    assert argument in str(refusal.value)
    assert expected in str(refusal.value)


def test_a_call_without_an_argument_says_what_python_says() -> None:
    with pytest.raises(TypeError, match=r"evaluate\(\) missing 2 required positional arguments"):
        mp.evaluate(PLAN)  # type: ignore[call-arg]


@pytest.mark.parametrize("function", [mp.solve, mp.what_if, mp.pareto])
def test_a_time_limit_is_by_default_none_everywhere(function: Callable[..., object]) -> None:
    assert inspect.signature(function).parameters["seconds"].default is None


@pytest.mark.parametrize(
    "call",
    [
        lambda listener: mp.solve(PROBLEM, "eplb", progress=listener),
        lambda listener: mp.what_if(PLAN, PROBLEM, STEPS, ready=False, progress=listener),
        lambda listener: mp.pareto(PROBLEM, STEPS, solver="eplb", redundant=[0], progress=listener),
        lambda listener: mp.decide(PLAN, [PLAN], STEPS, PROBLEM, resamples=40, progress=listener),
    ],
    ids=["solve", "what_if", "pareto", "decide"],
)
def test_progress_has_one_form(call: Callable[[Callable[[mp.Progress], None]], object]) -> None:
    heard: list[mp.Progress] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(heard.append)
    assert heard
    assert all(isinstance(news, mp.Progress) for news in heard)
    assert [news.seconds for news in heard] == sorted(news.seconds for news in heard)
    assert all(news.total is None or 0 <= news.done <= news.total for news in heard)


def test_listeners_of_the_old_forms_still_hear_and_are_told_of_the_new() -> None:
    parts: list[tuple[int, int, str]] = []
    draws: list[int] = []

    def old_sweep(done: int, total: int, name: str) -> None:
        parts.append((done, total, name))

    def old_draws(done: int) -> None:
        draws.append(done)

    with pytest.warns(DeprecationWarning, match=r"progress\(done, total, message\) of what_if is deprecated"):
        mp.what_if(PLAN, PROBLEM, STEPS, ready=False, progress=old_sweep)  # type: ignore[arg-type]
    assert parts == [(0, 2, "device:0"), (1, 2, "device:1")]
    with pytest.warns(DeprecationWarning, match=r"progress\(done\) of decide"):
        mp.decide(PLAN, [PLAN], STEPS, PROBLEM, resamples=40, progress=old_draws)  # type: ignore[arg-type]
    assert draws == list(range(1, 41))


def test_the_old_keyword_of_decide_works_and_names_the_new_one() -> None:
    with pytest.warns(DeprecationWarning, match=r"decide\(held=\.\.\.\) is deprecated.*held_out="):
        decision = mp.decide(PLAN, [PLAN], held=STEPS, problem=PROBLEM, resamples=40)  # type: ignore[call-arg]
    assert decision.action == "keep"


def test_an_old_name_works_and_names_the_new_one_where_it_was_used() -> None:
    get = renamed("moeplace", {"finish": "complete"}, {"complete": 3}.__getitem__)
    with pytest.warns(DeprecationWarning, match=r"moeplace\.finish is deprecated.*use moeplace\.complete") as caught:
        assert get("finish") == 3
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get("complete") == 3
        with pytest.raises(DeprecationWarning):
            warn_deprecated("this", "that")


IMPORT = re.compile(r"^\s*from (moeplace[\w.]*) import ([\w, ]+)", re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.py"))],
    ids=lambda page: page.name,
)
def test_readers_are_shown_public_names_only(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module, taken in IMPORT.findall(text):
        package = importlib.import_module(module)
        assert module.count(".") <= 1, f"{module} is private: take the name from moeplace or from its package"
        for name in taken.replace(" ", "").split(","):
            assert name in package.__all__, f"{module}.{name} is not public"
    for name in re.findall(r"\bmp\.(\w+)", text):
        assert name in mp.__all__, f"mp.{name} is not there"
