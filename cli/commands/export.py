"""`moeplace export`: a plan as an engine reads it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..inputs import read_plan
from ..options import AsJson, KeepOptions, PlanReference
from ..output import emit, pairs
from ..progress import working

if TYPE_CHECKING:
    from ...placement.plan import Plan

CHECKPOINT = "transformers"


def export_command(
    plan: PlanReference,
    engine: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="ENGINE",
            help="sglang, vllm, vllm-ascend, trtllm, moeplace (the plan file itself), or transformers (a permuted "
            "checkpoint).",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="File to write; a new folder for a checkpoint.",
            show_default=False,
        ),
    ],
    storage: KeepOptions,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            metavar="DIR",
            help="With --for transformers: the safetensors checkpoint to permute.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a plan for a serving engine, and say how to start the engine with it.

    The engine's limits (equal slots a rank, equal shares, ...) are checked first.
    A permuted checkpoint suits every engine that deals experts to ranks in order, and gives the same logits.

    Example:

      moeplace export plan.json --for sglang -o init_expert_location.json
      moeplace export plan.json --for transformers --checkpoint Mixtral-8x7B -o Mixtral-8x7B-placed
    """
    if (engine == CHECKPOINT) != (checkpoint is not None):
        raise typer.BadParameter(f"--checkpoint and --for {CHECKPOINT} go together")
    exported = read_plan(plan, storage.db)
    if checkpoint is None:
        data = _write_file(exported, engine, output)
    else:
        data = _write_checkpoint(exported, checkpoint, output)
    if storage.store:
        _keep(exported, data, storage.db)
    emit(data, pairs(data), as_json=as_json)


def _write_file(plan: Plan, engine: str, output: Path) -> dict[str, Any]:
    from ...runtime.exporters import engine_usage, export_plan

    written = export_plan(plan, engine, output)
    return {
        "engine": engine,
        "path": str(written),
        "sha256": hashlib.sha256(written.read_bytes()).hexdigest(),
        "usage": engine_usage(plan, engine, written),
    }


def _write_checkpoint(plan: Plan, checkpoint: Path, output: Path) -> dict[str, Any]:
    from ...runtime.permute import permute_checkpoint

    with working(f"writing {output}") as update:
        written = permute_checkpoint(
            checkpoint,
            plan,
            output,
            progress=lambda done, total: update(f"writing {output}", done / max(total, 1)),
        )
    return {
        "engine": CHECKPOINT,
        "path": str(written.folder),
        "sha256": None,
        "weight_files": len(written.weight_files),
        "bytes": written.bytes_written,
        "left_out": ", ".join(written.left_out) or None,
        "usage": f"load {written.folder} in place of {checkpoint}, with experts dealt to ranks in order",
    }


def _keep(plan: Plan, data: dict[str, Any], db: str | None) -> None:
    from ...db import Store

    with Store.open(db) as store:
        path = Path(data["path"]).resolve()
        store.add_export(store.add_plan(plan).id, format=data["engine"], path=path, sha256=data["sha256"] or "")
