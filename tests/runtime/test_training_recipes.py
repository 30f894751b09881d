"""Recipes that people train with, around layers of experts: each is right, or refused in words that say what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from ranks import launch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("recipe_ranks:recipes", 4, tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Adafactor", "divides by the root mean square of the whole tensor"),
        ("transformers", "divides by the root mean square of the whole tensor"),
        ("LBFGS", "takes one step for all parameters together"),
        ("AdamW8bit", "keeps its state in blocks of values, which reach from expert to expert"),
        ("Muon", "as AdamW does, or to moeplace.runtime.Muon"),
        ("Unknown", "say moeplace.runtime.allow_optimizer(Unknown)"),
    ],
)
def test_optimizers_that_look_past_an_expert_are_refused(recipes: list[Any], name: str, words: str) -> None:
    assert all(words in found["optimizers"][name] for found in recipes)


@pytest.mark.parametrize("name", ["Known", "SGD", "RMSprop", "Adafactor of the rest"])
def test_optimizers_by_element_and_those_of_other_parameters_go_on(recipes: list[Any], name: str) -> None:
    assert all(found["optimizers"][name] == "" for found in recipes)


def test_experts_left_to_ddp_are_refused(recipes: list[Any]) -> None:
    assert all("call exclude_from_ddp(model) before" in found["ddp"] for found in recipes)


def test_a_scaler_that_each_rank_asks_alone_is_refused(recipes: list[Any]) -> None:
    for found in recipes:
        assert "ShardedGradScaler" in found["scalers"]["alone"]["said"]
        assert found["scalers"]["off"]["said"] == ""


def test_a_scaler_that_asks_all_ranks_skips_the_same_step_on_all(recipes: list[Any]) -> None:
    for found in recipes:
        assert found["scalers"]["sharded"] == {"said": "", "scales": [512.0, 512.0], "kept": [True, False]}


def test_fully_shard_in_bfloat16_takes_float32_experts_in_bfloat16(recipes: list[Any]) -> None:
    for found in recipes:
        mixed = found["mixed"]
        assert mixed["out"]
        assert mixed["dtype"] == "torch.float32"
        assert mixed["kinds"] == ["torch.float32 torch.float32"]
        assert mixed["grads"] < 0.01


def test_tokens_wider_than_weights_are_refused(recipes: list[Any]) -> None:
    assert all("tokens are torch.float32" in found["mixed"]["narrow"] for found in recipes)


@pytest.mark.parametrize("name", ["no gradients", "experts", "copy", "bfloat16", "given", "given an iterator"])
def test_a_norm_of_this_ranks_experts_is_refused(recipes: list[Any], name: str) -> None:
    assert all("moeplace.clip_grad_norm_(model, max_norm)" in found["norms"][name] for found in recipes)


@pytest.mark.parametrize("name", ["value", "infinity", "rest", "ours", "given ours", "compiled step"])
def test_what_asks_no_norm_of_experts_goes_on(recipes: list[Any], name: str) -> None:
    assert all(found["norms"][name] == "" for found in recipes)


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("save", "torch.save"),
        ("on the host", "torch.save"),
        ("in bfloat16", "torch.save"),
        ("wrapped", "torch.save"),
        ("parameters", "torch.save"),
        ("module", "torch.save"),
        ("safetensors", "safetensors"),
        ("safetensors model", "safetensors"),
        ("safetensors bytes", "safetensors"),
        ("dcp", "torch.distributed.checkpoint"),
        ("async dcp", "torch.distributed.checkpoint"),
    ],
)
def test_writing_this_ranks_experts_for_all_is_refused(recipes: list[Any], name: str, by: str) -> None:
    for found in recipes:
        assert f"{by} " in found["files"][name]
        assert "moeplace.save_checkpoint(path, model, optimizer)" in found["files"][name]
        assert "moeplace.export_hf(model, folder)" in found["files"][name]


@pytest.mark.parametrize("name", ["rest", "of this rank", "ours"])
def test_what_is_all_there_is_or_said_to_be_this_ranks_is_written(recipes: list[Any], name: str) -> None:
    assert all(found["files"][name] == "" for found in recipes)


def test_states_are_loaded_and_averaged_and_parameters_keep_their_mark(recipes: list[Any]) -> None:
    for found in recipes:
        assert found["in memory"] == {
            "equal": True,
            "kinds": ["ExpertParameter", "ExpertParameter"],
            "difference": 0.0,
            "average": "ExpertParameter",
        }


def test_one_rank_has_the_norm_and_writes_experts_that_are_in_order(tmp_path: Path) -> None:
    (found,) = launch("recipe_ranks:in_one_process", 1, tmp_path)
    refused = {name for name, words in found.items() if words}
    assert refused == {name for name in found if "reversed" in name and "norm" not in name}
    assert len(refused) == 8
    assert "exp_avg of gate_up_proj has a row for each of 6 experts" in found["optimizer reversed"]
    assert "a row for each of 6 experts, as a whole model's state has" in found["whole reversed"]


def test_deepspeed_is_refused_before_it_sends_anything(recipes: list[Any]) -> None:
    assert all("DeepSpeed's engine sends the first rank's parameters" in found["deepspeed"] for found in recipes)


def test_recipes_of_the_matrix_are_equal_or_refused() -> None:
    names = (
        "AveragedModel", "GPipe", "Adafactor", "broadcast_from_rank0", "PeriodicModelAverager", "delay_weight",
        "what came from other ranks kept",
    )  # fmt: skip
    command = [sys.executable, "-m", "benchmarks", "training_recipes", "--only", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [line.split("|")[2].strip() for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert sorted(results) == ["equal"] * 5 + ["refused"] * 4


@pytest.mark.parametrize("name", ["average", "by hand", "together"])
def test_averages_from_under_another_plan_are_refused(recipes: list[Any], name: str) -> None:
    assert all("would be mixed with those of another plan" in found["plans"][name] for found in recipes)


@pytest.mark.parametrize("name", ["model", "optimizer", "into one that is new"])
def test_states_from_under_another_plan_are_refused(recipes: list[Any], name: str) -> None:
    assert all("as another plan has them" in found["plans"][name] for found in recipes)


@pytest.mark.parametrize("place", ["fresh", "stepped"])
@pytest.mark.parametrize("kind", ["AdamW", "Adagrad"])
def test_an_optimizers_state_is_loaded_only_where_it_is_known_whose_rows_it_has(
    recipes: list[Any], kind: str, place: str
) -> None:
    key = {"AdamW": "exp_avg", "Adagrad": "sum"}[kind]
    for words in (found["rows"] for found in recipes):
        assert f"{key} of gate_up_proj has a row for each of" in words[f"{kind} whole {place}"]
        assert "load_checkpoint(path, model, optimizer) reads either" in words[f"{kind} whole {place}"]
        assert "does not say whose they are" in words[f"{kind} bare {place}"]
        assert "of down_proj has shape" in words[f"{kind} cut {place}"]
        assert words[f"{kind} read {place}"] == ""
        assert words[f"{kind} same"]
        assert "as another plan has them" in words[f"{kind} read {place} moved"]
        assert "does not say whose they are" in words[f"{kind} bare {place} moved"]


def test_a_models_state_is_loaded_only_where_it_is_known_whose_rows_it_has(recipes: list[Any]) -> None:
    for words in (found["rows"] for found in recipes):
        assert "as another plan has them" in words["model moved"]
        assert words["model back"] == ""
        assert "does not say whose they are" in words["model bare"]
        assert "as a whole model's state has" in words["model updated"]


def test_states_from_under_the_same_plan_are_loaded_row_by_expert(recipes: list[Any]) -> None:
    for found in recipes:
        assert found["plans"]["back"] == ""
        assert found["plans"]["rows"]
        assert found["plans"]["plain"] == ["Tensor"]


def test_an_average_that_moves_with_the_plan_goes_on(recipes: list[Any]) -> None:
    assert all(found["plans"]["average moved"] == "" for found in recipes)


def test_an_optimizers_state_of_this_ranks_experts_is_not_written_for_all(recipes: list[Any]) -> None:
    assert all("moeplace.save_checkpoint(path, model, optimizer)" in found["plans"]["saved"] for found in recipes)


def test_an_optimizer_that_was_not_told_of_a_plan_is_refused(recipes: list[Any]) -> None:
    for found in recipes:
        assert "Give it to apply(model, plan, optimizer)" in found["plans"]["not told"]
        assert found["plans"]["told"] == ""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("twice", "leave out create_graph"),
        ("func", "use backward() or torch.autograd.grad"),
        ("join", "leave out join"),
        ("averaging", "averages every parameter over ranks"),
        ("parametrised", "leave the experts out"),
        ("pruned", "'down_proj_orig'"),
    ],
)
def test_what_goes_past_an_expert_layer_is_refused(recipes: list[Any], name: str, words: str) -> None:
    assert all(words in found["unknown"][name] for found in recipes)
