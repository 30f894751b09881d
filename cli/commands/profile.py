"""`moeplace profile`: record the routing of a script that is not edited for it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..options import recording_path
from ..output import note


class Mode(StrEnum):
    tokens = "tokens"
    counts = "counts"


def profile_command(
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND...", help="The script to run: python train.py ...", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="Folder for the trace, or statistics .npz.",
            show_default=False,
            callback=recording_path,
        ),
    ],
    mode: Annotated[
        Mode, typer.Option("--mode", help="Every token's experts, or counts by expert and window only.")
    ] = Mode.tokens,
    sample: Annotated[float, typer.Option("--sample", min=0.0, max=1.0, help="Share of sequences recorded.")] = 1.0,
) -> None:
    """Run a Python script and record the routing of the Transformers MoE models in it.

    The script needs no change, and gets everything after -- as it stands. It may be started by torchrun.
    moeplace ends with the script's exit code.

    Example:

      moeplace profile -o trace -- python generate.py --prompts prompts.txt
    """
    from ...profiler.run_script import run_recorded

    code = run_recorded(command, output, mode=mode.value, sample=sample)
    if code == 0:
        note(f"recorded into {output}; `moeplace stats {output}` shows what is in it")
    raise typer.Exit(code)
