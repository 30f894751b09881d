"""The examples run as their users would run them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from torchrun_examples import torchrun_example

import moeplace as mp
from moeplace.db import Store
from moeplace.db.records import Actor, CountWindow

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_placing_from_python_beats_index_order_and_saves_the_plan(tmp_path: Path) -> None:
    printed = run("place_from_python.py", folder=tmp_path)
    today, found = (float(line.split("step ")[1].split(" ms")[0]) for line in printed.splitlines()[:2])
    assert found < today
    plan = mp.Plan.load(tmp_path / "plan.json")
    assert plan.gap is not None
    assert f"{plan.gap:.1%}" in printed


def test_the_demo_compares_solves_exports_and_reports(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    # The environment that runs the tests, which has what the demo installs.
    (tmp_path / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (tmp_path / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    (tmp_path / ".venv" / ".demo").touch()
    done = subprocess.run(["make", "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    for solver in ("contiguous", "eplb", "search"):
        assert solver in printed
    gain = re.search(r"Held-out steps of 4,096 tokens take (-?[0-9.]+)% less time than in index order", printed)
    assert gain is not None
    assert float(gain[1]) > 20.0
    assert "puts moeplace on the path" in printed
    plan = mp.Plan.load(tmp_path / "demo" / "plan.json")
    exported = json.loads((tmp_path / "demo" / "init_expert_location.json").read_text())
    assert exported == {"physical_to_logical_map": plan.physical_to_logical.tolist()}
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "<html" in page
    assert 'src="http' not in page
    if find_spec("uvicorn") is not None:
        # Nobody is at a terminal here: it says where the service was and how to start it, and stops it.
        assert re.search(r"The service is ready \(200\): http://127.0.0.1:\d+", printed)
        assert "To start it: moeplace serve --no-auth --db " in printed
        with Store.open(tmp_path / "demo" / "moeplace.db") as store:
            assert store.windows.totals("demo")[0] == 96
            assert store.deployments.get("demo").version == 1
            # It ends with a plan that pays, left for the reader to put in force.
            (waiting,) = store.decisions.page("demo", limit=2, state="waiting")
            assert waiting.action == "apply"
            assert waiting.figures["gain_low"] > 0.02 * waiting.figures["current"]
            assert f"/decisions/{waiting.key} or `moeplace approve {waiting.key} --server http://127.0.0.1:" in printed


@pytest.mark.parametrize(("arguments", "moment"), [([], "$ moeplace stats"), (["--only-service"], "Ctrl-C stops it")])
@pytest.mark.long
def test_ctrl_c_ends_the_demo_at_any_moment(arguments: list[str], moment: str, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    pty = pytest.importorskip("pty")
    # A deployment with windows is taken as it is.
    with Store.open(tmp_path / "moeplace.db") as store:
        store.add_model(mp.ModelSpec(layers=1, experts=4, top_k=1, hidden_size=8, ffn_size=8), name="other")
        store.add_topology(mp.Topology.preset("a100-pcie", nodes=2, devices_per_node=4), name="demo")
        store.deployments.add("demo", "other", "demo", {}, Actor("ann", "approve"))
        store.windows.add({"demo": [CountWindow(datetime(2026, 1, 1, tzinfo=UTC), np.ones((1, 4), int))]})
    terminal, end = pty.openpty()
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--out", str(tmp_path), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "CI"}

    def foreground() -> None:
        # What a shell starts in the background ignores it, and so do its children.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    demo = subprocess.Popen(
        command, stdin=end, stdout=end, stderr=end, env=environment, start_new_session=True, preexec_fn=foreground
    )
    os.close(end)
    shown = ""
    try:
        while moment not in shown:
            shown += os.read(terminal, 1000).decode(errors="replace")
        # As a terminal does: to all that runs in it.
        os.killpg(demo.pid, signal.SIGINT)
        with contextlib.suppress(OSError):
            while piece := os.read(terminal, 1000):
                shown += piece.decode(errors="replace")
        assert demo.wait(100) == 130
    finally:
        if demo.poll() is None:
            os.killpg(demo.pid, signal.SIGKILL)
        os.close(terminal)
    # Python itself reports that it was interrupted while it started, before any of our code runs.
    assert "Traceback" not in shown or "Python runtime state: " in shown
    if arguments:
        assert "To start it again: moeplace serve --no-auth --db " in shown
        url = re.search(r"http://127\.0\.0\.1:\d+", shown)
        assert url is not None
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"{url[0]}/health", timeout=10)


@pytest.mark.timeout(290)
@pytest.mark.long
def test_serving_in_both_modes_gives_the_same_tokens_under_torchrun(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    small = ["--nodes", "2", "--solver", "exflow", "--prompts", "2", "--prompt-tokens", "8", "--new-tokens", "6"]
    printed = torchrun_example("serve_context_coherent.py", 2, tmp_path, "--out", "run", *small)
    assert "the same tokens in all three" in printed
    rows = [
        line.split(" | ") for line in printed.splitlines() if "dispatch_combine" in line or "context_coherent" in line
    ]
    assert [row[0] for row in rows] == [
        "| index order, dispatch_combine",
        "| plan, dispatch_combine",
        "| plan, context_coherent",
    ]
    assert [float(row[5]) > 0 for row in rows] == [False, False, True]
