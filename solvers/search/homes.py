"""Scenario tokens with a home device each, laid out for the kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...placement.problem import Problem
from ...placement.steps import Steps
from .layout import Floats, Ints
from .scenario import Scenario


class HomeTokens(NamedTuple):
    """One layer of scenario steps whose tokens have homes. T tokens in order of home and step, k experts each, H homes.

    experts: [T, k] int32. home, step_of: [T] int32. first, tokens: CSR lists of the tokens of each (expert, home)
    ([E * H + 1], [T * k]). counts: [E, H, S] tokens that chose the expert, those not walked over too. nearest: whether a token takes the replica
    nearest to its home, or any by share.
    """

    experts: npt.NDArray[np.int32]
    home: npt.NDArray[np.int32]
    step_of: npt.NDArray[np.int32]
    first: Ints
    tokens: npt.NDArray[np.int32]
    counts: Floats
    nearest: bool


def with_homes(scenario: Scenario, problem: Problem, seed: int) -> Scenario:
    """The scenario, its tokens dealt to home devices where the choice of replicas depends on homes.

    Each step's tokens are dealt evenly in random order: one draw of what an even spread means, so that a token is
    priced once rather than once a device.
    """
    wanted = problem.objective.replica_choice == "nearest" and problem.has_replicas
    if scenario.steps is None or scenario.steps.source is not None or not wanted:
        return scenario
    return replace(scenario, steps=deal_homes(scenario.steps, problem.num_devices, seed))


def deal_homes(steps: Steps, devices: int, seed: int) -> Steps:
    """The steps, each one's tokens dealt evenly over devices."""
    rng = np.random.default_rng(seed)
    source = np.empty(len(steps.expert_ids), np.int64)
    for start, end in zip(steps.offsets[:-1], steps.offsets[1:], strict=True):
        # What does not divide evenly goes to devices drawn anew, not always to the first.
        rounds = -(-int(end - start) // devices)
        dealt = np.concatenate([rng.permutation(devices) for _ in range(rounds)])[: end - start]
        source[start:end] = rng.permutation(dealt)
    return replace(steps, source=source)


def home_tokens(scenario: Scenario, layer: int, problem: Problem) -> HomeTokens:
    """One layer of a scenario whose tokens have homes."""
    steps, devices = scenario.steps, problem.num_devices
    assert steps is not None
    assert steps.source is not None
    groups = problem.model.experts * devices
    cell = (steps.expert_ids[:, layer].astype(np.int64) * devices + steps.source[:, None]) * steps.num_steps
    counts = np.bincount((cell + steps.step_of[:, None]).ravel(), minlength=groups * steps.num_steps).astype(np.float64)
    walked = np.arange(len(steps.source)) if scenario.walked is None else scenario.walked
    order = walked[np.argsort(steps.source[walked], kind="stable")]
    ids = np.ascontiguousarray(steps.expert_ids[order, layer], dtype=np.int32)
    home, step_of = steps.source[order].astype(np.int32), steps.step_of[order].astype(np.int32)
    group = (ids * devices + home[:, None]).ravel()
    first = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=groups))]).astype(np.int64)
    tokens = (np.argsort(group, kind="stable") // ids.shape[1]).astype(np.int32)
    return HomeTokens(
        ids,
        home,
        step_of,
        first,
        tokens,
        counts.reshape(problem.model.experts, devices, steps.num_steps),
        problem.objective.replica_choice == "nearest",
    )
