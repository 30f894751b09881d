"""Whether a permuted checkpoint computes what the original does, or holds the bytes that it should."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...placement.errors import FileFormatError, UnsupportedError

if TYPE_CHECKING:
    import torch

PROMPTS, TOKENS = 3, 16
TOLERANCE = 1e-3
"""Largest difference of logits in float32, relative to the largest: sums over experts come in another order."""
MEMORY_A_BYTE = 6
"""Bytes in memory that a byte of the checkpoint may take: 8-bit weights become float32, with room for a tensor more."""


def differing_logits(original: Path, permuted: Path, architecture: str, nbytes: int) -> float | None:
    """The largest difference of the two models' logits on drawn prompts, relative to the largest logit.

    None where Transformers is not installed or has no such class, or where the model does not fit into memory.

    Raises:
        UnsupportedError: the logits differ by more than rounding.
    """
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if nbytes * MEMORY_A_BYTE > available:
        return None
    try:
        import transformers
    except ImportError:
        return None
    kind = getattr(transformers, architecture, None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        return None
    before, after = (_logits(kind, folder) for folder in (original, permuted))
    difference = float((before - after).abs().max() / before.abs().max().clamp(min=1e-9))
    if not difference <= TOLERANCE:
        raise UnsupportedError(
            f"{permuted}: logits differ by {difference:.2g} of the largest, rounding gives less than {TOLERANCE:g}; "
            f"how to permute a {architecture} is not known, and nothing was written"
        )
    return difference


def _logits(kind: Any, folder: Path) -> torch.Tensor:
    import torch

    model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (PROMPTS, TOKENS), generator=torch.Generator().manual_seed(0))
    arguments = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = ids
    with torch.no_grad():
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
