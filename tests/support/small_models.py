"""Transformers MoE models of real classes, small and randomly initialised, and what their own routers say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers as tf

VOCAB = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def mixtral(**changes: Any) -> torch.nn.Module:
    return _built(tf.MixtralForCausalLM, tf.MixtralConfig, intermediate_size=24, num_hidden_layers=2,
                  num_local_experts=8, **{"num_experts_per_tok": 2, **changes})  # fmt: skip


def olmoe(**changes: Any) -> torch.nn.Module:
    return _built(tf.OlmoeForCausalLM, tf.OlmoeConfig, intermediate_size=24, num_hidden_layers=2,
                  num_experts=8, **{"num_experts_per_tok": 2, **changes})  # fmt: skip


def qwen3_moe(**changes: Any) -> torch.nn.Module:
    """Layers 1, 3 and 7 are sparse: every second one, and 5 is named dense."""
    return _built(tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig, intermediate_size=24, moe_intermediate_size=24, head_dim=8,
                  num_hidden_layers=8, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True,
                  decoder_sparse_step=2, mlp_only_layers=[5], **changes)  # fmt: skip


def deepseek_v3(**changes: Any) -> torch.nn.Module:
    """Layers 1 and 2 are sparse; grouped sigmoid routing, with a correction bias that changes who is chosen."""
    model = _built(tf.DeepseekV3ForCausalLM, tf.DeepseekV3Config, intermediate_size=24, moe_intermediate_size=24,
                   num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=16, n_shared_experts=1, n_group=4,
                   topk_group=2, num_experts_per_tok=4, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
                   qk_nope_head_dim=8, v_head_dim=8, **changes)  # fmt: skip
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.3)
    return model


def gpt_oss(**changes: Any) -> torch.nn.Module:
    return _built(tf.GptOssForCausalLM, tf.GptOssConfig, intermediate_size=24, num_hidden_layers=2, head_dim=8,
                  num_local_experts=8, num_experts_per_tok=4, **{"sliding_window": 16, **changes})  # fmt: skip


def openai_privacy_filter() -> torch.nn.Module:
    """Experts with gpt-oss's settings, whose gate and up stand one behind the other."""
    return _built(tf.OpenAIPrivacyFilterForTokenClassification, tf.OpenAIPrivacyFilterConfig, intermediate_size=24,
                  num_hidden_layers=2, head_dim=8, num_local_experts=8, num_experts_per_tok=2)  # fmt: skip


FAMILIES: dict[str, tuple[Callable[..., torch.nn.Module], tuple[int, ...]]] = {
    "mixtral": (mixtral, (0, 1)),
    "olmoe": (olmoe, (0, 1)),
    "qwen3_moe": (qwen3_moe, (1, 3, 7)),
    "deepseek_v3": (deepseek_v3, (1, 2)),
    "gpt_oss": (gpt_oss, (0, 1)),
}


def _built(model: Any, config: Any, **fields: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    built: torch.nn.Module = model(config(**{**SHAPE, "initializer_range": 0.3, **fields}))
    return built.eval()


def tokens(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, width), generator=torch.Generator().manual_seed(seed))


class RouterWitness:
    """What each router module returned, call by call, apart from any recorder: {layer: [(ids, weights), ...]}."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.calls: dict[int, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
        for name, module in model.named_modules():
            if type(module).__name__.lower().endswith("topkrouter"):
                layer = int(name.split("layers.")[1].split(".")[0])
                module.register_forward_hook(self._hear(layer))

    def _hear(self, layer: int) -> Callable[..., None]:
        def hear(module: torch.nn.Module, args: Any, output: Any) -> None:
            _, weights, ids = output
            self.calls[layer].append((ids.numpy().copy(), weights.detach().float().numpy().copy()))

        return hear

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.calls))

    def routing(self, call: int | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """([T, L, k] ids, [T, L, k] weights as float16) of some calls, the highest weight first."""
        calls = [self.calls[layer][call] for layer in self.layers]
        joined = [
            layer if isinstance(layer, tuple) else tuple(np.concatenate(part) for part in zip(*layer, strict=True))
            for layer in calls
        ]
        ids = np.stack([layer[0] for layer in joined], axis=1)
        weights = np.stack([layer[1] for layer in joined], axis=1).astype(np.float16)
        order = np.argsort(-weights, axis=2, kind="stable")
        return np.take_along_axis(ids, order, 2), np.take_along_axis(weights, order, 2)
