"""The distribution: a wheel built from the tree, with what it requires and nothing else, runs the main job from another
folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from traces import make_trace

import moeplace as mp

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    return next(folder.glob("moeplace-*.whl"))


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


def link_required(requirements: Iterable[str], extras: Iterable[str], into: Path) -> None:
    """Puts what meets these requirements here, and what that requires, into another folder of packages."""
    for requirement in map(Requirement, requirements):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        found = metadata.distribution(requirement.name)
        assert requirement.specifier.contains(found.version, prereleases=True), f"{requirement} is not {found.version}"
        tops = {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}
        new = [top for top in tops if not (into / top).exists()]
        for top in new:
            (into / top).symlink_to(found.locate_file(top))
        if new or requirement.extras:
            link_required(found.requires or (), requirement.extras, into)


def test_the_wheel_runs_the_main_job_with_what_it_requires_and_nothing_else(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=250)
    (installed,) = metadata.distributions(name="moeplace", path=[str(packages)])
    link_required(installed.requires or (), ["solve"], packages)
    assert (packages / "scipy").exists()
    assert not (packages / "torch").exists()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    mp.write_trace(make_trace(seed=0), elsewhere / "trace")
    command = tmp_path / "env" / "bin" / "moeplace"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MOEPLACE"))}
    environment["MOEPLACE_DB"] = f"sqlite:///{elsewhere / 'plans.db'}"

    def moeplace(*arguments: str) -> str:
        done = subprocess.run(
            [command, *arguments],
            cwd=elsewhere,
            env=environment,
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
