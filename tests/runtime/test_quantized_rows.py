"""Rows in few bits: the format itself, and layers whose rows travel in it, on real Gloo processes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplace as mp

pytest.importorskip("torch")

import torch
from ranks import launch

from moeplace.placement.cost import combine_bytes, dispatch_bytes
from moeplace.runtime import LSHCompression, QuantizedRows
from moeplace.runtime.moe.compression import LARGEST, RowFormat, WireDtype
from moeplace.training.rebalancer import row_dtypes

DTYPES: tuple[WireDtype, ...] = ("int8", "int4", "fp8")
ROUNDING = 2e-5


def rows_of(seed: int, rows: int, width: int, exponents: tuple[int, int] = (-3, 3)) -> torch.Tensor:
    """Rows whose groups of values differ in size."""
    generator = torch.Generator().manual_seed(seed)
    power = torch.randint(*exponents, (rows, width), generator=generator).float()
    return torch.randn(rows, width, generator=generator) * torch.exp2(power)


@given(
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    st.integers(0, 5),
    st.integers(1, 4),
    st.sampled_from([2, 4, 16, 32]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=120, deadline=None)
def test_a_row_comes_back_within_half_a_step_of_its_groups_largest_value(
    dtype: WireDtype, seed: int, rows: int, groups: int, group_size: int, of: torch.dtype
) -> None:
    x = rows_of(seed, rows, groups * group_size, (-20, 20)).to(of)
    form = RowFormat(dtype, group_size)
    message = form.encode(x)
    assert message.shape == (rows, form.row_bytes(groups * group_size))
    back = form.decode(message, groups * group_size, of)
    assert back.dtype == of
    parts, found = (value.float().view(rows, groups, group_size) for value in (x, back))
    largest = parts.abs().amax(dim=2, keepdim=True)
    # A scale is rounded to bfloat16, what is read back to the rows' type: 2^-8 of it each at most.
    step = largest / LARGEST[dtype] * (1 + 2**-7)
    bound = step / 2 if dtype != "fp8" else torch.maximum(parts.abs() * 2**-4, step * 2**-10)
    assert ((parts - found).abs() <= bound + largest * (2**-8 if of == torch.bfloat16 else 2**-20)).all()


@given(st.sampled_from(DTYPES), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_what_was_read_back_is_written_in_the_same_bytes(dtype: WireDtype, seed: int) -> None:
    """So that a second hop inside a node loses nothing more."""
    form = RowFormat(dtype, 16)
    message = form.encode(rows_of(seed, 8, 64))
    assert torch.equal(form.encode(form.decode(message, 64, torch.float32)), message)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_that_a_format_has_come_back_exactly(dtype: WireDtype) -> None:
    codes = {
        "int8": torch.arange(-127, 128).float(),
        "int4": torch.arange(-7, 8).float(),
        "fp8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0),
    }[dtype]
    count = len(codes) + len(codes) % 2
    x = torch.cat([codes, codes.new_zeros(count - len(codes))])[None] * 2.0**-9
    assert torch.equal(RowFormat(dtype, count).decode(RowFormat(dtype, count).encode(x), count, torch.float32), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros_and_what_is_not_finite_spoils_its_group_alone(dtype: WireDtype) -> None:
    x = rows_of(0, 4, 64)
    x[0] = 0.0
    x[1, 3], x[2, 40], x[3, 63] = float("nan"), float("inf"), -float("inf")
    form = RowFormat(dtype, 32)
    back = form.decode(form.encode(x), 64, torch.float32)
    assert torch.equal(back[0], x[0])
    spoilt = back.isnan().view(4, 2, 32)
    assert spoilt.all(dim=2).tolist() == [[False, False], [True, False], [False, True], [False, True]]
    assert spoilt.any(dim=2).tolist() == spoilt.all(dim=2).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_very_small_and_very_large_values_keep_their_sizes(dtype: WireDtype) -> None:
    """Gradients far below what half precision holds."""
    x = rows_of(1, 2, 64) * torch.tensor([[1e-30], [1e30]])
    back = RowFormat(dtype, 32).decode(RowFormat(dtype, 32).encode(x), 64, torch.float32)
    assert ((back - x).double().norm(dim=1) / x.double().norm(dim=1)).max() < 0.15


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dispatch_dtype": "int3"}, "dispatch_dtype 'int3' is unknown; did you mean"),
        ({"gradient_dtype": "bf16"}, "gradient_dtype 'bf16' is unknown"),
        ({"group_size": 3}, "group_size \\(3\\) must be an even number"),
        ({"group_size": 0}, "group_size \\(0\\)"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(mp.InputError, match=words):
        QuantizedRows(**fields)


def test_the_cost_model_prices_the_bytes_that_travel() -> None:
    spec = mp.ModelSpec(layers=1, experts=8, top_k=2, hidden_size=2880, ffn_size=64)
    for dtype in DTYPES:
        for group_size in (32, 96):
            rows = QuantizedRows(dtype, None, None, group_size)
            objective = mp.Objective(**rows.objective)
            assert rows.dispatch is not None
            assert dispatch_bytes(spec, objective) == pytest.approx(rows.dispatch.row_bytes(2880), rel=1e-12)
            assert combine_bytes(spec, objective) == 2 * 2880


def test_a_rebalancer_prices_rows_as_they_travel() -> None:
    int4 = QuantizedRows("int4", None, None)
    assert row_dtypes(torch.bfloat16, None) == ("bf16", "bf16")
    for compression in (int4, LSHCompression(rows=int4)):
        assert row_dtypes(torch.bfloat16, compression) == ("int4/32", "bf16")


@pytest.mark.parametrize("dtype", ["int4/", "int4/1", "bf16/32", "int4/32/2", "int4/-2", "/32", "int4/99999999"])
def test_types_by_groups_that_do_not_exist_are_refused(dtype: str) -> None:
    with pytest.raises(mp.InputError, match="combine_dtype.*by groups of values: int8/32"):
        mp.Objective(combine_dtype=dtype)


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("quantized_ranks:layers", 4, tmp_path_factory.mktemp("quantized"))


@pytest.mark.slow
def test_outputs_and_all_gradients_are_those_of_one_process_that_rounds_alike(layers: list[Any]) -> None:
    for found in layers:
        for case, errors in found["equality"].items():
            assert {"out", "x", "gate", "gate_up_proj", "down_proj"} <= set(errors)
            assert max(errors.values()) < ROUNDING, (case, errors)


@pytest.mark.slow
def test_the_bytes_counted_are_those_of_the_messages(layers: list[Any]) -> None:
    for found in layers:
        for case, seen in found["bytes"].items():
            assert seen["sent_bytes"] == seen["forward"], case
            assert seen["backward"] == seen["backward_expected"], case
            assert seen["plain_bytes"] == seen["plain_forward"], case


@pytest.mark.slow
def test_hops_inside_a_node_lose_little_more_than_one_exchange(layers: list[Any]) -> None:
    for found in layers:
        flat, deep = found["hops"]
        assert 0.0 < flat < 0.01
        assert deep < 2 * flat


@pytest.mark.slow
def test_a_batch_in_chunks_sends_and_gives_the_same(layers: list[Any]) -> None:
    for found in layers:
        assert found["chunks"]["error"] < 1e-6
        whole, cut = found["chunks"]["told"]
        assert cut == whole


@pytest.mark.slow
def test_clusters_travel_in_few_bits_too(layers: list[Any]) -> None:
    for found in layers:
        seen = found["composed"]
        assert seen["sent_rows"] < 0.4 * seen["plain_rows"]
        assert seen["sent_bytes"] == seen["sent_rows"] * seen["row_bytes"]
        assert 0.0 < seen["error"] < 0.02


@pytest.mark.slow
def test_ranks_that_differ_in_format_and_widths_that_are_no_whole_groups_are_refused(layers: list[Any]) -> None:
    for found in layers:
        assert "plan and settings of MoE layer" in found["refused"]["differing"]
        assert "group_size (32) does not divide rows of 16 values" in found["refused"]["width"]
