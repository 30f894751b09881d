"""Minutes from a clean environment to a verdict and to a plan that is loaded, by one how-to page each.

    python -m benchmarks first_contacts [--ways sglang,vllm] [--write]

A new virtual environment gets this checkout with `pip install '.[solve]'` and then `'.[torch]'` (dumps of engines are
torch files; on an engine's machine torch is there), whose minutes stand by themselves. Then each page's commands run as
they stand there, one after the other, in a folder that holds what its reader has: records in the engine's own format, a
server that answers as the engine does, a checkpoint. Models there are small. A verdict is a sentence that says what a
plan saves, or that none pays.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from runner import Report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
VERDICT = re.compile(r"no plan (can save|saves) more|MoE time than|is proven on|WORTH IT|APPLY|KEEP")

SERVED_BY_VLLM = """
import os, sys
from types import ModuleType
import torch
class Default:
    @classmethod
    def rebalance_experts(cls, weight, num_replicas, num_groups, num_nodes, num_ranks, current=None) -> torch.Tensor:
        raise AssertionError("vLLM's own balancer ran")
policies = {"default": Default}
for name in ("vllm", "vllm.distributed", "vllm.distributed.eplb", "vllm.distributed.eplb.policy"):
    sys.modules[name] = ModuleType(name)
    sys.modules[name].EPLB_POLICIES = policies
from importlib.metadata import entry_points
[plug_in] = entry_points(group="vllm.general_plugins", name="moeplace")
plug_in.load()()
import moeplace as mp
plan = mp.Plan.load("plan.json")
table = torch.tensor(plan.physical_to_logical)
load = torch.rand(len(table), plan.model.experts)
devices = plan.topology.num_devices
answer = policies["default"].rebalance_experts(load, table.shape[1], 1, 1, devices, torch.zeros_like(table))
assert (answer == table).all()
"""
LIVE_MODEL = """
from pathlib import Path
import torch, torch.distributed as dist, transformers
from torch.distributed.device_mesh import init_device_mesh
import moeplace as mp
dist.init_process_group("gloo")
plan = mp.Plan.load("plan.json")
[saved] = Path("run").glob("checkpoint-*")
model = transformers.AutoModelForCausalLM.from_pretrained(saved).eval()
tokens = torch.arange(1, 33)[None]
with torch.no_grad():
    before = model(tokens).logits
    mp.parallelize(model, plan, init_device_mesh("cpu", (plan.topology.num_devices,)))
    assert torch.allclose(before, model(tokens).logits, atol=1e-4)
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Way:
    """Of use. after: the command after which the plan is loaded; script: that loads it then, where the command does not
    itself, on so many ranks; by: what that is."""

    name: str
    page: str
    after: str
    by: str
    script: str = ""
    ranks: int = 0


WAYS = (
    Way("SGLang", "sglang", "moeplace check plan.json", "`moeplace check` of a dump as its recorder writes it"),
    Way("vLLM", "vllm", "moeplace export", "its plug-in in a stand-in of vLLM's policies", SERVED_BY_VLLM),
    Way("TensorRT-LLM", "tensorrt-llm", "moeplace check plan.json", "`moeplace check` of its YAML"),
    Way("a Transformers checkpoint", "checkpoint", "moeplace permute model", "Transformers, same logits (`--verify`)"),
    Way(
        "a training loop",
        "training",
        "moeplace solve trace",
        "`mp.parallelize`, four ranks, same logits",
        LIVE_MODEL,
        ranks=4,
    ),
)


INSTALLED = ("solve", "torch")
"""Extras, one after the other: what all need, and what brings torch where no engine has."""


def environment(folder: Path) -> tuple[Path, list[float]]:
    """Programs of the one in this folder, with this checkout in it, and the seconds each of `INSTALLED` took; made
    where none is."""
    took = folder / "installed_seconds"
    if not took.is_file():
        seconds = []
        pins = ["-c", str(ROOT / "constraints.txt")]
        for extra in INSTALLED:
            start = time.monotonic()
            if not seconds:
                subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([folder / "bin" / "pip", "install", "-q", *pins, f"{ROOT}[{extra}]"], check=True)
            seconds.append(time.monotonic() - start)
        took.write_text(" ".join(f"{each:.0f}" for each in seconds))
    return folder / "bin", [float(each) for each in took.read_text().split()]


def first_contact(way: Way, programs: Path, folder: Path) -> tuple[int, float, float, list[tuple[str, float]]]:
    """(commands, seconds to the verdict, seconds to the loaded plan, each command with its seconds)."""
    from how_to_settings import DOCS, SETTINGS, Setting, commands

    clean = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(folder), "MOEPLACE_DB": str(folder / "store.db")}
    clean |= {name: os.environ[name] for name in ("TMPDIR", "LANG") if name in os.environ}
    setting, spent, told, steps = Setting(folder), 0.0, None, []
    here = Path.cwd()
    os.chdir(folder)
    try:
        with SETTINGS[way.page](setting):
            for line in commands(DOCS / "how-to" / f"{way.page}.md"):
                for prefix in [prefix for prefix in setting.before if line.startswith(prefix)]:
                    setting.before.pop(prefix)()
                text = line
                for words, others in setting.replaced.items():
                    text = text.replace(words, others)
                start = time.monotonic()
                done = subprocess.run(
                    [str(programs / "moeplace"), *shlex.split(text)[1:]],
                    cwd=folder, env=clean, capture_output=True, text=True, check=False,
                )  # fmt: skip
                if done.returncode:
                    raise SystemExit(f"{way.name}: {line}\n{done.stdout}\n{done.stderr}")
                loaded = line.startswith(way.after)
                if loaded and way.script:
                    served = clean | {"MOEPLACE_VLLM_PLAN": str(folder / "map.json")}
                    (folder / "load.py").write_text(way.script)
                    alone = [programs / "python", "load.py"]
                    spread = [programs / "torchrun", f"--nproc-per-node={way.ranks}", "load.py"]
                    subprocess.run(spread if way.ranks else alone, cwd=folder, env=served, check=True)
                spent += time.monotonic() - start
                steps.append((line, time.monotonic() - start))
                if told is None and VERDICT.search(" ".join(done.stdout.split())):
                    told = spent
                if loaded:
                    break
    finally:
        os.chdir(here)
    if told is None:
        raise SystemExit(f"{way.name}: no command told a verdict")
    return len(steps), told, spent, steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ways", default=",".join(way.page for way in WAYS), help="how-to pages, with commas")
    parser.add_argument("--environment", type=Path, help="folder of one to keep, made where it is not there")


def run(options: argparse.Namespace, report: Report) -> None:
    table = report.table(
        "first contacts",
        ("I run", "page", "commands", "install", "to a verdict", "to a loaded plan", "all", "loaded by"),
        {"install": ".1f", "to a verdict": ".1f", "to a loaded plan": ".1f", "all": ".1f"},
    )
    each = report.table("commands", ("page", "command", "s"), {"s": ".1f"})
    with tempfile.TemporaryDirectory() as scratch:
        programs, spent = environment((options.environment or Path(scratch) / "venv").resolve())
        for extra, seconds in zip(INSTALLED, spent, strict=True):
            each.row("all", f"`pip install '.[{extra}]'`", seconds)
        installing = sum(spent)
        for way in WAYS:
            if way.page not in options.ways.split(","):
                continue
            folder = Path(scratch) / way.page
            folder.mkdir()
            count, told, loaded, steps = first_contact(way, programs, folder)
            page = f"[{way.page}](../how-to/{way.page}.md)"
            minutes = [each / 60 for each in (installing, told, loaded, installing + loaded)]
            table.row(way.name, page, count + 1, *minutes, way.by)
            for line, seconds in steps:
                each.row(way.page, f"`{line}`", seconds)
