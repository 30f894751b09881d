"""A plan served, or a rebalancer of one's own, inside a running vLLM: a policy in place of its EPLB's default.

vLLM calls `EPLB_POLICIES["default"].rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_ranks, current)`
(vllm/distributed/eplb/policy). Up to 0.18 it wants three maps back, later the physical-to-logical map alone; both are
told apart by the return annotation of the policy installed (checked: 0.18.0, 0.33.0). vLLM loads the plugins of the
group `vllm.general_plugins` in each of its processes, which is where `install` belongs.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..._types import FloatArray, IntArray
from ..._vllm_plugin import PLAN_VARIABLE
from ...placement.engines import check_plan
from ...placement.errors import FileFormatError, InputError, UnsupportedError
from ...placement.plan import FORMAT, Plan
from .base import load_content
from .vllm import map_rows

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
