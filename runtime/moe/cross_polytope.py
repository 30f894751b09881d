"""Cross-polytope hashing: the nearest of the 2 d unit vectors along the axes of a randomly rotated space of d dimensions.

Andoni et al., Practical and Optimal LSH for Angular Distance, 2015; as in LSH-MoE, 2024. Here each hash projects to its
own small space: at full width nearly every token would have a code of its own.

N rows, D hidden size, H hashes, d dimensions of one hash.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotations(hidden_size: int, hashes: int, dimension: int, seed: int) -> Tensor:
    """[D, H * d] of float32: for each hash d orthonormal directions, drawn from `seed`; the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(hashes, hidden_size, dimension, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn).Q
    return basis.movedim(0, 1).reshape(hidden_size, hashes * dimension).float()


def digits(projected: Tensor, dimension: int) -> Tensor:
    """[N, H] hash values below 2 d of rows projected to [N, H * d]: twice the longest coordinate's index, one more if it
    is negative."""
    p_NHd = projected.view(len(projected), -1, dimension)
    longest = p_NHd.abs().argmax(dim=-1, keepdim=True)
    return (2 * longest + (p_NHd.gather(-1, longest) < 0)).squeeze(-1)
