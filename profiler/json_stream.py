"""JSON too large to parse at once, read value by value in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..placement.errors import FileFormatError

CHUNK = 1 << 20
VALUE_LIMIT = 1 << 26
"""Characters that one value may have."""
SPACE = " \t\r\n"
ENDS = SPACE + ",:]}"


class JsonStream:
    """A UTF-8 JSON file whose containers are walked and whose other values are decoded one at a time.

    Raises:
        FileFormatError: text that is not JSON where it is read, cut off, or a value of more than `limit` characters.
    """

    def __init__(self, path: Path, limit: int = VALUE_LIMIT) -> None:
        self._path = path
        self._limit = limit
        self._ended = False
        self._handle = path.open(encoding="utf-8")
        self._text = ""
        self._at = 0
        self._before = 0
        self._decoder = json.JSONDecoder()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()

    def fields(self) -> Iterator[str]:
        """The keys of the object that begins here; take each one's value before going on."""
        self._expect("{")
        if self._taken("}"):
            return
        while True:
            key = self.value()
            if not isinstance(key, str):
                raise self._wrong("expected a key")
            self._expect(":")
            yield key
            if not self._taken(","):
                break
        self._expect("}")

    def items(self) -> Iterator[None]:
        """One turn for each value of the array that begins here; take it before going on."""
        self._expect("[")
        if self._taken("]"):
            return
        while True:
            yield
            if not self._taken(","):
                break
        self._expect("]")

    def value(self) -> Any:
        """The value that begins here, decoded whole."""
        self._skip_space()
        while True:
            try:
                found, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                problem = str(error).split("\n")[0]
            else:
                # A number may go on past what was read: "1." of "1.5" decodes as 1.
                if self._text[end] in ENDS if end < len(self._text) else self._ended:
                    self._at = end
                    return found
                problem = "cut off, or a value that nothing ends"
            if len(self._text) - self._at > self._limit:
                raise self._wrong(f"a value of more than {self._limit:,} characters, or damaged")
            if self._ended:
                raise self._wrong(problem)
            # Doubled, so that decoding anew costs twice the decoding in all.
            self._more(max(CHUNK, len(self._text) - self._at))

    def next_mark(self) -> str:
        """The character that the next value begins with; empty at the end of the file."""
        self._skip_space()
        return self._text[self._at : self._at + 1]

    def end(self) -> None:
        """Checks that nothing follows."""
        if self.next_mark():
            raise self._wrong("expected the end")

    def _taken(self, mark: str) -> bool:
        self._skip_space()
        if self._at < len(self._text) and self._text[self._at] == mark:
            self._at += 1
            return True
        return False

    def _expect(self, mark: str) -> None:
        if not self._taken(mark):
            found = self._text[self._at : self._at + 20]
            raise self._wrong(f"expected {mark!r}, found {found!r}" if found else f"cut off, expected {mark!r}")

    def _skip_space(self) -> None:
        while True:
            while self._at < len(self._text) and self._text[self._at] in SPACE:
                self._at += 1
            if self._at < len(self._text) or not self._more(CHUNK):
                return

    def _more(self, wanted: int) -> bool:
        """Reads on, and forgets what was taken."""
        try:
            read = self._handle.read(wanted)
        except ValueError as error:
            raise FileFormatError(f"{self._path}: not UTF-8 text ({error})") from None
        self._before += self._at
        self._text, self._at = self._text[self._at :] + read, 0
        self._ended = not read
        return bool(read)

    def _wrong(self, problem: str) -> FileFormatError:
        return FileFormatError(f"{self._path}: damaged JSON after {self._before + self._at:,} characters: {problem}")
