"""LSH-compressed dispatch against the naive layer and against plain dispatch: real Gloo processes, many checks a
spawn."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

import moeplace as mp

pytest.importorskip("torch")

import torch
from ranks import launch

from moeplace.runtime import LSHCompression
from moeplace.runtime.moe.lsh import cluster, digits, rotations

pytestmark = pytest.mark.slow

ROUNDING = 2e-5
"""Of float32 sums of some hundred terms."""


@pytest.fixture(scope="module")
def equality(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("compression_ranks:equality", 4, tmp_path_factory.mktemp("equality"))


def test_outputs_and_gradients_equal_the_naive_layer_under_random_plans_and_settings(equality: list[Any]) -> None:
    for found in equality:
        assert {"out", "x", "gate", "gate_up_proj", "down_proj", "up_proj", "gate_up_proj_bias"} <= set(found["worst"])
        assert max(found["worst"].values()) < ROUNDING, found["worst"]
        assert found["clusters"] > 50


@pytest.fixture(scope="module")
def behaviours(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("compression_ranks:behaviours", 4, tmp_path_factory.mktemp("behaviours"))


def test_where_nothing_is_compressed_the_bits_are_those_of_plain_dispatch(behaviours: list[Any]) -> None:
    for found in behaviours:
        assert all(found["nothing_left_out"].values()), found["nothing_left_out"]


def test_statistics_count_the_rows_that_travel_and_the_rate_is_kept(behaviours: list[Any]) -> None:
    for found in behaviours:
        for mesh in ("flat", "deep"):
            seen = found["rows"][mesh]
            assert seen["carried"]["plain"] == seen["plain_rows"]
            if mesh == "flat":
                assert seen["carried"]["sent"] == seen["sent_rows"]
            assert seen["carried"]["sent"] <= seen["sent_rows"] < 0.4 * seen["plain_rows"]
            assert seen["sent_rows"] <= seen["left"] <= 0.25 * seen["pairs"]
            row = 2 * 16 * 4 + 8 * 3
            assert seen["bytes"] == [seen["plain_rows"] * row, seen["sent_rows"] * row]
            assert 0.0 < seen["error"] < 1.0


def test_few_and_no_tokens_and_all_to_one_expert_are_ordinary_input(behaviours: list[Any]) -> None:
    for rank, found in enumerate(behaviours):
        odd = found["odd_inputs"]
        count = {1: 0, 2: 1}.get(rank, 120)
        assert odd["few"] == [[count, 16], [count, 16], True]
        assert odd["none"] == [0, 16]
        pairs, left = odd["one"]
        assert pairs == 120
        assert left <= 24


def test_equal_tokens_lose_nothing(behaviours: list[Any]) -> None:
    assert all(found["odd_inputs"]["same"] < ROUNDING for found in behaviours)


def test_nan_stays_with_its_token(behaviours: list[Any]) -> None:
    for rank, found in enumerate(behaviours):
        assert found["odd_inputs"]["nan"] == ([2, 5] if rank == 1 else [])
        assert found["odd_inputs"]["nan_grad"] == ([2, 5] if rank == 1 else [])


def test_bfloat16_is_as_near_as_its_precision(behaviours: list[Any]) -> None:
    assert all(found["half_precision"] < 0.015 for found in behaviours)


def test_activation_checkpointing_recomputes_the_same_clusters(behaviours: list[Any]) -> None:
    assert all(found["recomputed"] for found in behaviours)


def test_the_warm_up_counts_optimizer_steps(behaviours: list[Any]) -> None:
    for found in behaviours:
        assert found["schedule"] == [False] * 4 + [True] * 4


def test_a_rate_follows_the_error_between_optimizer_steps(behaviours: list[Any]) -> None:
    for found in behaviours:
        left, error = found["following"]["left"], found["following"]["error"]
        assert found["following"]["again"] == left
        assert left[0] < 0.1
        assert error[0] > 0.7
        assert all(abs(late - 0.6) < 0.06 for late in error[-10:])
        assert left[-1] > 3 * left[0]


def test_a_compressed_layer_learns_under_ddp_and_its_replicas_stay_equal(behaviours: list[Any]) -> None:
    for found in behaviours:
        assert found["ddp"]["last"] < 0.5 * found["ddp"]["first"]
        assert found["ddp"]["equal"]


def test_placement_is_solved_on_the_rows_that_experts_get(behaviours: list[Any]) -> None:
    windows = behaviours[0]["counts"]["windows"]
    for found in behaviours:
        counts = found["counts"]
        assert counts["windows"] == windows
        assert counts["slots"] >= 6
        for rows, tokens in zip(windows, counts["tokens"], strict=True):
            for layer in rows:
                assert all(0 < row <= count or row == count == 0 for row, count in zip(layer, tokens, strict=True))
                assert sum(layer) <= 0.25 * sum(tokens)
        assert "without compression" in counts["refused"]
    assert [sum(layer) for layer in windows[-1]] == [sum(f["counts"]["mine"][n] for f in behaviours) for n in range(2)]


def test_a_hidden_size_below_the_projection_other_dispatchers_and_chunks_are_refused(behaviours: list[Any]) -> None:
    for rank, found in enumerate(behaviours):
        assert "hidden size 16 is too small for a projection to 17 dimensions" in found["refusals"]["hidden"]
        assert "on top of flat and node_aware dispatch, not of Other" in found["refusals"]["dispatch"]
        assert "flat and node_aware dispatch, not with LSHCompression; give chunks=1" in found["refusals"]["chunks"]
        assert ("rank 2 refused it" in found["refusals"]["one"]) == (rank != 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rate": 0.0}, "rate \\(0.0\\) must be above 0"),
        ({"rate": 1.5}, "rate \\(1.5\\)"),
        ({"hashes": 0}, "hashes \\(0\\) must be at least 1"),
        ({"lloyd_steps": -1}, "lloyd_steps \\(-1\\) must be at least 0"),
        ({"dimension": 0}, "dimension \\(0\\)"),
        ({"warm_up": -1}, "warm_up \\(-1\\)"),
        ({"rotation_steps": 0}, "rotation_steps \\(0\\)"),
        ({"error_bound": float("nan")}, "error_bound is nan"),
        ({"error_target": 1.0}, "error_target \\(1.0\\) must be between 0 and 1"),
        ({"residual": "scale"}, "did you mean 'scaled'"),
        ({"scope": "off_nodes"}, "did you mean 'off_node'"),
        ({"hashes": 16, "dimension": 64}, "take fewer hashes"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(mp.InputError, match=words):
        LSHCompression(**settings)


def test_a_hash_is_the_nearest_of_the_axes_both_ways() -> None:
    directions = rotations(12, hashes=3, dimension=4, seed=5)
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    found = digits(x @ directions, 4)
    for h in range(3):
        basis = directions[:, 4 * h : 4 * h + 4]
        assert torch.allclose(basis.T @ basis, torch.eye(4), atol=1e-6)
        corners = torch.stack([sign * basis[:, i] for i in range(4) for sign in (1.0, -1.0)])
        assert torch.equal(found[:, h], (x @ corners.T).argmax(dim=1))


def test_more_rows_allowed_never_make_a_larger_error() -> None:
    generator = torch.Generator().manual_seed(1)
    projected = torch.randn(400, 24, generator=generator)
    slot = torch.randint(5, (400, 2), generator=generator)
    errors = []
    for target in range(5, 500, 15):
        everything, alike = torch.ones_like(slot, dtype=torch.bool), torch.ones(400, 2)
        found = cluster(projected, slot, everything, alike, torch.tensor(target), 5, 4, target, 0)
        rows = int((found.size_M > 1).sum()) + int((found.row_TK == len(found.slot_M)).sum())
        assert rows <= target
        total = 0.0
        for j in range(int((found.size_M > 0).sum())):
            members = projected[(found.row_TK == j).nonzero()[:, 0]]
            assert len(members) == found.size_M[j]
            total += float((members - members.mean(dim=0)).square().sum())
        errors.append(total)
    assert all(b <= a * 1.02 for a, b in pairwise(errors)), errors


def test_lloyd_steps_lower_the_error_and_never_add_rows() -> None:
    generator = torch.Generator().manual_seed(2)
    points = torch.randn(40, 24, generator=generator)[torch.randint(40, (400,), generator=generator)]
    projected = points + 0.3 * torch.randn(400, 24, generator=generator)
    slot = torch.randint(5, (400, 2), generator=generator)
    weight = torch.rand(400, 2, generator=generator) + 0.1
    everything = torch.ones_like(slot, dtype=torch.bool)
    errors, rows = [], []
    for steps in range(5):
        found = cluster(projected, slot, everything, weight, torch.tensor(150), 5, 4, 150, steps)
        alone = found.row_TK == len(found.slot_M)
        rows.append(int((found.size_M > 0).sum()) + int(alone.sum()))
        total = 0.0
        for j in range(int((found.size_M > 0).sum())):
            t, k = (found.row_TK == j).nonzero(as_tuple=True)
            assert (slot[t, k] == found.slot_M[j]).all()
            own = weight[t, k][:, None]
            mean = (own * projected[t]).sum(dim=0) / own.sum()
            total += float((own * (projected[t] - mean).square()).sum())
        errors.append(total)
    assert all(b <= a for a, b in pairwise(errors)), errors
    assert errors[2] < 0.75 * errors[0]
    assert all(b <= a <= 150 for a, b in pairwise(rows)), rows
