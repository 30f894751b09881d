"""JSON Schemas of what commands print: one for each, as committed, and true of real outputs.

`cli_runs.Run.data` and `check_output` hold every output that any test reads to its schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runs import CLUSTER, JUDGED, check_output, run, skewed_counts, toy_model, toy_trace_folder
from pydantic import VERSION, ValidationError

from moeplace.cli.document import commands
from moeplace.cli.output import SCHEMA
from moeplace.cli.schemas import output_schema, output_types

FILES = Path(__file__).resolve().parents[2] / "docs" / "schemas"


def test_every_command_that_prints_json_has_a_schema_and_no_other() -> None:
    printing = {
        name.removeprefix("moeplace ").replace(" ", "-")
        for name, command in commands()
        if any("--json" in param.opts for param in command.params)
    }
    assert printing == set(output_types())


@pytest.mark.parametrize("name", output_types())
def test_the_committed_schema_is_current(name: str) -> None:
    if tuple(map(int, VERSION.split(".")[:2])) < (2, 14):
        pytest.skip("older releases of pydantic word the same schemas otherwise")
    file = FILES / f"{name}.{SCHEMA}.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written == output_schema(name), "run: python -m moeplace.cli schema -o docs/schemas"


def test_no_schema_is_left_over() -> None:
    current = {f"{name}.{SCHEMA}.json" for name in output_types()}
    assert current <= {file.name for file in FILES.iterdir()}
    assert all(file.name.split(".")[1].isdigit() for file in FILES.iterdir())


def test_schemas_are_printed_written_and_refused_by_name(tmp_path: Path) -> None:
    assert json.loads(run("schema", "solve").out) == output_schema("solve")
    assert run("schema").out.split() == sorted(output_types())
    assert run("schema", "-o", tmp_path / "schemas").code == 0
    assert len(list((tmp_path / "schemas").iterdir())) == len(output_types())
    refused = run("schema", "slove")
    assert refused.code == 1
    assert "did you mean solve?" in refused.err or "solve" in refused.err


def test_a_name_that_no_schema_tells_of_is_not_overlooked() -> None:
    data = run("topology", "list", "--json").data
    data["rows"][0]["colour"] = "green"
    with pytest.raises(ValidationError, match="colour"):
        check_output(data)
    del data["rows"][0]["colour"], data["rows"][0]["compute"]
    with pytest.raises(ValidationError, match="compute"):
        check_output(data)


@pytest.mark.slow
def test_outputs_that_no_other_test_reads_keep_to_their_schemas(tmp_path: Path) -> None:
    store, plan = ("--db", tmp_path / "store.db"), tmp_path / "plan.json"
    trace = toy_trace_folder(tmp_path / "trace", toy_model())
    counts = skewed_counts(tmp_path / "counts.npz")

    def data(*words: Any) -> Any:
        done = run(*words, "--json")
        assert done.code in (0, 1), done.err
        return done.data

    cheap = ("--solvers", "eplb", "--steps", "12")
    sizes = ("--hidden-size", "64", "--ffn-size", "128")
    data("solve", trace, *CLUSTER, "--solver", "eplb", "--decode", "8", "-o", plan, *store)
    data("solve", counts, *CLUSTER, *sizes, "--solver", "eplb", "--top-k", "2", "--decode", "8", *store)
    data("evaluate", plan, trace, *JUDGED, "--prefill", "32", *store)
    data("report", trace, *CLUSTER, *cheap, "--decode", "8", "-o", tmp_path / "report.html")
    data("advise", trace, *CLUSTER, *cheap, "--decode", "8")
    for pool in ("compare", "solve"):
        only = cheap if pool == "compare" else ("--solver", "eplb", *store)
        pools = data(pool, trace, *CLUSTER, *only, "--pool", "prefill", "--pool", "decode")["pools"]
        assert all("batches" in answer for answer in pools.values())
    data("export", plan, "--for", "sglang", "-o", tmp_path / "map.json", *store)
    entry = data("plans", "list", *store)["rows"][-1]
    shown = data("plans", "show", entry["id"], *store)
    assert shown["evaluations"]
    assert shown["exports"][0]["created"].endswith("Z")
    data("check", plan, "--running", tmp_path / "map.json")
    data("tokens", "add", "ci", "--role", "submit", "--days", "1", *store)
    [token] = data("tokens", "list", *store)["rows"]
    assert token["expires"].endswith("Z")
    data("stats", counts)
    data("import", counts, "-o", tmp_path / "again.npz", "--no-store")
    data("doctor", *store)
