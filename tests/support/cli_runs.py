"""Running the commands in tests, and a small trace for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from traces import make_trace
from typer.testing import CliRunner

import moeplace as mp
from moeplace.cli.app import app
from moeplace.cli.schemas import output_schema, output_types
from moeplace.profiler.statistics_file import write_statistics
from moeplace.profiler.trace_files import write_trace

CLUSTER = ("--topology", "h100-hgx", "--nodes", "2", "--devices-per-node", "2")
JUDGED = ("--decode", "8", "--steps", "12")


@dataclass(frozen=True)
class Run:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """stdout as JSON; fails when anything else stands there, or what the command's JSON Schema does not tell of."""
        data = json.loads(self.out)
        check_output(data)
        return data


def check_output(data: dict[str, Any]) -> None:
    """Fails where a command's JSON is not what its schema says, or holds names that the schema lacks."""
    name = data["schema"].split("/")[1]
    output_type(name).validate_python({key: value for key, value in data.items() if key != "schema"})
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(data, output_schema(name))


@cache
def output_type(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(output_types()[name])


def run(*arguments: object) -> Run:
    """Runs a command in this process; an error that is not a refusal is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Run(result.exit_code, result.stdout, result.stderr)


def toy_model(**changes: Any) -> mp.ModelSpec:
    """The model of `make_trace`, with sizes."""
    fields = {"layers": 3, "experts": 8, "top_k": 2, "hidden_size": 64, "ffn_size": 128, "name": "toy"}
    return mp.ModelSpec(**{**fields, **changes})


def toy_trace_folder(folder: Path, model: mp.ModelSpec | None = None, seed: int = 0) -> Path:
    """Writes the toy trace, with its model unless None is wanted."""
    write_trace(make_trace(seed), folder, model=model)
    return folder


def skewed_counts(path: Path, windows: int = 40) -> Path:
    """Count windows whose two popular experts stand side by side: contiguous plans load one device with both."""
    share = np.array([8.0, 8, 1, 1, 1, 1, 1, 1])
    rng = np.random.default_rng(0)
    counts = np.stack([rng.multinomial(4000, share / share.sum(), size=3) for _ in range(windows)])
    write_statistics(mp.RoutingStatistics.from_counts({"decode": counts}, top_k=2), path)
    return path
