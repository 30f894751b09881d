"""What a step takes beside its MoE layers: attention, dense layers and all else, and what that makes of a saving.

Coefficients by engine and GPU stand in `serving.json`, fitted to rows of measured TPOT and TTFT of served models that
come with `aiconfigurator-core` (`python -m benchmarks serving_fit --write`, which says how well they predict rows left
out). A served step is explained by terms that physics gives, each times a coefficient near 1: weights and KV cache read
at the memory bandwidth, operations at the dtype's rate, and a launch for each step, layer and sequence. Rows are of
whole models, experts included; what is taken from them here is the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._types import FloatArray
from .kernels import MEASURED_AS
from .model import DTYPE_BYTES, ModelSpec
from .steps import Batch, Phase
from .topology import PRESETS, Box, Topology

CONTEXT = 4096
"""Tokens of a sequence that attention reads, where nobody says how long sequences are."""

TERMS: dict[Phase, tuple[str, ...]] = {
    "decode": (
        "step",
        "layer",
        "sequence",
        "dense_read",
        "kv_read",
        "dense_work",
        "expert_read",
        "expert_work",
        "reduce",
        "prompts",
    ),
    "prefill": (
        "step",
        "layer",
        "sequence",
        "dense_read",
        "dense_work",
        "attention_work",
        "expert_read",
        "expert_work",
        "reduce",
        "queue",
    ),
}
"""Of TPOT and of TTFT. prompts: prefill that runs beside decode. queue: prompts that wait for one another."""
OTHER: dict[Phase, tuple[str, ...]] = {
    "decode": ("step", "layer", "sequence", "dense_read", "kv_read", "dense_work"),
    "prefill": ("step", "layer", "dense_read", "dense_work", "attention_work"),
}
"""Those that are no part of the MoE layers, where attention is data parallel."""


class Architecture(NamedTuple):
    """What is known of a model beside its experts.

    layers: all. hidden_size. dense_weights: of attention, dense layers, shared experts and the head. expert_weights: of
    one expert. moe_layers, experts, top_k. kv_values: a token's in the KV cache, all layers. kv_shared: whether every
    rank of tensor parallelism keeps all of them (multi-head latent attention). attention_width: heads times head
    width, summed over layers.
    """

    layers: int
    hidden_size: int
    dense_weights: float
    expert_weights: float
    moe_layers: int
    experts: int
    top_k: int
    kv_values: int
    kv_shared: bool
    attention_width: int


class Load(NamedTuple):
    """How a model is run for a step. sequences: decoding at once on all devices, or prompts. prompt: tokens of each,
    output: tokens made of it. attention_shards, expert_shards: devices that share a sequence's attention, and all
    experts. replicas: of attention (data parallelism). dense_bytes, expert_bytes, kv_bytes: of a value."""

    sequences: float
    prompt: float
    output: float
    attention_shards: int
    expert_shards: int
    replicas: int
    dense_bytes: float
    expert_bytes: float
    kv_bytes: float


def step_terms(phase: Phase, model: Architecture, load: Load, box: Box) -> FloatArray:
    """Seconds of each of `TERMS`, with coefficients of 1 (launches: how many)."""
    rate = box.compute * (box.fp8 if load.dense_bytes == 1 else box.fp4 if load.dense_bytes < 1 else 1.0)
    several, here = float(load.attention_shards * load.replicas > 1), load.sequences / load.replicas
    tokens = here if phase == "decode" else load.prompt
    everyone = load.sequences if phase == "decode" else load.prompt * load.replicas
    chosen = 1.0 - (1.0 - model.top_k / model.experts) ** everyone if model.experts else 0.0
    dense = model.dense_weights / load.attention_shards
    expert = model.moe_layers * model.expert_weights / load.expert_shards
    work = 2.0 * dense * tokens / rate, 2.0 * expert * model.top_k * everyone / rate
    context = load.prompt + load.output / 2
    cache = model.kv_values * load.kv_bytes / (1 if model.kv_shared else load.attention_shards)
    values = {
        "step": 1.0,
        "layer": float(model.layers),
        "sequence": here,
        "dense_read": dense * load.dense_bytes / box.memory_bandwidth,
        "kv_read": here * context * cache / box.memory_bandwidth,
        "dense_work": work[0],
        "attention_work": 2.0 * model.attention_width * load.prompt**2 / load.attention_shards / rate,
        "expert_read": expert * model.experts * chosen * load.expert_bytes / box.memory_bandwidth,
        "expert_work": work[1],
        "reduce": several * model.layers * tokens * model.hidden_size * 4.0 / box.intra_bandwidth,
        "prompts": sum(work) * load.prompt / load.output,
        "queue": sum(work) * here,
    }
    return np.array([values[name] for name in TERMS[phase]])


@cache
def serving_data() -> dict[str, Any]:
    """The file: "source", "models" (fields of `Architecture` by name), and "engines": by engine, GPU and phase the
    coefficients in the order of `TERMS` and the error."""
    data: dict[str, Any] = json.loads(Path(__file__).with_name("serving.json").read_text(encoding="utf-8"))
    return data


def known_architecture(model: ModelSpec) -> tuple[str, Architecture] | None:
    """(name, what is known of it) of the model that has such experts; None where none has."""
    for name, row in serving_data()["models"].items():
        architecture = Architecture(**row)
        shape = (
            architecture.experts,
            architecture.top_k,
            architecture.hidden_size,
            architecture.moe_layers,
            architecture.expert_weights,
        )
        expert = 3.0 * model.hidden_size * model.ffn_size
        if shape == (model.experts, model.top_k, model.hidden_size, model.layers, expert):
            return name, architecture
    return None


def cache_token_bytes(model: ModelSpec) -> float | None:
    """Bytes of KV cache that a token takes on its device, all layers; None where the model is not known.

    Attention is data parallel, and values are stored as beside experts of that type: one byte beside fp8 and narrower
    ones, else two.
    """
    known = known_architecture(model)
    return None if known is None else known[1].kv_values * _cache_value_bytes(_stored(model))


def _stored(model: ModelSpec) -> float:
    """Bytes of a weight where those of the experts' type are measured."""
    return {"fp8": 1.0, "fp4": DTYPE_BYTES["nvfp4"]}.get(MEASURED_AS.get(model.expert_dtype, model.expert_dtype), 2.0)


def _cache_value_bytes(stored: float) -> float:
    return 1.0 if stored <= 1 else 2.0


class OtherWork(NamedTuple):
    """What steps take beside their MoE layers.

    ms: milliseconds by phase. error: by phase, of the estimator on measured TPOT (decode) and TTFT (prefill) of whole
    models, rows left out of its fit. text: `attention and dense layers of DeepSeek-V3 as estimated (TPOT ±19 %, TTFT
    ±23 % on measured rows)`.
    """

    ms: dict[str, float]
    error: dict[str, float]
    text: str


def other_work(
    model: ModelSpec, topology: Topology, batches: Iterable[Batch], context: int = CONTEXT
) -> OtherWork | None:
    """Estimates what steps of those batches take beside their MoE layers, attention being data parallel.

    Args:
        model: whose experts tell which model it is, of those known (`serving_data`).
        topology: names the engine and its GPUs, all alike.
        batches: the steps; of several of one phase the mean by weight counts.
        context: tokens that attention reads of a decoding sequence, and of a prompt.

    Returns:
        None where the model, the engine or the GPU is not known: give the milliseconds then (`--other-ms`).
    """
    known, gpus = known_architecture(model), set(topology.gpus)
    coefficients = serving_data()["engines"].get(topology.engine, {})
    if known is None or len(gpus) != 1 or (gpu := next(iter(gpus))) not in coefficients:
        return None
    name, architecture = known
    box = next(box for box in PRESETS.values() if box.gpu == gpu)
    stored = _stored(model)
    ms: dict[str, float] = {}
    weight: dict[str, float] = {}
    for batch in batches:
        if batch.phase not in coefficients[gpu]:
            continue
        tokens = batch.step_tokens(topology.num_devices)
        here = tokens / topology.num_devices
        load = Load(
            sequences=tokens if batch.phase == "decode" else 1.0,
            prompt=context if batch.phase == "decode" else here,
            output=0.0,
            attention_shards=1,
            expert_shards=topology.num_devices,
            replicas=topology.num_devices,
            dense_bytes=stored,
            expert_bytes=stored,
            kv_bytes=_cache_value_bytes(stored),
        )
        seconds = _other_seconds(batch.phase, architecture, load, box, coefficients[gpu][batch.phase][0], context)
        ms[batch.phase] = ms.get(batch.phase, 0.0) + batch.weight * seconds * 1e3
        weight[batch.phase] = weight.get(batch.phase, 0.0) + batch.weight
    if not ms:
        return None
    error = {phase: coefficients[gpu][phase][1] / 100 for phase in ms}
    label = {"decode": "TPOT", "prefill": "TTFT"}
    sure = ", ".join(f"{label[phase]} ±{of:.0%}".replace("%", " %") for phase, of in error.items())
    text = f"attention and dense layers of {name} as estimated ({sure} on measured rows)"
    return OtherWork({phase: ms[phase] / weight[phase] for phase in ms}, error, text)


def _other_seconds(
    phase: Phase, model: Architecture, load: Load, box: Box, coefficients: list[float], context: int
) -> float:
    # Nothing is made of a prompt here, and no prompts run beside decode: terms that divide by output are no part.
    terms = dict(zip(TERMS[phase], step_terms(phase, model, load._replace(output=1.0), box), strict=True))
    if phase == "prefill":
        terms["attention_work"] *= context / load.prompt
    by_name = dict(zip(TERMS[phase], coefficients, strict=True))
    return float(sum(by_name[name] * terms[name] for name in OTHER[phase]))
