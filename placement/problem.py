"""Everything a solver is given, checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .._arguments import check_fields, check_methods, wrong_type
from .._display import Displayed, plural
from .._types import BoolArray, FloatArray, IntArray
from .degraded import Failure, failure_mask
from .engines import Constraint, EngineProfile, check_problem, engine_objective, engine_profile, group_rows
from .errors import InputError
from .layer_slots import DeviceSlots, Slots, in_table, own_slots, slots_by_layer, spanned
from .model import ModelSpec
from .objective import Objective
from .plan import Plan, memory_in_words
from .statistics import RoutingStatistics
from .steps import Batch, as_batches
from .topology import Topology
from .trace import RoutingTrace


@check_fields
@check_methods
@dataclass(frozen=True, eq=False, init=False, repr=False)
class Problem(Displayed):
    """Place the experts of `model` on the devices of `topology`, given `statistics`, to minimise `objective`.

    `Problem(trace, topology)` is enough where the recording knows its model; statistics that do are as good. Where it
    is not known, say it: `Problem(trace, topology, model=spec)`, or all three, `Problem(spec, topology, statistics)`.

    slots: P, physical slots a layer (default: one an expert), dealt evenly; the first P mod G devices get one more, and
    where devices differ in memory none gets more than it holds. Or [L] numbers, one a layer: the slot table is then as
    wide as the largest, and layers with fewer leave slots empty.
    device_slots: [G] slots of each device instead, when they are to differ, or [L, G] where layers differ too.
    pinned: (layer, expert) -> device that must hold it. forbidden: (layer, expert) -> devices that must not. Layers
    count MoE layers from 0.
    current: the plan in force, where a solver may start. max_moved_bytes: most bytes of expert weights that may travel
    to get from it to the answer, an expert counting once for every device that does not hold it yet.
    batches: the steps the deployment runs, which all that solve, judge and decide are about; by default the forward
    calls of the recording where they are known, else decode and prefill steps of usual sizes (see `step_mix`).
    tolerates: failures (see `single_failures`) in each of which every expert of every layer must keep a replica.
    engine: what the plan is for, a name of `target_names()`. The problem is then held to what that engine runs (slots
    default to the fewest that it deals), the objective says what it does wherever it says nothing itself, the topology
    predicts by its measured kernels, where there are any and it names no other's, and the plan keeps the name.

    Example:
        >>> import moeplace as mp
        >>> trace = mp.read_trace("examples/data/olmoe_small")  # doctest: +SKIP
        >>> topology = mp.Topology.preset("h100-hgx", nodes=2)  # doctest: +SKIP
        >>> problem = mp.Problem(trace, topology, slots=40)  # doctest: +SKIP
        >>> faster = dataclasses.replace(problem, objective=mp.Objective(risk="cvar:0.99"))  # doctest: +SKIP
    """

    model: ModelSpec
    topology: Topology
    statistics: RoutingStatistics
    objective: Objective
    slots: Slots | None
    device_slots: DeviceSlots | None
    pinned: Mapping[tuple[int, int], int]
    forbidden: Mapping[tuple[int, int], Sequence[int]]
    tolerates: Sequence[Failure]
    current: Plan | None
    max_moved_bytes: float | None
    engine: str | None
    batches: tuple[Batch, ...]

    def __init__(
        self,
        routing: RoutingTrace | RoutingStatistics | ModelSpec | None = None,
        topology: Topology | None = None,
        statistics: RoutingStatistics | RoutingTrace | None = None,
        objective: Objective | None = None,
        slots: Slots | None = None,
        device_slots: DeviceSlots | None = None,
        pinned: Mapping[tuple[int, int], int] | None = None,
        forbidden: Mapping[tuple[int, int], Sequence[int]] | None = None,
        tolerates: Sequence[Failure] = (),
        current: Plan | None = None,
        max_moved_bytes: float | None = None,
        *,
        model: ModelSpec | None = None,
        engine: str | None = None,
        batches: Sequence[Batch] | Batch | None = None,
    ) -> None:
        """See the class. The first argument is a trace, statistics, or the model, told by its type.

        Raises:
            InputError: no routing, no topology or no model known, an argument of another type, or arguments that do not
                go together.
            UnsupportedError: the engine cannot run what is asked for; says what to change.
        """
        if routing is None and statistics is None:
            raise wrong_type("Problem", "routing", None, RoutingTrace, RoutingStatistics)
        if topology is None:
            raise wrong_type("Problem", "topology", None, Topology)
        model, statistics = _model_and_statistics(routing, statistics, model)
        values: dict[str, Any] = {
            "model": (spec := model.of_routing(statistics.experts, statistics.moe_layers, statistics.top_k)),
            "topology": topology if engine is None else topology.with_kernels_of(engine),
            "statistics": statistics,
            "objective": _objective(objective, spec, engine),
            "slots": slots,
            "device_slots": device_slots,
            "pinned": {} if pinned is None else pinned,
            "forbidden": {} if forbidden is None else forbidden,
            "tolerates": tolerates,
            "current": current,
            "max_moved_bytes": max_moved_bytes,
            "engine": engine,
            "batches": as_batches(batches),
        }
        for field_name, content in values.items():
            object.__setattr__(self, field_name, content)
        if self.profile is not None:
            check_problem(self, self.profile)
        self._check_slots()
        self._check_online()
        self._check_tolerates()
        self._check_current()
        devices = self.num_devices
        for name, entries in (("pinned", {k: [v] for k, v in self.pinned.items()}), ("forbidden", self.forbidden)):
            for (layer, expert), targets in entries.items():
                inside = 0 <= layer < self.model.layers and 0 <= expert < self.model.experts
                if not inside or any(not 0 <= device < devices for device in targets):
                    raise InputError(
                        f"Problem.{name}[{layer}, {expert}] = {targets}: layer, expert or device out of range "
                        f"({self.model.layers} layers, {self.model.experts} experts, {devices} devices)"
                    )

    def _summary(self) -> tuple[str, dict[str, str]]:
        def default(value: object) -> str:
            return f"{value!r}" if isinstance(value, str) else f"{value}"

        title = f"{self.model.layers} layers of {self.model.experts} experts on {plural(self.num_devices, 'device')}"
        plain, asked_of = Objective(), self.objective
        changed = {
            name: value
            for name in sorted(Objective.model_fields)
            if (value := getattr(asked_of, name)) != getattr(plain, name) or name in asked_of.model_fields_set
        }
        routing = self.statistics._summary()
        rows = {
            "model": self.model.title,
            "cluster": self.topology._summary()[0],
            "routing": f"{routing[0]}; tokens {routing[1]['tokens']}; pairs {routing[1]['pairs']}",
            "objective": f"{self.objective.risk} of step seconds, {self.objective.execution}"
            + "".join(
                f", {name}={default(value)}" for name, value in changed.items() if name not in ("risk", "execution")
            ),
            "slots": f"{spanned(self.layer_slots.sum(axis=1))} a layer, {spanned(self.slots_per_device)} a device",
            "memory": memory_in_words(self.device_memory, self.topology),
        }
        asked = {
            "pinned": plural(len(self.pinned), "expert") if self.pinned else "",
            "forbidden": plural(len(self.forbidden), "expert") if self.forbidden else "",
            "tolerates": plural(len(self.tolerates), "failure") if len(self.tolerates) else "",
            "in force": "" if self.current is None else self.current._summary()[0],
            "batches": " and ".join(batch.text for batch in self.batches or self.statistics.batches),
            "engine": "" if self.profile is None else f"{self.engine} ({self.profile.requires})",
            "may move": "" if self.max_moved_bytes is None else f"{self.max_moved_bytes:,.0f} bytes",
        }
        return title, rows | {name: text for name, text in asked.items() if text}

    def _check_slots(self) -> None:
        needed, memory = self.device_memory, self.topology.expert_memory
        for device in np.flatnonzero(needed > memory)[:1]:
            reserve = self.topology.reserve[device]
            raise InputError(
                f"device {device} would hold {needed[device] / 1e9:.1f} GB of experts in its "
                f"{spanned(self.layer_slots[:, device])} slots a layer, its memory is "
                f"{self.topology.memory[device] / 1e9:.1f} GB"
                + (f", {reserve / 1e9:.1f} GB of it reserved" if reserve else "")
                + f"; all devices need {needed.sum() / 1e9:.1f} GB for experts, of {memory.sum() / 1e9:.1f} GB. Use "
                "fewer slots, more devices, a smaller expert_dtype or reserve (--memory-reserve), or say how many "
                "slots each device has (device_slots, --device-slots)"
            )

    def _check_online(self) -> None:
        online = self.objective.online
        if online and self.has_replicas:
            raise InputError(
                f"Objective.online ({online}) copies experts from the one home that each has, but a layer has "
                f"{spanned(self.layer_slots.sum(axis=1))} slots for {self.model.experts} experts; leave slots out"
            )

    @property
    def device_memory(self) -> FloatArray:
        """[G] bytes of experts on each device, its slots all in use."""
        return np.asarray(self.layer_slots.sum(axis=0) * self.model.bytes_per_expert)

    def _check_tolerates(self) -> None:
        if not len(self.tolerates):
            return
        exposed = failure_mask(self.tolerates, self.num_devices).any(axis=0)
        for name, slots in zip(self.model.moe_layers, self.layer_slots, strict=True):
            alone = min(int(slots[~exposed].sum()), self.model.experts)
            needed = 2 * self.model.experts - alone
            if slots.sum() < needed:
                raise InputError(
                    f"Problem.tolerates names failures of {int(exposed.sum())} of {self.num_devices} devices: at most "
                    f"{alone} experts can do with one replica, so at least {needed} slots a layer are needed, "
                    f"given {slots.sum()}" + ("" if self.layers_alike else f" in layer {name}")
                )

    def _check_current(self) -> None:
        current, limit = self.current, self.max_moved_bytes
        if current is not None:
            theirs, ours = ((model.experts, model.moe_layers) for model in (current.model, self.model))
            if theirs != ours:
                raise InputError(
                    f"Problem.current places {theirs[0]} experts in layers {theirs[1]}, the problem has {ours[0]} in "
                    f"{ours[1]}"
                )
            if current.topology.num_devices != self.num_devices:
                raise InputError(
                    f"Problem.current is for {current.topology.num_devices} devices, the topology has "
                    f"{self.num_devices}"
                )
        if limit is not None:
            if current is None:
                raise InputError(f"Problem.max_moved_bytes ({limit:g}) needs Problem.current, the plan to move from")
            if not limit >= 0:
                raise InputError(f"Problem.max_moved_bytes ({limit}) must be at least 0, or None for no limit")

    @property
    def max_moves(self) -> int | None:
        """Experts that may reach a device that does not hold them in the current plan, over all layers; None: any."""
        if self.max_moved_bytes is None:
            return None
        most = int(self.layer_slots.sum())
        # What is exactly so many experts' bytes must not lose one to rounding.
        return int(min(most, np.floor(self.max_moved_bytes / self.model.bytes_per_expert * (1 + 1e-12))))

    @property
    def num_devices(self) -> int:
        return self.topology.num_devices

    @property
    def num_slots(self) -> int:
        """P, slots a layer; where layers differ, the width of the slot table."""
        return len(self.slot_device)

    @property
    def has_replicas(self) -> bool:
        """Whether a layer has more slots than experts."""
        return bool((self.layer_slots.sum(axis=1) > self.model.experts).any())

    @property
    def layers_alike(self) -> bool:
        """Whether every layer has the same slots."""
        return bool((self.layer_slots == self.layer_slots[0]).all())

    @cached_property
    def profile(self) -> EngineProfile | None:
        """Of the engine, where one is named."""
        return None if self.engine is None else engine_profile(self.engine)

    @property
    def spreads_replicas(self) -> bool:
        """Whether no device may hold an expert twice, and has the slots to."""
        return self.has_replicas and self.profile is not None and Constraint.SPREAD_REPLICAS in self.profile.constraints

    @cached_property
    def forbidden_devices(self) -> Mapping[tuple[int, int], Sequence[int]]:
        """`forbidden`, with the devices that the engine's rows of grouped experts rule out besides."""
        if self.profile is None or Constraint.GROUP_ROWS not in self.profile.constraints:
            return self.forbidden
        away = group_rows(self.model, self.num_devices)
        places = {**self.forbidden, **away}
        return {at: sorted({*self.forbidden.get(at, ()), *away.get(at, ())}) for at in places}

    @cached_property
    def layer_slots(self) -> IntArray:
        """[L, G] slots of each layer on each device."""
        slots = self.slots
        if slots is None and self.device_slots is None and self.profile is not None:
            slots = self.profile.whole_slots(self.model.experts, self.num_devices)
        equal = self.profile is not None and self.profile.equal_slots
        return slots_by_layer(self.model, self.topology, slots, self.device_slots, equal)

    @cached_property
    def slots_per_device(self) -> IntArray:
        """[G] slots of the table on each device: of any layer that many at most."""
        return np.asarray(self.layer_slots.max(axis=0))

    @cached_property
    def slot_device(self) -> IntArray:
        """[P] the device owning each slot of the table; a device owns a run of slots."""
        return np.repeat(np.arange(self.num_devices), self.slots_per_device)

    @cached_property
    def own_slots(self) -> BoolArray:
        """[L, P] which slots of the table are a layer's own; the others stay empty."""
        return own_slots(self.layer_slots)

    def layer_slot_device(self, layer: int) -> IntArray:
        """[P_l] the device owning each of a layer's own slots; layers count MoE layers from 0."""
        return self._layer_slot_devices[layer]

    @cached_property
    def _layer_slot_devices(self) -> list[IntArray]:
        return [np.repeat(np.arange(self.num_devices), slots) for slots in self.layer_slots]

    @property
    def index_order(self) -> IntArray:
        """[L, P] slot i holds expert i mod E, what every engine does without a plan."""
        return self.slot_table([np.arange(count) % self.model.experts for count in self.layer_slots.sum(axis=1)])

    def slot_table(self, rows: Sequence[IntArray]) -> IntArray:
        """[L, P] the slot table of the experts in each layer's own slots, [P_l] a layer."""
        return in_table(rows, self.own_slots)

    def slot_shares(self, rows: Sequence[IntArray], shares: Sequence[FloatArray]) -> FloatArray:
        """[L, P] shares of the table's slots: a layer's own slots hold `rows` [P_l] and devices serve `shares` [E,
        G]."""
        own = [
            share[row, self.layer_slot_device(layer)]
            for layer, (row, share) in enumerate(zip(rows, shares, strict=True))
        ]
        return in_table(own, self.own_slots, elsewhere=0)


def _objective(objective: Objective | None, model: ModelSpec, engine: str | None) -> Objective:
    """The objective given, with the engine's choices where one is named."""
    objective = Objective() if objective is None else objective
    return objective if engine is None else engine_objective(engine_profile(engine), objective, model)


def _model_and_statistics(
    routing: RoutingTrace | RoutingStatistics | ModelSpec | None,
    statistics: RoutingStatistics | RoutingTrace | None,
    model: ModelSpec | None,
) -> tuple[ModelSpec, RoutingStatistics]:
    """The model and the statistics of what `Problem` was called with."""
    if isinstance(routing, ModelSpec):
        if model is not None:
            raise InputError("Problem: the model is given twice, as the first argument and as model=")
        model = routing
    elif routing is not None:
        if statistics is not None:
            raise InputError("Problem: the routing is given twice, as the first argument and as statistics")
        statistics = routing
    if statistics is None:
        raise wrong_type("Problem", "statistics", None, RoutingStatistics, RoutingTrace)
    model = statistics.model if model is None else model
    if model is None:
        raise InputError(
            "Problem: this routing does not say which model it was recorded on; give it, as "
            "Problem(trace, topology, model=ModelSpec.from_config(folder)) or model=ModelSpec(layers=..., experts=..., "
            "top_k=..., hidden_size=..., ffn_size=...)"
        )
    return model, RoutingStatistics.from_trace(statistics) if isinstance(statistics, RoutingTrace) else statistics
