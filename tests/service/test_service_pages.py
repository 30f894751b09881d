"""The dashboard in a real browser: signing in, reading, approving, rolling back, by keyboard, light and dark."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
pytest.importorskip("selenium", reason="selenium is not installed")
from cli_runs import run
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from service_runs import MODEL, PATIENCE, TOPOLOGY, Server, counts, prepared, serving, skewed

import moeplace as mp
from moeplace.db.records import CountWindow
from moeplace.placement.migration import migration

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="chromium and chromedriver are not installed")
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
    assert "experts" in browser.find_element(By.ID, "main").text
    assert browser.find_elements(By.CSS_SELECTOR, "table tbody tr")
    shot(browser, "decision")


def test_plans_are_compared_and_studies_read(server: tuple[Server, str], browser: Any) -> None:
    running, token = server
    browser.get(f"{running.url}/sign-in")
    browser.switch_to.active_element.send_keys(token, Keys.ENTER)
    see(browser, "h1", "Deployments")
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
        browser.get(f"{running.url}/sign-in")
        browser.switch_to.active_element.send_keys(token, Keys.ENTER)
        see(browser, "h1", "Deployments")
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
