"""Coefficients of served steps, fitted to measured TPOT and TTFT, and what they predict of rows left out.

    pip install aiconfigurator-core           # Apache-2.0, NVIDIA; 114 MB, asked for by this command alone
    python -m benchmarks serving_fit --write  # placement/serving.json and docs/results/serving.md

The rows are of whole models served by vLLM, SGLang and TensorRT-LLM (`silicon_sample.csv`), prefill and decode on the
same devices ("agg"); repeated rows count once, by their median. Rows of disaggregated serving are left out: their TTFT
holds the queue of another pool. Coefficients are of each engine and GPU, none below 0, drawn to 1 where rows do not
tell (terms of `placement/serving.py`). Every third of an engine's distinct configurations is left out and predicted.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from kernel_fit import compact, root_argument, tables_root
from runner import HERE, Report
from scipy.optimize import nnls

from moeplace.placement.kernels import GPUS
from moeplace.placement.model import DTYPE_BYTES
from moeplace.placement.serving import TERMS, Architecture, Load, step_terms
from moeplace.placement.steps import PHASES
from moeplace.placement.topology import PRESETS

FILE = HERE.parent / "placement" / "serving.json"
PAGE = "serving"
CONFIGS = {
    "deepseek-ai/DeepSeek-R1": "deepseek-ai--DeepSeek-R1",
    "deepseek-ai/DeepSeek-V3": "deepseek-ai--DeepSeek-V3",
    "MiniMaxAI/MiniMax-M2.5": "MiniMaxAI--MiniMax-M2.5",
    "openai/gpt-oss-120b": "openai--gpt-oss-120b",
    "Qwen/Qwen3-235B-A22B-FP8": "Qwen--Qwen3-235B-A22B-FP8",
    "moonshotai/Kimi-K2.5": "moonshotai--Kimi-K2.5",
    "Qwen/Qwen3.5-397B-A17B": "Qwen--Qwen3.5-397B-A17B",
    "zhipuai/GLM-5": "zai-org--GLM-5",
    "meta-llama/Llama-3.1-70B": "meta-llama--Meta-Llama-3.1-70B",
    "Qwen/Qwen3-32B": "Qwen--Qwen3-32B",
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama--Meta-Llama-3.1-8B",
}
"""Configurations of the models that rows are of."""
KNOWN = (
    "deepseek-ai--DeepSeek-V3",
    "MiniMaxAI--MiniMax-M2.5",
    "openai--gpt-oss-20b",
    "openai--gpt-oss-120b",
    "Qwen--Qwen3-30B-A3B",
    "Qwen--Qwen3-235B-A22B",
    "Qwen--Qwen3-Coder-480B-A35B-Instruct",
    "Qwen--Qwen3.5-397B-A17B",
    "moonshotai--Kimi-K2-Instruct",
    "zai-org--GLM-5",
)
"""Models whose work beside experts is estimated."""
STORED = {"fp8": 1.0, "fp8_block": 1.0, "nvfp4": DTYPE_BYTES["nvfp4"], "int4_wo": DTYPE_BYTES["int4"], "": 2.0}
FEWEST_ROWS = 45
MOST_ERROR = 0.4
"""Above it coefficients are shown, not kept."""
PRIOR = 0.03
"""Weight of a coefficient's distance from 1, beside one for each row's relative error."""
LAUNCHES = ("step", "layer", "sequence", "queue", "prompts")
"""Whose coefficients are drawn to nothing."""


def architecture(config: dict[str, Any]) -> Architecture:
    """What a model's configuration says of it."""
    text = config.get("text_config", config)
    hidden, layers, heads = text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]
    experts = text.get("num_local_experts") or text.get("num_experts") or text.get("n_routed_experts") or 0
    width = text.get("moe_intermediate_size") or text["intermediate_size"]
    dense_layers = text.get("first_k_dense_replace", 0) if experts else layers
    if text.get("kv_lora_rank"):
        latent, rope = text["kv_lora_rank"], text["qk_rope_head_dim"]
        query, plain, value = text.get("q_lora_rank") or 0, text["qk_nope_head_dim"], text["v_head_dim"]
        attention = hidden * query + (query or hidden) * heads * (plain + rope) + hidden * (latent + rope)
        attention += latent * heads * (plain + value) + heads * value * hidden
        kept, of_heads = latent + rope, heads * (plain + rope + value) // 2
    else:
        size = text.get("head_dim") or hidden // heads
        pairs = text.get("num_key_value_heads") or heads
        attention, kept, of_heads = hidden * size * (2 * heads + 2 * pairs), 2 * pairs * size, heads * size
    shared = (text.get("n_shared_experts") or 0) * width + (text.get("shared_expert_intermediate_size") or 0)
    moe_layers = layers - dense_layers
    dense = layers * attention + dense_layers * 3 * hidden * text.get("intermediate_size", 0)
    dense += moe_layers * 3 * hidden * shared + hidden * text["vocab_size"]
    return Architecture(
        layers=layers,
        hidden_size=hidden,
        dense_weights=float(dense),
        expert_weights=float(3 * hidden * width),
        moe_layers=moe_layers,
        experts=experts,
        top_k=text.get("num_experts_per_tok") or 0,
        kv_values=kept * layers,
        kv_shared=bool(text.get("kv_lora_rank")),
        attention_width=of_heads * layers,
    )


def load_of(row: dict[str, str]) -> Load:
    """How a row's model was run."""
    dense, expert = STORED[row["gemm_quant_mode"]], STORED[row["moe_quant_mode"]]
    if "gpt-oss" in row["model_path"]:
        dense, expert = 2.0, DTYPE_BYTES["mxfp4"]
    replicas = max(1, int(row["attention_dp_size"] or 1))
    return Load(
        sequences=float(row["batch_size"]),
        prompt=float(row["isl"]),
        output=float(row["osl"]),
        attention_shards=int(row["tp_size"]),
        expert_shards=max(1, int(row["moe_tp_size"])) * max(1, int(row["moe_ep_size"])),
        replicas=replicas,
        dense_bytes=dense,
        expert_bytes=expert,
        kv_bytes=1.0 if dense <= 1 else 2.0,
    )


FIELDS = (
    "backend",
    "system",
    "model_path",
    "precision",
    "isl",
    "osl",
    "batch_size",
    "tp_size",
    "attention_dp_size",
    "moe_tp_size",
    "moe_ep_size",
    "gemm_quant_mode",
    "moe_quant_mode",
)
MEASURED = {"decode": "silicon_tpot_ms", "prefill": "silicon_ttft_ms"}


def configurations(path: Path) -> list[dict[str, str]]:
    """Distinct served configurations, with the median of what was measured."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["mode"] == "agg" and row["tp_size"] and row["model_path"] in CONFIGS:
                found.setdefault(tuple(row[name] for name in FIELDS), []).append(row)
    result = []
    for rows in found.values():
        median = {name: np.median([float(row[name]) for row in rows if row[name]] or [0]) for name in MEASURED.values()}
        result.append(rows[0] | {name: str(value) for name, value in median.items()})
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    root_argument(parser)


def run(options: argparse.Namespace, report: Report) -> None:
    systems = tables_root(options.root).parent
    folder = systems.parent / "model_configs"

    def read(name: str) -> Architecture:
        return architecture(json.loads((folder / f"{name}_config.json").read_text(encoding="utf-8")))

    models = {name: read(config) for name, config in CONFIGS.items()}
    rows = configurations(systems / "silicon_sample.csv")
    boxes = {box.gpu: box for box in reversed(PRESETS.values())}
    known: dict[str, Any] = {}
    table = report.table("errors", ("engine", "GPU", "phase", "rows", "fitted %", "left out %"), {"rows": "d"})
    by_model: dict[tuple[str, str], list[float]] = {}
    every: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for engine, system in sorted({(row["backend"], row["system"]) for row in rows}):
        for phase in PHASES:
            mine = [row for row in rows if (row["backend"], row["system"]) == (engine, system)]
            mine = [row for row in mine if float(row[MEASURED[phase]]) > 0]
            if len(mine) < FEWEST_ROWS:
                continue
            box = boxes[GPUS[system]]
            terms = np.array([step_terms(phase, models[row["model_path"]], load_of(row), box) for row in mine])
            seconds = np.array([float(row[MEASURED[phase]]) for row in mine]) / 1e3
            held = np.arange(len(mine)) % 3 == 1
            coefficients = fitted(phase, terms[~held], seconds[~held])
            error = np.abs(terms @ coefficients / seconds - 1)
            left_out = float(np.median(error[held]))
            shown = f"{100 * left_out:.0f} ({100 * np.percentile(error[held], 90):.0f})"
            table.row(engine, GPUS[system], phase, len(mine), f"{100 * np.median(error[~held]):.0f}", shown)
            if left_out <= MOST_ERROR:
                entry = [[float(f"{value:.3g}") for value in coefficients], round(100 * left_out, 1)]
                known.setdefault(engine, {}).setdefault(GPUS[system], {})[phase] = entry
            every[phase].extend(error[held])
            for row, one in zip([row for row, out in zip(mine, held, strict=True) if out], error[held], strict=True):
                by_model.setdefault((row["model_path"], phase), []).append(one)
    total = report.table("by model", ("model", "TPOT %", "TTFT %", "rows"), {"rows": "d"})
    for name in sorted({name for name, _ in by_model}):
        both = [100 * float(np.median(by_model[name, phase])) for phase in PHASES]
        total.row(name, *both, len(by_model[name, "decode"]))
    total.row("all", *(100 * float(np.median(every[phase])) for phase in PHASES), len(every["decode"]))
    if options.write:
        text = "fitted to measured rows of aiconfigurator-core (Apache-2.0, NVIDIA CORPORATION & AFFILIATES)"
        facts = {name.partition("--")[2]: read(name)._asdict() for name in KNOWN}
        FILE.write_text(compact({"source": text, "models": facts, "engines": known}), "utf-8")


def fitted(phase: Any, terms: Any, seconds: Any) -> Any:
    """Coefficients, none below 0, of least relative error."""
    scale = np.sqrt(PRIOR * len(seconds))
    target = np.array([0.0 if name in LAUNCHES else 1.0 for name in TERMS[phase]])
    # A launch is drawn to nothing by what it explains of a step.
    size = np.array([np.median(column / seconds) for column in terms.T])
    unit = np.array([of if name in LAUNCHES else 1.0 for name, of in zip(TERMS[phase], size, strict=True)])
    prior = np.diag(scale * np.where(target > 0, np.minimum(1.0, size + 0.05), 0.1 * unit))
    left = np.vstack([terms / seconds[:, None], prior])
    right = np.concatenate([np.ones(len(seconds)), prior @ target])
    return nnls(left, right)[0]
