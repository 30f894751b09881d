"""The examples run as their users would run them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import moeplace as mp

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
