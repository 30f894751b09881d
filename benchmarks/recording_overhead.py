"""What recording costs: forward passes of one model with and without it, interleaved, by mode.

    python benchmarks/recording_overhead.py [--pairs 40] [--json]

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
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
) -> dict[str, Any]:
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
    return {
        "mode": mode,
        "overhead": float(np.median(ratio[:, 0])),
        "overhead_interval": interval(ratio[:, 0]),
        "cpu_overhead": float(np.median(ratio[:, 1])),
        "cpu_overhead_interval": interval(ratio[:, 1]),
        "forward_ms": float(np.median(plain[:, 0]) * 1e3),
        "end_ms": ending * 1e3,
        "bytes_per_token": size / tokens_recorded,
        "pairs": args.pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=4096, help=f"a forward, in sequences of {SEQUENCE}")
    parser.add_argument("--pairs", type=int, default=40, help="of forwards, a mode")
    parser.add_argument("--warmup", type=int, default=3, help="pairs that are not counted")
    parser.add_argument("--threads", type=int, default=None, help="of torch (default: its own choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = build(args)
    rows = max(1, args.tokens // SEQUENCE)
    batches = [torch.randint(4096, (rows, SEQUENCE), device=args.device) for _ in range(8)]
    results = [measure(model, batches, mode, args) for mode in ("counts", "tokens")]
    if args.json:
        print(json.dumps({"threads": torch.get_num_threads(), "device": args.device, "modes": results}))
        return
    print(f"{args.device}, {torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
    print(
        f"{'mode':8} {'overhead (95 % interval)':32} {'CPU time (95 % interval)':32} {'forward':>10} {'end':>9} {'bytes/token':>12}"
    )
    for row in results:
        columns = [
            f"{row[name]:+.2%} ({row[f'{name}_interval'][0]:+.2%} to {row[f'{name}_interval'][1]:+.2%})"
            for name in ("overhead", "cpu_overhead")
        ]
        print(
            f"{row['mode']:8} {columns[0]:32} {columns[1]:32} {row['forward_ms']:7.1f} ms {row['end_ms']:6.0f} ms "
            f"{row['bytes_per_token']:12.1f}"
        )


if __name__ == "__main__":
    main()
