"""Common boxes. Achievable figures: datasheet times what large kernels and collectives usually reach.

Factors: 0.65 of dense bf16 tensor throughput (grouped GEMM), 0.8 of memory bandwidth, 0.8 of link bandwidth.
Sources: NVIDIA datasheets of A100, H100, H200, B200, GB200 NVL72, L40S; NVLink and NIC figures are one direction.
`moeplace calibrate` measures the real box; a preset is a starting point.
"""

from __future__ import annotations

from typing import NamedTuple


class Box(NamedTuple):
    """One node: rates a device, inter-node bandwidth of the whole node."""

    devices: int
    compute: float
    memory: float
    memory_bandwidth: float
    intra_bandwidth: float
    inter_bandwidth: float
    intra_latency: float = 3e-6
    inter_latency: float = 10e-6


def _box(
    devices: int,
    tflops: float,
    memory_gb: float,
    hbm_tbs: float,
    link_gbs: float,
    nic_gbits: float,
    slow: bool = False,
) -> Box:
    return Box(
        devices=devices,
        compute=0.65 * tflops * 1e12,
        memory=memory_gb * 1e9,
        memory_bandwidth=0.8 * hbm_tbs * 1e12,
        intra_bandwidth=0.8 * link_gbs * 1e9,
        inter_bandwidth=0.8 * nic_gbits / 8 * 1e9 * devices,
        intra_latency=8e-6 if slow else 3e-6,
        inter_latency=20e-6 if slow else 10e-6,
    )


PRESETS: dict[str, Box] = {
    "a100-hgx": _box(8, 312, 80, 2.04, 300, 200),
    "h100-hgx": _box(8, 989, 80, 3.35, 450, 400),
    "h200-hgx": _box(8, 989, 141, 4.8, 450, 400),
    "b200-hgx": _box(8, 2250, 180, 7.7, 900, 400),
    "gb200-nvl72": _box(72, 2450, 186, 8.0, 900, 400),
    "a100-pcie": _box(8, 312, 80, 1.94, 32, 25, slow=True),
    "l40s-pcie": _box(8, 362, 48, 0.864, 32, 25, slow=True),
}
