"""The runner of benchmarks: what it lists, keeps and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from runner import PAGES, Report, benchmarks  # noqa: E402


def filled(folder: Path) -> Report:
    with (folder / "rows.jsonl").open("w") as sink:
        report = Report(sink)
        table = report.table("8 devices", ("plan", "load max/mean"), {"load max/mean": ".2f"})
        table.row("eplb", 1.126)
        table.row("none", None)
    return report


def test_rows_are_kept_as_json_with_all_their_digits(tmp_path: Path) -> None:
    filled(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[0] == {"table": "8 devices", "plan": "eplb", "load max/mean": 1.126}
    assert rows[1]["load max/mean"] is None


def test_a_page_gets_its_tables_between_their_markers_and_keeps_its_text(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: 8 devices -->\nold\n<!-- end of table -->\nafter\n")
    report = filled(tmp_path)
    for _ in range(2):
        report.write(page, "python -m benchmarks x")
    assert page.read_text() == (
        "before\n<!-- table: 8 devices -->\n\n| plan | load max/mean |\n| --- | --- |\n| eplb | 1.13 |\n| none | - |\n\n"
        "<!-- end of table -->\nafter\n"
    )


def test_a_page_without_a_place_for_a_table_is_left_as_it_is(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    with pytest.raises(SystemExit, match="no place for table '8 devices'"):
        filled(tmp_path).write(page, "")
    assert page.read_text() == "nothing here\n"


def test_a_note_is_written_where_the_page_has_its_place_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- table: won -->\n<!-- end of table -->\n")
    report = Report()
    report.note("won", "47 of 48")
    report.note("lost", "1 of 48")
    report.write(page, "")
    assert page.read_text() == "<!-- table: won -->\n\n47 of 48\n\n<!-- end of table -->\n"


def test_what_a_benchmark_finds_wrong_ends_the_run_after_its_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "engine_parsers", "--trtllm", str(tmp_path / "missing.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "| trtllm | ? | FAILED |" in done.stdout
    assert "missing.py" in done.stderr


def test_a_row_of_another_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 2 columns, the row 1 values"):
        filled(tmp_path).tables["8 devices"].row("eplb")


def test_every_benchmark_is_listed_with_what_it_measures() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name, line in benchmarks().items():
        assert line
        assert f"  {name} " in done.stdout
    assert "locality_front" in benchmarks()


def test_a_name_that_no_benchmark_has_ends_with_the_list() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nope"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no benchmark is called 'nope'" in done.stderr


@pytest.mark.parametrize("name", [name for name in benchmarks() if (PAGES / f"{name}.md").is_file()])
def test_result_pages_have_markers_that_close(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text()
    assert text.count("<!-- table: ") == text.count("<!-- end of table -->") > 0
