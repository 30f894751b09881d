"""Error of one MoE layer's output under compressors of the all-to-all, on held-out text of a trained model.

    python -m benchmarks compressed_training --out runs/lsh --text TEXT/*.txt --save --runs plain
    python -m benchmarks compressors --out runs/lsh --text TEXT/*.txt --checkpoint runs/lsh/plain-0

Each rank's batch (--batch sequences) is compressed for itself, as in training; experts stand in index order on
--devices. Rows are those between devices, over those of plain dispatch; bytes those of their values there and back,
over bfloat16's. Error: root of the mean square of the difference to the exact output over that of the output; the mean
over layers, and for LSH over rotations. Top-k sends the largest entries as bfloat16 with 16-bit places, results alike.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import torch
import torch.distributed as dist
from compressed_training import add_trained_arguments, trained_model
from emulated_devices import PartlyCompressed
from runner import Report
from torch import Tensor

from moeplace.runtime import LSHCompression, PlacedExperts, QuantizedRows
from moeplace.runtime.moe.compression import WireDtype
from moeplace.runtime.moe.data_parallel import expert_layers

Row = tuple[str, float, float, float]
"""Compressor, rows over plain, bytes over bfloat16, error."""

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


def compressed(given: Given, settings: LSHCompression | QuantizedRows, devices: int) -> tuple[float, float, float]:
    """(rows over plain, bytes over bfloat16, error). Rows travel between `devices`, all of them this process."""
    layer, x, ids, weights = given
    carrying = PartlyCompressed(layer, settings, devices)
    found = carrying(x, ids, weights)
    seen, width = carrying.dispatcher.statistics, x.shape[1]  # type: ignore[attr-defined]
    rows = settings if isinstance(settings, QuantizedRows) else settings.rows
    formats = (None, None) if rows is None else (rows.dispatch, rows.combine)
    row_bytes = sum(2 * width if form is None else form.row_bytes(width) for form in formats)
    return seen.rate, seen.rate * row_bytes / (4 * width), relative(found, exact_of(given))


def by_rows(given: Given, squeeze: Callable[[Tensor], Tensor], devices: int) -> float:
    """Error when rows are squeezed on the way there and, summed by device, on the way back."""
    layer, x, ids, weights = given
    device = ids * devices // layer.num_experts
    total = torch.zeros_like(x)
    for number in range(devices):
        here = torch.where(device == number, weights, 0.0)
        total += squeeze(layer(squeeze(x), ids, here))
    return relative(total, exact_of(given))


def top_k(share: float) -> Callable[[Tensor], Tensor]:
    def squeeze(row_TD: Tensor) -> Tensor:
        kept = max(1, int(share * row_TD.shape[1] * 2 / 4))
        places = row_TD.abs().topk(kept, dim=1).indices
        return torch.zeros_like(row_TD).scatter_(1, places, row_TD.gather(1, places))

    return squeeze


def compare(every: list[Given], devices: int, seeds: int) -> list[Row]:
    def of(name: str, settings: LSHCompression | QuantizedRows) -> Row:
        trials = [settings]
        if isinstance(settings, LSHCompression):
            trials = [replace(settings, seed=seed) for seed in range(seeds)]
        found = [compressed(given, trial, devices) for given in every for trial in trials]
        rows, size, error = (statistics.fmean(column) for column in zip(*found, strict=True))
        return name, rows, size, error

    def lsh(name: str, **fields: Any) -> Row:
        return of(f"LSH, {name}", LSHCompression(**fields))

    hidden = every[0][1].shape[1]
    rows = [lsh(f"residual {kind}", residual=kind) for kind in ("none", "plain", "scaled")]
    for rate in (0.2, 0.35, 0.5):
        rows += [lsh(f"rate {rate:.0%}, {n} Lloyd steps", rate=rate, lloyd_steps=n) for n in (0, 1, 2, 6)]
    rows += [lsh(f"error bound 0.5, {n} Lloyd steps", error_bound=0.5, lloyd_steps=n) for n in (0, 2)]
    rows += [lsh(f"{n} hashes", hashes=n) for n in (1, 2, 3)]
    rows += [
        lsh(f"dimension {d}, {h} hashes", dimension=d, hashes=h)
        for d, h in ((1, 10), (4, 6), (8, 4), (32, 3), (64, 3), (hidden, 1))
    ]
    for dtype in get_args(WireDtype):
        rows.append(of(dtype, QuantizedRows.of(dtype)))
    for rate, dtype in ((0.2, "int8"), (0.35, "int8"), (0.5, "int4"), (0.7, "int4")):
        rows.append(lsh(f"rate {rate:.0%}, {dtype}", rate=rate, rows=QuantizedRows.of(dtype)))
    for share in (0.2, 0.5):
        errors = [by_rows(given, top_k(share), devices) for given in every]
        rows.append((f"top-k, {share:.0%}", 1.0, share, statistics.fmean(errors)))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trained_arguments(parser)
    parser.add_argument("--seeds", type=int, default=2, help="rotations to average over")


def run(options: argparse.Namespace, report: Report) -> None:
    model, batches = trained_model(options)
    every: list[Given] = []
    for tokens in batches:
        every += recorded(model.train(False), tokens)
    formats = {"rows": ".1%", "bytes of bfloat16": ".1%", "error of the output": ".3f"}
    table = report.table("Error of one layer's output", ("compressor", *formats), formats)
    with torch.no_grad():
        for row in compare(every, options.devices, options.seeds):
            table.row(*row)
    dist.destroy_process_group()
