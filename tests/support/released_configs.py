"""Released MoE models: the sizes that their config.json states, and what these mean. Sizes only."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

FP8_BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head", "*self_attn*"]}
NVIDIA = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "modules_to_not_convert": ["gate"]}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT4_BYTES, FP8_BYTES = 0.5 + (2 + 0.5) / 128, 1 + 4 / 128**2


def compressed(weights: Config, ignore: list[str], form: str = "pack-quantized", target: str = "Linear") -> Config:
    groups = {"group_0": {"targets": [target], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ignore}


NO_EXPERTS = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]
INT4_GROUP_32 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
FP8_CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


def deepseek(kind: str, hidden: int, layers: int, experts: int, k: int, ffn: int, dense: int, **more: Any) -> Config:
    """DeepSeek's names, as GLM, dots and others have them."""
    return {
        "model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers, "n_routed_experts": experts,
        "num_experts_per_tok": k, "moe_intermediate_size": ffn, "first_k_dense_replace": dense, "n_group": 1,
        "topk_group": 1, "n_shared_experts": 1, "hidden_act": "silu", "torch_dtype": "bfloat16", **more,
    }  # fmt: skip


def qwen(kind: str, hidden: int, layers: int, experts: int, k: int, ffn: int, **more: Any) -> Config:
    return {
        "model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers, "num_experts": experts,
        "num_experts_per_tok": k, "moe_intermediate_size": ffn, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "hidden_act": "silu", "torch_dtype": "bfloat16", **more,
    }  # fmt: skip


def mixtral(kind: str, hidden: int, layers: int, experts: int, k: int, ffn: int, **more: Any) -> Config:
    return {
        "model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers, "num_local_experts": experts,
        "num_experts_per_tok": k, "intermediate_size": ffn, "hidden_act": "silu", "torch_dtype": "bfloat16", **more,
    }  # fmt: skip


def facts(layers: range | list[int], experts: int, k: int, hidden: int, ffn: int, **more: Any) -> Config:
    usual = {"groups": 1, "matrices": 3, "expert_dtype": "bf16", "bytes_per_weight": 2.0, "expert_input_size": hidden}
    return {
        "moe_layers": tuple(layers), "experts": experts, "top_k": k, "hidden_size": hidden, "ffn_size": ffn,
        "expert_output_size": more.get("expert_input_size", hidden), **usual, **more,
    }  # fmt: skip


V3 = {
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "intermediate_size": 18432,
    "num_nextn_predict_layers": 1,
}
FP8 = {"expert_dtype": "fp8", "bytes_per_weight": FP8_BYTES}
INT4 = {"expert_dtype": "int4", "bytes_per_weight": INT4_BYTES}
NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
NANO_LAYERS = [i for i, letter in enumerate(NANO) if letter == "E"]
NEMOTRON_NANO = deepseek(
    "nemotron_h", 2688, 52, 128, 6, 1856, 0,
    hybrid_override_pattern=NANO, mlp_hidden_act="relu2", intermediate_size=1856, n_groups=8,
)  # fmt: skip
QWEN3_30B, QWEN3_30B_FACTS = ("qwen3_moe", 2048, 48, 128, 8, 768), (range(48), 128, 8, 2048, 768)
R1, R1_FACTS = ("deepseek_v3", 7168, 61, 256, 8, 2048, 3), (range(3, 61), 256, 8, 7168, 2048)
K2, K2_FACTS = ("kimi_k2", 7168, 61, 384, 8, 2048, 1), (range(1, 61), 384, 8, 7168, 2048)
MIXTRAL, MIXTRAL_FACTS = ("mixtral", 4096, 32, 8, 2, 14336), (range(32), 8, 2, 4096, 14336)
KIMI_LINEAR = {
    "model_type": "kimi_linear", "hidden_size": 2304, "num_hidden_layers": 27, "num_experts": 256,
    "num_experts_per_token": 8, "moe_intermediate_size": 1024, "intermediate_size": 9216, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "num_expert_group": 1, "topk_group": 1, "use_grouped_topk": True, "num_shared_experts": 1,
    "dtype": "bfloat16",
}  # fmt: skip
LING = {"num_shared_experts": 1, "n_group": 8, "topk_group": 4, "intermediate_size": 5120}
LLAMA4 = mixtral("llama4_text", 5120, 48, 16, 1, 8192, intermediate_size_mlp=16384)

RELEASED: dict[str, tuple[Config, Config]] = {
    "DeepSeek-V2": (
        deepseek(
            "deepseek_v2",
            5120,
            60,
            160,
            6,
            1536,
            1,
            n_group=8,
            topk_group=3,
            topk_method="group_limited_greedy",
            moe_layer_freq=1,
            intermediate_size=12288,
        ),
        facts(range(1, 60), 160, 6, 5120, 1536, groups=8),
    ),
    "DeepSeek-V2-Lite": (
        deepseek(
            "deepseek_v2", 2048, 27, 64, 6, 1408, 1, topk_method="greedy", moe_layer_freq=1, intermediate_size=10944
        ),
        facts(range(1, 27), 64, 6, 2048, 1408),
    ),
    "DeepSeek-V3": (
        deepseek(*R1, **V3, moe_layer_freq=1, quantization_config=FP8_BLOCK),
        facts(*R1_FACTS, groups=8, **FP8),
    ),
    "DeepSeek-V3.1": (
        deepseek(*R1, **V3, moe_layer_freq=1, quantization_config={**FP8_BLOCK, "scale_fmt": "ue8m0"}),
        facts(*R1_FACTS, groups=8, **FP8),
    ),
    "DeepSeek-V3.2-Exp": (
        deepseek("deepseek_v32", *R1[1:], **V3, index_topk=2048, quantization_config=FP8_BLOCK),
        facts(*R1_FACTS, groups=8, **FP8),
    ),
    "DeepSeek-V4-Flash": (
        {
            "model_type": "deepseek_v4",
            "hidden_size": 4096,
            "num_hidden_layers": 43,
            "n_routed_experts": 256,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 2048,
            "n_shared_experts": 1,
            "num_hash_layers": 3,
            "num_nextn_predict_layers": 1,
            "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 41,
            "expert_dtype": "fp4",
            "dtype": "bfloat16",
            "quantization_config": {**FP8_BLOCK, "scale_fmt": "ue8m0"},
        },
        facts(range(43), 256, 6, 4096, 2048, expert_dtype="mxfp4", bytes_per_weight=0.53125),
    ),
    "DeepSeek-R1-NVFP4": (
        deepseek(*R1, **V3, quantization_config=NVFP4),
        facts(*R1_FACTS, groups=8, expert_dtype="nvfp4", bytes_per_weight=0.5625),
    ),
    "DeepSeek-R1-AWQ": (
        deepseek(*R1, **V3, quantization_config={**AWQ, "group_size": 64, "modules_to_not_convert": None}),
        facts(*R1_FACTS, groups=8, expert_dtype="int4", bytes_per_weight=0.5 + 2.5 / 64),
    ),
    "DeepSeek-R1-int4-AutoRound": (
        deepseek(
            *R1,
            **V3,
            quantization_config={
                "quant_method": "auto-round",
                "bits": 4,
                "group_size": 128,
                "sym": True,
                "data_type": "int",
                "packing_format": "auto_round:auto_gptq",
                "extra_config": {"model.layers.3.mlp.gate": {"bits": 16}},
            },
        ),
        facts(*R1_FACTS, groups=8, **INT4),
    ),
    "DeepSeek-R1-MXFP4 (Quark)": (
        deepseek(
            *R1,
            **V3,
            quantization_config={
                "quant_method": "quark",
                "exclude": ["lm_head", "*self_attn*", "*mlp.gate"],
                "global_quant_config": {
                    "weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
                },
            },
        ),
        facts(*R1_FACTS, groups=8, expert_dtype="mxfp4", bytes_per_weight=0.53125),
    ),
    "Moonlight-16B-A3B": (
        deepseek(
            "deepseek_v3",
            2048,
            27,
            64,
            6,
            1408,
            1,
            moe_layer_freq=1,
            topk_method="noaux_tc",
            n_shared_experts=2,
            intermediate_size=11264,
        ),
        facts(range(1, 27), 64, 6, 2048, 1408),
    ),
    "Kimi-VL-A3B": (
        {
            "model_type": "kimi_vl",
            "torch_dtype": "bfloat16",
            "vision_config": {"num_hidden_layers": 27},
            "text_config": deepseek("deepseek_v3", 2048, 27, 64, 6, 1408, 1, intermediate_size=11264),
        },
        facts(range(1, 27), 64, 6, 2048, 1408),
    ),
    "Kimi-K2-Instruct": (
        deepseek(*K2, moe_layer_freq=1, intermediate_size=18432, quantization_config=FP8_BLOCK),
        facts(*K2_FACTS, **FP8),
    ),
    "Kimi-K2-Thinking": (
        deepseek(*K2, intermediate_size=18432, quantization_config=compressed(INT4_GROUP_32, NO_EXPERTS)),
        facts(*K2_FACTS, expert_dtype="int4", bytes_per_weight=0.5625),
    ),
    "Kimi-K2.5": (
        {
            "model_type": "kimi_k25",
            "dtype": "bfloat16",
            "vision_config": {"vt_num_hidden_layers": 27},
            "text_config": deepseek(
                *K2, intermediate_size=18432, quantization_config=compressed(INT4_GROUP_32, NO_EXPERTS)
            ),
        },
        facts(*K2_FACTS, expert_dtype="int4", bytes_per_weight=0.5625),
    ),
    "Kimi-Linear-48B-A3B": (KIMI_LINEAR, facts(range(1, 27), 256, 8, 2304, 1024)),
    "Kimi-K3": (
        {
            "model_type": "kimi_k3",
            "text_config": {
                **KIMI_LINEAR,
                "hidden_size": 7168,
                "num_hidden_layers": 93,
                "num_experts": 896,
                "num_experts_per_token": 16,
                "moe_intermediate_size": 3072,
                "routed_expert_hidden_size": 3584,
                "num_shared_experts": 2,
                "intermediate_size": 33792,
                "hidden_act": "situ",
                "quantization_config": compressed(
                    {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
                    ["re:.*shared_experts.*"],
                    "mxfp4-pack-quantized",
                ),
            },
        },
        facts(
            range(1, 93), 896, 16, 7168, 3072, expert_input_size=3584, expert_dtype="mxfp4", bytes_per_weight=0.53125
        ),
    ),
    "Ling-lite": (
        qwen("bailing_moe", 2048, 28, 64, 6, 1408, num_shared_experts=2, first_k_dense_replace=0),
        facts(range(28), 64, 6, 2048, 1408),
    ),
    "Ling-mini-2.0": (
        qwen("bailing_moe_v2", 2048, 20, 256, 8, 512, first_k_dense_replace=1, **LING),
        facts(range(1, 20), 256, 8, 2048, 512, groups=8),
    ),
    "Ling-flash-2.0": (
        qwen("bailing_moe_v2", 4096, 32, 256, 8, 1024, first_k_dense_replace=1, **LING),
        facts(range(1, 32), 256, 8, 4096, 1024, groups=8),
    ),
    "Ring-1T": (
        qwen("bailing_moe_v2", 8192, 80, 256, 8, 2048, first_k_dense_replace=4, **LING),
        facts(range(4, 80), 256, 8, 8192, 2048, groups=8),
    ),
    "GLM-4.5": (deepseek("glm4_moe", 5120, 92, 160, 8, 1536, 3), facts(range(3, 92), 160, 8, 5120, 1536)),
    "GLM-4.5-Air": (deepseek("glm4_moe", 4096, 46, 128, 8, 1408, 1), facts(range(1, 46), 128, 8, 4096, 1408)),
    "GLM-4.6-FP8": (
        deepseek(
            "glm4_moe",
            5120,
            92,
            160,
            8,
            1536,
            3,
            quantization_config=compressed(FP8_CHANNEL, ["lm_head"], "float-quantized"),
        ),
        facts(range(3, 92), 160, 8, 5120, 1536, expert_dtype="fp8", bytes_per_weight=1 + 2 * (2 / 5120 + 1 / 1536) / 3),
    ),
    "GLM-4.7-Flash": (deepseek("glm4_moe_lite", 2048, 47, 64, 4, 1536, 1), facts(range(1, 47), 64, 4, 2048, 1536)),
    "GLM-5": (deepseek("glm_moe_dsa", 6144, 78, 256, 8, 2048, 3), facts(range(3, 78), 256, 8, 6144, 2048)),
    "Qwen1.5-MoE-A2.7B": (qwen("qwen2_moe", 2048, 24, 60, 4, 1408), facts(range(24), 60, 4, 2048, 1408)),
    "Qwen2-57B-A14B": (qwen("qwen2_moe", 3584, 28, 64, 8, 2560), facts(range(28), 64, 8, 3584, 2560)),
    "Qwen3-30B-A3B": (qwen(*QWEN3_30B), facts(*QWEN3_30B_FACTS)),
    "Qwen3-30B-A3B-FP8": (
        qwen(
            *QWEN3_30B,
            quantization_config={**FP8_BLOCK, "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]},
        ),
        facts(*QWEN3_30B_FACTS, **FP8),
    ),
    "Qwen3-30B-A3B-GPTQ-Int4": (qwen(*QWEN3_30B, quantization_config=GPTQ), facts(*QWEN3_30B_FACTS, **INT4)),
    "Qwen3-30B-A3B-AWQ": (qwen(*QWEN3_30B, quantization_config=AWQ), facts(*QWEN3_30B_FACTS, **INT4)),
    "Qwen3-30B-A3B-bnb-4bit": (
        qwen(*QWEN3_30B, quantization_config=NF4),
        facts(*QWEN3_30B_FACTS, expert_dtype="nf4", bytes_per_weight=0.5625),
    ),
    "Qwen3-30B-A3B-NVFP4": (
        qwen(
            *QWEN3_30B,
            quantization_config=compressed(
                {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
                ["lm_head", "re:.*mlp.gate$"],
                "nvfp4-pack-quantized",
            ),
        ),
        facts(*QWEN3_30B_FACTS, expert_dtype="nvfp4", bytes_per_weight=0.5625),
    ),
    "Qwen3-30B-A3B-4bit (MLX)": (
        qwen(*QWEN3_30B, quantization={"group_size": 64, "bits": 4}),
        facts(*QWEN3_30B_FACTS, expert_dtype="int4", bytes_per_weight=0.5 + 4 / 64),
    ),
    "Qwen3-235B-A22B": (qwen("qwen3_moe", 4096, 94, 128, 8, 1536), facts(range(94), 128, 8, 4096, 1536)),
    "Qwen3-Coder-480B-A35B": (qwen("qwen3_moe", 6144, 62, 160, 8, 2560), facts(range(62), 160, 8, 6144, 2560)),
    "Qwen3-Next-80B-A3B": (qwen("qwen3_next", 2048, 48, 512, 10, 512), facts(range(48), 512, 10, 2048, 512)),
    "Qwen3.5-397B-A17B": (
        {
            "model_type": "qwen3_5_moe",
            "text_config": {
                "model_type": "qwen3_5_moe_text",
                "hidden_size": 4096,
                "num_hidden_layers": 60,
                "num_experts": 512,
                "num_experts_per_tok": 10,
                "moe_intermediate_size": 1024,
                "dtype": "bfloat16",
            },
        },
        facts(range(60), 512, 10, 4096, 1024),
    ),
    "Qwen3-VL-30B-A3B": (
        {"model_type": "qwen3_vl_moe", "text_config": qwen("qwen3_vl_moe_text", *QWEN3_30B[1:])},
        facts(*QWEN3_30B_FACTS),
    ),
    "Qwen3-VL-235B-A22B": (
        {"model_type": "qwen3_vl_moe", "text_config": qwen("qwen3_vl_moe_text", 4096, 94, 128, 8, 1536)},
        facts(range(94), 128, 8, 4096, 1536),
    ),
    "Qwen3-Omni-30B-A3B": (
        {
            "model_type": "qwen3_omni_moe",
            "dtype": "bfloat16",
            "thinker_config": {
                "model_type": "qwen3_omni_moe_thinker",
                "audio_config": {"num_hidden_layers": 32},
                "text_config": qwen("qwen3_omni_moe_text", *QWEN3_30B[1:]),
            },
            "talker_config": {"text_config": {"num_experts": 128, "num_hidden_layers": 20}},
        },
        facts(*QWEN3_30B_FACTS),
    ),
    "gpt-oss-20b": (
        mixtral(
            "gpt_oss",
            2880,
            24,
            32,
            4,
            2880,
            quantization_config={
                "quant_method": "mxfp4",
                "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
            },
        ),
        facts(range(24), 32, 4, 2880, 2880, expert_dtype="mxfp4", bytes_per_weight=0.53125),
    ),
    "gpt-oss-120b": (
        mixtral("gpt_oss", 2880, 36, 128, 4, 2880, quantization_config={"quant_method": "mxfp4"}),
        facts(range(36), 128, 4, 2880, 2880, expert_dtype="mxfp4", bytes_per_weight=0.53125),
    ),
    "Mixtral-8x7B": (mixtral(*MIXTRAL), facts(*MIXTRAL_FACTS)),
    "Mixtral-8x7B-AWQ": (mixtral(*MIXTRAL, quantization_config=AWQ), facts(*MIXTRAL_FACTS, **INT4)),
    "Mixtral-8x7B-GPTQ": (mixtral(*MIXTRAL, quantization_config=GPTQ), facts(*MIXTRAL_FACTS, **INT4)),
    "Mixtral-8x7B-FP8 (tensor)": (
        mixtral(
            *MIXTRAL,
            quantization_config=compressed(
                {"num_bits": 8, "type": "float", "strategy": "tensor"},
                ["lm_head", "re:.*block_sparse_moe.gate"],
                "float-quantized",
            ),
        ),
        facts(*MIXTRAL_FACTS, expert_dtype="fp8", bytes_per_weight=1.0),
    ),
    "Mixtral-8x22B": (mixtral("mixtral", 6144, 56, 8, 2, 16384), facts(range(56), 8, 2, 6144, 16384)),
    "Llama-4-Scout": (
        {"model_type": "llama4", "torch_dtype": "bfloat16", "text_config": {**LLAMA4, "interleave_moe_layer_step": 1}},
        facts(range(48), 16, 1, 5120, 8192),
    ),
    "Llama-4-Maverick": (
        {
            "model_type": "llama4",
            "torch_dtype": "bfloat16",
            "text_config": {**LLAMA4, "num_local_experts": 128, "interleave_moe_layer_step": 2},
        },
        facts(range(1, 48, 2), 128, 1, 5120, 8192),
    ),
    "Llama-4-Maverick-FP8": (
        {
            "model_type": "llama4",
            "torch_dtype": "bfloat16",
            "quantization_config": {
                "quant_method": "fbgemm_fp8",
                "modules_to_not_convert": [
                    "language_model.model.layers.1.self_attn.o_proj",
                    "language_model.model.layers.1.feed_forward.router",
                ],
            },
            "text_config": {**LLAMA4, "num_local_experts": 128, "interleave_moe_layer_step": 2},
        },
        facts(
            range(1, 48, 2), 128, 1, 5120, 8192, expert_dtype="fp8", bytes_per_weight=1 + 4 * (2 / 5120 + 1 / 8192) / 3
        ),
    ),
    "Nemotron-3-Nano-30B-A3B": (
        NEMOTRON_NANO,
        facts(NANO_LAYERS, 128, 6, 2688, 1856, matrices=2),
    ),
    "Nemotron-3-Nano-30B-A3B-NVFP4": (
        {
            **NEMOTRON_NANO,
            "quantization_config": {
                "quant_method": "modelopt",
                "quant_algo": "NVFP4",
                "group_size": 16,
                "ignore": ["lm_head", "backbone.layers.0.mixer*", "backbone.layers.5.mixer*"],
            },
        },
        facts(NANO_LAYERS, 128, 6, 2688, 1856, matrices=2, expert_dtype="nvfp4", bytes_per_weight=0.5625),
    ),
    "Jamba-v0.1": (
        qwen("jamba", 4096, 32, 16, 2, 0, intermediate_size=14336, expert_layer_period=2, expert_layer_offset=1)
        | {"moe_intermediate_size": None, "decoder_sparse_step": None},
        facts(range(1, 32, 2), 16, 2, 4096, 14336),
    ),
    "Jamba-1.5-Large": (
        qwen("jamba", 8192, 72, 16, 2, 0, intermediate_size=24576, expert_layer_period=2, expert_layer_offset=1)
        | {"moe_intermediate_size": None, "decoder_sparse_step": None},
        facts(range(1, 72, 2), 16, 2, 8192, 24576),
    ),
    "Trinity-Mini": (
        qwen("afmoe", 2048, 32, 128, 8, 1024, num_dense_layers=2, n_group=1, topk_group=1, num_shared_experts=1),
        facts(range(2, 32), 128, 8, 2048, 1024),
    ),
    "LFM2-8B-A1B": (
        qwen("lfm2_moe", 2048, 24, 32, 4, 1792, num_dense_layers=2, intermediate_size=7168),
        facts(range(2, 24), 32, 4, 2048, 1792),
    ),
    "MiMo-V2-Flash": (
        deepseek(
            "mimo_v2_flash",
            4096,
            48,
            256,
            8,
            2048,
            0,
            moe_layer_freq=[0] + [1] * 47,
            hybrid_layer_pattern=[0, 1] * 24,
            intermediate_size=16384,
            quantization_config=FP8_BLOCK,
        )
        | {"first_k_dense_replace": None},
        facts(range(1, 48), 256, 8, 4096, 2048, **FP8),
    ),
    "MiniMax-Text-01": (mixtral("minimax_text_01", 6144, 80, 32, 2, 9216), facts(range(80), 32, 2, 6144, 9216)),
    "MiniMax-M1-80k": (mixtral("minimax_m1", 6144, 80, 32, 2, 9216), facts(range(80), 32, 2, 6144, 9216)),
    "MiniMax-M2": (
        mixtral("minimax_m2", 3072, 62, 256, 8, 1536, num_mtp_modules=3, quantization_config=FP8_BLOCK),
        facts(range(62), 256, 8, 3072, 1536, **FP8),
    ),
    "MiniMax-M3": (
        {
            "model_type": "minimax_m3_vl",
            "dtype": "bfloat16",
            "text_config": mixtral(
                "minimax_m3_vl_text",
                6144,
                60,
                128,
                4,
                3072,
                moe_layer_freq=[0] * 3 + [1] * 57,
                dense_intermediate_size=12288,
            ),
        },
        facts(range(3, 60), 128, 4, 6144, 3072),
    ),
    "Hunyuan-A13B": (
        {
            "model_type": "hunyuan_v1_moe",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_experts": 64,
            "moe_topk": [8] * 32,
            "moe_intermediate_size": [3072] * 32,
            "num_shared_expert": [1] * 32,
            "intermediate_size": 3072,
            "moe_layer_num_skipped": 0,
            "torch_dtype": "bfloat16",
        },
        facts(range(32), 64, 8, 4096, 3072),
    ),
    "Hunyuan-Large": (
        {
            "model_type": "hunyuan",
            "hidden_size": 6400,
            "num_hidden_layers": 64,
            "num_experts": 16,
            "moe_topk": 1,
            "intermediate_size": 18304,
            "num_shared_expert": 1,
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
        },
        facts(range(64), 16, 1, 6400, 18304),
    ),
    "ERNIE-4.5-21B-A3B": (
        {
            "model_type": "ernie4_5_moe",
            "hidden_size": 2560,
            "num_hidden_layers": 28,
            "moe_num_experts": 64,
            "moe_k": 6,
            "moe_intermediate_size": 1536,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 27,
            "moe_layer_interval": 1,
            "moe_num_shared_experts": 2,
            "intermediate_size": 12288,
            "torch_dtype": "bfloat16",
        },
        facts(range(1, 28), 64, 6, 2560, 1536),
    ),
    "ERNIE-4.5-300B-A47B": (
        {
            "model_type": "ernie4_5_moe",
            "hidden_size": 8192,
            "num_hidden_layers": 54,
            "moe_num_experts": 64,
            "moe_k": 8,
            "moe_intermediate_size": 3584,
            "moe_layer_start_index": 3,
            "moe_layer_end_index": 53,
            "moe_layer_interval": 1,
            "intermediate_size": 28672,
            "torch_dtype": "bfloat16",
        },
        facts(range(3, 54), 64, 8, 8192, 3584),
    ),
    "ERNIE-4.5-VL-28B-A3B": (
        {
            "model_type": "ernie4_5_moe_vl",
            "hidden_size": 2560,
            "num_hidden_layers": 28,
            "moe_num_experts": [64, 64],
            "moe_k": 6,
            "moe_intermediate_size": [1536, 512],
            "moe_layer_start_index": [1, 1],
            "moe_layer_end_index": [29, 28],
            "moe_layer_interval": 1,
            "moe_num_shared_experts": 2,
            "torch_dtype": "bfloat16",
        },
        facts(range(1, 28), 64, 6, 2560, 1536),
    ),
    "dots.llm1": (
        deepseek("dots1", 4096, 62, 128, 6, 1408, 1, n_shared_experts=2),
        facts(range(1, 62), 128, 6, 4096, 1408),
    ),
    "OLMoE-1B-7B": (
        {
            "model_type": "olmoe",
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "intermediate_size": 1024,
            "torch_dtype": "bfloat16",
        },
        facts(range(16), 64, 8, 2048, 1024),
    ),
    "Phi-3.5-MoE": (mixtral("phimoe", 4096, 32, 16, 2, 6400), facts(range(32), 16, 2, 4096, 6400)),
    "Phi-mini-MoE": (mixtral("phimoe", 4096, 32, 16, 2, 960), facts(range(32), 16, 2, 4096, 960)),
    "Granite-3.1-1B-A400M": (mixtral("granitemoe", 1024, 24, 32, 8, 512), facts(range(24), 32, 8, 1024, 512)),
    "Granite-3.1-3B-A800M": (mixtral("granitemoe", 1536, 32, 40, 8, 512), facts(range(32), 40, 8, 1536, 512)),
    "Granite-4.0-H-Small": (
        mixtral(
            "granitemoehybrid",
            4096,
            40,
            72,
            10,
            768,
            shared_intermediate_size=1536,
            layer_types=["mamba"] * 36 + ["attention"] * 4,
        ),
        facts(range(40), 72, 10, 4096, 768),
    ),
    "DBRX": (
        {
            "model_type": "dbrx",
            "d_model": 6144,
            "n_layers": 40,
            "torch_dtype": "bfloat16",
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4, "moe_jitter_eps": 0.01},
        },
        facts(range(40), 16, 4, 6144, 10752),
    ),
    "Grok-2": (
        mixtral("git", 8192, 64, 8, 2, 32768, moe_intermediate_size=16384, residual_moe=True, hidden_act="gelu"),
        facts(range(64), 8, 2, 8192, 16384),
    ),
    "LongCat-Flash": (
        {
            "model_type": "longcat_flash",
            "hidden_size": 6144,
            "num_layers": 28,
            "n_routed_experts": 512,
            "moe_topk": 12,
            "expert_ffn_hidden_size": 2048,
            "ffn_hidden_size": 12288,
            "zero_expert_num": 256,
            "zero_expert_type": "identity",
            "torch_dtype": "bfloat16",
        },
        facts(range(28), 512, 12, 6144, 2048, zero_experts=256),
    ),
    "Step-3": (
        {
            "model_type": "step3_vl",
            "torch_dtype": "bfloat16",
            "text_config": {
                "model_type": "step3_text",
                "hidden_size": 7168,
                "num_hidden_layers": 61,
                "moe_num_experts": 48,
                "moe_top_k": 3,
                "moe_intermediate_size": 5120,
                "intermediate_size": 18432,
                "share_expert_dim": 5120,
                "moe_layers_enum": ",".join(map(str, range(4, 60))),
            },
        },
        facts(range(4, 60), 48, 3, 7168, 5120),
    ),
    "Step-3.5-Flash": (
        {
            "model_type": "step3p5",
            "hidden_size": 4096,
            "num_hidden_layers": 45,
            "moe_num_experts": 288,
            "moe_top_k": 8,
            "moe_intermediate_size": 1280,
            "intermediate_size": 11264,
            "share_expert_dim": 1280,
            "torch_dtype": "bfloat16",
            "moe_layers_enum": ",".join(map(str, range(3, 45))),
            "num_nextn_predict_layers": 3,
        },
        facts(range(3, 45), 288, 8, 4096, 1280),
    ),
    "Snowflake Arctic": (
        mixtral("arctic", 7168, 35, 128, 2, 4864, moe_layer_frequency=1),
        facts(range(35), 128, 2, 7168, 4864),
    ),
    "Aria": (
        {
            "model_type": "aria",
            "torch_dtype": "bfloat16",
            "text_config": {
                "model_type": "aria_moe_lm",
                "hidden_size": 2560,
                "num_hidden_layers": 28,
                "moe_num_experts": 64,
                "moe_topk": 6,
                "moe_intermediate_size": 1664,
                "moe_num_shared_experts": 2,
            },
        },
        facts(range(28), 64, 6, 2560, 1664),
    ),
    "switch-base-8": (
        {
            "model_type": "switch_transformers",
            "d_model": 768,
            "d_ff": 3072,
            "num_layers": 12,
            "num_decoder_layers": 12,
            "num_experts": 8,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "num_sparse_encoder_layers": 6,
            "num_sparse_decoder_layers": 6,
            "torch_dtype": "float32",
        },
        facts(range(1, 24, 2), 8, 1, 768, 3072, matrices=2, expert_dtype="fp32", bytes_per_weight=4.0),
    ),
    "NLLB-MoE-54B": (
        {
            "model_type": "nllb-moe",
            "d_model": 2048,
            "encoder_ffn_dim": 8192,
            "decoder_ffn_dim": 8192,
            "encoder_layers": 24,
            "decoder_layers": 24,
            "num_experts": 128,
            "encoder_sparse_step": 4,
            "decoder_sparse_step": 4,
            "torch_dtype": "float32",
        },
        facts(range(3, 48, 4), 128, 2, 2048, 8192, matrices=2, expert_dtype="fp32", bytes_per_weight=4.0),
    ),
    "Solar-Open-100B": (deepseek("solar_open", 4096, 48, 128, 8, 1280, 0), facts(range(48), 128, 8, 4096, 1280)),
    "K-EXAONE-236B-A23B": (
        qwen(
            "exaone_moe", 6144, 48, 128, 8, 2048, first_k_dense_replace=1, num_shared_experts=1, n_group=1, topk_group=1
        ),
        facts(range(1, 48), 128, 8, 6144, 2048),
    ),
    "OpenMoE-8B": (
        qwen(
            "llama",
            2048,
            24,
            32,
            2,
            0,
            moe_layer_interval=6,
            router_topk=2,
            num_experts_per_tok=None,
            decoder_sparse_step=None,
            moe_intermediate_size=None,
            intermediate_size=8192,
        ),
        facts([5, 11, 17, 23], 32, 2, 2048, 8192),
    ),
    "Skywork-MoE-Base": (
        mixtral("skywork_moe", 4608, 52, 0, 2, 12288, num_local_experts=None, num_experts=[16]),
        facts(range(52), 16, 2, 4608, 12288),
    ),
    "XVERSE-MoE-A4.2B": (
        {
            "model_type": "xverse",
            "hidden_size": 2560,
            "intermediate_size": 1728,
            "num_hidden_layers": 28,
            "num_experts": 64,
            "moe_top_k": 6,
            "num_shared_experts": 2,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
        },
        facts(range(28), 64, 6, 2560, 1728, shared_experts=2),
    ),
    "Yuan2-M32": (
        {
            "model_type": "yuan",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "use_moe": True,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
            "moe_config": {"moe_num_experts": 32, "moe_top_k": 2, "norm_topk_prob": True, "ffn_hidden_size": 4096},
        },
        facts(range(24), 32, 2, 2048, 4096),
    ),
    "LLaMA-MoE-v1-3.5B": (
        {
            "model_type": "llama_moe",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_experts": 16,
            "num_selects": 4,
            "size_experts": [[688] * 16] * 32,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
        },
        facts(range(32), 16, 4, 4096, 688),
    ),
    "deepseek-moe-16b": (
        deepseek("deepseek", 2048, 28, 64, 6, 1408, 1, n_shared_experts=2, moe_layer_freq=1, intermediate_size=10944),
        facts(range(1, 28), 64, 6, 2048, 1408, shared_experts=2),
    ),
    "SmallThinker-21BA3B": (
        {
            "model_type": "smallthinker",
            "hidden_size": 2560,
            "num_hidden_layers": 52,
            "moe_num_primary_experts": 64,
            "moe_num_active_primary_experts": 6,
            "moe_ffn_hidden_size": 768,
            "moe_layer_layout": [1] * 52,
            "torch_dtype": "bfloat16",
        },
        facts(range(52), 64, 6, 2560, 768),
    ),
    "ZAYA1-base": (
        {
            "model_type": "zaya",
            "hidden_size": 2048,
            "num_hidden_layers": 80,
            "zaya_layers": ["a", 16] * 40,
            "moe_router_topk": 1,
            "ffn_hidden_size_list": [0, 4096] * 40,
            "ffn_hidden_size": 4096,
            "gated_linear_unit": True,
            "torch_dtype": "bfloat16",
        },
        facts(range(1, 80, 2), 16, 1, 2048, 2048, zero_experts=1),
    ),
    "InternVL3.5-30B-A3B": (
        {"model_type": "internvl_chat", "llm_config": qwen(*QWEN3_30B), "vision_config": {"num_hidden_layers": 24}},
        facts(*QWEN3_30B_FACTS),
    ),
    "DeepSeek-OCR": (
        {
            "model_type": "deepseek_vl_v2",
            "language_config": deepseek(
                "deepseek_v2", 1280, 12, 64, 6, 896, 1, topk_method="greedy", n_shared_experts=2
            ),
        },
        facts(range(1, 12), 64, 6, 1280, 896, shared_experts=2),
    ),
    "GLM-4.5V": (
        {
            "model_type": "glm4v_moe",
            "text_config": deepseek("glm4v_moe_text", 4096, 46, 128, 8, 1408, 1),
            "vision_config": {"depth": 24, "hidden_size": 1536},
        },
        facts(range(1, 46), 128, 8, 4096, 1408),
    ),
    "MiniCPM-MoE-8x2B": (
        mixtral("minicpm", 2304, 40, 0, 2, 5760, num_local_experts=None, num_experts=8),
        facts(range(40), 8, 2, 2304, 5760),
    ),
    "openPangu-Ultra-MoE-718B": (
        {
            "model_type": "pangu_ultra_moe",
            "hidden_size": 7680,
            "num_hidden_layers": 61,
            "num_routed_experts": 256,
            "num_shared_experts": 1,
            "num_experts_per_tok": 8,
            "num_dense_layers": 3,
            "moe_intermediate_size": 2048,
            "intermediate_size": 18432,
            "num_mtp_layers": 1,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
        },
        facts(range(3, 61), 256, 8, 7680, 2048),
    ),
    "Mistral-Large-3 (params.json)": (
        {
            "dim": 7168,
            "n_layers": 61,
            "hidden_dim": 16384,
            "n_heads": 128,
            "vocab_size": 131072,
            "moe": {
                "num_experts": 128,
                "num_experts_per_tok": 4,
                "expert_hidden_dim": 4096,
                "num_shared_experts": 1,
                "first_k_dense_replace": 3,
                "num_expert_groups": 1,
                "num_expert_groups_per_tok": 1,
            },
        },
        facts(range(3, 61), 128, 4, 7168, 4096, shared_experts=1),
    ),
    "Mixtral-8x7B (params.json)": (
        {
            "dim": 4096,
            "n_layers": 32,
            "hidden_dim": 14336,
            "n_heads": 32,
            "n_kv_heads": 8,
            "moe": {"num_experts": 8, "num_experts_per_tok": 2},
        },
        facts(*MIXTRAL_FACTS),
    ),
    "DeepSeek-V3 (inference/configs/config_671B.json)": (
        {
            "dim": 7168,
            "n_layers": 61,
            "n_dense_layers": 3,
            "inter_dim": 18432,
            "moe_inter_dim": 2048,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "n_activated_experts": 8,
            "n_expert_groups": 8,
            "n_limited_groups": 4,
            "route_scale": 2.5,
            "score_func": "sigmoid",
            "dtype": "fp8",
        },
        facts(*R1_FACTS, groups=8, expert_dtype="fp8", bytes_per_weight=1.0),
    ),
    "nomic-embed-text-v2-moe": (
        {
            "model_type": "nomic_bert",
            "n_embd": 768,
            "n_inner": 3072,
            "n_layer": 12,
            "num_experts": 8,
            "moe_top_k": 2,
            "moe_every_n_layers": 2,
            "num_shared_experts": 0,
            "activation_function": "gelu",
            "torch_dtype": "float32",
        },
        facts(range(1, 12, 2), 8, 2, 768, 3072, matrices=2, expert_dtype="fp32", bytes_per_weight=4.0),
    ),
    "ERNIE-4.5-VL-424B-A47B": (
        {
            "model_type": "ernie4_5_moe_vl",
            "hidden_size": 8192,
            "num_hidden_layers": 54,
            "moe_num_experts": [64, 64],
            "moe_k": 8,
            "moe_intermediate_size": [3584, 1536],
            "moe_layer_start_index": [3, 3],
            "moe_layer_end_index": [53, 53],
            "moe_layer_interval": 1,
            "intermediate_size": 28672,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
        },
        facts(range(3, 54), 64, 8, 8192, 3584),
    ),
    "Nemotron-3-Super-120B-A12B": (
        deepseek(
            "nemotron_h",
            4096,
            len(SUPER),
            512,
            22,
            2688,
            0,
            hybrid_override_pattern=SUPER,
            mlp_hidden_act="relu2",
            intermediate_size=2688,
            n_groups=8,
            moe_latent_size=1024,
            num_nextn_predict_layers=1,
            mtp_hybrid_override_pattern="*E",
        ),
        facts(
            [i for i, letter in enumerate(SUPER) if letter == "E"],
            512,
            22,
            4096,
            2688,
            matrices=2,
            expert_input_size=1024,
        ),
    ),
    "Intern-S1": (
        {
            "model_type": "interns1",
            "text_config": qwen("qwen3_moe", 4096, 94, 128, 8, 1536),
            "vision_config": {"model_type": "interns1_vision", "num_hidden_layers": 45},
        },
        facts(range(94), 128, 8, 4096, 1536),
    ),
    "LLaDA2.0-mini": (
        qwen(
            "llada2_moe",
            2048,
            20,
            256,
            8,
            512,
            first_k_dense_replace=1,
            n_group=8,
            topk_group=4,
            num_shared_experts=1,
            intermediate_size=5120,
        ),
        facts(range(1, 20), 256, 8, 2048, 512, groups=8, shared_experts=1),
    ),
    "Ring-flash-linear-2.0": (
        qwen(
            "bailing_moe_linear",
            4096,
            32,
            256,
            8,
            1024,
            first_k_dense_replace=1,
            n_group=8,
            topk_group=4,
            num_shared_experts=1,
            layer_group_size=8,
            intermediate_size=9216,
        ),
        facts(range(1, 32), 256, 8, 4096, 1024, groups=8, shared_experts=1),
    ),
    "Ming-flash-omni": (
        {
            "model_type": "bailingmm_moe_v2_lite",
            "audio_config": {},
            "vision_config": {"depth": 27},
            "llm_config": qwen(
                "bailing_moe_v2",
                4096,
                32,
                256,
                8,
                1024,
                first_k_dense_replace=1,
                n_group=8,
                topk_group=4,
                num_shared_experts=1,
            ),
        },
        facts(range(1, 32), 256, 8, 4096, 1024, groups=8, shared_experts=1),
    ),
    "GigaChat-20B-A3B": (
        deepseek("deepseek", 1792, 28, 64, 6, 1792, 1, n_shared_experts=2, moe_layer_freq=1),
        facts(range(1, 28), 64, 6, 1792, 1792, shared_experts=2),
    ),
    "MiniMax-VL-01": (
        {
            "model_type": "minimax_vl_01",
            "vision_config": {"hidden_size": 1024},
            "text_config": mixtral("minimax_text_01", 6144, 80, 32, 2, 9216),
        },
        facts(range(80), 32, 2, 6144, 9216),
    ),
    "HunyuanImage-3.0": (
        {
            "model_type": "hunyuan_image_3_moe",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_experts": 64,
            "moe_topk": [8] * 32,
            "moe_intermediate_size": [3072] * 32,
            "num_shared_expert": [1] * 32,
            "intermediate_size": 3072,
            "moe_layer_num_skipped": 0,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
        },
        facts(range(32), 64, 8, 4096, 3072, shared_experts=1),
    ),
    "LongCat-Flash-Lite": (
        {
            "model_type": "longcat_flash_ngram",
            "hidden_size": 3072,
            "num_layers": 14,
            "n_routed_experts": 256,
            "moe_topk": 12,
            "expert_ffn_hidden_size": 1024,
            "ffn_hidden_size": 6144,
            "zero_expert_num": 128,
            "zero_expert_type": "identity",
            "torch_dtype": "bfloat16",
        },
        facts(range(14), 256, 12, 3072, 1024, zero_experts=128),
    ),
}
