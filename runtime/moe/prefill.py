"""Prompts through the model, rank by rank, and their context to all ranks where the mode of decoding needs it.

b prompts of this rank, W columns, B prompts of all ranks, G ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...placement.errors import InputError
from .agreement import agree, gather
from .context import Context
from .decode_state import DecodeState
from .row_gather import RowGather

if TYPE_CHECKING:
    from .decoder import Decoder


def prefill(
    decoder: Decoder, input_ids: Tensor, attention_mask: Tensor | None, new_tokens: int, settings: str
) -> DecodeState:
    """The state after the prompts; `Decoder.start` says more."""
    mesh, statistics = decoder.mesh, decoder.statistics
    failure: InputError | None = None
    length_b = torch.empty(0, dtype=torch.int64)
    try:
        length_b = _lengths(input_ids, attention_mask, new_tokens)
    except InputError as error:
        failure = error
    agree(mesh, "settings of decoding", f"{new_tokens} {settings}", failure)
    told = gather(mesh, torch.tensor([len(length_b), int(length_b.sum())], device=mesh.device)).cpu().numpy()
    count_G, context_G = told[:, 0], told[:, 1]
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
    shape_L4 = gather(mesh, _shapes(cache, len(decoder.parts.layers)).to(mesh.device)).amax(dim=0).tolist()
    for layer in decoder.parts.layers:
        context.allocate(layer.index, shape_L4[layer.index], logits_bV)
        if len(sequence_R):
            kept = cache.layers[layer.index]
            row = sequence_R - first
            context.write(
                layer.index, sequence_R, position_R, kept.keys[row, :, column_R], kept.values[row, :, column_R]
            )
        if decoder.holds_all:
            row_RW = context.packed(layer.index, sequence_R, position_R)
            context.unpack(layer.index, RowGather(mesh, statistics, "context", row_RW, context_G).finish())
    return state


def _lengths(input_ids: Tensor, attention_mask: Tensor | None, new_tokens: int) -> Tensor:
    """[b] tokens of each prompt."""
    if new_tokens < 1:
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


def _through_model(decoder: Decoder, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Any, Tensor]:
    """(cache, [b, vocabulary] logits of each prompt's last token). A rank without prompts takes part in every layer."""
    from transformers import DynamicCache

    cache = DynamicCache()
    model: Any = decoder.model
    if not len(input_ids):
        weight = model.lm_head.weight
        for experts in decoder.parts.placed:
            none = weight.new_empty(0, experts.spec.top_k)
            experts(weight.new_empty(0, experts.spec.hidden_size), none.long(), none)
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
    for row, kept in zip(shape_L4, cache.layers, strict=False):
        row[:] = torch.tensor([*kept.keys.shape[1::2], *kept.values.shape[1::2]])
    return shape_L4
