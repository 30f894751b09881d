"""What dispatch and combine were measured to take: coefficients by GPU, library, kind and number of nodes.

They are fitted to the tables of `aiconfigurator-core` (`python -m benchmarks transfer_fit --write`, which also says how
well they predict token counts that the fit did not see) and stand in `transfers.json`.

A row of these tables is the time of one dispatch or one combine. Every third token count (message size) is left out of
a fit: its error is the median of |predicted / measured - 1| over these. Fitted is

    launch + experts * a + row bytes * b + tokens of a rank * c + ranks * d + sqrt(bytes of a rank) * e
    + bytes on the busiest link / bandwidth

of which each kind has the terms that explain its tables (`TERMS`). Tables' routing is uniform: of R ranks a token of
top-k reaches R (1 - C(E - E/R, k) / C(E, k)) in the mean, itself among them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._types import BoolArray, FloatArray
from .kernels import installed_root, read, tables
from .model import DTYPE_BYTES

TERMS = {
    "normal": ("launch", "row", "token", "link"),
    "low_latency": ("launch", "expert", "row", "link"),
    "all_to_all": ("launch", "peer", "root", "link"),
    "all_gather": ("launch", "peer", "root", "link"),
    "one-sided": ("launch", "row", "token", "peer", "link"),
    "between nodes": ("launch", "link"),
}
SMS = {1: 20, 2: 24, 4: 24, 8: 24}
"""SMs of normal mode, by nodes: DeepEP's default (`Buffer.num_sms`); between nodes the most that was measured."""
MOST_TOKENS = {"normal": 32_768, "low_latency": 512}
"""Of a rank; beyond the second low-latency buffers are not made."""
FEWEST_EXPERTS = 32
"""Low latency deals a group of warps to each expert: tables of 8 and 16 experts starve and are left out."""
LARGEST_MESSAGE = 1 << 29
RANKS_OF_A_NODE = {"gb200": 4, "gb300": 4}
"""Where it is not 8: what one node means in the tables."""
SENT_AS = {"default": "fp8", "bfloat16": "bf16", "fp8": "fp8", "nvfp4": "nvfp4", "fp4": "nvfp4"}
FEWEST_SIZES = 6
"""Token counts of one width that are enough to fit."""


@dataclass(frozen=True)
class TransferRows:
    """Measured rows of a phase. seconds, and what the form's terms take: [R] arrays. size: what is held out by."""

    size: FloatArray
    seconds: FloatArray
    experts: FloatArray
    row: FloatArray
    tokens: FloatArray
    ranks: FloatArray
    volume: FloatArray
    link: FloatArray
    hidden_size: FloatArray

    @property
    def held_out(self) -> BoolArray:
        """[R] whether the row is left out of fits."""
        return np.isin(self.size, np.unique(self.size)[1::3])

    def terms(self, names: Sequence[str]) -> FloatArray:
        """[R, terms] what each coefficient is multiplied by."""
        columns = {
            "launch": np.ones(len(self.seconds)),
            "expert": self.experts,
            "row": self.row,
            "token": self.tokens,
            "peer": self.ranks,
            "root": np.sqrt(self.volume),
            "link": self.link,
        }
        return np.stack([np.asarray(columns[name], dtype=np.float64) for name in names], axis=1)

    def of_hidden_size(self, hidden_size: int) -> TransferRows | None:
        """The rows of that width, where they are enough to fit."""
        chosen = self.hidden_size == hidden_size
        if len(np.unique(self.size[chosen])) < FEWEST_SIZES:
            return None
        return TransferRows(*(getattr(self, column.name)[chosen] for column in fields(self)))


def copies(top_k: int, experts: int, ranks: int) -> float:
    """Ranks but its own that a token reaches in the mean."""
    return (ranks - 1) * (1.0 - comb(experts - experts // ranks, top_k) / comb(experts, top_k))


def deepep_rows(data: dict[str, Any], phase: str, kind: str, nodes: int, ranks: int) -> TransferRows | None:
    """Rows of SGLang's measurements, of one number of nodes."""
    column = {"normal": f"{phase}_transmit_us", "low_latency": f"{phase}_avg_t_us"}[kind]
    good = (data["node_num"] == nodes) & (data["num_token"] <= MOST_TOKENS[kind])
    good &= data["dispatch_sms"] == SMS[nodes] if kind == "normal" else data["num_experts"] >= FEWEST_EXPERTS
    if not good.any():
        return None
    micros = data[column] + (data[f"{phase}_notify_us"] if kind == "normal" else 0.0)
    tokens, top_k, experts = (data[name][good] for name in ("num_token", "num_topk", "num_experts"))
    width = DTYPE_BYTES["fp8" if phase == "dispatch" else "bf16"]
    return kind_rows(kind, tokens, micros[good], experts, top_k, data["hidden_size"][good], width, ranks, nodes)


def engine_rows(data: dict[str, Any], phase: str, kind: str, backend: str) -> TransferRows | None:
    """Rows of another engine's measurements, on one node."""
    good = (data["comm_backend"] == backend) & (data["phase"] == phase) & (data["num_tokens"] <= MOST_TOKENS[kind])
    if kind == "low_latency" and phase == "combine":
        # Results in fewer bits are an option of TensorRT-LLM's, off unless asked for.
        good &= np.isin(data["comm_dtype"], ("default", "bfloat16"))
    if not good.any():
        return None
    out = [DTYPE_BYTES[SENT_AS[name]] for name in data["comm_dtype"][good]]
    width = out if phase == "dispatch" else [DTYPE_BYTES["bf16"]] * len(out)
    tokens, top_k, experts = (data[name][good] for name in ("num_tokens", "topk", "num_experts"))
    ranks, hidden = int(data["ep_size"][good][0]), data["hidden_size"][good]
    return kind_rows(kind, tokens, data["latency"][good], experts, top_k, hidden, np.array(width), ranks, 1)


def nvlink_rows(data: dict[str, Any], phase: str) -> TransferRows | None:
    """Rows of TensorRT-LLM's one-sided NVLink kernels, 2 to 64 ranks of one NVLink domain."""
    good = (data["kernel_source"] == "NVLinkOneSided") & (data["op_name"] == f"alltoall_{phase}")
    good &= data["num_tokens"] <= MOST_TOKENS["normal"]
    if not good.any():
        return None
    names = ("num_tokens", "topk", "num_experts", "moe_ep_size", "hidden_size")
    tokens, top_k, experts, ranks, hidden = (data[name][good].astype(int) for name in names)
    width = np.array([DTYPE_BYTES[SENT_AS[name]] for name in data["moe_dtype"][good]])
    row = hidden * (width if phase == "dispatch" else DTYPE_BYTES["bf16"])
    link = tokens * row * [copies(*of) for of in zip(top_k, experts, ranks, strict=True)]
    return TransferRows(tokens, data["latency"][good] * 1e-3, experts, row, tokens, ranks, link, link, hidden)


def kind_rows(
    kind: str,
    tokens: FloatArray,
    micros: FloatArray,
    experts: FloatArray,
    top_k: FloatArray,
    hidden_size: FloatArray,
    width: FloatArray | float,
    ranks: int,
    nodes: int,
) -> TransferRows:
    """Rows of one kind. Between nodes the link is a device's share of its node's: copies are merged by node, or not."""
    parties, row = ranks if nodes == 1 else nodes, hidden_size * width
    if kind == "normal":
        # DeepEP's own test, which was run, takes the experts of a token from four nodes at most.
        spread = min(nodes, 4)
        remote = spread * (1 - (1 - 1 / spread) ** top_k) * (1 - 1 / nodes)
        sent = np.array([copies(int(k), int(e), ranks) for k, e in zip(top_k, experts, strict=True)])
        each = sent if nodes == 1 else remote
    else:
        each = top_k * (1 - 1 / parties)
    link = tokens * row * each
    return TransferRows(
        tokens, micros * 1e-6, experts, row, tokens, np.full(len(tokens), ranks), link, link, hidden_size
    )


def collective_rows(data: dict[str, Any], operation: str) -> TransferRows | None:
    """Rows of NCCL: bytes of the whole message, of which each rank keeps its part."""
    size = data["message_size"] * np.where(data["nccl_dtype"] == "half", 2, 1)
    good = (data["op_name"] == operation) & (size <= LARGEST_MESSAGE)
    if not good.any():
        return None
    ranks, size = data["num_gpus"][good], size[good].astype(float)
    moved, none = size * (ranks - 1) / ranks, np.zeros(int(good.sum()))
    return TransferRows(size, data["latency"][good] * 1e-3, none, none, none, ranks, moved, moved, none)


def fitted(rows: TransferRows, names: Sequence[str]) -> tuple[dict[str, float], FloatArray]:
    """Coefficients by term, none below 0, and the relative errors of rows left out."""
    from scipy.optimize import least_squares

    terms, test = rows.terms(names), rows.held_out
    unit = terms.max(axis=0)
    scaled, logs = terms[~test] / unit, np.log(rows.seconds[~test])

    def residual(of: FloatArray) -> FloatArray:
        return np.asarray(np.log(scaled @ np.exp(of)) - logs)

    best: Any = None
    for seed in range(3):
        start = np.log(np.median(rows.seconds) / 3) + np.random.default_rng(seed).normal(0, 2, len(names))
        fit = least_squares(residual, start, loss="soft_l1", f_scale=0.1, bounds=(-40.0, 5.0))
        best = fit if best is None or fit.cost < best.cost else best
    coefficients = np.exp(best.x) / unit
    error = np.abs(terms @ coefficients / rows.seconds - 1)[test]
    return dict(zip(names, coefficients.tolist(), strict=True)), error


Source = tuple[str, str, str, int, str, list[TransferRows | None]]
"""GPU, engine, kind, nodes, library, and the rows of dispatch and of combine."""


def newest_last(root: Path, pattern: str) -> list[tuple[str, str, Path]]:
    """(GPU, engine or library, file) of every table of that name, older versions first."""
    newest = sorted(tables(root, pattern), key=lambda table: (table[2], table[3]))
    return [(gpu, engine, path) for gpu, engine, _, path in newest]


def sources(root: Path) -> Iterator[Source]:
    """All that is measured, older tables first.

    Raises:
        FileFormatError: a table that cannot be read.
    """
    for mode, kind in (("normal", "normal"), ("ll", "low_latency")):
        for gpu, engine, path in newest_last(root, f"wideep_deepep_{mode}_perf.parquet"):
            data = read(path)
            for nodes in sorted(set(data["node_num"].tolist())):
                ranks = RANKS_OF_A_NODE.get(gpu, 8) * nodes
                rows = [deepep_rows(data, phase, kind, nodes, ranks) for phase in ("dispatch", "combine")]
                yield gpu, engine, kind, nodes, f"DeepEP of {engine} {path.parent.name}", rows
    backends = {"vllm": ("deepep_ht", "deepep_ll"), "trtllm": ("trtllm_deepep_ht", "trtllm_deepep_ll")}
    for gpu, engine, path in newest_last(root, "moe_a2a_perf.parquet"):
        data = read(path)
        for kind, backend in zip(("normal", "low_latency"), backends[engine], strict=True):
            rows = [engine_rows(data, phase, kind, backend) for phase in ("dispatch", "combine")]
            yield gpu, engine, kind, 1, f"DeepEP of {engine} {path.parent.name}", rows
    for gpu, engine, path in newest_last(root, "trtllm_alltoall_perf.parquet"):
        data = read(path)
        rows = [nvlink_rows(data, phase) for phase in ("dispatch", "combine")]
        yield gpu, engine, "normal", 1, f"NVLink one-sided of {engine} {path.parent.name}", rows
    for gpu, library, path in newest_last(root, "nccl_perf.parquet"):
        if library != "nccl":
            continue
        data, version = read(path), f"NCCL {path.parent.name}"
        there, back = (collective_rows(data, name) for name in ("all_gather", "reduce_scatter"))
        yield gpu, "nccl", "all_gather", 1, version, [there, back]
        yield gpu, "nccl", "all_to_all", 1, version, [collective_rows(data, "alltoall")] * 2


@cache
def newest(root: Path) -> dict[tuple[str, str, str, int], Source]:
    """Of each GPU, engine, kind and number of nodes the newest measurements that have both phases.

    Raises:
        FileFormatError: a table that cannot be read.
    """
    return {source[:4]: source for source in sources(root) if all(rows is not None for rows in source[5])}


def form(kind: str, nodes: int, library: str) -> tuple[str, ...]:
    """The terms that explain such rows."""
    return TERMS["between nodes" if nodes > 1 else "one-sided" if "one-sided" in library else kind]


MOST_DECODE_TOKENS = 256
"""Of a device: a larger step is prefill, where its batch does not say. Low-latency buffers are made for 128 (SGLang,
DeepEP's tests) or 256 (vLLM); chunks of prefill are longer."""

COLUMNS = ("launch", "expert", "row", "token", "peer", "root", "intra", "inter", "error")


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
