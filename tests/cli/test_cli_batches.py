"""Steps are named once, come first in every output, and verdicts end them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_runs import CLUSTER, run, skewed_counts, toy_model, toy_trace_folder
from traces import make_trace

import moeplace as mp
from moeplace.cli.options import BatchOptions, Pool
from moeplace.cli.parse import read_batches
from moeplace.profiler.trace_files import write_trace

MIXED = ("--batch", "decode:2@3", "--batch", "prefill:96/step")
QUICK = (*CLUSTER, "--seconds", "0.5", "--no-store")


def test_batches_are_read_from_every_form() -> None:
    assert read_batches(BatchOptions()) == ()
    assert read_batches(BatchOptions(batch=["decode:64@0.9", "prefill:2048@0.1"])) == (
        mp.Batch("decode", tokens_per_device=64, weight=0.9),
        mp.Batch("prefill", tokens_per_device=2048, weight=0.1),
    )
    assert read_batches(BatchOptions(decode=128, prefill=4096)) == (
        mp.Batch("decode", tokens=128),
        mp.Batch("prefill", tokens=4096),
    )
    assert read_batches(BatchOptions(tokens_per_gpu=32)) == (mp.Batch("decode", tokens_per_device=32),)
    both = read_batches(BatchOptions(tokens_per_gpu=32, pool=[Pool.prefill, Pool.decode]))
    assert [batch.phase for batch in both] == ["prefill", "decode"]
    for wrong in (
        BatchOptions(batch=["decode:64"], decode=128),
        BatchOptions(tokens_per_gpu=8, prefill=128),
        BatchOptions(batch=["decode"]),
        BatchOptions(batch=["decode:64", "decode:64@2"]),
    ):
        with pytest.raises(mp.InputError):
            read_batches(wrong)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_trace_folder(tmp_path_factory.mktemp("toy") / "trace", toy_model())


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording that knows its forward calls: a token of each of 12 sequences."""
    folder = tmp_path_factory.mktemp("calls") / "trace"
    made = make_trace(0)
    write_trace(replace(made, step=made.position), folder, model=toy_model())
    return folder


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return skewed_counts(tmp_path_factory.mktemp("counts") / "counts.npz")


SIZES = ("--hidden-size", "64", "--ffn-size", "128")


def first_line(out: str) -> str:
    """Made whole again: a pipe has 80 columns."""
    return " ".join(out.split("\n\n")[0].splitlines())


def last_line(out: str) -> str:
    """Made whole again."""
    return " ".join(out.strip().split("\n\n")[-1].splitlines())


@pytest.mark.slow
def test_every_command_begins_with_the_steps_and_ends_with_a_verdict(trace: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    said = "Steps: decode steps of 2 tokens a device (75.0% of steps) and prefill steps of 96 tokens (25.0% of steps)"
    commands: dict[str, tuple[object, ...]] = {
        "solve": ("solve", trace, *QUICK, *MIXED, "-o", plan),
        "evaluate": ("evaluate", plan, trace, "--no-store"),
        "compare": ("compare", trace, *CLUSTER, "--seconds", "0.5", "--solvers", "eplb,search", *MIXED),
        "decide": ("decide", trace, "--candidates", plan, "--resamples", "20"),
        "whatif": ("whatif", plan, trace, "--no-ready", "--lose", "device:1"),
        "pareto": ("pareto", trace, *QUICK, *MIXED, "--redundant", "0", "--solver", "eplb", "--out", tmp_path / "f"),
    }
    for name, command in commands.items():
        shown = run(*command)
        assert shown.code == 0, shown.err
        # A plan keeps the steps it was solved for.
        assert first_line(shown.out).startswith(said), name
        assert run(*command, "--json").data["batches"]["text"].startswith(said), name
        if name in ("solve", "evaluate", "compare", "decide"):
            closing = last_line(shown.out)
            assert "no plan can save more than" in closing or "leave it" in closing, name


@pytest.mark.slow
def test_a_comparison_has_a_table_for_each_batch_and_one_of_all(trace: Path) -> None:
    rows = run("compare", trace, *CLUSTER, "--seconds", "0.5", "--solvers", "eplb", *MIXED, "--json").data["rows"]
    by_kind = {kind: [row for row in rows if row["steps"] == kind] for kind in ("mix", "decode 8", "prefill 96")}
    assert [len(found) for found in by_kind.values()] == [2, 2, 2]
    mixed = 0.75 * by_kind["decode 8"][1]["step_seconds_mean"] + 0.25 * by_kind["prefill 96"][1]["step_seconds_mean"]
    assert by_kind["mix"][1]["step_seconds_mean"] == pytest.approx(mixed)
    assert all(0 < row["ideal_share"] <= 1 for row in rows)


@pytest.mark.slow
def test_recorded_calls_are_the_steps_where_none_are_named(calls: Path, tmp_path: Path) -> None:
    shown = run("solve", calls, *QUICK, "-o", tmp_path / "plan.json")
    assert first_line(shown.out) == "Steps: decode steps of 12 tokens; the recorded forward calls"


@pytest.mark.slow
def test_one_size_says_what_the_plan_does_at_others(trace: Path, tmp_path: Path) -> None:
    shown = run("solve", trace, *QUICK, "--tokens-per-gpu", "2", "--other-ms", "3", "-o", tmp_path / "plan.json")
    assert "prefill 4096" in shown.out
    assert "faster" in shown.out or "slower" in shown.out
    assert "TPOT" in shown.out
    both = run("solve", trace, *QUICK, *MIXED, "-o", tmp_path / "plan.json")
    assert "At other steps" not in both.out


@pytest.mark.slow
def test_pools_each_get_a_plan_from_one_record(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    solved = run("solve", trace, *QUICK, "--pool", "prefill", "--pool", "decode", *MIXED, "-o", out, "--json")
    assert list(solved.data["pools"]) == ["prefill", "decode"], solved.err
    for pool, batches in (("prefill", ("prefill:96/step",)), ("decode", ("decode:2",))):
        assert mp.Plan.load(tmp_path / f"plan-{pool}.json").provenance.batches == batches
        assert solved.data["pools"][pool]["verdict"]["than"] == "eplb"
    compared = run(
        "compare", trace, *CLUSTER, "--seconds", "0.5", "--solvers", "eplb", "--pool", "prefill", "--pool", "decode"
    )
    assert [line.split(" ")[1] for line in compared.out.splitlines() if line.startswith("Steps:")] == [
        "prefill",
        "decode",
    ]
    refused = run("solve", trace, *QUICK, "--batch", "decode:8", "--pool", "prefill", "-o", out)
    assert "no --batch is of prefill steps" in refused.err
    refused = run("evaluate", tmp_path / "plan-decode.json", trace, "--pool", "prefill", "--pool", "decode")
    assert "one --pool" in refused.err


@pytest.mark.slow
def test_counts_are_compared_reported_and_judged_as_tokens_are(counts: Path, tmp_path: Path) -> None:
    asked: tuple[Any, ...] = (counts, *SIZES, *CLUSTER, "--seconds", "0.5", "--solvers", "eplb", *MIXED)
    compared = run("compare", *asked)
    assert compared.code == 0, compared.err
    assert "Counts tell neither" in compared.out
    assert "sampling" in compared.out
    assert "leave it" in last_line(compared.out)
    page = tmp_path / "report.html"
    reported = run("report", *asked, "-o", page)
    assert reported.code == 0, reported.err
    assert "Counts tell neither" in page.read_text(encoding="utf-8")
