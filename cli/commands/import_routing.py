"""`moeplace import`: routing recorded elsewhere, written as this project's own files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...placement.errors import InputError
from ..inputs import Routing, read_routing
from ..options import AsJson, KeepOptions
from ..output import Table, count, emit, pairs
from ..progress import working
from ..storing import keep_statistics

if TYPE_CHECKING:
    from ...placement.model import ModelSpec


def import_command(
    source: Annotated[
        Path, typer.Argument(metavar="RECORD", help="A file or folder of recorded routing.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for the trace; for a record of counts, the statistics file (.npz).",
            show_default=False,
        ),
    ],
    storage: KeepOptions,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            help="Transformers config.json of the recorded model, or its folder: kept in the trace, and its MoE "
            "layers' numbers with it.",
            show_default=False,
        ),
    ] = None,
    num_experts: Annotated[
        int | None,
        typer.Option(
            "--num-experts",
            min=1,
            help="Experts a layer, where the record does not say. Default: the model's.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name to keep the statistics under.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read routing recorded elsewhere, and write it as a trace or as statistics.

    What it is is found by content: ExFlow's .npy, this project's Parquet and statistics.

    Example:

      moeplace import trace.npy --model config.json --out trace
    """
    from ...placement.model import ModelSpec
    from ...placement.statistics import RoutingStatistics
    from ...profiler.statistics_file import write_statistics
    from ...profiler.trace_files import write_trace

    spec = None if model is None else ModelSpec.from_config(model)
    with working(f"reading {source}"):
        record = read_routing(source, num_experts or (None if spec is None else spec.experts))
        spec = record.model if spec is None else spec
        record = record if spec is None else numbered_as(record, spec)
        if record.trace is not None:
            write_trace(record.trace, out, model=spec)
            statistics = RoutingStatistics.from_trace(record.trace)
        else:
            assert record.statistics is not None
            statistics = record.statistics
            write_statistics(statistics, out)
        stored = keep_statistics(statistics, storage.db, name) if storage.store else None
    data: dict[str, Any] = {
        "kind": "statistics" if record.trace is None else "trace",
        "file": str(out),
        "tokens": statistics.tokens,
        "experts": statistics.experts,
        "top_k": statistics.top_k,
        "moe_layers": list(statistics.moe_layers),
        "workloads": list(statistics.workloads),
        "fingerprint": statistics.fingerprint,
        "stored_as": stored,
    }
    emit(data, _table(data), as_json=as_json)


def numbered_as(record: Routing, spec: ModelSpec) -> Routing:
    """The record with the model's own layer numbers.

    Raises:
        InputError: the record is of another model.
    """
    shape = record.shape
    for field in ("layers", "experts", "top_k"):
        if shape.get(field, getattr(spec, field)) != getattr(spec, field):
            raise InputError(
                f"{record.path} is of another model: {field} is {shape[field]}, the model's is {getattr(spec, field)}"
            )
    return replace(
        record,
        model=spec,
        trace=None if record.trace is None else replace(record.trace, moe_layers=spec.moe_layers),
        statistics=None if record.statistics is None else replace(record.statistics, moe_layers=spec.moe_layers),
    )


def _table(data: dict[str, Any]) -> Table:
    return pairs(
        {
            "wrote": f"{data['kind']} {data['file']}",
            "tokens": count(data["tokens"]) if data["tokens"] else None,
            "layers": f"{len(data['moe_layers'])} of {data['experts']} experts",
            "workloads": ", ".join(name or "(untagged)" for name in data["workloads"]),
            "fingerprint": data["fingerprint"][:12],
            "stored as": data["stored_as"],
        }
    )
