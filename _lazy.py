"""Public names of a package from the stub beside it, each imported when it is first used, and which extra of this
package brings a library that is not installed.
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

EXTRAS = {
    **dict.fromkeys(("scipy", "pyarrow", "pulp", "highspy", "ortools", "ijson", "joblib", "numba"), "solve"),
    **dict.fromkeys(("sqlalchemy", "alembic", "platformdirs", "yaml", "jinja2", "urllib3"), "solve"),
    **dict.fromkeys(("typer", "rich"), "solve"),
    "torch": "torch",
    "transformers": "torch",
    "safetensors": "torch",
    "psycopg": "postgres",
    "ray": "ray",
    "resvg_py": "plot",
    "PIL": "plot",
    "fsspec": "traces",
    "s3fs": "traces",
    "fastapi": "service",
    "starlette": "service",
    "uvicorn": "service",
    "prometheus_client": "service",
    "standardwebhooks": "service",
}


def missing_libraries() -> dict[str, list[str]]:
    """Of each extra, its libraries that are not installed."""
    from importlib.util import find_spec

    missing: dict[str, list[str]] = {extra: [] for extra in EXTRAS.values()}
    for library, extra in EXTRAS.items():
        if find_spec(library) is None:
            missing[extra].append(library)
    return missing


def extra_in_words(extra: str, missing: list[str]) -> str:
    """Whether it is installed, else what to install."""
    return f"{', '.join(missing)} not installed: pip install 'moeplace[{extra}]'" if missing else "installed"


def missing_extra(error: ImportError) -> str | None:
    """What to install, in a sentence, where `error` is of a library that an extra brings; else None."""
    library = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(library)
    return None if extra is None else f"this needs {library}, which is not installed: pip install 'moeplace[{extra}]'"


def names_extra(function: F) -> F:
    """Has the error of a library that an extra brings, and that is not installed, say so."""

    @functools.wraps(function)
    def telling(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ModuleNotFoundError as error:
            error.msg = missing_extra(error) or error.msg
            raise

    return cast(F, telling)


class _Package(ModuleType):
    """A package in which a module does not take the place of the public name that it is called after."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and name in self.__dict__["_functions"]):
            super().__setattr__(name, value)


def attach_stub(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose stub says `from .module import name as name`.

    file: the package's `__file__`; the stub has its name and ends in .pyi.
    """
    tree = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 1]
    module_of = {alias.asname or alias.name: (node.module, alias.name) for node in imports for alias in node.names}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, real = module_of[name]
        try:
            if module is None:
                return importlib.import_module(f"{package}.{real}")
            value = getattr(importlib.import_module(f"{package}.{module}"), real)
        except ImportError as error:
            hint = missing_extra(error)
            if hint is None:
                raise
            raise ModuleNotFoundError(f"{package}.{name}: {hint}", name=error.name) from error
        sys.modules[package].__dict__[name] = value
        return value

    def names() -> list[str]:
        return sorted(module_of)

    # `import moeplace.solvers.solve` sets `solve` of the package to the module.
    this = sys.modules[package]
    this.__dict__["_functions"] = {name for name, (module, _) in module_of.items() if module == name}
    this.__class__ = _Package
    return get, names, sorted(module_of)
