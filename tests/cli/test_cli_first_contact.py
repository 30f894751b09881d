"""What a newcomer meets first: help, completion, the doctor, and whether a plan is worth it at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import CLUSTER, JUDGED, run, skewed_counts, toy_model, toy_trace_folder

import moeplace as mp
from moeplace.cli import completion, output
from moeplace.cli.document import commands
from moeplace.placement.progress import COMPILE_TIME

OLMOE = Path(__file__).resolve().parents[2] / "examples" / "data" / "olmoe_small"
PANELS = {
    "--json": "Output and store",
    "--db": "Output and store",
    "--store": "Output and store",
    "--seed": "Solving",
    "--certify": "Solving",
    "--execution": "Objective",
    "--risk": "Objective",
    "--held-out": "Steps and held-out routing",
    "--hidden-size": "Model",
    "--memory-reserve": "Cluster",
}


@pytest.fixture(autouse=True)
def _own_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEPLACE_DB", str(tmp_path / "store.db"))
    monkeypatch.delenv("MOEPLACE_VLLM_PLAN", raising=False)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_trace_folder(tmp_path_factory.mktemp("toy") / "trace", toy_model())


def test_options_that_commands_share_stand_in_the_same_panel() -> None:
    for path, command in commands():
        options = [param for param in command.params if param.param_type_name == "option"]
        for option in options:
            panel = PANELS.get(option.opts[0])
            if panel is not None and path != "moeplace serve":
                assert option.rich_help_panel == panel, f"{path} {option.opts[0]}"


def test_a_long_page_of_options_begins_with_few() -> None:
    for path, command in commands():
        options = [param for param in command.params if param.param_type_name == "option" and param.name != "help"]
        first = [option for option in options if not getattr(option, "rich_help_panel", None)]
        if len(options) > 20:
            assert 0 < len(first) <= 8, path


def test_what_is_written_is_named_output_everywhere() -> None:
    for path, command in commands():
        names = [name for param in command.params for name in param.opts]
        assert not {"--out", "--save"} & set(names), path
        if "--output" in names:
            assert "-o" in names, path


def test_slots_are_named_either_way(trace: Path, tmp_path: Path) -> None:
    asked = ("solve", trace, *CLUSTER, "-s", "eplb", "--no-store", "-o", tmp_path / "plan.json")
    assert run(*asked, "--redundant", 4).code == 0
    assert mp.Plan.load(tmp_path / "plan.json").num_slots == 12
    both = run(*asked, "--redundant", 4, "--slots", 12)
    assert "give --slots or --redundant, not both: --redundant 4 is --slots 12 for 8 experts" in both.err


def test_export_knows_every_engine_that_solving_knows(trace: Path, tmp_path: Path) -> None:
    run("solve", trace, *CLUSTER, "-s", "eplb", "--no-store", "-o", tmp_path / "plan.json")
    ended = run("export", tmp_path / "plan.json", "--for", "permute", "-o", tmp_path / "x.json")
    assert "moeplace permute CHECKPOINT --plan" in ended.err


def test_the_shell_is_offered_presets_solvers_engines_and_plans(trace: Path) -> None:
    assert completion.presets("h100-s") == ["h100-sxm"]
    assert completion.engines("vllm") == ["vllm", "vllm-ascend"]
    assert completion.solvers("eplb,ex") == ["eplb,exflow"]
    assert completion.plans("") == []
    assert run("solve", trace, *CLUSTER, "-s", "eplb", "--name", "mine").code == 0
    assert completion.plans("m") == ["mine"]
    assert completion.plans("other.json,m") == ["other.json,mine"]


COMPLETED = {"topology", "plan_topology", "engine", "solver", "solvers", "plan", "plans", "candidates", "current"}


def test_every_option_that_takes_one_of_them_offers_them() -> None:
    for path, command in commands():
        for param in command.params:
            if param.name in COMPLETED and path != "moeplace topologies remove":
                assert param._custom_shell_complete is not None, f"{path} {param.name}"


@pytest.mark.parametrize(
    ("shell", "typed"),
    [
        ("bash", {"COMP_WORDS": "moeplace solve trace --topology h200", "COMP_CWORD": "4"}),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "moeplace solve trace --topology h200"}),
        (
            "fish",
            {
                "_TYPER_COMPLETE_ARGS": "moeplace solve trace --topology h200",
                "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            },
        ),
    ],
)
def test_shells_complete_what_is_typed(shell: str, typed: dict[str, str]) -> None:
    environment = {**os.environ, "_MOEPLACE_COMPLETE": f"complete_{shell}", **typed}
    code = "import sys; sys.argv = ['moeplace']; from moeplace.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert re.findall(r"[\w-]*h200[\w-]*", done.stdout) == ["h200-sxm"], done.stderr


def test_the_doctor_says_what_is_here() -> None:
    done = run("doctor", "--json")
    assert done.code == 0
    assert done.data["extras"]["solve"] == []
    assert done.data["version"] == mp.__version__
    assert done.data["store"].startswith("sqlite:")
    assert "extra solve" in run("doctor").out


def test_the_doctor_compares_the_file_on_this_node_with_the_plan(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("mine", 0), ("other", 7)):
        plan = tmp_path / f"{name}.json"
        assert run("solve", trace, *CLUSTER, "-s", "random", "--seed", seed, "--name", name, "-o", plan).code == 0
    served = tmp_path / "map.json"
    assert run("export", "mine", "--for", "sglang", "-o", served).code == 0
    assert "is the plan mine" in " ".join(run("doctor", "--file", served, "--plan", "mine").out.split())
    done = run("doctor", "--file", served, "--plan", "other", "--json")
    assert done.code == 1
    assert "another map than the plan in" in done.data["wrong"][0]
    monkeypatch.setenv("MOEPLACE_VLLM_PLAN", str(tmp_path / "gone.json"))
    assert run("doctor").code == 1
    shutil.copy(tmp_path / "mine.json", tmp_path / "gone.json")
    assert run("doctor", "--plan", "mine").code == 0


@pytest.mark.slow
def test_advice_begins_with_the_verdict_and_ends_with_what_to_run(tmp_path: Path) -> None:
    cluster = ("-t", "a100-pcie", "--nodes", 2, "--devices-per-node", 4)
    asked = ("advise", OLMOE, *cluster, "--slots", 40, "--prefill", 2048, "--steps", 4, "--seconds", 1)
    done = run(*asked)
    assert done.code == 0, done.err
    assert done.out.startswith("WORTH IT for prefill 2048: the best plan (")
    assert "less time than index order" in " ".join(done.out.split())
    assert f"moeplace solve {OLMOE} --topology a100-pcie --nodes 2 --devices-per-node 4 --slots 40" in done.out
    # Of an engine that was not named nothing is guessed.
    assert "moeplace export plan.json --for ENGINE -o placement.json" in done.out


@pytest.mark.slow
def test_what_to_run_next_says_again_what_was_asked(trace: Path) -> None:
    asked = ("--slots", 12, "--batch", "decode:8@0.9", "--batch", "prefill:32@0.1", "--replica-choice", "nearest")
    done = run("advise", trace, *CLUSTER, *asked, "--for", "sglang", "--seconds", 0.5, "--steps", 4, "--json")
    solve, evaluate, export, _ = done.data["next"]
    for word in map(str, (*CLUSTER, *asked, "--for", "sglang", "--seconds", 0.5)):
        assert f" {'--topology' if word == '-t' else word} " in f"{solve} "
    assert f"--solver {done.data['best']} -o plan.json" in solve
    assert "--batch decode:8@0.9 --batch prefill:32@0.1" in evaluate
    assert export == "moeplace export plan.json --for sglang -o placement.json"


def test_advice_on_counts_says_what_counts_do_not_tell(tmp_path: Path) -> None:
    counts = skewed_counts(tmp_path / "counts.npz")
    sizes = ("--hidden-size", 64, "--ffn-size", 64)
    done = run("advise", counts, *CLUSTER, *sizes, "--solvers", "eplb", "--json")
    assert done.data["advice"][0].startswith("NOT WORTH IT for mix: the best plan")
    assert done.data["next"][0].startswith(f"moeplace solve {counts}")
    quiet = run("advise", counts, *CLUSTER, *sizes, "--solvers", "contiguous", *JUDGED)
    assert quiet.out.startswith("NOT WORTH IT for decode 8")


def test_the_time_left_counts_down_from_the_last_news_and_leaves_compiling_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(output, "_clock", lambda: now[0])
    work = output._Working("search")
    work.update("search", 0.0)
    now[0] = 102.0
    work.update("search", 0.2)
    assert work.time == "20%, about 8 s left"
    now[0] = 105.0
    assert work.time == "20%, about 5 s left"
    now[0] = 200.0
    assert work.time == "20%"
    COMPILE_TIME.begin()
    try:
        assert re.fullmatch(r"20%, compiling for \d+ s, which is once an installation", work.time)
    finally:
        COMPILE_TIME.end()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_at_a_terminal_time_goes_on_between_two_news() -> None:
    import pty

    terminal, side = pty.openpty()
    code = "import time; from moeplace.cli.output import working\nwith working('counting'):\n    time.sleep(2.5)"
    shown = ""
    with subprocess.Popen([sys.executable, "-c", code], stderr=side) as process:
        os.close(side)
        # Where nobody writes any more, reading ends in nothing or in an error.
        with contextlib.suppress(OSError):
            while part := os.read(terminal, 4096):
                shown += part.decode(errors="replace")
    os.close(terminal)
    assert process.returncode == 0
    assert len(set(re.findall(r"(\d+) s so far", shown))) > 1


@pytest.mark.parametrize("columns", [20, 40, 60])
def test_tables_in_pipes_keep_to_the_columns_that_are_asked_for(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in (("topology", "list"), ("topology", "show", "h100-hgx"), ("stats", OLMOE)):
        lines = run(*command).out.splitlines()
        words = [line for line in lines if len(line) > columns and len(line.split()) > 2]
        assert not words, command
        assert any("h100" in line or "expert" in line for line in lines)


def test_columns_that_say_nothing_are_not_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    for columns in ("80", "0", "", "many", "-5"):
        monkeypatch.setenv("COLUMNS", columns)
        asked[columns] = run("topology", "list").out
    assert len(set(asked.values())) == 1
