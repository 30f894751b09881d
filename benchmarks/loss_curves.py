"""Held-out loss over long runs of several seeds, with and without compression: a table and a figure.

    python -m benchmarks compressed_training --resume --out runs/lsh ... --runs plain:seed=0 int4:rows=int4,seed=0 ...
    python -m benchmarks loss_curves --out runs/lsh --runs plain int4:rows=int4 ... --figure --write

Reads the curves that `--resume` keeps; runs without their seed, which are `--seeds`. Bytes are of rows' values over
bfloat16's, rows computed over all pairs of a token and an expert, both means over a run. Spread: the largest loss of a
seed less the smallest. A run that has not come to the last step is told by the step that it has come to.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from compressed_training import SEEN, STEP, compression_from, run_of
from runner import PAGES, Report

from moeplace.runtime.moe.compression import quantized_rows

PAGE = "lsh"
LOSS = STEP + 2
SENT = STEP + 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="of compressed_training")
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME[:field=value,...]", help="plain first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hidden", type=int, default=128, help="as of compressed_training")
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 600, 900, 1200, 1500], help="to show")
    parser.add_argument("--title", default="Loss of three seeds", help="of the table")
    parser.add_argument("--figure", metavar="NAME", help="draw NAME.svg beside the page; needs matplotlib")


def curve_of(out: Path, name: str, seed: int) -> list[list[Any]]:
    path = out / f"unfinished-{name}-{seed}" / "curve.json"
    found: list[list[Any]] = json.loads(path.read_text()) if path.is_file() else []
    return found


def size_of(text: str, entries: list[list[Any]], hidden: int) -> tuple[float, float]:
    """(bytes of values over bfloat16's, rows computed over pairs), means of a run."""

    _, fields = run_of(text)
    # Later entries tell of the last pass that compressed.
    until = fields.get("until", entries[-1][STEP] if entries else 0)

    def mean(above: str, below: str, uncompressed: float = 1.0) -> float:
        places = [SENT + SEEN.index(key) for key in (above, below)]
        return statistics.fmean(
            entry[places[0]] / entry[places[1]] if entry[STEP] <= until else uncompressed for entry in entries
        )

    kept = {key: value for key, value in fields.items() if key not in ("after", "until")}
    settings = compression_from(kept, 0)
    if settings is None or not entries:
        return 1.0, 1.0
    rows = quantized_rows(settings)
    formats = (None, None) if rows is None else (rows.dispatch, rows.combine)
    size = sum(2 * hidden if form is None else form.row_bytes(hidden) for form in formats) / (4 * hidden)
    computed = 1.0 if settings is rows else mean("rows_computed", "pairs")
    return size * mean("sent_rows", "plain_rows", 1.0 / size), computed


def draw(by_step: dict[str, dict[int, dict[int, float]]], figure: Path) -> None:
    """Each run's loss less the mean of plain's over the seeds: a thin line a seed, a thick one for their mean."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moeplace"
    from matplotlib import pyplot as plt

    plain = next(iter(by_step.values()))
    base = {
        step: statistics.fmean(losses[step] for losses in plain.values())
        for step in set.intersection(*(set(losses) for losses in plain.values()))
    }
    drawing, axes = plt.subplots(figsize=(9.6, 4.0))
    for (name, seeds), colour in zip(by_step.items(), plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False):
        for losses in seeds.values():
            steps = sorted(set(losses) & set(base))
            axes.plot(steps, [losses[step] - base[step] for step in steps], color=colour, linewidth=0.6, alpha=0.6)
        steps = sorted(set(base).intersection(*(set(losses) for losses in seeds.values())))
        means = [statistics.fmean(losses[step] for losses in seeds.values()) - base[step] for step in steps]
        axes.plot(steps, means, color=colour, linewidth=2, label=f"{name}, mean of {len(seeds)} seeds")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("held-out loss less plain's mean, nats a token")
    axes.legend(fontsize=8)
    drawing.savefig(figure, format="svg", metadata={"Date": None}, facecolor="white", bbox_inches="tight")


def run(options: argparse.Namespace, report: Report) -> None:
    curves = {
        run_of(text)[0]: {
            seed: curve for seed in options.seeds if (curve := curve_of(options.out, run_of(text)[0], seed))
        }
        for text in options.runs
    }
    by_step = {
        name: {seed: {entry[STEP]: entry[LOSS] for entry in curve} for seed, curve in seeds.items()}
        for name, seeds in curves.items()
    }
    percent = {"bytes": ".0%", "rows computed": ".0%"}
    at = [f"{step:,}" for step in options.steps]
    table = report.table(options.title, ("run", *percent, *at, "mean", "spread", "less plain"), percent)
    plain: dict[int, float] = {}
    last = options.steps[-1]
    for text in options.runs:
        name = run_of(text)[0]
        losses = by_step[name]
        size = size_of(text, [entry for curve in curves[name].values() for entry in curve], options.hidden)
        cells = [
            ", ".join(f"{part[step]:.3f}" if step in part else "-" for part in losses.values())
            for step in options.steps
        ]
        done = {seed: part[last] for seed, part in losses.items() if last in part}
        plain = plain or done
        paired = [loss - plain[seed] for seed, loss in done.items() if seed in plain]
        table.row(
            name, *size, *cells,
            f"{statistics.fmean(done.values()):.3f}" if done else "-",
            f"{max(done.values()) - min(done.values()):.3f}" if len(done) > 1 else "-",
            ", ".join(f"{difference:+.3f}" for difference in paired) or "-",
        )  # fmt: skip
    if options.figure:
        draw(by_step, PAGES / f"{options.figure}.svg")
