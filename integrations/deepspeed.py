"""Plans for DeepSpeed's AutoEP: the descriptors by which its checkpoints say which rank has which experts.

AutoEP itself deals experts to ranks in order, equally many to each, without replicas. A plan like that is put in force
by `moeplace.permute_model`; a descriptor says of any plan where its experts are, replicas included, and DeepSpeed's
universal checkpoints are read by it (`deepspeed.checkpoint.autoep_affine`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..placement.errors import UnsupportedError
from ..placement.plan import Plan


def placement_descriptors(plan: Plan) -> dict[int, dict[str, Any]]:
    """What DeepSpeed calls the placement of each layer, made and checked by DeepSpeed.

    Args:
        plan: any, with unequal numbers of slots and replicas too.

    Returns:
        {absolute layer: descriptor}: plain numbers, lists and dictionaries.

    Raises:
        UnsupportedError: deepspeed cannot be imported, or a device has an expert twice.
    """
    try:
        from deepspeed.checkpoint.autoep_affine import make_autoep_placement_descriptor
    except ImportError as error:
        raise UnsupportedError(
            f"deepspeed 0.19 cannot be imported ({error}); pip install 'moeplace[deepspeed]'"
        ) from error
    result = {}
    for row, layer in enumerate(plan.moe_layers):
        experts = [_experts_of(plan, row, device) for device in range(plan.topology.num_devices)]
        for device, own in enumerate(experts):
            twice = sorted({expert for expert in own if own.count(expert) > 1})
            if twice:
                raise UnsupportedError(
                    f"layer {layer}: device {device} has expert {twice[0]} twice, which AutoEP's descriptor has no "
                    "word for; solve with replicas on different devices"
                )
        result[layer] = make_autoep_placement_descriptor(plan.model.experts, experts)
    return result


def _experts_of(plan: Plan, row: int, device: int) -> list[int]:
    slots = np.flatnonzero((plan.slot_device == device) & plan.filled[row])
    return [int(expert) for expert in plan.physical_to_logical[row, slots]]
