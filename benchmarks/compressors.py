"""Error of one MoE layer's output under compressors of the all-to-all, at equal bytes, on held-out text of a trained model.

    python -m benchmarks compressed_training --out runs/lsh --text TEXT/*.txt --save --runs plain
    python -m benchmarks compressors --out runs/lsh --text TEXT/*.txt --checkpoint runs/lsh/plain-0

Each rank's batch (--batch sequences) is compressed for itself, as in training; experts stand in index order on --devices. Bytes are
those of rows between devices there and back, over those of plain dispatch in float32. Error: root of the mean square of the
difference to the exact output over that of the output; the mean over layers. LSH stands at several settings; int8 sends each row as
one float32 scale and a byte an entry; top-k sends the largest entries as float32 with 16-bit places. Both treat results alike.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from compressed_training import add_model_arguments, load_domains, spread_model
from runner import Report
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers.utils import logging

from moeplace.runtime import LSHCompression, PlacedExperts, load_checkpoint
from moeplace.runtime.moe.data_parallel import expert_layers
from moeplace.runtime.moe.lsh import CompressedDispatcher

Row = tuple[str, float, float]
"""Compressor, bytes over plain, error."""

Given = tuple[PlacedExperts, Tensor, Tensor, Tensor]
"""A layer, and [T, D] tokens, [T, K] experts and [T, K] weights that reached it."""


def recorded(model: torch.nn.Module, tokens: Tensor) -> list[Given]:
    """What reaches each layer's experts."""
    seen: list[Given] = []

    def note(module: Any, given: Any) -> None:
        x, ids, weights = given[:3]
        seen.append((module, x.reshape(-1, x.shape[-1]), ids.reshape(-1, ids.shape[-1]), weights.reshape(ids.shape)))

    hooks = [layer.register_forward_pre_hook(note) for _, layer in expert_layers(model)]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return seen


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def exact_of(given: Given) -> Tensor:
    layer, x, ids, weights = given
    result: Tensor = layer(x, ids, weights)
    return result


def lsh(given: Given, settings: LSHCompression, devices: int) -> tuple[float, float]:
    """(bytes over plain, error). Rows are counted between `devices`, though all experts are computed here."""
    layer, x, ids, weights = given
    exact = exact_of(given)
    device = ids * devices // layer.num_experts
    copies = int((torch.nn.functional.one_hot(device, devices).sum(dim=1) > 0).sum())
    # The dispatcher sees one device, to which plain dispatch sends each token once.
    settings = replace(settings, rate=settings.rate * copies / len(x))
    plain = layer.dispatcher
    layer.dispatcher = CompressedDispatcher(plain, layer.mesh, settings, layer.layer, x.shape[1], lambda: 0)
    layer.put_in_force(layer.plan, layer.placement)
    found = layer(x, ids, weights)
    seen = layer.dispatcher.statistics
    layer.dispatcher = plain
    assert seen is not None
    alone = seen.pairs - seen.clustered
    return (seen.clusters + alone) / copies, relative(found, exact)


def by_rows(given: Given, squeeze: Callable[[Tensor], Tensor], devices: int) -> float:
    """Error when rows are squeezed on the way there and, summed by device, on the way back."""
    layer, x, ids, weights = given
    device = ids * devices // layer.num_experts
    total = torch.zeros_like(x)
    for number in range(devices):
        here = torch.where(device == number, weights, 0.0)
        total += squeeze(layer(squeeze(x), ids, here))
    return relative(total, exact_of(given))


def int8(row_TD: Tensor) -> Tensor:
    scale = row_TD.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    return (row_TD / scale).round() * scale


def top_k(share: float) -> Callable[[Tensor], Tensor]:
    def squeeze(row_TD: Tensor) -> Tensor:
        kept = max(1, int(share * row_TD.shape[1] * 4 / 6))
        places = row_TD.abs().topk(kept, dim=1).indices
        return torch.zeros_like(row_TD).scatter_(1, places, row_TD.gather(1, places))

    return squeeze


def mean(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.fmean(a for a, _ in pairs), statistics.fmean(b for _, b in pairs)


def compare(every: list[Given], devices: int, seeds: int) -> list[Row]:
    def of(name: str, **fields: Any) -> Row:
        trials = [LSHCompression(**fields, seed=seed) for seed in range(seeds)]
        return name, *mean([lsh(given, settings, devices) for given in every for settings in trials])

    hidden = every[0][1].shape[1]
    share8 = (hidden + 4) / (4 * hidden)
    rows = [of(f"LSH, residual {kind}", rate=0.2, residual=kind) for kind in ("none", "plain", "scaled")]
    rows += [of(f"LSH, scaled, rate {rate:.0%}", rate=rate, residual="scaled") for rate in (share8, 0.5)]
    rows += [of(f"LSH, scaled, {n} hashes", rate=0.2, residual="scaled", hashes=n) for n in (1, 2, 3, 4)]
    rows += [
        of(f"LSH, scaled, dimension {d}, {h} hashes", rate=0.2, residual="scaled", dimension=d, hashes=h)
        for d, h in ((1, 10), (2, 8), (4, 6), (8, 4), (16, 4), (32, 3), (64, 3), (hidden, 1), (hidden, 3))
    ]
    rows += [of(f"LSH, none, dimension {d}", rate=0.2, residual="none", dimension=d, hashes=2) for d in (2, 8, 32)]
    for share in (0.2, share8):
        squeeze = top_k(share)
        rows.append(
            (f"top-k, {share:.0%}", share, statistics.fmean(by_rows(given, squeeze, devices) for given in every))
        )
    rows.append(("int8", share8, statistics.fmean(by_rows(given, int8, devices) for given in every)))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="that the benchmark compressed_training wrote with --save"
    )
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--senders", type=int, default=4, help="batches to measure")
    parser.add_argument("--seeds", type=int, default=8, help="rotations to average over")


def run(options: argparse.Namespace, report: Report) -> None:
    options.load = None
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    domains, tokenizer = load_domains(options)
    model = spread_model(options, tokenizer, init_device_mesh("cpu", (1,)), None)
    load_checkpoint(options.checkpoint, model)
    every: list[Given] = []
    for sender in range(options.senders):
        places = range(sender * options.batch, sender * options.batch + len(domains))
        parts = [domain.held_out[i % len(domain.held_out)] for i, domain in zip(places, domains, strict=True)]
        every += recorded(model.train(False), torch.stack((parts * options.batch)[: options.batch]))
    formats = {"bytes of plain": ".1%", "error of the output": ".3f"}
    table = report.table("Error of one layer's output", ("compressor", *formats), formats)
    with torch.no_grad():
        for row in compare(every, options.devices, options.seeds):
            table.row(*row)
    dist.destroy_process_group()
