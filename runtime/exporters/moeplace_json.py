"""This project's own plan file: the only format that keeps shares, provenance and proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...placement.engines import engine_profile
from ...placement.errors import InputError
from ...placement.model import ModelSpec
from ...placement.plan import FORMAT, Plan, plan_to_dict
from ...placement.topology import Topology


class MoeplaceJson:
    """What `Plan.save` writes. Any plan fits."""

    name = "moeplace"
    profile = engine_profile("moeplace")

    def content(self, plan: Plan) -> str:
        return json.dumps(plan_to_dict(plan), allow_nan=False)

    def read(self, path: Path, model: ModelSpec, topology: Topology) -> Plan:
        """Reads a plan file, which must be for that model and topology.

        Raises:
            FileFormatError: see `Plan.load`. InputError: the plan is for another model or topology.
        """
        plan = Plan.load(path)
        for field, expected, stored in (("model", model, plan.model), ("topology", topology, plan.topology)):
            if expected != stored:
                raise InputError(
                    f"{path}: this plan is for another {field} ({_short(stored)}) than the one given "
                    f"({_short(expected)}); Plan.load reads it with its own"
                )
        return plan

    def recognises(self, content: Any) -> bool:
        return isinstance(content, dict) and content.get("format") == FORMAT

    def usage(self, plan: Plan, path: Path, model_path: str = "MODEL") -> str:
        return f"mp.Plan.load({str(path)!r})"


def _short(record: ModelSpec | Topology) -> str:
    if isinstance(record, ModelSpec):
        return f"{record.layers} layers, {record.experts} experts, top-{record.top_k}"
    return f"{record.num_devices} devices in {record.num_nodes} nodes, {record.name}"
