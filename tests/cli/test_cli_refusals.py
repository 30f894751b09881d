"""What goes wrong on the command line: one line says what was given and what to do, before the work, never a traceback.

`run` raises whatever is no refusal, so that each case here fails where an exception gets through.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runs import CLUSTER, JUDGED, Run, run, skewed_counts, toy_model, toy_trace_folder

import moeplace as mp

SOLVE = ("solve", "TRACE", *CLUSTER, "--no-store", "-o", "DIR/new.json", "--seconds", "1")
COMPARE = ("compare", "TRACE", *CLUSTER, *JUDGED)
PARETO = ("pareto", "TRACE", *CLUSTER, *JUDGED, "--no-store", "-s", "eplb", "--redundant", "0")
WHATIF = ("whatif", "PLAN", "TRACE", *JUDGED, "--no-ready")
HUGE = 10**21


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A trace, counts and a plan, by the words that stand for them in the cases."""
    folder = tmp_path_factory.mktemp("inputs")
    trace = toy_trace_folder(folder / "trace", toy_model())
    counts = skewed_counts(folder / "counts.npz")
    plan = folder / "plan.json"
    assert run("solve", trace, *CLUSTER, "-s", "eplb", "--no-store", "-o", plan).code == 0
    return {"TRACE": str(trace), "COUNTS": str(counts), "PLAN": str(plan)}


@pytest.fixture(autouse=True)
def _own_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEPLACE_DB", str(tmp_path / "store.db"))


def ended(inputs: dict[str, str], folder: Path, *arguments: object) -> Run:
    """Runs a case: words in capitals stand for the inputs, DIR for an empty folder."""
    words = {**inputs, "DIR": str(folder)}

    def filled(argument: object) -> str:
        text = str(argument)
        for word, path in words.items():
            text = text.replace(word, path)
        return text

    return run(*map(filled, arguments))


def refused(inputs: dict[str, str], folder: Path, *arguments: object) -> str:
    """The refusal of a case: one line and exit code 1, or usage and 2; nothing on stdout, nothing written."""
    before = [path for path in sorted(folder.rglob("*")) if path.name != "store.db"]
    done = ended(inputs, folder, *arguments)
    assert done.code in (1, 2), done
    assert done.out == ""
    if done.code == 1:
        assert done.err.splitlines()[-1].startswith("error: "), done.err
    assert [path for path in sorted(folder.rglob("*")) if path.name != "store.db"] == before
    return " ".join(done.err.replace("│", " ").split())


SEEDED = {
    "solve": SOLVE,
    "evaluate": ("evaluate", "PLAN", "TRACE", "--no-store"),
    "evaluate counts": ("evaluate", "PLAN", "COUNTS", "--no-store"),
    "compare": COMPARE,
    "decide": ("decide", "TRACE", "--candidates", "PLAN"),
    "pareto": (*PARETO, "-o", "DIR/front"),
    "whatif": WHATIF,
    "report": ("report", *COMPARE[1:], "-o", "DIR/report.html"),
}


@pytest.mark.parametrize("command", SEEDED)
@pytest.mark.parametrize("seed", ["-1", HUGE, "1.5", "x"])
def test_a_seed_that_is_none_is_refused(command: str, seed: object, inputs: dict[str, str], tmp_path: Path) -> None:
    assert "--seed" in refused(inputs, tmp_path, *SEEDED[command], "--seed", seed)


def test_seeds_are_checked_in_python_too(inputs: dict[str, str]) -> None:
    trace = mp.read_trace(inputs["TRACE"])
    problem = mp.Problem(trace, mp.Topology.preset("h100-sxm", devices_per_node=4))
    for solver in ("eplb", "random", "search", "exflow"):
        with pytest.raises(mp.InputError, match=r"seed \(-1\) must be a whole number, 0 or more"):
            mp.solve(problem, solver, seed=-1)
    for call in (trace.decode_steps, trace.prefill_steps, trace.split):
        with pytest.raises(mp.InputError, match=r"seed \(-1\)"):
            call(seed=-1, **({"tokens": 8} if call == trace.prefill_steps else {}))


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ("search:proposals=abc", "option proposals is 'abc', it takes a whole number"),
        ("search:proposals=0", "proposals (0) must be at least 1"),
        ("search:batch=decode,step_tokens=x", "option step_tokens is 'x'"),
        ("search:step_tokens=8,step_tokens=9", "option step_tokens is given twice"),
        ("search:step_tokens=100000000", "must be from 1 to 10,000,000"),
        ("search:steps=100000000", "GB of memory"),
        ("search:certify=nan", "certify (nan)"),
        ("chain:step_tokens=100000000000", "must be from 1 to 10,000,000"),
        ("chain:steps=1000000000", "GB of memory"),
        ("chain:minimise=x", "'transitions' or 'step'"),
        ("moetuner:tolerance=x", "option tolerance is 'x', it takes a number"),
        ("moetuner:tolerance=-1", "tolerance (-1.0) must be at least 0"),
        ("moetuner:backend=x", "backend 'x' is unknown"),
        ("exflow:form=staged,backend=x", "backend 'x' is unknown"),
        ("exflow:form=staged;backend=cbc", "form 'staged;backend=cbc' is unknown"),
        ("eplb:hierarchical=banana", "it takes true or false or none"),
        ("eplb:hierarchical", "write eplb:OPTION=VALUE,OPTION=VALUE"),
        ("eplb:", "is not OPTION=VALUE"),
        ("eplb,search", "solver 'eplb,search' is unknown"),
        ("", "'' is empty, a value is expected; give one, or leave --solver out"),
    ],
)
def test_options_of_every_solver_are_checked(solver: str, message: str, inputs: dict[str, str], tmp_path: Path) -> None:
    assert message in refused(inputs, tmp_path, *SOLVE, "-s", solver)


@pytest.mark.parametrize("word", ["False", "0", "no", "off"])
def test_words_for_no_mean_no(word: str, inputs: dict[str, str], tmp_path: Path) -> None:
    done = ended(inputs, tmp_path, *SOLVE, "-s", f"eplb:hierarchical={word}", "--json")
    assert done.data["options"] == {"hierarchical": False, "seconds": 1.0}


@pytest.mark.parametrize("separator", [",", ":"])
def test_options_are_parted_by_commas(separator: str, inputs: dict[str, str], tmp_path: Path) -> None:
    done = ended(inputs, tmp_path, *SOLVE, "-s", f"chain:batch=prefill{separator}step_tokens=8", "--json")
    assert done.data["options"] == {"batch": "prefill", "step_tokens": 8, "seconds": 1.0}


def test_commas_part_solvers_and_their_options(inputs: dict[str, str], tmp_path: Path) -> None:
    done = ended(inputs, tmp_path, *COMPARE, "--solvers", "eplb:hierarchical=no,random", "--json")
    assert [row["solver"] for row in done.data["rows"]] == ["contiguous", "eplb:hierarchical=no", "random"]
    named = "exflow:form=staged,backend=cbc,warm_start=yes,eplb"
    done = ended(inputs, tmp_path, *COMPARE, "--solvers", named, "--seconds", "1", "--json")
    rows = [row["solver"] for row in done.data["rows"]]
    assert rows == ["contiguous", "exflow:form=staged,backend=cbc,warm_start=yes", "eplb"]
    assert "names no solver" in refused(inputs, tmp_path, *COMPARE, "--solvers", ",")


TOO_MUCH = [
    ("evaluate", "PLAN", "TRACE", "--no-store", "--decode", 100_000_000),
    ("evaluate", "PLAN", "TRACE", "--no-store", "--decode", HUGE),
    ("evaluate", "PLAN", "TRACE", "--no-store", "--prefill", HUGE),
    ("evaluate", "PLAN", "TRACE", "--no-store", "--steps", HUGE),
    ("evaluate", "PLAN", "TRACE", "--no-store", "--prefill", 8, "--steps", HUGE),
    (*COMPARE[:-4], "--decode", HUGE),
    (*COMPARE[:-4], "--steps", HUGE),
    ("whatif", "PLAN", "TRACE", "--no-ready", "--decode", HUGE),
    ("whatif", "PLAN", "COUNTS", "--no-ready", "--decode", HUGE),
    ("decide", "TRACE", "--candidates", "PLAN", "--decode", HUGE),
    ("decide", "TRACE", "--candidates", "PLAN", "--resamples", HUGE),
    ("solve", "TRACE", *CLUSTER, "--no-store", "-o", "DIR/new.json", "-s", "search", "--decode", HUGE),
    (*SOLVE, "-s", "eplb", "--slots", 100_000_000),
    (*SOLVE, "-s", "eplb", "--nodes", HUGE),
    (*SOLVE, "-s", "eplb", "--hidden-size", HUGE),
    (*SOLVE[:-2], "-s", "eplb", "--seconds", "inf"),
    (*SOLVE, "-s", "search", "--certify", "inf"),
    ("export", "PLAN", "--for", "sglang", "--no-store", "-o", "DIR/e.json", "--hidden-layers", 100_000_000),
    ("export", "PLAN", "--for", "sglang", "--no-store", "-o", "DIR/e.json", "--hidden-layers", HUGE),
    ("export", "PLAN", "--for", "trtllm", "--no-store", "-o", "DIR/e.yaml", "--extra-layers", 999_999_999_999),
    ("export", "PLAN", "--for", "trtllm", "--no-store", "-o", "DIR/e.yaml", "--extra-layers", "8-9999999999"),
    ("import", "COUNTS", "--no-store", "-o", "DIR/c.npz", "--drop-layers", "0-99999"),
    ("plans", "list", "--limit", HUGE),
    ("topology", "show", "h100-sxm", "--nodes", HUGE),
    ("topology", "write", "h100-sxm", "--nodes", HUGE, "-o", "DIR/t.yaml"),
]


@pytest.mark.parametrize("arguments", TOO_MUCH, ids=lambda arguments: " ".join(map(str, arguments))[:80])
def test_too_much_is_refused_before_it_is_begun(
    arguments: tuple[object, ...], inputs: dict[str, str], tmp_path: Path
) -> None:
    began = time.perf_counter()
    refused(inputs, tmp_path, *arguments)
    assert time.perf_counter() - began < 60


def test_a_refusal_of_memory_says_what_would_fit(inputs: dict[str, str], tmp_path: Path) -> None:
    asked = ("evaluate", "PLAN", "TRACE", "--no-store", "--decode")
    assert "must be from 1 to 10,000,000" in refused(inputs, tmp_path, *asked, HUGE)
    said = refused(inputs, tmp_path, *asked, 10_000_000, "--steps", 1_000_000)
    assert "1,000,000 steps of" in said
    assert "tokens would fit: " in said


EMPTY = [
    ("decide", "TRACE", "--candidates", ","),
    (*PARETO[:-1], "", "-o", "DIR/front"),
    ("import", "COUNTS", "--no-store", "-o", "DIR/c.npz", "--moe-layers", ""),
    ("import", "COUNTS", "--no-store", "-o", "DIR/c.npz", "--moe-layers", "3-1"),
]


@pytest.mark.parametrize("arguments", EMPTY, ids=lambda arguments: arguments[0])
def test_lists_of_nothing_are_refused(arguments: tuple[object, ...], inputs: dict[str, str], tmp_path: Path) -> None:
    refused(inputs, tmp_path, *arguments)


def test_a_front_without_points_is_no_success(inputs: dict[str, str], tmp_path: Path) -> None:
    done = ended(inputs, tmp_path, *PARETO[:-1], 100_000_000, "-o", "DIR/front")
    assert done.code == 1
    assert ": no plan." in done.out
    assert "none of the points asked for has a plan" in done.err


FILES = {
    "solve": (*SOLVE[:-4], "-s", "eplb", "-o"),
    "stats": ("stats", "TRACE", "-o"),
    "export": ("export", "PLAN", "--for", "sglang", "--no-store", "-o"),
    "report": ("report", *COMPARE[1:], "--solvers", "eplb", "-o"),
    "topology": ("topology", "write", "h100-sxm", "-o"),
    "calibrate": ("calibrate", "-o"),
    "import": ("import", "COUNTS", "--no-store", "-o"),
    "profile": ("profile", "-o"),
}
ENDINGS = {"topology": "t.yaml", "calibrate": "t.yaml", "import": "c.npz", "profile": "c.npz"}


@pytest.mark.slow
@pytest.mark.parametrize("command", FILES)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    command: str, inputs: dict[str, str], tmp_path: Path
) -> None:
    name = ENDINGS.get(command, "new.json")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / name)
    more = ("--", "python", "-c", "pass") if command == "profile" else ()
    for path, message in (
        (f"DIR/folder/{name}", "is a folder; name a file in it"),
        (f"DIR/missing/{name}", "make it first (mkdir -p"),
        (f"DIR/file/{name}", "is a file, not a folder"),
        (f"DIR/{name}", "is no file: what is written takes the place of a file"),
        (f"/proc/{name}", "/proc cannot be written to"),
        (f"~nobody-of-this-name/{name}", "the home folder is not known"),
        ("a" * 300 + name, "File name too long"),
    ):
        assert message in refused(inputs, tmp_path, *FILES[command], path, *more)


FOLDERS = {
    "compare": (*COMPARE, "--solvers", "eplb", "-o"),
    "pareto": (*PARETO, "-o"),
    "whatif": (*WHATIF[:-1], "-o"),
    "import": ("import", "TRACE", "--no-store", "-o"),
    "permute": ("permute", "DIR", "--plan", "PLAN", "--no-store", "-o"),
    "record": ("record", "--sglang", "http://127.0.0.1:1", "--seconds", "1", "-o"),
}


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    command: str, inputs: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for path, message in (
        ("DIR/file/deep/front", "is a file, not a folder"),
        ("/proc/front", "/proc cannot be written to"),
        ("~nobody-of-this-name/front", "the home folder is not known"),
    ):
        assert message in refused(inputs, tmp_path, *FOLDERS[command], path)


def test_a_recording_is_never_written_over(inputs: dict[str, str], tmp_path: Path) -> None:
    for command in (
        ("import", "TRACE", "--no-store"),
        ("record", "--sglang", "http://127.0.0.1:1", "--seconds", "1"),
    ):
        assert "already holds a recording" in refused(inputs, tmp_path, *command, "-o", "TRACE")
    (tmp_path / "placed").mkdir()
    said = refused(inputs, tmp_path, "permute", "DIR", "--plan", "PLAN", "--no-store", "-o", "DIR/placed")
    assert "is there already" in said


@pytest.mark.slow
def test_home_is_understood_wherever_a_path_is(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    toy_trace_folder(tmp_path / "trace", toy_model())
    assert run("topology", "write", "h100-sxm", "--devices-per-node", 4, "-o", "~/t.yaml").code == 0
    assert run("solve", "~/trace", "-t", "~/t.yaml", "-s", "eplb", "--no-store", "-o", "~/plan.json").code == 0
    assert (tmp_path / "plan.json").is_file()
    assert run("evaluate", "~/plan.json", "~/trace", "--no-store").code == 0
    assert run("decide", "~/trace", "--candidates", "~/plan.json,~/plan.json", "--resamples", 80).code == 0
    compared = run("compare", "~/trace", "-t", "~/t.yaml", *JUDGED, "--solvers", "eplb", "--plans", "~/plan.json")
    assert compared.code == 0
    assert run("export", "~/plan.json", "--for", "sglang", "--db", "~/s.db", "-o", "~/e.json").code == 0
    assert run("check", "~/plan.json", "--running", "~/e.json").code == 0
    assert (tmp_path / "s.db").is_file()


def test_a_database_that_is_none_and_a_name_that_is_taken_are_told_before_the_work(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    solve = (*SOLVE[:-5], "-o", "DIR/new.json", "-s", "eplb")
    assert "no such folder for the database" in refused(inputs, tmp_path, *solve, "--db", "DIR/nowhere/s.db")
    evaluate = ("evaluate", "PLAN", "TRACE", "--db", "DIR/nowhere/s.db")
    assert "no such folder for the database" in refused(inputs, tmp_path, *evaluate)
    assert ended(inputs, tmp_path, *solve, "--name", "mine").code == 0
    (tmp_path / "new.json").unlink()
    assert "the name 'mine' is taken" in refused(inputs, tmp_path, *solve, "--seed", 3, "--name", "mine")
    assert "'' is empty, a value is expected" in refused(inputs, tmp_path, *solve, "--name", "")


def test_what_could_not_be_stored_is_still_shown(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeplace.db import Store

    def full(*_: object, **__: object) -> None:
        raise mp.StoreError("the disk is full")

    # A disk that fills up while the solver runs.
    monkeypatch.setattr(Store, "add_plan", full)
    solve = (*SOLVE[:-5], "-s", "eplb", "-o", "DIR/new.json")
    done = ended(inputs, tmp_path, *solve)
    assert done.code == 1
    assert "proven bound" in done.out
    assert f"error: the result was not stored, it is in {tmp_path / 'new.json'}: the disk is full" in done.err
    assert mp.Plan.load(tmp_path / "new.json")
    done = ended(inputs, tmp_path, "evaluate", "PLAN", "TRACE", "--steps", 4)
    assert done.code == 1
    assert "step ms" in done.out


ON_A_FULL_DISK = {
    "solve": (*SOLVE[:-4], "-s", "eplb", "-o", "DIR/new.json"),
    "compare": (*COMPARE, "--solvers", "eplb", "-o", "DIR/plans"),
    "report": ("report", *COMPARE[1:], "--solvers", "eplb", "-o", "DIR/report.html"),
    "stats": ("stats", "TRACE", "-o", "DIR/counts.npz"),
    "pareto": (*PARETO, "-o", "DIR/front"),
    "whatif": (*WHATIF[:-1], "-s", "eplb", "--lose", "device:1", "-o", "DIR/plans"),
}


@pytest.mark.parametrize("command", ON_A_FULL_DISK)
def test_what_a_full_disk_does_not_take_is_still_shown(
    command: str, inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    done = ended(inputs, tmp_path, *ON_A_FULL_DISK[command])
    assert done.code == 1
    assert len(done.out.splitlines()) > 4
    last = done.err.splitlines()[-1]
    assert last.startswith("error: the result was not written, it is only shown: "), done.err
    assert "the disk is full; free some space" in last
    assert str(tmp_path) in last
    assert [path.name for path in tmp_path.iterdir() if path.name != "store.db"] == []


NOTHING_LEFT = {
    "trace": ("import", "TRACE", "--no-store", "-o", "DIR/a/b/trace"),
    "counts": ("import", "COUNTS", "--no-store", "-o", "DIR/new.npz"),
    "export": ("export", "PLAN", "--for", "sglang", "--no-store", "-o", "DIR/e.json"),
    "topology": ("topology", "write", "h100-sxm", "-o", "DIR/t.yaml"),
    "schema": ("schema", "-o", "DIR/a/schemas"),
    "plot": ("plot", "PLAN", "TRACE", "-o", "DIR/p.svg"),
}


@pytest.mark.parametrize(
    ("command", "call"),
    [
        *((command, call) for command in NOTHING_LEFT for call in ("fsync", "replace")),
        *((command, "mkdir") for command in ("trace", "schema")),
    ],
)
def test_a_full_disk_leaves_nothing_half_written(
    command: str, call: str, inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: object, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path if isinstance(path, str) else None)

    monkeypatch.setattr(os, call, full)
    said = refused(inputs, tmp_path, *NOTHING_LEFT[command])
    assert "the disk is full; free some space" in said


def test_a_trace_of_several_shards_is_there_whole_or_not_at_all(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, fsync = iter([True, True]), os.fsync

    def filling_up(handle: int) -> None:
        if next(left, False):
            return fsync(handle)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("moeplace.profiler.trace_files.ROWS_PER_SHARD", 100)
    monkeypatch.setattr(os, "fsync", filling_up)
    (tmp_path / "there").mkdir()
    for folder in ("new/trace", "there"):
        left = iter([True, True])
        assert "the disk is full" in refused(inputs, tmp_path, "import", "TRACE", "--no-store", "-o", f"DIR/{folder}")
    monkeypatch.setattr(os, "fsync", fsync)
    assert ended(inputs, tmp_path, "import", "TRACE", "--no-store", "-o", "DIR/there").code == 0
    assert len(list((tmp_path / "there").iterdir())) > 2


def test_refusals_of_an_engines_options_name_them_as_they_were_given(inputs: dict[str, str], tmp_path: Path) -> None:
    for engine, option, value, told in (
        ("trtllm", "--extra-layers", "0", "--extra-layers: layer 0 is in the plan"),
        ("trtllm", "--extra-layers", "99999", "--extra-layers: layer (99999) must be at most 65536"),
        ("sglang", "--extra-layers", "61", "has no option --extra-layers; it is for trtllm; leave it out"),
        ("trtllm", "--hidden-layers", "61", "has no option --hidden-layers; it is for sglang, sglang-lp, vllm"),
        ("sglang", "--hidden-layers", "2", "--hidden-layers (2) must exceed the last MoE layer"),
        ("vllm", "--hidden-layers", "9", "--hidden-layers goes with form 53022"),
        ("vllm", "--form", "1", "--form '1' is none of"),
        ("sglang", "--form", "49572", "has no option --form; it is for vllm"),
        ("sglang-lp", "--part", "all", "--part 'all' is neither"),
    ):
        export = ("export", "PLAN", "--for", engine, "--no-store", "-o", "DIR/e.json")
        assert told in refused(inputs, tmp_path, *export, option, value)


def test_refusals_of_sizes_name_the_options_that_gave_them(inputs: dict[str, str], tmp_path: Path) -> None:
    for option, value, told in (
        ("--top-k", HUGE, f"--top-k ({HUGE}) must not exceed"),
        ("--groups", 3, "by --groups (3)"),
        ("--expert-dtype", "fp7", "--expert-dtype ('fp7') must be one of"),
        ("--risk", "luck", "--risk ('luck') must be"),
        ("--tokens-per-gpu", HUGE, "--tokens-per-gpu: "),
        ("--batch", "decode:0", "--batch: "),
        ("--devices-per-node", 99, "--devices-per-node (99) must be between 1 and 8"),
    ):
        assert told in refused(inputs, tmp_path, *SOLVE, "-s", "eplb", option, value)


def test_a_plan_that_a_full_disk_does_not_take_is_in_the_database(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    done = ended(inputs, tmp_path, *(word for word in ON_A_FULL_DISK["solve"] if word != "--no-store"))
    [stored] = run("plans", "list", "--json").data["rows"]
    assert f"error: the result was not written, it is stored as {stored['id']}: " in done.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_standard_output_that_takes_nothing_is_told_in_words() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "moeplace.cli", "topology", "list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: no space is left where this output, or a temporary file, goes; free some, then repeat\n"
    )


def test_a_folder_where_a_file_is_read_is_called_one(inputs: dict[str, str], tmp_path: Path) -> None:
    for command in (("check", "PLAN", "--running", "DIR"), ("topology", "show", "DIR/t.yaml")):
        (tmp_path / "t.yaml").mkdir(exist_ok=True)
        assert "is a folder; name a file" in refused(inputs, tmp_path, *command)


def test_refusals_name_the_options_that_are_wrong(inputs: dict[str, str], tmp_path: Path) -> None:
    assert "--max-moved counts from a plan: give it as --current" in refused(
        inputs, tmp_path, *SOLVE, "-s", "eplb", "--max-moved", "5GB"
    )
    assert "--memory-reserve '200GB' leaves experts no memory: a device has 80 GB" in refused(
        inputs, tmp_path, *SOLVE, "-s", "eplb", "--memory-reserve", "200GB"
    )


def test_a_check_that_finds_nothing_shows_no_table(inputs: dict[str, str], tmp_path: Path) -> None:
    assert ended(inputs, tmp_path, "export", "PLAN", "--for", "sglang", "--no-store", "-o", "DIR/e.json").code == 0
    done = ended(inputs, tmp_path, "check", "PLAN", "--running", "DIR/e.json")
    assert " ".join(done.out.split()) == f"{tmp_path / 'e.json'}: its map is the plan's."


def test_devices_without_experts_are_warned_of(inputs: dict[str, str], tmp_path: Path) -> None:
    wide = ("--topology", "h100-sxm", "--nodes", 2, "--devices-per-node", 8)
    done = ended(inputs, tmp_path, "solve", "TRACE", *wide, "-s", "eplb", "--no-store", "-o", "DIR/wide.json")
    assert "warning: 8 of 16 devices hold no expert in 8 slots a layer; give at least 16 slots" in done.err
    done = ended(inputs, tmp_path, "compare", "TRACE", *wide, *JUDGED, "--solvers", "eplb")
    assert "8 of 16 devices hold no expert" in done.err


def test_what_an_extra_brings_is_named_where_it_is_missing(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['torch'] = None; from moeplace.cli.app import main; main()"
    command = [sys.executable, "-c", hidden, "calibrate", "-o", str(tmp_path / "t.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: this needs torch, which is not installed: pip install 'moeplace[torch]'\n"


PRESSED = """
import os, signal
from moeplace.cli import run_comparison
from moeplace.cli.app import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
shown = run_comparison.solve_listener

def listener(update, label, seconds):
    listen = shown(update, label, seconds)
    pressed = []
    def heard(news):
        listen(news)
        if label == "search" and news.value is not None and not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)
    return heard

run_comparison.solve_listener = listener
main()
"""
"""Ctrl-C as soon as a search has a first plan."""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compare", "report"])
def test_ctrl_c_keeps_what_was_solved(command: str, inputs: dict[str, str], tmp_path: Path) -> None:
    output = {"compare": tmp_path / "plans", "report": tmp_path / "report.html"}[command]
    solvers = ("--solvers", "eplb,search,moetuner", "--seconds", "600", "-o", str(output))
    arguments = [word.replace("TRACE", inputs["TRACE"]) for word in (command, *COMPARE[1:], *solvers)]
    done = subprocess.run(
        [sys.executable, "-c", PRESSED, *arguments], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 130, done.stderr
    assert "interrupted: what was solved by then is judged and shown" in done.stderr
    assert "eplb" in done.stdout
    assert output.exists()


def _heard() -> None:
    """A shell may have had Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


HELD_UP = """
import builtins, os, signal, sys
from moeplace import __main__
real, pressed = builtins.__import__, []
def slow(name, *rest, **named):
    # As an import that C++ asked for: what breaks it off is taken for a missing module.
    if name == "WHERE" and not pressed:
        pressed.append(name)
        import importlib.abc
        class Finder(importlib.abc.MetaPathFinder):
            def find_spec(self, asked, path, target=None):
                if asked == "moeplace_pressed":
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Finder())
        try:
            real("moeplace_pressed")
        except BaseException as error:
            print(type(error).__name__, file=sys.stderr)
    return real(name, *rest, **named)
builtins.__import__ = slow
__main__.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["typer", "pyarrow.parquet"])
def test_ctrl_c_in_an_import_is_raised_after_it(where: str, inputs: dict[str, str], tmp_path: Path) -> None:
    arguments = ["decide", inputs["TRACE"], "--candidates", inputs["PLAN"], "--resamples", "100000"]
    done = subprocess.run(
        [sys.executable, "-c", HELD_UP.replace("WHERE", where), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=_heard,
    )
    assert (done.returncode, done.stdout) == (130, "")
    # The import ended as it would have without Ctrl-C.
    told = [line for line in done.stderr.splitlines() if not line.endswith("so far")]
    assert told == ["ModuleNotFoundError", "interrupted; nothing was written"]


def test_former_names_of_options_work_and_say_so(inputs: dict[str, str], tmp_path: Path) -> None:
    done = ended(inputs, tmp_path, *COMPARE, "--solvers", "eplb", "--save", "DIR/plans")
    assert done.code == 0
    assert "note: --save is called --output now" in done.err
    assert (tmp_path / "plans" / "eplb.json").is_file()
    assert ended(inputs, tmp_path, "import", "TRACE", "--no-store", "--out=DIR/again").code == 0
    assert (tmp_path / "again").is_dir()
    assert "--model is called --model-name now" in run("plans", "list", "--model", "nobody").err


@pytest.mark.parametrize("days", ["1e300", "nan", "inf", "-0.5"])
def test_a_token_that_would_never_be_over_or_be_over_at_once_is_refused(days: str, tmp_path: Path) -> None:
    refused = run("tokens", "add", "ci", "--days", days, "--db", tmp_path / "store.db")
    assert refused.code in (1, 2)
    assert "days" in refused.err


def test_advice_on_two_pools_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeplace.cli.commands.advise.run_comparison", lambda *_: pytest.fail("it was compared"))
    trace = toy_trace_folder(tmp_path / "trace", toy_model())
    refused = run("advise", trace, *CLUSTER, "--pool", "prefill", "--pool", "decode")
    assert refused.code == 1
    assert "advice is on one --pool" in refused.err


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_no_command_in_a_traceback(closed: str, tmp_path: Path) -> None:
    script = f'"$0" -m moeplace.cli topology show h100-sxm {closed}; echo "ended with $?" > {tmp_path}/ended'
    done = subprocess.run(["sh", "-c", script, sys.executable], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "ended").read_text() == "ended with 0\n"


SOLVED = ("solve", "TRACE", *CLUSTER, "-s", "eplb", "-o", "DIR/new.json")
SERVED = ("--server", "http://127.0.0.1:9")
IDLE = {
    "the model of a plan that says it": (
        ("export", "PLAN", "--for", "sglang", "-o", "DIR/a.json"),
        "--plan-model PLAN",
    ),
    "the cluster of a plan that says it": (("evaluate", "PLAN", "TRACE"), "--plan-topology h100-hgx"),
    "what no engine is started with": (("export", "PLAN", "--for", "moeplace", "-o", "DIR/a.json"), "--model-path M"),
    "a folder of a dump": (("check", "PLAN", "--running", "PLAN"), "--folder DIR"),
    "a key of a dump": (("check", "PLAN", "--running", "PLAN"), "--api-key K"),
    "a name that nothing is kept under": ((*SOLVED, "--no-store"), "--name new"),
    "a database that a service has": ((*SOLVED, *SERVED), "--db DIR/other.db"),
    "what a service keeps": (("import", "COUNTS", *SERVED), "--no-store"),
    "a service of a file": (("evaluate", "PLAN", "TRACE"), " ".join(SERVED)),
    "a service of files": (("decide", "TRACE", "--candidates", "PLAN"), " ".join(SERVED)),
    "a database of a service's plan": (("check", "stored", "--running", "PLAN", *SERVED), "--db DIR/other.db"),
    "a service without a plan": (("doctor",), " ".join(SERVED)),
    "what the recorder's requests would be": (
        ("record", "--sglang", "http://127.0.0.1:9", "--seconds", "1", "-o", "DIR/new.npz"),
        "--max-tokens 5",
    ),
    "the recorder's folder beside requests": (
        ("record", "--vllm", "http://127.0.0.1:9", "--prompts", "PLAN", "-o", "DIR/new"),
        "--folder DIR",
    ),
    "a sample of counts": (("stats", "COUNTS"), "--sample-tokens 5"),
    "pictures beside JSON": (("stats", "TRACE", "--json"), "--plot"),
    "how nothing is held out": ((*COMPARE, "--held-out", "0"), "--held-out-by step"),
    "a restart of no engine": (COMPARE, "--restart-seconds 60"),
    "a restart where experts move while it runs": ((*COMPARE, "--for", "moeplace"), "--restart-seconds 60"),
    "what the service's policy says": (
        ("decide", "--deployment", "chat", *SERVED, "--candidates", "PLAN"),
        "--horizon 50",
    ),
    "a record of no decision": (("decide", "TRACE", "--candidates", "PLAN"), "--record"),
    "who solves for nothing": (("whatif", "PLAN", "TRACE", *JUDGED, "--no-ready"), "--solver eplb"),
    "where nothing is solved for": (("whatif", "PLAN", "TRACE", *JUDGED, "--no-ready"), "--output DIR/new"),
    "what moves without a failure": (
        ("whatif", "PLAN", "TRACE", *JUDGED, "-s", "eplb", "--devices", "8"),
        "--max-moved 1GB",
    ),
    "steps of a record alone": (("plot", "TRACE"), "--decode 8"),
}


@pytest.mark.parametrize("case", IDLE)
def test_an_option_that_would_do_nothing_is_refused_by_name(case: str, inputs: dict[str, str], tmp_path: Path) -> None:
    line, option = IDLE[case]
    told = refused(inputs, tmp_path, *line, *option.split())
    assert f"{option.split()[0]} does nothing " in told
    assert "leave it out" in told


def test_what_variables_name_for_many_commands_is_refused_by_none(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", str(tmp_path))
    monkeypatch.setenv("MOEPLACE_ENGINE_KEY", "key")
    exported = tmp_path / "location.json"
    assert ended(inputs, tmp_path, "export", "PLAN", "--for", "sglang", "-o", exported).code == 0
    assert ended(inputs, tmp_path, "check", "PLAN", "--running", exported).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["solve", "compare", "evaluate", "report", "advise"])
def test_the_time_of_restarts_and_of_all_else_is_heeded_wherever_it_is_taken(
    command: str, inputs: dict[str, str], tmp_path: Path
) -> None:
    """By advise and report it was passed over, and outputs of solve asked for an option that it did not have."""
    engine = ("--for", "sglang", "--other-ms", "12", "--restart-seconds", "90")
    plan = tmp_path / "plan.json"
    skewed = (*CLUSTER, "--slots", "12", "--hidden-size", "4096", "--ffn-size", "4096", "--top-k", "2")
    solved = ended(
        inputs, tmp_path, "solve", "COUNTS", *skewed, "-s", "eplb", "--for", "sglang", "--no-store", "-o", plan
    )
    assert solved.code == 0
    line: tuple[object, ...] = {
        "solve": ("solve", "COUNTS", *skewed, "-s", "eplb", "-o", tmp_path / "other.json"),
        "evaluate": ("evaluate", plan, "COUNTS"),
        "report": ("report", "COUNTS", *skewed, "--solvers", "eplb", "-o", tmp_path / "report.html"),
    }.get(command, (command, "COUNTS", *skewed, "--solvers", "eplb"))
    verdict = ended(inputs, tmp_path, *line, *engine, "--json").data["verdict"]
    assert "With the other work of a step" in verdict["whole_step"]
    printed = " ".join(ended(inputs, tmp_path, *line, *engine).out.split())
    assert "With the other work of a step" in printed
    if command != "evaluate":  # Its plan is the engine's own, which saves nothing against that.
        assert "its 90 s are paid back in" in verdict["applied"]
        assert "its 90 s are paid back in" in printed
