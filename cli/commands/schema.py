"""`moeplace schema`: the JSON Schemas of what `--json` prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ...placement.errors import InputError, nearest
from ..options import output_folder, output_option
from ..output import SCHEMA, note, wrote


def schema_command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Of a command, with dashes between its words: solve, plans-list. Without it the names are listed.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        output_option(
            "DIR", "Write every schema into this folder, which is made where it is not there.", output_folder
        ),
    ] = None,
) -> None:
    """Print the JSON Schema of what a command prints with --json.

    An output's `schema` names its schema and version, as in moeplace/solve/1; the version rises where a name goes or
    changes its meaning.

    Example:

      moeplace schema solve
      moeplace schema -o schemas
    """
    from ...placement.files import write_text
    from ..schemas import output_schema, output_types

    known = sorted(output_types())
    if name is not None and name not in known:
        raise InputError(f"no command {name!r} prints JSON; {nearest(name, known)}")
    if output is not None:
        for each in known if name is None else [name]:
            file = output / f"{each}.{SCHEMA}.json"
            write_text(file, json.dumps(output_schema(each), indent=1) + "\n")
        wrote(output)
    elif name is None:
        typer.echo("\n".join(known))
        note("moeplace schema NAME prints one of them")
    else:
        typer.echo(json.dumps(output_schema(name), indent=2))
