"""What dispatch and combine were measured to take: coefficients by GPU, library, kind and number of nodes.

They are fitted to the tables of `aiconfigurator-core` (`python -m benchmarks transfer_fit --write`, which also says how
well they predict token counts that the fit did not see) and stand in `transfers.json`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from .kernel_tables import installed_root
from .objective import DispatchKind
from .transfer_tables import fitted, form, newest

DISPATCH_KINDS: tuple[DispatchKind, ...] = get_args(DispatchKind)

MOST_DECODE_TOKENS = 256
"""Of a device: a larger step is prefill, where its batch does not say. Low-latency buffers are made for 128 (SGLang,
DeepEP's tests) or 256 (vLLM); chunks of prefill are longer."""

TERMS = ("launch", "expert", "row", "token", "peer", "root", "intra", "inter", "error")


class Leg(NamedTuple):
    """Dispatch or combine: seconds, but for the bandwidths (bytes/s of a device; 0 where not measured) and the error.

    launch; expert: an expert of the layer; row: a byte of a token's row; token: a token of a device; peer: a device;
    root: a root of the bytes that a device sends where tokens are routed at random. intra, inter: of the busiest link
    inside a node and between nodes. error: median of the relative error on token counts left out of the fit.
    """

    launch: float
    expert: float
    row: float
    token: float
    peer: float
    root: float
    intra: float
    inter: float
    error: float


class TransferFit(NamedTuple):
    """Both ways of one kind, as measured on so many nodes. library: whose, and which version."""

    dispatch: Leg
    combine: Leg
    library: str
    gpu: str
    kind: str
    nodes: int

    @property
    def error(self) -> float:
        return max(self.dispatch.error, self.combine.error)


@cache
def transfer_data() -> dict[str, Any]:
    """The file of coefficients: "source", "columns", and under "transfers" rows by GPU, engine, kind and nodes."""
    data: dict[str, Any] = json.loads(Path(__file__).with_name("transfers.json").read_text(encoding="utf-8"))
    return data


def transfer_fit(gpu: str, engine: str, kind: str, nodes: int, hidden_size: int = 0) -> TransferFit | None:
    """What is known of a kind on a GPU, of the engine's own measurements first; None where nothing is.

    nodes: of the most nodes measured that are no more than these, else of the fewest. hidden_size: whose rows are
    fitted alone where measured tables are installed and have them, rather than those of all widths.
    """
    return _fit(gpu, engine, kind, nodes, hidden_size)


@cache
def _fit(gpu: str, engine: str, kind: str, nodes: int, hidden_size: int) -> TransferFit | None:
    of_gpu, root = transfer_data()["transfers"].get(gpu, {}), installed_root()
    for library in (engine, "sglang", "nccl"):
        measured = of_gpu.get(library, {}).get(kind, {})
        if measured:
            counts = sorted(map(int, measured))
            count = max((of for of in counts if of <= nodes), default=counts[0])
            own = None
            if root is not None and count == 1 and kind in ("normal", "low_latency"):
                own = _of_width(root, (gpu, library, kind, count), hidden_size)
            return _parse(measured[str(count)], gpu, kind, count) if own is None else own
    return None


def _of_width(root: Path, key: tuple[str, str, str, int], hidden_size: int) -> TransferFit | None:
    """The rows of one hidden size alone, of the tables that are installed."""
    source = newest(root).get(key)
    if source is None:
        return None
    gpu, _, kind, nodes, library, phases = source
    # A launch that grows with the row is a launch.
    names = [name for name in form(kind, nodes, library) if name != "row"]
    legs = []
    for rows in phases:
        mine = None if rows is None else rows.of_hidden_size(hidden_size)
        if mine is None:
            return None
        terms, error = fitted(mine, names)
        waits = {name: terms.get(name, 0.0) for name in ("launch", "expert", "row", "token", "peer", "root")}
        legs.append(Leg(**waits, intra=1.0 / terms["link"], inter=0.0, error=float(np.median(error))))
    return TransferFit(legs[0], legs[1], f"the table of {library} at {hidden_size}", gpu, kind, nodes)


def known_transfers() -> list[TransferFit]:
    """All that is known."""
    return [
        _parse(row, gpu, kind, int(nodes))
        for gpu, engines in transfer_data()["transfers"].items()
        for kinds in engines.values()
        for kind, measured in kinds.items()
        for nodes, row in measured.items()
    ]


def _parse(row: dict[str, Any], gpu: str, kind: str, nodes: int) -> TransferFit:
    return TransferFit(_leg(row["dispatch"]), _leg(row["combine"]), row["library"], gpu, kind, nodes)


def _leg(row: list[float]) -> Leg:
    launch, expert, per_byte, token, peer, root, intra, inter, error = row
    return Leg(
        launch * 1e-6,
        expert * 1e-9,
        per_byte * 1e-9,
        token * 1e-9,
        peer * 1e-6,
        root * 1e-9,
        intra * 1e9,
        inter * 1e9,
        error / 100,
    )
