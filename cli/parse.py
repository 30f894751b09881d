"""What options say, read and checked: the model's shape, the cluster, the objective, sizes, slots, solvers."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..placement.errors import InputError, nearest
from .options import BatchOptions, Execution, ModelOptions, ObjectiveOptions, StudyOptions, TopologyOptions

if TYPE_CHECKING:
    from ..placement.model import ModelSpec
    from ..placement.objective import Objective
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
        for name in ("hidden_size", "ffn_size", "top_k", "groups", "expert_dtype")
        if (value := getattr(options, name)) is not None
    }
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
            "--out DIR` writes the record with the model's numbers"
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

    fields, notes, _ = read_config(model, expert_dtype)
    for line in notes:
        note(f"note: {model}: {line}")
    return ModelSpec(**fields)


def reader_defaults(model: Path | None) -> dict[str, Any]:
    """What --model says that a record's own format may leave out."""
    from ..placement.model_config import read_config

    if model is None:
        return {}
    fields, _, hidden_layers = read_config(model, expert_dtype="bf16")
    return {"num_experts": fields["experts"], "top_k": fields["top_k"], "layers": hidden_layers}


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
    return topology.reserving(read_size("--memory-reserve", reserve))


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
        "dispatch_dtype": options.dispatch_dtype,
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


def read_slots(text: str | None) -> int | list[int] | None:
    """Slots a layer from `72`, or from `72,64,80` one number for each layer.

    Raises:
        InputError: not of that form.
    """
    if text is None:
        return None
    counts = _counts(text)
    if not counts or 0 in counts:
        raise InputError(f"--slots {text!r} must be a whole number above 0, or one for each layer with commas between")
    return counts if len(counts) > 1 else counts[0]


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
        """Reads NAME or NAME:OPTION=VALUE:OPTION=VALUE; values as the solver's own options want them (`read_options`).

        Raises:
            InputError: unknown solver or option (the nearest is named), a value it does not take, or not of that form.
        """
        from ..solvers.solve import read_options, solver_named

        name, *pairs = text.strip().split(":")
        solver = solver_named(name)
        options: dict[str, str] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not (key and equals):
                raise InputError(f"solver {text!r}: {pair!r} is not OPTION=VALUE")
            options[key] = value
        return cls(text.strip(), name, read_options(solver, options))

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

    def for_steps(self, batch: BatchOptions) -> SolverChoice:
        """The choice, with the first kind of steps wanted passed on to a solver that minimises the time of steps."""
        from inspect import signature

        from ..solvers import solver_named

        if batch.is_assumed and self.solver in (None, "search"):
            return self
        kind, tokens = next(iter(batch.kinds.items()))
        batch_options: dict[str, Any] = {"batch": kind, "step_tokens": tokens}
        if self.solver is not None:
            known = signature(solver_named(self.solver).solve).parameters
            batch_options = {name: value for name, value in batch_options.items() if name in known}
        return replace(self, options={**batch_options, **self.options})


def study_solver(options: StudyOptions) -> SolverChoice:
    """Who solves a study, for the one kind of steps it is judged on."""
    import typer

    if options.server is not None and options.solver is None:
        raise typer.BadParameter("a service is told which solver to use: give --solver")
    if len(options.kinds) > 1:
        raise typer.BadParameter("steps are of --decode or of --prefill, not of both")
    choice = SolverChoice.parse(options.solver) if options.solver else SolverChoice.best()
    return choice.for_steps(options)


def split_list(text: str | None) -> list[str]:
    """The entries of a comma-separated list."""
    return [entry.strip() for entry in (text or "").split(",") if entry.strip()]


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
        numbers.extend(range(int(first), min(int(last or first), int(first) + 100_000) + 1))
    return numbers
