"""Solvers, readers and exporters of other packages: installed in a folder with real metadata, found by entry point."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PACKAGE = """
import numpy as np
import moeplace as mp

class Reversed:
    name = "reversed"
    supports = frozenset()
    needs = frozenset()

    def solve(self, problem, budget, *, shift: int = 0):
        row = np.roll(np.arange(problem.model.experts)[::-1], shift)
        table = problem.slot_table([row] * problem.model.layers)
        return mp.Solution(table, mp.device_load_certificate(problem, table))

class Half:
    name = "half"

class Lines:
    name = "their lines of layers"
    options = frozenset({"num_experts"})

    def recognise(self, path):
        return path.suffix == ".theirs"

    def read(self, path, num_experts=4):
        return mp.RoutingTrace.from_arrays(np.loadtxt(path, dtype=int, ndmin=2), num_experts)

class Slots:
    name = "slots-only"
    profile = mp.EngineProfile(name="slots-only", requires="no engine")

    def content(self, plan, *, header="slots"):
        return header + " " + repr(plan.physical_to_logical.tolist())

    def read(self, path, model, topology):
        raise NotImplementedError

    def usage(self, plan, path):
        return "cat " + str(path)

class Impostor(Reversed):
    name = "eplb"
"""

PROBLEM = """
import warnings
import numpy as np
import moeplace as mp
model = mp.ModelSpec(layers=2, experts=4, top_k=1, hidden_size=8, ffn_size=8)
counts = mp.RoutingStatistics.from_counts(np.ones((2, 4)), model=model)
problem = mp.Problem(counts, mp.Topology.preset("h100-hgx", devices_per_node=2))
"""


def install(folder: Path, entry_points: str) -> None:
    """What pip leaves behind of a package: its modules and a dist-info folder."""
    (folder / "strangers.py").write_text(PACKAGE)
    info = folder / "strangers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))


def run(folder: Path, script: str) -> str:
    """What a fresh process prints that has the folder on its path."""
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\n{PROBLEM}\n{textwrap.dedent(script)}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installed_solver_is_known_by_name_with_its_options(tmp_path: Path) -> None:
    install(tmp_path, "[moeplace.solvers]\nreversed = strangers:Reversed\n")
    printed = run(
        tmp_path,
        """
        print(mp.solver_names()[-1])
        plan = mp.solve(problem, "reversed", shift=1)
        print(plan.provenance.solver, plan.physical_to_logical[0].tolist())
        try:
            mp.solve(problem, "reversed", shfit=1)
        except mp.InputError as error:
            print(error)
        """,
    )
    assert printed.splitlines() == [
        "reversed",
        "reversed [0, 3, 2, 1]",
        "solver 'reversed' has no option 'shfit'; did you mean 'shift'? known: shift",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "said"),
    [
        ("half = strangers:Half", "Half lacks supports, needs, solve"),
        ("gone = strangers:Absent", "AttributeError"),
        ("broken = strangers_absent:Solver", "ModuleNotFoundError: No module named 'strangers_absent'"),
        ("eplb = strangers:Impostor", "the name 'eplb' is taken"),
    ],
)
def test_a_plug_in_that_fails_is_named_and_breaks_nothing_else(tmp_path: Path, point: str, said: str) -> None:
    install(tmp_path, f"[moeplace.solvers]\n{point}\nreversed = strangers:Reversed\n")
    name = point.partition(" ")[0]
    printed = run(
        tmp_path,
        f"""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            names = mp.solver_names()
        assert [str(w.message) for w in caught if w.category is RuntimeWarning], caught
        print(*[w.message for w in caught if w.category is RuntimeWarning])
        print(names[-1], len(set(names)) == len(names))
        print(mp.solve(problem, "reversed").provenance.solver, mp.solve(problem, "eplb").provenance.version)
        if {name!r} != "eplb":
            try:
                mp.solve(problem, {name!r})
            except mp.InputError as error:
                print(error)
        """,
    ).splitlines()
    assert "of strangers does not load: " in printed[0]
    assert said in printed[0]
    assert printed[1] == "reversed True"
    assert printed[2].startswith("reversed 0.")
    assert name == "eplb" or said in printed[3]


def test_an_installed_reader_reads_what_it_recognises(tmp_path: Path) -> None:
    install(tmp_path, "[moeplace.readers]\nlines = strangers:Lines\nbroken = strangers:Half\n")
    (tmp_path / "routing.theirs").write_text("0 1\n2 3\n3 0\n")
    printed = run(
        tmp_path,
        f"""
        warnings.simplefilter("ignore")
        trace = mp.read_any({str(tmp_path / "routing.theirs")!r}, num_experts=5)
        print(trace.num_tokens, trace.num_layers, trace.num_experts)
        """,
    )
    assert printed == "3 2 5\n"


def test_an_installed_exporter_writes_plans_for_its_engine(tmp_path: Path) -> None:
    install(tmp_path, "[moeplace.exporters]\nslots = strangers:Slots\nbroken = strangers:Half\n")
    printed = run(
        tmp_path,
        f"""
        warnings.simplefilter("ignore")
        plan = mp.solve(problem, "contiguous")
        path = mp.export_plan(plan, "slots-only", {str(tmp_path / "out.txt")!r}, header="map")
        print(path.read_text())
        print(mp.engine_names()[0], mp.engine_names()[-1])
        try:
            mp.export_plan(plan, "broken", "x")
        except mp.InputError as error:
            print(error)
        """,
    ).splitlines()
    assert printed[:2] == ["map [[0, 1, 2, 3], [0, 1, 2, 3]]", "moeplace slots-only"]
    assert "of strangers does not load" in printed[2]
