"""What commands draw, once as charts and once in characters, and where it goes: a file, or the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..placement.errors import InputError
from .output import draw, note, wrote

if TYPE_CHECKING:
    from ..placement.evaluate import Evaluation
    from ..placement.plan import Plan
    from ..placement.statistics import RoutingStatistics
    from .report import Figure
    from .run_comparison import Comparison

HEIGHT = 320


@dataclass(frozen=True)
class Drawing:
    """A figure, and the same in lines of characters."""

    figure: Figure
    lines: Sequence[str]


def show(drawings: Sequence[Drawing], file: Path | None, in_terminal: bool) -> None:
    """Writes the drawings into the file, and shows them: as images where the terminal does, else in characters."""
    if file is not None:
        _write(drawings, file)
    if in_terminal and not _shown_as_images(drawings):
        draw(*(drawing.lines for drawing in drawings))


def _write(drawings: Sequence[Drawing], file: Path) -> None:
    from ..charts.svg import png, stacked
    from ..placement.files import write_bytes, write_text

    suffix = file.suffix.lower()
    if suffix == ".html":
        from .report import render

        write_text(file, render("plots.html.j2", figures=[drawing.figure for drawing in drawings]))
    elif suffix == ".svg":
        write_text(file, stacked(_charts(drawings)))
    else:
        write_bytes(file, _told(lambda: png(stacked(_charts(drawings)), zoom=2.0)))
    wrote(file)


def _shown_as_images(drawings: Sequence[Drawing]) -> bool:
    from .._lazy import missing_extra
    from ..charts import terminal
    from ..charts.svg import png, stacked

    how = terminal.protocol(sys.stdout)
    if how is None or not drawings:
        return False
    svg = stacked(_charts(drawings))
    try:
        zoom = min(2.0, terminal.pixels_across(sys.stdout) / _width(svg))
        terminal.show(png(svg, zoom), how, sys.stdout)
    except ImportError as error:
        note(f"this terminal shows images; {missing_extra(error) or error}")
        return False
    except RuntimeError as error:
        note(str(error))
        return False
    return True


def _told(make: Any) -> Any:
    try:
        return make()
    except RuntimeError as error:
        raise InputError(str(error)) from None


def _width(svg: str) -> float:
    return float(svg.split('width="', 1)[1].split('"', 1)[0])


def _charts(drawings: Sequence[Drawing]) -> list[tuple[str, str, str]]:
    """All charts with their titles, those of a selector below each other."""
    return [
        (
            ", ".join(filter(None, (drawing.figure.title, choice.label, panel.heading))),
            drawing.figure.caption if choice is drawing.figure.choices[0] and panel is choice.panels[0] else "",
            panel.chart,
        )
        for drawing in drawings
        for choice in drawing.figure.choices
        for panel in choice.panels
    ]


MOST_WORKLOADS = 8
"""That one chart tells apart."""
BUSIEST = "Tokens of the busiest expert over the mean expert's of the layer."

# Plans judged on steps.


def comparison_drawings(comparison: Comparison, mapped: Sequence[str], pool: str = "") -> list[Drawing]:
    """For each kind of steps: step times of all plans, balance of their layers, and load maps of those named, the first
    of which stands out against the second. pool: goes before the names of its steps."""
    from .report import distribution_figure, line_kinds

    first, *rest = mapped
    drawings = []
    for steps in comparison.kinds:
        kind = f"{pool}, {steps}" if pool else steps
        evaluations = {
            entry.name: entry.evaluations[steps] for entry in comparison.entries if steps in entry.evaluations
        }
        before = rest[0] if rest else first
        figure = distribution_figure({kind: evaluations}, before, first)
        drawings.append(Drawing(figure, _times(evaluations, kind)))
        model, topology = comparison.problem.model, comparison.problem.topology
        kinds = line_kinds(list(evaluations), before, first)
        drawings.append(_balance({name: evaluations[name] for name in kinds}, model.moe_layers, kind, kinds))
        maps = {name: evaluations[name] for name in mapped if name in evaluations}
        drawings.append(_loads(maps, model.moe_layers, topology, kind))
    return drawings


def _times(evaluations: Mapping[str, Evaluation], kind: str) -> list[str]:
    import numpy as np

    from ..charts.svg import axis_form
    from ..charts.terminal import text_histograms
    from .report import span_in_words

    every = np.concatenate([evaluation.step_seconds for evaluation in evaluations.values()]) * 1e3
    low, high = float(every.min()), float(every.max())
    write = axis_form([low, high], high - low)
    return [
        f"{kind}: steps from {write(low)} to {write(high)} ms, the median as |; {span_in_words(low, high)}",
        *text_histograms({name: each.step_seconds * 1e3 for name, each in evaluations.items()}, low, high),
    ]


def _balance(
    evaluations: Mapping[str, Evaluation], layers: Sequence[int], kind: str, kinds: Mapping[str, str]
) -> Drawing:
    """Tokens of the busiest device over the mean device's, layer by layer."""
    import numpy as np

    from ..placement.objective import weighted_mean

    busiest = {}
    for name, evaluation in evaluations.items():
        mean = evaluation.device_tokens.mean(axis=2)
        ratio = evaluation.device_tokens.max(axis=2) / np.where(mean > 0, mean, 1.0)
        ratio = np.where(mean > 0, ratio, 1.0)
        busiest[name] = np.array([weighted_mean(column, evaluation.weight) for column in ratio.T])
    what = "busiest device over the mean device"
    caption = "Tokens of the busiest device over the mean device's, mean over steps; 1.0 is an even share."
    return _by_layer(f"Balance of layers, {kind}", what, caption, busiest, layers, kinds)


def _by_layer(
    title: str, what: str, caption: str, rows: Mapping[str, Any], layers: Sequence[int], kinds: Mapping[str, str]
) -> Drawing:
    """A curve a name over MoE layers, from 1.0 on. kinds: class of each curve."""
    from ..charts.svg import Curve, curves, number_axis
    from ..charts.terminal import text_lines
    from .report import WIDE, Panel, single

    high = max(1.0 + 1e-3, *(float(values.max()) for values in rows.values()))
    drawn = [
        Curve(name, kinds[name], list(zip(map(float, layers), values.tolist(), strict=True)))
        for name, values in rows.items()
    ]
    first, last = float(layers[0]), float(layers[-1])
    x_axis = number_axis(first, last if last > first else first + 1.0, "MoE layer", enclosing=False, whole=True)
    chart = curves(
        title, x_axis, number_axis(1.0, high, what), drawn, width=WIDE, height=HEIGHT, form="layer {:.0f}".format
    )
    lines = [f"{title}: {what}, 1 to {high:.3g}", *text_lines(rows, 1.0, high), AT_THE_RIGHT]
    return Drawing(single("balance", title, caption, Panel("", chart)), lines)


AT_THE_RIGHT = "At the right the largest of the layers."


def _loads(evaluations: Mapping[str, Evaluation], layers: Sequence[int], topology: Any, kind: str) -> Drawing:
    """Load maps of plans on one scale."""
    from ..charts.svg import load_map, load_shades
    from ..charts.terminal import text_map
    from .report import Panel, relative_load, single

    loads = {name: relative_load(evaluation) for name, evaluation in evaluations.items()}
    shades = load_shades(list(loads.values()))
    panels = [
        Panel(
            f"{name}: largest {load.max():.2f}",
            load_map(f"Device load, {name}", load, layers, topology.node_size, shades),
        )
        for name, load in loads.items()
    ]
    devices = [f"node {node:>3} device {device:>4}" for device, node in enumerate(topology.node_of)]
    lines: list[str] = []
    for name, load in loads.items():
        lines += [f"Load of {name}, {kind}: devices by MoE layers, ▁ none, █ twice the mean"]
        lines += [*text_map(devices, load.T, 0.0, 2.0), AT_THE_RIGHT]
    caption = "Tokens a device computes over the mean device's, mean over steps; 1.0 is an even share."
    return Drawing(single("load", f"Load by layer and device, {kind}", caption, *panels), lines)


# Records and plans by themselves.


def record_drawings(statistics: RoutingStatistics) -> list[Drawing]:
    """Load of experts by layer, and how uneven layers are, by workload where there are several."""
    import numpy as np

    from ..charts.svg import Shades, Side, heat_map
    from ..charts.terminal import text_map
    from .report import Panel, line_kinds, single

    def relative(load: Any) -> Any:
        mean = load.mean(axis=1, keepdims=True)
        return load / np.where(mean > 0, mean, 1.0)

    load, layers = relative(statistics.total_load), statistics.moe_layers
    high = max(1.0, float(load.max()))
    chart = heat_map(
        "Load of experts",
        load.T,
        Side("expert", [str(expert) for expert in range(load.shape[1])]),
        Side("MoE layer", [str(layer) for layer in layers]),
        Shades(0.0, high, "{:.2f}".format),
    )
    title, caption = "Load of experts", "Tokens of an expert over the mean expert's of its layer."
    # Experts beyond what a terminal shows are those of least load.
    order = np.argsort(-load.max(axis=0), kind="stable")
    names = [f"expert {expert:>4}" for expert in order.tolist()]
    lines = [
        f"{title}, the busiest first: experts by MoE layers, ▁ none, █ {high:.3g} times the mean",
        *text_map(names, load.T[order], 0.0, high),
        AT_THE_RIGHT,
    ]
    rows = {"all": load.max(axis=1)}
    if len(statistics.workloads) > 1:
        rows |= {
            name or "(untagged)": relative(statistics.workload_load[w]).max(axis=1)
            for w, name in enumerate(statistics.workloads[:MOST_WORKLOADS])
        }
    kinds = line_kinds(list(rows), "all", "all")
    return [
        Drawing(single("experts", title, caption, Panel("", chart)), lines),
        _by_layer("Balance of layers", "busiest expert over the mean expert", BUSIEST, rows, layers, kinds),
    ]


def plan_drawings(plan: Plan, name: str) -> list[Drawing]:
    """How many replicas each expert has, by layer.

    Raises:
        InputError: every expert has one, so that there is nothing to see without routing.
    """
    import numpy as np

    from ..charts.svg import Shades, Side, heat_map
    from ..charts.terminal import text_map
    from .report import Panel, single

    replicas = np.asarray(plan.replicas, dtype=np.float64)
    if replicas.max() <= 1:
        raise InputError(f"{name} has each expert once, which draws nothing; name its record too: plot {name} ROUTING")
    experts = [str(expert) for expert in range(replicas.shape[1])]
    layers = [str(layer) for layer in plan.moe_layers]
    title = f"Replicas of experts, {name}"
    chart = heat_map(
        title,
        replicas.T,
        Side("expert", experts),
        Side("MoE layer", layers),
        Shades(0.0, float(replicas.max()), "{:.0f}".format),
    )
    order = np.argsort(-replicas.sum(axis=0), kind="stable")
    lines = [
        f"{title}: experts by MoE layers, those of most replicas first, █ {replicas.max():.0f}",
        *text_map([f"expert {expert:>4}" for expert in order.tolist()], replicas.T[order], 0.0, float(replicas.max())),
        AT_THE_RIGHT,
    ]
    return [Drawing(single("replicas", title, "Slots that hold an expert, in each layer.", Panel("", chart)), lines)]


# What commands told as JSON.


def front_drawings(data: Mapping[str, Any]) -> list[Drawing]:
    """Step time over redundant slots and over memory, of `pareto --json`."""
    points = data["points"]
    if not points:
        return []
    return [
        _front(
            points,
            "slots",
            "Step time over redundant slots",
            "redundant slots a layer",
            [float(point["redundant_slots"]) for point in points],
        ),
        _front(
            points,
            "memory",
            "Step time over memory",
            "expert weights on the fullest device (GB)",
            [point["device_memory_max"] / 1e9 for point in points],
        ),
    ]


def _front(points: Sequence[Mapping[str, Any]], key: str, title: str, x_title: str, at: Sequence[float]) -> Drawing:
    from ..charts.svg import POINT_KINDS, Mark, scatter
    from ..charts.terminal import text_points
    from .report import WIDE, Panel, single

    marks, drawn = [], []
    for point, x in zip(points, at, strict=True):
        ms = point["risk_seconds"] * 1e3
        kind = "in force" if point["point"] == "in force" else point["tolerate"]
        marks.append(
            Mark(x, ms, *POINT_KINDS[kind or "nothing asked"], f"{point['point']}: {ms:.6g} ms", bool(point["best"]))
        )
        drawn.append((x, ms, bool(point["best"])))
    chart = scatter(title, x_title, "predicted step time (ms)", marks, width=WIDE, height=HEIGHT)
    caption = (
        "Lower is faster, further left costs less. Large marks are plans that no other beats in everything. "
        "The axes do not start at zero."
    )
    lines = [f"{title}: * no other plan is at least as good in everything", *text_points(drawn, x_title, "{} ms")]
    return Drawing(single(key, title, caption, Panel("", chart)), lines)


def slot_front_drawings(front: Mapping[str, Any]) -> list[Drawing]:
    """Step time over the memory of redundant experts, of `solve --slots auto --json`."""
    from ..charts.svg import Mark, scatter
    from ..charts.terminal import text_points
    from .report import WIDE, Panel, single

    best = tuple(front["recommended"]["slots"])
    shown = {tuple(point["slots"]): point for point in (*front["even"], *front["points"])}
    title, x_title = "Slots against KV cache", "memory of redundant experts, on the device with most (GB)"
    marks, drawn = [], []
    for slots, point in shown.items():
        x, ms = point["memory_bytes"] / 1e9, point["step_seconds"] * 1e3
        symbol, name = ("circle", "same in every layer") if point["even"] else ("diamond", "by layer")
        hint = f"{min(slots)} to {max(slots)} slots a layer: {ms:.6g} ms; {point['cache_lost']:.1%} of the cache"
        if slots == best:
            symbol, name = "cross", "recommended"
        marks.append(Mark(x, ms, symbol, name, hint, slots == best))
        drawn.append((x, ms, slots == best))
    chart = scatter(title, x_title, "predicted step time (ms), MoE layers", marks, width=WIDE, height=HEIGHT)
    caption = "Lower is faster, further left leaves more KV cache. The axes do not start at zero."
    lines = [f"{title}: * recommended", *text_points(drawn, x_title, "{} ms")]
    return [Drawing(single("slots", title, caption, Panel("", chart)), lines)]


def judged_drawings(rows: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    """What steps of each kind are spent on, a bar a plan, of `compare --json`, `evaluate --json` or `report --json`."""
    from ..charts.svg import stacked_bars
    from .report import WIDE, Panel, single

    drawings = []
    for kind in dict.fromkeys(row["steps"] for row in rows):
        judged = [row for row in rows if row["steps"] == kind and row.get("step_seconds_mean") is not None]
        if not judged:
            continue
        title, names = f"Mean step, {kind}", [row["solver"] for row in judged]
        parts = [
            (name, [row[field] * 1e3 for row in judged])
            for name, field in (("expert work", "compute_seconds"), ("transfer", "transfer_seconds"))
        ]
        chart = stacked_bars(title, names, parts, "predicted step time (ms), mean", "{:.6g} ms".format, width=WIDE)
        most, wide = max(row["step_seconds_mean"] for row in judged), max(map(len, names))
        lines = [f"{title}: █ expert work, ░ transfer, ms"]
        for row in judged:
            work, moved = (round(32 * row[f] / most) for f in ("compute_seconds", "transfer_seconds"))
            lines.append(f"{row['solver']:<{wide}}  {'█' * work}{'░' * moved}  {row['step_seconds_mean'] * 1e3:.6g}")
        drawings.append(
            Drawing(single("mean", title, "The slowest device's, layer by layer.", Panel("", chart)), lines)
        )
    return drawings
