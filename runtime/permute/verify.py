"""Whether a permuted checkpoint computes what the original does, or holds the bytes that it should."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...placement.errors import FileFormatError, UnsupportedError
from ...placement.memory import free_memory

if TYPE_CHECKING:
    import torch

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
