"""Coefficients of expert kernels and all-to-alls, fitted to measured tables, and what they predict of rows left out.

    pip install aiconfigurator-core          # Apache-2.0, NVIDIA; 114 MB, asked for by this command alone
    python -m benchmarks kernel_fit --write  # placement/kernels.json and docs/results/kernels.md

A row of a table is one GPU's time for the experts of a layer, or one phase of an all-to-all. Every third token count is
left out of the fits and predicted: "error" is the median of |predicted / measured - 1| over these. What rows are of is
said in `placement/kernels.py`, which reads and fits them.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from runner import HERE, Report

from moeplace.placement.kernels import FORM, Rows, errors, expert_rows, fitted, installed_root, predicted, tables
from moeplace.placement.topology import PRESETS

FILE = HERE.parent / "placement" / "kernels.json"
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
MOST_UNSEEN = 0.4
"""Error on shapes left out up to which coefficients for any shape are kept."""
PAGE = "kernels"
SOURCE = "fitted to the tables of aiconfigurator-core (Apache-2.0, NVIDIA CORPORATION & AFFILIATES)"


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


def entry(logs: Any, error: float) -> list[float]:
    """A row of the file: launch us, read GB/s, TFLOP/s, rows, passing GB/s, error %."""
    launch, per_byte, per_operation, rows, per_passed = np.exp(logs)
    figures = (launch * 1e6, 1e-9 / per_byte, 1e-12 / per_operation, rows, 1e-9 / per_passed, 100 * error)
    return [float(f"{figure:.3g}") for figure in figures]


def written(errors: Any) -> str:
    """The median of relative errors in percent, and their 90th percentile."""
    return f"{100 * np.median(errors):.1f} ({100 * np.percentile(errors, 90):.0f})"


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
                    cells.append(written(error))
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


def root_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--root`, of the tables."""
    parser.add_argument(
        "--root", type=Path, help="folder of the tables (default: where aiconfigurator-core keeps them)"
    )


def tables_root(root: Path | None) -> Path:
    """The folder named, else that of the installed package.

    Raises:
        SystemExit: neither is there.
    """
    if root is not None:
        return root
    found = installed_root()
    if found is None:
        sys.exit("the tables are not here: pip install aiconfigurator-core")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    root_argument(parser)


def run(options: argparse.Namespace, report: Report) -> None:
    root = tables_root(options.root)
    data = {"source": SOURCE, "experts": fit_experts(root, report)}
    if options.write:
        FILE.write_text(compact(data), encoding="utf-8")


def compact(data: Any, indent: int = 0) -> str:
    """JSON with a list a line."""
    if not isinstance(data, dict):
        return json.dumps(data)
    pad = " " * (indent + 1)
    inner = ",\n".join(f"{pad}{json.dumps(key)}: {compact(value, indent + 1)}" for key, value in data.items())
    return f"{{\n{inner}\n{' ' * indent}}}" + ("\n" if indent == 0 else "")
