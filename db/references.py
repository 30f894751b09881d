"""What a stored row is known by: its content, as a fingerprint, and what people type, be it a name, a label, or the
first digits of an id.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from ..placement.errors import InputError, NotFoundError, nearest
from ..placement.plan import Plan, plan_to_dict
from ..placement.statistics import RoutingStatistics
from .schema import (
    DecisionRow,
    DeploymentRow,
    JobRow,
    ModelRow,
    Named,
    PlanRow,
    StatisticsRow,
    TopologyRow,
    UploadRow,
)

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


Kind = Literal["model", "topology", "statistics", "plan"]
NamedRow = ModelRow | TopologyRow | StatisticsRow | PlanRow
ROWS: dict[Kind, type[NamedRow]] = {
    "model": ModelRow,
    "topology": TopologyRow,
    "statistics": StatisticsRow,
    "plan": PlanRow,
}

NAME_LENGTH = 100
_DIGITS = re.compile(r"[0-9a-f]{4,64}")
_READS_AS_ID = re.compile(r"[0-9a-f]{8,64}")
_SHOWN = 8

R = TypeVar("R", ModelRow, TopologyRow, StatisticsRow, PlanRow)
Numbered = TypeVar("Numbered", DecisionRow, JobRow, UploadRow)


def find(session: Session, row: type[R], ref: str) -> R:
    """The one row `ref` means: its name, else the label only it has, else at least 4 first digits of its id.

    Raises:
        NotFoundError: no row; the nearest name is given. InputError: several; the candidates are named.
    """
    candidates = matches(session, row, ref)
    if len(candidates) > 1:
        # Enough digits to tell the candidates apart, whatever was typed.
        digits = max(ID_DIGITS, len(ref) + 4)
        listed = ", ".join(_title(candidate, digits) for candidate in candidates[:_SHOWN])
        more = f" and {len(candidates) - _SHOWN} more" if len(candidates) > _SHOWN else ""
        raise InputError(
            f"{ref!r} could be {len(candidates)} {_plural(row)}: {listed}{more}; give more digits, or the name"
        )
    return candidates[0]


def matches(session: Session, row: type[R], ref: str) -> Sequence[R]:
    """Every row `ref` may mean, by the first rule of `find` that gives any.

    Raises:
        NotFoundError: none; the nearest name is given.
    """
    storable(f"{kind_of(row)} reference", ref)
    rules: list[Any] = [row.name == ref]
    if issubclass(row, ModelRow | TopologyRow) and ref:
        rules.append(row.label == ref)
    if _DIGITS.fullmatch(ref.lower()):
        rules.append(row.fingerprint.startswith(ref.lower()))
    for rule in rules:
        candidates = session.scalars(select(row).where(rule).order_by(row.key)).all()
        if candidates:
            return candidates
    raise NotFoundError(_missing(session, row, ref))


def numbered_row(session: Session, kind: type[Numbered], what: str, key: int) -> Numbered:
    """The row of that key. what: it is called in errors.

    Raises:
        NotFoundError: there is none.
    """
    row = session.get(kind, key) if 0 <= key < 1 << 31 else None
    if row is None:
        raise NotFoundError(f"no {what} {key}")
    return row


def deployment_row(session: Session, name: str) -> DeploymentRow:
    """The deployment of that name.

    Raises:
        NotFoundError: there is none; the nearest is named.
    """
    row = session.scalar(select(DeploymentRow).where(DeploymentRow.name == name)) if name.isprintable() else None
    if row is None:
        names = session.scalars(select(DeploymentRow.name).limit(200)).all()
        raise NotFoundError(f"no deployment {name!r}; {nearest(name, names)}")
    return row


def id_of(session: Session, row: type[NamedRow], key: int | None) -> str | None:
    """The id people know a row by; None for none."""
    return None if key is None else str(session.scalar(select(row.fingerprint).where(row.key == key)))[:ID_DIGITS]


def claim_name(session: Session, row: NamedRow, name: str | None) -> None:
    """Gives `row` a name that no other row of its kind has; None changes nothing.

    Raises:
        InputError: the name cannot be one, is taken, or the row has another already.
    """
    if name is None or row.name == name:
        return
    check_name(name)
    kind = kind_of(type(row))
    if row.name is not None:
        raise InputError(
            f"this {kind} is stored already, as {row.name!r} ({row.fingerprint[:ID_DIGITS]}); "
            f"leave the name out, or rename it with Store.rename({kind!r}, {row.name!r}, {name!r})"
        )
    set_name(session, row, name)


def set_name(session: Session, row: NamedRow, name: str) -> None:
    """Renames `row`.

    Raises:
        InputError: the name cannot be one, or is taken.
    """
    check_free(session, type(row), name, row.fingerprint)
    row.name = name


def check_free(session: Session, table: type[NamedRow], name: str, fingerprint: str = "") -> None:
    """Raises InputError when `name` cannot be one, or another row than that of the fingerprint has it."""
    check_name(name)
    owner = session.scalar(select(table.fingerprint).where(table.name == name, table.fingerprint != fingerprint))
    if owner is not None:
        raise InputError(
            f"the name {name!r} is taken by {kind_of(table)} {owner[:ID_DIGITS]}; choose another, or rename or delete "
            "that one"
        )


def check_name(name: str) -> None:
    """Raises InputError when `name` would be hard to type, or could be mistaken for an id."""
    storable("name", name, NAME_LENGTH)
    if not name or not name.isprintable() or name != name.strip():
        raise InputError(f"name {name!r} must be printable, without blanks at its ends, and not empty")
    if name in (".", ".."):
        raise InputError(f"name {name!r} is a step between folders, which clients and proxies take out of addresses")
    if unicodedata.normalize("NFC", name) != name:
        raise InputError(
            f"name {name!r} ({name!a}) is not in Unicode's composed form (NFC): it would look like another one"
        )
    if _READS_AS_ID.fullmatch(name):
        raise InputError(f"name {name!r} reads as an id (8 or more hexadecimal digits only); add a word to it")


def kind_of(row: type[Named]) -> Kind:
    """How messages call rows of this table."""
    return next(kind for kind, known in ROWS.items() if known is row)


def _plural(row: type[Named]) -> str:
    return {"model": "models", "topology": "topologies", "statistics": "statistics", "plan": "plans"}[kind_of(row)]


def _title(row: Named, digits: int) -> str:
    return row.fingerprint[:digits] + (f" ({row.name})" if row.name else "")


def _missing(session: Session, row: type[NamedRow], ref: str) -> str:
    known: list[str] = [name for name in session.scalars(select(row.name).where(row.name.is_not(None))) if name]
    if issubclass(row, ModelRow | TopologyRow):
        known += [label for label in session.scalars(select(row.label).distinct()) if label]
    ids = [
        digits[:ID_DIGITS] for digits in session.scalars(select(row.fingerprint).order_by(row.key.desc()).limit(500))
    ]
    close = get_close_matches(ref, [*sorted(set(known)), *ids], n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if not ids:
        return f"no {kind_of(row)} {ref!r} is stored; this database has no {_plural(row)} yet"
    listed = sorted(set(known))[:_SHOWN] or ids[:_SHOWN]
    return f"no {kind_of(row)} {ref!r} is stored; {hint}known: {', '.join(listed)}" + (
        ", ..." if len(listed) == _SHOWN else ""
    )
