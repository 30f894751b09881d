"""The one entry point: checks a solver against a problem, runs it, and signs its answer as a plan."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from .._arguments import check_types
from .._plugins import Registry
from ..placement.bounds import device_loads
from ..placement.cost import slot_shares
from ..placement.engines import check_plan
from ..placement.errors import InputError, SolveError, UnsupportedError, nearest
from ..placement.plan import Plan, Provenance
from ..placement.problem import Problem
from ..placement.progress import Listener
from ..placement.validation import check_seed
from ..placement.version import __version__
from .base import Budget, Feature, Needs, Solver, SolverOptions
from .baselines import Contiguous, RandomPlacement, RoundRobin
from .chain import Chain
from .device_names import level_devices
from .eplb import Eplb
from .exflow import Exflow
from .moetuner import MoeTuner
from .search import Search
from .search.scenario import priced_on_windows

SOLVERS: Registry[Solver] = Registry(
    "solver",
    "moeplace.solvers",
    ("name", "supports", "needs", "solve"),
    Contiguous(),
    RoundRobin(),
    RandomPlacement(),
    Eplb(),
    Exflow(),
    MoeTuner(),
    Chain(),
    Search(),
)
"""Every solver, in the order comparisons print them. A new one is a file and a line here, or an entry point
elsewhere."""

CHAIN_SECONDS = 10.0
"""Work that chain's proof may take when nobody asked for it."""


@dataclass(frozen=True)
class Choice:
    """A solver, the options it is to run with, and a sentence saying why it. otherwise: what is to run when it has no
    plan after half of the time."""

    solver: Solver
    options: dict[str, Any]
    reason: str
    otherwise: Choice | None = None


def choose(problem: Problem, asked: frozenset[Feature], seconds: float | None, options: dict[str, Any]) -> Choice:
    """chain where it proves the least mean step time within seconds, search elsewhere.

    asked: what the problem asks beyond the plain case. seconds: the time limit, half of which chain may be expected to
    need. options: given by the caller; a solver that does not know one of them is out.
    """
    chain, search = Chain(), Search()
    # What chain proves needs no better bound.
    alone = {name: value for name, value in options.items() if name != "certify"}
    chosen = {"minimise": "step", **alone}
    obstacle = _obstacle(chain, problem, asked, seconds, alone)
    if obstacle is None and chosen["minimise"] == "step":
        late = Choice(search, options, "search has the plan; chain was not done with its proof in half of the time")
        return Choice(
            chain, chosen, "chain proves its plan optimal, and few placements a layer make it fast here", late
        )
    if "minimise" in options:
        return Choice(chain, options, "chain is the solver with the option minimise")
    figure = "the device load max/mean of count windows" if priced_on_windows(problem) else "the predicted step time"
    return Choice(search, options, f"search minimises {figure}; chain, which would prove it, {obstacle}")


def _obstacle(
    chain: Chain, problem: Problem, asked: frozenset[Feature], seconds: float | None, options: dict[str, Any]
) -> str | None:
    """Why chain is not the one, as the end of a sentence about it; None when nothing speaks against it."""
    statistics, objective = problem.statistics, problem.objective
    missing = asked - chain.supports
    if missing:
        return f"does not support {' and '.join(sorted(feature.value for feature in missing))}"
    unknown = set(options) - set(inspect.signature(chain.solve).parameters)
    if unknown:
        return f"has no option {' and '.join(sorted(unknown))}"
    if objective.risk != "mean":
        return f"minimises means, not {objective.risk}"
    if statistics.transitions is None or statistics.sample is None or not statistics.sample.num_tokens:
        return "needs tokens, not counts alone"
    work = chain.work(problem, options.get("batch"), options.get("step_tokens"), options.get("steps"))
    if work is None:
        return "cannot go through this many placements"
    limit = CHAIN_SECONDS if seconds is None else min(CHAIN_SECONDS, seconds / 2)
    return None if work <= limit else f"would take some {work:.0f} s, {limit:.3g} s being the limit"


def solver_named(name: str) -> Solver:
    """The solver of that name, built in or plugged in.

    Raises:
        InputError: unknown name (the nearest is told), or a plug-in that does not load.
    """
    return SOLVERS.named(name)


@check_types
def solve(
    problem: Problem,
    solver: str | Solver | SolverOptions | None = None,
    seconds: float | None = None,
    seed: int = 0,
    progress: Listener | None = None,
    slots: Literal["auto"] | None = None,
    memory_budget: float | None = None,
    **options: Any,
) -> Plan:
    """Solves `problem` and returns a plan with its certificate.

    Args:
        problem: what to place, and where.
        solver: a name of `solver_names()`; or options of one with their types (`SearchOptions(proposals=2000)`); or any
            object that is a `Solver`. None takes chain where it proves the least mean step time within seconds, and
            search elsewhere (`plan.provenance.choice` says which and why).
        seconds: wall-clock limit, by default none: the solver then does its own amount of work, and the same seed gives
            the same plan. Kernels that the first solve after installation compiles are not counted.
        seed: decides every random choice.
        progress: called with each news, a `Progress`.
        slots: "auto" chooses the slots of each layer first, in half of the time (see `slot_front`), where the problem
            names none.
        memory_budget: most bytes of redundant experts on a device, with slots "auto".
        options: the solver's own (see its `solve` method).

    Returns:
        The plan. `print(plan)` tells how good it is, and how to use it.

    Raises:
        InputError: unknown solver or option, an argument or option of the wrong type, or a negative seed.
        UnsupportedError: the problem asks for what the solver cannot do; the message names solvers that can.
        SolveError: no plan within the limit.

    Example:
        >>> import moeplace as mp
        >>> trace = mp.read_trace("examples/data/olmoe_small")  # doctest: +SKIP
        >>> problem = mp.Problem(trace, mp.Topology.preset("h100-hgx"))  # doctest: +SKIP
        >>> plan = mp.solve(problem, "search", seconds=10)  # doctest: +SKIP
        >>> print(plan)  # doctest: +SKIP
    """
    check_seconds(seconds)
    check_seed(seed)
    if slots is None and memory_budget is not None:
        raise InputError(f'memory_budget ({memory_budget:g}) is of slots that are chosen; give slots="auto" too')
    if slots is not None:
        # Which solves problems itself.
        from .slot_budget import slot_front

        part = None if seconds is None else seconds / 2
        front = slot_front(
            problem,
            memory_budget=memory_budget,
            solver=solver,
            seconds=part,
            seed=seed,
            options=options,
            progress=progress,
        )
        return solve(front.problem_with(front.recommended), solver, part, seed, progress, **options)
    budget = Budget(seconds=seconds, seed=seed, progress=progress)
    if solver is None:
        choice = choose(problem, required_features(problem), seconds, options)
    else:
        choice = _chosen(solver, options)
    check_options(choice.solver, choice.options)
    _check_supported(choice.solver, problem)
    if choice.otherwise is None or seconds is None:
        solution = choice.solver.solve(problem, budget, **choice.options)
    else:
        half = Budget(seconds=seconds / 2, seed=seed, progress=progress, history=budget.history)
        try:
            solution = choice.solver.solve(problem, half, **choice.options)
        except SolveError:
            if not half.spent:
                raise
            choice = choice.otherwise
            solution = choice.solver.solve(problem, budget, **choice.options)
    solution = level_devices(problem, solution)
    looked_at = dict(choice.options)
    if isinstance(choice.solver, Search) and priced_on_windows(problem):
        # What steps are drawn like says nothing of a plan that was made without any.
        looked_at = {name: value for name, value in looked_at.items() if name not in ("batch", "step_tokens", "steps")}
    plan = Plan(
        model=problem.model,
        topology=problem.topology,
        physical_to_logical=solution.physical_to_logical,
        slot_device=problem.slot_device,
        shares=np.empty(0) if solution.shares is None else solution.shares,
        certificate=solution.certificate,
        provenance=Provenance(
            solver=choice.solver.name,
            version=__version__,
            seed=seed,
            options=looked_at | ({} if seconds is None else {"seconds": seconds}),
            seconds=budget.elapsed,
            stop=solution.stop,
            trace_fingerprint=problem.statistics.fingerprint,
            history=tuple(budget.history),
            choice=choice.reason,
            engine=problem.engine or "",
            batches=tuple(batch.written for batch in problem.batches),
        ),
    )
    if problem.engine is not None:
        check_plan(plan, problem.engine)
    return replace(plan, predicted=_predicted(plan, problem))


def check_seconds(seconds: float | None) -> None:
    """Raises InputError for a time limit that is not positive."""
    if seconds is not None and not 0 < seconds < float("inf"):
        raise InputError(f"seconds ({seconds}) must be positive and finite, or None for no limit")


def _chosen(solver: Any, options: dict[str, Any]) -> Choice:
    """The solver that the caller names, describes by its options, or hands over."""
    if isinstance(solver, str):
        return Choice(solver_named(solver), options, "")
    if isinstance(solver, SolverOptions):
        return Choice(solver_named(solver.solver), {**solver.changed(), **options}, "")
    return Choice(SOLVERS.check(solver), options, "")


def _predicted(plan: Plan, problem: Problem) -> dict[str, float]:
    """What is known of a plan without replaying steps: its load on the routing solved on, and what it moves."""
    load, table = problem.statistics.total_load, plan.physical_to_logical
    shares = slot_shares(plan, load, problem.objective)
    loads = device_loads(load, table, shares, plan.slot_device, problem.num_devices)
    mean = loads.mean(axis=1)
    ratio = np.where(mean > 0, loads.max(axis=1) / np.where(mean > 0, mean, 1.0), 1.0)
    figures = {"load_max_mean": float(ratio.mean())}
    if problem.current is not None:
        moves = int((plan.holds & ~problem.current.holds).sum())
        figures |= {"moves": float(moves), "bytes_moved": moves * problem.model.bytes_per_expert}
    return figures


def solver_names() -> tuple[str, ...]:
    """Names accepted by `solve`."""
    return SOLVERS.names


def required_features(problem: Problem) -> frozenset[Feature]:
    """What the problem asks beyond the plain case."""
    asked = set()
    if problem.has_replicas:
        asked.add(Feature.REPLICAS)
    if (problem.layer_slots.min(axis=1) < problem.layer_slots.max(axis=1)).any():
        asked.add(Feature.UNEVEN_SLOTS)
    if not problem.layers_alike:
        asked.add(Feature.LAYER_SLOTS)
    if problem.pinned or problem.forbidden_devices:
        asked.add(Feature.PINNED)
    if problem.spreads_replicas:
        asked.add(Feature.SPREAD_REPLICAS)
    if problem.tolerates:
        asked.add(Feature.TOLERATES)
    if problem.max_moved_bytes is not None:
        asked.add(Feature.MOVE_LIMIT)
    if problem.objective.online:
        asked.add(Feature.ONLINE)
    return frozenset(asked)


def solvers_for(features: frozenset[Feature]) -> tuple[str, ...]:
    """Names of the solvers that support all of these."""
    return tuple(solver.name for solver in SOLVERS if features <= solver.supports)


def _check_supported(solver: Solver, problem: Problem) -> None:
    asked = required_features(problem)
    missing = asked - solver.supports
    if missing:
        able = solvers_for(asked)
        raise UnsupportedError(
            f"solver {solver.name!r} does not support {' and '.join(sorted(f.value for f in missing))}; "
            + (f"these do: {', '.join(able)}" if able else "no solver does all this problem asks")
        )
    if Needs.TRANSITIONS in solver.needs and problem.statistics.transitions is None:
        _ = problem.statistics.total_transitions
    if Needs.SAMPLE in solver.needs:
        problem.statistics.require_sample()


def check_options(solver: Solver, options: Mapping[str, Any]) -> None:
    """Checks names and types of options against the signature of the solver's `solve`.

    Raises:
        InputError: an option the solver does not have (the nearest is named), or a value of another type than it takes.
    """
    for name, value in options.items():
        kinds = _kinds(solver, name)
        if not any(_is_of(kind, value) for kind in kinds):
            raise _wrong(solver, name, value, kinds)


def read_options(solver: Solver, options: Mapping[str, str]) -> dict[str, Any]:
    """Options given as text, each as the type that the signature of the solver's `solve` says.

    Raises:
        InputError: an option the solver does not have, or text that is nothing it takes; what it takes is named.
    """
    return {name: _read(solver, name, text) for name, text in options.items()}


TRUE, FALSE, NONE = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("none", "null")


def _read(solver: Solver, name: str, text: str) -> Any:
    kinds, word = _kinds(solver, name), text.strip().lower()
    # Any text is text, so that what reads as something else comes first.
    for kind in sorted(kinds, key=lambda kind: kind is str):
        if kind is NoneType and word in NONE:
            return None
        if kind is bool and word in TRUE + FALSE:
            return word in TRUE
        if kind is str or (get_origin(kind) is Literal and text in get_args(kind)):
            return text
        if kind in (int, float):
            with suppress(ValueError):
                return kind(text)
    raise _wrong(solver, name, text, kinds)


def _kinds(solver: Solver, name: str) -> tuple[Any, ...]:
    """The types that an option may have."""
    known = set(inspect.signature(solver.solve).parameters) - {"problem", "budget", "options"}
    if name not in known:
        listed = nearest(name, known) if known else "it takes none"
        raise InputError(f"solver {solver.name!r} has no option {name!r}; {listed}")
    hint = get_type_hints(solver.solve)[name]
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_of(kind: Any, value: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    # True is a whole number to Python, and no number of anything.
    if kind is bool or isinstance(value, (bool, np.bool_)):
        return kind is bool and isinstance(value, (bool, np.bool_))
    return isinstance(value, {int: Integral, float: Real}.get(kind, kind))


def _wrong(solver: Solver, name: str, value: Any, kinds: tuple[Any, ...]) -> InputError:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "none"}
    accepted = [
        " or ".join(map(repr, get_args(kind))) if get_origin(kind) is Literal else words[kind] for kind in kinds
    ]
    words_taken = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    close = get_close_matches(str(value).lower(), words_taken, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return InputError(f"solver {solver.name!r}: option {name} is {value!r}, it takes {' or '.join(accepted)}{hint}")
