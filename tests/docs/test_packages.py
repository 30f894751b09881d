"""The packages: which may import which, and what `import moeplace` may cost."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moeplace

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "placement": set(),
    "profiler": {"placement"},
    "solvers": {"placement"},
    "runtime": {"placement"},
    "compat": {"placement", "solvers"},
    "training": {"placement", "profiler", "solvers", "runtime"},
    "integrations": {"placement", "profiler", "runtime", "training"},
    "db": {"placement"},
    "charts": set(),
    "cli": {"placement", "profiler", "solvers", "runtime", "db", "charts", "service"},
    "service": {"placement", "profiler", "solvers", "runtime", "db", "charts"},
}
STUBBED = [path.parent.name for path in sorted(ROOT.glob("*/__init__.pyi"))]
SHARED = {path.stem for path in ROOT.glob("_*.py") if not path.stem.startswith("__")}
"""Modules beside the packages that every package may use; their underscore says that they are nobody else's."""
HEAVY = {
    "urllib3",
    "torch",
    "transformers",
    "pyarrow",
    "pulp",
    "highspy",
    "ortools",
    "scipy",
    "sqlalchemy",
    "alembic",
    "pandas",
}


def imports_of(path: Path) -> list[tuple[str, list[str]]]:
    """(dotted module inside moeplace, names taken) of every import in a file, at any depth."""
    parents = ["moeplace", *path.relative_to(ROOT).parent.parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.append((module, [alias.name for alias in node.names]))
        elif isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
    return [(module, names) for module, names in found if module.split(".")[0] == "moeplace"]


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_those_below_it(package: str) -> None:
    for path in files_of(package):
        for module, names in imports_of(path):
            parts = module.split(".")
            targets = {parts[1]} if len(parts) > 1 else set(names) & set(MAY_IMPORT)
            assert targets <= MAY_IMPORT[package] | {package} | SHARED, f"{path.relative_to(ROOT)} imports {module}"
            assert len(parts) > 1 or package == "cli", f"{path.relative_to(ROOT)} imports the package it is part of"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_package_reaches_into_anothers_private_names(package: str) -> None:
    for path in files_of(package):
        for module, names in imports_of(path):
            parts = module.split(".")
            if len(parts) > 1 and parts[1] not in {package} | SHARED:
                private = [name for name in [*parts, *names] if name.startswith("_") and not name.startswith("__")]
                assert not private, f"{path.relative_to(ROOT)} takes {private} from {module}"


@pytest.mark.parametrize("statement", ["import moeplace", "import moeplace.cli.app"])
def test_importing_brings_in_no_heavy_library(statement: str) -> None:
    script = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & HEAVY


@pytest.mark.parametrize("package", ["moeplace", *(f"moeplace.{name}" for name in STUBBED)])
def test_every_public_name_is_found_where_the_stub_says(package: str) -> None:
    module = importlib.import_module(package)
    if package in ("moeplace", "moeplace.runtime", "moeplace.training"):
        for extra in ("torch", "transformers"):
            pytest.importorskip(extra)
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_an_unknown_public_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="sovle"):
        _ = moeplace.sovle


@pytest.mark.slow
def test_solving_does_not_import_torch() -> None:
    script = (
        "import sys, numpy as np, moeplace as mp\n"
        "model = mp.ModelSpec(layers=2, experts=4, top_k=1, hidden_size=8, ffn_size=8)\n"
        "topology = mp.Topology.preset('h100-hgx', devices_per_node=2)\n"
        "trace = mp.RoutingTrace.from_arrays(np.random.default_rng(0).integers(4, size=(50, 2, 1)), 4)\n"
        "problem = mp.Problem(model, topology, mp.RoutingStatistics.from_trace(trace))\n"
        "for solver in mp.solver_names():\n"
        "    mp.solve(problem, solver, seconds=2)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=250)


def test_no_module_waits_for_one_that_waits_for_it() -> None:
    """So each module can be the first that is imported: a circle of imports shows in some orders only."""
    modules = {dotted(path): path for package in (*MAY_IMPORT, ".") for path in modules_of(package)}
    graph = {name: modules.keys() & set(imported_at_once(path, modules)) - {name} for name, path in modules.items()}
    assert len(graph) > 200
    assert any(graph.values())
    graphlib.TopologicalSorter(graph).prepare()


def modules_of(package: str) -> list[Path]:
    """Of a package; those beside the packages for `.`."""
    files = ROOT.glob("*.py") if package == "." else (ROOT / package).rglob("*.py")
    # What the migration tool runs by itself is imported by nobody.
    return sorted(path for path in files if "versions" not in path.parts and path.name != "env.py")


def dotted(path: Path) -> str:
    return ".".join(["moeplace", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


def imported_at_once(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Modules of moeplace that a module brings in while it is imported itself. Its own packages are there by then."""
    parents = ["moeplace", *path.relative_to(ROOT).parent.parts]
    for node in run_at_once(ast.parse(path.read_text()).body):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            targets = names
        else:
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            targets = [source_of(module, name, modules) for name in names]
        for target in targets:
            parts = target.split(".")
            packages = {".".join(parts[:end]) for end in range(1, len(parts))}
            yield from {target} | packages - {".".join(parents[:end]) for end in range(1, len(parents) + 1)}


def source_of(module: str, name: str, modules: dict[str, Path]) -> str:
    """The module that `from module import name` ends in: itself, one inside it, or the one its stub takes it from."""
    if f"{module}.{name}" in modules:
        return f"{module}.{name}"
    source = taken_from(modules[module]).get(name) if module in modules else None
    return module if source is None else f"{module}.{source}"


@functools.cache
def taken_from(path: Path) -> dict[str, str]:
    """The module that each name comes from, of a package whose names its stub lists."""
    stub = path.with_suffix(".pyi")
    if not stub.is_file():
        return {}
    nodes = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom) and node.level]
    return {alias.name: node.module for node in nodes for alias in node.names if node.module}


def run_at_once(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports outside functions, but for those that only type checkers follow."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If):
            yield from run_at_once(
                node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else node.body + node.orelse
            )
        elif isinstance(node, ast.Try):
            handled = [line for handler in node.handlers for line in handler.body]
            yield from run_at_once(node.body + handled + node.orelse + node.finalbody)
        elif isinstance(node, ast.ClassDef | ast.With):
            yield from run_at_once(node.body)
