"""Which solver answers a problem when none is named."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from ..placement.problem import Problem
from .base import Feature, Solver
from .chain import Chain
from .search import Search

CHAIN_SECONDS = 10.0
"""Work that chain's proof may take when nobody asked for it."""


@dataclass(frozen=True)
class Choice:
    """A solver, the options it is to run with, and a sentence saying why it. otherwise: what is to run when it has no plan
    after half of the time."""

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
    return Choice(search, options, f"search minimises the predicted step time; chain, which would prove it, {obstacle}")


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
    work = chain.work(problem, options.get("step_tokens"), options.get("steps"))
    if work is None:
        return "cannot go through this many placements"
    limit = CHAIN_SECONDS if seconds is None else min(CHAIN_SECONDS, seconds / 2)
    return None if work <= limit else f"would take some {work:.0f} s, {limit:.3g} s being the limit"
