"""Devices, the nodes they stand in, and the links between them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat, ValidationInfo, field_validator

from .._arguments import check_methods
from .._display import Displayed, plural
from .._lazy import names_extra
from .._types import FloatArray, IntArray
from .errors import InputError, nearest
from .files import parse_yaml, read_text, write_text
from .validation import Record

# Common boxes, named by their GPU as engines and measured kernels name it. Achievable figures: datasheet times what
# large kernels and collectives usually reach. Factors: 0.65 of dense tensor throughput (grouped GEMM), 0.8 of memory
# bandwidth, 0.8 of link bandwidth. Sources: NVIDIA datasheets of A100, H100, H200, B200, B300, GB200 and GB300 NVL72,
# L40S, RTX PRO 6000 Blackwell, GeForce RTX 4090; NVLink and NIC figures are one direction. `moeplace calibrate`
# measures the real box; a preset is a starting point.


class Box(NamedTuple):
    """One node: rates a device, inter-node bandwidth of the whole node. fp8, fp4: arithmetic at those types over that
    at bf16."""

    gpu: str
    devices: int
    compute: float
    memory: float
    memory_bandwidth: float
    intra_bandwidth: float
    inter_bandwidth: float
    fp8: float = 1.0
    fp4: float = 1.0
    intra_latency: float = 3e-6
    inter_latency: float = 10e-6


def _box(
    gpu: str,
    devices: int,
    tflops: float,
    memory_gb: float,
    hbm_tbs: float,
    link_gbs: float,
    nic_gbits: float,
    fp8: float = 1.0,
    fp4: float = 1.0,
    slow: bool = False,
) -> Box:
    return Box(
        gpu=gpu,
        devices=devices,
        compute=0.65 * tflops * 1e12,
        memory=memory_gb * 1e9,
        memory_bandwidth=0.8 * hbm_tbs * 1e12,
        intra_bandwidth=0.8 * link_gbs * 1e9,
        inter_bandwidth=0.8 * nic_gbits / 8 * 1e9 * devices,
        fp8=fp8,
        fp4=max(fp8, fp4),
        intra_latency=8e-6 if slow else 3e-6,
        inter_latency=20e-6 if slow else 10e-6,
    )


PRESETS: dict[str, Box] = {
    "a100-sxm": _box("a100-sxm", 8, 312, 80, 2.04, 300, 200),
    "h100-sxm": _box("h100-sxm", 8, 989, 80, 3.35, 450, 400, fp8=2),
    "h200-sxm": _box("h200-sxm", 8, 989, 141, 4.8, 450, 400, fp8=2),
    "b200-sxm": _box("b200-sxm", 8, 2250, 180, 7.7, 900, 400, fp8=2, fp4=4),
    "b300-sxm": _box("b300-sxm", 8, 2250, 288, 8.0, 900, 800, fp8=2, fp4=6),
    # One NVLink domain over eighteen hosts of four devices: links between these hosts are those inside a node.
    "gb200-nvl72": _box("gb200", 72, 2450, 186, 8.0, 900, 400, fp8=2, fp4=4),
    "gb300-nvl72": _box("gb300", 72, 2450, 288, 8.0, 900, 800, fp8=2, fp4=6),
    "a100-pcie": _box("a100-pcie", 8, 312, 80, 1.94, 32, 25, slow=True),
    "h100-pcie": _box("h100-pcie", 8, 756, 80, 2.0, 64, 200, fp8=2, slow=True),
    "l40s": _box("l40s", 8, 362, 48, 0.864, 32, 25, fp8=2, slow=True),
    "rtx-pro-6000": _box("rtx-pro-6000", 8, 504, 96, 1.79, 64, 100, fp8=2, fp4=4, slow=True),
    # Workstations of two cards, that copy over PCIe and reach others by 10 Gb Ethernet.
    "rtx-pro-6000-pair": _box("rtx-pro-6000", 2, 504, 96, 1.79, 64, 5, fp8=2, fp4=4, slow=True),
    "rtx-4090-pair": _box("rtx-4090", 2, 165, 24, 1.008, 32, 5, fp8=2, slow=True),
}

ENGINES = ("vllm", "sglang", "trtllm")
"""Whose kernels were measured."""
FORMER_NAMES = {
    "a100-hgx": "a100-sxm",
    "h100-hgx": "h100-sxm",
    "h200-hgx": "h200-sxm",
    "b200-hgx": "b200-sxm",
    "l40s-pcie": "l40s",
}
"""Presets under names that earlier plans, files and scripts use."""


T = TypeVar("T")


MOST_DEVICES = 65_536
"""Of one cluster: `count` lets a short file ask for any number."""
DEEPEST = 8
"""Collections inside one another in a file, of which a topology's has five."""


class Device(Record):
    """One GPU. Rates are achievable, not datasheet: flop/s, bytes, bytes/s (one direction for links).

    reserve: bytes of its memory that experts must leave: other weights, KV cache, buffers. compute: at bf16.
    fp8_compute, fp4_compute: at those types, where they are faster. gpu: a name that measured kernels are known by
    ("h100-sxm"), where it is such a GPU.
    """

    compute: PositiveFloat
    memory: PositiveFloat
    memory_bandwidth: PositiveFloat
    intra_bandwidth: PositiveFloat
    reserve: NonNegativeFloat = 0.0
    fp8_compute: PositiveFloat | None = None
    fp4_compute: PositiveFloat | None = None
    gpu: str = ""

    @field_validator("reserve")
    @classmethod
    def _leaves_memory(cls, reserve: float, info: ValidationInfo) -> float:
        if reserve >= info.data.get("memory", float("inf")):
            raise ValueError(f"reserve ({reserve:g}) must be below memory ({info.data['memory']:g})")
        return reserve

    @property
    def left_out(self) -> set[str]:
        later = ("reserve", "fp8_compute", "fp4_compute", "gpu")
        return {name for name in later if not getattr(self, name)}


class Node(Record):
    """Devices that share a fast fabric, and the node's total bandwidth (bytes/s, one direction) to other nodes."""

    devices: tuple[Device, ...]
    inter_bandwidth: PositiveFloat

    @field_validator("devices")
    @classmethod
    def _some(cls, devices: tuple[Device, ...]) -> tuple[Device, ...]:
        return _not_empty(devices, "devices")


@check_methods
class Topology(Displayed, Record):
    """A cluster. Devices are ranked node by node, so a node owns a run of ranks; nodes may differ.

    intra_latency, inter_latency: seconds a message to one peer costs inside a node and between nodes. engine: whose
    expert kernels run ("vllm", "sglang", "trtllm"): predicted times are of their measurements where devices name a gpu
    for which there are any (`mp.expert_seconds`), else of a roofline.

    Example:
        >>> import moeplace as mp
        >>> mp.Topology.preset("h100-hgx", nodes=2).num_devices
        16
        >>> mp.Topology.preset("a100-pcie", nodes=2, devices_per_node=4)
        <Topology: a100-pcie, 2 nodes, 8 devices>
    """

    nodes: tuple[Node, ...]
    intra_latency: NonNegativeFloat = 3e-6
    inter_latency: NonNegativeFloat = 10e-6
    name: str = "custom"
    engine: str = ""

    @field_validator("engine")
    @classmethod
    def _known(cls, engine: str) -> str:
        if engine not in ("", *ENGINES):
            raise ValueError(f"engine ({engine!r}) has no measured kernels; {nearest(engine, ENGINES)}")
        return engine

    @field_validator("nodes")
    @classmethod
    def _some(cls, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
        return _not_empty(nodes, "nodes")

    @property
    def left_out(self) -> set[str]:
        return set() if self.engine else {"engine"}

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)

    @property
    def num_devices(self) -> int:
        return sum(len(node.devices) for node in self.nodes)

    @cached_property
    def node_size(self) -> IntArray:
        """[N] devices in each node."""
        return np.array([len(node.devices) for node in self.nodes], dtype=np.int64)

    @cached_property
    def node_start(self) -> IntArray:
        """[N] first device of each node."""
        return np.concatenate([[0], np.cumsum(self.node_size)[:-1]])

    @cached_property
    def node_of(self) -> IntArray:
        """[G] node index of each device."""
        return np.repeat(np.arange(self.num_nodes), self.node_size)

    @cached_property
    def compute(self) -> FloatArray:
        """[G] flop/s."""
        return self._per_device("compute")

    @cached_property
    def gpus(self) -> tuple[str, ...]:
        """[G] what measured kernels know each device by, "" where none are."""
        return tuple(device.gpu for node in self.nodes for device in node.devices)

    def rate(self, dtype: str) -> FloatArray:
        """[G] flop/s at which experts of that type compute. Types that are only stored (mxfp4) compute at bf16."""
        eight = [device.fp8_compute or device.compute for node in self.nodes for device in node.devices]
        if dtype in ("fp8", "int8", "mxfp8"):
            return np.array(eight)
        if dtype in ("fp4", "nvfp4"):
            four = [device.fp4_compute for node in self.nodes for device in node.devices]
            return np.array([four or eight for four, eight in zip(four, eight, strict=True)])
        return self.compute

    @cached_property
    def memory(self) -> FloatArray:
        """[G] bytes."""
        return self._per_device("memory")

    @cached_property
    def reserve(self) -> FloatArray:
        """[G] bytes that experts must leave."""
        return self._per_device("reserve")

    @cached_property
    def expert_memory(self) -> FloatArray:
        """[G] bytes that experts may take: memory without its reserve."""
        return np.asarray(self.memory - self.reserve)

    @cached_property
    def memory_bandwidth(self) -> FloatArray:
        """[G] bytes/s."""
        return self._per_device("memory_bandwidth")

    @cached_property
    def intra_bandwidth(self) -> FloatArray:
        """[G] bytes/s of a device's links inside its node, one direction."""
        return self._per_device("intra_bandwidth")

    @cached_property
    def inter_bandwidth(self) -> FloatArray:
        """[N] bytes/s of a node's links to other nodes, one direction."""
        return np.array([node.inter_bandwidth for node in self.nodes])

    def _summary(self) -> tuple[str, dict[str, str]]:
        def rates(values: FloatArray, unit: float, name: str) -> str:
            low, high = values.min() / unit, values.max() / unit
            return f"{low:.4g} {name}" if low == high else f"{low:.4g} to {high:.4g} {name}"

        sizes = sorted(set(self.node_size.tolist()))
        return f"{self.name}, {plural(self.num_nodes, 'node')}, {plural(self.num_devices, 'device')}", {
            "devices a node": f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}",
            "compute": rates(self.compute, 1e12, "Tflop/s a device"),
            "memory": f"{rates(self.memory, 1e9, 'GB')} at {rates(self.memory_bandwidth, 1e9, 'GB/s a device')}"
            + (f", {rates(self.reserve, 1e9, 'GB')} of it reserved" if self.reserve.any() else ""),
            "inside a node": f"{rates(self.intra_bandwidth, 1e9, 'GB/s a device')}, {self.intra_latency * 1e6:g} us",
            "between nodes": f"{rates(self.inter_bandwidth, 1e9, 'GB/s a node')}, {self.inter_latency * 1e6:g} us",
        }

    @property
    def is_uniform(self) -> bool:
        """Whether any two devices, and any two nodes, can be swapped without changing any cost."""
        return all(node == self.nodes[0] for node in self.nodes) and all(
            device == node.devices[0] for node in self.nodes for device in node.devices
        )

    def _per_device(self, field: str) -> FloatArray:
        return np.array([getattr(device, field) for node in self.nodes for device in node.devices])

    @classmethod
    def preset(cls, name: str, nodes: int = 1, devices_per_node: int | None = None, engine: str = "") -> Topology:
        """A common box by name (see `placement/topology.py` for sources of the figures).

        devices_per_node: use only so many of the box's devices, with the network cards that belong to them.
        engine: see `Topology`.

        Raises:
            InputError: unknown preset (the nearest is named), or counts the box does not have.
        """
        known = FORMER_NAMES.get(name, name)
        if known not in PRESETS:
            raise InputError(f"topology preset {name!r} is unknown; {nearest(name, PRESETS)}")
        box = PRESETS[known]
        count = box.devices if devices_per_node is None else devices_per_node
        if not 1 <= nodes <= MOST_DEVICES:
            raise InputError(f"nodes ({nodes}) must be at least 1 and at most {MOST_DEVICES}")
        if not 1 <= count <= box.devices:
            raise InputError(f"devices_per_node ({count}) must be between 1 and {box.devices}, what a {name} holds")
        device = Device(
            compute=box.compute,
            memory=box.memory,
            memory_bandwidth=box.memory_bandwidth,
            intra_bandwidth=box.intra_bandwidth,
            fp8_compute=box.fp8 * box.compute if box.fp8 > 1 else None,
            fp4_compute=box.fp4 * box.compute if box.fp4 > 1 else None,
            gpu=box.gpu,
        )
        node = Node(devices=(device,) * count, inter_bandwidth=box.inter_bandwidth * count / box.devices)
        return cls(
            nodes=(node,) * nodes,
            intra_latency=box.intra_latency,
            inter_latency=box.inter_latency,
            name=name,
            engine=engine,
        )

    def is_same_cluster(self, other: Topology) -> bool:
        """Whether both are one cluster, whichever engine's kernels predict its times."""
        return self.replace(engine="") == other.replace(engine="")

    def with_kernels_of(self, engine: str) -> Topology:
        """The same cluster, predicted by the measured kernels of that engine; itself where there are none, or where it
        names an engine already."""
        family = engine.partition("-")[0]
        return self if self.engine or family not in ENGINES or not any(self.gpus) else self.replace(engine=family)

    def reserving(self, reserve: float, share: bool = False) -> Topology:
        """The same cluster with memory kept from experts on every device.

        Args:
            reserve: bytes a device, or with `share` a part of its memory from 0 to below 1.

        Raises:
            InputError: a device has no more memory than that.
        """

        def reserved(device: Device) -> Device:
            return device.replace(reserve=device.memory * reserve if share else reserve)

        nodes = (node.replace(devices=tuple(map(reserved, node.devices))) for node in self.nodes)
        return self.replace(nodes=tuple(nodes))

    def without(self, devices: Iterable[int]) -> Topology:
        """What is left when devices go: the others keep their order and are ranked anew, nodes left empty go too.

        A node's bandwidth to others shrinks with its devices: network cards belong to devices, as in `preset`.

        Raises:
            InputError: a device that is not there, or none would be left.
        """
        gone = set(devices)
        unknown = sorted(device for device in gone if not 0 <= device < self.num_devices)
        if unknown:
            raise InputError(f"device {unknown[0]} is not in the topology; it has 0 to {self.num_devices - 1}")
        if len(gone) == self.num_devices:
            raise InputError(f"without devices 0 to {self.num_devices - 1} nothing is left of the topology")
        nodes, first = [], 0
        for node in self.nodes:
            rest = tuple(device for rank, device in enumerate(node.devices, first) if rank not in gone)
            first += len(node.devices)
            if rest:
                share = len(rest) / len(node.devices)
                nodes.append(Node(devices=rest, inter_bandwidth=node.inter_bandwidth * share))
        return self.replace(nodes=tuple(nodes))

    def resized(self, devices: int | None = None, nodes: int | None = None) -> Topology:
        """The same cluster with so many devices, or so many nodes: the last go, or more like the last node come.

        A last node that gets fewer devices than the one it is like keeps a bandwidth in proportion.

        Raises:
            InputError: neither or both are given, or less than one or more than any cluster has is asked for.
        """
        if (devices is None) == (nodes is None):
            raise InputError("Topology.resized takes devices or nodes, one of them")
        for kind, asked in (("devices", devices), ("nodes", nodes)):
            if asked is not None and not 1 <= asked <= MOST_DEVICES:
                raise InputError(f"Topology.resized: {asked} {kind} asked for, expected 1 to {MOST_DEVICES}")
        if nodes is not None:
            more = (self.nodes[-1],) * max(0, nodes - self.num_nodes)
            return self.replace(nodes=self.nodes[:nodes] + more)
        assert devices is not None
        size = len(self.nodes[-1].devices)
        whole = self.num_nodes + max(0, -(-(devices - self.num_devices) // size))
        grown = self.resized(nodes=whole)
        return grown.without(range(devices, grown.num_devices))

    @classmethod
    def from_dict(cls, data: Any, origin: str = "topology") -> Topology:
        """Builds from plain data. A node or device entry may carry `count: n`; a `preset: NAME` entry replaces all
        else but `reserve`.

        Raises:
            InputError: a field is missing, unknown, not positive or not a number; the message names it.
        """
        if not isinstance(data, dict):
            raise InputError(f"{origin}: expected a mapping with the key 'nodes', found {type(data).__name__}")
        if "preset" in data:
            unknown = set(data) - {"preset", "nodes", "devices_per_node", "reserve", "engine"}
            if unknown:
                raise InputError(f"{origin}: {sorted(unknown)} cannot stand beside 'preset'")
            kinds = (("preset", str), ("nodes", int), ("devices_per_node", int), ("engine", str))
            for key, kind in kinds:
                if data.get(key) is not None and type(data[key]) is not kind:
                    raise InputError(f"{origin}: {key} is {data[key]!r}, expected {kind.__name__}")
            num_nodes = 1 if data.get("nodes") is None else data["nodes"]
            box = cls.preset(data["preset"], num_nodes, data.get("devices_per_node"), data.get("engine") or "")
            reserve = data.get("reserve", 0.0)
            if isinstance(reserve, bool) or not isinstance(reserve, int | float):
                raise InputError(f"{origin}: reserve is {reserve!r}, expected bytes a device")
            return box.reserving(reserve) if reserve else box
        _check_count(data, origin)
        nodes = [
            {**node, "devices": _repeated(node.get("devices", []), f"{origin}: nodes.{i}.devices")}
            for i, node in enumerate(_repeated(data.get("nodes", []), f"{origin}: nodes"))
        ]
        try:
            return cls(**{**data, "nodes": nodes})
        except InputError as error:
            raise InputError(f"{origin}: {error}") from None

    @classmethod
    @names_extra
    def load(cls, path: str | Path) -> Topology:
        """Reads a YAML or JSON file in the form of `from_dict`."""
        data = parse_yaml(read_text(path, limit_bytes=1 << 24), str(path), DEEPEST)
        return cls.from_dict(_with_numbers(data), origin=str(path))

    @names_extra
    def save(self, path: str | Path) -> None:
        """Writes JSON, or YAML when `path` ends so."""
        data = self.model_dump(mode="json")
        if str(path).endswith((".yaml", ".yml")):
            import yaml

            write_text(path, yaml.safe_dump(data, sort_keys=False))
        else:
            write_text(path, json.dumps(data, indent=2))


def _not_empty(entries: tuple[T, ...], field: str) -> tuple[T, ...]:
    # After the entries themselves are checked, so that a wrong entry is not also reported as an empty list.
    if not entries:
        raise ValueError(f"{field} is empty, expected at least one")
    return entries


def _check_count(data: dict[str, Any], origin: str) -> None:
    """Refuses more devices than any cluster has before they are made."""

    def count(entry: Any) -> int:
        number = entry.get("count", 1) if isinstance(entry, dict) else 1
        return number if isinstance(number, int) else 1

    def items(owner: Any, key: str) -> list[Any]:
        entries = owner.get(key) if isinstance(owner, dict) else None
        return list(entries) if isinstance(entries, list | tuple) else []

    nodes = items(data, "nodes")
    total = sum(count(node) * sum(count(device) for device in items(node, "devices")) for node in nodes)
    if total > MOST_DEVICES:
        raise InputError(f"{origin}: {total:,} devices, at most {MOST_DEVICES:,} are taken")


def _repeated(entries: Any, origin: str) -> list[dict[str, Any]]:
    if not isinstance(entries, list | tuple):
        raise InputError(f"{origin}: expected a list, found {type(entries).__name__}")
    result: list[dict[str, Any]] = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(f"{origin}.{i}: expected a mapping, found {entry!r}")
        fields = dict(entry)
        count = fields.pop("count", 1)
        if not isinstance(count, int) or not 1 <= count <= 4096:
            raise InputError(f"{origin}.{i}.count: {count!r} must be a whole number from 1 to 4096")
        result.extend([fields] * count)
    return result


def _with_numbers(data: Any) -> Any:
    """YAML 1.1 reads `50e9` as text; users write bandwidths so."""
    if isinstance(data, dict):
        words = ("name", "engine", "gpu")
        return {key: value if key in words else _with_numbers(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_with_numbers(value) for value in data]
    if isinstance(data, str):
        try:
            return float(data)
        except ValueError:
            return data
    return data
