"""`moeplace decide`: answers keep or apply, and what it rests on."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runs import CLUSTER, run, skewed_counts, toy_model, toy_trace_folder

import moeplace as mp
from moeplace.profiler.statistics_file import read_statistics

JUDGED = ("--decode", "8", "--resamples", "40")


@pytest.mark.slow
def test_decide_prints_a_verdict_for_each_candidate(tmp_path: Path) -> None:
    model = toy_model(hidden_size=4096, ffn_size=4096)
    trace = toy_trace_folder(tmp_path / "trace", model)
    plan, db = tmp_path / "plan.json", ("--db", tmp_path / "plans.db")
    run("solve", trace, *CLUSTER, "--solver", "chain", "-o", plan, *db)
    answer = run("decide", trace, "--candidates", f"{plan},{plan}", *JUDGED, "--json", *db)
    assert answer.code == 0
    assert answer.data["action"] in ("keep", "apply")
    assert len(answer.data["candidates"]) == 2
    first = answer.data["candidates"][0]
    assert first["relative_low"] <= first["relative"] <= first["relative_high"]
    assert first["bytes_moved"] == first["moves"] * model.bytes_per_expert
    assert 0 < first["ideal_share"] <= 1
    assert first["current_ideal_share"] == answer.data["candidates"][1]["current_ideal_share"] <= 1
    assert answer.out == run("decide", trace, "--candidates", f"{plan},{plan}", *JUDGED, "--json", *db).out


def test_a_plan_is_never_applied_over_itself(tmp_path: Path) -> None:
    trace = toy_trace_folder(tmp_path / "trace", toy_model())
    plan, db = tmp_path / "plan.json", ("--db", tmp_path / "plans.db")
    run("solve", trace, *CLUSTER, "--solver", "chain", "-o", plan, *db)
    shown = run("decide", trace, "--candidates", plan, "--current", plan, *JUDGED, *db)
    assert "KEEP the plan in force:" in " ".join(shown.out.split())


def test_plans_for_different_clusters_are_refused(tmp_path: Path) -> None:
    trace = toy_trace_folder(tmp_path / "trace", toy_model())
    db = ("--db", tmp_path / "plans.db")
    run("solve", trace, *CLUSTER, "--solver", "contiguous", "-o", tmp_path / "four.json", *db)
    run(
        "solve",
        trace,
        "-t",
        "h100-hgx",
        "--devices-per-node",
        "2",
        "--solver",
        "contiguous",
        "-o",
        tmp_path / "two.json",
        *db,
    )
    asked = run(
        "decide", trace, "--candidates", tmp_path / "four.json", "--current", tmp_path / "two.json", *JUDGED, *db
    )
    assert asked.code == 1
    assert "is for 2 devices, the candidate for 4" in asked.err
    assert mp.Plan.load(tmp_path / "two.json").topology.num_devices == 2


def test_counts_are_judged_on_held_out_windows_as_the_service_judges_them(tmp_path: Path) -> None:
    counts, plan, db = skewed_counts(tmp_path / "counts.npz"), tmp_path / "plan.json", ("--db", tmp_path / "plans.db")
    sizes = ("--hidden-size", "4096", "--ffn-size", "4096")
    run("solve", counts, *CLUSTER, *sizes, "-s", "eplb", "-o", plan, *db)
    asked = ("decide", counts, "--candidates", plan, "--decode", "4096", "--horizon", "1e9", *db)
    answer = run(*asked, "--json").data
    assert answer["action"] == "apply"
    assert "10 of 40 windows" in answer["held_out"]
    assert "independent" in answer["held_out"]
    row = answer["candidates"][0]
    assert 0 < row["relative_low"] <= row["relative"] <= row["relative_high"]
    assert row["relative"] <= answer["most"] < 1
    assert "no plan can save more than" in answer["text"]
    candidate, (train, held_out) = mp.Plan.load(plan), read_statistics(counts).split("sequence", 0.25, 0)
    problem = mp.Problem(candidate.model, candidate.topology, train)
    again = mp.decide(mp.solve(problem, "contiguous"), [candidate], held_out, problem, concurrency=4096)
    assert again.verdicts[0].gain == row["gain_seconds"]
    assert again.verdicts[0].ideal_share == row["ideal_share"] <= 1
    assert again.verdicts[0].current_ideal_share == row["current_ideal_share"] < row["ideal_share"]
    shown = run(*asked, "--current", plan).out
    assert "KEEP" in shown
    assert "of the ideal" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80


def test_too_few_windows_of_counts_are_refused(tmp_path: Path) -> None:
    counts, plan, db = skewed_counts(tmp_path / "few.npz", 8), tmp_path / "plan.json", ("--db", tmp_path / "plans.db")
    run("solve", counts, *CLUSTER, "--hidden-size", "64", "--ffn-size", "64", "-s", "eplb", "-o", plan, *db)
    ended = run("decide", counts, "--candidates", plan, *db)
    assert ended.code == 1
    assert "2 held-out windows" in ended.err


def test_a_comparison_s_bound_holds_for_plans_given_with_more_slots(tmp_path: Path) -> None:
    counts, plan, db = skewed_counts(tmp_path / "counts.npz"), tmp_path / "plan.json", ("--db", tmp_path / "plans.db")
    sizes = ("--hidden-size", "4096", "--ffn-size", "65536")
    assert run("solve", counts, *CLUSTER, *sizes, "-s", "eplb", "--slots", "16", "-o", plan, *db).code == 0
    asked = ("--plans", plan, "--solvers", "contiguous", "--decode", "16384", "--steps", "4", "--json")
    compared = run("compare", counts, *CLUSTER, *sizes, *asked).data["verdict"]
    assert 0.5 < compared["saves"] <= compared["most"] < 1
