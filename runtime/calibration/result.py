"""What a calibration found: the topology that commands take, and the timings that it was fitted to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...placement.topology import Topology


@dataclass(frozen=True)
class LinkTiming:
    """An all-to-all. kind: "intra" (inside nodes), "inter" (between ranks of equal place on nodes) or "all" (every rank
    to every rank). peer_bytes: from a rank to each peer. seconds: on the slowest rank. predicted: by the topology."""

    kind: str
    peer_bytes: int
    seconds: float
    predicted: float


@dataclass(frozen=True)
class WorkTiming:
    """Expert work. pairs: token-expert pairs an expert. seconds: on the median device, rows gathered and summed.
    products_only: without. predicted: by the topology."""

    pairs: int
    seconds: float
    products_only: float
    predicted: float


@dataclass(frozen=True)
class DispatchTiming:
    """The runtime's dispatch and combine, one after the other without experts, of tokens that choose devices evenly.

    dispatch: "flat" or "node_aware". copies: rows that a rank sends there, those to itself included, all stages
    together. seconds: until the last rank is done. links: of these, what the topology says of the rows, stage after
    stage.
    """

    dispatch: str
    copies: float
    seconds: float
    links: float

    @property
    def copy_seconds(self) -> float:
        """What a copy costs beside its time on links: ranks tell each other numbers, order, pack and add up rows, and
        wait for the last of them in every stage."""
        return max(0.0, self.seconds - self.links) / self.copies


@dataclass(frozen=True)
class Calibration:
    """topology: devices and links with effective rates, as the cost model uses them.

    dispatches: of the runtime; the cost model leaves out what they take beside links. experts: a device had in `work`.
    tokens: of the steps that sizes were taken from. token_seconds: what a token costs its own rank in one stage without
    any link; the cost model leaves it out, since it is the same under every plan. copy_bandwidth: bytes/s read and
    written by plain copies. alone: how much faster a device does expert work when the others are idle; well above 1
    when ranks share cores. device_dtype: for reports, such as "cpu, torch.float32".
    """

    topology: Topology
    links: tuple[LinkTiming, ...]
    dispatches: tuple[DispatchTiming, ...]
    work: tuple[WorkTiming, ...]
    experts: int
    tokens: int
    token_seconds: float
    copy_bandwidth: float
    alone: float
    device_dtype: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "topology": self.topology.model_dump(mode="json")}

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the reader of the figures should know."""
        remarks = []
        if self.alone > 1.25:
            remarks.append(
                f"A device works {self.alone:.2f} times as fast while the others are idle: ranks share cores. The cost "
                "model takes devices to be independent, so plans of unequal load will be faster than it says."
            )
        if self.topology.num_nodes == 1:
            remarks.append(
                "One node: links between nodes were not measured; the file has the node's links inside in their place."
            )
        if self.topology.node_size.max() == 1:
            remarks.append(
                "One rank a node: links inside nodes were not measured; the file has memory bandwidth in their place."
            )
        return tuple(remarks)
