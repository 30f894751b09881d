"""A permuted checkpoint computes what the original computes, and can be undone byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import permute_models as models  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from moeplace.runtime.permute.checkpoint import (  # noqa: E402
    ORDER_FILE,
    permute_checkpoint,
    read_expert_order,
)

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
LAYOUTS = ("one file", "shards", "fused shards")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Every family, saved in every layout."""
    root = tmp_path_factory.mktemp("models")
    folders = {}
    for family in models.FAMILIES:
        model = models.build(family)
        for layout in LAYOUTS:
            folder = folders[family, layout] = root / f"{family}-{layout.replace(' ', '-')}"
            size = "50GB" if layout == "one file" else "20KB"
            model.save_pretrained(folder, max_shard_size=size, save_original_format=layout != "fused shards")
            (folder / "tokenizer.json").write_text("{}")
    return folders


def weight_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_logits_stay_and_the_original_comes_back(
    family: str, layout: str, saved: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = saved[family, layout]
    plan = models.random_plan(source, seed=len(family) + len(layout))
    done = permute_checkpoint(source, plan, tmp_path / "permuted")
    assert len(done.weight_files) == 1 if layout == "one file" else len(done.weight_files) > 2

    expected = models.logits(models.load(source))
    permuted = models.load(tmp_path / "permuted")
    assert expected.std() > 0.1
    torch.testing.assert_close(models.logits(permuted), expected, rtol=1e-4, atol=1e-5)

    original = models.load(source)
    for layer, order in zip(plan.moe_layers, done.expert_order, strict=True):
        before, after = original.model.layers[layer].mlp.experts, permuted.model.layers[layer].mlp.experts
        for name, tensor in before.named_parameters():
            assert torch.equal(dict(after.named_parameters())[name], tensor[torch.from_numpy(np.array(order))])

    permute_checkpoint(tmp_path / "permuted", plan, tmp_path / "restored", invert=True)
    assert weight_bytes(tmp_path / "restored") == weight_bytes(source)


@pytest.mark.parametrize("logits", [True, False])
def test_what_was_written_is_verified(logits: bool, saved: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    source = saved["olmoe", "shards"]
    if not logits:
        models.edit_config(shutil.copytree(source, tmp_path / "other"), architectures=["NoSuchClass"])
        source = tmp_path / "other"
    done = permute_checkpoint(source, models.random_plan(source, seed=1), tmp_path / "permuted", verify=True)
    assert ("logits of drawn prompts" if logits else "every byte is where the order puts it") in done.verified


def test_tables_that_hold_expert_ids_are_rewritten(saved: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    source = shutil.copytree(saved["olmoe", "one file"], tmp_path / "model")
    ids = torch.tensor([[0, 7], [3, 5], [1, 2]])
    rewrite(source, lambda t: t.update({"model.layers.1.mlp.gate.tid2eid": ids}))
    done = permute_checkpoint(source, models.random_plan(source, seed=2), tmp_path / "permuted")
    moved = load_file(tmp_path / "permuted" / "model.safetensors")["model.layers.1.mlp.gate.tid2eid"]
    assert np.array_equal(np.asarray(done.expert_order)[1][moved.numpy()], ids.numpy())


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("seed", range(4))
def test_logits_stay_for_many_plans(family: str, seed: int, saved: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    source = saved[family, "shards"]
    devices = [1, 2, 4, 8][seed]
    plan = models.random_plan(source, seed=100 + seed, devices=devices)
    permute_checkpoint(source, plan, tmp_path / "permuted")
    expected = models.logits(models.load(source))
    torch.testing.assert_close(models.logits(models.load(tmp_path / "permuted")), expected, rtol=1e-4, atol=1e-5)


def test_each_device_gets_the_experts_the_plan_gives_it(saved: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    source = saved["deepseek_v3", "one file"]
    plan = models.random_plan(source, seed=3)
    done = permute_checkpoint(source, plan, tmp_path / "permuted")
    for row, order in zip(plan.physical_to_logical, done.expert_order, strict=True):
        for device in range(4):
            assert set(row[2 * device : 2 * device + 2]) == set(order[2 * device : 2 * device + 2])


def test_quantised_gpt_oss_moves_blocks_and_scales(tmp_path: Path) -> None:
    model, source, rng = models.build("gpt_oss"), tmp_path / "model", np.random.default_rng(0)
    model.save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = tensors.pop(name).shape
        blocks = rng.integers(0, 256, size=(experts, outer, inner // 32, 16), dtype=np.uint8)
        scales = rng.integers(122, 127, size=(experts, outer, inner // 32), dtype=np.uint8)
        tensors |= {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    models.edit_config(source, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": kept})

    plan = models.random_plan(source, seed=5)
    permute_checkpoint(source, plan, tmp_path / "permuted")
    options = {"quantization_config": transformers.Mxfp4Config(dequantize=True)}
    expected = models.logits(models.load(source, **options))
    permuted = models.load(tmp_path / "permuted", **options)
    assert expected.std() > 0.1
    torch.testing.assert_close(models.logits(permuted), expected, rtol=1e-4, atol=1e-5)
    permute_checkpoint(tmp_path / "permuted", plan, tmp_path / "restored", invert=True)
    assert weight_bytes(tmp_path / "restored") == weight_bytes(source)


def dequantise(folder: Path) -> None:
    """Multiplies each expert's weight by the scale that stands beside it; Transformers does so with accelerate only."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        tensors[weight] = tensors[weight].float() * tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def test_quantised_deepseek_moves_block_scales_and_keeps_the_prediction_layer(tmp_path: Path) -> None:
    source, generator = tmp_path / "model", torch.Generator().manual_seed(0)
    models.build("deepseek_v3").save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if ".mlp.experts." in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(1, 1, generator=generator) + 0.5
    for name in [name for name in tensors if name.startswith("model.layers.2.mlp.")]:
        tensors[name.replace("layers.2.", "layers.3.")] = tensors[name].clone()
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    models.edit_config(source, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})

    plan = models.random_plan(source, seed=6)
    done = permute_checkpoint(source, plan, tmp_path / "permuted")
    moved = load_file(tmp_path / "permuted" / "model.safetensors")
    for name, tensor in tensors.items():
        assert name in moved
        if "layers.3." in name or "experts." not in name.replace("shared_experts.", ""):
            continue
        layer, expert = int(name.split(".")[2]), int(name.split(".")[5])
        row = np.flatnonzero(done.expert_order[plan.moe_layers.index(layer)] == expert)[0]
        assert torch.equal(moved[name.replace(f"experts.{expert}.", f"experts.{row}.")].view(-1), tensor.view(-1))
    assert all(torch.equal(moved[name], tensors[name]) for name in tensors if "layers.3." in name)
    for folder in (source, tmp_path / "permuted"):
        dequantise(folder)
    expected = models.logits(models.load(source))
    assert expected.std() > 0.1
    torch.testing.assert_close(models.logits(models.load(tmp_path / "permuted")), expected, rtol=1e-4, atol=1e-5)


def test_other_files_go_along_and_stale_weights_stay_behind(saved: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(saved["olmoe", "shards"], source)
    (source / "original").mkdir()
    (source / "original" / "model.safetensors").write_bytes(b"x")
    (source / "consolidated.safetensors").write_bytes(b"x")
    (source / "pytorch_model.bin").write_bytes(b"x")
    seen: list[tuple[int, int]] = []
    done = permute_checkpoint(
        source, models.random_plan(source, 1), tmp_path / "out", progress=lambda at, total: seen.append((at, total))
    )
    assert done.left_out == ("consolidated.safetensors", "original", "pytorch_model.bin")
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= set(done.copied)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*done.copied, *done.weight_files, ORDER_FILE}
    assert seen[-1] == (done.bytes_written, done.bytes_written)
    assert [at for at, _ in seen] == sorted(at for at, _ in seen)


@pytest.mark.parametrize("field", ["experts", "top_k", "hidden_size", "ffn_size"])
def test_a_plan_for_a_model_of_another_size_is_refused(
    saved: dict[tuple[str, str], Path], tmp_path: Path, field: str
) -> None:
    source = saved["qwen3_moe", "one file"]
    plan = models.random_plan(source, seed=1)
    value = getattr(plan.model, field)
    other = plan.model.replace(**{field: 2 * value if field != "top_k" else value - 1})
    table = plan.physical_to_logical
    if field == "experts":
        table = np.concatenate([table, table + value], axis=1)
    other_plan = mp.Plan(
        other,
        plan.topology,
        table,
        np.repeat(np.arange(plan.topology.num_devices), table.shape[1] // plan.topology.num_devices),
    )
    with pytest.raises(mp.InputError, match=f"for another model: {field} is {value} in the checkpoint"):
        permute_checkpoint(source, other_plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_order_is_recorded_and_guards_against_permuting_twice(
    saved: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = saved["qwen3_moe", "one file"]
    plan = models.random_plan(source, seed=1)
    done = permute_checkpoint(source, plan, tmp_path / "out")
    recorded = read_expert_order(tmp_path / "out")
    assert recorded is not None
    assert list(recorded) == [0, 2]
    assert np.array_equal(np.stack(list(recorded.values())), done.expert_order)
    with pytest.raises(mp.InputError, match="permuted already"):
        permute_checkpoint(tmp_path / "out", plan, tmp_path / "again")
    with pytest.raises(mp.InputError, match="another plan"):
        permute_checkpoint(tmp_path / "out", models.random_plan(source, seed=2), tmp_path / "again", invert=True)
    with pytest.raises(mp.InputError, match="not a permuted checkpoint"):
        permute_checkpoint(source, plan, tmp_path / "again", invert=True)
    # The same rows under other layers are another order.
    record = json.loads((tmp_path / "out" / ORDER_FILE).read_text())
    layers = list(record["expert_order"])
    rows = dict(zip(reversed(layers), record["expert_order"].values(), strict=True))
    (tmp_path / "out" / ORDER_FILE).write_text(json.dumps({**record, "expert_order": rows}))
    with pytest.raises(mp.InputError, match="another plan"):
        permute_checkpoint(tmp_path / "out", plan, tmp_path / "again", invert=True)
    (tmp_path / "out" / ORDER_FILE).write_text(
        json.dumps({"format": "moeplace.expert_order", "version": 1, "expert_order": {"0": [0, 0, 1]}})
    )
    with pytest.raises(mp.FileFormatError, match="layer 0: expected every expert once"):
        permute_checkpoint(tmp_path / "out", plan, tmp_path / "again", invert=True)


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(
    saved: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = saved["mixtral", "shards"]
    plan = models.random_plan(source, seed=1)
    (tmp_path / "taken").mkdir()
    with pytest.raises(mp.InputError, match="exists already"):
        permute_checkpoint(source, plan, tmp_path / "taken")

    def interrupt(at: int, total: int) -> None:
        if at > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        permute_checkpoint(source, plan, tmp_path / "new", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_full_disk_is_noticed_before_anything_is_written(
    saved: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved["mixtral", "one file"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(mp.InputError, match="10 are free"):
        permute_checkpoint(source, models.random_plan(source, 1), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_plans_that_no_order_of_experts_can_follow_are_refused(
    saved: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = saved["olmoe", "one file"]
    plan = models.random_plan(source, seed=1)
    table = np.hstack([plan.physical_to_logical, plan.physical_to_logical[:, :4]])
    with_replicas = mp.Plan(plan.model, plan.topology, table, np.repeat(np.arange(4), 3))
    uneven = mp.Plan(plan.model, plan.topology, plan.physical_to_logical, np.array([0, 0, 0, 1, 1, 2, 2, 3]))
    for wrong, message in ((with_replicas, "slots=8"), (uneven, "same number of slots")):
        with pytest.raises(mp.UnsupportedError, match=message):
            permute_checkpoint(source, wrong, tmp_path / "out")


def test_a_plan_that_parts_expert_groups_is_refused_with_advice(
    saved: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = saved["deepseek_v3", "one file"]
    plan = models.random_plan(source, seed=1)
    parted = plan.physical_to_logical.copy()
    parted[1] = [0, 2, 1, 3, 4, 5, 6, 7]
    ungrouped = plan.model.replace(groups=1, top_groups=0)
    for model in (plan.model, ungrouped):
        wrong = mp.Plan(model, plan.topology, parted, plan.slot_device)
        with pytest.raises(mp.UnsupportedError, match=r"4 groups of 2 experts.*layer 2.*groups move whole"):
            permute_checkpoint(source, wrong, tmp_path / "out")


def test_a_plan_for_another_model_is_refused(saved: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    plan = models.random_plan(saved["deepseek_v3", "one file"], seed=1)
    with pytest.raises(mp.InputError, match=r"moe_layers is \(0, 1, 2\) in the checkpoint, \(1, 2\)"):
        permute_checkpoint(saved["olmoe", "one file"], plan, tmp_path / "out")


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "an unknown tensor in a MoE layer": (
        lambda t: t.update({"model.layers.0.mlp.mystery": torch.zeros(8)}),
        mp.UnsupportedError,
        r"model\.layers\.0\.mlp\.mystery.*not known",
    ),
    "an unknown tensor of an expert": (
        lambda t: t.update({"model.layers.0.mlp.experts.0.lora_A.weight": torch.zeros(1)}),
        mp.FileFormatError,
        r"lora_A.*expert 1 is missing",
    ),
    "experts in a layer without MoE": (
        lambda t: t.update({"model.layers.7.mlp.experts.0.up_proj.weight": torch.zeros(1)}),
        mp.UnsupportedError,
        "outside the MoE layers",
    ),
    "experts under another name": (
        lambda t: t.update({"aux.router.weight": torch.zeros(1)}),
        mp.UnsupportedError,
        "outside the MoE layers",
    ),
    "a missing expert": (
        lambda t: t.pop("model.layers.1.mlp.experts.5.up_proj.weight"),
        mp.FileFormatError,
        r"layers\.1.*expert 5 is missing",
    ),
    "an expert too many": (
        lambda t: t.update({"model.layers.1.mlp.experts.8.up_proj.weight": torch.zeros(16, 32)}),
        mp.FileFormatError,
        "expert 8 is missing or too many",
    ),
    "a missing router": (lambda t: t.pop("model.layers.2.mlp.gate.weight"), mp.FileFormatError, "no router of layer 2"),
    "a layer without experts": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.2.mlp.experts.")],
        mp.FileFormatError,
        "no experts of layer 2",
    ),
    "experts under two names": (
        lambda t: t.update({f"eagle.layers.0.mlp.experts.{e}.up_proj.weight": torch.zeros(16, 32) for e in range(8)}),
        mp.UnsupportedError,
        "experts of layer 0 stand under (?:eagle.layers.0. and model|model.layers.0. and eagle).* two models",
    ),
    "whole numbers of a router": (
        lambda t: t.update({"model.layers.1.mlp.gate.token_table": torch.zeros(64, 2, dtype=torch.int64)}),
        mp.UnsupportedError,
        "holds whole numbers, which may be experts'",
    ),
    "whole numbers of a layer": (
        lambda t: t.update({"model.layers.1.hash.table": torch.zeros(64, dtype=torch.int32)}),
        mp.UnsupportedError,
        "holds whole numbers, which may be experts'",
    ),
    "an order of experts": (
        lambda t: t.update({"model.layers.1.mlp.gate.order": torch.arange(8)}),
        mp.UnsupportedError,
        "holds whole numbers, which may be experts'",
    ),
    "experts of different shape": (
        lambda t: t.update({"model.layers.1.mlp.experts.5.up_proj.weight": torch.zeros(8, 32)}),
        mp.UnsupportedError,
        "cannot change places",
    ),
    "a router of another width": (
        lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.zeros(6, 32)}),
        mp.UnsupportedError,
        "expected 8 experts in dimension 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_cannot_be_placed_are_refused(
    case: str, saved: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    change, error, message = REFUSED[case]
    source = tmp_path / "model"
    shutil.copytree(saved["olmoe", "one file"], source)
    rewrite(source, change)
    with pytest.raises(error, match=message):
        permute_checkpoint(source, models.random_plan(source, 1), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
