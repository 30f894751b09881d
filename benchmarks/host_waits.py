"""What would make the host wait for a GPU, seen on a CPU, where none of it waits.

The host waits when it reads what the device holds, when a size depends on values, and when it hands over a list or an
array of its own: memory that is not pinned is copied behind all that the device has yet to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
SIZED_BY_VALUES = ("nonzero", "masked_select", "unique", "bincount")
COMPARED = ("aten.equal.", "_local_scalar_dense", "is_nonzero")
HANDED_OVER = "lift_fresh"
"""What torch calls for torch.tensor(values), value.new_tensor(values), torch.from_numpy and indices that are lists; and
on a CPU alone for `value[index] = number`, which `value[index].fill_(number)` does without."""


@contextmanager
def host_waits(told: Callable[[str], None]) -> Iterator[None]:
    """Calls `told` with a name at each wait, once, before it is gone through."""
    reading = False

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            places = args[1] if name.startswith(("aten.index.", "aten.index_put")) else ()
            masks = any(place is not None and place.dtype == torch.bool for place in places)
            unsized = (
                "repeat_interleave" in name and isinstance(args[-1], Tensor) and not (kwargs or {}).get("output_size")
            )
            waits = any(part in name for part in (*SIZED_BY_VALUES, *COMPARED, HANDED_OVER))
            if (waits or masks or unsized) and not reading:
                told(name)
            return func(*args, **(kwargs or {}))

    before = {name: getattr(Tensor, name) for name in READS}

    def noting(name: str) -> Any:
        def read(value: Tensor, *arguments: Any) -> Any:
            nonlocal reading
            outermost = not reading
            if outermost:
                told(f"Tensor.{name}")
            reading = True
            try:
                return before[name](value, *arguments)
            finally:
                reading = not outermost

        return read

    try:
        for name in READS:
            setattr(Tensor, name, noting(name))
        with Operators():
            yield
    finally:
        for name, method in before.items():
            setattr(Tensor, name, method)
