"""Kernels compile once an installation; time limits of solves do not pay for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeplace.solvers.base import COMPILE_TIME, Budget, CompileTime

FRESH = """
import numpy as np
import moeplace as mp
from moeplace.solvers.base import COMPILE_TIME

model = mp.ModelSpec(layers=4, experts=16, top_k=2, hidden_size=64, ffn_size=64)
topology = mp.Topology.preset("h100-hgx", nodes=1, devices_per_node=4)
draws = np.random.default_rng(0).exponential(size=(2048, 4, 16)) / np.arange(1, 17)
trace = mp.RoutingTrace.from_arrays(np.argsort(draws, axis=2)[..., :2], num_experts=16, sequence=np.arange(2048) // 64)
problem = mp.Problem(model, topology, mp.RoutingStatistics.from_trace(trace))
seen = []
mp.solve(problem, "search", seconds=1.5, step_tokens=16, progress=lambda update: seen.append(update.seconds))
print(COMPILE_TIME.seconds, max(seen))
"""


def test_a_fresh_installation_searches_as_long_as_one_that_has_compiled(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    compiled = []
    for _ in range(2):
        ran = subprocess.run(
            [sys.executable, "-c", FRESH], env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        assert ran.returncode == 0, ran.stderr
        compiling, told = map(float, ran.stdout.split())
        compiled.append(compiling)
        # By its own clock the search ends near its limit, and not before it.
        assert 1.0 < told < 10.0
    # Compiling takes longer than the limit, once.
    assert compiled[0] > 1.5
    assert compiled[1] == 0.0


def test_overlapping_stretches_count_once() -> None:
    clock = CompileTime()
    for _ in range(20):
        clock.begin()
    time.sleep(0.05)
    for _ in range(20):
        clock.end()
    total = clock.seconds
    assert 0.05 <= total < 20 * 0.05
    time.sleep(0.02)
    assert clock.seconds == total


def test_a_budget_stands_still_while_kernels_compile() -> None:
    budget = Budget(seconds=10.0)
    COMPILE_TIME.begin()
    time.sleep(0.2)
    inside = budget.elapsed
    COMPILE_TIME.end()
    assert budget.elapsed == pytest.approx(inside, abs=0.1)
    assert budget.elapsed < 0.15
