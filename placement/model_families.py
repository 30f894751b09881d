"""Where the config of each MoE model says how many layers, experts and weights it has: a table by `model_type`.

The first row, `UNKNOWN`, has every name that any model uses, and reads types that are not listed. A listed type differs
from it only where its row says so. Checked against what Transformers builds, by tests/placement/test_model_families.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

Names = tuple[str, ...]


class Family(NamedTuple):
    """Which fields of a config say what: names in order of preference, of which the first that is there counts.

    A dot leads into a nested mapping. gate_and_up: in place of ffn, the width of both together. matrices: weight
    matrices of an expert; None where the activation tells, three for gated and two for others. bias: whether they have
    biases. defaults: values that Transformers takes where a config has no field
    of that meaning. switch: a flag without
    which the model has no experts. stacks: for an encoder and a decoder, fields of its layers and of its step, and the
    number that `STEPS` has; the decoder's layers are counted on from the encoder's. sets: whether a list has an entry
    for each set of experts that a layer has, of which the first, for text, is placed. router_has_shared: whether the
    router has rows for shared experts, behind the others. remark: what such a model has that is not placed.
    """

    hidden_layers: Names = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
    experts: Names = (
        "per_layer_experts_blocks",
        "n_routed_experts",
        "num_experts",
        "num_local_experts",
        "moe_num_experts",
        "num_routed_experts",
        "num_moe_experts",
        "moe_num_primary_experts",
    )
    top_k: Names = (
        "num_experts_per_tok",
        "num_experts_per_token",
        "experts_per_token",
        "moe_top_k",
        "moe_topk",
        "moe_k",
        "top_k_experts",
        "num_selected_experts",
        "num_activated_experts",
        "moe_router_topk",
        "router_topk",
        "moe_num_active_primary_experts",
        "n_activated_experts",
    )
    hidden: Names = ("hidden_size", "d_model", "n_embd", "dim")
    ffn: Names = (
        "moe_intermediate_size",
        "expert_intermediate_size",
        "expert_ffn_hidden_size",
        "moe_ffn_hidden_size",
        "expert_hidden_dim",
        "moe_inter_dim",
        "intermediate_size",
        "ffn_hidden_size",
        "hidden_dim",
    )
    gate_and_up: Names = ()
    latent: Names = ("moe_latent_size", "routed_expert_hidden_size", "moe_hidden_size")
    groups: Names = (
        "n_group",
        "num_expert_group",
        "num_expert_groups",
        "n_expert_groups",
        "router_n_groups",
        "moe_router_num_groups",
    )
    top_groups: Names = (
        "topk_group",
        "num_limited_groups",
        "n_limited_groups",
        "topk_groups",
        "router_topk_groups",
        "num_expert_groups_per_tok",
        "moe_router_group_topk",
    )
    shared: Names = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
    shared_width: Names = (
        "shared_expert_intermediate_size",
        "shared_experts_intermediate_size",
        "shared_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "share_expert_dim",
        "share_expert_dims",
    )
    zero: Names = ("zero_expert_num", "num_zero_experts")
    activation: Names = ("mlp_hidden_act", "hidden_act", "hidden_activation", "activation_function")
    matrices: int | None = None
    bias: bool = False
    defaults: Mapping[str, Any] = {}
    switch: str = ""
    stacks: tuple[tuple[str, str, int], ...] = ()
    sets: bool = False
    router_has_shared: bool = False
    remark: str = ""


UNKNOWN = Family()
GATED = Family(matrices=3)

# Which layers have routed experts, from a field of each of these kinds. A list for every layer has the last word; the
# others each leave layers out.

WORDS = ("mlp_layer_types", "layers_block_type", "layer_block_types", "layer_types")
"""A word for each layer; in all but the first of attention alone where none is of `EXPERT_WORDS`."""
PATTERNS = ("hybrid_override_pattern", "hybrid_layer_pattern")
"""A letter for each layer: Mamba, Experts, attention (*), a dense MLP (-)."""
FLAGS = ("moe_layer_freq", "moe_layer_flags", "moe_layer_layout", "is_moe_layer", "zaya_layers")
"""1 for a layer with experts, 0 for one without; `moe_layer_freq` may be a step instead, and `zaya_layers` has the
number of experts, or "a" for attention."""
INDICES = ("moe_layers", "moe_layers_enum", "moe_layer_indices", "moe_layer_ids", "moe_layers_idx")
"""Layers with experts, as a list or in words: "3,4,5"."""
DENSE_HEAD = ("first_k_dense_replace", "num_dense_layers", "moe_layer_num_skipped", "dense_mlp_idx", "n_dense_layers")
"""Layers at the start without experts."""
DENSE_INDICES = ("mlp_only_layers", "dense_layers", "dense_layer_ids")
"""Layers without experts."""
STEPS = {
    "moe_layer_freq": 0,
    "decoder_sparse_step": 1,
    "interleave_moe_layer_step": 1,
    "moe_layer_frequency": 1,
    "moe_layer_interval": 1,
    "moe_every_n_layers": 1,
    "route_every_n": 0,
}
"""Every so many layers one with experts: layer i where (i + the number here) is divisible by the field."""
PERIOD, OFFSET = "expert_layer_period", "expert_layer_offset"
"""Jamba's: layer i where i modulo the period is the offset."""
FIRST, LAST = "moe_layer_start_index", "moe_layer_end_index"
"""ERNIE's: layers between, both included; a last of -1 is the model's."""
MTP_LAYERS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "num_mtp_modules",
    "mtp_num_layers",
    "mtp_num_hidden_layers",
)
"""Layers for multi-token prediction, which lists for every layer may go on to name."""

LAYER_BY_LAYER = ("block_configs", "per_layer_config")
"""Fields of single layers: a mapping for each, in a list or by its number."""

EXPERT_WORDS = frozenset({"sparse", "moe", "hash_moe", "moe_mlp", "E"})
DENSE_WORDS = frozenset({"dense", "mlp"})
EXPERT_LETTER, LETTERS = "E", frozenset("ME*-")

EXPERT_PARTS = ("moe_config", "moe")
"""Where models of types that are not listed may keep what is said of experts."""
GATES = ("glu", "use_glu", "gated_linear_unit", "swiglu", "use_gated_mlp", "gated_mlp", "mlp_gated")
"""Whether experts are gated, in configs of types that are not listed."""
SWITCHES = ("use_moe", "is_moe", "moe_enable")
"""False in a model without experts, whatever else is said of them."""
SHARED_EXPERTS_EVERY = "experts_shared_frequency"
"""Megrez2's: so many layers in a row use the experts of their first."""

LANGUAGE_PARTS = ("text_config", "language_config", "llm_config", "thinker_config", "language_model_config")
"""Where a model of several parts keeps its language model."""

_OWN_WIDTH = GATED._replace(ffn=UNKNOWN.ffn[: UNKNOWN.ffn.index("intermediate_size")])
"""Whose experts are not as wide as `intermediate_size`, which dense layers are."""


def _own(**defaults: Any) -> Family:
    return _OWN_WIDTH._replace(defaults=defaults)


_AS_WIDE_AS_DENSE = """
    arctic cohere2_moe flex_olmo granitemoe granitemoe_swa granitemoeshared grok grok-1 hunyuan hunyuan_v1_moe
    llada_moe llama4 minimax minimax_m1 minimax_m2 minimax_m3 minimax_text_01 mixtral olmoe phimoe phi3moe
    skywork_moe xverse xverse_moe
"""
_PLAIN = """
    bailing_moe bailing_moe_linear bailing_moe_v2 deepseek deepseek_vl_v2 dots1 inkling2 inkling2_loop
    kimi_k2 kimi_vl mellum qwen3_moe qwen3_omni_moe qwen3_omni_moe_thinker qwen3_vl_moe step3_text step3_vl
"""
_DEEPSEEK_V3 = _own(first_k_dense_replace=3, n_shared_experts=1, n_group=8, topk_group=4)
_INKLING = _own(n_shared_experts=2)._replace(router_has_shared=True)

FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(_AS_WIDE_AS_DENSE.split(), GATED),
    **dict.fromkeys(_PLAIN.split(), _OWN_WIDTH),
    "afmoe": _own(num_dense_layers=1, num_shared_experts=2),
    "aria": GATED._replace(defaults={"moe_num_shared_experts": 2}),
    "axk1": _own(first_k_dense_replace=1, n_shared_experts=1, n_group=8, topk_group=4),
    "axk2": _own(first_k_dense_replace=1, n_shared_experts=1)._replace(groups=()),
    "bailing_hybrid": _own(num_shared_experts=1, num_expert_group=8, topk_group=4),
    "beam": _own(first_k_dense_replace=3, n_group=8, topk_group=4),
    "dbrx": GATED._replace(
        experts=("ffn_config.moe_num_experts",),
        top_k=("ffn_config.moe_top_k",),
        hidden=("d_model",),
        ffn=("ffn_config.ffn_hidden_size",),
    ),
    **dict.fromkeys(("deepseek_ocr2", "deepseek_v2"), _own(n_shared_experts=2)),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "kimi_k25"), _DEEPSEEK_V3),
    "deepseek_v4": _own(n_shared_experts=1),
    "diffusion_gemma": _OWN_WIDTH,
    "doge": Family(matrices=2, ffn=("neurons",), switch="is_moe", defaults={"neurons": 1}),
    "dots3_note": _own(first_k_dense_replace=1),
    "ernie4_5_moe": _own(moe_layer_start_index=1, moe_num_shared_experts=2),
    "ernie4_5_moe_vl": _own(moe_layer_start_index=1, moe_num_shared_experts=2)._replace(sets=True),
    "ernie4_5_vl_moe": _own(first_k_dense_replace=1, moe_num_shared_experts=2)._replace(sets=True),
    "exaone_moe": _own(num_shared_experts=1),
    "flint": _own(mlp_only_layers=[0, 1], shared_expert_intermediate_size=1024),
    "gemma4": _OWN_WIDTH._replace(switch="enable_moe_block"),
    **dict.fromkeys(("glm4_moe", "glm4_moe_lite", "glm4v_moe"), _own(first_k_dense_replace=1, n_shared_experts=1)),
    **dict.fromkeys(("glm5_next", "glm_moe_dsa"), _own(first_k_dense_replace=3, n_shared_experts=1)),
    "gpt_oss": GATED._replace(bias=True),
    "granitemoehybrid": GATED._replace(defaults={"shared_intermediate_size": 1024}),
    "hy_v3": _own(first_k_dense_replace=1, num_shared_experts=1),
    **dict.fromkeys(("hy_v4", "hy_v4_vl"), _own(first_k_dense_replace=1, n_shared_experts=1)),
    **dict.fromkeys(("inkling", "inkling_mm_model"), _INKLING),
    "jamba": GATED._replace(defaults={"expert_layer_period": 2, "expert_layer_offset": 1}),
    "jetmoe": GATED._replace(remark="its attention experts are routed apart from those of the MLP"),
    "kimi_linear": _own(first_k_dense_replace=1, num_shared_experts=1),
    **dict.fromkeys(("kolibri1", "lara_mini"), GATED._replace(defaults={"shared_expert_intermediate_size": 512})),
    "laguna": _own(first_k_dense_replace=1, shared_expert_intermediate_size=512),
    "lfm2_moe": _own(num_dense_layers=2),
    "llama_moe": GATED._replace(top_k=("num_selects",), ffn=("size_experts",)),
    "longcat_flash": _own(zero_expert_num=256),
    "mimo_v2_flash": _own(first_k_dense_replace=1),
    "minimax_m3_vl": GATED._replace(defaults={"shared_intermediate_size": 3072}),
    "muse_spark": _own(moe_hidden_size=4096),
    "mistral4": _own(n_shared_experts=1),
    "mistral_large4": _own(first_k_dense_replace=1, n_shared_experts=1),
    **dict.fromkeys(("nemotron_h", "nemotron_h_puzzle"), _OWN_WIDTH._replace(matrices=2)),
    "nllb-moe": Family(
        ffn=("decoder_ffn_dim",),
        matrices=2,
        bias=True,
        defaults={"num_experts_per_tok": 2, "encoder_sparse_step": 4, "decoder_sparse_step": 4},
        stacks=(("encoder_layers", "encoder_sparse_step", 1), ("decoder_layers", "decoder_sparse_step", 1)),
    ),
    "nomic_bert": Family(matrices=2, ffn=("n_inner",)),
    "openai_privacy_filter": GATED._replace(bias=True),
    "qwen2_moe": _own(shared_expert_intermediate_size=5632),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_next", "qwen4_exp"), _own(shared_expert_intermediate_size=512)),
    "solar_open": _own(n_shared_experts=1),
    **dict.fromkeys(("step3p5", "step3p7"), _own(first_k_dense_replace=3, share_expert_dim=1280)),
    "switch_transformers": Family(
        ffn=("d_ff",),
        matrices=2,
        defaults={"num_experts_per_tok": 1, "encoder_sparse_step": 4, "decoder_sparse_step": 4},
        stacks=(("num_layers", "encoder_sparse_step", -1), ("num_decoder_layers", "decoder_sparse_step", -1)),
    ),
    "unlimited_ocr": _own(first_k_dense_replace=1, n_shared_experts=2),
    # Its router may choose that a token skips the layer: a class behind those of the experts.
    "zaya": GATED._replace(
        experts=("num_experts", "zaya_layers"),
        ffn=("moe_intermediate_size",),
        gate_and_up=("ffn_hidden_size_list", "ffn_hidden_size"),
        defaults={"zero_expert_num": 1, "num_experts_per_tok": 1},
    ),
}
"""By `model_type`, without `_text` at its end."""

BESIDE = re.compile(r"(?:^|[._])(?:visual|vision|audio|talker|code2wav|mtp|nextn)(?:[._]|$)")
"""In names of modules and tensors: parts of a model beside the layers of its language model, routed, if at all, among
experts of their own."""

SPEAKS = re.compile(r"layer|expert|moe|quant|sparse|rout|top_?k|n_?group|num_group", re.IGNORECASE)
"""Fields that may say something of layers, experts or quantisation: those that were not read are named."""

ELSEWHERE = re.compile(
    r"layer_?norm|layer_?drop|layer_scale|layer_?types?$|no_rope|rope_|kv_|_kv|attn|attention|window|feature_layer"
    r"|aux_loss|z_loss|router_(aux|bias|dtype|jitter|ignore|logit)|jitter|_eps|eps_|output_router|routed_scaling"
    r"|rout(ed?|er)_scal|routing_bias|scaling_factor|norm_topk|renorm|moe_norm|index_|indexer|mamba|ssm|loop_|^n_groups$|ple_"
    r"|layer_input|expert_capacity|expert_policy|capacity|dropout|router_hidden|layer_cycle|zero_expert_type|activation|dtype"
    r"|moe_layer_auto_map|num_sparse_(en|de)coder_layers|ep_size|hash_layers|shared_expert_(sink|overlap|comb|gate)|overlap|scoring|score|gating"
    r"|use_expert_bias|expert_bias|expert_selection|fp32_combine|apply_router|softcap|mtp|nextn|use_routed|norm_min"
    r"|initializer|layers_per_attn|enable_moe_block|pretraining|layer_group_size|no_split|lora|gradient|fusion",
    re.IGNORECASE,
)
"""Names like these speak of attention, norms, losses, how experts are weighed, or prediction of more tokens."""
