"""Hooks on a model: every forward call of it is a step, and what its routers choose in between is recorded."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..placement.errors import UnsupportedError
from .families import RouterSite
from .hooks_batch import BatchReader
from .hooks_compile import compiled_parts, listen, recompile, record_operator, unlisten
from .hooks_step import Step, StepRouting

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


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
        self._reader = BatchReader(model)
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
        wanted = {site.module for site in self._sites}
        return [
            module
            for module in self._model.modules()
            if module is self._model
            or (isinstance(module, transformers.PreTrainedModel) and wanted <= set(module.modules()))
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
            self._open = StepRouting(self._sites, self._reader.read(args, kwargs), keep_weights=self._keep_weights)
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
            self._deliver(step)
            self.steps += 1

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
                f"a forward call ran without calling {listed}: the layer may run a kernel that bypasses its modules, or "
                "code compiled before recording began. Pass the compiled module itself to profile, or open the block "
                "before the first compiled call; name the modules that do route with routers="
            )
        raise UnsupportedError(
            f"{listed} did not route in this forward call, other layers did; token mode needs every layer of a token: "
            "use mode='counts', or leave these layers out with routers="
        )


def _in_backward() -> bool:
    """Whether this thread is computing gradients, as when activation checkpointing runs a layer again."""
    import torch

    return bool(torch._C._current_graph_task_id() != -1)
