"""A comparison as the parts of a page (figures, table, provenance), and the page: one HTML file with everything in it,
which opens without a network.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._display import plural
from ...charts.svg import STATIC
from ...placement.errors import InputError, nearest
from ...placement.files import write_text
from ...placement.layer_slots import spanned
from ...placement.step_mix import step_mix
from ..output import Column, telling_apart
from ..run_comparison import Comparison, Entry
from ..tables import COMPARISON_COLUMNS, comparison_rows, comparison_tables, reading_notes
from .figures import Figure, affinity_figure, breakdown_figure, distribution_figure, load_figure, traffic_figure


@dataclass(frozen=True)
class Headline:
    """A figure before and after, and the change in words."""

    label: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class Line:
    """A row: a plan's name and its cells, or why there is no plan. chosen: it stands out."""

    name: str
    cells: list[str]
    reason: str
    chosen: bool


@dataclass(frozen=True)
class Section:
    """A table of the comparison for one kind of steps."""

    title: str
    headings: list[str]
    rows: list[Line]


@dataclass(frozen=True)
class Report:
    """What the page shows."""

    title: str
    subtitle: str
    before: str
    after: str
    headlines: list[Headline]
    sections: list[Section]
    remarks: list[str]
    figures: list[Figure]
    provenance: list[tuple[str, str]]


def build_report(
    comparison: Comparison,
    before: str | None,
    after: str | None,
    provenance: list[tuple[str, str]],
    verdict: Sequence[str] = (),
) -> Report:
    """Chooses the two plans to set side by side and draws everything.

    before: an entry's name (default: the first plan given, else contiguous). after: default: the best of the rest on
    the objective. verdict: sentences on the best plan, which come first of the remarks.

    Raises:
        InputError: no such entry, or one without a plan.
    """
    kind = next(iter(comparison.kinds))
    old, new = _sides(comparison, before, after)
    rows = comparison_rows(comparison)
    model, topology = comparison.problem.model, comparison.problem.topology
    return Report(
        title=model.name or "Expert placement",
        subtitle=f"{model.layers} MoE layers of {model.experts} experts, top-{model.top_k}, "
        f"on {plural(topology.num_devices, 'device')} in {plural(topology.num_nodes, 'node')} ({topology.name}), "
        f"{spanned(comparison.problem.layer_slots.sum(axis=1))} slots a layer, "
        f"{comparison.problem.objective.execution}",
        before=old.name,
        after=new.name,
        headlines=_headlines(comparison, old, new),
        sections=_sections(comparison, rows, new.name),
        remarks=[step_mix(comparison.problem).text, *verdict, *reading_notes(comparison, rows)],
        figures=_figures(comparison, old, new, kind),
        provenance=provenance,
    )


def _sides(comparison: Comparison, before: str | None, after: str | None) -> tuple[Entry, Entry]:
    usable = {entry.name: entry for entry in comparison.entries if entry.plan is not None}
    for name in (before, after):
        if name is not None and name not in usable:
            raise InputError(f"{name!r} is not among the plans of this report; {nearest(name, usable)}")
    if before is None:
        old = next((entry for entry in usable.values() if entry.was_given), comparison.baseline)
    else:
        old = usable[before]
    rest = [entry for entry in usable.values() if entry is not old]
    if after is not None:
        return old, usable[after]
    if not rest:
        raise InputError("a report sets two plans side by side, and only one could be made; give more --solvers")
    return old, min(rest, key=comparison.risk)


def _headlines(comparison: Comparison, old: Entry, new: Entry) -> list[Headline]:
    assert old.evaluation is not None
    assert new.evaluation is not None
    first, second = old.evaluation.summary(), new.evaluation.summary()
    lines: list[tuple[str, str, float, str]] = [
        ("Step time, mean", "step_seconds_mean", 1e3, "{:.3f} ms"),
        ("Step time, p99", "step_seconds_p99", 1e3, "{:.3f} ms"),
        ("Of the force-balanced ideal", "ideal_share", 100.0, "{:.1f}%"),
        ("Device load, max / mean", "load_max_mean", 1.0, "{:.2f}"),
        ("Devices a token", "devices_per_token", 1.0, "{:.2f}"),
        _travel(comparison),
    ]
    return [
        Headline(
            label,
            form.format(first[key] * scale),
            form.format(second[key] * scale),
            _points(first[key], second[key]) if "%" in form else _change(first[key], second[key]),
        )
        for label, key, scale, form in lines
    ]


def _travel(comparison: Comparison) -> tuple[str, str, float, str]:
    """What of the traffic the way of execution depends on."""
    problem = comparison.problem
    if problem.objective.execution == "context_coherent":
        return "Transitions kept on a device", "local_transitions", 100.0, "{:.1f}%"
    if problem.topology.num_nodes > 1:
        return "Copies that leave their node", "cross_node_fraction", 100.0, "{:.1f}%"
    return "Copies that leave their device", "cross_device_fraction", 100.0, "{:.1f}%"


def _change(old: float, new: float) -> str:
    if not old:
        return ""
    change = new / old - 1.0
    written = f"{change:+.0%}" if abs(change) >= 0.095 else f"{change:+.1%}"
    return "unchanged" if abs(change) < 0.0005 else written.replace("-", "\N{MINUS SIGN}")


def _points(old: float, new: float) -> str:
    """The change of a share, in percentage points: a ratio of shares would read as a share."""
    return f"{100 * (new - old):+.1f} points".replace("-", "\N{MINUS SIGN}")


def _sections(comparison: Comparison, rows: list[dict[str, Any]], after: str) -> list[Section]:
    sections = []
    for table in comparison_tables(comparison, rows):
        columns = [column for column in telling_apart(table) if column.key not in CERTIFIED]
        lines = [_line(row, columns, row.get("solver") == after) for row in table.rows]
        sections.append(Section(table.title, [column.title for column in columns], lines))
    return sections + _certificates(rows, after)


CERTIFIED = ("value", "bound", "gap")


def _certificates(rows: list[dict[str, Any]], after: str) -> list[Section]:
    """What is proven, a table an objective: gaps of different ones cannot be compared."""
    columns = [column for column in COMPARISON_COLUMNS if column.key in ("solver", *CERTIFIED)]
    columns.sort(key=lambda column: ("solver", *CERTIFIED).index(column.key))
    first = [row for row in rows if row["steps"] == rows[0]["steps"] and row["objective"]]
    return [
        Section(
            f"Proven of the solver's own objective on the part solved on: {objective}",
            [column.title for column in columns],
            [_line(row, columns, row["solver"] == after) for row in first if row["objective"] == objective],
        )
        for objective in dict.fromkeys(row["objective"] for row in first)
    ]


def _line(row: Mapping[str, Any], columns: Sequence[Column], chosen: bool) -> Line:
    values = [(row.get(column.key), column.write) for column in columns[1:]]
    cells = ["\N{EN DASH}" if value is None else write(value) for value, write in values]
    return Line(row[columns[0].key], cells, row.get("reason") or "", chosen)


def _figures(comparison: Comparison, old: Entry, new: Entry, kind: str) -> list[Figure]:
    from ...placement.replay import device_traffic

    problem, steps = comparison.problem, comparison.kinds[kind]
    assert old.plan is not None
    assert new.plan is not None
    names, plans = (old.name, new.name), (old.plan, new.plan)
    evaluations = {
        kind: {entry.name: entry.evaluations[kind] for entry in comparison.entries if kind in entry.evaluations}
        for kind in comparison.kinds
    }
    matrices = [
        device_traffic(plan, steps, problem.topology, problem.objective).bytes_between(problem.model, problem.objective)
        for plan in plans
    ]
    figures = [
        distribution_figure(evaluations, *names),
        breakdown_figure(evaluations, *names),
        load_figure(
            names,
            (old.evaluations[kind], new.evaluations[kind]),
            problem.model.moe_layers,
            problem.topology,
            kind,
        ),
    ]
    if problem.topology.num_devices > 1:
        figures.append(traffic_figure(names, (matrices[0], matrices[1]), problem.topology, kind))
    if problem.statistics.transitions is not None and problem.model.layers > 1:
        figures.append(affinity_figure(names, plans, problem.statistics.total_transitions))
    return figures


# The page.

TEMPLATES = Path(__file__).parent / "templates"


def write_page(report: Report, path: str | Path) -> None:
    """Renders the report and writes it whole or not at all."""
    write_text(path, render_page(report))


def render_page(report: Report) -> str:
    """The report as HTML."""
    return render("page.html.j2", figures=report.figures, report=report)


def render(template: str, **context: Any) -> str:
    """A template with the style and the script inside, which are all that the page runs: their hashes say so."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style = "\n" + "".join(path.read_text(encoding="utf-8") for path in (STATIC / "charts.css", TEMPLATES / "page.css"))
    script = "\n" + (STATIC / "charts.js").read_text(encoding="utf-8")
    return environment.get_template(template).render(
        **context,
        style=Markup(style),
        script=Markup(script),
        hashes={"style": _hash(style), "script": _hash(script)},
    )


def _hash(text: str) -> str:
    """As a Content-Security-Policy names what an element holds."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
