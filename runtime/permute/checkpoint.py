"""A plan applied to a checkpoint on disk: any engine that deals experts in contiguous blocks then runs the plan."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from ..._arguments import check_types
from ..._types import IntArray
from ...placement.engines import engine_profile, order_in_groups, violations
from ...placement.errors import FileFormatError, InputError, UnsupportedError
from ...placement.files import parse_json, read_text, write_text
from ...placement.memory import free_memory
from ...placement.model import ModelSpec
from ...placement.model_config import ConfigReading, read_config
from ...placement.model_families import BESIDE, MTP_LAYERS
from ...placement.plan import Plan

if TYPE_CHECKING:
    import torch


def expert_order(plan: Plan, groups: int | None = None) -> IntArray:
    """The order of experts by which an engine that deals them in contiguous blocks runs a plan.

    With the experts in this order, an engine that gives device g the g-th block of E / G experts runs the plan. The
    order is the plan's slot order; with group-limited routing (`groups` > 1, default the plan's model's) slots may be
    exchanged inside a device, so that every block of E / groups rows holds one original group whole.

    Args:
        plan: without replicas, with as many slots on every device.
        groups: of group-limited routing.

    Returns:
        [L, E] the original expert that row e of the permuted model holds.

    Raises:
        UnsupportedError: the plan has replicas or uneven slots, or it parts a group in a way no order can mend; the
            message says what to change.
    """
    if groups is not None:
        plan = replace(plan, model=plan.model.replace(groups=groups))
    broken = violations(plan, engine_profile("permute").constraints)
    if broken:
        raise UnsupportedError(f"a checkpoint cannot be permuted to this plan: {'; '.join(broken)}")
    if plan.model.groups == 1:
        return plan.physical_to_logical
    rows = (order_in_groups(row, plan.slot_device, plan.model.groups) for row in plan.physical_to_logical)
    return np.stack([row for row in rows if row is not None])


SINGLE, INDEX = "model.safetensors", ".safetensors.index.json"
"""All weights; and what the name of an index of shards ends with: "model" before it, "quant_model_weights" of
msModelSlim for Ascend."""
ORDER_FILE = "moeplace_expert_order.json"
ORDER_FORMAT = "moeplace.expert_order"
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PermutedCheckpoint:
    """What was written. expert_order: [L, E] the original expert in each row (what `ORDER_FILE` records).

    copied: other files taken over. left_out: folders and weights in other files, which would still be in the old order.
    verified: what was compared, where that was asked for.
    """

    folder: Path
    expert_order: IntArray
    weight_files: tuple[str, ...]
    bytes_written: int
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    verified: str = ""


@check_types
def permute_checkpoint(
    checkpoint: str | Path,
    plan: Plan,
    out: str | Path,
    *,
    invert: bool = False,
    progress: Progress | None = None,
    verify: bool = False,
) -> PermutedCheckpoint:
    """Writes a Transformers safetensors checkpoint with each MoE layer's experts in the plan's order.

    Router rows, biases and correction biases, expert weights and their quantisation scales move together, and tables of
    expert ids are rewritten, so the model computes what it did; headers, index and sharding stay as they are. What a
    tensor is, its name and its shape against the config say; what they leave open is refused. Bytes are streamed:
    memory does not grow with the checkpoint. `ORDER_FILE` beside the weights records the order.

    Args:
        checkpoint: the model's folder.
        plan: without replicas, with as many slots on every device; of a model with an encoder and a decoder it may be
            of the layers of one, and the other stays as it is.
        out: a new folder.
        invert: undo instead: `checkpoint` is a permuted folder, `out` becomes the original, byte for byte.
        progress: called with bytes written so far and in all.
        verify: compares logits of both on a few drawn prompts before `out` appears, where Transformers has the class
            and the model fits into memory, and otherwise every byte with what it should be.

    Returns:
        What was written.

    Raises:
        InputError: no such folder, `out` exists, too little disk, a plan for another model, a checkpoint permuted
            already (or, to invert, not by this plan).
        UnsupportedError: a tensor whose part in a MoE layer is not clear, a plan with replicas or uneven slots, or one
            that parts expert groups; see `expert_order`.
        FileFormatError: config, index or weights are malformed, truncated or incomplete.
    """
    source, target = Path(checkpoint), Path(out)
    if not source.is_dir():
        raise InputError(f"{source}: no such folder")
    if target.exists() or target.is_symlink():
        raise InputError(f"{target}: exists already; a checkpoint is written to a new folder only")
    reading, mtp_layers = checkpoint_model(source)
    spec = ModelSpec(**reading.fields)
    _check_same_model(spec, plan.model, reading.encoder_layers, source)
    order = expert_order(plan, spec.groups)
    _check_state(source, dict(zip(plan.moe_layers, order, strict=True)), invert)

    headers = read_weight_headers(source)
    tensors = [tensor for header in headers for tensor in header.tensors]
    roles = tensor_roles(tensors, spec, reading, mtp_layers)
    check_complete(headers, roles, spec.moe_layers)
    experts = experts_by_place(
        headers, roles, spec.experts, {spec.experts + spec.zero_experts, spec.experts * reading.expert_sets}
    )
    rows = dict(zip(plan.moe_layers, inverse(order) if invert else order, strict=True))
    roles = {name: role if role is not None and role.layer in rows else None for name, role in roles.items()}

    weights = tuple(header.file.name for header in headers)
    copied, left_out = other_files(source, weights)
    written = {header.file.name: permuted_header(header, roles, experts, rows) for header in headers}
    total = sum(len(written[header.file.name]) + header.file.stat().st_size - len(header.raw) for header in headers)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with new_folder(target, total) as scratch:
        for header in headers:
            ranges = file_ranges(header, roles, experts, rows)
            copy_ranges(ranges, written[header.file.name], scratch / header.file.name, report)
        for name in copied:
            shutil.copyfile(source / name, scratch / name)
        if not invert:
            write_expert_order(scratch, plan.moe_layers, order)
        verified = ""
        if verify:
            architecture = str((json_object(source / "config.json").get("architectures") or [""])[0])
            difference = differing_logits(source, scratch, architecture, total)
            if isinstance(difference, float):
                verified = f"logits of drawn prompts are those of the original, to {difference:.1g} of the largest"
            else:
                for header in headers:
                    parts = map(_content, _pieces(file_ranges(header, roles, experts, rows)))
                    check_bytes(scratch / header.file.name, itertools.chain([written[header.file.name]], parts))
                verified = f"every byte is where the order puts it; logits were not compared: {difference}"
    return PermutedCheckpoint(target, order, weights, total, copied, left_out, verified)


def _pieces(ranges: Iterable[ByteRange | Content]) -> Iterator[ByteRange | Content]:
    for part in ranges:
        if isinstance(part, Content):
            yield part
            continue
        for start in range(0, part.nbytes, COPY_BYTES):
            yield ByteRange(part.file, part.start + start, min(COPY_BYTES, part.nbytes - start))


def _content(part: ByteRange | Content) -> bytes:
    if isinstance(part, Content):
        return part.data
    with part.file.open("rb") as handle:
        handle.seek(part.start)
        return handle.read(part.nbytes)


def checkpoint_model(folder: Path) -> tuple[ConfigReading, int]:
    """What the config says, and how many layers for multi-token prediction stand behind the model's."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json; is this a Transformers checkpoint?")
    config = json_object(path)
    if reason := runs_other_experts(str(config.get("model_type"))):
        raise UnsupportedError(f"{path}: {reason}")
    try:
        # However weights are stored, their bytes move as they are.
        reading = read_config(path, expert_dtype="bf16")
    except InputError as error:
        raise FileFormatError(str(error)) from None
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    extra = [part.get(name) for part in parts for name in MTP_LAYERS]
    return reading, max((count for count in extra if type(count) is int), default=0)


def _check_same_model(checkpoint: ModelSpec, plan: ModelSpec, encoder_layers: int, folder: Path) -> None:
    stacks = [
        tuple(layer for layer in checkpoint.moe_layers if (layer < encoder_layers) is inside)
        for inside in (True, False)
    ]
    for name in ("experts", "moe_layers", "top_k", "hidden_size", "ffn_size"):
        stored, expected = getattr(checkpoint, name), getattr(plan, name)
        if stored != expected and not (name == "moe_layers" and encoder_layers and expected in stacks):
            raise InputError(
                f"{folder}: the plan is for another model: {name} is {stored} in the checkpoint, {expected} in the plan"
            )


def _check_state(folder: Path, order: Mapping[int, IntArray], invert: bool) -> None:
    recorded = read_expert_order(folder)
    if not invert and recorded is not None:
        raise InputError(
            f"{folder}: permuted already ({ORDER_FILE} is there), and a plan counts the original's experts; permute "
            "the original, or restore it first with invert=True"
        )
    if invert and recorded is None:
        raise InputError(f"{folder}: no {ORDER_FILE}, so this is not a permuted checkpoint and cannot be restored")
    if invert and recorded is not None:
        same = recorded.keys() == order.keys() and all(np.array_equal(recorded[layer], order[layer]) for layer in order)
        if not same:
            raise InputError(f"{folder}: permuted to another plan than the one given; use the plan it was made with")


# Which part of a Transformers checkpoint a tensor is, by its name and shape.


_LAYER = re.compile(r"(?P<stem>(?:.*?\.)?(?:layers?|blocks?|h)\.(?P<layer>\d+)\.)(?P<rest>.+)")
_ATTENTION = re.compile(r"(?:^|[._])(?:self_)?(?:attn|attention)(?:[._]|$)|(?:^|\.)(?:conv1d|conv)\.")
_SHARED = re.compile(r"(?:^|\.)shared?_|(?:^|\.)(?:shared_mlp|residual_mlp)(?:\.|$)")
_EXPERT = re.compile(
    r"(?P<block>(?:.+\.)?)(?:experts|local_experts)\.(?P<matrix>(?:gate_up|gate|up|down)_projs\.)?(?:expert_)?"
    r"(?P<expert>0|[1-9]\d*)\.(?P<part>.+)"
)
"""The matrix stands before the expert's number in gpt-oss's checkpoints for bitsandbytes."""
_FUSED = re.compile(r"(?P<block>(?:.+\.)?)(?:experts\.(?P<part>.+)|(?:input|output)_linear\.weight)")
_JOINED = re.compile(r"mlp\.(?:w1|v1|w2)")
"""DBRX's: experts behind one another in dimension 0."""
_ROUTER = re.compile(
    r"(?:^|\.)(?:gate|router)(?:\.|$)|e_score|correction_bias|expert_bias|per_expert|balancing|moe_statics"
)
_IDS = re.compile(r"(?:^|\.)tid2eid$")
_PACKED = re.compile(
    r"(?:^|[._])(?:qweight|qzeros|weight_packed|zero_point|W_q|zero|absmax|nested_absmax|quant_state|SCB)(?:[._]|$)"
)
"""Several values of a quantised matrix in one, or blocks that know no rows."""
_OF_PACKAGES = re.compile(r"(?:^|[._])(?:weight|g_idx|shape|deq_scale|quant_bias|trellis|codes|tokens_per_expert)$")
"""Whole numbers that packages for quantisation write of a matrix, and how many tokens an expert got."""
_NORM = re.compile(r"norm\.(?:weight|bias)$")
_METADATA = re.compile(r"\.quant_state\.bitsandbytes__\w+$")
"""bitsandbytes' text about a matrix, numbers as text included: of as many bytes as that takes."""
_SUSPECT = re.compile(r"expert|router|(?:^|[._])moe[._]|(?:^|\.)gate\.|e_score|tid2eid")
_WHOLE_NUMBERS = {
    "U8": "u1",
    "I8": "i1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "I64": "<i8",
    "U64": "<u8",
}


@dataclass(frozen=True)
class Role:
    """kind: "router" and "fused" hold an expert a row (dimension 0), "columns" an expert a column (the last
    dimension), "ids" experts' numbers as values; "expert" belongs to one expert alone.

    layer: the model's absolute index. expert: its index, for "expert". place: the name without the expert's number,
    equal for the tensors that change places with each other. sets: of "columns", how many sets of experts have a row
    each, of which the first changes.
    """

    kind: Literal["router", "fused", "columns", "ids", "expert"]
    layer: int
    expert: int = -1
    place: str = ""
    sets: int = 1


def tensor_roles(
    tensors: Sequence[StoredTensor], spec: ModelSpec, reading: ConfigReading, mtp_layers: int = 0
) -> dict[str, Role | None]:
    """Each tensor's part in a routed MoE layer, by its name; None for tensors a change of experts leaves alone.

    Layers past the model's, for multi-token prediction, keep their experts as they are, and so do parts of the model
    that are no language model.

    Raises:
        UnsupportedError: a tensor of a MoE layer that has a dimension of as many as there are experts, or one that
            speaks of experts elsewhere, and is not known. Leaving it alone could part an expert from its own tensors.
    """
    blocks: dict[int, set[str]] = defaultdict(set)
    stems: dict[int, str] = {}
    places: dict[str, tuple[int, str, str]] = {}
    for tensor in tensors:
        match = None if BESIDE.search(tensor.name) else _LAYER.fullmatch(tensor.name)
        if match is None:
            if _SUSPECT.search(tensor.name) and not BESIDE.search(tensor.name):
                raise UnsupportedError(
                    f"tensor {tensor.name} speaks of experts outside the MoE layers; how to permute it is not known"
                )
            continue
        decoder = reading.encoder_layers * bool(re.search(r"(?:^|\.)decoder\.", match["stem"]))
        layer, rest = int(match["layer"]) + decoder, match["rest"]
        if layer >= reading.hidden_layers + mtp_layers and _SUSPECT.search(rest):
            raise UnsupportedError(
                f"tensor {tensor.name} speaks of experts outside the MoE layers: the config has "
                f"{reading.hidden_layers} layers and {mtp_layers} for multi-token prediction"
            )
        if layer >= reading.hidden_layers:
            continue
        places[tensor.name] = (layer, match["stem"], rest)
        layout = (
            None
            if _ATTENTION.search(rest) or _SHARED.search(rest)
            else _EXPERT.fullmatch(rest) or _FUSED.fullmatch(rest)
        )
        if layout is not None:
            if (other := stems.setdefault(layer, match["stem"])) != match["stem"]:
                raise UnsupportedError(
                    f"experts of layer {layer} stand under {other} and {match['stem']} ({tensor.name}), as of two "
                    "models in one checkpoint; which of them the plan is of is not known"
                )
            blocks[layer].add(match["stem"] + layout["block"])
    if extra := sorted(blocks.keys() - set(spec.moe_layers)):
        raise UnsupportedError(
            f"layer {extra[0]} has tensors of experts, and by the config none; its MoE layers are {spec.moe_layers}"
        )
    roles: dict[str, Role | None] = dict.fromkeys(tensor.name for tensor in tensors)
    for tensor in tensors:
        if tensor.name in places:
            layer, stem, rest = places[tensor.name]
            if layer in spec.moe_layers and not _ATTENTION.search(rest) and not _SHARED.search(rest):
                roles[tensor.name] = _role(tensor, layer, stem, rest, blocks[layer], spec, reading)
    _check_single_routers([tensor for tensor in tensors if len(tensor.shape) == 2], roles)
    return roles


def _may_be_ids(tensor: StoredTensor, rest: str) -> bool:
    """Whether a tensor beside the experts may have experts' numbers as values: several whole numbers too wide for
    quantised weights, of no package's names. Counts of tokens are none."""
    several = math.prod(tensor.shape) > 1 and tensor.dtype in _WHOLE_NUMBERS and tensor.dtype not in ("U8", "I8")
    return several and not (_PACKED.search(rest) or _OF_PACKAGES.search(rest))


def _check_single_routers(matrices: Sequence[StoredTensor], roles: Mapping[str, Role | None]) -> None:
    """Refuses layers in which two matrices could each be the router's last."""
    seen: dict[int, str] = {}
    for tensor in matrices:
        role = roles[tensor.name]
        if role is not None and role.kind in ("router", "columns") and tensor.name.endswith(".weight"):
            other = seen.setdefault(role.layer, tensor.name)
            if other != tensor.name:
                raise UnsupportedError(
                    f"{other} and {tensor.name} both have a row or column for each expert; which of them the router's "
                    "scores come from is not known"
                )


def _role(
    tensor: StoredTensor, layer: int, stem: str, rest: str, blocks: set[str], spec: ModelSpec, reading: ConfigReading
) -> Role | None:
    def unclear(why: str) -> UnsupportedError:
        return UnsupportedError(
            f"tensor {tensor.name} of shape {list(tensor.shape)} is in a layer of {spec.experts} experts and {why}; "
            "leaving it as it is could give wrong results"
        )

    if single := _EXPERT.fullmatch(rest):
        place = f"{stem}{single['block']}experts.{single['matrix'] or ''}*.{single['part']}"
        return Role("expert", layer, int(single["expert"]), place)
    routed = {spec.experts, spec.experts + spec.zero_experts, reading.router_rows}
    first = tensor.shape[0] if tensor.shape else 0
    if fused := _FUSED.fullmatch(rest):
        if math.prod(tensor.shape) == 1 < spec.experts:
            return None
        if _NORM.search(rest) and tensor.shape == (spec.expert_output_size,):
            if first == spec.experts:
                raise unclear("is as long as an expert's output as well")
            return None
        if (_ROUTER.search(fused["part"] or "") and first in routed) or first == spec.experts:
            return Role("fused", layer)
        if fused["part"] and _JOINED.fullmatch(fused["part"]) and first % spec.experts == 0:
            return Role("fused", layer)
        if first == spec.experts + spec.zero_experts:
            return Role("fused", layer)
        raise unclear(f"expected {spec.experts} experts in dimension 0")
    if _IDS.search(rest):
        if tensor.dtype not in _WHOLE_NUMBERS:
            raise unclear(f"its expert ids are {tensor.dtype}")
        return Role("ids", layer)
    if _may_be_ids(tensor, rest):
        raise unclear("holds whole numbers, which may be experts'")
    sized = bool(routed.intersection(tensor.shape))
    if not any(f"{stem}{rest}".startswith(block) for block in blocks):
        if not sized or not _SUSPECT.search(rest):
            return None
        if not _ROUTER.search(rest):
            raise unclear("its name speaks of experts outside of their block")
    if _ROUTER.search(rest) or (_SUSPECT.search(rest) and sized):
        if reading.expert_sets > 1:
            if rest.endswith("_1"):
                return None
            if len(tensor.shape) == 2 and tensor.shape == (reading.expert_sets, spec.experts):
                return Role("columns", layer, sets=reading.expert_sets)
        if _PACKED.search(rest):
            raise unclear("has the router's weights packed, in which an expert's are not apart")
        if first in routed:
            plain = sum(size in routed for size in tensor.shape) == 1 or re.search(
                r"(?:gate|router|wg|classifier|proj|layer)\.weight$", rest
            )
            if not plain:
                raise unclear("has two dimensions of that size")
            return Role("router", layer)
        if len(tensor.shape) > 1 and tensor.shape[-1] in routed:
            return Role("columns", layer)
        if re.search(r"(?:^|\.)(?:gate|router)\.weight$", rest):
            raise unclear(f"is no router of theirs, expected {reading.router_rows} experts in dimension 0")
    elif sized and stem not in blocks:
        raise unclear("its name is not known")
    return None


# From recognised tensors and an order of experts to the byte ranges of each permuted file.


Experts: TypeAlias = "Mapping[str, Sequence[StoredTensor]]"


def experts_by_place(
    headers: Sequence[Header], roles: Mapping[str, Role | None], experts: int, stored: set[int]
) -> Experts:
    """The E tensors that change places with each other, in expert order, by `Role.place`, and behind them those that
    stay.

    stored: how many of a place there may be beside E: zero experts have some, or another set of experts.

    Raises:
        FileFormatError: a place lacks an expert. UnsupportedError: its experts differ in shape or dtype.
    """
    by_place: dict[str, dict[int, StoredTensor]] = defaultdict(dict)
    for header in headers:
        for tensor in header.tensors:
            role = roles[tensor.name]
            if role is not None and role.kind == "expert":
                by_place[role.place][role.expert] = tensor
    for place, tensors in by_place.items():
        if len(tensors) not in stored or sorted(tensors) != list(range(len(tensors))):
            wrong = sorted(set(range(experts)) ^ set(tensors))
            raise FileFormatError(
                f"{place}: expected tensors of experts 0 to {experts - 1}, expert {wrong[0]} is missing or too many"
            )
        first = tensors[0]
        for expert, tensor in tensors.items():
            alike = tensor.shape == first.shape or (_METADATA.search(place) and len(tensor.shape) == 1)
            if expert < experts and (tensor.dtype != first.dtype or not alike):
                raise UnsupportedError(
                    f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, expert 0's is {first.dtype} "
                    f"{list(first.shape)}: experts of different form cannot change places (expert {expert})"
                )
    return {place: [tensors[expert] for expert in sorted(tensors)] for place, tensors in by_place.items()}


def check_complete(headers: Sequence[Header], roles: Mapping[str, Role | None], layers: Sequence[int]) -> None:
    """Checks that every MoE layer has a router and experts among the tensors.

    Raises:
        FileFormatError: one has not; the layer is named.
    """
    seen = {(role.layer, role.kind in ("router", "columns")) for role in roles.values() if role is not None}
    for layer in layers:
        for is_router, what in ((True, "router"), (False, "experts")):
            if (layer, is_router) not in seen:
                names = ", ".join(header.file.name for header in headers[:3])
                raise FileFormatError(f"{names}: no {what} of layer {layer} among the tensors, which the plan places")


def _source(role: Role, experts: Experts, order: Mapping[int, IntArray]) -> StoredTensor:
    """The tensor whose content an expert's place gets."""
    rows = order[role.layer]
    return experts[role.place][rows[role.expert] if role.expert < len(rows) else role.expert]


def permuted_header(
    header: Header, roles: Mapping[str, Role | None], experts: Experts, order: Mapping[int, IntArray]
) -> bytes:
    """The permuted file's first bytes: the header as it is, but where text about a matrix has another length."""
    own = [(tensor, roles[tensor.name]) for tensor in header.tensors]
    sources = [_source(role, experts, order) if role is not None and role.kind == "expert" else t for t, role in own]
    if all(tensor.shape == source.shape for (tensor, _), source in zip(own, sources, strict=True)):
        return header.raw
    entries: dict[str, Any] = json.loads(header.raw[8:])
    start = 0
    for (tensor, _), source in zip(own, sources, strict=True):
        offsets = [start, start := start + source.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(source.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_ranges(
    header: Header, roles: Mapping[str, Role | None], experts: Experts, order: Mapping[int, IntArray]
) -> Iterator[ByteRange | Content]:
    """The source of every byte of the permuted file, which keeps the header: names and places stay, contents move.

    order: by absolute layer, [E] the expert whose content row e gets.
    """
    for tensor in header.tensors:
        role = roles[tensor.name]
        if role is None:
            yield ByteRange(tensor.file, tensor.start, tensor.nbytes)
        elif role.kind == "expert":
            source = _source(role, experts, order)
            yield ByteRange(source.file, source.start, source.nbytes)
        elif role.kind in ("ids", "columns"):
            yield Content(_rewritten(tensor, role, order[role.layer]))
        else:
            rows = order[role.layer]
            # Experts without weights stand behind the others in the router, and stay.
            count = tensor.shape[0] if role.kind == "router" or tensor.shape[0] % len(rows) else len(rows)
            if not tensor.nbytes or count < len(rows) or tensor.nbytes % count:
                raise UnsupportedError(
                    f"{tensor.name} has shape {list(tensor.shape)}, expected {len(rows)} experts in dimension 0"
                )
            width = tensor.nbytes // count
            yield from (ByteRange(tensor.file, tensor.start + int(row) * width, width) for row in rows)
            yield ByteRange(tensor.file, tensor.start + len(rows) * width, tensor.nbytes - len(rows) * width)


def _rewritten(tensor: StoredTensor, role: Role, rows: IntArray) -> bytes:
    """The tensor's bytes with its columns in the order of `rows`, or its expert ids as these rows count them."""
    with tensor.file.open("rb") as handle:
        handle.seek(tensor.start)
        raw = np.frombuffer(handle.read(tensor.nbytes), dtype=np.uint8)
    if role.kind == "columns":
        values = raw.reshape(*tensor.shape, -1)
        order = np.concatenate([rows, np.arange(len(rows), tensor.shape[-1])])
        changed = values[..., order, :]
        if role.sets > 1:
            changed[1:] = values[1:]
        return np.ascontiguousarray(changed).tobytes()
    ids = raw.view(_WHOLE_NUMBERS[tensor.dtype])
    inside = (ids >= 0) & (ids < len(rows))
    changed = ids.copy()
    changed[inside] = np.argsort(rows)[ids[inside]]
    return changed.tobytes()


def inverse(order: IntArray) -> IntArray:
    """[L, E] the order that undoes `order`."""
    return np.argsort(order, axis=1)


# The files of a checkpoint's folder: which hold weights, which go along, and the record of a permuted order.


def write_expert_order(folder: Path, moe_layers: Sequence[int], order: IntArray) -> None:
    """Records in a model's folder which original expert each row holds."""
    rows = {str(layer): row.tolist() for layer, row in zip(moe_layers, order, strict=True)}
    write_text(folder / ORDER_FILE, json.dumps({"format": ORDER_FORMAT, "version": 1, "expert_order": rows}))


def read_expert_order(folder: str | Path) -> dict[int, IntArray] | None:
    """The order recorded in a permuted model's folder, by absolute layer; None when the folder has none.

    Routing recorded on the permuted model is in the original's experts after `order[layer][recorded_ids]`.

    Raises:
        FileFormatError: the file is malformed, or a row is not a permutation; the layer is named.
    """
    path = Path(folder) / ORDER_FILE
    if not path.is_file():
        return None
    data = json_object(path)
    rows = data.get("expert_order")
    if data.get("format") != ORDER_FORMAT or data.get("version") != 1 or not isinstance(rows, dict):
        raise FileFormatError(f"{path}: not a {ORDER_FORMAT} file of version 1")
    result = {}
    for layer, row in rows.items():
        is_row = isinstance(row, list) and all(type(expert) is int for expert in row)
        if not layer.isdecimal() or not is_row or sorted(row) != list(range(len(row))):
            raise FileFormatError(f"{path}: layer {layer}: expected every expert once")
        result[int(layer)] = np.array(row, dtype=np.int64)
    return result


def read_weight_headers(folder: Path) -> list[Header]:
    """The checked headers of a checkpoint's weight files: `model.safetensors`, or all that its index names.

    Raises:
        InputError: no weights, or both forms. FileFormatError: a missing shard, a tensor that the index places in
            another shard or does not know, a shard name that leaves the folder.
    """
    index = weight_index(folder)
    if index is None:
        return [read_header(folder / SINGLE)]
    placed = json_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise FileFormatError(f"{index}: no weight_map")
    files: dict[str, set[str]] = {}
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise FileFormatError(f"{index}: tensor {name}: {str(file)[:100]!r} is not a shard of this folder")
        files.setdefault(file, set()).add(name)
    headers = []
    for file, expected in sorted(files.items()):
        if not (folder / file).is_file():
            raise FileFormatError(f"{folder}: shard {file} is missing, the index places {len(expected)} tensors in it")
        header = read_header(folder / file)
        different = expected ^ {tensor.name for tensor in header.tensors}
        if different:
            raise FileFormatError(
                f"{folder / file}: the index and the shard disagree about tensor {min(different)} "
                f"({len(different)} in all)"
            )
        headers.append(header)
    return headers


def weight_index(folder: Path) -> Path | None:
    """The index of the folder's shards; None where all weights are in `SINGLE`.

    Raises:
        InputError: neither is there, or both, or several indexes and none is the model's.
    """
    single, model = (folder / SINGLE).is_file(), folder / f"model{INDEX}"
    files = [model] if model.is_file() else sorted(folder.glob(f"*{INDEX}"))
    if single and model.is_file():
        raise InputError(f"{folder}: there is both {SINGLE} and {model.name}; remove the stale one")
    if not single and len(files) != 1:
        listed = ", ".join(path.name for path in files)
        raise InputError(
            f"{folder}: there is neither {SINGLE} nor {model.name}"
            + (f", but {listed}; remove the stale ones" if files else "; save the model with save_pretrained first")
        )
    return None if single else files[0]


def other_files(folder: Path, weights: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names to copy, and names left out: folders, and weights that stay in the old order."""
    copied: list[str] = []
    left_out: list[str] = []
    index = weight_index(folder)
    for entry in sorted(folder.iterdir()):
        if entry.name in weights or entry.name == ORDER_FILE:
            continue
        skip = not entry.is_file() or (entry.name.endswith(OTHER_WEIGHTS) and entry != index)
        (left_out if skip else copied).append(entry.name)
    return tuple(copied), tuple(left_out)


@contextlib.contextmanager
def new_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """A scratch folder beside `target`, renamed to it when the block ends well and removed when not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < nbytes:
        raise InputError(f"{target.parent}: the permuted weights take {nbytes:,} bytes, {free:,} are free")
    scratch = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    scratch.mkdir()
    try:
        yield scratch
        if target.exists():
            raise InputError(f"{target}: appeared meanwhile; nothing was overwritten")
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def json_object(path: Path) -> dict[str, Any]:
    """Parses a JSON file that must hold an object, and raises FileFormatError when it does not."""
    data = parse_json(read_text(path, limit_bytes=1 << 28), str(path))
    if not isinstance(data, dict):
        raise FileFormatError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


# The safetensors format, as far as moving tensors between files needs it: checked headers, and copying byte ranges.
# Format: an unsigned 64-bit length, a JSON header of that length, then the tensors without holes
# (https://github.com/huggingface/safetensors, README, "Format").


DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
MAX_HEADER = 100_000_000
"""Bytes, the format's own limit."""
MAX_RANK = 16
COPY_BYTES = 1 << 23


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `start` counts bytes from the beginning of the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checked header. raw: the file's first bytes up to the first tensor. tensors: in the order of their bytes."""

    file: Path
    raw: bytes
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True)
class ByteRange:
    file: Path
    start: int
    nbytes: int


@dataclass(frozen=True)
class Content:
    """Bytes that stand in no file as they are."""

    data: bytes


def read_header(file: Path) -> Header:
    """Reads and checks a header, no tensor.

    Raises:
        FileFormatError: truncated, not safetensors, an unknown dtype, a tensor whose size is not its shape's, tensors
            that overlap, leave holes or do not end with the file; the tensor is named.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise FileFormatError(
                f"{file}: not a safetensors file, or truncated ({size:,} bytes, header said to take {length:,})"
            )
        text = handle.read(length)
    entries = parse_json(text, f"{file}: the safetensors header")
    if not isinstance(entries, dict):
        raise FileFormatError(f"{file}: the safetensors header is not a JSON object")
    entries.pop("__metadata__", None)
    base = 8 + length
    tensors = sorted((_stored(file, base, *entry) for entry in entries.items()), key=lambda t: (t.start, t.nbytes))
    end = base
    for tensor in tensors:
        if tensor.start != end:
            raise FileFormatError(f"{file}: tensor {tensor.name} starts at byte {tensor.start:,}, expected {end:,}")
        end += tensor.nbytes
    if end != size:
        raise FileFormatError(
            f"{file}: {size:,} bytes, the header describes {end:,}; truncated, or the header is of another file"
        )
    return Header(file, prefix + text, tuple(tensors))


def copy_ranges(
    ranges: Iterable[ByteRange | Content], header: bytes, target: Path, report: Callable[[int], None]
) -> None:
    """Writes `header` and then the ranges one after the other, through a buffer of a few megabytes.

    report: called with the bytes of each write.

    Raises:
        FileFormatError: a source ended early (it changed since its header was read).
    """
    buffer = memoryview(bytearray(COPY_BYTES))
    source: Any = None
    try:
        with target.open("wb") as out:
            out.write(header)
            report(len(header))
            for part in _joined(ranges):
                if isinstance(part, Content):
                    out.write(part.data)
                    report(len(part.data))
                    continue
                if source is None or source.name != str(part.file):
                    if source is not None:
                        source.close()
                    source = open(str(part.file), "rb", buffering=0)  # noqa: SIM115 - kept for the next range
                source.seek(part.start)
                left = part.nbytes
                while left:
                    got = source.readinto(buffer[: min(left, COPY_BYTES)])
                    if not got:
                        raise FileFormatError(f"{part.file}: ended early; did it change while it was read?")
                    out.write(buffer[:got])
                    report(got)
                    left -= got
            out.flush()
            os.fsync(out.fileno())
    finally:
        if source is not None:
            source.close()


def _joined(ranges: Iterable[ByteRange | Content]) -> Iterator[ByteRange | Content]:
    """Neighbouring ranges as one: experts that stay need no seek each."""
    current: ByteRange | None = None
    for part in ranges:
        if isinstance(part, ByteRange):
            if current is not None and part.file == current.file and part.start == current.start + current.nbytes:
                current = ByteRange(current.file, current.start, current.nbytes + part.nbytes)
                continue
            if current is not None:
                yield current
            current = part
            continue
        if current is not None:
            yield current
        current = None
        yield part
    if current is not None:
        yield current


def _stored(file: Path, base: int, name: str, entry: Any) -> StoredTensor:
    def wrong(what: str) -> FileFormatError:
        return FileFormatError(f"{file}: tensor {name[:200]}: {what}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong("expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise wrong(f"dtype {str(dtype)[:40]!r} is unknown")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or any(type(n) is not int or n < 0 for n in shape):
        raise wrong("shape must list at most 16 non-negative whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int or n < 0 for n in offsets):
        raise wrong("data_offsets must be two non-negative whole numbers")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise wrong(f"{offsets[1] - offsets[0]:,} bytes, its shape {shape} and dtype {dtype} take {bits / 8:,.1f}")
    return StoredTensor(file, name, dtype, tuple(shape), base + offsets[0], bits // 8)


# Whether a permuted checkpoint computes what the original does, and holds the bytes that it should.

PROMPTS, TOKENS = 3, 16
TOLERANCE = 1e-3
"""Largest difference of logits in float32, relative to the largest: sums over experts come in another order."""
MEMORY_A_BYTE = 6
"""Bytes in memory that a byte of the checkpoint may take: 8-bit weights become float32, with room for a tensor more."""


def differing_logits(original: Path, permuted: Path, architecture: str, nbytes: int) -> float | str:
    """The largest difference of the two models' logits on drawn prompts, relative to the largest logit.

    Or why they cannot be compared: Transformers is not installed, has no such class or does not load it here, or the
    model does not fit into memory.

    Raises:
        UnsupportedError: the logits differ by more than rounding.
    """
    available = free_memory()
    if nbytes * MEMORY_A_BYTE > available:
        return f"the model takes up to {nbytes * MEMORY_A_BYTE:,} bytes of memory, {available:,} are free"
    try:
        import transformers
    except ImportError:
        return "Transformers is not installed"
    kind = getattr(transformers, architecture, None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        return f"Transformers has no class {architecture or '(the config names no architecture)'}"
    try:
        before = _logits(kind, original)
    except Exception as error:  # noqa: BLE001  # quantised models want kernels, packages or a GPU of their own
        return f"the original does not run here ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if not before.isfinite().all():
        return "the original's own are not all finite"
    after = _logits(kind, permuted)
    difference = float((before - after).abs().max() / before.abs().max().clamp(min=1e-9))
    if not difference <= TOLERANCE:
        raise UnsupportedError(
            f"{permuted}: logits differ by {difference:.2g} of the largest, rounding gives less than {TOLERANCE:g}; "
            f"how to permute a {architecture} is not known, and nothing was written"
        )
    return difference


def runs_other_experts(model_type: str) -> str | None:
    """Why this model's logits change with the order of its experts, in the Transformers installed here.

    NLLB-MoE's experts are handed the router's choice as a mask, 0 or 1 for each expert, and take these for experts'
    numbers in Transformers 5.24: experts 0 and 1 alone run, whichever were chosen.
    """
    if model_type != "nllb-moe":
        return None
    try:
        import torch
        from transformers import NllbMoeConfig
        from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts
    except ImportError:
        return None
    experts = NllbMoeExperts(NllbMoeConfig(d_model=2, num_experts=3), 2).eval()
    ran = []
    for name, expert in experts.named_children():
        expert.register_forward_hook(lambda *_, name=name: ran.append(name))
    experts(torch.ones(1, 2), torch.tensor([[0, 0, 1]]), torch.tensor([[0.0, 0.0, 1.0]]))
    if "expert_2" in ran:
        return None
    return (
        "Transformers' NllbMoeExperts takes the mask of chosen experts for their numbers, so that experts 0 and 1 "
        "alone run, and logits change with the order of experts; update Transformers to one that runs the chosen ones"
    )


def _logits(kind: Any, folder: Path) -> torch.Tensor:
    import torch

    model, read = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    if unlike := sorted(map(str, [*read["missing_keys"], *read["mismatched_keys"]])):
        raise ValueError(f"Transformers has no weights for {unlike[0]}, and {len(unlike) - 1} more, and draws them")
    model = model.eval()
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (PROMPTS, TOKENS), generator=torch.Generator().manual_seed(0))
    arguments = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = ids
    # Some draw in their forward, as diffusion models their canvas.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        output = model(**arguments)
    logits = getattr(output, "logits", None)
    chosen: torch.Tensor = output[0] if logits is None else logits
    return chosen


def check_bytes(file: Path, parts: Iterable[bytes]) -> None:
    """Compares a written file with what it should hold, part by part.

    Raises:
        FileFormatError: a part differs, or the file is longer; the place is named.
    """
    with file.open("rb") as handle:
        for expected in parts:
            if handle.read(len(expected)) != expected:
                place = handle.tell() - len(expected)
                raise FileFormatError(f"{file}: byte {place:,} or one after it is not what was written")
        if handle.read(1):
            raise FileFormatError(f"{file}: longer than what was written")
