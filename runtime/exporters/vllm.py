"""vLLM's expert maps, as its open pull requests would read them; no release up to 0.33 reads a file of its own.

Forms, each read in its pull request's own code (vllm-project/vllm):

- "49572": `eplb_config.initial_expert_map_path`, a JSON list [MoE layers][slots] of logical experts, or one row for
  all. The default, and what moeplace's policy takes (below), which is what works with releases.
- "41141": `eplb_config.initial_mapping_path`, a line of JSON: {"record_type": "eplb_initial_mapping", "version": 1,
  "num_redundant_experts", "num_slots", "initial_global_assignments": {"0": [slots], ...}}, MoE layers from 0.
- "53022": `eplb_config.expert_map_path`, for DeepSeek-V4 alone: a JSON list with a row a layer of the model, draft
  (MTP) layers after the others. Without replicas the router is permuted, so that groups must stay whole.

vLLM routes on logical experts and maps them afterwards, so that expert groups do not restrict the first two.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..._types import FloatArray, IntArray
from ..._vllm_plugin import PLAN_VARIABLE
from ...placement.engines import Constraint, check_plan, engine_profile, violations
from ...placement.errors import FileFormatError, InputError, UnsupportedError
from ...placement.model import ModelSpec
from ...placement.plan import FORMAT, Plan
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


# A plan served, or a rebalancer of one's own, inside a running vLLM: a policy in place of its EPLB's default.
#
# vLLM calls `EPLB_POLICIES["default"].rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_ranks,
# current)` (vllm/distributed/eplb/policy). Up to 0.18 it wants three maps back, later the physical-to-logical map
# alone; both are told apart by the return annotation of the policy installed (checked: 0.18.0, 0.33.0). vLLM loads the
# plugins of the group `vllm.general_plugins` in each of its processes, which is where `install` belongs.

Rebalance = Callable[[FloatArray, int, int, int, int], IntArray | None]
"""(load [L, E], slots, expert groups, nodes, ranks) -> physical_to_logical [L, P], or None to leave it to vLLM."""

log = logging.getLogger("vllm.moeplace")
"""Below vLLM's own, which is the one that is shown."""


def install() -> None:
    """vLLM plugin: serves the map in the file that `MOEPLACE_VLLM_PLAN` names; without the variable does nothing.

    The file is a plan, or what `moeplace export --for vllm` wrote of one.

    Raises:
        FileFormatError, InputError: no plan there. UnsupportedError: vLLM cannot express it.
    """
    path = os.environ.get(PLAN_VARIABLE)
    if path:
        install_policy(_rebalancer_of(Path(path)))
        log.info("moeplace serves the map in %s", path)


def plan_rebalancer(plan: Plan) -> Rebalance:
    """A rebalancer that answers with the plan, whatever the load.

    A model of another shape than the plan's (a draft model beside the served one) is left to vLLM's own policy.

    Raises:
        UnsupportedError: vLLM cannot express the plan; see `check_plan`. The rebalancer raises InputError when vLLM
            runs with other numbers of slots or ranks than the plan's.
    """
    check_plan(plan, "vllm")
    return _rebalancer(plan.physical_to_logical, plan.model.experts, plan.topology.num_devices)


def _rebalancer(table: IntArray, experts: int, devices: int | None) -> Rebalance:
    """devices: ranks that the table [L, P] is for, where that is known."""

    def rebalance(load: FloatArray, slots: int, groups: int, nodes: int, ranks: int) -> IntArray | None:
        expected = (len(table), experts)
        if load.shape != expected:
            log.warning(
                "moeplace: the plan is for a model of %s layers x experts, leaving %s to vLLM", expected, load.shape
            )
            return None
        for name, running, planned in (
            ("physical experts", slots, table.shape[1]),
            ("expert-parallel ranks", ranks, devices or ranks),
        ):
            if running != planned:
                raise InputError(
                    f"vLLM runs with {running} {name}, the plan in {PLAN_VARIABLE} is for {planned}: set "
                    f"num_redundant_experts to {table.shape[1] - experts} and the parallel sizes to "
                    f"{devices or ranks} ranks, or solve for this deployment"
                )
        return table

    return rebalance


def _rebalancer_of(path: Path) -> Rebalance:
    """The rebalancer of a plan's file, or of its export, which knows rows alone."""
    content = load_content(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        return plan_rebalancer(Plan.load(path))
    rows = map_rows(content, path)
    for index, row in enumerate(rows):
        whole = isinstance(row, list) and row and all(type(expert) is int and expert >= 0 for expert in row)
        if not whole or len(row) != len(rows[0]) or max(row) != max(rows[0]) or len(set(row)) != max(row) + 1:
            raise FileFormatError(f"{path}: row {index} is no list of every expert's slots, as many as in row 0")
    return _rebalancer(np.array(rows, dtype=np.int64), max(rows[0]) + 1, None)


def install_policy(rebalance: Rebalance) -> type:
    """Puts a policy that asks `rebalance` in the place of vLLM's default in this process, and returns it.

    Raises:
        UnsupportedError: vLLM is not installed, or its EPLB has no policies of a known form.
    """
    try:
        policies = importlib.import_module("vllm.distributed.eplb.policy").EPLB_POLICIES
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"no vLLM with vllm.distributed.eplb.policy here ({error}); 0.18 and 0.33 have it"
        ) from None
    base = policies["default"]
    policy = policy_class(rebalance, getattr(base, "replaced", base))
    policies["default"] = policy
    return policy


def policy_class(rebalance: Rebalance, base: Any) -> type:
    """A subclass of vLLM's policy `base` that asks `rebalance` first and answers in the form `base` does."""
    wants_maps = _returns_maps(base)

    def rebalance_experts(
        cls: Any,
        weight: Any,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        *rest: Any,
        **more: Any,
    ) -> Any:
        import torch

        load = weight.detach().cpu().double().numpy()
        table = rebalance(load, int(num_replicas), int(num_groups), int(num_nodes), int(num_ranks))
        if table is None:
            return base.rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_ranks, *rest, **more)
        maps = (table, *logical_maps(table, load.shape[1])) if wants_maps else (table,)
        tensors = tuple(torch.from_numpy(np.array(values, dtype=np.int64)).to(weight.device) for values in maps)
        return tensors if wants_maps else tensors[0]

    return type("MoeplacePolicy", (base,), {"replaced": base, "rebalance_experts": classmethod(rebalance_experts)})


def logical_maps(table: IntArray, experts: int) -> tuple[IntArray, IntArray]:
    """From [L, P]: the slots of each expert [L, E, R] padded with -1, and their number [L, E]."""
    counts = np.stack([np.bincount(row, minlength=experts) for row in table])
    slots = np.full((len(table), experts, int(counts.max())), -1, dtype=np.int64)
    for layer, row in enumerate(table):
        by_expert = np.argsort(row, kind="stable")
        rank = np.arange(len(row)) - np.repeat(np.cumsum(counts[layer]) - counts[layer], counts[layer])
        slots[layer, row[by_expert], rank] = by_expert
    return slots, counts


def _returns_maps(policy: Any) -> bool:
    annotation = inspect.signature(policy.rebalance_experts).return_annotation
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    if "tuple" in text.lower():
        return True
    if "tensor" in text.lower():
        return False
    raise UnsupportedError(
        f"vLLM's EPLB policy returns {annotation!r}; one tensor (0.23 on) or three (to 0.18) are known"
    )
