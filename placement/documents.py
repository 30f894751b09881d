"""JSON and YAML that nobody vouches for: no name twice in a mapping, and bounds for depth and what aliases stand for.

Parsers keep the last of two entries of one name, so that what a file says of a layer twice would be lost in silence.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from .errors import FileFormatError

MOST_ALIASED = 1 << 20
"""Values that all aliases of a file may stand for: 400 layers of 2,500 slots."""


def parse_json(text: str | bytes, origin: str) -> Any:
    """The value of a JSON text.

    Args:
        text: to parse. origin: of the text, for errors.

    Raises:
        FileFormatError: not JSON, truncated, nested too deep, a whole number of thousands of digits, or a name twice in
            an object.
    """

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise FileFormatError(f"{origin}: {twice[:60]!r} stands twice in an object; keep the entry that holds")
        return entries

    try:
        return json.loads(text, object_pairs_hook=members)
    except FileFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{origin}: not JSON, or truncated ({str(error)[:200]})") from None


def parse_yaml(text: str, origin: str, deepest: int) -> Any:
    """The value of a YAML text (of JSON, too), anchors and aliases included.

    Args:
        text: to parse. origin: of the text, for errors. deepest: collections inside one another that its format
            needs; what aliases stand for counts where they stand.

    Raises:
        FileFormatError: not YAML, truncated, a tag, a second document, nested deeper, a name twice in a mapping, or
            aliases that are circular or stand for more than a million values.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(yaml.parse(text, Loader=loader), origin, deepest)
        return yaml.load(text, Loader=loader)
    except FileFormatError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{origin}: neither JSON nor YAML, or truncated ({' '.join(str(error).split())[:200]})"
        ) from None


class _Open:
    """A collection that has begun: how many values it unfolds to so far and how deep they go; a mapping's names."""

    def __init__(self, anchor: str | None, names: set[str] | None) -> None:
        self.anchor, self.names = anchor, names
        self.children, self.values, self.depth = 0, 1, 1


def _check_events(events: Iterable[Any], origin: str, deepest: int) -> None:
    """Refuses what a loader chokes on or passes over, before anything is loaded."""
    import yaml

    anchored: dict[str, tuple[int, int]] = {}
    collections: list[_Open] = []
    aliased = documents = 0
    for event in events:
        where = f"{origin}: line {event.start_mark.line + 1}"
        values, depth, anchor = 1, 0, getattr(event, "anchor", None)
        if getattr(event, "tag", None):
            raise FileFormatError(f"{where}: the tag {event.tag[:40]!r} is not accepted; plain values are")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise FileFormatError(f"{where}: a second document; expected one")
            continue
        if isinstance(event, yaml.CollectionStartEvent):
            collections.append(_Open(anchor, set() if isinstance(event, yaml.MappingStartEvent) else None))
            if len(collections) > deepest:
                raise FileFormatError(f"{where}: nested deeper than this format goes")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            ended = collections.pop()
            values, depth, anchor = ended.values, ended.depth, ended.anchor
        elif isinstance(event, yaml.AliasEvent):
            known = anchored.get(str(anchor))
            if known is None:
                raise FileFormatError(f"{where}: *{str(anchor)[:40]} stands for nothing before it, or for itself")
            (values, depth), anchor = known, None
            aliased += values
            if aliased > MOST_ALIASED or len(collections) + depth > deepest:
                raise FileFormatError(
                    f"{where}: aliases stand for more than {MOST_ALIASED:,} values, or deeper than this format goes"
                )
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        if anchor:
            anchored[anchor] = (values, depth)
        if not collections:
            continue
        holder = collections[-1]
        if holder.names is not None and holder.children % 2 == 0:
            name = event.value if isinstance(event, yaml.ScalarEvent) else None
            if name is None or name in holder.names:
                said = "a name that is no plain value" if name is None else f"{name[:60]!r} stands twice in a mapping"
                raise FileFormatError(f"{where}: {said}; keep the entry that holds")
            holder.names.add(name)
        holder.children += 1
        holder.values += values
        holder.depth = max(holder.depth, depth + 1)
