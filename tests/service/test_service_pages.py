"""The dashboard in a real browser: signing in, reading, approving, rolling back, by keyboard, light and dark."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
pytest.importorskip("selenium", reason="selenium is not installed")
from axe import violations
from cli_runs import run
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from service_runs import MODEL, PATIENCE, TOPOLOGY, Server, counts, prepared, serving, skewed

import moeplace as mp
from moeplace.db.records import CountWindow
from moeplace.placement.migration import migration

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="chromium and chromedriver are not installed"),
]
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SHOTS = os.environ.get("MOEPLACE_TEST_SCREENSHOTS")
"""A folder for screenshots of every page, to be looked at."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A deployment with a plan in force, several checks, and a decision that waits."""
    path = str(tmp_path_factory.mktemp("pages") / "store.db")
    token = run("tokens", "add", "ann", "--role", "approve", "--db", path).out.strip()
    with serving(path, "--auth") as running, running.client(token) as client:
        prepared(client, "chat <b> &amp;", min_regret=0.003, horizon_steps=5e6)
        for part, seed in enumerate((0, 0, 0, 7, 7, 3)):
            windows = [
                CountWindow(NOON + timedelta(minutes=16 * part + i), counts(100 * part + i, skewed(seed)))
                for i in range(16)
            ]
            client.push_windows("chat <b> &amp;", windows)
            deadline = time.monotonic() + PATIENCE
            while len(list(client.checks("chat <b> &amp;"))) <= part:
                assert time.monotonic() < deadline, list(client.jobs())
                time.sleep(0.1)
            if part < 5:
                for decision in client.decisions(state="waiting"):
                    client.approve(decision.key, f"approved in part {part}")
        assert list(client.decisions(state="waiting"))
        asked: Any = {"solver": "eplb", "steps": {"tokens": 64, "count": 4}}
        client.wait(client.pareto("chat <b> &amp;", redundant=[0, 4, 16], **asked), timeout=PATIENCE)
        client.wait(client.what_if("chat <b> &amp;", **asked), timeout=PATIENCE)
        yield running, token


@pytest.fixture(params=["light", "dark"])
def browser(request: pytest.FixtureRequest, server: tuple[Server, str]) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1280,800",
        "--disable-dev-shm-usage",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.theme = request.param  # type: ignore[attr-defined]
    scheme = {"name": "prefers-color-scheme", "value": request.param}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    try:
        yield driver
    finally:
        driver.quit()


def sign_in(browser: Any, running: Server, token: str) -> None:
    browser.get(f"{running.url}/sign-in")
    browser.switch_to.active_element.send_keys(token, Keys.ENTER)
    see(browser, "h1", "Deployments")


def see(browser: Any, selector: str, text: str) -> None:
    """Waits until an element shows this text: pages load in their own time."""
    WebDriverWait(browser, 30, ignored_exceptions=(StaleElementReferenceException,)).until(
        lambda b: any(text in element.text for element in b.find_elements(By.CSS_SELECTOR, selector))
    )


def shot(browser: Any, name: str) -> None:
    if SHOTS:
        height = browser.execute_script("return document.documentElement.scrollHeight")
        browser.set_window_size(1280, min(4000, max(800, height + 100)))
        browser.save_screenshot(str(Path(SHOTS) / f"{name}-{browser.theme}.png"))
        browser.set_window_size(1280, 800)


WIDER = """return [...document.querySelectorAll('main *, header *')]
    .filter(e => !e.parentElement.closest('.scroll') && e.getBoundingClientRect().right > window.innerWidth + 1)
    .map(e => e.outerHTML.slice(0, 200))"""
"""What reaches beyond the window and does not scroll inside it."""


def phone_shot(browser: Any, path: str) -> None:
    if SHOTS:
        name = path.rpartition("//")[2].partition("/")[2].replace("/", "-") or "index"
        browser.save_screenshot(str(Path(SHOTS) / f"phone-{name[:40]}-{browser.theme}.png"))


def sound(browser: Any) -> None:
    """No script or style was refused, nothing failed to load, nothing is wider than the window, every field is
    labelled."""
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.execute_script(
        "return [...document.querySelectorAll('input:not([type=hidden]), select')].every(i => i.labels.length > 0)"
    )
    assert browser.execute_script("return [...document.querySelectorAll('table')].every(t => t.caption)")
    assert browser.execute_script("return document.querySelectorAll('h1').length") == 1


def test_the_dashboard_is_read_and_used_by_keyboard(server: tuple[Server, str], browser: Any) -> None:
    running, token = server
    browser.get(running.url)
    assert browser.current_url.endswith("/sign-in")
    browser.switch_to.active_element.send_keys("mp_wrong", Keys.ENTER)
    see(browser, "[role=alert]", "not a valid token")
    browser.get_log("browser")
    shot(browser, "sign-in")
    browser.switch_to.active_element.send_keys(token, Keys.ENTER)
    see(browser, "h1", "Deployments")
    sound(browser)
    shot(browser, "index")
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert browser.switch_to.active_element.text == "Skip to content"
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (browser.theme == "light")

    browser.find_element(By.LINK_TEXT, "chat <b> &amp;").send_keys(Keys.ENTER)
    see(browser, "h1", "chat <b> &amp;")
    sound(browser)
    charts = browser.find_elements(By.CSS_SELECTOR, "svg[role=img]")
    assert [chart.get_attribute("aria-label").partition(",")[0] for chart in charts] == [
        "Load over time",
        "Regret over time",
        "Drift over time",
        "Device load",
        "Device load",
        "Traffic between devices",
        "Step time over weights on the fullest device",
        "Step time over single failures in which every expert keeps a replica",
        "Step time over moved from the plan in force",
    ]
    assert len(charts[2].find_elements(By.CSS_SELECTOR, "line.alarm")) >= 2
    shot(browser, "deployment")

    browser.find_element(By.PARTIAL_LINK_TEXT, "approve or reject").send_keys(Keys.ENTER)
    see(browser, "h2", "What moves")
    sound(browser)
    headings = [heading.text for heading in browser.find_elements(By.TAG_NAME, "h2")]
    assert headings == ["What it does", "How it came about", "What moves", "The moves one by one"]
    effects = browser.find_element(By.CSS_SELECTOR, ".effects")
    assert [term.text for term in effects.find_elements(By.TAG_NAME, "dt")] == [
        "time",
        "balance",
        "bytes",
        "how to roll back",
    ]
    scale = browser.find_elements(By.CSS_SELECTOR, "svg .tick")
    assert "0 experts" in [text.text for text in scale]
    for words in ("ms a step now", "times the mean load now", "GB", "Once approved it is version"):
        assert words in effects.text
    assert browser.find_elements(By.TAG_NAME, "caption")[-1].text == "By device"
    assert "experts" in browser.find_element(By.ID, "main").text
    assert browser.find_elements(By.CSS_SELECTOR, "table tbody tr")
    shot(browser, "decision")


def test_no_page_is_wider_than_a_phone(server: tuple[Server, str], browser: Any) -> None:
    running, token = server
    screen = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(f"{running.url}/sign-in")
    assert browser.execute_script(WIDER) == []
    browser.switch_to.active_element.send_keys(token, Keys.ENTER)
    see(browser, "h1", "Deployments")
    browser.get_log("browser")
    with running.client(token) as client:
        [waiting] = client.decisions(state="waiting")
        jobs = [next(iter(client.jobs(kind=kind))).key for kind in ("pareto", "what-if")]
    links = browser.find_elements(By.CSS_SELECTOR, "nav[aria-label=Main] a, main tbody th a")
    paths = [link.get_attribute("href") for link in links]
    deployment = next(path for path in paths if "/deployments/" in path)
    paths += [
        f"{deployment}/diff",
        f"{deployment}/policy",
        f"{running.url}/decisions/{waiting.key}",
        f"{running.url}/plans/{waiting.candidate_id}",
    ]
    paths += [f"{running.url}/jobs/{key}" for key in jobs]
    for path in dict.fromkeys(paths):
        browser.get(path)
        sound(browser)
        assert browser.execute_script("return window.innerWidth") == 390
        for details in browser.find_elements(By.TAG_NAME, "details"):
            browser.execute_script("arguments[0].open = true", details)
        wide = browser.execute_script(WIDER)
        assert wide == [], (path, wide)
        phone_shot(browser, path)
    browser.get(f"{running.url}/nowhere")
    see(browser, "h1", "Not found")
    assert browser.execute_script(WIDER) == []


def paths_of_all_pages(running: Server, token: str) -> list[str]:
    """Of each page one, but the sign-in page and errors."""
    with running.client(token) as client:
        [waiting] = client.decisions(state="waiting")
        jobs = [next(iter(client.jobs(kind=kind))).key for kind in ("pareto", "what-if", "watch")]
        deployment = f"/deployments/{quote(waiting.deployment, safe='')}"
    lists = ("/", "/decisions", "/plans", "/jobs", "/engines", "/webhooks", "/audit")
    shown = (deployment, f"{deployment}/diff", f"/decisions/{waiting.key}", f"/plans/{waiting.candidate_id}")
    return [*lists, *shown, *(f"/jobs/{key}" for key in jobs), "/policies", f"{deployment}/policy"]


def resize(browser: Any, width: int, height: int) -> None:
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


@pytest.mark.slow
@pytest.mark.long
def test_axe_finds_nothing_wrong_with_any_page(server: tuple[Server, str], browser: Any) -> None:
    running, token = server
    browser.get(f"{running.url}/sign-in")
    found = {"/sign-in": violations(browser)}
    browser.switch_to.active_element.send_keys(token, Keys.ENTER)
    see(browser, "h1", "Deployments")
    for path in [*paths_of_all_pages(running, token), "/nowhere"]:
        browser.get(running.url + path)
        for details in browser.find_elements(By.TAG_NAME, "details"):
            browser.execute_script("arguments[0].open = true", details)
        if browser.theme == "dark":
            # Colours are all that differs.
            found[path] = violations(browser, ["color-contrast"])
            continue
        for width, height in ((1440, 900), (390, 844)):
            resize(browser, width, height)
            found[f"{path} {width}"] = violations(browser)
    assert {path: wrong for path, wrong in found.items() if wrong} == {}


def test_charts_tell_what_is_pointed_at_and_a_drawn_range_is_shown(server: tuple[Server, str], browser: Any) -> None:
    running, token = server
    if browser.theme == "dark":
        pytest.skip("the script does the same in the dark")
    sign_in(browser, running, token)
    browser.get_log("browser")
    address = running.url + paths_of_all_pages(running, token)[7]
    browser.get(address)
    load = browser.find_element(By.CSS_SELECTOR, "svg[data-chart]")
    browser.execute_script("arguments[0].scrollIntoView()", load)
    hover = json.loads(load.get_attribute("data-chart"))
    _, top, _, bottom = hover["box"]
    size = load.size["width"], load.size["height"]

    def point(x: float) -> tuple[int, int]:
        """From the middle of the chart."""
        scale = size[0] / browser.execute_script("return arguments[0].viewBox.baseVal.width", load)
        return round(x * scale - size[0] / 2), round((top + bottom) / 2 * scale - size[1] / 2)

    tip = browser.find_element(By.ID, "tip")

    def pointed_at(chart: Any, x: int, y: int) -> str:
        """The tip there; the pointer moves again where a scroll that was still under way has hidden it."""

        def move(_: Any) -> str:
            way = ActionChains(browser).move_to_element_with_offset(chart, x, y + 1)
            way.move_to_element_with_offset(chart, x, y).perform()
            return str(tip.text)

        return str(WebDriverWait(browser, 30).until(move))

    told = pointed_at(load, *point(hover["at"][3])).splitlines()
    assert told[0].endswith(" UTC")
    assert told[1:] == hover["told"][3][1:]
    assert told[1].startswith("plan in force: ")
    box = browser.find_element(By.XPATH, "//figcaption[contains(., 'in force: worst')]/following::*[name()='svg'][1]")
    cell = pointed_at(box, 0, -20)
    assert cell.startswith("device ")
    assert "MoE layer " in cell

    begin, end = (hover["at"][1] + hover["at"][2]) / 2, hover["at"][-1] + 4
    drag = ActionChains(browser).move_to_element_with_offset(load, *point(begin)).click_and_hold()
    drag.move_to_element_with_offset(load, *point((begin + end) / 2)).move_to_element_with_offset(load, *point(end))
    drag.release().perform()
    WebDriverWait(browser, 30).until(lambda b: "since=" in b.current_url)
    see(browser, "h1", "chat")
    shown = json.loads(browser.find_element(By.CSS_SELECTOR, "svg[data-chart]").get_attribute("data-chart"))
    assert len(shown["at"]) < len(hover["at"])
    assert [entry[0] for entry in shown["told"]] == [entry[0] for entry in hover["told"]][-len(shown["told"]) :]
    assert browser.find_element(By.ID, "since").get_attribute("value")
    sound(browser)
    browser.find_element(By.LINK_TEXT, "30 days").send_keys(Keys.ENTER)
    see(browser, "[aria-current=true]", "30 days")
    browser.get(f"{address}?since=2020-01-01T00:00&until=2020-01-02T00:00")
    see(browser, "main", "No drift check in this span of time")
    sound(browser)
    browser.get(f"{address}?since=soon")
    see(browser, "main", "not a date and time")


def test_pages_follow_what_changes_without_being_asked(server: tuple[Server, str], browser: Any) -> None:
    running, token = server
    if browser.theme == "dark":
        pytest.skip("the script does the same in the dark")
    sign_in(browser, running, token)
    browser.get_log("browser")
    browser.get(f"{running.url}/jobs")
    see(browser, "#live", "Live")
    with running.client(token) as client:
        [deployment] = client.deployments()
        job = client.solve(deployment.name, solver="search", seconds=600.0)
        see(browser, "tbody th", str(job.key))
        browser.get(f"{running.url}/jobs/{job.key}")
        see(browser, "#live", "Live")
        client.cancel(job.key)
        see(browser, "dd", "cancelled")
        # What has ended is not followed any longer.
        WebDriverWait(browser, 30).until(lambda b: b.find_element(By.ID, "live").text == "")
        sound(browser)


def test_charts_name_their_lines_and_tell_them_apart_by_form(server: tuple[Server, str], browser: Any) -> None:
    running, token = server
    sign_in(browser, running, token)
    browser.find_element(By.LINK_TEXT, "chat <b> &amp;").send_keys(Keys.ENTER)
    see(browser, "h1", "chat <b> &amp;")
    load, regret, drift, *_ = browser.find_elements(By.CSS_SELECTOR, "svg[role=img]")
    for chart, names in (
        (load, ("plan in force", "proven bound of any plan", "alarm")),
        (regret, ("regret", "matters from here")),
        (drift, ("-log10 p", "alarm from here")),
    ):
        texts = [text.text for text in chart.find_elements(By.TAG_NAME, "text")]
        assert set(names) <= set(texts)
    loads, _, traffic = browser.find_elements(By.CSS_SELECTOR, "svg[role=img]")[3:6]
    assert len(loads.find_elements(By.CSS_SELECTOR, "line.node")) == TOPOLOGY.num_nodes - 1
    assert len(traffic.find_elements(By.CSS_SELECTOR, "line.node")) == 2 * (TOPOLOGY.num_nodes - 1)
    assert len(traffic.find_elements(By.CSS_SELECTOR, "rect.scale")) == 9
    dashes = {
        kind: load.find_element(By.CSS_SELECTOR, f"polyline.{kind}").value_of_css_property("stroke-dasharray")
        for kind in ("series-a", "series-b")
    }
    assert dashes["series-a"] == "none"
    assert dashes["series-b"] != "none"
    with running.client(token) as client:
        checks = list(client.checks("chat <b> &amp;"))[::-1]
    places = json.loads(load.get_attribute("data-chart"))["at"]
    times = [check.created.timestamp() for check in checks]
    assert len(places) == len(times)
    shares = [(place - places[0]) / (places[-1] - places[0]) for place in places]
    assert shares == pytest.approx([(time - times[0]) / (times[-1] - times[0]) for time in times], abs=0.01)


def test_plans_are_compared_and_studies_read(server: tuple[Server, str], browser: Any) -> None:
    running, token = server
    sign_in(browser, running, token)
    browser.get_log("browser")
    browser.find_element(By.LINK_TEXT, "chat <b> &amp;").send_keys(Keys.ENTER)
    see(browser, "h2", "Pareto front")
    browser.find_element(By.PARTIAL_LINK_TEXT, "Compare plans").send_keys(Keys.ENTER)
    see(browser, "h1", "compared")
    sound(browser)
    browser.find_element(By.ID, "before").send_keys("index order")
    browser.find_element(By.ID, "before").send_keys(Keys.TAB, Keys.TAB, Keys.ENTER)
    see(browser, "p", "From index order to")
    with running.client(token) as client:
        [waiting] = client.decisions(state="waiting")
        candidate = client.plan(waiting.candidate_id)
    flat = mp.RoutingStatistics.from_counts(np.ones((MODEL.layers, MODEL.experts)), top_k=2)
    moved = migration(mp.solve(mp.Problem(MODEL, TOPOLOGY, flat), "contiguous"), candidate)
    text = browser.find_element(By.ID, "main").text
    assert f"{moved.moves:,} experts, {moved.bytes_moved / 1e9:,.2f} GB" in text
    cells = [
        tuple(int(cell.text) for cell in row.find_elements(By.TAG_NAME, "td"))
        for row in browser.find_element(By.XPATH, "//table[caption='By device']").find_elements(
            By.CSS_SELECTOR, "tbody tr"
        )
    ]
    pairs = list(zip(moved.source.tolist(), moved.target.tolist(), strict=True))
    assert {(source, target): count for source, target, count in cells} == {
        pair: pairs.count(pair) for pair in set(pairs)
    }
    sound(browser)
    shot(browser, "diff")
    for kind, heading in (("pareto", "Pareto front"), ("what-if", "What each change does")):
        with running.client(token) as client:
            job = next(iter(client.jobs(kind=kind)))
        browser.get(f"{running.url}/jobs/{job.key}")
        see(browser, "h2", heading)
        sound(browser)
        shot(browser, kind)


def test_a_decision_is_approved_and_rolled_back_with_buttons(server: tuple[Server, str], browser: Any) -> None:
    running, token = server
    with running.client(token) as client:
        if browser.theme == "dark":
            pytest.skip("buttons do the same in the dark")
        sign_in(browser, running, token)
        [waiting] = client.decisions(state="waiting")
        version = client.deployment("chat <b> &amp;").version
        browser.get(f"{running.url}/decisions/{waiting.key}")
        browser.find_element(By.ID, "comment").send_keys("seen in the browser")
        browser.find_element(By.CSS_SELECTOR, "button[value=approve]").send_keys(Keys.ENTER)
        see(browser, "td", "seen in the browser")
        assert client.deployment("chat <b> &amp;").version == version + 1
        closed = next(iter(client.decisions()))
        assert (closed.state, closed.closed_by, closed.comment) == ("published", "ann", "seen in the browser")
        browser.find_element(By.CSS_SELECTOR, "[aria-label='Roll back to version 1']").send_keys(Keys.ENTER)
        see(browser, "td", "back to version 1")
        assert client.deployment("chat <b> &amp;").version == version + 2
        browser.find_element(By.CSS_SELECTOR, "form[action='/sign-out'] button").click()
        see(browser, "h1", "Sign in")
