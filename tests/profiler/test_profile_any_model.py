"""Models that are not of Transformers: routers and experts named by the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp

torch = pytest.importorskip("torch")

from routed_model import EXPERTS, TOP_K, WIDTH, MaskRouter, Model, ids_of  # noqa: E402

from moeplace.profiler.profile import profile  # noqa: E402
from moeplace.profiler.trace_files import read_trace  # noqa: E402

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "routers",
    [r"\.router$", r"experts", ["blocks.1.router", "blocks.3.router"], ["blocks.3.experts", "blocks.1.experts"]],
)
def test_routers_or_experts_are_named_by_pattern_or_list(routers: Any, tmp_path: Path) -> None:
    model = Model()
    with profile(model, tmp_path / "t", routers=routers, num_experts=EXPERTS) as recorder, torch.no_grad():
        model(ids_of(3, 4))
        model(ids_of(2, 5))
    trace = read_trace(tmp_path / "t")
    ids, weights = model.told
    assert recorder.model_spec is None
    assert trace.moe_layers == (1, 3)
    np.testing.assert_array_equal(trace.expert_ids, ids)
    np.testing.assert_array_equal(trace.gate_weights, weights)
    np.testing.assert_array_equal(trace.sequence, np.repeat(np.arange(5), [4, 4, 4, 5, 5]))


def test_a_users_function_reads_what_no_convention_does(tmp_path: Path) -> None:
    def extract(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        weights, ids = output.topk(TOP_K, dim=-1)
        return ids, weights

    model = Model(MaskRouter)
    with profile(model, tmp_path / "t", routers="router", extract=extract, num_experts=EXPERTS), torch.no_grad():
        model(ids_of(3, 4))
    np.testing.assert_array_equal(read_trace(tmp_path / "t").expert_ids, model.told[0])


def test_ids_without_weights_are_recorded_in_the_order_given(tmp_path: Path) -> None:
    def extract(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return output[1], None

    model = Model()
    with profile(model, tmp_path / "t", routers="router", extract=extract, num_experts=EXPERTS), torch.no_grad():
        model(ids_of(3, 4))
    trace = read_trace(tmp_path / "t")
    assert trace.gate_weights is None
    np.testing.assert_array_equal(trace.expert_ids, model.told[0])


def test_a_matrix_of_vectors_is_one_token_a_row_and_a_mask_drops_positions(tmp_path: Path) -> None:
    model = Model()
    with profile(model, tmp_path / "flat", routers="router", num_experts=EXPERTS), torch.no_grad():
        model(torch.randn(5, WIDTH))
    assert read_trace(tmp_path / "flat").sequence.tolist() == [0, 1, 2, 3, 4]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    with profile(model, tmp_path / "rows", routers="router", num_experts=EXPERTS), torch.no_grad():
        model(torch.randn(2, 3, WIDTH), attention_mask=mask)
    trace = read_trace(tmp_path / "rows")
    assert (trace.sequence.tolist(), trace.position.tolist()) == ([0, 0, 1], [0, 1, 0])


def test_a_module_that_shows_no_ids_is_an_error_that_says_what_it_saw(tmp_path: Path) -> None:
    model = Model(MaskRouter)
    with (
        pytest.raises(
            mp.InputError, match=r"MaskRouter: no expert ids in its output \(float32 \[3, 4, 6\]\).*extract="
        ),
        profile(model, tmp_path / "t", routers="router", num_experts=EXPERTS),
        torch.no_grad(),
    ):
        model(ids_of(3, 4))


@pytest.mark.parametrize(
    ("routers", "message"),
    [
        ("gate_up", "matches no module of Model; modules it has: blocks.1.router"),
        ("(", "not a regular expression"),
        (["blocks.0.router"], "no module 'blocks.0.router'"),
        ("blocks.1", "two routers for one layer"),
    ],
)
def test_names_that_do_not_fit_are_refused(routers: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(mp.InputError, match=message):
        profile(Model(), tmp_path / "t", routers=routers, num_experts=EXPERTS)


def test_an_unknown_number_of_experts_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(mp.InputError, match=r"blocks.1.router \(TupleRouter\).*num_experts="):
        profile(Model(), tmp_path / "t", routers="router")


@pytest.mark.parametrize("mode", ["tokens", "counts"])
@pytest.mark.parametrize("stray", [-1, EXPERTS, 300])
def test_ids_that_are_no_expert_are_refused(mode: Any, stray: int, tmp_path: Path) -> None:
    def extract(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return torch.where(output[1] == 0, stray, output[1]), output[0]

    model = Model()
    with (
        pytest.raises(mp.MoeplaceError, match=r"layer [13]\b.*from 0 to 5"),
        profile(model, tmp_path / "t", mode=mode, routers="router", extract=extract, num_experts=EXPERTS),
        torch.no_grad(),
    ):
        model(ids_of(30, 4))


def test_256_experts_keep_masked_ids_apart_from_real_ones(tmp_path: Path) -> None:
    def extract(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return torch.tensor([[255, 256]]).expand(output[1].shape), output[0]

    model = Model()
    with (
        pytest.raises(mp.MoeplaceError, match="is 256; ids must be from 0 to 255"),
        profile(model, tmp_path / "t", routers="router", extract=extract, num_experts=256),
        torch.no_grad(),
    ):
        model(ids_of(2, 4))


def test_a_layer_that_does_not_route_is_refused_in_token_mode_and_counted_as_none_in_count_mode(tmp_path: Path) -> None:
    model = Model()
    model.depth = 2
    with (
        pytest.raises(mp.UnsupportedError, match=r"blocks.3.router did not route.*mode='counts'"),
        profile(model, tmp_path / "t", routers="router", num_experts=EXPERTS),
        torch.no_grad(),
    ):
        model(ids_of(2, 4))
    with (
        profile(model, tmp_path / "c", mode="counts", routers="router", num_experts=EXPERTS) as recorder,
        torch.no_grad(),
    ):
        model(ids_of(2, 4))
    assert recorder.statistics().total_load.sum(axis=1).tolist() == [2 * 4 * TOP_K, 0]


def test_data_parallel_replicas_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(mp.UnsupportedError, match="DistributedDataParallel"),
        profile(torch.nn.DataParallel(Model()), tmp_path / "t", routers="router", num_experts=EXPERTS),
    ):
        pass
