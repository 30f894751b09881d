"""SGLang's `--init-expert-location` file, as JSON or as a tensor file (.pt).

Format: `compute_initial_expert_location_metadata` in sglang/srt/eplb/expert_location.py (read in 0.5.23): the file's
suffix decides between `torch.load` (.pt) and JSON (.json), and holds {"physical_to_logical_map": [layers][slots]} and
no other key, for every key is passed on as an argument. Row i is the model's layer i, dense layers included; SGLang
checks neither the number of rows nor that experts are covered. It routes on logical experts and maps them afterwards,
so expert groups of the model do not restrict a plan. Among replicas it prefers one on the token's own GPU, then one on
its node, where its all-to-all backend allows; equal shares are what is left. Ranks that are lost keep their numbers:
its elasticity-aware EPLB leaves expert 0 in their slots, as is written here for devices without any.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..._types import IntArray
from ...placement.engines import engine_profile
from ...placement.errors import FileFormatError, InputError
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from ...placement.topology import Topology
from .base import expert_row, plan_of_rows, read_json

KEY = "physical_to_logical_map"


class SGLang:
    """Rows of dense layers hold expert i mod E, as SGLang's own trivial map has them."""

    name = "sglang"
    profile = engine_profile("sglang")

    def content(self, plan: Plan, *, hidden_layers: int | None = None) -> str:
        """hidden_layers: `num_hidden_layers` of the model; wanted when dense layers follow the last MoE layer."""
        count = plan.moe_layers[-1] + 1 if hidden_layers is None else hidden_layers
        if count <= plan.moe_layers[-1]:
            raise InputError(f"hidden_layers ({count}) must exceed the last MoE layer's index ({plan.moe_layers[-1]})")
        rows = _with_lost_ranks(plan)
        table = np.tile(np.arange(rows.shape[1]) % plan.model.experts, (count, 1))
        table[list(plan.moe_layers)] = rows
        return json.dumps({KEY: table.tolist()})

    def read(self, path: Path, model: ModelSpec, topology: Topology) -> Plan:
        """Reads the rows of the model's MoE layers.

        Raises:
            FileFormatError: no such key, another key beside it, too few rows, a row of the wrong length, an id out of
                range, a layer that misses an expert; the row is named.
        """
        data = read_json(path)
        if not isinstance(data, dict) or set(data) != {KEY} or not isinstance(data[KEY], list):
            fields = sorted(map(str, data))[:5] if isinstance(data, dict) else type(data).__name__
            raise FileFormatError(
                f"{path}: expected one key {KEY!r} holding a list, found {fields}; SGLang takes no other key"
            )
        table = data[KEY]
        last = model.moe_layers[-1]
        if len(table) <= last:
            raise FileFormatError(
                f"{path}: {len(table)} rows, the model's last MoE layer is {last}; SGLang counts dense layers too"
            )
        slots = len(expert_row(table[0], f"{path}: {KEY}[0]", model))
        rows = [expert_row(row, f"{path}: {KEY}[{index}]", model, slots) for index, row in enumerate(table)]
        return plan_of_rows([rows[layer] for layer in model.moe_layers], str(path), model, topology)

    def usage(self, plan: Plan, path: Path) -> str:
        options = f"--init-expert-location {path} --ep-size {plan.topology.num_devices}"
        redundant = plan.num_slots - plan.model.experts
        options += f" --ep-num-redundant-experts {redundant}" if redundant else ""
        return (
            f"python -m sglang.launch_server {options}\n"
            "SGLang ignores the option, without a word, for model classes that do not declare expert locations: "
            "Mixtral and OLMoE as of 0.5.23. Permute the checkpoint for those."
        )


def _with_lost_ranks(plan: Plan) -> IntArray:
    """[L, P] the slot table with as many slots on every device, expert 0 in those of devices that have none."""
    counts = np.bincount(plan.slot_device, minlength=plan.topology.num_devices)
    rows = np.zeros((plan.model.layers, len(counts), int(counts.max())), dtype=np.int64)
    rows[:, counts > 0] = plan.physical_to_logical.reshape(plan.model.layers, -1, int(counts.max()))
    return rows.reshape(plan.model.layers, -1)
