"""What expert kernels were measured to take: coefficients by GPU, engine, dtype and shape.

They are fitted to the tables of `aiconfigurator-core` (`python -m benchmarks kernel_fit --write`, which also says how
well they predict token counts that the fit did not see) and stand in `kernels.json`. Where that package is installed
(`pip install "moeplace[kernels]"`), its table of the engine, GPU, type and shape is fitted instead, by the rows of so
many ranks as the cluster has. A device's experts take

    launch + passing * pairs of all devices
    + max((pairs + rows * experts hit) * flops / rate,  experts hit * bytes / bandwidth)

where every expert that is hit costs some rows of arithmetic beside its own, since tiles are padded. Counting tiles an
expert one by one, ceil(n_e / m), explains the tables no better than this mean does, for any tile m.

Tables are read as files: nothing of the package is imported or run. A row of a table is one GPU's time for the experts
of a layer, or one phase of an all-to-all (`transfers`). Every third token count is left out of a fit: its error is the
median of |predicted / measured - 1| over these.

Experts: rows of balanced routing, 2 to 64 ranks. Routing of DeepSeek-V3's shape on vLLM and SGLang is not balanced in
the tables: its tokens pass group-limited selection, where all groups tie, so that four of eight groups are taken, then
the four lowest experts beside the four that were meant. Rank 0, which was measured, then gets 5 of 8 choices on 8
ranks; rows are fitted with these counts. Shapes without a gate matrix are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._types import BoolArray, FloatArray
from .errors import FileFormatError
from .model import DTYPE_BYTES, ModelSpec
from .topology import ENGINES

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
FORM = "tokens and experts hit"
FEWEST_ROWS, FEWEST_ALIKE = 40, 12
"""Rows of a shape below which it is left out, and rows alike in ranks and experts below which all are fitted."""
MOST_BYTES, MOST_ROWS = 1 << 28, 5_000_000
"""Of one table: the largest known has 2 MB and 80,000 rows."""
LOWEST, HIGHEST = np.log([1e-7, 1e-14, 1e-17, 1e-2, 1e-15]), np.log([1e-3, 1e-11, 1e-12, 512.0, 1e-9])


def installed_root() -> Path | None:
    """The folder of the tables, None where the package is not installed."""
    spec = find_spec("aiconfigurator_core")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent / "systems" / "data"
    return root if root.is_dir() else None


def tables(root: Path, pattern: str) -> Iterator[tuple[str, str, list[int], Path]]:
    """(GPU, engine or library, version as numbers, file) of every table of that name, by GPU and engine."""
    for path in sorted(root.glob(f"*/*/*/*/{pattern}")):
        gpu, _, engine, version = path.relative_to(root).parts[:4]
        if gpu in GPUS:
            yield GPUS[gpu], engine, [int(number) for number in re.findall(r"\d+", version)], path


def read(path: Path, columns: Sequence[str] | None = None) -> dict[str, Any]:
    """A table's columns.

    Raises:
        FileFormatError: larger than any such table is, no table, or without a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        size = path.stat().st_size
        rows = pq.read_metadata(path).num_rows if size <= MOST_BYTES else 0
        if size > MOST_BYTES or rows > MOST_ROWS:
            raise FileFormatError(f"{path}: {size} bytes, {rows} rows; a table of kernels has at most {MOST_ROWS}")
        table = pq.read_table(path, columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise FileFormatError(f"{path} is not a table of kernels: {error}") from error
    absent = set(columns or ()) - set(table.column_names)
    if absent:
        raise FileFormatError(f"{path} has no column {', '.join(sorted(absent))}; reinstall aiconfigurator-core")
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


# Experts.


@dataclass(frozen=True, eq=False)
class Rows:
    """Measured rows of one shape. seconds, tokens, ranks, passed: [R]; counts: tokens of each expert of the rank.

    pairs: token-expert pairs of the rank. passed: those of all ranks, over which its kernels pass.
    """

    hidden_size: int
    ffn_size: int
    dtype: str
    tokens: FloatArray
    seconds: FloatArray
    passed: FloatArray
    ranks: FloatArray
    counts: list[FloatArray]

    @property
    def pairs(self) -> FloatArray:
        return np.array([one.sum() for one in self.counts])

    @property
    def hit(self) -> FloatArray:
        return np.array([(one > 0).sum() for one in self.counts], dtype=np.float64)

    @property
    def held_out(self) -> BoolArray:
        """[R] whether the row is left out of fits."""
        return np.isin(self.tokens, np.unique(self.tokens)[1::3])

    def nearest(self, experts: int, ranks: int) -> Rows:
        """The rows whose ranks hold next to as many experts as so many on so many ranks, of the number of ranks next to
        that; all where those are too few to fit."""
        holding = np.array([len(one) for one in self.counts])
        distance = np.abs(np.log(holding * ranks / experts)) + 1e-3 * np.abs(np.log(self.ranks / ranks))
        chosen = np.flatnonzero(distance <= distance.min() + 1e-9)
        if len(chosen) < FEWEST_ALIKE:
            return self
        columns = (self.tokens[chosen], self.seconds[chosen], self.passed[chosen], self.ranks[chosen])
        return Rows(self.hidden_size, self.ffn_size, self.dtype, *columns, [self.counts[i] for i in chosen])

    def terms(self, form: str = FORM) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """[R] bytes read, operations of pairs, operations of one more row an expert hit, bytes passed over."""
        shape = self.hidden_size * self.ffn_size
        tile = int(form.split()[-1]) if form.startswith("tiles") else 1
        pairs = self.pairs if tile == 1 else np.array([np.ceil(one / tile).sum() * tile for one in self.counts])
        more = self.hit * (form == FORM)
        passed = self.passed * 2.0 * (self.hidden_size + self.ffn_size)
        return self.hit * 3.0 * shape * DTYPE_BYTES[self.dtype], pairs * 6.0 * shape, more * 6.0 * shape, passed


@cache
def balanced(tokens: int, experts: int, top_k: int, ranks: int, ties: bool) -> FloatArray:
    """Tokens of each expert of rank 0, as the tables' routing deals them."""
    token, stride = np.arange(tokens)[:, None], -(-experts // top_k)
    first = token if tokens >= stride else (token * stride / tokens).astype(np.int64)
    ids = (first + np.arange(top_k) * stride) % experts
    if ties:
        lowest = np.tile(np.arange(top_k // 2 + 1), (tokens, 1))
        own = np.minimum(ids[:, :1], top_k // 2)
        ids = np.hstack([ids[:, : top_k // 2], lowest[lowest != own].reshape(tokens, -1)])
    return np.bincount(ids.ravel(), minlength=experts)[: experts // ranks].astype(np.float64)


COLUMNS = (
    "hidden_size",
    "inter_size",
    "topk",
    "num_experts",
    "moe_ep_size",
    "num_tokens",
    "latency",
    "moe_dtype",
    "kernel_source",
    "distribution",
    "moe_tp_size",
)


def expert_rows(path: Path, engine: str, distribution: str = "balanced") -> dict[tuple[str, int, int], Rows]:
    """Rows of a table by dtype and shape, of the plainest kernel.

    Raises:
        FileFormatError: as `read`.
    """
    data = read(path, COLUMNS)
    good = (data["moe_tp_size"] == 1) & (data["moe_ep_size"] >= 2) & (data["moe_ep_size"] <= 64)
    good &= (data["distribution"] == distribution) & (data["num_tokens"] <= 1 << 20)
    grouped: dict[tuple[str, int, int], dict[tuple[int, int, int, int], list[float]]] = {}
    names = COLUMNS[:7]
    blocked = {
        (int(h), int(f))
        for h, f, t in zip(*(data[n] for n in (*names[:2], "moe_dtype")), strict=True)
        if t == "fp8_block"
    }
    for i in np.flatnonzero(good):
        dtype, (h, f, k, e, ranks, tokens, ms) = str(data["moe_dtype"][i]), (data[name][i] for name in names)
        skipped = dtype == "fp8" and (h, f) in blocked
        if dtype not in DTYPES or skipped or (h, f) in WITHOUT_GATE or OTHER_KERNELS.search(data["kernel_source"][i]):
            continue
        key = int(tokens), int(e), int(k), int(ranks)
        grouped.setdefault((DTYPES[dtype], int(h), int(f)), {}).setdefault(key, []).append(float(ms))
    result = {}
    for (dtype, h, f), rows in grouped.items():
        keys = [key for key in rows if key[1] % key[3] == 0]
        if len(keys) < FEWEST_ROWS:
            continue
        ties = (h, f) == (7168, 2048) and engine != "trtllm"
        result[dtype, h, f] = Rows(
            h,
            f,
            dtype,
            np.array([key[0] for key in keys], dtype=np.float64),
            np.array([np.median(rows[key]) for key in keys]) * 1e-3,
            np.array([key[0] * key[2] for key in keys], dtype=np.float64),
            np.array([key[3] for key in keys], dtype=np.float64),
            [balanced(*key, ties and key[1] == 256) for key in keys],
        )
    return result


def predicted(logs: FloatArray, terms: tuple[FloatArray, ...]) -> FloatArray:
    """[R] seconds. logs: of launch, seconds a byte read, seconds an operation, rows, seconds a byte passed over."""
    launch, per_byte, per_operation, rows, per_passed = np.exp(logs)
    read_, pairs, more, passed = terms
    arithmetic = (pairs + more * rows) * per_operation
    return np.asarray(launch + np.maximum(read_ * per_byte, arithmetic) + passed * per_passed)


def fitted(sets: Sequence[Rows], form: str = FORM, starts: int = 8, slower: float = 1.0) -> FloatArray:
    """The logarithms that explain the rows not left out, by least squares of logarithms that outliers hardly move.

    slower: than GPUs, which a machine may be at most.
    """
    from scipy.optimize import least_squares

    terms = [tuple(term[~rows.held_out] for term in rows.terms(form)) for rows in sets]
    joined = tuple(np.concatenate(columns) for columns in zip(*terms, strict=True))
    logs = np.log(np.concatenate([rows.seconds[~rows.held_out] for rows in sets]))

    def residual(logs_of: FloatArray) -> FloatArray:
        return np.asarray(np.log(predicted(logs_of, joined)) - logs)

    best: Any = None
    highest = HIGHEST + np.log([slower, slower, slower, 1.0, slower])
    for read_, operation, passed in list(np.ndindex(2, 2, 2))[:starts]:
        start = np.log([2e-5, (4e-13, 2e-13)[read_], (2e-15, 8e-15)[operation], 16.0, (1e-12, 1e-14)[passed]])
        fit = least_squares(residual, start, loss="soft_l1", f_scale=0.1, bounds=(LOWEST, highest))
        best = fit if best is None or fit.cost < best.cost else best
    return np.asarray(best.x)


def errors(logs: FloatArray, rows: Rows, form: str = FORM) -> FloatArray:
    """[R'] relative errors of rows left out."""
    return np.asarray(np.abs(predicted(logs, rows.terms(form)) / rows.seconds - 1)[rows.held_out])


class TableFit(NamedTuple):
    """Coefficients of a shape's own rows. version: of the engine, and of how many ranks the rows are."""

    launch: float
    bandwidth: float
    rate: float
    rows: float
    passing: float
    error: float
    version: str


@cache
def expert_fit(
    root: Path, gpu: str, engine: str, dtype: str, hidden_size: int, ffn_size: int, experts: int, ranks: int
) -> TableFit | None:
    """Coefficients for a shape, so many experts on so many ranks, of the newest table that has it; None where none has.

    Raises:
        FileFormatError: a table that cannot be read.
    """
    candidates = [of for of in tables(root, "moe_perf.parquet") if of[:2] == (gpu, engine)]
    for _, _, _, path in sorted(candidates, key=lambda of: of[2], reverse=True):
        rows = expert_rows(path, engine).get((dtype, hidden_size, ffn_size))
        if rows is None:
            continue
        rows = rows.nearest(experts, ranks)
        logs = fitted([rows], starts=4)
        launch, per_byte, per_operation, more, per_passed = np.exp(logs).tolist()
        counts = sorted({int(of) for of in rows.ranks})
        which = f"{counts[0]} ranks" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} ranks"
        error = float(np.median(errors(logs, rows)))
        version = f"{path.parent.name} table of {which}"
        return TableFit(launch, 1 / per_byte, 1 / per_operation, more, 1 / per_passed, error, version)
    return None


MEASURED_AS = {"fp16": "bf16", "nvfp4": "fp4"}
"""Types under another's name in the tables: kernels of the same arithmetic and bytes."""


class KernelFit(NamedTuple):
    """Coefficients of the experts of one shape, or of any.

    launch: seconds. bandwidth: bytes/s at which weights are read. rate: flop/s. rows: of arithmetic that an expert hit
    costs beside its own. passing: bytes/s at which rows of hidden and FFN width at bf16 are passed over. error: median
    of the relative error on token counts left out of the fit; of shapes left out, where `shape` is "any".
    """

    launch: float
    bandwidth: float
    rate: float
    rows: float
    passing: float
    error: float
    gpu: str
    engine: str
    version: str
    dtype: str
    shape: str

    def seconds(self, model: ModelSpec) -> tuple[float, float, float, float, float]:
        """(launch, an expert read, arithmetic of a pair, rows an expert hit, passing over a pair) of its experts."""
        return (
            self.launch,
            model.bytes_per_expert / self.bandwidth,
            model.flops_per_token / self.rate,
            self.rows,
            2.0 * (model.hidden_size + model.ffn_size) / self.passing,
        )


@cache
def kernel_data() -> dict[str, Any]:
    """The file of coefficients: "source", and under "experts" lists by GPU, engine, dtype and shape."""
    data: dict[str, Any] = json.loads(Path(__file__).with_name("kernels.json").read_text(encoding="utf-8"))
    return data


def kernel_fit(gpu: str, engine: str, model: ModelSpec, ranks: int) -> KernelFit | None:
    """The coefficients for a model's experts on so many ranks: of the measured table itself where that is installed
    and has their shape, else as shipped, of their shape where it was measured; None where nothing is known."""
    return _fit(gpu, engine, model.expert_dtype, model.hidden_size, model.ffn_size, model.experts, ranks)


@cache
def _fit(
    gpu: str, engine: str, dtype: str, hidden_size: int, ffn_size: int, experts: int, ranks: int
) -> KernelFit | None:
    root, measured_as = installed_root(), MEASURED_AS.get(dtype, dtype)
    shape = f"{hidden_size}x{ffn_size}"
    if root is not None and engine in ENGINES:
        fit = expert_fit(root, gpu, engine, measured_as, hidden_size, ffn_size, experts, ranks)
        if fit is not None:
            return KernelFit(*fit[:6], gpu=gpu, engine=engine, version=fit.version, dtype=dtype, shape=shape)
    of_engine = kernel_data()["experts"].get(gpu, {}).get(engine, {})
    shapes = of_engine.get("dtypes", {}).get(measured_as, {})
    shape = shape if shape in shapes else "any"
    return _parse(shapes[shape], gpu, engine, of_engine["version"], dtype, shape) if shape in shapes else None


def known_kernels() -> list[KernelFit]:
    """All that is known."""
    return [
        _parse(row, gpu, engine, fits["version"], dtype, shape)
        for gpu, engines in kernel_data()["experts"].items()
        for engine, fits in engines.items()
        for dtype, shapes in fits["dtypes"].items()
        for shape, row in shapes.items()
    ]


def _parse(row: list[float], gpu: str, engine: str, version: str, dtype: str, shape: str) -> KernelFit:
    launch_us, gigabytes, teraflops, rows, passing_gigabytes, error = row
    return KernelFit(
        launch_us * 1e-6,
        gigabytes * 1e9,
        teraflops * 1e12,
        rows,
        passing_gigabytes * 1e9,
        error / 100,
        gpu,
        engine,
        version,
        dtype,
        shape,
    )
