"""`moeplace permute`: a checkpoint whose experts stand in a plan's order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..._display import plural
from .. import completion
from ..options import AsJson, KeepOptions, PlanFileOptions, new_folder, output_option
from ..output import emit, pairs, working
from ..remote import check_plan_options, plan_context, read_plan
from ..save import attempted, check_store, end_unkept, keep_export


def permute_command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="Folder of a Transformers checkpoint in safetensors.", show_default=False
        ),
    ],
    plan: Annotated[
        str,
        typer.Option(
            "--plan",
            metavar="PLAN",
            autocompletion=completion.plans,
            help="A plan file, an engine's own file of a placement (with --plan-topology), or a stored plan's name or "
            "id.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, output_option("DIR", "Folder to write; must not be there.", new_folder)],
    storage: KeepOptions,
    files: PlanFileOptions,
    invert: Annotated[
        bool, typer.Option("--invert", help="Undo: CHECKPOINT was permuted by this plan, DIR becomes the original.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Compare logits on a few prompts, or every byte where the model does not fit into memory."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint whose experts stand in a plan's order.

    Any engine that deals experts to ranks in order then runs the plan: vLLM, SGLang, Megatron-LM, DeepSpeed, torchtitan
    and others by default. Routers, biases, expert weights and their scales move together; the logits stay.
    What a tensor is, its name and its shape against the config say; what they leave open is refused by name.
    Weights are streamed: a checkpoint of any size takes little memory, and as much disk as it has.

    Example:

      moeplace permute Mixtral-8x7B --plan plan.json -o Mixtral-8x7B-placed
      moeplace permute Mixtral-8x7B-placed --plan plan.json -o Mixtral-8x7B --invert
    """
    from ...runtime.permute.checkpoint import permute_checkpoint

    check_plan_options([plan])
    if files.plan_model is None and (checkpoint / "config.json").is_file():
        files = replace(files, plan_model=checkpoint)
    placed = read_plan(plan, storage.db, **plan_context(files))
    if storage.store:
        check_store(storage.db)
    with working(f"writing {output}") as update:
        written = permute_checkpoint(
            checkpoint,
            placed,
            output,
            invert=invert,
            verify=verify,
            progress=lambda done, total: (
                update(f"comparing {output} with {checkpoint}", None)
                if verify and done >= total
                else update(f"writing {output}", done / max(total, 1))
            ),
        )
    failure = None
    if storage.store and not invert:
        _, failure = attempted(lambda: keep_export(placed, "permute", written.folder, storage.db))
    data: dict[str, Any] = {
        "path": str(written.folder),
        "inverted": invert,
        "weight_files": list(written.weight_files),
        "bytes": written.bytes_written,
        "copied": list(written.copied),
        "left_out": list(written.left_out),
        "verified": written.verified or None,
    }
    shown = {
        "wrote": f"{written.bytes_written:,} bytes of weights in {plural(len(written.weight_files), 'file')} in "
        f"{written.folder}",
        "copied": ", ".join(written.copied) or None,
        "left out": ", ".join(written.left_out) or None,
        "verified": written.verified or None,
        "use": f"load it in place of {checkpoint}, with experts dealt to ranks in order",
    }
    emit(data, pairs(shown), as_json=as_json)
    end_unkept(failure, written.folder)
