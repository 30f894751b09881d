"""`moeplace pareto`: what redundancy, bytes moved and survivable failures cost in step time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...placement.errors import SolveError
from .. import completion
from ..command_line import refuse_idle
from ..options import (
    SOLVING,
    AsJson,
    KeepOptions,
    ModelOptions,
    ObjectiveOptions,
    Plot,
    PlotFile,
    RoutingPath,
    StudyOptions,
    TopologyOptions,
    output_folder,
    output_option,
)
from ..output import emit, interrupted, working, wrote
from ..parse import (
    one_pool,
    read_batches,
    read_model,
    read_objective,
    read_size,
    read_topology,
    solved_batches,
    split_list,
    study_solver,
)
from ..plots import front_drawings, show
from ..remote import Study, read_plan, service, sweep_remotely
from ..routing_split import (
    RoutingSplit,
    described_steps,
    held_out_in_words,
    judged_steps,
    open_recording,
    steps_in_words,
    study_routing,
)
from ..run_comparison import warn_of_idle_devices
from ..save import attempted, check_store, end_unkept, end_unwritten, keep_judged_plans
from ..tables import pareto_table

if TYPE_CHECKING:
    from ...placement.degraded import Kind
    from ...placement.problem import Problem
    from ...solvers.pareto import Front

PAGE = "front.html"
TOLERATE: dict[str, Kind | None] = {"nothing": None, "device": "device", "node": "node"}


def pareto_command(
    routing: RoutingPath,
    model: ModelOptions,
    topology: TopologyOptions,
    objective: ObjectiveOptions,
    study: StudyOptions,
    storage: KeepOptions,
    redundant: Annotated[
        str | None,
        typer.Option(
            "--redundant",
            metavar="N,...",
            help="Slots a layer beyond one an expert. Default: 0, 1/8, 1/4, 1/2 and 1 an expert, as far as memory "
            "goes.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None,
    slots: Annotated[
        str | None,
        typer.Option(
            "--slots",
            metavar="N,...",
            help="Slots a layer: --redundant and the experts.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None,
    tolerate: Annotated[
        str,
        typer.Option(
            "--tolerate",
            metavar="nothing,device,node",
            help="Which single failures plans are asked to survive, as many of them as the slots allow.",
            rich_help_panel=SOLVING,
        ),
    ] = "nothing,device,node",
    current: Annotated[
        str | None,
        typer.Option(
            "--current",
            metavar="PLAN",
            autocompletion=completion.plans,
            help="The plan in force: bytes moved are counted from it.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None,
    max_moved: Annotated[
        str | None,
        typer.Option(
            "--max-moved",
            metavar="SIZE,...",
            help="Most expert weights that may travel from --current: sizes such as 500MB or 2GB, or any. "
            "Default: any, and with --current also 1/16 and 1/4 of all weights.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        output_option(
            "DIR",
            f"Write every point's plan and the plots ({PAGE}) into this folder, which is made where it is not there.",
            output_folder,
        ),
    ] = None,
    plot: Plot = False,
    plot_file: PlotFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what shorter steps cost: the front of step time, memory, bytes moved and survivable failures.

    Solves once for each number of redundant slots, kind of failures to survive and limit of bytes moved, judges all
    plans on the same held-out steps, and marks those that no other beats in everything. Ctrl-C ends the sweep and keeps
    what is finished.

    Of counts alone windows are held out, and steps drawn from their loads.

    Example:

      moeplace pareto trace --topology h100-hgx --nodes 2 --devices-per-node 4 -o front
      moeplace pareto trace --topology h100-hgx --solver search --server http://solver:8311
    """
    from ...placement.problem import Problem
    from ...placement.step_mix import step_mix
    from ...solvers.pareto import pareto

    choice, server, seed = study_solver(study), study.server, study.seed
    if output is None and not storage.store and server is None:
        raise typer.BadParameter("the plans would go nowhere: give --output, or leave out --no-store")
    if max_moved is not None and current is None:
        raise typer.BadParameter("--max-moved counts from --current, the plan in force")
    limits = None if max_moved is None else [_limit(entry) for entry in split_list(max_moved)]
    if slots is not None and redundant is not None:
        raise typer.BadParameter("give --slots or --redundant, not both")
    counts, totals = _whole_numbers("--redundant", redundant), _whole_numbers("--slots", slots)
    kinds = _kinds(tolerate)
    cluster, goal = read_topology(topology), read_objective(objective, study.engine)
    stores = storage.store and server is None
    if server is not None:
        refuse_idle("with a service, which keeps its plans", "db", "store")
    if stores:
        check_store(storage.db)
    with working("reading the routing") as update:
        recording = open_recording(routing, model.model)
        statistics, split = study_routing(recording, study, goal, seed)
        spec = read_model(model, recording)
        if totals is not None:
            counts = _beyond_experts(totals, spec.experts)
        in_force = None if current is None else read_plan(current, storage.db, server, model=spec, topology=cluster)
        problem = one_pool(
            Problem(
                model=spec,
                topology=cluster,
                statistics=statistics,
                objective=goal,
                engine=study.engine or (in_force.provenance.engine or None if in_force else None),
                batches=read_batches(study) or (() if in_force is None else solved_batches(in_force)),
            ),
            study,
        )
        warn_of_idle_devices(problem)
        if server is not None and isinstance(split, RoutingSplit):
            answer = sweep_remotely(
                server,
                problem,
                Study(split, study, choice),
                in_force,
                counts,
                kinds,
                limits,
                update,
            )
            data = answer | {"held_out": split.description}
            files = [] if output is None else fetch_front(server, data, output)
            for point, file in zip(data["points"], files, strict=False):
                point["file"] = str(file)
            emit(
                data,
                pareto_table(data, f"{data['steps']}. {split.description}. Step times: {data['prediction']}."),
                as_json=as_json,
                mix=step_mix(problem),
            )
            if plot or plot_file:
                show(front_drawings(data), plot_file, plot and not as_json)
            return
        replayed = judged_steps(split, problem, study.steps, seed)
        held_out, kinds_of_steps = held_out_in_words(replayed, split), steps_in_words(replayed, split)
        front = pareto(
            problem,
            replayed,
            redundant=counts,
            tolerate=kinds,
            current=in_force,
            max_moved=limits,
            solver=choice.solver,
            seconds=study.seconds,
            seed=seed,
            options=choice.options,
            progress=lambda news: update(f"{news.message} ({news.done + 1} of {news.total})", news.fraction),
        )
        update("keeping the plans", None)
        written, unwritten = None, None
        if output is not None:
            written, unwritten = attempted(partial(save_front, front, problem, kinds_of_steps, held_out, output))
        judged = [(point.plan, point.evaluation.by_batch()) for point in front.points]
        stored, failure = [], None
        if stores:
            keys, failure = attempted(
                lambda: keep_judged_plans(judged, problem.statistics, replayed.by_batch(), storage.db)
            )
            stored = keys or []
    if front.interrupted:
        interrupted("interrupted: these are the points finished by then")
    data = front.to_dict(written or [], stored) | {"steps": kinds_of_steps, "held_out": held_out}
    described = described_steps(replayed, split, data["prediction"])
    emit(data, pareto_table(data, described), as_json=as_json, mix=step_mix(problem))
    if plot or plot_file:
        show(front_drawings(data), plot_file, plot and not as_json)
    end_unwritten(unwritten)
    end_unkept(failure, output)
    if not front.points and not front.interrupted:
        raise SolveError("none of the points asked for has a plan; their reasons are above")


def plan_file(folder: Path, number: int, point: str) -> Path:
    """Where a point's plan goes."""
    name = point.replace("+", "").replace(", ", "-").replace(" ", "-").replace("<=", "at-most")
    return folder / f"{number:02d}-{name}.json"


def fetch_front(server: str, data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes each point's plan as the service keeps it; returns the files."""
    files = [plan_file(folder, number, point["point"]) for number, point in enumerate(data["points"])]
    with service(server) as client:
        for point, file in zip(data["points"], files, strict=True):
            client.plan(point["stored_as"]).save(file)
    wrote(f"{len(files)} plans")
    return files


def save_front(front: Front, problem: Problem, steps: str, held_out: str, folder: Path) -> list[Path]:
    """Writes each point's plan, numbered in their order, and the page of plots; returns the plans' files."""
    from ..report import build_front_page, write_front_page

    files = []
    for number, point in enumerate(front.points):
        files.append(plan_file(folder, number, point.name))
        point.plan.save(files[-1])
    write_front_page(build_front_page(front, problem, steps, held_out), folder / PAGE)
    wrote(f"{len(files)} plans and {folder / PAGE}")
    return files


def _beyond_experts(slots: list[int], experts: int) -> list[int]:
    if min(slots) < experts:
        raise typer.BadParameter(f"--slots {min(slots)} are fewer than the model's {experts} experts")
    return [count - experts for count in slots]


def _whole_numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    entries = split_list(text)
    if not entries or not all(entry.isdecimal() and len(entry) < 10 for entry in entries):
        raise typer.BadParameter(f"{option} {text!r} must be whole numbers with commas between")
    return [int(entry) for entry in entries]


def _limit(text: str) -> float | None:
    return None if text == "any" else read_size("--max-moved", text)


def _kinds(text: str) -> list[Kind | None]:
    entries = split_list(text)
    if not entries or not TOLERATE.keys() >= set(entries):
        raise typer.BadParameter(f"--tolerate {text!r} must name some of {', '.join(TOLERATE)}")
    return [TOLERATE[entry] for entry in entries]
