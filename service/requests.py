"""What may be asked for besides what a call's arguments name, by job. See the views of the API for what each means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from ..placement.failures import Kind
from ..placement.layer_slots import Slots
from ..placement.objective import Objective

Routing = Literal["counts", "tokens"]
Options = Mapping[str, Any]


class SolveRequest(TypedDict, total=False):
    """`POST /v1/solve`."""

    routing: Routing
    windows: int
    model: str
    topology: str
    statistics: str
    solver: str
    options: Options
    seconds: float
    seed: int
    slots: Slots | None
    objective: Objective


class DecideRequest(TypedDict, total=False):
    """`POST /v1/decide`."""

    current: str
    routing: Routing
    record: bool


class StepsRequest(TypedDict, total=False):
    """The steps of a `StudyRequest`."""

    batch: Literal["decode", "prefill"]
    tokens: int
    count: int | None


class StudyRequest(TypedDict, total=False):
    """What `POST /v1/what-if` and `POST /v1/pareto` have in common."""

    routing: Routing
    windows: int
    statistics: str
    held_out: str
    steps: StepsRequest
    solver: str
    options: Options
    seconds: float
    seed: int
    objective: Objective


class ChangesRequest(TypedDict, total=False):
    """The changes of a `WhatIfRequest`."""

    lose: Sequence[str]
    n_1: bool
    devices: int | None
    nodes: int | None
    topology: str | None
    slots: Slots | None


class WhatIfRequest(StudyRequest, total=False):
    """`POST /v1/what-if`."""

    plan: str
    changes: ChangesRequest
    ready: bool
    max_moved_bytes: float | None


class ParetoRequest(StudyRequest, total=False):
    """`POST /v1/pareto`."""

    model: str
    topology: str
    current: str | None
    redundant: Sequence[int] | None
    tolerate: Sequence[Kind | None]
    max_moved: Sequence[float | None] | None
