"""Live recording: `with profile(model, out=...) as recorder:` around any forward passes of an MoE model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from .._arguments import check_types
from ..placement.errors import InputError, UnsupportedError, nearest
from ..placement.model import ModelSpec
from ..placement.statistics import RoutingStatistics
from .families import Extract, find_sites, spec_of, takes_mask
from .hooks import ForwardHooks
from .recorders import CountSink, TokenSink, rank_and_world

if TYPE_CHECKING:
    from torch.nn import Module

Mode = Literal["tokens", "counts"]
MODES = ("tokens", "counts")


@check_types
def profile(
    model: Module,
    out: str | Path,
    *,
    mode: Mode = "tokens",
    sample: float = 1.0,
    workload: str = "",
    window_steps: int = 100,
    routers: str | Sequence[str] | None = None,
    extract: Extract | None = None,
    num_experts: int | None = None,
    reduce: bool = True,
) -> Recorder:
    """Records the routing of every forward call of `model` inside the `with` block.

    model: a Transformers 5 MoE model (Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V3, gpt-oss and those built like them),
    plain, wrapped (DistributedDataParallel, FSDP) or compiled (pass the compiled module); or any torch module with
    `routers`.
    out: mode "tokens": a folder for Parquet shards, one writer a rank. Mode "counts": a statistics .npz, or a folder
    for `statistics.npz`; expert loads alone, summed over ranks when the block ends, which every rank must reach.
    sample: fraction of sequences recorded, whole ones, chosen by a hash of their number.
    workload: tag of what is recorded; set `recorder.workload` to change it inside the block.
    window_steps: forward calls a window of loads, in mode "counts".
    routers: a regular expression searched in module names, or a list of names, one router or experts module a layer.
    extract: (module, args, kwargs, output) -> (expert ids [..., k], gate weights or None), for routers whose call
    does not show an integer tensor of ids beside weights of its shape.
    num_experts: experts a layer, where the named modules have no such attribute.
    reduce: False leaves each rank's counts in a file of its own for `merge_counts`, for ranks that cannot all be
    brought to the end of the block.

    Every row of a forward's input is a sequence; where the forward continues a KV cache, its rows go on being the
    sequences that filled it. Positions that `attention_mask` calls padding are dropped. Every forward is a step.

    Raises:
        InputError: no MoE layer found, a setting out of range, `out` already holding a recording; on leaving the
            block, when no forward call was seen in it. UnsupportedError: what cannot be recorded; see the message.
    """
    if mode not in MODES:
        raise InputError(f"mode {mode!r} is unknown; {nearest(str(mode), MODES)}")
    if not 0.0 < sample <= 1.0:
        raise InputError(f"sample ({sample}) must be above 0 and at most 1: the fraction of sequences to record")
    if window_steps < 1:
        raise InputError(f"window_steps ({window_steps}) must be at least 1")
    return Recorder(
        model,
        Path(out),
        mode=mode,
        sample=sample,
        workload=workload,
        window_steps=window_steps,
        routers=routers,
        extract=extract,
        num_experts=num_experts,
        reduce=reduce,
    )


class Recorder:
    """A recording: entered once, complete when left. Made by `profile`.

    workload: tag of the forward calls that follow; may be set at any time. model_spec: from the model's Transformers
    config, None without one. moe_layers: absolute indices of the layers recorded.
    trace_path: the folder of shards (mode "tokens"); statistics_path: the .npz (mode "counts"); the other is None.
    on_error: set before entering, is given an error of recording instead of the code that called the model; the
    recording then stops, what was complete is kept, and the model goes on.
    """

    def __init__(
        self,
        model: Module,
        out: Path,
        *,
        mode: Mode,
        sample: float,
        workload: str,
        window_steps: int,
        routers: str | Sequence[str] | None,
        extract: Extract | None,
        num_experts: int | None,
        reduce: bool,
    ) -> None:
        self._model, self._mode = model, mode
        self._sites = find_sites(model, routers, extract, num_experts)
        self._sample, self._window_steps, self._reduce = sample, window_steps, reduce
        self._hooks: ForwardHooks | None = None
        self._sink: TokenSink | CountSink | None = None
        self.on_error: Callable[[Exception], None] | None = None
        self.workload = workload
        self.model_spec: ModelSpec | None = spec_of(model, self._sites)
        self.moe_layers = tuple(site.layer for site in self._sites)
        self.num_experts = self._sites[0].num_experts
        self._spare_ids = self._sites[0].spare_ids
        if self._spare_ids and mode == "tokens" and not takes_mask(self._sites[0].module):
            raise UnsupportedError(
                f"{self._sites[0].name} has {self._spare_ids} zero-computation experts beside its "
                f"{self.num_experts}, so that tokens visit fewer experts than the router chose, and a trace has as "
                "many for each; record counts: mode='counts' (--mode counts). Zero experts are not placed"
            )
        self.trace_path = out if mode == "tokens" else None
        self.statistics_path = None if mode == "tokens" else out if out.suffix == ".npz" else out / "statistics.npz"

    @property
    def steps(self) -> int:
        """Forward calls recorded on this rank so far."""
        return 0 if self._hooks is None else self._hooks.steps

    @property
    def tokens(self) -> int:
        """Tokens recorded so far; in mode "tokens" those on their way to disk are not counted before the end."""
        return 0 if self._sink is None else self._sink.tokens

    def statistics(self) -> RoutingStatistics:
        """What solvers read, from this recording: in mode "tokens" of all ranks whose shards are in the folder.

        Raises:
            InputError: the recording is not complete, or its ranks have not been summed.
        """
        if self._sink is None or (self._hooks is not None and self._hooks.attached):
            raise InputError("the recording is not complete; ask for statistics() after the with block")
        if isinstance(self._sink, CountSink):
            if self._sink.statistics is None:
                raise InputError(
                    f"the ranks' counts have not been summed; merge_counts({str(self.statistics_path)!r}) does it"
                )
            return self._sink.statistics
        from .aggregate import aggregate

        assert self.trace_path is not None
        return aggregate(self.trace_path)

    def __enter__(self) -> Self:
        if self._hooks is not None:
            raise InputError("a recorder records once; call profile again, with another out")
        rank, world = rank_and_world()
        self._sink = self._open_sink(rank, world)
        self._hooks = ForwardHooks(
            self._model,
            self._sites,
            self._sink.take,
            lambda: self.workload,
            every_layer=self._mode == "tokens",
            keep_weights=self._mode == "tokens",
            on_error=self.on_error,
        )
        try:
            self._hooks.attach()
        except BaseException:
            self._hooks.detach()
            if isinstance(self._sink, TokenSink):
                self._sink.close(failed=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Ends the recording, as leaving the block does. error: what ended it early; it is not raised again here.

        Raises:
            InputError: no forward call was seen.
        """
        if self._hooks is None or self._sink is None or not self._hooks.attached:
            return
        self._hooks.detach()
        if error is None:
            self._sink.close(failed=False)
            if not self._hooks.steps:
                raise InputError(self._nothing_recorded())
            return
        try:
            self._sink.close(failed=True)
        except Exception as second:  # noqa: BLE001 - the first error is the one to see
            if second is not error:
                error.add_note(f"moeplace: closing the recording failed as well: {second}")

    def _open_sink(self, rank: int, world: int) -> TokenSink | CountSink:
        if self.trace_path is not None:
            return TokenSink(
                self.trace_path,
                num_experts=self.num_experts,
                moe_layers=self.moe_layers,
                rank=rank,
                sample=self._sample,
                model=self.model_spec,
                spare_ids=self._spare_ids,
            )
        assert self.statistics_path is not None
        return CountSink(
            self.statistics_path,
            num_experts=self.num_experts,
            moe_layers=self.moe_layers,
            rank=rank,
            world=world,
            sample=self._sample,
            window_steps=self._window_steps,
            reduce=self._reduce,
            spare_ids=self._spare_ids,
        )

    def _nothing_recorded(self) -> str:
        return (
            f"no forward call of the {type(self._model).__name__} given to profile was seen in the block. Call this "
            "very object (a wrapper around it will do)"
        )
