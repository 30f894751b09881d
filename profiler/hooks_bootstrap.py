"""Runs as `sitecustomize` in every Python process that a recorded command starts: costs nothing until Transformers is
imported, then hands its classes to `run_script`.

Copied beside nothing else by `run_script.run_recorded`, so it stands alone: the standard library, no relative imports.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType

WATCHED = {"transformers.modeling_utils", "torch._dynamo.eval_frame"}


class ImportWatch(importlib.abc.MetaPathFinder):
    """Lets the other finders import what is watched, then tells `run_script` of it."""

    def __init__(self) -> None:
        self._waiting = set(WATCHED)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._waiting:
            return None
        self._waiting.discard(fullname)
        finders = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in finders)), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            self._tell(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _tell(self, module: ModuleType) -> None:
        try:
            listener = importlib.import_module("moeplace.profiler.run_script")
        except ImportError as error:
            self._waiting.clear()
            message = f"moeplace: not recording, {sys.executable} cannot import it ({error}); install it there"
            print(message, file=sys.stderr)  # noqa: T201 - no logging is set up this early
        else:
            listener.imported(module)


def run_shadowed() -> None:
    """Runs the `sitecustomize` of the user's own that this one stands in front of, and leaves the path as it was."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, ImportWatch())
    run_shadowed()
