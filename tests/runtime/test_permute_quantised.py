"""Quantised checkpoints as each format stores them: an expert keeps its scales, zeros and all that is said of it.

Names and shapes of: Ascend's from msModelSlim's savers (AscendV1), bitsandbytes' from its `Linear4bit` and
`Linear8bitLt` state dicts, HQQ's from `HQQLinear.state_dict`, Quark's, GPTQ's, AWQ's, compressed-tensors' and
ModelOpt's from released checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file  # noqa: E402

from moeplace.runtime.permute.checkpoint import permute_checkpoint  # noqa: E402

LAYERS, EXPERTS, HIDDEN, FFN = 2, 8, 64, 32
I8, U8, I32, I64 = torch.int8, torch.uint8, torch.int32, torch.int64
F16, F32, F8 = torch.float16, torch.float32, torch.float8_e4m3fn
Stored = dict[str, tuple[Any, tuple[int, ...]]]


def ascend_dynamic(out: int, inner: int) -> Stored:
    return {"weight": (I8, (out, inner)), "weight_scale": (F32, (out, 1)), "weight_offset": (F32, (out, 1))}


def ascend_static(out: int, inner: int) -> Stored:
    return ascend_dynamic(out, inner) | {
        "input_scale": (F32, (1,)),
        "input_offset": (F32, (1,)),
        "quant_bias": (I32, (out,)),
        "deq_scale": (I64, (out,)),
    }


def ascend_w4a8(out: int, inner: int) -> Stored:
    return {
        "weight": (I8, (out // 2, inner)),
        "weight_scale": (F32, (out, 1)),
        "weight_offset": (F32, (out, 1)),
        "weight_scale_second": (F32, (out, inner // 32)),
        "weight_offset_second": (F32, (out, inner // 32)),
        "scale_bias": (F32, (out, 1)),
    }


def nf4(out: int, inner: int) -> Stored:
    return {
        "weight": (U8, (out * inner // 2, 1)),
        "weight.absmax": (U8, (out * inner // 64,)),
        "weight.nested_absmax": (F32, (1,)),
        "weight.nested_quant_map": (F32, (256,)),
        "weight.quant_map": (F32, (16,)),
    }


def int8(out: int, inner: int) -> Stored:
    return {"weight": (I8, (out, inner)), "SCB": (F32, (out,)), "weight_format": (U8, ())}


def hqq(out: int, inner: int) -> Stored:
    groups = out * inner // 64
    numbers = dict.fromkeys(("nbits", "group_size", "axis", "channel_wise", "view_as_float"), (I64, ()))
    texts = {"packing": (U8, (10,)), "compute_dtype": (U8, (14,)), "shape": (I64, (2,))}
    arrays = {"W_q": (U8, (32, groups)), "scale": (F16, (1, groups)), "zero": (F16, (1, groups))}
    return {**arrays, **numbers, **texts}


def quark_fp8(out: int, inner: int) -> Stored:
    return {
        "weight": (F8, (out, inner)),
        "weight_scale": (F32, ()),
        "input_scale": (F32, ()),
        "output_scale": (F32, ()),
    }


def quark_mxfp4(out: int, inner: int) -> Stored:
    return {"weight": (U8, (out, inner // 2)), "weight_scale": (U8, (out, inner // 32))}


def gptq(out: int, inner: int) -> Stored:
    return {
        "qweight": (I32, (inner // 8, out)),
        "qzeros": (I32, (inner // 32, out // 8)),
        "scales": (F16, (inner // 32, out)),
        "g_idx": (I32, (inner,)),
    }


def awq(out: int, inner: int) -> Stored:
    return {
        "qweight": (I32, (inner, out // 8)),
        "qzeros": (I32, (inner // 32, out // 8)),
        "scales": (F16, (inner // 32, out)),
    }


def compressed(out: int, inner: int) -> Stored:
    return {
        "weight_packed": (I32, (out, inner // 8)),
        "weight_scale": (F16, (out, inner // 32)),
        "weight_zero_point": (I32, (out // 8, inner // 32)),
        "weight_g_idx": (I32, (inner,)),
        "weight_shape": (I64, (2,)),
    }


def nvfp4(out: int, inner: int) -> Stored:
    scales = {"weight_scale": (F8, (out, inner // 16)), "weight_scale_2": (F32, ()), "input_scale": (F32, ())}
    return {"weight": (U8, (out, inner // 2)), **scales}


ASCEND = (ascend_dynamic, ascend_static, ascend_w4a8)
OTHERS = (nf4, int8, hqq, quark_fp8, quark_mxfp4, gptq, awq, compressed, nvfp4)
FORMATS = {function.__name__: function for function in (*ASCEND, *OTHERS)}
MATRICES = {"gate_proj": (FFN, HIDDEN), "up_proj": (FFN, HIDDEN), "down_proj": (HIDDEN, FFN)}


def drawn(generator: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*(shape or (1,))[:-1], (shape or (1,))[-1] * size), generator=generator, dtype=U8)
    return raw.view(dtype).reshape(shape).clone()


def quant_state(expert: int, shape: tuple[int, int]) -> Any:
    """bitsandbytes' text: the offset's digits decide its length."""
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape}
    said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": round(1 / (expert + 1), expert + 1)}
    return torch.tensor(list(json.dumps(said).encode()), dtype=U8)


def stored_tensors(form: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.norm.weight": drawn(generator, F16, (HIDDEN,))}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.mlp"
        tensors[f"{block}.gate.weight"] = drawn(generator, F16, (EXPERTS, HIDDEN))
        for expert in range(EXPERTS):
            for matrix, shape in MATRICES.items():
                name = f"{block}.experts.{expert}.{matrix}"
                for part, (dtype, size) in FORMATS[form](*shape).items():
                    tensors[f"{name}.{part}"] = drawn(generator, dtype, size)
                if form == "nf4":
                    tensors[f"{name}.weight.quant_state.bitsandbytes__nf4"] = quant_state(expert, shape)
    return tensors


def write(folder: Path, tensors: dict[str, Any], index: str = "") -> Path:
    """A checkpoint in one file, or in two with an index of that name."""
    folder.mkdir()
    config = {
        "model_type": "qwen3_moe", "num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": 2,
        "hidden_size": HIDDEN, "moe_intermediate_size": FFN, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    if not index:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    placed = {}
    for number in (1, 2):
        file = f"{index}-0000{number}-of-00002.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % 2 == number - 1}
        save_file(part, folder / file)
        placed |= dict.fromkeys(part, file)
    (folder / f"{index}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    said = {"model_quant_type": "W8A8_DYNAMIC", **dict.fromkeys(tensors, "W8A8_DYNAMIC")}
    (folder / "quant_model_description.json").write_text(json.dumps(said))
    return folder


def plan_of(folder: Path) -> mp.Plan:
    spec, rng = mp.ModelSpec.from_config(folder), np.random.default_rng(4)
    table = np.stack([rng.permutation(EXPERTS) for _ in range(LAYERS)])
    return mp.Plan(spec, mp.Topology.preset("h100-hgx", devices_per_node=4), table, np.repeat(np.arange(4), 2))


def loaded(folder: Path) -> dict[str, Any]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same(first: Any, second: Any) -> bool:
    """Byte by byte: drawn floats are not all numbers."""
    return torch.equal(*(value.contiguous().reshape(-1).view(U8) for value in (first, second)))


@pytest.mark.parametrize("form", FORMATS)
def test_an_expert_keeps_all_that_its_format_stores_of_it(form: str, tmp_path: Path) -> None:
    tensors = stored_tensors(form)
    index = "quant_model_weights" if form.startswith("ascend") else ""
    source = write(tmp_path / "model", tensors, index)
    plan = plan_of(source)
    done = permute_checkpoint(source, plan, tmp_path / "permuted", verify=True)
    assert done.verified.startswith("every byte is where the order puts it")
    moved = loaded(tmp_path / "permuted")
    assert moved.keys() == tensors.keys()
    for name, value in moved.items():
        where = name.split(".")
        if ".gate.weight" in name:
            expected = tensors[name][torch.from_numpy(done.expert_order[int(where[2])].copy())]
        elif ".experts." in name:
            where[5] = str(done.expert_order[int(where[2])][int(where[5])])
            expected = tensors[".".join(where)]
        else:
            expected = tensors[name]
        assert value.shape == expected.shape
        assert same(value, expected), name
    permute_checkpoint(tmp_path / "permuted", plan, tmp_path / "restored", invert=True)
    for file in source.iterdir():
        assert (tmp_path / "restored" / file.name).read_bytes() == file.read_bytes()


def test_experts_named_behind_their_matrix_move_with_bias_and_blocks(tmp_path: Path) -> None:
    """gpt-oss for bitsandbytes: a linear layer for each expert in two lists."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.mlp"
        tensors[f"{block}.router.linear.weight"] = drawn(generator, F16, (EXPERTS, HIDDEN))
        tensors[f"{block}.router.linear.bias"] = drawn(generator, F16, (EXPERTS,))
        for expert in range(EXPERTS):
            for matrix, shape in (("gate_up_projs", (2 * FFN, HIDDEN)), ("down_projs", (HIDDEN, FFN))):
                name = f"{block}.experts.{matrix}.{expert}"
                for part, (dtype, size) in nf4(*shape).items():
                    tensors[f"{name}.{part}"] = drawn(generator, dtype, size)
                tensors[f"{name}.bias"] = drawn(generator, F16, shape[:1])
    source = write(tmp_path / "model", tensors)
    done = permute_checkpoint(source, plan_of(source), tmp_path / "permuted")
    moved = loaded(tmp_path / "permuted")
    for name, value in moved.items():
        where = name.split(".")
        order = done.expert_order[int(where[2])]
        if "experts" in name:
            where[6] = str(order[int(where[6])])
            assert same(value, tensors[".".join(where)])
        else:
            assert same(value, tensors[name][torch.from_numpy(order.copy())])


def test_scales_of_fused_experts_move_and_one_scale_for_all_stays(tmp_path: Path) -> None:
    generator, tensors = torch.Generator().manual_seed(2), {}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.mlp"
        tensors[f"{block}.gate.weight"] = drawn(generator, F16, (EXPERTS, HIDDEN))
        for matrix, (out, inner) in (("gate_up_proj", (2 * FFN, HIDDEN)), ("down_proj", (HIDDEN, FFN))):
            for part, (dtype, size) in nvfp4(out, inner).items():
                name = f"{block}.experts.{matrix}" + ("" if part == "weight" else f"_{part}")
                tensors[name] = drawn(generator, dtype, (EXPERTS, *size) if size else (1,))
    source = write(tmp_path / "model", tensors)
    done = permute_checkpoint(source, plan_of(source), tmp_path / "permuted")
    for name, value in loaded(tmp_path / "permuted").items():
        order = torch.from_numpy(done.expert_order[int(name.split(".")[2])].copy())
        assert same(value, tensors[name] if tensors[name].numel() == 1 else tensors[name].view(U8)[order])


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed", "nf4", "hqq"])
def test_a_router_whose_weights_are_packed_is_refused(form: str, tmp_path: Path) -> None:
    tensors = stored_tensors("gptq")
    for layer in range(LAYERS):
        del tensors[f"model.layers.{layer}.mlp.gate.weight"]
        for part, (dtype, size) in FORMATS[form](EXPERTS, HIDDEN).items():
            tensors[f"model.layers.{layer}.mlp.gate.{part}"] = torch.zeros(size, dtype=dtype)
    source = write(tmp_path / "model", tensors)
    with pytest.raises(mp.UnsupportedError, match=r"model\.layers\.\d\.mlp\.gate\..* (packed|no router of theirs)"):
        permute_checkpoint(source, plan_of(source), tmp_path / "permuted")
    assert not (tmp_path / "permuted").exists()


def test_a_router_of_two_matrices_with_as_many_rows_as_experts_is_refused(tmp_path: Path) -> None:
    tensors = stored_tensors("int8")
    tensors["model.layers.1.mlp.gate.down_proj.weight"] = torch.zeros(EXPERTS, HIDDEN)
    source = write(tmp_path / "model", tensors)
    with pytest.raises(mp.UnsupportedError, match="which of them the router's scores come from is not known"):
        permute_checkpoint(source, plan_of(source), tmp_path / "permuted")


def test_a_model_that_does_not_run_here_is_verified_by_its_bytes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = write(tmp_path / "model", stored_tensors("awq"))
    config = json.loads((source / "config.json").read_text())
    plan = plan_of(source)
    config |= {"architectures": ["Qwen3MoeForCausalLM"], "quantization_config": {"quant_method": "of next year"}}
    (source / "config.json").write_text(json.dumps(config))
    done = permute_checkpoint(source, plan, tmp_path / "permuted", verify=True)
    assert "every byte is where the order puts it" in done.verified
    assert "the original does not run here (" in done.verified
