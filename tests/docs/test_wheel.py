"""The distribution: a wheel built from the tree, with what it requires and nothing else, runs the main job from another
folder."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

import pytest
from clean_environment import CleanEnvironment, build_wheel
from traces import make_trace

import moeplace as mp

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_package_and_nothing_else_of_the_tree(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if name.endswith(".py")}
    apart = {"tests", "examples", "benchmarks", "docs", "build"}
    packages = [part.parent.name for part in ROOT.glob("[a-z]*/__init__.py") if part.parent.name not in apart]
    expected = {f"moeplace/{path.name}" for path in ROOT.glob("*.py")} | {
        f"moeplace/{path.relative_to(ROOT).as_posix()}"
        for package in packages
        for path in (ROOT / package).rglob("*.py")
    }
    assert packed == expected
    assert any(name.endswith("page.html.j2") for name in names)
    assert {"moeplace/charts/static/charts.css", "moeplace/charts/static/charts.js"} <= set(names)
    assert {"moeplace/service/pages/templates/index.html", "moeplace/service/pages/static/style.css"} <= set(names)
    assert {
        "moeplace/py.typed",
        "moeplace/placement/kernels.json",
        "moeplace/placement/transfers.json",
        "moeplace/placement/serving.json",
    } <= set(names)
    stubs = {f"moeplace/{path.relative_to(ROOT).as_posix()}" for path in (*ROOT.glob("*.pyi"), *ROOT.glob("*/*.pyi"))}
    assert stubs
    assert stubs <= set(names)


def test_the_wheel_runs_the_main_job_with_what_it_requires_and_nothing_else(wheel: Path, tmp_path: Path) -> None:
    environment = CleanEnvironment.made(tmp_path / "env", wheel, ["solve"])
    assert (environment.packages / "scipy").exists()
    assert not (environment.packages / "torch").exists()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    mp.write_trace(make_trace(seed=0), elsewhere / "trace")
    variables = environment.variables(tmp_path) | {"MOEPLACE_DB": f"sqlite:///{elsewhere / 'plans.db'}"}

    def moeplace(*arguments: str) -> str:
        done = subprocess.run(
            [environment.bin / "moeplace", *arguments],
            cwd=elsewhere,
            env=variables,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    sizes = ["--hidden-size", "64", "--ffn-size", "64"]
    assert moeplace("--version").split()[-1] == mp.__version__
    solved = moeplace(
        "solve",
        "trace",
        "-t",
        "h100-hgx",
        "--devices-per-node",
        "2",
        *sizes,
        "--solver",
        "chain",
        "-o",
        "plan.json",
        "--json",
    )
    json.loads(solved)
    assert mp.Plan.load(elsewhere / "plan.json").proven_optimal
    moeplace("export", "plan.json", "--for", "sglang", "-o", "location.json")
    assert set(json.loads((elsewhere / "location.json").read_text())) == {"physical_to_logical_map"}
    assert len(json.loads(moeplace("plans", "list", "--json"))["rows"]) == 1
