"""Problems whose bounds are measured: models of several sizes with recorded routing, or routing made from what was
recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import recordings
from mixtral_ilp import recorded_transitions, transitions_of_a_whole_model

import moeplace as mp
from moeplace.placement.step_mix import sample_tokens

MIXTRAL = mp.ModelSpec(name="mixtral-8x7b", layers=32, experts=8, top_k=2, hidden_size=4096, ffn_size=14336)
OLMOE = mp.ModelSpec(name="olmoe-1b-7b", layers=16, experts=64, top_k=8, hidden_size=2048, ffn_size=1024)
DRAWN = 65_536
"""Tokens drawn from transitions."""


def gpt_oss(data: Path) -> mp.RoutingStatistics:
    """Statistics of the recorded routing."""
    return mp.RoutingStatistics.from_trace(recordings.gpt_oss(data))


def of_recorded_transitions(data: Path, model: mp.ModelSpec, recorded: str, seed: int = 0) -> mp.RoutingStatistics:
    """Statistics of a model of OLMoE's or Mixtral's size: its layers' transitions mixed from the two recorded pairs of
    layers of three domains (as mixtral_ilp.py says), and tokens drawn from these. Of one expert a token, transitions
    are those of the highest-weight experts."""
    of_tokens = recorded_transitions(data, recorded, top1=model.top_k == 1)
    transitions = transitions_of_a_whole_model(of_tokens, seed, model.layers)
    known = mp.RoutingStatistics(
        experts=model.experts,
        moe_layers=model.moe_layers,
        load=np.concatenate([transitions.sum(axis=2), transitions[-1:].sum(axis=1)])[None],
        window_workload=np.zeros(1, np.int64),
        transitions=transitions[None],
        top_k=model.top_k,
    )
    return mp.RoutingStatistics.from_trace(sample_tokens(known, model.top_k, DRAWN, seed))


def deepseek(data: Path, layers: int, tokens: int, seed: int = 0) -> tuple[mp.ModelSpec, mp.RoutingStatistics]:
    """DeepSeek-V3's shape. Each token takes its 8 experts by the layer's recorded loads, 4 of them among the 32 experts
    of one of 8 groups."""
    rng = np.random.default_rng(seed)
    counts = np.load(data / "deepseek_v3_counts.npz", allow_pickle=False)
    load = counts[sorted(counts.files)[0]].astype(np.float64)
    load = load[load.sum(axis=1) > 0][:layers]
    ids = np.empty((tokens, layers, 8), dtype=np.uint8)
    for layer, row in enumerate(load):
        # Gumbel keys draw without replacement in proportion to load.
        keys = np.log(row / row.sum() + 1e-9) + rng.gumbel(size=(tokens, 256))
        group = (keys.reshape(tokens, 8, 32).max(axis=2)).argmax(axis=1)
        inside = np.where(np.arange(256) // 32 == group[:, None], keys, -np.inf)
        first = np.argpartition(-inside, 4, axis=1)[:, :4]
        np.put_along_axis(keys, first, -np.inf, axis=1)
        ids[:, layer] = np.hstack([first, np.argpartition(-keys, 4, axis=1)[:, :4]])
    spec = mp.ModelSpec(
        name="deepseek-v3",
        layers=layers,
        experts=256,
        top_k=8,
        hidden_size=7168,
        ffn_size=2048,
        groups=8,
        expert_dtype="fp8",
    )
    trace = mp.RoutingTrace.from_arrays(ids, num_experts=256, sequence=np.arange(tokens) // 8)
    return spec, mp.RoutingStatistics.from_trace(trace)
