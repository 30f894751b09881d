"""Content as plain data, and its fingerprint: what makes two stored things the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from ..placement.errors import InputError
from ..placement.plan import Plan, plan_to_dict
from ..placement.statistics import RoutingStatistics

ID_DIGITS = 12


def plain(what: str, data: Any) -> Any:
    """`data` as it comes back from JSON, so that it has the same fingerprint before and after storing.

    Raises:
        InputError: not plain data, or holds NaN or an infinity.
    """
    try:
        return json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{what} cannot be stored: {error}; expected finite numbers, text, lists and mappings"
        ) from None


def fingerprint(data: Any) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def plan_fingerprint(document: dict[str, Any]) -> str:
    """What makes two plans the same: all but how long the solver took, so that solving again adds no second plan."""
    made = {key: value for key, value in document["provenance"].items() if key not in ("seconds", "history")}
    return fingerprint({**document, "provenance": made})


def id_of_plan(plan: Plan) -> str:
    """The id a plan has where it is stored, before it is."""
    return plan_fingerprint(plain("plan", plan_to_dict(plan)))[:ID_DIGITS]


def statistics_fingerprint(statistics: RoutingStatistics) -> str:
    """What makes two statistics the same: the counts and the sample, not the bytes of the file they are in."""
    sample = statistics.sample.fingerprint if statistics.sample is not None else ""
    digest = hashlib.sha256(repr((statistics_about(statistics), statistics.fingerprint, sample)).encode())
    for array in (statistics.load, statistics.window_workload, statistics.coactivation, statistics.transitions):
        if array is not None:
            digest.update(repr((array.dtype.str, array.shape)).encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def statistics_about(statistics: RoutingStatistics) -> dict[str, Any]:
    """The figures of `StatisticsRecord` by name."""
    return {
        "experts": int(statistics.experts),
        "moe_layers": [int(layer) for layer in statistics.moe_layers],
        "top_k": None if statistics.top_k is None else int(statistics.top_k),
        "workloads": list(statistics.workloads),
        "windows": len(statistics.load),
        "tokens": int(statistics.tokens),
        "has_coactivation": statistics.coactivation is not None,
        "has_transitions": statistics.transitions is not None,
        "sample_tokens": 0 if statistics.sample is None else statistics.sample.num_tokens,
    }


def storable(what: str, text: str, limit: int | None = None) -> str:
    """`text` when every backend can keep it.

    Raises:
        InputError: longer than `limit`, or holds a zero byte or half a surrogate pair.
    """
    if limit is not None and len(text) > limit:
        raise InputError(f"{what} has {len(text)} characters, at most {limit} are stored")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} ({text!r}) is not valid Unicode text") from None
    if "\0" in text:
        raise InputError(f"{what} ({text!r}) holds a zero byte")
    return text


def sha256_digits(what: str, text: str) -> str:
    """`text` when it is empty or a SHA-256 in hexadecimal.

    Raises:
        InputError: it is neither.
    """
    if text and (len(text) != 64 or set(text) - set("0123456789abcdef")):
        raise InputError(f"{what} ({text!r}) must be 64 hexadecimal digits (a SHA-256), or empty")
    return text
