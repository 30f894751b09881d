"""What the README tells a reader to type works as written."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import code

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def commands() -> list[str]:
    return [line for block in code(README, "sh") for line in block.splitlines() if line.startswith("moeplace ")]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the examples in it, so that their relative paths hold, and nothing written into the checkout."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def run(arguments: list[str], folder: Path) -> str:
    environment = {**os.environ, "MOEPLACE_DB": str(folder / "store.db"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_its_commands_run_in_the_order_they_stand_in(workplace: Path) -> None:
    for module in ("torch", "transformers"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"recording needs {module}")
    assert commands()
    for line in commands():
        # As written, but for shorter solves and training; `python` is the one that runs the tests.
        shorter = re.sub(r"--seconds \d+", "--seconds 0.5", line)
        shorter = re.sub(
            r"--steps \d+", "--steps 2 --batch 2 --record-tokens 2048 --text examples/train_moe.py", shorter
        )
        words = [sys.executable if word == "python" else word for word in shorter.split()]
        run([sys.executable, "-m", "moeplace.cli", *words[1:]], workplace)


def test_its_verdict_is_what_the_command_says(workplace: Path) -> None:
    (line,) = [line for line in commands() if line.startswith("moeplace advise ")]
    told = json.loads(run([sys.executable, "-m", "moeplace.cli", *line.split()[1:], "--json"], workplace))
    said = re.search(r"WORTH IT for prefill 4096: the best plan \(search\) takes ([0-9.]+)% less", TEXT)
    assert said is not None
    times = {row["solver"]: row["step_seconds_mean"] for row in told["rows"]}
    gain = 100 * (1 - times["search"] / times["contiguous"])
    assert abs(gain - float(said[1])) < 3.0
    assert times["search"] < times["eplb"]
    for name in ("contiguous", "eplb"):
        shown = re.search(r"step ms mean +([0-9.]+) +([0-9.]+)", TEXT)
        assert shown is not None
        assert f"{1e3 * times[name]:.3f}" == shown[1 if name == "contiguous" else 2]


def test_what_it_runs_next_is_what_the_command_advises(workplace: Path) -> None:
    (line,) = [line for line in commands() if line.startswith("moeplace advise ")]
    told = json.loads(run([sys.executable, "-m", "moeplace.cli", *line.split()[1:], "--json"], workplace))
    solve, _, export, _ = told["next"]
    position = commands().index(line)
    assert commands()[position + 1 : position + 3] == [solve, export]


def test_its_python_runs(workplace: Path) -> None:
    programs = [block for block in code(README, "python") if "import moeplace" in block]
    assert programs
    for program in programs:
        run([sys.executable, "-c", program.replace("seconds=5", "seconds=0.5")], workplace)


def test_what_it_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", TEXT)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
