"""What is asked of what-if and Pareto jobs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..placement.failures import Kind
from ..placement.objective import Objective
from .plain import PlainObject
from .slots import SlotCounts
from .views import Body, Ref

MOST_PARTS = 512
"""Changes of a what-if, points of a front."""
Size = Annotated[float, Field(ge=0.0, le=1e18, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=65_536)]


class StepsIn(Body):
    """The steps plans are replayed on: of one token of each of `tokens` sequences (decode), or of whole sequences (prefill).

    Where a deployment has counts only, steps of so many tokens are drawn from them, whichever batch is named. Left out:
    tokens is 128 for decode, 4096 for prefill, the policy's step_tokens for counts; count is 200, 32 and 16.
    """

    batch: Literal["decode", "prefill"] = "decode"
    tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    count: Annotated[int, Field(ge=1, le=2000)] | None = None


class StudyIn(Body):
    """On a deployment's routing (`routing` and `windows` as for a solve; the newest is held out to replay), or on stored
    statistics, with the token sample of `held_out`, other stored statistics, to replay.

    solver, options, seconds, seed, objective: of each solve; left out, those of the deployment's policy.
    """

    deployment: Ref | None = None
    routing: Literal["counts", "tokens"] = "counts"
    windows: Annotated[int, Field(ge=1, le=10_000)] = 256
    statistics: Ref | None = None
    held_out: Ref | None = None
    steps: StepsIn = StepsIn()
    solver: Annotated[str, Field(max_length=50)] | None = None
    options: PlainObject | None = None
    seconds: Annotated[float, Field(gt=0.0, le=3600.0)] = 10.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    objective: Objective | None = None


class ChangesIn(Body):
    """lose: failures such as "device:3", "node:1" or "device:3+node:1". n_1: every single device and node, as is the default
    when nothing else is asked. devices, nodes: the plan's cluster with so many. topology: another, stored one. slots: a
    layer of the ready plans, or one number for each layer."""

    lose: Annotated[list[Annotated[str, Field(max_length=2000)]], Field(max_length=MOST_PARTS)] = []  # noqa: RUF012
    n_1: bool = False
    devices: Annotated[int, Field(ge=1, le=4096)] | None = None
    nodes: Annotated[int, Field(ge=1, le=4096)] | None = None
    topology: Ref | None = None
    slots: SlotCounts | None = None


class WhatIfIn(StudyIn):
    """plan: the one asked about; left out, the deployment's in force. ready: solve a plan for each change.
    max_moved_bytes: most that ready plans may move between survivors."""

    plan: Ref | None = None
    changes: ChangesIn = ChangesIn()
    ready: bool = True
    max_moved_bytes: Size | None = None


class ParetoIn(StudyIn):
    """model, topology: where no deployment is named. current: bytes moved are counted from this plan; left out, from the
    deployment's in force. redundant: slots a layer beyond one an expert. tolerate: single failures to survive, null for
    none. max_moved: most bytes moved, null for any. What is left out, `pareto` chooses."""

    model: Ref | None = None
    topology: Ref | None = None
    current: Ref | None = None
    redundant: Annotated[list[Annotated[int, Field(ge=0, le=65_536)]], Field(min_length=1, max_length=32)] | None = None
    tolerate: Annotated[list[Kind | None], Field(min_length=1, max_length=3)] = [None, "device", "node"]  # noqa: RUF012
    max_moved: Annotated[list[Size | None], Field(min_length=1, max_length=16)] | None = None
