"""What the README tells a reader to type runs as written, where only what it says is installed, and prints gains."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from clean_environment import CleanEnvironment, build_wheel
from pages import code

import moeplace as mp

# One process runs what stands below each other on the page.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
COMMANDS = [line for block in code(README, "sh") for line in block.splitlines() if line.startswith("moeplace ")]
RECORDING = [line for line in COMMANDS if line.startswith("moeplace profile ")]
"""What needs more than the first line of the page installs."""
[ADVICE] = [line for line in COMMANDS if line.startswith("moeplace advise ")]
JUDGING = [line for line in COMMANDS if line.split()[1] in ("advise", "solve", "compare", "evaluate", "report")]

Run = Callable[[str], str]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> CleanEnvironment:
    """What the page's first line installs."""
    [extras] = set(re.findall(r"'\.\[(\w+)\]'", code(README, "sh")[0]))
    folder = tmp_path_factory.mktemp("installed")
    return CleanEnvironment.made(folder / "env", build_wheel(folder), [extras])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples in it, so that their relative paths hold, and nothing written into the checkout."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture(scope="module")
def run(environment: CleanEnvironment, workplace: Path) -> Run:
    """Runs a line in a shell, and returns what it prints."""

    def typed(line: str) -> str:
        done = subprocess.run(
            ["sh", "-c", line],
            cwd=workplace,
            env=environment.variables(workplace),
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return typed


@pytest.fixture(scope="module")
def printed(environment: CleanEnvironment, run: Run) -> dict[str, str]:
    """What each command prints, run in the order they stand in, but for what needs more installed."""
    assert not (environment.packages / "torch").exists()
    return {line: run(line) for line in COMMANDS if line not in RECORDING}


def times(text: str) -> dict[str, float]:
    """Milliseconds a step of each plan of a printed comparison."""
    head = re.search(r"^ plan +(.*\S) *$", text, re.MULTILINE)
    row = re.search(r"^ step ms mean +(.*\S) *$", text, re.MULTILINE)
    assert head is not None
    assert row is not None
    return dict(zip(head[1].split(), map(float, row[1].split()), strict=True))


def without_figures(text: str) -> str:
    return " ".join(re.sub(r"\d[\d,.]*\d|\d", "N", text).replace("─", "").split())


def test_its_commands_print_gains(printed: dict[str, str]) -> None:
    assert len(JUDGING) >= 5
    for line in JUDGING:
        text = " ".join(printed[line].split())
        saved = re.search(
            r"([\d.]+) % less MoE time than sglang's EPLB on held-out steps \(95%: ([-\d.]+) to [\d.]+\)", text
        )
        assert saved is not None, f"{line}\n{printed[line]}"
        assert float(saved[2]) > 30.0, line
        others = re.search(r"At other steps, of so many tokens, against sglang's EPLB: (.*? faster)\.", text)
        assert others is not None, line
        assert "slower" not in others[1]
        if "step ms mean" in text:
            judged = times(printed[line])
            (found,) = judged.keys() - {"contiguous", "eplb"}
            assert judged[found] < 0.7 * min(judged["contiguous"], judged["eplb"]), line


def test_its_verdict_is_what_the_command_prints(printed: dict[str, str]) -> None:
    [shown] = [block for block in code(README, "text") if block.startswith("WORTH IT")]
    for part in shown.split("\n\n"):
        assert without_figures(part) in without_figures(printed[ADVICE])
    said, told = times(shown), times(printed[ADVICE])
    assert (said.pop("contiguous"), said.pop("eplb")) == (told["contiguous"], told["eplb"])
    assert said.pop("search") == pytest.approx(told["search"], rel=0.03)
    for before, after in ((r"takes ", "% less time"), (r"search: ", " % less MoE time")):
        [here], [there] = (
            re.findall(rf"{before}([\d.]+){after}", " ".join(text.split())) for text in (shown, printed[ADVICE])
        )
        assert float(here) == pytest.approx(float(there), abs=3.0)
    assert not said


def test_what_it_runs_next_is_what_the_command_advises(printed: dict[str, str]) -> None:
    advised = printed[ADVICE].partition("Next:")[2].splitlines()
    solve, _, export, *_ = [line.strip() for line in advised if line.strip()]
    position = COMMANDS.index(ADVICE)
    assert COMMANDS[position + 1 : position + 3] == [solve, export]


def test_its_commands_leave_the_files_they_name(printed: dict[str, str], workplace: Path) -> None:
    assert printed
    plan = mp.Plan.load(workplace / "plan.json")
    placement = json.loads((workplace / "placement.json").read_text())
    assert placement == {"physical_to_logical_map": plan.physical_to_logical.tolist()}
    assert "<html" in (workplace / "report.html").read_text()
    (export,) = [line for line in COMMANDS if line.startswith("moeplace export ")]
    for words in re.findall(r"--[\w-]+ \d+", TEXT.partition("`export` prints")[2].partition("\n")[0]):
        assert words in printed[export]


def test_its_python_runs_and_prints_a_gain(printed: dict[str, str], run: Run, workplace: Path) -> None:
    [program] = [block for block in code(README, "python") if "import moeplace" in block]
    (workplace / "program.py").write_text(program)
    assert "search" in run("python program.py")


def test_a_model_of_the_readers_own_is_recorded(
    environment: CleanEnvironment, printed: dict[str, str], run: Run, workplace: Path
) -> None:
    for module in ("torch", "transformers"):
        if find_spec(module) is None:
            pytest.skip(f"recording needs {module}")
    assert printed
    [line] = RECORDING
    environment.add(re.findall(r"`pip install -e '\.\[(\w+)\]'`\):\n\n```sh\nmoeplace profile", TEXT))
    run(line)
    trace = mp.read_trace(workplace / "trace")
    assert trace.num_tokens > 0
    assert trace.num_experts == 8


def test_what_it_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", TEXT)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
