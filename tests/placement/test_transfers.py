"""Predicted dispatch and combine from measured all-to-alls."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import numpy as np
import pytest

import moeplace as mp
from moeplace.placement.cost import TransferCost, Transfers
from moeplace.placement.engines import engine_profile, target_names
from moeplace.placement.objective import DispatchKind
from moeplace.placement.replay import device_traffic
from moeplace.placement.topology import PRESETS
from moeplace.placement.transfers import known_transfers, transfer_fit

DEEPEP = {"h100-sxm", "h200-sxm", "b200-sxm", "b300-sxm", "gb200", "gb300"}


def test_all_that_is_known_of_transfers_is_sane() -> None:
    fits = known_transfers()
    assert {fit.kind for fit in fits} == set(get_args(DispatchKind))
    assert {fit.gpu for fit in fits} <= {box.gpu for box in PRESETS.values()}
    for fit in fits:
        for leg in (fit.dispatch, fit.combine):
            assert min(leg) >= 0, fit
            assert leg.launch > 0, fit
            assert (leg.intra > 0) != (leg.inter > 0), fit
            assert (leg.inter > 0) == (fit.nodes > 1), fit


@pytest.mark.parametrize("kind", ["normal", "low_latency"])
@pytest.mark.parametrize("gpu", sorted(DEEPEP))
def test_deepep_is_predicted_to_ten_percent_of_what_the_fit_did_not_see(gpu: str, kind: str) -> None:
    for nodes in (1, 2, 4):
        fit = transfer_fit(gpu, "sglang", kind, nodes)
        assert fit is not None
        assert fit.error <= 0.10, fit


def test_one_node_of_eight_h100_takes_what_was_measured() -> None:
    # Measured, 7,168 wide, top-8 of 256: 4,096 tokens a rank in normal mode 492 and 983 us.
    fit = transfer_fit("h100-sxm", "sglang", "normal", 1)
    assert fit is not None
    copies = 4096 * 7 * (1 - math.comb(224, 8) / math.comb(256, 8))
    for leg, width, micros in ((fit.dispatch, 1, 492), (fit.combine, 2, 983)):
        row = 7168 * width
        seconds = leg.launch + leg.row * row + leg.token * 4096 + copies * row / leg.intra
        assert seconds * 1e6 == pytest.approx(micros, rel=0.1)


def test_an_engine_has_its_own_measurements_first_and_others_of_the_kind_else() -> None:
    names = {engine: transfer_fit("h100-sxm", engine, "normal", 1) for engine in ("sglang", "vllm", "trtllm")}
    assert [name for name, fit in names.items() if fit is not None and name in fit.library] == list(names)
    other = transfer_fit("h100-sxm", "vllm", "all_gather", 1)
    assert other is not None
    assert "NCCL" in other.library
    assert transfer_fit("a100-sxm", "sglang", "normal", 1) is None
    assert transfer_fit("no-such-gpu", "sglang", "normal", 1) is None


def test_the_nearest_number_of_nodes_that_was_measured_is_taken() -> None:
    counts = [transfer_fit("h100-sxm", "sglang", "normal", nodes) for nodes in (1, 2, 3, 4, 16)]
    assert [None if fit is None else fit.nodes for fit in counts] == [1, 2, 2, 4, 4]


MODEL = mp.ModelSpec(layers=1, experts=256, top_k=8, hidden_size=7168, ffn_size=2048, expert_dtype="fp8")


def engine_problem(engine: str, **objective: str) -> mp.Problem:
    counts = mp.RoutingStatistics.from_counts(np.ones((1, 256)))
    topology = mp.Topology.preset("h100-sxm")
    return mp.Problem(counts, topology, model=MODEL, objective=mp.Objective(**objective), engine=engine)  # type: ignore[arg-type]


def test_engines_say_how_tokens_travel_in_each_phase() -> None:
    kinds = {}
    for name in target_names():
        profile = engine_profile(name)
        kinds[name] = (profile.prefill_dispatch, profile.decode_dispatch)
    assert kinds["sglang"] == kinds["sglang-lp"] == ("normal", "low_latency")
    assert kinds["vllm"] == ("all_gather", "all_gather")
    assert kinds["vllm-ascend"] == ("all_to_all", "low_latency")
    assert kinds["trtllm"] == kinds["moeplace"] == ("normal", "normal")
    objective = engine_problem("sglang").objective
    assert (objective.prefill_dispatch, objective.decode_dispatch) == ("normal", "low_latency")
    assert objective.dispatch_dtype == "fp8"
    asked = engine_problem("vllm", prefill_dispatch="normal").objective
    assert (asked.prefill_dispatch, asked.decode_dispatch) == ("normal", "all_gather")


def test_tokens_that_stay_with_their_experts_are_not_sent_back() -> None:
    with pytest.raises(mp.InputError, match="source rank"):
        mp.Objective(execution="context_coherent", decode_dispatch="low_latency")
    coherent = engine_problem("moeplace", execution="context_coherent").objective
    assert coherent.decode_dispatch == "normal"


@pytest.mark.parametrize(
    ("engine", "tokens", "dispatch", "combine"),
    [
        # Measured by SGLang on one node of 8 H100, us: 128 tokens a rank in low latency, 4,096 in normal mode.
        ("sglang", 128, 37, 67),
        ("sglang", 4096, 492, 983),
    ],
)
def test_a_balanced_step_takes_what_its_kind_was_measured_to_take(
    engine: str, tokens: int, dispatch: float, combine: float
) -> None:
    problem = engine_problem(engine)
    rng = np.random.default_rng(0)
    total = 8 * min(tokens, 512)
    ids = np.stack([rng.permutation(256)[:8] for _ in range(total)])[:, None].astype(np.uint16)
    # Eight times as many alike tokens as are drawn, where the step is large.
    ids = np.tile(ids, (8 * tokens // total, 1, 1))
    steps = mp.Steps(ids, np.array([0, len(ids)]), 256, (0,))
    judged = mp.evaluate(mp.solve(problem, "contiguous"), steps, problem)
    assert judged.dispatch[0, 0] * 1e6 == pytest.approx(dispatch, rel=0.12)
    assert judged.combine[0, 0] * 1e6 == pytest.approx(combine, rel=0.12)


def test_all_gathers_take_as_long_under_any_plan() -> None:
    problem = engine_problem("vllm")
    steps = mp.Steps(np.zeros((64, 1, 8), np.uint16) + np.arange(8, dtype=np.uint16), np.array([0, 64]), 256, (0,))
    plans = [mp.solve(problem, name) for name in ("contiguous", "round_robin")]
    seconds = [mp.evaluate(plan, steps, problem) for plan in plans]
    assert seconds[0].dispatch == pytest.approx(seconds[1].dispatch)
    # Every device receives the tokens of the seven others, a byte a value, and sends its sums of them back, two.
    assert seconds[0].device_bytes == pytest.approx(np.full((1, 8), 64 * 7 / 8 * 7168 * 3))
    traffic = device_traffic(plans[0], steps, problem.topology, problem.objective)
    assert traffic.dispatch.sum(axis=1) == pytest.approx(np.full(8, 64 * 7 / 8))
    assert seconds[0].compute[0, 0] > seconds[1].compute[0, 0]


def test_links_of_a_cluster_scale_what_was_measured_on_a_presets_links() -> None:
    topology = mp.Topology.preset("h100-sxm", engine="sglang")
    slow = topology.replace(
        nodes=tuple(
            node.replace(
                devices=tuple(device.replace(intra_bandwidth=device.intra_bandwidth / 2) for device in node.devices)
            )
            for node in topology.nodes
        )
    )
    costs = [TransferCost.of("normal", MODEL, of, mp.Objective()) for of in (topology, slow)]
    assert costs[1].per_copy == pytest.approx(2 * costs[0].per_copy)
    assert costs[1].fixed == costs[0].fixed


def sized_steps(*sizes: int) -> mp.Steps:
    ids = np.tile(np.arange(8, dtype=np.uint16), (sum(sizes), 1, 1))
    return mp.Steps(ids, np.concatenate([[0], np.cumsum(sizes)]), 256, (0,))


def test_steps_are_of_their_batchs_phase_and_else_decode_up_to_256_tokens_a_device() -> None:
    objective = mp.Objective(decode_dispatch="low_latency")
    transfers = Transfers.of(MODEL, mp.Topology.preset("h100-sxm"), objective)
    plain = sized_steps(8, 8 * 256, 8 * 256 + 1)
    assert transfers.which(plain).tolist() == [0, 0, 1]
    assert transfers.of_size(100).kind == "low_latency"
    named = dataclasses.replace(plain, batch=np.array([1, 2, 0]), batches=("decode 2049", "prefill 8", "mixed"))
    assert transfers.which(named).tolist() == [1, 0, 0]
    same = Transfers.of(MODEL, mp.Topology.preset("h100-sxm"), mp.Objective())
    assert len(same.each) == 1
    assert same.which(plain).tolist() == [0, 0, 0]
