"""Megatron-LM's and torchtitan's models permuted in memory, by the names and shapes their sources give them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import model_ranks
import torch
from model_ranks import EXPERTS, LAYERS, WIDTH, Values, experts_by_row, marked, megatron, plan

import moeplace as mp
from moeplace.runtime.permute.model import permute_model

pytestmark = pytest.mark.slow

torch.set_num_threads(1)


def spawned(world: int, job: str, folder: Path, **arguments: Any) -> list[Any]:
    out = str(folder / "rank")
    context = torch.multiprocessing.start_processes(
        model_ranks.run_rank,
        (world, str(folder / "init"), out, job, arguments),
        world,
        join=False,
        start_method="spawn",
    )
    try:
        deadline = time.monotonic() + 120
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(f"{out}{rank}.pt") for rank in range(world)]


def wanted(layer: int, table: np.ndarray[Any, Any]) -> list[int]:
    return [100 * layer + int(expert) for expert in table[LAYERS.index(layer)]]


def check(found: dict[str, list[int]], table: np.ndarray[Any, Any], rank: int = 0, world: int = 1) -> None:
    """Every row holds the expert that the plan's slot of this rank has."""
    local = EXPERTS // world
    assert found
    for name, rows in found.items():
        layer = int(name.split("layers.")[1].split(".")[0])
        mine = wanted(layer, table)[rank * local : (rank + 1) * local]
        if "router" in name:
            assert rows == wanted(layer, table), name
        elif len(rows) == 1:
            number = int("".join(c for c in name.split("experts.")[-1].split(".")[-1] if c.isdigit()) or -1)
            number = number if "local_experts" not in name else int(name.split("local_experts.")[1].split(".")[0])
            assert rows == [mine[number]], name
        else:
            assert rows == mine, name


@pytest.mark.parametrize("form", ["sequential", "te", "grouped"])
@pytest.mark.parametrize("prefix", ["", "module.module."])
def test_every_form_of_megatrons_experts_follows_the_plan_and_comes_back(form: str, prefix: str) -> None:
    model = megatron(form, range(EXPERTS), prefix)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    order = permute_model(model, plan(2))
    np.testing.assert_array_equal(order, plan(2).physical_to_logical)
    check(experts_by_row(model), order)
    for name, value in model.state_dict().items():
        assert "router" in name or ".experts." in name or torch.equal(value, before[name]), name
    permute_model(model, plan(2), invert=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_experts_change_ranks_with_gradients_and_optimizer_state(tmp_path: Path) -> None:
    ranks = spawned(2, "megatron", tmp_path, forms=("sequential", "te", "grouped"))
    for rank, forms in enumerate(ranks):
        for found in forms.values():
            check(found, plan(2).physical_to_logical, rank, 2)


def test_distributed_tensors_are_permuted_however_they_are_sharded(tmp_path: Path) -> None:
    for found in spawned(2, "titan", tmp_path):
        assert len(found) == 18
        for name, rows in found.items():
            assert rows == wanted(int(name.split("layers.")[1].split(".")[0]), plan(2).physical_to_logical), name


def test_ranks_that_would_move_different_experts_are_told_and_none_waits(tmp_path: Path) -> None:
    for rank, words in enumerate(spawned(2, "unlike", tmp_path)):
        for name in ("plan", "way", "gradients"):
            assert f"rank {1 - rank} has another one than rank {rank}" in words[name], name
        assert ("expert_of_nobody speaks of experts" if rank == 1 else "rank 1 refused it") in words["one refuses"]
        sharded = "layer 1 has no router" if rank == 1 else "rank 1 refused it"
        assert sharded in words["one refuses, sharded"]


TITAN: dict[str, tuple[str, ...]] = {
    "0.2": ("experts.w1", "experts.w2", "experts.w3", "router.gate.weight", "expert_bias", "tokens_per_expert"),
    "0.3": (
        "routed_experts.inner_experts.w1_EFD",
        "routed_experts.inner_experts.w2_EDF",
        "routed_experts.inner_experts.w3_EFD",
        "router.gate.weight",
        "expert_bias_E",
        "tokens_per_expert_E",
    ),
    "0.2 gpt-oss": (
        "experts.mlp1_weight",
        "experts.mlp1_bias",
        "experts.mlp2_weight",
        "experts.mlp2_bias",
        "router.gate.weight",
        "router.gate.bias",
    ),
    "0.3 gpt-oss": (
        "routed_experts.inner_experts.mlp1_weight_EGD",
        "routed_experts.inner_experts.mlp1_bias_EG",
        "routed_experts.inner_experts.mlp2_weight_EDF",
        "routed_experts.inner_experts.mlp2_bias_ED",
        "router.gate.weight",
        "router.gate.bias",
    ),
}


@pytest.mark.parametrize("release", TITAN)
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_torchtitans_names_follow_the_plan(release: str, prefix: str) -> None:
    tensors = {
        f"{prefix}layers.{layer}.moe.{name}": marked(
            range(EXPERTS), *(() if "bias" in name or "tokens" in name else (WIDTH,)), layer=layer
        )
        for layer in LAYERS
        for name in TITAN[release]
    }
    shared = {f"{prefix}layers.{layer}.moe.shared_experts.w1.weight": torch.ones(2) for layer in LAYERS}
    model = Values({**tensors, **shared, "mtp_layers.0.moe.experts.w1": torch.ones(3, 2)}, buffers=("expert_bias_E",))
    permute_model(model, plan(4))
    for name, value in model.state_dict().items():
        if name in tensors:
            rows = [int(row) for row in value.reshape(EXPERTS, -1)[:, 0]]
            assert rows == wanted(int(name.split("layers.")[1].split(".")[0]), plan(4).physical_to_logical), name
        else:
            assert (value == 1).all()


def test_a_pipeline_stage_numbers_its_layers_as_the_model_does() -> None:
    model = megatron("sequential", range(EXPERTS))
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"] and len(parts) == 3:
            module.layer_number = int(parts[2]) + 1 + 10  # type: ignore[assignment]
    with pytest.raises(mp.InputError, match="is of layer 11, which the plan does not place"):
        permute_model(model, plan(2))
    later = mp.Plan(
        plan(2).model.replace(moe_layers=(11, 13)), plan(2).topology, plan(2).physical_to_logical, plan(2).slot_device
    )
    permute_model([model], later)
    check(experts_by_row(model), plan(2).physical_to_logical)


STEM = "decoder.layers.1.mlp."
WRONG: dict[str, tuple[dict[str, torch.Tensor], type[Exception], str]] = {
    "an adapter on an expert": (
        {f"{STEM}experts.local_experts.0.linear_fc1.lora_a": torch.ones(3)},
        mp.UnsupportedError,
        "lora_a stands in an MoE layer and its name is not known",
    ),
    "experts elsewhere": ({"head.experts.weight": torch.ones(3)}, mp.UnsupportedError, "speaks of experts"),
    "a layer of experts the plan does not know": (
        {"decoder.layers.2.mlp.router.weight": torch.ones(EXPERTS, 2)},
        mp.InputError,
        "layer 2, which the plan does not place; its MoE layers are 1, 3",
    ),
    "a router of other experts": (
        {f"{STEM}router.weight": torch.ones(EXPERTS + 1, 2)},
        mp.InputError,
        r"shape \[9, 2\], expected 8 experts",
    ),
    "an expert too many": (
        {f"{STEM}experts.local_experts.8.linear_fc1.weight": torch.ones(WIDTH, 6)},
        mp.InputError,
        "has 9 tensor.* expected 8 experts on this rank",
    ),
    "experts of different shape": (
        {f"{STEM}experts.local_experts.7.linear_fc1.weight": torch.ones(2)},
        mp.UnsupportedError,
        "differ in shape",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_known_is_refused_and_nothing_moves(case: str) -> None:
    extra, error, message = WRONG[case]
    good = megatron("sequential", range(EXPERTS))
    model = Values({**dict(good.state_dict()), **extra})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        permute_model(model, plan(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_halves_of_a_layer_other_models_and_local_experts_without_a_group_are_refused() -> None:
    whole = dict(megatron("sequential", range(EXPERTS)).state_dict())
    no_experts = {name: value for name, value in whole.items() if not name.startswith(f"{STEM}experts")}
    with pytest.raises(mp.InputError, match="layer 1 has no experts"):
        permute_model(Values(no_experts), plan(2))
    with pytest.raises(mp.InputError, match="no MoE layer"):
        permute_model(torch.nn.Linear(2, 2), plan(2))
    with pytest.raises(mp.InputError, match="pass expert_group"):
        permute_model(megatron("te", range(4)), plan(2))


def test_an_optimizer_whose_state_cannot_follow_is_refused() -> None:
    model = megatron("te", range(EXPERTS))
    with pytest.raises(mp.UnsupportedError, match="state of Values cannot be permuted"):
        permute_model(model, plan(2), optimizer=model)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters())
    name, parameter = next((n, p) for n, p in model.named_parameters() if ".experts.linear" in n)
    optimizer.state[parameter] = {"rows": torch.ones(2)}
    with pytest.raises(mp.UnsupportedError, match=f"optimizer's rows of {name}"):
        permute_model(model, plan(2), optimizer=optimizer)


def test_a_plan_that_parts_expert_groups_is_refused() -> None:
    with pytest.raises(mp.UnsupportedError, match="groups"):
        permute_model(megatron("te", range(EXPERTS)), plan(2, groups=4))
