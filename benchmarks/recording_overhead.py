"""What recording costs: forward passes of one model with and without it, interleaved, by mode.

    python -m benchmarks recording_overhead [--pairs 40]

The model is an OLMoE of 8 layers of 32 experts, top-2, hidden size 192; a step is a batch of 4,096 tokens. A pair is one
forward with recording and one without, in random order, so that other work on the machine falls on both alike; the
figure of a mode is the median ratio over pairs, with a bootstrap confidence interval. A recorded forward is charged with
all of its work: in token mode it ends when its tokens have been written, though in use the next forward would run
meanwhile. CPU time, of all threads, is the steadier figure on a machine that others load. The end of the block (the
last shard, the statistics file) is timed apart: it is paid once a recording.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from runner import Report
from transformers import OlmoeConfig, OlmoeForCausalLM

from moeplace.profiler.profile import profile

SEQUENCE = 256


def build(args: argparse.Namespace) -> OlmoeForCausalLM:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=4096,
        hidden_size=args.hidden,
        intermediate_size=max(16, args.hidden * 2 // 3 // 16 * 16),
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 32),
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        max_position_embeddings=SEQUENCE,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return OlmoeForCausalLM(config).to(args.device).eval()


def seconds(forward: Callable[[], object], device: str) -> tuple[float, float]:
    """(wall, CPU of all threads) seconds of one forward. CPU time tells overhead where others load the machine."""
    if device != "cpu":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    forward()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    rng = np.random.default_rng(seed)
    draws = np.median(rng.choice(values, size=(4000, len(values))), axis=1)
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def measure(
    model: OlmoeForCausalLM, batches: list[torch.Tensor], mode: str, args: argparse.Namespace
) -> tuple[object, ...]:
    """Pairs of forwards under one recorder, which is switched off for the unrecorded half of each pair."""
    rng = np.random.default_rng(0)
    recorded, plain = np.empty((args.pairs, 2)), np.empty((args.pairs, 2))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), contextlib.ExitStack() as stack:
        recorder = stack.enter_context(profile(model, Path(folder) / "out", mode=mode))  # type: ignore[arg-type]
        hooks = [module._forward_pre_hooks.copy() for module in model.modules()]
        after = [module._forward_hooks.copy() for module in model.modules()]

        def switch(on: bool) -> None:
            for module, before, behind in zip(model.modules(), hooks, after, strict=True):
                module._forward_pre_hooks.clear()
                module._forward_hooks.clear()
                if on:
                    module._forward_pre_hooks.update(before)
                    module._forward_hooks.update(behind)

        for pair in range(-args.warmup, args.pairs):
            tokens = batches[pair % len(batches)]
            for on in rng.permutation([True, False]):
                switch(bool(on))

                def forward(tokens: torch.Tensor = tokens, written: bool = bool(on) and mode == "tokens") -> None:
                    model(input_ids=tokens, logits_to_keep=1)
                    while written and recorder.tokens < recorder.steps * tokens.numel():
                        time.sleep(1e-4)

                spent = seconds(forward, args.device)
                if pair >= 0:
                    (recorded if on else plain)[pair] = spent
        switch(True)
        clock = time.perf_counter()
        stack.close()
        ending = time.perf_counter() - clock
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    ratio = recorded / plain - 1.0
    tokens_recorded = recorder.tokens
    wall, cpu = (interval(ratio[:, column]) for column in (0, 1))
    return (
        mode,
        *(float(np.median(ratio[:, 0])), *wall),
        *(float(np.median(ratio[:, 1])), *cpu),
        float(np.median(plain[:, 0]) * 1e3),
        ending * 1e3,
        size / tokens_recorded,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=4096, help=f"a forward, in sequences of {SEQUENCE}")
    parser.add_argument("--pairs", type=int, default=40, help="of forwards, a mode")
    parser.add_argument("--warmup", type=int, default=3, help="pairs that are not counted")
    parser.add_argument("--threads", type=int, default=None, help="of torch (default: its own choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(options: argparse.Namespace, report: Report) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    model = build(options)
    rows = max(1, options.tokens // SEQUENCE)
    batches = [torch.randint(4096, (rows, SEQUENCE), device=options.device) for _ in range(8)]
    formats = {
        "mode": "",
        "overhead": "+.2%",
        "from": "+.2%",
        "to": "+.2%",
        "CPU time": "+.2%",
        "CPU from": "+.2%",
        "CPU to": "+.2%",
        "forward ms": ".1f",
        "end ms": ".0f",
        "bytes a token": ".1f",
    }
    table = report.table("overhead, with 95 % intervals", formats, formats)
    for mode in ("counts", "tokens"):
        table.row(*measure(model, batches, mode, options))
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    report.note("machine", f"{options.device}, {threads} threads, load average {load:.1f}")
