"""Which part of a Transformers checkpoint a tensor is, by its name."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from ..placement.errors import UnsupportedError

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss")
"""`model_type` of the models whose tensors are known, as their checkpoints and as Transformers 5 itself name them."""

_BLOCK = re.compile(r"((?:model\.)?layers\.(\d+)\.(?:mlp|block_sparse_moe)\.)(.+)")
_ROUTER = re.compile(r"gate\.(weight|bias|e_score_correction_bias)|router\.(weight|bias)")
_FUSED = re.compile(r"experts\.(gate_up_proj|down_proj)(_bias|_blocks|_scales|_scale_inv)?")
_EXPERT = re.compile(
    r"experts\.(0|[1-9]\d*)\.((?:w1|w2|w3|gate_proj|up_proj|down_proj)\.(?:weight|bias"
    r"|weight_scale|weight_scale_inv|weight_scale_2|weight_global_scale|weight_packed|weight_shape|weight_zero_point"
    r"|weight_g_idx|input_scale|input_global_scale|qweight|qzeros|scales|g_idx))"
)
_SHARED = re.compile(r"shared_experts?\..+|shared_expert_gate\.(weight|bias)")
_SUSPECT = re.compile(r"expert|router|moe|(^|\.)gate\.|e_score")


@dataclass(frozen=True)
class Role:
    """kind: "router" and "fused" hold an expert a row (dimension 0); "expert" belongs to one expert alone.

    layer: the model's absolute index. expert: its index, for "expert". place: the name without layer-wide parts, equal
    for the tensors that change places with each other.
    """

    kind: Literal["router", "fused", "expert"]
    layer: int
    expert: int = -1
    place: str = ""


def tensor_role(name: str, moe_layers: Container[int], ignored_layers: Container[int] = ()) -> Role | None:
    """The tensor's part in a routed MoE layer; None for tensors a change of experts leaves alone.

    ignored_layers: layers that keep their experts as they are (multi-token prediction layers).

    Raises:
        UnsupportedError: a name inside a MoE block, or one that speaks of experts elsewhere, which is not known.
            Leaving it alone could part an expert from its own tensors.
    """
    found = _BLOCK.fullmatch(name)
    layer = int(found[2]) if found else -1
    if found is None or layer not in moe_layers:
        inside_ignored = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
        if inside_ignored and int(inside_ignored[1]) in ignored_layers:
            return None
        if _SUSPECT.search(name):
            raise UnsupportedError(
                f"tensor {name} speaks of experts outside the MoE layers of the plan; it is not known how to permute it"
            )
        return None
    stem, rest = found[1], found[3]
    if _SHARED.fullmatch(rest):
        return None
    if _ROUTER.fullmatch(rest):
        return Role("router", layer)
    if _FUSED.fullmatch(rest):
        return Role("fused", layer)
    expert = _EXPERT.fullmatch(rest)
    if expert is None:
        raise UnsupportedError(
            f"tensor {name} stands in a MoE layer and its name is not known; leaving it as it is could give wrong "
            f"results. Known families: {', '.join(FAMILIES)}"
        )
    return Role("expert", layer, int(expert[1]), f"{stem}experts.*.{expert[2]}")
