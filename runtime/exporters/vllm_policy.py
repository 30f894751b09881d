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
from typing import Any

import numpy as np

from ..._types import FloatArray, IntArray
from ...placement.errors import InputError, UnsupportedError
from ...placement.plan import Plan
from .export import check_export

PLAN_VARIABLE = "MOEPLACE_VLLM_PLAN"

Rebalance = Callable[[FloatArray, int, int, int, int], IntArray | None]
"""(load [L, E], slots, expert groups, nodes, ranks) -> physical_to_logical [L, P], or None to leave it to vLLM."""

log = logging.getLogger(__name__)


def install() -> None:
    """vLLM plugin: serves the plan in the file that `MOEPLACE_VLLM_PLAN` names; without the variable does nothing.

    Raises:
        FileFormatError, InputError: no plan there. UnsupportedError: vLLM cannot express it.
    """
    path = os.environ.get(PLAN_VARIABLE)
    if path:
        install_policy(plan_rebalancer(Plan.load(path)))


def plan_rebalancer(plan: Plan) -> Rebalance:
    """A rebalancer that answers with the plan, whatever the load.

    A model of another shape than the plan's (a draft model beside the served one) is left to vLLM's own policy.

    Raises:
        UnsupportedError: vLLM cannot express the plan; see `check_export`. The rebalancer raises InputError when vLLM
            runs with other numbers of slots or ranks than the plan's.
    """
    check_export(plan, "vllm")
    expected = (plan.model.layers, plan.model.experts)

    def rebalance(load: FloatArray, slots: int, groups: int, nodes: int, ranks: int) -> IntArray | None:
        if load.shape != expected:
            log.warning(
                "moeplace: the plan is for a model of %s layers x experts, leaving %s to vLLM", expected, load.shape
            )
            return None
        for name, running, planned in (
            ("physical experts", slots, plan.num_slots),
            ("expert-parallel ranks", ranks, plan.topology.num_devices),
        ):
            if running != planned:
                raise InputError(
                    f"vLLM runs with {running} {name}, the plan in {PLAN_VARIABLE} is for {planned}: set "
                    f"num_redundant_experts to {plan.num_slots - plan.model.experts} and the parallel sizes to "
                    f"{plan.topology.num_devices} ranks, or solve for this deployment"
                )
        return plan.physical_to_logical

    return rebalance


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
