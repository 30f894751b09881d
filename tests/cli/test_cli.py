"""The program as a whole: exit codes, pure stdout, one-line errors, start-up, and the small commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_runs import CLUSTER, JUDGED, run, toy_model, toy_trace_folder

import moeplace as mp
from moeplace.cli.output import Column, Table, plain


@pytest.fixture(autouse=True)
def _own_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEPLACE_DB", str(tmp_path / "store.db"))


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_trace_folder(tmp_path_factory.mktemp("toy") / "trace", toy_model())


def program(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The real program, in a process of its own."""
    command = [sys.executable, "-m", "moeplace.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_refusal_is_one_line_on_stderr_and_exit_code_1() -> None:
    ended = program("topology", "show", "h10-hgx")
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert "did you mean 'h100-sxm'" in ended.stderr


def test_wrong_usage_is_exit_code_2() -> None:
    ended = program("solve", "trace", "--solver", "eplb")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "--topology" in ended.stderr


@pytest.mark.slow
def test_nothing_but_data_on_stdout_in_a_pipe(trace: Path) -> None:
    ended = program("compare", trace, *CLUSTER, *JUDGED, "--solvers", "contiguous,eplb", "--json")
    assert ended.returncode == 0, ended.stderr
    assert '"rows"' in ended.stdout
    assert ended.stdout.startswith("{")
    assert ended.stdout.endswith("}\n")
    # On a busy machine the time spent so far is told now and then.
    assert not [line for line in ended.stderr.splitlines() if not line.endswith("so far")]


def test_help_needs_neither_heavy_libraries_nor_a_database() -> None:
    heavy = "torch pyarrow scipy pulp sqlalchemy jinja2 transformers highspy joblib"
    code = (
        "import sys, typer\nfrom moeplace.cli.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        f"loaded = [name for name in {heavy.split()!r} if name in sys.modules]\nassert not loaded, loaded"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_a_reader_that_stops_early_is_no_traceback(trace: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "moeplace.cli", "stats", str(trace)]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr


def test_version() -> None:
    assert run("--version").out == f"moeplace {mp.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stats", "no-such-folder"), "no-such-folder: no such file or folder"),
        (("solve", "no-such-folder", *CLUSTER, "--solver", "eplb"), "no such file or folder"),
        (("evaluate", "no-such.json", "no-such-folder"), "no-such.json: no such file"),
        (("evaluate", "some-name", "no-such-folder"), "not a file, and not a stored plan either"),
        (("topology", "show", "missing.yaml"), "missing.yaml: no such file"),
        (("plans", "show", "nothing"), "nothing"),
    ],
)
def test_what_is_not_there_is_named(arguments: tuple[str, ...], message: str) -> None:
    ended = run(*arguments)
    assert ended.code == 1
    assert ended.out == ""
    assert message in ended.err
    assert ended.err.startswith("error: ")


def test_an_unknown_solver_names_the_nearest(trace: Path) -> None:
    ended = run("solve", trace, *CLUSTER, "--solver", "epbl", "--no-store", "-o", "plan.json")
    assert ended.code == 1
    assert "did you mean 'eplb'" in ended.err


def test_an_option_that_is_not_of_the_solver_is_refused(trace: Path) -> None:
    assert "'eplb' has no option 'colour'" in run("solve", trace, *CLUSTER, "-s", "eplb:colour=red").err
    wrong = "option hierarchical is 'banana', it takes true or false or none"
    assert wrong in run("solve", trace, *CLUSTER, "-s", "eplb:hierarchical=banana").err
    assert "'colour' is not OPTION=VALUE" in run("solve", trace, *CLUSTER, "-s", "eplb:colour").err


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not routing")
    ended = run("stats", path)
    assert ended.code == 1
    assert "no known format" in ended.err


def test_a_disk_error_is_one_line(trace: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    ended = run("stats", trace, "-o", blocked / "statistics.npz")
    assert ended.code == 1
    assert ended.err.startswith("error: ")
    assert str(blocked) in ended.err


def test_topologies_are_listed_shown_and_written(tmp_path: Path) -> None:
    presets = run("topology", "list", "--json").data["rows"]
    assert {"h100-sxm", "a100-sxm"} <= {row["name"] for row in presets}
    path = tmp_path / "cluster.yaml"
    assert run("topology", "write", "h100-hgx", "--nodes", "2", "-o", path).code == 0
    assert mp.Topology.load(path) == mp.Topology.preset("h100-hgx", nodes=2)
    shown = run("topology", "show", path, "--json").data
    assert len(shown["nodes"]) == 2
    assert "0 to 15" in run("topology", "show", path).out
    assert "--nodes" in run("topology", "show", path, "--nodes", "2").err


def test_stats_counts_a_trace_and_writes_statistics_that_read_the_same(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    first = run("stats", trace, "-o", path, "--json").data
    assert first["tokens"] == 480
    assert [layer["tokens"] for layer in first["layers"]] == [480, 480, 480]
    assert {row["workload"]: row["share"] for row in first["workloads"]} == {"chat": 0.5, "code": 0.5}
    assert run("stats", path, "--json").data == first


def test_top_successors_are_counted_by_hand(tmp_path: Path) -> None:
    # Expert 0 is always followed by 1; 1 by each of eight alike: of 16 tokens, 8 + 4 go to four likeliest successors.
    ids = np.zeros((16, 2, 1), dtype=np.int64)
    ids[:8, 1, 0] = 1
    ids[8:, 0, 0] = 1
    ids[8:, 1, 0] = np.arange(8)
    from moeplace.profiler.trace_files import write_trace

    write_trace(mp.RoutingTrace.from_arrays(ids, 8), tmp_path / "t")
    layers = run("stats", tmp_path / "t", "--json").data["layers"]
    assert layers[0]["top_successors"] == pytest.approx(12 / 16)
    assert layers[1]["top_successors"] is None
    assert layers[0]["load_max_mean"] == pytest.approx(4.0)
    assert layers[0]["idle_experts"] == 6


def test_import_gives_a_record_the_models_layer_numbers(tmp_path: Path) -> None:
    source, out = tmp_path / "trace.npy", tmp_path / "trace"
    np.save(source, np.random.default_rng(0).integers(4, size=(50, 3)))
    config = tmp_path / "config.json"
    config.write_text(
        '{"model_type": "toy", "num_hidden_layers": 4, "first_k_dense_replace": 1, "n_routed_experts": 4, '
        '"num_experts_per_tok": 1, "hidden_size": 8, "moe_intermediate_size": 8}'
    )
    done = run("import", source, "--model", config, "-o", out, "--json").data
    assert done["moe_layers"] == [1, 2, 3]
    assert done["stored_as"]
    refused = run("solve", source, "--model", config, *CLUSTER, "-s", "eplb", "--held-out", "0")
    assert "numbers its layers 0-2, the model's MoE layers are 1-3" in refused.err
    assert run("solve", out, *CLUSTER, "-s", "eplb", "--held-out", "0").code == 0


def test_layers_that_are_kept_are_a_part_of_the_model(tmp_path: Path) -> None:
    """A stage of a pipeline: the model's other layers are no concern of its plan."""
    config = tmp_path / "config.json"
    fields = {"model_type": "mixtral", "num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 2}
    config.write_text(json.dumps(fields | {"hidden_size": 64, "intermediate_size": 128}))
    np.save(tmp_path / "loads.npy", np.random.default_rng(0).random((5, 8)))
    common = ("import", tmp_path / "loads.npy", "--model", config, "-o", tmp_path / "part.npz", "--json")
    kept = run(*common, "--keep-layers", "2-3")
    assert (kept.code, kept.data["moe_layers"]) == (0, [2, 3]), kept.err
    read = mp.read_statistics(tmp_path / "part.npz")
    assert read.model is not None
    assert (read.model.layers, read.model.hidden_size) == (2, 64)
    assert "of another model" in run(*common, "--keep-layers", "3-4").err
    # Behind a dense layer 0, a record that begins with 0 counts MoE layers alone.
    config.write_text(json.dumps(fields | {"hidden_size": 64, "intermediate_size": 128, "first_k_dense_replace": 1}))
    kept = run(*common, "--keep-layers", "1-2")
    assert (kept.code, kept.data["moe_layers"]) == (0, [2, 3]), kept.err
    ended = run(*common)
    assert "Recorded only: 3-4" in ended.err, ended.err
    others = run(*common[:-1], "--drop-layers", "3-4", "--moe-layers", "7-9")
    assert (others.code, "7-9 are no MoE layers" in others.err) == (0, True)


def test_import_refuses_a_record_of_another_model(tmp_path: Path, trace: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        '{"num_hidden_layers": 3, "num_experts": 16, "num_experts_per_tok": 2, "hidden_size": 8, '
        '"intermediate_size": 8}'
    )
    ended = run("import", trace, "--model", config, "-o", tmp_path / "out")
    assert ended.code == 1
    assert "experts is 8, the model's is 16" in ended.err
    assert not (tmp_path / "out").exists()


def test_json_holds_only_what_json_can() -> None:
    value = {"a": np.float32(1.5), "b": [np.nan, np.inf], "c": np.arange(2), "d": Path("x"), "e": (True, None)}
    assert plain(value) == {"a": 1.5, "b": [None, None], "c": [0, 1], "d": "x", "e": [True, None]}


def test_tables_in_a_pipe_are_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    from moeplace.cli.output import emit

    emit([], Table([Column("a", "a", right=False)], [{"a": "x" * 500}]), as_json=False)
    assert "x" * 500 in capsys.readouterr().out


def test_a_narrow_terminal_gets_every_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moeplace.cli.output import emit

    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    columns = [Column("name", "plan", right=False)] + [Column(f"f{i}", f"figure\nnumber {i}") for i in range(12)]
    rows = [{"name": name} | {f"f{i}": f"{name}{i:04}" for i in range(12)} for name in ("a", "b")]
    emit([], Table(columns, rows), as_json=False)
    shown = capsys.readouterr().out
    assert all(str(value) in shown for row in rows for value in row.values())
    assert max(map(len, shown.splitlines())) <= 60


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("stats", "trace"),
        ("solve", "trace", *CLUSTER, "-s", "eplb", "--no-store", "-o", "plan.json"),
        ("compare", "trace", *CLUSTER, *JUDGED, "--solvers", "eplb,random,round_robin,contiguous", "--seed", 2),
        ("evaluate", "plan.json", "trace", "--steps", 8),
        ("plans", "list"),
        ("topology", "list"),
        ("topology", "kernels", "--gpu", "h100-sxm", "--for", "vllm"),
    ],
    ids=lambda arguments: " ".join(map(str, arguments[:2])),
)
def test_tables_fit_80_columns_in_a_pipe(
    arguments: tuple[object, ...], trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace").symlink_to(trace)
    assert run("solve", "trace", *CLUSTER, "-s", "eplb", "-o", "plan.json").code == 0
    ended = run(*arguments)
    assert ended.code == 0, ended.err
    assert max(map(len, ended.out.splitlines())) <= 80


def test_times_that_differ_read_differently(capsys: pytest.CaptureFixture[str]) -> None:
    from moeplace.cli.output import emit, milliseconds

    column = Column("seconds", "ms", milliseconds)
    emit([], Table([column], [{"seconds": 78.64e-6}, {"seconds": 78.66e-6}, {"seconds": 0.9}]), as_json=False)
    assert capsys.readouterr().out.split()[2:] == ["0.0786", "0.0787", "900.0000"]
    emit([], Table([column], [{"seconds": 0.5}, {"seconds": 0.5}, {"seconds": 0.9}]), as_json=False)
    assert capsys.readouterr().out.split()[2:] == ["500.000", "500.000", "900.000"]


def test_stats_begins_with_what_the_record_is(trace: Path) -> None:
    lines = run("stats", trace).out.splitlines()
    assert lines[0].split() == ["record", "480", "tokens", "in", "2", "windows,", "2", "workloads"]
    assert lines[2].startswith("busiest expert")


def test_json_names_its_schema(trace: Path) -> None:
    assert run("stats", trace, "--json").data["schema"] == "moeplace/stats/1"
    assert run("topology", "show", "h100-sxm", "--json").data["schema"] == "moeplace/topology-show/1"


@pytest.mark.parametrize(
    "listed", ["plans list", "tokens list", "topology list", "topology kernels", "topology transfers"]
)
def test_json_of_lists_names_its_schema_too(listed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPLACE_DB", str(tmp_path / "plans.db"))
    data = run(*listed.split(), "--json").data
    assert data["schema"] == f"moeplace/{listed.replace(' ', '-')}/1"
    assert isinstance(data["rows"], list)
