"""The examples run as their users would run them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from torchrun_examples import torchrun_example

import moeplace as mp
from moeplace.db import Store

ROOT = Path(__file__).resolve().parents[1]


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


def test_placing_from_python_beats_index_order_and_saves_the_plan(tmp_path: Path) -> None:
    printed = run("place_from_python.py", folder=tmp_path)
    today, found = (float(line.split("step ")[1].split(" ms")[0]) for line in printed.splitlines()[:2])
    assert found < today
    plan = mp.Plan.load(tmp_path / "plan.json")
    assert plan.gap is not None
    assert f"{plan.gap:.1%}" in printed


def test_the_demo_compares_solves_exports_and_reports(tmp_path: Path) -> None:
    printed = run("demo.py", "--out", str(tmp_path / "demo"), folder=tmp_path)
    for solver in ("contiguous", "eplb", "exflow", "moetuner", "search"):
        assert solver in printed
    plan = mp.Plan.load(tmp_path / "demo" / "plan.json")
    exported = json.loads((tmp_path / "demo" / "init_expert_location.json").read_text())
    assert exported == {"physical_to_logical_map": plan.physical_to_logical.tolist()}
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "<html" in page
    assert 'src="http' not in page
    if find_spec("uvicorn") is not None:
        # Nobody is at a terminal here: it says where the service was and how to start it, and stops it.
        assert re.search(r"The service is ready \(200\): http://127.0.0.1:\d+", printed)
        assert "To start it: moeplace serve --db " in printed
        with Store.open(tmp_path / "demo" / "moeplace.db") as store:
            assert store.windows.totals("demo")[0] == 96
            assert store.deployments.get("demo").version == 1


@pytest.mark.timeout(290)
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
