"""Training that keeps its plan right: plain loop, Transformers Trainer, and the example under torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moeplace as mp

pytest.importorskip("torch")
pytest.importorskip("transformers")

from ranks import launch
from torchrun_examples import torchrun_example
from traces import make_trace

from moeplace.profiler import write_trace
from moeplace.training.propose import Terms, answer, propose, request

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(600)
def test_a_plain_loop_records_solves_beside_training_and_changes_its_plan(tmp_path: Path) -> None:
    # The solving process stands back behind whatever else runs: on a busy machine it takes minutes.
    found = launch("training_ranks:plain_loop", 2, tmp_path, seconds=570)
    for rank in found:
        kept, rebalanced = rank["kept"]["curve"], rank["rebalanced"]["curve"]
        assert rank["rebalanced"]["applied"] == 1
        assert rank["rebalanced"]["changed"]
        assert not rank["kept"]["changed"]
        assert rebalanced[:12] == pytest.approx(kept[:12], rel=1e-3)
    news = found[0]["news"]
    assert "solving" in news[0]
    assert "apply" in news[-2]
    assert "new plan in force" in news[-1]
    assert found[1]["news"] == []


def test_a_solver_that_cannot_be_started_or_heard_leaves_no_rank_waiting(tmp_path: Path) -> None:
    found = launch("training_ranks:unanswered", 2, tmp_path)
    for rank in found:
        assert all(case["done"] and case["applied"] == 0 for case in rank.values())
    assert "keep: the solver cannot be started (OSError: [Errno 28] No space" in found[0]["no start"]["news"][-1]
    assert "keep: the solver's answer cannot be read" in found[0]["no answer"]["news"][-1]


def test_the_trainer_calls_back_and_refuses_its_own_clipping_and_saving(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    found = launch("training_ranks:trainer", 2, tmp_path)
    for rank in found:
        assert "max_grad_norm (1.0) clips by a norm that differs between ranks" in rank["refused"]["1.0 no"]
        assert "save_strategy ('steps') would write the first rank's experts" in rank["refused"]["0.0 steps"]
        for case in ("pretrained", "part"):
            assert "moeplace.runtime.save_checkpoint(path, model, optimizer)" in rank["refused"].get(case, "nothing")
        assert not rank["written"]
        assert rank["rounds"][0] == "round-0001"
        assert rank["trace"]
    assert "moeplace.runtime.save_checkpoint(path, model, optimizer)" in found[0]["refused"].get("trainer", "nothing")
    assert len(found[0]["losses"]) == 8


def test_the_expert_trainer_saves_all_experts_and_resumes_with_its_plan(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    found = launch("training_ranks:expert_trainer", 2, tmp_path)
    for rank in found:
        assert rank["whole"]["norms"][3:] == pytest.approx(rank["resumed"]["norms"][-3:], rel=1e-4)
        assert rank["whole"]["norms"] == found[0]["whole"]["norms"]
        np.testing.assert_allclose(rank["resumed"]["logits"], rank["whole"]["logits"], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(rank["read"], rank["whole"]["logits"], rtol=1e-3, atol=1e-4)
        assert rank["resumed"]["steps"] == rank["whole"]["steps"] == 6
        assert rank["resumed"]["plan"]


def test_a_proposal_is_judged_on_the_later_steps_and_a_plan_that_saves_nothing_is_kept(tmp_path: Path) -> None:
    trace = make_trace(0, sequences=40)
    stepped = mp.RoutingTrace.from_arrays(
        trace.expert_ids, trace.num_experts, sequence=trace.sequence, step=np.arange(trace.num_tokens) // 160
    )
    write_trace(stepped, tmp_path / "trace")
    model = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=512, ffn_size=1024)
    topology = mp.Topology.preset("a100-pcie", devices_per_node=4)
    load = stepped.recorded_steps().loads().sum(axis=0)
    table = np.argsort(-load, axis=1)  # the busiest experts of a layer stand together
    worst = mp.Plan(model=model, topology=topology, physical_to_logical=table, slot_device=np.arange(8) // 2)
    terms = Terms(solver="search", seconds=1.0, horizon_steps=1e9, bytes_per_expert=1e6)
    better, reason = propose(tmp_path / "trace", worst, terms)
    assert better is not None
    assert "saves" in reason
    again, reason = propose(tmp_path / "trace", better, terms)
    assert again is None
    again, reason = propose(tmp_path / "trace", worst, Terms("search", 1.0, 1.0, 1e12))
    assert again is None
    assert "not paid back" in reason


def test_the_solving_process_imports_nothing_from_the_folder_that_training_runs_in(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('not the numpy that was meant')")
    model = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=512, ffn_size=1024)
    topology = mp.Topology.preset("a100-pcie", devices_per_node=4)
    table = np.tile(np.arange(8), (3, 1))
    plan = mp.Plan(model=model, topology=topology, physical_to_logical=table, slot_device=np.arange(8) // 2)
    arguments = request(tmp_path, plan, Terms("eplb", 1.0, 1.0, 1.0))
    subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True)
    better, reason = answer(tmp_path)
    assert better is None
    assert str(tmp_path / "trace") in reason


@pytest.mark.timeout(290)
@pytest.mark.long
def test_the_example_trains_under_torchrun_and_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("\n".join(f"{number} times {number} is {number * number}" for number in range(9000)))
    small = ["--layers", "2", "--experts", "4", "--hidden", "32", "--batch", "1", "--text", str(text)]
    rounds = ["--every", "4", "--record-steps", "2", "--seconds", "1"]
    printed = torchrun_example("train_expert_parallel.py", 2, tmp_path, "--out", "run", "--steps", "8", *small, *rounds)
    assert "changes of plan" in printed
    assert mp.Plan.load(tmp_path / "run" / "plan.json").topology.num_devices == 2
    torchrun_example(
        "train_expert_parallel.py", 1, tmp_path, "--out", "run", "--steps", "2", "--resume", "run/checkpoint-8", *small
    )
