"""Recording from inside torch.compile: an operator the compiler neither looks into nor drops.

A hook registered on a module is traced into the graph when its caller is compiled, and Python side effects of traced
code are lost or break the graph. The hook therefore calls an operator declared to change a tensor (a token of one
number): it stays in the graph, in order, `fullgraph=True` included, and CUDA graphs are split around it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

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
