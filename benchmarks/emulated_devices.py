"""Several devices' traffic in one process: each row travels to its device, in its format, and back, all to this
process; and compression of parts of it, for ablations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import moeplace as mp
from moeplace.runtime import LSHCompression, PlacedExperts, QuantizedRows, TrafficStatistics
from moeplace.runtime.moe.data_parallel import expert_layers
from moeplace.runtime.moe.dispatcher import AllToAllDispatcher, AllToAllStage, Dispatcher, DispatchMetadata, flat
from moeplace.runtime.moe.layer_placement import LayerPlacement
from moeplace.runtime.moe.lsh import CompressedDispatcher, CompressedMetadata

Part = Literal["all", "forward", "backward", "inputs"]
"""What is compressed: everything; values, with the gradients of plain dispatch; gradients, with the values of plain
dispatch; or only what experts read, in place of each token its cluster's mean, everything else exact."""


class EmulatedStage(AllToAllStage):
    """Copies of rows to `devices` that are all this process. sent: rows to each of the latest batch."""

    def __init__(self, devices: int) -> None:
        world = dist.group.WORLD
        assert world is not None
        self.group, self.devices, self.peers, self.own = world, np.arange(devices), devices, 0
        self.rows = None
        self.peer_G = self._peer_P = torch.arange(devices)
        self.sent: list[int] = []

    def _sizes(self, key_N: Tensor, peer_TK: Tensor) -> tuple[list[int], list[int], int]:
        self.sent = torch.bincount(key_N, minlength=self.peers + 1)[:-1].tolist()
        return [sum(self.sent)], [sum(self.sent)], int((peer_TK < self.peers).sum())


class EmulatedDispatcher(AllToAllDispatcher):
    """Flat dispatch to emulated devices, of which this process is the first."""

    def __init__(self, mesh: Any, devices: int) -> None:
        super().__init__(mesh, two_stage=False)
        self._emulated = EmulatedStage(devices)
        self.stages = [self._emulated]

    def _traffic(self, batches: Sequence[DispatchMetadata]) -> TrafficStatistics:
        ((copies,),), away = [batch.copies for batch in batches], sum(self._emulated.sent[1:])
        there, back = copies.exchange, copies.back
        assert back is not None
        plain = away * (there.whole_row_bytes + there.side_bytes + back.whole_row_bytes)
        return TrafficStatistics(away, away, plain, away * (there.row_bytes + there.side_bytes + back.row_bytes))


class PartlyCompressed:
    """A layer's forward with compression of one part.

    enabled: False sends everything as it is, as in evaluation.
    """

    def __init__(
        self, layer: PlacedExperts, settings: LSHCompression | QuantizedRows, devices: int, part: Part = "all"
    ) -> None:
        if part not in get_args(Part):
            raise mp.InputError(f"part {part!r} is unknown; one of {', '.join(get_args(Part))}")
        self._layer, self._part, self.enabled = layer, part, True
        rows = settings if isinstance(settings, QuantizedRows) else settings.rows
        carrier = EmulatedDispatcher(layer.mesh, devices)
        carrier.quantize(rows)
        self.dispatcher: Dispatcher = carrier
        if isinstance(settings, LSHCompression):
            width = layer.spec.expert_input_size
            self.dispatcher = CompressedDispatcher(
                carrier, layer.mesh, settings, layer.layer, width, lambda: layer.optimizer_steps.done
            )
        self.plain = flat(layer.mesh)
        placement = LayerPlacement.of(index_order_on(layer.spec, devices), layer.layer)
        self.dispatcher.place(placement, torch.arange(layer.num_experts), layer.num_experts)
        self.plain.place(layer.placement, torch.from_numpy(layer.row_of_slot), len(layer.row_expert))

    def __call__(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        shape, x_TD = x_TD.shape, x_TD.reshape(-1, x_TD.shape[-1])
        weight_TK = weight_TK.float()
        if not self.enabled:
            out_TD = self._through(self.plain, x_TD, expert_TK, weight_TK)
        elif self._part == "all":
            out_TD = self._through(self.dispatcher, x_TD, expert_TK, weight_TK)
        elif self._part == "inputs":
            out_TD = self._of_means(x_TD, expert_TK, weight_TK)
        else:
            exact_TD = self._through(self.plain, x_TD, expert_TK, weight_TK)
            lossy_TD = self._through(self.dispatcher, x_TD, expert_TK, weight_TK)
            values, gradients = (lossy_TD, exact_TD) if self._part == "forward" else (exact_TD, lossy_TD)
            out_TD = gradients + (values - gradients).detach()
        return out_TD.view(shape)

    def _through(self, dispatcher: Dispatcher, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> Tensor:
        metadata = dispatcher.dispatch(x_TD, slot_TK, weight_TK)
        row_ND, count_S = dispatcher.receive(metadata)
        y_ND = self._layer.kind.forward(row_ND, count_S, dict(self._layer.named_parameters(recurse=False)))
        return dispatcher.combine(y_ND, metadata)

    def _of_means(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> Tensor:
        with torch.no_grad():
            metadata = self.dispatcher.dispatch(x_TD, slot_TK, weight_TK)
            self.dispatcher.receive(metadata)
        if not isinstance(metadata, CompressedMetadata):
            return self._through(self.plain, x_TD, slot_TK, weight_TK)
        top_k = slot_TK.shape[1]
        x_ND = x_TD.repeat_interleave(top_k, dim=0)
        mean_MD = torch.cat([metadata.centroid_MD, metadata.centroid_MD.new_zeros(1, x_TD.shape[1])])
        row_N = metadata.row_TK.flatten()
        away_ND = torch.where((row_N < len(metadata.slot_M))[:, None], mean_MD[row_N] - x_ND, 0.0)
        y_ND = self._through(self.plain, x_ND + away_ND.detach(), slot_TK.view(-1, 1), weight_TK.view(-1, 1))
        return y_ND.view(-1, top_k, x_TD.shape[1]).sum(dim=1)


def index_order_on(spec: mp.ModelSpec, devices: int) -> mp.Plan:
    """Experts in index order on `devices` of one node."""
    experts = np.arange(spec.experts)
    return mp.Plan(
        model=spec,
        topology=mp.Topology.preset("h100-sxm", nodes=1, devices_per_node=devices),
        physical_to_logical=np.tile(experts, (spec.layers, 1)),
        slot_device=experts * devices // spec.experts,
    )


def compress_parts(
    model: nn.Module,
    settings: LSHCompression | QuantizedRows,
    devices: int,
    part: Part = "all",
    first_layer: int = 0,
) -> list[PartlyCompressed]:
    """Has a model of one process send as `devices` would, from `first_layer` on; what now carries each layer's rows."""
    changed = []
    for _, layer in expert_layers(model):
        if layer.layer >= first_layer:
            carrying = PartlyCompressed(layer, settings, devices, part)
            layer.forward = carrying  # type: ignore[method-assign,assignment]
            changed.append(carrying)
    return changed
