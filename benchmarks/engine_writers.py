"""Records written by the engines' own code, read here: what comes out must be the routing that went in.

    python -m benchmarks engine_writers --sglang DIR --vllm DIR --trtllm expert_statistic.py --megatron router_trace.py

DIR are unpacked wheels (see engine_parsers.py); TensorRT-LLM's file is tensorrt_llm/_torch/expert_statistic.py and Megatron-LM's
megatron/core/transformer/moe/router_trace.py, of their repositories. Engines without one are skipped and said so. Each runs
in its own process, without a GPU, for random routing of random shapes. The recording code is the engine's; stood in for:

- SGLang: the recorder of expert_distribution.py runs as it is in modes stat, per_pass and per_token, from start_record over
  with_forward_pass and on_select_experts to dump_record, on one Gloo rank or, in per_pass and per_token, as ranks in turn. Stood in
  for: sglang.srt.environ (the folder), runtime_context (the server's settings), forward_batch_info and metrics_collector (names
  only), layers.moe (not reached), Withable and get_int_env_var of utils (Withable is the engine's own, taken out of utils/common.py), torch's empty_cache
  on a CPU, and the expert map (its three fields). Routed experts: its own extract_routed_experts_from_meta_info reads what is
  read here.
- vLLM: numpy2base64 of utils/serial_utils.py encodes what is read. Stood in for: pybase64 (base64).
- TensorRT-LLM: ExpertStatistic runs as it is. Stood in for: tensorrt_llm.envs and logger.
- Megatron-LM: RouterTracer runs as it is, its hooks on modules that return a boolean map or indices. Stood in for: the router.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from engine_parsers import check_engines, extract, load_source, stand_in
from runner import Report

import moeplace as mp
from moeplace.profiler.read import read_any
from moeplace.profiler.readers.routed_experts import read_routed_experts

RUNS = 20


def routing(rng: np.random.Generator, tokens: int, layers: int, experts: int, top_k: int) -> torch.Tensor:
    """[tokens, layers, k] different experts."""
    scores = torch.from_numpy(rng.random((tokens, layers, experts)))
    return scores.topk(top_k, dim=2).indices.to(torch.int32)


def counted(ids: torch.Tensor, experts: int) -> np.ndarray[Any, Any]:
    """[layers, experts] tokens of each."""
    layers = ids.shape[1]
    return np.stack([np.bincount(ids[:, layer].flatten(), minlength=experts) for layer in range(layers)])


def check_sglang(folder: Path, rng: np.random.Generator, scratch: Path) -> str:
    settings = SimpleNamespace(
        moe=SimpleNamespace(moe_a2a_backend="none", deepep_mode="auto", elastic_ep_backend=None),
        overlap=SimpleNamespace(enable_two_batch_overlap=False),
    )
    variable = SimpleNamespace(get=lambda: str(scratch))
    stand_in("sglang.srt.environ", envs=SimpleNamespace(SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR=variable))
    stand_in("sglang.srt.layers.moe", get_moe_a2a_backend=None)
    stand_in("sglang.srt.model_executor.forward_batch_info", ForwardBatch=object, ForwardMode=object)
    stand_in(
        "sglang.srt.observability.metrics_collector",
        STAT_LOGGER_ROLE_EXPERT_DISPATCH="",
        ExpertDispatchCollector=object,
        resolve_collector_class=None,
    )
    stand_in(
        "sglang.srt.runtime_context",
        get_device=lambda: SimpleNamespace(device="cpu"),
        get_exec=lambda: settings,
        get_platform=lambda: SimpleNamespace(is_hip=False),
        get_schedule=lambda: SimpleNamespace(chunked_prefill_size=64),
        get_resources=lambda: SimpleNamespace(),
        logs_expert_balancedness_to_server_log=lambda: False,
        reports_expert_balancedness=lambda: False,
    )
    from contextlib import contextmanager
    from typing import Generic, Optional, TypeVar

    names = {"Generic": Generic, "Optional": Optional, "T": TypeVar("T"), "contextmanager": contextmanager}
    withable = extract(folder / "sglang/srt/utils/common.py", "Withable", names)
    stand_in("sglang.srt.utils", Withable=withable, get_device=lambda: "cpu", get_int_env_var=lambda *_: 0)
    torch.cpu.empty_cache = lambda: None  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", init_method=f"file://{scratch}/init", rank=0, world_size=1)
    engine = load_source("sglang.srt.eplb.expert_distribution", folder / "sglang/srt/eplb/expert_distribution.py")

    for run in range(RUNS):
        for mode in ("stat", "per_pass", "per_token"):
            layers, experts = int(rng.integers(2, 5)), int(rng.integers(6, 12))
            slots, top_k, dense = experts + int(rng.integers(0, 4)), int(rng.integers(2, 5)), 1
            mapping = torch.stack([torch.randperm(slots) % experts for _ in range(layers)])
            location = SimpleNamespace(
                num_layers=layers,
                num_physical_experts=slots,
                num_local_physical_experts=slots,
                num_logical_experts=experts,
                physical_to_logical_map=mapping,
                ep_size=1,
            )
            settings.moe.expert_distribution_recorder_mode = mode
            settings.moe.expert_distribution_recorder_buffer_size = 8
            target = scratch / f"{mode}{run}"
            variable.get = lambda target=target: str(target)
            passes = int(rng.integers(1, 7))
            expected = np.zeros((passes, layers - dense, experts))
            tokens: list[torch.Tensor] = []
            for rank in range(1 if mode == "stat" else 2):
                recorder = engine.ExpertDistributionRecorder.init_new(location, rank)
                recorder.start_record()
                for step in range(passes):
                    size = int(rng.integers(1, 9))
                    logical = routing(rng, size, layers, experts, top_k)
                    batch = SimpleNamespace(
                        input_ids=torch.arange(size),
                        positions=torch.arange(size),
                        extend_seq_lens_cpu=[size],
                        forward_mode=SimpleNamespace(value=1),
                    )
                    with recorder.with_forward_pass(step, batch):
                        for layer in range(dense, layers):
                            slot_of = torch.argsort(mapping[layer], stable=True)
                            first = torch.searchsorted(mapping[layer][slot_of], torch.arange(experts))
                            physical = slot_of[first][logical[:, layer].long()].to(torch.int32)
                            padded = torch.cat([physical, torch.full((2, top_k), -1, dtype=torch.int32)])
                            with recorder.with_current_layer(layer):
                                recorder.on_select_experts(padded)
                    expected[step] += counted(logical[:, dense:], experts)
                    tokens.append(logical[:, dense:])
                recorder.stop_record()
                recorder.dump_record()
            record = read_any(target)
            assert record.moe_layers == tuple(range(dense, layers))
            if isinstance(record, mp.RoutingStatistics):
                # Experts past the last one that a slot holds cannot be told.
                assert np.array_equal(record.load, expected[:, :, : record.experts])
                assert not expected[:, :, record.experts :].any()
            else:
                assert np.array_equal(record.expert_ids, torch.cat(tokens).numpy())
    reader = extract(
        folder / "sglang/srt/state_capturer/routed_experts.py",
        "extract_routed_experts_from_meta_info",
        {"np": np, "pybase64": base64},
    )
    ids = routing(rng, 50, 4, 8, 2)
    ids[:, 0] = 0
    response = {"meta_info": {"routed_experts": base64.b64encode(ids.numpy().tobytes()).decode()}}
    (scratch / "r.json").write_text(json.dumps(response))
    trace = read_routed_experts(scratch / "r.json", layers=4, top_k=2)
    assert np.array_equal(reader(response).reshape(-1, 4, 2)[:, 1:], trace.expert_ids)
    return f"{RUNS} records each of stat, per_pass and per_token; routed experts"


def check_vllm(folder: Path, rng: np.random.Generator, scratch: Path) -> str:
    import io

    encode = extract(folder / "vllm/utils/serial_utils.py", "numpy2base64", {"np": np, "io": io, "pybase64": base64})
    for run in range(RUNS):
        layers, experts = int(rng.integers(2, 5)), int(rng.integers(5, 300))
        ids = routing(rng, 200, layers, experts, 2)
        ids[:, 0] = 0
        kind = np.uint8 if experts <= 256 else np.uint16
        parts = np.split(ids.numpy().astype(kind), [70])
        lines = [json.dumps({"choices": [{"index": 0, "routed_experts": encode(part)}]}) for part in parts]
        path = scratch / f"{run}.jsonl"
        path.write_text("\n".join(lines))
        trace = read_any(path, num_experts=experts)
        assert isinstance(trace, mp.RoutingTrace)
        assert np.array_equal(trace.expert_ids, ids[:, 1:].numpy())
        assert trace.sequence.tolist() == [0] * 70 + [1] * 130
    return f"{RUNS} files of responses"


def check_trtllm(file: Path, rng: np.random.Generator, scratch: Path) -> str:
    import safetensors.torch  # the engine's file expects it loaded

    assert safetensors.torch
    stand_in("tensorrt_llm", envs=SimpleNamespace(get_env=os.environ.get))
    stand_in("tensorrt_llm.logger", logger=SimpleNamespace(info=lambda *_: None))
    engine = load_source("tensorrt_llm._torch.expert_statistic", file)
    os.environ["EXPERT_STATISTIC_ITER_RANGE"] = "100-104"
    for run in range(RUNS):
        experts, layers, ranks = int(rng.integers(4, 40)), int(rng.integers(1, 4)), int(rng.integers(1, 4))
        os.environ["EXPERT_STATISTIC_PATH"] = str(scratch / f"{run}")
        expected = np.zeros((4, layers, experts))
        for rank in range(ranks):
            engine.ExpertStatistic.create(rank)
            for step in range(98, 105):
                engine.ExpertStatistic.set_iter(step)
                for layer in range(layers):
                    engine.ExpertStatistic.set_layer(layer + 3)
                    for _ in range(2):
                        ids = routing(rng, int(rng.integers(1, 30)), 1, experts, 2)
                        engine.ExpertStatistic.maybe_add_info(experts, ids[:, 0])
                        if 100 <= step < 104:
                            expected[step - 100, layer] += counted(ids, experts)[0]
        record = read_any(scratch / f"{run}")
        assert isinstance(record, mp.RoutingStatistics)
        assert (record.moe_layers, record.top_k) == (tuple(range(3, 3 + layers)), 2)
        assert np.array_equal(record.load, expected)
    return f"{RUNS} folders"


def check_megatron(file: Path, rng: np.random.Generator, scratch: Path) -> str:
    engine = load_source("megatron_router_trace", file)
    torch.cuda.is_current_stream_capturing = lambda: False
    for run in range(RUNS):
        layers, experts, top_k, ranks = int(rng.integers(1, 4)), int(rng.integers(4, 30)), 2, int(rng.integers(1, 4))
        expected = []
        for rank in range(ranks):
            tracer = engine.RouterTracer(str(scratch / f"{run}"), 3, rank, training_mode=run % 2 == 0)
            hooks = [tracer.make_hook(f"decoder.layers.{layer + 1}.mlp.router") for layer in range(layers)]
            extra = tracer.make_hook("mtp.layers.0.mtp_model_layer.mlp.router")
            for _ in range(3):
                size = int(rng.integers(1, 20))
                ids = routing(rng, size, layers, experts, top_k)
                for layer, hook in enumerate(hooks):
                    if run % 2 == 0:
                        chosen = torch.zeros(size, experts, dtype=torch.bool).scatter_(1, ids[:, layer].long(), True)
                    else:
                        chosen = ids[:, layer]
                    hook(SimpleNamespace(topk=top_k), (), (None, chosen))
                extra(SimpleNamespace(topk=top_k), (), (None, ids[:, 0]))
                # The training hook loses the order of gate weights.
                expected.append(torch.sort(ids, dim=2).values if run % 2 == 0 else ids)
                if tracer.training_mode:
                    tracer.advance_step()
            tracer.flush()
        record = read_any(scratch / f"{run}", num_experts=experts)
        assert isinstance(record, mp.RoutingTrace)
        assert record.moe_layers == tuple(range(1, layers + 1))
        assert np.array_equal(record.expert_ids, torch.cat(expected).numpy())
    return f"{RUNS} folders"


CHECKS = {"sglang": check_sglang, "vllm": check_vllm, "trtllm": check_trtllm, "megatron": check_megatron}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for engine in CHECKS:
        parser.add_argument(f"--{engine}", type=Path)
    parser.add_argument("--only", choices=CHECKS, help=argparse.SUPPRESS)


def run(options: argparse.Namespace, report: Report) -> None:
    if options.only:
        path = vars(options)[options.only.replace("-", "_")]
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as scratch:
            print(CHECKS[options.only](path, np.random.default_rng(0), Path(scratch)))
        return
    check_engines("engine_writers", CHECKS, options, report)
