"""`moeplace pareto`: a table, JSON, plan files, stored plans and a page of plots."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cli_runs import CLUSTER, JUDGED, Run, run, skewed_counts

import moeplace as mp
from moeplace.db import Store

OLMOE = Path(__file__).resolve().parents[2] / "examples" / "data" / "olmoe_small"
SIZES = ("--hidden-size", "2048", "--ffn-size", "1024")


def pareto(*more: Any) -> Run:
    return run("pareto", OLMOE, *SIZES, *CLUSTER, *JUDGED, "--seconds", "1", *more)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A small sweep with a plan in force, as JSON, and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("front")
    plan, db = folder / "now.json", ("--db", folder / "plans.db")
    assert run("solve", OLMOE, *SIZES, *CLUSTER, "-s", "contiguous", "-o", plan, *db).code == 0
    sweep = ("--redundant", "0,32", "--tolerate", "nothing,node", "--current", plan, "--max-moved", "any,300MB")
    return folder, pareto(*sweep, "-o", folder / "out", *db, "--json")


@pytest.mark.slow
def test_every_point_is_a_plan_on_disk_and_in_the_store(swept: tuple[Path, Run]) -> None:
    folder, done = swept
    assert done.code == 0, done.err
    points = done.data["points"]
    assert [point["point"] for point in points] == [
        "in force",
        "+0 slots",
        "+0 slots, 0.3 GB moved",
        "+32 slots",
        "+32 slots, node failures",
    ]
    assert [entry["point"] for entry in done.data["refused"]] == [
        "+32 slots, 0.3 GB moved",
        "+32 slots, node failures, 0.3 GB moved",
    ]
    assert points[2]["bytes_moved"] <= points[2]["max_moved_bytes"] == 300e6
    with Store.open(folder / "plans.db") as store:
        for point in points:
            plan = mp.Plan.load(point["file"])
            record = store.plan(point["stored_as"])
            assert plan.fingerprint == record.plan.fingerprint == point["fingerprint"]
            assert plan.num_slots == point["slots"] == 32 + point["redundant_slots"]
            (evaluation,) = store.evaluations(point["stored_as"])
            assert evaluation.summary["step_seconds_mean"] == point["step_seconds_mean"]
    assert points[0]["bytes_moved"] == 0
    assert points[4]["survives"] == {"device": {"survived": 4, "of": 4}, "node": {"survived": 2, "of": 2}}
    assert points[0]["best"]
    assert points[4]["best"]


def test_the_page_holds_everything_it_shows(swept: tuple[Path, Run]) -> None:
    page = (swept[0] / "out" / "front.html").read_text(encoding="utf-8")
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    for wanted in ('id="memory-title"', 'id="failures-title"', 'id="moved-title"', "+32 slots, node failures", "of 6"):
        assert wanted in page


def test_the_table_marks_the_front_and_says_why_a_wish_has_no_plan(tmp_path: Path) -> None:
    done = pareto("--redundant", "0,4", "--tolerate", "node,nothing", "-s", "eplb", "--no-store", "-o", tmp_path)
    assert done.code == 0
    shown = " ".join(done.out.split())
    assert (
        "+4 slots, node failures: no plan. 4 redundant slots a layer are too few to survive any node failure" in shown
    )
    assert "* no other plan here is at least as good in everything" in shown
    assert "of the ideal" in shown
    again = pareto("--slots", "32,36", "--tolerate", "node,nothing", "-s", "eplb", "--no-store", "-o", tmp_path)
    assert again.out == done.out
    assert "30 are fewer than the model's 32 experts" in pareto("--slots", "30", "-o", tmp_path).err
    assert "give --slots or --redundant, not both" in pareto("--slots", "32", "--redundant", "0").err
    assert max(map(len, done.out.splitlines())) <= 80
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00-0-slots.json", "01-4-slots.json", "front.html"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--redundant", "1,x"), "must be whole numbers"),
        (("--tolerate", "rack"), "must name some of nothing, device, node"),
        (("--max-moved", "1GB"), "counts from --current"),
        (("--no-store",), "the plans would go nowhere"),
    ],
)
def test_a_wrong_call_is_refused(options: tuple[str, ...], message: str) -> None:
    done = pareto(*options)
    assert done.code == 2
    assert message in " ".join(done.err.replace("│", " ").split())


def test_a_front_of_counts_is_judged_on_steps_drawn_from_held_out_windows(tmp_path: Path) -> None:
    counts, sizes = skewed_counts(tmp_path / "counts.npz"), ("--hidden-size", "64", "--ffn-size", "64")
    shown = ("-o", tmp_path / "front", "--redundant", "0,8", "--tolerate", "nothing", "--no-store", "-s", "eplb")
    answer = run("pareto", counts, *CLUSTER, *sizes, *shown, *JUDGED, "--json").data
    assert answer["steps"] == "decode 8: 12 steps drawn from counts"
    assert "10 of 40 windows" in answer["held_out"]
    assert len(answer["points"]) >= 2
    assert "drawn from counts" in (tmp_path / "front" / "front.html").read_text(encoding="utf-8")
