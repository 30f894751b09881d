"""`moeplace calibrate`: measure the cluster at hand."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..._display import plural
from ..options import MODEL, AsJson, output_option, topology_file
from ..output import Column, Table, emit, figure, milliseconds, note, pairs, percent, quantity, wrote
from ..parse import read_spec

if TYPE_CHECKING:
    from ...placement.model import ModelSpec
    from ...runtime.calibration import Calibration

LINKS = {"intra": "inside nodes", "inter": "between nodes", "all": "all ranks to all"}


class Dtype(StrEnum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


def calibrate_command(
    output: Annotated[
        Path | None, output_option("FILE", "Topology file to write: .yaml, .yml or .json.", topology_file)
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="PATH",
            help="Transformers config.json of the model whose experts to time, or its folder. Default: OLMoE-1B-7B's "
            "sizes.",
        ),
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option("--hidden-size", min=1, help="In place of the model's.", rich_help_panel=MODEL)
    ] = None,
    ffn_size: Annotated[
        int | None, typer.Option("--ffn-size", min=1, help="In place of the model's.", rich_help_panel=MODEL)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="In place of the model's.", rich_help_panel=MODEL)
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(
            "--experts", min=1, help="Experts a device. Default: the model's over the ranks, as memory allows."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            min=1,
            help="Of a step, all ranks together: messages and expert products are timed at the sizes that follow. "
            "Default: 4096 a rank on GPUs, 1024 on CPUs.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Of weights and activations. Default: bf16 on GPUs, fp32 on CPUs.")
    ] = None,
    node_size: Annotated[
        int | None, typer.Option("--node-size", min=1, help="Ranks a node, where torchrun's hosts are not the nodes.")
    ] = None,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="Devices and nodes are of one kind: write their median for each.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the devices and links that torchrun's ranks run on, and write them as a topology.

    Start it by torchrun as training or serving will run, as many hosts and as many ranks on each:
    `torchrun --nproc-per-node 8 -m moeplace calibrate -o topology.json`. All ranks work at once throughout. Times
    expert products of the model's sizes, plain copies, and all-to-alls inside nodes, between nodes and over all ranks,
    by NCCL on GPUs and Gloo on CPUs. Every command takes the file as --topology. A single process measures its device
    alone.

    Example:

      moeplace calibrate --model config.json -o topology.json
    """
    import torch.distributed as dist

    from ...runtime import calibrate

    spec = _spec(model, hidden_size=hidden_size, ffn_size=ffn_size, top_k=top_k)
    first = int(os.environ.get("RANK", "0")) == 0
    _join()
    calibration = calibrate(
        spec,
        dtype=_torch_dtype(dtype),
        experts=experts,
        tokens=tokens,
        node_size=node_size,
        uniform=uniform,
        listen=note if first else lambda message: None,
    )
    if first:
        if output is not None:
            calibration.topology.save(output)
        _show(calibration, as_json)
        if output is not None:
            wrote(output)
    dist.destroy_process_group()


def _spec(model: Path | None, **sizes: int | None) -> ModelSpec:
    from ...placement.model import ModelSpec

    if model is None:
        spec = ModelSpec(layers=16, experts=64, top_k=8, hidden_size=2048, ffn_size=1024, name="OLMoE-1B-7B")
    else:
        spec = read_spec(model)
    return spec.replace(**{name: value for name, value in sizes.items() if value is not None})


def _join() -> None:
    """The process group that torchrun describes; a single process makes one of its own."""
    import torch
    import torch.distributed as dist

    from ...runtime.calibration import own_device

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    own_device()
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        note("one process: no links to measure; torchrun starts as many ranks as the cluster has devices")
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def _torch_dtype(dtype: Dtype | None) -> Any:
    import torch

    names = {Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16, Dtype.fp32: torch.float32}
    return None if dtype is None else names[dtype]


def _show(calibration: Calibration, as_json: bool) -> None:
    topology = calibration.topology
    data = calibration.to_dict()
    errors = ("seconds", "predicted")
    links, work = (
        [{**row, "error": row[errors[1]] / row[errors[0]] - 1.0} for row in data[name]] for name in ("links", "work")
    )
    rates = quantity("B/s")
    summary = pairs(
        {
            "devices": f"{topology.num_devices} in {plural(topology.num_nodes, 'node')} ({calibration.device_dtype})",
            "tokens of a step": f"{calibration.tokens:,}",
            "compute a device": _span(topology.compute, quantity("flop/s")),
            "memory bandwidth, reading experts": _span(topology.memory_bandwidth, rates),
            "memory bandwidth, plain copies": rates(calibration.copy_bandwidth),
            "links inside a node, a device": _span(topology.intra_bandwidth, rates),
            "links between nodes, a node": _span(topology.inter_bandwidth, rates),
            "a message inside a node": f"{figure(topology.intra_latency * 1e6)} us",
            "a message between nodes": f"{figure(topology.inter_latency * 1e6)} us",
            "a token's handling on its own rank, a hop": f"{figure(calibration.token_seconds * 1e6)} us",
            **{
                f"a copy in {timed.dispatch} dispatch, beside links": f"{figure(timed.copy_seconds * 1e6)} us"
                for timed in calibration.dispatches
            },
            "a device's speed while others are idle": f"{calibration.alone:.2f} x",
        }
    )
    timed = (
        Column("seconds", "measured\nms", milliseconds),
        Column("predicted", "from the\ntopology ms", milliseconds),
        Column("error", "error", percent),
    )
    emit(
        {**data, "remarks": list(calibration.remarks)},
        summary,
        Table(
            (
                Column("kind", "all-to-all", lambda kind: LINKS[kind], right=False),
                Column("peer_bytes", "to each peer", quantity("B")),
                *timed,
            ),
            links,
            footnotes=[
                "Links are one direction; devices and nodes that differ are shown from the slowest to the fastest."
            ],
        ),
        Table(
            (
                Column("pairs", "tokens\nan expert"),
                *timed,
                Column("products_only", "products\nalone ms", milliseconds),
            ),
            work,
            footnotes=[f"{calibration.experts} experts a device.", *calibration.remarks],
        ),
        as_json=as_json,
    )


def _span(values: Any, write: Any) -> str:
    low, high = write(float(values.min())), write(float(values.max()))
    return low if low == high else f"{low} to {high}"
