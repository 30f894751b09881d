"""What a plan's layers wait for: which term of the cost model binds, in how many steps, for how long, and where."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .binding_codes import LATENCY, NOTHING
from .evaluate import Evaluation

FloatArray = npt.NDArray[np.float64]

PHASES = ("dispatch", "compute", "combine")
TERMS = ("compute", "memory", "intra", "inter", "latency")
"""Arithmetic of a device; its reading of weights; links inside a node; links between nodes; latency alone."""


@dataclass(frozen=True, eq=False)
class BindingTerms:
    """Per layer, phase and term, over the steps of an evaluation.

    steps: [L, 3, 5] fraction of steps in which the term binds the phase. seconds: [L, 3, 5] mean seconds a step of the
    phases it binds; their sum is the mean step time. device_steps: [L, 3, G] fraction of steps in which that device is
    the one waited for (its arithmetic, its memory or its links); node_steps: [L, 3, N] the same of nodes' links.
    Phases are `PHASES`, terms `TERMS`.
    """

    steps: FloatArray
    seconds: FloatArray
    device_steps: FloatArray
    node_steps: FloatArray

    def term_seconds(self) -> dict[str, float]:
        """Mean seconds of a step that wait for each term, over all layers."""
        return dict(zip(TERMS, self.seconds.sum(axis=(0, 1)).tolist(), strict=True))

    def layer_seconds(self) -> FloatArray:
        """[L, 5] mean seconds of a step that wait for each term in each layer."""
        return np.asarray(self.seconds.sum(axis=1))


def binding_terms(evaluation: Evaluation) -> BindingTerms:
    """Reads an evaluation's codes. Where terms tie, the earlier of `TERMS` and the lower device is named."""
    devices, nodes = evaluation.device_bytes.shape[1], evaluation.node_bytes.shape[1]
    layers = evaluation.dispatch.shape[1]
    steps, seconds = np.zeros((2, layers, len(PHASES), len(TERMS)))
    device_steps, node_steps = np.zeros((layers, len(PHASES), devices)), np.zeros((layers, len(PHASES), nodes))
    for phase, name in enumerate(PHASES):
        codes, spent = getattr(evaluation, f"{name}_at"), getattr(evaluation, name)
        first, second = ("compute", "memory") if name == "compute" else ("intra", "inter")
        kinds = {
            first: (codes >= 0) & (codes < devices),
            second: codes >= devices,
            "latency": codes == LATENCY,
        }
        for term, binds in kinds.items():
            steps[:, phase, TERMS.index(term)] = binds.mean(axis=0)
            seconds[:, phase, TERMS.index(term)] = np.where(binds, spent, 0.0).mean(axis=0)
        on_node = second == "inter"
        for layer in range(layers):
            column = codes[:, layer]
            column = column[(column != NOTHING) & (column != LATENCY)]
            owners = column if on_node else column % devices
            counted = np.bincount(owners, minlength=devices + nodes) / len(codes)
            device_steps[layer, phase] = counted[:devices]
            if on_node:
                node_steps[layer, phase] = counted[devices : devices + nodes]
    return BindingTerms(steps, seconds, device_steps, node_steps)
