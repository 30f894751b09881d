"""TensorRT-LLM's YAML for `moe_config.load_balancer`.

Format: `MoeLoadBalancerConfig` in tensorrt_llm/llmapi/llm_args.py, a pydantic model that forbids other fields:
num_slots, initial_global_assignments {absolute layer index: [num_slots expert ids]}, layer_updates_per_iter (0:
static). Slots divide over ranks in equal runs; a MoE layer without an entry is a KeyError at start. TensorRT-LLM routes
on logical experts and maps them afterwards, so expert groups of the model do not restrict a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...placement.engines import engine_profile
from ...placement.errors import FileFormatError, InputError
from ...placement.files import read_text
from ...placement.model import ModelSpec
from ...placement.plan import Plan
from ...placement.topology import Topology
from .base import FILE_LIMIT, expert_row, plan_of_rows

SLOTS, ASSIGNMENTS, UPDATES = "num_slots", "initial_global_assignments", "layer_updates_per_iter"
DEEPEST = 4
"""Levels of YAML nesting the format needs, documents and scalars included."""


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
            rows[layer] = [slot % plan.model.experts for slot in range(plan.num_slots)]
        lines = [f"{SLOTS}: {plan.num_slots}", f"{UPDATES}: 0", f"{ASSIGNMENTS}:"]
        lines += [f"  {layer}: [{', '.join(map(str, row))}]" for layer, row in sorted(rows.items())]
        return "\n".join(lines) + "\n"

    def read(self, path: Path, model: ModelSpec, topology: Topology) -> Plan:
        """Reads the entries of the model's MoE layers; others (an MTP layer's) are checked and left.

        Raises:
            FileFormatError: not YAML, aliases or deep nesting, an unknown field, a MoE layer without an entry, an entry
                not as long as num_slots, an id out of range, a layer that misses an expert; the layer is named.
        """
        data = _load(path)
        if not isinstance(data, dict) or not set(data) <= {SLOTS, ASSIGNMENTS, UPDATES}:
            fields = sorted(map(str, data))[:5] if isinstance(data, dict) else type(data).__name__
            raise FileFormatError(f"{path}: expected the fields {SLOTS}, {ASSIGNMENTS} and {UPDATES}, found {fields}")
        slots, entries = data.get(SLOTS), data.get(ASSIGNMENTS)
        if type(slots) is not int or slots < model.experts:
            raise FileFormatError(f"{path}: {SLOTS} is {slots!r}, expected a whole number of at least {model.experts}")
        if not isinstance(entries, dict):
            raise FileFormatError(f"{path}: {ASSIGNMENTS} must map layers to lists, found {type(entries).__name__}")
        missing = [layer for layer in model.moe_layers if layer not in entries]
        if missing:
            raise FileFormatError(
                f"{path}: {ASSIGNMENTS} has no entry for MoE layer {missing[0]} ({len(missing)} missing in all); "
                "TensorRT-LLM counts dense layers too"
            )
        for layer, row in entries.items():
            expert_row(row, f"{path}: {ASSIGNMENTS}[{layer}]", model, slots)
        return plan_of_rows([entries[layer] for layer in model.moe_layers], str(path), model, topology)

    def usage(self, plan: Plan, path: Path) -> str:
        return (
            f"trtllm-serve --ep_size {plan.topology.num_devices} --extra_llm_api_options FILE, FILE holding "
            f"enable_attention_dp: true and moe_config: {{load_balancer: {path}}}\n"
            "TensorRT-LLM ignores the load balancer, without a word, for architectures outside its moe_model_arch_list "
            "(OLMoE is not in it) and without expert parallelism over more than one rank."
        )


def read_assignments(path: str | Path) -> dict[int, list[int]]:
    """The layout a load balancer's YAML starts with: for each layer's absolute index, the expert in each slot.

    Raises:
        InputError: no such file. FileFormatError: not such a file, or entries other than lists of num_slots ids.
    """
    source = Path(path)
    data = _load(source)
    entries = data.get(ASSIGNMENTS) if isinstance(data, dict) else None
    slots = data.get(SLOTS) if isinstance(data, dict) else None
    if not isinstance(entries, dict) or not entries or type(slots) is not int:
        raise FileFormatError(f"{source}: expected {SLOTS} and {ASSIGNMENTS}, as a load balancer's file has them")
    for layer, row in entries.items():
        whole = isinstance(row, list) and len(row) == slots and all(type(e) is int and 0 <= e < slots for e in row)
        if type(layer) is not int or layer < 0 or not whole:
            raise FileFormatError(f"{source}: {ASSIGNMENTS}[{str(layer)[:20]}] is not a list of {slots} expert ids")
    return {int(layer): list(row) for layer, row in entries.items()}


def _load(path: Path) -> Any:
    import yaml

    text = read_text(path, limit_bytes=FILE_LIMIT)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_shape(yaml.parse(text, Loader=loader), path)
        return yaml.load(text, Loader=loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise FileFormatError(f"{path}: not YAML, or truncated ({str(error)[:200]})") from None


def _check_shape(events: Any, path: Path) -> None:
    """Refuses what the format has no use for and a loader chokes on: aliases, tags, more documents, deep nesting."""
    import yaml

    depth = documents = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise FileFormatError(f"{path}: line {event.start_mark.line + 1}: aliases and tags are not accepted")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        if depth > DEEPEST or documents > 1:
            raise FileFormatError(f"{path}: line {event.start_mark.line + 1}: nested deeper than this format goes")
