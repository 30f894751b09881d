"""`moeplace decide`: answers keep or apply, and what it rests on."""

from __future__ import annotations

from pathlib import Path

from cli_runs import CLUSTER, run, toy_model, toy_trace_folder

import moeplace as mp

JUDGED = ("--decode", "8", "--resamples", "40")


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
    assert answer.out == run("decide", trace, "--candidates", f"{plan},{plan}", *JUDGED, "--json", *db).out


def test_a_plan_is_never_applied_over_itself(tmp_path: Path) -> None:
    trace = toy_trace_folder(tmp_path / "trace", toy_model())
    plan, db = tmp_path / "plan.json", ("--db", tmp_path / "plans.db")
    run("solve", trace, *CLUSTER, "--solver", "chain", "-o", plan, *db)
    shown = run("decide", trace, "--candidates", plan, "--current", plan, *JUDGED, *db)
    assert "KEEP the plan in force: no candidate is proven better" in " ".join(shown.out.split())


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
