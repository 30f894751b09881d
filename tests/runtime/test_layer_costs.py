"""What a layer keeps for backward and asks of the device, as figures that must not grow; saving changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from ranks import launch

MOST = {
    "flat": {
        "kept": 32.0, "operations forward": 77, "operations backward": 61, "waits forward": 1, "waits backward": 0,
        "messages forward": 3, "messages backward": 2,
    },
    "flat, 4 replicas": {
        "kept": 32.0, "operations forward": 95, "operations backward": 78, "waits forward": 1, "waits backward": 0,
        "messages forward": 3, "messages backward": 4,
    },
    "node by node": {
        "kept": 32.0, "operations forward": 121, "operations backward": 78, "waits forward": 2, "waits backward": 0,
        "messages forward": 6, "messages backward": 4,
    },
    "padded to 1.25 of the mean": {
        "kept": 38.5, "operations forward": 76, "operations backward": 58, "waits forward": 0, "waits backward": 0,
        "messages forward": 2, "messages backward": 2,
    },
    "flat, LSH at 0.2": {
        "kept": 9.5, "operations forward": 450, "operations backward": 86, "waits forward": 1, "waits backward": 0,
        "messages forward": 3, "messages backward": 2,
    },
}  # fmt: skip
"""In bfloat16, k = 8, inner width half the hidden size: bytes kept over the input's, and counts."""


@pytest.mark.slow
def test_a_layer_keeps_and_asks_for_no_more_than_this(tmp_path: Path) -> None:
    ranks = launch("layer_cost_ranks:costs", 4, tmp_path)
    for name, most in MOST.items():
        mean = {key: sum(found[name][key] for found in ranks) / len(ranks) for key in most}
        assert {key: mean[key] for key in most if mean[key] > most[key]} == {}


def test_whatever_makes_the_host_wait_for_a_gpu_is_counted_once() -> None:
    from layer_cost_ranks import waits_of

    value, mask = torch.arange(4), torch.tensor([True, False, True, False])
    waiting = {
        "tolist": lambda: value.tolist(), "a number": lambda: int(value[0]), "a question": lambda: bool(mask[0]),
        "an array": lambda: value.numpy(), "a mask": lambda: value[mask], "nonzero": lambda: mask.nonzero(),
        "a list": lambda: value[[0, 2]], "a new tensor": lambda: value.new_tensor([1]),
        "a from array": lambda: torch.from_numpy(np.arange(3)), "unique": lambda: value.unique(),
        "repeated": lambda: value.repeat_interleave(value), "counted": lambda: torch.bincount(value),
        "compared": lambda: torch.equal(value, value),
    }  # fmt: skip
    assert {name: len(waits_of(function)) for name, function in waiting.items()} == dict.fromkeys(waiting, 1)
    still = (
        lambda: value[:2] + value[0], lambda: value[value], lambda: value.repeat_interleave(2), lambda: mask.sum(),
        lambda: value.new_zeros(4).scatter_add_(0, value, value), lambda: torch.where(mask, value, 0).fill_(3),
        lambda: value.repeat_interleave(value, output_size=6),
    )  # fmt: skip
    assert [waits_of(function) for function in still] == [[]] * len(still)


@pytest.mark.parametrize("seed", range(20))
def test_the_nearest_mean_is_the_same_slot_by_slot_and_of_all_at_once(seed: int) -> None:
    from layer_cost_ranks import waits_of

    from moeplace.runtime.moe import lsh

    rng = np.random.default_rng(seed)
    slots, pairs = int(rng.integers(1, 6)), int(rng.integers(2, 60))
    slot_N = torch.from_numpy(np.sort(rng.integers(0, slots + 1, pairs)))
    # Runs inside slots, those out of scope behind.
    begin_N = torch.from_numpy(rng.random(pairs) < 0.3)
    begin_N[1:] |= slot_N[1:] != slot_N[:-1]
    begin_N[0] = True
    id_N = begin_N.cumsum(0) - 1
    rows = int(id_N[-1]) + 1 + int(rng.integers(0, 4))
    # Whole numbers: exact whatever the products' order, ties included.
    p_NX = torch.from_numpy(rng.integers(-2, 3, (pairs, 4))).float()
    mean_RX = torch.from_numpy(rng.integers(-2, 3, (rows, 4))).float()
    slot_R = torch.full((rows,), -1).scatter_(0, id_N, slot_N)
    by_slot, of_all = (
        function(id_N, p_NX, slot_N, mean_RX, slot_R, slots) for function in (lsh.nearest_in_slots, lsh.nearest_of_all)
    )
    assert torch.equal(by_slot, of_all)
    assert waits_of(lambda: lsh.nearest_of_all(id_N, p_NX, slot_N, mean_RX, slot_R, slots)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_rows_are_those_of_torchs_own_operations_to_the_bit(dtype: Any) -> None:
    from moeplace.runtime.moe.dispatcher import RowSum, unpermute

    generator = torch.Generator().manual_seed(0)
    y = torch.randn(40, 8, generator=generator).to(dtype)
    weight, place = torch.rand(40, generator=generator), torch.randint(12, (40,), generator=generator)
    up = torch.randn(12, 8, generator=generator)
    results = []
    for own in (True, False):
        rows, gates = y.clone().requires_grad_(), weight.clone().requires_grad_()
        if own:
            total = unpermute(rows, place, gates, 12)
            summed = RowSum.apply(rows, place, 12)
        else:
            weighted = rows.float() * gates[:, None]
            total = weighted.new_zeros(12, 8).index_add(0, place, weighted)
            summed = torch.zeros(12, 8).index_add(0, place, rows.float()).to(dtype)
        ((total * up).sum() + (summed.float() * up).sum()).backward()
        results.append([total, summed, rows.grad, gates.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["SwiGLU", "GptOss"])
def test_gates_computed_again_give_the_same_bits(kind: str) -> None:
    from moeplace.runtime.moe import expert_mlps

    gate = getattr(expert_mlps, kind)()._gate
    value = 4 * torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (lambda both: expert_mlps.recomputed(gate, both), gate):
        both = value.clone().requires_grad_()
        out = function(both)
        out.square().sum().backward()
        results.append([out, both.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
