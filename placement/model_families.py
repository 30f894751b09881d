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

    A dot leads into a nested mapping. matrices: weight matrices of an expert; None where the activation tells, three
    for gated and two for others. bias: whether they have biases. defaults: values that Transformers takes where a
    released config leaves a field out. switch: a flag without which the model has no experts. stacks: for an encoder
    and a decoder, fields of its layers and of its step, and the number that `STEPS` has; the decoder's layers are
    counted on from the encoder's. sets: whether a list has an entry for each set of experts that a layer has, of which
    the first, for text, is placed. remark: what such a model has that is not placed.
    """

    hidden_layers: Names = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
    experts: Names = (
        "n_routed_experts",
        "num_experts",
        "num_local_experts",
        "moe_num_experts",
        "num_routed_experts",
        "num_moe_experts",
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
    )
    hidden: Names = ("hidden_size", "d_model", "n_embd")
    ffn: Names = (
        "moe_intermediate_size",
        "expert_intermediate_size",
        "expert_ffn_hidden_size",
        "moe_ffn_hidden_size",
        "intermediate_size",
        "ffn_hidden_size",
    )
    latent: Names = ("moe_latent_size", "routed_expert_hidden_size", "moe_hidden_size")
    groups: Names = ("n_group", "num_expert_group", "num_expert_groups", "router_n_groups")
    top_groups: Names = ("topk_group", "num_limited_groups", "topk_groups", "router_topk_groups")
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
    remark: str = ""


UNKNOWN = Family()
GATED = Family(matrices=3)

# Which layers have routed experts, from a field of each of these kinds. A list for every layer has the last word; the
# others each leave layers out.

WORDS = ("mlp_layer_types", "layers_block_type", "layer_block_types", "layer_types")
"""A word for each layer; in all but the first of attention alone where none is of `EXPERT_WORDS`."""
PATTERNS = ("hybrid_override_pattern", "hybrid_layer_pattern")
"""A letter for each layer: Mamba, Experts, attention (*), a dense MLP (-)."""
FLAGS = ("moe_layer_freq", "moe_layer_flags")
"""1 for a layer with experts, 0 for one without; `moe_layer_freq` may be a step instead."""
INDICES = ("moe_layers", "moe_layers_enum", "moe_layer_indices", "moe_layer_ids")
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

LANGUAGE_PARTS = ("text_config", "language_config", "llm_config", "thinker_config", "language_model_config")
"""Where a model of several parts keeps its language model."""

_FIRST_DENSE: Mapping[str, Any] = {"first_k_dense_replace": 1}
_THREE_DENSE: Mapping[str, Any] = {"first_k_dense_replace": 3}

_PLAIN = """
    afmoe arctic aria bailing_hybrid bailing_moe bailing_moe_linear bailing_moe_v2 cohere2_moe deepseek
    deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v4 deepseek_vl_v2 dots1 exaone_moe flex_olmo flint glm4_moe
    glm4v_moe granitemoe granitemoe_swa granitemoehybrid granitemoeshared grok grok-1 hunyuan hunyuan_v1_moe inkling
    inkling_mm_model inkling2 inkling2_loop jamba kimi_k2 kimi_k25 kimi_vl kolibri1 lara_mini lfm2_moe llada_moe
    llama4 longcat_flash mellum minimax minimax_m1 minimax_m2 minimax_m3 minimax_m3_vl minimax_text_01 mistral4
    mixtral muse_spark olmoe phimoe phi3moe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe
    qwen3_omni_moe_thinker qwen3_vl_moe qwen4_exp solar_open step3_text step3_vl skywork_moe xverse xverse_moe zaya
"""

FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(_PLAIN.split(), GATED),
    "axk1": GATED._replace(defaults=_FIRST_DENSE),
    "axk2": GATED._replace(defaults=_FIRST_DENSE, groups=()),
    "beam": GATED._replace(defaults=_THREE_DENSE),
    "dbrx": GATED._replace(
        experts=("ffn_config.moe_num_experts",),
        top_k=("ffn_config.moe_top_k",),
        hidden=("d_model",),
        ffn=("ffn_config.ffn_hidden_size",),
    ),
    "deepseek_v32": GATED._replace(defaults=_THREE_DENSE),
    "diffusion_gemma": GATED,
    "doge": Family(matrices=2, ffn=("neurons",), switch="is_moe", defaults={"neurons": 1}),
    "dots3_note": GATED._replace(defaults=_FIRST_DENSE),
    "ernie4_5_moe": GATED._replace(defaults={FIRST: 1}),
    "ernie4_5_moe_vl": GATED._replace(defaults={FIRST: 1}, sets=True),
    "ernie4_5_vl_moe": GATED._replace(defaults=_FIRST_DENSE, sets=True),
    "gemma4": GATED._replace(switch="enable_moe_block"),
    "glm4_moe_lite": GATED._replace(defaults=_FIRST_DENSE),
    "glm5_next": GATED._replace(defaults=_THREE_DENSE),
    "glm_moe_dsa": GATED._replace(defaults=_THREE_DENSE),
    "gpt_oss": GATED._replace(bias=True),
    "hy_v3": GATED._replace(defaults=_FIRST_DENSE),
    "hy_v4": GATED._replace(defaults=_FIRST_DENSE),
    "hy_v4_vl": GATED._replace(defaults=_FIRST_DENSE),
    "jetmoe": GATED._replace(remark="its attention experts are routed apart from those of the MLP"),
    "kimi_linear": GATED._replace(defaults=_FIRST_DENSE),
    "laguna": GATED._replace(defaults=_FIRST_DENSE),
    "mimo_v2_flash": GATED._replace(defaults=_FIRST_DENSE),
    "mistral_large4": GATED._replace(defaults=_FIRST_DENSE),
    "nemotron_h": Family(matrices=2),
    "nemotron_h_puzzle": Family(matrices=2),
    "nllb-moe": Family(
        ffn=("decoder_ffn_dim",),
        matrices=2,
        bias=True,
        defaults={"num_experts_per_tok": 2},
        stacks=(("encoder_layers", "encoder_sparse_step", 1), ("decoder_layers", "decoder_sparse_step", 1)),
    ),
    "openai_privacy_filter": GATED._replace(bias=True),
    "step3p5": GATED._replace(defaults=_THREE_DENSE),
    "step3p7": GATED._replace(defaults=_THREE_DENSE),
    "switch_transformers": Family(
        ffn=("d_ff",),
        matrices=2,
        defaults={"num_experts_per_tok": 1},
        stacks=(("num_layers", "encoder_sparse_step", -1), ("num_decoder_layers", "decoder_sparse_step", -1)),
    ),
    "unlimited_ocr": GATED._replace(defaults=_FIRST_DENSE),
}
"""By `model_type`, without `_text` at its end."""

SPEAKS = re.compile(r"layer|expert|moe|quant|sparse|rout|top_?k|n_?group|num_group", re.IGNORECASE)
"""Fields that may say something of layers, experts or quantisation: those that were not read are named."""

ELSEWHERE = re.compile(
    r"layer_?norm|layer_?drop|layer_scale|layer_?types?$|no_rope|rope_|kv_|_kv|attn|attention|window|feature_layer"
    r"|aux_loss|z_loss|router_(aux|bias|dtype|jitter|ignore|logit)|jitter|_eps|eps_|output_router|routed_scaling"
    r"|rout(e|er)_scal|scaling_factor|norm_topk|renorm|moe_norm|index_|indexer|mamba|ssm|loop_|^n_groups$|ple_"
    r"|layer_input|expert_capacity|expert_policy|capacity|dropout|router_hidden|layer_cycle|zero_expert_type|activation|dtype"
    r"|moe_layer_auto_map|num_sparse_(en|de)coder_layers|ep_size|hash_layers|shared_expert_(sink|overlap|comb|gate)|overlap|scoring|score|gating"
    r"|use_expert_bias|expert_bias|expert_selection|fp32_combine|apply_router|softcap|mtp|nextn|use_routed|norm_min"
    r"|initializer|layers_per_attn|enable_moe_block|pretraining|layer_group_size|no_split|lora|gradient|fusion",
    re.IGNORECASE,
)
"""Names like these speak of attention, norms, losses, how experts are weighed, or prediction of more tokens."""
