"""TensorRT-LLM's YAML for `moe_config.load_balancer`.

Format: `MoeLoadBalancerConfig` in tensorrt_llm/llmapi/llm_args.py, a pydantic model that forbids other fields:
num_slots, initial_global_assignments {absolute layer index: [num_slots expert ids]}, layer_updates_per_iter (0:
static). Slots divide over ranks in equal runs; a MoE layer without an entry is a KeyError at start. TensorRT-LLM routes
on logical experts and maps them afterwards, so expert groups of the model do not restrict a plan.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...placement.engines import engine_profile
from ...placement.errors import FileFormatError, InputError, UnsupportedError
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from ...placement.topology import Topology
from .base import Usage, check_layer_count, every_node, expert_row, load_content, plan_of_rows, quoted

SLOTS, ASSIGNMENTS, UPDATES = "num_slots", "initial_global_assignments", "layer_updates_per_iter"


class TensorRTLLM:
    """Layers by their absolute index."""

    name = "trtllm"
    profile = engine_profile("trtllm")

    def content(self, plan: Plan, *, extra_layers: Sequence[int] = ()) -> str:
        """extra_layers: MoE layers the plan does not know (DeepSeek-V3's MTP layer 61), laid out as slot i mod E."""
        rows = dict(zip(plan.moe_layers, plan.physical_to_logical.tolist(), strict=True))
        for layer in extra_layers:
            if layer in rows or layer < 0:
                raise InputError(f"extra_layers: layer {layer} is in the plan, or negative; name layers it lacks")
            check_layer_count("extra_layers: layer", layer)
            rows[layer] = [slot % plan.model.experts for slot in range(plan.num_slots)]
        lines = [f"{SLOTS}: {plan.num_slots}", f"{UPDATES}: 0", f"{ASSIGNMENTS}:"]
        lines += [f"  {layer}: [{', '.join(map(str, row))}]" for layer, row in sorted(rows.items())]
        return "\n".join(lines) + "\n"

    def read(self, path: Path, model: ModelSpec, topology: Topology) -> Plan:
        """Reads the entries of the model's MoE layers; others (an MTP layer's) are checked and left.

        Raises:
            FileFormatError: not YAML, aliases or deep nesting, an unknown field, a wrong number of updates, a MoE layer
                without an entry, an entry not as long as num_slots, an id out of range, a layer that misses an expert;
                the layer is named.
        """
        data = load_content(path)
        if not isinstance(data, dict) or not set(data) <= {SLOTS, ASSIGNMENTS, UPDATES}:
            fields = sorted(map(str, data))[:5] if isinstance(data, dict) else type(data).__name__
            raise FileFormatError(f"{path}: expected the fields {SLOTS}, {ASSIGNMENTS} and {UPDATES}, found {fields}")
        slots, entries = data.get(SLOTS), data.get(ASSIGNMENTS)
        if _updates(data, path):
            warnings.warn(
                f"{path}: {UPDATES} is {data[UPDATES]}: TensorRT-LLM moves experts while it runs, and this is where "
                "they begin",
                stacklevel=2,
            )
        if type(slots) is not int or slots < model.experts:
            raise FileFormatError(f"{path}: {SLOTS} is {slots!r}, expected a whole number of at least {model.experts}")
        if not isinstance(entries, dict):
            raise FileFormatError(f"{path}: {ASSIGNMENTS} must map layers to lists, found {type(entries).__name__}")
        entries = assigned_layers(entries, f"{path}: {ASSIGNMENTS}")
        missing = [layer for layer in model.moe_layers if layer not in entries]
        if missing:
            raise FileFormatError(
                f"{path}: {ASSIGNMENTS} has no entry for MoE layer {missing[0]} ({len(missing)} missing in all); "
                "TensorRT-LLM counts dense layers too"
            )
        for layer, row in entries.items():
            expert_row(row, f"{path}: {ASSIGNMENTS}[{layer}]", model, slots)
        return plan_of_rows([entries[layer] for layer in model.moe_layers], str(path), model, topology)

    def recognises(self, content: Any) -> bool:
        return (
            isinstance(content, dict) and ASSIGNMENTS in content and SLOTS in content and "record_type" not in content
        )

    def usage(self, plan: Plan, path: Path, model_path: str = "MODEL") -> str:
        devices, nodes = plan.topology.num_devices, plan.topology.num_nodes
        launch = "" if nodes == 1 else f"mpirun -n {devices} --map-by ppr:{devices // nodes}:node trtllm-llmapi-launch "
        return Usage(
            [
                "cat > extra_llm_api_options.yaml <<'EOF'\nenable_attention_dp: true\nmoe_config:\n"
                f"  load_balancer: {json.dumps(str(path))}\nEOF\n"
                f"{launch}trtllm-serve {quoted(model_path)} --tp_size {devices} --ep_size {devices} "
                "--extra_llm_api_options extra_llm_api_options.yaml"
            ],
            files=every_node(path, plan),
            applied="TensorRT-LLM says nothing of it; with ENABLE_PERFECT_ROUTER unset and EXPERT_STATISTIC_PATH set "
            "it records slots, which `moeplace import --assignments` maps back by this file.",
            back="restart without moe_config.load_balancer.",
            notes=(
                "TensorRT-LLM ignores the load balancer, without a word, for architectures outside its "
                "moe_model_arch_list (OLMoE is not in it) and without expert parallelism over more than one rank.",
            ),
        ).text()


def read_assignments(path: str | Path) -> dict[int, list[int]]:
    """The layout a load balancer's YAML starts with: for each layer's absolute index, the expert in each slot.

    Raises:
        InputError: no such file. FileFormatError: not such a file, or entries other than lists of num_slots ids.
        UnsupportedError: experts move while it runs: slots are not those of the file any more.
    """
    source = Path(path)
    data = load_content(source)
    if isinstance(data, dict) and (updates := _updates(data, source)):
        raise UnsupportedError(
            f"{source}: {UPDATES} is {updates}: experts move while TensorRT-LLM runs, so that the slots it records are "
            "those of this file at the start alone; record with 0"
        )
    entries = data.get(ASSIGNMENTS) if isinstance(data, dict) else None
    slots = data.get(SLOTS) if isinstance(data, dict) else None
    if not isinstance(entries, dict) or not entries or type(slots) is not int:
        raise FileFormatError(f"{source}: expected {SLOTS} and {ASSIGNMENTS}, as a load balancer's file has them")
    rows = assigned_layers(entries, f"{source}: {ASSIGNMENTS}")
    for layer, row in rows.items():
        whole = isinstance(row, list) and len(row) == slots and all(type(e) is int and 0 <= e < slots for e in row)
        if not whole:
            raise FileFormatError(f"{source}: {ASSIGNMENTS}[{layer}] is not a list of {slots} expert ids")
    return {layer: list(row) for layer, row in rows.items()}


def _updates(data: dict[Any, Any], path: Path) -> int:
    """Layers whose experts move after each iteration; 0 for none.

    Raises:
        FileFormatError: no such number.
    """
    value = data.get(UPDATES, 0)
    if type(value) is not int or value < 0:
        raise FileFormatError(f"{path}: {UPDATES} is {str(value)[:40]!r}, expected a whole number of at least 0")
    return value


def assigned_layers(entries: dict[Any, Any], origin: str) -> dict[int, Any]:
    """The entries by whole numbers: pydantic takes quoted layers for numbers, as it takes bare ones.

    Raises:
        FileFormatError: a key that is no layer, or one given twice.
    """
    result: dict[int, Any] = {}
    for key, row in entries.items():
        # Of a huge number only its length is looked at.
        number = int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10 else key
        if type(number) is not int or number < 0 or number in result:
            twice = " twice" if type(number) is int and number in result else ""
            raise FileFormatError(f"{origin}[{str(key)[:20]}]{twice}: expected each layer's absolute index once")
        result[number] = row
    return result
