"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from traces import make_trace

import moeplace as mp

# A slow machine must not fail a property.
settings.register_profile("moeplace", deadline=None)
settings.load_profile("moeplace")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


SLOW_FILE = re.compile(r"^pytestmark = .*\bmark\.slow\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where slow tests are left out, files with no other are not imported: that takes as long as many tests."""
    if collection_path.suffix != ".py" or "not slow" not in config.option.markexpr.split(" and "):
        return None
    return True if SLOW_FILE.search(collection_path.read_text(encoding="utf-8")) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: processes that share the files then end together.

    The first of all compiles the kernels that others load, while what solves nothing runs beside it.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def turn(item: pytest.Item) -> int:
        if item.path not in slow:
            return 3
        if item.path.name == "test_golden_solves.py":
            return 0
        return 1 if item.path.parent.name in ("runtime", "integrations", "profiler") else 2

    items.sort(key=turn)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of recorded routing of public models, beside the checkout; not part of the distribution."""
    if not (SHARED / "gpt_oss_20b_routing.npz").is_file():
        pytest.skip(f"recorded routing of public models is not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def gpt_oss(shared_data: Path) -> mp.RoutingTrace:
    """Routing of gpt-oss-20b: 24 layers, 32 experts, top-4, 131,403 decode tokens of 430 sequences."""
    arrays = np.load(shared_data / "gpt_oss_20b_routing.npz", allow_pickle=False)
    return mp.RoutingTrace.from_arrays(
        arrays["expert_ids"],
        num_experts=32,
        gate_weights=arrays["gate_probs"],
        sequence=arrays["sequence"],
        position=arrays["position"],
        workload=arrays["sequence_dataset"][arrays["sequence"]],
    )


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind, gone after the test."""
    if request.param == "sqlite":
        yield str(tmp_path / "store.db")
        return
    server = os.environ.get("MOEPLACE_TEST_POSTGRES")
    if not server:
        pytest.skip("MOEPLACE_TEST_POSTGRES does not name a PostgreSQL database")
    import psycopg

    schema = f"moeplace_test_{secrets.token_hex(6)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {schema}".encode())
        try:
            yield f"{server}{'&' if '?' in server else '?'}options=-csearch_path%3D{schema}"
        finally:
            connection.execute(f"DROP SCHEMA {schema} CASCADE".encode())


@pytest.fixture
def toy_trace() -> mp.RoutingTrace:
    """A small trace with real structure: two workloads, each with favourite experts and sticky transitions."""
    return make_trace(seed=0)
