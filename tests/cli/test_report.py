"""The report: the figures it shows, and that its page needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cli_runs import CLUSTER, run, toy_model, toy_trace_folder
from traces import make_trace

import moeplace as mp
from moeplace.cli.commands.report import without_folders

HOSTILE = "</script><script>alert('x')</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def trace(folder: Path) -> Path:
    return toy_trace_folder(folder / "trace", toy_model(name=HOSTILE))


@pytest.fixture(scope="module")
def page(folder: Path, trace: Path) -> Path:
    """A page with two kinds of steps, a plan better than contiguous, and a solver that fails."""
    path = folder / "report.html"
    steps = ("--decode", "8", "--prefill", "32", "--steps", "12", "--slots", "12")
    done = run("report", trace, *CLUSTER, *steps, "--solvers", "eplb,chain", "--after", "eplb", "-o", path)
    assert done.code == 0, done.err
    assert "eplb" in done.out
    return path


class Elements(HTMLParser):
    """Every element's attributes, and the text of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.tags: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.texts.setdefault(tag, [])

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[self._inside].append(data)


def charts(html: str) -> dict[str, list[str]]:
    """The charts of each figure, shown and hidden, in order."""
    found: dict[str, list[str]] = {}
    for panels in re.split(r'<div class="panels" id="', html)[1:]:
        figure = panels.partition('"')[0].rpartition("-")[0]
        found.setdefault(figure, []).extend(re.findall(r"<svg .*?</svg>", panels.partition("</section>")[0], re.DOTALL))
    return found


def told(chart: str) -> Any:
    """What the script tells of a chart."""
    match = re.search(r'data-chart="(.*?)"', chart)
    assert match
    return json.loads(unescape(match.group(1)))


def cells(chart: str, unit: str = "") -> npt.NDArray[Any]:
    """A heat map's values; NaN where a cell is empty."""
    values = told(chart)["values"]
    return np.array([[np.nan if v is None else float(v.removesuffix(unit)) for v in row] for row in values])


def test_the_page_refers_to_nothing_outside_itself(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    elements = Elements(html)
    assert not [entry for entry in elements.attributes if entry[1] in ("src", "href", "srcset", "action", "data")]
    assert "link" not in elements.tags
    style = "".join(elements.texts["style"])
    assert "url(" not in style
    assert "@import" not in style
    policy = next(value for tag, _, value in elements.attributes if tag == "meta" and "default-src" in value)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_names_from_files_cannot_break_out_of_the_page(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "&lt;/script&gt;" in html
    assert Elements(html).tags.count("script") == 1


def test_the_page_runs_and_wears_only_what_it_names_by_hash(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    elements = Elements(html)
    policy = next(value for tag, _, value in elements.attributes if tag == "meta" and "default-src" in value)
    for kind in ("script", "style"):
        [content] = re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not [entry for entry in elements.attributes if entry[1] == "style" or entry[1].startswith("on")]


def test_the_page_is_small(page: Path) -> None:
    assert page.stat().st_size < 400_000


def test_every_chart_says_what_it_shows_in_which_unit(page: Path) -> None:
    drawn = charts(page.read_text(encoding="utf-8"))
    assert list(drawn) == ["times", "breakdown", "load", "traffic", "affinity"]
    for key, unit in (("times", "(ms)"), ("breakdown", "(ms)"), ("traffic", "B</text>"), ("affinity", "%</text>")):
        for chart in drawn[key]:
            assert unit in chart, key
    for key in ("load", "traffic", "affinity"):
        for chart in drawn[key]:
            assert chart.count('scale"') == 9


def test_load_map_shows_the_evaluations_loads(page: Path, trace: Path) -> None:
    _, held = make_trace(0).split(held_out=0.25, seed=0)
    steps = held.decode_steps(concurrency=8, steps=12, seed=0)
    problem = mp.Problem(
        toy_model(),
        mp.Topology.preset("h100-hgx", nodes=2, devices_per_node=2),
        mp.RoutingStatistics.from_trace(held),
        slots=12,
    )
    tokens = mp.evaluate(mp.solve(problem, "contiguous"), steps, problem).device_tokens
    expected = (tokens / tokens.mean(axis=2, keepdims=True)).mean(axis=0).T
    before, _ = charts(page.read_text(encoding="utf-8"))["load"]
    assert cells(before) == pytest.approx(expected, abs=0.0051)
    about = told(before)
    assert (about["rows"][0], about["columns"][0]) == ("device", "MoE layer")
    # Around the even share: as far above as below it.
    low, high = (float(text) for text in re.findall(r">([\d.]+)</text>", before)[-2:])
    assert low + high == pytest.approx(2.0)


def test_step_time_curves_end_at_one_and_choices_cover_all_charts(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    drawn = charts(html)["times"]
    choices = re.search(r'<select data-choices="times".*?</select>', html, re.DOTALL)
    assert choices
    # Of each kind of steps a chart that is fitted to the data, and one that shows how little that is of a step.
    assert 2 * len(re.findall("<option", choices.group(0))) == len(drawn) == 4
    for chart in drawn:
        assert re.findall(r'class="name"|>(contiguous|eplb)</text>', chart) == ["contiguous", "eplb"]
        for curve in re.findall(r'<polyline class="(?:before|after)" points="([^"]{30,})"', chart):
            points = np.array([[float(n) for n in point.split(",")] for point in curve.split()])
            assert (np.diff(points[:, 0]) >= 0).all()
            assert (np.diff(points[:, 1]) <= 0).all()


def test_affinity_rows_are_shares_in_the_plans_order(page: Path) -> None:
    before, after = charts(page.read_text(encoding="utf-8"))["affinity"][:2]
    train, _ = make_trace(0).split(held_out=0.25, seed=0)
    counts = mp.RoutingStatistics.from_trace(train).total_transitions[0]
    share = 100 * counts / counts.sum(axis=1, keepdims=True)
    # Contiguous with replicas of experts 0 to 3 at the end: the first holder wins a tie, so the order stays.
    assert cells(before, "%") == pytest.approx(share, abs=0.051)
    assert np.sort(cells(after, "%"), axis=None) == pytest.approx(np.sort(share, axis=None), abs=0.051)


@pytest.mark.slow
def test_gaps_of_different_objectives_stand_apart(trace: Path, folder: Path) -> None:
    path = folder / "two_objectives.html"
    asked = ("--decode", "8", "--steps", "6", "--solvers", "eplb,exflow", "--execution", "context_coherent")
    done = run("report", trace, *CLUSTER, *asked, "-o", path)
    assert done.code == 0, done.err
    tables = re.findall(r"<table>.*?</table>", path.read_text(encoding="utf-8"), re.DOTALL)
    with_gaps = [table for table in tables if '<th scope="col">gap</th>' in table]
    assert len(with_gaps) == 2
    for table in with_gaps:
        assert "Proven of the solver&#39;s own objective" in table
        assert ("eplb" in table) != ("exflow" in table)


def test_no_folder_of_this_machine_is_on_the_page(page: Path, folder: Path) -> None:
    html = page.read_text(encoding="utf-8")
    assert str(folder) not in html
    assert "Routing" in html


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("/home/ann/trace", "trace"),
        ("~/a/plan.json,/b/other.json", "plan.json,other.json"),
        ("--output=/home/ann/x.html", "--output=x.html"),
        ("postgresql://ann:secret@host/db", "postgresql://..."),
        ("--db=postgresql://ann:secret@host/db", "--db=postgresql://..."),
        ("decode=64", "decode=64"),
        ("eplb,search", "eplb,search"),
        ("C:\\Users\\ann\\trace", "trace"),
    ],
)
def test_what_a_command_named_is_shown_without_its_folder(argument: str, shown: str) -> None:
    assert without_folders(argument) == shown


def test_the_table_names_the_plan_shown_and_why_another_failed(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    assert '<tr class="chosen"><th scope="row">eplb</th>' in html
    assert '<td class="reason"' in html
    assert "SHA-256" in html
    assert "moeplace 0" in html


def test_a_plan_that_is_not_there_cannot_be_shown(trace: Path, folder: Path) -> None:
    judged = ("--decode", "8", "--steps", "3", "--solvers", "eplb")
    ended = run("report", trace, *CLUSTER, *judged, "--after", "epbl", "-o", folder / "no.html")
    assert ended.code == 1
    assert "did you mean 'eplb'" in ended.err
    alone = run("report", trace, *CLUSTER, *judged[:4], "--solvers", "contiguous", "-o", folder / "no.html")
    assert alone.code == 1
    assert "two plans side by side" in alone.err
    assert not (folder / "no.html").exists()


def test_a_browser_draws_every_plot_without_errors(page: Path, folder: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium to open the page with")
    ended = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--enable-logging=stderr",
            f"--user-data-dir={folder / 'browser'}",
            "--virtual-time-budget=2000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    problems = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    assert problems == []
    # The script ran, and what was drawn before it still stands.
    assert '<div id="tip"' in ended.stdout
    assert len(charts(ended.stdout)) == 5
