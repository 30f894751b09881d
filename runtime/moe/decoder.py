"""Greedy decoding over ranks, whichever way tokens reach their experts.

The loop and its two modes come first, then what a batch of sequences carries, prompts, the parts of a model, and how
ranks tell each other keys, values and tokens.

B sequences of all ranks, in order of their ranks; b of this rank; T tokens that stand here, one of a sequence; K
experts a token; D hidden size; L MoE layers; G ranks; N token-expert pairs computed here; W columns of a row.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..._arguments import check_fields
from ..._types import IntArray
from ...placement.errors import InputError, MoeplaceError, UnsupportedError
from ...placement.plan import Plan
from .all_to_all import AsyncAllToAll
from .coherent import CoherentExperts, DecodeStatistics, LocalTokens
from .coordination import check_consistent, gather
from .dispatcher import AllToAllDispatcher, DispatchMetadata
from .experts import MakeDispatcher, PlacedExperts
from .layer import ExpertParallelMoE
from .mesh import ExpertMesh
from .parallelize import parallelize

Routing = tuple[Tensor, Tensor]
"""[L, B, K] expert ids and gate weights to use in the place of the routers'."""


class Decoder(ABC):
    """A model whose ranks decode sequences together, each its own.

    Every rank calls the same methods with the same settings, with any number of sequences, none is fine.

    statistics: of this rank, since the start or its `reset`. holds_all: whether a rank holds the context of all
    sequences, or of its own.

    Args:
        model: a Transformers model of a known family (`FAMILIES`), in evaluation mode and the same on every rank, or
            one that `parallelize` has spread by this plan and mesh.
        plan: which experts stand where.
        mesh: all ranks; device g of the plan is its g-th.
        dispatch: as for `parallelize`, and the way that decoding sends tokens: "flat", or "node_aware" on a mesh of two
            dimensions (the default there).

    Raises:
        InputError: as `parallelize`; or the model is in training mode. All errors are raised on every rank.
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
            if any(part.shards is not None for part in placed):
                raise UnsupportedError(
                    "the model's experts are cut over copies (shard_experts), which is for training; write it with "
                    "export_hf, and decode from that"
                )
            if any(part.padded_tokens is not None for part in placed):
                raise UnsupportedError(
                    "the model drops tokens beyond a capacity (padded_tokens), which is for training; write it with "
                    "export_hf, and decode from that"
                )
        except MoeplaceError as error:
            failure = error
        check_consistent(self.mesh, "decoder", f"{type(self).__name__} {plan.fingerprint} {bool(placed)}", failure)
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

        Args:
            input_ids: [b, W] prompts of this rank.
            max_new_tokens: n, unless all sequences end before.
            attention_mask: [b, W] 0 where prompts are padded, on the left.
            eos_token_id: tokens that end a sequence (default: those of the model's generation_config); padding follows.

        Raises:
            InputError: no prompt on any rank, an empty prompt, padding elsewhere than on the left, different settings
                on different ranks.
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
        """The prompts have been through the model, and their context is where this mode needs it.

        Args:
            input_ids: [b, W] prompts of this rank.
            new_tokens: that may be decoded.
            attention_mask: see `generate`.
            settings: that must be the same on every rank.
        """
        return prefill(self, input_ids, attention_mask, new_tokens, settings)

    @torch.no_grad()
    def step(self, state: DecodeState, token_B: Tensor | None = None, routing: Routing | None = None) -> None:
        """One iteration: the newest token of every active sequence goes through the model, and the most likely next one
        takes its place in `state`, on every rank.

        Args:
            state: of `start`.
            token_B: [B] tokens to go on with in the place of the newest.
            routing: experts to use, for instance recorded ones.

        Raises:
            InputError: more tokens than `start` was told of; tokens, or a routing, that are not the model's.
        """
        if token_B is not None:
            if token_B.shape != state.token_B.shape:
                raise InputError(
                    f"token_B has shape {list(token_B.shape)}, expected {list(state.token_B.shape)}: one of each "
                    "sequence of all ranks"
                )
            check_tokens("token_B", token_B, self.parts.vocabulary)
            state.token_B = token_B.to(state.token_B)
        if routing is not None:
            self._check_routing(routing, len(state.token_B))
        sequence_T, count_G = state.active()
        limit = int(state.position_B.max()) + 1
        if limit > state.context.capacity:
            raise InputError(
                f"the context holds {state.context.capacity} tokens a sequence; start with more new_tokens"
            )
        residual_TD = self.parts.embed(state.token_B[sequence_T])
        rotation = self.parts.rotate(residual_TD, state.position_B[:, None])
        masks = {
            window: visible(state.position_B, limit, window, residual_TD.dtype)
            for window in {layer.window for layer in self.parts.layers}
        }
        tokens = LocalTokens(residual_TD, sequence_T, count_G)
        number = 0
        for layer in self.parts.layers:
            with self.statistics.timing("attention"):
                tokens = self._attend(layer, tokens, state, rotation, masks[layer.window], limit)
            self._share_context(layer, tokens, state)
            if layer.dense is not None:
                output_TD = layer.dense(layer.output_norm(tokens.residual_TD)[:, None])[:, 0]
                tokens = LocalTokens(tokens.residual_TD + output_TD, tokens.sequence_T, tokens.count_G)
                continue
            with self.statistics.timing("attention"):
                x_TD = layer.output_norm(tokens.residual_TD)
                if routing is None:
                    assert layer.router is not None
                    _, weight_TK, expert_TK = layer.router(x_TD)
                else:
                    expert_TK, weight_TK = (every[number, tokens.sequence_T] for every in routing)
            tokens = self._experts(layer, tokens, x_TD, expert_TK.long(), weight_TK.float())
            number += 1
        with self.statistics.timing("head"):
            state.logits_RV, state.sequence_R = self.parts.head(tokens.residual_TD), tokens.sequence_T
            token_T = state.logits_RV.argmax(dim=-1)
        self._share_tokens(state, tokens, token_T)
        self.statistics.iterations += 1
        self.statistics.tokens += len(sequence_T)

    def drain(self, state: DecodeState) -> None:
        """Waits for what is still under way; every rank calls this when it is done with a batch."""
        for layer in sorted(state.gathering):
            state.gathering.pop(layer).finish()

    def _check_routing(self, routing: Routing, sequences: int) -> None:
        """Raises InputError for experts that the layers do not have: -1 would be the last one."""
        expert_LBK, weight_LBK = routing
        expected = (len(self.parts.placed), sequences)
        if expert_LBK.ndim != 3 or tuple(expert_LBK.shape[:2]) != expected or weight_LBK.shape != expert_LBK.shape:
            raise InputError(
                f"routing has ids of shape {list(expert_LBK.shape)} and weights of {list(weight_LBK.shape)}, expected "
                f"[{expected[0]} MoE layers, {expected[1]} sequences, experts a token] twice"
            )
        if expert_LBK.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise InputError(f"routing has ids of {expert_LBK.dtype}, expected whole numbers")
        experts = self.parts.placed[0].num_experts
        wrong = expert_LBK[(expert_LBK < 0) | (expert_LBK >= experts)]
        if wrong.numel():
            raise InputError(
                f"routing names expert {int(wrong[0])}, the layers have 0 to {experts - 1}; give a token that goes to "
                "fewer experts any of these with a weight of 0"
            )

    def _attend(
        self,
        layer: LayerParts,
        tokens: LocalTokens,
        state: DecodeState,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor,
        limit: int,
    ) -> LocalTokens:
        self._receive_context(layer, state)
        sequence_T = tokens.sequence_T
        if not len(sequence_T):
            return tokens
        position_T = state.position_B[sequence_T]
        state.context.stand(sequence_T, position_T, limit)
        arguments: dict[str, Any] = {self.parts.cache_name: state.context}
        output, *_ = layer.attention(
            hidden_states=layer.input_norm(tokens.residual_TD)[:, None],
            position_embeddings=(rotation[0][sequence_T], rotation[1][sequence_T]),
            attention_mask=mask[sequence_T],
            position_ids=position_T[:, None],
            **arguments,
        )
        return LocalTokens(tokens.residual_TD + output[:, 0], sequence_T, tokens.count_G)

    def _share_context(self, layer: LayerParts, tokens: LocalTokens, state: DecodeState) -> None:
        """Starts telling other ranks the keys and values of the tokens that stand here."""
        if not self.holds_all:
            return
        for gathering in state.gathering.values():
            gathering.hand_on()
        sequence_T = tokens.sequence_T
        row_TW = state.context.packed(layer.index, sequence_T, state.position_B[sequence_T])
        state.gathering[layer.index] = RowGather(self.mesh, self.statistics, "gather", row_TW, tokens.count_G)

    def _receive_context(self, layer: LayerParts, state: DecodeState) -> None:
        """Takes in what `_share_context` of the iteration before has brought."""
        if layer.index in state.gathering:
            state.context.unpack(layer.index, state.gathering.pop(layer.index).finish())

    def _share_tokens(self, state: DecodeState, tokens: LocalTokens, token_T: Tensor) -> None:
        """Every rank learns the new token of every sequence."""
        pair_T2 = torch.stack([tokens.sequence_T, token_T], dim=1)
        theirs = RowGather(self.mesh, self.statistics, "ids", pair_T2, tokens.count_G).finish()
        sequence, token = torch.cat([pair_T2, theirs]).unbind(dim=1)
        state.token_B = state.token_B.index_copy(0, sequence, token)
        state.position_B = state.position_B + state.active_B.long()

    def _ends(self, eos_token_id: int | Sequence[int] | None) -> list[int]:
        if eos_token_id is None:
            eos_token_id = getattr(self.model.generation_config, "eos_token_id", None)
        return [] if eos_token_id is None else np.atleast_1d(np.asarray(eos_token_id)).tolist()

    @abstractmethod
    def _check_dispatch(self, model: nn.Module, dispatch: str | MakeDispatcher | None) -> None:
        """Raises unless tokens can be sent this way."""

    @abstractmethod
    def _experts(
        self, layer: LayerParts, tokens: LocalTokens, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor
    ) -> LocalTokens:
        """Tokens through the experts of one layer. x_TD: what experts read of the residual stream."""


@check_fields
class DispatchCombineDecoder(Decoder):
    """A token lives on the rank of its sequence; its experts' outputs come back to it, two all-to-alls a layer."""

    holds_all = False

    def _check_dispatch(self, model: nn.Module, dispatch: str | MakeDispatcher | None) -> None:
        pass

    def _experts(
        self, layer: LayerParts, tokens: LocalTokens, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor
    ) -> LocalTokens:
        experts, statistics = layer.experts, self.statistics
        assert experts is not None
        dispatcher = experts.dispatcher
        with statistics.timing("dispatch"):
            metadata = dispatcher.dispatch(x_TD, experts.replica_choice.slots(expert_TK), weight_TK)
        with statistics.timing("experts"):
            shared_TD = None if layer.shared is None else layer.shared(x_TD)
        with statistics.timing("dispatch"):
            row_ND, count_S = dispatcher.receive(metadata)
        with statistics.timing("experts"):
            y_ND = experts.kind.forward(row_ND, count_S, dict(experts.named_parameters(recurse=False)))
        with statistics.timing("combine"):
            output_TD = dispatcher.combine(y_ND, metadata)
        if isinstance(dispatcher, AllToAllDispatcher):
            self._count(dispatcher, metadata)
        if shared_TD is not None:
            output_TD = output_TD + shared_TD
        return LocalTokens(tokens.residual_TD + output_TD, tokens.sequence_T, tokens.count_G)

    def _count(self, dispatcher: AllToAllDispatcher, metadata: DispatchMetadata) -> None:
        """What was sent; sums return with nothing beside them."""
        for stage, copies in zip(dispatcher.stages, metadata.copies, strict=True):
            there = copies.exchange
            others = np.arange(stage.peers) != stage.own
            self.statistics.exchanged("dispatch", stage.devices, others * there.sent, there.row_bytes, there.side_bytes)
            if copies.back is not None:
                back_bytes = copies.back.row_bytes
                self.statistics.exchanged("combine", stage.devices, others * there.received, back_bytes)


@check_fields
class ContextCoherentDecoder(Decoder):
    """A token moves to the device of its highest-weight expert and stays there (ExFlow): one all-to-all a layer with
    one expert a token, a second for the other experts' outputs with more.

    Every rank holds the context of all sequences: keys and values of prompts are gathered at the start, those of new
    tokens layer by layer while later layers run, and the new tokens at the end of an iteration. The prompts themselves
    go through the model as in `DispatchCombineDecoder`.

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
        self._moves: dict[int, CoherentExperts] = {}
        for experts in self.parts.placed:
            # One copy a token has nothing to save between nodes, and one stage is faster than two.
            node_aware = dispatch == "node_aware" or (dispatch is None and experts.spec.top_k > 1)
            self._moves[experts.layer] = CoherentExperts(experts, self.statistics, node_aware, overlap)

    def _check_dispatch(self, model: nn.Module, dispatch: str | MakeDispatcher | None) -> None:
        check_no_compression(model)
        if dispatch is not None and not isinstance(dispatch, str):
            raise UnsupportedError(
                "context-coherent execution sends tokens whole, since a compressed token is restored where it came "
                "from, and there it does not return; give dispatch='flat' or 'node_aware', or use "
                "DispatchCombineDecoder"
            )

    def _experts(
        self, layer: LayerParts, tokens: LocalTokens, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor
    ) -> LocalTokens:
        # Each device makes x of the residual streams that arrive there, for a token's owner adds to what it was sent.
        assert layer.experts is not None
        move = self._moves[layer.experts.layer].move
        return move(tokens, weight_TK, expert_TK, layer.output_norm, layer.shared)


@dataclass(eq=False)
class DecodeState:
    """A batch of sequences being decoded: what every rank knows of all of them.

    token_B: the newest token of each sequence, which has not been through the model. position_B: its place in the
    sequence. active_B: sequences that are not at their end. count_G: sequences of each rank.

    logits_RV, sequence_R: what the latest iteration made of the tokens that ended on this rank.
    """

    context: Context
    token_B: Tensor
    position_B: Tensor
    active_B: Tensor
    count_G: IntArray
    rank: int
    logits_RV: Tensor
    sequence_R: Tensor
    gathering: dict[int, RowGather] = field(default_factory=dict)

    @property
    def own(self) -> slice:
        """This rank's sequences among B."""
        first = int(self.count_G[: self.rank].sum())
        return slice(first, first + int(self.count_G[self.rank]))

    def active(self) -> tuple[Tensor, IntArray]:
        """(this rank's active sequences, [G] active sequences of every rank)."""
        number_B = torch.arange(len(self.token_B), device=self.token_B.device)
        own = number_B[self.own]
        source_B = np.repeat(np.arange(len(self.count_G)), self.count_G)
        active = np.bincount(source_B[self.active_B.cpu().numpy()], minlength=len(self.count_G))
        return own[self.active_B[self.own]], active


class Context:
    """Keys and values on this rank, in the place of a Transformers cache: one new token of some of the sequences at a
    time.

    sequences, capacity: B sequences of S positions. first: number of the first sequence held here. H heads, d head
    width, R tokens.
    """

    def __init__(self, sequences: int, capacity: int, first: int = 0) -> None:
        self.sequences, self.capacity, self.first = sequences, capacity, first
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._standing_R = self._position_R = torch.empty(0, dtype=torch.int64)
        self._limit = 0

    def allocate(self, layer: int, shape: Sequence[int], like: Tensor) -> None:
        """Memory for a layer. shape: heads and width of keys, heads and width of values."""
        if layer not in self._keys:
            heads, width, value_heads, value_width = shape
            self._keys[layer] = like.new_zeros(self.sequences, heads, self.capacity, width)
            self._values[layer] = like.new_zeros(self.sequences, value_heads, self.capacity, value_width)

    def write(self, layer: int, sequence_R: Tensor, position_R: Tensor, key_RHd: Tensor, value_RHd: Tensor) -> None:
        self._keys[layer][sequence_R - self.first, :, position_R] = key_RHd
        self._values[layer][sequence_R - self.first, :, position_R] = value_RHd

    def packed(self, layer: int, sequence_R: Tensor, position_R: Tensor) -> Tensor:
        """[R, W] keys, values, sequence and position of single tokens, for other ranks."""
        key, value = self._keys[layer], self._values[layer]
        row_R = sequence_R - self.first
        place_R2 = torch.stack([sequence_R, position_R], dim=1).int().view(key.dtype)
        return torch.cat(
            [key[row_R, :, position_R].flatten(1), value[row_R, :, position_R].flatten(1), place_R2], dim=1
        )

    def unpack(self, layer: int, row_RW: Tensor) -> None:
        """Takes in what other ranks have packed."""
        key, value = self._keys[layer], self._values[layer]
        width, end = key.shape[1] * key.shape[3], row_RW.shape[1] - 8 // key.element_size()
        sequence_R, position_R = row_RW[:, end:].contiguous().view(torch.int32).long().unbind(dim=1)
        self.write(
            layer,
            sequence_R,
            position_R,
            row_RW[:, :width].view(len(row_RW), key.shape[1], key.shape[3]),
            row_RW[:, width:end].view(len(row_RW), value.shape[1], value.shape[3]),
        )

    def stand(self, sequence_R: Tensor, position_R: Tensor, limit: int) -> None:
        """The tokens of the next attention. limit: positions that any of them may see."""
        self._standing_R, self._position_R, self._limit = sequence_R, position_R, limit

    def update(self, key_states: Tensor, value_states: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        """What attention calls: [R, H, 1, d] of the new tokens in, [R, H, limit, d] of their sequences out."""
        self.write(layer, self._standing_R, self._position_R, key_states[:, :, 0], value_states[:, :, 0])
        row_R = self._standing_R - self.first
        return self._keys[layer][row_R, :, : self._limit], self._values[layer][row_R, :, : self._limit]


def visible(position_B: Tensor, limit: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, limit] to add to attention scores: zero for what a token at that position sees.

    window: how many positions back it sees, its own among them; None for all.
    """
    key_S = torch.arange(limit, device=position_B.device)
    seen_BS = key_S <= position_B[:, None]
    if window is not None:
        seen_BS &= key_S > position_B[:, None] - window
    hidden = torch.zeros(seen_BS.shape, dtype=dtype, device=position_B.device)
    return hidden.masked_fill(~seen_BS, torch.finfo(dtype).min)[:, None, None, :]


def prefill(
    decoder: Decoder, input_ids: Tensor, attention_mask: Tensor | None, new_tokens: int, settings: str
) -> DecodeState:
    """The state after the prompts; `Decoder.start` says more."""
    mesh, statistics = decoder.mesh, decoder.statistics
    failure: InputError | None = None
    length_b = torch.empty(0, dtype=torch.int64)
    try:
        length_b = _lengths(input_ids, attention_mask, new_tokens)
        check_tokens("input_ids", input_ids, decoder.parts.vocabulary)
    except InputError as error:
        failure = error
    check_consistent(mesh, "settings of decoding", f"{new_tokens} {settings}", failure)
    sizes = torch.tensor([len(length_b), int(length_b.sum())], device=mesh.device)
    count_G, context_G = gather(mesh.group, sizes).cpu().numpy().T
    total = int(count_G.sum())
    if not total:
        raise InputError("no rank has a prompt; give at least one of them input_ids of one row or more")
    first = int(count_G[: mesh.rank].sum())
    number_b = torch.arange(first, first + len(length_b), device=mesh.device)
    cache, logits_bV = _through_model(decoder, input_ids, attention_mask)
    token_b = logits_bV.argmax(dim=-1)
    own = torch.stack([number_b, length_b.to(mesh.device), token_b], dim=1)
    every = torch.cat([own, RowGather(mesh, statistics, "ids", own, count_G).finish()])
    _, position_B, token_B = every[every[:, 0].argsort()].unbind(dim=1)
    here, start = (total, 0) if decoder.holds_all else (len(length_b), first)
    context = Context(here, int(position_B.max()) + new_tokens, start)
    state = DecodeState(
        context,
        token_B,
        position_B,
        torch.ones_like(token_B, dtype=torch.bool),
        count_G,
        mesh.rank,
        logits_bV,
        number_b,
    )
    sequence_R = number_b.repeat_interleave(length_b.to(mesh.device))
    position_R = torch.cat([torch.arange(n, device=mesh.device) for n in [0, *length_b.tolist()]])
    column_R = position_R + (input_ids.shape[-1] - length_b.to(mesh.device))[sequence_R - first]
    shape_L4 = gather(mesh.group, _shapes(cache, len(decoder.parts.layers)).to(mesh.device)).amax(dim=0).tolist()
    for layer in decoder.parts.layers:
        context.allocate(layer.index, shape_L4[layer.index], logits_bV)
        if len(sequence_R):
            cached, row_R = cache.layers[layer.index], sequence_R - first
            key_RHd, value_RHd = cached.keys[row_R, :, column_R], cached.values[row_R, :, column_R]
            context.write(layer.index, sequence_R, position_R, key_RHd, value_RHd)
        if decoder.holds_all:
            row_RW = context.packed(layer.index, sequence_R, position_R)
            context.unpack(layer.index, RowGather(mesh, statistics, "context", row_RW, context_G).finish())
    return state


def _lengths(input_ids: Tensor, attention_mask: Tensor | None, new_tokens: int) -> Tensor:
    """[b] tokens of each prompt."""
    if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 1:
        raise InputError(f"new tokens ({new_tokens}) must be at least 1")
    if input_ids.ndim != 2:
        raise InputError(f"input_ids has shape {list(input_ids.shape)}, expected [prompts, tokens]")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise InputError(f"attention_mask has shape {list(mask.shape)}, input_ids {list(input_ids.shape)}")
    length_b = mask.bool().sum(dim=1)
    if len(length_b) and int(length_b.min()) < 1:
        raise InputError(f"prompt {int(length_b.argmin())} of this rank is empty; give every prompt a token at least")
    column = torch.arange(mask.shape[1], device=mask.device)
    if not torch.equal(mask.bool(), column >= mask.shape[1] - length_b[:, None]):
        raise InputError("attention_mask has zeros elsewhere than on the left; pad prompts on the left")
    return length_b


def check_tokens(name: str, token: Tensor, vocabulary: int) -> None:
    """Raises InputError for what is no token of the model: the rank alone would fail, and the others wait for it."""
    if token.dtype not in (torch.int64, torch.int32):
        raise InputError(f"{name} is {token.dtype}, expected whole numbers (torch.int64 or torch.int32)")
    wrong = token[(token < 0) | (token >= vocabulary)]
    if len(wrong):
        raise InputError(f"{name} has the token {int(wrong[0])}, the model's are 0 to {vocabulary - 1}")


def _through_model(decoder: Decoder, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Any, Tensor]:
    """(cache, [b, vocabulary] logits of each prompt's last token). A rank without prompts takes part in every layer."""
    from transformers import DynamicCache

    cache = DynamicCache()
    model: Any = decoder.model
    if not len(input_ids):
        weight = model.lm_head.weight
        for experts in decoder.parts.placed:
            none = weight.new_empty(0, experts.spec.top_k)
            experts(weight.new_empty(0, experts.spec.expert_input_size), none.long(), none)
        return cache, weight.new_empty(0, len(weight))
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=(mask.long().cumsum(dim=-1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
        **{decoder.parts.cache_name: cache},
    )
    return cache, output.logits[:, -1]


def _shapes(cache: Any, layers: int) -> Tensor:
    """[layers, 4] heads and width of keys, heads and width of values; zeros where nothing is held."""
    shape_L4 = torch.zeros(layers, 4, dtype=torch.int64)
    for row, cached in zip(shape_L4, cache.layers, strict=False):
        row[:] = torch.tensor([*cached.keys.shape[1::2], *cached.values.shape[1::2]])
    return shape_L4


FAMILIES = ("deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen3_moe")
"""Model types of Transformers that are known to be built as `DecoderParts` says."""

ATTENTION = ("eager", "sdpa")
"""Implementations of attention that take a mask of scores."""


@dataclass(frozen=True, eq=False)
class LayerParts:
    """x + attention(input_norm(x)), then x + feed-forward(output_norm(x)): `dense`, or router, experts and shared
    experts.

    index: in the model. window: positions that attention sees, None for all.
    """

    index: int
    input_norm: nn.Module
    attention: nn.Module
    window: int | None
    output_norm: nn.Module
    dense: nn.Module | None = None
    router: nn.Module | None = None
    experts: PlacedExperts | None = None
    shared: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class DecoderParts:
    """embed: token ids to the residual stream. rotate: (any tensor, position ids) to position embeddings. head: the
    residual stream to logits. cache_name: the argument of attention that takes the cache."""

    embed: Callable[[Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    layers: tuple[LayerParts, ...]
    head: Callable[[Tensor], Tensor]
    cache_name: str

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return len(cast(Any, self.embed).weight)

    @property
    def placed(self) -> tuple[PlacedExperts, ...]:
        return tuple(layer.experts for layer in self.layers if layer.experts is not None)

    @classmethod
    def of(cls, model: Any) -> DecoderParts:
        """model: passes `check_decoder`, and `parallelize` has been there."""
        inner = model.model
        attention = inner.layers[0].self_attn
        return cls(
            embed=inner.embed_tokens,
            rotate=inner.rotary_emb,
            layers=tuple(_layer(model.config, index, layer) for index, layer in enumerate(inner.layers)),
            head=lambda x: model.lm_head(inner.norm(x)),
            # Transformers 5 changed its name on the way.
            cache_name="cache" if "cache" in inspect.signature(attention.forward).parameters else "past_key_values",
        )


def check_decoder(model: nn.Module) -> None:
    """Raises unless the model can be run part by part, with all ranks' context, to the same logits.

    Raises:
        InputError: the model is in training mode.
        UnsupportedError: a family, attention implementation, position embedding or way of sending that is not known to
            fit.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if family not in FAMILIES or not hasattr(model, "lm_head"):
        raise UnsupportedError(
            f"{type(model).__name__} ({family}) cannot be decoded layer by layer; known are the causal language models "
            f"of {', '.join(FAMILIES)}. Use mp.parallelize and the model's own generate(synced_gpus=True)"
        )
    if model.training:
        raise InputError("the model is in training mode; call model.eval() before decoding")
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ATTENTION:
        raise UnsupportedError(
            f"attention implementation {implementation!r} takes no mask of scores; call "
            f"model.set_attn_implementation({ATTENTION[0]!r}) or ({ATTENTION[-1]!r})"
        )
    rope = getattr(model.get_submodule("model.rotary_emb"), "rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise UnsupportedError(
            f"position embeddings of type {rope!r} change with the longest sequence that a rank has seen, so ranks "
            "would differ; decode with mp.parallelize and the model's own generate(synced_gpus=True)"
        )


def check_no_compression(model: nn.Module) -> None:
    """Raises unless tokens travel whole: what was compressed needs the way back, which this mode does not have.

    Raises:
        UnsupportedError: a layer's tokens are sent by something else than plain all-to-alls.
    """
    for name, module in model.named_modules():
        if not isinstance(module, PlacedExperts):
            continue
        dispatcher = module.dispatcher
        if type(dispatcher) is not AllToAllDispatcher or dispatcher.quantized is not None:
            raise UnsupportedError(
                f"{name}: tokens are sent by {type(dispatcher).__name__}, compression={module.compression}; "
                "context-coherent execution sends them whole, since a compressed token is restored where it came from, "
                "and there it does not return. Use no compression and dispatch='flat' or 'node_aware', or decode with "
                "DispatchCombineDecoder"
            )


def _layer(config: Any, index: int, layer: Any) -> LayerParts:
    window = getattr(layer.self_attn, "sliding_window", getattr(config, "sliding_window", None))
    block = layer.mlp
    parts: dict[str, Any] = {"dense": block}
    if isinstance(block, ExpertParallelMoE):
        parts = {"router": block.gate, "experts": block.experts, "shared": block.shared_experts}
    elif isinstance(getattr(block, "experts", None), PlacedExperts):
        parts = {"router": block.router if hasattr(block, "router") else block.gate, "experts": block.experts}
    return LayerParts(index, layer.input_layernorm, layer.self_attn, window, layer.post_attention_layernorm, **parts)


class RowGather:
    """Rows of all ranks on every rank, different numbers from each, while other work goes on.

    On a mesh of two dimensions a row crosses to each other node once, and is handed on inside. Every rank calls
    `hand_on` and `finish` at the same points of its work.
    """

    def __init__(self, mesh: ExpertMesh, statistics: DecodeStatistics, part: str, row_RW: Tensor, count_G: IntArray):
        """row_RW: this rank's rows. count_G: [G] rows of every rank. part: of the statistics."""
        self._mesh, self._statistics, self._part = mesh, statistics, part
        self._stages = mesh.stages(mesh.nested)
        self._row_RW, self._count_G = row_RW, count_G
        self._parts = [row_RW[:0]]
        self._exchange: AsyncAllToAll | None = None
        self._launch()

    def hand_on(self) -> None:
        """Begins the second stage, if there is one that has not begun; waits for the first."""
        if self._stages:
            self._land()
            self._launch()

    def finish(self) -> Tensor:
        """[sum of the others' rows, W], in no promised order."""
        self.hand_on()
        self._land()
        return torch.cat(self._parts)

    def _launch(self) -> None:
        if not self._stages:  # one rank
            return
        group, devices, _ = self._stages.pop(0)
        row_RW = torch.cat([self._row_RW, *self._parts])
        others = devices != self._mesh.rank
        sent, received = np.where(others, len(row_RW), 0), np.where(others, self._count_G[devices], 0)
        self._exchange = AsyncAllToAll(group, sent.tolist(), received.tolist())
        self._exchange.start(row_RW.repeat(int(others.sum()), 1))
        self._statistics.sent(self._part, devices, sent, self._exchange.row_bytes)
        if self._stages:  # every rank now has the rows of the ranks of its place on all nodes
            node_size = self._mesh.node_size
            self._count_G = np.tile(self._count_G.reshape(-1, node_size).sum(axis=0), self._mesh.size // node_size)

    def _land(self) -> None:
        if self._exchange is not None:
            with self._statistics.timing(self._part):
                self._parts.append(self._exchange.wait()[0])
        self._exchange = None
