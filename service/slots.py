"""How many slots a request may ask for: one number for all layers, or one for each."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

SlotCount = Annotated[int, Field(ge=1, le=65_536)]
SlotCounts = SlotCount | Annotated[list[SlotCount], Field(min_length=1, max_length=1024)]
