"""Mutated configs of released models against `ModelSpec.from_config`: the typed error or a model, in bounded time.

    python -m benchmarks fuzz_configs --count 100000 --seed 0

Each input is the config of a released model with one to four changes: a value put at its limits or of another type, a
field dropped, doubled, moved into another part, or one that means something to other models added. An input fails when
anything but InputError comes out, or when reading takes more than a second of processor time. The run fails where any
did.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from runner import Report

import moeplace as mp
from moeplace.placement import model_families as table
from moeplace.placement.model_config import read_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.released_configs import AWQ, FP8_BLOCK, GPTQ, INT4_GROUP_32, NVFP4, RELEASED, compressed

SLOW = 1.0
CONFIGS = [json.dumps(config) for config, _ in RELEASED.values()]
FIELDS = sorted(
    {name for names in table.UNKNOWN[:11] for name in names}
    | {*table.WORDS, *table.PATTERNS, *table.FLAGS, *table.INDICES, *table.DENSE_HEAD, *table.DENSE_INDICES}
    | {*table.STEPS, table.PERIOD, table.OFFSET, table.FIRST, table.LAST, *table.MTP_LAYERS, *table.LAYER_BY_LAYER}
    | {*table.LANGUAGE_PARTS, "quantization_config", "expert_dtype", "dtype", "topk_method", "quantization", "ignore"}
    | {"model_type", "config_groups", "targets", "weights", "dynamic", "extra_config", "quantized_layers", "bits"}
)
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 2**31, 2**63, 10**40, 0.5, -0.0, float("inf"), float("nan"), "", "4", "moe",
    "MEM*", "1,2,3", ",", "re:(a+)+$", "re:[", "re:.*experts.*", "*", "[", "fp4", "torch.float32", [], [[]], [0, 1],
    [1] * 61, [None] * 8, ["sparse"] * 48, [-1], [10**9], ["Linear"], [{}], {}, {"0": {"num_experts": 3}}, {"a": None},
    {"quant_method": "fp8"}, AWQ, FP8_BLOCK, GPTQ, NVFP4, compressed(INT4_GROUP_32, ["re:.*"]), {"weight": [{}]},
    {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}}}, {"load_in_4bit": True},
    *table.FAMILIES,
]  # fmt: skip


def mutated(rng: np.random.Generator) -> Any:
    """A released config with one to four changes."""
    config = json.loads(CONFIGS[rng.integers(len(CONFIGS))])
    for _ in range(rng.integers(1, 5)):
        holders = [config]
        for holder in holders:
            holders.extend(value for value in holder.values() if isinstance(value, dict))
        holder = holders[rng.integers(len(holders))]
        names = list(holder) or ["model_type"]
        name, value = names[rng.integers(len(names))], copy.deepcopy(VALUES[rng.integers(len(VALUES))])
        change = rng.integers(5)
        if change == 0:
            holder.pop(name, None)
        elif change == 1:
            holder[FIELDS[rng.integers(len(FIELDS))]] = value
        elif change == 2:
            holders[rng.integers(len(holders))][name] = copy.deepcopy(holder.get(name))
        elif change == 3 and isinstance(holder.get(name), list):
            holder[name].insert(rng.integers(len(holder[name]) + 1), value)
        else:
            holder[name] = value
    return config


def outcome(config: Any) -> str:
    """`read`, `refused`, or how reading failed."""
    begin = time.process_time()
    try:
        mp.ModelSpec(**read_config(config).fields)
        result = "read"
    except mp.InputError as error:
        result = "refused" if str(error) else "FAILED: an empty message"
    except Exception as error:  # noqa: BLE001 - what is looked for
        result = f"FAILED: {type(error).__name__}: {str(error)[:100]}"
    taken = time.process_time() - begin
    return result if taken < SLOW else f"FAILED: {taken:.1f} s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace, report: Report) -> None:
    rng = np.random.default_rng(options.seed)
    outcomes: Counter[str] = Counter()
    examples: dict[str, str] = {}
    begin = time.perf_counter()
    for _ in range(options.count):
        config = mutated(rng)
        result = outcome(config)
        outcomes[result] += 1
        if result.startswith("FAILED"):
            examples.setdefault(result, json.dumps(config)[:2000])
    failed = sum(count for result, count in outcomes.items() if result.startswith("FAILED"))
    rate = options.count / (time.perf_counter() - begin)
    formats = {**dict.fromkeys(("inputs", "read", "refused", "failed"), ","), "inputs a second": ",.0f"}
    counts = (options.count, outcomes["read"], outcomes["refused"], failed, rate)
    report.table("fuzzing configs", ("what", *formats), formats).row("configs", *counts)
    if examples:
        report.failure = "\n".join(f"{result}: {config}" for result, config in list(examples.items())[:10])
