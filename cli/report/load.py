"""Load by layer and device, before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .figure import Figure, make_figure
from .panels import boundaries, paired_layout
from .theme import Theme, colour_axis

if TYPE_CHECKING:
    from ...placement.evaluate import Evaluation
    from ...placement.topology import Topology

FloatArray = npt.NDArray[np.float64]


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
