"""Recorded routing of real models as traces: what benchmarks solve and judge on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import moeplace as mp

GPT_OSS = mp.ModelSpec(
    name="gpt-oss-20b", layers=24, experts=32, top_k=4, hidden_size=2880, ffn_size=2880, expert_dtype="mxfp4"
)
QWEN3 = mp.ModelSpec(name="Qwen3-30B-A3B", layers=48, experts=128, top_k=8, hidden_size=2048, ffn_size=768)
OLMOE_SMALL = mp.ModelSpec(name="small OLMoE", layers=8, experts=32, top_k=2, hidden_size=2048, ffn_size=1024)


def gpt_oss(data: Path) -> mp.RoutingTrace:
    """131,403 decode tokens of 430 sequences, each tagged with the question set it answers."""
    arrays = np.load(data / "gpt_oss_20b_routing.npz", allow_pickle=False)
    return mp.RoutingTrace.from_arrays(
        arrays["expert_ids"],
        num_experts=GPT_OSS.experts,
        gate_weights=arrays["gate_probs"],
        sequence=arrays["sequence"],
        position=arrays["position"],
        workload=arrays["sequence_dataset"][arrays["sequence"]],
    )


def qwen3_prefill(data: Path) -> mp.RoutingTrace:
    """One prefill batch of 2,050 tokens."""
    ids = np.load(data / "qwen3_30b_prefill.npz", allow_pickle=False)["expert_ids"]
    return mp.RoutingTrace.from_arrays(ids, num_experts=QWEN3.experts, position=np.arange(len(ids)))


def olmoe_small(root: Path) -> mp.RoutingTrace:
    """The example model of this repository: 163,840 tokens of five text domains."""
    return mp.read_trace(root / "examples" / "data" / "olmoe_small")
