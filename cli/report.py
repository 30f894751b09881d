"""A comparison, or a front, as the parts of a page (figures, table, provenance), and the page: one HTML file with
everything in it, which opens without a network. Its figures follow, charts beside each other or to choose from.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._display import plural
from .._types import FloatArray, IntArray
from ..charts.svg import (
    POINT_KINDS,
    STATIC,
    Axis,
    Curve,
    Mark,
    Shades,
    Side,
    axis_form,
    curves,
    device_map,
    heat_map,
    load_map,
    load_shades,
    number_axis,
    scatter,
    stacked_bars,
)
from ..placement.errors import InputError, nearest
from ..placement.files import write_text
from ..placement.layer_slots import spanned
from ..placement.step_mix import step_mix
from .output import Column, milliseconds, quantity, telling_apart
from .run_comparison import Comparison, Entry
from .tables import COMPARISON_COLUMNS, comparison_rows, comparison_tables, pareto_columns, pareto_notes, reading_notes

if TYPE_CHECKING:
    from ..placement.evaluate import Evaluation
    from ..placement.plan import Plan
    from ..placement.problem import Problem
    from ..placement.topology import Topology
    from ..solvers.pareto import Front, Point


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
    from ..placement.replay import device_traffic

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


# The page of a front: what shorter steps cost in memory, in bytes moved and in failures not survived.


@dataclass(frozen=True)
class FrontPage:
    """What the page shows; rows of plans that nothing beats are chosen."""

    title: str
    subtitle: str
    figures: list[Figure]
    headings: list[str]
    rows: list[Line]
    remarks: list[str]


def write_front_page(page: FrontPage, path: str | Path) -> None:
    """Renders the page and writes it whole or not at all."""
    write_text(path, render("front.html.j2", figures=page.figures, page=page))


def build_front_page(front: Front, problem: Problem, steps: str, held_out: str) -> FrontPage:
    """Plots of step time over memory, over failures survived, and over bytes moved where a plan is in force."""
    model, topology = problem.model, problem.topology
    data = front.to_dict()
    columns = pareto_columns(data)
    figures = [
        front_figure(
            front,
            "memory",
            "Step time over memory",
            "expert weights on the fullest device (GB)",
            lambda point: point.memory / 1e9,
        ),
        front_figure(
            front,
            "failures",
            "Step time over failures survived",
            f"single failures in which every expert keeps a replica, of {sum(front.failures.values())}",
            lambda point: float(sum(point.survived.values())),
            more_is_better=True,
        ),
    ]
    if any(point.migration is not None for point in front.points):
        figures.append(
            front_figure(
                front,
                "moved",
                "Step time over bytes moved",
                "moved from the plan in force (GB)",
                lambda p: p.bytes_moved / 1e9,
            )
        )
    return FrontPage(
        title=model.name or "Expert placement",
        subtitle=f"{model.layers} MoE layers of {model.experts} experts, top-{model.top_k}, on {topology.num_devices} "
        f"devices in {plural(topology.num_nodes, 'node')} ({topology.name}), "
        f"{problem.objective.execution}",
        figures=figures,
        headings=[column.title for column in columns],
        rows=[
            Line(
                row["point"],
                ["\N{EN DASH}" if (v := row.get(c.key)) is None else c.write(v) for c in columns[1:]],
                "",
                row["best"],
            )
            for row in data["points"]
        ],
        remarks=[*pareto_notes(data), f"{steps}. {held_out}. Step times: {data['prediction']}."],
    )


def front_figure(
    front: Front, key: str, title: str, x_title: str, value: Callable[[Point], float], more_is_better: bool = False
) -> Figure:
    """Points of step time over `value`; plans that nothing beats are large, the line joins the fastest for each
    value."""
    marks = [
        Mark(value(point), point.seconds * 1e3, *POINT_KINDS[_kind(point)], _told(point), bool(best))
        for point, best in zip(front.points, front.best, strict=True)
    ]
    chart = scatter(
        title, x_title, "predicted step time (ms)", marks, more_is_better=more_is_better, width=1130, height=380
    )
    return single(
        key,
        title,
        f"Lower is faster, further {'right survives more' if more_is_better else 'left costs less'}. Large marks are "
        "plans that no other beats in everything; the dotted line is what these two figures alone allow. "
        "The axes do not start at zero.",
        Panel("", chart),
    )


def _kind(point: Point) -> str:
    if point.config is None:
        return "in force"
    return point.config.tolerate or "nothing asked"


def _told(point: Point) -> str:
    survived = ", ".join(f"{count} {kind}" for kind, count in point.survived.items())
    moved = "" if point.migration is None else f"; {quantity('B')(point.bytes_moved)} to move"
    return (
        f"{point.name}: {milliseconds(point.seconds)} ms; {quantity('B')(point.memory)} on the fullest device{moved}"
        f"; survives {survived} failures"
    )


# What a figure of a page is, and the figures of a comparison: device loads, traffic, affinity, step times and what they
# are spent on.


@dataclass(frozen=True)
class Panel:
    """A chart as SVG, and what stands above it."""

    heading: str
    chart: str


@dataclass(frozen=True)
class Choice:
    """Panels that are shown together, and what a selector calls them."""

    label: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Figure:
    """key: its element's id. caption: what to look for. choices: one, or several under a selector with this label; the
    first is shown."""

    key: str
    title: str
    caption: str
    choices: tuple[Choice, ...]
    choice_label: str = ""


def single(key: str, title: str, caption: str, *panels: Panel) -> Figure:
    """A figure without a selector."""
    return Figure(key, title, caption, (Choice("", panels),))


WIDE = 1130
"""Of a chart that has the page's width to itself."""

# Load by layer and device, before and after.


def relative_load(evaluation: Evaluation) -> FloatArray:
    """[L, G] a device's tokens over the mean device's, mean over steps."""
    mean = evaluation.device_tokens.mean(axis=2, keepdims=True)
    ratio = evaluation.device_tokens / np.where(mean > 0, mean, 1.0)
    return np.asarray(np.where(mean > 0, ratio, 1.0).mean(axis=0))


def load_figure(
    names: tuple[str, str],
    evaluations: tuple[Evaluation, Evaluation],
    moe_layers: tuple[int, ...],
    topology: Topology,
    steps: str,
) -> Figure:
    """Heat maps [G, L] of relative load on one scale around 1.0, the even share."""
    loads = [relative_load(evaluation) for evaluation in evaluations]
    shades = load_shades(loads)
    panels = [
        Panel(
            f"{name}: largest {load.max():.2f}, mean of the layers' largest {load.max(axis=1).mean():.2f}",
            load_map(f"Device load, {name}", load, moe_layers, topology.node_size, shades),
        )
        for name, load in zip(names, loads, strict=True)
    ]
    between = " Lines part nodes." if topology.num_nodes > 1 else ""
    return single(
        "load",
        "Load by layer and device",
        f"Tokens a device computes over the mean device's, mean over steps ({steps}); 1.0 is an even share.{between}",
        *panels,
    )


# Traffic between devices, before and after.


WRITTEN_DEVICES = 8
"""Up to so many devices, cells carry their figure."""


def traffic_figure(
    names: tuple[str, str], matrices: tuple[FloatArray, FloatArray], topology: Topology, steps: str
) -> Figure:
    """Heat maps [G, G] of bytes a step from each device to each other."""
    largest = max(float(matrix.max()) for matrix in matrices)
    unit, size = next(((unit, size) for unit, size in _UNITS if largest >= size), _UNITS[-1])
    devices = topology.num_devices
    same = topology.node_of[:, None] == topology.node_of[None, :]
    written = quantity("B")
    panels = []
    for name, matrix in zip(names, matrices, strict=True):
        between = (
            f", {written(float(np.where(same, 0.0, matrix).sum()))} between nodes" if topology.num_nodes > 1 else ""
        )
        shades = Shades(0.0, max(largest / size, 1e-9), lambda value: f"{value:.3g} {unit}")
        shown = np.where(np.eye(devices, dtype=bool), np.nan, matrix / size)
        chart = device_map(f"Traffic, {name}", shown, topology.node_size, shades, written=devices <= WRITTEN_DEVICES)
        panels.append(Panel(f"{name}: {written(float(matrix.sum()))} a step{between}", chart))
    return single(
        "traffic",
        "Traffic between devices",
        f"Activations over all layers of a step, to experts and back, mean over steps ({steps}), in {unit}. "
        + ("Copies for another node enter it once and are fanned out inside. " if topology.num_nodes > 1 else "")
        + ("Lines part nodes." if topology.num_nodes > 1 else ""),
        *panels,
    )


_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


# Expert affinity: where tokens go from one layer to the next, experts ordered by the device that holds them.


LAYERS_SHOWN = 12


def owners(plan: Plan) -> IntArray:
    """[L, E] the device that serves most of each expert's tokens."""
    return np.asarray(plan.device_share.argmax(axis=2))


def kept_share(transitions: FloatArray, plan: Plan, layer: int) -> float:
    """Share of the transitions from `layer` to the next that stay on a device."""
    share = plan.device_share
    share_kept = float(np.einsum("ef,eg,fg->", transitions, share[layer], share[layer + 1]))
    return share_kept / max(float(transitions.sum()), 1e-300)


def affinity_figure(names: tuple[str, str], plans: tuple[Plan, Plan], transitions: FloatArray) -> Figure:
    """Heat maps [E, E] of where a token goes next, in percent of each expert's tokens; a selector picks the layer.

    transitions: [L-1, E, E] of the part that was solved on.
    """
    layers = len(transitions)
    chosen = np.unique(np.linspace(0, layers - 1, min(layers, LAYERS_SHOWN)).round().astype(int)).tolist()
    shares = {layer: _row_percent(transitions[layer]) for layer in chosen}
    top = float(np.percentile(np.concatenate([share.ravel() for share in shares.values()]), 99.5))
    shades = Shades(0.0, max(top, 1e-6), "{:.1f}%".format)
    names_of = plans[0].model.moe_layers
    choices = []
    for layer in chosen:
        panels = []
        for name, plan in zip(names, plans, strict=True):
            owner = owners(plan)
            rows, columns = (np.argsort(owner[at], kind="stable") for at in (layer, layer + 1))
            chart = heat_map(
                f"Expert affinity, {name}",
                shares[layer][np.ix_(rows, columns)],
                _experts("from expert", rows, owner[layer]),
                _experts("to expert", columns, owner[layer + 1]),
                shades,
            )
            panels.append(Panel(f"{name}: {kept_share(transitions[layer], plan, layer):.0%} stay on a device", chart))
        choices.append(Choice(f"{names_of[layer]} to {names_of[layer + 1]}", tuple(panels)))
    return Figure(
        "affinity",
        "Expert affinity",
        "Where an expert's tokens go in the next layer, of each hundred. Experts stand in the order of their devices, "
        "whose numbers are at the edges; lines part devices: what a plan keeps on a device stands out as blocks on the "
        f"diagonal. Shades end at the 99.5th percentile ({top:.0f}%).",
        tuple(choices),
        "Layers",
    )


def _row_percent(counts: FloatArray) -> FloatArray:
    total = counts.sum(axis=1, keepdims=True)
    return np.asarray(100.0 * counts / np.where(total > 0, total, 1.0))


def _experts(title: str, order: IntArray, owner: IntArray) -> Side:
    """Experts in this order, each with its device; a label in the middle of each device's run."""
    devices, starts, counts = np.unique(owner[order], return_index=True, return_counts=True)
    runs = zip(devices.tolist(), starts.tolist(), counts.tolist(), strict=True)
    return Side(
        title,
        [f"{expert} on device {owner[expert]}" for expert in order.tolist()],
        starts[1:].tolist(),
        [(start + count / 2, str(device)) for device, start, count in runs],
    )


QUANTILES = (0.5, 0.99)


SPAN = 0.02
"""Of the step time: a narrower axis shows what nobody would see in practice, and says so beside a whole one."""


POINTS = 200
"""Of a curve: nobody sees more."""


def distribution_figure(evaluations: dict[str, dict[str, Evaluation]], before: str, after: str) -> Figure:
    """Cumulative share of steps over step time, a curve a plan, with p50 and p99 as dots; a choice a kind of steps.
    The axis is fitted to the data; where that is narrower than `SPAN` of a step, a second chart shows how little it is.

    evaluations: kind of steps -> plan name -> evaluation.
    """
    kinds = _kinds(evaluations, before, after)
    choices = []
    for kind, by_name in evaluations.items():
        times = {name: by_name[name].step_seconds * 1e3 for name in kinds if name in by_name}
        low, high = (float(end(end(each) for each in times.values())) for end in (min, max))
        middle, narrow = (low + high) / 2.0, high - low < SPAN * high
        panels = []
        # Side by side, letters keep their size.
        width = WIDE // 2 if narrow and high > low else WIDE
        if high > low:
            heading = f"Fitted to the data: the axis is {span_in_words(low, high)}" if narrow else ""
            panels.append(Panel(heading, _distribution(times, kinds, kind, low, high, width)))
        if narrow:
            half = SPAN / 2.0 * middle
            heading = f"The axis is {SPAN:.0%} of a step"
            panels.append(Panel(heading, _distribution(times, kinds, kind, middle - half, middle + half, width)))
        choices.append(Choice(kind, tuple(panels)))
    return Figure(
        "times",
        "Step time",
        "Share of steps that take at most so long; further left is faster, steeper is steadier. "
        "Dots are the median and the 99th percentile; the axis does not start at zero.",
        tuple(choices),
        "Steps",
    )


def _distribution(
    times: dict[str, FloatArray], kinds: dict[str, str], kind: str, low: float, high: float, width: int
) -> str:
    """The curves on an axis from low to high. times: of each plan, in ms."""
    x_axis = number_axis(low, high, "predicted step time (ms)", enclosing=False)
    write = axis_form([low, high], (high - low) / 100.0)
    drawn = []
    for name, each in times.items():
        shares = np.linspace(0.0, 1.0, min(POINTS, len(each)))
        at = np.quantile(each, shares).tolist()
        p50, p99 = np.quantile(each, QUANTILES).tolist()
        dots = [(p50, 0.5, f"{name}: p50 {write(p50)} ms"), (p99, 0.99, f"{name}: p99 {write(p99)} ms")]
        drawn.append(Curve(name, kinds[name], list(zip(at, shares.tolist(), strict=True)), dots))
    return curves(
        f"Step time, {kind}",
        x_axis,
        Axis(0.0, 1.02, SHARES, "share of steps at most so long"),
        drawn,
        width=width,
        height=400,
        form=lambda value: f"{write(value)} ms",
    )


def span_in_words(low: float, high: float) -> str:
    """How wide a range of milliseconds is: `0.0100 µs wide, 0.0001 % of a step`."""
    width = high - low
    size = f"{width:.3g} ms" if width >= 0.1 else f"{width * 1e3:.3g} \N{MICRO SIGN}s"
    return f"{size} wide, {100.0 * width / high:.2g} % of a step" if high > 0 else f"{size} wide"


SHARES = ((0.0, "0"), (0.25, "0.25"), (0.5, "p50"), (0.75, "0.75"), (0.99, "p99"))


def breakdown_figure(evaluations: dict[str, dict[str, Evaluation]], before: str, after: str) -> Figure:
    """Mean seconds of a step in dispatch, expert work and combine, a bar a plan; a choice a kind of steps."""
    choices = []
    for kind, by_name in evaluations.items():
        present = [name for name in _kinds(evaluations, before, after) if name in by_name]
        parts = [
            (part, [float(getattr(by_name[name], field).sum(axis=1).mean()) * 1e3 for name in present])
            for part, field in _PARTS
        ]
        chart = stacked_bars(
            f"What a step is spent on, {kind}",
            present,
            parts,
            "predicted step time (ms), mean",
            "{:.3f} ms".format,
            width=WIDE,
        )
        choices.append(Choice(kind, (Panel("", chart),)))
    return Figure(
        "breakdown",
        "What a step is spent on",
        "Mean over steps. Expert work is the slowest device's, layer by layer; the rest is waiting for activations.",
        tuple(choices),
        "Steps",
    )


_PARTS = (("expert work", "compute"), ("dispatch", "dispatch"), ("combine", "combine"))


def line_kinds(names: Sequence[str], before: str, after: str) -> dict[str, str]:
    """How each plan's line is drawn: the two that matter first."""
    others = [name for name in names if name not in (before, after)]
    return {before: "before", after: "after"} | {name: f"other-{i % 8}" for i, name in enumerate(others)}


def _kinds(evaluations: dict[str, dict[str, Evaluation]], before: str, after: str) -> dict[str, str]:
    return line_kinds(list(dict.fromkeys(name for by_name in evaluations.values() for name in by_name)), before, after)
