"""Programs are solved within their limit by every backend, and results claim no more than was found and proven."""

from __future__ import annotations

import itertools
import math
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.solvers.base import Budget
from moeplace.solvers.mip.cbc import lower_bound, run_limited
from moeplace.solvers.mip.cpsat import UNBOUNDED, whole_program
from moeplace.solvers.mip.program import (
    BACKENDS,
    FEASIBLE,
    Feature,
    Program,
    ProgramBuilder,
    Request,
    backend_named,
    solve_program,
)

pytestmark = pytest.mark.slow

WEIGHTS = np.random.default_rng(0).integers(10**5, 10**6, 60).astype(float)

each = pytest.mark.parametrize("backend", BACKENDS)
slow = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def small_program(most: float = math.inf) -> Program:
    """The best of 3x + 2y + 7 is 3 * 2 + 2 * 1 + 7 = 15; x + y at most `most`."""
    builder = ProgramBuilder("small")
    numbers = builder.add_variables((1, 2), upper=10.0, cost=[3.0, 2.0], integral=True)
    builder.constant = 7.0
    builder.add_rows(numbers, [2.0, 3.0], lower=6.5)
    builder.add_rows(numbers, [1.0, -1.0], lower=0.5)
    builder.add_rows(numbers, 1.0, upper=most)
    return builder.build()


def hard_program(items: int = 60, sides: int = 6) -> Program:
    """Numbers on sides of equal sum: solutions are everywhere, the best one's proof is out of reach."""
    weights = WEIGHTS[:items]
    builder = ProgramBuilder("hard")
    on = builder.add_variables((items, sides), integral=True)
    ends = builder.add_variables((2,), upper=weights.sum(), cost=[1.0, -1.0])
    builder.add_rows(on, 1.0, 1.0, 1.0)
    for end, side in zip(ends, ({"upper": 0.0}, {"lower": 0.0}), strict=True):
        held = np.concatenate([on.T, np.full((sides, 1), end)], axis=1)
        builder.add_rows(held, np.append(weights, -1.0), **side)
    return builder.build()


def market_split() -> Program:
    """Five equalities over 40 binaries (Cornuejols and Dawande 1998): finding any solution is hard."""
    rows = np.random.default_rng(1).integers(0, 100, (5, 40)).astype(float)
    builder = ProgramBuilder("split")
    numbers = builder.add_variables((1, 40), cost=1.0, integral=True)
    sums = rows.sum(axis=1) // 2
    builder.add_rows(np.repeat(numbers, 5, axis=0), rows, sums, sums)
    return builder.build()


def affinity_program(seed: int) -> Program:
    """Items in bins of limited weight; neighbours apart pay, as in ExFlow's program."""
    rng = np.random.default_rng(seed)
    items, bins = int(rng.integers(4, 14)), int(rng.integers(2, 4))
    builder = ProgramBuilder("affinity")
    costs = rng.random((items, bins)) * 10 ** rng.integers(0, 6) * rng.choice([1, -1])
    inside = builder.add_variables((items, bins), cost=costs, integral=True)
    builder.add_rows(inside, 1.0, 1.0, 1.0)
    builder.add_rows(inside.T, 1.0, upper=float(-(-items // bins)))
    weights = rng.random(items) * 10 ** rng.integers(0, 5)
    builder.add_rows(inside.T, weights, upper=np.full(bins, weights.sum() / bins * 1.25))
    apart = builder.add_variables((items - 1,), cost=rng.random(items - 1) * 5, implied=True)
    for b in range(bins):
        builder.add_rows(np.stack([inside[:-1, b], inside[1:, b], apart], axis=1), [1.0, -1.0, -1.0], upper=0.0)
    return builder.build()


def one_side(program: Program, sides: int = 6) -> np.ndarray:
    """Everything on side 0."""
    values = np.zeros(program.variables)
    values[:-2:sides] = 1.0
    values[-2] = WEIGHTS[: (program.variables - 2) // sides].sum()
    return values


@each
def test_an_optimum_is_proven_constants_included(backend: str) -> None:
    for seconds in (None, 5.0):
        result = solve_program(small_program(), Budget(seconds=seconds), backend=backend)
        assert result.value == pytest.approx(15.0)
        assert result.bound == pytest.approx(15.0)
        assert (result.status, result.stop) == ("optimal", "finished")
        np.testing.assert_allclose(result.solution(small_program()), [2.0, 1.0])


@each
def test_an_incumbent_at_the_time_limit_is_not_called_optimal(backend: str) -> None:
    program = hard_program()
    result = solve_program(program, Budget(seconds=2.0), backend=backend)
    assert (result.status, result.stop) == ("feasible", "time limit")
    assert result.bound < result.value
    values = result.solution(program)
    assert program.violation(values) <= FEASIBLE
    assert result.value == pytest.approx(values[-2] - values[-1])
    assert result.seconds < 6.0


@each
def test_a_gap_asked_for_ends_the_solve_with_that_gap_reported(backend: str) -> None:
    exact = solve_program(hard_program(9, 3), Budget(), backend="highs")
    rough = solve_program(hard_program(9, 3), Budget(), backend=backend, absolute_gap=3 * exact.value)
    assert rough.finished
    assert rough.bound <= exact.value * (1 + 1e-9) <= rough.value * (1 + 1e-6)
    assert rough.value - rough.bound <= 3 * exact.value * (1 + 1e-6)


@each
def test_a_program_without_solution_is_said_to_have_none(backend: str) -> None:
    program = small_program(most=1.0)
    result = solve_program(program, Budget(), backend=backend)
    assert (result.status, result.stop, result.values) == ("infeasible", "finished", None)
    with pytest.raises(mp.SolveError, match="'small' has no solution"):
        result.solution(program)


@each
def test_no_incumbent_in_time_is_an_error_that_says_what_to_do(backend: str) -> None:
    program = market_split()
    result = solve_program(program, Budget(seconds=1.0), backend=backend)
    assert (result.status, result.stop) == ("unknown", "time limit")
    with pytest.raises(mp.SolveError, match=r"found no solution .*'split' \(40 variables\) within .*more seconds"):
        result.solution(program)


@each
def test_a_start_is_kept_when_nothing_better_is_found_in_time(backend: str) -> None:
    program = hard_program()
    start = one_side(program)
    result = solve_program(program, Budget(seconds=1e-9), backend=backend, start=start)
    np.testing.assert_array_equal(result.values, start)
    assert result.value == WEIGHTS.sum()
    assert (result.bound, result.status, result.stop) == (-math.inf, "feasible", "time limit")
    assert solve_program(program, Budget(seconds=2.0), backend=backend, start=start).value < result.value


@each
def test_the_answer_is_never_worse_than_a_feasible_start_and_news_are_better(backend: str) -> None:
    program = hard_program()
    good = solve_program(program, Budget(seconds=2.0), backend="highs")
    heard: list[float] = []
    result = solve_program(
        program,
        Budget(seconds=1.0),
        backend=backend,
        start=good.values,
        report=lambda value, bound: heard.append(value),
    )
    assert result.value <= good.value * (1 + 1e-9)
    assert all(value < good.value for value in heard)


@each
def test_a_start_that_breaks_a_row_is_a_hint_only(backend: str) -> None:
    result = solve_program(small_program(), Budget(), backend=backend, start=np.array([0.0, 0.0]))
    assert result.value == pytest.approx(15.0)


@pytest.mark.parametrize("backend", ["highs", "cpsat", "portfolio"])
def test_better_solutions_are_reported_with_bounds_below_them(backend: str) -> None:
    rng = np.random.default_rng(0)
    builder = ProgramBuilder("cover")
    numbers = builder.add_variables((1, 60), cost=rng.integers(5, 50, 60), integral=True)
    rows = rng.permuted(np.tile(numbers, (60, 1)), axis=1)[:, :6]
    builder.add_rows(rows, 1.0, lower=1.0)
    program = builder.build()
    heard: list[tuple[float, float | None]] = []
    result = solve_program(
        program,
        Budget(seconds=3.0),
        backend=backend,
        start=np.ones(60),
        report=lambda value, bound: heard.append((value, bound)),
    )
    values = [value for value, _ in heard]
    assert values == sorted(set(values), reverse=True)
    assert values[-1] == pytest.approx(result.value)
    assert all(bound is None or bound <= value + 1e-6 for value, bound in heard)


@each
def test_same_seed_without_a_time_limit_gives_the_same_solution(backend: str) -> None:
    one, two = (solve_program(hard_program(8, 3), Budget(seed=7), backend=backend) for _ in range(2))
    np.testing.assert_array_equal(one.values, two.values)


@pytest.mark.parametrize("backend", ["highs", "cpsat", "portfolio"])
def test_ctrl_c_stops_a_solve_soon_with_what_it_has(backend: str) -> None:
    # A test worker may have been started with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    program = hard_program()
    timer = threading.Timer(1.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    try:
        timer.start()
        result = solve_program(program, Budget(seconds=60.0), backend=backend, start=one_side(program))
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    assert result.stop == "interrupted"
    assert result.seconds < 20.0
    assert result.value <= WEIGHTS.sum()


@pytest.mark.parametrize("backend", ["highs", "cpsat"])
def test_what_a_listener_raises_ends_the_solve_and_is_passed_on(backend: str) -> None:
    rng = np.random.default_rng(0)
    builder = ProgramBuilder("knapsack")
    numbers = builder.add_variables((1, 40), cost=-rng.integers(5, 50, 40), integral=True)
    builder.add_rows(numbers, rng.integers(5, 50, (1, 40)), upper=300.0)

    def refuse(value: float, bound: float | None) -> None:
        raise mp.InputError("enough")

    with pytest.raises(mp.InputError, match="enough"):
        solve_program(builder.build(), Budget(seconds=30.0), backend=backend, report=refuse)


@each
def test_nothing_is_printed(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    solve_program(small_program(), Budget(seconds=5.0), backend=backend)
    assert capfd.readouterr() == ("", "")


def test_an_unknown_backend_names_the_nearest() -> None:
    for limit in (None, 1e-9):
        with pytest.raises(mp.InputError, match=r"backend 'hihgs' is unknown; did you mean 'highs'\?"):
            solve_program(small_program(), Budget(seconds=limit), backend="hihgs")


def test_a_backend_without_a_feature_names_those_that_have_it() -> None:
    assert Feature.CONTINUOUS not in backend_named("cpsat").features
    with pytest.raises(mp.UnsupportedError, match="'cpsat' does not take programs without integer.*highs, cbc"):
        solve_program(small_program().relaxed(), Budget(), backend="cpsat")


def test_crossed_bounds_are_refused() -> None:
    builder = ProgramBuilder("crossed")
    builder.add_variables((2,), lower=[0.0, 2.0], upper=1.0)
    with pytest.raises(mp.InputError, match="'crossed' has a variable or row whose lower bound"):
        builder.build()


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Small programs of arbitrary floats: 2 to 5 whole variables, sometimes a continuous one, feasible more often than
    not."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    count, rows = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    spread = draw(st.sampled_from([0.1, 1.0, 1000.0]))
    builder = ProgramBuilder("random")
    lower = rng.integers(-2, 1, count).astype(float)
    whole = builder.add_variables(
        (count,), lower=lower, upper=lower + 2, cost=spread * rng.normal(size=count), integral=True
    )
    loose = builder.add_variables((draw(st.integers(0, 1)),), lower=-3.0, upper=3.7, cost=rng.normal() * spread)
    columns = np.tile(np.concatenate([whole, loose]), (rows, 1))
    builder.add_rows(columns, spread * rng.normal(size=columns.shape), upper=spread * rng.random(rows))
    if draw(st.booleans()):
        builder.add_rows(columns[:1], rng.integers(-3, 4, (1, columns.shape[1])), lower=-1.0, upper=3.0)
    return builder.build()


def brute_force(program: Program) -> float:
    """The optimum over every choice of whole numbers, the rest by linear programming."""
    ranges = [
        np.arange(low, high + 1) if whole else [0.0]
        for low, high, whole in zip(program.lower, program.upper, program.integral, strict=True)
    ]
    best = math.inf
    for choice in itertools.product(*ranges):
        values = np.array(choice)
        if program.integral.all():
            best = min(best, program.value(values) if program.violation(values) <= 1e-9 else math.inf)
        else:
            best = min(best, solve_program(program.fixed(values), Budget(), backend="highs").value)
    return best


@given(program=programs(), bits=st.sampled_from([4, 8, 14]))
@slow
def test_rounding_to_whole_numbers_never_lifts_the_bound_above_the_true_optimum(program: Program, bits: int) -> None:
    """However coarse: the optimum in whole numbers, less what rounding can hide, is below the true one."""
    best = brute_force(program)
    whole = whole_program(program, row_bits=bits + 4, objective_bits=bits, step_bits=bits)
    rounded = ProgramBuilder("whole")
    numbers = rounded.add_variables(
        (program.variables,), lower=whole.lower, upper=whole.upper, cost=whole.cost, integral=True
    )
    row = np.repeat(np.arange(program.rows), np.diff(whole.row_start))
    rounded.add_sparse_rows(
        program.rows,
        row,
        numbers[whole.column],
        whole.coefficient,
        # Sides so large are bounds to HiGHS, and spoil its arithmetic: it then ends at what is no optimum.
        lower=np.where(whole.row_lower <= -UNBOUNDED, -np.inf, whole.row_lower),
        upper=np.where(whole.row_upper >= UNBOUNDED, np.inf, whole.row_upper),
    )
    found = solve_program(rounded.build(), Budget(), backend="highs")
    assert math.isinf(best) or not found.infeasible
    if not found.infeasible:
        assert whole.bound(found.value, program.constant) <= best + 1e-9 * max(1.0, abs(best))


@given(program=programs())
@settings(slow, max_examples=20)
def test_cp_sat_finds_the_optimum_of_floats_and_bounds_it_from_below(program: Program) -> None:
    best = brute_force(program)
    found = solve_program(program, Budget(), backend="cpsat")
    if math.isinf(best):
        assert found.values is None
        return
    assert found.value == pytest.approx(best, rel=1e-5, abs=1e-5)
    assert found.bound <= best + 1e-12 * max(1.0, abs(best))
    assert found.bound == pytest.approx(best, rel=1e-5, abs=1e-5)
    assert program.violation(found.solution(program)) <= FEASIBLE


@pytest.mark.parametrize("seed", [431, 927, 968, 1203, 1297, 1391, 1779, 2159, 2288])
def test_backends_agree_on_what_is_optimal(seed: int) -> None:
    # HiGHS 1.14.0 calls a worse solution optimal in each of these.
    program = affinity_program(seed)
    optima = [solve_program(program, Budget(None), backend=name).value for name in ("highs", "cpsat", "cbc")]
    assert optima == pytest.approx([optima[0]] * 3, rel=1e-6)


@given(program=programs(), seed=st.integers(0, 10**6))
@slow
def test_any_prices_bound_the_relaxation_from_below(program: Program, seed: int) -> None:
    relaxed = program.relaxed()
    optimum = solve_program(relaxed, Budget(), backend="highs")
    drawn = np.random.default_rng(seed).normal(size=program.rows)
    assert relaxed.dual_bound(drawn) <= optimum.value + 1e-9 * max(1.0, abs(optimum.value))
    if optimum.prices is not None:
        assert relaxed.dual_bound(optimum.prices) == pytest.approx(optimum.value, rel=1e-6, abs=1e-6)


def test_the_same_program_from_blocks_in_any_order_of_terms() -> None:
    builder = ProgramBuilder("order")
    numbers = builder.add_variables((2, 3), upper=5.0)
    builder.add_sparse_rows(
        2, np.array([1, 0, 1]), numbers.ravel()[[5, 0, 1]], np.array([3.0, 1.0, 2.0]), upper=[1.0, 2.0]
    )
    np.testing.assert_array_equal(builder.build().matrix.toarray(), [[1, 0, 0, 0, 0, 0], [0, 2, 0, 0, 0, 3]])


@pytest.mark.parametrize(
    "order", [("highspy", "ortools.sat.python.cp_model"), ("ortools.sat.python.cp_model", "highspy")]
)
def test_both_libraries_work_in_one_process_in_either_order(order: tuple[str, str]) -> None:
    """highspy 1.15 and ortools each bring a libhighs of their own, which only one of them finds."""
    script = (
        f"import {order[0]}, {order[1]}\n"
        "import numpy as np\n"
        "from moeplace.solvers.base import Budget\n"
        "from moeplace.solvers.mip.program import ProgramBuilder, solve_program\n"
        "builder = ProgramBuilder('one')\n"
        "builder.add_rows(builder.add_variables((1, 2), cost=1.0, integral=True), 1.0, lower=0.5)\n"
        "for backend in ('highs', 'cpsat'):\n"
        "    assert solve_program(builder.build(), Budget(), backend=backend).value == 1.0\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


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
    monkeypatch.setattr("moeplace.solvers.mip.cbc.GRACE_SECONDS", 0.3)
    stays = f"import signal, time; signal.signal(signal.SIGINT, signal.{on_interrupt}); time.sleep(3600)"
    assert run_limited([sys.executable, "-c", stays], tmp_path / "log", 0.1) is None


def test_a_backend_process_that_fails_is_told_from_one_that_was_ended(tmp_path: Path) -> None:
    assert run_limited([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", 60.0) == 3


def test_a_request_leaves_time_to_read_the_answer() -> None:
    assert Request().seconds_left() is None
    left = Request(seconds=10.0).seconds_left()
    assert left is not None
    assert 9.0 < left <= 10.0
