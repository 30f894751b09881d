"""The packages: which may import which, and what `import moeplace` may cost."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
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
    "db": {"placement"},
    "cli": {"placement", "profiler", "solvers", "runtime", "db", "service"},
    "service": {"placement", "profiler", "solvers", "runtime", "db"},
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
    "plotly",
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


def test_solving_does_not_import_torch() -> None:
    script = (
        "import sys, numpy as np, moeplace as mp\n"
        "model = mp.ModelSpec(layers=2, experts=4, top_k=1, hidden_size=8, ffn_size=8)\n"
        "topology = mp.Topology.preset('h100-hgx', devices_per_node=2)\n"
        "trace = mp.RoutingTrace.from_arrays(np.random.default_rng(0).integers(4, size=(50, 2, 1)), 4)\n"
        "problem = mp.Problem(model, topology, mp.RoutingStatistics.from_trace(trace))\n"
        "for solver in mp.solver_names():\n"
        "    mp.solve(problem, solver, seconds=1)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=250)


@pytest.mark.parametrize(
    "package", ["placement", "profiler", "solvers", "runtime", "compat", "training", "db", "cli", "service"]
)
def test_every_module_can_be_the_first_that_is_imported(package: str) -> None:
    """A circle of imports shows in some orders only, so each module begins one of its own."""
    names = [
        ".".join(["moeplace", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        for path in files_of(package)
        if path.name != "__main__.py" and "versions" not in path.parts and path.name != "env.py"
    ]
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    for known in [n for n in sys.modules if n.split('.')[0] == 'moeplace']:\n"
        "        del sys.modules[known]\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *names], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-1500:]
