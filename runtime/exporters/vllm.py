"""vLLM's proposed initial expert map.

No release up to 0.33 reads a plan from a file; pull request 49572 of vllm-project/vllm adds
`eplb_config.initial_expert_map_path`: a JSON list [MoE layers][slots] of logical experts, or one row for all layers.
Row i is the i-th MoE layer: dense layers are not counted. What works today is `vllm_policy`, or a permuted checkpoint.
vLLM routes on logical experts and maps them afterwards, so expert groups of the model do not restrict a plan.
"""

from __future__ import annotations

import json
from pathlib import Path

from ...placement.engines import engine_profile
from ...placement.errors import FileFormatError
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from ...placement.topology import Topology
from .base import expert_row, plan_of_rows, read_json


class VLLM:
    """[MoE layers][slots]; read also with one row for all layers."""

    name = "vllm"
    profile = engine_profile("vllm")

    def content(self, plan: Plan) -> str:
        return json.dumps(plan.physical_to_logical.tolist())

    def read(self, path: Path, model: ModelSpec, topology: Topology) -> Plan:
        """Reads a row a MoE layer, or one row for all.

        Raises:
            FileFormatError: not a list of lists, rows other than the model's MoE layers, rows of different lengths, an
                id out of range, a layer that misses an expert; the row is named.
        """
        data = read_json(path)
        if not isinstance(data, list) or not data:
            raise FileFormatError(f"{path}: expected a list with a row a MoE layer, found {type(data).__name__}")
        if not isinstance(data[0], list):
            data = [data] * model.layers
        if len(data) != model.layers:
            raise FileFormatError(
                f"{path}: {len(data)} rows, the model has {model.layers} MoE layers; vLLM does not count dense layers"
            )
        slots = len(expert_row(data[0], f"{path}: row 0", model))
        rows = [expert_row(row, f"{path}: row {index}", model, slots) for index, row in enumerate(data)]
        return plan_of_rows(rows, str(path), model, topology)

    def usage(self, plan: Plan, path: Path) -> str:
        config = {"num_redundant_experts": plan.num_slots - plan.model.experts, "initial_expert_map_path": str(path)}
        return (
            f"vllm serve --enable-expert-parallel --enable-eplb --eplb-config '{json.dumps(config)}'\n"
            "No release reads initial_expert_map_path yet: without it, start vLLM with MOEPLACE_VLLM_PLAN naming the "
            "plan's own file, and moeplace's policy serves it, or permute the checkpoint."
        )
