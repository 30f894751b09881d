"""Token-expert pairs of a rank, in the order of its rows of expert weights, and back to sums a token.

R tokens here, K experts a token, N pairs computed here, S rows of expert weights, D hidden size, P slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """row_ND: inputs, those of one row of expert weights behind another's. count_S: inputs of each.

    token_N, weight_N: the token that each input is of, and its gate weight. tokens: R.
    """

    row_ND: Tensor
    count_S: Tensor
    token_N: Tensor
    weight_N: Tensor
    tokens: int

    @classmethod
    def of(cls, x_RD: Tensor, weight_RK: Tensor, slot_RK: Tensor, row_P: Tensor, rows: int, pairs: int) -> Pairs:
        """row_P: [P + 1] row of expert weights of each slot, `rows` where it stands elsewhere; slot -1 reads the last
        entry. pairs: how many stand here."""
        key_N = row_P[slot_RK.long()].flatten()
        order_N = key_N.argsort(stable=True)[:pairs]
        count_S = torch.zeros(rows + 1, dtype=torch.int64, device=key_N.device)
        count_S.scatter_add_(0, key_N, torch.ones_like(key_N))
        token_N = order_N.div(max(slot_RK.shape[1], 1), rounding_mode="floor")
        return cls(x_RD.index_select(0, token_N), count_S[:-1], token_N, weight_RK.flatten()[order_N], tokens=len(x_RD))

    def weighted_sum(self, y_ND: Tensor) -> Tensor:
        """[R, D] in float32: each token's outputs, weighted."""
        weighted_ND = y_ND.float() * self.weight_N[:, None]
        return weighted_ND.new_zeros(self.tokens, y_ND.shape[1]).index_add(0, self.token_N, weighted_ND)
