"""vLLM's expert maps, as its open pull requests would read them; no release up to 0.33 reads a file of its own.

Forms, each read in its pull request's own code (vllm-project/vllm):

- "49572": `eplb_config.initial_expert_map_path`, a JSON list [MoE layers][slots] of logical experts, or one row for
  all. The default, and what moeplace's policy takes (`vllm_policy`), which is what works with releases.
- "41141": `eplb_config.initial_mapping_path`, a line of JSON: {"record_type": "eplb_initial_mapping", "version": 1,
  "num_redundant_experts", "num_slots", "initial_global_assignments": {"0": [slots], ...}}, MoE layers from 0.
- "53022": `eplb_config.expert_map_path`, for DeepSeek-V4 alone: a JSON list with a row a layer of the model, draft
  (MTP) layers after the others. Without replicas the router is permuted, so that groups must stay whole.

vLLM routes on logical experts and maps them afterwards, so that expert groups do not restrict the first two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...placement.engines import Constraint, engine_profile, violations
from ...placement.errors import FileFormatError, InputError, UnsupportedError
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from ...placement.topology import Topology
from .base import Usage, every_node, expert_row, load_content, model_rows, plan_of_rows, quoted

FIELDS: dict[str, str] = {
    "49572": "initial_expert_map_path",
    "41141": "initial_mapping_path",
    "53022": "expert_map_path",
}
RECORD, ASSIGNMENTS = "eplb_initial_mapping", "initial_global_assignments"


class VLLM:
    """MoE layers only, in their order; read also with one row for all layers."""

    name = "vllm"
    profile = engine_profile("vllm")

    def content(self, plan: Plan, *, form: str = "49572", hidden_layers: int | None = None) -> str:
        """form: the pull request whose form is written. hidden_layers: with 53022, layers of the model, draft layers
        included, where they follow the last MoE layer.

        Raises:
            InputError: no such form. UnsupportedError: 53022 and layers that are not MoE, or parted groups.
        """
        if form not in FIELDS:
            raise InputError(f"form {form!r} is none of vLLM's pull requests: {', '.join(FIELDS)}")
        if form != "53022" and hidden_layers is not None:
            raise InputError("hidden_layers goes with form 53022: the other forms count MoE layers only")
        if form == "49572":
            return json.dumps(plan.physical_to_logical.tolist())
        if form == "53022":
            if plan.moe_layers != tuple(range(plan.model.layers)):
                raise UnsupportedError(
                    f"form 53022 is for DeepSeek-V4, whose layers are all MoE; this plan's are {plan.moe_layers}"
                )
            if plan.num_slots == plan.model.experts and (parted := violations(plan, {Constraint.GROUP_ROWS})):
                raise UnsupportedError(f"form 53022 permutes the router where there are no replicas: {parted[0]}")
            return json.dumps(model_rows(plan, plan.physical_to_logical, hidden_layers).tolist())
        record = {
            "record_type": RECORD,
            "version": 1,
            "num_redundant_experts": plan.num_slots - plan.model.experts,
            "num_slots": plan.num_slots,
            ASSIGNMENTS: {str(index): row for index, row in enumerate(plan.physical_to_logical.tolist())},
        }
        return json.dumps(record) + "\n"

    def read(self, path: Path, model: ModelSpec, topology: Topology) -> Plan:
        """Reads a row a MoE layer, or one row for all, in any of the forms; rows of draft layers behind them are left.

        Raises:
            FileFormatError: not a list of lists or such a record, rows other than the model's MoE layers, rows of
                different lengths, an id out of range, a layer that misses an expert; the row is named.
        """
        data = load_content(path)
        if isinstance(data, list) and data and not isinstance(data[0], list):
            data = [data] * model.layers
        data = map_rows(data, path)
        if model.moe_layers == tuple(range(model.layers)):
            # Rows of draft layers, which form 53022 puts behind, lie as they would without a plan.
            data = data[: model.layers] + [row for row in data[model.layers :] if not is_default(row, model)]
        if len(data) != model.layers:
            raise FileFormatError(
                f"{path}: {len(data)} rows, the model has {model.layers} MoE layers; vLLM does not count dense layers"
            )
        slots = len(expert_row(data[0], f"{path}: row 0", model))
        rows = [expert_row(row, f"{path}: row {index}", model, slots) for index, row in enumerate(data)]
        return plan_of_rows(rows, str(path), model, topology)

    def recognises(self, content: Any) -> bool:
        return isinstance(content, list) or (isinstance(content, dict) and content.get("record_type") == RECORD)

    def usage(self, plan: Plan, path: Path, model_path: str = "MODEL") -> str:
        config = json.dumps({"num_redundant_experts": plan.num_slots - plan.model.experts})
        served = vllm_commands(plan, model_path, f"--enable-eplb --eplb-config {quoted(config)}")
        forms = "; ".join(f'#{number} "{field}" (export --form {number})' for number, field in FIELDS.items())
        return Usage(
            [f"MOEPLACE_VLLM_PLAN={quoted(path)} {line}" for line in served],
            needs="moeplace in vLLM's environment on every node (`pip install` of its checkout or wheel, which brings "
            "numpy and pydantic): its plug-in serves the map in EPLB's place.",
            files=every_node(path, plan),
            applied="each worker logs 'moeplace serves the map' when the plug-in is installed; the map is in force "
            "after the first rebalance, step_interval - step_interval // 4 steps on (750 by default; a smaller "
            "step_interval in --eplb-config brings it forward). vLLM gives its map to nobody; on each node, "
            "`moeplace doctor --file FILE --plan PLAN` says whether the file is the plan.",
            back="restart without MOEPLACE_VLLM_PLAN (vLLM then balances by itself) or without --enable-eplb.",
            notes=(
                "vLLM up to 0.33 reads no map from a file, and its --eplb-config refuses fields it does not know. "
                f"Built from a pull request it takes the file's path there instead of the variable: {forms}; "
                '#41141 with "disable_online_rebalancing": true besides.',
            ),
        ).text()


def vllm_commands(plan: Plan, model_path: str, options: str) -> list[str]:
    """The command of each node: attention data-parallel, experts over all ranks."""
    devices = plan.topology.num_devices
    common = f"vllm serve {quoted(model_path)} --data-parallel-size {devices} --enable-expert-parallel {options}"
    if plan.topology.num_nodes == 1:
        return [common]
    lines, start = [], 0
    for size in plan.topology.node_size.tolist():
        line = f"{common} --data-parallel-size-local {size} --data-parallel-address HEAD --data-parallel-rpc-port 13345"
        lines.append(f"{line} --headless --data-parallel-start-rank {start}" if start else line)
        start += size
    return lines


def is_default(row: Any, model: ModelSpec) -> bool:
    """Whether slot i holds expert i modulo their number."""
    return isinstance(row, list) and row == [slot % model.experts for slot in range(len(row))]


def map_rows(content: Any, path: Path) -> list[list[int]]:
    """Rows of MoE layers in any of the forms, of a file's content.

    Raises:
        FileFormatError: neither a list of lists nor such a record; what is there is named.
    """
    if isinstance(content, dict):
        entries = content.get(ASSIGNMENTS)
        if content.get("record_type") != RECORD or not isinstance(entries, dict):
            raise FileFormatError(f"{path}: expected rows of experts, or a record {RECORD!r} with {ASSIGNMENTS}")
        if content.get("version") != 1:
            raise FileFormatError(f"{path}: version is {str(content.get('version'))[:20]}, this release reads 1")
        if set(entries) != {str(index) for index in range(len(entries))}:
            raise FileFormatError(
                f"{path}: {ASSIGNMENTS} names layers {sorted(map(str, entries))[:5]}, expected MoE layers from 0"
            )
        slots = content.get("num_slots")
        for index, row in entries.items():
            if slots is not None and isinstance(row, list) and len(row) != slots:
                raise FileFormatError(
                    f"{path}: {ASSIGNMENTS}[{index}] has {len(row)} slots, num_slots is {str(slots)[:20]}"
                )
        content = [entries[str(index)] for index in range(len(entries))]
    if not isinstance(content, list) or not content:
        kind = "an empty list" if content == [] else type(content).__name__
        raise FileFormatError(f"{path}: expected a list with a row a MoE layer, found {kind}")
    return content
