"""The flagship solver: the predicted step time itself, on recorded steps, by annealing with exact increments."""

from __future__ import annotations

from ...placement.errors import InputError
from ...placement.problem import Problem
from ...placement.steps import Phase
from ..base import Budget, Feature, Needs, Solution


class Search:
    """Minimises the predicted step time, in both execution modes, under any risk, replicas and shares included.

    Simulated annealing of every layer over exchanges of slots, replicas and shares, each proposal priced exactly on
    scenario steps; layers side by side on all cores. Starts from heaviest-first balancing (context-coherent: from
    sweeps of linear assignment too, or from the plan found as if tokens returned home). Deterministic for a seed and a
    number of proposals; with `seconds` the clock decides how many. With counts alone it minimises load max/mean, all
    that counts can tell, and its certificate says so.
    """

    name = "search"
    supports = frozenset(Feature)
    needs: frozenset[Needs] = frozenset()

    def solve(
        self,
        problem: Problem,
        budget: Budget,
        *,
        batch: Phase | None = None,
        step_tokens: int | None = None,
        steps: int | None = None,
        proposals: int | None = None,
        certify: float = 0.0,
        off_home: float | None = None,
    ) -> Solution:
        """batch, step_tokens: in place of the problem's batches, decode steps of so many sequences (all devices
        together) or prefill steps of so many tokens; a size alone is of decode steps, a kind alone has its usual size.
        steps: of each batch. proposals: a layer, when
        no time limit is given (default: 20,000 on steps, 120,000 on counts alone). certify: seconds spent on a better
        bound after the search. off_home: with counts alone, the largest share of a
        layer's load that may be served off its expert group's home node (default: no limit; 0 keeps every group on one
        node, as group-limited routing would have it).

        Raises:
            InputError: batch is neither "decode" nor "prefill", or a size is not positive, or certify is negative, or
                off_home is no share.
            UnsupportedError: off_home with a token sample, on which node traffic itself is priced, or without groups.
        """
        if batch not in (None, "decode", "prefill"):
            raise InputError(f"batch {batch!r} is unknown; known: decode, prefill")
        for name, value in (("step_tokens", step_tokens), ("steps", steps), ("proposals", proposals)):
            if value is not None and value < 1:
                raise InputError(f"{name} ({value}) must be at least 1")
        if not 0.0 <= certify < float("inf"):
            raise InputError(f"certify ({certify}) must be seconds to spend on the bound, 0 or more")
        budget.report(None, None, "loading kernels, compiled at the first use")
        # Loading takes a second, which importing the package must not.
        from .driver import run_search

        return run_search(problem, budget, batch, step_tokens, steps, proposals, certify, off_home)
