"""What the shell offers after an option: presets, solvers, engines, and plans in the store."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def presets(incomplete: str) -> list[str]:
    """Clusters that have a name."""
    from ..placement.topology import PRESETS

    return _beginning(incomplete, PRESETS)


def engines(incomplete: str) -> list[str]:
    """Engines that --for knows."""
    from ..placement.engines import PROFILES

    return _beginning(incomplete, PROFILES.names)


def solvers(incomplete: str) -> list[str]:
    """Solvers, the last of several with commas between."""
    from ..solvers import solver_names

    return _last_of(incomplete, lambda last: _beginning(last, solver_names()))


def plans(incomplete: str) -> list[str]:
    """Names of the plans in the store, the last of several with commas between; none where it cannot be read. Files are
    the shell's own business."""
    from ..db import Store
    from ..placement.errors import MoeplaceError

    try:
        with Store.open(lock_seconds=1.0) as store:
            names = [plan.name or plan.id for plan in store.plans(limit=50)]
    except (MoeplaceError, OSError, ImportError):
        return []
    return _last_of(incomplete, lambda last: _beginning(last, names))


def _last_of(incomplete: str, complete: Callable[[str], list[str]]) -> list[str]:
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in complete(last)]


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))
