"""The report: the figures it shows, and that its page needs nothing but itself."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cli_runs import CLUSTER, run, toy_model, toy_trace_folder
from traces import make_trace

import moeplace as mp

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


def plots(html: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="plots">(.*?)</script>', html, re.DOTALL)
    assert match
    return dict(json.loads(match.group(1)))


def unpacked(array: Any) -> npt.NDArray[Any]:
    """Plotly's packed array."""
    if not isinstance(array, dict):
        return np.asarray(array)
    values = np.frombuffer(base64.b64decode(array["bdata"]), dtype=np.dtype(array["dtype"]))
    shape = array.get("shape")
    return values.reshape([int(size) for size in shape.split(",")]) if shape else values


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
    assert Elements(html).tags.count("script") == 3


def test_every_plot_has_titles_with_units_in_both_themes(page: Path) -> None:
    drawn = plots(page.read_text(encoding="utf-8"))
    assert list(drawn) == ["times", "breakdown", "load", "traffic", "affinity"]
    for key, plot in drawn.items():
        assert set(plot["layouts"]) == {"light", "dark"}
        for layout in plot["layouts"].values():
            titles = [axis["title"]["text"] for name, axis in layout.items() if name.startswith(("xaxis", "yaxis"))]
            assert any(titles), key
            if "coloraxis" in layout:
                assert layout["coloraxis"]["colorbar"]["title"]["text"].strip()
    assert "ms" in drawn["times"]["layouts"]["light"]["xaxis"]["title"]["text"]
    assert "B a step" in drawn["traffic"]["layouts"]["light"]["coloraxis"]["colorbar"]["title"]["text"]


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
    shown = plots(page.read_text(encoding="utf-8"))["load"]
    assert unpacked(shown["data"][0]["z"]) == pytest.approx(expected, rel=1e-5)
    scale = shown["layouts"]["light"]["coloraxis"]
    assert scale["cmin"] + scale["cmax"] == pytest.approx(2.0)


def test_step_time_curves_end_at_one_and_choices_cover_all_curves(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    shown = plots(html)["times"]["data"]
    curves = [trace for trace in shown if trace["mode"] == "lines"]
    assert [trace["name"] for trace in curves] == ["contiguous", "eplb"] * 2
    for curve in curves:
        assert (np.diff(unpacked(curve["x"])) >= 0).all()
        assert unpacked(curve["y"])[-1] == pytest.approx(1.0)
    choices = re.search(r'<select data-plot="times">(.*?)</select>', html, re.DOTALL)
    assert choices
    offered = re.findall(r'value="([\d,]+)"', choices.group(1))
    assert sorted(int(i) for group in offered for i in group.split(",")) == list(range(len(shown)))


def test_affinity_rows_are_shares_in_the_plans_order(page: Path) -> None:
    shown = plots(page.read_text(encoding="utf-8"))["affinity"]
    train, _ = make_trace(0).split(held_out=0.25, seed=0)
    counts = mp.RoutingStatistics.from_trace(train).total_transitions[0]
    share = 100 * counts / counts.sum(axis=1, keepdims=True)
    before, after = (unpacked(shown["data"][i]["z"]) for i in (0, 2))
    # Contiguous with replicas of experts 0 to 3 at the end: the first holder wins a tie, so the order stays.
    assert before == pytest.approx(share, rel=1e-4)
    assert np.sort(after, axis=None) == pytest.approx(np.sort(share, axis=None), rel=1e-4)


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
    assert not problems
    for key in plots(page.read_text(encoding="utf-8")):
        drawn = ended.stdout.partition(f'id="{key}"')[2].partition("</section>")[0]
        assert "main-svg" in drawn, key
