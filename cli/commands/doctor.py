"""`moeplace doctor`: what is installed and found on this machine, and whether the plan's file here is the one meant."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..._lazy import extra_in_words, missing_extra, missing_libraries
from ..._vllm_plugin import PLAN_VARIABLE
from ...placement.errors import MoeplaceError
from .. import completion
from ..command_line import refuse_idle
from ..options import AsJson, ServerOptions, StoreOptions
from ..output import Table, emit, pairs, quantity
from ..remote import is_engines_own, is_file, read_plan

if TYPE_CHECKING:
    from ...placement.plan import Plan

ENGINES = ("sglang", "vllm", "vllm-ascend", "tensorrt-llm", "transformers", "megatron-core", "deepspeed", "torchtitan")
"""Distributions of the engines that plans are made for."""
GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")


def doctor_command(
    storage: StoreOptions,
    remote: ServerOptions,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help=f"The plan's file that an engine on this node reads. Default: what {PLAN_VARIABLE} names, if set.",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan",
            metavar="PLAN",
            autocompletion=completion.plans,
            help="The plan that is meant, published on the service of --server or stored: is the file's map its map?",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is installed, which engines and GPUs are here, and what is missing.

    With --plan also whether the plan's file on this node is that plan. Ends with 1 where something is wrong; an extra
    that is not installed is not.

    Example:

      moeplace doctor
      moeplace doctor --file init_expert_location.json --plan production --server http://plans:8311
    """
    served = file or (Path(os.environ[PLAN_VARIABLE]) if os.environ.get(PLAN_VARIABLE) else None)
    if plan is not None and served is None:
        raise typer.BadParameter(f"--plan is compared with a file: give --file, or set {PLAN_VARIABLE}")
    if plan is None or is_file(plan):
        refuse_idle("without a --plan that the service has", "server")
    if plan is not None and is_engines_own(plan):
        raise typer.BadParameter(f"{plan} is an engine's own file, as --file is: give the plan it was exported from")
    data: dict[str, Any] = {
        **_installed(),
        "gpus": _gpus(),
        **_store(storage.db),
        "plan_file": None if served is None else str(served),
        "wrong": [],
    }
    if served is not None:
        data["wrong"] += _wrong_with(served, None if plan is None else read_plan(plan, storage.db, remote.server))
    emit(data, *_tables(data, plan), as_json=as_json)
    if data["wrong"]:
        raise typer.Exit(1)


def _installed() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    from ...placement.memory import free_memory
    from ...placement.version import __version__

    def release(distribution: str) -> str | None:
        try:
            return version(distribution)
        except PackageNotFoundError:
            return None

    return {
        "version": __version__,
        "python": sys.version.split()[0],
        "extras": missing_libraries(),
        "engines": {name: number for name in ENGINES if (number := release(name)) is not None},
        "free_memory": free_memory(),
    }


def _gpus() -> list[str]:
    if shutil.which(GPU_QUERY[0]) is None:
        return []
    try:
        query = subprocess.run(GPU_QUERY, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return query.stdout.splitlines() if query.returncode == 0 else []


def _store(db: str | None) -> dict[str, Any]:
    try:
        from ...db import Store

        with Store.open(db, lock_seconds=2.0) as store:
            return {"store": store.url, "store_error": None}
    except (MoeplaceError, OSError) as error:
        return {"store": None, "store_error": str(error)}
    except ImportError as error:
        # An engine's own environment has the core.
        reason = missing_extra(error)
        if reason is None:
            raise
        return {"store": None, "store_error": f"none: {reason}"}


def _wrong_with(file: Path, meant: Plan | None) -> list[str]:
    """What is wrong with the file that an engine here reads."""
    import numpy as np

    from ...runtime.exporters.export import read_plan_file, recognised

    try:
        if meant is None:
            recognised(file)
            return []
        plan = read_plan_file(file, meant.model, meant.topology)
    except (MoeplaceError, OSError) as error:
        return [str(error)]
    if plan.physical_to_logical.shape != meant.physical_to_logical.shape:
        return [
            f"{file} has {plan.num_slots} slots in {len(plan.moe_layers)} layers, the plan {meant.num_slots} in "
            f"{len(meant.moe_layers)}"
        ]
    layers = np.flatnonzero((plan.physical_to_logical != meant.physical_to_logical).any(axis=1))
    if len(layers):
        return [f"{file} has another map than the plan in {len(layers)} of {len(plan.moe_layers)} layers"]
    return []


def _tables(data: dict[str, Any], plan: str | None) -> list[Table]:
    extras = {f"extra {extra}": extra_in_words(extra, missing) for extra, missing in data["extras"].items()}
    shown = {
        "moeplace": f"{data['version']}, Python {data['python']}",
        **extras,
        "engines": ", ".join(f"{name} {version}" for name, version in data["engines"].items()) or "none here",
        "GPUs": "; ".join(data["gpus"]) or "none that nvidia-smi tells of",
        "free memory": quantity("B")(data["free_memory"]),
        "store": data["store"] or data["store_error"],
    }
    if data["plan_file"] is not None:
        fine = "holds a placement" if plan is None else f"is the plan {plan}"
        shown["plan's file"] = f"{data['plan_file']} {fine}" if not data["wrong"] else "; ".join(data["wrong"])
    return [pairs(shown)]
