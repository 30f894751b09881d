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

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.startswith("moeplace ")]


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


def test_its_comparison_shows_that_search_gains_on_contiguous(workplace: Path) -> None:
    (line,) = [line for line in commands() if line.startswith("moeplace compare ")]
    words = line.replace("contiguous,eplb,search", "search").split()
    rows = json.loads(run([sys.executable, "-m", "moeplace.cli", *words[1:], "--steps", "8", "--json"], workplace))[
        "rows"
    ]
    times = {row["solver"]: row["step_seconds_mean"] for row in rows}
    assert times["search"] < times["contiguous"]


def test_its_python_runs(workplace: Path) -> None:
    programs = [block for block in blocks("python") if "import moeplace" in block]
    assert programs
    for program in programs:
        run([sys.executable, "-c", program.replace("seconds=5", "seconds=0.5")], workplace)


def test_what_it_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
