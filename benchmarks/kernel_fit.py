"""Coefficients of expert kernels and all-to-alls, fitted to measured tables, and what they predict of rows left out.

    pip install aiconfigurator-core          # Apache-2.0, NVIDIA; 114 MB, asked for by this command alone
    python -m benchmarks kernel_fit --write  # placement/kernels.json and docs/results/kernels.md

A row of a table is one GPU's time for the experts of a layer, or one phase of an all-to-all. Every third token count is
left out of the fits and predicted: "error" is the median of |predicted / measured - 1| over these.

Experts: rows of balanced routing, 2 to 64 ranks. Routing of DeepSeek-V3's shape on vLLM and SGLang is not balanced in
the tables: its tokens pass group-limited selection, where all groups tie, so that four of eight groups are taken, then
the four lowest experts beside the four that were meant. Rank 0, which was measured, then gets 5 of 8 choices on 8
ranks; rows are fitted with these counts. Shapes without a gate matrix are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from runner import HERE, Report
from scipy.optimize import least_squares

from moeplace.placement.model import DTYPE_BYTES
from moeplace.placement.topology import PRESETS

FILE = HERE.parent / "placement" / "kernels.json"
GPUS = {
    "a100_sxm": "a100-sxm",
    "a100_pcie": "a100-pcie",
    "h100_sxm": "h100-sxm",
    "h100_pcie": "h100-pcie",
    "h200_sxm": "h200-sxm",
    "b200_sxm": "b200-sxm",
    "b300_sxm": "b300-sxm",
    "gb200": "gb200",
    "gb300": "gb300",
    "l40s": "l40s",
    "rtx_pro_6000_server": "rtx-pro-6000",
}
# Types of the tables, the later of two of one type where a shape has both.
DTYPES = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8", "w4a16_mxfp4": "mxfp4", "nvfp4": "fp4"}
OTHER_KERNELS = re.compile("min_latency|nongated|situ")
WITHOUT_GATE = {(2688, 1856), (1024, 2688), (2048, 5120), (8192, 5120)}
MODELS = {
    "gpt-oss-20b mxfp4": (2880, 2880, 4, 32, "mxfp4"),
    "DeepSeek-V3 fp8": (7168, 2048, 8, 256, "fp8"),
    "Qwen3-235B fp8": (4096, 1536, 8, 128, "fp8"),
    "Qwen3-30B bf16": (2048, 768, 8, 128, "bf16"),
}
SHOWN_GPUS = ("h100-sxm", "h200-sxm", "b200-sxm", "gb200")
FORMS = {
    "tokens alone": "max(reading, pairs)",
    "tokens and experts hit": "max(reading, pairs + rows x experts hit)",
    "tiles of 16": "max(reading, tiles)",
    "tiles of 64": "",
    "tiles of 128": "",
}
FORM = "tokens and experts hit"
MOST_UNSEEN = 0.4
"""Error on shapes left out up to which coefficients for any shape are kept."""
PAGE = "kernels"
LOWEST, HIGHEST = np.log([1e-7, 1e-14, 1e-17, 1e-2, 1e-15]), np.log([1e-3, 1e-11, 1e-12, 512.0, 1e-9])


def tables(root: Path, pattern: str) -> Iterator[tuple[str, str, list[int], Path]]:
    """(GPU, engine or library, version as numbers, file) of every table of that name, by GPU and engine."""
    for path in sorted(root.glob(f"*/*/*/*/{pattern}")):
        gpu, _, engine, version = path.relative_to(root).parts[:4]
        if gpu in GPUS:
            yield GPUS[gpu], engine, [int(number) for number in re.findall(r"\d+", version)], path


# Experts.


@dataclass(frozen=True, eq=False)
class Rows:
    """Measured rows of one shape. seconds, tokens, pairs, hit, passed: [R]; counts: tokens of each expert of the rank.

    pairs: token-expert pairs of the rank. passed: those of all ranks, over which its kernels pass.
    """

    hidden_size: int
    ffn_size: int
    dtype: str
    tokens: Any
    seconds: Any
    passed: Any
    counts: list[Any]

    @property
    def pairs(self) -> Any:
        return np.array([one.sum() for one in self.counts])

    @property
    def hit(self) -> Any:
        return np.array([(one > 0).sum() for one in self.counts])

    @property
    def held(self) -> Any:
        """[R] whether the row is left out of fits."""
        return np.isin(self.tokens, np.unique(self.tokens)[1::3])

    def terms(self, form: str) -> tuple[Any, Any, Any, Any]:
        """[R] bytes read, operations of pairs, operations of one more row an expert hit, bytes passed over."""
        shape = self.hidden_size * self.ffn_size
        tile = int(form.split()[-1]) if form.startswith("tiles") else 1
        pairs = self.pairs if tile == 1 else np.array([np.ceil(one / tile).sum() * tile for one in self.counts])
        more = self.hit * (form == FORM)
        passed = self.passed * 2.0 * (self.hidden_size + self.ffn_size)
        return self.hit * 3.0 * shape * DTYPE_BYTES[self.dtype], pairs * 6.0 * shape, more * 6.0 * shape, passed


@cache
def balanced(tokens: int, experts: int, top_k: int, ranks: int, ties: bool) -> Any:
    """Tokens of each expert of rank 0, as the tables' routing deals them."""
    token, stride = np.arange(tokens)[:, None], -(-experts // top_k)
    first = token if tokens >= stride else (token * stride / tokens).astype(np.int64)
    ids = (first + np.arange(top_k) * stride) % experts
    if ties:
        lowest = np.tile(np.arange(top_k // 2 + 1), (tokens, 1))
        own = np.minimum(ids[:, :1], top_k // 2)
        ids = np.hstack([ids[:, : top_k // 2], lowest[lowest != own].reshape(tokens, -1)])
    return np.bincount(ids.ravel(), minlength=experts)[: experts // ranks].astype(float)


@cache
def power_law(tokens: int, experts: int, top_k: int, ranks: int, alpha: float) -> list[Any]:
    """Draws of the tokens of each expert of the fullest rank, as the tables' unequal routing is drawn."""
    rng, draws = np.random.default_rng(0), []
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
    for _ in range(20):
        power = 1.0 - alpha
        load = ((high**power - low**power) * rng.random(experts) + low**power) ** (1.0 / power)
        load = np.minimum(np.round(load / load.sum() * tokens * top_k), tokens).reshape(ranks, -1)
        draws.append(load[load.sum(axis=1).argmax()])
    return draws


def expert_rows(path: Path, engine: str, distribution: str = "balanced") -> dict[tuple[str, int, int], Rows]:
    """Rows of a table by dtype and shape, of the plainest kernel."""
    names = ("hidden_size", "inter_size", "topk", "num_experts", "moe_ep_size", "num_tokens", "latency")
    table = pq.read_table(path, columns=[*names, "moe_dtype", "kernel_source", "distribution", "moe_tp_size"])
    data = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    good = (data["moe_tp_size"] == 1) & (data["moe_ep_size"] >= 2) & (data["moe_ep_size"] <= 64)
    good &= data["distribution"] == distribution
    grouped: dict[tuple[str, int, int], dict[tuple[int, ...], list[float]]] = {}
    blocked = {
        (int(h), int(f))
        for h, f, t in zip(*(data[n] for n in (*names[:2], "moe_dtype")), strict=True)
        if t == "fp8_block"
    }
    for i in np.flatnonzero(good):
        dtype, (h, f, k, e, ranks, tokens, ms) = data["moe_dtype"][i], (data[name][i] for name in names)
        skipped = dtype == "fp8" and (h, f) in blocked
        if dtype not in DTYPES or skipped or (h, f) in WITHOUT_GATE or OTHER_KERNELS.search(data["kernel_source"][i]):
            continue
        key = int(tokens), int(e), int(k), int(ranks)
        grouped.setdefault((DTYPES[dtype], int(h), int(f)), {}).setdefault(key, []).append(float(ms))
    result = {}
    for (dtype, h, f), rows in grouped.items():
        keys = [key for key in rows if key[1] % key[3] == 0]
        if len(keys) < 40:
            continue
        ties = (h, f) == (7168, 2048) and engine != "trtllm"
        counts = [balanced(*key, ties and key[1] == 256) for key in keys]
        result[dtype, h, f] = Rows(
            h,
            f,
            dtype,
            np.array([key[0] for key in keys]),
            np.array([np.median(rows[key]) for key in keys]) * 1e-3,
            np.array([key[0] * key[2] for key in keys]),
            counts,
        )
    return result


def predicted(logs: Any, terms: tuple[Any, Any, Any, Any]) -> Any:
    """[R] seconds. logs: of launch, seconds a byte read, seconds an operation, rows, seconds a byte passed over."""
    launch, per_byte, per_operation, rows, per_passed = np.exp(logs)
    read, pairs, more, passed = terms
    return launch + np.maximum(read * per_byte, (pairs + more * rows) * per_operation) + passed * per_passed


def fitted(sets: Sequence[Rows], form: str = FORM, starts: int = 8) -> Any:
    """The logarithms that explain the rows not left out, by least squares of logarithms that outliers hardly move."""
    terms = [tuple(term[~rows.held] for term in rows.terms(form)) for rows in sets]
    joined: Any = tuple(np.concatenate(columns) for columns in zip(*terms, strict=True))
    logs = np.log(np.concatenate([rows.seconds[~rows.held] for rows in sets]))

    def residual(logs_of: Any) -> Any:
        return np.log(predicted(logs_of, joined)) - logs

    best = None
    for read, operation, passed in list(np.ndindex(2, 2, 2))[:starts]:
        start = np.log([2e-5, (4e-13, 2e-13)[read], (2e-15, 8e-15)[operation], 16.0, (1e-12, 1e-14)[passed]])
        found = least_squares(residual, start, loss="soft_l1", f_scale=0.1, bounds=(LOWEST, HIGHEST))
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    return best.x


def errors(logs: Any, rows: Rows, form: str = FORM) -> Any:
    """[R'] relative errors of rows left out."""
    return np.abs(predicted(logs, rows.terms(form)) / rows.seconds - 1)[rows.held]


def entry(logs: Any, error: float) -> list[float]:
    """A row of the file: launch us, read GB/s, TFLOP/s, rows, passing GB/s, error %."""
    launch, per_byte, per_operation, rows, per_passed = np.exp(logs)
    figures = (launch * 1e6, 1e-9 / per_byte, 1e-12 / per_operation, rows, 1e-9 / per_passed, 100 * error)
    return [float(f"{figure:.3g}") for figure in figures]


def fit_experts(root: Path, report: Report) -> dict[str, Any]:
    """Coefficients by GPU, engine, dtype and shape, and the tables of what they predict."""
    versions: dict[tuple[str, str], list[tuple[list[int], Path]]] = {}
    for gpu, engine, version, path in tables(root, "moe_perf.parquet"):
        versions.setdefault((gpu, engine), []).append((version, path))
    newest = {}
    result: dict[str, Any] = {}
    shown: dict[tuple[str, str, str], Rows] = {}
    any_shape = report.table(
        "any shape", ("GPU", "engine", "dtype", "shapes", "a shape measured %", "a shape left out %"), {"shapes": "d"}
    )
    for (gpu, engine), files in versions.items():
        # Of each dtype and shape the newest rows; the newest table may hold few.
        each = [(path, expert_rows(path, engine)) for _, path in sorted(files)]
        by_shape = {key: rows for _, found in each for key, rows in found.items()}
        path = max(each, key=lambda one: len(one[1]))[0] if by_shape else files[0][1]
        newest[gpu, engine] = path
        if not by_shape:
            continue
        dtypes: dict[str, Any] = {}
        for dtype in sorted({key[0] for key in by_shape}):
            mine = {(h, f): rows for (of, h, f), rows in by_shape.items() if of == dtype}
            own = {shape: fitted([rows]) for shape, rows in mine.items()}
            entries = {
                f"{h}x{f}": entry(own[h, f], float(np.median(errors(own[h, f], rows)))) for (h, f), rows in mine.items()
            }
            left_out = [
                float(np.median(errors(fitted([of for of in mine.values() if of is not rows], starts=2), rows)))
                for rows in mine.values()
                if len(mine) > 1
            ]
            unseen = float(np.median(left_out)) if left_out else 1.0
            anywhere = {"any": entry(fitted(list(mine.values())), unseen)} if unseen <= MOST_UNSEEN else {}
            dtypes[dtype] = anywhere | entries
            known = float(np.median([row[-1] for row in entries.values()]))
            any_shape.row(gpu, engine, dtype, len(mine), known, 100 * unseen if left_out else None)
            for model, (h, f, _, _, of) in MODELS.items():
                if gpu in SHOWN_GPUS and of == dtype and (h, f) in mine:
                    shown[gpu, engine, model] = mine[h, f]
        version = path.parent.name
        result.setdefault(gpu, {})[engine] = {"version": version, "dtypes": dtypes}
    show_experts(shown, report)
    show_unequal({key: newest[key[:2]] for key in shown}, shown, report)
    return result


def show_experts(shown: dict[tuple[str, str, str], Rows], report: Report) -> None:
    """The forms against one another, and each model's errors under the one that is used."""
    models = [name for name in MODELS if any(key[2] == name for key in shown)]
    table = report.table("experts", ("GPU", "engine", *(f"{model} %" for model in models), "roofline %"))
    by_form: dict[str, list[float]] = {form: [] for form in FORMS}
    for gpu, engine in dict.fromkeys(key[:2] for key in shown):
        cells, plain = [], []
        for model in models:
            rows = shown.get((gpu, engine, model))
            if rows is None:
                cells.append("-")
                continue
            for form in FORMS:
                logs = fitted([rows], form)
                error = errors(logs, rows, form)
                by_form[form].append(float(np.median(error)))
                if form == FORM:
                    cells.append(f"{100 * np.median(error):.1f} ({100 * np.percentile(error, 90):.0f})")
            box = next(box for box in PRESETS.values() if box.gpu == gpu)
            rate = box.compute * (box.fp8 if rows.dtype == "fp8" else 1.0)
            read, pairs, _, _ = rows.terms(FORM)
            roofline = np.maximum(read / box.memory_bandwidth, pairs / rate)
            plain.append(float(np.median(np.abs(roofline / rows.seconds - 1)[rows.held])))
        table.row(gpu, engine, *cells, f"{100 * np.median(plain):.0f}")
    forms = report.table("forms", ("form", "median %", "worst %", "above 10 %"), {"above 10 %": "d"})
    for form, medians in by_form.items():
        above = sum(median > 0.10 for median in medians)
        forms.row(form, 100 * float(np.median(medians)), 100 * max(medians), above)


def show_unequal(
    paths: dict[tuple[str, str, str], Path], shown: dict[tuple[str, str, str], Rows], report: Report
) -> None:
    """Rows of unequal routing, whose counts are not in the tables but drawn alike, by coefficients of equal ones."""
    table = report.table("unequal routing", ("engine", "power law 1.01 %", "power law 1.2 %", "rows"), {"rows": "d"})
    ratios: dict[tuple[str, float], list[float]] = {}
    for (_, engine, model), path in paths.items():
        h, f, k, e, dtype = MODELS[model]
        if model.startswith("DeepSeek"):
            continue
        logs = fitted([shown[_, engine, model]])
        for alpha in (1.01, 1.2):
            rows = expert_rows(path, engine, f"power_law_{alpha}").get((dtype, h, f))
            if rows is None:
                continue
            for i in range(len(rows.seconds)):
                if rows.passed[i] != rows.tokens[i] * k or len(rows.counts[i]) * 64 < e:
                    continue
                ranks = e // len(rows.counts[i])
                if ranks not in (8, 16) or rows.tokens[i] < 64:
                    continue
                drawn = power_law(int(rows.tokens[i]), e, k, ranks, alpha)
                passed = np.full(len(drawn), rows.passed[i])
                sample = replace(rows, passed=passed, counts=drawn, tokens=passed, seconds=passed)
                ratio = float(np.mean(predicted(logs, sample.terms(FORM)))) / rows.seconds[i]
                ratios.setdefault((engine, alpha), []).append(ratio - 1)
    for engine in dict.fromkeys(key[0] for key in ratios):
        first, second = (np.array(ratios[engine, alpha]) for alpha in (1.01, 1.2))
        table.row(
            engine,
            *(f"{100 * np.median(np.abs(one)):.1f} (mean {100 * one.mean():+.1f})" for one in (first, second)),
            len(first) + len(second),
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", type=Path, help="folder of the tables (default: where aiconfigurator-core keeps them)"
    )


def run(options: argparse.Namespace, report: Report) -> None:
    root = options.root
    if root is None:
        spec = find_spec("aiconfigurator_core")
        if spec is None or spec.origin is None:
            sys.exit("the tables are not here: pip install aiconfigurator-core")
        root = Path(spec.origin).parent / "systems" / "data"
    source = "fitted to the tables of aiconfigurator-core (Apache-2.0, NVIDIA CORPORATION & AFFILIATES)"
    data: dict[str, Any] = {"source": source}
    data["experts"] = fit_experts(root, report)
    if options.write:
        FILE.write_text(compact(data), encoding="utf-8")


def compact(data: Any, indent: int = 0) -> str:
    """JSON with a list a line."""
    if not isinstance(data, dict):
        return json.dumps(data)
    pad = " " * (indent + 1)
    inner = ",\n".join(f"{pad}{json.dumps(key)}: {compact(value, indent + 1)}" for key, value in data.items())
    return f"{{\n{inner}\n{' ' * indent}}}" + ("\n" if indent == 0 else "")
