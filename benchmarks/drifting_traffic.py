"""Count windows of traffic that changes, with what truly changed and when.

`week`: recorded sequences of gpt-oss-20b, asked for at the times of recorded requests of two Azure services, over a week of
5-minute windows. Each half day has a mixture of topics (data sets) of its own; every third change takes four hours. `turns`:
the recorded loads of a DeepSeek-V3-shaped model under five workloads, one after the other, with loads that wander.
`stationary`: the first of these without any change.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from recordings import GPT_OSS

import moeplace as mp

WINDOW_SECONDS = 300.0
HALF_DAY = 144
RAMP = 48
TOPICS = ("mmlu_test", "mmlu_dev", "mmlu_pro_test", "sorry_bench_base")
SHARE = 1 / 40
"""Of the recorded requests that one deployment gets at its busiest hour."""


@dataclass(frozen=True)
class Traffic:
    """load: [S, L, E]. changes: windows at which one begins. phases: what follows each, the first from window 0."""

    name: str
    model: mp.ModelSpec
    topology: mp.Topology
    slots: int
    step_tokens: int
    load: np.ndarray
    changes: tuple[int, ...]
    phases: tuple[str, ...]


class Recorded:
    """Sequences of gpt-oss-20b by topic, and times and lengths of requests."""

    def __init__(self, data: Path) -> None:
        arrays = np.load(data / "gpt_oss_20b_routing.npz", allow_pickle=False)
        ids = arrays["expert_ids"].astype(np.int64)
        self.layers, self.experts = ids.shape[1], 32
        self.flat = ids + (np.arange(self.layers) * self.experts)[:, None]
        starts = np.flatnonzero(np.diff(arrays["sequence"], prepend=-1))
        lengths = np.diff(np.append(starts, len(ids)))
        topic = arrays["sequence_dataset"][arrays["sequence"][starts]]
        self.members = [(starts[topic == name], lengths[topic == name]) for name in TOPICS]
        requests = [np.load(data / f"azure_2023_requests_{kind}.npz", allow_pickle=False) for kind in ("conv", "code")]
        arrived = np.concatenate([entry["arrival_seconds"] for entry in requests])
        order = np.argsort(arrived)
        self.arrived = arrived[order] % 3600.0
        self.answer = np.concatenate([entry["generated_tokens"] for entry in requests])[order]

    def window(self, number: int, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """[L, E] counts of one window: the requests of any five minutes of the recorded hour, fewer by night than by day."""
        begin = rng.uniform(0.0, 3400.0 - WINDOW_SECONDS)
        asked = self.answer[(self.arrived >= begin) & (self.arrived < begin + WINDOW_SECONDS)]
        hour = number * WINDOW_SECONDS / 3600.0 % 24.0
        busy = 0.3 + 0.7 * np.sin(np.pi * hour / 24.0) ** 2
        asked = np.maximum(1, asked[rng.random(len(asked)) < SHARE * busy])
        tokens = []
        for topic, length in zip(rng.choice(len(TOPICS), size=len(asked), p=weights), asked, strict=True):
            starts, lengths = self.members[topic]
            chosen = rng.integers(len(starts))
            tokens.append(starts[chosen] + np.arange(min(length, lengths[chosen])))
        where = self.flat[np.concatenate(tokens)] if tokens else self.flat[:0]
        return np.bincount(where.ravel(), minlength=self.layers * self.experts).reshape(self.layers, self.experts)


@functools.cache
def _recorded(data: Path) -> Recorded:
    return Recorded(data)


def week(data: Path, seed: int, half_days: int = 14) -> Traffic:
    """Mixtures of topics by the half day."""
    recorded, rng = _recorded(data), np.random.default_rng(seed)
    mixtures: list[np.ndarray] = []
    while len(mixtures) < half_days:
        drawn = rng.dirichlet(np.full(len(TOPICS), 0.2))
        # Total variation of at least half: less is hardly a change of topic.
        if not mixtures or np.abs(drawn - mixtures[-1]).sum() > 1.0:
            mixtures.append(drawn)
    windows = []
    for phase, mixture in enumerate(mixtures):
        ramp = RAMP if phase and phase % 3 == 0 else 1
        for step in range(HALF_DAY):
            part = min(1.0, (step + 1) / ramp)
            weights = part * mixture + (1.0 - part) * mixtures[max(0, phase - 1)]
            windows.append(recorded.window(phase * HALF_DAY + step, weights, rng))
    told = [", ".join(f"{t} {w:.0%}" for t, w in zip(TOPICS, m, strict=True) if w >= 0.05) for m in mixtures]
    changes = tuple(range(HALF_DAY, half_days * HALF_DAY, HALF_DAY))
    return Traffic("week", *_gpt_oss(), 40, 4096, np.array(windows), changes, tuple(told))


def stationary(data: Path, seed: int, windows: int) -> np.ndarray:
    """[S, L, E] of one mixture of topics, hours of the day included."""
    recorded, rng = _recorded(data), np.random.default_rng(seed)
    mixture = rng.dirichlet(np.full(len(TOPICS), 0.4))
    first = int(rng.integers(0, 288))
    return np.array([recorded.window(first + number, mixture, rng) for number in range(windows)])


def turns(data: Path, seed: int, windows: int = 128, rounds: int = 1, tokens: int = 16_384) -> Traffic:
    """Workloads in turn; logarithms of loads wander by a tenth, half of it kept from one window to the next."""
    rng = np.random.default_rng(seed)
    arrays = np.load(data / "deepseek_v3_counts.npz", allow_pickle=False)
    names = list(arrays.files) * rounds
    model = mp.ModelSpec(layers=58, experts=256, top_k=8, hidden_size=7168, ffn_size=2048, groups=8, name="deepseek-v3")
    loads, level = [], np.zeros((58, 256))
    for name in names:
        counts = arrays[name][3:].astype(np.float64)
        for _ in range(windows):
            level = 0.5 * level + rng.normal(0.0, 0.1, counts.shape)
            chances = counts * np.exp(level)
            loads.append(rng.multinomial(tokens * 8, chances / chances.sum(axis=1, keepdims=True)))
    topology = mp.Topology.preset("h100-hgx", nodes=4, devices_per_node=8)
    changes = tuple(range(windows, len(loads), windows))
    return Traffic("turns", model, topology, 288, 65_536, np.array(loads), changes, tuple(names))


def _gpt_oss() -> tuple[mp.ModelSpec, mp.Topology]:
    return GPT_OSS, mp.Topology.preset("h100-hgx", nodes=2, devices_per_node=4)
