"""`moeplace whatif`: failures and other clusters, as a table, as JSON and as plan files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from cli_runs import CLUSTER, JUDGED, Run, run, skewed_counts

import moeplace as mp

OLMOE = Path(__file__).resolve().parents[2] / "examples" / "data" / "olmoe_small"
SIZES = ("--hidden-size", "2048", "--ffn-size", "1024")


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Any, ...]]:
    """A plan for OLMoE's small trace on 2 nodes of 2 devices, and the options of its store."""
    folder = tmp_path_factory.mktemp("plans")
    db = ("--db", folder / "plans.db")
    cluster = ("-t", "a100-pcie", "--nodes", "2", "--devices-per-node", "2", "--slots", "40")
    done = run("solve", OLMOE, *SIZES, *cluster, "-s", "eplb", "-o", folder / "plan.json", "--name", "now", *db)
    assert done.code == 0, done.err
    return folder / "plan.json", db


def whatif(solved: tuple[Path, tuple[Any, ...]], *more: Any, plan: str | None = None) -> Run:
    solver = () if "--no-ready" in more else ("-s", "eplb")
    return run("whatif", plan or solved[0], OLMOE, *JUDGED, *solver, "--json", *solved[1], *more)


def test_every_single_failure_is_looked_at_and_its_plans_are_written(
    solved: tuple[Path, tuple[Any, ...]], tmp_path: Path
) -> None:
    done = whatif(solved, "-o", tmp_path, plan="now")
    assert done.code == 0, done.err
    rows = done.data["changes"]
    assert [row["change"] for row in rows] == [f"device:{g}" for g in range(4)] + ["node:0", "node:1"]
    plan = mp.Plan.load(solved[0])
    assert done.data["plan"] == plan.fingerprint
    for row, failure in zip(rows, mp.single_failures(plan.topology), strict=True):
        left = [p for p in range(plan.num_slots) if plan.slot_device[p] not in failure.devices]
        lost = {
            str(layer): sorted(set(range(32)) - set(table[left].tolist()))
            for layer, table in zip(plan.moe_layers, plan.physical_to_logical, strict=True)
        }
        assert row["lost"] == {layer: experts for layer, experts in lost.items() if experts}
        assert row["survives"] == (not row["lost"])
        assert row["experts_lost"] == sum(len(experts) for experts in lost.values())
        ready = mp.Plan.load(row["ready"]["file"])
        assert ready.fingerprint == row["ready"]["fingerprint"]
        assert ready.topology == plan.topology.without(failure.devices)
        assert row["repaired"]["bytes_moved"] == 0
        assert row["repaired"]["bytes_reloaded"] == row["experts_lost"] * plan.model.bytes_per_expert
        assert mp.Plan.load(row["repaired"]["file"]).num_slots == row["ready"]["slots"]
    assert done.data["survives"] == {"device": {"survived": 0, "of": 4}, "node": {"survived": 0, "of": 2}}


@pytest.mark.slow
def test_the_changes_asked_for_are_made_each_on_its_own(solved: tuple[Path, tuple[Any, ...]]) -> None:
    done = whatif(solved, "--lose", "device:1+device:3", "--lose", "node:1", "--devices", "6", "--nodes", "3")
    assert [row["change"] for row in done.data["changes"]] == ["3 nodes", "6 devices", "device:1+device:3", "node:1"]
    assert [row["devices"] for row in done.data["changes"]] == [6, 6, 2, 2]
    slots = whatif(solved, "--slots", "64")
    assert [(row["change"], row["extra_slots"]) for row in slots.data["changes"]] == [("64 slots", 24)]
    assert whatif(solved, "--redundant", "32").data == slots.data
    assert "give --slots or --redundant, not both" in whatif(solved, "--redundant", "32", "--slots", "64").err
    other = whatif(solved, "-t", "h100-hgx", "--devices-per-node", "4", "--lose", "device:0", "--no-ready")
    assert [row["change"] for row in other.data["changes"]] == ["h100-hgx, 4 devices", "device:0"]
    assert other.data["changes"][1]["ready"] is None
    assert other.data["changes"][1]["reason"] is None


def test_the_table_says_what_survives(solved: tuple[Path, tuple[Any, ...]]) -> None:
    done = run("whatif", solved[0], OLMOE, *JUDGED, "-s", "exflow", "--lose", "device:0", "--slots", "40", *solved[1])
    assert done.code == 0
    shown = " ".join(done.out.split())
    assert "single failures in which every expert survives: devices 0/4, nodes 0/2." in shown
    assert re.search(r"Now: [0-9.]+ ms, [0-9.]+% of the force-balanced ideal, in 40 slots", shown)
    ready = run("whatif", solved[0], OLMOE, *JUDGED, "-s", "eplb", "--lose", "device:0", *solved[1])
    assert "new plan, of the ideal" in " ".join(ready.out.split())
    assert max(map(len, (done.out + ready.out).splitlines())) <= 80
    assert "device:0: no new plan. solver 'exflow' does not support" in shown


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--lose", "device:9"), 1, "the topology has devices 0 to 3"),
        (("--lose", "node:0+node:1"), 1, "takes all 4 devices"),
        (("--devices-per-node", "2"), 2, "goes with --topology"),
        (("--devices", "2", "-t", "h100-hgx"), 2, "resizes the plan's own cluster"),
        (("--pool", "decode", "--pool", "prefill"), 1, "one --pool"),
    ],
)
def test_a_wrong_question_is_refused(
    solved: tuple[Path, tuple[Any, ...]], options: tuple[str, ...], code: int, message: str
) -> None:
    done = whatif(solved, *options)
    assert done.code == code
    assert message in " ".join(done.err.replace("│", " ").split())


def test_the_example_of_the_page_prints_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = OLMOE.parents[2]
    page = (root / "docs" / "what-if.md").read_text(encoding="utf-8")
    commands, expected = re.search(r"```sh\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL).groups()  # type: ignore[union-attr]
    (tmp_path / "examples").symlink_to(root / "examples")
    monkeypatch.chdir(tmp_path)
    for line in commands.splitlines():
        done = run(*shlex.split(line)[1:], "--db", tmp_path / "plans.db")
        assert done.code == 0, done.err
    shown = "\n".join(line.rstrip() for line in done.out.strip("\n").splitlines())
    assert shown.strip("\n") == expected.strip("\n")


def test_counts_are_replayed_on_steps_drawn_from_held_out_windows(tmp_path: Path) -> None:
    counts, plan, db = skewed_counts(tmp_path / "counts.npz"), tmp_path / "plan.json", ("--db", tmp_path / "plans.db")
    run("solve", counts, *CLUSTER, *SIZES, "--slots", "16", "-s", "eplb", "-o", plan, *db)
    asked = ("whatif", plan, counts, "--lose", "device:1", "-s", "eplb", *JUDGED)
    answer = run(*asked, "--json").data
    assert answer["steps"] == "decode 8: 12 steps drawn from counts"
    assert "10 of 40 windows" in answer["held_out"]
    assert "independent" in answer["held_out"]
    assert answer["changes"][0]["ready"]["ratio"] > 1.0
    refused = run(*asked, "--server", "http://127.0.0.1:1")
    assert refused.code == 1
    assert "leave out --server" in refused.err
    coherent = run(*asked, "--execution", "context_coherent")
    assert coherent.code == 1
    assert "counts tell of none" in coherent.err
