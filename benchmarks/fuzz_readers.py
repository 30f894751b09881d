"""Mutated records against every reader: the typed error or a result, bounded memory, no code run.

    python -m benchmarks fuzz_readers --count 100000 --seed 0 [--only "sglang stat" ...]

For each kind of record a small true one is changed and read, `count` times: bytes flipped, cut out, doubled, moved,
numbers put at their limits, tokens of the formats inserted, the end cut off; in archives (.pt, .npz) half the time
inside a member that is packed again, so that what is behind the checksum is reached. Half of the inputs go through
`read_any`, the others straight to the reader. An input fails when anything but InputError comes out, when the process
would grow by more than 256 MiB (RLIMIT_AS; the files have some kilobytes), when the peak of traced memory (Python's and
numpy's allocations, traced on every tenth input) passes 16 MiB + 64 times the files' size, when reading takes more than
5 s of processor time, or when an audit hook sees code run, a process started, a module loaded from elsewhere, a socket,
or a file opened to write. Failing inputs are kept in --keep. The run fails where any failed.
"""

from __future__ import annotations

import argparse
import codecs
import importlib
import io
import resource
import shutil
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from reader_records import RECORDS, Shape
from runner import Report

import moeplace as mp
from moeplace.profiler.read import read_any, reader_of

FREE_BYTES, MULTIPLE = 1 << 24, 64
GROWTH = 1 << 28
TRACED = 10
SLOW = 5.0
SIZES = {"load history": 3, "sglang stat": 4, "sglang per_pass": 3, "trtllm": 2, "sglang responses": 3000}
TOKENS = (
    b"\x00", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x80", b"\xff" * 8, b"-1", b"0", b"1e308",
    b"NaN", b"null",
    b"[", b"]", b"{", b"}", b'"', b",", b"99999999999999999999", b"[[[[[[[[[[[[[[[[", b"true",
    b"\xf0\x9f", b"\x93NUMPY\x01\x00",
    b"cos\nsystem\n(X\x04\x00\x00\x00exitt\x85R", b"c__builtin__\neval\n(X\x01\x00\x00\x001tR", b"\x93", b"R",
    b"b", b"\x81",
    b"'|O'", b"'<i8'", b"(1000000, 1000000, 8)", b"(-1, 2, 2)", b"PK\x05\x06", b"PK\x01\x02", b"\x00" * 64,
)  # fmt: skip
WATCHED = {
    "exec", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.bind",
    "ctypes.dlopen", "ctypes.call_function", "os.remove", "os.rename", "os.mkdir", "shutil.rmtree", "os.putenv",
}  # fmt: skip


@dataclass
class Watch:
    """What the audit hook saw while a record was read."""

    reading: bool = False
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.reading:
            return
        if event in WATCHED:
            self.seen.append(f"{event} {str(arguments)[:100]}")
        elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            self.seen.append(f"open {arguments[:2]}")


WATCH = Watch()


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one to four changes."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(0, len(data) + 1))
        width = int(rng.integers(1, 17))
        match int(rng.integers(0, 9)):
            case 0:
                data[at : at + width] = rng.bytes(width)
            case 1 if at < len(data):
                data[at] ^= 1 << int(rng.integers(0, 8))
            case 2:
                del data[at : at + int(rng.integers(1, 200))]
            case 3:
                end = at + int(rng.integers(1, 400))
                data[at:at] = data[at:end]
            case 4:
                del data[at:]
            case 5:
                other = int(rng.integers(0, len(data) + 1))
                data[at : at + width] = data[other : other + width]
            case 6:
                token = TOKENS[int(rng.integers(0, len(TOKENS)))]
                data[at : at + len(token)] = token
            case 7:
                data[at:at] = TOKENS[int(rng.integers(0, len(TOKENS)))]
            case _:
                _change_number(data, rng)
    return bytes(data)


def _change_number(data: bytearray, rng: np.random.Generator) -> None:
    """Puts another number where the text has one, near a random place."""
    at = int(rng.integers(0, len(data) + 1))
    digits = b"0123456789"
    start = next((i for i in range(at, min(at + 300, len(data))) if data[i] in digits), None)
    if start is None:
        return
    end = start
    while end < len(data) and data[end] in digits and end - start < 20:
        end += 1
    extremes = [-1, 0, 1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**62, 2**63, 2**64, 10**30]
    pick = int(rng.integers(0, len(extremes) + 2))
    number = extremes[pick] if pick < len(extremes) else int(rng.integers(0, 300))
    data[start:end] = str(number).encode()


def mutated_file(content: bytes, rng: np.random.Generator) -> bytes:
    """The same, half the time inside a member of an archive."""
    if not content.startswith(b"PK") or rng.random() < 0.5:
        return mutated(content, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        # The structure is where readers can go wrong; the numbers behind it are checked too.
        wanted = [n for n in names if n.endswith(("data.pkl", ".npy", ".json"))]
        chosen = (
            wanted[int(rng.integers(0, len(wanted)))]
            if wanted and rng.random() < 0.8
            else names[int(rng.integers(0, len(names)))]
        )
        for info in old.infolist():
            member = old.read(info)
            name = info.filename
            packed = zipfile.ZIP_DEFLATED if rng.random() < 0.02 else info.compress_type
            new.writestr(name, mutated(member, rng) if name == chosen else member, compress_type=packed)
    return out.getvalue()


class Target:
    """A kind of record in a scratch folder: its true bytes, and a changed copy to read."""

    def __init__(self, name: str, scratch: Path) -> None:
        base = scratch / "base"
        base.mkdir(parents=True)
        made = RECORDS[name](base, np.random.default_rng(1), Shape(SIZES.get(name, 12)))
        self.reader = reader_of(made)
        files = sorted(file for file in made.rglob("*") if file.is_file()) if made.is_dir() else [made]
        self.contents = {file.relative_to(base): file.read_bytes() for file in files}
        self.scratch = scratch / "changed"
        self.path = self.scratch / made.relative_to(base)
        for file, content in self.contents.items():
            (self.scratch / file).parent.mkdir(parents=True, exist_ok=True)
            (self.scratch / file).write_bytes(content)
        self.changed = next(iter(self.contents))
        self.reader.read(made)

    def write(self, rng: np.random.Generator) -> int:
        """Changes one file, the others being as they were; returns the size of all."""
        names = list(self.contents)
        # Creating a file takes far longer than reading one: the others stay as they are.
        (self.scratch / self.changed).write_bytes(self.contents[self.changed])
        self.changed = names[int(rng.integers(0, len(names)))]
        content = mutated_file(self.contents[self.changed], rng)
        (self.scratch / self.changed).write_bytes(content)
        return len(content) + sum(len(other) for name, other in self.contents.items() if name != self.changed)

    def read(self, told: bool) -> Any:
        return read_any(self.path) if told else self.reader.read(self.path)


def trial(target: Target, rng: np.random.Generator, traced: bool) -> tuple[str, float, int, float]:
    """(what came of one input, seconds, peak bytes, peak over size), the last two 0 where memory is not traced."""
    size = target.write(rng)
    told = bool(rng.random() < 0.5)
    WATCH.seen.clear()
    if traced:
        tracemalloc.start()
    # Of the processor: a machine that others use stands still for seconds at times.
    begin = time.process_time()
    WATCH.reading = True
    try:
        target.read(told)
        outcome = "read"
    except mp.InputError:
        outcome = "refused"
    except Exception as error:  # noqa: BLE001 - whatever else comes out is what is looked for
        outcome = f"FAILED {type(error).__name__}: {str(error)[:200]}"
    finally:
        WATCH.reading = False
    seconds = time.process_time() - begin
    peak = tracemalloc.get_traced_memory()[1]
    if traced:
        tracemalloc.stop()
    if WATCH.seen:
        outcome = f"FAILED ran {WATCH.seen[0]}"
    elif seconds > SLOW:
        outcome = f"FAILED took {seconds:.1f} s"
    elif peak > FREE_BYTES + MULTIPLE * size:
        outcome = f"FAILED took {peak:,} bytes for {size:,}"
    return outcome, seconds, peak, peak / max(size, 1)


def fuzz(name: str, count: int, seed: int, keep: Path | None = None) -> tuple[tuple[object, ...], list[str]]:
    """Reads `count` changed records of one kind; the row of the table, and what failed."""
    rng = np.random.default_rng([seed, list(RECORDS).index(name)])
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    most_seconds = most_peak = most_ratio = 0.0
    # In memory, so that the disk is not what is waited for.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        target = Target(name, Path(folder))
        begin = time.perf_counter()
        for number in range(count):
            outcome, seconds, peak, ratio = trial(target, rng, number % TRACED == 0)
            outcomes[outcome.split()[0]] += 1
            most_seconds, most_peak, most_ratio = (
                max(most_seconds, seconds),
                max(most_peak, peak),
                max(most_ratio, ratio),
            )
            if outcome.startswith("FAILED"):
                failures.append(outcome)
                if keep is not None and len(failures) <= 20:
                    where = keep / f"{name.replace(' ', '_')}-{number}"
                    shutil.copytree(target.scratch, where, dirs_exist_ok=True)
        taken = time.perf_counter() - begin
    row = (name, count, outcomes["read"], outcomes["refused"], outcomes["FAILED"])
    return (*row, 1e3 * most_seconds, most_peak / 1e6, most_ratio, count / taken), sorted(set(failures))[:10]


def limit_memory() -> None:
    """Lets the process grow by so much and no more."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + GROWTH, resource.RLIM_INFINITY))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(RECORDS), default=list(RECORDS))
    parser.add_argument("--keep", type=Path, help="folder for inputs that fail")


def run(options: argparse.Namespace, report: Report) -> None:
    counted = dict.fromkeys(("inputs", "read", "refused", "failed"), ",")
    formats = counted | {"most ms": ".1f", "most MB": ".2f", "most memory over size": ".1f", "inputs a second": ",.0f"}
    # What readers, json, zipfile and torch.load import on odd input only, which an audit hook sees as code that runs.
    for encoding in (
        "utf-16",
        "utf-16-le",
        "utf-16-be",
        "utf-32",
        "utf-32-le",
        "utf-32-be",
        "utf-8-sig",
        "cp437",
        "raw_unicode_escape",
        "unicode_escape",
        "ascii",
    ):
        codecs.lookup(encoding)
    for module in (
        "ijson",
        "torch.utils.serialization.config",
        "torch.nested._internal.ops",
        "torch.nested._internal.nested_tensor",
        "torch._subclasses.schema_check_mode",
    ):
        importlib.import_module(module)
    sys.addaudithook(WATCH)
    for name in options.only:
        fuzz(name, 50, options.seed + 1)
        limit_memory()
        row, failures = fuzz(name, options.count, options.seed, options.keep)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        report.table("fuzzing", ("record", *formats), formats).row(*row)
        if failures:
            report.failure = "\n".join([*filter(None, [report.failure]), f"{name}: {'; '.join(failures)}"])
