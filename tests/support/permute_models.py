"""Small random Transformers models of every family whose checkpoints can be permuted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moeplace as mp

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
DEEPSEEK = {**SIZES, **LATENT, "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**SIZES, "num_local_experts": 8}),
    "olmoe": ("Olmoe", {**SIZES, "num_experts": 8}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**SIZES, "num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {**SIZES, "head_dim": 16, "num_experts": 8, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {**DEEPSEEK, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": ("DeepseekV3", {**DEEPSEEK, "n_routed_experts": 8, "n_group": 4, "topk_group": 2}),
    "gpt_oss": ("GptOss", {**SIZES, "head_dim": 16, "num_local_experts": 8}),
}


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model with every weight and buffer drawn, so that routing depends on all of them."""
    import transformers

    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**fields, "num_experts_per_tok": 2, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        for buffer_name, buffer in model.named_buffers():
            if "e_score_correction_bias" in buffer_name:
                buffer.normal_(std=0.1)
    return model


def logits(model: Any) -> torch.Tensor:
    tokens = torch.from_numpy(np.random.default_rng(0).integers(1, 64, size=(2, 24)))
    with torch.no_grad():
        return model(tokens).logits


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def random_plan(folder: Path, seed: int, devices: int = 4) -> mp.Plan:
    """Experts anywhere, or with expert groups: groups whole on any device, in any order inside it."""
    spec = mp.ModelSpec.from_config(folder)
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(spec.layers):
        blocks = rng.permutation(np.arange(spec.experts).reshape(spec.groups, -1))
        block = spec.experts // (spec.groups if spec.groups > 1 else 1)
        rows.append(np.concatenate([rng.permutation(part) for part in blocks.reshape(-1, block)]))
    topology = mp.Topology.preset("h100-hgx", nodes=1, devices_per_node=devices)
    owner = np.repeat(np.arange(devices), spec.experts // devices)
    return mp.Plan(model=spec, topology=topology, physical_to_logical=np.stack(rows), slot_device=owner)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
