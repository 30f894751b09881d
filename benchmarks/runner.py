"""The one runner of benchmarks: finds them by name, reads their options, prints their tables, keeps their rows.

A benchmark is a module beside this one with two functions, and a docstring whose first line says what it measures:

    def add_arguments(parser: argparse.ArgumentParser) -> None: ...
    def run(options: argparse.Namespace, report: Report) -> None: ...

`run` hands each row to a table of the report as soon as it is measured. Rows are shown on stderr as they come, whole tables on stdout in
the end; `--json FILE` keeps every row as a line, and `--write` puts the tables into the result page that names them:

    <!-- table: 8 devices -->
    ...
    <!-- end of table -->
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import sys
from collections.abc import Sequence
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
        """A row's texts; None is a dash."""
        return [
            "-" if value is None else format(value, self.formats.get(column, ""))
            for column, value in zip(self.columns, values, strict=True)
        ]

    def markdown(self) -> str:
        """The table as a page has it."""
        lines = [self.columns, ("---",) * len(self.columns), *map(self.cells, self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass
class Report:
    """The tables of one run."""

    sink: Any = None
    tables: dict[str, Table] = field(default_factory=dict)

    def table(self, name: str, columns: Sequence[str], **formats: str) -> Table:
        """The table of that name, made when first asked for. formats: by column, with blanks as underscores."""
        if name not in self.tables:
            known = {column: formats[key] for column in columns if (key := re.sub(r"\W", "_", column)) in formats}
            self.tables[name] = Table(name, tuple(columns), known, sink=self.sink)
        return self.tables[name]

    def write(self, page: Path, command: str) -> None:
        """Puts each table between its markers in the page, and the command between those of `command`.

        Raises:
            SystemExit: the page lacks a table's markers; they are named, and nothing is written.
        """
        text = page.read_text(encoding="utf-8")
        for name, content in [*((n, t.markdown()) for n, t in self.tables.items()), ("command", f"    {command}")]:
            pattern = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(\n?<!-- end of table -->)", re.DOTALL)
            if not pattern.search(text):
                if name == "command":
                    continue
                raise SystemExit(
                    f"{page}: no place for table {name!r}; put in\n<!-- table: {name} -->\n<!-- end of table -->"
                )
            text = pattern.sub(lambda match, content=content: f"{match[1]}\n{content}\n{match[2]}", text)
        page.write_text(text, encoding="utf-8")


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
    if "--data" in parser.format_usage():
        parser.set_defaults(data=SHARED if SHARED.is_dir() else None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append every row to this file, a JSON line each")
    parser.add_argument("--write", type=Path, metavar="PAGE", nargs="?", const=PAGES / f"{name}.md",
                        help=f"put the tables into this page, between their markers (default: docs/results/{name}.md)")  # fmt: skip
    options = parser.parse_args(given[1:])
    if getattr(options, "data", SHARED) is None:
        parser.error("--data: name the folder of recorded routing; there is none beside this checkout")
    sink = options.json.open("a", encoding="utf-8") if options.json else None
    try:
        report = Report(sink)
        module.run(options, report)
    finally:
        if sink is not None:
            sink.close()
    for table in report.tables.values():
        print(f"\n{table.name}\n\n{table.markdown()}")
    if options.write:
        report.write(options.write, f"python -m benchmarks {' '.join(given)}")
