"""A PuLP model is solved within its limit, and its result claims no more than was found and proven."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import numpy as np
import pulp
import pytest

import moeplace as mp
from moeplace.solvers.base import Budget
from moeplace.solvers.ilp import BACKENDS, solve_ilp
from moeplace.solvers.ilp_cbc import lower_bound, run_limited

WEIGHTS = np.random.default_rng(0).integers(10**5, 10**6, 60).tolist()

both = pytest.mark.parametrize("backend", BACKENDS)


def small_model() -> pulp.LpProblem:
    """The best of 3x + 2y + 7 is 3 * 2 + 2 * 1 + 7 = 15."""
    model = pulp.LpProblem("small", pulp.LpMinimize)
    x, y = (model.add_variable(name, 0, 10, pulp.LpInteger) for name in "xy")
    model += 3 * x + 2 * y + 7
    model += 2 * x + 3 * y >= 6.5
    model += x - y >= 0.5
    return model


def hard_model(items: int = 60, sides: int = 6) -> pulp.LpProblem:
    """Numbers on sides of equal sum: solutions are everywhere, the best one's proof is out of reach."""
    weights = WEIGHTS[:items]
    model = pulp.LpProblem("hard", pulp.LpMinimize)
    on = [[model.add_variable(f"on_{i}_{s}", 0, 1, pulp.LpInteger) for s in range(sides)] for i in range(items)]
    most, least = model.add_variable("most", 0), model.add_variable("least", 0)
    model += most - least
    for row in on:
        model += pulp.lpSum(row) == 1
    for s in range(sides):
        held = pulp.lpSum(w * row[s] for w, row in zip(weights, on, strict=True))
        model += held <= most
        model += held >= least
    return model


def market_split() -> pulp.LpProblem:
    """Five equalities over 40 binaries (Cornuejols and Dawande 1998): finding any solution is hard."""
    rng = np.random.default_rng(1)
    model = pulp.LpProblem("split", pulp.LpMinimize)
    x = [model.add_variable(f"x_{i}", 0, 1, pulp.LpInteger) for i in range(40)]
    model += pulp.lpSum(x)
    for row in rng.integers(0, 100, (5, 40)).tolist():
        model += pulp.lpSum(a * v for a, v in zip(row, x, strict=True)) == sum(row) // 2
    return model


def one_side(model: pulp.LpProblem) -> dict[str, float]:
    """Everything on side 0."""
    values = {v.name: float(v.name.endswith("_0")) for v in model.variables()}
    return values | {"most": float(sum(WEIGHTS)), "least": 0.0}


@both
def test_an_optimum_is_proven_constants_included(backend: str) -> None:
    result = solve_ilp(small_model(), Budget(), backend=backend)
    assert result.value == pytest.approx(15.0)
    assert result.bound == pytest.approx(15.0)
    assert (result.status, result.finished) == ("optimal", True)
    assert result.values == {"x": pytest.approx(2.0), "y": pytest.approx(1.0)}


@both
def test_an_incumbent_at_the_time_limit_is_not_called_optimal(backend: str) -> None:
    model = hard_model()
    result = solve_ilp(model, Budget(seconds=2.0), backend=backend)
    assert pulp.LpStatus[model.status] == "Optimal", "PuLP's own word, which solve_ilp must not repeat"
    assert (result.status, result.finished) == ("feasible", False)
    assert result.bound is not None
    assert result.bound < result.value
    assert result.value == pytest.approx(result.values["most"] - result.values["least"])


@both
def test_a_gap_asked_for_ends_the_solve_with_that_gap_reported(backend: str) -> None:
    model = hard_model(12, 3)
    exact = solve_ilp(hard_model(12, 3), Budget(), backend=backend)
    assert exact.status == "optimal"
    rough = solve_ilp(model, Budget(), backend=backend, absolute_gap=3 * exact.value)
    assert rough.finished
    assert rough.bound is not None
    assert rough.bound <= exact.value * (1 + 1e-9) <= rough.value * (1 + 1e-6)
    assert rough.value - rough.bound <= 3 * exact.value * (1 + 1e-6)


@both
def test_a_model_without_solution_is_said_to_have_none(backend: str) -> None:
    model = small_model()
    model += pulp.lpSum(model.variables()) <= 1
    with pytest.raises(mp.SolveError, match="'small' has no solution"):
        solve_ilp(model, Budget(), backend=backend)


@both
def test_no_incumbent_in_time_is_an_error_that_says_what_to_do(backend: str) -> None:
    with pytest.raises(mp.SolveError, match=r"found no solution .*'split' \(40 variables\) within .*more seconds"):
        solve_ilp(market_split(), Budget(seconds=1.0), backend=backend)


@both
def test_a_start_is_kept_when_nothing_better_is_found_in_time(backend: str) -> None:
    model = hard_model()
    start = one_side(model)
    spent = Budget(seconds=1e-9)
    result = solve_ilp(model, spent, backend=backend, start=start)
    assert result.values == start
    assert result.value == start["most"]
    assert (result.bound, result.status, result.finished) == (None, "feasible", False)
    assert solve_ilp(model, Budget(seconds=2.0), backend=backend, start=start).value < result.value


@both
def test_the_backend_begins_from_the_start(backend: str) -> None:
    good = solve_ilp(hard_model(), Budget(seconds=1.5))
    assert good.value > 0
    model = hard_model()
    heard: list[float] = []
    result = solve_ilp(
        model,
        Budget(seconds=1.0),
        backend=backend,
        start=good.values,
        report=lambda value, bound: heard.append(value),
    )
    assert result.value <= good.value * (1 + 1e-9)
    assert all(value < good.value for value in heard)


def test_better_solutions_are_reported_with_bounds_below_them() -> None:
    heard: list[tuple[float, float | None]] = []
    solve_ilp(hard_model(), Budget(seconds=2.0), report=lambda value, bound: heard.append((value, bound)))
    values = [value for value, _ in heard]
    assert values
    assert values == sorted(values, reverse=True)
    assert all(bound is None or bound <= value for value, bound in heard)


def test_same_seed_gives_the_same_solution_on_both_backends() -> None:
    for backend in BACKENDS:
        one, two = (solve_ilp(hard_model(10, 3), Budget(seed=7), backend=backend) for _ in range(2))
        assert one.values == two.values


def test_an_interrupt_stops_highs_and_is_passed_on() -> None:
    # A test worker may have been started with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            solve_ilp(hard_model(), Budget(seconds=60.0), report=lambda *_: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)


@both
def test_nothing_is_printed(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    solve_ilp(small_model(), Budget(), backend=backend)
    assert capfd.readouterr() == ("", "")


def test_an_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(mp.InputError, match=r"backend 'hihgs' is unknown; did you mean 'highs'\?"):
        solve_ilp(small_model(), Budget(), backend="hihgs")


def test_a_model_that_maximises_is_refused() -> None:
    model = pulp.LpProblem("up", pulp.LpMaximize)
    with pytest.raises(mp.InputError, match="'up' maximises"):
        solve_ilp(model, Budget())


@pytest.mark.parametrize(
    ("log", "proven", "bound"),
    [
        ("Result - Stopped on time limit\n\nLower bound:                    -610951.171\n", None, -610951.1715),
        ("Lower bound: 3\nLower bound:  4.25\n", None, 4.245),
        ("Lower bound:                    -1" + 50 * "0" + ".000\n", None, None),
        ("Result - Optimal solution found\n\nObjective value: 15.0\n", 15.0, 15.0),
        ("Result - Stopped on time limit\n\nNo feasible solution found\n", None, None),
    ],
)
def test_cbcs_bound_is_read_from_its_log_and_never_above_what_it_proved(
    log: str, proven: float | None, bound: float | None
) -> None:
    read = lower_bound(log, proven)
    assert (read is None) == (bound is None)
    if bound is not None and read is not None:
        assert read <= bound + 1e-9


@pytest.mark.parametrize("on_interrupt", ["SIG_DFL", "SIG_IGN"])
def test_a_backend_process_that_ignores_its_limit_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_interrupt: str
) -> None:
    monkeypatch.setattr("moeplace.solvers.ilp_cbc.GRACE_SECONDS", 0.3)
    stays = f"import signal, time; signal.signal(signal.SIGINT, signal.{on_interrupt}); time.sleep(3600)"
    assert run_limited([sys.executable, "-c", stays], tmp_path / "log", 0.1) is None


def test_a_backend_process_that_fails_is_told_from_one_that_was_ended(tmp_path: Path) -> None:
    assert run_limited([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", 60.0) == 3
