"""Weights of a Transformers model in its own files: a rank reads the rows of its experts alone, and writes them again.

Reading comes first, then writing, then what both ask Transformers: how names and tensors on disk become parameters. One
expert is converted at a time, so that no rank holds more than its own rows and one expert.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..._arguments import check_types
from ...placement.errors import FileFormatError, InputError, UnsupportedError
from ..permute.checkpoint import StoredTensor, read_weight_headers
from .coordination import check_consistent, wait_everywhere
from .data_parallel import WRAPPERS, expert_layers
from .experts import PlacedExperts

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Of safetensors, as far as weights that are not quantised have them."""

SHARD_BYTES = 5_000_000_000


# Reading.


def load_weights(model: nn.Module, folder: str | Path) -> int:
    """Reads a folder of safetensors into a model whose experts are spread: whole tensors, but this rank's experts only.

    Args:
        model: of Transformers, on real devices.
        folder: as `save_pretrained`, `export_hf` or a hub have it.

    Returns:
        Bytes read.

    Raises:
        InputError: a tensor is missing, or has another shape than the model's. FileFormatError: a malformed file.
        UnsupportedError: the weights are quantised, or experts are converted in a way that mixes them.
    """
    reader = _Reader(model, Path(folder))
    with torch.no_grad():
        for target, sources in reader.targets.items():
            reader.load(target, sources)
    reader.check_complete()
    return reader.nbytes


class _Reader:
    """targets: {parameter: its sources on disk, in natural order}. nbytes: read so far."""

    def __init__(self, model: Any, folder: Path) -> None:
        from transformers.core_model_loading import dot_natural_key

        self._folder, self._model = folder, model
        if getattr(model.config, "quantization_config", None) is not None:
            raise UnsupportedError(
                f"{folder}: the model's config says that its weights are quantised; experts are spread in the type "
                "that they train in: write them in bfloat16 first, and leave out quantization_config"
            )
        self._conversion = _Conversion.of(model)
        self._state = dict(model.state_dict(keep_vars=True))
        self._experts = _expert_tensors(model)
        self._loaded: set[str] = set()
        self.nbytes = 0
        self.targets: dict[str, list[tuple[str, StoredTensor]]] = defaultdict(list)
        unknown = []
        tensors = [tensor for header in read_weight_headers(folder) for tensor in header.tensors]
        for tensor in sorted(tensors, key=lambda tensor: dot_natural_key(tensor.name)):
            target, pattern = self._conversion.target(tensor.name, self._state)
            if target in self._state:
                self.targets[target].append((pattern, tensor))
            else:
                unknown.append(tensor.name)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        unknown = [name for name in unknown if not any(re.search(pattern, name) for pattern in ignored)]
        if unknown:
            warnings.warn(
                f"{folder}: {len(unknown)} tensors belong to no parameter of {type(model).__name__} and were not read: "
                f"{', '.join(unknown[:4])}{', ...' if len(unknown) > 4 else ''}",
                stacklevel=4,
            )

    def load(self, target: str, sources: list[tuple[str, StoredTensor]]) -> None:
        if target not in self._experts:
            whole = [(pattern, tensor.name, self._read(tensor)) for pattern, tensor in sources]
            for name, value in self._conversion.apply(target, whole, self._state).items():
                self._put(name, value)
            return
        module, name = self._experts[target]
        lists: dict[str, list[StoredTensor]] = defaultdict(list)
        for pattern, tensor in sources:
            lists[pattern].append(tensor)
        for row, expert in enumerate(module.row_expert.tolist()):
            parts = [
                (pattern, tensors[0].name, self._read_expert(pattern, tensors, expert, module, name))
                for pattern, tensors in lists.items()
            ]
            alone = {target: torch.empty(1, *module.shapes[name], device="meta")}
            for made, value in self._conversion.apply(target, parts, alone).items():
                if made != target or tuple(value.shape) != tuple(alone[target].shape):
                    raise InputError(
                        f"{self._folder}: expert {expert} of {target} has shape {tuple(value.shape)} as {made}, "
                        f"expected {tuple(alone[target].shape)}"
                    )
                module.fill(name, row, value[0])
        self._loaded.add(target)

    def check_complete(self) -> None:
        self._model.tie_weights()
        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        missing = [name for name in self._state if name not in self._loaded and name not in tied]
        through = {source for name, source in tied.items() if name in self._loaded}
        missing = [name for name in missing if name not in through]
        if missing:
            raise InputError(
                f"{self._folder}: no tensors for {len(missing)} parameters of {type(self._model).__name__}: "
                f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}"
            )

    def _put(self, name: str, value: Tensor) -> None:
        if name not in self._state:
            raise InputError(f"{self._folder}: {name} is no parameter of {type(self._model).__name__}")
        target = self._state[name]
        if value.shape != target.shape:
            raise InputError(f"{self._folder}: {name} has shape {list(value.shape)}, expected {list(target.shape)}")
        if isinstance(target, DTensor):
            raise InputError(f"{name} is sharded already; read weights first, then call fully_shard")
        target.copy_(value)
        self._loaded.add(name)

    def _read_expert(
        self, pattern: str, tensors: list[StoredTensor], expert: int, module: PlacedExperts, name: str
    ) -> Tensor:
        experts = module.num_experts
        # Those that compute nothing have tensors in files that Transformers wrote, and none in released ones.
        stored = (experts, experts + module.unused_rows.get(name, 0))
        if len(tensors) in stored and (experts > 1 or "*" in pattern):
            return self._read(tensors[expert])
        if len(tensors) == 1 and tensors[0].shape and tensors[0].shape[0] >= experts:
            return self._read(tensors[0], expert)
        raise InputError(
            f"{self._folder}: {tensors[0].name} stands for {experts} experts, and {len(tensors)} tensors of shape "
            f"{list(tensors[0].shape)} are there; expected one an expert, or one with a row for each"
        )

    def _read(self, tensor: StoredTensor, row: int | None = None) -> Tensor:
        """The tensor, or one of its rows as [1, ...]; no other byte of the file."""
        if tensor.dtype not in DTYPES:
            raise UnsupportedError(
                f"{tensor.file}: {tensor.name} is {tensor.dtype}, a quantised type; write the weights in bfloat16 first"
            )
        shape, start, nbytes = tensor.shape, tensor.start, tensor.nbytes
        if row is not None:
            nbytes //= shape[0]
            shape, start = (1, *shape[1:]), start + row * nbytes
        raw = np.fromfile(tensor.file, dtype=np.uint8, count=nbytes, offset=start)
        if len(raw) != nbytes:
            raise FileFormatError(f"{tensor.file}: {tensor.name} ends after {len(raw)} of {nbytes} bytes")
        self.nbytes += nbytes
        # Torch says 0 elements cannot be viewed as another type.
        return (
            torch.from_numpy(raw).view(DTYPES[tensor.dtype]).view(shape)
            if nbytes
            else torch.empty(shape, dtype=DTYPES[tensor.dtype])
        )


def materialise(model: nn.Module, device: torch.device) -> None:
    """Gives every parameter and buffer on the meta device memory on `device`: parameters without values, buffers that
    no checkpoint has (rotary frequencies) with those that Transformers computes.

    Raises:
        UnsupportedError: such a buffer that Transformers does not compute.
    """
    made: dict[int, nn.Parameter] = {}
    computed: list[tuple[str, nn.Module, str]] = []
    for path, module in model.named_modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if value.is_meta:
                if id(value) not in made:
                    made[id(value)] = nn.Parameter(torch.empty_like(value, device=device), value.requires_grad)
                setattr(module, name, made[id(value)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                mark = float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min
                module._buffers[name] = torch.full_like(buffer, mark, device=device)
                if name in module._non_persistent_buffers_set:
                    computed.append((f"{path}.{name}", module, name))
    for module in {id(module): module for _, module, _ in computed}.values():
        _initialise(model, module)
    for path, module, name in computed:
        value = module.get_buffer(name)
        left = value.isnan() if value.is_floating_point() else value == torch.iinfo(value.dtype).min
        if bool(left.any()):
            raise UnsupportedError(
                f"{path} is on the meta device, stands in no checkpoint, and {type(model).__name__} does not compute "
                "it; build the model on a real device"
            )


@torch.no_grad()
def _initialise(model: Any, module: nn.Module) -> None:
    """What Transformers computes for a module of its own: by the model that it belongs to."""
    if hasattr(model, "_init_weights"):
        model._init_weights(module)


# Writing.


@dataclass(frozen=True)
class _Entry:
    """A tensor on disk."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@check_types
def export_hf(model: nn.Module, folder: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Writes the model as `save_pretrained` would in one process: config, and safetensors with all experts in order.

    Every rank calls it and writes its own experts into files that all ranks see; the first writes the rest. No rank
    holds more than its own weights, one expert, and on the first rank the other weights.

    Args:
        model: of Transformers, spread by `parallelize`, wrapped or not.
        folder: new or empty.
        shard_bytes: most bytes a file, though one tensor at least.

    Returns:
        The folder.

    Raises:
        InputError: the model is not spread, or the folder holds weights already; on every rank.
    """
    folder = Path(folder)
    while not hasattr(model, "config"):
        wrapped = [name for name in WRAPPERS if isinstance(getattr(model, name, None), nn.Module)]
        if not wrapped:
            raise InputError(f"{type(model).__name__} is no Transformers model: it has no config")
        model = getattr(model, wrapped[0])
    layers = expert_layers(model)
    if not layers:
        raise InputError(f"{type(model).__name__} has no layer of placed experts; save_pretrained writes it")
    mesh = layers[0][1].mesh
    failure = None
    if mesh.first and folder.is_dir() and any(folder.glob("*.safetensors")):
        failure = InputError(f"{folder}: holds weights already; give a new folder")
    check_consistent(mesh, "folder to write to", str(shard_bytes), failure)
    writer = _Writer(model, layers, folder, shard_bytes)
    if mesh.first:
        writer.lay_out()
    wait_everywhere(mesh)
    writer.write(mesh.first, mesh.copy)
    wait_everywhere(mesh)
    return folder


class _Writer:
    def __init__(self, model: Any, layers: Sequence[tuple[str, PlacedExperts]], folder: Path, shard_bytes: int) -> None:
        self._model, self._layers, self._folder = model, layers, folder
        self._conversion = _Conversion.of(model)
        self._first_of: set[str] = set()
        """Names of the first expert's tensors, where each expert has its own."""
        experts = _expert_tensors(model)
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        state = {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in experts}
        self._others = {_plain(name): value for name, value in state.items() if _plain(name) not in tied}
        entries = list(self._entries(_on_meta(self._others)))
        for path, module in layers:
            entries += self._expert_entries(path, module)
        self._place: dict[str, tuple[str, int]] = {}
        self._files: dict[str, list[_Entry]] = {}
        self._pack(entries, shard_bytes)

    def lay_out(self) -> None:
        """Files of full size with their headers, and all that is not weights."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for file, entries in self._files.items():
            header = self._header(entries)
            with (self._folder / file).open("wb") as handle:
                handle.write(header)
                handle.truncate(len(header) + sum(entry.nbytes for entry in entries))
        if len(self._files) > 1:
            total = sum(entry.nbytes for entries in self._files.values() for entry in entries)
            names = {entry.name: file for file, entries in self._files.items() for entry in entries}
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2, sort_keys=True)
            (self._folder / "model.safetensors.index.json").write_text(text + "\n")
        self._model.config.save_pretrained(self._folder)
        if getattr(self._model, "generation_config", None) is not None and self._model.can_generate():
            self._model.generation_config.save_pretrained(self._folder)

    @torch.no_grad()
    def write(self, first: bool, copy: int) -> None:
        others = {}
        for name, value in self._others.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if first:
                others[name] = whole.detach().cpu()
        if first:
            for name, value in self._conversion.revert(others).items():
                self._write(name, value)
        for path, module in self._layers:
            if copy and module.shards is None:
                continue
            owner_E = module.placement.device[module.placement.slots_of[:, 0]]
            for expert, row in zip(*np.unique(module.row_expert, return_index=True), strict=True):
                if owner_E[expert] == module.mesh.rank:
                    alone = {
                        f"{_plain(path)}.{name}": module.joined(value[row : row + 1]).cpu()
                        for name, value in module.named_parameters(recurse=False)
                    }
                    if not copy:
                        self._write_expert(alone, int(expert))

    def _write_expert(self, alone: Mapping[str, Tensor], expert: int) -> None:
        for name, value in self._conversion.revert(alone).items():
            if name in self._first_of:
                self._write(self._numbered(name, expert), value)
            else:
                self._write(name, value, expert)

    def _entries(self, values: Mapping[str, Tensor]) -> Iterator[_Entry]:
        for name, value in self._conversion.revert(values).items():
            yield _Entry(name, value.dtype, tuple(value.shape))

    def _expert_entries(self, path: str, module: PlacedExperts) -> Iterator[_Entry]:
        """What the layer's experts are on disk, from two of them without content."""
        two = {
            f"{_plain(path)}.{name}": torch.empty(2, *module.shapes[name], dtype=value.dtype, device="meta")
            for name, value in module.named_parameters(recurse=False)
        }
        made = {entry.name: entry for entry in self._entries(two)}
        # Of experts that compute nothing Transformers keeps rows all the same: zeros, as a new file is.
        unused = {
            entry.name: more
            for parameter, more in module.unused_rows.items()
            for entry in self._entries({key: two[key] for key in (f"{_plain(path)}.{parameter}",)})
        }
        for name, entry in made.items():
            second = self._numbered(name, 1)
            if second != name and second in made:
                self._first_of.add(name)
                for expert in range(module.num_experts + unused.get(name, 0)):
                    yield _Entry(self._numbered(name, expert), entry.dtype, entry.shape)
            elif self._numbered(name, 0) not in made or self._numbered(name, 0) == name:
                if entry.shape[0] != 2:
                    raise UnsupportedError(f"{name}: Transformers makes shape {list(entry.shape)} of two experts")
                rows = module.num_experts + unused.get(name, 0)
                yield _Entry(name, entry.dtype, (rows, *entry.shape[1:]))

    @staticmethod
    def _numbered(name: str, expert: int) -> str:
        """The name with the last number in it replaced: the expert's, behind the layer's."""
        parts = name.split(".")
        places = [place for place, part in enumerate(parts) if part.isdecimal()]
        if len(places) < 2:
            return name
        parts[places[-1]] = str(expert)
        return ".".join(parts)

    def _pack(self, entries: Iterable[_Entry], shard_bytes: int) -> None:
        groups: list[list[_Entry]] = [[]]
        size = 0
        for entry in entries:
            if groups[-1] and size + entry.nbytes > shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(entry)
            size += entry.nbytes
        for number, group in enumerate(groups, 1):
            file = "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
            self._files[file] = group
            start = len(self._header(group))
            for entry in group:
                self._place[entry.name] = (file, start)
                start += entry.nbytes

    @staticmethod
    def _header(entries: Sequence[_Entry]) -> bytes:
        names = {dtype: name for name, dtype in DTYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for entry in entries:
            header[entry.name] = {
                "dtype": names[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, start + entry.nbytes],
            }  # fmt: skip
            start += entry.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _write(self, name: str, value: Tensor, row: int = 0) -> None:
        file, start = self._place[name]
        content = value.contiguous().flatten().view(torch.uint8).numpy() if value.numel() else np.empty(0, np.uint8)
        handle = os.open(self._folder / file, os.O_WRONLY)
        try:
            view, offset = memoryview(content.data), start + row * len(content)
            while len(view):
                written = os.pwrite(handle, view, offset)
                view, offset = view[written:], offset + written
        finally:
            os.close(handle)


# What Transformers knows.


@dataclass(frozen=True)
class _Conversion:
    """How names and tensors on disk become the model's parameters, and back."""

    model: Any
    renamings: list[Any]
    converters: list[Any]

    @classmethod
    def of(cls, model: nn.Module) -> _Conversion:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        if not isinstance(model, PreTrainedModel):
            raise InputError(f"{type(model).__name__} is no Transformers model; its weights go through load_logical")
        entries = get_model_conversion_mapping(model)
        return cls(
            model,
            [entry for entry in entries if isinstance(entry, WeightRenaming)],
            [entry for entry in entries if isinstance(entry, WeightConverter)],
        )

    def target(self, name: str, state: Mapping[str, Any]) -> tuple[str, str]:
        """(the parameter that a tensor on disk is for, or part of, the pattern that says so)."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(name, self.renamings, self.converters, prefix, dict(state))
        if target not in state and name in state:
            target, pattern = name, None
        return target, pattern or ""

    def apply(
        self, target: str, sources: Sequence[tuple[str, str, Tensor]], shapes: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """{parameter: value} from (pattern, name, tensor) of all its sources. shapes: of parameters asked for."""
        pattern = sources[0][0]
        if not pattern:
            return {target: sources[0][2]}
        converter = copy.deepcopy(next(entry for entry in self.converters if pattern in entry.source_patterns))
        for pattern, name, tensor in sources:
            converter.add_tensor(target, name, pattern, tensor)
        made = converter.convert(target, model=_Shapes(self.model, shapes), config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def revert(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name on disk: tensor} of parameters by name."""
        from transformers.core_model_loading import revert_weight_conversion

        seen: Any = _Shapes(self.model, values)
        made: dict[str, Tensor] = revert_weight_conversion(seen, dict(values))
        return made


class _Shapes:
    """The model as conversions see it, with parameters of the shapes that are converted."""

    def __init__(self, model: nn.Module, shapes: Mapping[str, Tensor]) -> None:
        self._model, self._shapes = model, shapes

    def get_parameter(self, name: str) -> Tensor:
        return self._shapes[name]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _expert_tensors(model: nn.Module) -> dict[str, tuple[PlacedExperts, str]]:
    """By the name that the model gives each, several where layers share their experts."""
    return {
        f"{_plain(path)}.{name}": (module, name)
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PlacedExperts)
        for name, _ in module.named_parameters(recurse=False)
    }


def _plain(path: str) -> str:
    """A name as the model has it without wrappers."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS[1:])


def _on_meta(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in values.items()}
