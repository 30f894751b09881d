"""solve, evaluate, compare, export and plans on a small trace."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_runs import CLUSTER, JUDGED, run, skewed_counts, toy_model, toy_trace_folder
from traces import make_trace

import moeplace as mp
from moeplace.profiler.statistics_file import write_statistics

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _own_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEPLACE_DB", str(tmp_path / "store.db"))


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_trace_folder(tmp_path_factory.mktemp("toy") / "trace", toy_model())


@pytest.fixture
def plan(trace: Path, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    assert run("solve", trace, *CLUSTER, "-s", "eplb", "--seed", "3", "-o", path).code == 0
    return path


def test_solve_writes_and_stores_the_plan_it_summarises(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    summary = run("solve", trace, *CLUSTER, "-s", "eplb", "-o", path, "--name", "first", "--json").data
    plan = mp.Plan.load(path)
    assert summary["fingerprint"] == plan.fingerprint
    assert (summary["value"], summary["bound"], summary["gap"]) == (plan.certificate.value, plan.bound, plan.gap)  # type: ignore[union-attr]
    shown = run("plans", "show", "first", "--json").data
    assert shown["id"] == summary["stored_as"]
    assert shown["fingerprint"] == plan.fingerprint
    assert [row["name"] for row in run("plans", "list", "--json").data["rows"]] == ["first"]


def test_stored_plans_values_stand_below_their_objective(trace: Path) -> None:
    for solver in ("eplb", "exflow", "contiguous"):
        assert run("solve", trace, *CLUSTER, "-s", solver).code == 0
    lines = run("plans", "list").out.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("Value: ")]
    assert [lines[i] for i in heads] == [
        "Value: device load max/mean on average loads, mean over layers",
        "Value: cross-device transitions, share of all",
    ]
    assert not any("value" in line for line in lines[: heads[0]])
    between, after = " ".join(lines[heads[0] : heads[1]]), " ".join(lines[heads[1] :])
    assert "contiguous" in between
    assert "eplb" in between
    assert "exflow" in after
    assert "eplb" not in after


def test_solve_takes_a_number_of_slots_for_each_layer(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    done = run("solve", trace, *CLUSTER, "-s", "eplb", "--slots", "8,12,10", "-o", path, "--json")
    assert (done.data["slots"], done.data["layer_slots"]) == (12, [8, 12, 10])
    plan = mp.Plan.load(path)
    assert plan.filled.sum(axis=1).tolist() == [8, 12, 10]
    assert "in 8 to 12 slots on" in run("plans", "show", done.data["stored_as"]).out
    stored = run("plans", "show", done.data["stored_as"], "--json").data
    assert stored["fingerprint"] == plan.fingerprint
    judged = run("evaluate", path, trace, *JUDGED, "--json").data["rows"]
    assert judged[-1]["step_seconds_mean"] > 0
    wrong = run("solve", trace, *CLUSTER, "-s", "eplb", "--slots", "8,12")
    assert wrong.code != 0
    assert "one for each of the 3 MoE layers" in wrong.err
    assert "must be a whole number above 0" in run("solve", trace, *CLUSTER, "--slots", "8,,9").err


def test_solve_takes_slots_of_each_device_and_keeps_memory_from_experts(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    devices = ("--nodes", "1", "--devices-per-node", "2")
    done = run("solve", trace, "-t", "h100-hgx", *devices, "-s", "eplb", "--device-slots", "5,3", "-o", path, "--json")
    plan = mp.Plan.load(path)
    assert plan.slots_per_device.tolist() == [[5, 3]] * plan.model.layers
    assert done.data["device_memory"] == plan.device_memory.tolist()
    assert "of experts a device" in done.data["memory"]
    assert "--device-slots" in run("solve", trace, "-t", "h100-hgx", "-s", "eplb", "--device-slots", "5;3").err
    kept = run("solve", trace, "-t", "h100-hgx", *devices, "-s", "eplb", "--memory-reserve", "25%", "-o", path)
    assert "20 GB reserved" in " ".join(kept.out.split())
    assert mp.Plan.load(path).topology.reserve.tolist() == [20e9, 20e9]
    for wrong, message in (("80GB", "leaves experts no memory"), ("lots", "not a size"), ("140%", "not a size")):
        assert message in run("solve", trace, "-t", "h100-hgx", "-s", "eplb", "--memory-reserve", wrong).err


def test_solve_plans_for_the_failures_it_is_told_to_survive(trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "safe.json"
    done = run("solve", trace, *CLUSTER, "--slots", 16, "--tolerate", "node", "--solver", "eplb", "-o", file)
    assert done.code == 1
    assert "does not support failures to tolerate" in done.err
    done = run("solve", trace, *CLUSTER, "--slots", 16, "--tolerate", "node", "--seconds", "0.5", "-o", file)
    assert done.code == 0, done.err
    plan = mp.Plan.load(file)
    assert mp.survives(plan, mp.single_failures(plan.topology, ("node",))).all()
    for wrong in ("rack", "", "node,nothing"):
        done = run("solve", trace, *CLUSTER, "--slots", 16, "--tolerate", wrong, "-o", file)
        assert done.code != 0
        assert "--tolerate" in done.err


def test_a_config_s_storage_is_told_or_said(trace: Path, tmp_path: Path) -> None:
    fields = {
        "model_type": "novel", "num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 8,
        "intermediate_size": 16, "quantization_config": {"quant_method": "secret"},
    }  # fmt: skip
    config = tmp_path / "config.json"
    config.write_text(json.dumps(fields))
    asked = ("solve", trace, *CLUSTER, "-s", "eplb", "--model", config)
    refused = run(*asked)
    assert refused.code == 1
    assert "'secret'" in refused.err
    assert "--expert-dtype" in refused.err
    told = run(*asked, "--expert-dtype", "nvfp4", "-o", tmp_path / "plan.json")
    assert told.code == 0, told.err
    assert "'novel' is not one this release knows" in told.err
    assert mp.Plan.load(tmp_path / "plan.json").model.bytes_per_expert == 3 * 8 * 16 * 0.5625


def test_solve_holds_out_what_evaluate_judges_on(trace: Path, plan: Path) -> None:
    whole = make_trace(0)
    solved = mp.Plan.load(plan)
    train, _ = whole.split(held_out=0.25, seed=3)
    assert solved.provenance.trace_fingerprint == mp.RoutingStatistics.from_trace(train).fingerprint
    judged = run("evaluate", plan, trace, *JUDGED, "--json")
    assert judged.err == ""
    assert judged.data["routing"]["train_fingerprint"] == solved.provenance.trace_fingerprint
    assert judged.data["routing"]["seed"] == 3


def test_evaluate_warns_when_the_plan_saw_all_of_the_routing(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    run("solve", trace, *CLUSTER, "-s", "eplb", "--held-out", "0", "-o", path)
    assert "flatter" in run("evaluate", path, trace, *JUDGED).err


def test_evaluate_gives_the_librarys_figures(trace: Path, plan: Path) -> None:
    _, held = make_trace(0).split(held_out=0.25, seed=3)
    steps = held.decode_steps(concurrency=8, steps=12, seed=3)
    loaded = mp.Plan.load(plan)
    problem = mp.Problem(loaded.model, loaded.topology, mp.RoutingStatistics.from_trace(held))
    expected = mp.evaluate(loaded, steps, problem).summary()
    rows = run("evaluate", plan, trace, *JUDGED, "--json").data["rows"]
    row = next(row for row in rows if row["solver"] == "plan")
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    base = next(row for row in rows if row["solver"] == "contiguous")
    assert row["ratio"] == pytest.approx(row["step_seconds_mean"] / base["step_seconds_mean"])


def test_evaluations_are_kept_with_their_plan(trace: Path, plan: Path) -> None:
    run("evaluate", plan, trace, "--decode", "8", "--prefill", "32", "--steps", "5")
    identity = run("plans", "list", "--json").data["rows"][0]["id"]
    kept = run("plans", "show", identity, "--json").data["evaluations"]
    assert [entry["steps"] for entry in kept] == ["decode 8, 5 steps", "prefill 32, 5 steps"]
    assert all(entry["step_seconds_mean"] > 0 for entry in kept)


def test_compare_has_a_row_for_each_solver_and_says_why_one_has_no_plan(trace: Path) -> None:
    done = run("compare", trace, *CLUSTER, *JUDGED, "--slots", "12", "--solvers", "eplb,chain,round_robin", "--json")
    rows = {row["solver"]: row for row in done.data["rows"]}
    assert list(rows) == ["contiguous", "eplb", "chain", "round_robin"]
    assert rows["contiguous"]["ratio"] == 1.0
    assert rows["eplb"]["status"] == "ok"
    refused = rows["chain"]
    assert (refused["status"], refused["step_seconds_mean"], refused["ratio"]) == ("failed", None, None)
    assert "chain" in refused["reason"]
    table = run("compare", trace, *CLUSTER, *JUDGED, "--slots", "12", "--solvers", "eplb,chain").out
    assert refused["reason"] in " ".join(table.split())


def test_compare_judges_plans_in_force_beside_solvers(trace: Path, plan: Path, tmp_path: Path) -> None:
    saved = tmp_path / "plans"
    done = run("compare", trace, *CLUSTER, *JUDGED, "--solvers", "round_robin", "--plans", plan, "-o", saved, "--json")
    assert [row["solver"] for row in done.data["rows"]] == ["contiguous", "plan", "round_robin"]
    assert sorted(path.name for path in saved.iterdir()) == ["contiguous.json", "round_robin.json"]
    assert mp.Plan.load(saved / "round_robin.json").provenance.solver == "round_robin"


def test_compare_is_the_same_twice(trace: Path) -> None:
    def rows() -> list[dict[str, object]]:
        data = run("compare", trace, *CLUSTER, *JUDGED, "--solvers", "eplb,random", "--seed", "5", "--json").data
        return [{key: value for key, value in row.items() if key != "solve_seconds"} for row in data["rows"]]

    assert rows() == rows()


def test_regret_is_measured_against_the_best_of_the_compared(trace: Path) -> None:
    done = run("compare", trace, *CLUSTER, *JUDGED, "--solvers", "eplb,random", "--risk", "regret", "--json")
    regrets = [row["risk_seconds"] for row in done.data["rows"]]
    assert min(regrets) >= 0.0
    assert max(regrets) > 0.0


def test_a_trace_of_another_model_is_refused(trace: Path, plan: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    from moeplace.profiler.trace_files import write_trace

    write_trace(make_trace(0, experts=6), other)
    ended = run("evaluate", plan, other, *JUDGED)
    assert ended.code == 1
    assert "experts" in ended.err
    config = tmp_path / "config.json"
    config.write_text(
        '{"num_hidden_layers": 3, "num_experts": 16, "num_experts_per_tok": 2, "hidden_size": 8, '
        '"intermediate_size": 8}'
    )
    refused = run("compare", trace, *CLUSTER, *JUDGED, "--model", config)
    assert "experts is 8, ModelSpec.experts is 16" in refused.err


def test_a_plan_for_other_devices_is_refused_by_name(trace: Path, plan: Path) -> None:
    ended = run("compare", trace, "--topology", "h100-hgx", *JUDGED, "--solvers", "eplb", "--plans", plan)
    assert ended.code == 1
    assert "plan 'plan'" in ended.err
    assert "4 devices" in ended.err


def test_a_model_is_described_by_options_where_the_record_does_not(tmp_path: Path) -> None:
    bare = toy_trace_folder(tmp_path / "bare")
    asked = run("solve", bare, *CLUSTER, "-s", "eplb")
    assert asked.code == 1
    assert "--hidden-size and --ffn-size" in asked.err
    path = tmp_path / "plan.json"
    sizes = ("--hidden-size", "64", "--ffn-size", "128")
    assert run("solve", bare, *CLUSTER, *sizes, "-s", "eplb", "-o", path).code == 0
    assert mp.Plan.load(path).model == toy_model(name="")


def test_counts_are_solved_on_a_part_of_their_windows_and_judged_on_the_rest(tmp_path: Path) -> None:
    share = np.random.default_rng(0).dirichlet(np.ones(8), 3)
    counts = np.stack([np.random.default_rng(i).multinomial(40, share) for i in range(40)])
    path = tmp_path / "counts.npz"
    write_statistics(mp.RoutingStatistics.from_counts({"decode": counts}, top_k=2), path)
    sizes = ("--hidden-size", "64", "--ffn-size", "128")
    solved = run("solve", path, *CLUSTER, *sizes, "-s", "eplb", "-o", tmp_path / "plan.json", "--json").data
    assert solved["windows"]["held_out"] > 1.0
    # A plan even on the mean load is uneven in windows of 40 tokens, by chance.
    assert solved["windows"]["noise"] > 0.05
    assert run("stats", path, "--json").data["has_transitions"] is False
    judged = run("evaluate", tmp_path / "plan.json", path, "--json").data
    assert judged["windows"][1]["held_out"] == solved["windows"]["held_out"]
    assert judged["rows"][1]["step_seconds_mean"] > 0
    assert "10 of 40 windows" in judged["routing"]["held_out"]
    compared = run("compare", path, *CLUSTER, *sizes, "--solvers", "eplb", "--json").data
    assert [row["plan"] for row in compared["windows"]] == ["contiguous", "eplb"]
    assert "Counts tell neither" in run("compare", path, *CLUSTER, *sizes, "--solvers", "eplb").out


def test_a_plan_of_counts_says_that_the_load_of_windows_was_minimised(tmp_path: Path) -> None:
    counts, sizes = skewed_counts(tmp_path / "counts.npz"), ("--hidden-size", "64", "--ffn-size", "128")
    asked = ("solve", counts, *CLUSTER, *sizes, "--seconds", "1", "--no-store", "-o", tmp_path / "plan.json", "--json")
    solved = run(*asked)
    assert "windows" in solved.data["objective"]
    assert 0 <= solved.data["noise_gap"] <= solved.data["gap"]
    assert "sampling noise" in run(*asked[:-1]).out
    assert "device load max/mean of count windows; chain" in solved.data["choice"]
    assert "step_tokens" not in solved.data["options"]
    assert "assumed" not in solved.err
    assert "the steps named are what it is judged on" in run(*asked, "--decode", "64").err


def test_a_trace_too_small_to_part_says_what_to_do(tmp_path: Path) -> None:
    from moeplace.profiler.trace_files import write_trace

    write_trace(make_trace(0, sequences=1), tmp_path / "one", model=toy_model())
    ended = run("solve", tmp_path / "one", *CLUSTER, "-s", "eplb")
    assert ended.code == 1
    assert "--held-out-by" in ended.err
    assert run("solve", tmp_path / "one", *CLUSTER, "-s", "eplb", "--held-out-by", "time").code == 0


def test_no_plan_is_lost_for_lack_of_a_place(trace: Path) -> None:
    assert run("solve", trace, *CLUSTER, "-s", "eplb", "--no-store").code == 2


def test_export_writes_what_the_engine_reads_and_notes_it(plan: Path, tmp_path: Path) -> None:
    from moeplace.runtime.exporters.export import read_exported

    path = tmp_path / "location.json"
    done = run("export", plan, "--for", "sglang", "-o", path, "--json").data
    loaded = mp.Plan.load(plan)
    assert (
        read_exported(path, "sglang", loaded.model, loaded.topology).physical_to_logical == loaded.physical_to_logical
    ).all()
    assert "--init-expert-location" in done["usage"]
    identity = run("plans", "list", "--json").data["rows"][0]["id"]
    assert run("plans", "show", identity, "--json").data["exports"][0]["sha256"] == done["sha256"]


def test_export_refuses_unknown_engines(plan: Path, tmp_path: Path) -> None:
    assert "did you mean 'sglang'" in run("export", plan, "--for", "sglan", "-o", tmp_path / "x").err


def test_stored_plans_are_renamed_used_by_name_and_deleted(trace: Path, plan: Path) -> None:
    identity = run("plans", "list", "--json").data["rows"][0]["id"]
    assert run("plans", "rename", identity[:8], "production").code == 0
    judged = run("evaluate", "production", trace, *JUDGED, "--json").data
    assert [row["solver"] for row in judged["rows"]] == ["contiguous", "production"]
    assert run("plans", "delete", "production").code == 0
    assert run("plans", "list", "--json").data["rows"] == []
    assert "No plans" in run("plans", "list").out


def test_solvers_of_step_times_are_told_which_steps(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    base = ("solve", trace, *CLUSTER, "-s", "search:proposals=10", "--seconds", "1", "-o", path)
    assert run(*base, "--prefill", "32").code == 0
    assert mp.Plan.load(path).provenance.batches == ("prefill:32/step",)
    assert run(*base, "--decode", "16").code == 0
    assert mp.Plan.load(path).provenance.batches == ("decode:16/step",)
    assert run(*base, "--decode", "16", "--prefill", "32").code == 0
    certificate = mp.Plan.load(path).certificate
    assert certificate is not None
    assert "(decode 16 and prefill 32)" in certificate.objective


def test_plans_of_one_name_are_told_apart(trace: Path, plan: Path, tmp_path: Path) -> None:
    twin, solver = tmp_path / "other" / "plan.json", tmp_path / "round_robin.json"
    twin.parent.mkdir()
    for copy in (twin, solver):
        copy.write_bytes(plan.read_bytes())
    done = run(
        "compare", trace, *CLUSTER, *JUDGED, "--solvers", "round_robin", "--plans", f"{plan},{twin},{solver}", "--json"
    )
    names = [row["solver"] for row in done.data["rows"]]
    assert names == ["contiguous", "plan", "plan (2)", "round_robin", "round_robin (2)"]


def test_without_a_solver_the_plan_says_which_was_chosen_and_why(trace: Path, tmp_path: Path) -> None:
    arguments = ("solve", trace, *CLUSTER, "--decode", "8", "-o", tmp_path / "plan.json")
    summary = run(*arguments, "--json").data
    assert (summary["solver"], summary["proven_optimal"]) == ("chain", True)
    assert "chosen because" in run(*arguments).out
    assert run(*arguments, "--risk", "cvar:0.9", "--seconds", "1", "--json").data["solver"] == "search"


def test_no_more_is_moved_than_allowed(trace: Path, plan: Path, tmp_path: Path) -> None:
    size = toy_model().bytes_per_expert
    options = (*CLUSTER, "-s", "search:proposals=50:steps=4", "--decode", "8", "--current", plan)
    arguments = ("solve", trace, *options, "-o", tmp_path / "new.json")
    summary = run(*arguments, "--max-moved", f"{4 * size / 1000} kB", "--json").data
    assert summary["bytes_moved"] == summary["experts_moved"] * size
    assert summary["experts_moved"] <= 4
    assert "moved" in run(*arguments, "--max-moved", "0").out
    assert "is not a size" in run(*arguments, "--max-moved", "4 bits").err
    assert "does not support a limit of bytes moved" in run(*arguments, "--max-moved", "0", "-s", "eplb").err


def test_what_layers_wait_for_is_shown_after_solving_and_judging(trace: Path, plan: Path) -> None:
    judged = run("evaluate", plan, trace, *JUDGED, "--json").data
    (rows,) = judged["binding"].values()
    assert [row["layer"] for row in rows] == [0, 1, 2]
    mean = next(row for row in judged["rows"] if row["solver"] == "plan")["step_seconds_mean"]
    assert sum(row["seconds"] for row in rows) == pytest.approx(mean)
    for row in rows:
        assert sum(row["terms"].values()) == pytest.approx(row["seconds"])
        assert all(sum(phase["steps"].values()) == pytest.approx(1.0) for phase in row["phases"].values())
    assert "what layers of plan wait for" in run("evaluate", plan, trace, *JUDGED).out
    solved = run("solve", trace, *CLUSTER, "-s", "eplb", "--decode", "8", "-o", plan)
    assert "what layers wait for" in solved.out


def test_plans_are_judged_by_the_replicas_that_the_engine_takes(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "wide.json"
    assert run("solve", trace, *CLUSTER, "-s", "eplb", "--slots", "16", "-o", path, "--no-store").code == 0
    crossing = {}
    load = {}
    for rule in ("share", "nearest", "balanced", "balanced --division lp"):
        asked = ("--replica-choice", *rule.split(" "))
        done = run("evaluate", path, trace, *JUDGED, *asked, "--json", "--no-store")
        crossing[rule] = done.data["rows"][-1]["cross_node_fraction"]
        load[rule] = done.data["rows"][-1]["load_max_mean"]
    assert crossing["nearest"] < crossing["share"]
    assert crossing["balanced"] < crossing["balanced --division lp"]
    assert load["balanced"] == load["balanced --division lp"] < min(load["share"], load["nearest"])
    refused = run("evaluate", path, trace, *JUDGED, "--replica-choice", "nearest", "--execution", "context_coherent")
    assert refused.code != 0
    assert "needs tokens with a source rank" in refused.err
