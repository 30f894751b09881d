"""Step times that the cost model predicts for the runtime on a calibrated cluster.

The model's own terms come from `placement/cost.py`, with one difference: node-aware dispatch takes the longer of its two
stages there, as where they overlap, and their sum here, since the runtime runs one after the other. Added is what the model
leaves out: what dispatch and combine take beside links, as the calibration has timed them, in proportion to copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plans

import moeplace as mp
from moeplace.placement.cost import (
    Flows,
    all_to_all_latency,
    combine_bytes,
    compute_seconds,
    dispatch_bytes,
    transfer_seconds,
)
from moeplace.placement.evaluate import evaluate_on
from moeplace.placement.replay import Demand, replay
from moeplace.runtime.calibration.result import DispatchTiming

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


class Predictions:
    """calibration: as `mp.runtime.calibrate` found it, as a dictionary."""

    def __init__(self, calibration: dict[str, Any]) -> None:
        self.topology = mp.Topology.from_dict(calibration["topology"])
        self._copy_seconds = {row["dispatch"]: DispatchTiming(**row).copy_seconds for row in calibration["dispatches"]}

    def of(self, plan: mp.Plan, steps: mp.Steps, dispatch: str, execution: str) -> dict[str, Any]:
        """Seconds of each step, and means over steps of their parts."""
        staged = dispatch == "node_aware"
        objective = plans.OBJECTIVE.replace(node_dedup=staged, execution=execution)
        judged = evaluate_on(plan, steps, plan.model, self.topology, objective)
        transfer, compute, handling = [], [], []
        for demand in replay(plan, steps, self.topology, objective):
            seconds = self._moved(demand.dispatch, dispatch_bytes(plan.model, objective), staged)
            if demand.combine is not None:
                seconds = seconds + self._moved(demand.combine, combine_bytes(plan.model, objective), staged)
            transfer.append(seconds.sum(axis=1))
            work = compute_seconds(demand.tokens, demand.experts_hit, plan.model, self.topology)
            compute.append(work.max(axis=2).sum(axis=1))
            handling.append(self._handled(demand, staged).sum(axis=1))
        moved, worked, handled = map(np.concatenate, (transfer, compute, handling))
        return {
            "seconds": (moved + worked + handled).tolist(),
            "model": judged.step_seconds.tolist(),
            "transfer": float(moved.mean()),
            "compute": float(worked.mean()),
            "handling": float(handled.mean()),
            "load_max_mean": float(judged.load_max_mean.mean()),
        }

    def _moved(self, flows: Flows, copy_bytes: float, staged: bool) -> FloatArray:
        """[S, L] seconds of an all-to-all, stage after stage."""
        latency = all_to_all_latency(self.topology, node_dedup=staged)
        if not staged:
            return transfer_seconds(flows, copy_bytes, self.topology, latency)
        inside = transfer_seconds(Flows(flows.intra, np.zeros_like(flows.inter)), copy_bytes, self.topology, 0.0)
        between = transfer_seconds(Flows(np.zeros_like(flows.intra), flows.inter), copy_bytes, self.topology, 0.0)
        return latency + inside + between

    def _handled(self, demand: Demand, staged: bool) -> FloatArray:
        """[S, L] seconds beside links, in proportion to a rank's copies, those that stay on it included."""
        copies = demand.reached.sum(axis=2) / self.topology.num_devices
        if not staged or "node_aware" not in self._copy_seconds:
            return np.asarray(copies * self._copy_seconds["flat"])
        copies = copies + demand.node_reached.sum(axis=2) / self.topology.num_devices
        return np.asarray(copies * self._copy_seconds["node_aware"])
