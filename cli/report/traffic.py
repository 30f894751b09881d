"""Traffic between devices, before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..output import quantity
from .figure import Figure, make_figure
from .panels import boundaries, paired_layout
from .theme import Theme, colour_axis

if TYPE_CHECKING:
    from ...placement.topology import Topology

FloatArray = npt.NDArray[np.float64]
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
