"""What stands in the rows of a forward call: which sequences, how far they have been read, and what is padding."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..placement.errors import UnsupportedError
from .families import WRAPPERS

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

IntArray = npt.NDArray[np.int64]

CACHES = ("cache", "past_key_values")
"""What Transformers calls the KV cache, the newest name first: `cache` from 5.24 on."""

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Rows:
    """Sequences in the rows of a batch. number: [B], empty until numbered. seen: [B] tokens read of each so far."""

    count: int
    number: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    seen: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def __post_init__(self) -> None:
        if not len(self.seen):
            self.seen = np.zeros(self.count, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward call. width: positions a row, None where the input does not say it.

    mask: [B, width] true for real tokens, None when all are. position: [B or 1, width] as given to the model, or None.
    """

    rows: Rows
    width: int | None
    mask: Tensor | None = None
    position: Tensor | None = None

    def width_of(self, tokens: int, layer: str) -> int:
        """Positions a row when `layer` routed `tokens` tokens.

        Raises:
            UnsupportedError: the tokens are not the batch's positions row by row, so they cannot be told apart.
        """
        width = tokens // max(self.rows.count, 1) if self.width is None else self.width
        if self.rows.count * width != tokens:
            raise UnsupportedError(
                f"{layer} routed {tokens} tokens in a batch of {self.rows.count} rows"
                + (f" of {self.width}" if self.width is not None else "")
                + "; recording needs every position of every row, row by row"
            )
        return width


class BatchReader:
    """Reads batches off the arguments of a model's forward, and follows sequences through their KV caches.

    Each row of a forward is a sequence. Where a forward is given a KV cache that is already filled, its rows go on
    being the sequences that filled it.
    """

    def __init__(self, model: Module) -> None:
        self._signature = _signature(model)
        self._of_cache: MutableMapping[Any, Rows] = weakref.WeakKeyDictionary()
        self._warned = False

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
        """The batch a forward is about to run on."""
        given = self._arguments(args, kwargs)
        count, width = _shape(given)
        cache = _cache_of(given.get)
        past = _cache_length(cache)
        rows = self._of_cache.get(cache) if past and _referable(cache) else None
        if rows is None or rows.count != count:
            rows = Rows(count, seen=np.full(count, past, dtype=np.int64))
            if _referable(cache):
                self._of_cache[cache] = rows
        position = given.get("position_ids")
        if position is not None:
            # A copy: decoding loops write the next positions over these, perhaps before a thread has read them.
            position = position.detach().clone() if position.ndim == 2 and position.shape[1] == width else None
        return Batch(rows, width, self._mask(given.get("attention_mask"), width, past), position)

    def finish(self, batch: Batch, output: Any) -> None:
        """Notes a KV cache that the forward made itself, so that calls which continue it are known."""
        if isinstance(output, tuple):
            cache = next((part for part in output if hasattr(part, "get_seq_length")), None)
        elif isinstance(output, Mapping):
            # A plain copy: asking Transformers' own for a deprecated name warns the user of what is not his.
            cache = _cache_of(dict(output).get)
        else:
            cache = _cache_of(lambda name: getattr(output, name, None))
        if cache is not None and _referable(cache):
            self._of_cache[cache] = batch.rows

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        if not args:
            return kwargs
        try:
            bound = self._signature.bind_partial(*args, **kwargs).arguments
        except TypeError:
            return kwargs  # the forward itself is about to say what is wrong
        given: dict[str, Any] = {}
        for name, value in bound.items():
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                given.update(value)
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                given.update({f"{name}[{i}]": item for i, item in enumerate(value)})
            else:
                given[name] = value
        return given

    def _mask(self, mask: Any, width: int | None, past: int) -> Tensor | None:
        """[B, width] real tokens. A 4-D mask (queries by keys) tells padding on its diagonal: nothing attends to it."""
        import torch

        if isinstance(mask, Mapping):
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if mask is None or width is None:
            return None
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= width:
            first = past if mask.shape[1] >= past + width else mask.shape[1] - width
            return mask[:, first if mask.shape[1] > width else 0 :][:, :width] != 0
        if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[2] == width <= mask.shape[3]:
            offset = past if mask.shape[3] >= past + width else mask.shape[3] - width
            diagonal = torch.diagonal(mask[:, 0], offset=offset, dim1=-2, dim2=-1)[:, :width]
            return diagonal == 0 if mask.is_floating_point() else diagonal != 0
        if not self._warned:
            self._warned = True
            shape = f"shape {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
            logger.warning("attention_mask (%s) does not tell padding from tokens; all positions are recorded", shape)
        return None


def _signature(model: Module) -> inspect.Signature:
    """Of the model's forward; of what it wraps where the wrapper takes anything."""
    signature = inspect.signature(model.forward)
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
        for name in WRAPPERS:
            inner: Any = getattr(model, name, None)
            if callable(getattr(inner, "forward", None)):
                return _signature(inner)
    return signature


def _shape(given: Mapping[str, Any]) -> tuple[int, int | None]:
    """(rows, positions a row) of the model's input.

    Token ids are [B, S] or [S], embeddings [B, S, H]. Other input has its rows in front, and their width shows when
    tokens are routed (an image becomes patches): a matrix of floats is one token a row.
    """
    import torch

    first = next((given[n] for n in ("input_ids", "inputs_embeds") if given.get(n) is not None), None)
    named = first is not None
    if first is None:
        first = next((value for value in given.values() if isinstance(value, torch.Tensor) and value.ndim), None)
    if first is None:
        return 1, None
    if not first.is_floating_point():
        return (1, int(first.shape[0])) if first.ndim == 1 else (int(first.shape[0]), int(first.shape[1]))
    mask = given.get("attention_mask")
    masked = isinstance(mask, torch.Tensor) and first.ndim == 3 and mask.shape == first.shape[:2]
    return int(first.shape[0]), int(first.shape[1]) if named or masked else None


def _cache_of(get: Callable[[str], Any]) -> Any:
    """The KV cache among arguments or outputs."""
    return next((cache for cache in map(get, CACHES) if cache is not None), None)


def _cache_length(cache: Any) -> int:
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if isinstance(cache, tuple | list) and cache else 0


def _referable(cache: Any) -> bool:
    return cache is not None and not isinstance(cache, tuple | list)


@dataclass(frozen=True)
class Placed:
    """The real tokens of a batch. index: [n] positions among the B * width. sequence, position: [n]."""

    index: IntArray
    sequence: IntArray
    position: IntArray


class SequenceBook:
    """Numbers sequences in the order they are seen."""

    def __init__(self) -> None:
        self._next = 0

    def number_rows(self, rows: Rows) -> IntArray:
        """[B] the number of each row's sequence; rows seen for the first time get new ones."""
        if not len(rows.number):
            rows.number = self._take(rows.count)
        return rows.number

    def place(
        self, rows: Rows, width: int, mask: npt.NDArray[np.bool_] | None, position: npt.NDArray[Any] | None
    ) -> Placed:
        """The real tokens of a batch, numbered, and the rows moved on.

        In new rows, positions that start again (packed sequences) start a new sequence.
        """
        shape = (rows.count, width)
        keep = np.ones(shape, dtype=np.bool_) if mask is None else np.broadcast_to(mask, shape)
        index = np.flatnonzero(keep)
        row = index // max(width, 1)
        if position is None:
            where = (np.cumsum(keep, axis=1) - 1 + rows.seen[:, None]).reshape(-1)[index]
        else:
            where = np.broadcast_to(position, shape).reshape(-1)[index].astype(np.int64)
        if len(rows.number):
            sequence = rows.number[row]
        else:
            first = np.ones(len(index), dtype=np.bool_)
            first[1:] = (row[1:] != row[:-1]) | (where[1:] <= where[:-1])
            sequence = self._take(int(first.sum()))[np.cumsum(first) - 1] if len(index) else index
            # A row that is all padding so far has a sequence too: its tokens may come with the next call.
            rows.number = np.full(rows.count, -1, dtype=np.int64)
            rows.number[row] = sequence
            empty = np.flatnonzero(rows.number < 0)
            rows.number[empty] = self._take(len(empty))
        rows.seen = rows.seen + keep.sum(axis=1)
        return Placed(index, sequence, where)

    def _take(self, count: int) -> IntArray:
        self._next += count
        return np.arange(self._next - count, self._next, dtype=np.int64)


def sampled(sequence: IntArray, fraction: float, salt: int) -> npt.NDArray[np.bool_]:
    """Whether each sequence number falls into the sample: a hash of it, so the same on every run (SplitMix64)."""
    with np.errstate(over="ignore"):
        z = sequence.astype(np.uint64) + np.uint64(salt << 40) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    unit: npt.NDArray[np.float64] = (z ^ (z >> np.uint64(31))) / 2.0**64
    return unit < fraction
