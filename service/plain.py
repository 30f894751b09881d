"""Free-form JSON from requests that every later reader can take: valid text, finite numbers, bounded depth."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator

MOST_CHARACTERS = 20_000


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError):
        raise ValueError("must hold finite numbers and valid text, not nested too deep") from None
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{len(text)} characters of JSON, at most {MOST_CHARACTERS} are taken")
    return value


PlainObject = Annotated[dict[str, Any], AfterValidator(_plain)]
