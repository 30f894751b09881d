"""The one runner of benchmarks: finds them by name, reads their options, prints their tables, keeps their rows.

A benchmark is a module beside this one with two functions, and a docstring whose first line says what it measures:

    def add_arguments(parser: argparse.ArgumentParser) -> None: ...
    def run(options: argparse.Namespace, report: Report) -> None: ...

`run` hands each row to a table of the report as soon as it is measured. Rows are shown on stderr as they come, whole
tables on stdout in the end; `--json FILE` keeps every row as a line, and `--write` puts the tables into the result page
that names them:

    <!-- table: 8 devices -->
    ...
    <!-- end of table -->

The command stands in the page in the same way, under the name `command`, and a note under its name, where the page has
a place for it.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGES = HERE.parent / "docs" / "results"
SHARED = HERE.parents[1] / "shared" / "data"
"""Recorded routing of public models, where a checkout has it beside it."""


@dataclass
class Table:
    """Rows under column names; `formats` has a format specification for each column that wants one (".2f")."""

    name: str
    columns: tuple[str, ...]
    formats: dict[str, str] = field(default_factory=dict)
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    sink: Any = None

    def row(self, *values: Any) -> None:
        """Adds a row, a value a column."""
        if len(values) != len(self.columns):
            raise ValueError(
                f"table {self.name!r} has {len(self.columns)} columns, the row {len(values)} values: {values}"
            )
        self.rows.append(values)
        print(f"{self.name}: {' | '.join(self.cells(values))}", file=sys.stderr, flush=True)
        if self.sink is not None:
            entry = {"table": self.name, **dict(zip(self.columns, values, strict=True))}
            print(json.dumps(entry, default=float), file=self.sink, flush=True)

    def cells(self, values: tuple[Any, ...]) -> list[str]:
        """A row's texts: words as they are, None as a dash, numbers without a format in four digits."""
        return [
            "-"
            if value is None
            else value
            if isinstance(value, str)
            else format(value, self.formats.get(column, ",.4g" if isinstance(value, float) else ""))
            for column, value in zip(self.columns, values, strict=True)
        ]

    def markdown(self) -> str:
        """The table as a page has it."""
        lines = [self.columns, ("---",) * len(self.columns), *map(self.cells, self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass
class Report:
    """The tables and notes of one run. failure: what was found wrong; the run then ends with it and status 1."""

    sink: Any = None
    tables: dict[str, Table] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    failure: str | None = None

    def table(self, name: str, columns: Iterable[str], formats: Mapping[str, str] | None = None) -> Table:
        """The table of that name, made when first asked for. formats: by column."""
        if name not in self.tables:
            self.tables[name] = Table(name, tuple(columns), dict(formats or {}), sink=self.sink)
        return self.tables[name]

    def note(self, name: str, text: str) -> None:
        """Adds a line of text beside the tables."""
        self.notes.setdefault(name, []).append(text)
        print(f"{name}: {text}", file=sys.stderr, flush=True)
        if self.sink is not None:
            print(json.dumps({"note": name, "text": text}), file=self.sink, flush=True)

    def write(self, page: Path, command: str) -> None:
        """Puts each table between its markers in the page, and notes and the command where the page has theirs.

        Raises:
            SystemExit: the page lacks a table's markers; they are named, and nothing is written.
        """
        text = page.read_text(encoding="utf-8")
        notes = {"command": f"    {command}", **{name: "\n".join(lines) for name, lines in self.notes.items()}}
        for name, content in ({name: table.markdown() for name, table in self.tables.items()} | notes).items():
            pattern = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end of table -->)", re.DOTALL)
            if not pattern.search(text):
                if name in notes:
                    continue
                raise SystemExit(
                    f"{page}: no place for table {name!r}; put in\n<!-- table: {name} -->\n<!-- end of table -->"
                )
            text = pattern.sub(lambda match, content=content: f"{match[1]}\n{content}\n\n{match[2]}", text)
        page.write_text(text, encoding="utf-8")


def data_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--data`, which is asked for only where no recordings stand beside the checkout."""
    parser.add_argument(
        "--data",
        type=Path,
        default=SHARED if SHARED.is_dir() else None,
        required=not SHARED.is_dir(),
        help="folder of recorded routing",
    )


def child(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A benchmark run in a process of its own, whose memory, modules and failures are then its own."""
    command = [sys.executable, str(HERE), name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def benchmarks() -> dict[str, str]:
    """Name and first line of every module here that is a benchmark."""
    named = {}
    for path in sorted(HERE.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if {"add_arguments", "run"} <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            named[path.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    return named


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark that the arguments name; without any, lists what there is."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    known = benchmarks()
    if not given or given[0] in ("-h", "--help") or given[0] not in known:
        width = max(map(len, known))
        print("python -m benchmarks NAME [options]; NAME --help lists a benchmark's own\n")
        print("\n".join(f"  {name:<{width}}  {line}" for name, line in known.items()))
        raise SystemExit(0 if not given or given[0] in ("-h", "--help") else f"\nno benchmark is called {given[0]!r}")
    name = given[0]
    sys.path.insert(0, str(HERE))
    module = importlib.import_module(name)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    page = getattr(module, "PAGE", name)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append every row to this file, a JSON line each")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="PAGE",
        nargs="?",
        const=PAGES / f"{page}.md",
        help=f"put the tables into this page, between their markers (default: docs/results/{page}.md)",
    )
    options = parser.parse_args(given[1:])
    sink = options.json.open("a", encoding="utf-8") if options.json else None
    try:
        report = Report(sink)
        module.run(options, report)
    finally:
        if sink is not None:
            sink.close()
    for table in report.tables.values():
        print(f"\n{table.name}\n\n{table.markdown()}")
    for note, lines in report.notes.items():
        print(f"\n{note}\n\n" + "\n".join(lines))
    if options.write:
        report.write(options.write, f"python -m benchmarks {' '.join(given)}")
    if report.failure:
        raise SystemExit(report.failure)
