"""Requests sent to a running vLLM or SGLang, and the routing that comes back with the answers.

vLLM started with --enable-return-routed-experts puts `routed_experts` into every choice (vllm/entrypoints/openai,
0.33); SGLang started with the same option does so for requests with `return_routed_experts`: in `meta_info` of
/generate, in `sglext` of the OpenAI endpoints (sglang/srt/managers/tokenizer_manager.py, entrypoints/openai, 0.5.23).
"""

from __future__ import annotations

import json
import os
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from .._http import Answer, Connections, UnansweredError, check_address
from ..placement.errors import EngineError, InputError
from ..placement.files import no_file, parse_json
from ..placement.statistics import RoutingStatistics
from ..placement.trace import RoutingTrace
from .readers.sglang import read_sglang_files

ANSWER_LIMIT = 1 << 28
"""Bytes an answer may have."""

_CONNECTIONS = Connections()


@dataclass(frozen=True)
class EngineServer:
    """Where an engine answers. key: sent as a bearer token. timeout: seconds to wait for an answer. quote: whether
    errors quote what was answered; not where others than those who named the address read them. most: bytes of an
    answer. connections: how it is called, where not from anywhere to anywhere.

    Redirects are not followed: they would lead the key elsewhere.
    """

    url: str
    key: str | None = None
    timeout: float = 300.0
    quote: bool = True
    most: int = ANSWER_LIMIT
    connections: Connections = field(default=_CONNECTIONS, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = check_address(self.url)
        if parts.query or parts.fragment:
            raise InputError(f"{self.url!r} is not the address of a server; expected http://host:port")

    def call(self, method: str, path: str, body: Any = None) -> bytes:
        """The answer to one request.

        Raises:
            EngineError: unreachable, no answer in time, or an answer other than 200; `status` tells which, 0 for none.
        """
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        url = self.url.rstrip("/") + path
        try:
            answer = self.connections.request(method, url, data, headers, timeout=self.timeout, most=self.most + 1)
        except UnansweredError as error:
            if error.timed_out:
                raise AnswerError(
                    f"{method} {url}: no answer in {self.timeout:g} s; the server is stuck or busy, or needs a longer "
                    "timeout"
                ) from None
            raise AnswerError(
                f"{method} {url}: {error}; is the engine running there, and reachable from here?"
            ) from None
        if not 200 <= answer.status < 300:
            raise AnswerError(f"{method} {url}: {self._refusal(answer)}", answer.status)
        if len(answer.body) > self.most:
            raise AnswerError(f"{method} {url}: an answer of more than {self.most:,} bytes")
        return answer.body

    def _refusal(self, answer: Answer) -> str:
        words = f"answered {answer.status}"
        if self.quote:
            body = answer.body[:300].decode("utf-8", "replace").strip()
            words += f" {answer.reason}: {body or 'nothing more'}"
        if answer.status in (401, 403):
            words += "; pass the server's key"
        elif 300 <= answer.status < 400:
            words += "; redirects are not followed: give the address it leads to"
        return words

    def json(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The answer, which must be a JSON object.

        Raises:
            EngineError: as `call`, or another answer.
        """
        content = self.call(method, path, body)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise AnswerError(
                f"{method} {self.url.rstrip('/')}{path}: answered no JSON object, so it is no engine's server"
            )
        return answer


class AnswerError(EngineError):
    """A call that failed. status: of the answer, 0 where none came."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


# SGLang's expert distribution recorder driven over HTTP: start, wait, stop, dump, and find the files. Source
# (0.5.23): `/start_expert_distribution_record` and its two sisters in sglang/srt/entrypoints/http_server.py answer
# 200 once the scheduler has done it; the dump goes to `SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR` (/tmp) of the
# server's machine, whole when the answer comes for the rank that answers, a moment later for the others. No endpoint
# sends the file. Starting without `--expert-distribution-recorder-mode` raises in the scheduler, which takes the
# server down: so the mode is asked first.


FOLDER_VARIABLE = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"
PATTERN = "expert_distribution_recorder_*.pt"
MODES = {"stat": "counts", "stat_approx": "counts", "per_pass": "counts", "per_token": "tokens"}
"""What each mode of the recorder keeps."""
SETTLED = 1.0
"""Seconds without a new file after which no more are waited for."""


@dataclass(frozen=True)
class SGLangRecording:
    """What a recording gave. mode: the server's. files: what it wrote. notes: what to know of the record."""

    record: RoutingTrace | RoutingStatistics
    mode: str
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def recorder_folder(folder: str | Path | None = None) -> Path:
    """Where the server writes, as far as this machine can know: the folder given, or SGLang's variable, or its
    default."""
    return Path(folder or os.environ.get(FOLDER_VARIABLE) or "/tmp")


def record_sglang(
    server: EngineServer,
    seconds: float,
    folder: Path,
    *,
    expected: str | None = None,
    patience: float = 60.0,
    progress: Callable[[float], None] | None = None,
) -> SGLangRecording:
    """Records what a running SGLang serves for so many seconds.

    folder: the server's recorder folder as this machine sees it. expected: "tokens" or "counts", to refuse a server
    that records the other. patience: seconds to wait for the files. progress: called with the share of time that is
    over. An interrupted recording is stopped on the server.

    Raises:
        InputError: no such folder. EngineError: unreachable, no SGLang, its recorder is off or in another mode, or no
            file came; says what to do. FileFormatError: the files hold no record, as when nothing was served meanwhile.
    """
    files, mode, info = dump_sglang(server, seconds, folder, expected=expected, patience=patience, progress=progress)
    notes = []
    if info.get("enable_eplb"):
        notes.append(
            "the server rebalances experts (--enable-eplb): each rebalance empties the recorder, and ids before it are "
            "mapped by the map after it; record without"
        )
    return SGLangRecording(read_sglang_files(files, folder), mode, tuple(files), tuple(notes))


def dump_sglang(
    server: EngineServer,
    seconds: float,
    folder: Path,
    *,
    expected: str | None = None,
    patience: float = 60.0,
    progress: Callable[[float], None] | None = None,
) -> tuple[list[Path], str, dict[str, Any]]:
    """The files that a running SGLang's recorder writes of so many seconds, its mode, and the server's settings.

    Raises:
        InputError, EngineError: as `record_sglang`.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; the server's {FOLDER_VARIABLE} must be a folder that this machine reads too"
        )
    info = server_info(server)
    mode = _mode(server, info, expected)
    processes = _processes(info) if mode in ("per_pass", "per_token") else 1
    before = set(folder.glob(PATTERN))
    server.call("POST", "/start_expert_distribution_record")
    try:
        _wait(seconds, progress)
    finally:
        server.call("POST", "/stop_expert_distribution_record")
    server.call("POST", "/dump_expert_distribution_record")
    return _new_files(folder, before, processes, patience), mode, info


def server_info(server: EngineServer) -> dict[str, Any]:
    """The server's settings, from `/server_info` or its older name.

    Raises:
        EngineError: unreachable, or not SGLang.
    """
    try:
        return server.json("GET", "/server_info")
    except AnswerError as error:
        if error.status != 404:
            raise
    try:
        return server.json("GET", "/get_server_info")
    except AnswerError as error:
        if error.status != 404:
            raise
        raise EngineError(
            f"{server.url} has neither /server_info nor /get_server_info: it is no SGLang server"
        ) from None


def _mode(server: EngineServer, info: dict[str, Any], expected: str | None) -> str:
    if "expert_distribution_recorder_mode" not in info:
        raise EngineError(f"{server.url} does not say expert_distribution_recorder_mode: it is no SGLang server")
    mode = info["expert_distribution_recorder_mode"]
    choice = "per_token" if expected == "tokens" else "stat"
    if mode is None:
        raise EngineError(
            f"{server.url}: SGLang's recorder is off; start the server with --expert-distribution-recorder-mode "
            f"{choice}"
        )
    if mode not in MODES:
        raise EngineError(f"{server.url}: records in mode {mode!r}, known are {', '.join(MODES)}")
    if expected is not None and MODES[mode] != expected:
        raise EngineError(
            f"{server.url}: records {MODES[mode]} (mode {mode}), {expected} are wanted; start the server with "
            f"--expert-distribution-recorder-mode {choice}"
        )
    return str(mode)


def _processes(info: dict[str, Any]) -> int:
    """Processes that write a file each."""
    sizes = [info.get(name) for name in ("tp_size", "pp_size")]
    if not info.get("enable_dp_attention"):
        sizes.append(info.get("dp_size"))
    count = 1
    for size in sizes:
        count *= size if type(size) is int and size > 0 else 1
    return count


def _wait(seconds: float, progress: Callable[[float], None] | None) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if progress is not None:
            progress(1 - left / seconds)
        time.sleep(min(left, 0.5))


def _new_files(folder: Path, before: set[Path], number: int, patience: float) -> list[Path]:
    """The files that came, all of them complete, once there are as many as wanted and no more come."""
    end = time.monotonic() + patience
    seen: list[Path] = []
    since = time.monotonic()
    while True:
        files = sorted(set(folder.glob(PATTERN)) - before)
        if files != seen:
            seen, since = files, time.monotonic()
        # The directory of a zip archive is written last.
        whole = [file for file in files if zipfile.is_zipfile(file)]
        if len(files) >= number and len(whole) == len(files) and time.monotonic() - since >= SETTLED:
            return files
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    count = f"{len(whole)} whole files of {number}" if files else "no file"
    raise EngineError(
        f"{folder}: {count} came in {patience:g} s after the dump; set the server's {FOLDER_VARIABLE} to a folder that "
        "all of its nodes and this machine share, and name it"
    )


Engine = Literal["vllm", "sglang"]
Request = dict[str, Any]
"""A completion ({"prompt": ...}) or chat ({"messages": ...}) request, in OpenAI's terms."""

OPTION = "--enable-return-routed-experts"
REQUEST_LIMIT = 1 << 24


@dataclass(frozen=True)
class Answers:
    """How many requests were answered with routing, and what the others were told."""

    answered: int
    failed: int
    first_failure: str = ""


def read_requests(path: Path) -> Iterator[Request]:
    """Requests of a text file: a prompt a line, or a JSON object with `prompt` or `messages` a line.

    Raises:
        InputError: no such file, a line that is neither, or longer than 16 MB; the line is named.
    """
    if not path.is_file():
        raise no_file(path)
    with path.open(encoding="utf-8", errors="replace") as handle:
        number = 0
        while line := handle.readline(REQUEST_LIMIT):
            number += 1
            if len(line) >= REQUEST_LIMIT:
                raise InputError(f"{path}: line {number} is longer than {REQUEST_LIMIT:,} characters")
            if not line.strip():
                continue
            if not line.lstrip().startswith("{"):
                yield {"prompt": line.rstrip("\n")}
                continue
            request = parse_json(line, f"{path}: line {number}, which begins like JSON")
            if ("prompt" in request) == ("messages" in request):
                raise InputError(f"{path}: line {number} must have prompt or messages, one of them")
            yield request


def record_requests(
    server: EngineServer,
    engine: Engine,
    requests: Iterator[Request],
    out: BinaryIO,
    *,
    max_tokens: int = 128,
    seconds: float | None = None,
    concurrency: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Answers:
    """Sends requests, and writes the routing of each answer as a line of JSON, as `read_routed_experts` takes it.

    max_tokens: tokens to answer with where a request does not say. seconds: no request is sent later than so long after
    the first; those on their way are waited for. concurrency: requests on their way at once. progress: called with the
    number of answers.

    Raises:
        EngineError: unreachable, set up without routing in its answers, or every request failed; says what to do.
    """
    defaults: Request = {"max_tokens": max_tokens, "stream": False}
    if engine == "vllm":
        defaults["model"] = _model(server)
    elif server_info(server).get("enable_return_routed_experts") is False:
        raise EngineError(f"{server.url}: SGLang does not keep routed experts; start the server with {OPTION}")
    started = time.monotonic()
    answered = failed = 0
    first_failure = ""
    stop = threading.Event()
    waiting: set[Future[Request]] = set()

    def ask(request: Request) -> Request:
        if stop.is_set():
            raise EngineError("stopped")
        return _ask(server, engine, {**defaults, **request})

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            more = True
            while more or waiting:
                while more and len(waiting) < concurrency:
                    request = None
                    if seconds is None or time.monotonic() - started < seconds:
                        request = next(requests, None)
                    more = request is not None
                    if request is not None:
                        waiting.add(pool.submit(ask, request))
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    try:
                        out.write(json.dumps(future.result()).encode() + b"\n")
                    except AnswerError as error:
                        # Refusing one request (too long a prompt) is the server's right; anything else ends it all.
                        if error.status != 400:
                            raise
                        failed += 1
                        first_failure = first_failure or str(error)
                    else:
                        answered += 1
                        if progress is not None:
                            progress(answered)
        finally:
            stop.set()
    if not answered:
        raise EngineError(first_failure or f"{server.url}: no request was sent; the file of requests is empty")
    return Answers(answered, failed, first_failure)


def _model(server: EngineServer) -> str:
    """The name vLLM serves its model under."""
    models = server.json("GET", "/v1/models").get("data")
    if not isinstance(models, list) or not models or not isinstance(models[0], dict) or "id" not in models[0]:
        raise EngineError(f"{server.url}: /v1/models names no model; is a vLLM server there?")
    return str(models[0]["id"])


def _ask(server: EngineServer, engine: Engine, request: Request) -> Request:
    """The routing of one answer, without the answer."""
    completions = "/v1/completions" if engine == "vllm" else "/generate"
    path = "/v1/chat/completions" if "messages" in request else completions
    if engine == "sglang":
        request = {**request, "return_routed_experts": True}
        if path == "/generate":
            request = _generate(request)
    answer = server.json("POST", path, request)
    reported = _routing(answer)
    if not reported:
        raise EngineError(f"{server.url}: an answer came without routed experts; start the server with {OPTION}")
    return reported


def _generate(request: Request) -> Request:
    """A completion request in the terms of SGLang's own endpoint, whose answer counts its tokens."""
    sampling = {"max_new_tokens": request["max_tokens"]}
    sampling |= {name: request[name] for name in ("temperature", "top_p", "top_k", "stop") if name in request}
    return {"text": request["prompt"], "sampling_params": sampling, "return_routed_experts": True}


def _routing(answer: Request) -> Request:
    """What `read_routed_experts` reads of an answer; empty where there is nothing."""
    routing: Request = {}
    for name in ("prompt_routed_experts", "routed_experts"):
        if answer.get(name) is not None:
            routing[name] = answer[name]
    for name in ("meta_info", "sglext"):
        inner = answer.get(name)
        if isinstance(inner, dict) and inner.get("routed_experts") is not None:
            counts = ("routed_experts", "prompt_tokens", "completion_tokens")
            routing[name] = {key: inner[key] for key in counts if key in inner}
    choices: Sequence[Any] = answer["choices"] if isinstance(answer.get("choices"), list) else ()
    inside = [_routing(choice) for choice in choices if isinstance(choice, dict)]
    if any(inside):
        routing["choices"] = inside
    return routing
