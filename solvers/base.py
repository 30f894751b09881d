"""The contract between `solve` and the solvers: one method, a statement of what it supports, and its options.

Options have types, for editors and type checkers: `solve(problem, SearchOptions(proposals=2000))`. Each field is a
keyword argument of that solver's `solve` method, with the same type and default (a test compares them); what the
options mean stands there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from .._arguments import check_fields
from .._types import FloatArray, IntArray
from ..placement.plan import Certificate, Stop
from ..placement.progress import COMPILE_TIME, Listener, Progress
from ..placement.steps import Phase


def working_seconds() -> float:
    """A clock that stands still while kernels are compiled: differences are seconds."""
    return time.perf_counter() - COMPILE_TIME.seconds


class Feature(Enum):
    """What a problem may ask beyond one slot an expert, dealt evenly over equal devices."""

    REPLICAS = "replicas"
    UNEVEN_SLOTS = "devices with different numbers of slots"
    LAYER_SLOTS = "layers with different numbers of slots"
    SPREAD_REPLICAS = "replicas each on a device of its own, as the engine needs"
    PINNED = "pinned or forbidden devices"
    TOLERATES = "failures to tolerate"
    MOVE_LIMIT = "a limit of bytes moved from the current plan"
    ONLINE = "experts copied for one step"


class Needs(Enum):
    """What a solver reads beyond expert loads."""

    TRANSITIONS = "transitions"
    SAMPLE = "a token sample"


@check_fields
@dataclass
class Budget:
    """What a solve may spend, and whom it tells. Only `seconds` depends on the machine; None is no limit. Time in which
    kernels are compiled, as by the first solve of an installation, is not counted."""

    seconds: float | None = None
    seed: int = 0
    progress: Listener | None = None
    history: list[tuple[float, float, float | None]] = field(default_factory=list)
    started: float = field(default_factory=working_seconds)
    interrupted: bool = False

    @property
    def elapsed(self) -> float:
        return working_seconds() - self.started

    @property
    def left(self) -> float | None:
        """Seconds left, at least 0, or None without a limit."""
        return None if self.seconds is None else max(0.0, self.seconds - self.elapsed)

    @property
    def spent(self) -> bool:
        return self.left == 0.0

    @contextlib.contextmanager
    def until_interrupted(self) -> Iterator[None]:
        """Around work that Ctrl-C may cut short, its result so far being good: that it came is kept."""
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted = True

    def report(self, value: float | None, bound: float | None, message: str = "") -> None:
        """Tells the listener; a value or bound that is news is kept in the history."""
        now = self.elapsed
        if value is not None and (not self.history or self.history[-1][1:] != (value, bound)):
            self.history.append((now, value, bound))
        if self.progress is not None:
            self.progress(Progress(now, value, bound, message))


@dataclass(frozen=True)
class Solution:
    """A solver's answer: the slot table [L, P], shares [L, P] (None: equal), what is proven, why it stopped.

    separable: whether the value is one of layers each for itself, as the problem's objective prices them: devices that
    are alike may then be renamed in one layer alone (see `solvers/device_names.py`).
    """

    physical_to_logical: IntArray
    certificate: Certificate
    shares: FloatArray | None = None
    stop: Stop = "finished"
    separable: bool = False


@runtime_checkable
class Solver(Protocol):
    """A placement strategy. Instances are stateless; options are keyword arguments of `solve`, with type hints.

    `solve(problem: Problem, budget: Budget, *, <options>) -> Solution` raises SolveError when no placement was found
    within the budget, and UnsupportedError for an option or a size it cannot serve. Any object with these four
    attributes goes to `moeplace.solve(problem, solver)`; a package makes one known by name with an entry point
    "moeplace.solvers".

    Example:
        >>> import numpy as np, moeplace as mp
        >>> class Reversed:
        ...     name = "reversed"
        ...     supports = frozenset()
        ...     needs = frozenset()
        ...
        ...     def solve(self, problem, budget):
        ...         row = np.arange(problem.model.experts)[::-1]
        ...         table = problem.slot_table([row] * problem.model.layers)
        ...         return mp.Solution(table, mp.device_load_certificate(problem, table))
        >>> plan = mp.solve(problem, Reversed())  # doctest: +SKIP
    """

    @property
    def name(self) -> str: ...

    @property
    def supports(self) -> frozenset[Feature]: ...

    @property
    def needs(self) -> frozenset[Needs]: ...

    @property
    def solve(self) -> Callable[..., Solution]: ...


def fill_slots(device_of: IntArray) -> IntArray:
    """[L, P] slot table from [L, E] the device of each expert (no replicas), experts in increasing order a device.

    Every device must get exactly as many experts as it has slots.
    """
    return np.argsort(device_of, axis=1, kind="stable").astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """A solver, by its class, and how it is to run."""

    solver: ClassVar[str]

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, as `solve` takes them by keyword."""
        fields = dataclasses.fields(self)
        return {field.name: value for field in fields if (value := getattr(self, field.name)) != field.default}


@check_fields
@dataclass(frozen=True, kw_only=True)
class EplbOptions(SolverOptions):
    """Of `eplb`: whether to balance groups over nodes first (None: where that is possible)."""

    solver = "eplb"
    hierarchical: bool | None = None


@check_fields
@dataclass(frozen=True, kw_only=True)
class ExflowOptions(SolverOptions):
    """Of `exflow`: the program's backend and form, and whether it starts from assignment sweeps."""

    solver = "exflow"
    backend: str = "portfolio"
    form: str = "direct"
    warm_start: bool = True


@check_fields
@dataclass(frozen=True, kw_only=True)
class MoeTunerOptions(SolverOptions):
    """Of `moetuner`: backend, gap at which each program may stop, and how clusters are put on devices."""

    solver = "moetuner"
    backend: str = "portfolio"
    tolerance: float = 0.025
    program2: str = "auto"
    warm_start: bool = True


@check_fields
@dataclass(frozen=True, kw_only=True)
class ChainOptions(SolverOptions):
    """Of `chain`: what is proven least, and the steps that are priced."""

    solver = "chain"
    minimise: Literal["transitions", "step"] | None = None
    batch: Phase | None = None
    step_tokens: int | None = None
    steps: int | None = None


@check_fields
@dataclass(frozen=True, kw_only=True)
class SearchOptions(SolverOptions):
    """Of `search`: the steps that are priced, proposals a layer, and seconds for a better bound.

    Example:
        >>> import moeplace as mp
        >>> mp.SearchOptions(proposals=2000).changed()
        {'proposals': 2000}
        >>> plan = mp.solve(problem, mp.SearchOptions(batch="prefill", step_tokens=4096))  # doctest: +SKIP
    """

    solver = "search"
    batch: Phase | None = None
    step_tokens: int | None = None
    steps: int | None = None
    proposals: int | None = None
    certify: float = 0.0
    off_home: float | None = None
