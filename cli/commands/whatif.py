"""`moeplace whatif`: what a failure or another cluster does to a plan."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import completion
from ..command_line import refuse_idle
from ..options import (
    CLUSTER,
    SOLVING,
    AsJson,
    ObjectiveOptions,
    PlanFileOptions,
    PlanReference,
    Redundant,
    RoutingPath,
    StoreOptions,
    StudyOptions,
    TopologyOptions,
    output_folder,
    output_option,
)
from ..output import emit, interrupted, working, wrote
from ..parse import (
    asked_slots,
    one_pool,
    read_batches,
    read_objective,
    read_size,
    read_slots,
    read_topology,
    solved_batches,
    study_solver,
)
from ..remote import Study, check_plan_options, is_engines_own, plan_context, read_plan, service, what_if_remotely
from ..routing_split import (
    RoutingSplit,
    described_steps,
    held_out_in_words,
    judged_steps,
    open_recording,
    steps_in_words,
    study_routing,
)
from ..save import attempted, end_unwritten
from ..tables import what_if_table

if TYPE_CHECKING:
    from ...placement.plan import Plan
    from ...solvers.what_if import Outcome, WhatIf


def whatif_command(
    plan: PlanReference,
    routing: RoutingPath,
    objective: ObjectiveOptions,
    study: StudyOptions,
    storage: StoreOptions,
    files: PlanFileOptions,
    lose: Annotated[
        list[str] | None,
        typer.Option(
            "--lose",
            metavar="FAILURE",
            help="device:N or node:N, or several joined by + that are lost together; may be given again.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    n_1: Annotated[
        bool,
        typer.Option(
            "--n-1",
            help="The loss of each device and of each node, one at a time; the default when nothing else is asked.",
            rich_help_panel=CLUSTER,
        ),
    ] = False,
    devices: Annotated[
        int | None,
        typer.Option(
            "--devices",
            metavar="N",
            min=1,
            help="The plan's cluster with so many devices in all.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes",
            metavar="N",
            min=1,
            help="The plan's cluster with so many nodes, or nodes of --topology.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    topology: Annotated[
        str | None,
        typer.Option(
            "--topology",
            "-t",
            metavar="NAME|FILE",
            autocompletion=completion.presets,
            help="Another cluster: a preset or a file.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    devices_per_node: Annotated[
        int | None,
        typer.Option(
            "--devices-per-node",
            metavar="N",
            min=1,
            help="Devices used in each node of a preset --topology.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    slots: Annotated[
        str | None,
        typer.Option(
            "--slots",
            metavar="N[,N...]",
            help="Slots a layer of the ready plans, or a number for each layer, by commas; alone, a change of its own. "
            "Default: those of the devices that stay, or the plan's.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None,
    redundant: Redundant = None,
    ready: Annotated[
        bool, typer.Option("--ready/--no-ready", help="Solve a ready plan for each change.", rich_help_panel=SOLVING)
    ] = True,
    max_moved: Annotated[
        str | None,
        typer.Option(
            "--max-moved",
            metavar="SIZE",
            help="Most expert weights that may travel between survivors to a ready plan after a failure: 500MB, 2GB.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None,
    keep_ranks: Annotated[
        bool,
        typer.Option(
            "--keep-ranks",
            help="After a failure the devices left keep their numbers, lost ones having no slots: for engines that run "
            "on with masked ranks (sglang).",
            rich_help_panel=SOLVING,
        ),
    ] = False,
    output: Annotated[
        Path | None,
        output_option("DIR", "Write the plans into this folder, which is made where it is not there.", output_folder),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a lost device or node does to a plan, or another cluster, and get a plan ready for it.

    For each failure: which experts lose their last replica; the predicted time of held-out steps when the surviving
    replicas take the lost ones' tokens (unrepaired), or when the lost experts are loaded again and nothing else moves
    (repaired); and a plan solved for what is left (ready), with the bytes to move between devices and to load from
    storage. Ctrl-C ends the sweep and keeps what is finished.

    Of counts alone windows are held out, and steps drawn from their loads.

    Example:

      moeplace whatif plan.json trace -o contingency
      moeplace whatif plan.json trace --lose device:3 --lose node:1
      moeplace whatif plan.json trace --devices 16 --slots 288
      moeplace whatif production trace --solver search --server http://solver:8311
    """
    from ...placement.problem import Problem
    from ...placement.step_mix import step_mix
    from ...solvers.what_if import parse_changes, what_if

    choice, server, seed = study_solver(study), study.server, study.seed
    asked = asked_changes(lose or [], n_1, devices, nodes, topology, devices_per_node, read_slots(slots))
    most_moved = None if max_moved is None else read_size("--max-moved", max_moved)
    check_plan_options([plan], server)
    if not ready:
        refuse_idle("with --no-ready, which solves for nothing", *READY, *([] if server is not None else ["solver"]))
    with working("reading the routing") as update:
        opened = cache(lambda: open_recording(routing))
        context = plan_context(files, opened) if is_engines_own(plan) else {}
        current = read_plan(plan, storage.db, server, **context)
        asked["slots"] = asked_slots(slots, redundant, current.model.experts)
        recording = opened()
        changes = parse_changes(current.topology, **asked)
        if not any(change.stays for change in changes):
            refuse_idle("without a failure (--lose, --n-1)", "max_moved", "keep_ranks")
        goal = read_objective(objective)
        statistics, split = study_routing(recording, study, goal, seed)
        problem = one_pool(
            Problem(
                model=current.model,
                topology=current.topology,
                statistics=statistics,
                objective=goal,
                engine=study.engine or current.provenance.engine or None,
                batches=read_batches(study) or solved_batches(current),
            ),
            study,
        )
        if server is not None and isinstance(split, RoutingSplit):
            asked |= {"keep_ranks": keep_ranks}
            data = what_if_remotely(
                server, current, problem, Study(split, study, choice), asked, ready, most_moved, update
            )
            if output is not None:
                fetch_plans(server, data, output)
            described = f"{data['steps']}. {split.description}. Step times: {data['prediction']}."
            emit(
                data | {"held_out": split.description},
                what_if_table(data, described),
                as_json=as_json,
                mix=step_mix(problem),
            )
            return
        replayed = judged_steps(split, problem, study.steps, seed)
        held_out = held_out_in_words(replayed, split)
        result = what_if(
            current,
            problem,
            replayed,
            changes,
            ready=ready,
            max_moved_bytes=most_moved,
            keep_ranks=keep_ranks,
            solver=choice.solver,
            seconds=study.seconds,
            seed=seed,
            options=choice.options,
            progress=lambda news: update(f"{news.message} ({news.done + 1} of {news.total})", news.fraction),
        )
    if result.interrupted:
        interrupted(f"interrupted: {len(result.outcomes)} of {len(changes)} changes looked at")
    saved, unwritten = None, None
    if output is not None:
        saved, unwritten = attempted(partial(save_plans, result, output))
    written = saved or {}

    def about(outcome: Outcome, kind_of_plan: str, _: Plan) -> dict[str, str | None]:
        file = written.get(outcome.change.name, {}).get(kind_of_plan)
        return {"file": None if file is None else str(file)}

    data = result.to_dict(about)
    kinds = steps_in_words(replayed, split)
    described = described_steps(replayed, split, data["prediction"])
    emit(
        data | {"steps": kinds, "held_out": held_out},
        what_if_table(data, described),
        as_json=as_json,
        mix=step_mix(problem),
    )
    end_unwritten(unwritten)


READY = ("slots", "redundant", "max_moved", "keep_ranks", "seconds", "output")
"""Options of ready plans."""


def asked_changes(
    lose: list[str],
    n_1: bool,
    devices: int | None,
    nodes: int | None,
    topology: str | None,
    devices_per_node: int | None,
    slots: int | list[int] | None,
) -> dict[str, Any]:
    """The changes that the options ask for, as `parse_changes` takes them."""
    if topology is None and devices_per_node is not None:
        raise typer.BadParameter("--devices-per-node goes with --topology")
    if topology is not None and devices is not None:
        raise typer.BadParameter("--devices resizes the plan's own cluster; with --topology give --nodes")
    other = None
    if topology is not None:
        other = read_topology(TopologyOptions(topology=topology, nodes=nodes, devices_per_node=devices_per_node))
    return {
        "lose": lose,
        "n_1": n_1,
        "devices": devices,
        "nodes": None if topology is not None else nodes,
        "topology": other,
        "slots": slots,
    }


def plan_file(folder: Path, change: str, kind: str) -> Path:
    """Where a change's ready or repaired plan goes."""
    name = change.replace(":", "-").replace(", ", "-").replace(" ", "-").replace("/", "-")
    return folder / f"{name}-{kind}.json"


def save_plans(result: WhatIf, folder: Path) -> dict[str, dict[str, Path]]:
    """Writes the ready plans, and the repaired ones, by the names of their changes; returns where each went."""
    files: dict[str, dict[str, Path]] = {}
    for outcome in result.outcomes:
        for kind, judged in (("ready", outcome.ready), ("repaired", outcome.repaired)):
            if judged is not None:
                path = plan_file(folder, outcome.change.name, kind)
                judged.plan.save(path)
                files.setdefault(outcome.change.name, {})[kind] = path
                wrote(path)
    return files


def fetch_plans(server: str, data: dict[str, Any], folder: Path) -> None:
    """Writes the plans of a service's answer, and notes in it where each went."""
    with service(server) as client:
        for row in data["changes"]:
            for kind in ("ready", "repaired"):
                if row[kind] is not None:
                    path = plan_file(folder, row["change"], kind)
                    client.plan(row[kind]["stored_as"]).save(path)
                    row[kind]["file"] = str(path)
                    wrote(path)
