"""Options that several commands share, in groups: a dataclass in a command's signature stands for its fields."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from typer import Argument, Option

from ..placement.errors import InputError
from ..placement.files import check_output_file, check_output_folder, expanded
from . import completion

MOST_SLOTS = 1_000_000
MAX_SEED = 2**63 - 1
"""The largest seed that files and databases hold."""
MODEL, CLUSTER, OBJECTIVE = "Model", "Cluster", "Objective"
JUDGING, SOLVING, STORE = "Steps and held-out routing", "Solving", "Output and store"


# Paths that commands write to, checked when the command line is read: nothing is lost for lack of a place.


def output_file(path: Path | None) -> Path | None:
    """A file that can be written, in a folder that is there; `~` is expanded.

    Raises:
        InputError: it cannot; what to do is said.
    """
    return None if path is None else check_output_file(path)


def output_folder(path: Path | None) -> Path | None:
    """A folder that files can be written into; it is made when there is something to write.

    Raises:
        InputError: it cannot; what to do is said.
    """
    return None if path is None else check_output_folder(path)


def new_folder(path: Path) -> Path:
    """A folder that is not there yet, and can be made.

    Raises:
        InputError: it is there, or cannot be made.
    """
    folder = output_folder(path)
    assert folder is not None
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} is there already; name a new folder, or remove it")
    return folder


def recording_path(path: Path | None) -> Path | None:
    """Where a recording goes: a folder that holds none yet, for a trace; or a file that ends in .npz, for counts.

    Raises:
        InputError: it cannot go there.
    """
    if path is None or path.suffix == ".npz":
        return output_file(path)
    folder = output_folder(path)
    if folder is not None and any(folder.glob("*.parquet")):
        raise InputError(f"{folder} already holds a recording; give another name, or remove it")
    return folder


def topology_file(path: Path | None) -> Path | None:
    """A file for a cluster, whose ending says its form.

    Raises:
        InputError: another ending, or it cannot be written.
    """
    if path is not None and path.suffix not in (".json", ".yaml", ".yml"):
        raise InputError(f"{path} must end in .json, .yaml or .yml")
    return output_file(path)


def output_option(metavar: str, text: str, check: Callable[[Path], Path | None]) -> Any:
    """Where a command writes. metavar: FILE or DIR. text: its help. check: one of the above."""
    return Option("--output", "-o", metavar=metavar, help=text, show_default=False, callback=check)


CHARTS = (".svg", ".png", ".html")
"""How files of charts may end."""


def plot_file(path: Path | None) -> Path | None:
    """A file for charts, whose ending says its form.

    Raises:
        InputError: another ending, or it cannot be written.
    """
    if path is not None and path.suffix.lower() not in CHARTS:
        raise InputError(f"{path} must end in {', '.join(CHARTS[:-1])} or {CHARTS[-1]}")
    if path is not None and path.suffix.lower() == ".png":
        import resvg_py  # noqa: F401 (missed before the work, not after it)
    return output_file(path)


class Execution(StrEnum):
    dispatch_combine = "dispatch_combine"
    context_coherent = "context_coherent"


class Split(StrEnum):
    equal = "equal"
    free = "free"


class ReplicaChoice(StrEnum):
    share = "share"
    nearest = "nearest"
    balanced = "balanced"


class Division(StrEnum):
    local = "local"
    lp = "lp"
    waterfill = "waterfill"


class Dispatch(StrEnum):
    normal = "normal"
    low_latency = "low_latency"
    all_to_all = "all_to_all"
    all_gather = "all_gather"


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
AsJson = Annotated[bool, Option("--json", help="Print JSON instead of a table.", rich_help_panel=STORE)]
Plot = Annotated[
    bool,
    Option(
        "--plot",
        help="Also draw what the table tells: as images where the terminal shows them, else in characters.",
        rich_help_panel=STORE,
    ),
]
PlotFile = Annotated[
    Path | None,
    Option(
        "--plot-file",
        metavar="FILE",
        help="Draw it into a file that ends in .svg, .png or .html.",
        show_default=False,
        callback=plot_file,
        rich_help_panel=STORE,
    ),
]
PlanReference = Annotated[
    str,
    Argument(
        metavar="PLAN",
        autocompletion=completion.plans,
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
            "or the checkpoint's model.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None
    plan_topology: Annotated[
        str | None,
        Option(
            "--plan-topology",
            metavar="NAME[:NxM]|FILE",
            autocompletion=completion.presets,
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
    top_groups: Annotated[
        int | None,
        Option(
            "--top-groups",
            metavar="N",
            min=1,
            help="Of how many of these groups a token's experts are.",
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
            autocompletion=completion.presets,
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
            metavar="share|nearest|balanced",
            help="Which replica the engine lets serve a token: any by its share, the nearest to the token's rank "
            "(SGLang's static and dynamic dispatch), or as each step's tokens are divided to balance it. Default: as "
            "the engine does, else share.",
            show_default=False,
            rich_help_panel=OBJECTIVE,
        ),
    ] = None
    division: Annotated[
        Division | None,
        Option(
            "--division",
            metavar="local|lp|waterfill",
            help="How --replica-choice balanced divides a step: own tokens stay under the least possible load, any "
            "least possible load (SGLang's lp, LPLB), or by what devices lack of the mean (SGLang's Waterfill). "
            "Default: as the engine does, else local.",
            show_default=False,
            rich_help_panel=OBJECTIVE,
        ),
    ] = None
    online: Annotated[
        int,
        Option(
            "--online",
            min=0,
            metavar="SLOTS",
            help="Spare slots of each device into which experts are copied anew for every step, from homes that the "
            "plan decides.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = 0
    dispatch_dtype: Annotated[
        str | None,
        Option(
            "--dispatch-dtype",
            metavar="DTYPE",
            help="What activations travel to experts in: bf16, fp8, or by groups of values with a scale, int8/32, "
            "int4/32. Default: as the engine does, else bf16.",
            show_default=False,
            rich_help_panel=OBJECTIVE,
        ),
    ] = None
    combine_dtype: Annotated[
        str | None,
        Option(
            "--combine-dtype",
            metavar="DTYPE",
            help="What experts' outputs travel back in, as --dispatch-dtype. Default: bf16.",
            show_default=False,
            rich_help_panel=OBJECTIVE,
        ),
    ] = None
    dispatch: Annotated[
        Dispatch | None,
        Option(
            "--dispatch",
            metavar="normal|low_latency|all_to_all|all_gather",
            help="How tokens travel to experts, in all steps: one copy for a device, one for an expert (low_latency, "
            "all_to_all), or all of them everywhere. Default: as the engine does for prefill and decode, else normal.",
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


class Pool(StrEnum):
    prefill = "prefill"
    decode = "decode"


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """The steps that the deployment runs."""

    batch: Annotated[
        list[str] | None,
        Option(
            "--batch",
            metavar="PHASE:N[@WEIGHT]",
            help="Steps that the deployment runs: decode or prefill steps of N tokens on each GPU (N/step: over all), "
            "and their share of steps, as decode:64@0.9; may be given again. Default: what the plan was solved for, "
            "the recorded forward calls, or usual sizes.",
            show_default=False,
            rich_help_panel=JUDGING,
        ),
    ] = None
    tokens_per_gpu: Annotated[
        int | None,
        Option(
            "--tokens-per-gpu",
            metavar="N",
            min=1,
            help="Short for --batch decode:N, or with --pool prefill for --batch prefill:N.",
            show_default=False,
            rich_help_panel=JUDGING,
        ),
    ] = None
    pool: Annotated[
        list[Pool] | None,
        Option(
            "--pool",
            metavar="prefill|decode",
            help="Of a deployment whose prefill and decode run apart, only the steps of this pool; given twice, a plan "
            "is made and judged for each (solve, compare).",
            show_default=False,
            rich_help_panel=JUDGING,
        ),
    ] = None
    decode: Annotated[
        int | None,
        Option(
            "--decode",
            metavar="N",
            min=1,
            help="Short for --batch decode:N/step: decode steps of N sequences over all GPUs.",
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
            help="Short for --batch prefill:N/step: prefill steps of N tokens over all GPUs.",
            show_default=False,
            rich_help_panel=JUDGING,
        ),
    ] = None


OtherMs = Annotated[
    str | None,
    Option(
        "--other-ms",
        metavar="MS|PHASE:MS,...",
        help="Time of attention, dense layers and all else of a step, to say what whole steps gain: 12, or "
        "decode:12,prefill:80. Default: estimated for known models, engines and GPUs.",
        show_default=False,
        rich_help_panel=JUDGING,
    ),
]
RestartSeconds = Annotated[
    float | None,
    Option(
        "--restart-seconds",
        metavar="S",
        min=0.0,
        help="How long an engine that takes plans only at its start serves nothing when it is restarted.",
        show_default=False,
        rich_help_panel=JUDGING,
    ),
]


def _known(engine: str | None) -> str | None:
    """The engine named, which is looked up before anything is read."""
    from ..placement.engines import engine_profile

    return None if engine is None else engine_profile(engine).name


Redundant = Annotated[
    int | None,
    Option(
        "--redundant",
        metavar="N",
        min=0,
        max=MOST_SLOTS,
        help="Slots a layer beyond one an expert: --slots less the experts, as engines count them.",
        show_default=False,
        rich_help_panel=SOLVING,
    ),
]
Engine = Annotated[
    str | None,
    Option(
        "--for",
        callback=_known,
        autocompletion=completion.engines,
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
            help="Steps of each batch. Default: 200 of decode, 32 of prefill, fewer where they are large.",
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
            "makes room for replicas; auto chooses them (moeplace solve, --memory-budget). Default: one an expert.",
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
    redundant: Redundant = None
    seconds: Annotated[
        float, Option("--seconds", metavar="S", min=0.01, help="Time limit of a solve.", rich_help_panel=SOLVING)
    ] = 30.0


Seed = Annotated[
    int,
    Option(
        "--seed",
        metavar="N",
        min=0,
        max=MAX_SEED,
        help="Decides the held-out part and every random choice.",
        rich_help_panel=SOLVING,
    ),
]
PlanSeed = Annotated[
    int | None,
    Option(
        "--seed",
        metavar="N",
        min=0,
        max=MAX_SEED,
        help="Decides the held-out part and the steps. Default: the seed the plan, of several the first, was solved "
        "with.",
        show_default=False,
        rich_help_panel=SOLVING,
    ),
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
            autocompletion=completion.solvers,
            help="Comma-separated solvers, each with options where wanted: eplb,exflow:form=staged,backend=cbc. "
            "Default: all.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None
    plans: Annotated[
        str | None,
        Option(
            "--plans",
            autocompletion=completion.plans,
            help="Comma-separated plan files, engines' own files or stored plans to judge beside them, such as the one "
            "in force.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None
    engine: Engine = None
    other_ms: OtherMs = None
    restart_seconds: RestartSeconds = None
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class StudyOptions(HeldOutOptions, StepOptions, ServerOptions):
    """Many solves, judged on the same held-out steps, here or by a service."""

    solver: Annotated[
        str | None,
        Option(
            "--solver",
            "-s",
            autocompletion=completion.solvers,
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


def grouped(function: Callable[..., None], first: Sequence[str] = ()) -> Callable[..., None]:
    """Replaces each parameter annotated with a dataclass by the dataclass's fields, and builds it on the call.

    first: parameters whose options the help begins with, before all panels.
    """
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
        values = {name: _home(value) for name, value in values.items()}
        built = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        function(**values, **built)

    parameters = [*(_shown_first(parameters, name) for name in first), *(p for p in parameters if p.name not in first)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def as_arguments(options: Any, *groups: type[Any]) -> list[str]:
    """What was said of the options of these groups, as words of a command line: those that differ from the default."""
    words = []
    for group in groups:
        hints = get_type_hints(group, include_extras=True)
        for field in fields(group):
            value = getattr(options, field.name)
            if value != field.default:
                # Of an annotation, typer holds the first name as its default.
                name = get_args(hints[field.name])[1].default
                for each in value if isinstance(value, list) else [value]:
                    words += [name, f"{each:g}" if isinstance(each, float) else str(each)]
    return words


def _shown_first(parameters: list[inspect.Parameter], name: str) -> inspect.Parameter:
    (parameter,) = (parameter for parameter in parameters if parameter.name == name)
    kind, option = get_args(parameter.annotation)
    option = copy(option)
    option.rich_help_panel = None
    return parameter.replace(annotation=Annotated[kind, option])


def _home(value: Any) -> Any:
    """A path, or a list of them, with `~` expanded where the shell did not (`--output=~/plan.json`, quotes, commas)."""
    if isinstance(value, Path):
        return expanded(value)
    if type(value) is str and re.search(r"(^|,)~[^,/]*/", value):
        return ",".join(str(expanded(part)) if part.startswith("~") else part for part in value.split(","))
    return [_home(entry) for entry in value] if isinstance(value, list) else value


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
