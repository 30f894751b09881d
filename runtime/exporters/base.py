"""The contract between `export_plan` and the engines: write a file, read it back, say what the engine needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from ...placement.model import ModelSpec
from ...placement.plan import Plan
from ...placement.topology import Topology
from .constraints import Constraint


class Exporter(Protocol):
    """One engine's file format. Instances are stateless.

    `write(plan, path, *, <options>) -> None` gets a plan that keeps to `constraints`; the options are keyword arguments
    of `export_plan`. `read(path, model, topology) -> Plan` takes an untrusted file and raises FileFormatError.
    """

    @property
    def name(self) -> str: ...

    @property
    def constraints(self) -> frozenset[Constraint]: ...

    @property
    def requires(self) -> str:
        """The engine and the versions that read the file."""
        ...

    @property
    def replica_choice(self) -> Literal["share", "nearest"]:
        """Which replica the engine lets serve a token, in the objective's terms."""
        ...

    @property
    def write(self) -> Callable[..., None]: ...

    def read(self, path: Path, model: ModelSpec, topology: Topology) -> Plan: ...

    def usage(self, plan: Plan, path: Path) -> str:
        """How to give the file to the engine: the options this very plan needs."""
        ...
