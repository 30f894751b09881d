"""Files of `torch.save` that nobody vouches for, and zip archives: sizes and names are checked before anything is read.

Below every package, as `_types`: recordings and placement files of engines both come so.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .placement.errors import FileFormatError, UnsupportedError

PLAIN = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}
NAMED_OPCODES = {"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "OBJ", "NEWOBJ", "NEWOBJ_EX"}


def checked_members(name: str, archive: zipfile.ZipFile, size: int) -> list[zipfile.ZipInfo]:
    """The members of a zip archive of `size` bytes, which together take no more of the file than there is of it.

    zipfile allocates what a member claims to take before it reads.

    Raises:
        FileFormatError: they claim more, or a stored member claims another size than it takes.
    """
    members = archive.infolist()
    if sum(member.compress_size for member in members) > size:
        raise FileFormatError(f"{name}: members claim more than the {size:,} bytes of the file; damaged")
    for member in members:
        if member.compress_type == zipfile.ZIP_STORED and member.file_size != member.compress_size:
            raise FileFormatError(f"{name}: {member.filename[:60]!r} is stored and claims two sizes; damaged")
    return members


def load_plain(path: Path) -> Any:
    """Lists, dicts, numbers, text and CPU tensors of a `torch.save` file, and nothing else.

    Nothing is unpacked before sizes are checked: members must be stored as they are, so that what comes into memory is
    no more than the file; and the structure may name tensors only, so that nothing in it is called.

    Raises:
        FileFormatError: damaged, compressed, or holding anything else. UnsupportedError: torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise UnsupportedError(f"{path}: reading this needs torch; pip install 'moeplace[torch]'") from None
    try:
        with zipfile.ZipFile(path) as archive:
            members = checked_members(str(path), archive, path.stat().st_size)
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
            if packed or sum(member.file_size for member in members) > path.stat().st_size:
                raise FileFormatError(
                    f"{path}: members that unpack to more than the file; torch.save writes none, refused"
                )
            structure = [member for member in members if member.filename.endswith("/data.pkl")]
            if len(structure) != 1:
                raise FileFormatError(f"{path}: {len(structure)} members named data.pkl, expected 1; not of torch.save")
            _check_names(path, archive.read(structure[0]))
        # Mapped, so that a tensor that claims more than its member ends with the file: reading on is not possible.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (FileFormatError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - torch's unpickler lets any error through that the bytes provoke
        raise FileFormatError(f"{path}: damaged or not a plain torch.save file ({_line(error)})") from None


def array_of(path: Path, field: str, value: Any, dimensions: int) -> npt.NDArray[np.integer[Any]]:
    """A dense tensor of whole numbers as an array.

    Raises:
        FileFormatError: anything else, or a shape that claims more than is stored; the field is named.
    """
    array = tensor_array(path, field, value)
    if array.dtype.kind not in "iu" or array.ndim != dimensions:
        raise FileFormatError(
            f"{path}: {field} is {value.dtype} of shape {array.shape}, expected whole numbers in {dimensions} "
            "dimensions"
        )
    return array


def tensor_array(path: Path, field: str, value: Any) -> npt.NDArray[Any]:
    """A dense tensor of whole or floating-point numbers as an array; bfloat16 becomes float32.

    Raises:
        FileFormatError: as `array_of`.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise FileFormatError(f"{path}: {field} is a {type(value).__name__}, expected a tensor")
    shape = tuple(value.shape)
    whole = value.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    floating = value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if value.layout != torch.strided or not (whole or floating):
        raise FileFormatError(f"{path}: {field} is {value.dtype} of shape {shape}, expected a dense tensor of numbers")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise FileFormatError(f"{path}: {field} claims shape {shape}, more than the file stores of it")
    result: npt.NDArray[Any] = (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
    return result


def _check_names(path: Path, structure: bytes) -> None:
    """Refuses a pickle that names anything but tensors."""
    for opcode, argument, _ in pickletools.genops(structure):
        name = str(argument)
        storage = name.startswith("torch ") and name.endswith("Storage")
        if opcode.name in NAMED_OPCODES or (opcode.name == "GLOBAL" and name not in PLAIN and not storage):
            raise FileFormatError(
                f"{path}: holds {name if opcode.name == 'GLOBAL' else opcode.name}; a record holds tensors, lists, "
                "numbers and text only, refused"
            )


def _line(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        # torch goes on to advise loading without weights_only, which is what a stranger's file would want.
        return "its structure is not what torch.save writes for tensors, lists and numbers"
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
