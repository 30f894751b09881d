"""What readers of the tutorial and of the how-to pages have: records, checkpoints, servers that answer as engines do.

Sizes alone are smaller than on the pages.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from cli_runs import run
from engine_endpoints import EXPERTS, LAYERS, SLOTS, TOP_K, VLLM, SGLang, serving
from pages import code
from permute_models import build
from safetensors.torch import save_file
from service_runs import Server

import moeplace as mp

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [DOCS / "tutorial.md", *sorted((DOCS / "how-to").glob("*.md"))]
CONFIG = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": 32,
    "intermediate_size": 128,
    "torch_dtype": "bfloat16",
}
DEEPSEEK = {**CONFIG, "model_type": "deepseek_v3", "n_routed_experts": EXPERTS, "first_k_dense_replace": 1}
DEEPSEEK |= {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_nextn_predict_layers": 0}
QWEN = {**CONFIG, "model_type": "qwen3_moe", "num_experts": EXPERTS, "mlp_only_layers": [0], "decoder_sparse_step": 1}
SIZES = {"top_k": 2, "hidden_size": 64, "ffn_size": 32}
SMALLER = {"--nodes 4": "--devices-per-node 2", "--slots 288": f"--slots {SLOTS}", "--prefill 4096": "--prefill 256"}


@dataclass
class Setting:
    """What a page's reader has: files made in the folder, and what is written otherwise here.

    before: what happens in the world before the first command that begins so.
    """

    folder: Path
    replaced: dict[str, str] = field(default_factory=dict)
    before: dict[str, Callable[[], object]] = field(default_factory=dict)


def model_folder(folder: Path, config: dict[str, object]) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def example_record(setting: Setting) -> None:
    """Two layers of every eighth sequence of the example."""
    whole = mp.read_trace(ROOT / "examples" / "data" / "olmoe_small")
    rows = np.flatnonzero(whole.sequence % 8 == 0)
    trace = mp.RoutingTrace.from_arrays(whole.expert_ids[rows, :2], num_experts=32, sequence=whole.sequence[rows])
    mp.write_trace(trace, setting.folder / "record", model=mp.ModelSpec(**{**SIZES, "layers": 2, "experts": 32}))
    setting.replaced["--prefill 4096"] = "--prefill 256"


def stat_dump(path: Path, seed: int) -> None:
    """As SGLang's recorder writes it in mode stat; layer 0 is dense."""
    counts = torch.zeros(40, LAYERS, EXPERTS, dtype=torch.int32)
    counts[:32, 1:] = torch.randint(50, 900, (32, LAYERS - 1, EXPERTS), generator=torch.Generator().manual_seed(seed))
    torch.save({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, path)


def pass_dump(path: Path, plan: Path) -> None:
    """As the recorder of a server that runs the plan writes it in mode per_pass."""
    table = torch.arange(SLOTS).expand(LAYERS, SLOTS) % EXPERTS
    table = table.clone()
    table[1:] = torch.from_numpy(mp.Plan.load(plan).physical_to_logical.copy())
    torch.save({"records": [], "last_physical_to_logical_map": table}, path)


@contextlib.contextmanager
def sglang(setting: Setting) -> Iterator[None]:
    setting.replaced |= {**SMALLER, "/models/DeepSeek-V3": model_folder(setting.folder / "deepseek", DEEPSEEK)}
    stat_dump(setting.folder / "expert_distribution_recorder_1764400000.0.pt", 0)
    dump = setting.folder / "expert_distribution_recorder_1764500000.0_0.pt"
    setting.before["moeplace check"] = lambda: pass_dump(dump, setting.folder / "plan.json")
    recorder = setting.folder / "recorder"
    recorder.mkdir()
    with serving(SGLang(recorder)) as url:
        setting.replaced |= {"http://localhost:30000": f"{url} --folder {recorder}", "--seconds 60": "--seconds 0.1"}
        # One dump is little: what the page solves on are the reader's sixty seconds.
        setting.before["moeplace stats counts.npz"] = lambda: run(
            "import", setting.folder / "expert_distribution_recorder_1764400000.0.pt", "--model",
            setting.folder / "deepseek", "-o", setting.folder / "counts.npz",
        )  # fmt: skip
        yield


@contextlib.contextmanager
def vllm(setting: Setting) -> Iterator[None]:
    prompts = "".join(f"{'word ' * (5 + i % 7)}\n" for i in range(24))
    (setting.folder / "prompts.txt").write_text(prompts)
    setting.replaced |= {"/models/Qwen3-30B-A3B": model_folder(setting.folder / "qwen", QWEN)}
    setting.replaced |= {"--slots 144": f"--slots {SLOTS}", "--devices-per-node 8": "--devices-per-node 2"}
    with serving(VLLM()) as url:
        setting.replaced["http://localhost:8000"] = url
        yield


@contextlib.contextmanager
def tensorrt_llm(setting: Setting) -> Iterator[None]:
    setting.replaced |= {**SMALLER, "/models/DeepSeek-V3": model_folder(setting.folder / "deepseek", DEEPSEEK)}
    folder = setting.folder / "expert_statistics"
    folder.mkdir()
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": TOP_K}))
    rng = np.random.default_rng(0)
    for rank in range(2):
        counts = {
            f"{i}_{layer}": torch.from_numpy(rng.multinomial(80, rng.dirichlet(np.full(EXPERTS, 2.0))))
            for i in range(100, 108)
            for layer in range(1, LAYERS)
        }
        save_file(counts, folder / f"rank{rank}.safetensors")
    yield


@contextlib.contextmanager
def vllm_ascend(setting: Setting) -> Iterator[None]:
    setting.replaced |= {"/models/Qwen3-30B-A3B": model_folder(setting.folder / "qwen", QWEN)}
    setting.replaced |= {"--slots 144": f"--slots {SLOTS}", "--devices-per-node 8": "--devices-per-node 2"}
    loads = np.random.default_rng(0).integers(50, 900, size=(8, LAYERS - 1, EXPERTS))
    np.save(setting.folder / "loads.npy", loads)
    yield


@contextlib.contextmanager
def checkpoint(setting: Setting) -> Iterator[None]:
    model = build("mixtral", num_local_experts=4)
    model.save_pretrained(setting.folder / "model")
    spec = mp.ModelSpec.from_config(setting.folder / "model")
    ids = np.random.default_rng(0).integers(4, size=(400, spec.layers, 1))
    trace = mp.RoutingTrace.from_arrays(
        np.concatenate([ids, (ids + 1) % 4], 2), num_experts=4, sequence=np.arange(400) // 20
    )
    mp.write_trace(trace, setting.folder / "trace", model=spec)
    yield


@contextlib.contextmanager
def training(setting: Setting) -> Iterator[None]:
    (setting.folder / "examples").symlink_to(ROOT / "examples")
    setting.replaced |= {
        "--steps 40": "--steps 2 --batch 2 --record-tokens 2048 --text examples/train_moe.py",
        "python ": f"{sys.executable} ",
    }
    rng = np.random.default_rng(0)
    lines = [
        {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0, "num_tokens": 40}
        | {"topk": 2, "top_indices": [sorted(rng.permutation(8)[:2].tolist()) for _ in range(40)]}
        for step in range(8)
        for layer in range(1, 4)
    ]
    (setting.folder / "router_traces").mkdir()
    trace = setting.folder / "router_traces" / "router_trace_rank0.jsonl"
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    yield


@contextlib.contextmanager
def recorded_run(setting: Setting) -> Iterator[None]:
    """As a run of 64 experts on four ranks is recorded."""
    chosen = np.random.default_rng(0).permuted(np.tile(np.arange(64), (600, 2, 1)), axis=2)[:, :, :8]
    trace = mp.RoutingTrace.from_arrays(
        chosen,
        num_experts=64,
        sequence=np.arange(600) // 20,
        step=np.arange(600) // 100,
        source=np.arange(600) // 20 % 4,
    )
    mp.write_trace(trace, setting.folder / "trace")
    yield


@contextlib.contextmanager
def workloads(setting: Setting) -> Iterator[None]:
    setting.replaced |= {**SMALLER, "/models/DeepSeek-V3": model_folder(setting.folder / "deepseek", DEEPSEEK)}
    for seed, name in enumerate(("chat.pt", "code.pt")):
        stat_dump(setting.folder / name, seed)
    yield


@contextlib.contextmanager
def losing_a_node(setting: Setting) -> Iterator[None]:
    example_record(setting)
    cluster = "--topology h100-sxm --nodes 2 --devices-per-node 4 --slots 40"
    solved = f"solve record {cluster} --solver eplb --for sglang -o plan.json"
    assert run(*solved.split()).code == 0
    yield


@contextlib.contextmanager
def service(setting: Setting) -> Iterator[None]:
    setting.replaced |= SMALLER
    model = mp.ModelSpec(**{**SIZES, "layers": 3, "experts": EXPERTS, "moe_layers": (1, 2, 3), "name": "chat-model"})
    loads = np.random.default_rng(0).integers(50, 900, size=(8, 3, EXPERTS))
    statistics = mp.RoutingStatistics.from_counts(loads, moe_layers=(1, 2, 3), top_k=TOP_K, model=model)
    mp.write_statistics(statistics, setting.folder / "counts.npz")
    server = Server(str(setting.folder / "service.db"))
    try:
        client = server.client()
        client.add_model(model)
        client.add_topology(mp.Topology.preset("h100-sxm", devices_per_node=2), name="box")
        client.add_deployment("chat", "chat-model", "box", {"solver": "eplb", "seconds": 5})
        setting.replaced["http://127.0.0.1:8311"] = server.url
        yield
    finally:
        server.stop()


@contextlib.contextmanager
def example(setting: Setting) -> Iterator[None]:
    example_record(setting)
    setting.replaced["examples/data/olmoe_small"] = "record"
    yield


SETTINGS = {
    "sglang": sglang,
    "vllm": vllm,
    "tensorrt-llm": tensorrt_llm,
    "vllm-ascend": vllm_ascend,
    "checkpoint": checkpoint,
    "training": training,
    "torchtitan": recorded_run,
    "megatron": recorded_run,
    "deepspeed": recorded_run,
    "workloads": workloads,
    "losing-a-node": losing_a_node,
    "service": service,
    "tutorial": example,
    "worth-it": example,
}


def commands(page: Path) -> list[str]:
    """The command lines of a page's `sh` blocks, comments left out."""
    return [line.split("  #")[0].strip() for block in code(page, "sh") for line in block.splitlines() if line.strip()]
