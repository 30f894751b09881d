"""`moeplace solve`: routing in, plan out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..._display import plural
from .. import completion
from ..command_line import refuse_idle
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
    OtherMs,
    Plot,
    PlotFile,
    RestartSeconds,
    RoutingPath,
    Seed,
    ServerOptions,
    SolveOptions,
    TopologyOptions,
    output_file,
    output_option,
)
from ..output import (
    Table,
    Update,
    emit,
    milliseconds,
    note,
    pairs,
    percent,
    quantity,
    seconds,
    solve_listener,
    working,
    wrote,
)
from ..parse import (
    AUTO,
    SolverChoice,
    asked_slots,
    check_restart,
    pool_problems,
    read_batches,
    read_device_slots,
    read_failure_kinds,
    read_model,
    read_objective,
    read_size,
    read_topology,
)
from ..plots import Drawing, comparison_drawings, show, slot_front_drawings
from ..remote import read_plan, solve_remotely
from ..routing_split import TrainingRouting, count_row, count_table, training_routing
from ..run_comparison import BASELINE, PEER, Comparison, Entry, judge, solve_entry, warn_of_idle_devices
from ..save import attempted, check_store, end_unkept, end_unwritten, keep_plan
from ..tables import binding_rows, binding_table, slot_table

if TYPE_CHECKING:
    from ...placement.plan import Plan
    from ...placement.problem import Problem
    from ...solvers import SlotFront

REPLAYED_TOKENS = 16_384
"""Of the steps of each batch, replayed to say what a new plan costs and what its layers wait for."""
FULL = 0.8
"""Of a device's memory: where experts take more and nothing is reserved, engines rarely have enough left."""


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
            autocompletion=completion.solvers,
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
    memory_budget: Annotated[
        str | None,
        typer.Option(
            "--memory-budget",
            metavar="SIZE",
            help="With --slots auto, most memory of a device that redundant experts may take, all layers together: "
            "4GB. Default: all that one slot an expert and --memory-reserve leave.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None,
    cache_token_bytes: Annotated[
        str | None,
        typer.Option(
            "--cache-token-bytes",
            metavar="SIZE",
            help="With --slots auto, KV cache of a token on its device, all layers: 70kB. Default: of known models.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None,
    engine: Engine = None,
    other_ms: OtherMs = None,
    restart_seconds: RestartSeconds = None,
    current: Annotated[
        str | None,
        typer.Option(
            "--current",
            metavar="PLAN",
            autocompletion=completion.plans,
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
    tolerate: Annotated[
        str | None,
        typer.Option(
            "--tolerate",
            metavar="device,node",
            help="Which single failures the plan must survive: every expert then has a replica on a second device, or "
            "node. Needs slots for them.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None,
    seed: Seed = 0,
    output: Annotated[Path | None, output_option("FILE", "File to write the plan to (JSON).", output_file)] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name to keep the plan under.", show_default=False, rich_help_panel=STORE),
    ] = None,
    plot: Plot = False,
    plot_file: PlotFile = None,
    as_json: AsJson = False,
) -> None:
    """Solve for a placement, and say how good it provably is.

    Search minimises the time of the steps that run: those of --batch, else the recorded forward calls, else decode and
    prefill steps of usual sizes together. Of counts alone it minimises the device load of windows.
    A quarter of the routing is held out, and the plan judged on it: what it saves against the plan in force or the
    engine's own policy, and what no plan can save; --held-out 0 solves on everything. Of counts windows are held out,
    and the plan's balance on them is told; statistics files that keep a token sample are used whole.

    Example:

      moeplace solve trace --topology h100-hgx --nodes 2 --devices-per-node 4 --certify 20 -o plan.json
      moeplace solve trace --topology h100-hgx --for sglang --slots 72 --batch decode:64@0.9 --batch prefill:2048@0.1
      moeplace solve trace --topology h100-hgx --pool prefill --pool decode -o plan.json
      moeplace solve trace --topology h100-hgx --memory-reserve 30GB --slots auto --memory-budget 4GB -o plan.json
      moeplace solve trace --topology h100-hgx --solver search --server http://solver:8311
    """
    from ...placement.decide import read_other_ms
    from ...placement.degraded import single_failures
    from ...placement.problem import Problem
    from ...placement.step_mix import step_mix
    from ...solvers import slot_front, solve

    if remote.server is not None and solver is None:
        raise typer.BadParameter("a service is told which solver to use: give --solver")
    if output is None and not storage.store and remote.server is None:
        raise typer.BadParameter("the plan would go nowhere: give --output, or leave out --no-store")
    choice = SolverChoice.best() if solver is None else SolverChoice.parse(solver)
    if certify is not None:
        choice = choice.certified(certify)
    cluster, goal, batches = read_topology(topology), read_objective(objective, engine), read_batches(batch)
    device_slots = read_device_slots(solving.device_slots)
    most_moved = None if max_moved is None else read_size("--max-moved", max_moved)
    other = None if other_ms is None else read_other_ms(other_ms)
    failures = () if tolerate is None else single_failures(cluster, read_failure_kinds(tolerate))
    chosen = solving.slots is not None and solving.slots.strip() == AUTO
    sizes = [
        None if text is None else read_size(option, text)
        for option, text in (("--memory-budget", memory_budget), ("--cache-token-bytes", cache_token_bytes))
    ]
    if not chosen and sizes != [None, None]:
        raise typer.BadParameter("--memory-budget and --cache-token-bytes go with --slots auto")
    if chosen and (remote.server is not None or solving.redundant is not None or device_slots is not None):
        raise typer.BadParameter("--slots auto goes without --server, --redundant and --device-slots")
    if max_moved is not None and current is None:
        raise typer.BadParameter("--max-moved counts from a plan: give it as --current")
    check_restart(engine)
    stores = storage.store and remote.server is None
    if remote.server is not None:
        refuse_idle("with a service, which keeps its plans", "db", "store")
    elif not stores:
        refuse_idle("with --no-store", "name")
    if stores:
        check_store(storage.db, name)
    with working("counting the routing") as update:
        routed = training_routing(routing, model, held_out, seed, update)
        spec = read_model(model, routed.recording)
        in_force = None if current is None else read_plan(current, storage.db, model=spec, topology=cluster)
        problem = Problem(
            model=spec,
            topology=cluster,
            statistics=routed.train,
            objective=goal,
            slots=None if chosen else asked_slots(solving.slots, solving.redundant, spec.experts),
            device_slots=device_slots,
            current=in_force,
            max_moved_bytes=most_moved,
            tolerates=failures,
            engine=engine,
            batches=batches,
        )
        warn_of_idle_devices(problem)
        pools = pool_problems(problem, batch)
        answers: list[Answer] = []
        failure: str | None = None
        unwritten: str | None = None
        for pool, asked in pools.items():
            stored_name = None if name is None or len(pools) == 1 else f"{name}-{pool}"
            stored: str | None = None
            front, limit = None, solving.seconds
            if chosen:
                limit /= 2
                front = slot_front(
                    asked,
                    memory_budget=sizes[0],
                    token_bytes=sizes[1],
                    other_ms=other,
                    solver=choice.solver,
                    seconds=limit,
                    seed=seed,
                    options=choice.options,
                    progress=lambda news: update(news.message, (news.done or 0) / (news.total or 1)),
                )
                asked = front.problem_with(front.recommended)
            if remote.server is not None and choice.solver is not None:
                plan, stored = solve_remotely(
                    remote.server,
                    asked,
                    choice.solver,
                    solving.seconds,
                    seed,
                    choice.options,
                    stored_name or name,
                    update,
                )
            else:
                plan = solve(
                    asked,
                    choice.solver,
                    seconds=limit,
                    seed=seed,
                    progress=solve_listener(update, choice.label, limit + (certify or 0.0)),
                    **choice.options,
                )
            file = output if output is None or len(pools) == 1 else output.with_stem(f"{output.stem}-{pool}")
            if file is not None:
                _, failed = attempted(partial(plan.save, file))
                if failed is None:
                    wrote(file, show=False)
                else:
                    file, unwritten = None, failed
            if stores:
                keep = partial(keep_plan, plan, routed.train, storage.db, stored_name or name)
                stored, failed = attempted(keep)
                failure = failure or failed
            compared = _compared(plan, asked, routed, seed, pool, update)
            answers.append(Answer(plan, file, stored, compared, compared.verdict_data(other, restart_seconds), front))
    note(routed.description)
    if routed.counts is not None and batches and answers[0].plan.provenance.solver == "search":
        note("of counts search minimises the load of windows, not step times; the steps named are what it is judged on")
    fullest = float((answers[0].plan.device_memory / cluster.memory).max())
    if fullest > FULL and not cluster.reserve.any():
        note(
            f"warning: experts fill {fullest:.1%} of a device's memory, and nothing is reserved for other weights, KV "
            "cache and buffers; say how much they need with --memory-reserve"
        )
    if as_json and len(answers) > 1:
        each = {answer.comparison.pool: answer.data(in_force) | answer.mix_data for answer in answers}
        emit({"pools": each}, as_json=True)
    for answer in answers if not as_json or len(answers) == 1 else ():
        data = answer.data(in_force)
        emit(
            data,
            summary_table(data),
            *answer.tables(data),
            as_json=as_json,
            mix=step_mix(answer.comparison.problem),
            closing=partial(answer.comparison.verdict, other, restart_seconds),
        )
    if plot or plot_file:
        show([drawing for answer in answers for drawing in answer.drawings()], plot_file, plot and not as_json)
    end_unwritten(unwritten, answers[-1].stored)
    end_unkept(failure, output)


@dataclass(frozen=True)
class Answer:
    """A plan that was solved for, where it went, what it costs beside others, and what it saves."""

    plan: Plan
    file: Path | None
    stored: str | None
    comparison: Comparison
    verdict: dict[str, Any] | None
    front: SlotFront | None = None

    @property
    def mix_data(self) -> dict[str, Any]:
        from ...placement.step_mix import step_mix

        return {"batches": step_mix(self.comparison.problem).to_dict()}

    def data(self, in_force: Plan | None) -> dict[str, Any]:
        """As JSON has it. in_force: the plan that experts move from."""
        from ...placement.migration import migration

        moved = None if in_force is None else migration(in_force, self.plan)
        comparison, counts = self.comparison, None
        if isinstance(comparison.split, TrainingRouting):
            counts = comparison.split.counts
        evaluation = comparison.best.evaluation
        assert evaluation is not None
        return {
            **plan_summary(self.plan),
            "experts_moved": None if moved is None else moved.moves,
            "bytes_moved": None if moved is None else moved.bytes_moved,
            "file": None if self.file is None else str(self.file),
            "stored_as": self.stored,
            "step_seconds": evaluation.mean_seconds,
            "ideal_share": evaluation.ideal_share,
            "prediction": evaluation.basis.text,
            "binding": binding_rows(evaluation, self.plan.moe_layers),
            "windows": None
            if counts is None
            else count_row(
                self.plan.provenance.solver, self.plan, counts, comparison.problem.objective, comparison.seed
            ),
            "slot_front": None if self.front is None else self.front.to_dict(),
            "verdict": self.verdict,
        }

    def tables(self, data: dict[str, Any]) -> list[Table]:
        """What stands below the summary: what layers wait for, or of counts the balance on windows."""
        split = self.comparison.split
        front = [] if self.front is None else [slot_table(data["slot_front"])]
        if isinstance(split, TrainingRouting) and split.counts is not None:
            return [*front, count_table([data["windows"]], split.counts)]
        return [*front, binding_table(data["binding"], f"what layers wait for, on {self.comparison.where}")]

    def drawings(self) -> list[Drawing]:
        """Step times, balance and loads of the plan, beside what it is measured against; the front of slots."""
        comparison = self.comparison
        front = [] if self.front is None else slot_front_drawings(self.front.to_dict())
        return [*front, *comparison_drawings(comparison, comparison.sides, comparison.pool)]


def _compared(
    plan: Plan, problem: Problem, routed: TrainingRouting, seed: int, pool: str, update: Update
) -> Comparison:
    """The plan beside what runs without it, on steps that it has not seen: the plan in force, the engine's own policy,
    contiguous."""
    from ...placement.step_mix import problem_steps

    # Judged by itself, from whatever plan one sets out.
    free = replace(problem, current=None, max_moved_bytes=None, tolerates=())
    steps = problem_steps(routed.judged, problem, most_tokens=REPLAYED_TOKENS, seed=seed)
    made = plan.provenance.solver
    entries = [solve_entry(SolverChoice.parse(name), free, 30.0, seed, update) for name in (BASELINE, PEER)]
    if problem.current is not None:
        entries.append(Entry("the plan in force", problem.current, was_given=True))
    entries = [entry for entry in entries if entry.name != made]
    judged = [judge(entry, problem, steps, update) for entry in (*entries, Entry(made, plan))]
    return Comparison(problem, steps, routed, tuple(judged), seed, pool, made)


def plan_summary(plan: Plan) -> dict[str, Any]:
    """How a plan was made and how good it is on its solver's own objective, as plain values."""
    from ...placement.plan import memory_in_words, noise_in_words

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
        "noise": None if certificate is None else certificate.noise,
        "noise_gap": None if certificate is None else certificate.noise_gap,
        "noise_words": None if certificate is None or certificate.noise is None else noise_in_words(certificate),
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
        f"{plural(summary['devices'], 'device')} in {plural(summary['nodes'], 'node')} ({summary['topology']})",
        "memory": summary["memory"],
        "objective": summary["objective"],
        "step ms": f"{milliseconds(summary['step_seconds'])}, {percent(summary['ideal_share'])} of the force-balanced "
        f"ideal; {summary['prediction']}"
        if "step_seconds" in summary
        else None,
        "value": None if summary["value"] is None else f"{summary['value']:.6g}",
        "proven bound": None if summary["bound"] is None else f"{summary['bound']:.6g}",
        "gap": _gap(summary),
        "sampling noise": summary["noise_words"],
        "stopped": f"{summary['stop']} after {seconds(summary['seconds'])} s",
        "seed": summary["seed"],
        "solved on": summary["trace_fingerprint"][:12] or None,
        "moved": _moved(summary),
        "file": summary.get("file"),
        "stored as": summary.get("stored_as"),
    }
    rarely = ("chosen because", "for engine", "step ms", "sampling noise", "moved")
    return pairs({name: value for name, value in shown.items() if value is not None or name not in rarely})


def _moved(summary: dict[str, Any]) -> str | None:
    if summary.get("experts_moved") is None:
        return None
    return f"{summary['experts_moved']} experts, {quantity('B')(summary['bytes_moved'])}, from the plan in force"


def _gap(summary: dict[str, Any]) -> str | None:
    if summary["gap"] is None:
        return None
    return f"{percent(summary['gap'])}{', proven optimal' if summary['proven_optimal'] else ''}"
