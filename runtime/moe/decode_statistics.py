"""What decoding sent and where its time went, on one rank.

G devices.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(eq=False)
class DecodeStatistics:
    """Of one rank, since `reset`. Parts of what travels:

    - `dispatch`: tokens on their way to experts
    - `combine`: outputs of experts on their way to the token
    - `gather`: keys and values of new tokens, to all ranks
    - `context`: keys and values of prompts, to all ranks
    - `ids`: new tokens

    copies: [G] rows sent to each other device, by part. bytes: [G] their bytes, without what describes them;
    side_bytes: [G] gate weights, slots and numbers of tokens beside them. all_to_alls: exchanges of dispatch and combine,
    by part, of all layers and iterations. seconds: spent or waited, by part, and `attention`, `experts`, `head`.
    iterations: of decoding. tokens: of this rank's sequences in them.
    """

    devices: int
    copies: dict[str, IntArray] = field(default_factory=dict)
    bytes: dict[str, IntArray] = field(default_factory=dict)
    side_bytes: dict[str, IntArray] = field(default_factory=dict)
    all_to_alls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    iterations: int = 0
    tokens: int = 0

    def reset(self) -> None:
        self.__init__(self.devices)  # type: ignore[misc]

    def sent(self, part: str, rows_G: IntArray, row_bytes: int, side_bytes: int = 0) -> None:
        """rows_G: [G] rows to each device, none to itself. row_bytes, side_bytes: of one row."""
        for table, factor in ((self.copies, 1), (self.bytes, row_bytes), (self.side_bytes, side_bytes)):
            if part not in table:
                table[part] = np.zeros(self.devices, dtype=np.int64)
            table[part] += rows_G * factor

    @contextlib.contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Adds the host's time inside the block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began

    def bytes_sent(self, *parts: str, to: IntArray | None = None) -> int:
        """Bytes of these parts (default: all), what describes the rows included; `to` some devices or all."""
        total = 0
        for table in (self.bytes, self.side_bytes):
            for part in parts or table:
                if part in table:
                    total += int((table[part] if to is None else table[part][to]).sum())
        return total
