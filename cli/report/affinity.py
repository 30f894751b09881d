"""Expert affinity: where tokens go from one layer to the next, experts ordered by the device that holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .figure import Choice, Figure, make_figure
from .panels import paired_layout
from .theme import Theme, colour_axis

if TYPE_CHECKING:
    from ...placement.plan import Plan

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

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
    choices: list[Choice] = []
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
            Choice(
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
