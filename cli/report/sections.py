"""Step times: their distribution, and what they are spent on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..._types import FloatArray, IntArray
from ..output import quantity
from .figures import Figure, Theme, TraceChoice, axis, base_layout, boundaries, colour_axis, make_figure, paired_layout

if TYPE_CHECKING:
    from ...placement.evaluate import Evaluation
    from ...placement.plan import Plan
    from ...placement.topology import Topology

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
    import plotly.graph_objects as go

    loads = [relative_load(evaluation) for evaluation in evaluations]
    largest = max(float(np.abs(load - 1.0).max()) for load in loads)
    span = next((span for span in (0.1, 0.2, 0.5) if largest <= span), 1.0)
    devices = np.arange(topology.num_devices)
    traces = [
        go.Heatmap(
            z=load.T.astype(np.float32),
            x=[str(layer) for layer in moe_layers],
            y=devices,
            xaxis=f"x{suffix}",
            yaxis=f"y{suffix}",
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hovertemplate="layer %{x}, device %{y}<br>%{z:.2f} of the mean load<extra></extra>",
        )
        for load, suffix in zip(loads, ("", "2"), strict=True)
    ]
    node_ends = (np.cumsum(topology.node_size)[:-1] - 0.5).tolist()
    headings = tuple(
        f"{name}: largest {load.max():.2f}, mean of the layers' largest {load.max(axis=1).mean():.2f}"
        for name, load in zip(names, loads, strict=True)
    )

    def layout(theme: Theme) -> dict[str, Any]:
        ticks = np.linspace(1.0 - span, 1.0 + span, 5)
        labels = [f"{tick:.2f}" for tick in ticks]
        if largest > span:
            labels[-1] = "\N{GREATER-THAN OR EQUAL TO} " + labels[-1]
        bar = {"tickvals": ticks.tolist(), "ticktext": labels}
        return paired_layout(
            theme,
            (headings[0], headings[1]),
            "MoE layer",
            "device",
            height=int(np.clip(130 + 24 * topology.num_devices, 260, 720)),
            coloraxis=colour_axis(
                theme, theme.diverging, "load / mean", cmin=1.0 - span, cmax=1.0 + span, colorbar=bar
            ),
            x={"type": "category", "nticks": 13, "tickangle": 0},
            y={"dtick": 1 if topology.num_devices <= 16 else 8},
            shapes=boundaries(theme, node_ends, -0.5, len(moe_layers) - 0.5, both=False),
        )

    between = " Lines part nodes." if topology.num_nodes > 1 else ""
    return make_figure(
        "load",
        "Load by layer and device",
        f"Tokens a device computes over the mean device's, mean over steps ({steps}); 1.0 is an even share.{between}",
        traces,
        layout,
    )


# Traffic between devices, before and after.


WRITTEN_DEVICES = 8
"""Up to so many devices, cells carry their figure."""


def traffic_figure(
    names: tuple[str, str], matrices: tuple[FloatArray, FloatArray], topology: Topology, steps: str
) -> Figure:
    """Heat maps [G, G] of bytes a step from each device to each other."""
    import plotly.graph_objects as go

    largest = max(float(matrix.max()) for matrix in matrices)
    unit, size = next(((unit, size) for unit, size in _UNITS if largest >= size), _UNITS[-1])
    devices = topology.num_devices
    same = topology.node_of[:, None] == topology.node_of[None, :]
    traces = []
    for matrix, suffix in zip(matrices, ("", "2"), strict=True):
        shown = np.where(np.eye(devices, dtype=bool), np.nan, matrix / size)
        traces.append(
            go.Heatmap(
                z=shown.astype(np.float32),
                xaxis=f"x{suffix}",
                yaxis=f"y{suffix}",
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
                hoverongaps=False,
                texttemplate="%{z:.3g}" if devices <= WRITTEN_DEVICES else None,
                hovertemplate="device %{y} to device %{x}<br>%{z:.3g} " + unit + " a step<extra></extra>",
            )
        )
    ends = (np.cumsum(topology.node_size)[:-1] - 0.5).tolist()
    written = quantity("B")
    headings = [
        f"{name}: {written(float(matrix.sum()))} a step"
        + (f", {written(float(np.where(same, 0.0, matrix).sum()))} between nodes" if topology.num_nodes > 1 else "")
        for name, matrix in zip(names, matrices, strict=True)
    ]

    def layout(theme: Theme) -> dict[str, Any]:
        ticks = {"dtick": 1 if devices <= 16 else 8}
        return paired_layout(
            theme,
            (headings[0], headings[1]),
            "to device",
            "from device",
            height=560,
            coloraxis=colour_axis(theme, theme.sequential, f"{unit} a step", cmin=0.0, cmax=max(largest / size, 1e-9)),
            x=ticks,
            y=ticks,
            square=True,
            shapes=boundaries(theme, ends, -0.5, devices - 0.5, both=True),
        )

    return make_figure(
        "traffic",
        "Traffic between devices",
        f"Activations over all layers of a step, to experts and back, mean over steps ({steps}). "
        + ("Copies for another node enter it once and are fanned out inside. " if topology.num_nodes > 1 else "")
        + ("Lines part nodes." if topology.num_nodes > 1 else ""),
        traces,
        layout,
    )


_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


# Expert affinity: where tokens go from one layer to the next, experts ordered by the device that holds them.


CELLS = 600_000
"""Matrix cells on the page, both panels together: keeps it a few MB whatever the model."""

LABELLED = 64
"""Up to so many experts, each cell names its pair."""


def owners(plan: Plan) -> IntArray:
    """[L, E] the device that serves most of each expert's tokens."""
    return np.asarray(plan.device_share.argmax(axis=2))


def kept_share(transitions: FloatArray, plan: Plan, layer: int) -> float:
    """Share of the transitions from `layer` to the next that stay on a device."""
    share = plan.device_share
    kept = float(np.einsum("ef,eg,fg->", transitions, share[layer], share[layer + 1]))
    return kept / max(float(transitions.sum()), 1e-300)


def affinity_figure(names: tuple[str, str], plans: tuple[Plan, Plan], transitions: FloatArray) -> Figure:
    """Heat maps [E, E] of where a token goes next, in percent of each expert's tokens; a selector picks the layer.

    transitions: [L-1, E, E] of the part that was solved on.
    """
    import plotly.graph_objects as go

    layers, experts = len(transitions), transitions.shape[1]
    count = int(np.clip(CELLS // (2 * experts * experts), 1, min(layers, 12)))
    chosen = np.unique(np.linspace(0, layers - 1, count).round().astype(int)).tolist()
    traces: list[Any] = []
    choices: list[TraceChoice] = []
    shares = {layer: _row_percent(transitions[layer]) for layer in chosen}
    top = float(np.percentile(np.concatenate([share.ravel() for share in shares.values()]), 99.5))
    names_of = plans[0].model.moe_layers
    for layer in chosen:
        first = len(traces)
        for plan, suffix in zip(plans, ("", "2"), strict=True):
            owner = owners(plan)
            rows, columns = (np.argsort(owner[at], kind="stable") for at in (layer, layer + 1))
            axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
            traces.append(
                go.Heatmap(
                    z=shares[layer][np.ix_(rows, columns)].astype(np.float32),
                    coloraxis="coloraxis",
                    text=_labels(rows, columns, owner[layer], owner[layer + 1]) if experts <= LABELLED else None,
                    hovertemplate=("%{text}<br>" if experts <= LABELLED else "") + "%{z:.1f}%<extra></extra>",
                    **axes,
                )
            )
            x, y = _device_lines(owner[layer], owner[layer + 1])
            traces.append(
                go.Scatter(x=x, y=y, mode="lines", line={"width": 0.7}, hoverinfo="skip", showlegend=False, **axes)
            )
        kept = [kept_share(transitions[layer], plan, layer) for plan in plans]
        choices.append(
            TraceChoice(
                f"{names_of[layer]} to {names_of[layer + 1]} (kept on a device: {kept[0]:.0%} before, {kept[1]:.0%} after)",
                tuple(range(first, len(traces))),
            )
        )
    ticks = _device_ticks(plans)
    extent = [-0.5, experts - 0.5]

    def layout(theme: Theme) -> dict[str, Any]:
        bar = {"ticksuffix": "%"}
        return paired_layout(
            theme,
            names,
            "expert in the next layer, by device",
            "expert, by device",
            height=560,
            coloraxis=colour_axis(
                theme, theme.sequential, "share of tokens", cmin=0.0, cmax=max(top, 1e-6), colorbar=bar
            ),
            x=ticks | {"range": extent},
            y=ticks | {"range": extent[::-1], "autorange": False},
            square=True,
        ) | {"colorway": [theme.muted]}

    return make_figure(
        "affinity",
        "Expert affinity",
        "Where an expert's tokens go in the next layer. Experts stand in the order of their devices, lines part devices: "
        "what a plan keeps on a device stands out as blocks on the diagonal. "
        f"Colours end at the 99.5th percentile ({top:.0f}%).",
        traces,
        layout,
        choices,
        "Layers",
    )


def _row_percent(counts: FloatArray) -> FloatArray:
    total = counts.sum(axis=1, keepdims=True)
    return np.asarray(100.0 * counts / np.where(total > 0, total, 1.0))


def _device_lines(owner: IntArray, owner_next: IntArray) -> tuple[list[float | None], list[float | None]]:
    """Lines of a panel between the devices' runs of experts, as one broken line."""
    end = len(owner) - 0.5
    x: list[float | None] = []
    y: list[float | None] = []
    for at in np.flatnonzero(np.diff(np.sort(owner))) + 0.5:
        x += [-0.5, end, None]
        y += [at, at, None]
    for at in np.flatnonzero(np.diff(np.sort(owner_next))) + 0.5:
        x += [at, at, None]
        y += [-0.5, end, None]
    return x, y


def _device_ticks(plans: tuple[Plan, Plan]) -> dict[str, Any]:
    """Device numbers at the middle of their runs, where all layers of both plans have the same runs; else none."""
    devices = plans[0].topology.num_devices
    sizes = [np.bincount(row, minlength=devices) for plan in plans for row in owners(plan)]
    if any((size != sizes[0]).any() for size in sizes):
        return {"showticklabels": False}
    return {
        "tickvals": (np.cumsum(sizes[0]) - (sizes[0] + 1) / 2).tolist(),
        "ticktext": [str(device) for device in range(devices)],
    }


def _labels(rows: IntArray, columns: IntArray, owner: IntArray, owner_next: IntArray) -> list[list[str]]:
    return [[f"expert {e} on {owner[e]} to expert {f} on {owner_next[f]}" for f in columns] for e in rows]


QUANTILES = (0.5, 0.99)


def distribution_figure(evaluations: dict[str, dict[str, Evaluation]], before: str, after: str) -> Figure:
    """Cumulative share of steps over step time, a curve a plan, with p50 and p99 as dots; a choice a kind of steps.

    evaluations: kind of steps -> plan name -> evaluation.
    """
    import plotly.graph_objects as go

    names = _order(evaluations, before, after)
    traces: list[Any] = []
    choices: list[TraceChoice] = []
    for kind, by_name in evaluations.items():
        first = len(traces)
        for rank, name in enumerate(names):
            if name not in by_name:
                continue
            times = np.sort(by_name[name].step_seconds) * 1e3
            share = np.linspace(0.0, 1.0, len(times))
            marks = np.percentile(times, [100 * q for q in QUANTILES])
            important = name in (before, after)
            traces.append(
                go.Scatter(
                    x=times.astype(np.float32),
                    y=share.astype(np.float32),
                    mode="lines",
                    name=name,
                    legendgroup=name,
                    legendrank=rank,
                    line={"width": 2.5 if important else 1.2},
                    hovertemplate="%{x:.3f} ms<extra>" + name + "</extra>",
                )
            )
            traces.append(
                go.Scatter(
                    x=marks,
                    y=list(QUANTILES),
                    mode="markers",
                    name=name,
                    legendgroup=name,
                    showlegend=False,
                    marker={"size": 8 if important else 5},
                    text=["p50", "p99"],
                    hovertemplate="%{text} %{x:.3f} ms<extra>" + name + "</extra>",
                )
            )
        choices.append(TraceChoice(kind, tuple(range(first, len(traces)))))

    def layout(theme: Theme) -> dict[str, Any]:
        colours = _colours(theme, names, before, after)
        way = [colours[trace.name] for trace in traces]
        lines = [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": q,
                "y1": q,
                "line": {"color": theme.muted, "width": 0.8, "dash": "dot"},
                "layer": "below",
            }
            for q in QUANTILES
        ]
        return base_layout(theme, 420) | {
            "colorway": way,
            "xaxis": axis(theme, "predicted step time (ms)", showgrid=True, ticks="outside", showline=True),
            "yaxis": axis(
                theme,
                "share of steps at most so long",
                range=[0, 1.02],
                tickvals=[0, 0.25, 0.5, 0.75, 0.99],
                ticktext=["0", "0.25", "p50", "0.75", "p99"],
                showgrid=False,
                ticks="",
            ),
            "shapes": lines,
            "legend": {"x": 1.01, "y": 1.0, "font": {"color": theme.text, "size": 12}, "itemwidth": 30},
            "hovermode": "closest",
        }

    return make_figure(
        "times",
        "Step time",
        "Share of steps that take at most so long; further left is faster, steeper is steadier. "
        "Dots are the median and the 99th percentile; the axis does not start at zero.",
        traces,
        layout,
        choices if len(choices) > 1 else (),
        "Steps",
    )


def breakdown_figure(evaluations: dict[str, dict[str, Evaluation]], before: str, after: str) -> Figure:
    """Mean seconds of a step in dispatch, expert work and combine, a bar a plan; a choice a kind of steps."""
    import plotly.graph_objects as go

    names = _order(evaluations, before, after)
    traces: list[Any] = []
    choices: list[TraceChoice] = []
    for kind, by_name in evaluations.items():
        first = len(traces)
        present = [name for name in names if name in by_name]
        for part, field in _PARTS:
            values = [float(getattr(by_name[name], field).sum(axis=1).mean()) * 1e3 for name in present]
            traces.append(
                go.Bar(
                    x=values,
                    y=present,
                    orientation="h",
                    name=part,
                    hovertemplate="%{y}: %{x:.3f} ms " + part + "<extra></extra>",
                )
            )
        choices.append(TraceChoice(kind, tuple(range(first, len(traces)))))

    def layout(theme: Theme) -> dict[str, Any]:
        return base_layout(theme, 110 + 26 * len(names)) | {
            "colorway": [theme.parts[i % len(_PARTS)] for i in range(len(traces))],
            "barmode": "stack",
            "bargap": 0.35,
            "margin": {"l": 64, "r": 16, "t": 36, "b": 52},
            "xaxis": axis(theme, "predicted step time (ms), mean", showgrid=True, ticks="outside", rangemode="tozero"),
            "yaxis": axis(
                theme,
                "",
                autorange="reversed",
                ticks="",
                showgrid=False,
                automargin=True,
                ticklabelstandoff=6,
                tickfont={"color": theme.text},
            ),
            "legend": {
                "orientation": "h",
                "x": 0,
                "y": 1.0,
                "yanchor": "bottom",
                "traceorder": "normal",
                "font": {"color": theme.text},
            },
        }

    return make_figure(
        "breakdown",
        "What a step is spent on",
        "Mean over steps. Expert work is the slowest device's, layer by layer; the rest is waiting for activations.",
        traces,
        layout,
        choices if len(choices) > 1 else (),
        "Steps",
    )


_PARTS = (("expert work", "compute"), ("dispatch", "dispatch"), ("combine", "combine"))


def _order(evaluations: dict[str, dict[str, Evaluation]], before: str, after: str) -> list[str]:
    seen: Sequence[str] = list(dict.fromkeys(name for by_name in evaluations.values() for name in by_name))
    return [before, after, *(name for name in seen if name not in (before, after))]


def _colours(theme: Theme, names: list[str], before: str, after: str) -> dict[str, str]:
    others = [name for name in names if name not in (before, after)]
    result = {name: theme.others[i % len(theme.others)] for i, name in enumerate(others)}
    return result | {before: theme.before, after: theme.after}
