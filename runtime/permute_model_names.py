"""Which part of a Megatron-LM or torchtitan model a parameter or buffer is, by its name.

Names as of megatron-core 0.16.1 (megatron/core/transformer/moe: router.py, experts.py, shared_experts.py) and torchtitan
0.2.2 and 0.3.0 (torchtitan/models/common/moe.py, models/gpt_oss/moe.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ..placement.errors import UnsupportedError

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_MEGATRON = re.compile(r"(?P<stem>(?:.+\.)?decoder\.layers\.(?P<layer>\d+)\.)mlp\.(?P<rest>.+)")
_TITAN = re.compile(r"(?P<stem>(?:.+\.)?layers\.(?P<layer>\d+)\.)moe\.(?P<rest>.+)")
_PREDICTION = re.compile(r"(?:^|\.)mtp(?:_|\.)")
_SUSPECT = re.compile(r"expert|router|(?:^|\.)moe\.")

_ROUTER = re.compile(
    r"router\.(?:weight|bias|expert_bias|local_tokens_per_expert|global_tokens_per_expert)"  # Megatron-LM
    r"|router\.gate\.(?:weight|bias)|(?:expert_bias|tokens_per_expert)(?:_E)?"  # torchtitan
)
_STACKED = re.compile(
    r"(?:routed_experts\.inner_experts|experts)\.(?:w[123]|w1_EFD|w2_EDF|w3_EFD"
    r"|mlp1_weight(?:_EGD)?|mlp1_bias(?:_EG)?|mlp2_weight(?:_EDF)?|mlp2_bias(?:_ED)?)"
)
_JOINED = re.compile(r"experts\.weight[12]")
_GROUPED = re.compile(r"experts\.(linear_fc[12]\.(?:weight|bias))(\d+)")
_SINGLE = re.compile(r"experts\.local_experts\.(\d+)\.(linear_fc[12]\.(?:weight|bias))")
_ALIKE = re.compile(
    r"shared_experts\..+|router\.ga_steps|fc[12]_latent_proj\..+"
    # A layer without experts.
    r"|linear_fc[12]\.(?:weight|bias|layer_norm_weight|layer_norm_bias)"
)


@dataclass(frozen=True)
class ModelRole:
    """kind: "router" has all E experts in dimension 0, on every rank; "stacked" has this rank's experts there; "joined" has
    them one after the other in its memory, whatever its shape; "expert" is of one of this rank's experts alone.

    layer: as the name says it. stem: the layer's own name. expert: its number on this rank, for "expert". place: equal
    for the tensors that change places with each other.
    """

    kind: Literal["router", "stacked", "joined", "expert"]
    layer: int
    stem: str
    place: str
    expert: int = -1


def without_wrappers(name: str) -> str:
    """The name without what torch.compile, activation checkpointing and FSDP put into it."""
    return _WRAPPERS.sub("", name)


def model_role(name: str) -> ModelRole | None:
    """The part in a routed MoE layer; None for what a change of experts leaves alone.

    Raises:
        UnsupportedError: a name inside an MoE layer, or one that speaks of experts elsewhere, which is not known.
    """
    plain = without_wrappers(name)
    found = _MEGATRON.fullmatch(plain) or _TITAN.fullmatch(plain)
    if _PREDICTION.search(plain):
        return None
    if found is None:
        if _SUSPECT.search(plain):
            raise UnsupportedError(
                f"{name} speaks of experts, and its name is of no layer of Megatron-LM or torchtitan that is known; "
                "leaving it as it is could give wrong results"
            )
        return None
    layer, stem, rest = int(found["layer"]), found["stem"], found["rest"]
    if _ALIKE.fullmatch(rest):
        return None
    for pattern, kind in ((_ROUTER, "router"), (_STACKED, "stacked"), (_JOINED, "joined")):
        if pattern.fullmatch(rest):
            return ModelRole(kind, layer, stem, plain)  # type: ignore[arg-type]
    if grouped := _GROUPED.fullmatch(rest):
        return ModelRole("expert", layer, stem, f"{stem}{grouped[1]}", int(grouped[2]))
    if single := _SINGLE.fullmatch(rest):
        return ModelRole("expert", layer, stem, f"{stem}{single[2]}", int(single[1]))
    raise UnsupportedError(
        f"{name} stands in an MoE layer and its name is not known; leaving it as it is could give wrong results. Known are "
        "megatron-core up to 0.16 and torchtitan 0.2 and 0.3"
    )
