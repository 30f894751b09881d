"""What a layer keeps for backward and asks of the device, as figures that must not grow; saving changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
        "kept": 32.0, "operations forward": 95, "operations backward": 81, "waits forward": 1, "waits backward": 0,
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
}  # fmt: skip
"""In bfloat16, k = 8, inner width half the hidden size: bytes kept over the input's, and counts."""


@pytest.mark.slow
def test_a_layer_keeps_and_asks_for_no_more_than_this(tmp_path: Path) -> None:
    ranks = launch("layer_cost_ranks:costs", 4, tmp_path)
    for name, most in MOST.items():
        mean = {key: sum(found[name][key] for found in ranks) / len(ranks) for key in most}
        assert {key: mean[key] for key in most if mean[key] > most[key]} == {}


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
