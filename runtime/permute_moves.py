"""From recognised tensors and an order of experts to the byte ranges of each permuted file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..placement.errors import FileFormatError, UnsupportedError
from .permute_names import Role
from .permute_rows import IntArray
from .permute_safetensors import ByteRange, Header, StoredTensor

Experts = Mapping[str, Sequence[StoredTensor]]


def experts_by_place(headers: Sequence[Header], roles: Mapping[str, Role | None], experts: int) -> Experts:
    """The E tensors that change places with each other, in expert order, by `Role.place`.

    Raises:
        FileFormatError: a place lacks an expert. UnsupportedError: its experts differ in shape or dtype.
    """
    found: dict[str, dict[int, StoredTensor]] = defaultdict(dict)
    for header in headers:
        for tensor in header.tensors:
            role = roles[tensor.name]
            if role is not None and role.kind == "expert":
                found[role.place][role.expert] = tensor
    for place, tensors in found.items():
        if sorted(tensors) != list(range(experts)):
            wrong = sorted(set(range(experts)) ^ set(tensors))
            raise FileFormatError(
                f"{place}: expected tensors of experts 0 to {experts - 1}, expert {wrong[0]} is missing or too many"
            )
        first = tensors[0]
        for expert, tensor in tensors.items():
            if (tensor.dtype, tensor.shape) != (first.dtype, first.shape):
                raise UnsupportedError(
                    f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, expert 0's is {first.dtype} "
                    f"{list(first.shape)}: experts of different form cannot change places (expert {expert})"
                )
    return {place: [tensors[expert] for expert in range(experts)] for place, tensors in found.items()}


def check_complete(headers: Sequence[Header], roles: Mapping[str, Role | None], layers: Sequence[int]) -> None:
    """Checks that every MoE layer has a router and experts among the tensors.

    Raises:
        FileFormatError: one has not; the layer is named.
    """
    seen = {(role.layer, role.kind == "router") for role in roles.values() if role is not None}
    for layer in layers:
        for is_router, what in ((True, "router"), (False, "experts")):
            if (layer, is_router) not in seen:
                names = ", ".join(header.file.name for header in headers[:3])
                raise FileFormatError(f"{names}: no {what} of layer {layer} among the tensors, which the plan places")


def file_ranges(
    header: Header, roles: Mapping[str, Role | None], experts: Experts, order: Mapping[int, IntArray]
) -> Iterator[ByteRange]:
    """The source of every byte of the permuted file, which keeps the header: names and places stay, contents move.

    order: by absolute layer, [E] the expert whose content row e gets.
    """
    for tensor in header.tensors:
        role = roles[tensor.name]
        if role is None:
            yield ByteRange(tensor.file, tensor.start, tensor.nbytes)
        elif role.kind == "expert":
            source = experts[role.place][order[role.layer][role.expert]]
            yield ByteRange(source.file, source.start, source.nbytes)
        else:
            rows = order[role.layer]
            if not tensor.shape or tensor.shape[0] != len(rows) or tensor.nbytes % len(rows):
                raise UnsupportedError(
                    f"{tensor.name} has shape {list(tensor.shape)}, expected {len(rows)} experts in dimension 0"
                )
            width = tensor.nbytes // len(rows)
            yield from (ByteRange(tensor.file, tensor.start + int(row) * width, width) for row in rows)


def inverse(order: IntArray) -> IntArray:
    """[L, E] the order that undoes `order`."""
    return np.argsort(order, axis=1)
