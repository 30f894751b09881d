"""Screenshots of every page of the dashboard, on the demo's data, light and dark.

    make demo
    .venv/bin/python docs/figures/dashboard.py --db demo/moeplace.db --out shots
    .venv/bin/python docs/figures/dashboard.py --db demo/moeplace.db --docs

It asks the service for a front and a what-if where there is none yet. --out writes each page in full, and its first
window with something in focus; --docs those that the documentation shows. Needs Selenium, Chromium and its driver, and
Pillow.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

import moeplace as mp

HERE = Path(__file__).parent
WIDTH, HEIGHT = 1440, 900
COLOURS = 256
SHOWN = {
    ("deployment", "light"): "dashboard.png",
    ("decision", "light"): "dashboard_decision.png",
    ("front", "dark"): "dashboard_front_dark.png",
}
"""Of the documentation: the first window of a page."""


@contextmanager
def service(db: Path, *arguments: str) -> Iterator[str]:
    """Where it answers."""
    command = [sys.executable, "-m", "moeplace.cli", "serve", "--no-auth", "--db", str(db), "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = ""
    for line in process.stderr:
        entry = json.loads(line) if line.startswith("{") else {"message": line}
        url = entry.get("url", url)
        if "startup complete" in entry["message"]:
            break
    # What it logs from here on is not looked at.
    drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
    try:
        yield url
    finally:
        process.terminate()
        process.wait(300)
        drain.wait()


def pages(client: mp.Client) -> dict[str, str]:
    """Paths by name; studies are asked for where there are none."""
    [deployment] = [entry.name for entry in client.deployments()]
    asked = {
        "pareto": lambda: client.pareto(deployment, seconds=2, redundant=[0, 4, 8, 16]),
        "what-if": lambda: client.what_if(deployment, seconds=2),
    }
    studies = {}
    for kind, ask in asked.items():
        found = next((job for job in client.jobs(kind=kind) if job.state == "done"), None)
        studies[kind] = found or client.wait(ask(), timeout=1200)
    watched = next(job for job in client.jobs(kind="watch") if job.state == "done")
    decision = next(iter(client.decisions(deployment)))
    return {
        "index": "/",
        "deployment": f"/deployments/{deployment}",
        "decision": f"/decisions/{decision.key}",
        "diff": f"/deployments/{deployment}/diff",
        "front": f"/jobs/{studies['pareto'].key}",
        "what-if": f"/jobs/{studies['what-if'].key}",
        "watch": f"/jobs/{watched.key}",
    }


@contextmanager
def browser(theme: str) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        scheme = {"name": "prefers-color-scheme", "value": theme}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()


def picture(driver: webdriver.Chrome, height: int) -> bytes:
    """The page at this height of the window, its width as always."""
    size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    time.sleep(0.3)
    return driver.get_screenshot_as_png()


def smaller(content: bytes) -> bytes:
    """The same picture in few colours."""
    buffer = io.BytesIO()
    image = (
        Image.open(io.BytesIO(content))
        .convert("RGB")
        .quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    )
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--db", type=Path, required=True, help="the demo's database")
    parser.add_argument("--out", type=Path, help="folder for every page in full")
    parser.add_argument("--docs", action="store_true", help="write the pictures of the documentation")
    given = parser.parse_args()
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
    with service(given.db) as url:
        with mp.Client(url) as client:
            paths = pages(client)
        for theme in ("light", "dark"):
            with browser(theme) as driver:
                for name, path in paths.items():
                    picture_of(driver, url + path, name, theme, given)
    with service(given.db, "--auth", "--workers", "0") as url:
        for theme in ("light", "dark"):
            with browser(theme) as driver:
                picture_of(driver, url, "sign-in", theme, given)


def picture_of(driver: webdriver.Chrome, address: str, name: str, theme: str, given: argparse.Namespace) -> None:
    picture(driver, HEIGHT)
    driver.get(address)
    wide = driver.execute_script("return document.documentElement.scrollWidth")
    if wide > WIDTH:
        sys.stderr.write(f"{name}, {theme}: {wide} pixels wide, does not fit\n")
    first = picture(driver, HEIGHT)
    if given.docs and (name, theme) in SHOWN:
        (HERE / SHOWN[name, theme]).write_bytes(smaller(first))
    if given.out:
        for _ in range(4):
            driver.switch_to.active_element.send_keys(Keys.TAB)
        (given.out / f"{name}-{theme}-focus.png").write_bytes(picture(driver, HEIGHT))
        tall = min(6000, driver.execute_script("return document.documentElement.scrollHeight"))
        (given.out / f"{name}-{theme}.png").write_bytes(picture(driver, max(HEIGHT, tall)))


if __name__ == "__main__":
    main()
