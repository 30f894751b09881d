"""A batch of sequences being decoded: what every rank knows of all of them.

B sequences of all ranks, in order of their ranks; G ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .context import Context
from .decode_statistics import IntArray
from .row_gather import RowGather


@dataclass(eq=False)
class DecodeState:
    """token_B: the newest token of each sequence, which has not been through the model. position_B: its place in the
    sequence. active_B: sequences that are not at their end. count_G: sequences of each rank.

    logits_RV, sequence_R: what the latest iteration made of the tokens that ended on this rank.
    """

    context: Context
    token_B: Tensor
    position_B: Tensor
    active_B: Tensor
    count_G: IntArray
    rank: int
    logits_RV: Tensor
    sequence_R: Tensor
    gathering: dict[int, RowGather] = field(default_factory=dict)

    @property
    def own(self) -> slice:
        """This rank's sequences among B."""
        first = int(self.count_G[: self.rank].sum())
        return slice(first, first + int(self.count_G[self.rank]))

    def at_home(self) -> tuple[Tensor, IntArray]:
        """(this rank's active sequences, [G] active sequences of every rank)."""
        number_B = torch.arange(len(self.token_B), device=self.token_B.device)
        own = number_B[self.own]
        home_B = np.repeat(np.arange(len(self.count_G)), self.count_G)
        active = np.bincount(home_B[self.active_B.cpu().numpy()], minlength=len(self.count_G))
        return own[self.active_B[self.own]], active
