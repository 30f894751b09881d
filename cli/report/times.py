"""Step times: their distribution, and what they are spent on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .figure import Choice, Figure, make_figure
from .theme import Theme, axis, base_layout

if TYPE_CHECKING:
    from ...placement.evaluate import Evaluation

QUANTILES = (0.5, 0.99)


def distribution_figure(evaluations: dict[str, dict[str, Evaluation]], before: str, after: str) -> Figure:
    """Cumulative share of steps over step time, a curve a plan, with p50 and p99 as dots; a choice a kind of steps.

    evaluations: kind of steps -> plan name -> evaluation.
    """
    import plotly.graph_objects as go

    names = _order(evaluations, before, after)
    traces: list[Any] = []
    choices: list[Choice] = []
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
        choices.append(Choice(kind, tuple(range(first, len(traces)))))

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
    choices: list[Choice] = []
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
        choices.append(Choice(kind, tuple(range(first, len(traces)))))

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
