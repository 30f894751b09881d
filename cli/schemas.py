"""What `--json` prints, command by command: the models that its JSON Schemas are made from.

Seconds are of a step and predicted, unless a name says otherwise; fractions and shares are of one. Figures that are not
known, or not finite, are null. What the service tells, too, is its own record.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ..placement.model import ModelSpec
from ..placement.objective import Objective
from ..placement.topology import Topology
from .output import SCHEMA

T = TypeVar("T")
Phase = Literal["decode", "prefill"]
RecordKind = Literal["trace", "statistics"]
SolvedKind = Annotated[str | None, Field(description="why the solver ended, such as `time limit`")]


class Output(BaseModel):
    """Names that are not told of here are refused, so that none goes without."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Rows(Output, Generic[T]):
    """Entries of a list."""

    rows: list[T]


class Pools(Output, Generic[T]):
    """An answer for each of the prefill and decode pools that were asked for."""

    pools: dict[str, T]


# Steps, and what a plan costs on them.


class BatchOfSteps(Output):
    """Steps of one kind. weight: their part of all steps, in proportion to the others'."""

    phase: Phase
    tokens_per_device: float
    tokens: int
    weight: float


class Steps(Output):
    """Which steps the figures are about. origin: who said so."""

    text: str
    origin: str
    batches: list[BatchOfSteps]


class Judged(Output):
    """batches: which steps the figures are about."""

    batches: Steps


class Figures(Output):
    """What a plan costs on the steps, as `Evaluation.summary()` has it.

    ideal_share: of the force-balanced ideal, every device at the mean load. cross_device_fraction, cross_node_fraction:
    of token-expert pairs. local_transitions, node_local_transitions: of pairs of experts in neighbouring layers.
    experts_copied: in a step, where the objective copies experts online. step_seconds_grouped: mean, of steps
    drawn from counts, with a token's experts grouped as the model limits them.
    """

    step_seconds_mean: float | None
    step_seconds_p50: float | None
    step_seconds_p95: float | None
    step_seconds_p99: float | None
    compute_seconds: float | None
    transfer_seconds: float | None
    ideal_share: float | None
    load_max_mean: float | None
    load_max_mean_p99: float | None
    devices_per_token: float | None
    nodes_per_token: float | None
    cross_device_fraction: float | None
    cross_node_fraction: float | None
    local_transitions: float | None
    node_local_transitions: float | None
    device_bytes_max: float | None
    node_bytes_max: float | None
    device_memory_max: float | None
    step_seconds_grouped: float | None = None
    experts_copied: float | None = None


class Saving(Output):
    """What one plan saves against another. than: the other. saves, low, high: a fraction of the other's step time, and
    its interval at `confidence`. grouped: of counts, saved with a token's experts grouped as the model limits them.
    most: that no plan can save more than, where it is proven. whole_step: what whole steps gain, where the time of all
    else is known. applied: what it takes to put the plan in force, where the engine restarts for it."""

    than: str
    saves: float
    low: float
    high: float
    grouped: float | None
    confidence: float
    most: float | None
    text: str
    whole_step: str | None
    applied: str | None


class Terms(Output):
    """Of what a layer waits for."""

    compute: float
    memory: float
    intra: float
    inter: float
    latency: float


class PhaseBinding(Output):
    """steps: fraction in which each term is the largest. seconds: of each. devices, nodes: fraction of steps in which
    each is the one that is waited for."""

    steps: Terms
    seconds: Terms
    devices: dict[str, float]
    nodes: dict[str, float]


class LayerBinding(Output):
    """What one layer waits for. terms: mean seconds, which add up to `seconds`."""

    layer: int
    seconds: float
    terms: Terms
    phases: dict[Literal["dispatch", "compute", "combine"], PhaseBinding]


class PlanBalance(Output):
    """A plan's device load max/mean on windows of counts. noise: what chance alone makes of it. reason: why there is no
    plan."""

    plan: str
    solved_on: float | None = None
    held_out: float | None = None
    noise: float | None = None
    reason: str | None = None


class Cluster(Output):
    name: str
    nodes: int
    devices: int


class RoutingSplit(Output):
    """Which part plans are solved on, and which they are judged on."""

    train_fingerprint: str
    held_out: str
    train_tokens: int
    judged_tokens: int
    seed: int


class ComparedPlan(Figures):
    """A plan on steps of one kind; without one, status is failed and reason says why.

    risk_seconds: the objective's figure. ratio: of the step time to index order's. value, bound, gap: of the solver's
    own objective. noise, noise_gap: how much of value and gap sampling noise alone makes, of plans searched on counts.
    """

    solver: str
    steps: str
    status: Literal["ok", "failed"]
    reason: str | None
    risk: str
    risk_seconds: float | None
    ratio: float | None
    objective: str | None
    value: float | None
    bound: float | None
    gap: float | None
    noise: float | None
    noise_gap: float | None
    proven_optimal: bool | None
    stop: SolvedKind
    solve_seconds: float | None


class Comparison(Judged):
    """Plans on the same held-out steps. verdict: what the best saves against the engine's balancer, or the plan that
    was named. windows: of counts alone."""

    model: ModelSpec
    topology: Cluster
    slots: int
    prediction: str
    objective: Objective
    routing: RoutingSplit
    windows: list[PlanBalance] | None
    rows: list[ComparedPlan]
    best: str
    verdict: Saving | None


class Advice(Comparison):
    """advice: whether a plan is worth it, a sentence for each kind of steps. next: commands to run."""

    advice: list[str]
    next: list[str]


class EvaluatedPlan(Comparison):
    """binding: what layers wait for, by kind of steps."""

    binding: dict[str, list[LayerBinding]]


# Plans.


class PlanSummary(Output):
    """How a plan was made, and how good it is on its solver's own objective. layer_slots: of each layer. device_memory:
    bytes of experts. proven_optimal: value and bound are one. noise, noise_gap: how much of value and gap sampling
    noise alone makes, of plans searched on counts; noise_words: the same in words."""

    solver: str
    choice: str | None
    options: dict[str, Any]
    engine: str | None
    seed: int
    model: str | None
    layers: int
    experts: int
    slots: int
    layer_slots: list[int]
    devices: int
    nodes: int
    topology: str
    device_memory: list[float]
    memory: str
    objective: str | None
    value: float | None
    bound: float | None
    gap: float | None
    noise: float | None
    noise_gap: float | None
    noise_words: str | None
    proven_optimal: bool
    stop: SolvedKind
    seconds: float
    version: str
    trace_fingerprint: str
    fingerprint: str
    stored_as: str | None


class SlotsPoint(Output):
    """slots: of each layer. even: one number in every layer. redundant_experts: over all layers. memory_bytes: of them,
    on the device with most. cache_lost: part of the KV cache that they displace. saved: part of a whole step's time.
    throughput: tokens a second over those with the fewest slots, where the cache bounds how many decode at once."""

    slots: list[int]
    even: bool
    redundant_experts: int
    memory_bytes: float
    cache_lost: float
    cache_tokens_lost: float | None
    step_seconds: float
    saved: float
    throughput: float


class SlotsFront(Output):
    """Slots of layers against KV cache. memory_budget: bytes a device that redundant experts may take. cache_bytes:
    what one slot an expert leaves of a device. other_seconds: of a step beside its MoE layers, as far as known."""

    memory_budget: float
    cache_bytes: float
    cache_token_bytes: float | None
    other_seconds: float
    recommended: SlotsPoint
    recommended_even: SlotsPoint
    points: list[SlotsPoint]
    even: list[SlotsPoint]


class SolvedPlan(PlanSummary, Judged):
    """experts_moved, bytes_moved: from the plan in force, where one was named. step_seconds, ideal_share: on held-out
    steps. slot_front: where slots were chosen."""

    experts_moved: int | None
    bytes_moved: float | None
    file: str | None
    step_seconds: float
    ideal_share: float
    prediction: str
    binding: list[LayerBinding]
    windows: PlanBalance | None
    slot_front: SlotsFront | None
    verdict: Saving | None


class PlanEntry(Output):
    """model, topology: names, and of a service ids."""

    id: str
    name: str | None
    created: datetime
    solver: str
    model: str | None
    topology: str
    devices: int
    slots: int
    objective: str | None
    value: float | None
    bound: float | None
    gap: float | None


class StoredEvaluation(Figures):
    created: datetime
    steps: str
    steps_fingerprint: str
    execution: str | None


class StoredExport(Output):
    format: str
    path: str
    created: datetime
    sha256: str | None


class StoredPlan(PlanSummary):
    id: str
    name: str | None
    created: datetime
    evaluations: list[StoredEvaluation]
    exports: list[StoredExport]


class ExportedPlan(Output):
    """usage: commands and files by which the engine takes the plan, how to see it, how to undo it."""

    engine: str
    path: str
    sha256: str
    usage: str


class PermutedCheckpoint(Output):
    path: str
    inverted: bool
    weight_files: list[str]
    bytes: int
    copied: list[str]
    left_out: list[str]
    verified: str | None


class CheckFinding(Output):
    kind: str
    layer: int | None
    text: str


class CheckedWeights(Output):
    layers: list[int]
    notes: list[str]


class CheckedMap(Output):
    """sound: nothing is wrong. weights: which layers' were compared, where that was asked for."""

    running: str
    read: list[str]
    layers: int
    sound: bool
    weights: CheckedWeights | None
    findings: list[CheckFinding]


# Decisions.


class Candidate(Output):
    """A plan against the one in force. relative: of the gain to the current figure. payback_steps: until the gain has
    paid the migration; null where never, or where what it costs is not known. restart: what the engine is started with
    anew to take the plan, null where plans change while it runs. stall_seconds: in which nothing is served, null where
    that is not known. gain_grouped: of counts, in seconds, with a token's experts grouped as the model limits them."""

    candidate: str
    current_seconds: float
    candidate_seconds: float
    gain_seconds: float
    relative: float
    relative_low: float
    relative_high: float
    moves: int
    bytes_moved: float
    migration_seconds: float
    restart: str | None
    stall_seconds: float | None
    gain_grouped: float | None
    payback_steps: float | None
    payback_steps_high: float | None
    current_ideal_share: float | None
    ideal_share: float | None


class Decision(Judged):
    """chosen: the candidate to apply. most: part of the figure in force that no plan can save more than."""

    action: Literal["keep", "apply"]
    chosen: str | None
    reason: str
    text: str
    most: float | None
    confidence: float
    horizon_steps: float
    candidates: list[Candidate]
    prediction: str
    held_out: str


class ServiceDecision(Output):
    """What a service decided on one candidate. decision, decision_state: of its record, with --record."""

    action: Literal["keep", "apply"]
    reason: str
    figures: dict[str, Any]
    candidates: list[Candidate]
    decision: int | None = None
    decision_state: str | None = None
    plan: str | None = None
    statistics: str | None = None


# Other clusters, and fronts.


class Survived(Output):
    survived: int
    of: int


class ChangedPlan(Figures):
    """ratio: of the step time to that before the change. bytes_reloaded: from storage."""

    ratio: float
    slots: int
    device_slots: list[int]
    moves: int
    bytes_moved: float
    bytes_reloaded: float
    migration_seconds: float
    survives: dict[str, Survived]
    stop: SolvedKind
    fingerprint: str
    file: str | None = None
    stored_as: str | None = None


class Change(Output):
    """lost: experts without a replica, by layer. degraded: nothing moved; repaired: lost experts loaded again; ready: a
    plan solved for what is left. extra_slots: that devices need beyond their present ones."""

    change: str
    devices: int
    nodes: int
    survives: bool
    experts_lost: int
    lost: dict[str, list[int]]
    lost_load: float
    degraded: ChangedPlan | None
    repaired: ChangedPlan | None
    ready: ChangedPlan | None
    extra_slots: int
    reason: str | None


class Study(Judged):
    """statistics: id of the routing, where a service was asked."""

    statistics: str | None = None


class WhatIf(Study):
    plan: str
    slots: int
    survives: dict[str, Survived]
    prediction: str
    now: Figures
    interrupted: bool
    changes: list[Change]
    steps: str
    held_out: str


class FrontPoint(Figures):
    """best: no other point is at least as good in everything. ratio: of the step time to the fastest point's."""

    point: str
    best: bool
    redundant_slots: int
    slots: int
    tolerate: str | None
    max_moved_bytes: float | None
    survives: dict[str, Survived]
    bytes_moved: float | None
    migration_seconds: float | None
    risk_seconds: float
    ratio: float
    solver: str
    stop: SolvedKind
    fingerprint: str
    file: str | None
    stored_as: str | None


class RefusedPoint(Output):
    point: str
    reason: str


class Front(Study):
    model: ModelSpec
    topology: Cluster
    objective: Objective
    prediction: str
    points: list[FrontPoint]
    refused: list[RefusedPoint]
    interrupted: bool
    steps: str
    held_out: str


# Records of routing.


class LayerLoad(Output):
    """choices: tokens times k. top_successors: share that an expert's four likeliest successors take."""

    layer: int
    choices: float
    tokens: float | None
    load_max_mean: float | None
    busiest_expert: int
    idle_experts: int
    top_successors: float | None


class WorkloadLoad(Output):
    """distance: share of choices that would have to change to match all workloads' load."""

    workload: str
    share: float
    windows: int
    distance: float


class Statistics(Output):
    experts: int
    top_k: int | None
    moe_layers: list[int]
    tokens: int
    windows: int
    sample_tokens: int
    has_transitions: bool
    has_coactivation: bool
    fingerprint: str
    layers: list[LayerLoad]
    workloads: list[WorkloadLoad]


class ImportedRecord(Output):
    """sent: what a service took."""

    kind: RecordKind
    file: str | None
    tokens: int
    experts: int
    top_k: int | None
    moe_layers: list[int]
    workloads: list[str]
    fingerprint: str
    stored_as: str | None
    sent: str | None


class EngineRecording(Output):
    """mode: of SGLang's recorder, or requests. read: its files. answered, refused: requests."""

    engine: Literal["sglang", "vllm"]
    mode: str
    kind: RecordKind
    file: str
    tokens: int
    experts: int
    moe_layers: list[int]
    read: str | None = None
    answered: int | None = None
    refused: int | None = None


# Clusters.


class Preset(Output):
    """Achievable rates a device (flop/s at bf16, bytes, bytes/s one way), seconds a message."""

    name: str
    gpu: str | None
    devices: int
    compute: float
    memory: float
    memory_bandwidth: float
    intra_bandwidth: float
    inter_bandwidth: float
    fp8: float | None
    fp4: float | None
    intra_latency: float
    inter_latency: float


class KernelFit(Output):
    """Coefficients of measured expert kernels: seconds a launch, bytes/s, flop/s, rows. error: median on token counts
    left out of the fit."""

    gpu: str
    engine: str
    version: str
    dtype: str
    shape: str
    launch: float
    bandwidth: float
    rate: float
    rows: float
    passing: float
    error: float


class TransferFit(Output):
    """Coefficients of measured all-to-alls."""

    gpu: str
    kind: str
    nodes: int
    library: str
    phase: Literal["dispatch", "combine"]
    launch: float
    expert: float
    row: float
    token: float
    peer: float
    root: float
    intra: float
    inter: float
    error: float


class MeasuredLink(Output):
    """An all-to-all. seconds: measured; predicted: by the topology."""

    kind: Literal["intra", "inter", "all"]
    peer_bytes: int
    seconds: float
    predicted: float


class MeasuredWork(Output):
    """Expert work, of so many token-expert pairs an expert. products_only: seconds without gathering and summing."""

    pairs: int
    seconds: float
    products_only: float
    predicted: float


class MeasuredDispatch(Output):
    """The runtime's dispatch and combine. copies: rows that a rank sends. links: seconds of these alone."""

    dispatch: Literal["flat", "node_aware"]
    copies: float
    seconds: float
    links: float


class Calibration(Output):
    """A cluster as it was measured, as `Calibration.to_dict()` has it. alone: how much faster a device is while others
    are idle."""

    topology: Topology
    links: list[MeasuredLink]
    dispatches: list[MeasuredDispatch]
    work: list[MeasuredWork]
    experts: int
    tokens: int
    token_seconds: float
    copy_bandwidth: float
    alone: float
    device_dtype: str
    remarks: list[str]


# The machine, and who may use a service.


class Installation(Output):
    """extras: libraries that each lacks. wrong: with the plan's file."""

    version: str
    python: str
    extras: dict[str, list[str]]
    engines: dict[str, str]
    free_memory: int | None
    gpus: list[str]
    store: str | None
    store_error: str | None
    plan_file: str | None
    wrong: list[str]


class Token(Output):
    name: str
    role: Literal["read", "submit", "approve"]
    token: str


class Removed(Output):
    """What was removed: its name or number, or how many."""

    removed: str | int


@cache
def output_types() -> Mapping[str, Any]:
    """The type of each command's output, by the command's name with dashes between its words."""
    from ..db import records as stored
    from ..service import schemas as service

    removals = ("models", "topologies", "deployments", "windows", "webhooks", "engines")
    return {
        "advise": Advice,
        "approve": stored.DecisionRecord,
        "calibrate": Calibration,
        "check": CheckedMap,
        "compare": Comparison | Pools[Comparison],
        "decide": Decision | ServiceDecision,
        "decisions-list": Rows[stored.DecisionRecord],
        "decisions-show": stored.DecisionRecord,
        "deploy": stored.DeploymentRecord,
        "deployments-list": Rows[stored.DeploymentRecord],
        "deployments-release": stored.DeploymentRecord,
        "deployments-show": stored.DeploymentRecord,
        "doctor": Installation,
        "engines-set": stored.EngineRecord,
        "engines-show": stored.EngineRecord,
        "evaluate": EvaluatedPlan,
        "export": ExportedPlan,
        "import": ImportedRecord,
        "jobs-cancel": stored.JobRecord,
        "jobs-list": Rows[stored.JobRecord],
        "jobs-show": stored.JobRecord,
        "models-list": Rows[stored.ModelRecord],
        "pareto": Front,
        "permute": PermutedCheckpoint,
        "plans-list": Rows[PlanEntry],
        "plans-show": StoredPlan,
        "record": EngineRecording,
        "reject": stored.DecisionRecord,
        "report": Comparison | Pools[Comparison],
        "rollback": stored.PublicationRecord,
        "solve": SolvedPlan | Pools[SolvedPlan],
        "stats": Statistics,
        "tokens-add": Token,
        "tokens-list": Rows[stored.TokenRecord],
        "topologies-list": Rows[service.TopologyView],
        "topology-kernels": Rows[KernelFit],
        "topology-list": Rows[Preset],
        "topology-show": Topology,
        "topology-transfers": Rows[TransferFit],
        "webhooks-add": service.WebhookMade,
        "webhooks-deliveries": Rows[stored.DeliveryRecord],
        "webhooks-list": Rows[stored.WebhookRecord],
        "whatif": WhatIf,
        "windows-list": Rows[service.WindowView],
        **{f"{kind}-remove": Removed for kind in removals},
    }


def output_schema(name: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a command's output. Names may be added to outputs, so unknown ones are allowed."""
    generated = _open(TypeAdapter(output_types()[name]).json_schema())
    definitions = generated.pop("$defs", {})
    called = f"moeplace/{name}/{SCHEMA}"
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{called.replace('/', ':')}",
        "title": called,
        "type": "object",
        "properties": {"schema": {"const": called}},
        "required": ["schema"],
        "allOf": [generated],
        **({"$defs": definitions} if definitions else {}),
    }


def _open(schema: Any) -> Any:
    """Without refusing further names, and without titles that only repeat the names of fields."""
    if isinstance(schema, list):
        return [_open(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    opened = {key: _open(value) for key, value in schema.items() if (key, value) != ("additionalProperties", False)}
    if isinstance(described := opened.get("description"), str):
        # Examples and further paragraphs are for readers of the code.
        opened["description"] = " ".join(described.partition("\n\n")[0].split())
    for field in opened.get("properties", {}).values():
        if isinstance(field, dict):
            field.pop("title", None)
    return opened
