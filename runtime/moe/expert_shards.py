"""Experts cut over the ranks that would else hold the same ones: data parallelism that does not repeat them.

Every tensor of an expert is cut along its first dimension, a part for each copy. Parts are joined for a layer's forward
pass and again for its backward, and dropped between the two; gradients come back summed over all copies, each rank its
part's: what fully_shard does with other weights.

S rows of a rank, n the first dimension of an expert's tensor, C copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ...placement.errors import UnsupportedError
from .coordination import naming_unresponsive_ranks
from .mesh import ExpertMesh


class ExpertShards:
    """This rank's parts of tensors [S, n, ...], between the ranks of a mesh that hold the same experts."""

    def __init__(self, mesh: ExpertMesh) -> None:
        assert mesh.data is not None
        self._group, self._count, self._index = mesh.data, mesh.copies, mesh.copy

    def check(self, layer: int, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raises UnsupportedError unless each copy has an equal part of every tensor."""
        for name, shape in shapes.items():
            if shape[0] % self._count:
                raise UnsupportedError(
                    f"layer {layer}: an expert's {name} is {list(shape)}, whose first dimension {self._count} copies "
                    "cannot share evenly; leave out shard_experts, or give a mesh with another number of copies"
                )

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """What a rank holds of an expert's tensor."""
        return (whole[0] // self._count, *whole[1:])

    def part(self, value_SN: Tensor) -> Tensor:
        """[S, n / C, ...] this rank's part."""
        return value_SN.chunk(self._count, dim=1)[self._index]

    def join(self, part_SN: Tensor) -> Tensor:
        """[S, n, ...] from all copies' parts; each of them calls it."""
        rows, size, *rest = part_SN.shape
        parts = part_SN.new_empty(self._count * rows, size, *rest)
        with naming_unresponsive_ranks(self._group):
            dist.all_gather_into_tensor(parts, part_SN.contiguous(), group=self._group)
        return parts.view(self._count, rows, size, *rest).transpose(0, 1).reshape(rows, self._count * size, *rest)

    def sum_parts(self, value_SN: Tensor) -> Tensor:
        """[S, n / C, ...] this rank's part of the sum over all copies' tensors."""
        rows, size, *rest = value_SN.shape
        parts = value_SN.view(rows, self._count, size // self._count, *rest).transpose(0, 1).contiguous()
        mine = parts.new_empty(rows, size // self._count, *rest)
        with naming_unresponsive_ranks(self._group):
            dist.reduce_scatter_tensor(mine, parts.flatten(0, 1), group=self._group)
        return mine


class JoinedWeights:
    """The whole weights of one layer's pass. What autograd would keep of them is joined again in backward.

    Args:
        shards: how they are cut.
        parts: [S, n / C, ...] by name, as autograd follows them.
        dtype: in which they travel and are used.
    """

    def __init__(self, shards: ExpertShards, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._shards, self._dtype = shards, dtype
        self._parts = {name: part.detach().as_subclass(Tensor) for name, part in parts.items()}
        self._again: dict[str, Tensor] = {}
        self._name_at: dict[int, str] = {}

    @classmethod
    def run(
        cls,
        shards: ExpertShards,
        parts: Mapping[str, Tensor],
        dtype: torch.dtype,
        compute: Callable[[Mapping[str, Tensor]], Tensor],
    ) -> Tensor:
        """What `compute` makes of the whole weights; autograd keeps none of them."""
        joined = cls(shards, parts, dtype)
        wholes = dict(zip(parts, _Join.apply(joined, *parts.values()), strict=True))  # type: ignore[no-untyped-call]
        joined._name_at = {value.untyped_storage().data_ptr(): name for name, value in wholes.items() if value.numel()}
        with torch.autograd.graph.saved_tensors_hooks(joined._pack, joined._unpack):
            result = compute(wholes)
        again: Tensor = _JoinAgain.apply(joined, result)  # type: ignore[no-untyped-call]
        return again

    def join(self) -> dict[str, Tensor]:
        """The whole of each parameter, from what the copies hold now."""
        return {name: self._shards.join(part.to(self._dtype)) for name, part in self._parts.items()}

    def join_again(self) -> None:
        """For backward: every copy at the same point of it, whichever weights its tokens went through."""
        self._again = self.join()

    def sum_parts(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """This rank's parts of gradients; what backward joined is not needed any more."""
        self._again = {}
        return [
            self._shards.sum_parts(grad.to(part.dtype)) for grad, part in zip(grads, self._parts.values(), strict=True)
        ]

    def _pack(self, value: Tensor) -> Any:
        name = self._name_at.get(value.untyped_storage().data_ptr()) if value.numel() else None
        return value if name is None else (name, value.shape, value.stride(), value.storage_offset())

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        name, shape, stride, offset = packed
        return self._again[name].as_strided(shape, stride, offset)


class _Join(Function):
    """Parts to wholes; backward, the sums over all copies' gradients to the parts."""

    @staticmethod
    def forward(ctx: Any, joined: JoinedWeights, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.joined = joined
        return tuple(joined.join().values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.joined.sum_parts(grads)


class _JoinAgain(Function):
    """Identity; backward comes to it before it needs weights."""

    @staticmethod
    def forward(ctx: Any, joined: JoinedWeights, result: Tensor) -> Tensor:
        ctx.joined = joined
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        ctx.joined.join_again()
        return None, grad
