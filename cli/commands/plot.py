"""`moeplace plot`: records, plans and what commands told of them, as charts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Option

from ...placement.errors import FileFormatError, InputError
from .. import completion
from ..command_line import GIVEN, refuse_idle
from ..options import (
    Engine,
    HeldOutOptions,
    ObjectiveOptions,
    PlanFileOptions,
    PlanSeed,
    StepOptions,
    StoreOptions,
    plot_file,
)
from ..output import working
from ..plots import (
    Drawing,
    comparison_drawings,
    front_drawings,
    judged_drawings,
    plan_drawings,
    record_drawings,
    show,
    slot_front_drawings,
)
from ..remote import PLAN_FILE_OPTIONS, check_plan_options, is_engines_own, plan_context, read_plan
from ..routing_split import counted, open_recording
from ..run_comparison import plan_name
from .evaluate import judge_plans

if TYPE_CHECKING:
    from ...profiler.read import Recording


def plot_command(
    things: Annotated[
        list[str],
        Argument(
            metavar="RECORD|PLAN|OUTPUT...",
            autocompletion=completion.plans,
            help="A record of routing; plans, as files or by the names they are stored under; what `compare`, "
            "`evaluate`, `pareto` or `solve` printed with --json.",
            show_default=False,
        ),
    ],
    objective: ObjectiveOptions,
    held_out: HeldOutOptions,
    steps: StepOptions,
    storage: StoreOptions,
    files: PlanFileOptions,
    output: Annotated[
        Path | None,
        Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Draw into a file that ends in .svg, .png or .html, instead of the terminal.",
            show_default=False,
            callback=plot_file,
        ),
    ] = None,
    engine: Engine = None,
    seed: PlanSeed = None,
) -> None:
    """Draw a record, plans on a record, plans alone, or what was printed as JSON.

    Plans and a record: step times of the plans side by side, the balance of their layers, loads of devices. A record
    alone: loads of experts. A plan alone: replicas of experts. JSON: fronts, and what steps are spent on. Terminals
    that show images (kitty's protocol, iTerm2's, Sixel) show charts, all others and pipes characters.

    Example:

      moeplace plot trace
      moeplace plot plan.json other.json trace --decode 128 -o plans.svg
    """
    subjects = [_told(each) for each in things]
    records = [thing.path for thing in subjects if thing.kind == "record"]
    plans = [thing.name for thing in subjects if thing.kind == "plan"]
    if len(records) > 1:
        raise BadParameter(f"{records[0]} and {records[1]} are both records; name one")
    if not (records and plans):
        refuse_idle("unless plans are judged on a record: name both", *(GIVEN.keys() - PLANS_ALONE))
    check_plan_options(plans)
    drawings: list[Drawing] = []
    for thing in subjects:
        drawings += _of_output(thing.name, thing.data) if thing.data is not None else []
    if records and plans:
        judged = judge_plans(plans, records[0], objective, held_out, steps, storage.db, files, engine, seed)
        own = [entry.name for entry in judged.comparison.entries if entry.was_given]
        drawings += comparison_drawings(judged.comparison, own if len(own) > 1 else [*own, "contiguous"])
    elif records:
        with working("counting") as update:
            drawings += record_drawings(counted(open_recording(records[0]), update))
    for name in () if records else plans:
        context = plan_context(files, partial(_no_routing, name)) if is_engines_own(name) else {}
        drawings += plan_drawings(read_plan(name, storage.db, **context), plan_name(name))
    if not drawings:
        raise InputError(f"{', '.join(things)}: nothing in it to draw")
    show(drawings, output, in_terminal=output is None)


PLANS_ALONE = {"output", "db", *PLAN_FILE_OPTIONS}
"""Options that are of use without a record."""


@dataclass(frozen=True)
class _Thing:
    """What an argument is: record, plan or output. data: of an output."""

    name: str
    kind: str
    data: Mapping[str, Any] | None = None

    @property
    def path(self) -> Path:
        return Path(self.name)


def _told(name: str) -> _Thing:
    path = Path(name)
    if path.is_dir():
        return _Thing(name, "record")
    if not path.is_file():
        return _Thing(name, "plan")
    data = _output(path)
    if data is not None:
        return _Thing(name, "output", data)
    try:
        is_engines_own(name)
    except FileFormatError:
        return _Thing(name, "record")
    return _Thing(name, "plan")


def _output(path: Path) -> Mapping[str, Any] | None:
    """What a command printed with --json, if the file is that."""
    if path.suffix != ".json":
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) and str(data.get("schema", "")).startswith("moeplace/") else None


def _of_output(name: str, data: Mapping[str, Any]) -> list[Drawing]:
    command = str(data["schema"]).split("/")[1]
    parts = data["pools"].values() if "pools" in data else [data]
    drawings: list[Drawing] = []
    for part in parts:
        if command == "pareto":
            drawings += front_drawings(part)
        elif command in ("compare", "evaluate", "report"):
            drawings += judged_drawings(part["rows"])
        elif command == "solve" and part.get("slot_front"):
            drawings += slot_front_drawings(part["slot_front"])
        else:
            without = " without --slots auto" if command == "solve" else ""
            raise InputError(
                f"{name}: `moeplace {command} --json`{without} has nothing to draw; compare, evaluate, report, pareto "
                "and solve --slots auto have"
            )
    return drawings


def _no_routing(name: str) -> Recording:
    raise InputError(f"{name} is an engine's own file, which does not say its model: give --plan-model, or the record")
