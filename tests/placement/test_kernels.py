"""Predicted times from measured kernels: the one cost function, its bounds, and what is said of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import make_trace

import moeplace as mp
from moeplace._types import IntArray
from moeplace.placement.bounds import compute_bound
from moeplace.placement.cost import ExpertCost, compute_seconds
from moeplace.placement.kernels import kernel_fit, known_kernels
from moeplace.placement.topology import ENGINES, FORMER_NAMES, PRESETS

GPT_OSS = mp.ModelSpec(
    layers=1, experts=32, top_k=4, hidden_size=2880, ffn_size=2880, expert_dtype="mxfp4", name="gpt-oss-20b"
)


def measured(gpus: tuple[str, ...] = ("h100-sxm",) * 4, engine: str = "vllm") -> mp.Topology:
    """A node of those GPUs."""
    boxes = {box.gpu: name for name, box in PRESETS.items()}
    devices = tuple(mp.Topology.preset(boxes[gpu]).nodes[0].devices[0] for gpu in gpus)
    return mp.Topology(nodes=(mp.Node(devices=devices, inter_bandwidth=1e11),), engine=engine)


def test_expert_seconds_is_the_formula_that_is_written_down() -> None:
    fit = kernel_fit("h100-sxm", "vllm", GPT_OSS, 3)
    assert fit is not None
    pairs, hit = np.array([0.0, 64.0, 9000.0]), np.array([0.0, 4.0, 3.0])
    flops, size = 6 * 2880 * 2880, 3 * 2880 * 2880 * 0.53125
    expected = [
        fit.launch
        + pairs.sum() * 2 * (2880 + 2880) / fit.passing
        + max((n + fit.rows * h) * flops / fit.rate, h * size / fit.bandwidth)
        for n, h in zip(pairs, hit, strict=True)
    ]
    seconds = mp.expert_seconds(GPT_OSS, gpu="h100-sxm", engine="vllm", tokens=pairs, experts_hit=hit)
    assert seconds == pytest.approx(expected)
    assert compute_seconds(pairs, hit, GPT_OSS, measured(("h100-sxm",) * 3)) == pytest.approx(expected)


@pytest.mark.parametrize(("engine", "low", "high"), [("vllm", 100, 135), ("sglang", 130, 160), ("trtllm", 120, 170)])
def test_small_steps_take_what_was_measured_and_not_what_a_roofline_says(engine: str, low: float, high: float) -> None:
    pairs = np.full(8, 128 * 4 / 8)
    seconds = mp.expert_seconds(GPT_OSS, gpu="h100-sxm", engine=engine, tokens=pairs, experts_hit=[4] * 8)
    assert low < seconds[0] * 1e6 < high
    assert compute_seconds(pairs, np.full(8, 4.0), GPT_OSS, mp.Topology.preset("h100-sxm"))[0] < 25e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "vlm"}, "did you mean 'vllm'"),
        ({"gpu": "h100"}, "did you mean"),
        ({"gpu": ["h100-sxm"]}, "1 GPUs are named for 2 devices"),
        ({"tokens": [1.0]}, "must be as long"),
        ({"tokens": [-1.0, 2.0]}, "at least 0"),
    ],
)
def test_what_is_not_known_is_refused(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"gpu": "h100-sxm", "engine": "vllm", "tokens": [4.0, 4.0], "experts_hit": [1, 2]}
    with pytest.raises(mp.InputError, match=message):
        mp.expert_seconds(GPT_OSS, **(arguments | changes))  # type: ignore[arg-type]


def test_every_prediction_says_what_it_rests_on() -> None:
    roofline = mp.prediction_basis(GPT_OSS, mp.Topology.preset("h100-sxm"))
    assert roofline.error is None
    assert roofline.transfer_error is None
    assert "a roofline and the topology's links, not measured" in roofline.text
    assert "name an engine" in roofline.text
    basis = mp.prediction_basis(GPT_OSS, mp.Topology.preset("h100-sxm", engine="sglang"))
    assert basis.error is not None
    assert basis.transfer_error is not None
    assert 0 < basis.error < 0.2
    assert 0 < basis.transfer_error < 0.1
    assert basis.text.startswith(f"predicted, ±{max(basis.error, basis.transfer_error) * 100:.0f} % (")
    assert f"compute ±{basis.error * 100:.0f} %" in basis.text
    assert f"transfer ±{basis.transfer_error * 100:.0f} %: normal by DeepEP" in basis.text
    assert "h100-sxm, mxfp4" in basis.text
    mixed = mp.prediction_basis(GPT_OSS, measured(("h100-sxm", "rtx-4090")))
    assert mixed.error is None
    assert "rtx-4090" in mixed.text
    gathered = mp.Objective(prefill_dispatch="all_gather", decode_dispatch="low_latency")
    b200 = mp.prediction_basis(GPT_OSS, mp.Topology.preset("b200-sxm", nodes=2, engine="sglang"), gathered)
    assert "low latency by DeepEP" in b200.text
    assert "all gather by NCCL" in b200.text
    assert "links between nodes not measured" in b200.text
    a100 = mp.Topology.preset("a100-sxm", engine="sglang")
    partly = mp.prediction_basis(GPT_OSS.replace(expert_dtype="bf16"), a100)
    assert partly.error is not None
    assert partly.transfer_error is None
    assert "of what was measured" in partly.text
    assert "by the topology's links, not measured" in partly.text


def test_a_problem_for_an_engine_is_predicted_by_its_kernels() -> None:
    trace, topology = make_trace(seed=0), mp.Topology.preset("h100-sxm", devices_per_node=2)
    model = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=64, ffn_size=32)
    assert mp.Problem(trace, topology, model=model).topology.engine == ""
    assert mp.Problem(trace, topology, model=model, engine="sglang").topology.engine == "sglang"
    own = topology.replace(engine="trtllm")
    assert mp.Problem(trace, own, model=model, engine="sglang").topology.engine == "trtllm"


def test_eight_and_four_bit_arithmetic_have_their_own_rate() -> None:
    topology = mp.Topology.preset("b200-sxm")
    assert topology.rate("fp8")[0] == 2 * topology.rate("bf16")[0]
    assert topology.rate("fp4")[0] == 4 * topology.rate("bf16")[0]
    assert topology.rate("mxfp4")[0] == topology.rate("bf16")[0]
    assert mp.Topology.preset("a100-sxm").rate("fp8")[0] == mp.Topology.preset("a100-sxm").rate("bf16")[0]


@pytest.mark.parametrize("name", FORMER_NAMES)
def test_former_preset_names_mean_the_new_ones(name: str) -> None:
    former = mp.Topology.preset(name)
    assert former.name == name
    assert former.replace(name=FORMER_NAMES[name]) == mp.Topology.preset(FORMER_NAMES[name])


def test_an_engine_without_kernels_is_refused_and_files_keep_the_engine(tmp_path: object) -> None:
    with pytest.raises(mp.InputError, match="no measured kernels"):
        mp.Topology.preset("h100-sxm", engine="tgi")
    topology = mp.Topology.preset("h100-sxm", engine="vllm")
    path = f"{tmp_path}/cluster.yaml"
    topology.save(path)
    assert mp.Topology.load(path) == topology


def test_all_that_is_known_is_sane() -> None:
    fits = known_kernels()
    assert {fit.engine for fit in fits} == set(ENGINES)
    assert {box.gpu for box in PRESETS.values()} - {fit.gpu for fit in fits} <= {"rtx-4090", "a100-pcie", "h100-pcie"}
    for fit in fits:
        assert min(fit[:6]) > 0, fit


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([("h100-sxm",) * 4, ("h100-sxm", "h100-sxm", "b200-sxm", "a100-sxm"), ("l40s", "rtx-4090")]),
    st.sampled_from(["bf16", "fp8"]),
    st.integers(0, 4),
)
def test_no_placement_is_below_the_bound_of_its_compute(
    seed: int, gpus: tuple[str, ...], dtype: str, spare: int
) -> None:
    rng = np.random.default_rng(seed)
    experts = 8
    model = mp.ModelSpec(layers=1, experts=experts, top_k=2, hidden_size=2048, ffn_size=768, expert_dtype=dtype)
    topology = measured(gpus, str(rng.choice(ENGINES)))
    loads = rng.integers(0, int(rng.choice([3, 60, 3000])), (2, 1, experts)).astype(float)
    loads *= rng.random(loads.shape) < 0.8
    slots = experts + spare
    slot_device = np.sort(np.arange(slots) % len(gpus))
    table = np.concatenate([np.arange(experts), rng.integers(0, experts, spare)])
    table = rng.permutation(table)
    share = np.zeros((experts, len(gpus)))
    weight = rng.random(slots)
    for slot in range(slots):
        share[table[slot], slot_device[slot]] += weight[slot]
    share /= share.sum(axis=1, keepdims=True)
    hit = 1.0 - (1.0 - share) ** loads[..., None]
    seconds = ExpertCost.of(model, topology).seconds(loads @ share, hit.sum(axis=2)).max(axis=-1)
    problem = _problem(model, topology, np.bincount(slot_device, minlength=len(gpus)))
    assert (compute_bound(loads, problem) <= seconds * (1 + 1e-9)).all()


def _problem(model: mp.ModelSpec, topology: mp.Topology, slots: IntArray) -> mp.Problem:
    trace = make_trace(seed=0, layers=1)
    return mp.Problem(trace, topology, model=model, device_slots=tuple(slots.tolist()))


@pytest.mark.slow
def test_search_prices_its_moves_as_plans_are_judged() -> None:
    trace = make_trace(seed=3)
    model = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=4096, ffn_size=14336)
    topology = mp.Topology.preset("h100-sxm", nodes=2, devices_per_node=2, engine="vllm")
    problem = mp.Problem(trace, topology, model=model)
    plan = mp.solve(problem, "search", proposals=400, seed=0)
    contiguous = mp.solve(problem, "contiguous")
    steps = trace.decode_steps(32, 8, seed=0)
    judged = [mp.evaluate(each, steps, problem).step_seconds for each in (plan, contiguous)]
    plain = dataclasses.replace(problem, topology=topology.replace(engine=""))
    assert (judged[0] > mp.evaluate(plan, steps, plain).step_seconds).all()
    assert judged[0].mean() <= judged[1].mean()
    assert plan.certificate is not None
    assert plan.certificate.bound is not None
    assert plan.certificate.bound <= plan.certificate.value
