"""What expert kernels were measured to take: coefficients by GPU, engine, dtype and shape.

They are fitted to the tables of `aiconfigurator-core` (`python -m benchmarks kernel_fit --write`, which also says how
well they predict token counts that the fit did not see) and stand in `kernels.json`. Where that package is installed
(`pip install "moeplace[kernels]"`), its table of the engine, GPU, type and shape is fitted instead, by the rows of so
many ranks as the cluster has. A device's experts take

    launch + passing * pairs of all devices
    + max((pairs + rows * experts hit) * flops / rate,  experts hit * bytes / bandwidth)

where every expert that is hit costs some rows of arithmetic beside its own, since tiles are padded. Counting tiles an
expert one by one, ceil(n_e / m), explains the tables no better than this mean does, for any tile m.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .kernel_tables import expert_fit, installed_root
from .model import ModelSpec
from .topology import ENGINES

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
        found = expert_fit(root, gpu, engine, measured_as, hidden_size, ffn_size, experts, ranks)
        if found is not None:
            return KernelFit(*found[:6], gpu=gpu, engine=engine, version=found.version, dtype=dtype, shape=shape)
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
