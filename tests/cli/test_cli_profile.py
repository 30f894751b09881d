"""`moeplace profile` around real scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import run

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
import torch
from transformers import MixtralConfig, MixtralForCausalLM

torch.manual_seed(0)
torch.set_num_threads(1)
config = MixtralConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
)
model = MixtralForCausalLM(config).eval()
with torch.no_grad():
    model(torch.randint(64, (3, 10)))
print("arguments", sys.argv[1:])
"""


def profiled(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moeplace.cli", "profile", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture
def script(tmp_path: Path) -> Path:
    pytest.importorskip("transformers", reason="recording needs transformers")
    path = tmp_path / "generate.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_is_recorded_as_it_stands(script: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    ended = profiled(tmp_path, "-o", trace, "--", sys.executable, script, "--out", "theirs", "--json")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "arguments ['--out', 'theirs', '--json']\n"
    counted = run("stats", trace, "--json").data
    assert (counted["tokens"], counted["experts"], counted["top_k"]) == (30, 4, 2)
    assert counted["moe_layers"] == [0, 1]
    # The trace knows its model: a plan needs no more.
    solved = run("solve", trace, "-t", "h100-hgx", "--devices-per-node", "2", "-s", "eplb", "--db", tmp_path / "s.db")
    assert solved.code == 0, solved.err


def test_the_scripts_exit_code_is_the_commands(tmp_path: Path) -> None:
    assert run("profile", "-o", tmp_path / "trace", sys.executable, "-c", "raise SystemExit(7)").code == 7


def test_a_script_without_a_model_is_refused(tmp_path: Path) -> None:
    ended = run("profile", "-o", tmp_path / "trace", "--", sys.executable, "-c", "pass")
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith("error: ")


def test_a_program_that_is_not_there_is_refused(tmp_path: Path) -> None:
    ended = run("profile", "-o", tmp_path / "trace", "--", "no-such-program")
    assert ended.code == 1
    assert "no-such-program" in ended.err
