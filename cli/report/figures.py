"""What a figure of a page is: charts, beside each other or to choose from. The figures of a comparison: device loads,
traffic, affinity, step times and what they are spent on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..._types import FloatArray, IntArray
from ...charts.svg import (
    Axis,
    Curve,
    Shades,
    Side,
    axis_form,
    curves,
    device_map,
    heat_map,
    load_map,
    load_shades,
    number_axis,
    stacked_bars,
)
from ..output import quantity

if TYPE_CHECKING:
    from ...placement.evaluate import Evaluation
    from ...placement.plan import Plan
    from ...placement.topology import Topology


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
