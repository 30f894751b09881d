"""The core: what an engine's image needs works with numpy and pydantic alone; what does not says what to install."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path

import pytest
from cli_runs import CLUSTER, run, toy_model, toy_trace_folder

import moeplace as mp
from moeplace._lazy import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
CORE = {"numpy", "pydantic"}
NAMES = {
    "pyyaml": "yaml",
    "psycopg": "psycopg",
    "prometheus-client": "prometheus_client",
    "resvg-py": "resvg_py",
    "pillow": "PIL",
}
"""Libraries that are imported under another name than they are installed under."""

BARE = "import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n"
"""Libraries that cannot be imported, and are not there for who looks."""


def bare(code: str, *arguments: object, beside: Collection[str] = ()) -> subprocess.CompletedProcess[str]:
    """Runs code where only the core is installed, and what else is named."""
    start = BARE.format(absent=set(EXTRAS) - set(beside))
    return subprocess.run(
        [sys.executable, "-c", start + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    trace = toy_trace_folder(folder / "trace", toy_model())
    assert run("solve", trace, *CLUSTER, "-s", "eplb", "--no-store", "-o", folder / "plan.json").code == 0
    return folder / "plan.json"


def test_the_core_is_numpy_and_pydantic_and_every_other_library_has_an_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {name: [_library(entry) for entry in entries] for name, entries in project["optional-dependencies"].items()}
    assert {_library(entry) for entry in project["dependencies"]} == CORE
    for library in named["solve"]:
        assert EXTRAS[NAMES.get(library, library)] == "solve"
    for library, extra in EXTRAS.items():
        installed = {NAMES.get(name, name) for name in named[extra]}
        assert library in installed or library == "starlette"


def _library(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower()


def test_plans_are_read_and_exported_by_the_core(plan: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from moeplace.runtime.exporters.export import export_plan, read_plan_file\n"
        "plan = read_plan_file(sys.argv[1], None, None)\n"
        "for engine, ending in {'sglang': 'json', 'vllm': 'json', 'trtllm': 'yaml', 'vllm-ascend': 'json'}.items():\n"
        "    export_plan(plan, engine, Path(sys.argv[2]) / f'{engine}.{ending}')\n"
    )
    done = bare(code, plan, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.iterdir())) == 4


def test_the_plug_in_loads_nothing_without_a_plan_and_the_core_with_one(plan: Path) -> None:
    quiet = bare("from moeplace._vllm_plugin import install; install(); print('numpy' in sys.modules)")
    assert quiet.stdout == "False\n", quiet.stderr
    code = (
        "import os\nos.environ['MOEPLACE_VLLM_PLAN'] = sys.argv[1]\n"
        "from moeplace._vllm_plugin import install\n"
        "try:\n    install()\n"
        "except ModuleNotFoundError as error:\n    print(error.name.partition('.')[0])\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    # Nothing is missing but vLLM itself.
    assert "vllm" in bare(code, plan).stdout


def test_the_plug_in_starts_without_what_only_solving_and_other_engines_need() -> None:
    done = bare("import moeplace.runtime.exporters.vllm\nprint(*(m for m in sys.modules if 'moeplace' in m))")
    modules = set(done.stdout.split())
    assert "moeplace.placement.plan" in modules, done.stderr
    heavy = ("kernels", "transfers", "model_config", "model_families")
    assert not modules & {f"moeplace.placement.{name}" for name in (*heavy, "expert_storage")}
    assert not modules & {f"moeplace.runtime.exporters.{name}" for name in ("export", "sglang", "trtllm")}


@pytest.mark.slow
def test_tests_that_need_torch_say_so() -> None:
    """Where it is not installed, as on the other Pythons of `make matrix`, they are skipped and end nothing."""
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'safetensors'):\n    sys.modules[name] = None\n"
        "import pytest\nsys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', 'tests']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_what_the_core_lacks_is_named(tmp_path: Path) -> None:
    hint = "which is not installed: pip install 'moeplace[solve]'"
    solve = bare("import moeplace as mp\nmp.solve")
    assert "moeplace.solve: this needs" in solve.stderr
    assert hint in solve.stderr
    (tmp_path / "cluster.yaml").write_text("nodes: 1")
    for call in ("mp.read_trace(sys.argv[2])", "mp.Topology.load(sys.argv[1])"):
        done = bare(
            f"import moeplace as mp\n{call}", tmp_path / "cluster.yaml", ROOT / "examples" / "data" / "olmoe_small"
        )
        assert hint in done.stderr, call
    program = bare("from moeplace.__main__ import main\nmain()", "--help")
    assert program.returncode == 1
    assert program.stderr == f"error: this needs typer, {hint}\n"


PROGRAM = "from moeplace.__main__ import main\nmain()"


def test_the_core_tells_its_version_and_what_is_missing() -> None:
    assert bare(PROGRAM, "--version").stdout == f"moeplace {mp.__version__}\n"
    told = bare(PROGRAM, "doctor")
    assert told.returncode == 0, told.stderr
    assert "not installed: pip install 'moeplace[service]'" in told.stdout


@pytest.mark.slow
def test_an_engines_environment_exports_and_checks_plans(plan: Path, tmp_path: Path) -> None:
    """Engines bring what the command line needs (typer and rich), and no database."""

    def run_there(*arguments: object) -> subprocess.CompletedProcess[str]:
        return bare(PROGRAM, *arguments, beside={"typer", "rich"})

    location = tmp_path / "location.json"
    unstored = run_there("export", plan, "--for", "sglang", "-o", location)
    assert unstored.returncode == 1
    assert f"not stored, it is in {location}: this needs sqlalchemy" in unstored.stderr
    assert location.is_file()
    for arguments in (
        ("export", plan, "--for", "vllm", "--no-store", "-o", tmp_path / "map.json"),
        ("doctor", "--file", location, "--plan", plan),
        ("check", plan, "--running", location),
    ):
        done = run_there(*arguments)
        assert done.returncode == 0, done.stderr
