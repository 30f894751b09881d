"""What each engine can run, and how it runs a plan: the one place where engines differ for solvers and exporters.

`Problem(engine=...)` is narrowed by a profile before anything is solved, and what is solved is checked against it, so
that no plan needs repair at export. Where a profile says a format or a default, it was read in the engine's own source;
the exporter of that name says where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

import numpy as np

from .._arguments import check_types
from .._plugins import Registry
from .._types import IntArray
from .errors import InputError, UnsupportedError, nearest
from .layer_slots import spanned
from .model import ModelSpec
from .objective import DispatchKind, Division, Objective, ReplicaChoice
from .plan import EMPTY, Plan, equal_shares

if TYPE_CHECKING:
    from .problem import Problem


class Constraint(Enum):
    """A limit of an engine that not every valid plan keeps to."""

    EQUAL_SLOTS = "every device has the same number of slots in every layer, and none is empty"
    EQUAL_SHARES = "an expert's replicas take equal shares of its tokens"
    SPREAD_REPLICAS = "no device holds an expert twice in a layer"
    NO_REPLICAS = "every expert has one slot"
    GROUP_ROWS = "experts of a group of group-limited routing stay in the rows of a group"


DEALT = frozenset({Constraint.EQUAL_SLOTS, Constraint.EQUAL_SHARES})
"""Of engines that read a table of slots and cut it into equal runs, a rank each."""


@dataclass(frozen=True, kw_only=True)
class EngineProfile:
    """An engine, as solvers, judges and exporters need to know it.

    Attributes:
        name: by which it is asked for (`--for`).
        requires: the engine and the versions meant, in words.
        constraints: limits of the plans it runs.
        replica_choices: which replica serves a token, in the objective's terms; the first is what it does by itself.
        divisions: by which rules it divides each step's tokens where that is "balanced", in the objective's terms; the
            first where the objective does not say.
        executions: how it runs a layer, in the objective's terms.
        prefill_dispatch, decode_dispatch: how tokens travel to experts in large steps and in small ones, in the
            objective's terms, where nobody chooses otherwise.
        dispatch_dtypes: what activations travel in by what experts are stored in; bf16 elsewhere.
        node_dedup: whether a token travels once to a node.
        layer_rows: the layout of its maps: a row a layer of the model ("model": dense layers are counted) or a row a
            MoE layer ("moe"), a row's slots in equal runs, a rank each.
        split: how replicas share an expert's tokens, in the objective's terms, where the objective does not say.
        online: whether it copies experts for one step (the objective's `online`).
        masked_ranks: whether it runs on when ranks are lost, those left keeping their numbers: a device may then have
            no slots.
        restart: what it is started with anew to take a plan, by the name of the option or file; empty where a plan
            changes while it runs.
    """

    name: str
    requires: str
    constraints: frozenset[Constraint] = frozenset()
    replica_choices: tuple[ReplicaChoice, ...] = ("share", "nearest")
    divisions: tuple[Division, ...] = ("local",)
    executions: tuple[Literal["dispatch_combine", "context_coherent"], ...] = ("dispatch_combine",)
    prefill_dispatch: DispatchKind = "normal"
    decode_dispatch: DispatchKind = "normal"
    dispatch_dtypes: Mapping[str, str] = field(default_factory=dict)
    node_dedup: bool = True
    split: Literal["equal", "free"] = "equal"
    layer_rows: Literal["model", "moe"] = "moe"
    online: bool = False
    masked_ranks: bool = False
    restart: str = ""

    @property
    def profile(self) -> EngineProfile:
        """Itself: an exporter plugged in has one."""
        return self

    @property
    def equal_slots(self) -> bool:
        return Constraint.EQUAL_SLOTS in self.constraints

    def whole_slots(self, slots: int, devices: int) -> int:
        """So many slots a layer, or the next number that the engine deals to devices."""
        return -(-slots // devices) * devices if self.equal_slots else slots


EITHER: tuple[Literal["dispatch_combine", "context_coherent"], ...] = ("dispatch_combine", "context_coherent")
FP8 = {"fp8": "fp8"}
QUANTISED = {dtype: dtype for dtype in ("fp8", "mxfp8", "nvfp4", "fp4", "int8")}
"""Activations are quantised as the experts' arithmetic wants them before they travel."""

# How tokens travel, read in the engines' sources:
# - SGLang with --moe-a2a-backend deepep, which dispatch by rank and replicas want: --deepep-mode auto is normal for
#   prefill and low latency for decode (`DeepEPMode.resolve` in layers/moe/utils.py). It sends fp8 but for bf16 weights
#   and kernels that quantise themselves (`get_deepep_output_dtype`, same file): nvfp4 travels as bf16 unless
#   SGLANG_MOE_NVFP4_DISPATCH says otherwise.
# - vLLM: `ParallelConfig.all2all_backend` is "allgather_reducescatter" unless deepep_high_throughput (normal) or
#   deepep_low_latency is asked for. It quantises first (`_quantize_and_setup_dispatch` in
#   fused_moe/prepare_finalize/naive_dp_ep.py); DeepEP's backends do so for block fp8 alone (deepep_ht.py and
#   deepep_ll.py there).
# - TensorRT-LLM with attention data parallelism takes NVLinkOneSided, one copy a (token, rank), where NVLink reaches,
#   for prefill and decode alike (`CommunicationFactory.create_strategy` in fused_moe/communication/
#   communication_factory.py), after quantising (`supports_post_quant_dispatch`); its DeepEP normal mode sends bf16 or
#   nvfp4.
# - vLLM-Ascend: MC2 for decode, one copy a (token, expert), int8 where experts are (`quant_mode=2` of
#   `TokenDispatcherWithMC2` in ops/fused_moe/token_dispatcher.py); all-to-all of such copies for prefill.

PROFILES: Registry[EngineProfile] = Registry(
    "engine",
    "moeplace.exporters",
    ("name", "profile"),
    EngineProfile(
        name="moeplace",
        requires="moeplace",
        replica_choices=("share", "nearest", "balanced"),
        executions=EITHER,
        online=True,
    ),
    EngineProfile(
        name="sglang",
        requires="SGLang 0.4.6.post5 or newer",
        constraints=DEALT,
        replica_choices=("nearest", "share", "balanced"),
        divisions=("lp", "waterfill"),
        decode_dispatch="low_latency",
        dispatch_dtypes=FP8,
        layer_rows="model",
        masked_ranks=True,
        restart="--init-expert-location",
    ),
    EngineProfile(
        name="sglang-lp",
        requires="HYGON-AI's sglang-das, or another SGLang that reads static LP shares",
        constraints=frozenset({Constraint.EQUAL_SLOTS}),
        replica_choices=("share",),
        decode_dispatch="low_latency",
        dispatch_dtypes=FP8,
        split="free",
        layer_rows="model",
        restart="--init-expert-location",
    ),
    EngineProfile(
        name="vllm",
        requires="moeplace's plug-in (0.18 and 0.33), or a vLLM with pull request 49572: no release reads a plan file",
        constraints=DEALT,
        replica_choices=("share",),
        prefill_dispatch="all_gather",
        decode_dispatch="all_gather",
        dispatch_dtypes=QUANTISED,
        restart="MOEPLACE_VLLM_PLAN",
    ),
    EngineProfile(
        name="vllm-ascend",
        requires="vLLM-Ascend 0.14 to 0.23",
        constraints=DEALT | {Constraint.SPREAD_REPLICAS},
        replica_choices=("share",),
        prefill_dispatch="all_to_all",
        decode_dispatch="low_latency",
        dispatch_dtypes={"int8": "int8"},
        node_dedup=False,
        restart="expert_map_path",
    ),
    EngineProfile(
        name="trtllm",
        requires="TensorRT-LLM 1.0 or newer",
        constraints=DEALT,
        replica_choices=("share",),
        dispatch_dtypes={"fp8": "fp8", "nvfp4": "nvfp4", "fp4": "fp4"},
        layer_rows="model",
        restart="moe_config.load_balancer",
    ),
    EngineProfile(
        name="permute",
        requires="a permuted checkpoint",
        constraints=frozenset({Constraint.NO_REPLICAS, Constraint.EQUAL_SLOTS, Constraint.GROUP_ROWS}),
        executions=EITHER,
        restart="the permuted checkpoint",
    ),
)


def target_names() -> tuple[str, ...]:
    """Engines that a problem may be for."""
    return PROFILES.names


@check_types
def engine_profile(engine: str) -> EngineProfile:
    """The profile of that engine, built in or an exporter's that is plugged in.

    Raises:
        InputError: unknown engine (the nearest is told), or a plug-in that does not load.
    """
    if not isinstance(engine, str):
        raise InputError(f"engine {engine!r} is no name; {nearest('', target_names())}")
    return PROFILES.named(engine).profile


# A problem within an engine's limits.


def check_objective(profile: EngineProfile, objective: Objective) -> None:
    """Checks what an objective says of itself.

    Raises:
        UnsupportedError: the engine does not do that; says what to change.
    """
    said: list[tuple[str, tuple[str, ...]]] = [
        ("execution", profile.executions),
        ("replica_choice", profile.replica_choices),
    ]
    if objective.replica_choice == "balanced":
        said.append(("division", profile.divisions))
    for name, choices in said:
        if name in objective.model_fields_set and getattr(objective, name) not in choices:
            raise refusal(
                profile, f"it does not do {name}={getattr(objective, name)!r}; use {' or '.join(map(repr, choices))}"
            )
    if objective.online and not profile.online:
        raise refusal(profile, f"it copies no experts for one step, which online={objective.online} asks for; use 0")
    if Constraint.EQUAL_SHARES in profile.constraints and objective.split != "equal":
        raise refusal(
            profile, f"replicas take equal shares there, the objective says split={objective.split!r}; use equal"
        )


def engine_objective(profile: EngineProfile, objective: Objective, model: ModelSpec) -> Objective:
    """The objective with what the engine does wherever the objective says nothing.

    Raises:
        UnsupportedError: as `check_objective`.
    """
    check_objective(profile, objective)
    returns = objective.execution == "dispatch_combine"
    if objective.replica_choice == "balanced":
        objective = objective.filled(division=profile.divisions[0])
    return objective.filled(
        replica_choice=profile.replica_choices[0] if returns and not objective.online else "share",
        prefill_dispatch=profile.prefill_dispatch if returns else "normal",
        decode_dispatch=profile.decode_dispatch if returns else "normal",
        split=profile.split,
        dispatch_dtype=profile.dispatch_dtypes.get(model.expert_dtype, "bf16"),
        node_dedup=profile.node_dedup,
    )


def check_problem(problem: Problem, profile: EngineProfile) -> None:
    """Checks the slots that a problem asks for.

    Raises:
        UnsupportedError: the engine cannot run a plan with them; says what to change.
    """
    constraints, devices, experts = profile.constraints, problem.num_devices, problem.model.experts
    slots = problem.layer_slots.sum(axis=1)
    if Constraint.NO_REPLICAS in constraints:
        if experts % devices:
            fitting = [count for count in range(1, devices) if experts % count == 0]
            raise refusal(profile, f"{experts} experts do not divide over {devices} devices; use {fitting[-1]}")
        if problem.has_replicas:
            raise refusal(profile, f"{spanned(slots)} slots a layer for {experts} experts make replicas; use {experts}")
    if Constraint.EQUAL_SLOTS in constraints:
        if not problem.layers_alike:
            raise refusal(
                profile,
                f"every layer has the same slots there, this problem's have {spanned(slots)}; use one number for all, "
                f"a multiple of {devices}",
            )
        counts, what = _dealt(problem.slots_per_device, profile)
        if len(set(counts.tolist())) > 1:
            raise refusal(
                profile,
                f"{what} the same number of slots there, {problem.num_slots} do not divide over {len(counts)} devices; "
                f"use {_fitting(problem.num_slots, len(counts), experts)}",
            )
    if Constraint.SPREAD_REPLICAS in constraints and int(problem.slots_per_device.max()) > experts:
        raise refusal(
            profile,
            f"a device may hold an expert once, {problem.slots_per_device.max()} slots a device for {experts} experts "
            f"hold one twice; use at most {experts * devices} slots",
        )


def group_rows(model: ModelSpec, devices: int) -> dict[tuple[int, int], list[int]]:
    """Devices that each (layer, expert) must keep away from, for experts to stay in the rows of their group: those
    whose block of rows meets no row of the group's."""
    if model.groups == 1:
        return {}
    row = np.arange(model.experts)
    group = row * model.groups // model.experts
    here = np.zeros((model.groups, devices), np.bool_)
    here[group, row * devices // model.experts] = True
    away = [np.flatnonzero(~here[group[expert]]).tolist() for expert in range(model.experts)]
    return {
        (layer, expert): away[expert]
        for layer in range(model.layers)
        for expert in range(model.experts)
        if away[expert]
    }


def refusal(profile: EngineProfile, problem_and_change: str) -> UnsupportedError:
    return UnsupportedError(f"{profile.name} cannot run such a plan ({profile.requires}): {problem_and_change}")


# A plan within an engine's limits.


def violations(plan: Plan, constraints: Iterable[Constraint], masked_ranks: bool = False) -> list[str]:
    """A sentence for each constraint the plan breaks: what it has and what to change. Empty when it keeps to all.

    masked_ranks: whether devices may have no slots.
    """
    asked = set(constraints)
    sentences = (check(plan, masked_ranks) for constraint, check in _CHECKS.items() if constraint in asked)
    broken = [sentence for sentence in sentences if sentence is not None]
    # Rows can be told only where each device has its block of them.
    parted = None if broken or Constraint.GROUP_ROWS not in asked else _parted_groups(plan)
    return broken if parted is None else [parted]


def check_plan(plan: Plan, engine: str) -> None:
    """Checks that the engine can express the plan.

    Raises:
        InputError: unknown engine.
        UnsupportedError: it cannot; names every constraint broken, what to change, and the versions meant.
    """
    profile = engine_profile(engine)
    broken = violations(plan, profile.constraints, profile.masked_ranks)
    if broken:
        raise UnsupportedError(f"{engine} cannot express this plan ({profile.requires}): {'; '.join(broken)}")


def _dealt(slots: IntArray, profile: EngineProfile) -> tuple[IntArray, str]:
    """The counts [G] that must be equal, and of what: devices without slots are lost ranks where they may be."""
    return (slots[slots > 0], "every device left has") if profile.masked_ranks else (slots, "every device has")


def _fitting(slots: int, devices: int, experts: int) -> str:
    below, above = slots // devices * devices, -(-slots // devices) * devices
    return " or ".join(str(count) for count in dict.fromkeys((below, above)) if count >= experts)


def _unequal_slots(plan: Plan, masked_ranks: bool) -> str | None:
    devices, experts = plan.topology.num_devices, plan.model.experts
    counts = np.bincount(plan.slot_device, minlength=devices)
    if masked_ranks:
        counts = counts[counts > 0]
    if not plan.filled.all():
        return (
            f"every slot needs an expert in every layer, this plan's layers fill {spanned(plan.filled.sum(axis=1))} of "
            f"{plan.num_slots}: solve with one number of slots for all layers, a multiple of {len(counts)}"
        )
    if counts.min() == counts.max():
        return None
    return (
        f"every device needs the same number of slots, this plan's {plan.num_slots} slots a layer give its "
        f"{len(counts)} devices from {counts.min()} to {counts.max()}: solve with "
        f"slots={_fitting(plan.num_slots, len(counts), experts)} and no device_slots"
    )


def _unequal_shares(plan: Plan, masked_ranks: bool) -> str | None:
    if plan.has_equal_shares:
        return None
    expected = equal_shares(plan.physical_to_logical, plan.model.experts)
    layer, slot = np.unravel_index(int(np.abs(plan.shares - expected).argmax()), plan.shares.shape)
    expert = plan.physical_to_logical[layer, slot]
    return (
        f"replicas take equal shares of an expert's tokens, this plan gives slot {slot} a share of "
        f"{plan.shares[layer, slot]:.3f} of expert {expert} in layer {plan.moe_layers[layer]}, where an equal one is "
        f"{expected[layer, slot]:.3f}: solve with Objective(split='equal'), from here with Problem(current=plan, "
        "max_moved_bytes=0) to keep the placement, or more to fit it to equal shares (`moeplace solve --split equal "
        "--current PLAN --max-moved SIZE`)"
    )


def _stacked_replicas(plan: Plan, masked_ranks: bool) -> str | None:
    for table, layer in zip(plan.physical_to_logical, plan.moe_layers, strict=True):
        filled = table != EMPTY
        pairs, counts = np.unique(plan.slot_device[filled] * plan.model.experts + table[filled], return_counts=True)
        if counts.max() > 1:
            device, expert = divmod(int(pairs[counts.argmax()]), plan.model.experts)
            return (
                f"a device may hold an expert once, device {device} holds expert {expert} {counts.max()} times in "
                f"layer {layer}: solve with fewer slots, or with a solver that spreads replicas over devices"
            )
    return None


def _replicas(plan: Plan, masked_ranks: bool) -> str | None:
    if plan.num_slots == plan.model.experts:
        return None
    return (
        f"every expert needs exactly one slot, this plan has {plan.num_slots} slots a layer for {plan.model.experts} "
        f"experts: solve with slots={plan.model.experts} (the default)"
    )


def _parted_groups(plan: Plan) -> str | None:
    groups = plan.model.groups
    for row, layer in zip(plan.physical_to_logical, plan.moe_layers, strict=True):
        if groups > 1 and order_in_groups(row, plan.slot_device, groups) is None:
            size = plan.model.experts // groups
            return (
                f"the model routes to {groups} groups of {size} experts and reads them as blocks of {size} rows, and "
                f"the plan parts the groups of layer {layer} otherwise than blocks of devices do. Solve so that "
                "experts move inside their group or groups move whole (contiguous, or the hierarchical EPLB with as "
                "many nodes as groups), or use an engine that maps experts after routing (sglang, trtllm)"
            )
    return None


def order_in_groups(row: IntArray, device: IntArray, groups: int) -> IntArray | None:
    """The row with slots exchanged inside devices so that each block holds one group; None when there is no such order.

    A block of rows takes so many experts from each device. It can hold a group exactly if the group has so many experts
    on each device; blocks and groups with equal counts are interchangeable, so matching them in order finds an answer
    whenever there is one.
    """
    size = len(row) // groups
    block = np.arange(len(row)) // size
    group = row // size
    if np.array_equal(group, np.repeat(group[::size], size)):
        return row
    devices = int(device[-1]) + 1
    block_counts = _counts(block, device, groups, devices)
    group_counts = _counts(group, device, groups, devices)
    free = dict.fromkeys(range(groups))
    order = np.empty_like(row)
    for b in range(groups):
        match = next((g for g in [b, *free] if g in free and np.array_equal(group_counts[g], block_counts[b])), None)
        if match is None:
            return None
        del free[match]
        for d in np.flatnonzero(block_counts[b]):
            order[(block == b) & (device == d)] = row[(group == match) & (device == d)]
    return order


def _counts(labels: IntArray, device: IntArray, groups: int, devices: int) -> IntArray:
    """[groups, G] how many slots of each label stand on each device."""
    return np.bincount(labels * devices + device, minlength=groups * devices).reshape(groups, devices)


_CHECKS: dict[Constraint, Callable[[Plan, bool], str | None]] = {
    Constraint.EQUAL_SLOTS: _unequal_slots,
    Constraint.EQUAL_SHARES: _unequal_shares,
    Constraint.SPREAD_REPLICAS: _stacked_replicas,
    Constraint.NO_REPLICAS: _replicas,
}
