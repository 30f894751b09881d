"""Options that several commands share, in groups: a dataclass in a command's signature stands for its fields."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from typer import Argument, Option

MODEL, CLUSTER, OBJECTIVE = "Model", "Cluster", "Objective"
JUDGING, SOLVING, STORE = "Steps and held-out routing", "Solving", "Store"


class Execution(StrEnum):
    dispatch_combine = "dispatch_combine"
    context_coherent = "context_coherent"


class Split(StrEnum):
    equal = "equal"
    free = "free"


class ReplicaChoice(StrEnum):
    share = "share"
    nearest = "nearest"


class HeldOutBy(StrEnum):
    sequence = "sequence"
    step = "step"
    time = "time"


RoutingPath = Annotated[
    Path,
    Argument(
        metavar="ROUTING",
        help="Recorded routing: a trace folder or Parquet file, a statistics .npz, or any record `moeplace import` "
        "reads.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, Option("--json", help="Print JSON instead of a table.")]
PlanReference = Annotated[
    str,
    Argument(
        metavar="PLAN",
        help="A plan file, an engine's own file of a placement, or a stored plan's name or id.",
        show_default=False,
    ),
]


EngineKey = Annotated[
    str | None,
    Option(
        "--api-key",
        metavar="KEY",
        envvar="MOEPLACE_ENGINE_KEY",
        help="The server's key (SGLang's recorder wants the admin key where there is one).",
        show_default=False,
    ),
]
RecorderFolder = Annotated[
    Path | None,
    Option(
        "--folder",
        metavar="DIR",
        envvar="SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR",
        help="Where SGLang's recorder writes its files, as this machine sees it. Default: /tmp, as SGLang's.",
        show_default=False,
    ),
]


@dataclass(frozen=True, kw_only=True)
class PlanFileOptions:
    """What an engine's own file of a placement does not say."""

    plan_model: Annotated[
        Path | None,
        Option(
            "--plan-model",
            metavar="PATH",
            help="For a plan in an engine's own file: the model's config.json, or its folder. Default: the routing's "
            "model.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None
    plan_topology: Annotated[
        str | None,
        Option(
            "--plan-topology",
            metavar="NAME[:NxM]|FILE",
            help="For a plan in an engine's own file: the cluster it is for, a preset with N nodes of M devices "
            "(h100-hgx:2x8), or a file.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Where the model's shape comes from when the routing does not carry it."""

    model: Annotated[
        Path | None,
        Option(
            "--model",
            metavar="PATH",
            help="Transformers config.json of the model, or its folder. Default: what the trace says of itself.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None
    hidden_size: Annotated[
        int | None,
        Option(
            "--hidden-size",
            metavar="N",
            min=1,
            help="Width of the residual stream.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None
    ffn_size: Annotated[
        int | None,
        Option(
            "--ffn-size", metavar="N", min=1, help="Width of one expert.", show_default=False, rich_help_panel=MODEL
        ),
    ] = None
    top_k: Annotated[
        int | None,
        Option(
            "--top-k",
            metavar="N",
            min=1,
            help="Experts a token, where the record holds counts only.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None
    groups: Annotated[
        int | None,
        Option(
            "--groups",
            metavar="N",
            min=1,
            help="Expert groups of group-limited routing.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None
    expert_dtype: Annotated[
        str | None,
        Option(
            "--expert-dtype",
            metavar="DTYPE",
            help="How expert weights are stored, in place of what --model says of it: nvfp4, int4, int8, mxfp4, mxfp8, "
            "fp8, bf16, fp16, float32.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class TopologyOptions:
    """The cluster to place experts on."""

    topology: Annotated[
        str,
        Option(
            "--topology",
            "-t",
            metavar="NAME|FILE",
            help="A preset (see `moeplace topology list`) or a YAML or JSON file.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ]
    nodes: Annotated[
        int | None,
        Option(
            "--nodes",
            metavar="N",
            min=1,
            help="Nodes of the preset. Default: 1.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None
    devices_per_node: Annotated[
        int | None,
        Option(
            "--devices-per-node",
            metavar="N",
            min=1,
            help="Devices used in each node of the preset. Default: all.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None
    memory_reserve: Annotated[
        str | None,
        Option(
            "--memory-reserve",
            metavar="SIZE|PERCENT",
            help="Memory of each device that experts must leave, for other weights, KV cache and buffers: 30GB, 40%. "
            "Default: what the topology's file says, else none.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """What a plan is to minimise."""

    execution: Annotated[
        Execution,
        Option(
            "--execution",
            metavar="dispatch_combine|context_coherent",
            help="How the engine runs a layer: results return to the token's rank, or the token stays (ExFlow).",
            rich_help_panel=OBJECTIVE,
        ),
    ] = Execution.dispatch_combine
    risk: Annotated[
        str,
        Option(
            "--risk",
            metavar="RISK",
            help="Which step time counts: mean, cvar:Q, worst_workload, regret.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = "mean"
    split: Annotated[
        Split | None,
        Option(
            "--split",
            metavar="equal|free",
            help="Whether replicas share tokens equally or by weights. Default: as the engine does, else equal.",
            show_default=False,
            rich_help_panel=OBJECTIVE,
        ),
    ] = None
    replica_choice: Annotated[
        ReplicaChoice | None,
        Option(
            "--replica-choice",
            metavar="share|nearest",
            help="Which replica the engine lets serve a token: any by its share, or the nearest to the token's rank "
            "(SGLang's static and dynamic dispatch). Default: as the engine does, else share.",
            show_default=False,
            rich_help_panel=OBJECTIVE,
        ),
    ] = None
    dispatch_dtype: Annotated[
        str | None,
        Option(
            "--dispatch-dtype",
            metavar="DTYPE",
            help="How activations travel to experts. Default: as the engine does, else bf16.",
            show_default=False,
            rich_help_panel=OBJECTIVE,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class HeldOutOptions:
    """Which part of the routing solvers never see."""

    held_out: Annotated[
        float,
        Option(
            "--held-out",
            metavar="SHARE",
            min=0.0,
            max=0.95,
            help="Share of the routing kept from solving and judged on; 0 uses all of it for both.",
            rich_help_panel=JUDGING,
        ),
    ] = 0.25
    held_out_by: Annotated[
        HeldOutBy,
        Option("--held-out-by", metavar="sequence|step|time", help="What is held out whole.", rich_help_panel=JUDGING),
    ] = HeldOutBy.sequence


DECODE_CONCURRENCY, DECODE_STEPS, PREFILL_STEPS = 128, 200, 32


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """The kind of steps that matter."""

    decode: Annotated[
        int | None,
        Option(
            "--decode",
            metavar="N",
            min=1,
            help="Decode steps of this many sequences. Default: 128, or none with --prefill.",
            show_default=False,
            rich_help_panel=JUDGING,
        ),
    ] = None
    prefill: Annotated[
        int | None,
        Option(
            "--prefill",
            metavar="N",
            min=1,
            help="Prefill steps of this many tokens.",
            show_default=False,
            rich_help_panel=JUDGING,
        ),
    ] = None

    @property
    def is_assumed(self) -> bool:
        """Whether neither kind of steps was asked for."""
        return self.decode is None and self.prefill is None

    @property
    def kinds(self) -> dict[str, int]:
        """Tokens a step by kind ("decode", "prefill"), decode first."""
        decode = self.decode or (None if self.prefill else DECODE_CONCURRENCY)
        kinds = {"decode": decode, "prefill": self.prefill}
        return {kind: tokens for kind, tokens in kinds.items() if tokens is not None}


def _known(engine: str | None) -> str | None:
    """The engine named, which is looked up before anything is read."""
    from ..placement.engines import engine_profile

    return None if engine is None else engine_profile(engine).name


Engine = Annotated[
    str | None,
    Option(
        "--for",
        callback=_known,
        metavar="ENGINE",
        help="Keep to what an engine can run, and judge as it runs plans: sglang, sglang-lp, vllm, vllm-ascend, "
        "trtllm, permute (a permuted checkpoint), or moeplace (any plan). Where --slots is not given, the fewest it "
        "can run. Default: what the plan was solved for, if there is one.",
        show_default=False,
        rich_help_panel=SOLVING,
    ),
]


@dataclass(frozen=True, kw_only=True)
class StepOptions(BatchOptions):
    """The steps a plan is judged on."""

    steps: Annotated[
        int | None,
        Option(
            "--steps",
            metavar="N",
            min=1,
            help="Steps of each kind. Default: 200 decode, 32 prefill.",
            show_default=False,
            rich_help_panel=JUDGING,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """What a solver may use."""

    slots: Annotated[
        str | None,
        Option(
            "--slots",
            metavar="N[,N...]",
            help="Slots a layer over all devices, or a number for each layer, by commas; more than the model's experts "
            "makes room for replicas. Default: one an expert.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None
    device_slots: Annotated[
        str | None,
        Option(
            "--device-slots",
            metavar="N,N...",
            help="Slots a layer of each device, by commas. Default: dealt evenly, as far as each device's memory goes.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None
    seconds: Annotated[
        float, Option("--seconds", metavar="S", min=0.01, help="Time limit of a solve.", rich_help_panel=SOLVING)
    ] = 30.0


Seed = Annotated[
    int,
    Option("--seed", metavar="N", help="Decides the held-out part and every random choice.", rich_help_panel=SOLVING),
]


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Where plans are kept."""

    db: Annotated[
        str | None,
        Option(
            "--db",
            metavar="URL",
            envvar="MOEPLACE_DB",
            help="Database URL, or a path of a SQLite file. Default: a file in the user's data folder.",
            show_default=False,
            rich_help_panel=STORE,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class KeepOptions(StoreOptions):
    """Where results are kept, and whether."""

    store: Annotated[
        bool,
        Option("--store/--no-store", help="Keep the result in the database, as is the default.", rich_help_panel=STORE),
    ] = True


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """A service to ask instead of this machine and its database."""

    server: Annotated[
        str | None,
        Option(
            "--server",
            metavar="URL",
            envvar="MOEPLACE_SERVER",
            help="A running `moeplace serve` to ask instead; MOEPLACE_TOKEN holds the token where it wants one.",
            show_default=False,
            rich_help_panel=STORE,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions(
    ModelOptions, TopologyOptions, ObjectiveOptions, HeldOutOptions, StepOptions, SolveOptions, StoreOptions
):
    """Several plans, solved for and judged on the same held-out steps."""

    solvers: Annotated[
        str | None,
        Option(
            "--solvers",
            help="Comma-separated solvers, each with options where wanted: exflow:form=staged. Default: all.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None
    plans: Annotated[
        str | None,
        Option(
            "--plans",
            help="Comma-separated plan files, engines' own files or stored plans to judge beside them, such as the one "
            "in force.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None
    engine: Engine = None
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class StudyOptions(HeldOutOptions, StepOptions, ServerOptions):
    """Many solves, judged on the same held-out steps, here or by a service."""

    solver: Annotated[
        str | None,
        Option(
            "--solver",
            "-s",
            help="Who solves. Default: as `moeplace solve` chooses.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None
    seconds: Annotated[
        float, Option("--seconds", metavar="S", min=0.01, help="Time limit of each.", rich_help_panel=SOLVING)
    ] = 10.0
    engine: Engine = None
    seed: Seed = 0


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """Replaces each parameter annotated with a dataclass by the dataclass's fields, and builds it on the call."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if is_dataclass(hint) and isinstance(hint, type):
            groups[parameter.name] = hint
            parameters.extend(_parameters(hint))
        else:
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(function)
    def command(**values: Any) -> None:
        built = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        function(**values, **built)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameters(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
