"""JSON that nobody vouches for: whatever it is, an error that names the file, never the parser's own."""

from pathlib import Path

import pytest

import moeplace as mp
from moeplace.placement.files import parse_json

WRONG = {
    "cut off": '{"a": [1, 2',
    "nested too deep": "[" * 100_000,
    "a number of more digits than Python converts": '{"a": ' + "9" * 5000 + "}",
    "a name twice": '{"a": 1, "a": 2}',
    "no UTF-8": b'{"a": "\xff"}',
    "nothing": "",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())
def test_json_that_cannot_be_read_names_its_origin(text: str | bytes) -> None:
    with pytest.raises(mp.FileFormatError, match="^plan.json: "):
        parse_json(text, "plan.json")


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())
def test_plans_and_configurations_are_read_by_it(text: str | bytes, tmp_path: Path) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(mp.InputError, match="config.json: "):
        mp.Plan.load(tmp_path / "config.json")
    with pytest.raises(mp.InputError, match="config.json: "):
        mp.ModelSpec.from_config(tmp_path / "config.json")
