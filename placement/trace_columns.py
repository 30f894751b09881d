"""Checks and conversions of the columns a trace is built from."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError


def check_ids(ids: npt.NDArray[Any], num_experts: int, moe_layers: tuple[int, ...]) -> None:
    """Refuses ids outside 0..num_experts-1 and tokens with an expert twice, naming the first token and layer."""
    if not 1 <= num_experts <= 65536:
        raise InputError(f"num_experts ({num_experts}) must be between 1 and 65536")
    if not ids.size:
        return
    if int(ids.min()) < 0 or int(ids.max()) >= num_experts:
        token, layer, rank = (int(i) for i in np.argwhere((ids < 0) | (ids >= num_experts))[0])
        raise InputError(
            f"expert_ids[{token}, {layer}, {rank}] (model layer {moe_layers[layer]}) is {ids[token, layer, rank]}; "
            f"ids must be from 0 to {num_experts - 1} (num_experts is {num_experts})"
        )
    if ids.shape[2] > 1:
        ordered = np.sort(ids, axis=2)
        twice = (ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=2)
        if twice.any():
            token, layer = (int(i) for i in np.argwhere(twice)[0])
            raise InputError(
                f"token {token} chose the same expert twice in model layer {moe_layers[layer]}: "
                f"{ids[token, layer].tolist()}; a token's experts must differ"
            )


def column(name: str, values: npt.ArrayLike | None, tokens: int) -> npt.NDArray[np.int64] | None:
    """[T] whole numbers, one a token, or None."""
    if values is None:
        return None
    given = np.asarray(values)
    if given.shape != (tokens,) or not np.issubdtype(given.dtype, np.integer):
        raise InputError(f"{name} must be {tokens} integers, one a token; given {given.dtype} {given.shape}")
    if given.dtype == np.uint64 and tokens and int(given.max()) >= 1 << 63:
        raise InputError(f"{name} holds {int(given.max())}, more than a 64-bit signed integer")
    return np.array(given, dtype=np.int64)


def workload_codes(workload: Any, tokens: int) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Names in order, and each token's index into them."""
    if workload is None:
        return ("",), np.zeros(tokens, np.int64)
    tags = np.asarray(workload)
    if tags.shape != (tokens,):
        raise InputError(f"workload must be {tokens} tags, one a token; given shape {tags.shape}")
    names, codes = np.unique(tags.astype(str), return_inverse=True)
    return tuple(str(name) for name in names) or ("",), codes.astype(np.int64)


def order_within(sequence: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[T] how many tokens of the same sequence came before."""
    order = np.argsort(sequence, kind="stable")
    ordered = sequence[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(ordered) else ordered
    lengths = np.diff(np.append(starts, len(ordered)))
    position = np.empty(len(ordered), dtype=np.int64)
    position[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return position


def frozen(array: Any) -> Any:
    """The array, no longer writable."""
    if array is not None:
        array.flags.writeable = False
    return array
