"""What options say, read and checked: the model's shape, the cluster, the objective, sizes, slots, solvers."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..placement.errors import InputError, nearest
from .command_line import refuse_idle
from .options import (
    BatchOptions,
    Execution,
    ModelOptions,
    ObjectiveOptions,
    StudyOptions,
    TopologyOptions,
)

if TYPE_CHECKING:
    from ..placement.degraded import Kind
    from ..placement.model import ModelSpec
    from ..placement.objective import Objective
    from ..placement.plan import Plan
    from ..placement.problem import Problem
    from ..placement.steps import Batch
    from ..placement.topology import Topology
    from ..profiler.read import Recording


def read_model(options: ModelOptions, recording: Recording) -> ModelSpec:
    """The model's shape: from --model, from the record, or from the sizes given; single options override.

    Raises:
        InputError: nothing tells the model's sizes, or the model is not the recorded one.
    """
    from ..placement.model import ModelSpec

    sizes: dict[str, Any] = {
        name: value
        for name in ("hidden_size", "ffn_size", "top_k", "groups", "top_groups", "expert_dtype")
        if (value := getattr(options, name)) is not None
    }
    if "groups" in sizes:
        # Other groups than the model's are not limited as its own are.
        sizes.setdefault("top_groups", 0)
    if options.model is not None:
        spec = read_spec(options.model, options.expert_dtype).replace(**sizes)
    elif recording.model is not None:
        spec = recording.model.replace(**sizes)
    else:
        fields = {**recording.header.model_fields, **sizes}
        missing = [f"--{name.replace('_', '-')}" for name in ("hidden_size", "ffn_size", "top_k") if name not in fields]
        if missing:
            raise InputError(
                f"{recording.path} does not say how large the model is; give --model config.json, or "
                f"{' and '.join(missing)}"
            )
        spec = ModelSpec(**fields)
    layers = recording.header.moe_layers
    if len(layers) != spec.layers:
        from ..profiler.read import layers_that_differ

        raise InputError(layers_that_differ(recording.path, layers, spec))
    if layers != spec.moe_layers:
        raise InputError(
            f"{recording.path} numbers its layers {_span(layers)}, the model's MoE layers are "
            f"{_span(spec.moe_layers)}; if they are the same layers, `moeplace import {recording.path} --model CONFIG "
            "--output DIR` writes the record with the model's numbers"
        )
    return spec


def read_spec(model: Path, expert_dtype: str | None = None) -> ModelSpec:
    """The model that a config describes; what was assumed, and what was not read, goes to stderr.

    Raises:
        InputError: as `ModelSpec.from_config` does.
    """
    from ..placement.model import ModelSpec
    from ..placement.model_config import read_config
    from .output import note

    reading = read_config(model, expert_dtype)
    for line in reading.notes:
        note(f"note: {model}: {line}")
    return ModelSpec(**reading.fields)


def reader_defaults(model: Path | None) -> dict[str, Any]:
    """What --model says that a record's own format may leave out."""
    from ..placement.model_config import read_config

    if model is None:
        return {}
    reading = read_config(model, expert_dtype="bf16")
    fields = reading.fields
    return {"num_experts": fields["experts"], "top_k": fields["top_k"], "layers": reading.hidden_layers}


def _span(layers: tuple[int, ...]) -> str:
    contiguous = layers == tuple(range(layers[0], layers[-1] + 1)) and len(layers) > 1
    return f"{layers[0]}-{layers[-1]}" if contiguous else ",".join(map(str, layers))


def read_topology(options: TopologyOptions) -> Topology:
    """A preset's cluster, or the one a file describes.

    Raises:
        InputError: unknown preset (the nearest is named), no such file, a count that a file does not take, or a reserve
            that leaves no memory.
    """
    topology, reserve = _read_topology(options), options.memory_reserve
    if reserve is None:
        return topology
    if reserve.strip().endswith("%"):
        share = reserve.strip()[:-1].strip()
        if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]+)?", share):
            raise InputError(f"--memory-reserve {reserve!r} is not a size like 30GB, nor a percentage from 0% to 99%")
        return topology.reserving(float(share) / 100, share=True)
    size = read_size("--memory-reserve", reserve)
    if size >= (least := float(topology.memory.min())):
        raise InputError(f"--memory-reserve {reserve!r} leaves experts no memory: a device has {least / 1e9:g} GB")
    return topology.reserving(size)


def _read_topology(options: TopologyOptions) -> Topology:
    from ..placement.topology import FORMER_NAMES, PRESETS, Topology

    name = options.topology
    if name in PRESETS or name in FORMER_NAMES:
        return Topology.preset(name, options.nodes or 1, options.devices_per_node)
    if name.endswith((".yaml", ".yml", ".json")) or Path(name).is_file():
        if options.nodes is not None or options.devices_per_node is not None:
            raise InputError(f"--nodes and --devices-per-node go with a preset; {name} says itself how many it has")
        return Topology.load(name)
    raise InputError(f"--topology {name!r} is neither a preset nor a file; {nearest(name, PRESETS)}")


def plan_topology(text: str) -> Topology:
    """The cluster of --plan-topology: `h100-hgx`, `h100-hgx:2x8`, or a file.

    Raises:
        InputError: not of that form, or as `read_topology`.
    """
    name, _, size = text.partition(":")
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if size and match is None:
        raise InputError(f"--plan-topology {text!r} is not NAME, NAME:NODESxDEVICES or a file")
    nodes, devices = (None, None) if match is None else (int(match[1]), int(match[2]))
    return read_topology(TopologyOptions(topology=name, nodes=nodes, devices_per_node=devices))


def read_objective(options: ObjectiveOptions, engine: str | None = None) -> Objective:
    """The objective of the options; what none says is left to the engine.

    Raises:
        InputError: a setting out of range. UnsupportedError: the engine named does not do what is asked.
    """
    from ..placement.engines import check_objective, engine_profile
    from ..placement.objective import Objective

    chosen: dict[str, Any] = {
        "split": None if options.split is None else options.split.value,
        "replica_choice": None if options.replica_choice is None else options.replica_choice.value,
        "division": None if options.division is None else options.division.value,
        "online": options.online or None,
        "dispatch_dtype": options.dispatch_dtype,
        "combine_dtype": options.combine_dtype,
        "prefill_dispatch": None if options.dispatch is None else options.dispatch.value,
        "decode_dispatch": None if options.dispatch is None else options.dispatch.value,
        # What the command line has a default for counts as said only where it is another.
        "execution": None if options.execution is Execution.dispatch_combine else options.execution.value,
    }
    objective = Objective(risk=options.risk, **{name: value for name, value in chosen.items() if value is not None})
    if engine is not None:
        check_objective(engine_profile(engine), objective)
    return objective


def read_size(option: str, text: str) -> float:
    """Bytes from a number with or without a unit (B, kB, MB, GB, TB, and KiB, MiB, GiB, TiB).

    Raises:
        InputError: not of that form; the option is named.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(?:([kMGT]?)(i?)B)?\s*", text, re.IGNORECASE)
    if match is None or match[1].count(".") > 1 or match[1] == ".":
        raise InputError(f"{option} {text!r} is not a size; give bytes, or a number with a unit such as 20GB")
    value, prefix, binary = float(match[1]), match[2] or "", match[3]
    return value * float(1024 if binary else 1000) ** ["", "k", "m", "g", "t"].index(prefix.lower())


AUTO = "auto"
"""Of --slots: chosen by `slot_front`."""


def read_slots(text: str | None) -> int | list[int] | None:
    """Slots a layer from `72`, or from `72,64,80` one number for each layer.

    Raises:
        InputError: not of that form.
    """
    if text is None:
        return None
    if text.strip() == AUTO:
        raise InputError(
            f"--slots {AUTO} chooses slots for a plan to be made: moeplace solve does, this command does not"
        )
    counts = _counts(text)
    if not counts or 0 in counts:
        raise InputError(f"--slots {text!r} must be a whole number above 0, or one for each layer with commas between")
    return counts if len(counts) > 1 else counts[0]


def asked_slots(slots: str | None, redundant: int | None, experts: int) -> int | list[int] | None:
    """Slots a layer of --slots, or of --redundant and a model's experts.

    Raises:
        InputError: both, or not of that form.
    """
    if redundant is None:
        return read_slots(slots)
    if slots is not None:
        raise InputError(
            f"give --slots or --redundant, not both: --redundant {redundant} is --slots {experts + redundant} for "
            f"{experts} experts"
        )
    return experts + redundant


def read_device_slots(text: str | None) -> list[int] | None:
    """Slots of each device from `40,40,8`.

    Raises:
        InputError: not of that form.
    """
    counts = None if text is None else _counts(text)
    if counts == []:
        raise InputError(f"--device-slots {text!r} must be whole numbers, one for each device, with commas between")
    return counts


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    return [int(part) for part in parts] if all(part.isdecimal() and len(part) < 10 for part in parts) else []


@dataclass(frozen=True)
class SolverChoice:
    """A solver's name with options for it, as typed: `exflow:form=staged`; without a name, whichever suits best."""

    label: str
    solver: str | None
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> SolverChoice:
        """Reads NAME or NAME:OPTION=VALUE,OPTION=VALUE (colons may stand for the commas); values as the solver's own
        options want them (`read_options`).

        Raises:
            InputError: unknown solver or option (the nearest is named), a value it does not take, or not of that form.
        """
        from ..solvers.solve import read_options, solver_named

        name, colon, settings = text.strip().partition(":")
        pairs = re.split("[:,]", settings) if colon else []
        solver = solver_named(name)
        options: dict[str, str] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not (key and equals):
                raise InputError(
                    f"solver {text!r}: {pair!r} is not OPTION=VALUE; write {name}:OPTION=VALUE,OPTION=VALUE"
                )
            if key in options:
                raise InputError(f"solver {text!r}: option {key} is given twice")
            options[key] = value
        return cls(text.strip(), name, read_options(solver, options))

    @classmethod
    def parse_list(cls, option: str, text: str) -> list[SolverChoice]:
        """Reads several with commas between; an entry OPTION=VALUE belongs to the solver before it.

        Raises:
            InputError: none, or as `parse` does.
        """
        entries: list[str] = []
        for entry in split_list(text):
            if entries and "=" in entry.partition(":")[0]:
                entries[-1] += f"{',' if ':' in entries[-1] else ':'}{entry}"
            else:
                entries.append(entry)
        if not entries:
            raise InputError(
                f"{option} {text!r} names no solver; leave it out for all, or name some with commas between"
            )
        return [cls.parse(entry) for entry in entries]

    @classmethod
    def best(cls) -> SolverChoice:
        """Leaves it to the problem which solver runs."""
        return cls("best", None, {})

    def certified(self, seconds: float) -> SolverChoice:
        """The choice, with time for a better bound.

        Raises:
            InputError: the solver named has no use for it.
        """
        if self.solver not in (None, "search"):
            raise InputError(
                f"--certify is for the solver search; the bound of {self.solver} takes no time of its own: leave it out"
            )
        return replace(self, options={**self.options, "certify": seconds})


def study_solver(options: StudyOptions) -> SolverChoice:
    """Who solves a study."""
    import typer

    if options.server is not None and options.solver is None:
        raise typer.BadParameter("a service is told which solver to use: give --solver")
    return SolverChoice.best() if options.solver is None else SolverChoice.parse(options.solver)


def read_batches(options: BatchOptions) -> tuple[Batch, ...]:
    """The batches that were named; none where that is left to the recording.

    Raises:
        InputError: text that names no batch, the same kind twice, or two ways of naming batches at once.
    """
    from ..placement.steps import as_batches

    short = {"--decode": options.decode, "--prefill": options.prefill, "--tokens-per-gpu": options.tokens_per_gpu}
    short_names = [name for name, value in short.items() if value is not None]
    if short_names and options.batch:
        raise InputError(f"--batch and {short_names[0]} both name steps; say all of it with --batch")
    if options.tokens_per_gpu is not None and len(short_names) > 1:
        raise InputError(f"--tokens-per-gpu and {short_names[0]} both name steps; give one of them")
    if options.tokens_per_gpu is not None:
        phases = [pool.value for pool in dict.fromkeys(options.pool or [])] or ["decode"]
        named = [("--tokens-per-gpu", f"{phase}:{options.tokens_per_gpu}") for phase in phases]
    elif options.batch:
        named = [("--batch", text) for text in options.batch]
    else:
        steps = {"decode": options.decode, "prefill": options.prefill}
        named = [(f"--{phase}", f"{phase}:{size}/step") for phase, size in steps.items() if size is not None]
    return as_batches([_batch(option, text) for option, text in named])


def _batch(option: str, text: str) -> Batch:
    from ..placement.steps import Batch

    try:
        return Batch.parse(text)
    except InputError as error:
        raise InputError(f"{option}: {error}") from None


def pool_problems(problem: Problem, options: BatchOptions) -> dict[str, Problem]:
    """The problem of each pool by its name, with the batches of its phase alone; the problem as it is under "" where no
    pool was named.

    Raises:
        InputError: batches are named, and none of a pool's phase.
    """
    from ..placement.step_mix import named_batch, step_mix

    if not options.pool:
        return {"": problem}
    result = {}
    for pool in dict.fromkeys(options.pool):
        mine = tuple(batch for batch in step_mix(problem).batches if batch.phase == pool.value)
        if not mine and problem.batches:
            raise InputError(f"--pool {pool.value}: no --batch is of {pool.value} steps; add one")
        total = sum(batch.weight for batch in mine)
        apart = tuple(replace(batch, weight=batch.weight / total) for batch in mine)
        result[pool.value] = replace(problem, batches=apart or (named_batch(pool.value, None),))
    return result


def one_pool(problem: Problem, options: BatchOptions) -> Problem:
    """The problem of the one pool that may be named.

    Raises:
        InputError: several pools.
    """
    if len(set(options.pool or [])) > 1:
        raise InputError("a plan is judged for one --pool; `solve` and `compare` make a plan for each")
    return next(iter(pool_problems(problem, options).values()))


def solved_batches(plan: Plan) -> tuple[Batch, ...]:
    """The batches that a plan was solved for, where they were named."""
    from ..placement.steps import Batch

    return tuple(Batch.parse(text) for text in plan.provenance.batches)


def check_restart(engine: str | None) -> None:
    """Refuses --restart-seconds where no engine restarts to take a plan.

    Raises:
        typer.BadParameter: it was given.
    """
    from ..placement.engines import engine_profile

    if engine is None or not engine_profile(engine).restart:
        context = "without --for of an engine" if engine is None else f"for {engine}, which is no engine"
        refuse_idle(f"{context} that restarts to take a plan", "restart_seconds")


def split_list(text: str | None) -> list[str]:
    """The entries of a comma-separated list."""
    return [entry.strip() for entry in (text or "").split(",") if entry.strip()]


MOST_NUMBERS = 10_000
"""In a range like 3-60: far more than any model has layers."""


def whole_numbers(option: str, text: str | None) -> list[int] | None:
    """The numbers of a list like `0,3-60`; None where nothing was given.

    Raises:
        InputError: anything else.
    """
    if text is None:
        return None
    numbers: list[int] = []
    for entry in split_list(text):
        first, _, last = entry.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()) or len(entry) > 12:
            raise InputError(f"{option} {text!r}: {entry!r} is not a number or a range like 3-60")
        low, high = int(first), int(last or first)
        if not low <= high < low + MOST_NUMBERS:
            raise InputError(f"{option} {text!r}: {entry!r} must rise, by less than {MOST_NUMBERS:,}")
        numbers.extend(range(low, high + 1))
    if not numbers:
        raise InputError(f"{option} {text!r} names no number; give some such as 3-60 or 58,59")
    return numbers


def read_failure_kinds(text: str) -> list[Kind]:
    """What `--tolerate` names: single failures of devices, of nodes, or of both.

    Raises:
        InputError: something else.
    """
    from ..placement.degraded import KINDS

    kinds = [kind for entry in split_list(text) for kind in KINDS if kind == entry]
    if not kinds or len(kinds) < len(split_list(text)):
        raise InputError(f"--tolerate {text!r} must name some of {', '.join(KINDS)}")
    return kinds
