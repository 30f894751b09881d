"""Which experts' weights an engine's slots hold: told whatever the engine does to their layout, faults named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import run

import moeplace as mp
from moeplace.runtime.exporters.running import (
    VllmWorkerExtension,
    check_weights,
    read_weights,
    reference_weights,
    write_expert_fingerprints,
)

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file

LAYERS, EXPERTS, SLOTS, RANKS, HIDDEN, INNER = (1, 2), 6, 8, 2, 16, 12
CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "dtype": "bfloat16",
}
ROWS = {1: [0, 1, 2, 3, 4, 5, 0, 1], 2: [5, 4, 3, 2, 1, 0, 5, 3]}


def checkpoint(folder: Path) -> dict[str, Any]:
    """A checkpoint of the model, as Transformers names its tensors."""
    drawn = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in LAYERS:
        stem = f"model.layers.{layer}.mlp."
        tensors[f"{stem}gate.weight"] = torch.randn(EXPERTS, HIDDEN, generator=drawn, dtype=torch.bfloat16)
        for owner in [f"experts.{e}" for e in range(EXPERTS)] + ["shared_experts"]:
            for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
                tensors[f"{stem}{owner}.{name}_proj.weight"] = torch.randn(shape, generator=drawn, dtype=torch.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return tensors


def engine(
    tensors: dict[str, Any],
    held: dict[int, list[tuple[int, int]]],
    rank: int,
    change: Callable[[Any], Any] | None = None,
) -> Any:
    """A rank's model: up before gate, the second product transposed and padded, as kernels like them. held: the layer
    and expert whose weights each slot has."""
    model = torch.nn.Module()
    for layer, slots in held.items():
        own = slots[rank * len(slots) // RANKS : (rank + 1) * len(slots) // RANKS]
        part = [
            [tensors[f"model.layers.{i}.mlp.experts.{e}.{m}_proj.weight"] for m in ("up", "gate", "down")]
            for i, e in own
        ]
        w13 = torch.stack([torch.cat(matrices[:2]) for matrices in part])
        w2 = torch.stack([torch.nn.functional.pad(matrices[2].T, (0, 8)) for matrices in part])
        if change is not None:
            w13, w2 = change(w13), change(w2)
        node = model
        for name in ("model", "layers", str(layer), "mlp", "experts", "routed_experts"):
            if not hasattr(node, name):
                node.add_module(name, torch.nn.Module())
            node = getattr(node, name)
        for name, value in (("w13_weight", w13), ("w2_weight", w2), ("w13_input_scale", torch.ones(len(own)))):
            node.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    return model


def by_map(rows: dict[int, list[int]] = ROWS) -> dict[int, list[tuple[int, int]]]:
    return {layer: [(layer, expert) for expert in row] for layer, row in rows.items()}


def dump(
    folder: Path,
    tensors: dict[str, Any],
    held: dict[int, list[tuple[int, int]]],
    change: Callable[[Any], Any] | None = None,
) -> Path:
    for rank in range(RANKS):
        write_expert_fingerprints(engine(tensors, held, rank, change), folder, rank)
    return folder


def found(dumped: Path, reference: Path | None, rows: dict[int, list[int]] = ROWS) -> list[str]:
    weights, ranks = read_weights(dumped, LAYERS)
    assert ranks == RANKS
    model = mp.ModelSpec.from_config(CONFIG)
    expected = None if reference is None else reference_weights(reference, model, list(weights))
    findings, _ = check_weights(rows, weights, expected, EXPERTS)
    assert {finding.kind for finding in findings} <= {"weights"}
    return [finding.text for finding in findings]


def test_weights_in_slots_are_told_whatever_their_layout(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "model")
    dumped = dump(tmp_path / "dump", tensors, by_map())
    assert found(dumped, tmp_path / "model") == found(dumped, None) == []
    # The engines' own sharded state says the same.
    (tmp_path / "sharded").mkdir()
    for rank in range(RANKS):
        state = engine(tensors, by_map(), rank).state_dict()
        for part, names in enumerate((list(state)[:2], list(state)[2:])):
            save_file(
                {name: state[name].contiguous() for name in names},
                tmp_path / f"sharded/model-rank-{rank}-part-{part}.safetensors",
            )
    assert read_weights(tmp_path / "sharded", LAYERS) == read_weights(dumped, LAYERS)


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ({1: 2, 2: 1}, "layer 1 holds the weights of layer 2"),
        ({1: [0, 1, 3, 2, 4, 5, 0, 1]}, "layer 1: 2 of 8 slots hold other weights than the map's, as slot 2: expert 2"),
        ({2: [0, 1, 2, 3, 4, 5, 0, 1]}, "every slot holds the expert of the default map"),
        ({1: [0, 1, 2, 3, 4, 5, 0, 4]}, "layer 1: replicas of expert 1 hold different weights"),
    ],
)
def test_weights_that_are_not_the_maps_are_named(held: dict[int, Any], text: str, tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "model")
    slots = by_map()
    for layer, row in held.items():
        other = row if isinstance(row, int) else layer
        slots[layer] = [(other, expert) for expert in (ROWS[layer] if isinstance(row, int) else row)]
    texts = found(dump(tmp_path / "dump", tensors, slots), tmp_path / "model")
    assert any(each.startswith(text) for each in texts), texts


def test_damaged_weights_belong_to_no_expert(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "model")
    dumped = dump(tmp_path / "dump", tensors, by_map())
    tensors["model.layers.1.mlp.experts.3.down_proj.weight"][0, 0] += 1
    for rank in range(RANKS):
        write_expert_fingerprints(engine(tensors, by_map(), rank), dumped, rank)
    texts = found(dumped, tmp_path / "model")
    assert len(texts) == 1
    assert "as slot 3: expert 3 by the map, those of no expert that was read" in texts[0]
    # Nothing else holds expert 3, so slots alone cannot tell.
    assert found(dumped, None) == []


def test_layers_with_the_same_weights_are_seen_without_a_reference(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "model")
    held = by_map({1: ROWS[1], 2: ROWS[1]})
    held[2] = held[1]
    assert found(dump(tmp_path / "dump", tensors, held), None, {1: ROWS[1], 2: ROWS[1]}) == [
        "layers 1 and 2 hold the same weights"
    ]
    held[2] = [(2, 0)] * 2 + [(2, e) for e in ROWS[1][2:]]
    assert any(
        "slots of experts 0, 1 hold the same weights" in text
        for text in found(dump(tmp_path / "twins", tensors, held), None, ROWS | {2: ROWS[1]})
    )


def test_weights_quantised_at_loading_need_the_engines_own_reference(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "model")

    def halved(weights: Any) -> Any:
        return (weights.float() * 0.37).to(torch.bfloat16)

    dumped = dump(tmp_path / "dump", tensors, by_map(), halved)
    with pytest.raises(mp.UnsupportedError, match="the engine stores them in another form"):
        found(dumped, tmp_path / "model")
    default = {layer: [e % EXPERTS for e in range(SLOTS)] for layer in LAYERS}
    plain = dump(tmp_path / "plain", tensors, by_map(default), halved)
    assert found(dumped, plain) == []
    wrong = dump(tmp_path / "wrong", tensors, by_map(default), halved)
    assert any("the weights did not move" in text for text in found(wrong, plain))


def test_the_command_says_where_weights_and_map_differ(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "model")
    (tmp_path / "map.json").write_text(json.dumps(list(ROWS.values())))
    dumped = dump(tmp_path / "dump", tensors, by_map())
    common = ("check", "--running", tmp_path / "map.json", "--plan-model", tmp_path / "model")
    common = (*common, "--plan-topology", "h100-hgx:1x2", "--json")
    done = run(*common, "--weights", dumped, "--reference", tmp_path / "model")
    assert (done.code, done.data["weights"]) == (0, {"layers": [1, 2], "notes": []}), done.err
    slots = by_map()
    slots[2] = [(1, expert) for _, expert in slots[2]]
    dump(tmp_path / "dump", tensors, slots)
    done = run(*common, "--weights", dumped, "--reference", tmp_path / "model", "--layers", "2")
    assert (done.code, done.data["weights"]["layers"]) == (1, [2])
    # The layer whose weights they are was not asked about, and is named all the same.
    assert [each["text"] for each in done.data["findings"]] == ["layer 2 holds the weights of layer 1"]
    assert "none of them is a MoE layer" in run(*common, "--weights", dumped, "--layers", "9").err
    assert "are for --weights" in run(*common, "--reference", dumped).err


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, mp.FileFormatError, "neither expert-weights-rank-<rank>.json nor"),
        ({"expert-weights-rank-0.json": "[]"}, mp.FileFormatError, "expected a JSON object"),
        ({"expert-weights-rank-0.json": "{}"}, mp.FileFormatError, "not a moeplace/expert-weights/1 file"),
        ({"model-part-0.safetensors": ""}, mp.FileFormatError, "its name says no rank"),
        ({"expert-weights-rank-1.json": 0}, mp.FileFormatError, "it says it is of rank 0; was it renamed"),
        ({"expert-weights-rank-0.json": "x"}, mp.FileFormatError, "expected 16 hex digits"),
    ],
)
def test_dumps_that_cannot_be_one_are_refused(
    files: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        own = {"schema": "moeplace/expert-weights/1", "rank": 0, "layers": {"1": {"weight/2": ["0" * 16] * 4}}}
        if content == "x":
            own["layers"] = {"1": {"weight/2": ["no"]}}
        (tmp_path / name).write_text(content if content not in (0, "x") else json.dumps(own))
    with pytest.raises(error, match=message):
        read_weights(tmp_path, LAYERS)


def test_a_dump_of_other_slots_than_the_map_is_refused(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "model")
    dumped = dump(tmp_path / "dump", tensors, by_map())
    with pytest.raises(mp.FileFormatError, match="the dump has 8 slots, the map 6"):
        found(dumped, None, {layer: row[:6] for layer, row in ROWS.items()})
    (dumped / "expert-weights-rank-1.json").unlink()
    weights, ranks = read_weights(dumped, LAYERS)
    assert ranks == 1
    with pytest.raises(mp.FileFormatError, match="the dump has 4 slots, the map 8"):
        check_weights(ROWS, weights, None, EXPERTS)


def test_vllms_workers_write_their_own(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "model")

    class Worker(VllmWorkerExtension):
        def get_model(self) -> Any:
            return engine(tensors, by_map(), 0)

    written = Worker().write_expert_fingerprints(str(tmp_path / "dump"))
    assert json.loads(Path(written).read_text())["rank"] == 0
    with pytest.raises(mp.InputError, match="has a slot a row"):
        write_expert_fingerprints(torch.nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "float8_e4m3fn"])
def test_every_width_of_weights_is_counted_alike_in_engine_and_file(dtype: str, tmp_path: Path) -> None:
    weights = torch.randint(0, 200, (3, 40, 16), generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    model = torch.nn.Module()
    node = model
    for name in ("layers", "1", "experts"):
        node.add_module(name, torch.nn.Module())
        node = getattr(node, name)

    class Loaded(torch.nn.Parameter):
        """As engines have them, with a loader of their own."""

    node.register_parameter("w", Loaded(weights, requires_grad=False))
    write_expert_fingerprints(model, tmp_path / "a", 0)
    (tmp_path / "b").mkdir()
    save_file(model.state_dict(), tmp_path / "b/model-rank-0-part-0.safetensors")
    first, _ = read_weights(tmp_path / "a", LAYERS)
    assert first == read_weights(tmp_path / "b", LAYERS)[0]
    assert len(set(np.ravel(list(first[1].values())))) == 3
