"""Batches divided among replicas at run time: torch's whole numbers against NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from least_loads import least_largest_load

torch = pytest.importorskip("torch")

from moeplace.placement.division import divide, source_division  # noqa: E402
from moeplace.runtime.moe.layer_placement import DeviceDivision  # noqa: E402

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def drawn(seed: int, devices: int, experts: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    hosts = rng.random((experts, devices)) < rng.choice([0.0, 0.2, 0.5])
    hosts[np.arange(experts), rng.integers(devices, size=experts)] = True
    return rng.poisson(rng.gamma(0.5, 10.0, size=experts), size=(devices, experts)), hosts


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_torch_divides_as_numpy_does(seed: int, devices: int, experts: int, node_size: int) -> None:
    by_source, hosts = drawn(seed, devices, experts)
    node_of = np.arange(devices) // node_size
    counts = by_source.sum(axis=0)[None]
    divided = divide(counts, hosts, node_of, "local", by_source[None])
    parts = source_division(divided, counts, hosts, node_of, "local", by_source[None])[0]
    found = DeviceDivision(hosts, node_of, CPU)(torch.from_numpy(by_source))
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found.numpy(), parts)


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_torch_divides_among_many_devices_close_to_the_least(seed: int) -> None:
    by_source, hosts = drawn(seed, 16, 24)
    found = DeviceDivision(hosts, np.arange(16) // 8, CPU)(torch.from_numpy(by_source)).numpy()
    np.testing.assert_array_equal(found.sum(axis=2), by_source)
    assert (found >= 0).all()
    assert not found[:, ~hosts].any()
    least = int(least_largest_load(by_source.sum(axis=0)[None], hosts)[0])
    assert found.sum(axis=(0, 1)).max() <= 1.02 * least + 4
