"""A plan applied to a checkpoint on disk: any engine that deals experts in contiguous blocks then runs the plan."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..placement.errors import FileFormatError, InputError, UnsupportedError, nearest
from ..placement.model import ModelSpec
from ..placement.plan import Plan
from .permute_folder import (
    ORDER_FILE,
    json_object,
    new_folder,
    other_files,
    read_expert_order,
    read_weight_headers,
    write_expert_order,
)
from .permute_moves import check_complete, experts_by_place, file_ranges, inverse
from .permute_names import FAMILIES, tensor_role
from .permute_rows import IntArray, expert_order
from .permute_safetensors import copy_ranges

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PermutedCheckpoint:
    """What was written. expert_order: [L, E] the original expert in each row (what `ORDER_FILE` records).

    copied: other files taken over. left_out: folders and weights in other files, which would still be in the old order.
    """

    folder: Path
    expert_order: IntArray
    weight_files: tuple[str, ...]
    bytes_written: int
    copied: tuple[str, ...]
    left_out: tuple[str, ...]


def permute_checkpoint(
    checkpoint: str | Path,
    plan: Plan,
    out: str | Path,
    *,
    invert: bool = False,
    progress: Progress | None = None,
) -> PermutedCheckpoint:
    """Writes a Transformers safetensors checkpoint with each MoE layer's experts in the plan's order.

    Router rows, biases and correction biases, expert weights and their quantisation scales move together, so the model
    computes what it did; headers, index and sharding stay as they are. Bytes are streamed: memory does not grow with
    the checkpoint. `ORDER_FILE` beside the weights records the order.

    invert: undo instead: `checkpoint` is a permuted folder, `out` becomes the original, byte for byte.
    progress: called with bytes written so far and in all.

    Raises:
        InputError: no such folder, `out` exists, too little disk, a plan for another model, a checkpoint permuted
            already (or, to invert, not by this plan).
        UnsupportedError: another model family, a tensor that is not known, a plan with replicas or uneven slots, or one
            that parts expert groups; see `expert_order`.
        FileFormatError: config, index or weights are malformed, truncated or incomplete.
    """
    source, target = Path(checkpoint), Path(out)
    if not source.is_dir():
        raise InputError(f"{source}: no such folder")
    if target.exists() or target.is_symlink():
        raise InputError(f"{target}: exists already; a checkpoint is written to a new folder only")
    spec, ignored = _checkpoint_model(source)
    _check_same_model(spec, plan.model, source)
    order = expert_order(plan, spec.groups)
    _check_state(source, order, invert)

    headers = read_weight_headers(source)
    names = [tensor.name for header in headers for tensor in header.tensors]
    roles = {name: tensor_role(name, spec.moe_layers, ignored) for name in names}
    check_complete(headers, roles, spec.moe_layers)
    experts = experts_by_place(headers, roles, spec.experts)
    rows = dict(zip(spec.moe_layers, inverse(order) if invert else order, strict=True))

    weights = tuple(header.file.name for header in headers)
    copied, left_out = other_files(source, weights)
    total = sum(header.file.stat().st_size for header in headers)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with new_folder(target, total) as scratch:
        for header in headers:
            ranges = file_ranges(header, roles, experts, rows)
            copy_ranges(ranges, header.raw, scratch / header.file.name, report)
        for name in copied:
            shutil.copyfile(source / name, scratch / name)
        if not invert:
            write_expert_order(scratch, spec.moe_layers, order)
    return PermutedCheckpoint(target, order, weights, total, copied, left_out)


def _checkpoint_model(folder: Path) -> tuple[ModelSpec, range]:
    """The model's shape, and the indices of multi-token prediction layers, which stand behind the last layer."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json; is this a Transformers checkpoint?")
    config = json_object(path)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UnsupportedError(
            f"{path}: how to permute a model of type {kind!r} is not known; {nearest(str(kind), FAMILIES)}"
        )
    try:
        layers = int(config["num_hidden_layers"])
        extra = int(config.get("num_nextn_predict_layers") or 0)
        return ModelSpec.from_config(config), range(layers, layers + extra)
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: {error}") from None


def _check_same_model(checkpoint: ModelSpec, plan: ModelSpec, folder: Path) -> None:
    for name in ("experts", "moe_layers", "top_k"):
        found, expected = getattr(checkpoint, name), getattr(plan, name)
        if found != expected:
            raise InputError(
                f"{folder}: the plan is for another model: {name} is {found} in the checkpoint, {expected} in the plan"
            )


def _check_state(folder: Path, order: IntArray, invert: bool) -> None:
    recorded = read_expert_order(folder)
    if not invert and recorded is not None:
        raise InputError(
            f"{folder}: permuted already ({ORDER_FILE} is there), and a plan counts the original's experts; permute the "
            "original, or restore it first with invert=True"
        )
    if invert and recorded is None:
        raise InputError(f"{folder}: no {ORDER_FILE}, so this is not a permuted checkpoint and cannot be restored")
    if invert and recorded is not None:
        rows = list(recorded.values())
        if len(rows) != len(order) or any(not np.array_equal(a, b) for a, b in zip(rows, order, strict=True)):
            raise InputError(f"{folder}: permuted to another plan than the one given; use the plan it was made with")
