"""The MoE models that the installed Transformers has, and what it builds from their configs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as tf
from transformers.initialization import no_init_weights
from transformers.models.auto import configuration_auto, modeling_auto

FAMILY = re.compile(r"class \w*(Experts?|MoE|Moe)\w*\(nn\.|num_(local_|routed_)?experts|n_routed_experts")
EXPERTS = re.compile(r"((?<!Parallel)Experts|CDMoE|JetMoeMoE)$")
OTHER_PARTS = re.compile(r"vision|audio|talker|encoder$|code_predictor")
NOT_ROUTED = {
    "bamba": "its layers are dense",
    "vitpose_backbone": "a data set's number chooses the expert, not a router",
}

GEMMA = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
INDEXER = {"budget": 64, "compress_ratio": 4, "n_heads": 4, "kv_heads": 1, "head_dim": 256}
QSA = {f"indexer_{name}": value for name, value in INDEXER.items()}
CHANGES: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "deepseek_ocr2": {"text_config": {"num_experts_per_tok": 6, "mlp_layer_types": ["dense"] + ["sparse"] * 31}},
    "deepseek_ocr2_text": {"num_experts_per_tok": 6, "mlp_layer_types": ["sparse"] * 32},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "diffusion_gemma": {"text_config": GEMMA},
    "doge": {"is_moe": True},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "gemma4": {"text_config": {**GEMMA, "enable_moe_block": True}},
    "gemma4_text": {**GEMMA, "enable_moe_block": True},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 16, "moe_topk": [2] * 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "nemotron_h": {"moe_latent_size": 1024},
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA,
    "qwen3_omni_moe": {"enable_audio_output": False},
}
"""Where defaults build no model, or one without experts."""


class Built(NamedTuple):
    """What Transformers builds: facts of the modules themselves."""

    config: Any
    layers: tuple[int, ...]
    experts: int
    top_k: int | None
    input_size: int
    output_size: int
    ffn_size: int
    matrices: int
    values_per_expert: int
    groups: int

    @property
    def spec_fields(self) -> dict[str, Any]:
        """What a `ModelSpec` of it must say."""
        fields = {
            "moe_layers": self.layers,
            "experts": self.experts,
            "expert_input_size": self.input_size,
            "expert_output_size": self.output_size,
            "ffn_size": self.ffn_size,
            "matrices": self.matrices,
            "groups": self.groups,
        }
        return fields if self.top_k is None else fields | {"top_k": self.top_k}


EXPORTED = frozenset(dir(tf))


def moe_types() -> dict[str, tuple[str, str]]:
    """(config class, model class) of each model type whose module names experts, found by reading its source."""
    folder = Path(tf.__file__).parent / "models"
    modules = {
        path.parent.name for path in folder.glob("*/modeling_*.py") if FAMILY.search(path.read_text(encoding="utf-8"))
    }
    found = {}
    for model_type, config in configuration_auto.CONFIG_MAPPING_NAMES.items():
        module = configuration_auto.model_type_to_module_name(model_type)
        if module not in modules or module in NOT_ROUTED or OTHER_PARTS.search(model_type.removeprefix(module)):
            continue
        # Parts of a model have no class of their own here; the whole has.
        if model := _model_class(model_type, config):
            found[model_type] = (config, model)
    missing = modules - NOT_ROUTED.keys() - {configuration_auto.model_type_to_module_name(name) for name in found}
    return found | dict.fromkeys(missing, ("", ""))


def _model_class(model_type: str, config: str) -> str:
    maps = (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_MAPPING_NAMES,
    )
    names = [names[model_type] for names in maps if model_type in names]
    stem = config.removesuffix("Config")
    # By name: getting the class would import the model's module.
    guesses = [name for name in (f"{stem}ForConditionalGeneration", f"{stem}Model") if name in EXPORTED]
    return str((names or guesses or [""])[0])


def config_of(model_type: str, config_class: str) -> Any:
    return getattr(tf, config_class)(**CHANGES.get(model_type, {}))


def build(config: Any, model_class: str) -> Built:
    """Builds the model on the meta device, where weights take no memory, and looks at its experts."""
    with torch.device("meta"), no_init_weights():
        kind = getattr(tf, model_class)
        model = kind._from_config(config) if hasattr(kind, "_from_config") else kind(config)
    sites = list(_experts(model))
    first = sites[0][1]
    parent = model.get_submodule(sites[0][0].rpartition(".")[0])
    routers = [module for module in parent.modules() if isinstance(getattr(module, "top_k", None), int)]
    tops = {module.top_k for module in routers}
    experts, input_size, output_size, ffn_size, matrices, values = _shape(first, config)
    return Built(
        config,
        tuple(sorted({_layer(name, model) for name, _ in sites})),
        experts,
        tops.pop() if len(tops) == 1 else None,
        input_size,
        output_size,
        ffn_size,
        matrices,
        values,
        _groups(parent),
    )


def _experts(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in model.named_modules():
        shared = "shared" in name.rpartition(".")[2] or "attn" in name or "vision" in name or "talker" in name
        if EXPERTS.search(type(module).__name__) and not shared and list(module.parameters()):
            yield name, module


def _layer(name: str, model: torch.nn.Module) -> int:
    """The layer's number; a decoder's are counted on from its encoder's."""
    number = next(int(part) for part in name.split(".") if part.isdecimal())
    before = "num_layers" if hasattr(model.config, "num_decoder_layers") else "encoder_layers"
    return number + getattr(model.config, before, 0) * bool(re.search(r"(^|\.)decoder\.", name))


def _shape(module: torch.nn.Module, config: Any) -> tuple[int, int, int, int, int, int]:
    """(experts, input, output and inner width, matrices, values of one expert), from the module's parameters."""
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.ndim > 1}
    single = re.compile(r"(^|\.)expert_0\.")
    if any(single.search(name) for name in named):
        own = {name: p for name, p in module.named_parameters() if single.search(name)}
        weights = [tuple(p.shape) for p in own.values() if p.ndim == 2]
        (ffn, width), (output, _) = weights[0], weights[-1]
        experts = sum(bool(re.fullmatch(r"expert_\d+", name)) for name, _ in module.named_children())
        return experts, width, output, ffn, len(weights), sum(p.numel() for p in own.values())
    if "down_embed.weight" in named:
        experts, width = named["down_embed.weight"].shape
        return experts, width, width, 1, 2, 2 * width
    if "input_linear.weight" in named:
        experts, output, ffn = named["output_linear.weight"].shape
        both, width = named["input_linear.weight"].shape[1:]
        return experts, width, output, ffn, 1 + both // ffn, both * width + output * ffn
    if "mlp.w1" in named:
        experts, width = config.ffn_config.moe_num_experts, config.d_model
        ffn = config.ffn_config.ffn_hidden_size
        return experts, width, width, ffn, 3, sum(p.numel() for p in named.values()) // experts
    down = named["down_proj"]
    up = named["gate_up_proj" if "gate_up_proj" in named else "up_proj"]
    gated = "gate_up_proj" in named
    values = sum(parameter.numel() // parameter.shape[0] for parameter in named.values())
    # Outputs first, or as gpt-oss has it inputs first.
    (inner, width), (output, ffn) = up.shape[1:], down.shape[1:]
    if inner != (1 + gated) * ffn:
        (width, inner), (ffn, output) = up.shape[1:], down.shape[1:]
    assert inner == (1 + gated) * ffn
    return down.shape[0], width, output, ffn, 2 + gated, values


def _groups(parent: torch.nn.Module) -> int:
    """Groups that a router among the modules limits its choice to."""
    for module in parent.modules():
        groups = getattr(module, "num_group", None) or getattr(module, "n_group", None)
        chosen = getattr(module, "topk_group", None)
        greedy = getattr(module, "topk_method", None) == "greedy"
        if groups and chosen and chosen < groups and not greedy:
            return int(groups)
    return 1
