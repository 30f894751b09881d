"""The two ways of decoding: tokens go to their experts and come back, or stay with them.

T tokens that stand here, K experts a token, D hidden size, N token-expert pairs computed here, G devices.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ...placement.errors import UnsupportedError
from ...placement.plan import Plan
from .coherent import CoherentExperts, Standing
from .decoder import Decoder, Routing
from .decoder_parts import LayerParts, check_no_compression
from .dispatcher import HopDispatcher
from .experts import MakeDispatcher
from .mesh import ExpertMesh


class DispatchCombineDecoder(Decoder):
    """A token lives on the rank of its sequence; its experts' outputs come back to it, two all-to-alls a layer."""

    holds_all = False

    def _check_dispatch(self, model: nn.Module, dispatch: str | MakeDispatcher | None) -> None:
        pass

    def _experts(self, layer: LayerParts, standing: Standing, routing: Routing | None) -> Standing:
        experts, statistics = layer.experts, self.statistics
        assert experts is not None
        x_TD = layer.output_norm(standing.residual_TD)
        expert_TK, weight_TK = self._routed(layer, x_TD, standing.sequence_T, routing)
        dispatcher = experts.dispatcher
        with statistics.timing("dispatch"):
            sent = dispatcher.dispatch(x_TD, experts.replica_choice.slots(expert_TK.long()), weight_TK.float())
        with statistics.timing("experts"):
            shared_TD = None if layer.shared is None else layer.shared(x_TD)
        with statistics.timing("dispatch"):
            work = sent.wait()
        with statistics.timing("experts"):
            weights = dict(experts.named_parameters(recurse=False))
            y_ND = experts.kind.forward(work.row_ND, work.count_S, weights)
        with statistics.timing("combine"):
            output_TD = dispatcher.combine(y_ND, work)
        if isinstance(dispatcher, HopDispatcher):
            self._record(dispatcher, x_TD, expert_TK.shape[1])
        if shared_TD is not None:
            output_TD = output_TD + shared_TD
        return Standing(standing.residual_TD + output_TD, standing.sequence_T, standing.count_G)

    def _record(self, dispatcher: HopDispatcher, x_TD: Tensor, top_k: int) -> None:
        width = x_TD.shape[1] * x_TD.element_size()
        for part, hops, side in (("dispatch", dispatcher.copies, 8 * top_k), ("combine", dispatcher.returned, 0)):
            for rows, devices in zip(hops, dispatcher.devices, strict=True):
                rows_G = np.zeros(self.mesh.size, dtype=np.int64)
                rows_G[devices] = np.where(devices == self.mesh.rank, 0, rows)
                self.statistics.sent(part, rows_G, width, side)
                self.statistics.all_to_alls[part] += 1


class ContextCoherentDecoder(Decoder):
    """A token moves to the device of its highest-weight expert and stays there (ExFlow): one all-to-all a layer with one
    expert a token, a second for the other experts' outputs with more.

    Every rank holds the context of all sequences: keys and values of prompts are gathered at the start, those of new tokens
    layer by layer while later layers run, and the new tokens at the end of an iteration. The prompts themselves go through
    the model as in `DispatchCombineDecoder`.

    overlap: whether tokens that stay are computed while others travel, which reads experts' weights up to three times a
    layer; None: where that costs less than it hides, by the figures of the plan's topology.

    Raises, besides what `Decoder` does:
        UnsupportedError: tokens are to be sent compressed.
    """

    holds_all = True

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        mesh: DeviceMesh | ExpertMesh,
        *,
        dispatch: str | MakeDispatcher | None = None,
        overlap: bool | None = None,
    ) -> None:
        super().__init__(model, plan, mesh, dispatch=dispatch)
        self._moves = {}
        for experts in self.parts.placed:
            # One copy a token has nothing to save between nodes, and one hop is faster than two.
            node_aware = dispatch == "node_aware" or (dispatch is None and experts.spec.top_k > 1)
            self._moves[experts.layer] = CoherentExperts(experts, self.statistics, node_aware, overlap)

    def _check_dispatch(self, model: nn.Module, dispatch: str | MakeDispatcher | None) -> None:
        check_no_compression(model)
        if dispatch is not None and not isinstance(dispatch, str):
            raise UnsupportedError(
                "context-coherent execution sends tokens whole, since a compressed token is restored where it came from, and "
                "there it does not return; give dispatch='flat' or 'node_aware', or use DispatchCombineDecoder"
            )

    def _experts(self, layer: LayerParts, standing: Standing, routing: Routing | None) -> Standing:
        assert layer.experts is not None
        with self.statistics.timing("attention"):
            x_TD = layer.output_norm(standing.residual_TD)
            expert_TK, weight_TK = self._routed(layer, x_TD, standing.sequence_T, routing)
        return self._moves[layer.experts.layer].move(standing, weight_TK, expert_TK, layer.output_norm, layer.shared)
