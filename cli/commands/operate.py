"""What operators do on a running service: look at what it keeps and decides, approve, roll back, remove."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .. import completion
from ..command_line import Command
from ..options import STORE, AsJson, ModelOptions, TopologyOptions, grouped
from ..output import Column, Format, Table, emit, figure, note, pairs, to_the_minute
from ..remote import send_record, service

Server = Annotated[
    str,
    typer.Option(
        "--server",
        metavar="URL",
        envvar="MOEPLACE_SERVER",
        help="The running `moeplace serve`; MOEPLACE_TOKEN holds the token.",
        show_default=False,
        rich_help_panel=STORE,
    ),
]
Name = Annotated[str, typer.Argument(metavar="DEPLOYMENT", help="Its name.", show_default=False)]
Key = Annotated[int, typer.Argument(metavar="KEY", help="Its number.", min=1, show_default=False)]
Limit = Annotated[int, typer.Option("--limit", metavar="N", min=1, max=100_000, help="At most so many.")]
Comment = Annotated[str, typer.Option("--comment", help="For the audit log.", show_default=False)]
ByName = Annotated[
    str | None, typer.Option("--deployment", metavar="NAME", help="Of this one only.", show_default=False)
]


def _shown(
    records: Iterable[Any], columns: Sequence[tuple[str, str, Format]], as_json: bool, limit: int | None = None
) -> None:
    """The first so many records, as a table or JSON."""
    rows = [record.model_dump() for record in itertools.islice(records, limit)]
    shown = [Column(key, title, write, right=write not in (str, to_the_minute)) for key, title, write in columns]
    table = Table(shown, rows) if rows else Table((), (), footnotes=["There are none."])
    emit(rows, table, as_json=as_json)


def _one(record: Any, as_json: bool) -> None:
    """One record, a line a field."""
    data = record.model_dump() if hasattr(record, "model_dump") else dict(record)
    emit(data, pairs({key: to_the_minute(value) for key, value in data.items() if value is not None}), as_json=as_json)


def _group(what: str, example: str) -> typer.Typer:
    return typer.Typer(help=f"{what}\n\nExample:\n\n  moeplace {example} --server http://moeplace:8311")


models_app = _group("Models that a service keeps.", "models list")
topologies_app = _group("Clusters that a service keeps.", "topologies list")
deployments_app = _group("Deployments of a service.", "deployments list")
windows_app = _group("Count windows of a deployment.", "windows list chat")
decisions_app = _group("Decisions of a service, and what waits for approval.", "decisions list")
webhooks_app = _group("Webhooks of a deployment.", "webhooks list chat")
engines_app = _group("Engines that a service asks for their routing.", "engines show chat")
jobs_app = _group("Jobs of a service.", "jobs list")


@models_app.command("list", cls=Command)
@grouped
def list_models(server: Server, limit: Limit = 50, as_json: AsJson = False) -> None:
    """List models, newest first.

    Example:

      moeplace models list --server http://moeplace:8311
    """
    columns = (("id", "id", str), ("name", "name", str), ("created", "kept (UTC)", to_the_minute))
    with service(server) as client:
        _shown(client.models(), columns, as_json, limit)


@models_app.command("remove", cls=Command, no_args_is_help=True)
@grouped
def remove_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name or id.", show_default=False)],
    server: Server,
    as_json: AsJson = False,
) -> None:
    """Remove a model that no plan or deployment has.

    Example:

      moeplace models remove assistant --server http://moeplace:8311
    """
    _removed(server, "model", model, as_json)


@topologies_app.command("list", cls=Command)
@grouped
def list_topologies(server: Server, limit: Limit = 50, as_json: AsJson = False) -> None:
    """List clusters, newest first.

    Example:

      moeplace topologies list --server http://moeplace:8311
    """
    columns = (
        ("id", "id", str),
        ("name", "name", str),
        ("label", "label", str),
        ("devices", "devices", figure),
        ("nodes", "nodes", figure),
        ("created", "kept (UTC)", to_the_minute),
    )
    with service(server) as client:
        _shown(client.topologies(), columns, as_json, limit)


@topologies_app.command("remove", cls=Command, no_args_is_help=True)
@grouped
def remove_topology(
    topology: Annotated[str, typer.Argument(metavar="TOPOLOGY", help="Name or id.", show_default=False)],
    server: Server,
    as_json: AsJson = False,
) -> None:
    """Remove a cluster that no plan or deployment has.

    Example:

      moeplace topologies remove box --server http://moeplace:8311
    """
    _removed(server, "topology", topology, as_json)


def _removed(server: str, kind: Literal["model", "topology"], ref: str, as_json: bool) -> None:
    with service(server) as client:
        client.remove(kind, ref)
    _one({"removed": ref}, as_json)


@deployments_app.command("list", cls=Command)
@grouped
def list_deployments(server: Server, limit: Limit = 1000, as_json: AsJson = False) -> None:
    """List deployments by name.

    Example:

      moeplace deployments list --server http://moeplace:8311
    """
    columns = (
        ("name", "name", str),
        ("version", "version", figure),
        ("plan_id", "plan", str),
        ("model_id", "model", str),
        ("topology_id", "topology", str),
        ("created", "made (UTC)", to_the_minute),
    )
    with service(server) as client:
        _shown(client.deployments(), columns, as_json, limit)


@deployments_app.command("show", cls=Command, no_args_is_help=True)
@grouped
def show_deployment(name: Name, server: Server, as_json: AsJson = False) -> None:
    """Show a deployment: its plan, policy, what holds publication, and the alarm that is open.

    Example:

      moeplace deployments show chat --server http://moeplace:8311
    """
    with service(server) as client:
        _one(client.deployment(name), as_json)


@deployments_app.command("remove", cls=Command, no_args_is_help=True)
@grouped
def remove_deployment(name: Name, server: Server, as_json: AsJson = False) -> None:
    """Remove a deployment with its windows, decisions, webhooks and engine. Plans stay.

    Example:

      moeplace deployments remove chat --server http://moeplace:8311
    """
    with service(server) as client:
        client.remove_deployment(name)
    _one({"removed": name}, as_json)


@deployments_app.command("release", cls=Command, no_args_is_help=True)
@grouped
def release_deployment(name: Name, server: Server, as_json: AsJson = False) -> None:
    """Let automatic publication go on after a roll-back.

    Example:

      moeplace deployments release chat --server http://moeplace:8311
    """
    with service(server) as client:
        _one(client.release(name), as_json)


def deploy_command(
    source: Annotated[Path, typer.Argument(metavar="RECORD", help="Recorded routing.", show_default=False)],
    server: Server,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Of the deployment.", show_default=False)],
    shape: ModelOptions,
    cluster: TopologyOptions,
    engine: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="ENGINE",
            autocompletion=completion.engines,
            help="What its plans are for.",
            show_default=False,
        ),
    ] = None,
    publish: Annotated[
        bool, typer.Option("--automatic", help="Put in force what pays; otherwise a person approves.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a model, a cluster and a deployment on a service from a record, and send the record to it.

    Example:

      moeplace deploy trace --name chat --topology h100-hgx --server http://moeplace:8311
    """
    from ..parse import read_model, read_topology
    from ..routing_split import open_recording

    recording = open_recording(source, shape.model)
    spec, topology = read_model(shape, recording), read_topology(cluster)
    policy = {"publish": "automatic" if publish else "approval", **({"engine": engine} if engine else {})}
    with service(server) as client:
        made = client.add_deployment(name, client.add_model(spec).id, client.add_topology(topology).id, policy)
    note(send_record(server, recording, recording.statistics(), name))
    _one(made, as_json)


@windows_app.command("list", cls=Command, no_args_is_help=True)
@grouped
def list_windows(name: Name, server: Server, limit: Limit = 20, as_json: AsJson = False) -> None:
    """List a deployment's count windows, newest first.

    Example:

      moeplace windows list chat --server http://moeplace:8311
    """
    columns = (
        ("key", "key", figure),
        ("ended", "ended (UTC)", to_the_minute),
        ("received", "received (UTC)", to_the_minute),
        ("workload", "workload", str),
        ("pairs", "token-expert pairs", figure),
        ("merged", "of windows", figure),
    )
    with service(server) as client:
        _shown(client.windows(name), columns, as_json, limit)


@windows_app.command("remove", cls=Command, no_args_is_help=True)
@grouped
def remove_windows(
    name: Name,
    server: Server,
    before: Annotated[
        datetime | None,
        typer.Option("--before", help="Those that ended before this moment, UTC. Default: all.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Remove a deployment's count windows.

    Example:

      moeplace windows remove chat --before 2026-01-01 --server http://moeplace:8311
    """
    from datetime import UTC

    with service(server) as client:
        moment = None if before is None else before.replace(tzinfo=UTC)
        _one({"removed": client.remove_windows(name, ended_before=moment)}, as_json)


@decisions_app.command("list", cls=Command)
@grouped
def list_decisions(
    server: Server,
    deployment: ByName = None,
    waiting: Annotated[bool, typer.Option("--waiting", help="Those that wait for approval only.")] = False,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """List decisions, newest first.

    Example:

      moeplace decisions list --waiting --server http://moeplace:8311
    """
    columns = (
        ("key", "key", figure),
        ("deployment", "deployment", str),
        ("created", "made (UTC)", to_the_minute),
        ("action", "action", str),
        ("state", "state", str),
        ("candidate_id", "candidate", str),
        ("reason", "reason", str),
    )
    with service(server) as client:
        _shown(client.decisions(deployment, "waiting" if waiting else None), columns, as_json, limit)


@decisions_app.command("show", cls=Command, no_args_is_help=True)
@grouped
def show_decision(key: Key, server: Server, as_json: AsJson = False) -> None:
    """Show a decision with its figures.

    Example:

      moeplace decisions show 3 --server http://moeplace:8311
    """
    with service(server) as client:
        _one(client.decision(key), as_json)


def approve_command(key: Key, server: Server, comment: Comment = "", as_json: AsJson = False) -> None:
    """Approve a decision that waits: its plan is put in force.

    Example:

      moeplace approve 3 --comment "seen" --server http://moeplace:8311
    """
    with service(server) as client:
        _one(client.approve(key, comment), as_json)


def reject_command(key: Key, server: Server, comment: Comment = "", as_json: AsJson = False) -> None:
    """Reject a decision that waits: the plan in force stays.

    Example:

      moeplace reject 3 --server http://moeplace:8311
    """
    with service(server) as client:
        _one(client.reject(key, comment), as_json)


def rollback_command(
    name: Name,
    version: Annotated[int, typer.Argument(metavar="VERSION", help="To go back to.", min=1, show_default=False)],
    server: Server,
    comment: Comment = "",
    as_json: AsJson = False,
) -> None:
    """Put an earlier version's plan in force again. Nothing is published automatically until traffic changes.

    Example:

      moeplace rollback chat 2 --server http://moeplace:8311
    """
    with service(server) as client:
        _one(client.rollback(name, version, comment), as_json)


@webhooks_app.command("list", cls=Command, no_args_is_help=True)
@grouped
def list_webhooks(name: Name, server: Server, as_json: AsJson = False) -> None:
    """List a deployment's webhooks.

    Example:

      moeplace webhooks list chat --server http://moeplace:8311
    """
    columns = (("key", "key", figure), ("url", "url", str), ("created", "made (UTC)", to_the_minute))
    with service(server) as client:
        _shown(client.webhooks(name), columns, as_json)


@webhooks_app.command("add", cls=Command, no_args_is_help=True)
@grouped
def add_webhook(
    name: Name,
    url: Annotated[str, typer.Argument(metavar="ADDRESS", help="That is called.", show_default=False)],
    server: Server,
    event: Annotated[
        list[str] | None,
        typer.Option("--event", help="A kind to send; may be given again. Default: all.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Have events sent to an address. The secret that signs them is printed this once.

    Example:

      moeplace webhooks add chat https://ops.example/hook --event drift.alarm --server http://moeplace:8311
    """
    with service(server) as client:
        _one(client.add_webhook(name, url, events=event or None), as_json)


@webhooks_app.command("remove", cls=Command, no_args_is_help=True)
@grouped
def remove_webhook(name: Name, key: Key, server: Server, as_json: AsJson = False) -> None:
    """End a webhook, and what it was not sent yet.

    Example:

      moeplace webhooks remove chat 1 --server http://moeplace:8311
    """
    with service(server) as client:
        client.remove_webhook(name, key)
    _one({"removed": key}, as_json)


@webhooks_app.command("deliveries", cls=Command, no_args_is_help=True)
@grouped
def list_deliveries(name: Name, key: Key, server: Server, limit: Limit = 20, as_json: AsJson = False) -> None:
    """List a webhook's events, newest first, and what came of sending them.

    Example:

      moeplace webhooks deliveries chat 1 --server http://moeplace:8311
    """
    columns = (
        ("key", "key", figure),
        ("created", "made (UTC)", to_the_minute),
        ("state", "state", str),
        ("attempts", "attempts", figure),
        ("outcome", "outcome", str),
    )
    with service(server) as client:
        _shown(client.deliveries(name, key), columns, as_json, limit)


@engines_app.command("show", cls=Command, no_args_is_help=True)
@grouped
def show_engine(name: Name, server: Server, as_json: AsJson = False) -> None:
    """Show the engine that is asked for a deployment's routing, and what failed.

    Example:

      moeplace engines show chat --server http://moeplace:8311
    """
    with service(server) as client:
        _one(client.engine(name), as_json)


@engines_app.command("set", cls=Command, no_args_is_help=True)
@grouped
def set_engine(
    name: Name,
    url: Annotated[str, typer.Argument(metavar="ADDRESS", help="Of the engine.", show_default=False)],
    server: Server,
    recorder: Annotated[str, typer.Option("--recorder", help="Name of the folder that it writes to.")] = "default",
    every: Annotated[float, typer.Option("--every", min=1.0, help="Seconds between recordings.")] = 60.0,
    span: Annotated[float, typer.Option("--span", min=0.05, help="Seconds of each.")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Have an engine asked for a deployment's routing.

    Example:

      moeplace engines set chat http://engine:30000 --every 60 --server http://moeplace:8311
    """
    with service(server) as client:
        _one(client.set_engine(name, url, recorder=recorder, every=every, span=span), as_json)


@engines_app.command("remove", cls=Command, no_args_is_help=True)
@grouped
def remove_engine(name: Name, server: Server, as_json: AsJson = False) -> None:
    """Ask an engine for routing no more.

    Example:

      moeplace engines remove chat --server http://moeplace:8311
    """
    with service(server) as client:
        client.remove_engine(name)
    _one({"removed": name}, as_json)


@jobs_app.command("list", cls=Command)
@grouped
def list_jobs(server: Server, deployment: ByName = None, limit: Limit = 20, as_json: AsJson = False) -> None:
    """List jobs, newest first.

    Example:

      moeplace jobs list --deployment chat --server http://moeplace:8311
    """
    columns = (
        ("key", "key", figure),
        ("kind", "kind", str),
        ("deployment", "deployment", str),
        ("state", "state", str),
        ("actor", "asked for by", str),
        ("created", "at (UTC)", to_the_minute),
        ("error", "error", str),
    )
    with service(server) as client:
        _shown(client.jobs(deployment=deployment), columns, as_json, limit)


@jobs_app.command("show", cls=Command, no_args_is_help=True)
@grouped
def show_job(key: Key, server: Server, as_json: AsJson = False) -> None:
    """Show how far a job is, and its result.

    Example:

      moeplace jobs show 12 --server http://moeplace:8311
    """
    with service(server) as client:
        _one(client.job(key), as_json)


@jobs_app.command("cancel", cls=Command, no_args_is_help=True)
@grouped
def cancel_job(key: Key, server: Server, as_json: AsJson = False) -> None:
    """End a job that has not ended yet.

    Example:

      moeplace jobs cancel 12 --server http://moeplace:8311
    """
    with service(server) as client:
        _one(client.cancel(key), as_json)
