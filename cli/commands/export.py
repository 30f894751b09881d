"""`moeplace export`: a plan as an engine reads it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from ...placement.errors import UnsupportedError
from .. import completion
from ..command_line import refuse_idle
from ..options import AsJson, KeepOptions, PlanFileOptions, PlanReference, ServerOptions, output_file, output_option
from ..output import emit, pairs
from ..parse import whole_numbers
from ..remote import check_plan_options, plan_context, read_plan, service
from ..save import attempted, end_unkept, keep_export


def export_command(
    plan: PlanReference,
    engine: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="ENGINE",
            autocompletion=completion.engines,
            help="sglang, sglang-lp (forks that serve a plan's own shares), vllm, vllm-ascend, trtllm, or moeplace "
            "(the plan file itself); for permute there is `moeplace permute`.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, output_option("FILE", "File to write; sglang tells .json and .pt by the name.", output_file)
    ],
    storage: KeepOptions,
    remote: ServerOptions,
    files: PlanFileOptions,
    hidden_layers: Annotated[
        int | None,
        typer.Option(
            "--hidden-layers",
            metavar="N",
            min=1,
            help="sglang, vllm --form 53022: num_hidden_layers of the model, draft layers included, where layers that "
            "the plan lacks follow its last.",
            show_default=False,
        ),
    ] = None,
    extra_layers: Annotated[
        str | None,
        typer.Option(
            "--extra-layers",
            metavar="N,...",
            help="trtllm: MoE layers the plan does not know, laid out in order (DeepSeek-V3's 61 for multi-token "
            "prediction).",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--form",
            metavar="49572|41141|53022",
            help="vllm: the pull request whose file is written. Default: 49572, which moeplace's plug-in reads too.",
            show_default=False,
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            "--part",
            metavar="shares|map",
            help="sglang-lp: the file of shares, or of the placement that goes with it. Default: shares.",
            show_default=False,
        ),
    ] = None,
    model_path: Annotated[
        str, typer.Option("--model-path", metavar="PATH", help="What the engine serves, for the commands shown.")
    ] = "MODEL",
    as_json: AsJson = False,
) -> None:
    """Write a plan for a serving engine, and give the commands that serve it, show that it is in force, and undo it.

    The engine's limits (equal slots a rank, equal shares, ...) are checked first.
    Engines without a way to take a plan deal experts to ranks in order: `moeplace permute` writes a checkpoint for
    those.

    Example:

      moeplace export plan.json --for sglang -o init_expert_location.json
      moeplace export plan.json --for sglang --model-path deepseek-ai/DeepSeek-V3 -o location.pt
      moeplace export plan.json --for vllm --form 41141 -o mapping.jsonl
      moeplace export plan.json --for trtllm --extra-layers 61 -o load_balancer.yaml
      moeplace export 3f2a91c0 --server http://plans:8311 --for sglang -o init_expert_location.json
    """
    from ...runtime.exporters.export import engine_usage, export_plan

    if engine == "permute":
        raise UnsupportedError(
            f"a permuted checkpoint is written from the checkpoint: moeplace permute CHECKPOINT --plan {plan} -o FOLDER"
        )
    if engine == "moeplace":
        refuse_idle("for moeplace's own file, which no engine is started with", "model_path")
    engine_options = {
        "hidden_layers": hidden_layers,
        "extra_layers": whole_numbers("--extra-layers", extra_layers),
        "form": form,
        "part": part,
    }
    options = {option: value for option, value in engine_options.items() if value is not None}
    if remote.server is None:
        check_plan_options([plan])
        exported = read_plan(plan, storage.db, **plan_context(files))
    else:
        refuse_idle("with --server, whose plans say their own model and cluster", "plan_model", "plan_topology")
        with service(remote.server) as client:
            exported = client.plan(plan)
    written = export_plan(exported, engine, output, **options)
    data: dict[str, Any] = {
        "engine": engine,
        "path": str(written),
        "sha256": hashlib.sha256(written.read_bytes()).hexdigest(),
        "usage": engine_usage(exported, engine, written.resolve(), model_path),
    }
    failure = None
    if storage.store:
        _, failure = attempted(lambda: keep_export(exported, engine, written, storage.db, data["sha256"]))
    emit(data, pairs(data, whole=True), as_json=as_json)
    end_unkept(failure, written)
