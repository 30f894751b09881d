"""Solvers' options with their types, for editors and type checkers: `solve(problem, SearchOptions(proposals=2000))`.

Each field is a keyword argument of that solver's `solve` method, with the same type and default (a test compares them);
what the options mean stands there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..placement.steps import Phase


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """A solver, by its class, and how it is to run."""

    solver: ClassVar[str]

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, as `solve` takes them by keyword."""
        fields = dataclasses.fields(self)
        return {field.name: value for field in fields if (value := getattr(self, field.name)) != field.default}


@dataclass(frozen=True, kw_only=True)
class EplbOptions(SolverOptions):
    """Of `eplb`: whether to balance groups over nodes first (None: where that is possible)."""

    solver = "eplb"
    hierarchical: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ExflowOptions(SolverOptions):
    """Of `exflow`: the program's backend and form, and whether it starts from assignment sweeps."""

    solver = "exflow"
    backend: str = "portfolio"
    form: str = "direct"
    warm_start: bool = True


@dataclass(frozen=True, kw_only=True)
class MoeTunerOptions(SolverOptions):
    """Of `moetuner`: backend, gap at which each program may stop, and how clusters are put on devices."""

    solver = "moetuner"
    backend: str = "portfolio"
    tolerance: float = 0.025
    program2: str = "auto"
    warm_start: bool = True


@dataclass(frozen=True, kw_only=True)
class ChainOptions(SolverOptions):
    """Of `chain`: what is proven least, and the steps that are priced."""

    solver = "chain"
    minimise: Literal["transitions", "step"] | None = None
    batch: Phase | None = None
    step_tokens: int | None = None
    steps: int | None = None


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
