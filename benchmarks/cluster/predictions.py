"""Step times that are predicted for the runtime on a calibrated cluster: by the cost model alone, and event after
event."""

from __future__ import annotations

from typing import Any

import numpy as np
import plans
from timeline import Timeline, demands

import moeplace as mp
from moeplace.placement.cost import dispatch_bytes
from moeplace.placement.evaluate import evaluate_on
from moeplace.runtime.calibration import DispatchTiming


class Predictions:
    """calibration: as `mp.runtime.calibrate` found it, as a dictionary."""

    def __init__(self, calibration: dict[str, Any]) -> None:
        self.topology = mp.Topology.from_dict(calibration["topology"])
        self._copy_seconds = {row["dispatch"]: DispatchTiming(**row).copy_seconds for row in calibration["dispatches"]}

    def of(
        self, plan: mp.Plan, steps: mp.Steps, dispatch: str, execution: str, replica_choice: Any = "share"
    ) -> dict[str, Any]:
        """Of each step "seconds", by its timeline (the model's where tokens do not come back), and "model", by the cost
        model; and means of the model's parts."""
        objective = plans.OBJECTIVE.replace(
            node_dedup=dispatch == "node_aware", execution=execution, replica_choice=replica_choice
        )
        judged = evaluate_on(plan, steps, plan.model, self.topology, objective)
        seconds = judged.step_seconds.tolist()
        if execution == "dispatch_combine":
            # Nodes of one rank have nothing to hand on, and calibration times no second hop there.
            staged = dispatch == "node_aware" and "node_aware" in self._copy_seconds
            copy_seconds = self._copy_seconds["node_aware" if staged else "flat"]
            line = Timeline(plan.model, self.topology, copy_seconds, dispatch_bytes(plan.model, objective))
            seconds = [line.seconds(layers, staged) for layers in demands(plan, steps, replica_choice == "balanced")]
        return {
            "seconds": seconds,
            "model": judged.step_seconds.tolist(),
            "transfer": float((judged.dispatch + judged.combine).sum(axis=1).mean()),
            "compute": float(judged.compute.sum(axis=1).mean()),
            "load_max_mean": float(np.mean(judged.load_max_mean)),
        }
