"""A placement: which expert stands in which slot of which device, how it was made, and how good it provably is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np

from .._arguments import check_fields, check_methods, wrong_type
from .._display import Displayed, data_size
from .._types import BoolArray, FloatArray, IntArray
from .errors import FileFormatError, InputError
from .files import parse_json, read_text, write_text
from .model import ModelSpec
from .topology import Topology
from .validation import describe

if TYPE_CHECKING:
    from collections.abc import Mapping

Stop = Literal["finished", "time limit", "interrupted", "given"]

EMPTY = -1
"""In a slot table, a slot without an expert: it takes no memory and serves no token."""
RELATIVE_TOLERANCE = 1e-6
"""A gap below this is rounding of floating-point sums and of ILP tolerances, not a gap."""


@check_fields
@dataclass(frozen=True)
class Certificate:
    """What the solver minimised, the value of its plan, and a value proven to be a lower bound of any plan's.

    objective: the name of the minimised figure, with its unit. bound is None where nothing is proven, and holds for the
    steps or windows solved on, as if each could have a plan of its own. noise: how much of the value is there by chance
    alone, where it is of windows of counts: an estimate, of what no plan that is chosen before its tokens is without.
    """

    objective: str
    value: float
    bound: float | None = None
    noise: float | None = None

    @property
    def gap(self) -> float | None:
        """(value - bound) / value: 0 when proven optimal, None when nothing is proven."""
        if self.bound is None:
            return None
        gap = 0.0 if self.value <= 0 else (self.value - self.bound) / self.value
        return max(gap, 0.0)

    @property
    def noise_gap(self) -> float | None:
        """The part of the gap that sampling noise alone makes; what is left of the gap, a better plan or a better bound
        may close. None where noise is not known."""
        if self.gap is None or self.noise is None or self.value <= 0:
            return None
        return min(self.gap, max(0.0, self.noise / self.value))


@dataclass(frozen=True)
class Provenance:
    """How a plan was made; with the same solver, version, seed, options and trace it can be made again.

    history: (seconds, value, bound) of each better plan or bound found on the way. choice: why this solver, where none
    was named. engine: what the plan was solved for, where one was named. batches: the steps it was solved for, where
    they were named, as `Batch.parse` reads them.
    """

    solver: str
    version: str
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    stop: Stop = "finished"
    trace_fingerprint: str = ""
    history: tuple[tuple[float, float, float | None], ...] = ()
    choice: str = ""
    engine: str = ""
    batches: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", tuple(self.batches))


@check_methods
@dataclass(frozen=True, eq=False, repr=False)
class Plan(Displayed):
    """An immutable placement of `model` on `topology`.

    physical_to_logical: [L, P] expert in each slot, `EMPTY` in those that a layer does without. slot_device: [P] device
    owning each slot, non-decreasing. shares: [L, P] fraction of its expert's tokens each slot serves, 0 in an empty
    one; equal among replicas when left out.

    Example:
        >>> import numpy as np, moeplace as mp
        >>> model = mp.ModelSpec(layers=1, experts=4, top_k=1, hidden_size=64, ffn_size=64)
        >>> topology = mp.Topology.preset("h100-hgx", devices_per_node=2)
        >>> plan = mp.Plan(model, topology, np.array([[0, 1, 2, 3]]), slot_device=np.array([0, 0, 1, 1]))
        >>> plan.holds[0, 2].tolist()
        [False, True]
        >>> plan = mp.solve(problem)  # doctest: +SKIP
        >>> plan.save("plan.json")  # doctest: +SKIP
        >>> mp.export_plan(plan, "sglang", "location.json")  # doctest: +SKIP

    Raises:
        InputError: on construction, naming the layer and what is wrong (an id out of range, an expert without a
            slot, shares that do not sum to one, a device out of range), or an argument of another type.
    """

    model: ModelSpec
    topology: Topology
    physical_to_logical: IntArray
    slot_device: IntArray
    shares: FloatArray = field(default_factory=lambda: np.empty(0))
    certificate: Certificate | None = None
    provenance: Provenance = Provenance(solver="given", version="", stop="given")
    predicted: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("model", ModelSpec), ("topology", Topology)):
            if not isinstance(getattr(self, name), kind):
                raise wrong_type("Plan", name, getattr(self, name), kind)
        table = _integers("physical_to_logical", self.physical_to_logical)
        devices = _integers("slot_device", self.slot_device)
        object.__setattr__(self, "physical_to_logical", table)
        object.__setattr__(self, "slot_device", devices)
        _check_table(self.model, table, devices, self.topology.num_devices)
        if not np.size(self.shares):
            shares = equal_shares(table, self.model.experts)
        else:
            shares = np.array(self.shares, dtype=np.float64)
            _check_shares(self.model, table, shares)
        shares.flags.writeable = False
        object.__setattr__(self, "shares", shares)

    def _summary(self) -> tuple[str, dict[str, str]]:
        made, certificate, predicted = self.provenance, self.certificate, self.predicted
        gap = "" if self.gap is None else f", gap {self.gap:.2%}"
        rows = {"model": self.model.title, "cluster": self.topology._summary()[0], "slots": self._slots_in_words()}
        rows["memory"] = memory_in_words(self.device_memory, self.topology)
        if made.stop != "given":
            options = "".join(f", {name}={value}" for name, value in made.options.items())
            rows["solver"] = (
                f"{made.solver} {made.version}, seed {made.seed}{options}: {made.stop} in {made.seconds:.3g} s"
            )
        if made.choice:
            rows["chosen"] = made.choice
        if certificate is not None:
            rows["value"] = f"{certificate.value:.6g} ({certificate.objective})"
            rows["bound"] = "nothing proven" if certificate.bound is None else f"{certificate.bound:.6g}{gap}"
            rows["bound"] += ", proven optimal" if self.proven_optimal else ""
            if certificate.noise is not None:
                rows["noise"] = noise_in_words(certificate)
        if "load_max_mean" in predicted:
            rows["load"] = f"busiest device {predicted['load_max_mean']:.3f} times the mean, on the routing solved on"
        if "moves" in predicted:
            moves, moved = int(predicted["moves"]), data_size(predicted["bytes_moved"])
            rows["moved"] = f"{moves:,} experts to another device, {moved}, from the plan in force"
        rows["use"] = 'plan.save("plan.json"), or export_plan(plan, engine, path) with engine of engine_names()'
        return f"by {made.solver}, {self.model.layers} layers, {self.topology.num_devices} devices{gap}", rows

    def _slots_in_words(self) -> str:
        slots, spare = self.filled.sum(axis=1), self.filled.sum(axis=1) - self.model.experts
        low, high = int(slots.min()), int(slots.max())
        width = f"{low}" if low == high else f"{low} to {high}"
        return f"{width} a layer" + (f", {int(spare.max())} of them replicas" if spare.any() else "")

    @property
    def num_slots(self) -> int:
        """P, the width of the slot table; a layer with empty slots uses fewer."""
        return int(self.physical_to_logical.shape[1])

    @cached_property
    def filled(self) -> BoolArray:
        """[L, P] whether a slot holds an expert."""
        result = np.asarray(self.physical_to_logical != EMPTY)
        result.flags.writeable = False
        return result

    @cached_property
    def slots_per_device(self) -> IntArray:
        """[L, G] slots that each layer fills on each device."""
        owner = np.eye(self.topology.num_devices, dtype=np.int64)[self.slot_device]
        return np.asarray(self.filled.astype(np.int64) @ owner)

    @cached_property
    def device_memory(self) -> FloatArray:
        """[G] bytes of experts on each device."""
        return np.asarray(self.slots_per_device.sum(axis=0) * np.float64(self.model.bytes_per_expert))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return self.model.moe_layers

    @property
    def bound(self) -> float | None:
        """Proven lower bound of the solver's objective (`certificate.objective` names it)."""
        return self.certificate.bound if self.certificate else None

    @property
    def gap(self) -> float | None:
        """Relative distance between the plan's value and its proven bound."""
        return self.certificate.gap if self.certificate else None

    @property
    def proven_optimal(self) -> bool:
        """Whether the bound proves that no plan is better on the solver's objective."""
        return self.gap is not None and self.gap <= RELATIVE_TOLERANCE

    @cached_property
    def device_share(self) -> FloatArray:
        """[L, E, G] fraction of each expert's tokens served on each device; rows sum to 1."""
        rows, slots = np.nonzero(self.filled)
        result = np.zeros((self.model.layers, self.model.experts, self.topology.num_devices))
        place = rows, self.physical_to_logical[rows, slots], self.slot_device[slots]
        np.add.at(result, place, self.shares[rows, slots])
        result.flags.writeable = False
        return result

    @cached_property
    def holds(self) -> BoolArray:
        """[L, E, G] whether a device has a slot of the expert."""
        rows, slots = np.nonzero(self.filled)
        result = np.zeros((self.model.layers, self.model.experts, self.topology.num_devices), dtype=bool)
        result[rows, self.physical_to_logical[rows, slots], self.slot_device[slots]] = True
        result.flags.writeable = False
        return result

    @cached_property
    def replicas(self) -> IntArray:
        """[L, E] slots each expert has."""
        return replica_counts(self.physical_to_logical, self.model.experts)

    @cached_property
    def logical_to_physical(self) -> IntArray:
        """[L, E, R] the slots of each expert in increasing order, padded with -1."""
        layers, slots = self.physical_to_logical.shape
        result = np.full((layers, self.model.experts, int(self.replicas.max())), -1, dtype=np.int64)
        filled = np.zeros((layers, self.model.experts), dtype=np.int64)
        for slot in range(slots):
            rows = np.flatnonzero(self.filled[:, slot])
            expert = self.physical_to_logical[rows, slot]
            result[rows, expert, filled[rows, expert]] = slot
            filled[rows, expert] += 1
        return result

    @property
    def has_equal_shares(self) -> bool:
        equal = equal_shares(self.physical_to_logical, self.model.experts)
        return bool((np.abs(self.shares - equal) < 1e-12).all())

    def select(self, layers: Sequence[int]) -> Plan:
        """The same placement of some layers alone, as a pipeline stage has them; without certificate, which is of all.

        Args:
            layers: the model's absolute indices.

        Example:
            >>> stage = plan.select([0, 1, 2, 3])  # doctest: +SKIP
            >>> mp.parallelize(first_stage, stage, mesh["ep"])  # doctest: +SKIP

        Raises:
            InputError: no layer, one twice, or one that the plan does not place.
        """
        chosen = [int(layer) for layer in layers]
        strange = [layer for layer in chosen if layer not in self.moe_layers]
        if not chosen or strange or len(set(chosen)) != len(chosen):
            what = (
                f"layer {strange[0]} is not among them" if strange else f"given {chosen}, expected each once, and one"
            )
            raise InputError(f"select: the plan places the layers {list(self.moe_layers)}; {what}")
        chosen.sort()
        rows = [self.moe_layers.index(layer) for layer in chosen]
        return replace(
            self,
            model=self.model.replace(layers=len(chosen), moe_layers=tuple(chosen)),
            physical_to_logical=self.physical_to_logical[rows],
            shares=self.shares[rows],
            certificate=None,
            predicted={},
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the placement itself (slots, devices, shares, model), not of how it was made."""
        digest = hashlib.sha256(self.model.model_dump_json().encode())
        for array in (self.physical_to_logical, self.slot_device, np.round(self.shares, 12)):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, whole or not at all."""

        write_plan(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan written by `save`.

        Raises:
            FileFormatError: not a plan, truncated, or of a newer version; the field is named.
        """

        return read_plan(path)


def memory_in_words(device_memory: FloatArray, topology: Topology) -> str:
    """Bytes of experts [G], in words: `3.2 GB of experts a device, of 80 GB; nothing reserved for all else`."""
    share = device_memory / topology.memory
    fullest = int(np.argmax(share))
    low, high = data_size(device_memory.min()), data_size(device_memory.max())
    span = low if low == high else f"{low} to {high}"
    reserve = topology.reserve[fullest]
    rest = f"{data_size(reserve)} reserved" if reserve else "nothing reserved for all else (--memory-reserve)"
    at = f"fullest is device {fullest} with {share[fullest]:.0%} of {data_size(topology.memory[fullest])}"
    return f"{span} of experts a device; {at}, {rest}"


def noise_in_words(certificate: Certificate) -> str:
    """What of the value and the gap is chance: `0.044 of the value; 4.2% of the gap, 0.3% are left`."""
    assert certificate.noise is not None
    text = f"about {certificate.noise:.4g} of the value, which no plan chosen before its tokens is without"
    if certificate.noise_gap is None or certificate.gap is None:
        return text
    return f"{text}; {certificate.noise_gap:.2%} of the gap, {certificate.gap - certificate.noise_gap:.2%} are left"


def equal_shares(physical_to_logical: IntArray, experts: int) -> FloatArray:
    """[L, P] 1 / replicas of the slot's expert, 0 in empty slots."""
    counts = np.take_along_axis(replica_counts(physical_to_logical, experts), physical_to_logical, axis=1)
    return np.divide(1.0, counts, out=np.zeros(counts.shape), where=physical_to_logical != EMPTY)


def replica_counts(physical_to_logical: IntArray, experts: int) -> IntArray:
    """[L, E] slots of each expert in a table [L, P]."""
    layers = len(physical_to_logical)
    # An empty slot (-1) counts in a column of its own, the first of its layer.
    column = physical_to_logical + 1 + (np.arange(layers) * (experts + 1))[:, None]
    counts = np.bincount(column.ravel(), minlength=layers * (experts + 1))
    return np.asarray(counts.reshape(layers, experts + 1)[:, 1:])


def _integers(name: str, values: Any) -> IntArray:
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"Plan.{name} must hold integers, given {array.dtype}")
    array = np.array(array, dtype=np.int64)
    array.flags.writeable = False
    return array


def _check_table(model: ModelSpec, table: IntArray, devices: IntArray, num_devices: int) -> None:
    if devices.ndim != 1 or table.ndim != 2 or table.shape[1] != len(devices):
        raise InputError(
            f"Plan: physical_to_logical {table.shape} must be [layers, slots] and slot_device {devices.shape} [slots]"
        )
    if len(table) != model.layers:
        raise InputError(
            f"Plan: physical_to_logical has {len(table)} layers, the model has {model.layers}; "
            f"a row for each of the MoE layers {model.moe_layers} is needed"
        )
    if len(devices) and (devices.min() < 0 or devices.max() >= num_devices or (np.diff(devices) < 0).any()):
        raise InputError(
            f"Plan: slot_device must not decrease and stay within 0..{num_devices - 1}, given {devices.tolist()}"
        )
    for row, name in zip(table, model.moe_layers, strict=True):
        if len(row) and (row.min() < EMPTY or row.max() >= model.experts):
            raise InputError(
                f"Plan: layer {name} holds expert {row.min() if row.min() < EMPTY else row.max()}, "
                f"experts are 0..{model.experts - 1}, and {EMPTY} is an empty slot"
            )
        missing = np.flatnonzero(np.bincount(row[row != EMPTY], minlength=model.experts) == 0)
        if len(missing):
            raise InputError(f"Plan: layer {name} has no slot for expert {missing[0]} ({len(missing)} missing in all)")


def _check_shares(model: ModelSpec, table: IntArray, shares: FloatArray) -> None:
    if shares.shape != table.shape:
        raise InputError(f"Plan.shares has shape {shares.shape}, expected {table.shape}")
    if not np.isfinite(shares).all() or (shares < 0).any():
        raise InputError("Plan.shares must be non-negative and finite")
    for row, share, name in zip(table, shares, model.moe_layers, strict=True):
        empty = np.flatnonzero((row == EMPTY) & (share != 0))
        if len(empty):
            raise InputError(f"Plan.shares: layer {name}, slot {empty[0]} is empty, its share must be 0")
        sums = np.bincount(row[row != EMPTY], weights=share[row != EMPTY], minlength=model.experts)
        wrong = np.flatnonzero(np.abs(sums - 1.0) > 1e-6)
        if len(wrong):
            raise InputError(f"Plan.shares: layer {name}, expert {wrong[0]}: shares sum to {sums[wrong[0]]:.6f}, not 1")


# Plans on disk: one JSON object with a format name and a version.


T = TypeVar("T")

FORMAT = "moeplace.plan"
VERSION = 2
"""Version 1 knows no empty slots; plans without any are still written as such, for releases that read no other."""


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, in the file's form. Equal shares are left out: they follow from the table."""
    certificate, provenance = plan.certificate, plan.provenance
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": 1 if plan.filled.all() else 2,
        "model": plan.model.model_dump(mode="json"),
        "topology": plan.topology.model_dump(mode="json"),
        "physical_to_logical": plan.physical_to_logical.tolist(),
        "slot_device": plan.slot_device.tolist(),
        "shares": None if plan.has_equal_shares else plan.shares.tolist(),
        "certificate": None
        if certificate is None
        else {
            **{name: value for name, value in dataclasses.asdict(certificate).items() if name != "noise"},
            **({} if certificate.noise is None else {"noise": certificate.noise}),
            "map": "",
        },
        "provenance": {
            "solver": provenance.solver,
            "version": provenance.version,
            "seed": provenance.seed,
            "options": provenance.options,
            "seconds": provenance.seconds,
            "stop": provenance.stop,
            "trace_fingerprint": provenance.trace_fingerprint,
            "history": [list(entry) for entry in provenance.history],
            "choice": provenance.choice,
            # Left out where nothing is said, for releases that know no such entry.
            **({"engine": provenance.engine} if provenance.engine else {}),
            **({"batches": list(provenance.batches)} if provenance.batches else {}),
        },
        "predicted": plan.predicted,
    }
    if certificate is not None:
        document["certificate"]["map"] = _proven_map(document)
    return document


def plan_from_dict(data: Any, origin: str = "plan") -> Plan:
    """Builds a plan from the file's form.

    Raises:
        FileFormatError: a field is missing or wrong, the version is newer than this release reads, or the certificate
            was proven for another map. One that names no map is left out, with a warning.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FileFormatError(
            f"{origin}: not a {FORMAT} file (no such 'format' field); `Plan.save` writes one, and "
            "`mp.read_plan_file` reads engines' own files"
        )
    version = data.get("version")
    if not isinstance(version, int) or version < 1:
        raise FileFormatError(f"{origin}: version is {version!r}, expected a whole number")
    if version > VERSION:
        raise FileFormatError(
            f"{origin}: plan file of version {version}, this release reads up to {VERSION}; upgrade moeplace"
        )
    try:
        plan = Plan(
            model=ModelSpec(**_mapping(data, "model")),
            topology=Topology(**_mapping(data, "topology")),
            physical_to_logical=_array(data, "physical_to_logical", np.int64),
            slot_device=_array(data, "slot_device", np.int64),
            shares=np.empty(0) if data.get("shares") is None else _array(data, "shares", np.float64),
            certificate=None if data.get("certificate") is None else _certificate(data),
            provenance=_typed(Provenance, data, "provenance"),
            predicted={str(k): float(v) for k, v in _mapping(data, "predicted").items()},
        )
    except (InputError, TypeError, ValueError) as error:
        raise FileFormatError(f"{origin}: {error}") from None
    if plan.certificate is None:
        return plan
    proven = data["certificate"].get("map")
    if proven is None:
        warnings.warn(
            f"{origin}: its certificate does not say which map it was proven for, and is left out; plans written "
            "before certificates were bound to maps have none, and `moeplace solve` proves anew",
            UserWarning,
            stacklevel=3,
        )
        return dataclasses.replace(plan, certificate=None)
    if proven != _proven_map(data):
        raise FileFormatError(
            f"{origin}: the certificate is of another map: model, cluster, slots, shares or the certificate itself "
            "were changed after the solve. Take the field 'certificate' out to use the plan without a proof"
        )
    return plan


def _certificate(data: Mapping[str, Any]) -> Certificate:
    fields = {name: value for name, value in _mapping(data, "certificate").items() if name != "map"}
    return _typed(Certificate, {"certificate": fields}, "certificate")


def _proven_map(document: Mapping[str, Any]) -> str:
    """SHA-256 of what a certificate speaks of, and of what it says: as the file has it, so that fields which a later
    release gives to models or clusters change nothing."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [plain(entry) for entry in value]
        # Stores may write 1.0 as 1.
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    names = ("model", "topology", "physical_to_logical", "slot_device", "shares", "certificate")
    certificate = {name: value for name, value in document["certificate"].items() if name != "map"}
    content = {**{name: document.get(name) for name in names}, "certificate": certificate}
    return hashlib.sha256(json.dumps(plain(content), sort_keys=True).encode()).hexdigest()


def write_plan(plan: Plan, path: str | Path) -> None:
    """Writes the plan whole or not at all."""
    write_text(path, json.dumps(plan_to_dict(plan), allow_nan=False))


def read_plan(path: str | Path) -> Plan:
    """Reads a plan file; see `plan_from_dict` for what is refused."""
    return plan_from_dict(parse_json(read_text(path), str(path)), origin=str(path))


def _mapping(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name)
    if not isinstance(value, dict):
        raise InputError(f"field {name!r} must be an object, found {type(value).__name__}")
    return value


def _array(data: Mapping[str, Any], name: str, dtype: type[np.int64] | type[np.float64]) -> Any:
    value = data.get(name)
    if not isinstance(value, list):
        raise InputError(f"field {name!r} must be a list, found {type(value).__name__}")
    try:
        array = np.array(value)
    except ValueError:
        raise InputError(f"field {name!r} has rows of different lengths") from None
    whole = np.issubdtype(array.dtype, np.integer)
    if not (whole or (dtype is np.float64 and np.issubdtype(array.dtype, np.floating))):
        raise InputError(f"field {name!r} must hold {'whole ' if dtype is np.int64 else ''}numbers only")
    return array.astype(dtype)


def _typed(kind: type[T], data: Mapping[str, Any], name: str) -> T:
    """A dataclass from its fields, each of the type it declares."""
    from pydantic import TypeAdapter, ValidationError

    fields = _mapping(data, name)
    unknown = set(fields) - {field.name for field in dataclasses.fields(cast(Any, kind))}
    if unknown:
        raise InputError(f"field {name!r} has unknown entries {sorted(map(str, unknown))[:5]}")
    try:
        return TypeAdapter(kind).validate_python(fields)
    except ValidationError as error:
        raise InputError(describe(name, error)) from None
