"""`moeplace solve`: routing in, plan out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import (
    SOLVING,
    STORE,
    AsJson,
    BatchOptions,
    Engine,
    HeldOutOptions,
    KeepOptions,
    ModelOptions,
    ObjectiveOptions,
    RoutingPath,
    Seed,
    ServerOptions,
    SolveOptions,
    TopologyOptions,
)
from ..output import Table, emit, milliseconds, note, pairs, percent, quantity, seconds, solve_listener, working
from ..parse import SolverChoice, read_device_slots, read_model, read_objective, read_size, read_slots, read_topology
from ..remote import read_plan, solve_remotely
from ..routing_split import count_row, count_table, holds_counts_only, split_counts, training_statistics
from ..run_comparison import BASELINE
from ..save import keep_plan
from ..tables import binding_rows, binding_table

if TYPE_CHECKING:
    from ...placement.plan import Plan
    from ...placement.problem import Problem
    from ...placement.steps import Steps

REPLAYED_TOKENS = 16_384
"""Tokens replayed to say what a new plan costs and what its layers wait for."""
FULL = 0.8
"""Of a device's memory: where experts take more and nothing is reserved, engines rarely have enough left."""
PREFILL_TOKENS = 4096
"""Of the prefill steps that are looked at beside an assumed batch."""


def solve_command(
    routing: RoutingPath,
    model: ModelOptions,
    topology: TopologyOptions,
    objective: ObjectiveOptions,
    solving: SolveOptions,
    held_out: HeldOutOptions,
    batch: BatchOptions,
    storage: KeepOptions,
    remote: ServerOptions,
    solver: Annotated[
        str | None,
        typer.Option(
            "--solver",
            "-s",
            help="contiguous, round_robin, random, eplb, exflow, moetuner, chain or search, with options where wanted: "
            "exflow:form=staged. Default: chain where it proves its plan within seconds, search elsewhere.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None,
    certify: Annotated[
        float | None,
        typer.Option(
            "--certify",
            metavar="S",
            min=0.01,
            help="Seconds to spend, after the search, on a better proof of how good its plan is (solver search only).",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None,
    engine: Engine = None,
    current: Annotated[
        str | None,
        typer.Option(
            "--current",
            metavar="PLAN",
            help="The plan in force, a file (an engine's own too) or a stored plan's name or id: where search starts, "
            "and what --max-moved counts from.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None,
    max_moved: Annotated[
        str | None,
        typer.Option(
            "--max-moved",
            metavar="SIZE",
            help="Most expert weights that may travel from --current to the new plan: 20GB, 500MB, 0.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write the plan to (JSON).", show_default=False)
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name to keep the plan under.", show_default=False, rich_help_panel=STORE),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Solve for a placement, and say how good it provably is.

    Search minimises the time of decode and prefill steps together, unless --decode or --prefill says what runs.
    Of counts alone, where no step is known, it minimises the device load of windows.
    A quarter of the routing is held out, so that `moeplace evaluate` can judge the plan on what it has not seen;
    --held-out 0 solves on everything. Of counts windows are held out, and the plan's balance on them is told;
    statistics files that keep a token sample are used whole.

    Example:

      moeplace solve trace --topology h100-hgx --nodes 2 --devices-per-node 4 --certify 20 -o plan.json
      moeplace solve trace --topology h100-hgx --for sglang --slots 72 -o plan.json
      moeplace solve trace --topology h100-hgx --solver search --server http://solver:8311
    """
    from ...placement.migration import migration
    from ...placement.problem import Problem
    from ...solvers import solve

    if remote.server is not None and solver is None:
        raise typer.BadParameter("a service is told which solver to use: give --solver")
    if output is None and not storage.store and remote.server is None:
        raise typer.BadParameter("the plan would go nowhere: give --output, or leave out --no-store")
    if len(batch.kinds) > 1:
        raise typer.BadParameter("a plan is solved for --decode or for --prefill, not for both")
    choice = (SolverChoice.parse(solver) if solver else SolverChoice.best()).for_steps(batch)
    if certify is not None:
        choice = choice.certified(certify)
    cluster, goal = read_topology(topology), read_objective(objective, engine)
    with working("counting the routing") as update:
        recording, statistics, used = training_statistics(routing, model, held_out, seed, update)
        spec = read_model(model, recording)
        in_force = None if current is None else read_plan(current, storage.db, model=spec, topology=cluster)
        problem = Problem(
            model=spec,
            topology=cluster,
            statistics=statistics,
            objective=goal,
            slots=read_slots(solving.slots),
            device_slots=read_device_slots(solving.device_slots),
            current=in_force,
            max_moved_bytes=None if max_moved is None else read_size("--max-moved", max_moved),
            engine=engine,
        )
        stored: str | None = None
        if remote.server is not None and choice.solver is not None:
            plan, stored = solve_remotely(
                remote.server, problem, choice.solver, solving.seconds, seed, choice.options, name, update
            )
        else:
            plan = solve(
                problem,
                choice.solver,
                seconds=solving.seconds,
                seed=seed,
                progress=solve_listener(update, choice.label, solving.seconds + (certify or 0.0)),
                **choice.options,
            )
    if output is not None:
        plan.save(output)
    if remote.server is None and storage.store:
        stored = keep_plan(plan, statistics, storage.db, name)
    note(used)
    fullest = float((plan.device_memory / cluster.memory).max())
    if fullest > FULL and not cluster.reserve.any():
        note(
            f"warning: experts fill {fullest:.1%} of a device's memory, and nothing is reserved for other weights, KV "
            "cache and buffers; say how much they need with --memory-reserve"
        )
    if batch.is_assumed and plan.provenance.solver in ("search", "chain") and statistics.sample is not None:
        note(_assumed(plan, problem, batch, seed))
    moved = None if in_force is None else migration(in_force, plan)
    summary = {
        **plan_summary(plan),
        "experts_moved": None if moved is None else moved.moves,
        "bytes_moved": None if moved is None else moved.bytes_moved,
        "file": None if output is None else str(output),
        "stored_as": stored,
    }
    waits = _waits(plan, problem, batch, seed)
    tables = [] if waits is None else [binding_table(waits, "what layers wait for, on steps of the training part")]
    windows = None
    if holds_counts_only(recording):
        split = split_counts(recording, held_out, seed)
        if plan.provenance.solver == "search" and not batch.is_assumed and "step_tokens" not in plan.provenance.options:
            note("--decode and --prefill are not looked at: of counts the load of windows is minimised, not step times")
        windows = count_row(plan.provenance.solver, plan, split, seed)
        tables = [count_table([windows], split)]
    emit({**summary, "binding": waits, "windows": windows}, summary_table(summary), *tables, as_json=as_json)


def _assumed(plan: Plan, problem: Problem, batch: BatchOptions, seed: int) -> str:
    """What the search assumed of the steps, and what its plan does in others, on routing it may have seen."""
    from ...placement.evaluate import evaluate
    from ...solvers import solve
    from ...solvers.search.scenario import default_steps

    sizes: Mapping[Any, int] = default_steps(problem) if plan.provenance.solver == "search" else batch.kinds
    steps_said = " and ".join(f"{kind} steps of {tokens:,}" for kind, tokens in sizes.items())
    said = (
        f"warning: solver {plan.provenance.solver} assumed {steps_said} tokens; say what the deployment runs with "
        "--decode N or --prefill N"
    )
    contiguous = solve(problem, BASELINE)
    predicted = []
    for name, size in dict.fromkeys([*sizes.items(), ("prefill", PREFILL_TOKENS)]):
        steps = _training_steps(problem, name, size, seed)
        if steps is not None:
            ours, theirs = (evaluate(each, steps, problem).step_seconds.mean() for each in (plan, contiguous))
            predicted.append(
                f"{name} steps of {size:,}: {milliseconds(ours)} ms, {ours / theirs:.3f} of the {BASELINE} plan's"
            )
    return f"{said}. Predicted on the training part: {'; '.join(predicted)}" if predicted else said


def _waits(plan: Plan, problem: Problem, batch: BatchOptions, seed: int) -> list[dict[str, Any]] | None:
    """Rows of what binds on steps the solver may have seen; None when there are counts only."""
    from ...placement.evaluate import evaluate

    steps = _training_steps(problem, *next(iter(batch.kinds.items())), seed)
    return None if steps is None else binding_rows(evaluate(plan, steps, problem), plan.moe_layers)


def _training_steps(problem: Problem, kind: str, tokens: int, seed: int) -> Steps | None:
    sample = problem.statistics.sample
    if sample is None or sample.num_tokens < tokens:
        return None
    count = max(4, min(64, REPLAYED_TOKENS // tokens))
    draw = sample.decode_steps if kind == "decode" else sample.prefill_steps
    return draw(tokens, count, seed)


def plan_summary(plan: Plan) -> dict[str, Any]:
    """How a plan was made and how good it is on its solver's own objective, as plain values."""
    from ...placement.plan import memory_in_words

    certificate, provenance = plan.certificate, plan.provenance
    return {
        "solver": provenance.solver,
        "choice": provenance.choice or None,
        "options": provenance.options,
        "engine": provenance.engine or None,
        "seed": provenance.seed,
        "model": plan.model.name or None,
        "layers": plan.model.layers,
        "experts": plan.model.experts,
        "slots": plan.num_slots,
        "layer_slots": plan.slots_per_device.sum(axis=1).tolist(),
        "devices": plan.topology.num_devices,
        "nodes": plan.topology.num_nodes,
        "topology": plan.topology.name,
        "device_memory": plan.device_memory.tolist(),
        "memory": memory_in_words(plan.device_memory, plan.topology),
        "objective": None if certificate is None else certificate.objective,
        "value": None if certificate is None else certificate.value,
        "bound": plan.bound,
        "gap": plan.gap,
        "proven_optimal": plan.proven_optimal,
        "stop": provenance.stop,
        "seconds": provenance.seconds,
        "version": provenance.version,
        "trace_fingerprint": provenance.trace_fingerprint,
        "fingerprint": plan.fingerprint,
    }


def summary_table(summary: dict[str, Any]) -> Table:
    """The summary as lines of name and value."""
    import numpy as np

    from ...placement.layer_slots import spanned

    shown = {
        "solver": summary["solver"]
        + "".join(f" {key}={value}" for key, value in summary["options"].items() if key != "seconds"),
        "chosen because": summary["choice"],
        "for engine": summary["engine"],
        "placement": f"{summary['layers']} layers of {summary['experts']} experts in "
        f"{spanned(np.array(summary['layer_slots']))} slots on "
        f"{summary['devices']} devices in {summary['nodes']} nodes ({summary['topology']})",
        "memory": summary["memory"],
        "objective": summary["objective"],
        "value": None if summary["value"] is None else f"{summary['value']:.6g}",
        "proven bound": None if summary["bound"] is None else f"{summary['bound']:.6g}",
        "gap": _gap(summary),
        "stopped": f"{summary['stop']} after {seconds(summary['seconds'])} s",
        "seed": summary["seed"],
        "solved on": summary["trace_fingerprint"][:12] or None,
        "moved": _moved(summary),
        "file": summary.get("file"),
        "stored as": summary.get("stored_as"),
    }
    rarely = ("chosen because", "for engine", "moved")
    return pairs({name: value for name, value in shown.items() if value is not None or name not in rarely})


def _moved(summary: dict[str, Any]) -> str | None:
    if summary.get("experts_moved") is None:
        return None
    return f"{summary['experts_moved']} experts, {quantity('B')(summary['bytes_moved'])}, from the plan in force"


def _gap(summary: dict[str, Any]) -> str | None:
    if summary["gap"] is None:
        return None
    return f"{percent(summary['gap'])}{', proven optimal' if summary['proven_optimal'] else ''}"
