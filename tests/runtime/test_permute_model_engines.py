"""Models of Megatron-LM's, torchtitan's and DeepSpeed's own classes compute the same before and after. Run where they
are installed:

pip install --no-deps megatron-core==0.16.1 torchtitan==0.3.0 deepspeed==0.19.8
pip install hjson msgpack psutil py-cpuinfo einops spmd_types==0.2.3 tyro torchdata torch_checkpointing tokenizers
pip install triton
"""

from __future__ import annotations

import contextlib
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist

import moeplace as mp
from moeplace.runtime.permute.model import permute_model

torch.set_num_threads(1)
EXPERTS = 8


def plan(devices: int, layers: tuple[int, ...], seed: int = 0) -> mp.Plan:
    spec = mp.ModelSpec(
        layers=len(layers), experts=EXPERTS, top_k=2, hidden_size=32, ffn_size=16, moe_layers=layers, name="drawn"
    )
    rng = np.random.default_rng(seed)
    table = np.stack([rng.permutation(EXPERTS) for _ in layers])
    topology = mp.Topology.preset("h100-hgx", devices_per_node=devices)
    return mp.Plan(spec, topology, table, np.repeat(np.arange(devices), EXPERTS // devices))


def draw(model: torch.nn.Module, seed: int = 0) -> None:
    """Every weight and bias drawn, so that routing depends on all of them."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.2)


def run_megatron(rank: int, world: int, init_file: str, out: str) -> None:
    torch.set_num_threads(1)
    # Its CPU paths ask for the current CUDA device, its random state and TransformerEngine's GEMM.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_config import TransformerConfig

    tensor_parallel.get_cuda_rng_tracker = lambda: types.SimpleNamespace(fork=contextlib.nullcontext)
    moe_utils.te_general_gemm = None
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=world)
    for bias in (False, True):
        config = TransformerConfig(
            num_layers=3,
            hidden_size=32,
            ffn_hidden_size=64,
            num_attention_heads=2,
            num_moe_experts=EXPERTS,
            moe_layer_freq=[0, 1, 1],
            moe_ffn_hidden_size=16,
            moe_shared_expert_intermediate_size=None if bias else 16,
            moe_router_topk=2,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_load_balancing_type="none",
            moe_token_dispatcher_type="allgather",
            expert_model_parallel_size=world,
            use_cpu_initialization=True,
            add_bias_linear=bias,
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )
        layers = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        model = GPTModel(config=config, transformer_layer_spec=layers, vocab_size=64, max_sequence_length=32).eval()
        draw(model, seed=0)
        # Every rank drew the same numbers for other experts: make the local ones its own.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".experts." in name:
                    parameter.add_(0.01 * rank)
        ids = torch.arange(24)[None] * 7 % 64
        mask = torch.ones(1, 1, 24, 24).tril() < 0.5
        with torch.no_grad():
            before = model(ids, torch.arange(24)[None], mask)
            weights = {name: value.clone() for name, value in model.named_parameters()}
            placed = plan(2, (1, 2))
            group = parallel_state.get_expert_model_parallel_group() if world > 1 else None
            permute_model(model, placed, expert_group=group)
            after = model(ids, torch.arange(24)[None], mask)
            assert any(not torch.equal(value, weights[name]) for name, value in model.named_parameters())
            torch.testing.assert_close(after, before)
            # A router that moves alone changes the answer: the check would see a tensor left behind.
            model.decoder.layers[1].mlp.router.weight.copy_(weights["decoder.layers.1.mlp.router.weight"])
            broken = (model(ids, torch.arange(24)[None], mask) - before).abs().max()
            assert broken > 1e-3
    dist.barrier()
    Path(f"{out}{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_megatrons_logits_stay(world: int, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed; see the head of this file")
    context: Any = torch.multiprocessing.start_processes(
        run_megatron, (world, str(tmp_path / "init"), str(tmp_path / "done")), world, join=False, start_method="spawn"
    )
    try:
        deadline = time.monotonic() + 200
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        for process in context.processes:
            process.kill()
    assert len(list(tmp_path.glob("done*"))) == world


@pytest.mark.parametrize(("family", "dtype"), [("deepseek_v3", torch.float32), ("gpt_oss", torch.bfloat16)])
def test_torchtitans_layers_compute_the_same(family: str, dtype: torch.dtype) -> None:
    pytest.importorskip("torchtitan.models.common.moe", reason="torchtitan 0.3 is not installed")
    registry = pytest.importorskip(f"torchtitan.models.{family}").model_registry
    config = registry("debugmodel").model
    config.layers = config.layers[:3]
    model = config.build().eval().to(dtype)
    draw(model)
    blocks = {int(name.split(".")[1]): module for name, module in model.named_modules() if name.endswith(".moe")}
    assert blocks
    x = torch.randn(1, 64, 256, dtype=dtype)
    experts = next(iter(blocks.values())).router.num_experts
    placed = plan(2, tuple(blocks))
    if experts != EXPERTS:
        rng = np.random.default_rng(0)
        table = np.stack([rng.permutation(experts) for _ in blocks])
        spec = placed.model.replace(experts=experts)
        placed = mp.Plan(spec, placed.topology, table, np.repeat([0, 1], experts // 2))
    with torch.no_grad():
        before = {layer: block(x) for layer, block in blocks.items()}
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        permute_model(model, placed)
        for layer, block in blocks.items():
            close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(block(x), before[layer], **close)
        permute_model(model, placed, invert=True)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_deepspeeds_autoep_layers_compute_the_same(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts, router, its biases and counters, and the optimizer's state; attention and dense layers stay."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip(
        "deepspeed.module_inject.auto_ep", reason="deepspeed is not installed; see the head of this file"
    )
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from small_models import deepseek_v3
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = (
        deepseek_v3(use_cache=False)
        if family == "deepseek_v3"
        else MixtralForCausalLM(
            MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, vocab_size=64)
        )
    )
    config = AutoEPConfig(enabled=True, autoep_size=1, preset_model=family, use_grouped_mm=False)
    for found in AutoEP(model, config).ep_parser():
        # `AutoEP.replace_moe_layers` does this too, and fails on the registry of outputs of Transformers 5.24 then.
        parent, _, name = found.moe_module_name.rpartition(".")
        source = model.get_submodule(found.moe_module_name)
        layer = AutoEPMoELayer(spec=found, source_module=source, ep_size=1, ep_rank=0, config=config)
        setattr(model.get_submodule(parent), name, layer)
    model.eval()
    draw(model)
    layers = {
        int(name.split(".")[2]): part for name, part in model.named_modules() if hasattr(part, "_is_autoep_layer")
    }
    experts = next(iter(layers.values())).num_experts
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    ids = torch.arange(24)[None] * 7 % 64
    model(input_ids=ids).logits.square().mean().backward()
    optimizer.step()
    placed = plan(2, tuple(layers))
    rng = np.random.default_rng(0)
    groups = np.arange(experts).reshape(getattr(model.config, "n_group", None) or 1, -1)
    table = np.stack([rng.permuted(groups, axis=1).ravel() for _ in layers])
    spec = placed.model.replace(experts=experts)
    placed = mp.Plan(spec, placed.topology, table, np.repeat([0, 1], experts // 2))
    with mp.profile(model, tmp_path / "trace", routers=r"mlp\.router$") as recorder, torch.no_grad():
        model(input_ids=ids)
    assert recorder.moe_layers == tuple(layers)
    assert mp.read_trace(tmp_path / "trace").num_tokens == ids.numel()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        first = next(iter(layers.values())).experts.w1
        weights, moment = first.clone(), optimizer.state[first]["exp_avg"].clone()
        order = permute_model(model, placed, optimizer=optimizer)
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
        assert torch.equal(first, weights[order[0].tolist()])
        assert torch.equal(optimizer.state[first]["exp_avg"], moment[order[0].tolist()])
        permute_model(model, placed, optimizer=optimizer, invert=True)
        assert torch.equal(first, weights)
