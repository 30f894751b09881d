"""Steps of a DeepSeek-V3-shaped model: real loads, group-limited routing, affinity taken from gpt-oss-20b's tokens.

Only counts of DeepSeek-V3 were recorded, so tokens are modelled. Each modelled token follows a recorded gpt-oss-20b
token: in modelled layer l it sees that token's four experts and gate weights at layer l mod 24. Every modelled expert
is kin of one gpt-oss expert (8 each, dealt at random, anew in every layer), and a token's score for expert e is

    strength * gate weight of e's kin + bias[e] + Gumbel noise.

Scores go through DeepSeek-V3's routing: the 4 of 8 groups with the largest sum of their two best scores, then the 8
best experts inside. The biases are fitted layer by layer until expert loads are the recorded ones, as DeepSeek's own
bias update balances them. What is real: loads of every layer, the group limit, and which tokens go together and how
experts of neighbouring layers follow each other, as far as gpt-oss-20b's do. What is not: the strength, chosen so that
an expert's likeliest successors take a share of its tokens as gpt-oss's do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from runner import Report, data_argument

import moeplace as mp

EXPERTS, GROUPS, KEPT_GROUPS, TOP_K, KIN = 256, 8, 4, 8, 32
LAYERS = tuple(range(3, 61))
MODEL = mp.ModelSpec(
    name="deepseek-v3",
    layers=len(LAYERS),
    experts=EXPERTS,
    top_k=TOP_K,
    hidden_size=7168,
    ffn_size=2048,
    expert_dtype="fp8",
    groups=GROUPS,
    moe_layers=LAYERS,
)
FITTING = 24


def modelled_trace(data: Path, tokens: int, seed: int = 0, strength: float = 6.0) -> mp.RoutingTrace:
    """A trace of `tokens` modelled tokens of as many recorded ones, in their sequences; loads of decode_in1000out1000."""
    counts = np.load(data / "deepseek_v3_counts.npz", allow_pickle=False)
    load = next(counts[name] for name in counts.files if "decode_in1000out1000" in name)[list(LAYERS)]
    recorded = np.load(data / "gpt_oss_20b_routing.npz", allow_pickle=False)
    rng = np.random.default_rng(seed)
    sequences = rng.permutation(int(recorded["sequence"].max()) + 1)
    order = np.argsort(sequences[recorded["sequence"]], kind="stable")[:tokens]
    order.sort()
    ids = np.empty((len(order), len(LAYERS), TOP_K), dtype=np.uint8)
    for row in range(len(LAYERS)):
        known, gates = recorded["expert_ids"][order, row % 24], recorded["gate_probs"][order, row % 24]
        kin = rng.permutation(np.repeat(np.arange(KIN), EXPERTS // KIN))
        seen = np.zeros((len(order), KIN), dtype=np.float32)
        np.put_along_axis(seen, known.astype(np.int64), gates.astype(np.float32), axis=1)
        ids[:, row] = _routed(strength * seen[:, kin], load[row] / load[row].sum(), rng)
    sequence = recorded["sequence"][order]
    return mp.RoutingTrace.from_arrays(
        ids,
        num_experts=EXPERTS,
        moe_layers=LAYERS,
        sequence=sequence,
        position=recorded["position"][order],
        workload=recorded["sequence_dataset"][sequence],
    )


def _routed(
    affinity: npt.NDArray[np.float32], share: npt.NDArray[np.float64], rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """[T, k] experts by descending score; biases fitted on a part of the tokens until loads are `share`."""
    noise = rng.gumbel(size=affinity.shape).astype(np.float32)
    bias = np.log(np.maximum(share, 1e-6)).astype(np.float32)
    part = slice(0, min(len(affinity), 4096))
    for turn in range(FITTING):
        got = np.bincount(_choose(affinity[part] + noise[part] + bias).ravel(), minlength=EXPERTS) / (
            TOP_K * (part.stop - part.start)
        )
        rate = 0.6 if turn < FITTING // 2 else 0.3
        bias += rate * (np.log(np.maximum(share, 1e-5)) - np.log(np.maximum(got, 1e-5))).astype(np.float32)
    return _choose(affinity + noise + bias).astype(np.uint8)


def _choose(score: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    grouped = score.reshape(len(score), GROUPS, -1)
    two_best = np.partition(grouped, -2, axis=2)[:, :, -2:].sum(axis=2)
    kept = np.argpartition(two_best, -KEPT_GROUPS, axis=1)[:, -KEPT_GROUPS:]
    mask = np.zeros((len(score), GROUPS), dtype=bool)
    np.put_along_axis(mask, kept, True, axis=1)
    limited = np.where(np.repeat(mask, EXPERTS // GROUPS, axis=1), score, -np.inf)
    best = np.argpartition(limited, -TOP_K, axis=1)[:, -TOP_K:]
    descending = np.argsort(-np.take_along_axis(limited, best, axis=1), axis=1)
    return np.take_along_axis(best, descending, axis=1)


def followers(ids: npt.NDArray[np.integer], experts: int, most: int) -> float:
    """Share of an expert's tokens that its likeliest successors take, mean over experts and layer pairs, first choices."""
    shares = []
    for layer in range(ids.shape[1] - 1):
        pairs = np.zeros((experts, experts))
        np.add.at(pairs, (ids[:, layer, 0].astype(int), ids[:, layer + 1, 0].astype(int)), 1.0)
        used = pairs[pairs.sum(axis=1) > 0]
        shares.append((np.sort(used, axis=1)[:, -most:].sum(axis=1) / used.sum(axis=1)).mean())
    return float(np.mean(shares))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--strength", type=float, default=6.0)


def run(options: argparse.Namespace, report: Report) -> None:
    """Says how far the modelled loads are from the recorded ones and how the affinity compares."""
    ids = modelled_trace(options.data, options.tokens, strength=options.strength).expert_ids
    counts = np.load(options.data / "deepseek_v3_counts.npz", allow_pickle=False)
    load = next(counts[name] for name in counts.files if "decode_in1000out1000" in name)[list(LAYERS)]
    modelled = np.stack([np.bincount(ids[:, row].ravel(), minlength=EXPERTS) for row in range(len(LAYERS))])
    shares = (loads / loads.sum(axis=1, keepdims=True) for loads in (modelled, load))
    missed = 0.5 * np.abs(np.subtract(*shares)).sum(axis=1)
    real = np.load(options.data / "gpt_oss_20b_routing.npz", allow_pickle=False)["expert_ids"]
    table = report.table("modelled and recorded", ("figure", "value"))
    table.row("load off the recorded one, mean", float(missed.mean()))
    table.row("load off the recorded one, worst layer", float(missed.max()))
    table.row("share of an eighth of experts as successors, modelled", followers(ids, EXPERTS, 32))
    table.row("share of an eighth of experts as successors, gpt-oss-20b", followers(real, 32, 4))
