"""Greedy decoding over ranks, whichever way tokens reach their experts.

B sequences of all ranks, T tokens that stand here, K experts a token, D hidden size, L MoE layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ...placement.errors import InputError, MoeplaceError
from ...placement.plan import Plan
from .agreement import agree
from .coherent import Standing
from .context import visible
from .decode_state import DecodeState
from .decode_statistics import DecodeStatistics
from .decoder_parts import DecoderParts, LayerParts, check_decoder
from .experts import MakeDispatcher, PlacedExperts
from .mesh import ExpertMesh
from .parallelize import parallelize
from .prefill import prefill
from .row_gather import RowGather

Routing = tuple[Tensor, Tensor]
"""[L, B, K] expert ids and gate weights to use in the place of the routers'."""


class Decoder(ABC):
    """A model whose ranks decode sequences together, each its own.

    model: a Transformers model of a known family (`decoder_parts.FAMILIES`), in evaluation mode and the same on every rank,
    or one that `parallelize` has spread by this plan and mesh. dispatch: as for `parallelize`, and the way that decoding
    sends tokens: "flat", or "node_aware" on a mesh of two dimensions (the default there).
    statistics: of this rank, since the start or its `reset`.

    Every rank calls the same methods with the same settings, with any number of sequences, none is fine.
    holds_all: whether a rank holds the context of all sequences, or of its own.

    Raises, on every rank:
        InputError: as `parallelize`; or the model is in training mode.
        UnsupportedError: a family or setting of the model that is not known to give the same tokens.
    """

    holds_all: ClassVar[bool]

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        mesh: DeviceMesh | ExpertMesh,
        *,
        dispatch: str | MakeDispatcher | None = None,
    ) -> None:
        self.mesh = ExpertMesh.of(mesh)
        failure: MoeplaceError | None = None
        placed: list[PlacedExperts] = []
        try:
            check_decoder(model)
            self._check_dispatch(model, dispatch)
            placed = [part for part in model.modules() if isinstance(part, PlacedExperts)]
            if placed and placed[0].plan.fingerprint != plan.fingerprint:
                raise InputError("the model is spread by another plan; give that one, or mp.apply this plan first")
        except MoeplaceError as error:
            failure = error
        agree(self.mesh, "decoder", f"{type(self).__name__} {plan.fingerprint} {bool(placed)}", failure)
        if not placed:
            parallelize(model, plan, self.mesh, dispatch=dispatch)
        self.model = model
        self.parts = DecoderParts.of(model)
        self.statistics = DecodeStatistics(self.mesh.size)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Tensor:
        """[b, W + n] this rank's prompts, each continued by its most likely tokens; n is the same on every rank.

        input_ids: [b, W] prompts of this rank, padded on the left where attention_mask [b, W] is 0. eos_token_id: tokens
        that end a sequence (default: those of the model's generation_config); padding follows.

        Raises:
            InputError: no prompt on any rank, an empty prompt, padding elsewhere than on the left, different settings on
                different ranks.
            RankError: a rank died or hangs.
        """
        ends = self._ends(eos_token_id)
        state = self.start(input_ids, max_new_tokens, attention_mask=attention_mask, settings=f"ends {ends}")
        made = [state.token_B]
        pad = getattr(self.model.generation_config, "pad_token_id", None)
        filler = torch.tensor(int(pad) if pad is not None else (ends or [0])[0], device=state.token_B.device)
        end = torch.tensor(ends, dtype=torch.int64, device=state.token_B.device)
        for _ in range(max_new_tokens - 1):
            state.active_B = state.active_B & ~torch.isin(state.token_B, end)
            if not bool(state.active_B.any()):
                break
            self.step(state)
            made.append(state.token_B if not ends else torch.where(state.active_B, state.token_B, filler))
        self.drain(state)
        return torch.cat([input_ids, torch.stack(made, dim=1)[state.own].to(input_ids.dtype)], dim=1)

    @torch.no_grad()
    def start(
        self, input_ids: Tensor, new_tokens: int, *, attention_mask: Tensor | None = None, settings: str = ""
    ) -> DecodeState:
        """The prompts have been through the model, and their context is where this mode needs it. `generate` says what is
        what; new_tokens: that may be decoded. settings: that must be the same on every rank."""
        return prefill(self, input_ids, attention_mask, new_tokens, settings)

    @torch.no_grad()
    def step(self, state: DecodeState, token_B: Tensor | None = None, routing: Routing | None = None) -> None:
        """One iteration: the newest token of every active sequence goes through the model, and the most likely next one
        takes its place in `state`, on every rank.

        token_B: [B] tokens to go on with in the place of the newest. routing: experts to use, for instance recorded ones.
        """
        if token_B is not None:
            state.token_B = token_B.to(state.token_B)
        sequence_T, count_G = state.at_home()
        limit = int(state.position_B.max()) + 1
        if limit > state.context.capacity:
            raise InputError(
                f"there is room for {state.context.capacity} tokens a sequence; start with more new_tokens"
            )
        residual_TD = self.parts.embed(state.token_B[sequence_T])
        rotation = self.parts.rotate(residual_TD, state.position_B[:, None])
        masks = {
            window: visible(state.position_B, limit, window, residual_TD.dtype)
            for window in {layer.window for layer in self.parts.layers}
        }
        standing = Standing(residual_TD, sequence_T, count_G)
        number = 0
        for layer in self.parts.layers:
            with self.statistics.timing("attention"):
                standing = self._attend(layer, standing, state, rotation, masks[layer.window], limit)
            self._share_context(layer, standing, state)
            if layer.dense is not None:
                output_TD = layer.dense(layer.output_norm(standing.residual_TD)[:, None])[:, 0]
                standing = Standing(standing.residual_TD + output_TD, standing.sequence_T, standing.count_G)
                continue
            standing = self._experts(
                layer, standing, None if routing is None else (routing[0][number], routing[1][number])
            )
            number += 1
        with self.statistics.timing("head"):
            state.logits_RV, state.sequence_R = self.parts.head(standing.residual_TD), standing.sequence_T
            token_T = state.logits_RV.argmax(dim=-1)
        self._share_tokens(state, standing, token_T)
        self.statistics.iterations += 1
        self.statistics.tokens += len(sequence_T)

    def drain(self, state: DecodeState) -> None:
        """Waits for what is still under way; every rank calls this when it is done with a batch."""
        for layer in sorted(state.gathering):
            state.gathering.pop(layer).finish()

    def _attend(
        self,
        layer: LayerParts,
        standing: Standing,
        state: DecodeState,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor,
        limit: int,
    ) -> Standing:
        self._receive_context(layer, state)
        sequence_T = standing.sequence_T
        if not len(sequence_T):
            return standing
        position_T = state.position_B[sequence_T]
        state.context.stand(sequence_T, position_T, limit)
        arguments: dict[str, Any] = {self.parts.cache_name: state.context}
        output, *_ = layer.attention(
            hidden_states=layer.input_norm(standing.residual_TD)[:, None],
            position_embeddings=(rotation[0][sequence_T], rotation[1][sequence_T]),
            attention_mask=mask[sequence_T],
            position_ids=position_T[:, None],
            **arguments,
        )
        return Standing(standing.residual_TD + output[:, 0], sequence_T, standing.count_G)

    def _share_context(self, layer: LayerParts, standing: Standing, state: DecodeState) -> None:
        """Starts telling other ranks the keys and values of the tokens that stand here."""
        if not self.holds_all:
            return
        for gathering in state.gathering.values():
            gathering.hand_on()
        sequence_T = standing.sequence_T
        row_TW = state.context.packed(layer.index, sequence_T, state.position_B[sequence_T])
        state.gathering[layer.index] = RowGather(self.mesh, self.statistics, "gather", row_TW, standing.count_G)

    def _receive_context(self, layer: LayerParts, state: DecodeState) -> None:
        """Takes in what `_share_context` of the iteration before has brought."""
        if layer.index in state.gathering:
            state.context.unpack(layer.index, state.gathering.pop(layer.index).finish())

    def _share_tokens(self, state: DecodeState, standing: Standing, token_T: Tensor) -> None:
        """Every rank learns the new token of every sequence."""
        pair_T2 = torch.stack([standing.sequence_T, token_T], dim=1)
        theirs = RowGather(self.mesh, self.statistics, "ids", pair_T2, standing.count_G).finish()
        sequence, token = torch.cat([pair_T2, theirs]).unbind(dim=1)
        state.token_B = state.token_B.index_copy(0, sequence, token)
        state.position_B = state.position_B + state.active_B.long()

    def _routed(self, layer: LayerParts, x_TD: Tensor, sequence_T: Tensor, routing: Routing | None) -> Routing:
        """([T, K] expert ids, gate weights)."""
        if routing is not None:
            return routing[0][sequence_T], routing[1][sequence_T]
        assert layer.router is not None
        _, weight_TK, expert_TK = layer.router(x_TD)
        return expert_TK, weight_TK

    def _ends(self, eos_token_id: int | Sequence[int] | None) -> list[int]:
        if eos_token_id is None:
            eos_token_id = getattr(self.model.generation_config, "eos_token_id", None)
        return [] if eos_token_id is None else np.atleast_1d(np.asarray(eos_token_id)).tolist()

    @abstractmethod
    def _check_dispatch(self, model: nn.Module, dispatch: str | MakeDispatcher | None) -> None:
        """Raises unless tokens can be sent this way."""

    @abstractmethod
    def _experts(self, layer: LayerParts, standing: Standing, routing: Routing | None) -> Standing:
        """Tokens through the experts of one layer."""
