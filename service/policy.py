"""What a deployment wants done for it, and when."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PlainSerializer, model_validator

from ..placement.engines import engine_profile
from ..placement.objective import Objective
from ..placement.steps import Batch, as_batches
from ..placement.validation import Record

MOST_CHARACTERS = 20_000


MOST_DEPTH = 32
LARGEST_NUMBER = 1 << 63


def check_plain(value: Any) -> Any:
    """JSON as it came, where every later reader can take it.

    Raises:
        ValueError: nested too deep, or a whole number of more than 64 bits.
    """
    level, depth = [value], 0
    while level:
        if depth > MOST_DEPTH:
            raise ValueError(f"nested more than {MOST_DEPTH} deep")
        if any(isinstance(each, int) and not -LARGEST_NUMBER <= each < LARGEST_NUMBER for each in level):
            raise ValueError("holds a whole number of more than 64 bits")
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        depth += 1
    return value


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    check_plain(value)
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError):
        raise ValueError("must hold finite numbers and valid text, not nested too deep") from None
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{len(text)} characters of JSON, at most {MOST_CHARACTERS} are taken")
    return value


PlainObject = Annotated[dict[str, Any], AfterValidator(_plain)]
"""Free-form JSON that every later reader can take: valid text, finite numbers, bounded depth."""


SlotCount = Annotated[int, Field(ge=1, le=65_536)]
SlotCounts = SlotCount | Annotated[list[SlotCount], Field(min_length=1, max_length=1024)]
"""One number for all layers, or one for each."""


Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]


AskedObjective = Annotated[
    Objective, PlainSerializer(lambda objective: objective.model_dump(mode="json", exclude_unset=True))
]
"""An objective that is kept as it was asked for: what it leaves out is the engine's to choose."""

AskedBatches = Annotated[list[Batch], Field(max_length=16), AfterValidator(lambda named: list(as_batches(named)))]

EngineName = Annotated[str, AfterValidator(lambda name: engine_profile(name).name)]


class Policy(Record):
    """How a deployment's plans are solved, judged and published.

    engine: what plans are for; they are solved within its limits, and no other plan is put in force. solver, options,
    seconds, slots, objective: of its solves; slots is one number, or one for each layer.
    batches: the steps the deployment runs, as `Problem` takes them: {"phase": "decode", "tokens_per_device": 64,
    "weight": 0.9}; none for the recorded or usual ones. step_tokens: for one batch, decode steps of so many tokens over
    all devices.
    block: neighbouring windows taken as one observation. recent: newest windows that a check compares with those the
    plan was judged on; at least 8 blocks, since half of them are held out to judge on. false_alarm: chance of an alarm
    at a check although nothing changed. min_regret: predicted loss against a fresh solve from which on a change
    matters. publish: "approval" leaves what `decide` would apply to a person, "automatic" puts it in force. confidence,
    horizon_steps: of `decide`. restart_seconds: in which nothing is served, where the engine takes a plan only when it
    is started anew: decisions charge it in place of the moves; none where it is not known, and they say so.
    keep_windows, join, join_after_hours: how many windows are kept, and how many old ones are joined into one, and
    when. keep_traces: uploaded traces kept.
    """

    objective: AskedObjective = Objective()
    engine: EngineName | None = None
    solver: str = "search"
    options: PlainObject = {}  # noqa: RUF012
    seconds: Annotated[float, Field(gt=0.0, le=3600.0)] = 30.0
    slots: SlotCounts | None = None
    batches: AskedBatches = []  # noqa: RUF012
    step_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    block: Annotated[int, Field(ge=1, le=1000)] = 4
    recent: Annotated[int, Field(ge=8, le=10_000)] = 64
    false_alarm: Fraction = 0.001
    min_regret: Annotated[float, Field(ge=0.0, le=10.0)] = 0.02
    publish: Literal["approval", "automatic"] = "approval"
    confidence: Annotated[float, Field(ge=0.5, lt=1.0)] = 0.95
    horizon_steps: Annotated[float, Field(gt=0.0)] = 100_000.0
    restart_seconds: Annotated[float, Field(ge=0.0, le=1e6)] | None = None
    keep_windows: Annotated[int, Field(ge=64, le=10_000_000)] = 20_000
    join: Annotated[int, Field(ge=2, le=1000)] = 16
    join_after_hours: Annotated[float, Field(ge=1.0, le=10_000.0)] = 24.0
    keep_traces: Annotated[int, Field(ge=1, le=100)] = 4

    @model_validator(mode="before")
    @classmethod
    def _is_plain(cls, data: Any) -> Any:
        return check_plain(data)

    @property
    def asked(self) -> tuple[Batch, ...]:
        """The batches that were named."""
        return (Batch("decode", tokens=self.step_tokens),) if self.step_tokens is not None else tuple(self.batches)

    @property
    def searched(self) -> int:
        """Newest windows, those since the plan was judged among them, that a check searches for a change."""
        return 4 * self.recent

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.batches and self.step_tokens is not None:
            raise ValueError("batches and step_tokens say the same; give batches")
        if self.recent < 8 * self.block:
            raise ValueError(f"recent ({self.recent}) must be at least 8 blocks of {self.block} windows")
        if self.restart_seconds is not None and (self.engine is None or not engine_profile(self.engine).restart):
            raise ValueError(
                "restart_seconds is of an engine that takes plans only when it is started anew; "
                + ("name the engine" if self.engine is None else f"{self.engine} takes them while it runs")
            )
        return self

    def as_document(self) -> dict[str, Any]:
        """The policy as plain data."""
        return self.model_dump(mode="json")
