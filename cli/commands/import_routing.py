"""`moeplace import`: routing recorded elsewhere, written as this project's own files."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..._display import span
from ..command_line import refuse_idle
from ..options import STORE, AsJson, KeepOptions, ServerOptions, output_option, recording_path
from ..output import Table, count, emit, note, pairs, working
from ..parse import read_spec, whole_numbers
from ..remote import send_record
from ..routing_split import open_recording
from ..save import attempted, check_store, end_unkept, keep_statistics, save_recording


class Kind(StrEnum):
    tokens = "tokens"
    loads = "loads"


READING = "What the record does not say"


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a record's format may leave out."""

    num_experts: Annotated[
        int | None,
        typer.Option(
            "--num-experts",
            metavar="N",
            min=1,
            help="Experts a layer (ExFlow, Megatron-LM, routed experts). Default: the model's, or the highest seen.",
            show_default=False,
            rich_help_panel=READING,
        ),
    ] = None
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers",
            metavar="N",
            min=1,
            help="num_hidden_layers, dense ones counted (SGLang's routed experts). Default: the model's.",
            show_default=False,
            rich_help_panel=READING,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            metavar="N",
            min=1,
            help="Experts a token (SGLang's routed experts). Default: the model's.",
            show_default=False,
            rich_help_panel=READING,
        ),
    ] = None
    assignments: Annotated[
        Path | None,
        typer.Option(
            "--assignments",
            metavar="FILE",
            help="TensorRT-LLM's statistics of a run with a load balancer count slots: its YAML, for the expert in "
            "each.",
            show_default=False,
            rich_help_panel=READING,
        ),
    ] = None
    entries_per_window: Annotated[
        int | None,
        typer.Option(
            "--entries-per-window",
            metavar="N",
            min=1,
            help="Entries of a load history summed into a window. Default: 1.",
            show_default=False,
            rich_help_panel=READING,
        ),
    ] = None

    kind: Annotated[
        Kind | None,
        typer.Option(
            "--as",
            metavar="tokens|loads",
            help="What bare whole numbers are that may be expert ids of tokens or loads of experts.",
            show_default=False,
            rich_help_panel=READING,
        ),
    ] = None

    def options(self) -> dict[str, Any]:
        """What was said, as readers take it."""
        from ...runtime.exporters.trtllm import read_assignments

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["kind"] = None if self.kind is None else self.kind.value
        if self.assignments is not None:
            values["assignments"] = read_assignments(self.assignments)
        return {name: value for name, value in values.items() if value is not None}


def import_command(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECORD...",
            help="Files or folders of recorded routing of one model; each of several becomes a workload.",
            show_default=False,
        ),
    ],
    reading: ReadOptions,
    storage: KeepOptions,
    remote: ServerOptions,
    output: Annotated[
        Path | None,
        output_option(
            "PATH",
            "Folder for the trace, which is made; for a record of counts, the statistics file (.npz). Needed "
            "without --server.",
            recording_path,
        ),
    ] = None,
    deployment: Annotated[
        str | None,
        typer.Option(
            "--deployment",
            metavar="NAME",
            help="A deployment of the service of --server: a trace is uploaded to it, the windows of a record of "
            "counts are pushed.",
            show_default=False,
            rich_help_panel=STORE,
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            help="Transformers config.json of the recorded model, or its folder: kept in the trace, and its MoE "
            "layers' numbers with it.",
            show_default=False,
        ),
    ] = None,
    moe_layers: Annotated[
        str | None,
        typer.Option(
            "--moe-layers",
            metavar="N,...",
            help="Absolute indices of the recorded layers, where the record counts MoE layers only: 3-60. Default: the "
            "model's, with --model.",
            show_default=False,
        ),
    ] = None,
    keep_layers: Annotated[
        str | None,
        typer.Option(
            "--keep-layers",
            metavar="N,...",
            help="Recorded layers to take, by the numbers the record has them under: 0-57.",
            show_default=False,
        ),
    ] = None,
    drop_layers: Annotated[
        str | None,
        typer.Option(
            "--drop-layers",
            metavar="N,...",
            help="Recorded layers to leave out, such as one of multi-token prediction: 58.",
            show_default=False,
        ),
    ] = None,
    workloads: Annotated[
        list[str] | None,
        typer.Option(
            "--workload",
            metavar="NAME",
            help="What the tokens of a record are called; once for each RECORD. Default: of one record what it says "
            "itself, of several their files' names.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name to keep the statistics under.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read routing recorded elsewhere, and write it as a trace or as statistics, or send it to a service.

    What it is is found by content, not by name:
    a trace of this project (Parquet) or its statistics (.npz);
    SGLang's expert distribution records (stat, stat_approx, per_pass, per_token), a file or a folder of the ranks'
    files; routed experts that vLLM or SGLang return (.npy, .npz, or responses as JSON);
    vLLM's expert-load statistics (.jsonl);
    vLLM-Ascend's [EPLB experts] log lines, MindIE's hotspots and Omni-Placement's counts (folders);
    TensorRT-LLM's expert statistics (a folder); Megatron-LM's router traces (.jsonl, or a folder of the ranks' files);
    load histories of the ADRS benchmark (.json); ExFlow's trace.npy;
    plain loads [layers, experts] or [windows, layers, experts]: .npy, .npz, a .pt tensor, JSON or CSV.

    Example:

      moeplace import trace.npy --model config.json -o trace
      moeplace import router_traces --num-experts 64 -o trace
      moeplace import expert_statistics --assignments load_balancer.yaml --moe-layers 3-60 -o counts.npz
      moeplace import chat.pt code.pt --workload chat --workload code --model config.json -o counts.npz
      moeplace import history.json --server http://plans:8311 --deployment chat
    """
    from ...profiler.read import Recording, model_layers

    if output is None and remote.server is None:
        raise typer.BadParameter("the record would go nowhere: give --output, or --server")
    if deployment is not None and remote.server is None:
        raise typer.BadParameter("--deployment is of the service of --server")
    if remote.server is not None:
        refuse_idle("with a service, which keeps what it is sent", "name", "db", "store")
    elif not storage.store:
        refuse_idle("with --no-store", "name")
    spec = None if model is None else read_spec(model)
    sent = stored = None
    names = list(workloads or [source.stem for source in sources] if len(sources) > 1 else workloads or [])
    if names and (len(names) != len(sources) or len(set(names)) != len(names)):
        raise typer.BadParameter(
            f"{len(sources)} records take as many different workloads, not {', '.join(names)}: give --workload for each"
        )
    if keep_layers is not None and drop_layers is not None:
        raise typer.BadParameter("give --keep-layers or --drop-layers, not both")
    failure = None
    if storage.store and remote.server is None:
        check_store(storage.db)
    with working(f"reading {sources[0]}") as update:
        opened = []
        for source in sources:
            update(f"reading {source}", None)
            recording = open_recording(source, model, **reading.options())
            own = {} if spec is None else model_layers(recording.header.moe_layers, spec)
            if keep_layers is not None or drop_layers is not None:
                recorded = set(recording.header.moe_layers)
                dropped = set(whole_numbers("--drop-layers", drop_layers) or ())
                asked = set(whole_numbers("--keep-layers", keep_layers) or recorded)
                # One that was not recorded is refused by name.
                recording = recording.keep_layers(sorted(asked - dropped | (dropped - recorded)))
            numbers = whole_numbers("--moe-layers", moe_layers)
            if keep_layers is not None and spec is not None and numbers is None:
                # Part of the model, as of a pipeline's stage: the plan is for these layers alone.
                layers = recording.header.moe_layers
                numbers = (
                    [own[layer] for layer in layers] if set(layers) <= set(own) and len(layers) < spec.layers else None
                )
            if numbers is not None and spec is not None and (others := set(numbers) - set(spec.moe_layers)):
                note(f"note: {source}: {span(tuple(sorted(others)))} are no MoE layers of {model}")
            opened.append(recording.of_model(spec or recording.model, numbers))
        recording = Recording.join(dict(zip(names, opened, strict=True))) if names else opened[0]
        statistics = recording.statistics()
        if output is not None:
            save_recording(recording, output)
        if remote.server is not None:
            update("sending", None)
            sent = send_record(remote.server, recording, statistics, deployment)
        elif storage.store:
            stored, failure = attempted(lambda: keep_statistics(statistics, storage.db, name))
    data: dict[str, Any] = {
        "kind": "trace" if recording.is_trace else "statistics",
        "file": None if output is None else str(output),
        "tokens": statistics.tokens,
        "experts": statistics.experts,
        "top_k": statistics.top_k,
        "moe_layers": list(statistics.moe_layers),
        "workloads": list(statistics.workloads),
        "fingerprint": statistics.fingerprint,
        "stored_as": stored,
        "sent": sent,
    }
    emit(data, _table(data), as_json=as_json)
    end_unkept(failure, output)


def _table(data: dict[str, Any]) -> Table:
    shown = {
        "wrote": f"{data['kind']} {data['file']}" if data["file"] else None,
        "sent": data["sent"],
        "tokens": count(data["tokens"]) if data["tokens"] else None,
        "layers": f"{len(data['moe_layers'])} of {data['experts']} experts",
        "workloads": ", ".join(name or "(untagged)" for name in data["workloads"]),
        "fingerprint": data["fingerprint"][:12],
        "stored as": data["stored_as"],
    }
    return pairs({name: value for name, value in shown.items() if value is not None})
