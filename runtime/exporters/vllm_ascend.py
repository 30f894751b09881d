"""vLLM-Ascend's static expert map, `additional_config.eplb_config.expert_map_path`.

Format: `expert_file_to_tensor` in vllm_ascend/eplb/core/eplb_utils.py (read in 0.23.0 and 0.26.0rc1):
{"moe_layer_count": n, "layer_list": [{"layer_id", "device_count", "device_list": [{"device_id", "device_expert":
[ids]}]}]}. Layers and devices are read by their position, MoE layers only. `generate_log2phy_map` keeps one slot an
expert and device, and counts a device's slots from device 0's distinct experts: an expert twice on a device would shift
every slot id.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ...placement.engines import engine_profile
from ...placement.errors import FileFormatError, InputError
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from ...placement.topology import Topology
from .base import Usage, checked, every_node, expert_row, load_content, plan_of_rows, quoted
from .vllm import vllm_commands


class VLLMAscend:
    """Layers and devices by their position."""

    name = "vllm-ascend"
    profile = engine_profile("vllm-ascend")

    def content(self, plan: Plan, *, suffix: str = ".json") -> str:
        if suffix != ".json":
            raise InputError(f"vLLM-Ascend takes a file whose name ends in .json, not {suffix!r}")
        devices = plan.topology.num_devices
        layers = [
            {
                "layer_id": index,
                "device_count": devices,
                "device_list": [
                    {"device_id": device, "device_expert": experts.tolist()}
                    for device, experts in enumerate(np.split(row, devices))
                ],
            }
            for index, row in enumerate(plan.physical_to_logical)
        ]
        return json.dumps({"moe_layer_count": len(layers), "layer_list": layers})

    def read(self, path: Path, model: ModelSpec, topology: Topology) -> Plan:
        """Reads every MoE layer's devices.

        Raises:
            FileFormatError: a field is missing or of another kind, layers or devices other than the model's and the
                topology's or out of order, devices with different numbers of slots or an expert twice, an id out of
                range, a layer that misses an expert; layer and device are named.
        """
        data = load_content(path)
        layers = _entries(data, "layer_list", str(path), model.layers, "MoE layers")
        if data.get("moe_layer_count") != model.layers:
            raise FileFormatError(f"{path}: moe_layer_count is {data.get('moe_layer_count')!r}, not {model.layers}")
        rows: list[list[int]] = []
        for index, layer in enumerate(layers):
            origin = f"{path}: layer_list[{index}]"
            _check_number(layer, "layer_id", index, origin)
            devices = _entries(layer, "device_list", origin, topology.num_devices, "devices")
            if "device_count" in layer:
                _check_number(layer, "device_count", len(devices), origin)
            row: list[int] = []
            for number, device in enumerate(devices):
                _check_number(device, "device_id", number, f"{origin}.device_list[{number}]")
                experts = expert_row(
                    device.get("device_expert"), f"{origin}.device_list[{number}].device_expert", model
                )
                if number and len(experts) * number != len(row):
                    raise FileFormatError(
                        f"{origin}: device {number} has {len(experts)} slots, those before another number"
                    )
                if len(set(experts)) < len(experts):
                    raise FileFormatError(
                        f"{origin}: device {number} has an expert twice ({experts}); vLLM-Ascend keeps one slot an "
                        "expert and device, and would number all slots after it wrongly"
                    )
                row += experts
            if rows and len(row) != len(rows[0]):
                raise FileFormatError(f"{origin}: {len(row)} slots, the layers before have {len(rows[0])}")
            rows.append(row)
        return plan_of_rows(rows, str(path), model, topology)

    def recognises(self, content: Any) -> bool:
        return isinstance(content, dict) and "layer_list" in content

    def usage(self, plan: Plan, path: Path, model_path: str = "MODEL") -> str:
        config = json.dumps({"eplb_config": {"expert_map_path": str(path)}})
        return Usage(
            vllm_commands(plan, model_path, f"--additional-config {quoted(config)}"),
            files=every_node(path, plan),
            applied="each worker logs 'The expert_map is' with the path at start; it writes what runs to the file that "
            f"expert_map_record_path names. {checked('FILE')}",
            back="restart without expert_map_path.",
            notes=(
                "From 0.24.0rc1 on vLLM-Ascend loads weights in the default order whatever the map says, and means to "
                "remove static maps: use 0.23, or a permuted checkpoint.",
            ),
        ).text()


def _entries(data: Any, field: str, origin: str, count: int, what: str) -> list[Any]:
    entries = data.get(field) if isinstance(data, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise FileFormatError(f"{origin}: field {field!r} must be a list of objects")
    if len(entries) != count:
        raise FileFormatError(f"{origin}: {field} has {len(entries)} entries, expected {count} {what}")
    return entries


def _check_number(entry: dict[str, Any], field: str, expected: int, origin: str) -> None:
    value = entry.get(field)
    if type(value) is not int or value != expected:
        why = "as device_list has entries" if field == "device_count" else "entries are read in order"
        raise FileFormatError(f"{origin}: {field} is {str(value)[:40]}, expected {expected}: {why}")
