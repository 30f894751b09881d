"""Records with changed bytes, of every format: the typed error or a result. `test_read_fuzz` watches memory too."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
import warnings
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.profiler.read import open_routing, reader_of

WRITERS = Path(__file__).resolve().parents[2] / "benchmarks" / "reader_records.py"
spec = importlib.util.spec_from_file_location("reader_records", WRITERS)
assert spec is not None
assert spec.loader is not None
writers = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = writers
spec.loader.exec_module(writers)

WITH_TORCH = {"sglang stat", "sglang per_pass", "sglang per_token", "loads pt", "token imbalance"}
SIZES = {"sglang responses": 3000}
TOKENS = [b"-", b"9999999", b"[", b"null", b'"', b"1e999", b"}{", b"}\n{", b"1e9"]
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.one_of(st.binary(min_size=1, max_size=6), st.sampled_from(TOKENS))), max_size=4
)


@cache
def files_of(name: str) -> tuple[Path, dict[Path, bytes]]:
    """Where a small true record lies in its folder, and the bytes of its files."""
    with tempfile.TemporaryDirectory() as folder:
        made = writers.RECORDS[name](Path(folder), np.random.default_rng(1), writers.Shape(SIZES.get(name, 4)))
        files = [file for file in sorted(made.rglob("*")) if file.is_file()] if made.is_dir() else [made]
        return made.relative_to(folder), {file.relative_to(folder): file.read_bytes() for file in files}


def edited(content: bytes, edits: list[tuple[float, bytes]], cut: float = 2.0) -> bytes:
    changed = bytearray(content)
    for place, change in edits:
        at = int(place * len(changed))
        changed[at : at + len(change)] = change
    del changed[int(cut * len(changed)) + 1 :]
    return bytes(changed)


def in_archive(content: bytes, edits: list[tuple[float, bytes]], folder: Path) -> bytes:
    """The archive with a member changed and packed again: the pickled structure, or else the first."""
    (folder / "old").write_bytes(content)
    with zipfile.ZipFile(folder / "old") as old, zipfile.ZipFile(folder / "new", "w") as new:
        names = old.namelist()
        chosen = next((name for name in names if name.endswith("data.pkl")), names[0])
        for name in names:
            new.writestr(name, edited(old.read(name), edits) if name == chosen else old.read(name))
    return (folder / "new").read_bytes()


@pytest.mark.parametrize("name", writers.RECORDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), edits=EDITS, cut=st.floats(0, 2), inside=st.booleans(), told=st.booleans())
def test_changed_bytes_raise_only_the_typed_error(
    name: str, data: Any, edits: list[tuple[float, bytes]], cut: float, inside: bool, told: bool
) -> None:
    if name in WITH_TORCH:
        pytest.importorskip("torch")
    where, contents = files_of(name)
    which = data.draw(st.sampled_from(list(contents)))
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # What was left out is remarked; and pickletools warns of escapes in what was changed.
        warnings.simplefilter("ignore")
        folder = Path(scratch)
        for file, content in contents.items():
            (folder / "record" / file).parent.mkdir(parents=True, exist_ok=True)
            if file == which:
                packed = inside and content.startswith(b"PK")
                content = in_archive(content, edits, folder) if packed else edited(content, edits, cut)
            (folder / "record" / file).write_bytes(content)
        with contextlib.suppress(mp.InputError):
            reader = reader_of(folder / "record" / where)
            options = {"layers": 3, "top_k": 2, "num_experts": 8} if told else {}
            open_routing(
                folder / "record" / where, **{key: n for key, n in options.items() if key in reader.options}
            ).statistics()
