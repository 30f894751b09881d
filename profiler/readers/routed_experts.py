"""Routed experts that vLLM and SGLang return with a request (--enable-return-routed-experts).

A saved array (.npy, .npz) or saved responses (JSON, one, a list, or one a line). vLLM returns .npy bytes in base64, or
lists in older releases; SGLang returns int32 values in base64, [tokens, num_hidden_layers, top_k], without saying the
shape.
Sources: vllm/entrypoints/openai/chat_completion/protocol.py, sglang/srt/state_capturer/routed_experts.py.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ...placement.errors import FileFormatError
from ...placement.trace import RoutingTrace, id_dtype
from ..files import NPY_MAGIC, Source, json_items, name_of, path_or_file, reading
from .arrays import (
    MOST_EXPERTS,
    ROUTED,
    Ids,
    check_axes,
    fused_shared,
    holds_arrays,
    is_filled,
    npy_array,
    npy_file,
    npz_arrays,
)
from .engine_counts import left_out, remark, set_apart, trace_of, without_shared

PROMPT = f"prompt_{ROUTED}"
ROLLOUT = f"rollout_{ROUTED}"
"""What trainers of reinforcement learning (slime, Miles) call them in a sample."""
DEPTH = 3
"""Objects inside one another in which routed experts are looked for."""
LOOKED_AT = 1 << 24
RESPONSE_LIMIT = 1 << 28
ROWS = 1 << 14
TOLD_BY = 10_000
"""Ids that must be there before the number of layers and experts a token is read off them."""


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence. ids: [T, L, K], or [N] where the shape was not said. first: position of the first."""

    field: str
    ids: Ids
    sequence: int
    first: int = 0


def is_routed_experts(path: Path) -> bool:
    """Whether `path` holds such arrays, or responses with them."""
    if not path.is_file():
        return False
    if holds_arrays(path):
        return True
    with path.open("rb") as handle:
        start = handle.read(min(LOOKED_AT, path.stat().st_size))
    named = any(f'"{name}"'.encode() in start for name in (ROUTED, PROMPT, ROLLOUT))
    return named and start.lstrip()[:1] in (b"{", b"[")


def read_routed_experts(
    path: Source, *, layers: int | None = None, top_k: int | None = None, num_experts: int | None = None
) -> RoutingTrace:
    """Reads the routing of requests: each array or choice a sequence, a prompt's array before its answer's.

    layers, top_k: the shape of SGLang's values. Without them it is found where enough ids are there: the tokens come
    from `meta_info`, and k is the largest for which no token has an expert twice in a layer. num_experts: without it
    the highest expert seen is the last. Dense layers (zeros everywhere) are dropped, the others keep their absolute
    indices; tokens of a cached prefix (-1) and tokens never captured (zeros) are dropped, positions stay. Experts come
    in the engine's order, without weights.

    Raises:
        InputError: no such file. FileFormatError: no such record, damaged, requests of different models, axes in
            another order, or a shape that cannot be told: pass it.
    """
    source = path_or_file(path)
    name = name_of(source)
    with reading(source) as handle:
        start = handle.read(len(NPY_MAGIC))
    if start == NPY_MAGIC:
        pieces = [Piece("array", npy_file(source), 0)]
    elif start.startswith(b"PK"):
        pieces = list(_saved(npz_arrays(source)))
    else:
        pieces = _responses(source, layers, top_k)
    pieces = [piece for piece in pieces if len(piece.ids)]
    if not pieces:
        raise FileFormatError(
            f"{name}: no routed experts in it; enable them in the engine and ask for them in the request"
        )
    if start == NPY_MAGIC or start.startswith(b"PK"):
        for piece in pieces:
            check_axes(name, piece.ids)
    return _trace(name, pieces, num_experts)


def _saved(arrays: dict[str, Ids]) -> Iterator[Piece]:
    """Arrays of an .npz: `X_prompt_routed_experts` goes before `X_routed_experts`, any other is a sequence."""
    number = 0
    for name, ids in arrays.items():
        if name.endswith(PROMPT):
            continue
        prompt = arrays.get(name.removesuffix(ROUTED) + PROMPT) if name.endswith(ROUTED) else None
        if prompt is not None:
            yield Piece(name.removesuffix(ROUTED) + PROMPT, prompt, number)
        yield Piece(name, ids, number, 0 if prompt is None else len(prompt))
        number += 1
    for name, ids in arrays.items():
        if name.endswith(PROMPT) and name.removesuffix(PROMPT) + ROUTED not in arrays:
            yield Piece(name, ids, number)
            number += 1


def _responses(path: Path | BinaryIO, layers: int | None, top_k: int | None) -> list[Piece]:
    source = name_of(path)
    pieces: list[Piece] = []
    shapeless: list[tuple[Piece, int | None]] = []
    with reading(path) as handle:
        listed = handle.read(1 << 12).lstrip()[:1] == b"["
        handle.seek(0)
        for number, response in enumerate(json_items(handle, source, "item" if listed else "", RESPONSE_LIMIT)):
            for piece, tokens in _choices(source, f"response {number}", response, len(pieces) + len(shapeless)):
                if piece.ids.ndim == 1:
                    shapeless.append((piece, tokens))
                else:
                    pieces.append(piece)
    if shapeless and pieces:
        raise FileFormatError(f"{source}: {shapeless[0][0].field} has no shape, {pieces[0].field} has; of two engines")
    if shapeless and (layers is None or top_k is None):
        layers, top_k = _shape(source, shapeless)
    others: list[str] = []
    for piece, tokens in shapeless:
        assert layers is not None
        assert top_k is not None
        if layers < 1 or top_k < 1 or len(piece.ids) % (layers * top_k):
            raise FileFormatError(
                f"{source}: {piece.field} holds {len(piece.ids)} ids, not a multiple of {layers} layers x {top_k} "
                "experts"
            )
        pieces.append(Piece(piece.field, piece.ids.reshape(-1, layers, top_k), piece.sequence))
        if tokens is not None and len(pieces[-1].ids) != tokens:
            others.append(f"{piece.field} has {len(pieces[-1].ids):,} tokens, its meta_info speaks of {tokens:,}")
    if others:
        remark(
            f"{source}: {others[0]} ({len(others)} of {len(shapeless)} are such): are {layers} layers x {top_k} "
            "experts the model's?"
        )
    return pieces


def _choices(source: str, where: str, response: Any, sequence: int) -> Iterator[tuple[Piece, int | None]]:
    """The arrays of one response, and how many tokens each should have where that is said."""
    if not isinstance(response, dict):
        raise FileFormatError(f"{source}: {where} is a JSON {type(response).__name__}, expected an object")
    for place, holder, prompt in _holders(source, where, response, None):
        if prompt is not None and holder.get(PROMPT) is not None:
            yield Piece(f"{place}.{PROMPT}", prompt, sequence), None
        names = [name for name in (ROUTED, ROLLOUT) if holder.get(name) is not None]
        for name in names[:1]:
            ids = _decoded(source, f"{place}.{name}", holder[name])
            assert ids is not None
            yield Piece(f"{place}.{name}", ids, sequence, 0 if prompt is None else len(prompt)), _tokens(holder)
            sequence += 1


def _holders(
    source: str, place: str, holder: dict[str, Any], prompt: Ids | None, depth: int = 0
) -> Iterator[tuple[str, dict[str, Any], Ids | None]]:
    """(place, object, routing of the prompt) of objects that may hold routed experts: the response, and those in it,
    as choices, meta_info, or the samples of a rollout."""
    mine = _decoded(source, f"{place}.{PROMPT}", holder.get(PROMPT))
    prompt = prompt if mine is None else mine
    yield place, holder, prompt
    if depth == DEPTH:
        return
    for name, value in holder.items():
        listed = value if isinstance(value, list) else [value]
        for number, inner in enumerate(listed):
            if isinstance(inner, dict):
                at = f"{place}.{name[:40]}[{number}]" if isinstance(value, list) else f"{place}.{name[:40]}"
                yield from _holders(source, at, inner, prompt, depth + 1)


def _tokens(holder: dict[str, Any]) -> int | None:
    """Tokens SGLang returns: all of prompt and answer but the last, which was never forwarded."""
    counts = [holder.get("prompt_tokens"), holder.get("completion_tokens")]
    known = [count for count in counts if type(count) is int and count >= 0]
    return sum(known) - 1 if len(known) == 2 else None


def _decoded(source: str, field: str, value: Any) -> Ids | None:
    if value is None:
        return None
    if isinstance(value, str):
        return _base64_array(source, field, value)
    if not isinstance(value, list) or not all(isinstance(token, list) for token in value):
        raise FileFormatError(f"{source}: {field} is neither base64 text nor a list [tokens][layers][top_k]")
    layers = len(value[0]) if value else 0
    width = len(value[0][0]) if layers and isinstance(value[0][0], list) else 0
    if not all(
        len(token) == layers and all(isinstance(row, list) and len(row) == width for row in token) for token in value
    ) or not all(type(e) is int and -1 <= e < MOST_EXPERTS for token in value for row in token for e in row):
        raise FileFormatError(f"{source}: {field} is not a list [tokens][layers][top_k] of expert ids")
    return np.array(value, np.int32).reshape(len(value), layers, width)


def _shape(source: str, pieces: list[tuple[Piece, int | None]]) -> tuple[int, int]:
    """(layers, k) of values whose shape is not said."""
    ask = f"{source}: SGLang's values do not say their shape; pass layers (num_hidden_layers) and top_k"
    widths = {len(piece.ids) / tokens for piece, tokens in pieces if tokens}
    ids = np.concatenate([piece.ids for piece, tokens in pieces if tokens] or [np.empty(0, np.int32)])
    if len(widths) != 1 or not (width := widths.pop()).is_integer() or width < 1 or len(ids) < TOLD_BY:
        raise FileFormatError(f"{ask} (meta_info tells the tokens of too few ids, or not one width)")
    for top_k in range(min(int(width), 64), 0, -1):
        if width % top_k == 0:
            layers = int(width) // top_k
            if is_filled(ids.reshape(-1, layers, top_k)).all():
                return layers, top_k
    raise FileFormatError(ask)


def _base64_array(source: str, field: str, text: str) -> Ids:
    """[T, L, K] of vLLM's base64 .npy, or [N] int32 of SGLang's, which says no shape."""
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise FileFormatError(f"{source}: {field} is not base64 ({error})") from None
    if content.startswith(NPY_MAGIC):
        return npy_array(source, field, content)
    if len(content) % 4:
        raise FileFormatError(f"{source}: {field} holds {len(content)} bytes, expected .npy bytes or int32 values")
    return np.frombuffer(content, "<i4")


def _trace(source: str, pieces: list[Piece], num_experts: int | None) -> RoutingTrace:
    shapes = {piece.ids.shape[1:] for piece in pieces}
    if len(shapes) > 1 or 0 in next(iter(shapes)):
        raise FileFormatError(f"{source}: [layers, top_k] are {sorted(shapes)}, expected one shape of a model")
    shared = fused_shared([piece.ids for piece in pieces], num_experts)
    if shared:
        limit = num_experts or max(int(piece.ids.max()) for piece in pieces) + 1 - shared
        remark(set_apart(source, shared, limit))
        pieces = [replace(piece, ids=without_shared(piece.ids, limit, shared)) for piece in pieces]
    for piece in pieces:
        low, high = int(piece.ids.min()), int(piece.ids.max())
        if low < -1 or high >= (num_experts or MOST_EXPERTS):
            raise FileFormatError(
                f"{source}: {piece.field} holds ids from {low} to {high}, expected -1 or 0 to "
                f"{(num_experts or MOST_EXPERTS) - 1}"
            )
    blocks = [(piece, start) for piece in pieces for start in range(0, len(piece.ids), ROWS)]
    seen = np.zeros(next(iter(shapes))[0], np.bool_)
    for piece, start in blocks:
        seen |= (piece.ids[start : start + ROWS] > 0).any(axis=(0, 2))
    used = np.flatnonzero(seen)
    experts = num_experts or max(int(piece.ids.max()) for piece in pieces) + 1
    columns: dict[str, list[npt.NDArray[Any]]] = {"ids": [], "sequence": [], "position": []}
    partial = absent = 0
    for piece, start in blocks:
        ids = piece.ids[start : start + ROWS, used]
        blank = np.asarray((ids < 0).any(axis=2))
        if ids.shape[2] > 1:
            blank = blank | np.asarray((ids == 0).all(axis=2))
        whole = np.flatnonzero(~blank.any(axis=1))
        absent += int(blank.all(axis=1).sum())
        partial += len(ids) - len(whole) - int(blank.all(axis=1).sum())
        columns["ids"].append(ids[whole].astype(id_dtype(experts)))
        columns["sequence"].append(np.full(len(whole), piece.sequence, np.int64))
        columns["position"].append(whole + start + piece.first)
    joined: dict[str, Any] = {name: np.concatenate(parts) for name, parts in columns.items()}
    total = sum(len(piece.ids) for piece in pieces)
    if partial:
        remark(f"{source}: {left_out(partial, total)}")
    if absent:
        remark(f"{source}: {absent:,} of {total:,} tokens were cached or never captured, and are left out")
    if not len(used) or not len(joined["ids"]):
        raise FileFormatError(
            f"{source}: no token with an expert in each layer; all were cached, or nothing was captured"
        )
    return trace_of(source, joined, experts, used)
