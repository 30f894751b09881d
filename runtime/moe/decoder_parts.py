"""The parts of a Transformers decoder whose experts are placed, to be run one after the other."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...placement.errors import InputError, UnsupportedError
from .dispatcher import HopDispatcher
from .experts import PlacedExperts
from .layer import ExpertParallelMoE

FAMILIES = ("deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen3_moe")
"""Model types of Transformers that are known to be built as `DecoderParts` says."""

ATTENTION = ("eager", "sdpa")
"""Implementations of attention that take a mask of scores."""


@dataclass(frozen=True, eq=False)
class LayerParts:
    """x + attention(input_norm(x)), then x + feed-forward(output_norm(x)): `dense`, or router, experts and shared experts.

    index: in the model. window: positions that attention sees, None for all.
    """

    index: int
    input_norm: nn.Module
    attention: nn.Module
    window: int | None
    output_norm: nn.Module
    dense: nn.Module | None = None
    router: nn.Module | None = None
    experts: PlacedExperts | None = None
    shared: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class DecoderParts:
    """embed: token ids to the residual stream. rotate: (any tensor, position ids) to position embeddings. head: the
    residual stream to logits. cache_name: the argument of attention that takes the cache."""

    embed: Callable[[Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    layers: tuple[LayerParts, ...]
    head: Callable[[Tensor], Tensor]
    cache_name: str

    @property
    def placed(self) -> tuple[PlacedExperts, ...]:
        return tuple(layer.experts for layer in self.layers if layer.experts is not None)

    @classmethod
    def of(cls, model: Any) -> DecoderParts:
        """model: passes `check_decoder`, and `parallelize` has been there."""
        inner = model.model
        attention = inner.layers[0].self_attn
        return cls(
            embed=inner.embed_tokens,
            rotate=inner.rotary_emb,
            layers=tuple(_layer(model.config, index, layer) for index, layer in enumerate(inner.layers)),
            head=lambda x: model.lm_head(inner.norm(x)),
            # Transformers 5 changed its name on the way.
            cache_name="cache" if "cache" in inspect.signature(attention.forward).parameters else "past_key_values",
        )


def check_decoder(model: nn.Module) -> None:
    """Raises unless the model can be run part by part, with all ranks' context, to the same logits.

    Raises:
        InputError: the model is in training mode.
        UnsupportedError: a family, attention implementation, position embedding or way of sending that is not known to fit.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if family not in FAMILIES or not hasattr(model, "lm_head"):
        raise UnsupportedError(
            f"{type(model).__name__} ({family}) cannot be decoded layer by layer; known are the causal language models of "
            f"{', '.join(FAMILIES)}. Use mp.parallelize and the model's own generate(synced_gpus=True)"
        )
    if model.training:
        raise InputError("the model is in training mode; call model.eval() before decoding")
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ATTENTION:
        raise UnsupportedError(
            f"attention implementation {implementation!r} takes no mask of scores; call "
            f"model.set_attn_implementation({ATTENTION[0]!r}) or ({ATTENTION[-1]!r})"
        )
    rope = getattr(model.get_submodule("model.rotary_emb"), "rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise UnsupportedError(
            f"position embeddings of type {rope!r} change with the longest sequence that a rank has seen, so ranks would "
            "differ; decode with mp.parallelize and the model's own generate(synced_gpus=True)"
        )


def check_no_compression(model: nn.Module) -> None:
    """Raises unless tokens travel whole: what was compressed needs the way back, which this mode does not have.

    Raises:
        UnsupportedError: a layer's tokens are sent by something else than plain hops.
    """
    for name, module in model.named_modules():
        if isinstance(module, PlacedExperts) and type(module.dispatcher) is not HopDispatcher:
            raise UnsupportedError(
                f"{name}: tokens are sent by {type(module.dispatcher).__name__}; context-coherent execution sends them whole, "
                "since a compressed token is restored where it came from, and there it does not return. Use "
                "dispatch='flat' or 'node_aware', or decode with DispatchCombineDecoder"
            )


def _layer(config: Any, index: int, layer: Any) -> LayerParts:
    window = getattr(layer.self_attn, "sliding_window", getattr(config, "sliding_window", None))
    block = layer.mlp
    parts: dict[str, Any] = {"dense": block}
    if isinstance(block, ExpertParallelMoE):
        parts = {"router": block.gate, "experts": block.experts, "shared": block.shared_experts}
    elif isinstance(getattr(block, "experts", None), PlacedExperts):
        parts = {"router": block.router if hasattr(block, "router") else block.gate, "experts": block.experts}
    return LayerParts(index, layer.input_layernorm, layer.self_attn, window, layer.post_attention_layernorm, **parts)
