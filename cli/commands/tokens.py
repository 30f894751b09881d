"""`moeplace tokens`: who may use a service."""

from __future__ import annotations

import getpass
import math
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ..command_line import Command
from ..options import AsJson, StoreOptions, grouped
from ..output import Column, Table, emit, note, to_the_minute

if TYPE_CHECKING:
    from ...db.records import Actor

tokens_app = typer.Typer(
    help="Make, list and revoke access tokens of the service.\n\nExample:\n\n  moeplace tokens add ci --role submit"
)

COLUMNS = (
    Column("name", "name", right=False),
    Column("role", "role", right=False),
    Column("created", "made (UTC)", to_the_minute, right=False),
    Column("revoked", "revoked (UTC)", to_the_minute, right=False),
    Column("expires", "over (UTC)", to_the_minute, right=False),
    Column("used", "last used (UTC)", to_the_minute, right=False),
    Column("deployments", "for", ", ".join, right=False),
)


class RoleChoice(StrEnum):
    read = "read"
    submit = "submit"
    approve = "approve"


Name = Annotated[str, typer.Argument(metavar="NAME", help="Of the token: whose it is.", show_default=False)]


@tokens_app.command("add", cls=Command, no_args_is_help=True)
@grouped
def add_command(
    name: Name,
    storage: StoreOptions,
    role: Annotated[
        RoleChoice,
        typer.Option("--role", help="read: look. submit: also send routing and ask for solves. approve: everything."),
    ] = RoleChoice.read,
    deployment: Annotated[
        list[str] | None,
        typer.Option("--deployment", help="One that it is for; may be given again. Default: all.", show_default=False),
    ] = None,
    days: Annotated[
        float | None,
        typer.Option(
            "--days", min=0.0, max=36_499.0, help="After which it is over. Default: never.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a token. It is printed this once and kept as a hash only.

    Example:

      moeplace tokens add ci --role submit
      moeplace tokens add engine --deployment chat --days 90
    """
    from datetime import timedelta

    from ...db import Store

    if days is not None and math.isnan(days):
        raise typer.BadParameter("--days nan is no number of days; give one above 0, or leave it out")
    with Store.open(storage.db) as store:
        token = store.tokens.add(
            name,
            role.value,
            _operator(),
            deployments=deployment or None,
            lifetime=None if days is None else timedelta(days=days),
        )
    note("keep it: it is not shown again")
    if as_json:
        emit({"name": name, "role": role.value, "token": token}, as_json=True)
    else:
        typer.echo(token)


@tokens_app.command("list", cls=Command)
@grouped
def list_command(storage: StoreOptions, as_json: AsJson = False) -> None:
    """List tokens, without the tokens themselves.

    Example:

      moeplace tokens list
    """
    from ...db import Store

    with Store.open(storage.db) as store:
        rows = [entry.model_dump() for entry in store.tokens.all()]
    table = Table(COLUMNS, rows) if rows else Table((), (), footnotes=["There are no tokens."])
    emit(rows, table, as_json=as_json)


@tokens_app.command("revoke", cls=Command, no_args_is_help=True)
@grouped
def revoke_command(name: Name, storage: StoreOptions) -> None:
    """End a token, within seconds.

    Example:

      moeplace tokens revoke ci
    """
    from ...db import Store

    with Store.open(storage.db) as store:
        store.tokens.revoke(name, _operator())
    note(f"revoked {name}")


def _operator() -> Actor:
    from ...db.records import Actor

    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    # Whoever can write the database needs no token.
    return Actor(f"operator {user}"[:100], "approve")
