"""What stays in float32 where a model runs in half precision."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from torch.nn import functional as F

from moeplace.runtime.moe.balance import balance_loss
from moeplace.runtime.moe.expert_mlps import recomputed
from moeplace.runtime.moe.layer import SigmoidRouter


def test_the_sigmoid_router_chooses_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    router, x = SigmoidRouter(64, 32, 4), torch.randn(50, 64)
    expected = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_an_auxiliary_loss_of_half_precise_scores_counts_every_token() -> None:
    score = torch.rand(3000, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    chosen = score.topk(2).indices
    assert torch.equal(balance_loss(score, chosen), balance_loss(score.float(), chosen))


def test_what_is_computed_again_in_backward_is_under_the_autocast_of_forward() -> None:
    matrix = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    grads = []
    for again in (True, False):
        value = torch.ones(4, 6, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = recomputed(lambda v: F.silu(v @ matrix), value) if again else F.silu(value @ matrix)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        grads.append(value.grad)
    assert torch.equal(*grads)
