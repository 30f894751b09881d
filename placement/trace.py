"""Token-level routing in memory: which experts every token chose in every layer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .._arguments import check_methods
from .._display import Displayed, names, plural, span
from .._types import IntArray
from .errors import InputError
from .memory import check_memory, free_memory
from .model import ModelSpec
from .steps import Batch, Steps, batches_of_steps
from .validation import check_choice, generator

IdArray = npt.NDArray[np.unsignedinteger[Any]]


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


def column(name: str, values: npt.ArrayLike | None, tokens: int) -> IntArray | None:
    """[T] whole numbers, one a token, or None."""
    if values is None:
        return None
    array = np.asarray(values)
    if array.shape != (tokens,) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} must be {tokens} integers, one a token; given {array.dtype} {array.shape}")
    if array.dtype == np.uint64 and tokens and int(array.max()) >= 1 << 63:
        raise InputError(f"{name} holds {int(array.max())}, more than a 64-bit signed integer")
    return np.array(array, dtype=np.int64)


def workload_codes(workload: Any, tokens: int) -> tuple[tuple[str, ...], IntArray]:
    """Names in order, and each token's index into them."""
    if workload is None:
        return ("",), np.zeros(tokens, np.int64)
    tags = np.asarray(workload)
    if tags.shape != (tokens,):
        raise InputError(f"workload must be {tokens} tags, one a token; given shape {tags.shape}")
    names, codes = np.unique(tags.astype(str), return_inverse=True)
    return tuple(str(name) for name in names) or ("",), codes.astype(np.int64)


def order_within(sequence: IntArray) -> IntArray:
    """[T] how many tokens of the same sequence came before."""
    order = np.argsort(sequence, kind="stable")
    ordered = sequence[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(ordered) else ordered
    lengths = np.diff(np.append(starts, len(ordered)))
    position = np.empty(len(ordered), dtype=np.int64)
    position[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return position


def apart(traces: Sequence[RoutingTrace]) -> list[RoutingTrace]:
    """The traces with their sequences numbered on, so that none of one has the number of another's."""
    result, first = [], 0
    for trace in traces:
        numbers = np.unique(trace.sequence, return_inverse=True)[1].astype(np.int64)
        result.append(replace(trace, sequence=frozen(numbers + first)))
        first += int(numbers.max(initial=-1)) + 1
    return result


def layer_index(recorded: Sequence[int], layers: Sequence[int]) -> list[int]:
    """Where each of `layers` stands among the recorded ones, in their order.

    Raises:
        InputError: a layer that was not recorded, or none.
    """
    unknown = sorted(set(layers) - set(recorded))
    if unknown or not len(layers):
        raise InputError(f"layers {unknown or 'none'} were asked for; recorded are {span(tuple(recorded))}")
    return [i for i, layer in enumerate(recorded) if layer in set(layers)]


def frozen(array: Any) -> Any:
    """The array, no longer writable."""
    if array is not None:
        array.flags.writeable = False
    return array


def id_dtype(num_experts: int) -> type[np.uint8] | type[np.uint16]:
    """The narrowest type that holds expert ids below `num_experts`."""
    return np.uint8 if num_experts <= 256 else np.uint16


@check_methods
@dataclass(frozen=True, eq=False, repr=False)
class RoutingTrace(Displayed):
    """Routing of T tokens through L MoE layers, k experts each. Build it with `from_arrays`, which validates, or read
    it.

    expert_ids: [T, L, k] logical expert ids, the highest gate weight first. gate_weights: [T, L, k] float16, or None.
    sequence, position: [T] which sequence a token belongs to and where in it. workload: [T] index into `workloads`.
    step: [T] forward call it was recorded in, or None. source: [T] rank it was recorded on, or None.
    moe_layers: absolute indices of the L layers in the model. model: what was recorded, where the recording says so.
    whole_batches: kinds of the recording's forward calls, where this is a part of it that cuts them; see `batches`.

    Example:
        >>> import moeplace as mp
        >>> trace = mp.RoutingTrace.from_arrays([[[0, 1]], [[2, 0]], [[1, 2]]], num_experts=3)
        >>> trace.num_tokens, trace.num_layers, trace.top_k
        (3, 1, 2)
        >>> trace = mp.read_trace("examples/data/olmoe_small")  # doctest: +SKIP
        >>> train, held_out = trace.split(by="sequence", held_out=0.25)  # doctest: +SKIP
    """

    expert_ids: IdArray
    num_experts: int
    moe_layers: tuple[int, ...]
    sequence: IntArray
    position: IntArray
    workload: IntArray
    workloads: tuple[str, ...] = ("",)
    gate_weights: npt.NDArray[np.float16] | None = None
    step: IntArray | None = None
    source: IntArray | None = None
    model: ModelSpec | None = None
    whole_batches: tuple[Batch, ...] = ()

    def _summary(self) -> tuple[str, dict[str, str]]:
        tokens = plural(self.num_tokens, "token")
        title = f"{tokens}, {self.num_layers} layers, {self.num_experts} experts, top-{self.top_k}"
        recorded = [name for name in ("gate_weights", "step", "source") if getattr(self, name) is not None]
        return title, {
            "model": "not recorded" if self.model is None else self.model.title,
            "layers": span(self.moe_layers),
            "sequences": f"{len(np.unique(self.sequence)):,}",
            "workloads": names(self.workloads),
            "columns": ", ".join(["expert_ids", "sequence", "position", "workload", *recorded]),
        }

    @property
    def num_tokens(self) -> int:
        return int(self.expert_ids.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.expert_ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.expert_ids.shape[2])

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """Kinds of the recording's forward calls, none where these are not known; sizes are over all ranks."""
        if self.step is None or self.whole_batches or not self.num_tokens:
            return self.whole_batches
        calls = ForwardCalls()
        calls.add(self)
        return calls.batches()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the routing, the sequences and the workloads: what a plan was solved on."""
        digest = hashlib.sha256(
            repr((self.expert_ids.shape, self.num_experts, self.moe_layers, self.workloads)).encode()
        )
        for values in (self.expert_ids.astype(np.uint16), self.sequence, self.position, self.workload):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    @classmethod
    def from_arrays(
        cls,
        expert_ids: npt.ArrayLike,
        num_experts: int,
        gate_weights: npt.ArrayLike | None = None,
        sequence: npt.ArrayLike | None = None,
        position: npt.ArrayLike | None = None,
        workload: npt.ArrayLike | Sequence[str] | None = None,
        *,
        step: npt.ArrayLike | None = None,
        source: npt.ArrayLike | None = None,
        moe_layers: Sequence[int] | None = None,
        model: ModelSpec | None = None,
    ) -> RoutingTrace:
        """Validates arrays and puts each token's experts in order of gate weight, highest first.

        Args:
            expert_ids: [T, L, k], or [T, L] for top-1. Without gate_weights their order is taken as that of the
                weights.
            num_experts: E, experts a layer.
            gate_weights: [T, L, k], or [T, L] for top-1.
            sequence: [T] which sequence a token belongs to (default: one sequence).
            position: [T] where in it (default: the order within each sequence).
            workload: [T] tags (strings, or anything that prints).
            step: [T] forward call. source: [T] rank. moe_layers: [L] absolute layer indices (default: the model's,
                where one is given, else 0..L-1).
            model: what was recorded, so that `Problem` need not be told.

        Raises:
            InputError: wrong shape, an id outside 0..num_experts-1, a token with the same expert twice (the first
                offending token and layer are named), or a model of another shape.
        """
        ids = np.asarray(expert_ids)
        if ids.ndim == 2:
            ids = ids[:, :, None]
        if ids.ndim != 3 or 0 in ids.shape[1:] or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(
                f"expert_ids must be integers of shape [tokens, layers, top_k], given {ids.dtype} {ids.shape}"
            )
        tokens, layers, _ = ids.shape
        if moe_layers is None:
            moe_layers = model.moe_layers if model is not None and model.layers == layers else range(layers)
        layer_names = tuple(int(layer) for layer in moe_layers)
        if len(layer_names) != layers:
            raise InputError(f"moe_layers names {len(layer_names)} layers, expert_ids has {layers}")
        check_ids(ids, num_experts, layer_names)
        gates = None
        if gate_weights is not None:
            with np.errstate(over="ignore"):
                gates = np.asarray(gate_weights, dtype=np.float16)
            gates = gates[:, :, None] if gates.ndim == 2 else gates
            if gates.shape != ids.shape:
                raise InputError(f"gate_weights has shape {gates.shape}, expert_ids {ids.shape}; they must agree")
            if not np.isfinite(gates).all():
                token, layer, _ = (int(i) for i in np.argwhere(~np.isfinite(gates))[0])
                raise InputError(
                    f"gate_weights of token {token} in model layer {layer_names[layer]} are "
                    f"{gates[token, layer].tolist()}; "
                    "they must be finite and fit float16"
                )
            if np.any(gates[:, :, 1:] > gates[:, :, :-1]):
                order = np.argsort(-gates, axis=2, kind="stable")
                ids, gates = np.take_along_axis(ids, order, 2), np.take_along_axis(gates, order, 2)
        names, codes = workload_codes(workload, tokens)
        sequences = column("sequence", sequence, tokens)
        sequences = np.zeros(tokens, np.int64) if sequences is None else sequences
        positions = column("position", position, tokens)
        return cls(
            expert_ids=frozen(np.array(ids, dtype=id_dtype(num_experts))),
            num_experts=int(num_experts),
            moe_layers=layer_names,
            sequence=frozen(sequences),
            position=frozen(order_within(sequences) if positions is None else positions),
            workload=frozen(codes),
            workloads=names,
            gate_weights=None if gates is None else frozen(gates.copy()),
            step=frozen(column("step", step, tokens)),
            source=frozen(column("source", source, tokens)),
            model=None if model is None else model.of_routing(int(num_experts), layer_names, ids.shape[2]),
        )

    @classmethod
    def concatenate(cls, traces: Sequence[RoutingTrace]) -> RoutingTrace:
        """Traces of one model, one after the other; sequence numbers are taken as they are, workloads by name.

        The model is that of the traces which know theirs, and unknown where those differ.

        Raises:
            InputError: none given, or traces that differ in shape or in the columns they have.
        """
        if not traces:
            raise InputError("RoutingTrace.concatenate: no trace given")
        first = traces[0]
        for i, other in enumerate(traces):
            for name in ("num_experts", "moe_layers", "top_k"):
                if getattr(other, name) != getattr(first, name):
                    raise InputError(
                        f"RoutingTrace.concatenate: {name} is {getattr(other, name)} in trace {i}, "
                        f"{getattr(first, name)} in trace 0; join traces of one model"
                    )
            for name in ("gate_weights", "step", "source"):
                if (getattr(other, name) is None) != (getattr(first, name) is None):
                    raise InputError(f"RoutingTrace.concatenate: only some of the traces have {name}")
        names = tuple(sorted({name for trace in traces for name in trace.workloads}))
        code_of = {name: code for code, name in enumerate(names)}

        models = [trace.model for trace in traces if trace.model is not None]

        def joined(name: str) -> Any:
            columns = [getattr(trace, name) for trace in traces]
            return None if columns[0] is None else frozen(np.concatenate(columns))

        return replace(
            first,
            expert_ids=joined("expert_ids"),
            gate_weights=joined("gate_weights"),
            sequence=joined("sequence"),
            position=joined("position"),
            workload=frozen(
                np.concatenate([np.array([code_of[w] for w in t.workloads], np.int64)[t.workload] for t in traces])
            ),
            workloads=names,
            step=joined("step"),
            source=joined("source"),
            model=models[0] if models and all(model == models[0] for model in models) else None,
            whole_batches=first.whole_batches if len({trace.whole_batches for trace in traces}) == 1 else (),
        )

    def select(self, tokens: npt.NDArray[Any] | slice) -> RoutingTrace:
        """The trace of some tokens only: a boolean mask [T], or token indices in the order wanted.

        Raises:
            InputError: neither of these, or an index that is not there.
        """
        if not isinstance(tokens, slice):
            tokens = check_choice("RoutingTrace.select: tokens", tokens, self.num_tokens)

        def pick(column: Any) -> Any:
            return None if column is None else frozen(column[tokens])

        return replace(
            self,
            expert_ids=pick(self.expert_ids),
            gate_weights=pick(self.gate_weights),
            sequence=pick(self.sequence),
            position=pick(self.position),
            workload=pick(self.workload),
            step=pick(self.step),
            source=pick(self.source),
        )

    def keep_layers(self, layers: Sequence[int]) -> RoutingTrace:
        """The trace of some layers only, by their absolute indices.

        Raises:
            InputError: a layer that was not recorded, or none.
        """
        index = layer_index(self.moe_layers, layers)
        names = tuple(self.moe_layers[i] for i in index)
        return replace(
            self,
            expert_ids=frozen(self.expert_ids[:, index]),
            gate_weights=None if self.gate_weights is None else frozen(self.gate_weights[:, index]),
            moe_layers=names,
            model=None if self.model is None else self.model.replace(layers=len(names), moe_layers=names),
        )

    def tagged(self, workload: str) -> RoutingTrace:
        """The trace with every token of one workload."""
        return replace(self, workload=frozen(np.zeros(self.num_tokens, np.int64)), workloads=(workload,))

    def split(
        self, by: Literal["sequence", "step", "time"] = "sequence", held_out: float = 0.25, seed: int = 0
    ) -> tuple[RoutingTrace, RoutingTrace]:
        """Parts the trace into (train, held-out) that share no sequence, no step, or no time span.

        by: "sequence" and "step" draw whole ones at random, each workload keeping its share; "time" holds out the
        last tokens recorded.

        Raises:
            InputError: held_out outside (0, 1), or fewer than two units to part.
        """
        if not 0.0 < held_out < 1.0:
            raise InputError(f"held_out ({held_out}) must be between 0 and 1, both excluded")
        if by == "time":
            mask = np.arange(self.num_tokens) >= round(self.num_tokens * (1.0 - held_out))
        elif by in ("sequence", "step"):
            units = self.sequence if by == "sequence" else self.step
            if units is None:
                raise InputError("this trace has no step column; split by 'sequence' or by 'time'")
            mask = np.isin(units, _held_out_units(units, self.workload, held_out, seed))
        else:
            raise InputError(f"split by {by!r} is unknown; known: sequence, step, time")
        if mask.all() or not mask.any():
            raise InputError(f"cannot hold out {held_out:.0%} by {by}: too few; split by 'time' or record more")
        train, judged = (replace(self.select(part), whole_batches=self.batches) for part in (~mask, mask))
        return train, judged

    def decode_steps(self, concurrency: int = 128, steps: int = 200, seed: int = 0) -> Steps:
        """Steps of a decoding engine under continuous batching: one token of each of `concurrency` sequences a step.

        Each batch lane starts somewhere inside a sequence and takes up another when one ends; when all have been
        used they are drawn anew. Where fewer sequences were recorded than run at once, each step stands for itself: its
        sequences are drawn with replacement, as many as there are, and stand in it as often as it takes, at other
        positions. Steps then differ as much as other recordings of so many sequences would.
        """
        if concurrency < 1 or steps < 1:
            raise InputError(f"concurrency ({concurrency}) and steps ({steps}) must be at least 1")
        self._require_tokens(1)
        self._check_memory(concurrency, steps)
        rng = generator(seed)
        order, starts, lengths = self._sequences()
        offsets = np.arange(steps + 1) * concurrency
        if concurrency > len(starts):
            lane = np.arange(concurrency) % len(starts)
            drawn = rng.integers(len(starts), size=(steps, len(starts)))[:, lane]
            place = (rng.random(drawn.shape) * lengths[drawn]).astype(np.int64)
            note = _repeated(f"decode steps of {concurrency:,} sequences", len(starts), concurrency)
            made = self._steps(order[starts[drawn] + place].ravel(), offsets)
            return replace(made, notes=(note,), worth=np.full(steps, 1.0 / steps))
        lanes = np.empty((concurrency, steps), dtype=np.int64)
        waiting: list[int] = []
        for lane in lanes:
            filled = 0
            while filled < steps:
                if not waiting:
                    waiting = rng.permutation(len(starts)).tolist()
                chosen = waiting.pop()
                skip = int(rng.integers(lengths[chosen])) if filled == 0 else 0
                take = min(int(lengths[chosen]) - skip, steps - filled)
                first = int(starts[chosen]) + skip
                lane[filled : filled + take] = order[first : first + take]
                filled += take
        independent = min(float(steps), len(starts) / concurrency)
        return replace(self._steps(lanes.T.reshape(-1), offsets), worth=np.full(steps, independent / steps))

    def prefill_steps(self, tokens: int = 4096, steps: int | None = None, seed: int = 0) -> Steps:
        """Steps of a chunked prefill: whole sequences in random order, cut into batches of `tokens` tokens.

        steps: how many (default: as many as the trace fills, at least one); more than it fills draws the sequences
        anew. Steps larger than the trace each draw their sequences with replacement, and repeat them.
        """
        if tokens < 1 or (steps is not None and steps < 1):
            raise InputError(f"tokens ({tokens}) and steps ({steps}) must be at least 1")
        self._require_tokens(1)
        count = max(1, self.num_tokens // tokens) if steps is None else steps
        self._check_memory(tokens, count)
        rng = generator(seed)
        order, starts, lengths = self._sequences()
        if tokens > self.num_tokens:
            filled = []
            for drawn in rng.integers(len(starts), size=(count, len(starts))):
                step = np.concatenate([order[starts[i] : starts[i] + lengths[i]] for i in drawn])
                filled.append(np.resize(step, tokens))
            note = _repeated(f"prefill steps of {tokens:,} tokens", len(starts), tokens * len(starts) / self.num_tokens)
            made = self._steps(np.concatenate(filled), np.arange(count + 1) * tokens)
            return replace(made, notes=(note,), worth=np.full(count, 1.0 / count))
        chosen: list[IntArray] = []
        have = 0
        while have < count * tokens:
            drawn = rng.permutation(len(starts))
            # Tokens of the sequences one after the other: how far a token is into what was drawn, from there on.
            ends = np.cumsum(lengths[drawn])
            chosen.append(order[np.repeat(starts[drawn] - ends + lengths[drawn], lengths[drawn]) + np.arange(ends[-1])])
            have += int(ends[-1])
        made = self._steps(np.concatenate(chosen)[: count * tokens], np.arange(count + 1) * tokens)
        return replace(made, worth=np.full(count, min(1.0, self.num_tokens / tokens / count)))

    def recorded_steps(self) -> Steps:
        """The forward calls as they were recorded, with their source ranks where more than one rank recorded.

        Raises:
            InputError: the trace has no step column.
        """
        if self.step is None:
            raise InputError("this trace has no step column; use decode_steps or prefill_steps")
        self._require_tokens(1)
        order = np.argsort(self.step, kind="stable")
        ends = np.flatnonzero(np.diff(self.step[order])) + 1
        return self._steps(order, np.concatenate([[0], ends, [self.num_tokens]]), as_recorded=True)

    def _require_tokens(self, least: int) -> None:
        if self.num_tokens < least:
            raise InputError(
                f"the trace has {self.num_tokens} tokens, a step needs {least}; record more or ask for less"
            )

    def _check_memory(self, tokens: int, steps: int) -> None:
        # Measured with 2 to 8 experts a token: what a replay takes beside the ids, a token.
        token_bytes = 24 + self.expert_ids[:1].size * (self.expert_ids.itemsize + 8)
        fitting = int(free_memory() / token_bytes)
        check_memory(
            tokens * steps * token_bytes,
            f"{steps:,} steps of {tokens:,} tokens",
            f"some {fitting:,} tokens would fit: {max(1, fitting // tokens):,} steps of {min(tokens, fitting):,}",
        )

    def _sequences(self) -> tuple[IntArray, IntArray, IntArray]:
        """Tokens ordered by sequence and position, and each sequence's start and length in that order."""
        order = np.lexsort((self.position, self.sequence))
        starts = np.concatenate([[0], np.flatnonzero(np.diff(self.sequence[order])) + 1]).astype(np.int64)
        return order, starts, np.diff(np.append(starts, self.num_tokens))

    def _steps(self, tokens: IntArray, offsets: IntArray, as_recorded: bool = False) -> Steps:
        # Batches made here run on ranks nobody recorded: only steps as they were recorded keep their source ranks.
        return Steps(
            expert_ids=self.expert_ids[tokens],
            offsets=offsets,
            num_experts=self.num_experts,
            moe_layers=self.moe_layers,
            source=self.source[tokens] if as_recorded and self.source is not None and np.ptp(self.source) else None,
            workload=self.workload[tokens],
            workloads=self.workloads,
        )


class ForwardCalls:
    """Sizes of the forward calls of a recording, told from its blocks; a call may lie in several of them."""

    def __init__(self) -> None:
        self._blocks: list[tuple[IntArray, IntArray, IntArray]] = []

    def add(self, block: RoutingTrace) -> None:
        """Counts a block's tokens by call, and how many sequences have some; blocks without steps add nothing."""
        if block.step is None or not block.num_tokens:
            return
        calls, call, tokens = np.unique(block.step, return_inverse=True, return_counts=True)
        order = np.lexsort((block.sequence, call))
        first = np.diff(call[order], prepend=-1) != 0
        first |= np.diff(block.sequence[order], prepend=block.sequence[order[0]] - 1) != 0
        self._blocks.append((calls, tokens, np.bincount(call[order][first], minlength=len(calls))))

    def merge(self, other: ForwardCalls) -> None:
        """Adds the blocks that another counted."""
        self._blocks += other._blocks

    def batches(self) -> tuple[Batch, ...]:
        """The kinds of calls; none where no block had steps."""
        if not self._blocks:
            return ()
        calls, tokens, sequences = (np.concatenate(column) for column in zip(*self._blocks, strict=True))
        _, call = np.unique(calls, return_inverse=True)
        size, present = (np.bincount(call, weights=counts).astype(np.int64) for counts in (tokens, sequences))
        return batches_of_steps(size, np.asarray(size == present))


def _repeated(steps: str, sequences: int, needed: float) -> str:
    """How often the recorded sequences stand in a step that needs more of them."""
    return (
        f"{steps} are filled from {plural(sequences, 'recorded sequence')}, each {needed / sequences:.3g} times: what "
        "steps differ by is what so few sequences leave open."
    )


def _held_out_units(units: IntArray, workload: IntArray, held_out: float, seed: int) -> IntArray:
    """A share of the units of each workload (a unit counts under the workload of its first token)."""
    rng = generator(seed)
    names, first = np.unique(units, return_index=True)
    result: list[IntArray] = []
    for code in np.unique(workload[first]):
        mine = names[workload[first] == code]
        count = min(max(round(len(mine) * held_out), 1), max(len(mine) - 1, 0))
        result.append(rng.permutation(mine)[:count])
    return np.concatenate(result) if result else names[:0]
