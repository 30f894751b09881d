"""Hooks on a model: every forward call of it is a step, and what its routers choose in between is recorded."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._types import BoolArray, FloatArray, IntArray
from ..placement.errors import InputError, UnsupportedError
from .families import WRAPPERS, RouterSite

if TYPE_CHECKING:
    from torch import Tensor, dtype
    from torch.nn import Module

CACHES = ("cache", "past_key_values")
"""What Transformers calls the KV cache, the newest name first: `cache` from 5.24 on."""

logger = logging.getLogger(__name__)


# What stands in the rows of a forward call: which sequences, how far they have been read, and what is padding.


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

    decoder: of a model with an encoder as well, which is given arguments of its own for the decoder.

    Each row of a forward is a sequence. Where a forward is given a KV cache that is already filled, its rows go on
    being the sequences that filled it.
    """

    def __init__(self, model: Module, decoder: bool = False) -> None:
        self._signature = _signature(model)
        self._decoder = decoder
        # megatron-core's boolean masks are true where attention is not.
        self._forbids = any(type(part).__module__.startswith("megatron.core.") for part in model.modules())
        self._of_cache: MutableMapping[Any, Rows] = weakref.WeakKeyDictionary()
        self._warned = False

    def read(self, module: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
        """The batch a forward of `module` is about to run on."""
        arguments = self._arguments(args, kwargs)
        if self._decoder and "decoder_input_ids" in _signature(module).parameters:
            arguments = _decoder_arguments(arguments)
        count, width = _shape(arguments)
        cache = _cache_of(arguments.get)
        past = _cache_length(cache)
        rows = self._of_cache.get(cache) if past and _referable(cache) else None
        if rows is None or rows.count != count:
            rows = Rows(count, seen=np.full(count, past, dtype=np.int64))
            if _referable(cache):
                self._of_cache[cache] = rows
        position = arguments.get("position_ids")
        if position is not None:
            # A copy: decoding loops write the next positions over these, perhaps before a thread has read them.
            position = position.detach().clone() if position.ndim == 2 and position.shape[1] == width else None
        return Batch(rows, width, self._mask(arguments.get("attention_mask"), width, past), position)

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
        arguments: dict[str, Any] = {}
        for name, value in bound.items():
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(value)
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                arguments.update({f"{name}[{i}]": item for i, item in enumerate(value)})
            else:
                arguments[name] = value
        return arguments

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
            return diagonal == 0 if mask.is_floating_point() or self._forbids else diagonal != 0
        if not self._warned:
            self._warned = True
            shape = f"shape {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
            logger.warning("attention_mask (%s) does not tell padding from tokens; all positions are recorded", shape)
        return None


def _decoder_arguments(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a model's decoder is given, under the names of a model of one part."""
    own = {name.removeprefix("decoder_"): value for name, value in arguments.items() if name.startswith("decoder_")}
    own |= {name: arguments[name] for name in CACHES if name in arguments}
    if own.get("input_ids") is None and own.get("inputs_embeds") is None:
        # Labels shifted by one; else what the decoder reads is made in the forward, and has as many rows.
        rows = next((value for name, value in arguments.items() if name in ("input_ids", "inputs_embeds")), None)
        own["input_ids"] = arguments.get("labels")
        if own["input_ids"] is None and rows is not None:
            own |= {"": rows[:, :1].float().reshape(len(rows), -1)}
    return own


def _signature(model: Module) -> inspect.Signature:
    """Of the model's forward; of what it wraps where the wrapper takes anything."""
    signature = inspect.signature(model.forward)
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
        for name in WRAPPERS:
            inner: Any = getattr(model, name, None)
            if callable(getattr(inner, "forward", None)):
                return _signature(inner)
    return signature


def _shape(arguments: Mapping[str, Any]) -> tuple[int, int | None]:
    """(rows, positions a row) of the model's input.

    Token ids are [B, S] or [S], embeddings [B, S, H]. Other input has its rows in front, and their width shows when
    tokens are routed (an image becomes patches): a matrix of floats is one token a row.
    """
    import torch

    first = next((arguments[n] for n in ("input_ids", "inputs_embeds") if arguments.get(n) is not None), None)
    named = first is not None
    if first is None:
        first = next((value for value in arguments.values() if isinstance(value, torch.Tensor) and value.ndim), None)
    if first is None:
        return 1, None
    if not first.is_floating_point():
        return (1, int(first.shape[0])) if first.ndim == 1 else (int(first.shape[0]), int(first.shape[1]))
    mask = arguments.get("attention_mask")
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

    def place(self, rows: Rows, width: int, mask: BoolArray | None, position: npt.NDArray[Any] | None) -> Placed:
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


def sampled(sequence: IntArray, fraction: float, salt: int) -> BoolArray:
    """Whether each sequence number falls into the sample: a hash of it, so the same on every run (SplitMix64)."""
    with np.errstate(over="ignore"):
        z = sequence.astype(np.uint64) + np.uint64(salt << 40) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    unit: FloatArray = (z ^ (z >> np.uint64(31))) / 2.0**64
    return unit < fraction


# The routing of one forward call, gathered layer by layer on the device it was computed on.


@dataclass(frozen=True, eq=False)
class Step:
    """One whole forward call. expert_ids: [L, T, k] int16 or int32. gate_weights: [L, T, k] or None.

    routed: which layers routed at all.
    """

    number: int
    workload: str
    batch: Batch
    width: int
    expert_ids: Tensor
    gate_weights: Tensor | None
    routed: tuple[bool, ...]


def narrow_dtype(num_experts: int) -> dtype:
    """A narrow type in which an id that is no expert (-1, num_experts) still shows as what it was."""
    import torch

    return torch.int16 if num_experts < 1 << 15 else torch.int32


class StepRouting:
    """Fills up with the routing of one forward call.

    again: what layers routed when they ran a second time in it, as in models that loop over their layers.
    """

    def __init__(self, sites: Sequence[RouterSite], batch: Batch, *, keep_weights: bool) -> None:
        self.batch = batch
        self._sites, self._keep_weights = sites, keep_weights
        self._ids: Tensor | None = None
        self._weights: Tensor | None = None
        self.filled = [0] * len(sites)
        self.again: StepRouting | None = None

    def add(self, slot: int, ids: Tensor, weights: Tensor | None) -> None:
        """Copies what layer `slot` routed: ids and weights [..., k]. A layer may route its tokens in several calls."""
        import torch

        ids = ids.reshape(-1, ids.shape[-1])
        tokens = len(ids)
        if self._ids is None:
            total = self._expected(tokens, slot)
            shape = (len(self._sites), total, ids.shape[-1])
            self._ids = torch.empty(shape, dtype=narrow_dtype(self._sites[0].num_experts), device=ids.device)
            if weights is not None and self._keep_weights:
                self._weights = torch.empty(shape, dtype=torch.float16, device=ids.device)
        start = self.filled[slot]
        if tokens and start == self._ids.shape[1]:
            self.again = self.again or StepRouting(self._sites, self.batch, keep_weights=self._keep_weights)
            self.again.add(slot, ids, weights)
            return
        if start + tokens > self._ids.shape[1] or ids.shape[-1] != self._ids.shape[-1]:
            raise UnsupportedError(
                f"{self._sites[slot].name} routed {start + tokens} tokens to {ids.shape[-1]} experts each, other "
                f"layers of this forward {self._ids.shape[1]} to {self._ids.shape[-1]}; a trace needs the same of "
                "every layer"
            )
        self._ids[slot, start : start + tokens].copy_(ids, non_blocking=True)
        if self._weights is not None:
            if weights is None or weights.numel() != ids.numel():
                arguments = "no gate weights" if weights is None else f"gate weights of shape {list(weights.shape)}"
                raise InputError(f"{self._sites[slot].name}: {arguments} beside expert ids of shape {list(ids.shape)}")
            self._weights[slot, start : start + tokens].copy_(weights.detach().reshape(ids.shape), non_blocking=True)
        self.filled[slot] = start + tokens

    def _expected(self, tokens: int, slot: int) -> int:
        width = self.batch.width
        if width is not None and tokens < self.batch.rows.count * width:
            return self.batch.rows.count * width
        return tokens

    def finish(self, number: int, workload: str) -> Step | None:
        """The step, or None when no layer routed.

        Raises:
            UnsupportedError: a layer routed only a part of the batch.
        """
        if self._ids is None:
            return None
        total = self._ids.shape[1]
        for site, filled in zip(self._sites, self.filled, strict=True):
            if filled not in (0, total):
                raise UnsupportedError(
                    f"{site.name} routed {filled} of the {total} tokens of this forward; recording needs every position"
                )
        width = self.batch.width_of(total, self._sites[0].name)
        routed = tuple(filled > 0 for filled in self.filled)
        return Step(number, workload, self.batch, width, self._ids, self._weights, routed)

    @property
    def complete(self) -> bool:
        return self._ids is not None and all(filled == self._ids.shape[1] for filled in self.filled)


# Recording from inside torch.compile: an operator the compiler neither looks into nor drops. A hook registered on a
# module is traced into the graph when its caller is compiled, and Python side effects of traced code are lost or
# break the graph. The hook therefore calls an operator declared to change a tensor (a token of one number): it stays
# in the graph, in order, `fullgraph=True` included, and CUDA graphs are split around it.


Route = Callable[[int, "Tensor", "Tensor | None"], None]

_LISTENERS: dict[int, Route] = {}
"""Compiled graphs outlive recorders and hold a number, not a reference; a number without a listener does nothing."""


@functools.cache
def record_operator() -> Any:
    """The operator `moeplace::record(token!, ids, weights, listener, slot)`, defined on first use."""
    import torch

    def record(token: Tensor, ids: Tensor, weights: Tensor | None, listener: int, slot: int) -> None:
        listen = _LISTENERS.get(listener)
        if listen is not None:
            listen(slot, ids, weights)

    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    return torch.library.custom_op(
        "moeplace::record",
        record,
        mutates_args={"token"},
        schema="(Tensor(a!) token, Tensor ids, Tensor? weights, int listener, int slot) -> ()",
        **({"tags": (unsafe,)} if unsafe is not None else {}),
    )


def listen(route: Route) -> int:
    """Makes `route` hear what the operator is given under the number returned."""
    number = max(_LISTENERS, default=0) + 1
    _LISTENERS[number] = route
    return number


def unlisten(number: int) -> None:
    """Ends what `listen` began."""
    _LISTENERS.pop(number, None)


def compiled_parts(model: Module) -> list[Module]:
    """Modules of `model` that were given to torch.compile, themselves or through their `compile` method."""
    if "torch._dynamo" not in sys.modules:
        return []
    import torch

    optimized = torch._dynamo.OptimizedModule
    return [
        module
        for module in model.modules()
        if isinstance(module, optimized)
        or getattr(module, "_compiled_call_impl", None) is not None
        or "_compiled_call" in module.__dict__
    ]


def recompile() -> None:
    """Drops compiled code: it was compiled with the hooks of that moment, and does not look for others."""
    import torch

    torch.compiler.reset()


class ForwardHooks:
    """Watches `model` from `attach` to `detach` and hands each forward call's routing to `deliver`.

    Compiled models (torch.compile(model), model.compile(), compiled parts) are compiled anew with the hooks inside, and
    once more without them afterwards. Activation checkpointing runs layers a second time, in backward: a forward is
    recorded from its beginning to its end, and never while gradients are computed.
    """

    def __init__(
        self,
        model: Module,
        sites: Sequence[RouterSite],
        deliver: Callable[[Step], None],
        workload: Callable[[], str],
        *,
        every_layer: bool,
        keep_weights: bool,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self._model, self._sites, self._deliver, self._workload = model, sites, deliver, workload
        self._every_layer, self._keep_weights = every_layer, keep_weights
        self._on_error, self._failed = on_error, False
        self._reader = BatchReader(model, decoder=all(site.in_decoder for site in sites))
        self._open: StepRouting | None = None
        self._owner: Module | None = None
        self._undo: list[Callable[[], object]] = []
        self._compiled = False
        self.attached = False
        self.steps = 0

    def attach(self) -> None:
        """Registers the hooks.

        Raises:
            UnsupportedError: a torch.nn.DataParallel model, whose replicas route in threads of one process.
        """
        import torch

        if isinstance(self._model, torch.nn.DataParallel):
            raise UnsupportedError(
                "torch.nn.DataParallel runs replicas in threads of one process; record under "
                "torch.nn.parallel.DistributedDataParallel, or pass model.module and run it alone"
            )
        self.attached = True
        self._compiled = bool(compiled_parts(self._model))
        if self._compiled:
            recompile()
        listener = listen(self._route)
        self._undo.append(lambda: unlisten(listener))
        for slot, site in enumerate(self._sites):
            self._watch_router(slot, site, listener)
        for root in self._roots():
            self._watch_forward(root)

    def detach(self) -> None:
        """Removes every hook."""
        self.attached = False
        while self._undo:
            self._undo.pop()()
        self._open = self._owner = None
        if self._compiled:
            recompile()

    def _watch_router(self, slot: int, site: RouterSite, listener: int) -> None:
        import torch

        # Closures over plain values: a model copied with copy.deepcopy keeps working, and only the original records.
        token, operator, route, extract, watched = (
            torch.zeros(1),
            record_operator(),
            self._route,
            site.extract,
            site.module,
        )

        def read(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if module is not watched:
                return
            ids, weights = extract(module, args, kwargs, output)
            if torch.compiler.is_compiling():
                operator(token, ids, None if weights is None else weights.detach(), listener, slot)
            else:
                route(slot, ids, weights)

        def read_arguments(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read(module, args, kwargs, None)

        handle = (
            watched.register_forward_pre_hook(read_arguments, with_kwargs=True)
            if site.at_call
            else watched.register_forward_hook(read, with_kwargs=True)
        )
        self._undo.append(handle.remove)

    def _roots(self) -> list[Module]:
        """The model, and the Transformers models inside it that hold all its routers: they may be called themselves."""
        transformers = sys.modules.get("transformers.modeling_utils")
        if transformers is None or self._compiled:
            return [self._model]
        modules = {site.module for site in self._sites}
        return [
            module
            for module in self._model.modules()
            if module is self._model
            or (isinstance(module, transformers.PreTrainedModel) and modules <= set(module.modules()))
        ]

    def _watch_forward(self, root: Module) -> None:
        import torch

        begin, end = self._begin, self._end

        def before(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is root:
                begin(module, args, kwargs)

        def after(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if module is root:
                end(module, output)

        compiled: Callable[..., Any] | None = getattr(root, "_compiled_call_impl", None)
        if compiled is None:
            # A script may compile a call of the model later; these then stay Python, at the price of a graph break.
            disable: Callable[..., Any] = torch.compiler.disable
            reason = "moeplace records forward calls in Python: give profile the compiled model, or drop fullgraph=True"
            first, last = disable(before, reason=reason), disable(after, reason=reason)
            self._undo.append(root.register_forward_pre_hook(first, with_kwargs=True, prepend=True).remove)
            self._undo.append(root.register_forward_hook(last, with_kwargs=True, always_call=True).remove)
            return

        # model.compile() puts the hooks into the graph, where fullgraph=True has no room for Python: stand around it.
        def around(*args: Any, **kwargs: Any) -> Any:
            begin(root, args, kwargs)
            output = None
            try:
                output = compiled(*args, **kwargs)
            finally:
                end(root, output)
            return output

        root._compiled_call_impl = around
        self._undo.append(lambda: setattr(root, "_compiled_call_impl", compiled))

    def _begin(self, module: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._failed or _in_backward() or (self._open is not None and self._owner is not module):
            return
        with self._reporting():
            self._open = StepRouting(
                self._sites, self._reader.read(module, args, kwargs), keep_weights=self._keep_weights
            )
            self._owner = module

    def _route(self, slot: int, ids: Tensor, weights: Tensor | None) -> None:
        if self._open is not None and not _in_backward():
            with self._reporting():
                self._open.add(slot, ids, weights)

    def _end(self, module: Module, output: Any) -> None:
        if self._open is None or self._owner is not module or _in_backward():
            return
        routing, self._open, self._owner = self._open, None, None
        if output is None and not routing.complete:
            return  # the forward raised; what it had routed so far is no step
        with self._reporting():
            step = routing.finish(self.steps, self._workload())
            self._check_seen(step)
            assert step is not None
            self._reader.finish(routing.batch, output)
            if routing.again is not None and self._every_layer:
                raise self._looped(routing.again)
            self._deliver(step)
            again = routing.again
            while again is not None:
                if (step := again.finish(self.steps, self._workload())) is not None:
                    self._deliver(step)
                again = again.again
            self.steps += 1

    def _looped(self, again: StepRouting) -> UnsupportedError:
        names = [site.name for site, filled in zip(self._sites, again.filled, strict=True) if filled]
        return UnsupportedError(
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} ran more than once in one forward call: the "
            "model loops over these layers, and a trace has one choice for each token and layer. Record counts, which "
            "are summed over the runs: mode='counts' (--mode counts)"
        )

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Errors go to the script that called the model, or, where it knows nothing of recording, to `on_error`."""
        try:
            yield
        except Exception as error:
            if self._on_error is None:
                raise
            self._failed, self._open = True, None
            self._on_error(error)

    def _check_seen(self, step: Step | None) -> None:
        if step is not None and (all(step.routed) or not self._every_layer):
            return
        silent = [site.name for i, site in enumerate(self._sites) if step is None or not step.routed[i]]
        listed = f"{', '.join(silent[:3])}{', ...' if len(silent) > 3 else ''}"
        if step is None:
            raise UnsupportedError(
                f"a forward call ran without calling {listed}: the layer may run a kernel that bypasses its modules, "
                "or code compiled before recording began. Pass the compiled module itself to profile, or open the "
                "block before the first compiled call; name the modules that do route with routers="
            )
        raise UnsupportedError(
            f"{listed} did not route in this forward call, other layers did; token mode needs every layer of a token: "
            "use mode='counts', or leave these layers out with routers="
        )


def _in_backward() -> bool:
    """Whether this thread is computing gradients, as when activation checkpointing runs a layer again."""
    import torch

    return bool(torch._C._current_graph_task_id() != -1)
